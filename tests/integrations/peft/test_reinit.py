"""Adapters that PEFT adds or initialises again after ``accelerate`` run on doratune; plain LoRA stays LoRA."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

import doratune
from doratune.integrations.peft.variant import DoraVariant

from .peft_models import Pair, assert_same_gradients, relative, shake, twin, with_dora
from .test_quantised import quantised

SETTINGS: dict[str, Any] = {"target_modules": ["first", "second"], "init_lora_weights": False}


pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_variant")]


def kinds(model: nn.Module, adapter: str = "default") -> set[type | None]:
    return {type(layer.lora_variant.get(adapter)) for layer in layers(model)}


def assert_as_in_peft(model: Any, x: torch.Tensor) -> None:
    """Values and gradients of an accelerated model are those of its copy on PEFT's code."""
    stock = twin(model)
    doratune.restore(stock)
    for each in (model, stock):
        each.zero_grad()
        each(x).square().sum().backward()
    assert relative(model(x), stock(x)) < 1e-6
    assert_same_gradients(model, stock, 1e-5)


def test_layers_that_eva_initialises_stay_accelerated() -> None:
    config = peft.LoraConfig(
        use_dora=True, r=4, target_modules=["first", "second"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    model = peft.get_peft_model(Pair(), config)
    doratune.accelerate(model, norm_reuse="tracked", quiet=True)
    found = {"base_model.model.first": torch.randn(6, 24)}  # EVA gives this layer another rank; the other it makes anew
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the following layers were initialized")
        peft.initialize_lora_eva_weights(model, eva_state_dict=found)
    assert [layer.r["default"] for layer in layers(model)] == [6, 4]
    for layer, name in zip(layers(model), ("first", "second"), strict=True):
        variant = layer.lora_variant["default"]
        assert type(variant) is DoraVariant
        assert variant.norms.reuse == "tracked"
        assert variant.layer == f"base_model.model.{name}"
    shake(model)
    assert_as_in_peft(model, torch.randn(5, 24))


def test_an_adapter_added_later_is_accelerated_and_the_report_says_so() -> None:
    model = with_dora(Pair())
    report = doratune.accelerate(model, quiet=True)
    assert "Adapters that PEFT adds to these layers later" in str(report)
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    model.add_adapter("plain", peft.LoraConfig(r=3, **SETTINGS))
    assert kinds(model, "later") == {DoraVariant}
    assert kinds(model, "plain") == {type(None)}
    shake(model)
    x = torch.randn(5, 24)
    for active in (["later"], ["plain"], ["later", "default"], ["default", "plain"]):
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{adapter}." in name for adapter in active))
        assert_as_in_peft(model, x)
    report = doratune.accelerate(model, quiet=True)
    assert {(layer.name.rsplit(".", 1)[1], layer.adapter) for layer in report.accelerated} == {
        (name, adapter) for name in ("first", "second") for adapter in ("default", "later")
    }


def test_sixteen_bit_inputs_of_adapters_added_later_are_not_cast() -> None:
    model = with_dora(Pair().to(torch.bfloat16))
    doratune.accelerate(model, quiet=True)
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    for active in (["later"], ["later", "default"]):
        model.base_model.set_adapter(active)
        stock = twin(model)
        doratune.restore(stock)
        assert relative(model(x), stock(x)) < 2e-2
        layer = model.base_model.model.first
        assert layer._cast_input_dtype(x, torch.float32) is x


def test_an_adapter_deleted_and_added_again_is_accelerated_with_its_new_weights() -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, norm_reuse="tracked", quiet=True)
    x = torch.randn(5, 24)
    model(x)
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    model.set_adapter("default")
    assert kinds(model) == {DoraVariant}
    assert {layer.lora_variant["default"].norms.reuse for layer in layers(model)} == {"tracked"}
    shake(model)
    assert_as_in_peft(model, x)


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "overwritten"])
def test_an_adapter_that_comes_back_as_plain_lora_is_what_it_is_in_peft(deleted: bool) -> None:
    stock = with_dora(Pair())
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x = torch.randn(5, 24)
    config = peft.LoraConfig(r=3, **SETTINGS)
    if not deleted and _version() < (0, 19):
        pytest.skip(f"update_layer takes no config in PEFT {peft.__version__}")
    for model in (stock, fast):
        torch.manual_seed(1)
        if deleted:
            model.delete_adapter("default")
            model.add_adapter("default", config)
            model.set_adapter("default")
        else:
            for layer in layers(model):  # the layer stays DoRA then, in PEFT, too
                layer.update_layer("default", 3, lora_alpha=8, config=config)
    torch.testing.assert_close(fast(x), stock(x))
    if deleted and _version() >= (0, 20):  # until then PEFT keeps the variant of a deleted adapter for the next one
        assert kinds(fast) == kinds(stock) == {type(None)}
        assert not doratune.accelerate(fast, quiet=True).layers
        first = fast.base_model.model.first
        lora = first.lora_B["default"](first.lora_A["default"](x))
        torch.testing.assert_close(first(x), first.base_layer(x) + first.scaling["default"] * lora)


