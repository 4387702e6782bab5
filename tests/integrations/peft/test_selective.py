"""Under selective activation checkpointing with any policy an accelerated model has stock PEFT's gradients.

The checkpoint returns saved results in the order in which operations ran. So the recompute must run the operations of
the forward pass, and no code may overwrite a saved result.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import doratune
from doratune.internals import torch as internals

from ...nn.layers import kernels_on_paper
from .peft_models import assert_same_gradients, relative, twin, with_dora

__all__ = ["kernels_on_paper"]

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
WIDTH = 24
"""Size of the layers, rank and number of tokens: all equal, so that a wrongly returned result still fits."""


class Block(nn.Module):
    """Attention over one head between linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).tanh()
        attended = nn.functional.scaled_dot_product_attention(y[None, None], y[None, None], y[None, None])[0, 0]
        return self.second(attended)


class EverySecondMatmul:
    def __init__(self) -> None:
        self.calls = {False: 0, True: 0}

    def __call__(self, ctx: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if func not in MATMULS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.calls[ctx.is_recompute] += 1
        even = self.calls[ctx.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if even else CheckpointPolicy.PREFER_RECOMPUTE


def attention(_: Any, func: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    saved = "attention" in str(func)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[str, Callable[[], Any]] = {
    "matmuls": lambda: list(MATMULS),
    "every second matmul": EverySecondMatmul,
    "attention": lambda: attention,
    "everything": lambda: lambda *_, **__: CheckpointPolicy.MUST_SAVE,
    "nothing": list,
}


pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


def inputs() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()


def step(model: nn.Module, x: torch.Tensor, policy: Callable[[], Any] | None) -> torch.Tensor:
    torch.manual_seed(1)  # the same dropout for all
    if policy is None:
        y = model(x)
    else:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy())
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("norm_reuse", "launched"), [("auto", True), ("auto", False), ("tracked", True), ("off", False)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_stock_pefts_under_every_policy(
    policy: str, dropout: float, norm_reuse: str, launched: bool, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    stock = with_dora(Block(), r=WIDTH, target_modules=["first", "second"], lora_dropout=dropout)
    fast = twin(stock)
    doratune.accelerate(fast, norm_reuse=norm_reuse, quiet=True)
    wanted = step(stock, inputs(), None)
    if launched:
        request.getfixturevalue("kernels_on_paper")
    if policy == "everything" and dropout:  # dropout writes over its own saved mask, in stock PEFT as well
        for model in (twin(stock), fast):
            with pytest.raises(RuntimeError, match="has been mutated"):
                step(model, inputs(), POLICIES[policy])
        return
    if policy == "everything" and not internals.hides_modes:  # then operations inside are saved too: refused by PyTorch
        with pytest.raises(RuntimeError, match="has been mutated"):
            step(fast, inputs(), POLICIES[policy])
        return
    for _ in range(2):  # what one step keeps must not be the next one's
        fast.zero_grad()
        assert relative(step(fast, inputs(), POLICIES[policy]), wanted) <= 1e-5
        assert_same_gradients(fast, stock, 1e-5)


@pytest.mark.parametrize("norm_reuse", ["auto", "off"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", ["matmuls", "every second matmul"])
def test_four_bits_too(policy: str, dropout: float, norm_reuse: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32))
    config = peft.LoraConfig(use_dora=True, r=64, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout)
    fast = peft.get_peft_model(model.to("cpu"), config)
    doratune.accelerate(fast, norm_reuse=norm_reuse, quiet=True)
    results = []
    for chosen in (None, POLICIES[policy]):
        fast.zero_grad()
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        gradient = step(fast, x, chosen)
        results.append([gradient, *[p.grad.clone() for p in fast.parameters() if p.grad is not None]])
    assert len(results[0]) == 4
    for got, wanted in zip(results[1], results[0], strict=True):
        assert relative(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["_hide", "_dispatch_modes", "_function_modes", "_global_hooks"])
def test_gradients_are_right_if_pytorch_cannot_report_its_modes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, name, None)
    torch.manual_seed(0)
    stock = with_dora(Block(), r=WIDTH, target_modules=["first", "second"])
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    wanted = step(stock, inputs(), None)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="doratune leaves .* to PEFT in calls like this one: a global module hook"
        )
        for policy in (None, POLICIES["matmuls"], POLICIES["every second matmul"]):
            fast.zero_grad()
            assert relative(step(fast, inputs(), policy), wanted) <= 1e-5
            assert_same_gradients(fast, stock, 1e-5)
