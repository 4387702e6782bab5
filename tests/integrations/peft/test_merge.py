"""Merging and unmerging an accelerated model: zero rows of W + sBA become 0 and come back, all other rows are PEFT's.

PEFT divides by the rows' norms when it merges, and by m over them when it unmerges: NaN for both kinds of zeros.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import doratune
from doratune.integrations.peft.zero_rows import ZeroRowsWarning

from .peft_models import Pair, relative, shake, twin, with_dora
from .test_quantised import KINDS, quantised

ZERO, NEAR, NO_MAGNITUDE, LORA_ONLY = 3, 4, 5, 6
"""Rows of :func:`degenerate`: W and BA zero; W + sBA tiny; m zero; W zero and BA not."""


pytestmark = [
    pytest.mark.filterwarnings("error:doratune leaves"),
    pytest.mark.filterwarnings("ignore::doratune.integrations.peft.zero_rows.ZeroRowsWarning"),
]


class Conv1DPair(nn.Module):
    """Two of GPT-2's layers, which store W as [d_in, d_out]."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first, self.second = Conv1D(24, 24), Conv1D(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def rows_of(layer: Any) -> torch.Tensor:
    """W [d_out, d_in], not a copy."""
    return layer.get_base_layer().weight.data.T if layer.fan_in_fan_out else layer.get_base_layer().weight.data


def zero_a_row(layer: Any, adapter: str = "default", row: int = ZERO, magnitude: float | None = None) -> None:
    with torch.no_grad():
        rows_of(layer)[row] = 0.0
        layer.lora_B[adapter].weight[row] = 0.0
        if magnitude is not None:
            layer.lora_magnitude_vector[adapter].weight[row] = magnitude


def degenerate(kind: str, dtype: torch.dtype = torch.float32, autocast: bool = True) -> tuple[Any, Any]:
    """A model with every kind of row that PEFT cannot merge, and its first layer."""
    base, settings = (Conv1DPair(), {"fan_in_fan_out": True}) if kind == "conv1d" else (Pair(24, 24), {})
    model = with_dora(base.to(dtype), autocast_adapter_dtype=autocast, **settings, target_modules=["first", "second"])
    layer = model.base_model.model.first
    zero_a_row(layer, magnitude=0.7)
    zero_a_row(layer, row=LORA_ONLY)
    tiny = 1e-20 if dtype is torch.float32 else 3e-7 if dtype is torch.float16 else 1e-14
    with torch.no_grad():
        rows_of(layer)[NEAR] = tiny
        layer.lora_B["default"].weight[NEAR] = 0.0
        layer.lora_B["default"].weight[LORA_ONLY] = 0.1
        layer.lora_magnitude_vector["default"].weight[NO_MAGNITUDE] = 0.0
    return model, layer


