"""Convert the values of :mod:`.entry` to the rows of :mod:`.schema` and back, with checks in both directions.

A store may come from anybody, so no row is trusted: specs are parsed, configs validated, numbers checked. Whether a
config suits a GPU is checked in :mod:`.lookup`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import InstrumentedAttribute

from ..codegen.spec import DIMS, SPEC_FIELDS, Config, KernelSpec, SpecError
from .distance import distance_of
from .entry import (
    DEFAULT,
    MEASURED,
    PREDICTED,
    Binary,
    BinaryKey,
    Contender,
    Entry,
    Environment,
    Evaluation,
    Final,
)
from .errors import CorruptRowError, InvalidEntryError
from .neighbours import Candidate
from .schema import BinaryRow, EntryRow

PROVENANCES = (MEASURED, PREDICTED, DEFAULT)
"""Best first."""

_SPEC_COLUMNS = tuple(name for name in SPEC_FIELDS if hasattr(EntryRow, name))
"""The fields of a spec with a column of their own. The other flags are in the spec's text only: no query needs them."""

_ENVIRONMENT_TEXTS = ("triton", "torch", "driver", "gpu_name", "doratune", "architecture")
_COUNTS = ("registers", "spills", "shared_bytes")
_FIGURES = ("us", "floor_us", "error", "unfused_us")
_SAMPLE_DIGITS = 5
"""Significant digits of a final's samples: far below the noise, and a third of the text."""

_SEAL = b"doratune-1\0"
"""The start of a sealed image. xz compresses a cubin to a fifth (zlib: to a quarter) and unpacks it in 2 ms."""
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
_MOST_IMAGE_BYTES = 1 << 26
"""A limit, because a few kilobytes of xz can unpack to any size. This package's cubins have up to 150 kB."""


class _BadValue(ValueError):
    """A field holds an invalid value. The callers below raise it as a public error."""


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
        "lookup_regret": entry.lookup_regret,
    }
    try:
        values["final"] = None if entry.final is None else _final_text(entry.final)
        _check(values)
        _samples(values["samples_us"])
        _final(values["final"])
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
            final=_final(row.final),
            lookup_regret=row.lookup_regret,
        )
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, row.id, values["spec"], problem) from None


PLACE_COLUMNS: tuple[InstrumentedAttribute[Any], ...] = (
    EntryRow.id,
    EntryRow.spec,
    EntryRow.gpu,
    EntryRow.provenance,
    EntryRow.lookup_regret,
)
PLACE_COLUMNS += (EntryRow.d_out, EntryRow.d_in, EntryRow.rank, EntryRow.tokens, EntryRow.magnitude)
"""What the distance of an entry is computed from, without reading its config."""

CANDIDATE_COLUMNS: tuple[InstrumentedAttribute[Any], ...] = (EntryRow.id, EntryRow.spec, EntryRow.config)
CANDIDATE_COLUMNS += (EntryRow.template_digest, EntryRow.provenance)
CANDIDATE_COLUMNS += (EntryRow.us, EntryRow.floor_us, EntryRow.lookup_regret, EntryRow.final)
CANDIDATE_COLUMNS += tuple(getattr(EntryRow, name) for name in _SPEC_COLUMNS)


def distance_to(wanted: KernelSpec, row: Any, store: str) -> float:
    """The distance from ``wanted`` of a row of :data:`PLACE_COLUMNS`.

    Raises:
        CorruptRowError: its dims are no whole numbers of at least 0, or its regret is no ratio of times.
    """
    try:
        dims = {dim: getattr(row, dim) for dim in DIMS}
        for dim, value in dims.items():
            if not isinstance(value, int) or value < 0:
                raise _BadValue(f"{dim} must be a whole number of at least 0, got {value!r}")
        if row.lookup_regret is not None:
            _check_figure("lookup_regret", row.lookup_regret)
        flags = str(row.spec).partition("@")[0].split("/")
        return distance_of(wanted, dims, row.magnitude, flags)
    except _BadValue as problem:
        raise _corrupt(store, row.id, row.spec, problem) from None


