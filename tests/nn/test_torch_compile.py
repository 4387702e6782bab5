"""Under torch.compile a DoRA layer is one forward and one backward graph with doratune's operators, and computes the
same as without.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.nn import operators  # noqa: F401  registers them
from doratune.nn.compiled import composed_gated
from doratune.nn.functional import dora_compose, dora_linear, weight_norm
from doratune.nn.group import project_gated
from doratune.nn.group_plan import Plan, Projection
from doratune.nn.norm_cache import NormCache

from .layers import Layer, gradients, make_layer

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

FORMS: dict[str, Callable[[Layer], torch.Tensor]] = {
    "own, bias": lambda t: dora_linear(*t.args, t.bias),
    "given base": lambda t: dora_linear(*t.args, base=t.x @ t.weight.T, own_base=True),
    "given base, bias": lambda t: dora_linear(*t.args, t.bias, base=t.x @ t.weight.T + t.bias, own_base=True),
    "delta": lambda t: dora_linear(*t.args, delta=True),
    "foreign base": lambda t: foreign(t),
}


def foreign(layer: Layer) -> torch.Tensor:
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = weight_norm(weight, lora_a, lora_b, scaling)
    base = x @ weight.T + layer.bias
    return dora_compose(base, x, lora_a, lora_b, magnitude, scaling, layer.bias, norm=norm)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs it is given and runs them eagerly."""

    def __init__(self) -> None:
        self.made: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def keep(part: GraphModule, _: list[Any]) -> Callable[..., Any]:
            self.made.append(part)
            return part

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)  # type: ignore[no-any-return]

    def operators(self) -> list[str]:
        """doratune's operators in the graphs, in order."""
        names = [str(node.target) for graph in self.made for node in graph.graph.nodes if node.op == "call_function"]
        return [name.split(".")[1] for name in names if name.startswith("doratune.")]


