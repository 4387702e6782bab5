"""DoRA on quantised base layers: W is only ever multiplied by, and values and gradients are PEFT's.

Each kind needs its library; without it the test is skipped. All of them compute on CPU tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import doratune

pytest.importorskip("peft")
pytest.importorskip("transformers")

from doratune.runtime.peft import base_layers

from .peft_models import Pair, assert_same_gradients, relative, shake, twin, with_dora

KINDS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "HQQ", "torchao")


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="doratune leaves")
        yield


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Pair of this kind, whose bias is far larger than its products."""
    model = Pair(d_in=64, d_mid=96, d_out=64)
    shake(model)
    with torch.no_grad():
        model.first.bias.mul_(20.0)
    names = {"first": model.first, "second": model.second}
    if kind.startswith("bitsandbytes"):
        bitsandbytes = pytest.importorskip("bitsandbytes").nn
        for name, linear in names.items():
            sizes: dict[str, Any] = {"bias": linear.bias is not None}
            if kind == base_layers.BNB_4BIT:
                layer = bitsandbytes.Linear4bit(64, 96, **sizes, compute_dtype=dtype, quant_type="nf4")
                layer.weight = bitsandbytes.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", module=layer
                ).to("cpu")
            else:
                layer = bitsandbytes.Linear8bitLt(64, 96, **sizes, has_fp16_weights=False)
                layer.weight = bitsandbytes.Int8Params(linear.weight.data, requires_grad=False).to("cpu")
            layer.in_features, layer.out_features = linear.in_features, linear.out_features
            layer.bias = linear.bias
            setattr(model, name, layer)
        setattr(model, f"is_loaded_in_{kind[-5]}bit", True)
    elif kind == base_layers.HQQ:
        hqq = pytest.importorskip("hqq.core.quantize")
        for name, linear in names.items():
            config = hqq.BaseQuantizeConfig(nbits=8, group_size=32)
            setattr(model, name, hqq.HQQLinear(linear, config, compute_dtype=dtype, device="cpu"))
    else:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.to(dtype), torchao.Int8WeightOnlyConfig())
    return model


def heal(model: nn.Module, scales: dict[str, torch.Tensor]) -> None:
    """On CPU tensors PEFT's dequantising loses the scales of an 8-bit layer: put them back."""
    for name, values in scales.items():
        model.base_model.model.get_submodule(name).base_layer.weight.SCB = values.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_pefts(kind: str, dropout: float) -> None:
    base = quantised(kind)
    is_8bit = kind == base_layers.BNB_8BIT
    scales = {n: getattr(base, n).weight.SCB.clone() for n in ("first", "second")} if is_8bit else {}
    model = with_dora(base, lora_dropout=dropout)
    x = torch.randn(5, 64)
    for train in (False, True):
        model.train(train)
        results = []
        for accelerated in (True, False):
            if accelerated:
                assert {layer.base for layer in doratune.accelerate(model, quiet=True).accelerated} == {kind}
            else:
                doratune.restore(model)
            heal(model, scales)
            torch.manual_seed(3)
            model.zero_grad()
            source = x.clone().requires_grad_()
            with warnings.catch_warnings():
                if is_8bit and dropout and train:  # the report announces this
                    warnings.filterwarnings("ignore", message="doratune leaves")
                y = model(source)
            y.square().sum().backward()
            results.append((y.detach(), source.grad, {n: p.grad for n, p in model.named_parameters() if "lora" in n}))
        (y, dx, grads), (stock_y, stock_dx, stock_grads) = results
        assert relative(y, stock_y) < 1e-6
        assert relative(dx, stock_dx) < 1e-6
        for name, gradient in grads.items():
            assert relative(gradient, stock_grads[name]) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_what_the_layer_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_layers, "_BLOCK_ELEMENTS", 1000)  # many blocks of a few rows
    layer = quantised(kind).first
    base = base_layers.read_base(layer, 96, 64, transposed=False)
    assert isinstance(base, base_layers.BaseLayer)
    assert base.kind == kind
    assert base.matrix is None
    lora_a = torch.randn(5, 64)
    with torch.no_grad():
        if kind == base_layers.BNB_8BIT:  # its own product quantises x
            weight = layer.weight.data.float() * layer.weight.SCB.view(-1, 1) / 127.0
        else:
            weight = (layer(torch.eye(64)) - layer.bias).T
        squares = base_layers.row_squares(layer, base, 96, 64)
        products = base_layers.products(layer, base, lora_a)
    assert relative(squares, weight.square().sum(dim=1)) < 1e-4  # weight has lost digits to the large bias
    assert relative(products, weight @ lora_a.T) < 1e-4


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "HQQ", "torchao"])
def test_a_large_bias_does_not_drown_the_norm_in_sixteen_bits(kind: str) -> None:
    layer = quantised(kind, torch.bfloat16).first
    base = base_layers.read_base(layer, 96, 64, transposed=False)
    assert isinstance(base, base_layers.BaseLayer)
    lora_a = torch.randn(5, 64)
    with torch.no_grad():
        bias, layer.bias = layer.bias, None
        exact = layer(torch.eye(64, dtype=torch.bfloat16)).double().T
        layer.bias = bias
        assert bias is not None
        assert relative(base_layers.row_squares(layer, base, 96, 64), exact.square().sum(dim=1)) < 1e-5
        assert relative(base_layers.products(layer, base, lora_a), exact @ lora_a.double().T) < 2**-7


def test_torchao_that_quantises_activations_is_left_to_peft() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = Pair(d_in=64, d_mid=96, d_out=64)
    torchao.quantize_(base, torchao.Int8DynamicActivationInt8WeightConfig())
    report = doratune.accelerate(with_dora(base), quiet=True)
    assert not report.accelerated
    assert "weight-only" in report.left[0].remark


def test_the_squares_of_w_are_kept_until_w_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_dora(quantised(base_layers.BNB_4BIT))
    doratune.accelerate(model, quiet=True)
    computed = []
    original = base_layers.row_squares

    def counted(*args: Any) -> torch.Tensor:
        computed.append(1)
        return original(*args)

    monkeypatch.setattr("doratune.runtime.peft.variant.row_squares", counted)
    x = torch.randn(5, 64)
    y = model(x)
    assert torch.equal(model(x), y)
    assert len(computed) == 2  # one per layer
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    assert not torch.allclose(merged, y, atol=1e-7)
    again = model(x)
    assert len(computed) == 4
    doratune.restore(model)
    torch.testing.assert_close(model(x), again)


class Opaque(nn.Module):
    """A layer whose W only it knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def test_base_layers_of_an_unknown_kind_are_named_and_left_alone() -> None:
    model = with_dora(Pair())
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        layer.base_layer = Opaque(layer.base_layer)
    report = doratune.accelerate(model, quiet=True)
    assert [layer.remark for layer in report.left] == ["a Opaque has no weight tensor"] * 2


def test_checkpointing_and_autocast_on_four_bits() -> None:
    stock = with_dora(quantised(base_layers.BNB_4BIT, torch.bfloat16))
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (stock, fast):
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            y.float().square().sum().backward()
    assert math.isfinite(float(y.sum()))
    assert_same_gradients(fast, stock, 2e-2)
