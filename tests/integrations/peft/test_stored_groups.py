"""Quantised layers that read the same x run together, and a 4-bit layer's products need no graph of its own: values and
gradients are those of the way through PEFT, and every change between two layers of a group takes effect.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.integrations.peft import four_bits as four_bits_module
from doratune.integrations.peft import stored_place
from doratune.integrations.peft.base_layers import BNB_4BIT, BNB_8BIT, HQQ, TORCHAO
from doratune.integrations.peft.first_step import group_kernels_of
from doratune.integrations.peft.four_bits import FourBits
from doratune.integrations.peft.sources import source_of
from doratune.nn import kernels
from doratune.nn.stored_plan import StoredPlan

from ...nn.layers import KernelOnPaper
from .peft_models import by_hqq, by_torchao, eight_bits, four_bits, gradients, relative, shake, with_dora
from .test_first_step import autocast
from .test_stored_calls import only_through_peft

KINDS = (BNB_4BIT, BNB_8BIT, HQQ, TORCHAO)
TARGETS = r".*(q|k|v|out|gate|up|down)"
WIDTH = 64


class Attention(nn.Module):
    """Three projections of one x, and what a test wants to happen between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, width, bias=False) for width in (64, 64, 128))
        self.out = nn.Linear(192, WIDTH, bias=False)
        self.between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0 if x.requires_grad else x
        q = self.q(x)
        other = self.between(x)
        k = self.k(other)
        return x + self.out(torch.cat([q * k, self.v(other)], dim=-1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((64, 128), (64, 128), (128, 64)))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()
        self.checkpoints: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpoints is None:
            return self.mlp(self.attention(x))  # type: ignore[no-any-return]
        x = x * 1.0
        return self.mlp(checkpoint(self.attention, x, use_reentrant=self.checkpoints))  # type: ignore[no-any-return]


def quantised(kind: str, dtype: torch.dtype) -> nn.Module:
    net = Net()
    if kind == TORCHAO:
        by_torchao(net.to(dtype), "Int8WeightOnlyConfig")
        return net
    for name, linear in [*net.named_modules()]:
        if not isinstance(linear, nn.Linear):
            continue
        if kind == BNB_4BIT:
            layer = four_bits(linear)
            layer.compute_dtype = dtype
        elif kind == BNB_8BIT:
            layer = eight_bits(linear)
        else:
            layer = by_hqq(linear, dtype, nbits=8, group_size=32)
        net.set_submodule(name, layer)
    if kind != HQQ:
        setattr(net, f"is_loaded_in_{kind[-5]}bit", True)
    return net


def model_of(kind: str = BNB_4BIT, dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None) -> Any:
    torch.manual_seed(0)
    model: Any = with_dora(quantised(kind, dtype), target_modules=TARGETS, r=4, autocast_adapter_dtype=False)
    shake(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter or dtype)
    doratune.accelerate(model, quiet=True, precompile=False)
    return model


def net_of(model: Any) -> Net:
    net: Net = model.base_model.model
    return net


def x_of(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(model: Any, x: torch.Tensor, backwards: int = 1) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of all parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    for index in range(backwards):
        y.float().square().mean().backward(retain_graph=index + 1 < backwards)
    assert x.grad is not None
    return {"y": y.detach().clone(), "x": x.grad, **{name: grad.clone() for name, grad in gradients(model).items()}}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        assert relative(value, wanted[name]) <= bound, name


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The number of layers of each call of a plan, and whether it computed the base products itself."""
    seen: list[tuple[int, bool]] = []
    compose = stored_place.compose_stored

    def noted(x: Any, plan: Any, *rest: Any) -> Any:
        seen.append((plan.count, bool(plan.sources)))
        return compose(x, plan, *rest)

    monkeypatch.setattr(stored_place, "compose_stored", noted)
    return seen


@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_read_one_x_run_together(kind: str, checkpoints: bool | None, ran: list[tuple[int, bool]]) -> None:
    model = model_of(kind)
    net_of(model).checkpoints = checkpoints
    with only_through_peft():
        wanted = step(model, x_of(1))
    for _ in range(3):
        ran.clear()
        assert_same(step(model, x_of(1)), wanted)
    attention, mlp = [(3, True), (1, True)], [(2, True), (1, True)]
    assert ran == [*attention, *mlp, *(attention if checkpoints is not None else [])]
    model.eval()
    with torch.no_grad():
        model(x_of(1))  # in the first of them an 8-bit layer packs its W anew
        ran.clear()
        y = model(x_of(1))
        assert ran == [*attention, *mlp]
        with only_through_peft():
            assert relative(y, model(x_of(1))) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_gives_its_gradients_twice(kind: str) -> None:
    model = model_of(kind)
    for _ in range(3):
        once = step(model, x_of(1))
    twice = step(model, x_of(1), backwards=2)
    assert torch.equal(twice.pop("y"), once.pop("y"))
    assert_same(twice, {name: 2.0 * value for name, value in once.items()}, bound=1e-6)


def test_a_first_step_with_checkpoints_saves_in_the_recompute_what_it_saved_before() -> None:
    """In its first call a 4-bit layer decides in which dtype it computes; the recompute finds that decided."""
    model = model_of()
    for layer in model.modules():
        if hasattr(layer, "compute_type_is_set"):
            layer.compute_type_is_set = False
    net_of(model).checkpoints = False
    found = step(model, x_of(1))
    with only_through_peft():
        assert_same(found, step(model, x_of(1)))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [BNB_4BIT, HQQ])
def test_under_autocast_a_layer_that_computes_in_its_dtype_needs_no_graph(
    kind: str, adapter: torch.dtype, given: torch.dtype, ran: list[tuple[int, bool]]
) -> None:
    """QLoRA's recipe has norms in fp32, so an fp32 x, and autocast to bf16."""
    model = model_of(kind, dtype=torch.bfloat16, adapter=adapter)
    with autocast(True):
        with only_through_peft():
            wanted = step(model, x_of(1, given))
        for _ in range(3):
            ran.clear()
            found = step(model, x_of(1, given))
    assert_same(found, wanted, bound=0.02)
    assert ran == [(3, True), (1, True), (2, True), (1, True)]


def test_a_layer_that_is_used_twice_in_a_call_computes_twice() -> None:
    model = model_of()
    attention = net_of(model).attention
    again = lambda x: x + 0.1 * attention.q(x)[..., :WIDTH]  # noqa: E731
    attention.between = again
    with only_through_peft():
        wanted = step(model, x_of(1))
    for _ in range(3):
        assert_same(step(model, x_of(1)), wanted)


def rescale(layer: Any) -> None:
    layer.set_scale("default", 3.0)


def replace_adapter(layer: Any) -> None:
    layer.lora_A["default"].weight = nn.Parameter(1.5 * layer.lora_A["default"].weight.detach())


def replace_module(layer: Any) -> None:
    layer.lora_B["default"] = copy.deepcopy(layer.lora_B["default"])
    layer.lora_B["default"].weight.data.mul_(0.5)


def write_adapter(layer: Any) -> None:
    layer.lora_B["default"].weight.mul_(0.5)


def lower_rank(layer: Any) -> None:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down.data, up.data = down.data[:3], up.data[:, :3]


def replace_scales(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state.state2  # of the scales themselves
    state.absmax = state.absmax * 3.0


def new_codes(layer: Any) -> None:
    weight = layer.base_layer.weight
    weight.data = weight.data.flip(0)


def write_codes(layer: Any) -> None:
    weight = layer.base_layer.weight
    weight.copy_(weight.flip(0))


def quantise_anew(layer: Any) -> None:
    torch.manual_seed(5)
    base = layer.base_layer
    base.weight = four_bits(nn.Linear(base.in_features, base.out_features, bias=False)).weight
    base.quant_state = base.weight.quant_state  # the layer holds it, too


def add_bias(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.full((layer.out_features,), 0.5), requires_grad=False)


def hook_base(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1.0)


def hook(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, y: y + 1.0)


def merge(layer: Any) -> None:
    layer.merge()


def disable(layer: Any) -> None:
    layer.enable_adapters(False)


CHANGES = [
    rescale, replace_adapter, replace_module, write_adapter, lower_rank, replace_scales, new_codes, write_codes,
    quantise_anew, add_bias, hook_base, hook, merge, disable,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:doratune leaves", "ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_a_later_layer_of_a_group_takes_effect(change: Callable[[Any], None], name: str) -> None:
    """The code between two layers makes it, after the first has computed the outputs of all."""
    fast, stock = model_of(), model_of()
    with torch.no_grad():
        for seed in range(3):
            y = fast(x_of(seed))
            with only_through_peft():
                assert relative(y, stock(x_of(seed))) <= 2e-5
        for model in (fast, stock):
            attention = net_of(model).attention

            def act(x: torch.Tensor, attention: Any = attention) -> torch.Tensor:
                attention.between = lambda x: x
                change(getattr(attention, name))
                return x

            attention.between = act
        for seed in range(3, 6):
            y = fast(x_of(seed))
            with only_through_peft():
                wanted = stock(x_of(seed))
            assert relative(y, wanted) <= 2e-5
            assert seed > 3 or relative(y, model_of()(x_of(seed))) > 2e-4, "the change is no change"


def codes_of(base: Any) -> torch.Tensor:
    """The packed codes of a layer of any package."""
    codes: torch.Tensor = base.W_q if hasattr(base, "W_q") else base.weight
    inner = getattr(codes, "tensor_impl", codes)
    return getattr(inner, "qdata", getattr(inner, "int_data", codes))  # type: ignore[no-any-return]


def write_any_codes(layer: Any) -> None:
    codes = codes_of(layer.base_layer)
    codes.copy_(codes.flip(0))


def replace_any_scales(layer: Any) -> None:
    base = layer.base_layer
    if hasattr(base, "meta"):
        base.meta["scale"] = base.meta["scale"] * 3.0
    elif hasattr(base, "state"):
        base.state.SCB = base.state.SCB * 3.0
    else:
        inner = getattr(base.weight, "tensor_impl", base.weight)
        inner.scale = inner.scale * 3.0


@pytest.mark.filterwarnings("ignore:doratune leaves")
@pytest.mark.parametrize(
    "change",
    [rescale, replace_adapter, write_adapter, write_any_codes, replace_any_scales, hook_base, hook, disable],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", [BNB_8BIT, HQQ, TORCHAO])
def test_changes_of_other_packages_layers_take_effect_at_once(
    kind: str, train: bool, change: Callable[[Any], None]
) -> None:
    fast, stock = model_of(kind).train(train), model_of(kind).train(train)

    def results(model: Any, seed: int) -> dict[str, torch.Tensor]:
        if train:
            return step(model, x_of(seed))
        with torch.no_grad():
            return {"y": model(x_of(seed))}

    for seed in range(6):
        if seed == 3:
            with torch.no_grad():
                for model in (fast, stock):
                    change(net_of(model).attention.k)
        found = results(fast, seed)
        with only_through_peft():
            wanted = results(stock, seed)
        assert_same(found, wanted, 1e-4)
        if seed == 3:
            assert relative(found["y"], results(model_of(kind).train(train), seed)["y"]) > 2e-4, "it is no change"


@pytest.mark.parametrize("written", [False, True])
def test_another_x_is_not_taken_for_the_first_ones(written: bool) -> None:
    model = model_of()
    attention = net_of(model).attention
    with torch.no_grad():
        for seed in range(3):
            model(x_of(seed))
        attention.between = (lambda x: x.mul_(2.0)) if written else (lambda x: 2.0 * x)
        y = model(x_of(3))
        with only_through_peft():
            assert relative(y, model(x_of(3))) <= 2e-5


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_group_does_not_keep_the_memory_of_a_w_that_a_layer_has_given_up(name: str) -> None:
    model = model_of()
    for seed in range(3):
        step(model, x_of(seed))
    layer: Any = getattr(net_of(model).attention, name)
    memory = weakref.ref(layer.base_layer.weight.untyped_storage())
    scales = weakref.ref(layer.base_layer.weight.quant_state.absmax)
    quantise_anew(layer)
    gc.collect()
    assert memory() is None
    assert scales() is None


class Noted(KernelOnPaper):
    """A kernel that is asked for before its launches: notes the sizes and dtypes of its operands in both cases."""

    fusion_pays = False

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.operands: list[list[tuple[torch.Size, torch.dtype]]] = []

    def note(self, tensors: Any) -> tuple[int, ...]:
        flat = [tensor if tensor.ndim == 1 else tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        self.operands.append([(tensor.shape, tensor.dtype) for tensor in flat])
        return ()

    alignments_of = note

    def launch(self, inputs: Any, outputs: Any, scaling: float | None = None) -> None:
        self.note((*inputs, *outputs))
        super().launch(inputs, outputs, scaling)


@pytest.mark.parametrize("train", [True, False])
def test_what_a_group_will_launch_is_known_once_it_is_seen(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dtype=torch.bfloat16).train(train)
    with torch.set_grad_enabled(train):
        model(x_of(1, torch.bfloat16).requires_grad_(train))
    made: dict[Any, Noted] = {}
    monkeypatch.setattr(kernels, "kernel_for", lambda *key: made.setdefault(key, Noted(kernels.spec_for(*key[:-1]))))
    assert [*group_kernels_of(model, 10, train=train)] == [], "a CPU launches none"
    assert len([*group_kernels_of(model, 10, train=train, device=torch.device("cuda"))]) == (9 if train else 2)
    asked = {key[:-1]: one.operands[:1] for key, one in made.items() if one.operands}
    made.clear()
    for seed in range(2):
        with torch.set_grad_enabled(train):
            y = model(x_of(seed, torch.bfloat16).requires_grad_(train))
            if train:
                y.float().sum().backward()
    launched = {key[:-1]: one.operands[:1] for key, one in made.items() if one.operands}
    alone = ("weight_norm", "weight_norm_group", "lora_compose", "compose_backward", "adapter_backward")
    assert asked == {key: operands for key, operands in launched.items() if key[0] not in alone}


@pytest.mark.parametrize("count", [1, 2])
def test_a_plan_says_which_kernels_it_launches(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dtype=torch.bfloat16)
    attention = net_of(model).attention
    step(model, x_of(1, torch.bfloat16))
    projections = [attention.q._doratune.known(), attention.k._doratune.known()][:count]
    made: dict[Any, Noted] = {}
    monkeypatch.setattr(kernels, "kernel_for", lambda *key: made.setdefault(key, Noted(kernels.spec_for(*key[:-1]))))
    plan = StoredPlan(projections)
    assert len([*plan.requests(10, torch.bfloat16, train=True)]) == 4
    asked = {key: one.operands for key, one in made.items()}
    made.clear()
    x = x_of(2, torch.bfloat16).requires_grad_()
    sum(y.float().sum() for y in stored_place.compose_stored(x, plan)).backward()  # type: ignore[union-attr]
    assert asked == {key: one.operands for key, one in made.items() if not key[0].startswith("weight_norm")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("known", [True, False], ids=["operator", "forward"])
def test_products_have_the_bits_of_the_layers_own(
    dtype: torch.dtype, nested: bool, bias: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nn4bit = pytest.importorskip("bitsandbytes").nn
    layer: Any = nn4bit.Linear4bit(128, 96, bias=bias, compute_dtype=dtype)
    given = {"quant_type": "nf4", "compress_statistics": nested, "module": layer, "requires_grad": False}
    layer.weight = nn4bit.Params4bit(torch.randn(96, 128), **given).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    layer(torch.randn(1, 128, dtype=dtype))
    if not known:
        monkeypatch.setattr(four_bits_module, "_is_known", lambda: False)
    source = FourBits(layer)
    assert [each for each in (torch.float32, torch.bfloat16) if source.takes(each)] == [dtype]
    for tokens in (1, 7):
        x = torch.randn(tokens, 128, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(source.product(x), layer(x))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        dy = torch.randn_like(y)
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], dy @ source.matrix(dtype))


SOURCED: dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]] = {
    "int8": lambda linear, dtype: eight_bits(linear),
    "int8, outliers": lambda linear, dtype: eight_bits(linear, threshold=1.5),
    "HQQ, 8 bits": lambda linear, dtype: by_hqq(linear, dtype, nbits=8, group_size=32),
    "HQQ, 4 bits": lambda linear, dtype: by_hqq(linear, dtype, nbits=4, group_size=16, axis=0),
    "torchao": lambda linear, dtype: torchao_layer(linear.to(dtype), "Int8WeightOnlyConfig"),
    "torchao, groups": lambda linear, dtype: torchao_layer(linear.to(dtype), "IntxWeightOnlyConfig"),
    "torchao, float8": lambda linear, dtype: torchao_layer(linear.to(dtype), "Float8WeightOnlyConfig"),
}


def torchao_layer(linear: nn.Linear, config: str) -> nn.Module:
    by_torchao(nn.ModuleList([linear]), config)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOURCED)
def test_a_source_has_the_products_of_its_layer_and_the_matrix_of_its_gradient(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = SOURCED[name](nn.Linear(64, 48, bias=False), dtype)
    layer(torch.randn(1, 64, dtype=dtype))
    source = source_of(layer, {"int8": BNB_8BIT, "HQQ": HQQ, "torchao": TORCHAO}[name.split(",")[0]])
    assert source is not None
    assert source.takes(dtype)
    for tokens in (1, 7):
        x = torch.randn(tokens, 64, dtype=dtype)
        with torch.no_grad():
            y = source.product(x)
            assert torch.equal(y, layer(x))
            assert y.is_contiguous()
            assert y.dtype is dtype
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        dy = torch.randn_like(out)
        dx = torch.autograd.grad(out, leaf, dy)[0]
        near = 1e-2 if dtype is torch.bfloat16 else 1e-6
        assert relative(dy @ source.matrix(dtype), dx) <= near
    with torch.autocast("cpu", torch.bfloat16):  # a layer that multiplies by W decoded returns autocast's dtype
        by_matrix = name.startswith("HQQ") or name == "torchao, float8"
        assert (source.multiplies_from is not None) == by_matrix
        assert source.takes(dtype) == by_matrix
        if by_matrix and dtype is torch.bfloat16:
            x = torch.randn(3, 64)
            with torch.no_grad():
                y = layer(x)
                assert y.dtype is dtype
                assert torch.equal(source.product(x.to(dtype)), y)


def test_an_8_bit_layer_has_no_source_before_its_first_call() -> None:
    layer = eight_bits(nn.Linear(64, 48))
    assert source_of(layer, BNB_8BIT) is None
    layer(torch.randn(1, 64))
    source = source_of(layer, BNB_8BIT)
    assert source is not None
    assert source.takes(torch.bfloat16)


def test_products_that_the_layer_computes_otherwise_are_left_to_it() -> None:
    model = model_of()
    layer = net_of(model).attention.q.base_layer
    model(x_of(1))
    assert four_bits_module._is_known() == (FourBits(layer).product.func is not type(layer).forward)
    layer.support_avx512bf16_for_cpu = True  # then it packs W anew in inference
    assert FourBits(layer).product.func is type(layer).forward


@pytest.mark.filterwarnings("ignore:doratune leaves")
def test_a_replaced_forward_pass_of_the_package_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with torch.no_grad():
        before = [model(x_of(1)) for _ in range(3)][-1]
        cls = type(net_of(model).attention.q.base_layer)
        own = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x: own(self, x) + 1.0)
        found = model(x_of(1))
        assert not torch.allclose(found, before)
        with only_through_peft():
            assert relative(found, model(x_of(1))) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_refuses_codes_that_were_written_after_the_forward_pass(kind: str) -> None:
    model = model_of(kind)
    for seed in range(3):
        step(model, x_of(seed))
    y = model(x_of(1).requires_grad_())
    with torch.no_grad():
        write_any_codes(net_of(model).attention.k)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
