"""Convert the values of :mod:`.entry` to the rows of :mod:`.schema` and back, with checks in both directions.

A store may come from anybody, so no row is trusted: types, lengths and bounds of all values are checked, specs are
parsed, configs validated, and the digest over the whole row must be the recorded one. Whether a config suits a GPU is
checked in :mod:`.lookup`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, ColumnElement, Double, LargeBinary, func, type_coerce
from sqlalchemy.types import NULLTYPE

from ..codegen.spec import DIMS, MOST_CHARACTERS, MOST_SIZE, SPEC_FIELDS, Config, KernelSpec, SpecError
from ..printable import brief, is_printable, shortened
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
    Signature,
)
from .errors import CorruptRowError, InvalidEntryError
from .neighbours import Candidate
from .schema import BinaryRow, EntryRow, SignatureRow
from .seal import row_seal

PROVENANCES = (MEASURED, PREDICTED, DEFAULT)
"""Best first."""

_ENTRIES, _BINARIES = EntryRow.__table__, BinaryRow.__table__

_SPEC_COLUMNS = tuple(name for name in SPEC_FIELDS if hasattr(EntryRow, name))
"""The fields of a spec with a column of their own. Other flags and widths are in its text only: no query needs them."""

_ENVIRONMENT_TEXTS = ("triton", "torch", "driver", "gpu_name", "doratune", "architecture")
_COUNTS = ("registers", "spills", "shared_bytes")
_TIMES = ("us", "floor_us", "unfused_us")
_FIGURES = ("us", "floor_us", "error", "unfused_us")

_MOST = 256
_MOST_OF = {
    "spec": MOST_CHARACTERS,
    "config": 4096,
    "samples_us": 1 << 18,
    "final": 1 << 20,
    "source": 1 << 20,
    "metadata": 1 << 18,
}
"""Characters of a text at most, :data:`_MOST` for the others. The largest real sources have 19,000."""
_MOST_IMAGE_ROW = 1 << 23
_MOST_COUNT = 1 << 31
_LEAST_US, _MOST_US = 1e-6, 1e12
"""Bounds of a time that is not 0: a clock cycle takes 1e-4 µs, and 1e12 µs are 12 days."""
_MOST_FIGURE = 1e12
_MOST_TEXTS, _MOST_CONTENDERS = 64, 256
_BINARY_TEXTS = ("source_digest", "kernel", "triton", "architecture")
_GPU = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_FLAG_COLUMNS = tuple(column.name for column in _ENTRIES.columns if isinstance(column.type, Boolean))
_REAL_COLUMNS = tuple(column.name for column in _ENTRIES.columns if isinstance(column.type, Double))
_WHOLE_COLUMNS = tuple(column.name for column in _ENTRIES.columns if isinstance(column.type, BigInteger))
_OPTIONAL = tuple(column.name for column in _ENTRIES.columns if column.nullable)
_TEXT_COLUMNS = tuple(
    column.name
    for column in _ENTRIES.columns
    if column.name not in ("id", *_FLAG_COLUMNS, *_REAL_COLUMNS, *_WHOLE_COLUMNS)
)
_TEXT_LIMITS = tuple((name, _MOST_OF.get(name, _MOST)) for name in _TEXT_COLUMNS if name != "digest")
_CONFIG_TYPES = {int, str}
_SAMPLE_DIGITS = 5
"""Significant digits of a final's samples: far below the noise, and a third of the text."""

_SEAL = b"doratune-1\0"
"""The start of a sealed image. xz compresses a cubin to a fifth (zlib: to a quarter) and unpacks it in 2 ms."""
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
_MOST_IMAGE_BYTES = 1 << 23
"""A limit, because a few kilobytes of xz can unpack to any size. This package's cubins have up to 150 kB."""
_MOST_UNPACKING_BYTES = 1 << 25
"""What unpacking may take besides; xz takes 9 MB for what this module writes."""


class _BadValue(ValueError):
    """A field holds an invalid value. The callers below raise it as a public error."""


def _raw(table: Any, *names: str, server: bool) -> tuple[ColumnElement[Any], ...]:
    """Columns without a conversion of their values: these are checked first.

    On a ``server``, long values are cut just above their limit there. SQLite has a limit of its own (:mod:`.connect`).
    """
    return tuple(_cut(table.c[name], server).label(name) for name in names or table.c.keys())


def _cut(column: ColumnElement[Any], server: bool) -> ColumnElement[Any]:
    if server and isinstance(column.type, LargeBinary):
        return type_coerce(func.substr(column, 1, _MOST_IMAGE_ROW + 1), NULLTYPE)
    if server and str(column.name) in _MOST_OF:
        return type_coerce(func.left(column, _MOST_OF[str(column.name)] + 1), NULLTYPE)
    return type_coerce(column, NULLTYPE)


