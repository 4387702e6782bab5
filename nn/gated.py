"""act(gate)*up and its gradients from both base products, for the functions of :mod:`.group`.

Where :attr:`At.in_place <.group_plan.At>` holds, s*h@B.T is added to each base product in memory, in the forward pass,
and both passes read the sums. Elsewhere the kernels of both passes compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import operators
from .autograd import _rows
from .group_gradients import overwritten
from .group_plan import At, Plan

Tensors = Sequence[torch.Tensor]


def add_low_rank(plan: Plan, bases: Tensors, h: torch.Tensor, lora_B: Tensors) -> None:
    """base += s*h@B.T for the base product [..., d_out] of each projection; h [..., n*r] is that of all."""
    for base, part, b in zip(bases, h.chunk(plan.count, -1), lora_B, strict=True):
        operators.add_low_rank_(base, part, b, plan.scaling)


def activate(
    plan: Plan, at: At, bases: Tensors, h: torch.Tensor, lora_B: Tensors, g: Tensors, out: torch.Tensor | None
) -> torch.Tensor:
    """act(gate)*up [T, d_out] in ``out``, or in new memory, from both base products [T, d_out]."""
    kernel = at.compose
    factors, scaling = _factors(plan, at, bases, h, lora_B, g)
    biases = plan.biases and plan.biases_in(bases[0].dtype)
    if kernel is None:
        compose: Any = operators.swiglu_forward if at.in_place else operators.compose_swiglu
        made: torch.Tensor = compose(*factors, *(biases or (None, None)), *scaling, plan.activation)
        return made
    if out is None:
        out = torch.empty_like(bases[0])
    kernel.launch((*factors, *biases), (out,), *scaling)
    return out


def differentiate_activation(
    plan: Plan,
    at: At,
    dy: torch.Tensor,
    bases: Tensors,
    h: torch.Tensor,
    lora_B: Tensors,
    g: Tensors,
    norms: Tensors,
    *,
    release: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dYg [T, d_out] and dm of gate and up from the gradient [..., d_out] of act(gate)*up.

    dYg may overwrite the base products if ``release``.
    """
    kernel = at.differentiate
    factors, scaling = _factors(plan, at, bases, h, lora_B, g)
    biases = plan.biases and plan.biases_in(bases[0].dtype)
    if kernel is None:
        compose: Any
        if at.in_place:
            compose = operators.swiglu_backward_ if release else operators.swiglu_backward
        else:
            compose = operators.compose_swiglu_backward_ if release else operators.compose_swiglu_backward
        given = (_rows(dy), *factors, *norms, *(biases or (None, None)), *scaling)
        made = compose(*given, plan.activation, plan.magnitude_dtype)
        return made[:2], made[2:4]
    dbases = overwritten(bases, release=release)
    dm = [torch.empty_like(one, dtype=plan.magnitude_dtype) for one in norms]
    unread = [torch.empty_like(one) for one in norms] if biases else []  # the kernel's gradients of the biases
    kernel.launch((dy, *factors, *biases, *norms), (*dbases, *dm, *unread), *scaling)
    return dbases, dm


def _factors(
    plan: Plan, at: At, bases: Tensors, h: torch.Tensor, lora_B: Tensors, g: Tensors
) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
    """What the operation composes from, in its order, and s if it takes it."""
    return ((*bases, *g), ()) if at.in_place else ((*bases, h, *lora_B, *g), (plan.scaling,))
