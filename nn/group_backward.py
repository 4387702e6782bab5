"""The backward passes of projections that run together (:mod:`.group`): dX, and dA, dB and dm of each.

An MLP's backward pass computes act(gate)*up again, in one pass over both base products, for dA of down alone, and frees
it before it makes the gradient of the same size:

    down       dYg = g*dY, dB and dm as of any projection, t = s*dYg@B, dA = t.T@(act(gate)*up)
    between    d(act(gate)*up) = dYg@W + t@A
    gate, up   dYg of both in the memory of their base products, and the rest as of any group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..internals.torch import keeps_graph, some_autocast_is_on
from . import operators
from .autocast import without_autocast
from .autograd import _as, _check_unwritten, _product, _rows
from .differentiation import once_only
from .group_plan import Kept, Plan


class Needs(NamedTuple):
    """Which gradients of a plan's projections are wanted, and what they take.

    ``kept`` are the parameters that the backward pass reads, ``versions`` theirs in the forward pass.
    """

    plan: Plan
    x: bool
    lora_A: bool
    lora_B: bool
    kept: Kept
    versions: list[int]


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


def _saved(needs: Needs, tensors: Sequence[Any]) -> _Saved:
    """What was saved for one plan, from its part of ``ctx.saved_tensors``.

    Reading those runs a checkpoint's recompute, whose versions of parameters count: so they are read before this.
    """
    count, kept = needs.plan.count, needs.kept
    _check_unwritten(kept.parameters, needs.versions)
    weights: list[Any] = [*kept.tensors]
    for index, tensor in zip(kept.saved, tensors[3 * count + 2 :], strict=True):
        weights[index] = tensor
    return _Saved(
        tensors[0],
        [*tensors[1 : count + 1]],
        [*tensors[count + 1 : 2 * count + 1]],
        tensors[2 * count + 1],
        [*tensors[2 * count + 2 : 3 * count + 2]],
        weights[:count],
        weights[count],
        weights[count + 1 :],
    )


def differentiate(
    ctx: Any, backward: Callable[..., tuple[torch.Tensor | None, ...]], dys: Sequence[torch.Tensor | None], name: str
) -> tuple[torch.Tensor | None, ...]:
    """Run ``backward``, which may overwrite and free what was saved unless the graph is kept."""
    if not torch.is_grad_enabled():
        release = not keeps_graph()
        if not some_autocast_is_on():
            return backward(ctx, *dys, release=release)
        with without_autocast(_first(dys).device):
            return backward(ctx, *dys, release=release)
    with torch.no_grad(), without_autocast(_first(dys).device):
        grads = backward(ctx, *dys, release=False)
    saved = [each for each in ctx.saved_tensors if each is not None]
    parameters = [each for needs in ctx.needs for each in needs.kept.parameters]
    return once_only(name, grads, (*dys, *saved, *parameters))


def _first(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The first that is not None."""
    first = tensors[0]
    return next(tensor for tensor in tensors if tensor is not None) if first is None else first


def _release(ctx: Any) -> None:
    ctx.maybe_clear_saved_tensors()
    ctx.token = None