_SIZES = ("d_out", "d_in", "rank", "tokens", "layers")
_PLACE_NAMES = ("id", "spec", "gpu", "provenance", "lookup_regret", *_SIZES, "magnitude")
_CANDIDATE_TEXTS = ("spec", "config", "template_digest", "provenance", "final")
_CANDIDATE_NAMES = ("id", *_CANDIDATE_TEXTS, "us", "floor_us", "lookup_regret", *_SPEC_COLUMNS)

ENTRY_COLUMNS = {server: _raw(_ENTRIES, server=server) for server in (False, True)}
BINARY_COLUMNS = {server: _raw(_BINARIES, server=server) for server in (False, True)}
KEY_COLUMNS = {server: _raw(_BINARIES, "id", *_BINARY_TEXTS, server=server) for server in (False, True)}
SIGNATURE_COLUMNS = {server: _raw(SignatureRow.__table__, server=server) for server in (False, True)}
SOURCE_COLUMNS = {server: _raw(_ENTRIES, "id", "source", server=server) for server in (False, True)}
PLACE_COLUMNS = {server: _raw(_ENTRIES, *_PLACE_NAMES, server=server) for server in (False, True)}
"""What the distance of an entry is computed from, without reading its config."""
CANDIDATE_COLUMNS = {server: _raw(_ENTRIES, *_CANDIDATE_NAMES, server=server) for server in (False, True)}
"""The columns of each query, for SQLite (False) and for a server (True)."""


def entry_values(entry: Entry) -> dict[str, Any]:
    """Return the column values of ``entry``, with their digest.

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
        for name in _REAL_COLUMNS:
            if isinstance(values[name], (int, float)) and not isinstance(values[name], bool):
                values[name] = float(values[name]) + 0.0  # SQLite has no negative zero
        _check(values)
        _samples(values["samples_us"])
        _final(values["final"])
    except (_BadValue, OverflowError) as problem:
        raise InvalidEntryError(f"entry {entry.spec}: {problem}; nothing was stored") from None
    return sealed(values)


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The column values with the digest over them."""
    return {**values, "digest": row_seal(values)}


def entry_of(row: Mapping[Any, Any], store: str) -> Entry:
    """Return the entry in a row of :data:`ENTRY_COLUMNS` of ``store`` (its location, for the message).

    Raises:
        CorruptRowError: the row does not hold a valid entry.
    """
    values: dict[str, Any] = dict(row)
    try:
        _settle_flags(values)
        _check(values)
        spec = _spec(values)
        entry = Entry(
            spec=spec,
            config=_config(values["config"]),
            template_digest=values["template_digest"],
            source_digest=values["source_digest"],
            source=values["source"],
            evaluation=Evaluation(
                provenance=values["provenance"],
                samples_us=_samples(values["samples_us"]),
                trials=values["trials"],
                **{name: values[name] for name in (*_FIGURES, *_COUNTS)},
            ),
            environment=Environment(gpu=values["tuned_gpu"], **{name: values[name] for name in _ENVIRONMENT_TEXTS}),
            created_at=values["created_at"],
            final=_final(values["final"]),
            lookup_regret=values["lookup_regret"],
        )
        if values["digest"] != row_seal(values):
            raise _BadValue("its digest is another one: a value was changed after the row was written")
        return entry
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, values["id"], values["spec"], problem) from None


def unreadable(store: str, row_id: object, table: str, problem: object) -> CorruptRowError:
    """The error for a row that the database cannot give: text that is not UTF-8, or a value of many megabytes."""
    remedy = "tune the spec again to replace it, or " if table == EntryRow.__tablename__ else ""
    reason = brief(str(getattr(problem, "orig", problem)))
    error = CorruptRowError(
        f"{store}: row {brief(row_id)} of table {table} cannot be read: {reason}; {remedy}delete the row"
    )
    error.row_id = row_id if isinstance(row_id, int) else None
    return error


