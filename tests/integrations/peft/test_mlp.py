"""A gated MLP runs as one function with its down projection; where down does not fit, down runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.integrations.peft import gated

from .peft_models import assert_same_gradients, relative, twin, with_dora
from .test_projections import Mlp, Net, assert_step, pair, step, x_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``mlp`` for each MLP that ran as one function, ``gated`` for each whose down ran by itself."""
    seen: list[str] = []

    def spy(name: str) -> Callable[..., torch.Tensor]:
        run = getattr(gated, f"project_{name}")

        def spied(*arguments: Any) -> torch.Tensor:
            seen.append(name)
            return run(*arguments)  # type: ignore[no-any-return]

        return spied

    for name in ("mlp", "gated"):
        monkeypatch.setattr(gated, f"project_{name}", spy(name))
    return seen


def down_of(model: nn.Module) -> Any:
    return model.base_model.model.mlp.out  # type: ignore[union-attr]


def assert_right(stock: nn.Module, fast: nn.Module) -> None:
    for seed in range(2):
        assert_step(stock, fast, seed)
    with torch.no_grad():
        assert relative(fast(x_of()), stock(x_of())) <= 1e-12


def test_an_mlp_runs_as_one_function(calls: list[str]) -> None:
    stock, fast = pair()
    assert_right(stock, fast)
    assert calls == ["mlp"] * 3
    with torch.inference_mode():
        assert relative(fast(x_of()), stock(x_of())) <= 1e-12
    assert calls == ["mlp"] * 4


@pytest.mark.parametrize("settings", [{"rank_pattern": {"out": 3}}, {"alpha_pattern": {"out": 7}}])
def test_down_may_have_another_rank_or_scaling(settings: dict[str, Any], calls: list[str]) -> None:
    stock, fast = pair(**settings)
    assert_right(stock, fast)
    assert {*calls} == {"mlp"}


def hooked(model: nn.Module) -> None:
    down_of(model).register_forward_hook(lambda *args: args[2] * 2.0)


def hooked_before(model: nn.Module) -> None:
    down_of(model).register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def hooked_in_the_backward_pass(model: nn.Module) -> None:
    down_of(model).register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2.0,))


def hooked_inside(model: nn.Module) -> None:
    down_of(model).lora_A["default"].register_forward_hook(lambda *args: args[2] * 2.0)


def patched(model: nn.Module) -> None:
    run = down_of(model).forward
    down_of(model).forward = lambda x: run(x) * 2.0


def disabled(model: nn.Module) -> None:
    down_of(model).enable_adapters(False)


def merged(model: nn.Module) -> None:
    down_of(model).merge()


def with_a_trained_bias(model: nn.Module) -> None:
    down_of(model).base_layer.bias.requires_grad_(True)


def with_a_trained_weight(model: nn.Module) -> None:
    down_of(model).base_layer.weight.requires_grad_(True)


def with_two_adapters(model: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["out"], use_dora=True, init_lora_weights=False)
    model.add_adapter("second", config)
    model.double()
    down_of(model).set_adapter(["default", "second"])


def with_plain_lora(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["out"], init_lora_weights=False))
    model.double()
    down_of(model).set_adapter("second")


ALONE = [
    hooked,
    hooked_before,
    hooked_in_the_backward_pass,
    hooked_inside,
    patched,
    disabled,
    merged,
    with_a_trained_bias,
    with_a_trained_weight,
    with_two_adapters,
    with_plain_lora,
]


@pytest.mark.parametrize("change", ALONE)
@pytest.mark.parametrize("before", [True, False], ids=["from the start", "after a step"])
def test_down_runs_by_itself_where_it_does_not_fit(
    change: Callable[[nn.Module], None], before: bool, calls: list[str]
) -> None:
    stock, fast = pair()
    if not before:
        assert_right(stock, fast)
        calls.clear()
    for model in (stock, fast):
        change(model)
    if change is with_a_trained_weight:
        for seed in range(2):
            assert relative(step(fast, x_of(seed)), step(stock, x_of(seed))) <= 1e-10
    elif change is merged:
        with torch.no_grad():
            assert relative(fast(x_of()), stock(x_of())) <= 1e-10
    else:
        assert_right(stock, fast)
    assert {*calls} == {"gated"}


def test_down_runs_as_one_function_again_when_what_kept_it_is_gone(calls: list[str]) -> None:
    stock, fast = pair()
    handles = [down_of(model).register_forward_hook(lambda *args: args[2] * 2.0) for model in (stock, fast)]
    assert_right(stock, fast)
    for handle in handles:
        handle.remove()
    calls.clear()
    assert_right(stock, fast)
    assert {*calls} == {"mlp"}


