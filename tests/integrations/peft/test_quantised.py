"""DoRA on quantised base layers: values and gradients are those of the W that PEFT dequantises, in every version of the
packages that quantise.

Each kind needs its package. Without it the test is skipped, except in the runs of tests/versions. All of them compute
on CPU tensors.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

import doratune
from doratune.integrations.peft import base_layers

from .peft_models import (
    Pair,
    assert_same_gradients,
    by_torchao,
    dense,
    read_no_storage,
    relative,
    shake,
    twin,
    with_dora,
)

KINDS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "HQQ", "torchao")
LINEAR_KINDS = ("bitsandbytes 4-bit", "HQQ", "torchao")
"""Those whose output is the product with one W."""
SQUARE, OBLONG = (64, 64, 64), (64, 128, 64)
"""d_in, d_mid, d_out. In a square W, W.T is silently taken for it."""


pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


def quantised(
    kind: str,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int] = OBLONG,
    quant_type: str = "nf4",
    nested: bool = False,
) -> Pair:
    """A Pair of this kind, whose bias is far larger than its products."""
    model = Pair(*sizes)
    shake(model)
    with torch.no_grad():
        model.first.bias.mul_(20.0)
    if kind == base_layers.TORCHAO:
        by_torchao(model.to(dtype), "Int8WeightOnlyConfig")
        return model
    for name in ("first", "second"):
        linear = getattr(model, name)
        sizes_of_linear = {"input_features": linear.in_features, "output_features": linear.out_features}
        if kind == base_layers.HQQ:
            hqq = pytest.importorskip("hqq.core.quantize")
            config = hqq.BaseQuantizeConfig(nbits=8, group_size=32)
            layer = hqq.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        elif kind == base_layers.BNB_4BIT:
            nn4bit = pytest.importorskip("bitsandbytes").nn
            layer = nn4bit.Linear4bit(**sizes_of_linear, bias=False, compute_dtype=dtype)
            settings = {"quant_type": quant_type, "compress_statistics": nested, "module": layer}
            layer.weight = nn4bit.Params4bit(linear.weight.data, requires_grad=False, **settings).to("cpu")
            layer.bias = linear.bias
        else:
            nn8bit = pytest.importorskip("bitsandbytes").nn
            layer = nn8bit.Linear8bitLt(**sizes_of_linear, bias=False, has_fp16_weights=False)
            layer.weight = nn8bit.Int8Params(linear.weight.data, requires_grad=False).to("cpu")
            layer.bias = linear.bias
        setattr(model, name, layer)
    if kind.startswith("bitsandbytes"):
        setattr(model, f"is_loaded_in_{kind[-5]}bit", True)
    return model


def read(layer: nn.Module) -> base_layers.BaseLayer:
    found = base_layers.read_base(layer, layer.out_features, layer.in_features, transposed=False)  # type: ignore[arg-type]
    assert isinstance(found, base_layers.BaseLayer)
    return found


def heal(model: nn.Module, scales: dict[str, torch.Tensor]) -> None:
    """On CPU tensors PEFT's dequantising loses the scales of an 8-bit layer: put them back."""
    for name, values in scales.items():
        model.base_model.model.get_submodule(name).base_layer.weight.SCB = values.clone()


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_pefts(kind: str, dropout: float, sizes: tuple[int, int, int]) -> None:
    base = quantised(kind, sizes=sizes)
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
            y = model(source)
            after = torch.random.get_rng_state()
            y.square().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
            results.append((y.detach(), source.grad, grads, after))
        (y, dx, grads, after), (stock_y, stock_dx, stock_grads, stock_after) = results
        assert torch.equal(after, stock_after)  # as many random numbers
        assert relative(y, stock_y) < 1e-6
        assert relative(dx, stock_dx) < 1e-6
        for name, gradient in grads.items():
            assert relative(gradient, stock_grads[name]) < 1e-4, name


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize(
    ("kind", "storage"),
    [
        ("bitsandbytes 8-bit", {}),
        ("bitsandbytes 4-bit", {"quant_type": "nf4"}),
        ("bitsandbytes 4-bit", {"quant_type": "nf4", "nested": True}),
        ("bitsandbytes 4-bit", {"quant_type": "fp4"}),
        ("HQQ", {}),
        ("torchao", {}),
    ],
    ids=["int8", "nf4", "nested nf4", "fp4", "HQQ", "torchao"],
)
def test_products_and_their_gradients_are_those_of_the_dequantised_w(
    kind: str, storage: dict[str, Any], sizes: tuple[int, int, int], name: str
) -> None:
    layer = getattr(quantised(kind, sizes=sizes, **storage), name)
    weight = dequantize_module_weight(layer).double()
    base = read(layer)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    product = base_layers.multiply(layer, base, x)
    dy = torch.randn_like(product)
    product.backward(dy)
    assert x.grad is not None
    assert relative(product, x.double() @ weight.T) < 1e-6
    assert relative(x.grad, dy.double() @ weight) < 1e-6
    with torch.no_grad():
        squares = base_layers.row_squares(layer, base, *weight.shape)
        products = base_layers.products(layer, base, x[0])
    assert relative(squares, weight.square().sum(dim=1)) < 1e-6
    assert relative(products, weight @ x[0].double().T) < 1e-6


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_dropout_on_8_bits_keeps_no_dequantised_weight(autocast: bool) -> None:
    base = quantised(base_layers.BNB_8BIT, sizes=(64, 128, 64))
    model = with_dora(base, lora_dropout=0.4)
    doratune.accelerate(model.train(), quiet=True)
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = model(x)
    y.float().square().sum().backward()
    assert all(tensor.dtype is torch.int8 for tensor in kept if tensor.numel() >= 64 * 128)
    assert any(tensor.dtype is torch.int8 for tensor in kept)


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_inference_is_that_of_the_dequantised_w(kind: str, sizes: tuple[int, int, int]) -> None:
    model = with_dora(quantised(kind, sizes=sizes))
    exact = dense(model)
    doratune.accelerate(model.eval(), quiet=True)
    x = torch.randn(5, 64)
    with torch.no_grad():
        for _ in range(2):
            # On CPUs with bf16 instructions bitsandbytes packs W anew here, and computes in bf16 from then on.
            assert relative(model(x), exact(x.double())) < 5e-3


