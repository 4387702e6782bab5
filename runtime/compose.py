"""``dora_compose``: DoRA on top of a base layer whose W is not there as a matrix (quantised, or somebody else's)."""

from __future__ import annotations

import torch

from .arguments import ArgumentError
from .differentiation import refuse_transforms
from .gradients import Form, dora
from .linear import check_layer, keeps_adapters, product_dtype, trains
from .norm import check_adapters
from .watching import watched


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
        norm: the row norm w [d_out] (:func:`doratune.runtime.norm.norm_from_products`).
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
    dtype = product_dtype(base.device, base.dtype)
    form = Form(
        function="dora_compose",
        scaling=float(scaling),
        dtype=dtype,
        exact=keeps_adapters(lora_A, dtype),
        delta=delta,
        base_has_bias=bias is not None,
        owns_memory=own_base and not watched(),
        train=trains(base, x, lora_A, lora_B, magnitude, bias),
    )
    return dora(form, x.to(dtype), base.to(dtype), None, lora_A, lora_B, magnitude, bias, norm.detach())
