"""Bind an emitted module to a GPU: replace its jit functions by compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..internals.triton import InternalsError, Launcher, current_target, load, warn_once, why_compile
from .no_jit import NotCompiledError, no_jit, not_compiled

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
    source: Source,
    alignments: Mapping[str, int] | None = None,
    binaries: Mapping[str, Binary] | None = None,
    module: ModuleType | None = None,
    missing: str = "no binary is stored",
) -> ModuleType:
    """Load an emitted module for the current GPU and replace its jit functions by compiled kernels.

    ``alignments`` are the bytes that divide the address and the row stride of each operand, by name; None means
    contiguous operands. ``binaries`` are stored binaries by kernel name. They are used if the operands are contiguous
    and the binaries valid; otherwise Triton compiles, or loads from its own cache on disk. ``module`` is the executed
    text, if the caller has it. If this Triton cannot compile ahead of a launch, the jit functions stay and compile at
    their first start. ``missing`` says why there are no binaries, for the error.

    Raises:
        NotCompiledError: ``DORATUNE_NO_JIT`` is set and the binaries are missing or cannot be used.
    """
    from ..codegen.compile import BrokenToolchainError, CompileError, build, contiguous_alignments, judge_failure
    from ..codegen.module import kernel_names, load_module

    module = module or load_module(source)
    contiguous = alignments is None or dict(alignments) == contiguous_alignments(source.spec)
    kernels = {name: getattr(module, name) for name in kernel_names(module)}
    if no_jit() and not (binaries and contiguous):
        raise not_compiled(source.spec, missing if contiguous else "stored binaries are for contiguous operands")
    try:
        target = current_target()
        compiled = _restored(source, kernels, target, binaries) if binaries and contiguous else None
        if compiled is None:
            compiled = {name: build(source, kernel, target, alignments) for name, kernel in kernels.items()}
    except NotCompiledError:
        raise
    except Exception as problem:
        if no_jit():
            raise not_compiled(source.spec, problem) from problem
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
    """Triton's compiled kernels from stored binaries, loaded on the current GPU; None if one of them fails.

    Raises:
        NotCompiledError: one of them fails, and ``DORATUNE_NO_JIT`` is set.
    """
    from ..codegen.binary import BinaryError, restore

    reason = why_compile()
    if reason is not None:
        if no_jit():
            raise not_compiled(source.spec, reason)
        return None
    handles: dict[str, Any] = {}
    try:
        for name, kernel in kernels.items():
            if name not in binaries:
                raise BinaryError(f"{source.spec}: {name} has no stored binary")
            handle = restore(source, kernel, target, binaries[name].metadata, binaries[name].image)
            load(handle)  # now, while compiling is still possible
            handles[name] = handle
    except Exception as problem:
        if no_jit():
            raise not_compiled(source.spec, problem) from problem
        _say_why(problem)
        return None
    return handles


def _say_why(problem: Exception) -> None:
    """Warn that stored binaries are not used, unless Triton's settings in this process ask for others."""
    from ..codegen.binary import OtherSettingsError

    if isinstance(problem, InternalsError):
        warn_once("starting stored binaries", "kernels are compiled", problem)
    elif not isinstance(problem, OtherSettingsError):  # any error of the driver: compile, which reports a real fault
        warn_of_compile(problem)


def warn_of_compile(problem: object) -> None:
    """Warn that a stored binary cannot be used and its kernel is compiled instead."""
    warnings.warn(
        f"doratune compiles a kernel instead of using its stored binary: {problem}", RuntimeWarning, stacklevel=3
    )
