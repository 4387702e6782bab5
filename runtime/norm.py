"""The row norm of ``W + sBA`` on tensors, as DoRA divides by it: detached, fp32, without ever making BA."""

from __future__ import annotations

import torch

from ..codegen.ops import EPS
from . import (
    library,  # noqa: F401  the operators that torch.compile puts in its graph
    operations,
)
from .arguments import ArgumentError
from .differentiation import without_autocast
from .recording import is_recording, is_traced, recorded_norm


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
    wide = _norm_dtype(weight)
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


def norm_of(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    weight_sq: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norm of checked tensors, with A and B as they are (a caller under autocast has rounded them)."""
    with torch.no_grad():
        return operations.weight_norm(
            weight, _beside(weight, lora_A), _beside(weight, lora_B), weight_sq, float(scaling)
        )[0]


def norm_and_gain_of(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    weight_sq: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm as :func:`norm_of` gives it, and ``g = m / max(w, eps)`` [d_out] fp32."""
    with torch.no_grad():
        return operations.weight_norm_and_gain(
            weight, _beside(weight, lora_A), _beside(weight, lora_B), weight_sq, magnitude, float(scaling)
        )


def row_squares(weight: torch.Tensor) -> torch.Tensor:
    """``rowsum(W*W)``, [d_out] fp32, in one pass over W."""
    with torch.no_grad(), without_autocast(weight.device):
        norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=_norm_dtype(weight))
        return norms.square()


def norm_from_products(
    weight_sq: torch.Tensor, products: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return ``||W + sBA||`` by rows, [d_out] fp32, of a W that cannot be read as a matrix (quantised base layers).

    Args:
        weight_sq: ``rowsum(W*W)`` [d_out] fp32.
        products: ``W @ A.T`` [d_out, r] fp32: A sent through the base layer as r extra tokens, transposed.
        lora_A: A [r, d_in]. lora_B: B [d_out, r]. scaling: s.
    """
    with torch.no_grad(), without_autocast(lora_A.device):
        wide = _norm_dtype(lora_A)
        a, b = lora_A.to(wide), lora_B.to(wide)
        dots = (b * (products.to(wide) + (0.5 * scaling) * (b @ (a @ a.T)))).sum(dim=1)
        return (weight_sq + (2.0 * scaling) * dots).clamp_min(0.0).sqrt()


def safe_norm(norm: torch.Tensor) -> torch.Tensor:
    """``max(w, eps)``, by which magnitudes are divided: a zero row gives g*0 = 0, never NaN."""
    return norm.clamp_min(EPS)


def check_adapters(
    shape: torch.Size | tuple[int, ...], lora_A: torch.Tensor, lora_B: torch.Tensor, device: torch.device
) -> None:
    """Raise an ArgumentError unless A and B fit a W of ``shape`` [d_out, d_in] on ``device``."""
    if is_traced():  # sizes may be tensors; PyTorch's own operators check them
        return
    if len(shape) != 2:
        raise ArgumentError(
            f"weight has shape {list(shape)}; expected [d_out, d_in]: a quantised weight needs dora_compose"
        )
    d_out, d_in = shape
    check_plain(lora_A=lora_A, lora_B=lora_B)
    if lora_A.ndim != 2 or lora_A.shape[1] != d_in or lora_A.shape[0] < 1:
        raise ArgumentError(f"lora_A has shape {list(lora_A.shape)}; expected [r, {d_in}] beside W [{d_out}, {d_in}]")
    if lora_B.shape != (d_out, lora_A.shape[0]):
        raise ArgumentError(f"lora_B has shape {list(lora_B.shape)}; expected [{d_out}, {lora_A.shape[0]}] (d_out, r)")
    if lora_A.dtype != lora_B.dtype or not lora_A.dtype.is_floating_point:
        raise ArgumentError(f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}: give both one floating-point dtype")
    if lora_A.device != device or lora_B.device != device:
        raise ArgumentError(
            f"lora_A is on {lora_A.device}, lora_B on {lora_B.device}, the layer on {device}: move them"
        )


def check_plain(**tensors: torch.Tensor | None) -> None:
    """Raise an ArgumentError for a tensor whose values are not simply in its memory: sharded, quantised, …"""
    if torch.compiler.is_compiling() or is_traced():
        return
    for name, tensor in tensors.items():
        dispatch = getattr(type(tensor), "__torch_dispatch__", None)
        if tensor is not None and dispatch is not torch.Tensor.__torch_dispatch__:
            raise ArgumentError(
                f"{name} is a {type(tensor).__name__}: give a plain torch.Tensor (gather a sharded one first; for a "
                "quantised weight use doratune.runtime.compose.dora_compose)"
            )


def _norm_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _beside(weight: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    """The adapter in a dtype that the norm takes beside W: W's own, or fp32."""
    if adapter.dtype in (weight.dtype, torch.float32) and weight.dtype is not torch.float64:
        return adapter
    return adapter.to(_norm_dtype(weight))
