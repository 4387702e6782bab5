"""Calls of quantised layers pass PEFT's forward pass by where nothing in it applies, with the very values and gradients
that the way through PEFT has; anything that PEFT would do there goes through PEFT.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import doratune
from doratune.integrations.peft import base_layers
from doratune.integrations.peft.passes import pass_over
from doratune.integrations.peft.stored_place import StoredPlace
from doratune.integrations.peft.variant import DoraVariant
from doratune.nn import kernels
from doratune.nn.kernels import token_bucket

from .peft_models import Pair, gradients, relative, shake, with_dora
from .test_first_step import autocast
from .test_quantised import KINDS, quantised

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def through_peft(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often PEFT has called DoRA's variant of each layer."""
    count: Counter[str] = Counter()
    forward = DoraVariant.forward

    def counted(self: Any, module: Any, *args: Any, **named: Any) -> Any:
        count[self.layer] += 1
        return forward(self, module, *args, **named)

    monkeypatch.setattr(DoraVariant, "forward", counted)
    return count


def pair(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"r": 4, "autocast_adapter_dtype": dtype is not torch.bfloat16, **settings}
    model: Any = with_dora(quantised(kind, dtype), **settings)
    for name in ("first", "second"):
        layer = model.get_base_model().get_submodule(name)
        layer.base_layer.support_avx512bf16_for_cpu = False  # on a GPU W is not packed anew in inference
        if kind in (base_layers.BNB_4BIT, base_layers.BNB_8BIT) and layer.base_layer.bias is not None:
            layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.data.to(dtype), requires_grad=False)
    shake(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name and not settings["autocast_adapter_dtype"]:
            parameter.data = parameter.data.to(dtype)
    doratune.accelerate(model, quiet=True, precompile=False)
    return model


@contextmanager
def only_through_peft() -> Iterator[None]:
    run = StoredPlace.run
    StoredPlace.run = lambda self, module, x: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        StoredPlace.run = run  # type: ignore[method-assign]


def run(model: nn.Module, x: torch.Tensor, train: bool, rounds: bool) -> dict[str, torch.Tensor]:
    model.train(train)
    model.zero_grad()
    x = x.clone().requires_grad_(train)
    with torch.set_grad_enabled(train):
        with autocast(rounds):
            y = model(x)
        if train:
            y.float().square().mean().backward()
    found = {"y": y.detach().clone(), **{name: g.clone() for name, g in gradients(model).items()}}
    return found if x.grad is None else {**found, "x": x.grad}


WAYS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_way_through_peft(
    kind: str, way: str, train: bool, through_peft: Counter[str]
) -> None:
    dtype, rounds = WAYS[way]
    if kind == base_layers.HQQ and rounds and train:
        pytest.skip("HQQ's own backward pass fails under autocast")
    model = pair(kind, dtype)
    x = X.to(dtype)
    # A layer adds up the gradient of its input before it rounds it, so what depends on the second one's differs; and
    # torchao scales a gradient where the codes of W could be scaled.
    near = 1e-2 if dtype is torch.bfloat16 else 1e-5 if kind == base_layers.TORCHAO else 0.0
    with only_through_peft():
        wanted = run(model, x, train, rounds)
    assert set(through_peft) == {"base_model.model.first", "base_model.model.second"}
    through_peft.clear()
    for _ in range(3):
        found = run(model, x, train, rounds)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype
            if name != "y" and ".second." not in name:
                assert relative(value, wanted[name]) <= near, name
            else:
                assert torch.equal(value, wanted[name]), name
    assert not through_peft


class Composes:
    """A kernel of the op lora_compose on CPU tensors."""

    launches = 0

    def launch(self, inputs: Any, outputs: Any, scaling: float) -> None:
        base, h, lora_b, g = inputs
        assert h.dtype is lora_b.dtype is base.dtype
        y = g * (base.float() + scaling * h.float() @ lora_b.float().T)
        outputs[0].copy_(y.view(outputs[0].shape))
        Composes.launches += 1


@contextmanager
def norm_pass_over(module: nn.Module) -> Iterator[None]:
    by = pass_over(module).open()
    assert by is not None
    try:
        yield
    finally:
        by.close()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_in_inference_one_launch_composes_over_the_base_layers_output(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair(kind, torch.bfloat16)
    layer = model.base_model.model.second
    x = torch.randn(2, rows, layer.in_features).bfloat16()
    every = nn.ModuleList([layer]).eval()
    find = kernels.kernel_for
    with torch.no_grad():
        wanted = layer(x).float()
        sizes = set()

        def found(*key: Any) -> Any:
            if key[0] != "lora_compose":
                return find(*key)
            sizes.add(key[1:5])
            return Composes()

        monkeypatch.setattr(kernels, "kernel_for", found)
        Composes.launches = 0
        for given in (x, x.reshape(-1, x.shape[-1]), x.transpose(0, 1).contiguous().transpose(0, 1)):
            with norm_pass_over(every):
                y = layer(given)
            assert torch.allclose(y.reshape(wanted.shape).float(), wanted, rtol=2e-2, atol=1e-3)
        assert Composes.launches == 3
        assert sizes == {(layer.out_features, 1, 4, token_bucket(2 * rows))}
        assert layer(x[:0]).shape == (0, rows, layer.out_features)


def test_the_base_layers_output_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(base_layers.BNB_4BIT, torch.bfloat16)
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self, **named: (copies.append(self.shape), clone(self, **named))[1]
    )
    with torch.no_grad():
        model(X.bfloat16())
    assert copies == []


def hooked(model: Any) -> None:
    model.base_model.model.first.base_layer.register_forward_hook(lambda module, args, y: None)


def patched_base(model: Any) -> None:
    base = model.base_model.model.first.base_layer
    base.forward = MethodType(lambda self, x: type(self).forward(self, x), base)


def hooked_adapter(model: Any) -> None:
    model.base_model.model.first.lora_A["default"].register_forward_pre_hook(lambda module, args: None)


def replaced(model: Any) -> None:
    """Other code replaces PEFT's own forward pass."""
    layer = model.base_model.model.first
    cls = type(layer)._plain_class
    own = cls.forward
    model._undo = lambda: setattr(cls, "forward", own)
    cls.forward = lambda self, x, *args, **named: own(self, x, *args, **named)


def two_adapters(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(use_dora=True, r=4, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])


def caching(model: Any) -> None:
    peft_dora = pytest.importorskip("peft.tuners.lora.dora")
    if not hasattr(peft_dora, "ENABLE_DORA_CACHING"):
        pytest.skip("this PEFT caches no norms")
    before = peft_dora.ENABLE_DORA_CACHING
    model._undo = lambda: setattr(peft_dora, "ENABLE_DORA_CACHING", before)
    peft_dora.ENABLE_DORA_CACHING = True


@pytest.mark.filterwarnings("ignore:doratune leaves")
@pytest.mark.parametrize("changed", [hooked, patched_base, hooked_adapter, replaced, two_adapters, caching])
def test_what_only_peft_does_goes_through_peft(changed: Callable[[Any], None], through_peft: Counter[str]) -> None:
    model = pair(base_layers.BNB_4BIT)
    with torch.no_grad():
        model(X)
        assert not through_peft
        try:
            changed(model)
            y = model(X)
            assert through_peft["base_model.model.first"]
            with only_through_peft():
                assert torch.equal(model(X), y)
        finally:
            getattr(model, "_undo", lambda: None)()


def test_dropout_goes_through_peft_in_training_alone(through_peft: Counter[str]) -> None:
    model = pair(base_layers.BNB_4BIT, lora_dropout=0.5).train()
    model(X)
    assert len(through_peft) == 2
    through_peft.clear()
    model.eval()
    model(X)
    assert not through_peft


def test_exact_adapters_go_through_peft(through_peft: Counter[str]) -> None:
    """fp32 adapters beside 16-bit activations, without autocast, are not rounded."""
    model = pair(base_layers.BNB_4BIT, torch.bfloat16, autocast_adapter_dtype=True)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        assert layer.lora_A["default"].weight.dtype is torch.float32
    model(X.bfloat16())
    assert len(through_peft) == 2


def test_merged_disabled_and_switched_layers_go_through_peft_and_come_back(through_peft: Counter[str]) -> None:
    model = pair(base_layers.BNB_4BIT).eval()
    with torch.no_grad():
        y = model(X)
        with model.disable_adapter():
            plain = model(X)
        assert not torch.allclose(plain, y)
        assert torch.equal(model(X), y)
        assert not through_peft
        base: Any = model.get_base_model()
        assert isinstance(base, Pair)
        wanted = [layer.base_layer(X) for layer in (base.first,)]
        assert torch.equal(base.first.base_layer(X), wanted[0]), "a call has not written to what it returned before"


def test_the_layers_of_a_copy_are_its_own(through_peft: Counter[str]) -> None:
    model = pair(base_layers.BNB_4BIT)
    with torch.no_grad():
        y = model(X)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert not torch.equal(other(X), y)
        assert torch.equal(model(X), y)
    assert not through_peft


def test_a_shallow_copy_of_a_layer_is_another_layer(through_peft: Counter[str]) -> None:
    layer = pair(base_layers.BNB_4BIT).base_model.model.first
    with torch.no_grad():
        y = layer(X)
        other = copy.copy(layer)
        other._modules = {**layer._modules, "lora_B": copy.deepcopy(layer.lora_B)}
        other.lora_B["default"].weight.mul_(3.0)
        assert not torch.allclose(other(X), y)
        assert torch.equal(layer(X), y)


def test_a_new_w_under_the_same_parameter_is_noticed(through_peft: Counter[str]) -> None:
    """Streaming loaders give a parameter other memory; an optimizer's or a user's write stays where it is."""
    model = pair(base_layers.BNB_4BIT)
    weight = model.base_model.model.first.base_layer.weight
    with torch.no_grad():
        y = model(X)
        weight.data = torch.randint(0, 256, weight.shape, dtype=torch.uint8)
        moved = model(X)
        weight.data.copy_(torch.randint(0, 256, weight.shape, dtype=torch.uint8))
        scales = weight.quant_state.absmax
        weight.quant_state.absmax = scales * 2.0
        written = model(X)
        for value in (moved, written):
            assert not torch.equal(value, y)
        with only_through_peft():
            assert torch.equal(model(X), written)
