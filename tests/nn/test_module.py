"""DoRALinear starts as its base layer, trains like DoRA's formula, exchanges state dicts with PEFT, and merges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import doratune
from doratune.nn import DoRALinear, LayerError


def make(bias: bool = True, **options: object) -> tuple[nn.Linear, DoRALinear]:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, bias=bias)
    return copy.deepcopy(linear), DoRALinear.from_linear(linear, 4, 6.0, **options)  # type: ignore[arg-type]


def train(layer: nn.Module, steps: int = 3) -> None:
    """Move every trained tensor away from where it starts."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(32, 16), torch.randn(32, 24)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()


def formula(layer: DoRALinear, x: torch.Tensor) -> torch.Tensor:
    lora_a, lora_b, magnitude = (tensor.double() for tensor in layer.adapter)
    adapted = layer.base_layer.weight.double() + layer.scaling * lora_b @ lora_a
    y = x.double() @ (magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_the_layer_that_it_adapts_and_learns_without_touching_it(bias: bool) -> None:
    linear, layer = make(bias)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)
    train(layer)
    assert torch.equal(layer.base_layer.weight, linear.weight)
    assert not torch.allclose(layer(x), linear(x), atol=1e-2)
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)


def test_only_the_adapter_is_trained_and_kept_in_fp32_beside_16_bit_weights() -> None:
    layer = DoRALinear.from_linear(nn.Linear(16, 24).bfloat16(), 4, 6.0)
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {
        "lora_A.default.weight": torch.float32,
        "lora_B.default.weight": torch.float32,
        "lora_magnitude_vector.default.weight": torch.float32,
    }
    assert layer(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16


def test_state_dicts_move_to_peft_and_back_and_mean_the_same() -> None:
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.proj(x)
            return out

    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["proj"])
    stock = peft.get_peft_model(Model(), config).base_model.model.proj
    train(stock)
    layer = DoRALinear(16, 24, 4, 6.0)
    assert layer.state_dict().keys() == stock.state_dict().keys()
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(7, 16)
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)
    train(layer)
    stock.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(dtype: torch.dtype) -> None:
    _, layer = make()
    train(layer)
    layer.base_layer.to(dtype)
    weight, x = layer.base_layer.weight.clone(), torch.randn(5, 16).to(dtype)
    y = layer(x)
    layer.merge()
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert layer.merged
    assert not torch.equal(layer.base_layer.weight, weight)
    torch.testing.assert_close(layer(x), y, **bound)
    torch.testing.assert_close(layer.base_layer(x), y, **bound)
    with pytest.raises(LayerError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(layer(x), y)
    with pytest.raises(LayerError, match="not merged"):
        layer.unmerge()


def test_a_plain_linear_layer_can_be_made_of_it_merged_or_not() -> None:
    _, layer = make()
    train(layer)
    x = torch.randn(5, 16)
    y = layer(x)
    for merged in (False, True):
        if merged:
            layer.merge()
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert not linear.weight.requires_grad
        torch.testing.assert_close(linear(x), y, rtol=1e-5, atol=1e-5)


def test_a_merged_layer_that_moves_to_another_dtype_unmerges_there() -> None:
    _, layer = make()
    train(layer)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight.double())


def test_dropout_is_pefts_while_training_and_none_in_evaluation() -> None:
    _, layer = make(lora_dropout=0.4)
    train(layer)
    x = torch.randn(64, 16)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    torch.manual_seed(5)
    y = layer(x)
    lora_a, lora_b, magnitude = layer.adapter
    g = magnitude / layer.norm()
    weight = layer.base_layer.weight
    lora = layer.scaling * dropped @ lora_a.T @ lora_b.T
    wanted = layer.base_layer(x) + (g - 1.0) * (dropped @ weight.T) + g * lora
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y.square().sum(), layer.adapter)
    exact = torch.autograd.grad(wanted.square().sum(), layer.adapter)
    for grad, value in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)


def test_invalid_arguments_are_refused_with_the_remedy() -> None:
    with pytest.raises(LayerError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        DoRALinear.from_linear(nn.Conv1d(1, 1, 1), 4, 8.0)  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="the rank r must be an integer of at least 1, got 0"):
        DoRALinear(16, 24, 0, 8.0)
    with pytest.raises(LayerError, match=r"lora_dropout must be at least 0 and below 1, got 1\.0"):
        DoRALinear(16, 24, 4, 8.0, lora_dropout=1.0)


def test_a_layer_on_the_meta_device_takes_a_state_dict() -> None:
    _, trained = make()
    train(trained)
    layer = DoRALinear(16, 24, 4, 6.0, device="meta")
    layer.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), trained(x))


def test_its_text_names_its_settings() -> None:
    assert "r=4, lora_alpha=6.0, lora_dropout=0.0, merged=False" in repr(doratune.nn.DoRALinear(16, 24, 4, 6.0))


class Doubling(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def test_a_linear_that_computes_something_else_is_refused() -> None:
    with pytest.raises(LayerError, match=r"linear must use torch\.nn\.Linear's forward, got a Doubling"):
        doratune.nn.DoRALinear.from_linear(Doubling(8, 6), 2, 4.0)
    patched = torch.nn.Linear(8, 6)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(LayerError, match=r"linear must use torch\.nn\.Linear's forward"):
        doratune.nn.DoRALinear.from_linear(patched, 2, 4.0)
    integers = torch.nn.Linear(8, 6)
    integers.weight = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayerError, match=r"linear must have a dense weight, got a Parameter of torch\.int8"):
        doratune.nn.DoRALinear.from_linear(integers, 2, 4.0)


def test_hooks_of_the_base_layer_run_and_may_change_what_it_returns() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6)
    layer = doratune.nn.DoRALinear.from_linear(linear, 2, 4.0)
    with torch.no_grad():
        layer.adapter[1].normal_()
    plain, x = layer(torch.eye(8)), torch.eye(8)
    handle = linear.register_forward_hook(lambda module, given, output: output + 1.0)
    lora_a, lora_b, magnitude = layer.adapter
    gain = magnitude / (linear.weight + 2.0 * lora_b @ lora_a).norm(dim=1)
    torch.testing.assert_close(layer(x), plain + gain)
    handle.remove()
    torch.testing.assert_close(layer(x), plain)


def test_a_state_dict_of_a_merged_layer_is_that_of_the_unmerged_one() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(doratune.nn.DoRALinear(8, 6, 2, 4.0))
    with torch.no_grad():
        model[0].adapter[1].normal_()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 8)
    y = model(x)
    model[0].merge()
    saved = model.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], value) for name, value in wanted.items())
    other = torch.nn.Sequential(doratune.nn.DoRALinear(8, 6, 2, 4.0))
    other[0].merge()
    other.load_state_dict(saved)
    assert not other[0].merged
    torch.testing.assert_close(other(x), y)