def test_a_product_leaves_the_weight_as_a_backward_pass_will_need_it() -> None:
    layer = quantised(base_layers.BNB_4BIT, sizes=SQUARE).second.eval()
    weight = dequantize_module_weight(layer).double()
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        base_layers.multiply(layer, read(layer), torch.randn(7, 64))  # type: ignore[arg-type]
    y.sum().backward()
    assert relative(x.grad, torch.ones_like(y).double() @ weight) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_product_runs_no_hooks_and_changes_nothing_in_the_layer(kind: str) -> None:
    layer = quantised(kind, torch.bfloat16).first
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was run for rows that are no tokens"))
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook was run for rows that are no tokens"))
    before, bias = dict(layer.__dict__), layer.bias
    parameters = dict(layer._parameters)
    base_layers.multiply(layer, read(layer), torch.randn(7, 64))
    with pytest.raises(RuntimeError):
        base_layers.multiply(layer, read(layer), torch.randn(7, 63))
    assert layer.bias is bias
    assert layer.__dict__.keys() == before.keys()
    assert all(layer.__dict__[key] is value for key, value in before.items())
    assert layer._parameters == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_what_the_layer_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_layers, "_BLOCK_ELEMENTS", 1000)  # many blocks of a few rows
    layer = quantised(kind).first
    base = read(layer)
    assert base.kind == kind
    assert base.matrix is None
    lora_a = torch.randn(5, 64)
    with torch.no_grad():
        if kind == base_layers.BNB_8BIT:  # its own product quantises x
            weight = layer.weight.data.float() * layer.weight.SCB.view(-1, 1) / 127.0
        else:
            weight = (layer(torch.eye(64)) - layer.bias).T
        squares = base_layers.row_squares(layer, base, 128, 64)
        products = base_layers.products(layer, base, lora_a)
    assert relative(squares, weight.square().sum(dim=1)) < 1e-4  # weight has lost digits to the large bias
    assert relative(products, weight @ lora_a.T) < 1e-4


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_large_bias_does_not_drown_the_norm_in_sixteen_bits(kind: str) -> None:
    layer = quantised(kind, torch.bfloat16).first
    base = read(layer)
    lora_a = torch.randn(5, 64)
    with torch.no_grad():
        bias, layer.bias = layer.bias, None
        exact = layer(torch.eye(64, dtype=torch.bfloat16)).double().T
        layer.bias = bias
        assert bias is not None
        assert relative(base_layers.row_squares(layer, base, 128, 64), exact.square().sum(dim=1)) < 1e-5
        assert relative(base_layers.products(layer, base, lora_a), exact @ lora_a.double().T) < 2**-7


def test_torchao_that_quantises_activations_is_left_to_peft() -> None:
    base = Pair(d_in=64, d_mid=96, d_out=64)
    by_torchao(base, "Int8DynamicActivationInt8WeightConfig")
    reason = base_layers.read_base(base.first, 96, 64, transposed=False)  # older ones PEFT cannot dequantise either
    assert isinstance(reason, str)
    assert "weight-only" in reason


def test_a_forward_that_is_not_the_packages_own_is_left_to_peft() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn

    class Doubled(bitsandbytes.Linear4bit):  # type: ignore[misc,name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)  # type: ignore[no-any-return]

    base = quantised(base_layers.BNB_4BIT)
    base.first.__class__ = Doubled
    report = doratune.accelerate(with_dora(base), quiet=True)
    assert [layer.name.rpartition(".")[2] for layer in report.left] == ["first"]
    assert "not from bitsandbytes" in report.left[0].remark


def test_hqq_that_quantises_activations_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(base_layers.HQQ)
    hqq_linear = type(base.first)
    monkeypatch.setattr(hqq_linear, "forward", hqq_linear.forward_aten_int8)
    report = doratune.accelerate(with_dora(base), quiet=True)
    assert not report.accelerated
    assert "rounds" in report.left[0].remark


def test_the_squares_of_w_are_kept_until_w_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    read_no_storage(monkeypatch)
    model = with_dora(quantised(base_layers.BNB_4BIT))
    doratune.accelerate(model, quiet=True)
    computed = []
    original = base_layers.row_squares

    def counted(*args: Any) -> torch.Tensor:
        computed.append(1)
        return original(*args)

    monkeypatch.setattr("doratune.integrations.peft.variant.row_squares", counted)
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
    """A layer without a weight tensor."""

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