def candidate_of(row: Mapping[Any, Any], distance: float, store: str) -> Candidate:
    """Return the candidate in a row of :data:`CANDIDATE_COLUMNS`, which is this far from the wanted spec.

    Raises:
        CorruptRowError: the row does not hold a valid one.
    """
    values: dict[str, Any] = dict(row)
    try:
        _check_provenance(values)
        figures = {name: values[name] for name in ("us", "floor_us", "lookup_regret")}
        for name, value in figures.items():
            if value is not None:
                _check_figure(name, value)
        return Candidate(
            _spec(values),
            _config(values["config"]),
            values["template_digest"],
            values["provenance"],
            distance=distance,
            beaten=_beaten(_final(values["final"])),
            **figures,
        )
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, values["id"], values["spec"], problem) from None


def _beaten(final: Final | None) -> tuple[tuple[Config, float], ...]:
    if final is None or final.winner.us <= 0:
        return ()
    return tuple((contender.config, contender.us / final.winner.us) for contender in final.beaten)


def binary_values(binary: Binary) -> dict[str, Any]:
    """Return the column values of ``binary``, its image compressed and sealed.

    Raises:
        InvalidEntryError: the metadata is not a JSON object, the image is empty or not bytes, or a key is empty.
    """
    for name in BinaryKey._fields:
        if not getattr(binary, name):
            raise InvalidEntryError(f"binary of kernel {binary.kernel!r}: {name} is empty; nothing was stored")
    try:
        _check_metadata(binary.metadata)
        if not isinstance(binary.image, bytes) or not binary.image:
            raise _BadValue("the image is empty or not bytes")
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
            raise _BadValue("the image has no seal of a store")
        image = _unpacked(row.image[_SEAL_BYTES:])
        binary = Binary(row.code_digest, row.kernel, row.triton, row.architecture, row.metadata_json, image)
        if _seal_of(binary) != row.image[:_SEAL_BYTES]:
            raise _BadValue("its key, metadata and image do not belong together")
    except _BadValue as problem:
        raise CorruptRowError(
            f"{store}: binary {row.id} (kernel {row.kernel!r}, Triton {row.triton}): {problem}. "
            f"Delete row {row.id} of table {BinaryRow.__tablename__}: it is compiled again when needed."
        ) from None
    return binary


def _seal_of(binary: Binary) -> bytes:
    """The bytes before the compressed image: a digest over key, metadata and image.

    A wrong digit in the metadata's shared memory, or a row under another key, would make a kernel write where it must
    not, and neither SQLite nor the image would show it.
    """
    parts = (*(str(getattr(binary, name)) for name in BinaryKey._fields), binary.metadata)
    digest = hashlib.sha256("\0".join(parts).encode() + b"\0" + binary.image)
    return _SEAL + digest.digest()


def _unpacked(compressed: bytes) -> bytes:
    unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_IMAGE_BYTES)
    try:
        image = unpacking.decompress(compressed, _MOST_IMAGE_BYTES)
    except lzma.LZMAError as problem:
        raise _BadValue(f"the image cannot be unpacked: {problem}") from None
    if not unpacking.eof:
        raise _BadValue("the image is truncated, or larger than any kernel")
    return image


def _corrupt(store: str, row_id: int, spec: object, problem: Exception) -> CorruptRowError:
    return CorruptRowError(
        f"{store}: entry {row_id} ({spec!r}) is damaged: {problem}. "
        f"Tune the spec again to replace it, or delete row {row_id} of table {EntryRow.__tablename__}."
    )