def exact_merge(layer: Any, adapter: str = "default") -> torch.Tensor:
    """``g*(W + sBA)`` [d_out, d_in] in fp64, g = m / max(w, 1e-12)."""
    dense = rows_of(layer).double() + layer.scaling[adapter] * (
        layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    )
    gain = layer.lora_magnitude_vector[adapter].weight.double() / dense.norm(dim=1).clamp_min(1e-12)
    return (gain[:, None] * dense).detach()


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_degenerate_rows_are_merged_as_the_forward_pass_sees_them_and_come_back(kind: str, safe: bool) -> None:
    model, layer = degenerate(kind)
    doratune.accelerate(model, quiet=True)
    before, merged = rows_of(layer).clone(), exact_merge(layer)
    x = torch.randn(5, 24)
    y = model(x)
    for _ in range(2):
        model.merge_adapter(safe_merge=safe)
        assert torch.equal(rows_of(layer)[ZERO], torch.zeros(24))
        assert torch.equal(rows_of(layer)[NO_MAGNITUDE], torch.zeros(24))
        torch.testing.assert_close(rows_of(layer).double(), merged, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(rows_of(layer)[NEAR].double(), merged[NEAR], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(model(x), y)
        model.unmerge_adapter()
        assert torch.equal(rows_of(layer)[ZERO], before[ZERO])
        assert torch.equal(rows_of(layer)[NO_MAGNITUDE], before[NO_MAGNITUDE])
        torch.testing.assert_close(rows_of(layer), before, rtol=1e-5, atol=1e-7)
        assert not layer._caches
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe)(x), y)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_all_other_rows_are_pefts_to_the_bit(kind: str) -> None:
    fast, layer = degenerate(kind)
    stock = twin(fast)
    doratune.accelerate(fast, quiet=True)
    ordinary = [row for row in range(24) if row not in (ZERO, NEAR, NO_MAGNITUDE)]
    fast.merge_adapter(), stock.merge_adapter()
    assert torch.equal(rows_of(layer)[ordinary], rows_of(stock.base_model.model.first)[ordinary])
    if kind == "linear" or _version() >= (0, 21):  # PEFT took a Conv1D apart by columns until then
        fast.unmerge_adapter(), stock.unmerge_adapter()
        assert torch.equal(rows_of(layer)[ordinary], rows_of(stock.base_model.model.first)[ordinary])
    assert not torch.isfinite(rows_of(stock.base_model.model.first)).all(), "PEFT merges such rows now: say so"


