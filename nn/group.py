"""DoRA on several projections of one x as one differentiable function, on a gated activation, and on a whole MLP.

    forward    h = x@[A_1; A_2; …].T, base_i = x@W_i.T, y_i = g_i*(base_i + s*h_i@B_i.T) + b_i
    gated      act(y_gate)*y_up in the same pass: neither y_gate nor y_up is ever in memory; at high ranks
               s*h_i@B_i.T is added to base_i first, which the backward pass then reads (:mod:`.gated`)
    MLP        down(act(y_gate)*y_up): act(y_gate)*y_up is not kept for the backward pass, which computes it again
    backward   dYg_i = g_i*dY_i, t_i = s*dYg_i@B_i, dX = sum_i dYg_i@W_i + [t_1, t_2, …]@[A_1; A_2; …],
               [dA_1; dA_2; …] = [t_1, t_2, …].T@x, dB_i = s*dYg_i.T@h_i,
               dm_i = sum_t dY_i*(base_i + s*h_i@B_i.T) / max(w_i, eps)

One product gives h of all projections, one dA of all, one launch all compositions, and dX is added up in one tensor. A
single projection is a group of one. The function computes every base product itself, so it owns that memory: nothing
else can overwrite what the backward pass needs, and the backward pass writes over it.

What does not change from call to call is in a plan (:mod:`.group_plan`); :mod:`.group_backward` has the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import linear

from ..internals.torch import current_backward, saving_is_hooked
from . import operators
from .autograd import _as, _rows, note_recompute
from .gated import activate, add_low_rank
from .group_backward import Call, differentiate, gated_backward, mlp_backward, project_backward
from .group_plan import At, Needs, Plan
from .norm_cache import norms_taken, slice_settings, take_gains

_needs_gradient = attrgetter("requires_grad")
_version = attrgetter("_version")


def project(x: torch.Tensor, plan: Plan, dtype: torch.dtype, held: object = None) -> tuple[torch.Tensor, ...]:
    """Return each projection's output [..., d_out] of x [..., d_in], in ``dtype``.

    The projections are checked: their sizes and devices fit x, W has ``dtype``, and A and B are to be rounded to it.
    Nothing must watch (:func:`~doratune.internals.torch.undisturbed`). ``held`` lives until the backward pass has run:
    whoever made it can tell whether a graph of this call still waits.
    """
    if x.dtype is not dtype:
        x = x.to(dtype)
    if not torch.is_grad_enabled():
        return _project(x, plan, plan.at(x, trains=False))[0]
    if _trains(x, plan):
        outputs: tuple[torch.Tensor, ...] = _apply_project(plan, held, x, *plan.trained)
        return outputs
    with torch.no_grad():
        return _project(x, plan, plan.at(x, trains=False))[0]


def project_gated(x: torch.Tensor, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Return act(gate)*up [..., d_out] in ``dtype`` for a plan with an activation; otherwise as :func:`project`."""
    if x.dtype is not dtype:
        x = x.to(dtype)
    if not torch.is_grad_enabled():
        return _gated(x, plan, plan.at(x, trains=False))[0]
    if _trains(x, plan):
        output: torch.Tensor = _apply_gated(plan, None, x, *plan.trained)
        return output
    with torch.no_grad():
        return _gated(x, plan, plan.at(x, trains=False))[0]


