"""Convert Triton's compiled kernels to data that a store can keep, and back without a compiler.

A binary is used only if Triton would make the same one here: from the same code (a store finds a binary by the code's
digest), for contiguous operands, with the same signature, alignments, options, target and environment variables of the
compiler. The metadata records all of these and the compiler's results. A store may come from an untrusted source, and
Triton's host code trusts the metadata. So :func:`check` derives the metadata from the emitted text
(:mod:`.launch_facts`), reads the image's own description of its kernel (:mod:`.image`), and refuses a binary that
differs in any derived fact.

Three facts are not derived. The dynamic shared memory and, on sm_100, the tensor memory are checked against bounds: no
cubin states them, and a wrong number makes the kernel fail or miscompute on the GPU, as wrong machine code would. Of
Triton's hash only the form is checked. Only the image goes to the GPU; no part of a binary is executed on the host.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Set
from typing import Any

from ..errors import DoratuneError
from ..internals.triton import InternalsError, cache_environment, parsed_options, restored
from .compile import contiguous_alignments, divisibility, launch_options, signature_of, triton_source
from .gpu import find_gpu
from .image import ImageError, read_image
from .launch_facts import LaunchFacts, launch_facts
from .render import Source

_ASSUMED = "doratune"
"""The key in the metadata for the facts that Triton's own metadata leaves out."""
_LOCAL = ("extern_libs",)
"""Options that are paths on the machine that compiled. The files belong to the Triton version."""
_HASH = "hash"
"""The key of Triton's own cache. It also depends on how Triton was built, and a launch does not use it, so only its
form is checked."""
_MOST_METADATA = 1 << 16
"""Most characters of metadata. This package's kernels need up to 6,000."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxdict = _short.maxtuple = 6
_short.maxlevel = 2
_shown = _short.repr
"""A value as text of limited length, for messages: a store may hold anything."""


class BinaryError(DoratuneError):
    """A stored binary is invalid: a part of its metadata or its image is not that of this kernel."""


class OtherSettingsError(BinaryError):
    """A stored binary is valid, but Triton's settings in this process would produce another one."""


def pack(handle: Any) -> tuple[str, bytes]:
    """Return the metadata, as JSON, and the image of a result of :func:`~doratune.codegen.compile.build`.

    Raises:
        BinaryError: the installed Triton offers no way to read them.
    """
    try:
        metadata = _as_json({name: value for name, value in handle.metadata._asdict().items() if name not in _LOCAL})
        metadata[_ASSUMED] = _assumptions(handle.src.signature, handle.src.attrs)
        return json.dumps(metadata, sort_keys=True), bytes(handle.kernel)
    except (AttributeError, TypeError, InternalsError) as problem:
        raise BinaryError(f"this version of Triton gives no binary to store: {problem}") from problem


def check(source: Source, kernel: str, target: Any, metadata: str, image: bytes) -> None:
    """Check that a stored binary is what a compile of ``kernel`` for a ``GPUTarget`` would give, without compiling.

    Raises:
        OtherSettingsError: Triton's options or environment variables differ in this process.
        InternalsError: this Triton offers no way to read its options.
        BinaryError: a part of the metadata or of the image is not that of this kernel; the message names it.
    """
    _checked(source, kernel, target, metadata, image)


def restore(source: Source, kernel: Any, target: Any, metadata: str, image: bytes) -> Any:
    """Make Triton's compiled kernel of one jit function from a result of :func:`pack`, for contiguous operands.

    The result equals that of :func:`~doratune.codegen.compile.build`, except that its ``asm`` holds only the image.

    Raises:
        OtherSettingsError, BinaryError: as :func:`check`.
        InternalsError: this Triton offers no way to do it.
    """
    name = kernel.__name__
    values = _checked(source, name, target, metadata, image)
    return restored(name, triton_source(source, kernel), target, values, image, values[_HASH])


