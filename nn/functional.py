"""DoRA as differentiable functions on tensors: ``dora_linear``, ``dora_compose`` and the row norm ``weight_norm``."""

from __future__ import annotations

import torch

from ..internals.torch import is_recording
from ..runtime.arguments import ArgumentError
from .autocast import autocast_dtype, autocast_is_on
from .autograd import Form, dora
from .checks import check_adapters, check_layer, check_plain
from .differentiation import refuse_transforms
from .kernels import wide_dtype
from .norm import NormAndGain, norm_of
from .norm_cache import NormCache
from .tracing import recorded_norm
from .watching import watched

__all__ = ["dora_compose", "dora_linear", "weight_norm"]

_HALVES = (torch.bfloat16, torch.float16)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    norm: torch.Tensor | NormCache | None = None,
    delta: bool = False,
    own_base: bool = False,
) -> torch.Tensor:
    """Return ``y = g*(x@W.T + s*(x@A.T)@B.T) + b`` with ``g = m / max(||W + sBA||_row, 1e-12)``.

    x, A, B, m and b get gradients if they require them. The norm carries no gradient (DoRA, arXiv 2402.09353, section
    4.3), and W is frozen. With a 16-bit W, fp32 adapters are rounded to 16 bits under ``torch.autocast``, as autocast
    does, and kept exact otherwise; their gradients are fp32. Supports gradient checkpointing, AMP and
    ``torch.compile``.

    Args:
        x: [..., d_in]. weight: W [d_out, d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. magnitude: m [d_out].
        scaling: s, PEFT's ``lora_alpha / r``. bias: b [d_out].
        base: the value ``x@W.T + b`` [..., d_out], if the caller has computed it. This function still computes the
            whole gradient of x, so no gradient flows into the graph of ``base``.
        norm: the row norm w [d_out] (:func:`doratune.weight_norm`), or a cache that provides it; None computes it.
        delta: return ``(g-1)*(x@W.T) + g*s*(x@A.T)@B.T`` instead, which DoRA adds to the base output (for PEFT's
            dropout, where x is the dropped input). ``bias`` is then not added; it is given if ``base`` contains it.
        own_base: give the memory of ``base`` to this function: y may overwrite it, or the backward pass keeps it.
            Correct only if no other code holds it.

    Raises:
        ArgumentError: shapes, dtypes or devices do not match, or W requires a gradient.
        DifferentiationError: under ``torch.func`` transforms, and when a gradient is differentiated again.
    """
    refuse_transforms("dora_linear", x, lora_A, lora_B, magnitude, bias)
    check_plain(weight=weight)
    check_adapters(weight.shape, lora_A, lora_B, weight.device)
    d_out, d_in = weight.shape
    check_layer(x, d_in, d_out, magnitude, bias, base, norm, weight.device)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("weight must not require a gradient, because DoRA freezes W: call requires_grad_(False)")
    if delta and base is None and bias is not None:
        raise ArgumentError("the delta form adds no bias: leave bias out, or pass the base that contains it")
    autocast = autocast_is_on(x.device)
    if base is None and x.dtype != weight.dtype and not autocast:
        raise ArgumentError(
            f"x must have the dtype of weight, {weight.dtype}, got {x.dtype}: convert x, or run under torch.autocast"
        )
    return checked_linear(
        x,
        weight,
        lora_A,
        lora_B,
        magnitude,
        float(scaling),
        bias,
        base=base,
        norm=norm,
        delta=delta,
        own_base=own_base,
    )


def checked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    norm: torch.Tensor | NormCache | None = None,
    delta: bool = False,
    own_base: bool = False,
) -> torch.Tensor:
    """:func:`dora_linear` without its checks, for tensors that are known to fit each other."""
    dtype = _product_dtype(x.device, weight.dtype)
    if base is not None:
        base = base.detach() if base.dtype is dtype else base.detach().to(dtype)
    if x.dtype is not dtype:
        x = x.to(dtype)
    form = Form(
        "dora_linear",
        scaling,
        dtype,
        exact=_keeps_adapters(lora_A, dtype),
        delta=delta,
        base_has_bias=base is not None and bias is not None,
        owns_memory=own_base and not watched(),
        train=_trains(x, lora_A, lora_B, magnitude, bias),
    )
    return dora(form, x, base, weight, lora_A, lora_B, magnitude, bias, norm)


