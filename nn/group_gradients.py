"""Gradients of projections that run together (:mod:`.group`, :mod:`.stored_group`), from each dY [T, d_out].

dYg_i = g_i*dY_i, t_i = s*dYg_i@B_i, dB_i = s*dYg_i.T@h_i, dm_i = sum_t dY_i*(base_i + s*h_i@B_i.T) / max(w_i, eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from . import operators
from .autograd import _product, _rows, _unread

if TYPE_CHECKING:
    from . import group_plan, stored_plan

    Plan = group_plan.Plan | stored_plan.StoredPlan
    At = group_plan.At | stored_plan.At

_is_contiguous = torch.Tensor.is_contiguous


def overwritten(bases: Sequence[torch.Tensor], *, release: bool) -> list[torch.Tensor]:
    """Memory for each dYg: that of the base products if ``release``, which then count as written to."""
    if release and False not in map(_is_contiguous, bases):
        increment_version(bases)  # a launch does not, and autograd must see the write
        return [*bases]
    return [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]


def differentiate_group(
    plan: Plan,
    at: At,
    dys: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor],
    h: torch.Tensor,
    lora_B: Sequence[torch.Tensor],
    g: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    *,
    release: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dYg [T, d_out] and dm [d_out] of each projection of a group; dYg may overwrite base if ``release``."""
    kernel = at.differentiate
    if kernel is None:
        compose: Any = operators.compose_backward_group_ if release else operators.compose_backward_group
        rows = [*map(_rows, dys)]
        made = compose(rows, bases, h, lora_B, g, norms, plan.scaling, plan.magnitude_dtype)
        return made[: plan.count], made[plan.count :]
    dbases = overwritten(bases, release=release)
    dm = [torch.empty_like(norm, dtype=plan.magnitude_dtype) for norm in norms]
    kernel.launch((*dys, *bases, h, *lora_B, *g, *norms), (*dbases, *dm), plan.scaling)
    return dbases, dm


def differentiate_one(
    plan: Plan,
    at: At,
    dy: torch.Tensor,
    base: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    g: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dYg [T, d_out], dB [d_out, r] and dm [d_out] of one projection, from its dY [T, d_out]."""
    differentiate, adapter = at.differentiate, at.adapter
    if differentiate is None or adapter is None:
        dbase, dg = operators.compose_backward(dy, base, g, False)
        given = (dy, h, b, g, dg, norm, plan.scaling, plan.adapter_dtype, plan.magnitude_dtype)
        return dbase, *operators.adapter_backward(*given)
    dbase, dg = torch.empty_like(base), torch.empty_like(g)
    differentiate.launch((dy, base, g), (dbase, dg))
    product = wide(dy.T, h)
    db, dm = torch.empty_like(b, dtype=plan.adapter_dtype), torch.empty_like(g, dtype=plan.magnitude_dtype)
    adapter.launch((product, b, g, dg, norm), (db, dm), plan.scaling)
    return dbase, db, dm


def low_gradients(plan: Plan, dbases: Sequence[torch.Tensor | None], lora_B: Sequence[torch.Tensor]) -> torch.Tensor:
    """[t_1, t_2, …] [T, n*r] with t_i = s*dYg_i@B_i, from each dYg [T, d_out]; zero where that is None."""
    first = dbases[0]
    if plan.count == 1:
        assert first is not None
        return scaled(first, lora_B[0], plan.scaling, first.dtype)
    if first is None:
        first = next(dbase for dbase in dbases if dbase is not None)
    t = first.new_empty((first.shape[0], plan.count * plan.rank))
    for part, dbase, b in zip(t.chunk(plan.count, 1), dbases, lora_B, strict=True):
        if dbase is None:
            part.zero_()
        else:
            part.addmm_(dbase, b, beta=0, alpha=plan.scaling)  # beta=0: part is not read
    return t


def wide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left@right in fp32, of factors in fp32 or 16 bits: of these it is the accumulator, not rounded and not cast."""
    if left.dtype is torch.float32:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else operators.wide_product(left, right)


def scaled(left: torch.Tensor, right: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """s*left@right in ``dtype``."""
    if dtype is not left.dtype:
        return _product(left, right, scaling, dtype)
    if scaling == 1.0:
        return torch.mm(left, right)
    return torch.addmm(_unread(dtype, left.device), left, right, beta=0, alpha=scaling)
