"""``accelerate`` changes only the speed of a PEFT model; values and gradients stay as accurate as PEFT's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import doratune

from .peft_models import (
    VOCABULARY,
    Pair,
    assert_same_gradients,
    error_ratios,
    gpt2,
    gradients,
    inputs,
    llama,
    relative,
    shake,
    tokens,
    twin,
    variants,
    with_dora,
)

pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


@pytest.mark.parametrize("make", [llama, gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("rank", "count"), [(1, 9), (768, 9), (8, 1)])
def test_any_rank_and_a_single_token_are_right(make: Callable[[], nn.Module], rank: int, count: int) -> None:
    stock = with_dora(make(), r=rank)
    exact, fast = twin(stock).double(), twin(stock)
    assert len(doratune.accelerate(fast, quiet=True).accelerated) == len(variants(fast)) > 0
    ids = torch.randint(0, VOCABULARY, (32 // count, count))
    logits = {}
    for name, model in (("exact", exact), ("stock", stock), ("fast", fast)):
        output = model(ids).logits
        logits[name] = output.detach()
        torch.nn.functional.cross_entropy(output.flatten(0, 1), ids.roll(1).flatten()).backward()
    cosine = torch.nn.functional.cosine_similarity(logits["fast"], logits["stock"], dim=-1)
    assert cosine.min() >= 0.99999
    assert relative(logits["fast"], logits["exact"]) <= 2e-6
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        found, wanted = (
            torch.cat([gradient.double().flatten() for name, gradient in gradients(model).items() if kind in name])
            for model in (fast, exact)
        )
        assert relative(found, wanted) <= 5e-5, kind  # stock PEFT: up to 7e-6; one rank averages over little


@pytest.mark.parametrize("make", [llama, gpt2], ids=["linear", "conv1d"])
def test_fp32_gradients_are_as_good_as_pefts(make: Callable[[], nn.Module]) -> None:
    ratios: dict[str, float] = defaultdict(float)
    for seed in range(6):
        torch.manual_seed(seed)
        stock = with_dora(make(), seed=seed)
        exact, fast = twin(stock).double(), twin(stock)
        doratune.accelerate(fast, quiet=True)
        ids = tokens()
        for model in (exact, stock, fast):
            model(ids, labels=ids).loss.backward()
        for kind, ratio in error_ratios(fast, stock, exact).items():
            ratios[kind] += math.log(ratio) / 6
    assert len(ratios) == 3
    for kind, log in ratios.items():
        assert math.exp(log) <= 1.1, kind


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["linear", "conv1d"])
def test_sixteen_bit_models_are_as_good_as_pefts(
    make: Callable[[], nn.Module], adapters: torch.dtype, autocast: bool
) -> None:
    ratios: dict[str, float] = defaultdict(float)
    for seed in range(3):
        torch.manual_seed(seed)
        stock = with_dora(make().to(torch.bfloat16), seed=seed, autocast_adapter_dtype=adapters is torch.float32)
        exact, fast = twin(stock).double(), twin(stock)
        doratune.accelerate(fast, quiet=True)
        ids = torch.randint(0, VOCABULARY, (4, 16))
        reference = exact(ids, labels=ids)
        reference.loss.backward()
        errors = []
        for model in (fast, stock):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(ids, labels=ids)
                output.loss.backward()
            errors.append(relative(output.logits, reference.logits))
            dtypes = {g.dtype for name, g in gradients(model).items() if "lora_A" in name}
            assert dtypes == {adapters}
        assert errors[0] <= 1.1 * errors[1]
        for kind, ratio in error_ratios(fast, stock, exact).items():
            ratios[kind] += math.log(ratio) / 3
    assert len(ratios) == 3
    for kind, log in ratios.items():
        assert math.exp(log) <= 1.1, kind


def test_dropout_is_pefts_to_the_bit_of_the_mask() -> None:
    stock = with_dora(Pair(), lora_dropout=0.4)
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x = inputs()
    for train in (True, False):
        results = []
        for model in (stock, fast):
            model.train(train)
            torch.manual_seed(3)
            source = x.clone().requires_grad_()
            y = model(source)
            model.zero_grad()
            y.square().sum().backward()
            results.append((y.detach(), source.grad))
        assert relative(results[1][0], results[0][0]) < 1e-6
        assert relative(results[1][1], results[0][1]) < 1e-6
        assert_same_gradients(fast, stock, 1e-5)
    stock.train()
    assert relative(stock(x), results[0][0]) > 1e-2, "the dropout of this test drops nothing"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("second", ["dora", "lora"])
def test_several_active_adapters_follow_each_other_as_in_peft(second: str, dropout: float) -> None:
    stock = with_dora(Pair(), lora_dropout=dropout)
    settings = {"target_modules": ["first", "second"], "init_lora_weights": False, "lora_dropout": dropout}
    stock.add_adapter("other", peft.LoraConfig(use_dora=second == "dora", r=3, **settings))
    shake(stock, 1)
    for order in (["default", "other"], ["other", "default"]):
        stock.base_model.set_adapter(order)
        fast = twin(stock)
        doratune.accelerate(fast, quiet=True)
        x = inputs()
        results = []
        for model in (stock, fast):
            torch.manual_seed(3)
            source = x.clone().requires_grad_()
            y = model(source)
            model.zero_grad()
            y.square().sum().backward()
            results.append((y.detach(), source.grad))
        assert relative(results[1][0], results[0][0]) < 1e-6
        assert relative(results[1][1], results[0][1]) < 1e-6
        assert_same_gradients(fast, stock, 1e-5)


def test_trained_base_weights_and_biases_get_their_gradients() -> None:
    for dropout in (0.0, 0.4):
        stock = with_dora(Pair(), lora_dropout=dropout)
        for name, parameter in stock.named_parameters():
            if name.endswith(("first.base_layer.weight", "first.base_layer.bias")):
                parameter.requires_grad_(True)
        fast = twin(stock)
        doratune.accelerate(fast, quiet=True)
        x = inputs()
        for model in (stock, fast):
            torch.manual_seed(3)
            model(x).square().sum().backward()
        assert {n.rsplit(".", 1)[1] for n in gradients(fast) if "base_layer" in n} == {"weight", "bias"}
        assert_same_gradients(fast, stock, 1e-5)


def test_zero_rows_and_zero_magnitudes_are_finite_and_right() -> None:
    model = with_dora(Pair())
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.base_layer.weight[3] = 0.0
        layer.lora_B["default"].weight[3] = 0.0
        layer.base_layer.weight[4] = 0.0
        layer.lora_magnitude_vector["default"].weight[5] = 0.0
    x = inputs(1)
    assert not torch.isfinite(model(x)).all(), "PEFT learned to divide by a zero norm: say so in the README"
    doratune.accelerate(model, quiet=True)
    hidden = layer(x)[0]
    assert torch.isfinite(hidden).all()
    for row in (3, 5):
        assert hidden[row] == layer.base_layer.bias[row]
    weight = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    gain = layer.lora_magnitude_vector["default"].weight[4] / weight[4].norm()
    torch.testing.assert_close(hidden[4], gain * (x[0] @ weight[4]) + layer.base_layer.bias[4])
    model(x).square().sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reuse", ["auto", "off"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, reuse: str) -> None:
    stock = with_dora(llama())
    fast = twin(stock)
    doratune.accelerate(fast, norm_reuse=reuse, quiet=True)
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.train()
    for step in range(2):
        ids = tokens()
        for model in (stock, fast):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
        assert_same_gradients(fast, stock, 1e-4)
        shake(stock, step + 1)
        fast.load_state_dict(stock.state_dict())


def test_a_weight_written_behind_autograds_back_shows_in_the_next_forward() -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    x = inputs()
    layer = model.base_model.model.first
    for parameter in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        before = model(x)
        parameter.data.mul_(1.7)
        after = model(x)
        doratune.restore(model)
        torch.testing.assert_close(after, model(x))
        assert not torch.allclose(after, before)
        doratune.accelerate(model, quiet=True)
