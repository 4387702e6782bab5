"""Layers that read one x run as one call, gated MLPs with their activation; whatever does not fit runs alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.nn import group
from doratune.nn.group_plan import Plan

from .peft_models import Pair, assert_same_gradients, llama, relative, tokens, twin, with_dora

WIDTH = 24


def nothing(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x


class Attention(nn.Module):
    """Three projections of one x, and what a test wants to happen between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in (16, 16, 24))
        self.between: Callable[[nn.Module, torch.Tensor], torch.Tensor] = nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0 if x.requires_grad else x
        q = self.q(x)
        other = self.between(self, x)
        k = self.k(other)
        return torch.cat([q * k, self.v(other)], dim=-1)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.function = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The form that is recognised."""
        wide = self.two(x)
        return self.out(self.function(self.one(x)) * wide)


class Turned(Mlp):
    def forward(self, x):  # type: ignore[no-untyped-def]
        gate = self.function(self.one(x))
        y = self.two(x) * gate
        return self.out(y)


class Clamped(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.function(self.one(x)).clamp(max=0.6) * self.two(x))


class Added(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.function(self.one(x)) + self.two(x))


class Twice(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.function(self.one(x)) * self.one(x)) + self.two(x)[..., :WIDTH]


class Shifted(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1.0
        return self.out(self.function(self.one(x)) * self.two(x))


class Net(nn.Module):
    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = Attention()
        self.middle = nn.Linear(40, WIDTH)
        self.mlp = Mlp(nn.SiLU()) if mlp is None else mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.tanh(self.middle(self.attention(x))))  # type: ignore[no-any-return]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The sizes of the groups that ran, and ``gated`` for a gated pair."""
    seen: list[int | str] = []
    run, gated = group._project, group._gated

    def spy(x: torch.Tensor, plan: Plan, *args: Any, **settings: Any) -> Any:
        seen.append(plan.count)
        return run(x, plan, *args, **settings)

    def spy_gated(*args: Any, **settings: Any) -> Any:
        seen.append("gated")
        return gated(*args, **settings)

    monkeypatch.setattr(group, "_project", spy)
    monkeypatch.setattr(group, "_gated", spy_gated)
    return seen