def dora_compose(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | NormAndGain,
    delta: bool = False,
    own_base: bool = False,
) -> torch.Tensor:
    """Return ``y = g*(base - b + s*(x@A.T)@B.T) + b`` with ``g = m / max(norm, 1e-12)``.

    ``base`` is the base layer's output with its bias. Its gradient, g*dY, flows into its graph, where the base layer
    computes its part of the gradient of x. This function computes the LoRA path's part of the gradient of x, and the
    gradients of A, B and m.

    With dropout PEFT computes ``W@x + b + (g-1)*(W@x_d) + g*s*B@A@x_d`` for a dropped input x_d. That is the base
    layer's output plus the delta form of this function, with ``base`` and ``x`` computed from x_d.

    Args:
        base: [..., d_out]. x: [..., d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. magnitude: m [d_out].
        scaling: s. bias: b [d_out], if ``base`` contains it.
        norm: the row norm w [d_out] (:func:`doratune.nn.norm.norm_from_products`), or w and g of this ``magnitude``.
        delta: return ``(g-1)*(base - b) + g*s*(x@A.T)@B.T``, which DoRA adds to the base output.
        own_base: give the memory of ``base`` to this function: y may overwrite it, or the backward pass keeps it.
            Correct only if no other code holds it and the base layer's own backward pass does not need its values
            (that of a linear layer does not).

    Raises:
        ArgumentError: shapes, dtypes or devices do not match.
        DifferentiationError: under ``torch.func`` transforms, and when a gradient is differentiated again.
    """
    refuse_transforms("dora_compose", base, x, lora_A, lora_B, magnitude, bias)
    if base.ndim < 1 or x.ndim < 1:
        raise ArgumentError(
            f"base and x must have shapes [..., d_out] and [..., d_in], got {list(base.shape)} and {list(x.shape)}"
        )
    d_out, d_in = base.shape[-1], x.shape[-1]
    check_adapters((d_out, d_in), lora_A, lora_B, base.device)
    row_norm = norm.norm if isinstance(norm, NormAndGain) else norm
    check_layer(x, d_in, d_out, magnitude, bias, base, row_norm, base.device)
    given = norm if isinstance(norm, NormAndGain) else norm.detach()
    dtype = _product_dtype(base.device, base.dtype)
    form = Form(
        function="dora_compose",
        scaling=float(scaling),
        dtype=dtype,
        exact=_keeps_adapters(lora_A, dtype),
        delta=delta,
        base_has_bias=bias is not None,
        owns_memory=own_base and not watched(),
        train=_trains(base, x, lora_A, lora_B, magnitude, bias),
    )
    return dora(form, x.to(dtype), base.to(dtype), None, lora_A, lora_B, magnitude, bias, given)


def weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    weight_sq: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the row norms ``||W + sBA||``, [d_out] fp32 (fp64 from fp64), without a gradient (DoRA, section 4.3).

    Under ``torch.autocast`` A and B are first rounded to its dtype, as in the layer's products.

    Args:
        weight: W [d_out, d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. All on one device.
        scaling: s, PEFT's ``lora_alpha / r``.
        weight_sq: ``rowsum(W*W)`` [d_out] fp32 if known; None computes it.

    Raises:
        ArgumentError: shapes, dtypes or devices do not match.
    """
    check_plain(weight=weight)
    check_adapters(weight.shape, lora_A, lora_B, weight.device)
    wide = wide_dtype(weight)
    if weight_sq is not None and (weight_sq.shape != weight.shape[:1] or weight_sq.dtype != wide):
        raise ArgumentError(
            f"weight_sq must be [{weight.shape[0]}] {wide}, got {list(weight_sq.shape)} {weight_sq.dtype}"
        )
    rounded = autocast_dtype(weight.device)
    if rounded is not None and lora_A.dtype is not torch.float64:
        lora_A, lora_B = lora_A.to(rounded), lora_B.to(rounded)
    if is_recording():
        return recorded_norm(weight, lora_A, lora_B, scaling)
    return norm_of(weight, lora_A, lora_B, scaling, weight_sq)


def _product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with a tensor of ``dtype``: autocast's dtype if it is on, except for fp64."""
    rounded = None if dtype is torch.float64 else autocast_dtype(device)
    return dtype if rounded is None else rounded


def _keeps_adapters(lora_A: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether A and B are fp32 with 16-bit activations and stay exact, because autocast is off."""
    return lora_A.dtype is torch.float32 and dtype in _HALVES and not autocast_is_on(lora_A.device)


def _trains(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients are on and a tensor requires one."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
