"""DoRA's forward and hand-written backward: one autograd function for both public forms.

    forward    y = g*(base + s*h@B.T) + b, h = x@A.T, g = m / max(w, eps); delta form: (g-1)*base + g*s*h@B.T
    backward   dYg = g*dY and dg_base = sum_t dY*base (one pass), P = dY.T@h, t = s*dYg@B
               dX = dYg@W + t@A, dB = g*s*P, dA = t.T@x, dm = (dg_base + s*rowsum(B*P)) / max(w, eps), db = sum_t dY

Either the function owns the base product (``weight`` is given: dX has both terms, one GEMM accumulated into the other,
and the graph of ``base`` gets no gradient), or ``base`` is somebody else's and its whole gradient is dYg. w carries no
gradient (DoRA, arXiv 2402.09353, section 4.3). s is folded into the products of rank r, so that no pass over
[T, d_out] is spent on it.

What dg needs is kept in memory that nobody else can write to, because kernels that PyTorch does not see (fused
activations, rotary embeddings) overwrite the y that they are given: the base product where its memory is the function's
own, at no cost, else a copy of it. It is the base product in every pass, whoever watches: a checkpoint hands the
backward of its forward pass what its recompute kept. Only where one kernel computes all of y (``dora_linear_forward``)
is there no base product; that kernel writes inner = base + s*h@B.T instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..internals.torch import current_backward, is_recording, knows_backward
from . import operators
from .differentiation import once_only, without_autocast
from .norm import norm_and_gain_of, safe_norm
from .norm_cache import NormCache
from .tracing import recorded_dora
from .watching import hidden


class Form(NamedTuple):
    """What is computed, besides the tensors.

    ``function`` is the public name, for messages. ``dtype`` is what products run in. ``exact`` keeps fp32 adapters
    beside 16-bit activations as they are, where autocast would round them. ``base_has_bias``: ``base`` already
    contains the bias. ``owns_memory``: nobody else has the memory of ``base``. ``train``: save for a backward pass.
    """

    function: str
    scaling: float
    dtype: torch.dtype
    exact: bool
    delta: bool = False
    base_has_bias: bool = False
    owns_memory: bool = False
    train: bool = False


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass; None where no gradient asks for it.

    ``norm`` is w itself, before it is kept away from zero. ``kept`` is what dg comes from: the base product without
    bias, or base + s*h@B.T where ``is_inner``.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    g: torch.Tensor
    norm: torch.Tensor
    h: torch.Tensor
    kept: torch.Tensor | None
    is_inner: bool


def dora(
    form: Form,
    x: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | NormCache | None,
) -> torch.Tensor:
    """Run ``form`` on checked tensors with any leading dimensions; differentiable where something asks for a gradient.

    ``norm`` is w, or a cache to take it from, or None to compute it from ``weight``. Autocast may be on: what enters a
    product here has its dtype already, so there is nothing to switch off. No mode sees what happens here: a recompute
    that reuses the norm does less than its forward pass did, and selective checkpointing counts operations in both.
    """
    if is_recording():
        a, b = (lora_A, lora_B) if form.exact else (_as(lora_A, form.dtype), _as(lora_B, form.dtype))
        known = norm if isinstance(norm, torch.Tensor) else None
        return recorded_dora(x, base, weight, a, b, magnitude, bias, known, form.scaling, delta=form.delta)
    if not form.train:
        with torch.no_grad(), hidden():
            return _forward(form, x, base, weight, lora_A, lora_B, magnitude, bias, norm, needs_dg=False)[0]
    with hidden():
        result: torch.Tensor = _Dora.apply(  # type: ignore[no-untyped-call]
            x, base, weight, lora_A, lora_B, magnitude, bias, norm, form
        )
    return result


def _forward(
    form: Form,
    x: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | NormCache | None,
    *,
    needs_dg: bool,
) -> tuple[torch.Tensor, _Saved]:
    scaling, dtype = form.scaling, form.dtype
    rows = _rows(x)
    a, b = (lora_A, lora_B) if form.exact else (_as(lora_A, dtype), _as(lora_B, dtype))
    if isinstance(norm, torch.Tensor):
        g = magnitude / safe_norm(norm)
    elif norm is None:
        assert weight is not None
        norm, g = norm_and_gain_of(weight, a, b, magnitude, scaling)
    else:
        assert weight is not None
        norm, g = norm.gain_of_weight(weight, lora_A, lora_B, magnitude, scaling, rounded=(a, b), trains=form.train)

    extra = None if bias is None else _as(bias, dtype)
    h = torch.mm(rows.to(a.dtype) if form.exact else rows, a.T)
    left, right = _split(h, b, dtype) if form.exact else (h, b)
    kept: torch.Tensor | None
    fused = base is None and not form.delta and _fuses(rows, weight, right, extra, save=needs_dg)
    if fused:
        assert weight is not None
        y, *inner = operators.dora_linear_forward(rows, _as(weight, dtype), left, right, g, extra, scaling, needs_dg)
        kept = inner[0] if needs_dg else None
    else:
        owned = form.owns_memory or base is None
        if base is None:
            assert weight is not None
            base = rows @ _as(weight, dtype).T
        else:
            base = _rows(base.detach())  # what is written to it, and kept of it, is no business of its graph
        if extra is not None and form.base_has_bias:
            # A pass of its own: folded into the composition as (1-g)*b it would cancel to nothing where g is large, and
            # a zero row (base = b, g = m/eps) must give y = b.
            base = base.sub_(extra) if owned and not torch.compiler.is_compiling() else base - extra
            owned = True
        kept = None if not needs_dg else base if owned else base.clone()
        if form.delta:
            extra = None
        compose = operators.lora_compose_ if owned and not needs_dg else operators.lora_compose
        y = compose(base, left, right, g, extra, scaling, form.delta)
    # Detached, y is no view in autograd's eyes: to change it in place is the caller's right.
    return y.view(*x.shape[:-1], y.shape[-1]).detach(), _Saved(a, b, g, norm, h, kept, fused)


def _fuses(
    rows: torch.Tensor, weight: torch.Tensor | None, lora_B: torch.Tensor, bias: torch.Tensor | None, *, save: bool
) -> bool:
    """Whether one operator makes the base product too: under a compiler always, it decides when it runs."""
    assert weight is not None
    if torch.compiler.is_compiling():
        return True
    return operators.fusion_pays(rows, _as(weight, rows.dtype), lora_B, bias=bias is not None, save=save)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as [T, n]."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in ``dtype``; PyTorch is not asked where it is so already, as it is most often."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _split(h: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """An fp32 h as the sum of two of ``dtype`` side by side, and B twice: the same product over twice the rank."""
    high = h.to(dtype)
    low = (h - high).to(dtype)
    return torch.cat((high, low), dim=1), torch.cat((b, b), dim=1)


def _product(
    left: torch.Tensor, right: torch.Tensor, scaling: float, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``s * left @ right`` in ``dtype``; ``like`` is any tensor of the factors' dtype that expands to the result."""
    wide = dtype is torch.float32 and left.dtype is not torch.float32
    if wide and left.is_cuda and not torch.compiler.is_compiling():
        product = operators.wide_product(left, right)  # the accumulator as it is: no rounding, no cast
        return product if scaling == 1.0 else product.mul_(scaling)
    if scaling == 1.0:
        return _as(left @ right, dtype)
    return _as(torch.addmm(like, left, right, beta=0, alpha=scaling), dtype)  # beta=0: like is not read


