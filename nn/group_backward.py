"""The backward passes of projections that run together (:mod:`.group`): dX, and dA, dB and dm of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..internals.torch import keeps_graph
from . import operators
from .autocast import without_autocast
from .autograd import _as, _check_unwritten, _product, _rows
from .differentiation import once_only
from .group_plan import Plan


class _Saved(NamedTuple):
    """The forward pass's values for the backward pass; those that no gradient needs are None."""

    x: torch.Tensor | None
    g: list[torch.Tensor]
    norm: list[torch.Tensor]
    h: torch.Tensor
    bases: list[Any]
    weights: list[torch.Tensor]
    lora_A: torch.Tensor
    lora_B: list[torch.Tensor]


def _saved(ctx: Any) -> _Saved:
    count, kept = ctx.plan.count, ctx.kept
    x, *rest = ctx.saved_tensors  # runs a checkpoint's recompute, whose versions count
    _check_unwritten(kept.parameters, ctx.versions)
    weights: list[Any] = [*kept.tensors]
    for index, tensor in zip(kept.saved, rest[3 * count + 1 :], strict=True):
        weights[index] = tensor
    g, norm, h, bases = rest[:count], rest[count : 2 * count], rest[2 * count], rest[2 * count + 1 : 3 * count + 1]
    return _Saved(x, g, norm, h, bases, weights[:count], weights[count], weights[count + 1 :])


def differentiate(
    ctx: Any, backward: Callable[..., tuple[torch.Tensor | None, ...]], dys: Sequence[torch.Tensor | None], name: str
) -> tuple[torch.Tensor | None, ...]:
    """Run ``backward``, which may overwrite and free what was saved unless the graph is kept."""
    device = next(dy for dy in dys if dy is not None).device
    if not torch.is_grad_enabled():
        with without_autocast(device):
            return backward(ctx, *dys, release=not keeps_graph())
    with torch.no_grad(), without_autocast(device):
        grads = backward(ctx, *dys, release=False)
    followed = (*dys, *[saved for saved in ctx.saved_tensors if saved is not None], *ctx.kept.parameters)
    return once_only(name, grads, followed)


def _release(ctx: Any) -> None:
    ctx.maybe_clear_saved_tensors()
    ctx.token = None


