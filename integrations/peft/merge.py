"""Merge DoRA into W and unmerge it, also where rows of W + sBA or their magnitudes are zero.

To merge, PEFT multiplies the rows of W + sBA by m / ||W + sBA||; to unmerge, it divides by that factor. So merging
makes zero rows NaN, unmerging makes rows with m = 0 NaN, and in 16 bits a tiny row can overflow. This module clamps the
norm as in the forward pass, and saves the rows of W whose factor is zero. It leaves everything else to PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant

from ...codegen.ops import EPS
from ...nn.norm import safe_norm


class MergingVariant(DoraLinearVariant):  # type: ignore[misc]
    """PEFT's DoRA variant for linear layers, with merging and unmerging that never divide by zero."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return ``g*(W + sBA)`` as a new tensor; ``orig_weight`` is W, dequantised if it was quantised."""
        with _norm_above_zero(module.lora_magnitude_vector[active_adapter]):
            merged: torch.Tensor = DoraLinearVariant.merge_safe(module, active_adapter, orig_weight)
        _set_aside(module, active_adapter, orig_weight)
        return merged

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Set the parameter ``orig_weight``, which holds W, to ``g*(W + sBA)``."""
        before = orig_weight.data  # PEFT assigns a new tensor to the parameter
        with _norm_above_zero(module.lora_magnitude_vector[active_adapter]):
            DoraLinearVariant.merge_unsafe(module, active_adapter, orig_weight)
        _set_aside(module, active_adapter, before)

    @staticmethod
    @torch.no_grad()
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return W from the merged ``orig_weight``."""
        # PEFT's own method is not used: until 0.20 it divides the columns of a Conv1D, although merging scales rows.
        norm = module._cache_pop(_norm_key(active_adapter))
        gain = module.lora_magnitude_vector[active_adapter].weight / norm
        delta = module.get_delta_weight(active_adapter)
        weight: torch.Tensor = orig_weight.data / _along_rows(module, gain) - delta
        weight = weight.to(orig_weight.dtype)
        aside: tuple[torch.Tensor, torch.Tensor] | None = module._caches.pop(_aside_key(active_adapter), None)
        if aside is not None:
            index, rows = aside
            by_rows = weight.T if module.fan_in_fan_out else weight
            by_rows[index.to(weight.device)] = rows.to(weight)
        return weight


def holds_rows(module: LoraLayer, adapter: str) -> bool:
    """Whether rows of W are saved for unmerging ``adapter``. PEFT's own unmerge does not use them."""
    return _aside_key(adapter) in module._caches


@contextmanager
def _norm_above_zero(magnitude: Any) -> Iterator[None]:
    """Make ``magnitude.get_weight_norm``, which PEFT's merge calls, return norms of at least 1e-12.

    A tiny norm in 16 bits has few digits, and m divided by it can overflow. If there is one, all norms are returned in
    fp32 and the tiny ones are recomputed.
    """
    original = magnitude.get_weight_norm

    @torch.no_grad()
    def get_weight_norm(weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, **named: Any) -> torch.Tensor:
        norm: torch.Tensor = original(weight, lora_weight, scaling, **named)
        safe = (norm > max(EPS, torch.finfo(norm.dtype).tiny)) & (magnitude.weight / norm).isfinite()
        index = safe.logical_not().nonzero().flatten()
        if not len(index):
            return norm
        wide = torch.promote_types(norm.dtype, torch.float32)
        rows = (weight.T if magnitude.fan_in_fan_out else weight)[index].to(wide)
        exact = torch.linalg.vector_norm(rows + scaling * lora_weight[index].to(wide), dim=1)
        return norm.to(wide).index_copy(0, index, safe_norm(exact))

    magnitude.get_weight_norm = get_weight_norm
    try:
        yield
    finally:
        del magnitude.get_weight_norm


@torch.no_grad()
def _set_aside(module: LoraLayer, adapter: str, before: torch.Tensor) -> None:
    """Save the rows of the unmerged W, ``before``, whose gain is zero: their indices [n] and values [n, d_in]."""
    gain = module.lora_magnitude_vector[adapter].weight / module._caches[_norm_key(adapter)]
    index = (gain == 0).nonzero().flatten()
    module._caches.pop(_aside_key(adapter), None)
    if len(index):
        by_rows = before.T if module.fan_in_fan_out else before
        module._cache_store(_aside_key(adapter), (index, by_rows[index.to(before.device)]))


def _along_rows(module: LoraLayer, gain: torch.Tensor) -> torch.Tensor:
    return gain.view(1, -1) if module.fan_in_fan_out else gain.view(-1, 1)


def _norm_key(adapter: str) -> str:
    return f"{adapter}-weight_norm"  # PEFT's own


def _aside_key(adapter: str) -> str:
    return f"{adapter}-doratune_rows"
