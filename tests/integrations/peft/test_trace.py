"""Recording an accelerated model gives the graph that stock PEFT gives; doratune's own functions record the formula.

A forward pass or a training step is recorded at one number of tokens, and its graph is compared with the model at
another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import doratune
from doratune.nn import DoRALinear, LayerError
from doratune.nn.functional import dora_compose
from doratune.runtime.arguments import ArgumentError

TOKENS = torch.export.Dim("tokens", min=2)


pytestmark = pytest.mark.filterwarnings(
    "error:doratune", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"
)


def traced(model: Any, x: torch.Tensor) -> Any:
    return torch.jit.trace(model, (x,))


def exported(model: Any, x: torch.Tensor, strict: bool = False) -> Any:
    exported = torch.export.export(model, (x,), strict=strict, dynamic_shapes=[{0: TOKENS}])
    assert not any("doratune" in str(node.target) for node in exported.graph.nodes)
    return exported.module()


def proxied(model: Any, x: torch.Tensor) -> Any:
    return make_fx(model)(x)


RECORDERS: dict[str, Callable[..., Any]] = {"torch.jit.trace": traced, "torch.export": exported, "make_fx": proxied}


def parameters_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the PEFT drop-in -----------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """Two equal layers with DoRA, without PEFT's wrappers; the first is accelerated."""
    from .peft_models import Pair, twin, with_dora

    stock = with_dora(Pair())
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    return fast.base_model.model, stock.base_model.model


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_recorded_model_computes_what_stock_peft_records(recorder: str, train: bool, pair: tuple[Any, Any]) -> None:
    fast, stock = (model.train(train) for model in pair)
    x, other = torch.randn(5, 24), torch.randn(9, 24)
    graph, wanted = (RECORDERS[recorder](model, x) for model in (fast, stock))
    assert torch.equal(graph(other), wanted(other))
    torch.testing.assert_close(graph(other), fast(other))
    if recorder == "make_fx":  # holds copies of the parameters
        return
    graph(other).square().sum().backward()
    found = parameters_gradients(fast)
    fast.zero_grad()
    fast(other).square().sum().backward()
    torch.testing.assert_close(found, parameters_gradients(fast), rtol=1e-4, atol=1e-5)


def test_a_traced_training_step_drops_what_peft_drops() -> None:
    from .peft_models import Pair, twin, with_dora

    stock = with_dora(Pair(), lora_dropout=0.4).base_model.model
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x, other = torch.randn(5, 24), torch.randn(9, 24)
    results = []
    for model in (fast, stock):
        graph = torch.jit.trace(model, (x,), check_trace=False)
        torch.manual_seed(3)
        results.append(graph(other))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_model_with_fp32_adapters_is_traced_as_in_peft(dtype: torch.dtype) -> None:
    from .peft_models import Pair, twin, with_dora

    stock = with_dora(Pair().to(dtype)).base_model.model
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    x, other = (torch.randn(count, 24, dtype=dtype) for count in (5, 9))
    assert torch.equal(traced(fast, x)(other), traced(stock, x)(other))


def test_a_strict_export_is_right_too(pair: tuple[Any, Any]) -> None:
    fast, _ = pair
    other = torch.randn(9, 24)
    graph = exported(fast, torch.randn(5, 24), strict=True)
    torch.testing.assert_close(graph(other), fast(other))
    graph(other).square().sum().backward()
    assert {name.split(".")[1] for name in parameters_gradients(fast)} == {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }


@pytest.mark.parametrize("dynamo", [False, True], ids=["by trace", "by export"])
@pytest.mark.parametrize("kind", ["peft", "DoRALinear"])
def test_an_onnx_file_computes_what_the_model_does(dynamo: bool, kind: str, tmp_path: Path, request: Any) -> None:
    needed = ["onnx", "onnxruntime", *(["onnxscript"] if dynamo else [])]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed")
    import onnxruntime

    model = request.getfixturevalue("pair")[0].eval() if kind == "peft" else dora_linear_module().eval()
    x, other = torch.randn(5, 24), torch.randn(9, 24)
    dynamic = {"dynamic_shapes": [{0: TOKENS}]} if dynamo else {"dynamic_axes": {"x": {0: "tokens"}}}
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=dynamo, verbose=False, **dynamic)
    (y,) = onnxruntime.InferenceSession(file).run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(other).detach(), rtol=1e-4, atol=1e-5)


# ---- doratune's own functions and layer -----------------------------------------------------------------------------