def _input_gradients(
    ctx: Any, saved: _Saved, dbases: list[torch.Tensor | None], shape: Sequence[int]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX [*shape, d_in] and dA of each projection, from each dYg [T, d_out] or None; empties ``dbases``."""
    plan: Plan = ctx.plan
    first = next(dbase for dbase in dbases if dbase is not None)
    count, rank, scaling = plan.count, plan.rank, plan.scaling
    t = torch.empty((first.shape[0], count * rank), dtype=first.dtype, device=first.device)
    for part, dbase, b in zip((t,) if count == 1 else t.chunk(count, 1), dbases, saved.lora_B, strict=True):
        if dbase is None:
            part.zero_()
        else:
            part.addmm_(dbase, b, beta=0, alpha=scaling)  # beta=0: part is not read
    da: list[torch.Tensor | None] = [None] * count
    if ctx.need_a:
        assert saved.x is not None
        product = _product(t.t(), _rows(saved.x), 1.0, plan.adapter_dtype)
        parts = (product,) if count == 1 else product.chunk(count)
        da = [None if dbase is None else part for part, dbase in zip(parts, dbases, strict=True)]
    dx: torch.Tensor | None = None
    if ctx.need_x:
        for index, weight in enumerate(saved.weights):
            dbase, dbases[index] = dbases[index], None  # frees memory for the products that follow
            if dbase is not None:
                dx = torch.mm(dbase, weight) if dx is None else dx.addmm_(dbase, weight)
        assert dx is not None
        dx = dx.addmm_(t, saved.lora_A).view(*shape, saved.lora_A.shape[1])
    return dx, da


def _lora_b_gradients(ctx: Any, saved: _Saved, dbases: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """dB [d_out, r] = s*dYg.T@h of each projection, in the adapter's dtype."""
    plan: Plan = ctx.plan
    if not ctx.need_b:
        return [None] * plan.count
    parts = (saved.h,) if plan.count == 1 else saved.h.chunk(plan.count, 1)
    return [
        None if dbase is None else _product(dbase.t(), h, plan.scaling, plan.adapter_dtype)
        for dbase, h in zip(dbases, parts, strict=True)
    ]


def project_backward(ctx: Any, *dys: torch.Tensor | None, release: bool) -> tuple[torch.Tensor | None, ...]:
    plan: Plan = ctx.plan
    saved = _saved(ctx)
    if release:
        _release(ctx)
    rows = [None if dy is None else _rows(dy) for dy in dys]
    dbases: list[torch.Tensor | None] = [None] * plan.count
    db, dm = list(dbases), list(dbases)
    given = [dy for dy in rows if dy is not None]
    if saved.bases[0] is None:
        dbases = [None if dy is None else _as(dy * g, dy.dtype) for dy, g in zip(rows, saved.g, strict=True)]
        db = _lora_b_gradients(ctx, saved, dbases)
    elif 1 < plan.count == len(given):
        compose = operators.compose_backward_group_ if release else operators.compose_backward_group
        made = compose(
            given, saved.bases, saved.h, saved.lora_B, saved.g, saved.norm, plan.scaling, plan.magnitude_dtype
        )
        dbases, dm = made[: plan.count], made[plan.count :]  # type: ignore[assignment]
        db = _lora_b_gradients(ctx, saved, dbases)
    else:
        parts = (saved.h,) if plan.count == 1 else saved.h.chunk(plan.count, 1)
        for index, (dy, h) in enumerate(zip(rows, parts, strict=True)):
            if dy is None:
                continue
            b, g = saved.lora_B[index], saved.g[index]
            dbases[index], dg = operators.compose_backward(dy, saved.bases[index], g, False)
            db[index], dm[index] = operators.adapter_backward(
                dy, h, b, g, dg, saved.norm[index], plan.scaling, plan.adapter_dtype, plan.magnitude_dtype
            )
    if release:
        saved.bases.clear()  # what is not dYg now is freed
    shape = next(dy for dy in dys if dy is not None).shape[:-1]
    dx, da = _input_gradients(ctx, saved, dbases, shape)
    return _arguments(dx, da, db, dm)


def gated_backward(ctx: Any, dy: torch.Tensor, *, release: bool) -> tuple[torch.Tensor | None, ...]:
    plan: Plan = ctx.plan
    saved = _saved(ctx)
    if release:
        _release(ctx)
    rows = _rows(dy)
    biases = [_as(bias, rows.dtype) for bias in plan.biases] or (None, None)
    differentiate: Any = operators.compose_swiglu_backward_ if release else operators.compose_swiglu_backward
    factors = (*saved.bases, saved.h, *saved.lora_B, *saved.g, *saved.norm, *biases)
    gate, up, *dm = differentiate(rows, *factors, plan.scaling, plan.activation, plan.magnitude_dtype)
    del factors  # or it would keep what is freed below
    if release:
        saved.bases.clear()
    dbases: list[torch.Tensor | None] = [gate, up]
    db = _lora_b_gradients(ctx, saved, dbases)
    dx, da = _input_gradients(ctx, saved, dbases, dy.shape[:-1])
    return _arguments(dx, da, db, dm[:2])


def _arguments(
    dx: torch.Tensor | None,
    da: Sequence[torch.Tensor | None],
    db: Sequence[torch.Tensor | None],
    dm: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients in the order of a function's arguments: two without, x, then A, B, m of each projection."""
    grads: list[torch.Tensor | None] = [None, None, dx]
    for each in zip(da, db, dm, strict=True):
        grads += each
    return tuple(grads)