@pytest.mark.parametrize("init", ["pissa", "orthogonal", True])
def test_other_initialisations_keep_the_layer_accelerated(init: str | bool) -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(use_dora=True, r=4, **{**SETTINGS, "init_lora_weights": init}))
    model.set_adapter("default")
    assert kinds(model) == {DoraVariant}
    shake(model)
    assert_as_in_peft(model, torch.randn(5, 24))


def test_an_adapter_loaded_later_or_again_is_accelerated(tmp_path: Path) -> None:
    base = Pair()
    model = with_dora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    y = model(x)
    fresh = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(use_dora=True, r=2, **SETTINGS))
    fresh.base_model.model.first.base_layer.bias.data.copy_(model.base_model.model.first.base_layer.bias)
    doratune.accelerate(fresh, quiet=True)
    for name in ("loaded", "default"):
        if name == "default":
            fresh.delete_adapter("default")
        fresh.load_adapter(tmp_path, name, low_cpu_mem_usage=name == "default")
        fresh.set_adapter(name)
        assert kinds(fresh, name) == {DoraVariant}
        torch.testing.assert_close(fresh(x), y)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_accelerating_new_adapters_on_their_own_layers(copied: str) -> None:
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    if copied == "deepcopy":
        other = twin(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for theirs, ours in zip(layers(other), layers(model), strict=True):
        assert theirs.resolve_lora_variant.module is theirs
        assert ours.resolve_lora_variant.module is ours
    other.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    assert kinds(other, "later") == {DoraVariant}
    assert kinds(model, "later") == {type(None)}


def test_after_restore_new_adapters_are_pefts() -> None:
    model = with_dora(Pair())
    before = [set(vars(module)) for module in model.modules()]
    doratune.accelerate(model, quiet=True)
    doratune.restore(model)
    assert [set(vars(module)) for module in model.modules()] == before
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    assert kinds(model, "later") == {DoraLinearVariant}


def test_layers_left_to_peft_come_under_doratune_with_an_adapter_that_it_can_run() -> None:
    model = with_dora(Pair())
    layer = model.base_model.model.first
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(40))
    assert [left.name for left in doratune.accelerate(model, quiet=True).left] == ["base_model.model.first"]
    assert type(layer.lora_variant["default"]) is DoraLinearVariant
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    assert type(layer.lora_variant["later"]) is DoraVariant
    assert "_cast_input_dtype" in vars(layer)


def test_embeddings_and_models_without_dora_are_left_alone() -> None:
    model = peft.get_peft_model(Pair(), peft.LoraConfig(target_modules=["first"]))
    doratune.accelerate(model, quiet=True)
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, target_modules=["first"]))
    assert kinds(model, "later") == {DoraLinearVariant}  # "nothing was changed", the report said

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embed(ids))

    config = peft.LoraConfig(target_modules=["embed", "linear"], use_dora=True, init_lora_weights=False, r=4)
    mixed = peft.get_peft_model(Mixed(), config)
    doratune.accelerate(mixed, quiet=True)
    mixed.add_adapter("later", copy.deepcopy(config))
    mixed.set_adapter("later")
    types = {type(layer).__name__: type(layer.lora_variant["later"]).__name__ for layer in layers(mixed)}
    assert types == {"Embedding": "DoraEmbeddingVariant", "Linear": "DoraVariant"}
    ids = torch.randint(0, 10, (2, 5))
    stock = twin(mixed)
    doratune.restore(stock)
    torch.testing.assert_close(mixed(ids), stock(ids))


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao"])
def test_quantised_layers_accelerate_new_adapters(kind: str) -> None:
    model = with_dora(quantised(kind))
    doratune.accelerate(model, quiet=True)
    model.add_adapter("later", peft.LoraConfig(use_dora=True, r=3, **SETTINGS))
    model.set_adapter("later")
    assert kinds(model, "later") == {DoraVariant}
    stock = twin(model)
    doratune.restore(stock)
    x = torch.randn(5, 64)
    assert relative(model(x), stock(x)) < 1e-5


def _version() -> tuple[int, int]:
    major, minor, *_ = peft.__version__.split(".")
    return int(major), int(minor)
