"""A pass costs the host no more operations and launches than PEFT's LoRA, and a bounded number of calls.

Small models wait for Python. Times depend on the machine, so what is bounded here are counts, with kernels that start
nothing in the place of the real ones: operations of PyTorch that are kernels on a GPU, launches, and calls of Python
and of C. A fix that needs more has to say so here.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import doratune
from doratune.nn import kernels, norm_pass

from .peft_models import by_hqq, by_torchao, in_eight_bits, in_four_bits, in_layers

LAYERS = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_KERNELS = {
    "view", "t", "transpose", "as_strided", "reshape", "select", "slice", "split", "unbind", "expand", "unsqueeze",
    "squeeze", "empty", "empty_like", "empty_strided", "narrow", "alias", "detach", "chunk", "permute", "linear",
    "matmul", "to", "contiguous", "resolve_conj", "resolve_neg", "result_type", "item", "_local_scalar_dense",
    "_unsafe_view", "view_as", "expand_as", "type_as", "flatten", "unflatten", "lift_fresh", "new_empty", "_to_copy",
    "clone", "numpy_T", "_reshape_alias", "zeros", "ones", "ones_like", "zeros_like", "new_zeros", "is_nonzero",
}  # fmt: skip
"""Operations that start no kernel, or whose kernel is counted as another operation."""


class Cost(NamedTuple):
    """Counts of one pass through a model: kernels of PyTorch, launches of doratune, calls of Python and of C."""

    operations: int
    launches: int
    calls: int


class Started:
    """In the place of every kernel: counts its launches."""

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float = 0.0) -> None:
        self.launches += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    kernel = Started()

    def values(group: Any, found: Any, rounded: torch.dtype) -> Any:
        norms = torch.empty(2, len(found.members), found.members[0].weight.shape[0])
        kernel.launch(found.tensors, norms)
        return norms[0], norms[1].unbind()

    monkeypatch.setattr(kernels, "kernel_for", lambda *key: kernel)
    monkeypatch.setattr(kernels, "paying_kernel_for", lambda *key: None)
    monkeypatch.setattr(norm_pass._Group, "_values", values)
    return kernel


def model_of(use_dora: bool, quantised: Callable[[nn.Module], None] | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64 if quantised else 32,
        intermediate_size=128 if quantised else 48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=use_dora, init_lora_weights=False)
    base = LlamaForCausalLM(config)
    if quantised is not None:
        quantised(base)
    model = get_peft_model(base, settings)
    if use_dora:
        doratune.accelerate(model, quiet=True)
    return model


IDS = torch.arange(8).view(1, 8)


def train(model: nn.Module) -> None:
    """A step, without the calls that ``model.train()`` makes whatever the adapter is."""
    model(input_ids=IDS, use_cache=False).logits.sum().backward()


def step(model: nn.Module) -> None:
    model.train()
    train(model)


def checkpointed(model: Any) -> None:
    if not model.is_gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model)


def inference(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)


def decode(model: Any) -> None:
    """One token, after those that the cache holds."""
    if model.training:
        model.eval()  # once for many tokens
    with torch.no_grad():
        if "cache" not in model.__dict__:
            model.cache = model(input_ids=IDS, use_cache=True).past_key_values
        model(input_ids=IDS[:, :1], past_key_values=model.cache, use_cache=True)


def cost(model: nn.Module, run: Callable[[Any], None], started: Started) -> Cost:
    for _ in range(4):  # groups are learned, memos filled
        run(model)
    started.launches = 0
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def compare(one: torch.Tensor, other: object) -> torch.Tensor:
        if not isinstance(other, int | float):
            raise AssertionError("a tensor is compared, by `None in tensors` for instance: 10 µs that no count shows")
        return one.eq(other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__eq__", compare)
        gc.collect()  # what tests before left would be finalised in the pass
        sys.setprofile(count)
        try:
            run(model)
        finally:
            sys.setprofile(None)
    launches = started.launches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run(model)
    names = [event.name for event in recorded.events() if event.name.startswith("aten::")]
    return Cost(sum(name[6:].rstrip("_") not in NO_KERNELS for name in names), launches, calls)


@pytest.mark.parametrize(
    ("run", "operations", "launches", "calls"),
    [
        (train, 0.84, 15, 1.36),
        (step, 0.84, 15, 1.17),
        (checkpointed, 0.79, 16, 1.02),
        (inference, 0.73, 6, 1.05),
        (decode, 0.73, 6, 0.94),
    ],
)
def test_a_pass_costs_the_host_no_more_than_peft_lora(
    run: Callable[[Any], None],
    operations: float,
    launches: int,
    calls: float,
    started: Started,
    request: pytest.FixtureRequest,
) -> None:
    """The bounds: kernels and calls as a part of PEFT LoRA's, launches of doratune for each block of the model."""
    lora, ours = cost(model_of(False), run, started), cost(model_of(True), run, started)
    assert lora.launches == 0
    assert ours.launches <= launches * LAYERS
    assert ours.operations + ours.launches <= operations * lora.operations
    others = 1.1 if request.config.getoption("--versions") else 1.0  # of other versions LoRA itself takes fewer
    assert ours.calls <= others * calls * lora.calls


