"""The row norm of ``W + sBA``, by which DoRA divides: detached, in fp32, computed without materialising BA."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..codegen.ops import EPS
from . import operators
from .autocast import without_autocast
from .kernels import wide_dtype


class NormAndGain(NamedTuple):
    """The row norm w and ``g = m / max(w, eps)``, each [d_out] fp32, where a kernel has computed both."""

    norm: torch.Tensor
    g: torch.Tensor


def norm_of(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    weight_sq: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norm [d_out] of checked tensors. Ignores autocast: the caller rounds A and B if needed."""
    with torch.no_grad():
        return operators.row_norm(
            weight, _for_norm(weight, lora_A), _for_norm(weight, lora_B), weight_sq, float(scaling)
        )


def norm_and_gain_of(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    weight_sq: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of :func:`norm_of`, and ``g = m / max(w, eps)`` [d_out] fp32 (fp64 if W or m is)."""
    if magnitude.dtype is torch.float64 and weight.dtype is not torch.float64:
        norm = norm_of(weight, lora_A, lora_B, scaling, weight_sq)
        return norm, magnitude.detach() / safe_norm(norm)
    with torch.no_grad():
        return operators.row_norm_and_gain(
            weight, _for_norm(weight, lora_A), _for_norm(weight, lora_B), weight_sq, magnitude, float(scaling)
        )


def row_squares(weight: torch.Tensor) -> torch.Tensor:
    """``rowsum(W*W)``, [d_out] fp32, in one pass over W."""
    with torch.no_grad(), without_autocast(weight.device):
        norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide_dtype(weight))
        return norms.square()


def norm_from_products(
    weight_sq: torch.Tensor, products: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the row norms ``||W + sBA||``, [d_out] fp32, for a W that cannot be read as a matrix (quantised layers).

    Args:
        weight_sq: ``rowsum(W*W)`` [d_out] fp32.
        products: ``W @ A.T`` [d_out, r] fp32: the base layer's output for the rows of A as r tokens, transposed.
        lora_A: A [r, d_in]. lora_B: B [d_out, r]. scaling: s.
    """
    with torch.no_grad(), without_autocast(lora_A.device):
        wide = wide_dtype(lora_A)
        a, b = lora_A.to(wide), lora_B.to(wide)
        dots = (b * (products.to(wide) + (0.5 * scaling) * (b @ (a @ a.T)))).sum(dim=1)
        return (weight_sq + (2.0 * scaling) * dots).clamp_min(0.0).sqrt()


def safe_norm(norm: torch.Tensor) -> torch.Tensor:
    """``max(w, eps)``, the divisor of m: a zero row gives g*0 = 0 and not NaN."""
    return norm.clamp_min(EPS)


def _for_norm(weight: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    """The adapter in a dtype that the norm operators accept with W: W's own, or fp32."""
    if adapter.dtype in (weight.dtype, torch.float32) and weight.dtype is not torch.float64:
        return adapter
    return adapter.to(wide_dtype(weight))
