"""A layer is examined again when anything has changed that decides what it computes, wherever it is and whenever."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.utils.checkpoint import checkpoint

from doratune.integrations.peft import examine
from doratune.integrations.peft.unchanged import Unchanged

from .peft_models import relative
from .test_projections import assert_step, attention_of, calls, pair, x_of

__all__ = ["calls"]

PLACES = ["attention.q", "attention.k", "middle", "mlp.one", "mlp.two", "mlp.out"]
"""Layers first and later in a group, alone, in a gated MLP."""


def layer_of(model: nn.Module, place: str) -> Any:
    return model.base_model.model.get_submodule(place)  # type: ignore[union-attr,operator]


def rescale(layer: Any) -> None:
    layer.scaling = {name: 3.0 * value for name, value in layer.scaling.items()}


def replace_weight(layer: Any) -> None:
    base = layer.base_layer
    base.weight = nn.Parameter(1.5 * base.weight.detach(), requires_grad=False)


def replace_adapter(layer: Any) -> None:
    layer.lora_A["default"].weight = nn.Parameter(1.5 * layer.lora_A["default"].weight.detach())


def replace_module(layer: Any) -> None:
    layer.lora_B["default"] = copy.deepcopy(layer.lora_B["default"])
    layer.lora_B["default"].weight.data.mul_(0.5)


def replace_container(layer: Any) -> None:
    layer.lora_A = copy.deepcopy(layer.lora_A)
    layer.lora_A["default"].weight.data.mul_(0.5)


def replace_base(layer: Any) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.mul_(0.5)


class Doubled(DoraLinearVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **named: Any) -> torch.Tensor:
        return 2.0 * DoraLinearVariant.forward(module, active_adapter, x, result, **named)  # type: ignore[no-any-return]


def replace_variant(layer: Any) -> None:
    layer.lora_variant["default"] = Doubled()


def replace_variants(layer: Any) -> None:
    layer.lora_variant = {"default": Doubled()}


def bias_of_lora(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features, dtype=torch.float64))


def replace_bias(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.detach() + 1.0, requires_grad=False)


def new_data(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.data = 1.3 * parameter.data


def lower_rank(layer: Any) -> None:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down.data, up.data = down.data[:3], up.data[:, :3]


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


def dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = Halved()


def wrap_forward(layer: Any) -> None:
    own = layer.lora_A["default"].forward
    layer.lora_A["default"].forward = lambda x: 2.0 * own(x)


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1.0)


def merge(layer: Any) -> None:
    layer.merge()


def disable(layer: Any) -> None:
    layer.enable_adapters(False)


def train_bias(layer: Any) -> None:
    layer.base_layer.bias.requires_grad_()


def new_data_of_bias(layer: Any) -> None:
    bias = layer.base_layer.bias
    bias.data = bias.data + 0.5


def freeze(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].weight.requires_grad_(False)


CHANGES = [
    rescale, replace_weight, replace_adapter, replace_module, replace_container, replace_base, replace_variant,
    replace_variants, bias_of_lora, replace_bias, new_data, lower_rank, dropout, wrap_forward, hook, merge, disable,
    train_bias, new_data_of_bias, freeze,
]  # fmt: skip
IN_A_CALL = [
    rescale,
    replace_weight,
    replace_adapter,
    replace_module,
    replace_container,
    replace_base,
    replace_variant,
    replace_variants,
    replace_bias,
    new_data_of_bias,
    new_data,
    merge,
    disable,
    lower_rank,
]


@pytest.mark.filterwarnings("ignore:doratune leaves")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_layer_takes_effect_in_the_next_call(change: Callable[[Any], None], place: str) -> None:
    stock, fast = pair()
    for seed in range(2):
        assert_step(stock, fast, seed)
    for model in (stock, fast):
        change(layer_of(model, place))
    for seed in range(2, 4):
        assert_step(stock, fast, seed)


@pytest.mark.parametrize("change", IN_A_CALL)
@pytest.mark.parametrize("place", ["attention.k", "attention.v", "middle", "mlp.two"])
def test_a_change_of_a_later_layer_within_a_call_takes_effect(change: Callable[[Any], None], place: str) -> None:
    """The code between two layers of a group makes it, in a call for which the norms have been computed."""
    stock, fast = pair()
    with torch.no_grad():
        for seed in range(3):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-10
        for model in (stock, fast):
            later = layer_of(model, place)
            attention_of(model).between = lambda _, x, later=later: (change(later), x)[1]
        for seed in range(3, 5):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-10


def transpose(layer: Any) -> None:
    layer.base_layer.weight.data = layer.base_layer.weight.data.t()


@pytest.mark.parametrize("within", [False, True])
def test_a_square_weight_that_is_transposed_where_it_is_has_another_norm(within: bool) -> None:
    """Its address, size and version stay. In fp32, since norm passes leave out fp64."""
    stock, fast = pair()
    for model in (stock, fast):
        model.float()
        weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 25.0)
        layer_of(model, "attention.v").base_layer.weight.data = weight
    for seed in range(3):
        assert_close(stock, fast, seed)
    for model in (stock, fast):
        layer = layer_of(model, "attention.v")
        if within:
            attention_of(model).between = lambda _, x, layer=layer: (transpose(layer), x)[1]
        else:
            transpose(layer)
    for seed in range(3, 6):
        assert_close(stock, fast, seed)


def assert_close(stock: nn.Module, fast: nn.Module, seed: int) -> None:
    with torch.no_grad():
        x = x_of(seed).to(next(stock.parameters()).dtype)
        assert relative(fast(x), stock(x)) <= (1e-5 if x.dtype is torch.float32 else 2e-2)


def test_conversions_of_the_whole_model_are_seen() -> None:
    stock, fast = pair()
    for kind in ("float", "bfloat16", "float", "half", "float", "bfloat16", "half", "bfloat16"):
        for model in (stock, fast):
            getattr(model, kind)()
        for seed in range(2):
            assert_close(stock, fast, seed)


def test_a_shallow_copy_of_a_layer_is_another_layer() -> None:
    stock, fast = pair()
    for seed in range(2):
        assert_step(stock, fast, seed)
    results = []
    for model in (stock, fast):
        layer = layer_of(model, "attention.q")
        other = copy.copy(layer)
        other.scaling = {"default": 7.0}
        with torch.no_grad():
            results += [other(x_of()), layer(x_of()), other(x_of()), layer(x_of())]
    for one, exact in zip(results[4:], results[:4], strict=True):
        assert relative(one, exact) <= 1e-10
    assert_step(stock, fast, 3)


def gather_again(model: nn.Module, factor: float = 1.0) -> list[torch.Tensor]:
    """Put all parameters, scaled by ``factor``, into other memory, as FSDP2 does before each call of a block.

    What is returned holds the memory where they were.
    """
    kept = []
    for parameter in model.parameters():
        values, storage = parameter.detach() * factor, parameter.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        storage.resize_(0)
        kept.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
        while storage.data_ptr() == address:
            storage.resize_(0)
            kept.append(torch.empty(size, dtype=torch.uint8))
            storage.resize_(size)
        with torch.autograd._unsafe_preserve_version_counter(parameter):  # type: ignore[attr-defined]
            parameter.data.copy_(values)
    return kept


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters of all examinations."""
    seen: list[str] = []
    own = examine.examine
    monkeypatch.setattr(examine, "examine", lambda module, adapter: (seen.append(adapter), own(module, adapter))[1])
    return seen


