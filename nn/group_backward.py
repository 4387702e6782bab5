"""The backward passes of projections that run together (:mod:`.group`): dX, and dA, dB and dm of each.

An MLP's backward pass computes act(gate)*up again, in one pass over both base products, for dA of down alone, and frees
it before it makes the gradient of the same size:

    down       dYg = g*dY, dB and dm as of any projection, t = s*dYg@B, dA = t.T@(act(gate)*up)
    between    d(act(gate)*up) = dYg@W + t@A
    gate, up   dYg of both in the memory of their base products, and the rest as of any group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from ..internals.torch import keeps_graph, some_autocast_is_on
from .autocast import without_autocast
from .autograd import _as, _check_unwritten, _product, _rows
from .differentiation import once_only
from .gated import activate, differentiate_activation
from .group_gradients import (
    differentiate_group,
    differentiate_one,
    low_gradients,
    scaled,
)
from .group_plan import At, Needs, Plan

_Gradients = list[torch.Tensor | None]

_version = attrgetter("_version")


Call = tuple[Plan, At, Needs, list[int]]
"""A call of a plan whose backward pass is to come; the numbers are the versions of ``Needs.parameters``."""


class _Saved:
    """What a call's backward pass reads, of its part of ``ctx.saved_tensors``; what no gradient needs is None.

    Reading those runs a checkpoint's recompute, whose versions of parameters count: so they are read before this.
    """

    __slots__ = ("at", "bases", "g", "h", "lora_A", "lora_B", "needs", "norm", "plan", "weights", "x")

    def __init__(self, call: Call, tensors: Sequence[Any]) -> None:
        self.plan, self.at, self.needs, versions = call
        parameters = self.needs.parameters
        if [*map(_version, parameters)] != versions:
            _check_unwritten(parameters, versions)
        count = self.plan.count
        self.x, self.h = tensors[:2]
        self.g = tensors[2 : 2 + count]
        self.norm = tensors[2 + count : 2 + 2 * count]
        self.bases = [*tensors[2 + 2 * count : 2 + 3 * count]]
        weights: list[Any] = [*self.needs.tensors]
        for index, tensor in zip(self.needs.saved, tensors[2 + 3 * count :], strict=True):
            weights[index] = tensor
        self.weights, self.lora_A, self.lora_B = weights[:count], weights[count], weights[count + 1 :]


Backward = Callable[[Any, Sequence[torch.Tensor | None], bool], tuple[torch.Tensor | None, ...]]
"""From the context and the gradients of the outputs: those of the inputs. True: it may overwrite and free."""


def differentiate(
    ctx: Any, backward: Backward, dys: Sequence[torch.Tensor | None], name: str
) -> tuple[torch.Tensor | None, ...]:
    """Run ``backward``, which may overwrite and free what was saved unless the graph is kept."""
    if not torch.is_grad_enabled():
        if not some_autocast_is_on():
            return backward(ctx, dys, not keeps_graph())
        with without_autocast(_first(dys).device):
            return backward(ctx, dys, not keeps_graph())
    with torch.no_grad(), without_autocast(_first(dys).device):
        grads = backward(ctx, dys, False)
    saved = [each for each in ctx.saved_tensors if each is not None]
    parameters = [each for _, _, needs, _ in ctx.calls for each in needs.parameters]
    return once_only(name, grads, (*dys, *saved, *parameters))


def _first(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The first that is not None."""
    return next(tensor for tensor in tensors if tensor is not None)


def _release(ctx: Any) -> None:
    ctx.maybe_clear_saved_tensors()
    ctx.token = None


def _lora_a_gradients(plan: Plan, t: torch.Tensor, x: torch.Tensor) -> Sequence[torch.Tensor]:
    """dA [r, d_in] = t.T@x of each projection, in the adapter's dtype, for x [T, d_in]."""
    dtype = plan.adapter_dtype
    product = torch.mm(t.t(), x) if dtype is t.dtype else _product(t.t(), x, 1.0, dtype)
    return (product,) if plan.count == 1 else product.chunk(plan.count)


def _input_gradient(saved: _Saved, dbases: _Gradients, t: torch.Tensor) -> torch.Tensor:
    """dX [T, d_in]; empties ``dbases``."""
    dx: torch.Tensor | None = None
    for index, weight in enumerate(saved.weights):
        dbase, dbases[index] = dbases[index], None  # frees memory for the products that follow
        if dbase is not None:
            dx = torch.mm(dbase, weight) if dx is None else dx.addmm_(dbase, weight)
    assert dx is not None
    return dx.addmm_(t, torch.cat(saved.plan.lora_A) if saved.lora_A is None else saved.lora_A)


def _x_and_lora_a_gradients(
    saved: _Saved, dbases: _Gradients, shape: Sequence[int]
) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
    """dX [*shape, d_in] and dA of each projection, from each dYg [T, d_out] or None; empties ``dbases``."""
    plan, needs = saved.plan, saved.needs
    t = low_gradients(plan, dbases, saved.lora_B)
    da = _lora_a_gradients(plan, t, _rows(saved.x)) if needs.lora_A else [None] * plan.count
    if not needs.x:
        return None, da
    dx = _input_gradient(saved, dbases, t)
    return dx.view(*shape, dx.shape[1]), da


