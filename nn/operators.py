"""The operations as ``torch.library`` operators ``doratune::…``: ``torch.compile`` keeps them whole in its graph.

They are not differentiable themselves: the autograd function of :mod:`.gradients` calls them, forward and backward,
and its other products stay visible to the compiler. An operator returns a fixed number of tensors; one that was not
asked for is empty. They are defined in a ``Library``, without what a ``custom_op`` does around each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import operations

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("doratune", "DEF")


def _operator(function: F) -> F:
    """Make ``doratune::<name of the function>`` of it: fresh tensors out, nothing written to."""
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return function


def _fake(name: str) -> Callable[[F], F]:
    """What operator ``name`` returns, without the values."""
    register: Callable[[F], F] = torch.library.register_fake(f"doratune::{name}", lib=_LIBRARY)
    return register


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _absent(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(0)


@_operator
def weight_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, weight_sq: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """w, and nW unless it was given."""
    norm, squares = operations.weight_norm(weight, lora_A, lora_B, weight_sq, scaling)
    return norm, squares if weight_sq is None else _absent(norm)


@_fake("weight_norm")
def _(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, weight_sq: torch.Tensor | None, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    norm = weight.new_empty(weight.shape[0], dtype=_wide(weight))
    return norm, torch.empty_like(norm) if weight_sq is None else _absent(norm)


@_operator
def weight_norm_and_gain(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    magnitude: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w and g."""
    return operations.weight_norm_and_gain(weight, lora_A, lora_B, weight_sq, magnitude, scaling)


@_fake("weight_norm_and_gain")
def _(weight: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    norm = weight.new_empty(weight.shape[0], dtype=_wide(weight))
    return norm, torch.empty_like(norm)


@_operator
def lora_compose(
    base: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    delta: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and inner if ``save``."""
    y, inner = operations.lora_compose(base, h, lora_B, g, scaling, bias=bias, delta=delta, save=save)
    return y, _absent(y) if inner is None else inner


@_fake("lora_compose")
def _(base: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, save = others
    y = base.new_empty(base.shape)
    return y, torch.empty_like(y) if save else _absent(y)


@_operator
def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and inner if ``save``."""
    y, inner = operations.dora_linear(x, weight, h, lora_B, g, scaling, bias=bias, save=save)
    return y, _absent(y) if inner is None else inner


@_fake("dora_linear")
def _(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, save = others
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if save else _absent(y)


@_operator
def compose_backward(
    dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dYg, dg, and db if ``bias``."""
    dyg, dg, dbias = operations.compose_backward(dy, inner, g, bias=bias)
    return dyg, dg, _absent(dg) if dbias is None else dbias


@_fake("compose_backward")
def _(
    dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dg = torch.empty_like(g)
    return dy.new_empty(dy.shape), dg, torch.empty_like(g) if bias else _absent(g)


@_operator
def adapter_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    dg_base: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
    adapter: torch.dtype,
    magnitude: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dB and dm."""
    return operations.adapter_backward(dy, h, lora_B, g, dg_base, norm, scaling, adapter, magnitude)


@_fake("adapter_backward")
def _(dy: torch.Tensor, h: torch.Tensor, lora_B: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, adapter, magnitude = others
    return lora_B.new_empty(lora_B.shape, dtype=adapter), lora_B.new_empty(lora_B.shape[0], dtype=magnitude)


@_operator
def sum_of_products(left: torch.Tensor, right: torch.Tensor, low: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """``left@right + low@down``."""
    return operations.sum_of_products(left, right, low, down)


@_fake("sum_of_products")
def _(left: torch.Tensor, right: torch.Tensor, *_: object) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1])
