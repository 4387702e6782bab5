"""Whatever a run of a model launches is on the list of what it can launch, which is made without weights or a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import doratune
from doratune.codegen.ops import APART_TOKENS, IN_PLACE_RANK, IN_PLACE_TOKENS
from doratune.codegen.spec import TOKEN_BUCKETS, KernelSpec
from doratune.codegen.weight_formats import parse_format
from doratune.integrations.peft.base_layers import BNB_4BIT, BNB_8BIT, HQQ, TORCHAO
from doratune.integrations.peft.first_step import accelerated_layers
from doratune.integrations.peft.reachable import COUNTS, reachable_specs
from doratune.integrations.peft.reachable_norms import stored_norm_requests
from doratune.nn import kernels
from doratune.nn.rehearsal import rehearsing
from doratune.runtime.absent import GPU as ABSENT_GPU
from doratune.runtime.absent import NO_FUSION_PAYS

from . import test_first_step
from .peft_models import VOCABULARY, Pair, gpt2, llama, with_dora
from .test_first_step import autocast, pair, step
from .test_quantised import quantised as quantised_pair

_a_gpu, launches, passes = test_first_step._a_gpu, test_first_step.launches, test_first_step.passes


def bf16_llama(**settings: Any) -> nn.Module:
    return with_dora(llama().to(torch.bfloat16), autocast_adapter_dtype=False, **settings)


def wide_llama(**settings: Any) -> nn.Module:
    return with_dora(llama().to(torch.bfloat16), **settings)


def two_biases() -> nn.Module:
    model = Pair(64, 128, 64).to(torch.bfloat16)
    model.second = nn.Linear(128, 64, dtype=torch.bfloat16)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "bf16": bf16_llama,
    "fp32 adapters": wide_llama,
    "biases": functools.partial(pair, wide=True),
    "fp32": functools.partial(pair, torch.float32),
    "two biases": lambda: with_dora(two_biases()),
    "gpt2": lambda **settings: with_dora(gpt2().to(torch.bfloat16), **settings),
}


@functools.cache
def reachable(name: str) -> frozenset[KernelSpec]:
    return frozenset(reachable_specs(_on_meta(MODELS[name]()), TOKEN_BUCKETS, COUNTS if name == "bf16" else (16,)))


def _on_meta(model: nn.Module) -> nn.Module:
    model = model.to("meta")
    doratune.accelerate(model, quiet=True, precompile=False)
    return model


@pytest.fixture
def allowed(name: str) -> frozenset[KernelSpec]:
    """Made before the fixtures after it replace kernels."""
    return reachable(name)


def train(model: nn.Module) -> None:
    for _ in range(3):  # groups form in the first step
        step(model.train(), 12, train=True)


def infer(model: nn.Module) -> None:
    for tokens in (1, 12, 30):
        step(model.eval(), tokens, train=False)


def generate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval().generate(torch.zeros(2, 12, dtype=torch.long), max_new_tokens=3, do_sample=False)


def without_grad_in_training(model: nn.Module) -> None:
    step(model.train(), 12, train=False)
    step(model, 12, train=False)


def in_inference_mode(model: nn.Module) -> None:
    for _ in range(2):
        with torch.inference_mode():
            model.eval()(input_ids=torch.randint(0, VOCABULARY, (1, 5)))


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(model)


def layers_of(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_variant"))


def hooked(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    train(model)
    infer(model)


def with_trained_biases(model: nn.Module) -> None:
    for layer in layers_of(model):
        if layer.get_base_layer().bias is not None:
            layer.get_base_layer().bias.requires_grad_(True)
    train(model)


def with_an_activation_that_is_watched(model: nn.Module) -> None:
    """Gate and up then run as a group instead of a gated MLP."""
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.act_fn.register_forward_hook(lambda *_: None)
    train(model)


def block_by_block(model: nn.Module) -> None:
    """A block that is called alone opens a norm pass of its own."""
    inner = model.base_model.model.model
    x = torch.randn(1, 7, 48, dtype=torch.bfloat16)
    positions = inner.rotary_emb(x, torch.arange(7)[None])
    with torch.no_grad():
        for block in inner.layers:
            for _ in range(3):
                block(x, position_embeddings=positions)


RUNS: list[tuple[str, str, Callable[[nn.Module], None], dict[str, Any]]] = [
    ("bf16", "trained", train, {}),
    ("bf16", "trained under autocast", train, {"autocast": True}),
    ("bf16", "in use", infer, {}),
    ("bf16", "generating", generate, {}),
    ("bf16", "without gradients in training", without_grad_in_training, {}),
    ("bf16", "in inference mode", in_inference_mode, {}),
    ("bf16", "with checkpoints", functools.partial(checkpointed, reentrant=False), {}),
    ("bf16", "with reentrant checkpoints", functools.partial(checkpointed, reentrant=True), {}),
    ("bf16", "with dropout", train, {"lora_dropout": 0.1}),
    ("bf16", "with hooks", hooked, {}),
    ("bf16", "with a watched activation", with_an_activation_that_is_watched, {}),
    ("bf16", "block by block", block_by_block, {}),
    ("bf16", "with tracked norms", train, {"reuse": "tracked"}),
    ("bf16", "without reuse", train, {"reuse": "off"}),
    ("fp32 adapters", "trained under autocast", train, {"autocast": True}),
    ("fp32 adapters", "trained", train, {}),
    ("fp32 adapters", "in use", infer, {}),
    ("fp32 adapters", "generating under autocast", generate, {"autocast": True}),
    ("fp32 adapters", "with dropout", train, {"lora_dropout": 0.1, "autocast": True}),
    ("biases", "trained", train, {}),
    ("biases", "trained under autocast", train, {"autocast": True}),
    ("biases", "with trained biases", with_trained_biases, {"autocast": True}),
    ("biases", "with hooks and trained biases", lambda m: (hooked(m), with_trained_biases(m)), {"autocast": True}),
    ("biases", "with dropout", train, {"lora_dropout": 0.1}),
    ("fp32", "trained", train, {}),
    ("fp32", "trained under autocast", train, {"autocast": True}),
    ("gpt2", "trained", train, {}),
    ("gpt2", "in use", infer, {"autocast": True}),
]


@pytest.mark.parametrize(("name", "how", "run", "settings"), RUNS, ids=[f"{name}, {how}" for name, how, *_ in RUNS])
def test_a_run_launches_nothing_that_is_not_on_the_list(
    name: str,
    how: str,
    run: Callable[[nn.Module], None],
    settings: dict[str, Any],
    allowed: frozenset[KernelSpec],
    launches: Any,
    passes: Any,
) -> None:
    settings = dict(settings)
    rounds, reuse = settings.pop("autocast", False), settings.pop("reuse", "auto")
    model = MODELS[name](**settings)
    doratune.accelerate(model, quiet=True, precompile=False, norm_reuse=reuse)
    with autocast(rounds):
        run(model)
    found = {replace(spec, gpu=ABSENT_GPU) for spec in {kernel.spec for kernel, _ in launches} | passes}
    assert found, "something is launched"
    assert sorted(map(str, found - allowed)) == [], how


MANY_RANKS = IN_PLACE_RANK + 8


@functools.cache
def _reachable_of_many_ranks() -> frozenset[KernelSpec]:
    return frozenset(reachable_specs(_on_meta(bf16_llama(r=MANY_RANKS)), TOKEN_BUCKETS, (16,)))


@pytest.fixture
def of_many_ranks(monkeypatch: pytest.MonkeyPatch) -> frozenset[KernelSpec]:
    """The list of a model of many ranks, whose few columns may be composed apart, too."""
    monkeypatch.setattr("doratune.codegen.ops.APART_COLUMNS", 16)
    return _reachable_of_many_ranks()


@pytest.mark.parametrize("tokens", [12, IN_PLACE_TOKENS + 1, APART_TOKENS + 1])
@pytest.mark.parametrize("specialises", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_layers_of_many_ranks_launch_other_kernels_with_more_tokens_and_all_are_on_the_list(
    tokens: int,
    specialises: bool,
    checkpoints: bool,
    of_many_ranks: frozenset[KernelSpec],
    launches: Any,
    passes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: kernel is not None and specialises)
    model = bf16_llama(r=MANY_RANKS)
    doratune.accelerate(model, quiet=True, precompile=False)
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for train in (True, True, True, False):
        step(model.train(train), tokens, train=train)
    found = {replace(spec, gpu=ABSENT_GPU) for spec in {kernel.spec for kernel, _ in launches} | passes}
    assert sorted(map(str, found - of_many_ranks)) == []
    ops = {spec.op for spec in found}
    assert ("swiglu_forward" in ops) == ("swiglu_backward" in ops) == (tokens > IN_PLACE_TOKENS)
    assert ("compose_swiglu_backward" in ops) == (tokens <= IN_PLACE_TOKENS)
    assert ("compose_backward_group" in ops) == (tokens <= APART_TOKENS or not specialises)


def _quantised(kind: str, **settings: Any) -> nn.Module:
    return quantised_pair(kind, torch.bfloat16, (64, 128, 64), **settings)


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "nf4 with nested scales": lambda: _quantised(BNB_4BIT, nested=True),
    "int8": lambda: _quantised(BNB_8BIT),
    "hqq": lambda: _quantised(HQQ),
    "torchao's int8": lambda: _quantised(TORCHAO),
}


@functools.cache
def _on_the_list_of(weight: str, adapter: torch.dtype) -> frozenset[KernelSpec]:
    wide = adapter is torch.float32
    model = with_dora(Pair(64, 128, 64).to(torch.bfloat16), autocast_adapter_dtype=wide)
    return frozenset(reachable_specs(_on_meta(model), TOKEN_BUCKETS, (16,), weight=weight))


@pytest.fixture
def listed(name: str) -> dict[torch.dtype, frozenset[KernelSpec]]:
    """By the dtype of the adapters; made before the fixtures after it replace kernels."""
    report = doratune.accelerate(with_dora(QUANTISED[name]()), quiet=True, precompile=False)
    weights = {layer.weight_format for layer in report.layers}
    if "" in weights:
        pytest.skip(f"no kernel reads it here: {report.layers[0].remark}")
    return {dtype: _on_the_list_of(*weights, dtype) for dtype in (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("wide", [True, False], ids=["fp32 adapters", "adapters as PEFT leaves them"])
@pytest.mark.parametrize("rounds", [True, False], ids=["autocast", "no autocast"])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_run_with_a_quantised_base_launches_nothing_that_is_not_on_the_list_of_its_format(
    name: str,
    rounds: bool,
    wide: bool,
    listed: dict[torch.dtype, frozenset[KernelSpec]],
    launches: Any,
    passes: Any,
) -> None:
    model = with_dora(QUANTISED[name](), autocast_adapter_dtype=wide)
    doratune.accelerate(model, quiet=True, precompile=False)
    with autocast(rounds):
        for layer in accelerated_layers(model):  # each alone, outside of a pass
            layer(torch.randn(12, layer.in_features, dtype=torch.bfloat16))
        for train in (True, True, False):
            with torch.set_grad_enabled(train):
                y = model.train(train)(torch.randn(12, 64, dtype=torch.bfloat16))
            if train:
                y.float().sum().backward()
    found = {replace(spec, gpu=ABSENT_GPU) for spec in {kernel.spec for kernel, _ in launches} | passes}
    readers = {spec.op for spec in found if spec.format is not None}
    assert readers - {"weight_dequantise"} == {"weight_norm", "weight_norm_group"}
    if rounds and "int8" not in name:
        assert "weight_dequantise" in readers
    adapter = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    assert sorted(map(str, found - listed[adapter])) == []


@pytest.mark.parametrize("name", QUANTISED)
def test_what_decoding_from_the_codes_launches_is_on_the_list(
    name: str,
    listed: dict[torch.dtype, frozenset[KernelSpec]],
    launches: Any,
    passes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @functools.cache
    def pays(*key: Any) -> Any:
        return kernels.kernel_for(*key) if isinstance(key[5], str) else None

    monkeypatch.setattr(kernels, "paying_kernel_for", pays)
    model = with_dora(QUANTISED[name](), autocast_adapter_dtype=False).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # PEFT makes them in fp32 beside HQQ's layers
    doratune.accelerate(model, quiet=True, precompile=False)
    with torch.no_grad():
        for tokens in (1, 1, 12):
            model(torch.randn(tokens, 64, dtype=torch.bfloat16))
    fused = {replace(kernel.spec, gpu=ABSENT_GPU) for kernel, _ in launches if kernel.spec.op == "dora_linear_forward"}
    assert {(spec.d_out, spec.tokens) for spec in fused} == (
        set() if name == "int8" else {(width, tokens) for width in (128, 64) for tokens in (1, 16)}
    )
    assert sorted(map(str, fused - listed[torch.bfloat16])) == []
    assert not [spec for spec in listed[torch.bfloat16] if spec.format and spec.tokens > 16]


def test_norms_of_codes_are_listed_for_every_number_of_layers() -> None:
    layers = [*accelerated_layers(_on_meta(bf16_llama()))]
    with rehearsing(NO_FUSION_PAYS):
        specs = [kernel.spec for kernel, _ in stored_norm_requests(layers, parse_format("nf4"))]
    groups = {(spec.widths, spec.layers) for spec in specs if spec.op == "weight_norm_group" and spec.d_in == 48}
    assert {count for widths, count in groups if widths == (48,)} == {1, 2, 4}, "q and o of two blocks"


def test_without_a_weight_format_no_norm_of_codes_is_listed() -> None:
    dense = {*reachable_specs(_on_meta(with_dora(Pair(64, 128, 64).to(torch.bfloat16))), TOKEN_BUCKETS, (16,))}
    assert not [spec for spec in dense if spec.format is not None]
    assert dense < _on_the_list_of("nf4.nested", torch.float32), "some layers may be left dense"


def test_the_list_names_fused_kernels_groups_and_every_number_of_layers(request: pytest.FixtureRequest) -> None:
    specs = reachable("bf16")
    by_op: dict[str, set[KernelSpec]] = {}
    for spec in specs:
        by_op.setdefault(spec.op, set()).add(spec)
    assert by_op.keys() == {
        "adapter_backward",
        "compose_backward",
        "compose_backward_group",
        "compose_swiglu",
        "compose_swiglu_backward",
        "dora_linear_forward",
        "lora_compose",
        "lora_compose_group",
        "weight_norm",
        "weight_norm_exact",
        "weight_norm_group",
    }
    groups = {spec.widths for spec in by_op["lora_compose_group"]}
    if request.config.getoption("--versions"):  # a model of an older transformers is not called: every group may form
        assert groups >= {(48, 24, 24), (80, 80)}
    else:
        assert groups == {(48, 24, 24), (80, 80)}
    assert {spec.layers for spec in by_op["weight_norm_group"] if spec.widths == (48,)} == {1, 2, 4}
    assert {spec.tokens for spec in by_op["lora_compose"]} == {*TOKEN_BUCKETS}
    assert {spec.save for spec in by_op["weight_norm"]} == {True, False}


def test_other_numbers_of_tokens_ask_for_the_same_kernels() -> None:
    many = reachable_specs(_on_meta(bf16_llama()), [512], counts=(500,))
    assert {*many} == {spec for spec in reachable("bf16") if spec.tokens in (0, 512)}


def test_a_model_that_cannot_be_called_gets_every_group_that_may_form() -> None:
    model = _on_meta(bf16_llama())
    model.base_model.model.model.embed_tokens.forward = lambda *_: 1 / 0  # type: ignore[method-assign]
    specs = reachable_specs(model, [16], counts=(16,))
    widths = {spec.widths for spec in specs if spec.op == "lora_compose_group"}
    assert widths >= {(48, 24), (48, 24, 24), (24, 24), (80, 80)}


@pytest.mark.parametrize(("name", "adapter"), [("bf16", "bf16"), ("fp32 adapters", "fp32")])
def test_what_coverage_looks_up_is_what_runs(name: str, adapter: str) -> None:
    pytest.importorskip("rich")
    from doratune.benchmarks.coverage import usual_specs
    from doratune.tuner.models import Model, Projection

    shapes = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
    projections = [Projection(name, *shape, True, 2) for name, shape in shapes.items()]
    shapes = {"gate_proj": (80, 48), "up_proj": (80, 48), "down_proj": (48, 80)}
    projections += [Projection(name, *shape, False, 2) for name, shape in shapes.items()]
    model = Model("tiny", "", 2, tuple(projections), activation="silu")
    usual = {*usual_specs(model, 8, adapter, ABSENT_GPU)}
    assert (
        sorted(
            map(str, {spec for spec in usual if not (spec.op == "lora_compose" and not spec.bias)} - reachable(name))
        )
        == []
    )
    assert {spec.op for spec in usual} == {spec.op for spec in reachable("bf16")} - {
        "weight_norm",
        "weight_norm_exact",
        "dora_linear_forward",
    }
