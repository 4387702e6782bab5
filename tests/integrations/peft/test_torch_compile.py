"""A compiled PEFT model is one graph, with all its norms from one operator, and computes what the eager model does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.integrations.peft.variant import DoraVariant

from ...nn.test_torch_compile import Graphs
from .peft_models import Pair, assert_same_gradients, llama, tokens, twin, with_dora
from .test_projections import pair

LAYERS = 2
PROJECTIONS = 7 * LAYERS


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def accelerated(**settings: Any) -> Any:
    model = with_dora(llama(LAYERS), r=4, **settings)
    doratune.accelerate(model, quiet=True)
    return model.train()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def caches(model: Any) -> list[Any]:
    return [
        variant.norms
        for module in model.modules()
        for variant in getattr(module, "lora_variant", {}).values()
        if isinstance(variant, DoraVariant)
    ]


RECOMPUTES = find_spec("transformers.modeling_layers") is not None
"""Whether a graph of this transformers has the recompute of a checkpoint in it."""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_is_one_graph_with_one_operator_for_all_norms(checkpointing: bool, autocast: bool) -> None:
    model, ids = accelerated(), tokens()
    if autocast:
        model.base_model.model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        if hasattr(model.base_model.model, "_require_grads_hook"):
            model.base_model.model.disable_input_require_grads()  # transformers' hook for them has no graph
    eager, graphs = twin(model), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, wanted = logits(compiled, ids), logits(eager, ids)
    got.float().square().mean().backward()
    wanted.float().square().mean().backward()
    if not autocast:
        torch.testing.assert_close(got, wanted)
        assert_same_gradients(model, eager, 1e-4)
    else:
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    counts, passes = Counter(graphs.operators()), 2 if checkpointing and RECOMPUTES else 1
    assert counts["norms_and_gains"] == 1, "and a checkpoint's recompute computes no norm"
    assert counts["row_norm_and_gain"] == counts["row_norm"] == 0
    # The recompute leaves out an output that nothing reads again.
    assert (passes - 1) * (PROJECTIONS - 3 * LAYERS) < counts["lora_compose"] <= passes * (PROJECTIONS - 2 * LAYERS)
    assert counts["compose_swiglu"] == passes * LAYERS
    assert counts["compose_swiglu_backward"] == LAYERS
    assert all(norms.traced is None for norms in caches(model)), "the graph's values do not outlive it"


@pytest.mark.slow
def test_a_compiled_model_never_uses_an_old_norm() -> None:
    """Writes that PyTorch sees, that it does not see, and new tensors; with and without gradients."""
    model, ids = accelerated(), tokens()
    eager = twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    name = "base_model.model.model.layers.0.mlp.gate_proj"
    for change in ("none", "in place", "data", "W", "set"):
        for each in (model, eager):
            layer = each.get_submodule(name)
            with torch.no_grad():
                if change == "in place":
                    layer.lora_B["default"].weight.mul_(1.5)
                elif change == "data":
                    layer.lora_A["default"].weight.data.mul_(1.5)
                elif change == "W":
                    layer.base_layer.weight.data.mul_(0.5)
                elif change == "set":
                    layer.lora_B["default"].weight.data = 0.7 * layer.lora_B["default"].weight.data
        torch.testing.assert_close(logits(compiled, ids), logits(eager, ids), msg=lambda text: f"{change}: {text}")  # noqa: B023
        with torch.no_grad():
            torch.testing.assert_close(logits(compiled, ids), logits(eager, ids))


@pytest.mark.slow
def test_adapters_that_are_switched_off_merged_or_changed_are_so_in_the_compiled_model() -> None:
    model, ids = accelerated(), tokens()
    eager = twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (model, eager):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(compiled, ids), logits(eager, ids))
        with model.disable_adapter(), eager.disable_adapter():
            torch.testing.assert_close(logits(compiled, ids), logits(eager, ids))
        for each in (model, eager):
            each.merge_adapter()
        torch.testing.assert_close(logits(compiled, ids), logits(eager, ids))
        for each in (model, eager):
            each.unmerge_adapter()
        torch.testing.assert_close(logits(compiled, ids), logits(eager, ids), rtol=1e-4, atol=1e-5)


def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    model, ids = with_dora(llama(4), r=4), tokens()
    doratune.accelerate(model, quiet=True)
    eager, counter = twin(model), CompileCounter()
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        got, wanted = logits(model, ids), logits(eager, ids)
        torch.testing.assert_close(got, wanted)
    got.square().mean().backward()
    wanted.square().mean().backward()
    assert_same_gradients(model, eager, 1e-4)
    assert counter.frame_count <= 2, "the first block's input needs no gradient; the others are alike"


@pytest.mark.slow
def test_another_number_of_tokens_compiles_once_more_and_then_never() -> None:
    model, counter = accelerated(), CompileCounter()
    eager = twin(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for count in (5, 9, 17, 31):
        ids = torch.randint(0, 96, (2, count))
        torch.testing.assert_close(logits(compiled, ids), logits(eager, ids))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0] + 1, "one graph more, for any length"
    assert graphs[1:] == graphs[1:2] * 3


def test_a_layer_is_right_in_a_graph_that_has_no_norm_pass() -> None:
    """Only a part of the model is compiled, or a layer is called more often than the pass provides for."""
    model = with_dora(Pair())
    doratune.accelerate(model, quiet=True)
    x = torch.randn(5, 24)

    def function(x: torch.Tensor) -> torch.Tensor:
        first = model.base_model.model.first
        return first(x) + checkpoint(first, 2 * x, use_reentrant=False)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_tokens_pass_through_a_compiled_gated_mlp(backend: str) -> None:
    _, fast = pair()
    mlp = fast.base_model.model.mlp  # type: ignore[union-attr]
    x = torch.zeros(2, 0, 24, dtype=torch.float64, requires_grad=True)
    y = torch.compile(mlp, backend=backend, fullgraph=True)(x)
    assert y.shape == (2, 0, 24)
    y.sum().backward()
    assert x.grad is not None
    assert not any(parameter.grad.any() for parameter in mlp.parameters() if parameter.grad is not None)
