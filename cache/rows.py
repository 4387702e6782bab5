"""Between the values of :mod:`.entry` and the rows of :mod:`.schema`, checked in both directions.

A store may come from anybody, so nothing in a row is trusted: a spec is parsed, a config is validated, numbers are
numbers. What cannot be checked here (does this config suit this GPU?) is the business of :mod:`.lookup`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codegen.spec import SPEC_FIELDS, Config, KernelSpec, SpecError
from .entry import DEFAULT, MEASURED, PREDICTED, Binary, BinaryKey, Entry, Environment, Evaluation
from .errors import CorruptRowError, InvalidEntryError
from .schema import BinaryRow, EntryRow

PROVENANCES = (MEASURED, PREDICTED, DEFAULT)
"""Best first."""

_SPEC_COLUMNS = tuple(name for name in SPEC_FIELDS if hasattr(EntryRow, name))
"""The fields of a spec with a column of their own. Flags that nobody searches by are in the spec's text only."""

_ENVIRONMENT_TEXTS = ("triton", "torch", "driver", "gpu_name", "doratune", "architecture")
_COUNTS = ("registers", "spills", "shared_bytes")
_FIGURES = ("us", "floor_us", "error", "unfused_us")

_SEAL = b"doratune-1\0"
"""What a sealed image begins with. A cubin shrinks to a fifth as xz, which unpacks in 2 ms; to a quarter with zlib."""
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
_MOST_IMAGE_BYTES = 1 << 26
"""A few kilobytes of xz can unpack to any size; the cubins of this package have up to 150 kB."""


@dataclass(frozen=True)
class Candidate:
    """What lookup needs to rank an entry, without its source text and samples."""

    spec: KernelSpec
    config: Config
    template_digest: str
    provenance: str


class _BadValue(ValueError):
    """A field does not hold what it should; turned into a public error by the callers below."""


def entry_values(entry: Entry) -> dict[str, Any]:
    """Return the column values of ``entry``.

    Raises:
        InvalidEntryError: a field has the wrong type or range; the message names the spec and the field.
    """
    evaluation, environment = entry.evaluation, entry.environment
    values: dict[str, Any] = {"spec": str(entry.spec)}
    values |= {name: getattr(entry.spec, name) for name in _SPEC_COLUMNS}
    values |= {name: getattr(evaluation, name) for name in (*_FIGURES, *_COUNTS, "provenance", "trials")}
    values |= {name: getattr(environment, name) for name in _ENVIRONMENT_TEXTS}
    values |= {
        "config": json.dumps(entry.config.to_dict(), sort_keys=True),
        "template_digest": entry.template_digest,
        "source_digest": entry.source_digest,
        "source": entry.source,
        "samples_us": json.dumps(list(evaluation.samples_us)),
        "tuned_gpu": environment.gpu,
        "created_at": entry.created_at,
    }
    try:
        _check(values)
        _samples(values["samples_us"])
    except _BadValue as problem:
        raise InvalidEntryError(f"entry {entry.spec}: {problem}; nothing was stored") from None
    return values


def entry_of(row: EntryRow, store: str) -> Entry:
    """Return the entry that ``row`` of ``store`` (its location, for the message) holds.

    Raises:
        CorruptRowError: the row does not hold a valid entry.
    """
    values = {column.key: getattr(row, column.key) for column in EntryRow.__mapper__.column_attrs}
    try:
        _check(values)
        return Entry(
            spec=_spec(values),
            config=_config(values["config"]),
            template_digest=row.template_digest,
            source_digest=row.source_digest,
            source=row.source,
            evaluation=Evaluation(
                provenance=row.provenance,
                us=row.us,
                floor_us=row.floor_us,
                samples_us=_samples(row.samples_us),
                error=row.error,
                registers=row.registers,
                spills=row.spills,
                shared_bytes=row.shared_bytes,
                trials=row.trials,
                unfused_us=row.unfused_us,
            ),
            environment=Environment(gpu=row.tuned_gpu, **{name: values[name] for name in _ENVIRONMENT_TEXTS}),
            created_at=row.created_at,
        )
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, row.id, values["spec"], problem) from None


CANDIDATE_COLUMNS = (EntryRow.id, EntryRow.spec, EntryRow.config, EntryRow.template_digest, EntryRow.provenance)
CANDIDATE_COLUMNS += tuple(getattr(EntryRow, name) for name in _SPEC_COLUMNS)


def candidate_of(row: Mapping[Any, Any], store: str) -> Candidate:
    """Return the candidate in a row of :data:`CANDIDATE_COLUMNS`.

    Raises:
        CorruptRowError: the row does not hold a valid one.
    """
    values: dict[str, Any] = dict(row)
    try:
        _check_provenance(values)
        return Candidate(_spec(values), _config(values["config"]), values["template_digest"], values["provenance"])
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, values["id"], values["spec"], problem) from None


