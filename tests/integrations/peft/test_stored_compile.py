"""A compiled model on quantised layers is one graph, whose norms one operator computes from codes and scales; it
computes what the eager model does, also after changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import doratune
from doratune.integrations.peft.base_layers import BNB_4BIT, BNB_8BIT, TORCHAO

from ...nn.test_torch_compile import COMPILER, Graphs
from .peft_models import assert_same_gradients, relative, tokens, twin
from .test_stored_passes import (
    X,
    fast_pair,
    llama,
    new_adapters,
    rescale,
    write_codes,
    write_scales,
    write_unseen,
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def called(compiled: Any, model: Any, x: torch.Tensor) -> Any:
    """The output for x; skips versions of a package whose own layer is not one graph."""
    try:
        return compiled(x)
    except torch._dynamo.exc.Unsupported:
        torch._dynamo.reset()
        base = model.get_base_model().first.base_layer
        try:
            torch.compile(base, fullgraph=True, backend="eager")(x)
        except torch._dynamo.exc.Unsupported as reason:
            pytest.skip(f"a {type(base).__name__} alone is more than one graph: {reason}")
        raise


@pytest.mark.parametrize(("kind", "dropout"), [(BNB_4BIT, 0.0), (BNB_8BIT, 0.3), (TORCHAO, 0.0)])
def test_a_model_is_one_graph_with_one_operator_for_all_norms(kind: str, dropout: float) -> None:
    model, graphs = fast_pair(kind, lora_dropout=dropout), Graphs()
    model.train()
    eager = twin(model)
    doratune.accelerate(eager, quiet=True, precompile=False)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    outputs = []
    for run in (compiled, eager):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        y = called(run, model, x)
        y.square().sum().backward()
        outputs += [y, x.grad]
    counts = Counter(graphs.operators())
    assert counts["stored_norms_and_gains"] == 1
    assert counts["lora_compose"] == 2
    if not dropout:  # whose random numbers a graph may draw in another order
        assert relative(outputs[0], outputs[2]) < 1e-6
        assert relative(outputs[1], outputs[3]) < 1e-6
        assert_same_gradients(model, eager, 1e-4)


@pytest.mark.slow
def test_a_whole_model_with_checkpoints_computes_its_norms_once() -> None:
    model, ids, graphs = llama(lambda name: "mlp" in name, layers=1), tokens(), Graphs()
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(model.base_model.model, "_require_grads_hook"):
        model.base_model.model.disable_input_require_grads()
    eager = twin(model)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    got, wanted = (run(input_ids=ids, use_cache=False).logits for run in (compiled, eager))
    got.square().mean().backward()
    wanted.square().mean().backward()
    counts = Counter(graphs.operators())
    assert counts["stored_norms_and_gains"] == 1, "of the quantised half, and none in the recompute"
    assert counts["norms_and_gains"] == 1, "of the dense half"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert_same_gradients(model, eager, 1e-4)


def test_a_compiled_model_never_uses_an_old_norm() -> None:
    model = fast_pair()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        called(compiled, model, X)
        for change in (write_codes, write_scales, write_unseen, new_adapters, rescale):
            change(model)
            eager = twin(model)
            doratune.restore(eager)
            assert relative(compiled(X), eager(X)) < 1e-6, change.__name__


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same() -> None:
    model = fast_pair().train()
    eager = twin(model)
    y = called(torch.compile(model, fullgraph=True, backend="inductor"), model, X)
    y.square().sum().backward()
    wanted = eager(X)
    wanted.square().sum().backward()
    assert relative(y, wanted) < 1e-6
    assert_same_gradients(model, eager, 1e-4)
