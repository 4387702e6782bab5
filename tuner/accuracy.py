"""The accuracy that every kernel must reach, compared with the fp64 definition on the same inputs.

- norm, g and nW, of ``weight_norm_exact`` and ``weight_norm_group`` too: largest relative error 1e-5.
- y, inner, dYg: in each band of columns, the relative Frobenius error is at most 1.05 times that of rounding the fp64
  result to the output dtype. An fp32 output has no room for its own fp32 accumulation in that, so there 1e-6 holds; for
  dYg of a gated MLP 5e-6, because where terms of y_gate 1e4 times as large nearly cancel, act' has what they lost.
- dg, dm and db, in the same bands: 1e-3 from 16-bit inputs, 1e-5 from fp32 inputs; and what rounding adds, where m has
  16 bits.
- Each element of these: one unit in its last place, and :data:`ELEMENT_FACTOR` times what the band's bound gives to an
  element on average. A band of a large output would hide one wrong element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..codegen.spec import KernelSpec

NORM_ERROR = 1e-5
ROUNDING_FACTOR = 1.05
FP32_ERROR = 1e-6
SLOPE_ERROR = 5e-6
SUM_ERROR = {"bf16": 1e-3, "fp16": 1e-3, "fp32": 1e-5}

ELEMENT_FACTOR = 16.0
"""Errors of fp32 sums are spread like a normal distribution, whose largest of a billion is below 7 times its size; and
the bound for a band leaves far more room than they take (1e-3 against some 1e-6 for a 16-bit output)."""

SLOPE_ELEMENT_FACTOR = 256.0
"""What nearly cancels is rare, so the error of dYg of a gated MLP lies in few elements."""

SUM_ELEMENT_FACTOR = 4.0
"""For sums over tokens the bounds are no rounding errors, so an element may also be off by this times the bound."""

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
    return Judge(spec, exact).worst_error(outputs)


class Judge:
    """Compares outputs with the fp64 values ``exact``; what does not depend on the outputs is computed once."""

    def __init__(self, spec: KernelSpec, exact: Mapping[str, torch.Tensor]) -> None:
        self.spec = spec
        self._exact = exact
        self._relative = spec.op.startswith("weight_norm")
        self._bounds: dict[tuple[str, torch.dtype], _Bounds] = {}

    def worst_error(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, str | None]:
        """As the function of this name, for some or all outputs by name."""
        seen = {name: self._compare(name, value) for name, value in outputs.items()}
        numbers = iter(torch.cat([*seen.values()]).tolist())  # the only wait for a GPU
        worst, complaint = 0.0, None
        for name, value in outputs.items():
            found = [next(numbers) for _ in range(len(seen[name]))]
            if self._relative:
                error, bound, excess = found[0], NORM_ERROR, 0.0
            else:
                bounds = self._bounds[name, value.dtype]
                error, bound = _worst_band(found[:-1], bounds)
                excess = found[-1]
            if complaint is None and not error <= bound:  # NaN fails too
                complaint = f"{name} is off by {error:.3g} where {bound:.3g} is allowed"
            if complaint is None and excess > 0.0:
                complaint = self._element(name, value)
            if not math.isnan(worst):
                worst = error if math.isnan(error) else max(worst, error)
        return worst, complaint

    def _compare(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The largest relative error of a norm; else the Frobenius error of each band, and the largest excess over
        what an element may be off."""
        exact = self._exact[name]
        if self._relative:
            wide = value.double()
            relative = (wide - exact).abs() / exact.abs().clamp_min(_TINY)
            return torch.where(wide == exact, 0.0, relative).max()[None]
        bounds = self._bounds_of(name, value.dtype)
        difference = (value.double() - exact).abs_()
        errors = _band_norms(difference)
        return torch.cat([errors, difference.sub_(bounds.element).max()[None]])

    def _bounds_of(self, name: str, dtype: torch.dtype) -> _Bounds:
        key = (name, dtype)
        if key not in self._bounds:
            self._bounds[key] = _bounds(self.spec, self._exact[name], dtype)
        return self._bounds[key]

    def _element(self, name: str, value: torch.Tensor) -> str:
        """The complaint about the worst element."""
        exact, allowed = self._exact[name], self._bounds_of(name, value.dtype).element
        difference = (value.double() - exact).abs()
        flat = int((difference - allowed).argmax())
        place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
        off, most = float(difference.flatten()[flat]), float(allowed.flatten()[flat])
        return f"{name}[{place}] is off by {off:.3g} where {most:.3g} is allowed"


@dataclass(frozen=True)
class _Bounds:
    """The bounds of one output: relative ones and the exact values' norms by band, absolute ones by element."""

    sizes: list[float]
    relative: list[float]
    element: torch.Tensor


def _bounds(spec: KernelSpec, exact: torch.Tensor, dtype: torch.dtype) -> _Bounds:
    norms = _band_norms(exact)
    rounding = _band_norms(exact.to(dtype).double() - exact) / norms.clamp_min(_TINY)
    unit, factor = torch.finfo(dtype).eps, ELEMENT_FACTOR
    sloped = spec.op in ("compose_swiglu_backward", "swiglu_backward") and dtype is torch.float32
    if exact.ndim == 1:
        sum_error = SUM_ERROR[spec.activation]
        relative = sum_error + (rounding if dtype is not torch.float32 else torch.zeros_like(rounding))
        share = unit + SUM_ELEMENT_FACTOR * sum_error
    else:
        relative = (ROUNDING_FACTOR * rounding).clamp_min(SLOPE_ERROR if sloped else FP32_ERROR)
        factor = SLOPE_ELEMENT_FACTOR if sloped else ELEMENT_FACTOR
        share = unit + (ELEMENT_FACTOR * FP32_ERROR if dtype is torch.float32 else 0.0)
    counts = _band_norms(torch.ones_like(exact[:1] if exact.ndim == 2 else exact)).square() * exact[..., 0].numel()
    average = relative * torch.where(norms > 0.0, norms / counts.sqrt(), 1.0)
    by_column = average.repeat_interleave(_width(exact))[: exact.shape[-1]]
    least = torch.finfo(dtype).smallest_normal * unit
    element = (exact.abs() * share).clamp_min_(least).add_(factor * by_column)
    return _Bounds(norms.tolist(), relative.tolist(), element.float())


def _worst_band(errors: list[float], bounds: _Bounds) -> tuple[float, float]:
    """The relative error and the bound of the band that is nearest to its bound or farthest beyond it."""
    found = [
        (error / max(size, _TINY) if size else error, bound)
        for error, size, bound in zip(errors, bounds.sizes, bounds.relative, strict=True)
    ]
    wrong = [pair for pair in found if math.isnan(pair[0])]  # NaN compares false, so a later band would replace it
    return wrong[0] if wrong else max(found, key=lambda pair: pair[0] / pair[1])


def _width(values: torch.Tensor) -> int:
    return -(-values.shape[-1] // BANDS)


def _band_norms(values: torch.Tensor) -> torch.Tensor:
    """The Frobenius norms of the column bands of ``values`` [columns] or [rows, columns]."""
    width = _width(values)
    columns = torch.linalg.vector_norm(values, dim=0) if values.ndim == 2 else values.abs()
    missing = -values.shape[-1] % width
    bands: torch.Tensor = torch.nn.functional.pad(columns, (0, missing)).view(-1, width)
    norms: torch.Tensor = torch.linalg.vector_norm(bands, dim=1)
    return norms
