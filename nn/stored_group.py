"""DoRA over the base products of quantised projections that read one x, as one differentiable function.

    forward    h = x@[A_1; A_2; …].T, y_i = g_i*(base_i - b_i + s*h_i@B_i.T) + b_i
    backward   dYg_i = g_i*dY_i, t_i = s*dYg_i@B_i, dX = [t_1, t_2, …]@[A_1; A_2; …] (+ sum_i dYg_i@W_i),
               [dA_1; dA_2; …] = [t_1, t_2, …].T@x, dB_i = s*dYg_i.T@h_i,
               dm_i = sum_t dY_i*(base_i - b_i + s*h_i@B_i.T) / max(w_i, eps)

base_i = x@W_i.T + b_i is what the package of the quantised layer computes. Where the package also tells W
(:class:`~.stored_plan.Source`), the base products are the function's own: they have no graph, dX has all terms in one
tensor, and W is decoded again in the backward pass, so that it does not live from one to the other. Otherwise each
base product is an argument, whose gradient is dYg_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import linear

from ..internals.torch import current_backward, keeps_graph
from ..runtime.kernel import Kernel
from . import operators
from .autocast import autocast_is_on, without_autocast
from .autograd import _as, _check_unwritten, _product, note_recompute
from .differentiation import once_only
from .group_gradients import differentiate_group, differentiate_one, low_gradients, scaled
from .norm import NormAndGain, safe_norm
from .norm_cache import norms_taken, slice_settings, take_gains
from .stored_norm import How
from .stored_plan import At, StoredPlan

_needs_gradient = attrgetter("requires_grad")
_version = attrgetter("_version")


def compose_stored(
    x: torch.Tensor, plan: StoredPlan, bases: Sequence[torch.Tensor] = (), held: object = None
) -> Sequence[torch.Tensor]:
    """Return each projection's output [..., d_out] of x [..., d_in], in the dtype of x.

    The projections are checked: their sizes and devices fit x, their products have its dtype, and A and B are to be
    rounded to it. x has rows. Nothing must watch (:func:`~doratune.internals.torch.undisturbed`).

    Args:
        bases: the base products [..., d_out], biases included, contiguous, in memory that nobody else reads. None for a
            plan with sources.
        held: lives until the backward pass has run.
    """
    if not torch.is_grad_enabled():
        return _Forward(x, plan, bases, trains=False).outputs
    if True in map(_needs_gradient, (x, *plan.trained, *bases)):
        outputs: tuple[torch.Tensor, ...] = _apply(plan, held, x, *plan.trained, *bases)
        return outputs
    with torch.no_grad():
        return _Forward(x, plan, bases, trains=False).outputs


class _Forward:
    """A forward pass: the outputs, and what a backward pass needs of it. Without ``keeps`` y overwrites base."""

    __slots__ = ("at", "bases", "g", "h", "lora_A", "lora_B", "norm", "outputs")

    def __init__(
        self, x: torch.Tensor, plan: StoredPlan, bases: Sequence[torch.Tensor], *, trains: bool, keeps: bool = False
    ) -> None:
        rows, lead = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), x.shape[:-1]
        dtype = rows.dtype
        self.at = at = plan.at(rows.shape[0], dtype, trains=trains)
        down, up = plan.lora_A, plan.lora_B
        if not at.exact:
            down, up = [a.to(dtype) for a in down], [b.to(dtype) for b in up]
        self.lora_A, self.lora_B = down[0] if plan.count == 1 else torch.cat(down), up
        how = plan.hows(dtype)[autocast_is_on(plan.device)] if at.how is None else at.how
        self.norm, self.g = _norms_and_gains(plan, how, trains=trains)
        self.h = linear(rows, self.lora_A)
        if at.fused is not None and not bases:
            self.outputs = self._from_stored(rows, plan, at.fused, lead)
            return
        biases = plan.biases and [_as(bias, dtype) for bias in plan.biases]
        if at.multiplies:
            self.bases = [linear(rows, at.matrix(plan, index, dtype)) for index in range(plan.count)]
        else:
            if bases:
                self.bases = [base.view(-1, base.shape[-1]) for base in bases]
            else:
                self.bases = [product(rows) for product in plan.products]
            for base, bias in zip(self.bases, biases, strict=False):  # there may be none
                base.sub_(bias)  # a pass of its own: as (1-g)*b it would cancel where g is large
        if at.compose is None:
            made = self._by_reference(plan, biases)
        else:
            made = self.bases
            if keeps:
                made = [torch.empty((*lead, width), dtype=dtype, device=rows.device) for width in plan.widths]
            at.compose.launch((*self.bases, self.h, *up, *self.g, *biases), made, plan.scaling)
        # A view of what is saved, or of an input, could not be changed in place: hence detach().
        self.outputs = made if keeps and at.compose is not None else [y.view(*lead, y.shape[1]).detach() for y in made]

    def _from_stored(
        self, rows: torch.Tensor, plan: StoredPlan, kernels: Sequence[Kernel], lead: torch.Size
    ) -> list[torch.Tensor]:
        """The outputs of few tokens from the stored W: no base product is in memory."""
        dtype = rows.dtype
        # Each its own rows: a launch on slices of wider rows costs the host more than this copy.
        hs = self.h.view(-1, plan.count, plan.rank).transpose(0, 1).contiguous().unbind()
        made = []
        for index, kernel in enumerate(kernels):
            y = torch.empty((*lead, plan.widths[index]), dtype=dtype, device=rows.device)
            bias = [_as(each, dtype) for each in plan.biases[index : index + 1]]
            inputs = (rows, *plan.stored[index], hs[index], self.lora_B[index], self.g[index], *bias)
            kernel.launch(inputs, (y.view(-1, y.shape[-1]),), plan.scaling)
            made.append(y)
        return made

    def _by_reference(self, plan: StoredPlan, biases: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if plan.count == 1:
            bias = biases[0] if biases else None
            only = (self.bases[0], self.h, self.lora_B[0], self.g[0])
            return [operators.lora_compose(*only, bias, plan.scaling, False)]
        made: list[torch.Tensor] = operators.lora_compose_group(
            self.bases, self.h, self.lora_B, self.g, [*biases], plan.scaling
        )
        return made


def _norms_and_gains(plan: StoredPlan, how: How, *, trains: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """w (if ``trains``) and g of each projection: of the open norm pass, in a recompute of its forward pass's."""
    recomputing = trains and current_backward() != -1
    if not recomputing:
        settings = slice_settings(plan.tensors[0], plan.scaling, how)
        gains = take_gains(plan.caches, plan.tensors, plan.addresses, settings)
        if gains is not None:
            return norms_taken(plan.caches) if trains else [], gains
    norms, gains = [], []
    for one in plan.projections:
        layer, taken = one.layer, None
        if recomputing:
            shapes = (layer.weight.shape, layer.lora_A.shape)
            taken = layer.norms.take_stored(one.tensors, shapes, layer.scaling, how, trains=True)
        norm = one.ask() if taken is None else NormAndGain(*taken)
        if not isinstance(norm, NormAndGain):
            norm = NormAndGain(norm, layer.magnitude.detach() / safe_norm(norm.float()))
        norms.append(norm.norm.float())
        gains.append(norm.g.float())
    return norms, gains


