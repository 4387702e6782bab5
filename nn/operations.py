"""The operations of the contract on plain tensors: the tuned kernel where there is one, the eager reference elsewhere.

This is the one place that chooses. Tensors on a GPU that doratune knows run what ``load_kernel`` finds; CPU tensors,
fp64 and unknown GPUs run :mod:`doratune.runtime.reference` on the tensors' own device. Nothing here is differentiable
and nothing is checked: the callers (:mod:`.linear`, :mod:`.compose`, :mod:`.norm`) have done both.

While ``torch.compile`` traces, the same functions appear in the graph as the opaque ``doratune::…`` operators of
:mod:`.library`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..codegen.ops import EPS
from ..codegen.spec import KernelSpec, bucket_tokens
from ..runtime.kernel import Kernel
from ..runtime.loader import CPU, load_kernel
from ..runtime.reference import TORCH_DTYPES, Tensors, definition, reference
from .differentiation import without_autocast

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
    as it is when given, and computed on the way otherwise. Rows whose terms nearly cancel are summed directly.
    """
    if torch.compiler.is_compiling():
        norm, squares = torch.ops.doratune.weight_norm(weight, lora_A, lora_B, weight_sq, scaling)
        return norm, squares if weight_sq is None else weight_sq
    norm, squares, _ = _weight_norm(weight, lora_A, lora_B, weight_sq, None, scaling)
    return norm, squares


