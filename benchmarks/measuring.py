"""What the benchmarks share: checking names, loading kernels, peak memory, timing implementations in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch

from ..codegen.spec import FLAGS, KernelSpec
from ..errors import UsageError, near_names
from ..runtime.kernel import Kernel
from ..runtime.loader import CPU, load_kernel
from ..runtime.reference import TORCH_DTYPES
from ..tuner.timing import Rotation, interleaved_us
from .results import OURS

SCALING = 0.75

MEMORY_SHARE = 0.5
"""Share of the free GPU memory for the rotating inputs; peers that make dense matrices need the rest."""

Inputs = TypeVar("Inputs")


def require_gpu() -> None:
    """Raise a UsageError where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise UsageError("this benchmark needs a GPU and PyTorch sees none: run it where the GPU is")


def check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise a UsageError for a name that is not ``known``; ``kind`` says what the names are of."""
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {kind} {name!r}{near_names(name, known)} (known: {'; '.join(known)})")


def load(spec: KernelSpec, tokens: int = 0) -> Kernel:
    """The kernel that a user of ``load_kernel`` gets for ``spec`` at ``tokens`` tokens (its bucket's by default)."""
    flags: dict[str, Any] = {flag: True for flag in FLAGS if getattr(spec, flag)}
    return load_kernel(
        spec.op,
        d_out=spec.d_out,
        d_out_2=spec.d_out_2 or None,
        d_out_3=spec.d_out_3 or None,
        d_in=spec.d_in or 1,
        rank=spec.rank or 1,
        tokens=tokens or spec.tokens or 1,
        dtype=spec.weight if spec.format else TORCH_DTYPES[spec.weight or spec.activation],
        adapter_dtype=TORCH_DTYPES[spec.adapter] if spec.adapter else None,
        device=CPU if spec.gpu == CPU else "cuda",
        **flags,
    )


def peak_mb(call: Callable[[], object], device: str = "cuda", *, held: int | None = None) -> float | None:
    """The megabytes (10**6 bytes) at the peak of a call beyond ``held`` bytes, its result included.

    By default ``held`` is what is in use before the call, which then runs once before: what it keeps for later calls is
    not counted. ``device`` is the type of the device; None where that is no GPU.
    """
    if held is None:
        call()
        held = allocated_bytes(device)
    if not _is_gpu(device):
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6


def allocated_bytes(device: str) -> int:
    """The bytes of GPU memory in use by tensors, 0 for a CPU."""
    if not _is_gpu(device):
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _is_gpu(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_available()


def release_memory(device: torch.device) -> None:
    """Collect modules in reference cycles, and release the blocks of GPU memory that no tensor uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def left_out(name: str, failure: Exception) -> str:
    """The note for an implementation that takes no part because it failed."""
    reason = next(iter(str(failure).splitlines()), "")
    return f"{name} left out: {type(failure).__name__}: {reason}"


def time_in_turn(
    running: Mapping[str, Callable[[Inputs], object]],
    rotation: Rotation[Inputs],
    *,
    rounds: int,
    case: str,
    notes: list[str],
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Microseconds of one call in each round, and the peak memory of one call, by implementation.

    A peer that cannot be captured is left out, with a note that begins with ``case``.
    """
    peaks: dict[str, float | None] = {}
    graphs = {}
    for name, run in running.items():
        try:
            peak = peak_mb(rotation.calls(run)[0])
            graphs[name] = rotation.capture(run)
        except Exception as failure:
            if name == OURS:
                raise
            notes.append(f"{case}: {left_out(name, failure)}")
        else:
            peaks[name] = peak
    return interleaved_us(graphs, rounds=rounds), peaks