def pair(mlp: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A model that stock PEFT runs, and the same one accelerated, in fp64."""
    torch.manual_seed(0)
    stock = with_dora(Net(mlp), target_modules=r".*(q|k|v|middle|one|two|out)", **settings).double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    return stock, fast


def attention_of(model: nn.Module) -> Any:
    return model.base_model.model.attention  # type: ignore[union-attr]


def x_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """One training step without the optimizer; returns dX."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x) if run is None else run(model, x)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


def assert_step(stock: nn.Module, fast: nn.Module, seed: int = 0, run: Any = None) -> None:
    assert relative(step(fast, x_of(seed), run), step(stock, x_of(seed), run)) <= 1e-10
    assert_same_gradients(fast, stock, 1e-10)


def test_layers_that_read_one_x_become_one_call(calls: list[int | str]) -> None:
    stock, fast = pair()
    assert_step(stock, fast)
    assert calls == [1, 1, 1, 1, "gated", 1]
    for seed in (1, 2):
        calls.clear()
        assert_step(stock, fast, seed)
        assert calls == [3, 1, "gated", 1]
    calls.clear()
    with torch.no_grad():
        assert relative(fast(x_of()), stock(x_of())) <= 1e-12
    assert calls == [3, 1, "gated", 1]
    calls.clear()
    with torch.inference_mode():
        assert relative(fast(x_of()), stock(x_of())) <= 1e-12
    assert calls == [1, 1, 1, 1, "gated", 1], "writes to a tensor of inference mode are not seen"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_saves_the_same_before_and_after_groups_are_known(reentrant: bool, calls: list[int | str]) -> None:
    stock, fast = pair()

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    for seed in range(4):
        calls.clear()
        assert_step(stock, fast, seed, run)
    assert calls == [3, 1, "gated", 1] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_micro_batches_in_flight_while_groups_are_learned(reentrant: bool) -> None:
    stock, fast = pair()

    def steps(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        waiting = []
        grads = []
        for seed in range(6):
            x = x_of(seed).requires_grad_()
            waiting.append((x, checkpoint(model, x, use_reentrant=reentrant)))
            if len(waiting) == 3 or seed == 5:
                while len(waiting) > (0 if seed == 5 else 1):
                    x, y = waiting.pop(0)
                    y.square().sum().backward()
                    grads.append(x.grad)
        return grads  # type: ignore[return-value]

    for _ in range(2):
        for got, wanted in zip(steps(fast), steps(stock), strict=True):
            assert relative(got, wanted) <= 1e-10
        assert_same_gradients(fast, stock, 1e-10)


def other_tensor(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + 1.0


def written_x(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.data_ptr()
    return x.mul_(1.5) if not x.requires_grad else x * 1.5


def written_weight(module: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        module.k.lora_A["default"].weight.mul_(1.01)
        module.k.base_layer.weight.mul_(1.01)
    return x


def disabled(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.k.enable_adapters(False)
    return x


def hooked(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.k.lora_A["default"].register_forward_hook(lambda *_: None)
    return x


def rescaled(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.k.set_scale("default", 1.5)
    return x


def merged(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.k.merge()
    return x


def without_gradients(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.k.requires_grad_(False)
    return x.detach()


CHANGES = [other_tensor, written_x, disabled, hooked, rescaled, without_gradients]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_layers_of_a_group_takes_effect(change: Any) -> None:
    stock, fast = pair()
    for seed in range(2):
        assert_step(stock, fast, seed)
    for model in (stock, fast):
        attention_of(model).between = change
    for seed in range(2, 4):
        assert_step(stock, fast, seed)


@pytest.mark.parametrize("change", [written_weight, merged, written_x])
def test_what_is_written_between_two_layers_of_a_group_takes_effect(change: Any) -> None:
    stock, fast = pair()
    with torch.no_grad():
        for seed in range(2):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-12
        for model in (stock, fast):
            attention_of(model).between = change
        for seed in range(2, 4):
            assert relative(fast(x_of(seed)), stock(x_of(seed))) <= 1e-12


def test_an_output_that_nobody_asked_for_is_not_handed_out_later(calls: list[int | str]) -> None:
    stock, fast = pair()
    for _ in range(2):
        assert_step(stock, fast)
    own, other = attention_of(fast), attention_of(stock)
    x = x_of()
    with torch.no_grad():
        own.q(x)  # computes k and v too
        for layer in (own.k, own.v, other.k, other.v):
            layer.base_layer.weight.data.mul_(2.0)  # PyTorch does not see this write
        own.q(x)
        assert relative(own.k(x), other.k(x)) <= 1e-12
        assert relative(own.v(x), other.v(x)) <= 1e-12
        assert relative(own.v(x), other.v(x)) <= 1e-12  # a second time: alone


@pytest.mark.parametrize("settings", [{"rank_pattern": {"q": 4, "one": 4}}, {"alpha_pattern": {"k": 5, "two": 3}}, {}])
def test_layers_that_are_not_alike_run_alone(settings: dict[str, Any], calls: list[int | str]) -> None:
    torch.manual_seed(0)
    net = Net()
    if not settings:
        net.attention.v.bias = net.mlp.two.bias = None  # type: ignore[union-attr]
    stock = with_dora(net, target_modules=r".*(q|k|v|middle|one|two|out)", **settings).double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    for seed in range(3):
        assert_step(stock, fast, seed)
    assert set(calls) == {1}


@pytest.mark.parametrize("kind", [Mlp, Turned, Clamped, Added, Twice, Shifted])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Sigmoid()])
def test_mlps_of_every_form_are_right(kind: Any, act: nn.Module, calls: list[int | str]) -> None:
    stock, fast = pair(kind(act))
    for seed in range(3):
        calls.clear()
        assert_step(stock, fast, seed)
    known = kind in (Mlp, Turned) and not isinstance(act, nn.ReLU | nn.Sigmoid)
    assert ("gated" in calls) == known


def test_an_activation_with_parameters_or_hooks_keeps_its_own_forward(calls: list[int | str]) -> None:
    stock, fast = pair()
    for model in (stock, fast):
        model.base_model.model.mlp.function.register_forward_hook(lambda *args: 2.0 * args[2])  # type: ignore[union-attr]
    assert_step(stock, fast)
    assert "gated" not in calls
    stock, fast = pair(Mlp(nn.PReLU()))
    assert_step(stock, fast)
    assert "gated" not in calls


def test_hooks_on_gated_layers_run(calls: list[int | str]) -> None:
    stock, fast = pair()
    for model in (stock, fast):
        model.base_model.model.mlp.one.register_forward_hook(lambda *args: args[2] + 1.0)  # type: ignore[union-attr]
    assert_step(stock, fast)
    assert "gated" not in calls


def test_hooks_on_a_layer_of_a_group_run() -> None:
    stock, fast = pair()
    for model in (stock, fast):
        attention_of(model).v.register_forward_hook(lambda *args: args[2] * 2.0)
        attention_of(model).k.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    for seed in range(3):
        assert_step(stock, fast, seed)


def test_adapters_change_after_groups_are_known() -> None:
    stock, fast = pair()
    for _ in range(2):
        assert_step(stock, fast)
    for model in (stock, fast):
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["k", "one"], use_dora=True, init_lora_weights=False)
        model.add_adapter("second", config)  # type: ignore[operator]
        model.double()
        model.set_adapter("second")  # type: ignore[operator]
    assert_step(stock, fast)
    for model in (stock, fast):
        model.base_model.set_adapter(["default", "second"])  # type: ignore[union-attr,operator]
    assert_step(stock, fast)
    for model in (stock, fast):
        model.set_adapter("default")  # type: ignore[operator]
        model.merge_adapter()  # type: ignore[operator]
    with torch.no_grad():
        assert relative(fast(x_of()), stock(x_of())) <= 1e-10
    for model in (stock, fast):
        model.unmerge_adapter()  # type: ignore[operator]
    assert_step(stock, fast)
    with torch.no_grad(), stock.disable_adapter(), fast.disable_adapter():  # type: ignore[operator]
        assert relative(fast(x_of()), stock(x_of())) <= 1e-12


def test_dropout_runs_in_training_and_groups_in_inference(calls: list[int | str]) -> None:
    stock, fast = pair(lora_dropout=0.3)
    for _ in range(2):
        torch.manual_seed(2)
        got = step(fast, x_of())
        torch.manual_seed(2)
        assert relative(got, step(stock, x_of())) <= 1e-10
    assert calls == []
    for model in (stock, fast):
        model.eval()
    with torch.no_grad():
        for _ in range(3):
            assert relative(fast(x_of()), stock(x_of())) <= 1e-12
    assert calls[-4:] == [3, 1, "gated", 1]


def test_copies_and_pickles_have_weights_of_their_own(calls: list[int | str]) -> None:
    stock, fast = pair()
    for _ in range(2):
        assert_step(stock, fast)
    memory = io.BytesIO()
    torch.save(fast, memory)
    memory.seek(0)
    for other in (copy.deepcopy(fast), torch.load(memory, weights_only=False), pickle.loads(pickle.dumps(fast))):
        changed = twin(stock)
        with torch.no_grad():
            for model in (other, changed):
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        for seed in range(3):
            calls.clear()
            assert_step(changed, other, seed)
        assert calls == [3, 1, "gated", 1]
        assert type(attention_of(other).q).__name__ == "Linear"
        assert isinstance(attention_of(other).q, PeftLinear)
    assert_step(stock, fast, 5)


def test_replicas_of_data_parallel_use_their_own_weights() -> None:
    _, fast = pair()
    for _ in range(2):
        step(fast, x_of())
    layer = attention_of(fast).q
    replica = layer._replicate_for_data_parallel()
    replica._modules = dict(layer._modules)
    base = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        base.weight.mul_(3.0)
    replica._modules["base_layer"] = base
    with torch.no_grad():
        wanted = copy.deepcopy(layer)
        wanted.base_layer.weight.mul_(3.0)
        assert relative(replica(x_of()), wanted(x_of())) <= 1e-12


def test_restore_gives_every_module_its_class_back() -> None:
    stock, fast = pair()
    for _ in range(2):
        step(fast, x_of())
    assert type(attention_of(fast).q) is not PeftLinear
    doratune.restore(fast)
    for own, other in zip(fast.modules(), stock.modules(), strict=True):
        assert type(own) is type(other)
        assert own.__dict__.keys() == other.__dict__.keys()
    assert_step(stock, fast)
    doratune.accelerate(fast, quiet=True)
    doratune.accelerate(fast, quiet=True)  # twice changes nothing
    assert_step(stock, fast)
    doratune.restore(fast)
    assert type(attention_of(fast).q) is PeftLinear


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model_trains_and_generates(checkpointing: bool, calls: list[int | str]) -> None:
    torch.manual_seed(0)
    stock = with_dora(llama(), target_modules="all-linear").double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    ids = tokens()
    for model in (stock, fast):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(3):
        for model in (stock, fast):
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert_same_gradients(fast, stock, 1e-9)
    assert {3, "gated"} <= {*calls[-12:]}
    for model in (stock, fast):
        model.eval()
    with torch.no_grad():
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(fast.generate(input_ids=ids, **settings), stock.generate(input_ids=ids, **settings))


def test_a_pair_of_layers_that_read_different_tensors_is_no_group(calls: list[int | str]) -> None:
    stock = with_dora(Pair()).double()
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    for seed in range(3):
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert relative(step(fast, x), step(stock, x)) <= 1e-10
    assert set(calls) == {1}


def test_autocast_rounds_as_peft_does(calls: list[int | str]) -> None:
    torch.manual_seed(0)
    stock = with_dora(Net().to(torch.bfloat16), target_modules=r".*(q|k|v|middle|one|two|out)")
    fast, exact = twin(stock), twin(stock).double()
    doratune.accelerate(fast, quiet=True)
    for seed in range(3):
        x = x_of(seed).to(torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, other = fast(x), stock(x)
        calls_now = list(calls)
        y.sum().backward()
        wanted = exact(x.detach().double())
        assert y.dtype == other.dtype
        assert relative(y, wanted) <= 1.1 * relative(other, wanted)
    assert calls_now[-4:] == [3, 1, "gated", 1]