def run(form: str, layer: Layer, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    names = list(layer.tensors)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return FORMS[form](Layer(dict(zip(names, tensors, strict=True)), layer.scaling, layer.dy))

    compiled = torch.compile(function, fullgraph=True, **options) if options else function
    y = compiled(*layer.tensors.values())
    return y, gradients(y, layer)


def assert_equal(form: str, make: Callable[[], Layer], **options: Any) -> None:
    (y, grads), (wanted, exact) = run(form, make(), **options), run(form, make())
    tight = y.dtype is torch.float32
    torch.testing.assert_close(y, wanted, **({"rtol": 1e-5, "atol": 1e-5} if tight else {"rtol": 0.02, "atol": 0.02}))
    for name, value in exact.items():
        bound = {"rtol": 1e-4, "atol": 1e-4} if tight else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(grads[name], value, **bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_are_one_graph_each_with_the_operators_in_it(form: str) -> None:
    graphs = Graphs()
    assert_equal(form, lambda: make_layer(dtype=torch.float32), backend=graphs)
    assert len(graphs.made) == 2, "one forward and one backward graph"
    if form == "foreign base":  # has its norm from weight_norm, and leaves W's part of dX to the base's own graph
        assert graphs.operators() == ["row_norm", "lora_compose", "compose_backward", "adapter_backward"]
    elif form == "own, bias":  # one operator for all of the forward, which keeps inner
        assert graphs.operators() == [
            "row_norm_and_gain",
            "dora_linear_forward",
            "compose_backward",
            "wide_product",
            "sum_of_products",
        ]
    else:
        backward = ["compose_backward", "adapter_backward", "sum_of_products"]
        assert graphs.operators() == ["row_norm_and_gain", "lora_compose", *backward]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("form", FORMS)
def test_inductor_computes_the_same(form: str) -> None:
    assert_equal(form, lambda: make_layer(dtype=torch.float32), backend="inductor")


@pytest.mark.parametrize("trained", [("magnitude",), ("x",), ("lora_A", "lora_B"), ("x", "magnitude", "bias")])
def test_frozen_tensors_compile_too(trained: tuple[str, ...]) -> None:
    assert_equal("own, bias", lambda: make_layer(dtype=torch.float32, trained=trained), backend="aot_eager")


def test_fp32_adapters_under_autocast_compile_to_one_graph() -> None:
    layer, again = (make_layer(dtype=torch.bfloat16, adapter=torch.float32) for _ in range(2))

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return dora_linear(x, *layer.args[1:], layer.bias)

    graphs = Graphs()
    y = torch.compile(function, fullgraph=True, backend=graphs)(layer.x)
    grads = gradients(y, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = dora_linear(*again.args, again.bias)
    assert torch.equal(y, wanted)
    for name, value in gradients(wanted, again).items():
        torch.testing.assert_close(grads[name], value, rtol=1e-2, atol=1e-2)
    assert graphs.operators() == [
        "row_norm_and_gain",
        "dora_linear_forward",
        "compose_backward",
        "wide_product",
        "sum_of_products",
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_under_checkpointing_and_changing_token_counts_compiles_without_a_break(bias: bool) -> None:
    torch.manual_seed(0)
    module = doratune.nn.DoRALinear(16, 24, 4, 8.0, bias=bias)
    with torch.no_grad():
        module.adapter[1].normal_()
    graphs = Graphs()
    compiled = torch.compile(
        lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, backend=graphs, dynamic=True
    )
    for tokens in (3, 7, 50):
        x = torch.randn(2, tokens, 16)
        y = compiled(x)
        module.zero_grad()
        y.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in module.adapter]  # type: ignore[union-attr]
        module.zero_grad()
        wanted = module(x)
        wanted.square().sum().backward()
        torch.testing.assert_close(y, wanted)
        for grad, parameter in zip(grads, module.adapter, strict=True):
            torch.testing.assert_close(grad, parameter.grad)
    assert {"dora_linear_forward", "compose_backward"} <= set(graphs.operators())


def test_a_compiled_training_step_learns_and_never_uses_an_old_norm() -> None:
    modules = []
    for compiles in (False, True):
        torch.manual_seed(0)
        module = doratune.nn.DoRALinear(16, 24, 4, 8.0, norm_reuse="tracked")
        optimizer = torch.optim.AdamW(module.adapter, lr=0.05)
        forward = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
        update = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        x, target = torch.randn(32, 16), torch.randn(32, 24)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (forward(x) - target).square().mean()
            loss.backward()
            update()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        modules.append(losses)
    torch.testing.assert_close(modules[0], modules[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["magnitude", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp64_magnitudes_and_norms_beside_others_compile(given: str, dtype: torch.dtype) -> None:
    """fp64 numbers, from which everything else follows in fp32: by Inductor, whose memory follows the operators."""
    layer = make_layer(dtype=dtype)
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = weight_norm(weight, lora_a, lora_b, scaling)
    if given == "norm":
        norm = norm.double()
    else:
        magnitude = magnitude.detach().double().requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        return dora_linear(x, weight, lora_a, lora_b, magnitude, scaling, norm=norm)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        magnitude.grad = None
        y = function(x)
        y.backward(layer.dy)
        assert magnitude.grad is not None
        results.append((y.detach(), magnitude.grad.clone()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def samples(name: str) -> list[tuple[Any, ...]]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    weight, lora_a, lora_b, g = tensor(24, 16), tensor(4, 16), tensor(24, 4), tensor(24)
    rows, h = tensor(5, 24), tensor(5, 4)
    gated = (rows, tensor(5, 24), tensor(5, 8), lora_b, tensor(24, 4), g, tensor(24))
    return {
        "row_norm": [(weight, lora_a, lora_b, given, 0.5) for given in (None, weight.square().sum(dim=1))],
        "row_norm_and_gain": [(weight, lora_a, lora_b, given, g, 0.5) for given in (None, weight.square().sum(dim=1))],
        "lora_compose": [
            (rows, h, lora_b, g, bias, 0.5, delta) for bias, delta in ((None, False), (None, True), (g, False))
        ],
        "dora_linear_forward": [
            (tensor(5, 16), weight, h, lora_b, g, bias, 0.5, save) for bias, save in ((None, False), (g, True))
        ],
        "compose_backward": [
            (rows.to(dtype), tensor(5, 24).to(dtype), gain, bias)
            for bias in (False, True)
            for dtype, gain in ((torch.float32, g), (torch.bfloat16, g), (torch.float64, g.double()))
        ],
        "adapter_backward": [
            (rows, h, lora_b, g, g, g.abs(), 0.5, adapter, magnitude)
            for adapter, magnitude in ((torch.float32, torch.float32), (torch.bfloat16, torch.float64))
        ],
        "compose_swiglu": [
            (*gated, bias, bias, 0.5, activation)
            for bias, activation in ((None, "silu"), (g, "gelu"), (None, "gelu_tanh"))
        ],
        "compose_swiglu_backward": [
            (tensor(5, 24), *gated, g.abs(), g.abs(), bias, bias, 0.5, activation, magnitude)
            for bias, activation, magnitude in ((None, "silu", torch.float32), (g, "gelu", torch.float64))
        ],
        "low_rank_linear": [(tensor(5, 16), weight, tensor(5, 8)[:, 4:], lora_b, 0.5)],
        "swiglu_forward": [(*gated[:2], *gated[5:], *[bias] * 2, "silu") for bias in (None, g)],
        "swiglu_backward": [
            (tensor(5, 24), *gated[:2], *gated[5:], g.abs(), g.abs(), bias, bias, activation, magnitude)
            for bias, activation, magnitude in ((None, "silu", torch.float32), (g, "gelu", torch.float64))
        ],
        "lora_compose_group": [
            (list(group), tensor(5, 4 * len(group)), [tensor(t.shape[1], 4) for t in group], gains, biases, 0.5)
            for group, gains in (
                ((rows, tensor(5, 16)), [g, tensor(16)]),
                ((rows, rows, tensor(5, 8)), [g, g, tensor(8)]),
            )
            for biases in ([], gains)
        ],
        "compose_backward_group": [
            (
                [tensor(5, 24), tensor(5, 16)],
                [tensor(5, 24), tensor(5, 16)],
                tensor(5, 8),
                [lora_b, tensor(16, 4)],
                [g, tensor(16)],
                [g.abs(), tensor(16).abs()],
                0.5,
                magnitude,
            )
            for magnitude in (torch.float32, torch.float64)
        ],
        "sum_of_products": [(rows, tensor(24, 16), h, tensor(4, 16))],
    }[name]


@pytest.mark.parametrize("trains", [True, False])
def test_a_traced_mlp_of_many_ranks_adds_its_products_in_place(trains: bool) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.1).bfloat16()

    parts = [
        Projection(normal(48, 40), normal(200, 40), normal(48, 200), 1.0 + normal(48), normal(48), 0.5, NormCache())
        for _ in range(2)
    ]
    x = normal(3, 50, 40)
    trained = [x, *[each for one in parts for each in one[1:4]]]
    for each in trained:
        each.requires_grad_(trains)
    graphs, results = Graphs(), []

    def traced(x: torch.Tensor) -> torch.Tensor:
        return composed_gated(x, *parts, "silu", torch.bfloat16)

    for run in (
        torch.compile(traced, fullgraph=True, backend=graphs),
        lambda x: project_gated(x, Plan(parts, "silu"), torch.bfloat16),
    ):
        y = run(x)
        grads = torch.autograd.grad(y.float().square().sum(), trained) if trains else ()
        results.append((y.detach(), *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) or float((one - other).norm() / other.norm()) < 2e-2
    counts = Counter(graphs.operators())
    assert counts["low_rank_linear"] == 2
    assert counts["swiglu_forward"] == 1
    assert counts["swiglu_backward"] == trains
    assert counts["compose_swiglu"] == 0


def test_the_graph_of_an_mlp_of_many_ranks_holds_for_any_number_of_tokens() -> None:
    """Eagerly few tokens run another kernel. A graph that asked for their number would break a range that was told."""

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.1).bfloat16()

    parts = [
        Projection(normal(48, 40), normal(200, 40), normal(48, 200), 1.0 + normal(48), normal(48), 0.5, NormCache())
        for _ in range(2)
    ]
    graphs = Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def traced(x: torch.Tensor) -> torch.Tensor:
        return composed_gated(x, *parts, "silu", torch.bfloat16)

    for tokens in (150, 20, 300):
        x = normal(tokens, 40)
        torch._dynamo.mark_dynamic(x, 0, min=16, max=512)
        wanted = project_gated(x, Plan(parts, "silu"), torch.bfloat16)
        assert float((traced(x) - wanted).norm() / wanted.norm()) < 2e-2
    assert Counter(graphs.operators())["swiglu_forward"] == 1, "one graph"


@pytest.mark.parametrize(
    "name",
    [
        "row_norm",
        "row_norm_and_gain",
        "lora_compose",
        "dora_linear_forward",
        "compose_backward",
        "adapter_backward",
        "compose_swiglu",
        "compose_swiglu_backward",
        "low_rank_linear",
        "swiglu_forward",
        "swiglu_backward",
        "lora_compose_group",
        "compose_backward_group",
        "sum_of_products",
    ],
)
def test_every_operator_passes_opcheck(name: str) -> None:
    for args in samples(name):
        torch.library.opcheck(getattr(torch.ops.doratune, name).default, args)