def dora_linear_module(**settings: Any) -> DoRALinear:
    layer = DoRALinear(24, 40, 4, 8, **settings)
    with torch.no_grad():
        layer.adapter[1].normal_(std=0.2)
        layer.adapter[2].mul_(1.3)
        layer.base_layer.weight[3] = 0.0
        layer.adapter[1][3] = 0.0
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_recorded_dora_layer_has_the_layers_values_and_gradients(recorder: str, train: bool, bias: bool) -> None:
    layer = dora_linear_module(bias=bias).train(train)
    graph = RECORDERS[recorder](layer, torch.randn(5, 24))
    other = torch.randn(9, 24, requires_grad=True)
    y = graph(other)
    torch.testing.assert_close(y, layer(other))
    if recorder == "make_fx":
        return
    y.square().sum().backward()
    found, dx = parameters_gradients(layer), other.grad
    layer.zero_grad()
    other.grad = None
    layer(other).square().sum().backward()
    assert set(found) == {
        f"{name}.weight" for name in ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")
    }
    torch.testing.assert_close(found, parameters_gradients(layer), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx, other.grad, rtol=1e-4, atol=1e-5)


def test_make_fx_records_a_whole_training_step() -> None:
    layer = dora_linear_module()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def step(values: list[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = doratune.dora_linear(x, layer.base_layer.weight, *values, layer.scaling, layer.base_layer.bias)
        return torch.autograd.grad(y.square().sum(), values)

    x = torch.randn(5, 24)
    graph = make_fx(step)(list(layer.adapter), x)
    layer(x).square().sum().backward()
    wanted = [p.grad for name, p in layer.named_parameters() if name in names]
    torch.testing.assert_close(list(graph(list(layer.adapter), x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["linear", "delta", "given norm", "compose", "compose delta", "norm"])
def test_each_function_traces_to_its_formula(form: str, dtype: torch.dtype, autocast: bool) -> None:
    d_out, d_in, scaling = 40, 24, 0.7
    adapter_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias = torch.randn(d_out, d_in).to(dtype), torch.randn(d_out).to(dtype)
    a, b, m = (
        tensor.to(adapter_dtype) for tensor in (torch.randn(4, d_in), torch.randn(d_out, 4), torch.rand(d_out) + 0.5)
    )
    norm = doratune.weight_norm(weight, a, b, scaling)

    def layer(x: torch.Tensor) -> torch.Tensor:
        if form == "norm":
            return doratune.weight_norm(weight, a, b, scaling)
        if form == "linear":
            return doratune.dora_linear(x, weight, a, b, m, scaling, bias)
        if form == "delta":
            return doratune.dora_linear(x, weight, a, b, m, scaling, delta=True)
        if form == "given norm":
            return doratune.dora_linear(x, weight, a, b, m, scaling, bias, base=x @ weight.T + bias, norm=2.0 * norm)
        return dora_compose(x @ weight.T + bias, x, a, b, m, scaling, bias, norm=norm, delta=form == "compose delta")

    x, other = torch.randn(5, d_in).to(dtype), torch.randn(3, 7, d_in).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, wanted = torch.jit.trace(layer, (x,))(x), layer(x)
    low = torch.bfloat16 in (dtype, wanted.dtype) or autocast
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(y, wanted, rtol=2e-2 if low else 1e-5, atol=5e-2 if low else 1e-5)
    if not autocast and form != "norm":  # another number of leading dimensions, too
        y, wanted = torch.jit.trace(layer, (torch.randn(2, 5, d_in).to(dtype),))(other), layer(other)
        torch.testing.assert_close(y, wanted, rtol=2e-2 if low else 1e-5, atol=5e-2 if low else 1e-5)


# ---- what cannot be recorded says so --------------------------------------------------------------------------------


def test_a_kernel_is_not_lost_from_a_traced_graph() -> None:
    kernel = doratune.load_kernel(
        "lora_compose", d_out=32, d_in=16, rank=4, tokens=8, dtype=torch.float32, device="cpu"
    )
    h, b, g = torch.randn(8, 4), torch.randn(32, 4), torch.rand(32)

    def call(base: torch.Tensor) -> Any:
        return kernel(base, h, b, g, scaling=0.5)

    base = torch.randn(8, 32)
    call(base)
    for record in (lambda: torch.jit.trace(call, (base,)), lambda: make_fx(call)(base)):
        with pytest.raises(
            ArgumentError, match=r"torch\.jit\.trace and make_fx cannot record the launch.*doratune\.dora_linear"
        ):
            record()


def test_scripting_and_symbolic_tracing_name_what_to_do_instead() -> None:
    layer = dora_linear_module()
    with pytest.raises(LayerError, match=r"torch\.jit\.script cannot.*to_linear"):
        torch.jit.script(nn.Sequential(layer))
    with pytest.raises(LayerError, match=r"symbolic_trace cannot.*to_linear"):
        torch.fx.symbolic_trace(layer)
    plain = layer.eval().to_linear()
    x = torch.randn(3, 24)
    torch.testing.assert_close(torch.jit.script(plain)(x), layer(x))
    with pytest.raises(ArgumentError, match=r"x must be a plain torch\.Tensor, got Proxy"):
        torch.fx.symbolic_trace(
            lambda x: doratune.dora_linear(
                x, layer.base_layer.weight.detach(), *map(torch.Tensor.detach, layer.adapter), 1.0
            )
        )
