"""Adapters that nearly cancel W: an accelerated layer, dense or quantised, is as near to fp64 as PEFT's dense norm."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import doratune
from doratune.integrations.peft import base_layers, cancellation
from doratune.integrations.peft.cancellation import CancellationWatch, summed_norm
from doratune.nn.norm import norm_from_products
from doratune.runtime.reference import cancels

from .peft_models import Pair, read_no_storage, relative, twin, with_dora
from .test_quantised import KINDS, heal, quantised

S = 0.5
SHARES = (0.9, 0.999, 0.9999)


pytestmark = pytest.mark.filterwarnings("error:doratune leaves")
"""PEFT's code runs no layer unnoticed."""


def entries(layer: Any) -> torch.Tensor:
    """W [d_out, d_in] in fp64, as the base layer multiplies by it."""
    base = base_layers.read_base(layer.base_layer, layer.out_features, layer.in_features, transposed=False)
    assert isinstance(base, base_layers.BaseLayer)
    if base.matrix is not None:
        return base.matrix.double()
    return base_layers.products(layer.base_layer, base, torch.eye(layer.in_features)).double()


@torch.no_grad()
def take_away(layer: Any, share: float, rows: slice) -> None:
    """Give an adapter of as many ranks as W has columns s*BA = -share*W in some rows, and nothing elsewhere."""
    weight = entries(layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.copy_(torch.eye(weight.shape[1]))
    b.zero_()
    b[rows] = ((-share / S) * weight[rows]).float()
    layer.lora_magnitude_vector["default"].weight.copy_(1.0 + 0.1 * torch.randn(weight.shape[0]))


def first(model: nn.Module) -> Any:
    return model.base_model.model.first  # type: ignore[union-attr]


@torch.no_grad()
def exact(layer: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    adapted = entries(layer) + S * (b @ a)
    y = x.double() @ (adapted / adapted.norm(dim=1, keepdim=True)).T * layer.lora_magnitude_vector["default"].weight
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias


@pytest.mark.parametrize("share", SHARES)
def test_a_dense_layer_is_as_near_to_fp64_as_peft(share: float) -> None:
    stock = with_dora(Pair(d_in=64, d_mid=96), r=64, lora_alpha=64 * S)
    take_away(first(stock), share, slice(0, 96, 2))
    fast, x = twin(stock), torch.randn(40, 64)
    doratune.accelerate(fast, quiet=True)
    wanted = exact(first(stock), x)
    assert relative(first(fast)(x), wanted) <= 1.5 * relative(first(stock)(x), wanted)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_that_is_read_is_as_near_to_fp64_and_says_nothing(kind: str, share: float) -> None:
    base = quantised(kind, sizes=(64, 96, 64))
    scales = {n: getattr(base, n).weight.SCB.clone() for n in ("first", "second")} if kind == KINDS[1] else {}
    model = with_dora(base, r=64, lora_alpha=64 * S)
    doratune.accelerate(model, quiet=True)
    heal(model, scales)
    layer = first(model)
    take_away(layer, share, slice(1, 96, 3))
    heal(model, scales)
    x = torch.randn(40, 64)
    variant = layer.lora_variant["default"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in .* rows")
        y = layer(x)
        norm = variant._compute_norm(variant.glance.look(layer, "default"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    heal(model, scales)
    with torch.no_grad():
        wanted = (entries(layer) + S * (b.double() @ a.double())).norm(dim=1)
    # Of 8 bits the package and the kernel make values that differ by 1e-7, and all but 1-share of W is taken away.
    bound = 1e-5 + (1e-7 / (1.0 - share) if kind == base_layers.BNB_8BIT else 0.0)
    assert float(((norm - wanted) / wanted).abs().max()) <= bound
    if kind != base_layers.BNB_8BIT:
        assert relative(y, exact(layer, x)) <= 2e-3


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_sums_its_norm_from_its_entries_and_says_so_once(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_no_storage(monkeypatch)
    monkeypatch.setattr(cancellation, "_BLOCK_ELEMENTS", 1000)  # blocks of ten columns, the last one of four
    base = quantised(kind, sizes=(64, 96, 64))
    scales = {n: getattr(base, n).weight.SCB.clone() for n in ("first", "second")} if kind == KINDS[1] else {}
    model = with_dora(base, r=64, lora_alpha=64 * S)
    doratune.accelerate(model, quiet=True)
    heal(model, scales)
    layer = first(model)
    take_away(layer, share, slice(1, 96, 3))
    watch = layer.lora_variant["default"].cancellation
    x = torch.randn(40, 64)
    with pytest.warns(UserWarning, match=r"in 32 of 96 rows of .*first the adapter cancels most of W") as told:
        y = layer(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in .* rows")
        again = layer(x)
    assert len([one for one in told if "cancels most of W" in str(one.message)]) == 1
    heal(model, scales)
    read = base_layers.read_base(layer.base_layer, 96, 64, transposed=False)
    assert isinstance(read, base_layers.BaseLayer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    squares = base_layers.row_squares(layer.base_layer, read, 96, 64)
    with torch.no_grad():
        norm = watch.norm(
            squares, a, b, S, lambda rows: base_layers.products(layer.base_layer, read, rows), trains=False
        )
        wanted = (entries(layer) + S * (b.double() @ a.double())).norm(dim=1)
    assert float(((norm - wanted) / wanted).abs().max()) <= 1e-5
    if kind != base_layers.BNB_8BIT:  # whose own product rounds x to 8 bits, and is all that is left of y there
        assert relative(y, exact(layer, x)) <= 2e-3
        assert relative(again, exact(layer, x)) <= 2e-3


def test_an_ordinary_adapter_keeps_the_factored_norm() -> None:
    model = with_dora(quantised(base_layers.BNB_4BIT))
    doratune.accelerate(model, quiet=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in .* rows")
        model(torch.randn(5, 64)).sum().backward()


class Watched:
    """A dense W behind the product that a watch is given, with an adapter that can be made to cancel W."""

    def __init__(self) -> None:
        self.weight = torch.randn(48, 32)
        self.a, self.b = torch.eye(32), torch.zeros(48, 32)
        self.watch = CancellationWatch("layer")

    def set(self, share: float) -> None:
        self.b.copy_(-share * self.weight)

    def norm(self, trains: bool) -> torch.Tensor:
        squares = self.weight.square().sum(dim=1)
        return self.watch.norm(squares, self.a, self.b, 1.0, lambda rows: self.weight @ rows.T, trains=trains)

    def error(self, norm: torch.Tensor) -> float:
        wanted = (self.weight.double() + self.b.double()).norm(dim=1)
        return float(((norm - wanted) / wanted).abs().max())


class Later:
    """An answer that has arrived at the second query."""

    made = 0

    def __init__(self, number: torch.Tensor) -> None:
        Later.made += 1
        self.number, self.asked = number, 0

    def arrived(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def value(self) -> int:
        return int(self.number)


@pytest.fixture
def watched_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """CPU tensors that the watch treats as a GPU's."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cancellation, "_Answer", Later)
    Later.made = 0
    return Watched()


def test_the_first_norm_of_a_layer_is_checked(watched_on_a_gpu: Watched) -> None:
    layer = watched_on_a_gpu
    layer.set(0.999)
    with pytest.warns(UserWarning, match="in 48 of 48 rows of layer"):
        norm = layer.norm(trains=True)
    assert layer.error(norm) <= 1e-5
    assert Later.made == 0


def test_without_training_only_a_written_adapter_is_checked(
    watched_on_a_gpu: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = watched_on_a_gpu
    looks: list[Any] = []
    monkeypatch.setattr(cancellation, "cancels", lambda *of: looks.append(of) or cancels(*of))  # type: ignore[func-returns-value]
    for _ in range(3):
        layer.norm(trains=False)
    assert len(looks) == 1
    layer.set(0.999)
    with pytest.warns(UserWarning, match="in 48 of 48 rows of layer"):
        assert layer.error(layer.norm(trains=False)) <= 1e-5


def test_in_training_nothing_waits_and_a_later_norm_uses_the_result(watched_on_a_gpu: Watched) -> None:
    layer = watched_on_a_gpu
    layer.norm(trains=True)
    layer.set(0.6)  # as far as few steps take an adapter: less than half is left, and the factored norm is still good
    for _ in range(cancellation._LOOK_EVERY - 1):
        assert layer.error(layer.norm(trains=True)) <= 1e-5
    assert Later.made == 1
    layer.norm(trains=True)  # the answer arrives at the second question
    with pytest.warns(UserWarning, match="in 48 of 48 rows of layer"):
        layer.norm(trains=True)
    layer.set(0.999)
    assert layer.error(layer.norm(trains=True)) <= 1e-5


def test_where_no_check_is_possible_lost_rows_are_nan() -> None:
    layer = Watched()

    def norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        watch = CancellationWatch("layer")
        return watch.norm(weight.square().sum(dim=1), a, b, 1.0, lambda rows: weight @ rows.T, trains=False)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    layer.set(0.5)
    assert layer.error(compiled(layer.weight, layer.a, layer.b)) <= 1e-5
    layer.b[7] = -0.999 * layer.weight[7]
    assert compiled(layer.weight, layer.a, layer.b).isnan().nonzero().flatten().tolist() == [7]


def test_the_summed_norm_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Watched()
    layer.set(0.3)
    factored = norm_from_products(layer.weight.square().sum(dim=1), layer.weight @ layer.a.T, layer.a, layer.b, 1.0)
    for elements in (1, 100, 1 << 20):
        monkeypatch.setattr(cancellation, "_BLOCK_ELEMENTS", elements)
        summed = summed_norm(layer.a, layer.b, 1.0, lambda rows: layer.weight @ rows.T)
        torch.testing.assert_close(summed, factored, rtol=1e-5, atol=0.0)