def project_mlp(x: torch.Tensor, gated: Plan, down: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Return down(act(gate)*up) [..., d_out] in ``dtype``: :func:`project` of :func:`project_gated`, as one function.

    ``gated`` is a plan with an activation, ``down`` one of a single projection, which may have another r and s.
    """
    if x.dtype is not dtype:
        x = x.to(dtype)
    if not torch.is_grad_enabled():
        between = _gated(x, gated, gated.at(x, trains=False))[0]
        return _project(between, down, down.at(x, trains=False))[0][0]
    if not _trains(x, gated):  # then down alone is differentiated, if any, and needs act(gate)*up
        return project(project_gated(x, gated, dtype), down, dtype)[0]
    output: torch.Tensor = _apply_mlp(gated, down, x, *gated.trained, *down.trained)
    return output


def _trains(x: torch.Tensor, plan: Plan) -> bool:
    return x.requires_grad or True in map(_needs_gradient, plan.trained)


_Factors = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""What the forward pass computes with: A of all projections in one matrix, h of all, and B, w and g of each."""


def _factors(rows: torch.Tensor, plan: Plan, *, trains: bool) -> _Factors:
    dtype = rows.dtype
    packed, up = plan.lora_A[0] if plan.count == 1 else torch.cat(plan.lora_A), plan.lora_B
    rounds = plan.adapter_dtype is not dtype
    if rounds:
        packed, up = packed.to(dtype), [b.to(dtype) for b in up]
    norms: Sequence[torch.Tensor] = ()
    gains = None
    if not trains or current_backward() == -1:
        settings = slice_settings(plan.weights[0], plan.scaling, dtype)
        gains = take_gains(plan.caches, plan.tensors, plan.addresses, settings)
        if gains is None and plan.follow():
            gains = take_gains(plan.caches, plan.tensors, plan.addresses, settings)
    if gains is None:
        down = packed.split(plan.rank) if rounds else plan.lora_A
        norms, gains = _norms_and_gains(plan, down, up, dtype, trains=trains)
    elif trains:
        norms = norms_taken(plan.caches)
    return packed, linear(rows, packed), up, norms, gains


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
    x: torch.Tensor, plan: Plan, at: At, *, needs_dg: bool = False
) -> tuple[tuple[torch.Tensor, ...], _Factors, Sequence[torch.Tensor]]:
    """The outputs, the factors and the base products; these are overwritten unless ``needs_dg``."""
    dtype, lead, kernel, trains = x.dtype, x.shape[:-1], at.compose, at.trains
    # Without gradients products may keep x's leading dimensions: PyTorch's ``linear`` folds them in C++, where from
    # Python a view of each operand costs the host a microsecond.
    rows = x if not trains and kernel is not None and x.is_contiguous() else _rows(x)
    factors = _factors(rows, plan, trains=trains)
    biases = plan.biases and plan.biases_in(dtype)
    _, h, b, _, g = factors
    if plan.count == 1 and not trains and plan.fuses(x, b[0]):
        bias = biases[0] if biases else None
        made = operators.dora_linear_forward(_rows(x), plan.weights[0], _rows(h), b[0], g[0], bias, plan.scaling, False)
        bases = []
    else:
        bases = [*map(linear, repeat(rows), plan.weights)]
        if kernel is not None:
            made = bases
            if needs_dg:
                made = [base.new_empty((*lead, base.shape[1])) for base in bases]
            # The order of both contracts: bases, h, B, g, biases.
            if at.apart:
                for each, base, *own, y in zip(at.apart, bases, h.chunk(plan.count, -1), b, g, made, strict=True):
                    each.launch((base, *own, *biases[:1]), (y,), plan.scaling)
                    biases = biases[1:]
            else:
                kernel.launch((*bases, h, *b, *g, *biases), made, plan.scaling)
            if needs_dg or rows is x:
                return (*made,), factors, bases
        elif plan.count == 1:
            bias = biases[0] if biases else None
            made = [operators.lora_compose(bases[0], h, b[0], g[0], bias, plan.scaling, False)]
        else:
            made = operators.lora_compose_group(bases, h, b, g, biases, plan.scaling)  # type: ignore[arg-type]
    # Without detach() a view could not be changed in place.
    return (*[y.view(*lead, y.shape[1]).detach() for y in made],), factors, bases


def _gated(x: torch.Tensor, plan: Plan, at: At) -> tuple[torch.Tensor, _Factors, Sequence[torch.Tensor]]:
    """act(gate)*up, the factors and both base products, of which gate's is overwritten unless the call trains."""
    lead, kernel, trains = x.shape[:-1], at.compose, at.trains
    rows = x if not trains and kernel is not None and x.is_contiguous() else _rows(x)  # as in _project
    factors = _factors(rows, plan, trains=trains)
    _, h, b, _, g = factors
    bases = [*map(linear, repeat(rows), plan.weights)]
    if at.in_place:
        add_low_rank(plan, bases, h, b)
    if kernel is None:
        return activate(plan, at, bases, h, b, g, None).view(*lead, bases[0].shape[-1]).detach(), factors, bases
    y = bases[0].new_empty((*lead, bases[0].shape[-1])) if trains else bases[0]
    activate(plan, at, bases, h, b, g, y)
    if trains or rows is x:
        return y, factors, bases
    return y.view(*lead, y.shape[1]).detach(), factors, bases


