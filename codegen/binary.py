"""Compiled kernels as data: from Triton's compiled kernel to what a store can keep, and back without a compiler.

A binary serves only where Triton would make the same one: for the same code (its digest is what a store finds it by),
for contiguous operands, with the signature and alignments, the options, the target and the compiler's environment
variables with which it was made. The metadata records all of these, and what the compiler made of them. A store may
come from anybody, and Triton's host code believes the metadata, so :func:`check` derives it here
(:mod:`.launch_facts`), reads the image's own description of its kernel (:mod:`.image`), and refuses a binary that
differs in anything derived. Three facts are not derived. The dynamic shared memory and, on sm_100, the tensor memory
are held within bounds: no cubin states them, and a wrong number makes the kernel fail or err on the GPU, as other
machine code would. Of Triton's hash only the form is checked. Only the image goes to the GPU; nothing of a binary is
executed on the host.
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
"""The key in the metadata under which doratune keeps what Triton's own metadata leaves out."""
_LOCAL = ("extern_libs",)
"""Options that are paths of the machine that compiled. The libraries belong to the Triton version."""
_HASH = "hash"
"""The key of Triton's own cache. It also depends on how Triton was built, and nothing is launched by it: only its form
is checked."""
_MOST_METADATA = 1 << 16
"""Characters of metadata: those of this package's kernels have up to 6,000."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxdict = _short.maxtuple = 6
_short.maxlevel = 2
_shown = _short.repr
"""A value for a message, short whatever a store holds."""


class BinaryError(DoratuneError):
    """A stored binary is unsound: a part of its metadata or its image is not that of this kernel."""


class OtherSettingsError(BinaryError):
    """A stored binary is sound, but Triton is told here to make another one."""


def pack(handle: Any) -> tuple[str, bytes]:
    """The metadata, as JSON, and the image of a kernel that :func:`~doratune.codegen.compile.build` gave.

    Raises:
        BinaryError: the installed Triton does not give them.
    """
    try:
        metadata = _as_json({name: value for name, value in handle.metadata._asdict().items() if name not in _LOCAL})
        metadata[_ASSUMED] = _assumptions(handle.src.signature, handle.src.attrs)
        return json.dumps(metadata, sort_keys=True), bytes(handle.kernel)
    except (AttributeError, TypeError, InternalsError) as problem:
        raise BinaryError(f"this version of Triton gives no binary to store: {problem}") from problem


def check(source: Source, kernel: str, target: Any, metadata: str, image: bytes) -> None:
    """Hold a stored binary against what a compile of ``kernel`` for a ``GPUTarget`` would give, without compiling.

    Raises:
        OtherSettingsError: Triton's options or environment here are others.
        InternalsError: Triton's options cannot be known.
        BinaryError: a part of the metadata or of the image is not that of this kernel; the message names it.
    """
    _checked(source, kernel, target, metadata, image)


def restore(source: Source, kernel: Any, target: Any, metadata: str, image: bytes) -> Any:
    """Make Triton's compiled kernel of one jit function from what :func:`pack` gave, for contiguous operands.

    It is what :func:`~doratune.codegen.compile.build` would return, but that ``asm`` holds the image alone.

    Raises:
        OtherSettingsError, BinaryError: as :func:`check`.
        InternalsError: this Triton offers no way.
    """
    name = kernel.__name__
    values = _checked(source, name, target, metadata, image)
    return restored(name, triton_source(source, kernel), target, values, image, values[_HASH])


def _checked(source: Source, kernel: str, target: Any, metadata: str, image: bytes) -> dict[str, Any]:
    """Check a binary; returns the metadata as Triton's compiler would write it here."""
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
            raise BinaryError(f"the binary of {kernel} has {name}={_shown(values[name])}, which is not in {allowed}")
    if not isinstance(values[_HASH], str) or not re.fullmatch("[0-9a-f]{64}", values[_HASH]):
        raise BinaryError(f"the binary of {kernel} has {_HASH}={_shown(values[_HASH])}, which is no SHA-256")
    del known[_ASSUMED]
    checked = {**known, **{name: values[name] for name in (*facts.bounds, _HASH)}}
    _refuse_other_image(source, kernel, checked, facts, image)
    return {**checked, **local}


def _parsed(kernel: str, metadata: str) -> dict[str, Any]:
    try:
        values = json.loads(metadata) if len(metadata) <= _MOST_METADATA else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("name") != kernel or not isinstance(values.get(_ASSUMED), dict):
        raise BinaryError(f"the metadata is not that of {kernel}")
    return values


def _refuse_other_settings(
    kernel: str, found: Mapping[str, Any], settings: Mapping[str, object], environment: Mapping[str, str]
) -> None:
    """Refuse what may well be sound: Triton is told here to use other options, or its environment is another."""
    for name, value in sorted(settings.items()):
        difference = _difference(name, found.get(name, value), value)
        if difference is not None:
            raise OtherSettingsError(f"the binary of {kernel} was made with {difference}")
    stated = found[_ASSUMED].get("environment")
    if isinstance(stated, dict) and stated != environment:
        raise OtherSettingsError(f"the binary of {kernel} was made under other environment variables of Triton's")


def _refuse_other_names(kernel: str, found: Mapping[str, object], wanted: Set[str]) -> None:
    for name in sorted(wanted - found.keys()):
        raise BinaryError(f"the metadata of {kernel} lacks {name}")
    for name in sorted(found.keys() - wanted):
        raise BinaryError(f"the metadata of {kernel} has {_shown(name)}, which no binary of this Triton has")


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
            raise BinaryError(f"the image of {kernel} has {what} {_shown(found)}, here it is {_shown(wanted)}")
    needed, most = checked["shared"] + read.shared, find_gpu(source.spec.gpu).shared_bytes_per_multiprocessor
    if needed > most:
        raise BinaryError(f"the binary of {kernel} needs {needed} bytes of shared memory, {source.spec.gpu} has {most}")


def _difference(name: str, found: object, wanted: object) -> str | None:
    """Where and how two JSON values differ, or None; also in type, since to Python 1, 1.0 and True are equal."""
    inner: list[tuple[str, object, object]] = []
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        inner = [(f"{name}.{key}", found[key], value) for key, value in wanted.items()]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        inner = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    elif type(found) is not type(wanted) or found != wanted:
        return f"{name}={_shown(found)}, here it is {_shown(wanted)}"
    return next(filter(None, (_difference(*pair) for pair in inner)), None)


def _assumptions(signature: Mapping[str, str], attributes: Mapping[tuple[int, ...], object]) -> dict[str, Any]:
    """What a compiled kernel takes for granted, beyond Triton's metadata: its parameters and what divides them."""
    known = [[*index, value] for index, value in sorted(attributes.items())]
    return _as_json({"signature": [*signature.items()], "attributes": known, "environment": cache_environment()})


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are after a round through JSON, as Triton writes it."""
    parsed: dict[str, Any] = json.loads(json.dumps(values, default=vars))
    return parsed
