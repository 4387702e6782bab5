"""``dora_linear``: a linear layer with a DoRA adapter as one differentiable function."""

from __future__ import annotations

import torch

from .arguments import ArgumentError
from .differentiation import refuse_transforms
from .gradients import Form, dora
from .norm import check_adapters, check_plain
from .norm_cache import NormCache
from .recording import is_traced
from .watching import watched

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
    dtype = product_dtype(x.device, weight.dtype)
    if base is not None:
        base = base.detach() if base.dtype is dtype else base.detach().to(dtype)
    if x.dtype is not dtype:
        x = x.to(dtype)
    form = Form(
        "dora_linear",
        scaling,
        dtype,
        exact=keeps_adapters(lora_A, dtype),
        delta=delta,
        base_has_bias=base is not None and bias is not None,
        owns_memory=own_base and not watched(),
        train=trains(x, lora_A, lora_B, magnitude, bias),
    )
    return dora(form, x, base, weight, lora_A, lora_B, magnitude, bias, norm)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that products with a tensor of ``dtype`` run in: autocast's where it is on (it leaves fp64 alone)."""
    kind = device.type
    if dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def keeps_adapters(lora_A: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether fp32 adapters stay as they are beside 16-bit activations: where autocast would not round them."""
    return lora_A.dtype is torch.float32 and dtype in _HALVES and not torch.is_autocast_enabled(lora_A.device.type)


def trains(*tensors: torch.Tensor | None) -> bool:
    """Whether some tensor asks for a gradient now."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_layer(
    x: torch.Tensor,
    d_in: int,
    d_out: int,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    norm: torch.Tensor | NormCache | None,
    device: torch.device,
) -> None:
    """Raise an ArgumentError unless the tensors beside A and B fit a layer [d_out, d_in] on ``device``."""
    if is_traced():  # sizes may be tensors; PyTorch's own operators check them
        return
    check_plain(x=x, magnitude=magnitude, bias=bias, base=base)
    if x.ndim < 1 or x.shape[-1] != d_in:
        raise ArgumentError(f"x has shape {list(x.shape)}; expected [..., {d_in}] (d_in of the layer)")
    if base is not None and base.shape != (*x.shape[:-1], d_out):
        raise ArgumentError(f"base has shape {list(base.shape)}; expected {[*x.shape[:-1], d_out]} (x's tokens, d_out)")
    for name, vector in (("magnitude", magnitude), ("bias", bias), ("norm", norm)):
        if isinstance(vector, torch.Tensor) and vector.shape != (d_out,):
            raise ArgumentError(f"{name} has shape {list(vector.shape)}; expected [{d_out}] (d_out)")
    for name, tensor in (("x", x), ("magnitude", magnitude), ("bias", bias), ("base", base), ("norm", norm)):
        if isinstance(tensor, torch.Tensor) and tensor.device != device:
            raise ArgumentError(f"{name} is on {tensor.device}, the layer on {device}: move one of them")