def binary_values(binary: Binary) -> dict[str, Any]:
    """Return the column values of ``binary``, its image compressed and sealed.

    Raises:
        InvalidEntryError: the metadata is no JSON object, the image is empty or not bytes, or a key is empty.
    """
    for name in BinaryKey._fields:
        if not getattr(binary, name):
            raise InvalidEntryError(f"binary of kernel {binary.kernel!r}: {name} is empty; nothing was stored")
    try:
        _check_metadata(binary.metadata)
        if not isinstance(binary.image, bytes) or not binary.image:
            raise _BadValue("the image is empty or no bytes")
    except _BadValue as problem:
        raise InvalidEntryError(f"binary of kernel {binary.kernel!r}: {problem}; nothing was stored") from None
    return {
        "source_digest": binary.code_digest,
        "kernel": binary.kernel,
        "triton": binary.triton,
        "architecture": binary.architecture,
        "metadata": binary.metadata,
        "image": _seal_of(binary) + lzma.compress(binary.image, check=lzma.CHECK_NONE),
    }


def binary_of(row: BinaryRow, store: str) -> Binary:
    """Return the binary that ``row`` of ``store`` holds.

    Raises:
        CorruptRowError: some part of the row is not what was stored.
    """
    try:
        _check_metadata(row.metadata_json)
        if not isinstance(row.image, bytes) or not row.image.startswith(_SEAL):
            raise _BadValue("the image is not one that a store has sealed")
        image = _unpacked(row.image[_SEAL_BYTES:])
        binary = Binary(row.code_digest, row.kernel, row.triton, row.architecture, row.metadata_json, image)
        if _seal_of(binary) != row.image[:_SEAL_BYTES]:
            raise _BadValue("its parts are not those that were stored together")
    except _BadValue as problem:
        raise CorruptRowError(
            f"{store}: binary {row.id} (kernel {row.kernel!r}, Triton {row.triton}): {problem}. "
            f"Delete row {row.id} of table {BinaryRow.__tablename__}: it is compiled again when needed."
        ) from None
    return binary


def _seal_of(binary: Binary) -> bytes:
    """What stands before the compressed image: a digest that ties key, metadata and image to one another.

    One wrong digit in the metadata's shared memory, or a row under another's key, would make a kernel that writes where
    it should not. Neither SQLite nor the image itself would tell.
    """
    parts = (*(str(getattr(binary, name)) for name in BinaryKey._fields), binary.metadata)
    digest = hashlib.sha256("\0".join(parts).encode() + b"\0" + binary.image)
    return _SEAL + digest.digest()


def _unpacked(compressed: bytes) -> bytes:
    unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_IMAGE_BYTES)
    try:
        image = unpacking.decompress(compressed, _MOST_IMAGE_BYTES)
    except lzma.LZMAError as problem:
        raise _BadValue(f"the image does not unpack: {problem}") from None
    if not unpacking.eof:
        raise _BadValue("the image is cut off, or of no kernel's size")
    return image


def _corrupt(store: str, row_id: int, spec: object, problem: Exception) -> CorruptRowError:
    return CorruptRowError(
        f"{store}: entry {row_id} ({spec!r}) is damaged: {problem}. "
        f"Tune the spec again to replace it, or delete row {row_id} of table {EntryRow.__tablename__}."
    )


def _check(values: dict[str, Any]) -> None:
    """Check the fields that have no type of their own to check them."""
    _check_provenance(values)
    for name in _FIGURES:
        if values[name] is not None:
            _check_figure(name, values[name])
    for name in (*_COUNTS, "trials"):
        value = values[name]
        optional = value is None and name != "trials"
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise _BadValue(f"{name}={value!r} is not a whole number of at least 0")
    for name in (*_ENVIRONMENT_TEXTS, "tuned_gpu", "created_at", "source", "source_digest", "template_digest"):
        if not isinstance(values[name], str):
            raise _BadValue(f"{name}={values[name]!r} is not a text")
    for name in ("template_digest", "source_digest", "architecture"):
        if not values[name]:
            raise _BadValue(f"{name} is empty")


def _check_provenance(values: dict[str, Any]) -> None:
    if values["provenance"] not in PROVENANCES:
        raise _BadValue(f"provenance={values['provenance']!r} is none of {', '.join(PROVENANCES)}")


def _check_figure(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise _BadValue(f"{name}={value!r} is not a finite number of at least 0")


def _spec(values: dict[str, Any]) -> KernelSpec:
    if not isinstance(values["spec"], str):
        raise _BadValue(f"spec={values['spec']!r} is not a text")
    spec = KernelSpec.parse(values["spec"])
    if str(spec) != values["spec"]:
        raise _BadValue(f"the spec is not in its canonical form {str(spec)!r}")
    for name in _SPEC_COLUMNS:
        if getattr(spec, name) != values[name]:
            raise _BadValue(f"the column {name}={values[name]!r} contradicts the spec")
    return spec


def _config(text: object) -> Config:
    data = _json(text, "config")
    try:
        return Config.from_dict(data)
    except TypeError as problem:  # a variant or parameter of the wrong type
        raise _BadValue(f"config {text!r}: {problem}") from None


def _samples(text: object) -> tuple[float, ...]:
    data = _json(text, "samples_us")
    if not isinstance(data, list):
        raise _BadValue(f"samples_us={text!r} is not a list")
    for value in data:
        _check_figure("a sample", value)
    return tuple(data)


def _json(text: object, name: str) -> Any:
    if not isinstance(text, str):
        raise _BadValue(f"{name}={text!r} is not a text")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _BadValue(f"{name}={text[:80]!r} is not JSON") from None


def _check_metadata(metadata: object) -> None:
    if not isinstance(_json(metadata, "metadata"), dict):
        raise _BadValue("the metadata is not a JSON object")