def _call(plan: Plan, at: At, needs: Needs) -> Call:
    """A call of ``plan``, for its backward pass."""
    versions = [*map(_version, needs.parameters)]
    if current_backward() != -1:
        note_recompute(needs.parameters, versions)
    return plan, at, needs, versions


def _to_save(
    plan: Plan, needs: Needs, x: torch.Tensor | None, factors: _Factors, bases: Sequence[torch.Tensor] | None
) -> list[torch.Tensor | None]:
    """The tensors of a plan that the backward pass needs; ``bases`` are None where it needs none.

    They are for dm, and for a gated pair, which computes its outputs again.
    """
    packed, h, b, norms, g = factors
    saved = [x if needs.lora_A else None, h if needs.lora_B or bases else None, *g]
    saved += [*norms, *bases] if bases else [None] * (2 * plan.count)
    if needs.saved:
        weights = [*plan.weights, packed, *b]
        saved += [weights[index] for index in needs.saved]
    return saved


class _Project(torch.autograd.Function):
    """:func:`project` with gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, held: object, x: torch.Tensor, *_: torch.Tensor) -> Any:
        at, needs = plan.at(x, trains=True), plan.needs(plan.adapter_dtype is x.dtype, ctx.needs_input_grad[2:])
        outputs, factors, bases = _project(x, plan, at, needs_dg=needs.magnitude)
        ctx.set_materialize_grads(False)
        ctx.calls, ctx.token = (_call(plan, at, needs),), held
        ctx.save_for_backward(*_to_save(plan, needs, x, factors, bases if needs.magnitude else None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dys[0] is None and all(dy is None for dy in dys):
            return (None,) * (3 + 3 * len(dys))
        return differentiate(ctx, project_backward, dys, "dora_linear")


class _Gated(torch.autograd.Function):
    """:func:`project_gated` with gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, held: object, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        at, needs = plan.at(x, trains=True), plan.needs(plan.adapter_dtype is x.dtype, ctx.needs_input_grad[2:])
        y, factors, bases = _gated(x, plan, at)
        ctx.calls, ctx.token = (_call(plan, at, needs),), held
        ctx.save_for_backward(*_to_save(plan, needs, x, factors, bases))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return differentiate(ctx, gated_backward, (dy,), "an MLP of dora_linear")


class _Mlp(torch.autograd.Function):
    """:func:`project_mlp` with gradients: act(gate)*up is not saved, but computed again.

    Under hooks on what is saved it is saved. They are a checkpoint's: what its recompute saves lives for the backward
    pass of one block, and takes no memory to speak of. To compute it again takes a hundredth of a step.
    """

    @staticmethod
    def forward(ctx: Any, gated: Plan, down: Plan, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[2:]
        needs = gated.needs(gated.adapter_dtype is x.dtype, wanted[:7])
        needs_down = down.needs(down.adapter_dtype is x.dtype, (True, *wanted[7:]))
        at, at_down = gated.at(x, trains=True), down.at(x, trains=True)
        between, factors, bases = _gated(x, gated, at)
        (y,), low, base = _project(between, down, at_down, needs_dg=needs_down.magnitude)
        ctx.calls, ctx.token = (_call(gated, at, needs), _call(down, at_down, needs_down)), None
        first = _to_save(gated, needs, x, factors, bases)
        ctx.first = len(first)
        kept = between if saving_is_hooked() or current_backward() != -1 else None
        ctx.save_for_backward(*first, *_to_save(down, needs_down, kept, low, base if needs_down.magnitude else None))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return differentiate(ctx, mlp_backward, (dy,), "an MLP of dora_linear")


# ``apply`` without its preparations for functorch, which must not run.
_apply_project: Callable[..., Any] = super(torch.autograd.Function, _Project).apply
_apply_gated: Callable[..., Any] = super(torch.autograd.Function, _Gated).apply
_apply_mlp: Callable[..., Any] = super(torch.autograd.Function, _Mlp).apply
