"""Compiled layers and models on a GPU: Inductor's kernels, CUDA graphs, and the operator for all norms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import doratune
from doratune.nn.functional import dora_linear
from doratune.nn.traced_pass import norms_and_gains

from ..nn.layers import CASES, assert_close, error, gradients, make_layer, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = ((256, 128), (256, 128), (256, 128), (96, 256), (1024, 128), (1024, 128), (40, 72))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(rank: int, adapter: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    return [
        (
            normal(d_out, d_in),
            normal(rank, d_in, dtype=adapter),
            normal(d_out, rank, dtype=adapter),
            normal(d_out, dtype=adapter),
        )
        for d_out, d_in in SHAPES
    ]


def norms_of(tensors: Sequence[tuple[torch.Tensor, ...]], scaling: float) -> torch.Tensor:
    columns = [list(column) for column in zip(*tensors, strict=True)]
    return norms_and_gains(*columns, [scaling] * len(tensors), torch.bfloat16)


def exact(tensors: Sequence[tuple[torch.Tensor, ...]], scaling: float) -> torch.Tensor:
    norms, gains = [], []
    for w, a, b, m in tensors:
        a, b = a.bfloat16().double(), b.bfloat16().double()
        norms.append((w.double() + scaling * b @ a).norm(dim=1))
        gains.append(m.double() / norms[-1])
    return torch.stack((torch.cat(norms), torch.cat(gains)))


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_the_norms_of_many_layers_are_each_layers_own(rank: int, adapter: torch.dtype) -> None:
    tensors = layers(rank, adapter)
    for scaling in (0.7, -1.3, 0.0):
        torch.testing.assert_close(norms_of(tensors, scaling).double(), exact(tensors, scaling), rtol=1e-5, atol=1e-12)


def test_a_captured_graph_of_norms_follows_the_weights() -> None:
    tensors = layers(16, torch.bfloat16)
    norms_of(tensors, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = norms_of(tensors, 0.5)
    for w, a, *_ in tensors:
        w.data.mul_(1.5)
        a.data.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(values.double(), exact(tensors, 0.5), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_every_term_and_gradient_by_inductor(case: str, autocast: bool) -> None:
    adapter = torch.float32 if autocast else torch.bfloat16
    layer = make_layer(
        case, dtype=torch.bfloat16, adapter=adapter, tokens=(2, 150), d_out=96, d_in=80, rank=8, device="cuda"
    )

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            return dora_linear(*tensors[:5], layer.scaling, tensors[5])

    y = torch.compile(function, fullgraph=True)(*layer.tensors.values())
    double = layer.double(torch.bfloat16)
    wanted = plain(double)
    assert error(y, wanted) <= 1.05 * 3**0.5 * error(wanted.to(torch.bfloat16), wanted)
    assert_close(gradients(y, layer), gradients(wanted, double), 6e-3, case)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_the_eager_one(mode: str) -> None:
    """By CUDA graphs, too: every replay computes the norms of the weights as they are then."""
    pytest.importorskip("peft")
    from ..integrations.peft.peft_models import llama, with_dora

    model: Any = with_dora(llama(2), r=4).cuda()
    doratune.accelerate(model, quiet=True)
    eager = copy.deepcopy(model)
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    ids = torch.randint(0, 96, (2, 40), device="cuda")
    losses: list[list[float]] = [[], []]
    for found, each, call in ((losses[0], model, compiled), (losses[1], eager, eager)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.02)
        for _ in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-3)