def _checked(source: Source, kernel: str, target: Any, metadata: str, image: bytes) -> dict[str, Any]:
    """Check a binary; returns the metadata that Triton's compiler would write here."""
    from triton import __version__

    values = _parsed(kernel, metadata)
    asked = launch_options(source, kernel)
    options = _as_json(parsed_options(target, asked))
    local = {name: options.pop(name) for name in _LOCAL if name in options}
    facts = launch_facts(source, kernel, target, options)
    signature = signature_of(source, kernel)
    assumed = _assumptions(signature, divisibility(signature, contiguous_alignments(source.spec)))
    settings = options.keys() - asked.keys() - facts.exact.keys()
    _refuse_other_settings(kernel, values, {name: options[name] for name in settings}, assumed["environment"])
    known = {**options, **assumed["environment"], **facts.exact, "target": _as_json(vars(target))}
    known |= {"triton_version": __version__, _ASSUMED: assumed}
    _refuse_other_names(kernel, values, {*known, *facts.bounds, _HASH})
    _refuse_other_names(kernel, values[_ASSUMED], {*assumed})
    for name, value in sorted(known.items()):
        difference = _difference(name, values[name], value)
        if difference is not None:
            raise BinaryError(f"the binary of {kernel} was made with {difference}")
    for name, allowed in facts.bounds.items():
        if type(values[name]) is not int or values[name] not in allowed:
            raise BinaryError(f"the binary of {kernel} has {name}={_shown(values[name])}, expected one of {allowed}")
    if not isinstance(values[_HASH], str) or not re.fullmatch("[0-9a-f]{64}", values[_HASH]):
        raise BinaryError(f"the binary of {kernel} has {_HASH}={_shown(values[_HASH])}, expected a SHA-256")
    del known[_ASSUMED]
    checked = {**known, **{name: values[name] for name in (*facts.bounds, _HASH)}}
    _refuse_other_image(source, kernel, checked, facts, image)
    return {**checked, **local}


def _parsed(kernel: str, metadata: str) -> dict[str, Any]:
    try:
        values = json.loads(metadata, object_pairs_hook=_once) if len(metadata) <= _MOST_METADATA else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("name") != kernel or not isinstance(values.get(_ASSUMED), dict):
        raise BinaryError(f"the metadata does not belong to {kernel}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which each name stands once, so that nobody can read another value than was checked."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _refuse_other_settings(
    kernel: str, found: Mapping[str, Any], settings: Mapping[str, object], environment: Mapping[str, str]
) -> None:
    """Refuse a binary that may be valid, but was made with other options or environment variables of Triton."""
    for name, value in sorted(settings.items()):
        difference = _difference(name, found.get(name, value), value)
        if difference is not None:
            raise OtherSettingsError(f"the binary of {kernel} was made with {difference}")
    stated = found[_ASSUMED].get("environment")
    if isinstance(stated, dict) and stated != environment:
        raise OtherSettingsError(f"the binary of {kernel} was made with other environment variables of Triton")


def _refuse_other_names(kernel: str, found: Mapping[str, object], wanted: Set[str]) -> None:
    for name in sorted(wanted - found.keys()):
        raise BinaryError(f"the metadata of {kernel} lacks {name}")
    for name in sorted(found.keys() - wanted):
        raise BinaryError(f"the metadata of {kernel} has an unexpected fact {_shown(name)}")


def _refuse_other_image(
    source: Source, kernel: str, checked: Mapping[str, Any], facts: LaunchFacts, image: bytes
) -> None:
    try:
        read = read_image(image)
    except ImageError as problem:
        raise BinaryError(f"the image of {kernel} cannot be launched: {problem}") from None
    architecture = re.sub("^sm", "sm_", checked["arch"])
    for what, found, wanted in (
        ("the kernel", read.kernel, kernel),
        ("the architecture", read.architecture, architecture),
        ("the bytes of each parameter", read.parameters, facts.parameters),
        ("the threads of a block", read.threads, facts.threads),
        ("the blocks of a cluster", read.blocks, checked["num_ctas"]),
    ):
        if found != wanted:
            raise BinaryError(f"the image of {kernel} has {what} {_shown(found)}, expected {_shown(wanted)}")
    needed, most = checked["shared"] + read.shared, find_gpu(source.spec.gpu).shared_bytes_per_multiprocessor
    if needed > most:
        raise BinaryError(f"the binary of {kernel} needs {needed} bytes of shared memory; {source.spec.gpu} has {most}")


def _difference(name: str, found: object, wanted: object) -> str | None:
    """Where and how two JSON values differ, or None. Types count, because Python treats 1, 1.0 and True as equal."""
    inner: list[tuple[str, object, object]] = []
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        inner = [(f"{name}.{key}", found[key], value) for key, value in wanted.items()]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        inner = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    elif type(found) is not type(wanted) or found != wanted:
        return f"{name}={_shown(found)}, expected {_shown(wanted)}"
    return next(filter(None, (_difference(*pair) for pair in inner)), None)


def _assumptions(signature: Mapping[str, str], attributes: Mapping[tuple[int, ...], object]) -> dict[str, Any]:
    """What a compiled kernel assumes beyond Triton's metadata: its signature, the divisibility of its parameters, and
    the compiler's environment variables."""
    known = [[*index, value] for index, value in sorted(attributes.items())]
    return _as_json({"signature": [*signature.items()], "attributes": known, "environment": cache_environment()})


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON, in the form in which Triton writes them."""
    parsed: dict[str, Any] = json.loads(json.dumps(values, default=vars))
    return parsed
