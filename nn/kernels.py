"""Choose the kernel of an operation on given tensors, or the eager reference.

No other module chooses. Tensors on a supported GPU run the kernel that ``load_kernel`` finds. CPU tensors, fp64 tensors
and tensors on other GPUs run :mod:`doratune.runtime.reference` on their own device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch

from ..codegen.ops import WIDTHS
from ..codegen.spec import KernelSpec, bucket_tokens
from ..runtime.kernel import Kernel
from ..runtime.loader import CPU, load_kernel
from ..runtime.reference import TORCH_DTYPES, Tensors, definition, reference
from .autocast import without_autocast
from .rehearsal import META, StandIn

SPEC_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.float64: "fp32"}
"""Specs have no name for fp64. The fp64 definition, which computes fp64 tensors, ignores the dtype of its spec."""


@functools.cache
def kernel_for(
    op: str,
    d_out: int | tuple[int, ...],
    d_in: int,
    rank: int,
    bucket: int,
    dtype: torch.dtype | str,
    adapter: torch.dtype,
    flags: tuple[str, ...],
    magnitude: torch.dtype | None,
    device: torch.device,
) -> Kernel | None:
    """The kernel for these tensors; None where the eager reference runs. For meta tensors, a :class:`StandIn`.

    ``d_out`` are all widths of a group. ``dtype`` may be the text of a weight format.
    """
    from ..codegen.gpu import UnknownGpuError

    if not isinstance(dtype, str) and (dtype not in SPEC_DTYPES or dtype is torch.float64):
        return None
    if device.type == META:
        found = functools.partial(kernel_for, op, d_out, d_in, rank, bucket, dtype, adapter, flags, magnitude)
        return cast(Kernel, StandIn(found))
    if device.type != "cuda":
        return None
    wanted: dict[str, Any] = {**_widths(d_out), **dict.fromkeys(flags, True)}
    try:
        return load_kernel(
            op,
            d_in=d_in,
            rank=rank,
            tokens=bucket,
            dtype=dtype,
            adapter_dtype=adapter,
            magnitude_dtype=magnitude,
            device=device,
            **wanted,
        )
    except UnknownGpuError:
        return None


def specialises_warps(kernel: Kernel | None) -> bool:
    """Whether there is a kernel, on a GPU that has variants with specialised warps."""
    return kernel is not None and kernel.specialises_warps


def _widths(d_out: int | tuple[int, ...]) -> dict[str, int]:
    return {"d_out": d_out} if isinstance(d_out, int) else dict(zip(WIDTHS, d_out, strict=False))


@functools.cache
def paying_kernel_for(*key: Any) -> Kernel | None:
    """The kernel of :func:`kernel_for` if its fusion pays. (A rehearsal on another GPU may be told of the first.)"""
    kernel = kernel_for(*key)
    return kernel if kernel is not None and kernel.fusion_pays else None


@functools.cache
def spec_for(
    op: str,
    d_out: int | tuple[int, ...],
    d_in: int,
    rank: int,
    bucket: int,
    dtype: torch.dtype | str,
    adapter: torch.dtype,
    flags: tuple[str, ...],
    magnitude: torch.dtype | None,
) -> KernelSpec:
    """The spec that tells the eager reference what to compute."""
    return KernelSpec.create(
        op,
        **_widths(d_out),
        d_in=d_in,
        rank=rank,
        tokens=bucket,
        dtype=dtype if isinstance(dtype, str) else SPEC_DTYPES[dtype],
        adapter=SPEC_DTYPES[adapter],
        magnitude=None if magnitude is None else SPEC_DTYPES[magnitude],
        gpu=CPU,
        **dict.fromkeys(flags, True),
    )


def run_reference(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    """The outputs of ``spec`` by name, from the eager reference (the fp64 definition for fp64 tensors)."""
    first = next(iter(inputs.values()))
    compute = definition if first.dtype is torch.float64 else reference
    with torch.no_grad(), without_autocast(first.device):
        return compute(spec, inputs, scaling)


def run_reference_on(spec: KernelSpec, inputs: Sequence[torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """As :func:`run_reference`, for inputs in the order of the contract."""
    names = [operand.name for operand in spec.contract.inputs_of(spec)]
    return run_reference(spec, dict(zip(names, inputs, strict=True)), scaling)


@functools.cache
def flags_of(**flags: bool) -> tuple[str, ...]:
    """The names of the flags that are on."""
    return tuple(name for name, on in flags.items() if on)


@functools.cache
def token_bucket(tokens: int) -> int:
    """The bucket of a number of tokens; 1 for zero tokens, for which no kernel is launched."""
    return bucket_tokens(tokens) if tokens else 1


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of sums and norms of ``tensor``: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32