def _check(values: dict[str, Any]) -> None:
    """Check the fields whose types do not check themselves."""
    _check_provenance(values)
    for name in (*_FIGURES, "lookup_regret"):
        if values[name] is not None:
            _check_figure(name, values[name])
    for name in (*_COUNTS, "trials"):
        value = values[name]
        optional = value is None and name != "trials"
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise _BadValue(f"{name} must be a whole number of at least 0, got {value!r}")
    for name in (*_ENVIRONMENT_TEXTS, "tuned_gpu", "created_at", "source", "source_digest", "template_digest"):
        if not isinstance(values[name], str):
            raise _BadValue(f"{name} must be text, got {values[name]!r}")
    for name in ("template_digest", "source_digest", "architecture"):
        if not values[name]:
            raise _BadValue(f"{name} is empty")


def _check_provenance(values: dict[str, Any]) -> None:
    if values["provenance"] not in PROVENANCES:
        raise _BadValue(f"provenance must be one of {', '.join(PROVENANCES)}, got {values['provenance']!r}")


def _check_figure(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise _BadValue(f"{name} must be a finite number of at least 0, got {value!r}")


def _spec(values: dict[str, Any]) -> KernelSpec:
    if not isinstance(values["spec"], str):
        raise _BadValue(f"spec must be text, got {values['spec']!r}")
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
        raise _BadValue(f"samples_us must be a list, got {text!r}")
    for value in data:
        _check_figure("a sample", value)
    return tuple(data)


def _final_text(final: Final) -> str:
    contenders = [
        {
            "config": contender.config.to_dict(),
            "origins": list(contender.origins),
            "samples_us": [_shortened(us) for us in contender.samples_us],
        }
        for contender in final.contenders
    ]
    values = {name: getattr(final, name) for name in ("confidence", "noise", "settled")}
    return json.dumps({"contenders": contenders, **values, "notices": list(final.notices)})


def _shortened(us: float) -> float:
    _check_figure("a sample", us)
    return float(f"{us:.{_SAMPLE_DIGITS}g}")


def _final(text: object) -> Final | None:
    if text is None:
        return None
    data = _json(text, "final")
    names = {"contenders", "confidence", "noise", "settled", "notices"}
    if not isinstance(data, dict) or data.keys() != names:
        raise _BadValue(f"final must be an object with {', '.join(sorted(names))}, got {str(text)[:80]!r}")
    for name in ("confidence", "noise"):
        _check_figure(name, data[name])
    if not isinstance(data["settled"], bool):
        raise _BadValue(f"settled must be true or false, got {data['settled']!r}")
    contenders = tuple(_contender(value) for value in _list(data["contenders"], "contenders"))
    if not contenders:
        raise _BadValue("final has no contenders")
    return Final(contenders, data["confidence"], data["noise"], data["settled"], _texts(data, "notices"))


def _contender(data: Any) -> Contender:
    if not isinstance(data, dict) or data.keys() != {"config", "origins", "samples_us"}:
        raise _BadValue(f"a contender must be an object with config, origins and samples_us, got {str(data)[:80]!r}")
    samples = _list(data["samples_us"], "samples_us")
    for value in samples:
        _check_figure("a sample", value)
    if not samples:
        raise _BadValue("a contender has no samples")
    config = _config(json.dumps(data["config"]))
    return Contender(config, _texts(data, "origins"), tuple(samples))


def _texts(data: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = _list(data[name], name)
    for each in texts:
        if not isinstance(each, str):
            raise _BadValue(f"an element of {name} must be text, got {str(each)[:80]!r}")
    return tuple(texts)


def _list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list):
        raise _BadValue(f"{name} must be a list, got {str(data)[:80]!r}")
    return data


def _json(text: object, name: str) -> Any:
    if not isinstance(text, str):
        raise _BadValue(f"{name} must be text, got {text!r}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _BadValue(f"{name} must be JSON, got {text[:80]!r}") from None


def _check_metadata(metadata: object) -> None:
    if not isinstance(_json(metadata, "metadata"), dict):
        raise _BadValue("the metadata must be a JSON object")
