"""The operations of the contract on plain tensors: the tuned kernel where there is one, the eager reference elsewhere.

This is the one place that chooses. Tensors on a GPU that doratune knows run what ``load_kernel`` finds; CPU tensors,
fp64 and unknown GPUs run :mod:`doratune.runtime.reference` on the tensors' own device. Nothing here is differentiable
and nothing is checked: the callers (:mod:`.linear`, :mod:`.compose`, :mod:`.norm`) have done both.

While ``torch.compile`` traces, the same functions appear in the graph as the opaque ``doratune::…`` operators of
:mod:`.library`.
"""

from __future__ import annotations

import functools

import torch

from ..codegen.spec import KernelSpec, bucket_tokens
from .kernel import Kernel
from .loader import CPU, load_kernel
from .reference import TORCH_DTYPES, Tensors, definition, reference

_SPEC_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.float64: "fp32"}
"""fp64 tensors are computed by the fp64 definition, whose spec has no name for their dtype."""


def weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``||W + sBA||`` by rows and ``rowsum(W*W)``, both [d_out] fp32 (fp64 from fp64).

    weight [d_out, d_in], lora_A [r, d_in], lora_B [d_out, r]; A and B in W's dtype or fp32. ``weight_sq`` is returned
    as it is when given, and computed on the way otherwise.
    """
    if torch.compiler.is_compiling():
        norm, squares = torch.ops.doratune.weight_norm(weight, lora_A, lora_B, weight_sq, scaling)
        return norm, squares if weight_sq is None else weight_sq
    d_out, d_in = weight.shape
    save = weight_sq is None
    inputs = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if weight_sq is not None:
        inputs["weight_sq"] = weight_sq
    key = ("weight_norm", d_out, d_in, lora_A.shape[0], 1, weight.dtype, lora_A.dtype, False, False, save)
    kernel = _kernel(*key, weight.device)
    if kernel is None:
        results = _eager(_spec(*key), inputs, scaling)
        norm = results["norm"]
        return norm, results["weight_sq"] if weight_sq is None else weight_sq
    norm = torch.empty(d_out, dtype=torch.float32, device=weight.device)
    if weight_sq is not None:
        kernel.launch(_ready(inputs), (norm,), scaling)
        return norm, weight_sq
    squares = torch.empty_like(norm)
    kernel.launch(_ready(inputs), (norm, squares), scaling)
    return norm, squares


def lora_compose(
    base: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    delta: bool = False,
    save: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y = g*(base + s*h@B.T) + b, or the delta form (g-1)*base + g*s*h@B.T; and inner when ``save``.

    base [T, d_out], h [T, r] and bias [d_out] in one dtype, lora_B [d_out, r] in it or fp32, g [d_out] fp32.
    ``overwrite`` lets y take the memory of ``base``.
    """
    if torch.compiler.is_compiling():
        y, inner = torch.ops.doratune.lora_compose(base, h, lora_B, g, bias, scaling, delta, save)
        return y, inner if save else None
    tokens, d_out = base.shape
    inputs = {"base": base, "h": h, "lora_B": lora_B, "g": g}
    if bias is not None:
        inputs["bias"] = bias
    bucket = bucket_tokens(max(tokens, 1))
    key = ("lora_compose", d_out, 1, h.shape[1], bucket, base.dtype, lora_B.dtype, bias is not None, delta, save)
    kernel = _kernel(*key, base.device) if tokens else None
    if kernel is None:
        results = _eager(_spec(*key), inputs, scaling)
        return results["y"], results.get("inner")
    tensors = _ready(inputs)
    if overwrite:
        y = tensors[0]
        torch.autograd.graph.increment_version(y)  # a launch does not show in it, and autograd must see the write
    else:
        y = torch.empty_like(tensors[0])
    if not save:
        kernel.launch(tensors, (y,), scaling)
        return y, None
    inner = torch.empty_like(tensors[0])
    kernel.launch(tensors, (y, inner), scaling)
    return y, inner


def compose_backward(
    dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return dYg = g*dY [T, d_out], dg = sum_t dY*inner [d_out] fp32 and, when ``bias``, db = sum_t dY [d_out] fp32."""
    if torch.compiler.is_compiling():
        dyg, dg, dbias = torch.ops.doratune.compose_backward(dy, inner, g, bias)
        return dyg, dg, dbias if bias else None
    tokens, d_out = dy.shape
    inputs = {"dy": dy, "inner": inner, "g": g}
    key = ("compose_backward", d_out, 1, 1, bucket_tokens(max(tokens, 1)), dy.dtype, dy.dtype, bias, False, False)
    kernel = _kernel(*key, dy.device) if tokens else None
    if kernel is None:
        results = _eager(_spec(*key), inputs, 1.0)
        return results["dyg"], results["dg"], results.get("dbias")
    tensors = _ready(inputs)
    dyg = torch.empty_like(tensors[0])
    dg = torch.empty(d_out, dtype=torch.float32, device=dy.device)
    if not bias:
        kernel.launch(tensors, (dyg, dg))
        return dyg, dg, None
    dbias = torch.empty_like(dg)
    kernel.launch(tensors, (dyg, dg, dbias))
    return dyg, dg, dbias


def _ready(inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The inputs in a layout that kernels read: contiguous."""
    return tuple(t if t.is_contiguous() else t.contiguous() for t in inputs.values())


def _eager(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    compute = definition if next(iter(inputs.values())).dtype is torch.float64 else reference
    with torch.no_grad():
        return compute(spec, inputs, scaling)


@functools.cache
def _kernel(
    op: str,
    d_out: int,
    d_in: int,
    rank: int,
    bucket: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    bias: bool,
    delta: bool,
    save: bool,
    device: torch.device,
) -> Kernel | None:
    """The kernel for these tensors; None where the eager reference runs. No text is made once it is cached."""
    from ..codegen.gpu import UnknownGpuError

    if device.type != "cuda" or dtype not in _SPEC_DTYPES or dtype is torch.float64:
        return None
    try:
        return load_kernel(
            op,
            d_out=d_out,
            d_in=d_in,
            rank=rank,
            tokens=bucket,
            dtype=dtype,
            adapter_dtype=adapter,
            bias=bias,
            delta=delta,
            save=save,
            device=device,
        )
    except UnknownGpuError:
        return None


@functools.cache
def _spec(
    op: str,
    d_out: int,
    d_in: int,
    rank: int,
    bucket: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    bias: bool,
    delta: bool,
    save: bool,
) -> KernelSpec:
    """The spec by which the eager reference knows what to compute."""
    return KernelSpec.create(
        op,
        d_out=d_out,
        d_in=d_in,
        rank=rank,
        tokens=bucket,
        dtype=_SPEC_DTYPES[dtype],
        adapter=_SPEC_DTYPES[adapter],
        bias=bias,
        delta=delta,
        save=save,
        gpu=CPU,
    )