@pytest.mark.parametrize("adapters", ["fp32 adapters", "16-bit adapters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_neither_overflow_nor_lose_a_tiny_row(dtype: torch.dtype, adapters: str) -> None:
    model, layer = degenerate("linear", dtype, autocast=adapters == "fp32 adapters")
    doratune.accelerate(model, quiet=True)
    before, merged = rows_of(layer).clone(), exact_merge(layer)
    model.merge_adapter(safe_merge=True)
    assert torch.isfinite(rows_of(layer)).all()
    for row in (ZERO, NEAR, NO_MAGNITUDE):
        torch.testing.assert_close(rows_of(layer)[row].double(), merged[row], rtol=1e-2, atol=1e-7)
    assert relative(rows_of(layer), merged) < 2e-2
    model.unmerge_adapter()
    assert relative(rows_of(layer), before) < 2e-2
    for row in (ZERO, NO_MAGNITUDE):
        assert torch.equal(rows_of(layer)[row], before[row])
    torch.testing.assert_close(rows_of(layer)[NEAR], before[NEAR], rtol=0.5, atol=2e-7)  # fp16 has steps of 6e-8


def test_pefts_own_initial_magnitude_of_a_zero_row_is_merged_and_unmerged() -> None:
    base = Pair()
    with torch.no_grad():
        base.first.weight[[ZERO, 10]] = 0.0
    model = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, r=4, target_modules=["first", "second"]))
    layer = model.base_model.model.first
    assert layer.lora_magnitude_vector["default"].weight[ZERO] == 0.0
    doratune.accelerate(model, quiet=True)
    x = torch.randn(5, 24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    y, before = model(x), rows_of(layer).clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(rows_of(layer), before)
    assert torch.equal(rows_of(layer)[ZERO], torch.zeros(24))


@pytest.mark.parametrize(
    "names", [["default", "other"], ["other", "default"], ["plain", "default"], ["default", "plain"]]
)
def test_several_adapters_are_merged_and_unmerged(names: list[str]) -> None:
    model, layer = degenerate("linear")
    settings = {"target_modules": ["first", "second"], "init_lora_weights": False}
    model.add_adapter("other", peft.LoraConfig(use_dora=True, r=3, **settings))
    model.add_adapter("plain", peft.LoraConfig(r=3, **settings))
    for adapter in ("other", "plain"):
        zero_a_row(layer, adapter)
    doratune.accelerate(model, quiet=True)
    before = rows_of(layer).clone()
    model.merge_adapter(adapter_names=names, safe_merge=True)
    assert torch.isfinite(rows_of(layer)).all()
    assert torch.equal(rows_of(layer)[ZERO], torch.zeros(24))
    model.unmerge_adapter()
    torch.testing.assert_close(rows_of(layer), before, rtol=1e-4, atol=1e-6)
    assert not layer._caches
    model.add_weighted_adapter(names, [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    y = model(torch.ones(2, 24))
    assert torch.isfinite(y).all()
    model.delete_adapter(names[0])
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(torch.ones(2, 24)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save", "to"])
def test_a_merged_model_can_be_copied_moved_and_unmerged(copied: str) -> None:
    model, layer = degenerate("linear")
    before = rows_of(layer).clone()
    doratune.accelerate(model, quiet=True)
    model.merge_adapter()
    if copied == "deepcopy":
        model = copy.deepcopy(model)
    elif copied == "to":
        model.double()
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    model.unmerge_adapter()
    torch.testing.assert_close(rows_of(model.base_model.model.first).float(), before, rtol=1e-5, atol=1e-7)


def test_disabling_and_unloading_unmerge_an_adapter() -> None:
    model, _ = degenerate("linear")
    x = torch.randn(3, 24)
    with model.disable_adapter():
        y = model(x)
    doratune.accelerate(model, quiet=True)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), y)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model.unload()(x), y)


def test_restoring_a_merged_model_says_what_pefts_unmerge_would_lose() -> None:
    model, layer = degenerate("linear")
    before = rows_of(layer).clone()
    doratune.accelerate(model, quiet=True)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"first \(adapter default\).*accelerate\(model\) again before you unmerge"):
        doratune.restore(model)
    doratune.accelerate(model, quiet=True)
    model.unmerge_adapter()
    torch.testing.assert_close(rows_of(layer), before, rtol=1e-5, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doratune.restore(model)


def test_a_broken_adapter_is_still_refused_by_safe_merging() -> None:
    model, layer = degenerate("linear")
    doratune.accelerate(model, quiet=True)
    for part in (layer.base_layer, layer.lora_B["default"], layer.lora_magnitude_vector["default"]):
        value = part.weight.data[0].clone()
        part.weight.data[0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        part.weight.data[0] = value
    model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao"])  # PEFT merges LoRA alone there
def test_quantised_layers_merge_and_unmerge_zero_rows(kind: str) -> None:
    base = quantised(kind)
    is_8bit = kind == "bitsandbytes 8-bit"
    if is_8bit:  # PEFT's dequantising loses the scales of CPU tensors
        base.first.weight.SCB[ZERO] = 0.0
        scales = base.first.weight.SCB.clone()
    model = with_dora(base)
    layer = model.base_model.model.first
    x = torch.randn(5, 64)
    if is_8bit:
        layer.base_layer.weight.SCB = scales.clone()
    dense = _dequantised(layer)
    with torch.no_grad():
        if is_8bit:
            layer.lora_B["default"].weight[ZERO] = 0.0
            layer.base_layer.weight.SCB = scales.clone()
        layer.lora_magnitude_vector["default"].weight[[ZERO, NO_MAGNITUDE]] = 0.0
    doratune.accelerate(model, quiet=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rounding errors")
        layer.merge(safe_merge=True)
        assert torch.isfinite(layer.base_layer(x)).all()
        assert torch.equal(_dequantised(layer)[NO_MAGNITUDE], torch.zeros(64))
        layer.unmerge()
    assert relative(_dequantised(layer), dense) < 0.15  # quantised twice
    assert relative(_dequantised(layer)[NO_MAGNITUDE], dense[NO_MAGNITUDE]) < 0.15


def _dequantised(layer: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    base = layer.base_layer
    if type(getattr(base, "weight", None)).__name__ == "Int8Params":
        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        return base.weight.detach().float() * scales.view(-1, 1) / 127.0
    return dequantize_module_weight(base).detach().float().clone()


# ---- the warning ----------------------------------------------------------------------------------------------------


def _caught(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if issubclass(warning.category, ZeroRowsWarning)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_zero_rows_are_counted_and_named_in_one_warning(kind: str) -> None:
    base, settings = (Conv1DPair(), {"fan_in_fan_out": True}) if kind == "conv1d" else (Pair(24, 24), {})
    model = with_dora(base, target_modules=["first", "second"], **settings)
    layers = model.base_model.model
    assert not _caught(lambda: doratune.accelerate(model, quiet=True))
    with torch.no_grad():
        rows_of(layers.first)[[1, 2, 7]] = 0.0  # BA is not zero there: ordinary rows
        rows_of(layers.second)[0, 0] = 0.0
    assert not _caught(lambda: doratune.accelerate(model, quiet=True))
    for row in (1, 7):
        zero_a_row(layers.first, row=row)
    zero_a_row(layers.second, row=5)
    (message,) = _caught(lambda: doratune.accelerate(model, quiet=True))
    assert "3 rows of W + sBA are zero, in 2 DoRA layers" in message
    assert "first (adapter default): 2" in message
    assert "second (adapter default): 1" in message
    assert "PEFT" in message


def test_zero_rows_of_a_fresh_adapter_and_of_no_scaling_are_counted() -> None:
    base = Pair()
    with torch.no_grad():
        base.second.weight[2] = 0.0
    model = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, r=4, target_modules=["first", "second"]))
    assert "1 rows" in _caught(lambda: doratune.accelerate(model, quiet=True))[0]
    shake(model)
    assert not _caught(lambda: doratune.accelerate(model, quiet=True))
    model.base_model.model.second.scaling["default"] = 0.0
    assert "1 rows" in _caught(lambda: doratune.accelerate(model, quiet=True))[0]


def test_the_warning_about_stock_peft_is_true(tmp_path: Path) -> None:
    base = Pair()
    with torch.no_grad():
        base.second.weight[2] = 0.0
    config = peft.LoraConfig(use_dora=True, r=4, target_modules=["first", "second"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    doratune.accelerate(model, quiet=True)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(5, 24)
    assert not torch.isfinite(loaded(x)).all(), "PEFT learned to divide by a zero norm: the warning can go"
    torch.testing.assert_close(model.merge_and_unload()(x), base(x))


def test_the_counts_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_dora(Pair())
    for name in ("first", "second"):
        zero_a_row(getattr(model.base_model.model, name))
    fetched = []
    original = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        fetched.append(self)
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    assert _caught(lambda: doratune.accelerate(model, quiet=True))
    assert len(fetched) == 1


def test_zero_rows_of_eight_bit_layers_are_found_from_their_scales() -> None:
    base = quantised("bitsandbytes 8-bit")
    scales = {name: getattr(base, name).weight.SCB.clone() for name in ("first", "second")}
    model = with_dora(base)
    for name, values in scales.items():
        getattr(model.base_model.model, name).base_layer.weight.SCB = values.clone()
    layer = model.base_model.model.first
    layer.base_layer.weight.SCB[[ZERO, 9]] = 0.0
    layer.base_layer.state.SCB = None
    with torch.no_grad():
        layer.lora_B["default"].weight[ZERO] = 0.0
    (message,) = _caught(lambda: doratune.accelerate(model, quiet=True))
    assert "first (adapter default): 1." in message


def test_zero_rows_of_four_bit_layers_are_found_from_their_blocks() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    base = quantised("bitsandbytes 4-bit")
    dense = torch.randn(base.first.out_features, base.first.in_features)
    dense[[ZERO, 9]] = 0.0
    base.first.weight = bitsandbytes.Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=False, module=base.first
    ).to("cpu")
    model = with_dora(base)
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight[ZERO] = 0.0
    (message,) = _caught(lambda: doratune.accelerate(model, quiet=True))
    assert "first (adapter default): 1." in message


def _version() -> tuple[int, int]:
    major, minor, *_ = peft.__version__.split(".")
    return int(major), int(minor)
