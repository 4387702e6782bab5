"""DoRA's forward and hand-written backward pass: one autograd function for both public forms.

    forward    y = g*(base + s*h@B.T) + b, h = x@A.T, g = m / max(w, eps); delta form: (g-1)*base + g*s*h@B.T
    backward   dYg = g*dY and dg_base = sum_t dY*base (one pass), P = dY.T@h, t = s*dYg@B
               dX = dYg@W + t@A, dB = g*s*P, dA = t.T@x, dm = (dg_base + s*rowsum(B*P)) / max(w, eps), db = sum_t dY

If ``weight`` is given, the function owns the base product: dX has both terms (one GEMM accumulates into the other), and
the graph of ``base`` gets no gradient. Otherwise the caller owns ``base``, and its gradient is dYg. w carries no
gradient (DoRA, arXiv 2402.09353, section 4.3). s is folded into the products of rank r, which saves a pass over
[T, d_out].

The backward pass computes dg from the saved base product. It must be in memory that no other code writes to: kernels
that PyTorch does not see (fused activations, rotary embeddings) may overwrite y. So the function saves ``base`` itself
if it owns that memory, and otherwise a copy. Every pass saves the same tensor, with or without dispatch modes, because
a checkpoint gives what its recompute saved to the backward pass of the original forward pass. The exception: if one
kernel computes all of y (``dora_linear_forward``), there is no base product, and it saves inner = base + s*h@B.T.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..internals.torch import current_backward, is_recording, knows_backward
from . import operators
from .autocast import without_autocast
from .differentiation import once_only
from .kernels import wide_dtype
from .norm import NormAndGain, norm_and_gain_of, safe_norm
from .norm_cache import NormCache
from .tracing import recorded_dora
from .watching import hidden

_NOTHING = contextlib.nullcontext()


class Form(NamedTuple):
    """The settings of a call, other than its tensors.

    ``function`` is the public name, for messages. ``dtype`` is the dtype of the products. ``exact`` keeps fp32 adapters
    exact with 16-bit activations, where autocast would round them. ``base_has_bias``: ``base`` already contains the
    bias. ``owns_memory``: no other code holds the memory of ``base``. ``train``: save tensors for a backward pass.
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
    """The forward pass's values for the backward pass.

    ``norm`` is w before clamping. ``kept`` is the tensor from which dg is computed: the base product without bias, or
    base + s*h@B.T if ``is_inner``; None if no gradient needs it.
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
    norm: torch.Tensor | NormAndGain | NormCache | None,
) -> torch.Tensor:
    """Run ``form`` on checked tensors with any leading dimensions; differentiable if ``form.train``.

    ``norm`` is w, w and g, a cache that provides them, or None to compute it from ``weight``. Autocast may stay on,
    because all factors already have the dtype of the product. Dispatch modes are hidden from these operations:
    selective checkpointing matches the operations of the recompute to those of the forward pass, and a recompute that
    reuses the norm runs fewer.
    """
    if is_recording():
        a, b = (lora_A, lora_B) if form.exact else (_as(lora_A, form.dtype), _as(lora_B, form.dtype))
        known = norm.norm if isinstance(norm, NormAndGain) else norm if isinstance(norm, torch.Tensor) else None
        return recorded_dora(x, base, weight, a, b, magnitude, bias, known, form.scaling, delta=form.delta)
    if not form.train:
        with torch.no_grad(), hidden():
            return _forward(form, x, base, weight, lora_A, lora_B, magnitude, bias, norm, needs_dg=False)[0]
    with hidden():
        result: torch.Tensor = _Dora.apply(  # type: ignore[no-untyped-call]
            x, base, weight, lora_A, lora_B, magnitude, bias, norm, form
        )
    return result


def compose_unseen(
    form: Form,
    x: torch.Tensor,
    base: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | NormAndGain,
) -> torch.Tensor:
    """:func:`dora` over a base layer's output, where nothing records or watches (``undisturbed``)."""
    if form.dtype is not x.dtype:
        x = x.to(form.dtype)
    if form.train:
        result: torch.Tensor = apply_eagerly(_Dora, x, base, None, lora_A, lora_B, magnitude, bias, norm, form)
        return result
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        return _forward(form, x, base, None, lora_A, lora_B, magnitude, bias, norm, needs_dg=False)[0]