class _Compose(torch.autograd.Function):
    """:func:`compose_stored` with gradients, for x, A, B and m of each projection, and the base products if given."""

    @staticmethod
    def forward(ctx: Any, plan: StoredPlan, held: object, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        needs, end = ctx.needs_input_grad, 3 + 3 * plan.count
        need_x, need_m = needs[2], True in needs[5:end:3]
        ctx.need_x, ctx.need_a, ctx.need_b, ctx.need_m = need_x, True in needs[3:end:3], True in needs[4:end:3], need_m
        bases = [base.detach() for base in tensors[3 * plan.count :]]  # saving them must not keep their graph
        made = _Forward(x, plan, bases, trains=True, keeps=need_m)
        if plan.count > 1:
            ctx.set_materialize_grads(False)
        at = made.at
        ctx.plan, ctx.at, ctx.token, ctx.kept = plan, at, held, at.kept[need_x]
        kept = ctx.kept
        ctx.versions = versions = [*map(_version, kept)]
        if current_backward() != -1:
            note_recompute(kept, versions)
        ctx.save_for_backward(
            x if ctx.need_a else None,
            made.h,
            made.lora_A if need_x and not at.exact else None,
            *made.g,
            *([*made.norm, *made.bases] if need_m else ()),
            *(() if at.exact else made.lora_B),
        )
        return tuple(made.outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        device = ctx.plan.device
        if torch.is_grad_enabled():
            with torch.no_grad(), without_autocast(device):
                grads = _backward(ctx, dys, release=False)
            saved = [tensor for tensor in ctx.saved_tensors if tensor is not None]
            return once_only("dora_compose", grads, (*dys, *saved, *ctx.kept))
        if torch.is_autocast_enabled(device.type):
            with without_autocast(device):
                return _backward(ctx, dys, release=not keeps_graph())
        return _backward(ctx, dys, release=not keeps_graph())


_apply: Callable[..., Any] = super(torch.autograd.Function, _Compose).apply
"""``_Compose.apply`` without its preparations for functorch, which must not run."""


def _backward(ctx: Any, dys: Sequence[torch.Tensor | None], *, release: bool) -> tuple[torch.Tensor | None, ...]:
    plan: StoredPlan = ctx.plan
    count = plan.count
    x, h, a, *rest = ctx.saved_tensors  # runs a checkpoint's recompute, whose versions count
    if [*map(_version, ctx.kept)] != ctx.versions:
        _check_unwritten(ctx.kept, ctx.versions)
    if release:
        ctx.maybe_clear_saved_tensors()
        ctx.token = None
    given = (0,) if count == 1 else [index for index in range(count) if dys[index] is not None]
    grads: list[torch.Tensor | None] = [None] * (3 + 3 * count)
    if not given:
        return (*grads, *([None] * (0 if plan.sources else count)))
    saved = _Saved(ctx, h, rest)
    del rest
    rows: list[Any] = [dy if dy is None or dy.ndim == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    dbases: list[Any] = [None] * count
    if not ctx.need_m:
        for index in given:
            dbases[index] = _as(rows[index] * saved.g[index], h.dtype)
    elif 1 < count == len(given):
        dbases, grads[5::3] = differentiate_group(
            plan, ctx.at, rows, saved.bases, h, saved.lora_B, saved.g, saved.norm, release=release
        )
    else:
        for index in given:
            dbases[index], *grads[4 + 3 * index : 6 + 3 * index] = differentiate_one(
                plan,
                ctx.at,
                rows[index],
                saved.bases[index],
                saved.h[index],
                saved.lora_B[index],
                saved.g[index],
                saved.norm[index],
            )
    saved.bases = []  # what is not dYg now is freed
    if ctx.need_b and (count > 1 or not ctx.need_m):
        for index in given:
            db = scaled(dbases[index].T, saved.h[index], plan.scaling, plan.adapter_dtype)
            grads[4 + 3 * index] = db
    if ctx.need_x or ctx.need_a:
        t = low_gradients(plan, dbases, saved.lora_B)
        if ctx.need_a:
            wide, flat = plan.adapter_dtype is not t.dtype, x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
            da = _product(t.T, flat, 1.0, plan.adapter_dtype) if wide else torch.mm(t.T, flat)
            parts = (da,) if count == 1 else da.chunk(count)
            for index in given:
                grads[3 + 3 * index] = parts[index]
        if ctx.need_x:
            if a is None:
                a = plan.lora_A[0] if count == 1 else torch.cat(plan.lora_A)
            dx = _input_gradient(plan, ctx.at, dbases, t, a)
            grads[2] = dx.view(*dys[given[0]].shape[:-1], dx.shape[1])  # type: ignore[union-attr]
    if not plan.sources:
        grads += [None if dy is None else dbase.view(dy.shape) for dbase, dy in zip(dbases, dys, strict=True)]
    return tuple(grads)


class _Saved:
    """The forward pass's values for the backward pass, of each projection."""

    __slots__ = ("bases", "g", "h", "lora_B", "norm")

    def __init__(self, ctx: Any, h: torch.Tensor, rest: Sequence[torch.Tensor]) -> None:
        plan: StoredPlan = ctx.plan
        count = plan.count
        self.h = (h,) if count == 1 else h.chunk(count, 1)
        self.g = rest[:count]
        self.norm, self.bases = (rest[count : 2 * count], rest[2 * count : 3 * count]) if ctx.need_m else ([], [])
        self.lora_B = plan.lora_B if ctx.at.exact else rest[-count:]


def _input_gradient(plan: StoredPlan, at: At, dbases: list[Any], t: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """dX [T, d_in]; with sources it empties ``dbases``."""
    if not plan.sources:
        return torch.mm(t, lora_A)
    dx: Any = None
    for index in range(plan.count):
        dbase, dbases[index] = dbases[index], None  # frees memory for the products that follow
        if dbase is not None:
            weight = at.matrix(plan, index, t.dtype)
            dx = torch.mm(dbase, weight) if dx is None else dx.addmm_(dbase, weight)
            del weight
    made: torch.Tensor = dx.addmm_(t, lora_A)
    return made
