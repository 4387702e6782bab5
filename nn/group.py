"""DoRA on several projections of one x as one differentiable function, and on a gated activation, act(gate)*up.

    forward    h = x@[A_1; A_2; …].T, base_i = x@W_i.T, y_i = g_i*(base_i + s*h_i@B_i.T) + b_i
    gated      act(y_gate)*y_up in the same pass: neither y_gate nor y_up is ever in memory
    backward   dYg_i = g_i*dY_i, t_i = s*dYg_i@B_i, dX = sum_i dYg_i@W_i + [t_1, t_2, …]@[A_1; A_2; …],
               [dA_1; dA_2; …] = [t_1, t_2, …].T@x, dB_i = s*dYg_i.T@h_i,
               dm_i = sum_t dY_i*(base_i + s*h_i@B_i.T) / max(w_i, eps)

One product gives h of all projections, one dA of all, one launch all compositions, and dX is added up in one tensor. A
single projection is a group of one. The function computes every base product itself, so it owns that memory: nothing
else can overwrite what the backward pass needs, and the backward pass writes over it.

What does not change from call to call is in a plan (:mod:`.group_plan`); :mod:`.group_backward` has the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from ..internals.torch import current_backward
from . import operators
from .autograd import _as, _rows, _versions, apply_eagerly
from .group_backward import differentiate, gated_backward, project_backward
from .group_plan import Plan
from .norm_cache import norms_taken, slice_settings, take_gains


def project(x: torch.Tensor, plan: Plan, dtype: torch.dtype, held: object = None) -> tuple[torch.Tensor, ...]:
    """Return each projection's output [..., d_out] of x [..., d_in], in ``dtype``.

    The projections are checked: their sizes and devices fit x, W has ``dtype``, and A and B are to be rounded to it.
    Nothing must watch (:func:`~doratune.internals.torch.undisturbed`). ``held`` lives until the backward pass has run:
    whoever made it can tell whether a graph of this call still waits.
    """
    if x.dtype is not dtype:
        x = x.to(dtype)
    if torch.is_grad_enabled() and _trains(x, plan):
        outputs: tuple[torch.Tensor, ...] = apply_eagerly(_Project, plan, held, x, *plan.trained)
        return outputs
    with torch.no_grad():
        return _project(x, plan, trains=False)[0]


def project_gated(x: torch.Tensor, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Return act(gate)*up [..., d_out] in ``dtype`` for a plan with an activation; otherwise as :func:`project`."""
    if x.dtype is not dtype:
        x = x.to(dtype)
    if torch.is_grad_enabled() and _trains(x, plan):
        output: torch.Tensor = apply_eagerly(_Gated, plan, None, x, *plan.trained)
        return output
    with torch.no_grad():
        return _gated(x, plan, trains=False)[0]


def _trains(x: torch.Tensor, plan: Plan) -> bool:
    return x.requires_grad or True in [tensor.requires_grad for tensor in plan.trained]


class _Factors(NamedTuple):
    """What the forward pass computes with: A of all projections in one matrix, h of all, and B, w and g of each."""

    lora_A: torch.Tensor
    h: torch.Tensor
    lora_B: list[torch.Tensor]
    norm: list[torch.Tensor]
    g: list[torch.Tensor]


def _factors(rows: torch.Tensor, plan: Plan, *, trains: bool) -> _Factors:
    dtype = rows.dtype
    down, up = plan.lora_A, plan.lora_B
    if plan.adapter_dtype is not dtype:
        down, up = [a.to(dtype) for a in down], [b.to(dtype) for b in up]
    gains = None
    if not trains or current_backward() == -1:
        settings = slice_settings(plan.weights[0], plan.scaling, dtype)
        gains = take_gains(plan.caches, plan.tensors, plan.addresses, settings)
    if gains is None:
        norms, gains = _norms_and_gains(plan, down, up, dtype, trains=trains)
    else:
        norms = norms_taken(plan.caches) if trains else []
    a = down[0] if plan.count == 1 else torch.cat(down)
    return _Factors(a, linear(rows, a), up, norms, gains)


