"""The accuracy that every kernel must reach, compared with the fp64 definition on the same inputs.

- norm, g and nW, of ``weight_norm_exact`` too: largest relative error 1e-5.
- y, inner, dYg: in each band of columns, the relative Frobenius error is at most 1.05 times that of rounding the fp64
  result to the output dtype. An fp32 output has no room for its own fp32 accumulation in that, so there 1e-6 holds.
- dg, dm and db, in the same bands: 1e-3 from 16-bit inputs, 1e-5 from fp32 inputs; and what rounding adds, where m has
  16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..codegen.spec import KernelSpec

NORM_ERROR = 1e-5
ROUNDING_FACTOR = 1.05
FP32_ERROR = 1e-6
SUM_ERROR = {"bf16": 1e-3, "fp16": 1e-3, "fp32": 1e-5}

BANDS = 8
"""Column bands are judged separately: a large term in some columns must not hide a wrong small one in others."""

_TINY = 1e-30


def worst_error(
    spec: KernelSpec, outputs: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> tuple[float, str | None]:
    """Compare the outputs of ``spec`` with their fp64 values.

    Returns the largest relative error over all outputs, and what is wrong (output, error, bound) or None when every
    output is within its bound. NaN or infinity where the exact value is finite is wrong.
    """
    worst, complaint = 0.0, None
    for name, value in outputs.items():
        error, bound = _error_and_bound(spec, name, value.double(), exact[name], value.dtype)
        if not error <= bound and complaint is None:  # NaN fails too
            complaint = f"{name} is off by {error:.3g} where {bound:.3g} is allowed"
        worst = error if math.isnan(error) else max(worst, error)
    return worst, complaint


def _error_and_bound(
    spec: KernelSpec, name: str, value: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    if spec.op in ("weight_norm", "weight_norm_exact"):
        relative = (value - exact).abs() / exact.abs().clamp_min(_TINY)
        return _largest(torch.where(value == exact, torch.zeros_like(relative), relative)), NORM_ERROR
    width = -(-exact.shape[-1] // BANDS)
    worst, worst_bound = 0.0, 1.0
    for start in range(0, exact.shape[-1], width):
        part, truth = value[..., start : start + width], exact[..., start : start + width]
        size = float(truth.norm())
        error = _largest((part - truth).norm() / max(size, _TINY)) if size else _largest(part.abs())
        rounding = float((truth.to(dtype).double() - truth).norm()) / max(size, _TINY)
        if exact.ndim == 1:
            bound = SUM_ERROR[spec.activation] + (rounding if dtype is not torch.float32 else 0.0)
        else:
            bound = max(ROUNDING_FACTOR * rounding, FP32_ERROR)
        if math.isnan(error):  # NaN compares false, so a later band would replace it
            return error, bound
        if error / bound > worst / worst_bound:
            worst, worst_bound = error, bound
    return worst, worst_bound


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if not bool(values.isnan().any()) else float("nan")