def _parameters(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Those of ``tensors`` that are parameters, None in place of the others.

    A parameter lives as long as its module, so autograd need not keep it for the backward pass, and to be kept has its
    price: under gradient checkpointing three calls of Python for each tensor.
    """
    if torch.compiler.is_compiling() or not knows_backward:  # then autograd follows what it keeps itself
        return [None] * len(tensors)
    return [tensor if type(tensor) is nn.Parameter else None for tensor in tensors]


_recomputed: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
"""Of parameters, by their id, in which backward pass a checkpoint last computed with them, and their version then."""


def _versions(parameters: Sequence[torch.Tensor | None]) -> list[int]:
    """The versions of ``parameters``, for :func:`_check_unwritten`."""
    if torch.compiler.is_compiling():
        return []
    versions = [0 if parameter is None else parameter._version for parameter in parameters]
    task = current_backward()
    if task != -1:
        for parameter, version in zip(parameters, versions, strict=True):
            if parameter is not None:
                _recomputed[id(parameter)] = (weakref.ref(parameter), task, version)
    return versions


def _check_unwritten(parameters: Sequence[torch.Tensor | None], versions: Sequence[int]) -> None:
    """Raise a RuntimeError, as autograd does for what it keeps, if one was written to since it had these versions.

    Of a checkpointed layer autograd keeps what the recompute saw, so there the version is that of the recompute.
    """
    for parameter, version in zip(parameters, versions, strict=False):  # a compiler keeps all itself
        if parameter is None or parameter._version == version:
            continue
        known, task, again = _recomputed.get(id(parameter), (None, -1, -1))
        if known is None or known() is not parameter or (task, again) != (current_backward(), parameter._version):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"weight {list(parameter.shape)} of a DoRA layer, between its forward and its backward pass"
            )


class _Dora(torch.autograd.Function):
    """The function of this module's head. Inputs: x, base, weight, A, B, m, bias, w, form."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor | None,
        weight: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        norm: torch.Tensor | NormCache | None,
        form: Form,
    ) -> torch.Tensor:
        need_x, _, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        y, saved = _forward(form, x, base, weight, lora_A, lora_B, magnitude, bias, norm, needs_dg=need_m)
        ctx.form, ctx.owns_base, ctx.kept_inner = form, weight is not None, saved.is_inner
        ctx.adapter_dtype, ctx.magnitude_dtype = lora_A.dtype, magnitude.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        weights = (
            weight if need_x else None,
            saved.lora_A if need_x else None,
            saved.lora_B if need_x or need_a or need_b or need_m else None,
        )
        ctx.held = held = _parameters(weights)
        ctx.versions = _versions(held)
        ctx.save_for_backward(
            x if need_a else None,
            saved.g,
            saved.norm if need_m else None,
            saved.h if need_b or need_m else None,
            saved.kept,
            *[tensor if parameter is None else None for tensor, parameter in zip(weights, held, strict=True)],
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            with without_autocast(dy.device):
                return _backward(ctx, dy, release=not torch.compiler.is_compiling())
        with torch.no_grad(), without_autocast(dy.device):
            grads = _backward(ctx, dy, release=False)
        return once_only(ctx.form.function, grads, (dy, *ctx.saved_tensors, *ctx.held))


def _backward(ctx: Any, dy: torch.Tensor, *, release: bool) -> tuple[torch.Tensor | None, ...]:
    """The gradients of :class:`_Dora`; ``release`` lets go of saved tensors early, unless the graph is retained."""
    x, g, norm, h, kept, *saved = ctx.saved_tensors
    _check_unwritten(ctx.held, ctx.versions)
    weight, a, b = [other if held is None else held for held, other in zip(ctx.held, saved, strict=True)]
    if release:
        ctx.maybe_clear_saved_tensors()
    need_x, need_base, _, need_a, need_b, need_m, need_bias, *_ = ctx.needs_input_grad
    form: Form = ctx.form
    rows = _rows(dy)
    # The gradient of the base. In the delta form it has lost g's digits where g is near 1, so there g goes into the
    # products of rank r instead, which take dY itself.
    gain = g - 1.0 if form.delta else g
    dx = da = db = dmagnitude = dbias = total = None
    if need_m:
        dbase, dg, *sums = operators.compose_backward(rows, kept.reshape(rows.shape), gain, need_bias)
        total = sums[0] if need_bias else None
        if ctx.kept_inner:
            dmagnitude = _as(dg / safe_norm(norm), ctx.magnitude_dtype)
        else:
            db, dmagnitude = operators.adapter_backward(
                _as(rows, b.dtype), h, b, g, dg, norm, form.scaling, ctx.adapter_dtype, ctx.magnitude_dtype
            )
        kept = None  # its memory is there for what comes now
    else:
        dbase = _as(rows * gain, rows.dtype)
        if need_bias:
            total = rows.sum(dim=0, dtype=g.dtype)
    if need_bias:
        assert total is not None
        dbias = _bias_gradient(form, ctx.owns_base, g, total).to(ctx.bias_dtype)

    if need_x or need_a or need_b:
        low, down = (rows, _as(b * g[:, None], b.dtype)) if form.delta else (dbase, b)
        low = _as(low, b.dtype)  # wider when adapters are exact, else the same
        if need_x or need_a:
            t = _product(low, down, form.scaling, b[:1], low.dtype)
        if need_b and db is None:
            db = _as(g[:, None] * (form.scaling * operators.wide_product(_as(rows, b.dtype).T, h)), ctx.adapter_dtype)
        if need_a:
            da = _product(t.T, _as(_rows(x), t.dtype), 1.0, t, ctx.adapter_dtype)
        if need_x:
            if not ctx.owns_base:
                dx = _as(t @ a, rows.dtype)
            elif form.exact:
                dx = (dbase @ _as(weight, dbase.dtype)).add_(t @ a)
            else:
                dx = operators.sum_of_products(dbase, _as(weight, dbase.dtype), t, a)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    return dx, dbase.view(dy.shape) if need_base else None, None, da, db, dmagnitude, dbias, None, None


def _bias_gradient(form: Form, owns_base: bool, g: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """db from ``total`` = sum_t dY: what the graph of a foreign base with b in it delivers itself is left out."""
    if form.base_has_bias and not owns_base:
        return (1.0 - g) * total
    return torch.zeros_like(total) if form.delta else total