def test_parameters_that_are_gathered_into_other_memory_are_not_examined_again(examined: list[str]) -> None:
    stock, fast = pair()
    for seed in range(3):
        assert_step(stock, fast, seed)
    examined.clear()
    for seed in range(3, 6):
        kept = gather_again(fast)
        x_of(0).requires_grad_().register_hook(lambda gradient: None)  # as FSDP2 makes such in every call
        assert_step(stock, fast, seed)
        del kept
    assert examined == []
    for model in (stock, fast):
        new_data(layer_of(model, "middle"))
        replace_adapter(layer_of(model, "attention.k"))
    gather_again(fast)
    assert_step(stock, fast, 6)
    assert len(examined) > 0, "another parameter is examined"


@pytest.mark.parametrize("place", ["attention.k", "attention.v", "middle", "mlp.one", "mlp.out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_that_are_gathered_within_a_call_are_read_anew(place: str, dtype: torch.dtype) -> None:
    """Neither an output of a group that waits for its layer nor a norm that does was computed from them."""
    stock, fast = pair()
    kept: list[list[torch.Tensor]] = []
    bound = 1e-5 if dtype is torch.float32 else 1e-10
    for model in (stock, fast):
        model.to(dtype)
    for seed in range(7):
        for training in (True,) if seed < 3 else (False, True):
            with torch.set_grad_enabled(training):
                x = x_of(seed).to(dtype)
                wanted, found = stock(x), fast(x)
            assert relative(found, wanted) <= bound, (seed, training)
            if training:
                found.square().sum().backward()
        if seed == 2:
            for model in (stock, fast):
                base = layer_of(model, place).base_layer
                attention_of(model).between = lambda _, x, base=base: (kept.append(gather_again(base, 1.3)), x)[1]


@pytest.mark.parametrize("place", ["attention.q", "attention.k", "middle", "mlp.two", "mlp.out"])
@pytest.mark.parametrize("of", ["base_layer", "lora_A.default", "lora_B.default", "lora_magnitude_vector.default"])
def test_a_recompute_reads_other_parameters_of_the_same_storage(place: str, of: str) -> None:
    """The storage tells nothing then: where each begins in it does."""
    stock, fast = pair()
    held = []
    for model in (stock, fast):
        model.float()
        parameter = layer_of(model, place).get_submodule(of).weight
        held.append((parameter, torch.stack([parameter.detach(), 0.3 * parameter.detach() + 0.2])))
    for seed in range(4):
        gradients = []
        for model, (parameter, rows) in zip((stock, fast), held, strict=True):
            parameter.data = rows[0]
            x = x_of(seed).float().requires_grad_()
            y = checkpoint(model, x, use_reentrant=False)
            parameter.data = rows[1]
            y.square().sum().backward()
            gradients.append(x.grad)
        assert relative(gradients[1], gradients[0]) <= 1e-4, seed


def hook_base(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda *args: 1.1 * args[-1])


def hook_adapter(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda *args: 1.1 * args[-1])


@pytest.mark.parametrize("change", [*CHANGES, hook_base, hook_adapter])
@pytest.mark.parametrize("place", ["attention.k", "mlp.two"])
def test_a_checkpoint_saves_the_same_after_a_later_layer_of_a_group_has_changed(change: Any, place: str) -> None:
    stock, fast = pair()
    run = lambda model, x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    for seed in range(3):
        assert_step(stock, fast, seed, run)
    for model in (stock, fast):
        change(layer_of(model, place))
    for seed in range(3, 6):
        assert_step(stock, fast, seed, run)


def test_a_layer_that_has_moved_is_checked_no_more_often_than_one_that_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 moves every layer before every call."""
    _, fast = pair()
    for seed in range(3):
        fast(x_of(seed))
    checks: list[None] = []
    own = Unchanged.holds
    counted = lambda *args, **named: (checks.append(None), own(*args, **named))[1]  # noqa: E731
    monkeypatch.setattr(Unchanged, "holds", counted)
    fast(x_of(3))
    usual = len(checks)
    assert usual >= 7
    kept = gather_again(fast)
    checks.clear()
    fast(x_of(4))
    assert len(checks) <= usual + 1, "of the first layer, which a norm pass asks once more"
    del kept


def test_a_recompute_takes_its_forwards_norm_wherever_its_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm pass computes each norm once, and the recompute finds the same storages with other addresses."""
    stock, fast = pair()
    for model in (stock, fast):
        model.float()
    for seed in range(3):
        checkpoint(fast, x_of(seed).float().requires_grad_(), use_reentrant=False).sum().backward()
    computed: list[None] = []
    for place in ("nn.norm_pass", "nn.norm_cache"):
        module = importlib.import_module(f"doratune.{place}")
        own = module.norm_and_gain_of
        counted = lambda *args, own=own: (computed.append(None), own(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, "norm_and_gain_of", counted)
    for moved in (False, True):
        stock.zero_grad()
        fast.zero_grad()
        x = [x_of(5).float().requires_grad_() for _ in range(2)]
        wanted = stock(x[0])
        wanted.square().sum().backward()
        computed.clear()
        y = checkpoint(fast, x[1], use_reentrant=False)
        once = len(computed)
        assert once == 7
        kept = gather_again(fast) if moved else []
        y.square().sum().backward()
        del kept
        assert len(computed) == once, moved
        assert relative(x[1].grad, x[0].grad) <= 1e-4