def _norms_and_gains(
    plan: Plan, down: Sequence[torch.Tensor], up: Sequence[torch.Tensor], dtype: torch.dtype, *, trains: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """w and g of each projection, of which each is asked alone; A and B, rounded, are ``down`` and ``up``."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # what kernels take, whatever m or w came in
    norms, gains = [], []
    for one, a, b in zip(plan.projections, down, up, strict=True):
        weight, lora_a, lora_b, magnitude, _, scaling, cache = one
        norm, g = cache.gain_of_weight(weight, lora_a, lora_b, magnitude, scaling, rounded=(a, b), trains=trains)
        norms.append(_as(norm, wide))
        gains.append(_as(g, wide))
    return norms, gains


def _project(
    x: torch.Tensor, plan: Plan, *, trains: bool, needs_dg: bool = False
) -> tuple[tuple[torch.Tensor, ...], _Factors, list[torch.Tensor]]:
    """The outputs, the factors and the base products; these are overwritten unless ``needs_dg``."""
    rows = _rows(x)
    dtype, lead = rows.dtype, x.shape[:-1]
    factors = _factors(rows, plan, trains=trains)
    biases = [_as(bias, dtype) for bias in plan.biases]
    _, h, b, _, g = factors
    if plan.count == 1 and not trains and plan.fuses(rows, b[0]):
        bias = biases[0] if biases else None
        made = operators.dora_linear_forward(rows, plan.weights[0], h, b[0], g[0], bias, plan.scaling, False)
        bases = []
    else:
        bases = [linear(rows, weight) for weight in plan.weights]
        kernel = plan.kernel(rows.shape[0], dtype)
        if kernel is not None:
            made = bases
            if needs_dg:
                made = [torch.empty((*lead, b.shape[1]), dtype=dtype, device=x.device) for b in bases]
            # The order of both contracts: bases, h, B, g, biases.
            kernel.launch((*bases, h, *b, *g, *biases), made, plan.scaling)
            if needs_dg:
                return tuple(made), factors, bases
        elif plan.count == 1:
            bias = biases[0] if biases else None
            made = [operators.lora_compose(bases[0], h, b[0], g[0], bias, plan.scaling, False)]
        else:
            made = operators.lora_compose_group(bases, h, b, g, biases, plan.scaling)
    # Without detach() a view could not be changed in place.
    return tuple([y.view(*lead, y.shape[1]).detach() for y in made]), factors, bases


def _gated(x: torch.Tensor, plan: Plan, *, trains: bool) -> tuple[torch.Tensor, _Factors, list[torch.Tensor]]:
    """act(gate)*up, the factors and both base products, of which gate's is overwritten unless ``trains``."""
    rows, lead = _rows(x), x.shape[:-1]
    factors = _factors(rows, plan, trains=trains)
    bases = [linear(rows, weight) for weight in plan.weights]
    biases = [_as(bias, rows.dtype) for bias in plan.biases]
    kernel = plan.kernel(rows.shape[0], rows.dtype)
    if kernel is not None:
        gate = bases[0]
        y = torch.empty((*lead, gate.shape[1]), dtype=gate.dtype, device=gate.device) if trains else gate
        kernel.launch((*bases, factors.h, *factors.lora_B, *factors.g, *biases), (y,), plan.scaling)
        if trains:
            return y, factors, bases
    else:
        compose: Any = operators.compose_swiglu
        given = (*bases, factors.h, *factors.lora_B, *factors.g, *(biases or (None, None)))
        y = compose(*given, plan.scaling, plan.activation)
    return y.view(*lead, y.shape[1]).detach(), factors, bases


def _save(
    ctx: Any, x: torch.Tensor, plan: Plan, held: object, factors: _Factors, bases: Sequence[torch.Tensor | None]
) -> None:
    """Save for the backward pass of a function of the plan, ``held``, x, and A, B, m of each projection."""
    needs = ctx.needs_input_grad
    ctx.need_x, ctx.need_a, ctx.need_b = needs[2], True in needs[3::3], True in needs[4::3]
    ctx.plan, ctx.token = plan, held
    has_bases = bases[0] is not None  # for dm, and for a gated pair, which computes its outputs again
    ctx.kept = kept = plan.keeps(factors.lora_B[0] is plan.lora_B[0], ctx.need_x)
    ctx.versions = _versions(kept.parameters)
    weights = [*plan.weights, factors.lora_A, *factors.lora_B]
    ctx.save_for_backward(
        x if ctx.need_a else None,
        *factors.g,
        *(factors.norm if has_bases else [None] * plan.count),
        factors.h if ctx.need_b or has_bases else None,
        *bases,
        *[weights[index] for index in kept.saved],
    )


class _Project(torch.autograd.Function):
    """:func:`project` with gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, held: object, x: torch.Tensor, *_: torch.Tensor) -> Any:
        needs_dg = True in ctx.needs_input_grad[5::3]
        outputs, factors, bases = _project(x, plan, trains=True, needs_dg=needs_dg)
        ctx.set_materialize_grads(False)
        _save(ctx, x, plan, held, factors, bases if needs_dg else [None] * plan.count)
        return outputs

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if not any(dy is not None for dy in dys):
            return (None,) * (3 + 3 * len(dys))
        return differentiate(ctx, project_backward, dys, "dora_linear")


class _Gated(torch.autograd.Function):
    """:func:`project_gated` with gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, held: object, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        y, factors, bases = _gated(x, plan, trains=True)
        _save(ctx, x, plan, held, factors, bases)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return differentiate(ctx, gated_backward, (dy,), "an MLP of dora_linear")
