"""Refuse the kinds of differentiation that DoRA's hand-written gradients do not support; switch autocast off."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError
from ..internals.torch import has_tangents, transforms_active


class DifferentiationError(UsageError, RuntimeError):
    """DoRA's hand-written gradients do not support this kind of differentiation."""


def refuse_transforms(function: str, *tensors: torch.Tensor | None) -> None:
    """Raise a DifferentiationError inside ``torch.func`` transforms (grad, vmap, jvp, …) and for forward-mode AD."""
    if torch.compiler.is_compiling():
        return
    if transforms_active():
        raise DifferentiationError(
            f"{function} does not work under torch.func transforms (grad, vmap, jvp, functional_call inside them): "
            "use loss.backward() or torch.autograd.grad, or write the layer in plain PyTorch there"
        )
    if has_tangents(tensors):
        raise DifferentiationError(
            f"{function} has no forward-mode derivative: use loss.backward() or torch.autograd.grad"
        )


class _OnceOnly(torch.autograd.Function):
    """The identity on gradients; its own backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, function: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.function = function
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor | None) -> tuple[None, ...]:
        raise DifferentiationError(
            f"the gradient of {ctx.function} cannot be differentiated again (double backward, e.g. a gradient penalty "
            "or a Hessian): call backward without create_graph=True, or write the layer in plain PyTorch for this"
        )


def once_only(
    function: str, grads: tuple[torch.Tensor | None, ...], sources: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Return ``grads`` such that differentiating them with respect to ``sources`` raises a DifferentiationError.

    It changes nothing unless the backward pass runs with ``create_graph=True``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grads
    given = [grad for grad in grads if grad is not None]
    followed = [source for source in sources if source is not None and source.requires_grad]
    if not given or not followed:
        return grads
    marked = iter(_OnceOnly.apply(function, len(given), *given, *followed))  # type: ignore[no-untyped-call]
    return tuple(None if grad is None else next(marked) for grad in grads)