def _lora_b_gradients(saved: _Saved, dbases: Sequence[torch.Tensor | None]) -> _Gradients:
    """dB [d_out, r] = s*dYg.T@h of each projection, in the adapter's dtype."""
    plan = saved.plan
    if not saved.needs.lora_B:
        return [None] * plan.count
    parts = (saved.h,) if plan.count == 1 else saved.h.chunk(plan.count, 1)
    return [
        None if dbase is None else scaled(dbase.t(), h, plan.scaling, plan.adapter_dtype)
        for dbase, h in zip(dbases, parts, strict=True)
    ]


def _output_gradients(
    saved: _Saved, dys: Sequence[torch.Tensor | None], *, release: bool
) -> tuple[_Gradients, _Gradients, _Gradients]:
    """dYg, dB and dm of each projection from its dY [..., d_out] or None."""
    plan, at, bases, h = saved.plan, saved.at, saved.bases, saved.h
    dbases: Any
    db: Any
    dm: Any
    if not saved.needs.magnitude:
        dm = [None] * plan.count
        dbases = [None if dy is None else _as(_rows(dy) * g, dy.dtype) for dy, g in zip(dys, saved.g, strict=True)]
        db = _lora_b_gradients(saved, dbases)
    elif 1 < plan.count == len(given := [dy for dy in dys if dy is not None]) and not at.apart:
        dbases, dm = differentiate_group(plan, at, given, bases, h, saved.lora_B, saved.g, saved.norm, release=release)
        db = _lora_b_gradients(saved, dbases)
    else:
        dbases = [None] * plan.count
        db, dm = [*dbases], [*dbases]
        parts = (h,) if plan.count == 1 else h.chunk(plan.count, 1)
        for index, dy in enumerate(dys):
            if dy is not None:
                own = parts[index], saved.lora_B[index], saved.g[index], saved.norm[index]
                dbases[index], db[index], dm[index] = differentiate_one(plan, at, _rows(dy), bases[index], *own)
    if release:
        bases.clear()  # what is not dYg now is freed
    return dbases, db, dm


def _activation_gradients(saved: _Saved, dy: torch.Tensor, *, release: bool) -> tuple[_Gradients, _Gradients]:
    """dYg and dm of gate and up from the gradient [..., d_out] of act(gate)*up."""
    plan, bases = saved.plan, saved.bases
    factors = (bases, saved.h, saved.lora_B, saved.g, saved.norm)
    dbases, dm = differentiate_activation(plan, saved.at, dy, *factors, release=release)
    if release:
        bases.clear()
    return [*dbases], [*dm]


def project_backward(ctx: Any, dys: Sequence[torch.Tensor | None], release: bool) -> tuple[torch.Tensor | None, ...]:
    saved = _Saved(ctx.calls[0], ctx.saved_tensors)
    if release:
        _release(ctx)
    first = dys[0] if dys[0] is not None else _first(dys)
    dbases, db, dm = _output_gradients(saved, dys, release=release)
    dx, da = _x_and_lora_a_gradients(saved, dbases, first.shape[:-1])
    if len(dys) > 1:
        da = [None if dy is None else grad for dy, grad in zip(dys, da, strict=True)]
    return (None, None, dx, *_by_projection(da, db, dm))


def gated_backward(ctx: Any, dys: Sequence[Any], release: bool) -> tuple[torch.Tensor | None, ...]:
    (dy,) = dys
    saved = _Saved(ctx.calls[0], ctx.saved_tensors)
    if release:
        _release(ctx)
    dbases, dm = _activation_gradients(saved, dy, release=release)
    db = _lora_b_gradients(saved, dbases)
    dx, da = _x_and_lora_a_gradients(saved, dbases, dy.shape[:-1])
    return (None, None, dx, *_by_projection(da, db, dm))


def mlp_backward(ctx: Any, dys: Sequence[Any], release: bool) -> tuple[torch.Tensor | None, ...]:
    (dy,), (call, call_down), tensors = dys, ctx.calls, ctx.saved_tensors
    saved, down = _Saved(call, tensors[: ctx.first]), _Saved(call_down, tensors[ctx.first :])
    del tensors
    if release:
        _release(ctx)
    dbases, db_down, dm_down = _output_gradients(down, (dy,), release=release)
    t = low_gradients(down.plan, dbases, down.lora_B)
    da_down: Sequence[torch.Tensor | None] = (None,)
    if down.needs.lora_A:
        activation, down.x = down.x, None
        activation = _activation(saved) if activation is None else _rows(activation)
        da_down = _lora_a_gradients(down.plan, t, activation)
        del activation
    # Nothing here may hold this gradient, nor the activation, while the products of gate and up are made.
    dbases, dm = _activation_gradients(saved, _input_gradient(down, dbases, t), release=release)
    db = _lora_b_gradients(saved, dbases)
    dx, da = _x_and_lora_a_gradients(saved, dbases, dy.shape[:-1])
    return (None, None, dx, *_by_projection(da, db, dm), *_by_projection(da_down, db_down, dm_down))


def _activation(saved: _Saved) -> torch.Tensor:
    """act(gate)*up [T, d_out] again, as the forward pass computed it."""
    return activate(saved.plan, saved.at, saved.bases, saved.h, saved.lora_B, saved.g, None)


def _by_projection(
    da: Sequence[torch.Tensor | None], db: Sequence[torch.Tensor | None], dm: Sequence[torch.Tensor | None]
) -> _Gradients:
    """The gradients in the order of a function's arguments: A, B, m of each projection."""
    grads = [*da, *db, *dm]
    grads[0::3], grads[1::3], grads[2::3] = da, db, dm
    return grads