def test_a_down_without_an_adapter_runs_by_itself(calls: list[str]) -> None:
    torch.manual_seed(0)
    stock = with_dora(Net(Mlp(nn.GELU())), target_modules=r".*(one|two)").double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    assert_right(stock, fast)
    assert {*calls} == {"gated"}


def test_what_is_written_to_down_between_two_calls_takes_effect(calls: list[str]) -> None:
    stock, fast = pair()
    assert_right(stock, fast)
    for model in (stock, fast):
        with torch.no_grad():
            down_of(model).lora_A["default"].weight.mul_(1.5)
            down_of(model).base_layer.weight.mul_(0.5)
            down_of(model).lora_magnitude_vector["default"].weight.add_(0.25)
        down_of(model).set_scale("default", 1.5)
    assert_right(stock, fast)
    for model in (stock, fast):
        other = nn.Parameter(torch.randn_like(down_of(model).lora_B["default"].weight, dtype=torch.float64))
        other.data.copy_(torch.linspace(-1.0, 1.0, other.numel()).view_as(other))
        down_of(model).lora_B["default"].weight = other
    assert_right(stock, fast)
    assert {*calls} == {"mlp"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", ["none", "magnitudes", "down", "gate and up"])
def test_a_checkpoint_recomputes_an_mlp(reentrant: bool, frozen: str, calls: list[str]) -> None:
    stock, fast = pair()
    for model in (stock, fast):
        for name, parameter in model.named_parameters():
            of_down = ".out." in name
            if (
                (frozen == "magnitudes" and "magnitude" in name)
                or (frozen == "down" and of_down)
                or (frozen == "gate and up" and ".mlp." in name and not of_down)
            ):
                parameter.requires_grad_(False)

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    for seed in range(4):
        assert_step(stock, fast, seed, run)
    assert {*calls} == {"mlp"}


def test_dropout_keeps_down_apart_in_training_only(calls: list[str]) -> None:
    stock, fast = pair()
    for model in (stock, fast):
        down_of(model).lora_dropout["default"] = nn.Dropout(0.3)
    for _ in range(2):
        torch.manual_seed(2)
        got = step(fast, x_of())
        torch.manual_seed(2)
        assert relative(got, step(stock, x_of())) <= 1e-10
        assert_same_gradients(fast, stock, 1e-10)
    assert {*calls} == {"gated"}
    calls.clear()
    with torch.no_grad():
        assert relative(fast.eval()(x_of()), stock.eval()(x_of())) <= 1e-12
    assert calls == ["mlp"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16-bit x", "fp32 x"])
def test_autocast_with_fp32_adapters(dtype: torch.dtype, calls: list[str]) -> None:
    """fp32 adapters beside 16-bit weights: gradients of the adapter's dtype, as near to fp64 as PEFT's."""
    torch.manual_seed(0)
    stock = with_dora(Net().to(torch.bfloat16), target_modules=r".*(q|k|v|middle|one|two|out)")
    fast, exact = twin(stock), twin(stock).double()
    doratune.accelerate(fast, quiet=True)
    for seed in range(2):
        inputs = x_of(seed).to(torch.bfloat16)
        for model in (stock, fast, exact):
            model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [model(inputs.to(dtype).requires_grad_()) for model in (stock, fast)]
        outputs.append(exact(inputs.double()))
        for y in outputs:
            y.sum().backward()
        for (name, own), peft, wanted in zip(
            down_of(fast).named_parameters(), down_of(stock).parameters(), down_of(exact).parameters(), strict=True
        ):
            if own.requires_grad:
                assert own.grad is not None
                assert own.grad.dtype == own.dtype == torch.float32
                assert relative(own.grad, wanted.grad) <= 1.2 * relative(peft.grad, wanted.grad), name
    assert {*calls} == {"mlp"}


def test_autocast_rounds_an_fp32_x_of_an_mlp(calls: list[str]) -> None:
    torch.manual_seed(0)
    stock = with_dora(Net().to(torch.bfloat16), target_modules=r".*(q|k|v|middle|one|two|out)")
    fast, exact = twin(stock), twin(stock).double()
    doratune.accelerate(fast, quiet=True)
    x = x_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, other = fast.base_model.model.mlp(x), stock.base_model.model.mlp(x)  # type: ignore[union-attr,operator]
    wanted = exact.base_model.model.mlp(x.double())  # type: ignore[union-attr,operator]
    assert calls == ["mlp"]
    assert got.dtype is other.dtype is torch.bfloat16
    assert relative(got, wanted) <= 1.2 * relative(other, wanted)
