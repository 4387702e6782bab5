"""DoRA as differentiable functions on tensors: ``dora_linear``, ``dora_compose`` and the row norm ``weight_norm``."""

from __future__ import annotations

import torch

from ..internals.torch import is_recording
from ..runtime.arguments import ArgumentError
from .autograd import Form, dora
from .checks import check_adapters, check_layer, check_plain
from .differentiation import refuse_transforms
from .norm import norm_dtype, norm_of
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

    Gradients go to x, A, B, m and b, whichever require them; the norm carries none (DoRA, section 4.3), and W is
    frozen. fp32 adapters beside a 16-bit W are rounded to it under ``torch.autocast``, as autocast does, and kept exact
    otherwise; their gradients come out fp32. Right under gradient checkpointing, AMP and ``torch.compile``.

    Args:
        x: [..., d_in]. weight: W [d_out, d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. magnitude: m [d_out].
        scaling: s, PEFT's ``lora_alpha / r``. bias: b [d_out].
        base: the value ``x@W.T + b`` [..., d_out], where the caller has it already. The gradient to x is still made
            here, so nothing flows into the graph of ``base``.
        norm: the row norm w [d_out] (:func:`doratune.weight_norm`), or a cache to take it from; computed when None.
        delta: return ``(g-1)*(x@W.T) + g*s*(x@A.T)@B.T`` instead, what DoRA adds to the base output (for PEFT's
            dropout, where x is the dropped input); b only says what ``base`` contains.
        own_base: the memory of ``base`` is the function's from here on: y may take it, or the backward pass keeps it.
            Only right where nobody else has it.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit each other.
        DifferentiationError: under ``torch.func`` transforms, and when a gradient is differentiated again.
    """
    refuse_transforms("dora_linear", x, lora_A, lora_B, magnitude, bias)
    check_plain(weight=weight)
    check_adapters(weight.shape, lora_A, lora_B, weight.device)
    d_out, d_in = weight.shape
    check_layer(x, d_in, d_out, magnitude, bias, base, norm, weight.device)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("weight requires a gradient: DoRA's W is frozen; call weight.requires_grad_(False)")
    if delta and base is None and bias is not None:
        raise ArgumentError("the delta form has no bias of its own: leave bias out, or give the base that contains it")
    autocast = torch.is_autocast_enabled(x.device.type)
    if base is None and x.dtype != weight.dtype and not autocast:
        raise ArgumentError(f"x is {x.dtype} and weight {weight.dtype}: convert x, or run under torch.autocast")
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
    """:func:`dora_linear` on tensors that are known to fit each other; where it is, that is not looked at again."""
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
    norm: torch.Tensor,
    delta: bool = False,
    own_base: bool = False,
) -> torch.Tensor:
    """Return ``y = g*(base - b + s*(x@A.T)@B.T) + b`` with ``g = m / max(norm, 1e-12)``.

    ``base`` is the base layer's output with its bias; its gradient, g*dY, flows on into its graph, from where the base
    layer makes its share of the gradient to x. The gradients to x of the LoRA path, to A, B and m are made here.

    With dropout PEFT computes ``W@x + b + (g-1)*(W@x_d) + g*s*B@A@x_d`` for a dropped input x_d: that is the base
    layer's output plus the delta form of this function, with ``base`` and ``x`` made from x_d.

    Args:
        base: [..., d_out]. x: [..., d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. magnitude: m [d_out].
        scaling: s. bias: b [d_out], when ``base`` contains it.
        norm: the row norm w [d_out] (:func:`doratune.nn.norm.norm_from_products`).
        delta: return ``(g-1)*(base - b) + g*s*(x@A.T)@B.T``, what DoRA adds to the base output.
        own_base: the memory of ``base`` is the function's from here on: y may take it, or the backward pass keeps it.
            Only right where nobody else has it, and the base layer's own gradient does not need its values (linear
            layers do not).

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit each other.
        DifferentiationError: under ``torch.func`` transforms, and when a gradient is differentiated again.
    """
    refuse_transforms("dora_compose", base, x, lora_A, lora_B, magnitude, bias)
    if base.ndim < 1 or x.ndim < 1:
        raise ArgumentError(f"base is {list(base.shape)} and x {list(x.shape)}; expected [..., d_out] and [..., d_in]")
    d_out, d_in = base.shape[-1], x.shape[-1]
    check_adapters((d_out, d_in), lora_A, lora_B, base.device)
    check_layer(x, d_in, d_out, magnitude, bias, base, norm, base.device)
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
    return dora(form, x.to(dtype), base.to(dtype), None, lora_A, lora_B, magnitude, bias, norm.detach())


def weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    weight_sq: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``||W + sBA||`` by rows, [d_out] fp32, without a gradient.

    Under ``torch.autocast`` A and B are rounded to its dtype first, as the layer's products see them.

    Args:
        weight: W [d_out, d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. All on one device.
        scaling: s, PEFT's ``lora_alpha / r``.
        weight_sq: ``rowsum(W*W)`` [d_out] fp32, if it is known; computed on the way otherwise.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit each other.
    """
    check_plain(weight=weight)
    check_adapters(weight.shape, lora_A, lora_B, weight.device)
    wide = norm_dtype(weight)
    if weight_sq is not None and (weight_sq.shape != weight.shape[:1] or weight_sq.dtype != wide):
        raise ArgumentError(
            f"weight_sq is {list(weight_sq.shape)} {weight_sq.dtype}; expected [{weight.shape[0]}] {wide}"
        )
    device = weight.device.type
    if torch.is_autocast_enabled(device) and lora_A.dtype is not torch.float64:
        rounded = torch.get_autocast_dtype(device)
        lora_A, lora_B = lora_A.to(rounded), lora_B.to(rounded)
    if is_recording():
        return recorded_norm(weight, lora_A, lora_B, scaling)
    return norm_of(weight, lora_A, lora_B, scaling, weight_sq)


def _product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that products with a tensor of ``dtype`` run in: autocast's where it is on (it leaves fp64 alone)."""
    kind = device.type
    if dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def _keeps_adapters(lora_A: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether fp32 adapters stay as they are beside 16-bit activations: where autocast would not round them."""
    return lora_A.dtype is torch.float32 and dtype in _HALVES and not torch.is_autocast_enabled(lora_A.device.type)


def _trains(*tensors: torch.Tensor | None) -> bool:
    """Whether some tensor asks for a gradient now."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