def apply_eagerly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` without its preparations for functorch, which must not run."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _forward(
    form: Form,
    x: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | NormAndGain | NormCache | None,
    *,
    needs_dg: bool,
) -> tuple[torch.Tensor, _Saved]:
    scaling, dtype = form.scaling, form.dtype
    rows = _rows(x)
    a, b = (lora_A, lora_B) if form.exact else (_as(lora_A, dtype), _as(lora_B, dtype))
    if isinstance(norm, torch.Tensor):
        g = magnitude / safe_norm(_as(norm, wide_dtype(norm)))  # never in 16 bits
    elif isinstance(norm, NormAndGain):
        norm, g = norm
    elif norm is None:
        assert weight is not None
        norm, g = norm_and_gain_of(weight, a, b, magnitude, scaling)
    else:
        assert weight is not None
        norm, g = norm.gain_of_weight(weight, lora_A, lora_B, magnitude, scaling, rounded=(a, b), trains=form.train)

    wide = torch.float64 if dtype is torch.float64 else torch.float32  # what kernels take, whatever m or w came in
    norm, g = _as(norm, wide), _as(g, wide)
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
            base = _rows(base.detach())  # writing to it or saving it must not involve its graph
        if extra is not None and form.base_has_bias:
            # A separate pass. Folded into the composition as (1-g)*b, the bias would cancel where g is large, but a
            # zero row (base = b, g = m/eps) must give y = b.
            base = base.sub_(extra) if owned and not torch.compiler.is_compiling() else base - extra
            owned = True
        kept = None if not needs_dg else base if owned else base.clone()
        if form.delta:
            extra = None
        compose = operators.lora_compose_ if owned and not needs_dg else operators.lora_compose
        y = compose(base, left, right, g, extra, scaling, form.delta)
    # Without detach() autograd treats y as a view, and the caller could not change it in place.
    return y.view(*x.shape[:-1], y.shape[-1]).detach(), _Saved(a, b, g, norm, h, kept, fused)


def _fuses(
    rows: torch.Tensor, weight: torch.Tensor | None, lora_B: torch.Tensor, bias: torch.Tensor | None, *, save: bool
) -> bool:
    """Whether one operator computes the base product too. Under a compiler always: the operator decides at run time."""
    assert weight is not None
    if torch.compiler.is_compiling():
        return True
    return operators.fusion_pays(rows, _as(weight, rows.dtype), lora_B, bias=bias is not None, save=save)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as [T, n]."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in ``dtype``, without a call of PyTorch in the common case that it has this dtype."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _split(h: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an fp32 h into a high and a low part in ``dtype`` and repeat B: the same product with twice the rank."""
    high = h.to(dtype)
    low = (h - high).to(dtype)
    return torch.cat((high, low), dim=1), torch.cat((b, b), dim=1)


@functools.cache
def _unread(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, 1]: what ``addmm`` adds to a product with beta=0, which it does not read."""
    with torch.inference_mode(False):
        return torch.empty(1, 1, dtype=dtype, device=device)


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """``s * left @ right`` in ``dtype``."""
    wide = dtype is torch.float32 and left.dtype is not torch.float32
    if wide and left.is_cuda and not torch.compiler.is_compiling():
        product = operators.wide_product(left, right)  # returns the fp32 accumulator: no rounding, no cast
        return product if scaling == 1.0 else product.mul_(scaling)
    if scaling == 1.0:
        return _as(left @ right, dtype)
    unread = left.new_zeros(1, 1) if torch.compiler.is_compiling() else _unread(left.dtype, left.device)
    return _as(torch.addmm(unread, left, right, beta=0, alpha=scaling), dtype)


def _parameters(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The parameters among ``tensors``, with None in place of the others.

    A parameter lives as long as its module, so autograd does not have to save it. Saving costs time: under gradient
    checkpointing, three Python calls for each tensor.
    """
    if torch.compiler.is_compiling() or not knows_backward:  # then autograd saves all and tracks their versions
        return [None] * len(tensors)
    return [tensor if type(tensor) is nn.Parameter else None for tensor in tensors]


_recomputed: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
"""For a parameter's id: the parameter, the backward pass of the last recompute that used it, and its version then."""


def _versions(parameters: Sequence[torch.Tensor | None]) -> list[int]:
    """The versions of ``parameters``, for :func:`_check_unwritten`."""
    if torch.compiler.is_compiling():
        return []
    versions = [0 if parameter is None else parameter._version for parameter in parameters]
    if current_backward() != -1:
        note_recompute(parameters, versions)
    return versions


def note_recompute(parameters: Sequence[torch.Tensor | None], versions: Sequence[int]) -> None:
    """Note that a recompute in the running backward pass has used ``parameters`` in these versions."""
    task = current_backward()
    for parameter, version in zip(parameters, versions, strict=True):
        if parameter is not None:
            _recomputed[id(parameter)] = (weakref.ref(parameter), task, version)


def _check_unwritten(parameters: Sequence[torch.Tensor | None], versions: Sequence[int]) -> None:
    """Raise a RuntimeError, as autograd does for saved tensors, if a parameter was written to since these versions.

    For a checkpointed layer autograd saves the tensors of the recompute, so the recompute's version counts.
    """
    if [0 if parameter is None else parameter._version for parameter in parameters] == versions:
        return
    for parameter, version in zip(parameters, versions, strict=False):  # under a compiler there are no versions
        if parameter is None or parameter._version == version:
            continue
        known, task, again = _recomputed.get(id(parameter), (None, -1, -1))
        if known is None or known() is not parameter or (task, again) != (current_backward(), parameter._version):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"weight {list(parameter.shape)} of a DoRA layer, between its forward and its backward pass"
            )


class _Dora(torch.autograd.Function):
    """The autograd function described in the module's docstring."""

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
    """The gradients of :class:`_Dora`; ``release`` frees saved tensors early, unless the graph is retained."""
    x, g, norm, h, kept, *saved = ctx.saved_tensors
    _check_unwritten(ctx.held, ctx.versions)
    weight, a, b = [other if held is None else held for held, other in zip(ctx.held, saved, strict=True)]
    if release:
        ctx.maybe_clear_saved_tensors()
    need_x, need_base, _, need_a, need_b, need_m, need_bias, *_ = ctx.needs_input_grad
    form: Form = ctx.form
    rows = _rows(dy)
    # The factor of the base's gradient. In the delta form g - 1 loses the digits of g near 1, so there the products of
    # rank r use dY and g themselves.
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
        kept = None  # frees memory for the products below
    else:
        dbase = _as(rows * gain, rows.dtype)
        if need_bias:
            total = rows.sum(dim=0, dtype=g.dtype)
    if need_bias:
        assert total is not None
        dbias = _bias_gradient(form, ctx.owns_base, g, total).to(ctx.bias_dtype)

    if need_x or need_a or need_b:
        low, down = (rows, _as(b * g[:, None], b.dtype)) if form.delta else (dbase, b)
        low = _as(low, b.dtype)  # fp32 with exact adapters, else no change
        if need_x or need_a:
            t = _product(low, down, form.scaling, low.dtype)
        if need_b and db is None:
            db = _as(g[:, None] * (form.scaling * operators.wide_product(_as(rows, b.dtype).T, h)), ctx.adapter_dtype)
        if need_a:
            da = _product(t.T, _as(_rows(x), t.dtype), 1.0, ctx.adapter_dtype)
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
    """db from ``total`` = sum_t dY, without the part that flows through the graph of a ``base`` that contains b."""
    if form.base_has_bias and not owns_base:
        return (1.0 - g) * total
    return torch.zeros_like(total) if form.delta else total