# Of a 4-bit model, without the calls of model.train(), too.


def train_checkpointed(model: nn.Module) -> None:
    train(model)


def in_mode(model: Any, run: Callable[[Any], None]) -> nn.Module:
    """The model, ready for ``run``."""
    if run is train_checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(run in (train, train_checkpointed))  # type: ignore[no-any-return]


def infer(model: nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)


def decode_a_token(model: Any) -> None:
    """One more token, after those in the cache."""
    with torch.no_grad():
        if not hasattr(model, "held"):
            model.held = model(input_ids=IDS, use_cache=True).past_key_values
        model(input_ids=IDS[:, :1], use_cache=True, past_key_values=model.held)


COMPOSE, DIFFERENTIATE = 4, 4 + 2
"""Launches of each 4-bit block: q, k and v compose in one, gate and up in one, o and down alone. As many differentiate,
and of the two alone one more each makes dB and dm.
"""
DECODE = 7
"""Launches of each block that decode W: for dX, and in HQQ's layers for the base products, too."""
ALONE = 2 + 5
"""More of them where x has no graph, in the first block of a step without checkpoints: there q, k and v run alone."""
NO_DX = -3
"""There W of the three is not decoded for dX."""


@pytest.mark.parametrize(
    ("run", "blocks", "beside", "calls"),
    [
        (train, COMPOSE + DIFFERENTIATE + DECODE, ALONE + NO_DX, 0.84),
        (train_checkpointed, 2 * COMPOSE + DIFFERENTIATE + DECODE, 0, 0.95),
        (infer, COMPOSE, 0, 0.98),
        (decode_a_token, COMPOSE, 0, 0.98),
    ],
)
def test_a_pass_of_a_4_bit_model_costs_the_host_no_more_than_peft_lora(
    run: Callable[[Any], None],
    blocks: int,
    beside: int,
    calls: float,
    started: Started,
    request: pytest.FixtureRequest,
) -> None:
    """The bounds: launches of each block and beside, the norms of all layers of a shape in one; calls as above."""
    costs = []
    for dora in (False, True):
        costs.append(cost(in_mode(model_of(dora, in_four_bits), run), run, started))
    lora, ours = costs
    shapes = 4
    assert ours.launches == blocks * LAYERS + beside + shapes
    assert ours.operations <= lora.operations
    others = 1.15 if request.config.getoption("--versions") else 1.0  # bitsandbytes had no operator of the product
    assert ours.calls <= others * calls * lora.calls


BASES: dict[str, Callable[[nn.Module], None]] = {
    "int8": in_eight_bits,
    "int8, outliers": lambda model: in_eight_bits(model, threshold=6.0),
    "torchao": lambda model: by_torchao(model, "Int8WeightOnlyConfig"),
    "HQQ": lambda model: in_layers(model, lambda linear: by_hqq(linear, nbits=4, group_size=16, axis=1)),
}


@pytest.mark.parametrize(
    ("base", "step", "checkpointed", "inference"),
    [
        ("int8", 1.28, 1.12, 1.05),
        ("int8, outliers", 1.28, 1.12, 1.05),
        ("torchao", 1.43, 1.0, 1.14),
        ("HQQ", 0.62, 0.74, 0.5),
    ],
)
def test_a_pass_of_other_quantised_models_costs_the_host_little_more_than_peft_lora(
    base: str, step: float, checkpointed: float, inference: float, started: Started, request: pytest.FixtureRequest
) -> None:
    """Launches as of 4-bit models; their packages take the host fewer calls, of which ours are a larger part."""
    forward = COMPOSE + (DECODE if base == "HQQ" else 0)
    ways = [
        (train, forward + DIFFERENTIATE + DECODE, ALONE + NO_DX, step),
        (train_checkpointed, 2 * forward + DIFFERENTIATE + DECODE, 0, checkpointed),
        (infer, forward, 0, inference),
        (decode_a_token, forward, 0, inference),
    ]
    others = 1.15 if request.config.getoption("--versions") else 1.0
    shapes = 4
    for run, blocks, beside, calls in ways:
        lora, ours = (cost(in_mode(model_of(dora, BASES[base]), run), run, started) for dora in (False, True))
        assert ours.launches == blocks * LAYERS + beside + shapes
        assert ours.operations <= lora.operations
        assert ours.calls <= others * calls * lora.calls, run.__name__
