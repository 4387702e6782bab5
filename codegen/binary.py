"""Compiled kernels as data: from Triton's compiled kernel to what a store can keep, and back without a compiler.

A binary serves only where Triton would make the same one: for the same code (its digest is what a store finds it by),
for contiguous operands, with the signature and alignments, the options, the target and the compiler's environment
variables with which it was made. The metadata records all of these, and :func:`restore` holds them against what a
compile here would begin with. Only the image goes to the GPU; nothing of a binary is executed as Python.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DoratuneError
from .compile import launch_options, triton_source
from .render import Source

_ASSUMED = "doratune"
"""The key in the metadata under which doratune keeps what Triton's own metadata leaves out."""
_LOCAL = ("extern_libs",)
"""Options that are paths of the machine that compiled. The libraries belong to the Triton version."""
_DECIDED = ("num_warps",)
"""Options that the compiler itself may change: warps that specialise come on top of those asked for."""


class BinaryError(DoratuneError):
    """A stored binary is unsound: its metadata is not that of this kernel, or Triton cannot make a kernel from it."""


class OtherSettingsError(BinaryError):
    """A stored binary is sound, but Triton is told here to make another one."""


def pack(handle: Any) -> tuple[str, bytes]:
    """The metadata, as JSON, and the image of a kernel that :func:`~doratune.codegen.compile.build` gave."""
    metadata = _as_json({name: value for name, value in handle.metadata._asdict().items() if name not in _LOCAL})
    metadata[_ASSUMED] = _assumptions(handle.src)
    return json.dumps(metadata, sort_keys=True), bytes(handle.kernel)


def must_compile() -> str | None:
    """Why Triton is to run its compiler in this process whatever is stored, or None."""
    from triton import knobs

    for knob, variable in (
        ("always_compile", "TRITON_ALWAYS_COMPILE"),
        ("override", "TRITON_KERNEL_OVERRIDE"),
        ("dump_ir", "TRITON_KERNEL_DUMP"),
    ):
        if getattr(knobs.compilation, knob, False):
            return f"{variable} is set"
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return "a hook changes Triton's stages"
    return None


def check(source: Source, kernel: str, target: Any, metadata: str) -> None:
    """Hold the metadata of a stored binary against what a compile of ``kernel`` for a ``GPUTarget`` would begin with.

    Raises:
        OtherSettingsError: Triton's options or environment here are others.
        BinaryError: the metadata is of another kernel, or no metadata of one.
    """
    _check(source, kernel, target, _parsed(kernel, metadata))


def restore(source: Source, kernel: Any, target: Any, metadata: str, image: bytes) -> Any:
    """Make Triton's compiled kernel of one jit function from what :func:`pack` gave, for contiguous operands.

    It is what :func:`~doratune.codegen.compile.build` would return, but that ``asm`` holds the image alone.

    Raises:
        OtherSettingsError: Triton's options or environment here are others.
        BinaryError: the parts are not those of this kernel, or no compiled kernel can be made from them.
    """
    from triton.compiler import CompiledKernel
    from triton.compiler.compiler import make_backend

    name = kernel.__name__
    values = _parsed(name, metadata)
    options = _check(source, name, target, values)
    triton_input = triton_source(source, kernel)
    if values.pop(_ASSUMED) != _assumptions(triton_input):
        raise BinaryError(f"the binary of {name} was compiled for other parameters or alignments")
    values |= {local: options[local] for local in _LOCAL if local in options}
    try:
        with tempfile.TemporaryDirectory(prefix="doratune-") as folder:  # Triton reads a kernel from files
            parts = {f"{name}.json": json.dumps(values).encode(), f"{name}.{make_backend(target).binary_ext}": image}
            for part, content in parts.items():
                (Path(folder) / part).write_bytes(content)
            handle = CompiledKernel(triton_input, {part: str(Path(folder) / part) for part in parts}, values["hash"])
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise BinaryError(f"the binary of {name} is incomplete: {problem}") from problem
    handle.metadata_group = {}  # the files are gone
    return handle


def _parsed(kernel: str, metadata: str) -> dict[str, Any]:
    try:
        values = json.loads(metadata)
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("name") != kernel or not isinstance(values.get(_ASSUMED), dict):
        raise BinaryError(f"the metadata is not that of {kernel}")
    return values


def _check(source: Source, kernel: str, target: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for parsed metadata; returns the options of a compile here."""
    import triton
    from triton.compiler.compiler import make_backend

    options = vars(make_backend(target).parse_options(launch_options(source, kernel)))
    expected = _as_json({**options, "target": target, "triton_version": triton.__version__})
    for name in sorted(expected.keys() - {*_LOCAL, *_DECIDED}):
        if name not in values:
            raise BinaryError(f"the metadata of {kernel} lacks {name}")
        if values[name] != expected[name]:
            raise OtherSettingsError(
                f"the binary of {kernel} was made with {name}={values[name]!r}, here it is {expected[name]!r}"
            )
    if values[_ASSUMED].get("environment") != _environment():
        raise OtherSettingsError(f"the binary of {kernel} was made under other environment variables of Triton's")
    return _as_json(options)


def _assumptions(triton_input: Any) -> dict[str, Any]:
    """What a compiled kernel takes for granted, beyond Triton's metadata: its parameters and what divides them."""
    attributes = [[*index, value] for index, value in sorted(triton_input.attrs.items())]
    return _as_json(
        {"signature": [*triton_input.signature.items()], "attributes": attributes, "environment": _environment()}
    )


def _environment() -> dict[str, str]:
    """The environment variables that are part of the key of Triton's own cache, where they are set."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(get_cache_invalidating_env_vars())


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are after a round through JSON, as Triton writes it."""
    parsed: dict[str, Any] = json.loads(json.dumps(values, default=vars))
    return parsed