def distance_to(wanted: KernelSpec, row: Mapping[Any, Any], store: str) -> float:
    """The distance from ``wanted`` of a row of :data:`PLACE_COLUMNS`.

    Raises:
        CorruptRowError: its dims are no sizes, its regret is no ratio of times, or a text is no text or too long.
    """
    try:
        for name in ("spec", "gpu", "magnitude"):
            if not isinstance(row[name], str) or len(row[name]) > MOST_CHARACTERS:
                raise _BadValue(f"{name} must be text of at most {MOST_CHARACTERS} characters, got {brief(row[name])}")
        parts = row["spec"].partition("@")[0].split("/")
        texts = dict(part.partition("=")[::2] for part in parts)
        dims = {dim: row[dim] if dim in row else _whole(texts.get(dim, "0")) for dim in DIMS}
        for dim, value in dims.items():
            if type(value) is not int or not 0 <= value <= MOST_SIZE:
                raise _BadValue(f"{dim} must be a whole number from 0 to {MOST_SIZE}, got {brief(value)}")
        if row["lookup_regret"] is not None:
            _check_figure("lookup_regret", row["lookup_regret"])
        return distance_of(wanted, dims, row["magnitude"], parts)
    except _BadValue as problem:
        raise _corrupt(store, row["id"], row["spec"], problem) from None


def _whole(text: str) -> int | str:
    """The whole number of a spec's text; other text as it is."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def candidate_of(row: Mapping[Any, Any], distance: float, store: str) -> Candidate:
    """Return the candidate in a row of :data:`CANDIDATE_COLUMNS`, which is this far from the wanted spec.

    Raises:
        CorruptRowError: the row does not hold a valid one.
    """
    values: dict[str, Any] = dict(row)
    try:
        _settle_flags(values)
        _check_provenance(values)
        _check_text("template_digest", values["template_digest"])
        for name in ("us", "floor_us"):
            _check_time(name, values[name])
        if values["lookup_regret"] is not None:
            _check_figure("lookup_regret", values["lookup_regret"])
        _check_floor(values)
        return Candidate(
            _spec(values),
            _config(values["config"]),
            values["template_digest"],
            values["provenance"],
            distance=distance,
            beaten=_beaten(_final(values["final"])),
            **{name: values[name] for name in ("us", "floor_us", "lookup_regret")},
        )
    except (_BadValue, SpecError) as problem:
        raise _corrupt(store, values["id"], values["spec"], problem) from None


def _beaten(final: Final | None) -> tuple[tuple[Config, float], ...]:
    if final is None:
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


def key_of(row: Mapping[Any, Any], store: str) -> BinaryKey:
    """Return the key in a row of :data:`KEY_COLUMNS`.

    Raises:
        CorruptRowError: a part of it is no text.
    """
    try:
        for name in _BINARY_TEXTS:
            _check_text(name, row[name])
    except _BadValue as problem:
        raise unreadable(store, row["id"], BinaryRow.__tablename__, problem) from None
    return BinaryKey(*(row[name] for name in _BINARY_TEXTS))


def signature_of(row: Mapping[Any, Any], store: str) -> Signature:
    """Return the signature in a row of :data:`SIGNATURE_COLUMNS`; whether it is the key's is not checked here.

    Raises:
        CorruptRowError: a part of it is not what was stored.
    """
    signature = row["signature"]
    try:
        _check_text("digest", row["digest"])
        _check_text("key", row["key"])
        if not isinstance(signature, bytes) or not signature.startswith(_SEAL):
            raise _BadValue("the signature has no seal of a store; sign the row again with `cache export --sign`")
        found = Signature(row["digest"], row["key"], signature[_SEAL_BYTES:])
        if len(signature) > _MOST or _sealed(found) != signature:
            raise _BadValue("its digest, key and signature do not belong together")
    except _BadValue as problem:
        raise unreadable(store, row["id"], SignatureRow.__tablename__, problem) from None
    return found


def signature_values(signature: Signature) -> dict[str, Any]:
    """Return the values of a signature's row by column name."""
    return signature._asdict() | {"signature": _sealed(signature)}


def _sealed(signature: Signature) -> bytes:
    """The signature behind a digest over its row. A changed one would only seem to be another key's, or a forgery, and
    whoever checks the store has no public key to tell."""
    digest = hashlib.sha256("\0".join(signature[:2]).encode(errors="surrogatepass") + b"\0" + signature.signature)
    return _SEAL + digest.digest() + signature.signature