def weight_norm_and_gain(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    magnitude: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w as :func:`weight_norm` does and ``g = m / max(w, eps)``, both [d_out] fp32 (fp64 from fp64)."""
    if magnitude.dtype is torch.float64 and weight.dtype is not torch.float64:
        norm, _ = weight_norm(weight, lora_A, lora_B, weight_sq, scaling)
        return norm, magnitude / norm.clamp_min(EPS)
    if torch.compiler.is_compiling():
        norm, g = torch.ops.doratune.weight_norm_and_gain(weight, lora_A, lora_B, weight_sq, magnitude, scaling)
        return norm, g
    norm, _, g = _weight_norm(weight, lora_A, lora_B, weight_sq, magnitude, scaling)
    assert g is not None
    return norm, g


def _weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    magnitude: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """w, nW and, where a magnitude is given, g: the factored norm, then the rows in which that has lost its digits."""
    d_out, d_in = weight.shape
    inputs = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if weight_sq is not None:
        inputs["weight_sq"] = weight_sq
    flags = ("save",) if weight_sq is None else ()
    sizes = (d_out, d_in, lora_A.shape[0], 1, weight.dtype, lora_A.dtype)
    exact = ("weight_norm_exact", *sizes, (), None if magnitude is None else magnitude.dtype)
    kernel = _kernel("weight_norm", *sizes, flags, None, weight.device)
    if kernel is None:
        results = _eager(_spec("weight_norm", *sizes, flags, None), inputs, scaling)
        if weight_sq is None:
            weight_sq = results["weight_sq"]
        inputs |= {"weight_sq": weight_sq, "norm": results["norm"]}
        if magnitude is not None:
            inputs["magnitude"] = magnitude
        results = _eager(_spec(*exact), inputs, scaling)
        return results["norm_exact"], weight_sq, results.get("g")
    if weight.stride(1) != 1:
        weight = weight.contiguous()  # once: each of the two kernels would copy it
    norm = torch.empty(d_out, dtype=torch.float32, device=weight.device)
    if weight_sq is None:
        weight_sq = torch.empty_like(norm)
        kernel.launch((weight, lora_A, lora_B), (norm, weight_sq), scaling)
    else:
        kernel.launch((weight, lora_A, lora_B, weight_sq), (norm,), scaling)
    corrects = _kernel(*exact, weight.device)
    assert corrects is not None  # of the same device and dtypes
    given = (weight, lora_A, lora_B, weight_sq, norm)
    if magnitude is None:
        corrects.launch(given, (norm,), scaling)
        return norm, weight_sq, None
    g = torch.empty_like(norm)
    corrects.launch((*given, magnitude), (norm, g), scaling)
    return norm, weight_sq, g


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
    flags = _flags(bias=bias is not None, delta=delta, save=save)
    key = ("lora_compose", d_out, 1, h.shape[1], _bucket(tokens), base.dtype, lora_B.dtype, flags, None)
    kernel = _kernel(*key, base.device) if tokens else None
    if kernel is None:
        results = _eager(_spec(*key), inputs, scaling)
        return results["y"], results.get("inner")
    if overwrite and base.stride(-1) == 1:
        y = base
        torch.autograd.graph.increment_version(base)  # a launch does not show in it, and autograd must see the write
    else:
        y = torch.empty_like(base, memory_format=torch.contiguous_format)
    if not save:
        kernel.launch(tuple(inputs.values()), (y,), scaling)
        return y, None
    inner = torch.empty_like(base, memory_format=torch.contiguous_format)
    kernel.launch(tuple(inputs.values()), (y, inner), scaling)
    return y, inner


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y = g*(x@W.T + s*h@B.T) + b, and inner when ``save``: :func:`lora_compose` of the base product ``x@W.T``.

    Where a store says that it is faster, one kernel computes all of it (``dora_linear_forward``). Its base product is
    not rounded on the way. x [T, d_in] and weight [d_out, d_in] in one dtype.
    """
    if torch.compiler.is_compiling():
        compiled, kept = torch.ops.doratune.dora_linear(x, weight, h, lora_B, g, bias, scaling, save)
        return compiled, kept if save else None
    kernel = _fused_kernel(x, weight, lora_B, bias is not None, save)
    if kernel is not None:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        inner = torch.empty_like(y) if save else None
        inputs = (x, weight, h, lora_B, g)
        kernel.launch(inputs if bias is None else (*inputs, bias), (y,) if inner is None else (y, inner), scaling)
        return y, inner
    return lora_compose(x @ weight.T, h, lora_B, g, scaling, bias=bias, save=save, overwrite=True)


def compose_backward(
    dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return dYg = g*dY [T, d_out], dg = sum_t dY*inner [d_out] fp32 and, when ``bias``, db = sum_t dY [d_out] fp32."""
    if torch.compiler.is_compiling():
        dyg, dg, dbias = torch.ops.doratune.compose_backward(dy, inner, g, bias)
        return dyg, dg, dbias if bias else None
    tokens, d_out = dy.shape
    key = ("compose_backward", d_out, 1, 1, _bucket(tokens), dy.dtype, dy.dtype, _flags(bias=bias), None)
    kernel = _kernel(*key, dy.device) if tokens else None
    if kernel is None:
        results = _eager(_spec(*key), {"dy": dy, "inner": inner, "g": g}, 1.0)
        return results["dyg"], results["dg"], results.get("dbias")
    dyg = torch.empty_like(dy, memory_format=torch.contiguous_format)
    dg = torch.empty(d_out, dtype=torch.float32, device=dy.device)
    if not bias:
        kernel.launch((dy, inner, g), (dyg, dg))
        return dyg, dg, None
    dbias = torch.empty_like(dg)
    kernel.launch((dy, inner, g), (dyg, dg, dbias))
    return dyg, dg, dbias


def adapter_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    dg_base: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
    adapter: torch.dtype,
    magnitude: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dB = g*s*P [d_out, r] with P = dY.T@h, and dm = (dg_base + s*rowsum(B*P)) / max(w, eps) [d_out].

    dy [T, d_out], h [T, r] and lora_B [d_out, r] in one dtype; ``dg_base`` = sum_t dY*base and norm [d_out] fp32.
    ``adapter`` and ``magnitude`` are the dtypes of dB and dm. The rank-r term of dg needs no pass over [T, d_out], and
    nothing is divided by g.
    """
    if torch.compiler.is_compiling():
        db, dm = torch.ops.doratune.adapter_backward(dy, h, lora_B, g, dg_base, norm, scaling, adapter, magnitude)
        return db, dm
    product = wide_product(dy.T, h)
    d_out, rank = product.shape
    wide = product.dtype
    stored = adapter if adapter in (lora_B.dtype, wide) else wide  # dtypes that a kernel has; else converted at the end
    divided = wide if magnitude is torch.float64 else magnitude
    inputs = {"product": product, "lora_B": lora_B, "g": g, "dg_base": dg_base, "norm": norm}
    key = ("adapter_backward", d_out, 1, rank, 1, lora_B.dtype, stored, (), divided)
    kernel = _kernel(*key, dy.device)
    if kernel is None:
        results = _eager(_spec(*key), inputs, scaling)
        db, dm = results["dlora_B"], results["dmagnitude"]
    else:
        db = torch.empty(d_out, rank, dtype=stored, device=dy.device)
        dm = torch.empty(d_out, dtype=divided, device=dy.device)
        kernel.launch(tuple(inputs.values()), (db, dm), scaling)
    return (db if db.dtype is adapter else db.to(adapter)), (dm if dm.dtype is magnitude else dm.to(magnitude))


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in fp32 (fp64 from fp64), as it was accumulated: not rounded to 16 bits on the way."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float() if left.device.type == "cpu" else (left @ right).float()


def fusion_pays(
    x: torch.Tensor, weight: torch.Tensor, lora_B: torch.Tensor, *, bias: bool = False, save: bool = False
) -> bool:
    """Whether :func:`dora_linear` computes these operands in one kernel, without a base product in memory."""
    return _fused_kernel(x, weight, lora_B, bias, save) is not None


def sum_of_products(left: torch.Tensor, right: torch.Tensor, low: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return ``left@right + low@down``, [T, n] in the factors' dtype: one product accumulated into the other."""
    if torch.compiler.is_compiling():  # which would copy the first product before it adds to it
        total: torch.Tensor = torch.ops.doratune.sum_of_products(left, right, low, down)
        return total
    return (left @ right).addmm_(low, down)


def _fused_kernel(x: torch.Tensor, weight: torch.Tensor, lora_B: torch.Tensor, bias: bool, save: bool) -> Kernel | None:
    """The kernel of ``dora_linear_forward`` for these operands, if a store says that it is faster."""
    tokens, d_in = x.shape
    if not tokens or weight.stride(1) != 1:  # a kernel would have a W that lies by columns copied, at every call
        return None
    d_out, rank = lora_B.shape
    flags = _flags(bias=bias, save=save)
    key = ("dora_linear_forward", d_out, d_in, rank, _bucket(tokens), x.dtype, lora_B.dtype, flags, None)
    return _paying_kernel(*key, x.device)


def _flags(**flags: bool) -> tuple[str, ...]:
    return tuple(name for name, on in flags.items() if on)


def _bucket(tokens: int) -> int:
    return bucket_tokens(tokens) if tokens else 1  # no token: nothing is launched


def _eager(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    first = next(iter(inputs.values()))
    compute = definition if first.dtype is torch.float64 else reference
    with torch.no_grad(), without_autocast(first.device):
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
    flags: tuple[str, ...],
    magnitude: torch.dtype | None,
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
            magnitude_dtype=magnitude,
            bias="bias" in flags,
            delta="delta" in flags,
            save="save" in flags,
            output="output" in flags,
            device=device,
        )
    except UnknownGpuError:
        return None


@functools.cache
def _paying_kernel(*key: Any) -> Kernel | None:
    """The kernel of :func:`_kernel` if its fusion pays."""
    kernel = _kernel(*key)
    return kernel if kernel is not None and kernel.fusion_pays else None


@functools.cache
def _spec(
    op: str,
    d_out: int,
    d_in: int,
    rank: int,
    bucket: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    flags: tuple[str, ...],
    magnitude: torch.dtype | None,
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
        magnitude=None if magnitude is None else _SPEC_DTYPES[magnitude],
        gpu=CPU,
        **dict.fromkeys(flags, True),
    )