def _low_gradients(needs: Needs, saved: _Saved, dbases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """[t_1, t_2, …] [T, n*r] with t = s*dYg@B, from each dYg [T, d_out] or None."""
    count, rank, scaling = needs.plan.count, needs.plan.rank, needs.plan.scaling
    first = _first(dbases)
    if count == 1:
        return _product(first, saved.lora_B[0], scaling, first.dtype)
    t = first.new_empty((first.shape[0], count * rank))
    for part, dbase, b in zip(t.chunk(count, 1), dbases, saved.lora_B, strict=True):
        if dbase is None:
            part.zero_()
        else:
            part.addmm_(dbase, b, beta=0, alpha=scaling)  # beta=0: part is not read
    return t


def _lora_a_gradients(needs: Needs, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """dA [r, d_in] = t.T@x of each projection, in the adapter's dtype, for x [T, d_in]."""
    product = _product(t.t(), x, 1.0, needs.plan.adapter_dtype)
    return (product,) if needs.plan.count == 1 else product.chunk(needs.plan.count)


def _input_gradient(saved: _Saved, dbases: list[torch.Tensor | None], t: torch.Tensor) -> torch.Tensor:
    """dX [T, d_in]; empties ``dbases``."""
    dx: torch.Tensor | None = None
    for index, weight in enumerate(saved.weights):
        dbase, dbases[index] = dbases[index], None  # frees memory for the products that follow
        if dbase is not None:
            dx = torch.mm(dbase, weight) if dx is None else dx.addmm_(dbase, weight)
    assert dx is not None
    return dx.addmm_(t, saved.lora_A)


def _x_and_lora_a_gradients(
    needs: Needs, saved: _Saved, dbases: list[torch.Tensor | None], shape: Sequence[int]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX [*shape, d_in] and dA of each projection, from each dYg [T, d_out] or None; empties ``dbases``."""
    t = _low_gradients(needs, saved, dbases)
    da: list[torch.Tensor | None] = [None] * needs.plan.count
    if needs.lora_A:
        assert saved.x is not None
        parts = _lora_a_gradients(needs, t, _rows(saved.x))
        da = [None if dbase is None else part for part, dbase in zip(parts, dbases, strict=True)]
    dx = _input_gradient(saved, dbases, t).view(*shape, saved.lora_A.shape[1]) if needs.x else None
    return dx, da


def _lora_b_gradients(needs: Needs, saved: _Saved, dbases: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """dB [d_out, r] = s*dYg.T@h of each projection, in the adapter's dtype."""
    plan = needs.plan
    if not needs.lora_B:
        return [None] * plan.count
    parts = (saved.h,) if plan.count == 1 else saved.h.chunk(plan.count, 1)
    return [
        None if dbase is None else _product(dbase.t(), h, plan.scaling, plan.adapter_dtype)
        for dbase, h in zip(dbases, parts, strict=True)
    ]


_Gradients = list[torch.Tensor | None]


def _output_gradients(
    needs: Needs, saved: _Saved, rows: Sequence[torch.Tensor | None], *, release: bool
) -> tuple[_Gradients, _Gradients, _Gradients]:
    """dYg, dB and dm of each projection from its dY [T, d_out] or None."""
    plan = needs.plan
    dbases: _Gradients = [None] * plan.count
    db, dm = list(dbases), list(dbases)
    given = [dy for dy in rows if dy is not None]
    if saved.bases[0] is None:
        dbases = [None if dy is None else _as(dy * g, dy.dtype) for dy, g in zip(rows, saved.g, strict=True)]
        db = _lora_b_gradients(needs, saved, dbases)
    elif 1 < plan.count == len(given):
        compose = operators.compose_backward_group_ if release else operators.compose_backward_group
        made = compose(
            given, saved.bases, saved.h, saved.lora_B, saved.g, saved.norm, plan.scaling, plan.magnitude_dtype
        )
        dbases, dm = made[: plan.count], made[plan.count :]  # type: ignore[assignment]
        db = _lora_b_gradients(needs, saved, dbases)
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
    return dbases, db, dm


def _activation_gradients(
    needs: Needs, saved: _Saved, rows: torch.Tensor, *, release: bool
) -> tuple[_Gradients, _Gradients]:
    """dYg and dm of gate and up from the gradient [T, d_out] of act(gate)*up."""
    plan = needs.plan
    biases = plan.biases_in(rows.dtype) or (None, None)
    compose: Any = operators.compose_swiglu_backward_ if release else operators.compose_swiglu_backward
    factors = (*saved.bases, saved.h, *saved.lora_B, *saved.g, *saved.norm, *biases)
    gate, up, *dm = compose(rows, *factors, plan.scaling, plan.activation, plan.magnitude_dtype)
    if release:
        saved.bases.clear()
    return [gate, up], dm[:2]


def project_backward(ctx: Any, *dys: torch.Tensor | None, release: bool) -> tuple[torch.Tensor | None, ...]:
    (needs,) = ctx.needs
    saved = _saved(needs, ctx.saved_tensors)
    if release:
        _release(ctx)
    rows = [None if dy is None else _rows(dy) for dy in dys]
    dbases, db, dm = _output_gradients(needs, saved, rows, release=release)
    dx, da = _x_and_lora_a_gradients(needs, saved, dbases, _first(dys).shape[:-1])
    return (None, None, dx, *_by_projection(da, db, dm))


def gated_backward(ctx: Any, dy: torch.Tensor, *, release: bool) -> tuple[torch.Tensor | None, ...]:
    (needs,) = ctx.needs
    saved = _saved(needs, ctx.saved_tensors)
    if release:
        _release(ctx)
    dbases, dm = _activation_gradients(needs, saved, _rows(dy), release=release)
    db = _lora_b_gradients(needs, saved, dbases)
    dx, da = _x_and_lora_a_gradients(needs, saved, dbases, dy.shape[:-1])
    return (None, None, dx, *_by_projection(da, db, dm))


def mlp_backward(ctx: Any, dy: torch.Tensor, *, release: bool) -> tuple[torch.Tensor | None, ...]:
    needs, needs_down = ctx.needs
    tensors = ctx.saved_tensors
    saved, down = _saved(needs, tensors[: ctx.first]), _saved(needs_down, tensors[ctx.first :])
    del tensors
    if release:
        _release(ctx)
    dbases, db_down, dm_down = _output_gradients(needs_down, down, (_rows(dy),), release=release)
    t = _low_gradients(needs_down, down, dbases)
    da_down: Sequence[torch.Tensor | None] = (None,)
    if needs_down.lora_A:
        activation, down = down.x, down._replace(x=None)
        rows = _activation(needs.plan, saved) if activation is None else _rows(activation)
        da_down = _lora_a_gradients(needs_down, t, rows)
        del activation, rows
    # Nothing here may hold this gradient, nor the activation, while the products of gate and up are made.
    dbases, dm = _activation_gradients(needs, saved, _input_gradient(down, dbases, t), release=release)
    db = _lora_b_gradients(needs, saved, dbases)
    dx, da = _x_and_lora_a_gradients(needs, saved, dbases, dy.shape[:-1])
    return (None, None, dx, *_by_projection(da, db, dm), *_by_projection(da_down, db_down, dm_down))


def _activation(plan: Plan, saved: _Saved) -> torch.Tensor:
    """act(gate)*up [T, d_out] again, as the forward pass computed it."""
    biases = plan.biases_in(saved.h.dtype) or (None, None)
    compose: Any = operators.compose_swiglu
    factors = (*saved.bases, saved.h, *saved.lora_B, *saved.g, *biases)
    activation: torch.Tensor = compose(*factors, plan.scaling, plan.activation)
    return activation


def _by_projection(
    da: Sequence[torch.Tensor | None], db: Sequence[torch.Tensor | None], dm: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients in the order of a function's arguments: A, B, m of each projection."""
    return [grad for each in zip(da, db, dm, strict=True) for grad in each]