def binary_of(row: Mapping[Any, Any], store: str) -> Binary:
    """Return the binary in a row of :data:`BINARY_COLUMNS` of ``store``.

    Raises:
        CorruptRowError: some part of the row is not what was stored.
    """
    stored = row["image"]
    try:
        for name in _BINARY_TEXTS:
            _check_text(name, row[name])
        _check_metadata(row["metadata"])
        if not isinstance(stored, bytes) or not stored.startswith(_SEAL):
            raise _BadValue("the image has no seal of a store")
        if len(stored) > _MOST_IMAGE_ROW:
            raise _BadValue(f"the image has more than {_MOST_IMAGE_ROW} bytes")
        image = _unpacked(stored[_SEAL_BYTES:])
        code, kernel, triton, architecture = (row[name] for name in _BINARY_TEXTS)
        binary = Binary(code, kernel, triton, architecture, row["metadata"], image)
        if _seal_of(binary) != stored[:_SEAL_BYTES]:
            raise _BadValue("its key, metadata and image do not belong together")
    except _BadValue as problem:
        raise CorruptRowError(
            f"{store}: binary {brief(row['id'])} (kernel {brief(row['kernel'])}, Triton {brief(row['triton'])}): "
            f"{problem}. Delete row {brief(row['id'])} of table {BinaryRow.__tablename__}: it is compiled again when "
            "needed."
        ) from None
    return binary


def _seal_of(binary: Binary) -> bytes:
    """The bytes before the compressed image: a digest over key, metadata and image.

    A wrong digit in the metadata's shared memory, or a row under another key, would make a kernel write where it must
    not, and neither SQLite nor the image would show it.
    """
    parts = (*(str(getattr(binary, name)) for name in BinaryKey._fields), binary.metadata)
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogatepass") + b"\0" + binary.image)
    return _SEAL + digest.digest()


def _unpacked(compressed: bytes) -> bytes:
    unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_UNPACKING_BYTES)
    try:
        image = unpacking.decompress(compressed, _MOST_IMAGE_BYTES)
    except lzma.LZMAError as problem:
        raise _BadValue(f"the image cannot be unpacked: {problem}") from None
    if not unpacking.eof:
        raise _BadValue("the image is truncated, or larger than any kernel")
    return image


def _corrupt(store: str, row_id: object, spec: object, problem: Exception) -> CorruptRowError:
    return CorruptRowError(
        f"{store}: entry {brief(row_id)} ({brief(spec)}) is damaged: {shortened(str(problem), 400)}. "
        f"Tune the spec again to replace it, or delete row {brief(row_id)} of table {EntryRow.__tablename__}."
    )


def _settle_flags(values: dict[str, Any]) -> None:
    """Make booleans of the flags: SQLite has 0 and 1."""
    for name in _FLAG_COLUMNS:
        value = values[name]
        if type(value) is not bool and (type(value) is not int or value not in (0, 1)):
            raise _BadValue(f"{name} must be true or false, got {brief(value)}")
        values[name] = bool(value)


def _check(values: dict[str, Any]) -> None:
    """Check the types, lengths and bounds of all values."""
    for name, most in _TEXT_LIMITS:
        value = values[name]
        if type(value) is str and len(value) <= most and value.isascii() and value.isprintable():
            continue  # what almost all are
        if value is not None or name not in _OPTIONAL:
            _check_text(name, value)
    _check_provenance(values)
    for name in _TIMES:
        _check_time(name, values[name])
    for name in ("error", "lookup_regret"):
        if values[name] is not None:
            _check_figure(name, values[name])
    for name in (*_COUNTS, "trials"):
        value = values[name]
        optional = value is None and name != "trials"
        if not optional and (type(value) is not int or not 0 <= value < _MOST_COUNT):
            raise _BadValue(f"{name} must be a whole number of at least 0 and below 2**31, got {brief(value)}")
    for name in ("template_digest", "source_digest", "architecture"):
        if not values[name]:
            raise _BadValue(f"{name} is empty")
    for name in ("tuned_gpu", "architecture"):
        if not _GPU.fullmatch(values[name]):
            raise _BadValue(f"{name} must be a name such as h200 or sm_90, got {brief(values[name])}")
    if values["created_at"]:
        try:
            datetime.fromisoformat(values["created_at"])
        except ValueError:
            raise _BadValue(f"created_at must be a time in ISO 8601, got {brief(values['created_at'])}") from None
    _check_floor(values)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise _BadValue(f"{name} must be text, got {brief(value)}")
    most = _MOST_OF.get(name, _MOST)
    if len(value) > most:
        raise _BadValue(f"{name} must have at most {most} characters, got {brief(value)}")
    if not is_printable(value, lines=name == "source"):
        raise _BadValue(f"{name} has characters that cannot be printed: {brief(value)}")


def _check_provenance(values: Mapping[str, Any]) -> None:
    if values["provenance"] not in PROVENANCES:
        raise _BadValue(f"provenance must be one of {', '.join(PROVENANCES)}, got {brief(values['provenance'])}")


