"""Bind an emitted module to a GPU: replace its jit functions by compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..internals.triton import InternalsError, Launcher, current_target, warn_once, why_compile

if TYPE_CHECKING:
    from types import ModuleType

    from ..cache.entry import Binary
    from ..codegen.render import Source


def uses_descriptors(source: Source) -> bool:
    """Whether an emitted module accesses its matrices through tensor descriptors."""
    from ..codegen.variants import find_variant

    return find_variant(source.spec.op, source.config.variant).descriptors


def only_starts_kernels(source: Source) -> bool:
    """Whether the emitted ``launch`` only starts kernels and calls no library such as cuBLAS."""
    from ..codegen.variants import find_variant

    return not find_variant(source.spec.op, source.config.variant).library


def bind(
    source: Source, alignments: Mapping[str, int] | None = None, binaries: Mapping[str, Binary] | None = None
) -> ModuleType:
    """Load an emitted module for the current GPU and replace its jit functions by compiled kernels.

    ``alignments`` are the bytes that divide the address and the row stride of each operand, by name; None means
    contiguous operands. ``binaries`` are stored binaries by kernel name. They are used if the operands are contiguous
    and the binaries valid; otherwise Triton compiles, or loads from its own cache on disk. If this Triton cannot
    compile ahead of a launch, the jit functions stay and compile at their first start.
    """
    from ..codegen.compile import BrokenToolchainError, CompileError, build, contiguous_alignments, judge_failure
    from ..codegen.module import kernel_names, load_module

    module = load_module(source)
    contiguous = alignments is None or dict(alignments) == contiguous_alignments(source.spec)
    kernels = {name: getattr(module, name) for name in kernel_names(module)}
    try:
        target = current_target()
        compiled = _restored(source, kernels, target, binaries) if binaries and contiguous else None
        if compiled is None:
            compiled = {name: build(source, kernel, target, alignments) for name, kernel in kernels.items()}
    except Exception as problem:
        if isinstance(judge_failure(problem, str(source.spec)), CompileError | BrokenToolchainError):
            raise  # the text or this machine is at fault, and a jit function would fail as well
        warn_once("compiling before the first start", "kernels compile at their first start", problem)
        return module
    for name, handle in compiled.items():
        setattr(module, name, Launcher(handle))
    return module


def _restored(
    source: Source, kernels: Mapping[str, Any], target: Any, binaries: Mapping[str, Binary]
) -> dict[str, Any] | None:
    """Triton's compiled kernels from stored binaries, loaded on the current GPU; None if one of them fails."""
    from ..codegen.binary import BinaryError, OtherSettingsError, restore

    if why_compile() is not None:
        return None
    handles: dict[str, Any] = {}
    try:
        for name, kernel in kernels.items():
            if name not in binaries:
                raise BinaryError(f"{source.spec}: {name} has no stored binary")
            handle = restore(source, kernel, target, binaries[name].metadata, binaries[name].image)
            _ = handle.run  # the driver loads it now, while compiling is still possible
            handles[name] = handle
    except OtherSettingsError:
        return None
    except InternalsError as problem:
        warn_once("starting stored binaries", "kernels are compiled", problem)
        return None
    except Exception as problem:  # any error of the driver: compile, which reports a real fault itself
        warn_of_compile(problem)
        return None
    return handles


def warn_of_compile(problem: object) -> None:
    """Warn that a stored binary cannot be used and its kernel is compiled instead."""
    warnings.warn(
        f"doratune compiles a kernel instead of using its stored binary: {problem}", RuntimeWarning, stacklevel=3
    )
