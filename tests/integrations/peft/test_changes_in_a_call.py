"""Weights that change inside a call, outputs that outlive it, activations of their own kind: as with stock PEFT."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import doratune

from .peft_models import relative, twin, with_dora
from .test_projections import Attention, Mlp, Net, assert_step, attention_of, calls, pair, x_of

__all__ = ["calls"]


def both(model: nn.Module, action: Any) -> None:
    action(model)


@pytest.mark.parametrize("how", ["replaced", "data", "in place"])
def test_weights_that_a_hook_brings_in_are_used(how: str) -> None:
    """Layer streaming: a hook on a module in the middle of the model loads the weights of what follows."""
    stock, fast = pair()
    for seed in range(2):
        assert_step(stock, fast, seed)

    def load(module: nn.Module, *_: Any) -> None:
        for name, part in module.named_modules():
            for key, value in list(part._parameters.items()):
                if value is None or "lora" in name:
                    continue
                if how == "replaced":
                    part._parameters[key] = nn.Parameter(value.detach() * 1.5, requires_grad=False)
                elif how == "data":
                    value.data = value.data * 1.5
                else:
                    value.data.mul_(1.5)

    for model in (stock, fast):
        attention_of(model).register_forward_pre_hook(load)
    with torch.no_grad():
        for seed in range(3):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-10


def test_a_call_that_is_killed_leaves_no_pass_open() -> None:
    stock, fast = pair()

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = attention_of(fast).k.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        fast(x_of())
    handle.remove()
    for model in (stock, fast):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    for seed in range(3):
        assert_step(stock, fast, seed)


def test_heads_that_read_one_x_may_be_differentiated_one_by_one() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(24, 16), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x), self.k(x)

    torch.manual_seed(0)
    stock = with_dora(Heads(), target_modules=["q", "k"]).double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    for model in (fast, stock):
        for _ in range(3):
            model.zero_grad()
            for y in model(x_of()):
                y.square().sum().backward()
    for own, other in zip(fast.parameters(), stock.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or relative(own.grad, other.grad) <= 1e-10


def test_writes_under_inference_mode_between_two_layers_take_effect() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            for layer in (self.q, self.k, self.v):
                x += torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    stock = with_dora(Chain(), target_modules=["q", "k", "v"]).double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    with torch.inference_mode():
        for seed in range(3):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-12


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * function(self, x)  # type: ignore[no-any-return]

    return wrapper


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls", [Mlp, PeftLinear])
def test_a_forward_that_is_replaced_at_the_class_runs(when: str, cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "before":
        monkeypatch.setattr(cls, "forward", wrapped(cls.forward))
    stock, fast = pair()
    if when == "after":
        assert_step(stock, fast)
        monkeypatch.setattr(cls, "forward", wrapped(cls.forward))
    for seed in range(3):
        assert_step(stock, fast, seed)


class Beta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.beta * x)


class InTraining(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * (0.5 if self.training else 1.0)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy


class Straight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Straight.apply(x)  # type: ignore[no-any-return]


def change(mlp: Any) -> None:
    act = mlp.function
    if isinstance(act, Beta):
        act.beta = 1.7
    elif isinstance(act, nn.GELU):
        mlp.function = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("make", [Beta, InTraining, Straight, nn.GELU])
def test_activations_with_a_state_or_gradients_of_their_own_keep_them(make: Any) -> None:
    stock, fast = pair(Mlp(make()))
    assert_step(stock, fast)
    for model in (stock, fast):
        change(model.base_model.model.mlp)  # type: ignore[union-attr]
    assert_step(stock, fast)
    for model in (stock, fast):
        model.eval()
    assert_step(stock, fast)


def test_what_nobody_asks_for_does_not_outlive_the_call() -> None:
    _, fast = pair()
    for seed in range(2):
        fast(x_of(seed).requires_grad_()).sum().backward()
    seen: list[weakref.ref[torch.Tensor]] = []

    def skip(module: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(x))
        raise ValueError

    attention_of(fast).between = skip
    with pytest.raises(ValueError):
        fast(x_of().requires_grad_())
    gc.collect()
    assert seen[-1]() is None


def test_threads_that_call_one_model_get_their_own_outputs() -> None:
    stock, fast = pair()
    for seed in range(2):
        assert_step(stock, fast, seed)
    x = x_of()
    with torch.no_grad():
        wanted = stock(x)
    wrong: list[object] = []

    def run() -> None:
        try:
            for _ in range(20):
                y = fast(x.clone().requires_grad_())
                y.sum().backward()
                if relative(y, wanted) > 1e-12:
                    wrong.append(y)
        except Exception as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_transforms_of_a_whole_accelerated_model_run_pefts_code() -> None:
    stock, fast = pair()
    x = x_of()
    results = []
    for model in (stock, fast):
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(values: Any, model: nn.Module = model) -> torch.Tensor:
            return torch.func.functional_call(model, values, (x,)).square().sum()  # type: ignore[no-any-return]

        results.append(torch.func.grad(loss)(trained))
    for name, value in results[0].items():
        assert relative(results[1][name], value) <= 1e-10, name


def test_classes_with_ways_of_their_own_stay_as_they_are() -> None:
    class Registered(Mlp):
        made = 0

        def __init_subclass__(cls, **settings: Any) -> None:
            Registered.made += 1

    stock, fast = pair(Registered(nn.SiLU()))
    assert Registered.made == 0
    assert type(fast.base_model.model.mlp) is Registered  # type: ignore[union-attr]
    for seed in range(3):
        assert_step(stock, fast, seed)
    assert isinstance(copy.deepcopy(fast).base_model.model, Net)  # type: ignore[union-attr]
    assert isinstance(attention_of(fast), Attention)