def _check_figure(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_FIGURE:
        raise _BadValue(f"{name} must be a finite number of at least 0, got {brief(value)}")


def _check_time(name: str, value: object) -> None:
    if value is None:
        return
    _check_figure(name, value)
    if value and not _LEAST_US <= value <= _MOST_US:  # type: ignore[operator]
        raise _BadValue(f"{name} must be 0 or a time from {_LEAST_US:g} to {_MOST_US:g} µs, got {brief(value)}")


def _check_floor(values: Mapping[str, Any]) -> None:
    us, floor = values["us"], values["floor_us"]
    if Evaluation(values["provenance"], us).beats(floor):
        raise _BadValue(f"us is {us:g}, far below its floor of {floor:g} µs: no kernel is as fast")


def _spec(values: Mapping[str, Any]) -> KernelSpec:
    if not isinstance(values["spec"], str):
        raise _BadValue(f"spec must be text, got {brief(values['spec'])}")
    spec = KernelSpec.parse(values["spec"])
    if str(spec) != values["spec"]:
        raise _BadValue(f"the spec is not in its canonical form {str(spec)!r}")
    for name in _SPEC_COLUMNS:
        if getattr(spec, name) != values[name] or type(getattr(spec, name)) is not type(values[name]):
            raise _BadValue(f"the column {name}={brief(values[name])} contradicts the spec")
    return spec


def _config(text: object) -> Config:
    return _config_of(_json(text, "config"))


def _config_of(data: object) -> Config:
    try:
        if isinstance(data, dict) and {*map(type, data.values())} <= _CONFIG_TYPES:  # 1, 1.0 and true are equal keys
            return _known_config(tuple(data.items()))
        return Config.from_dict(data)
    except TypeError as problem:  # a name that is no parameter's
        raise _BadValue(f"config {brief(data)}: {problem}") from None


@functools.lru_cache(maxsize=1024)
def _known_config(items: tuple[tuple[str, int | str], ...]) -> Config:
    """The config of these values. Thousands of entries have the same few hundred, in their finals too."""
    return Config.from_dict(dict(items))


def _samples(text: object) -> tuple[float, ...]:
    data = _list(_json(text, "samples_us"), "samples_us")
    if not all(type(value) is float and 0 <= value <= _MOST_FIGURE for value in data):
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
        raise _BadValue(f"final must be an object with {', '.join(sorted(names))}, got {brief(data)}")
    for name in ("confidence", "noise"):
        _check_figure(name, data[name])
    if not isinstance(data["settled"], bool):
        raise _BadValue(f"settled must be true or false, got {brief(data['settled'])}")
    listed = _list(data["contenders"], "contenders")
    if not 0 < len(listed) <= _MOST_CONTENDERS:
        raise _BadValue("final has no contenders" if not listed else f"final has {len(listed)} contenders")
    contenders = tuple(_contender(value) for value in listed)
    return Final(contenders, data["confidence"], data["noise"], data["settled"], _texts(data, "notices"))


def _contender(data: Any) -> Contender:
    if not isinstance(data, dict) or data.keys() != {"config", "origins", "samples_us"}:
        raise _BadValue(f"a contender must be an object with config, origins and samples_us, got {brief(data)}")
    samples = _list(data["samples_us"], "samples_us")
    for value in samples:
        _check_figure("a sample", value)
        if not value:
            raise _BadValue("a sample of a final is 0")
    if not samples:
        raise _BadValue("a contender has no samples")
    return Contender(_config_of(data["config"]), _texts(data, "origins"), tuple(samples))


def _texts(data: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = _list(data[name], name)
    if len(texts) > _MOST_TEXTS:
        raise _BadValue(f"{name} has {len(texts)} elements, at most {_MOST_TEXTS} are possible")
    for each in texts:
        if not isinstance(each, str):
            raise _BadValue(f"an element of {name} must be text, got {brief(each)}")
        if len(each) > MOST_CHARACTERS or not is_printable(each):
            raise _BadValue(f"an element of {name} is too long or cannot be printed: {brief(each)}")
    return tuple(texts)


def _list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list):
        raise _BadValue(f"{name} must be a list, got {brief(data)}")
    return data


def _json(text: object, name: str) -> Any:
    if not isinstance(text, str):
        raise _BadValue(f"{name} must be text, got {brief(text)}")
    if len(text) > _MOST_OF[name]:
        raise _BadValue(f"{name} must have at most {_MOST_OF[name]} characters, got {brief(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _BadValue(f"{name} must be JSON, got {brief(text)}") from None


def _check_metadata(metadata: object) -> None:
    if not isinstance(_json(metadata, "metadata"), dict):
        raise _BadValue("the metadata must be a JSON object")
