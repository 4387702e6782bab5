"""On a real GPU the kernels of gated MLPs and of groups are right in bf16 as layers run them, by the operators: with
each activation, projections of different widths, over the memory of inputs. Equal inputs give equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from doratune.codegen.gpu import Gpu
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config
from doratune.nn import operators
from doratune.runtime.binding import bind
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return gpu_of(find_device("cuda"))


def drawn(op: str, tokens: int, case: str = "mixed", **values: object) -> tuple[KernelSpec, Tensors, float, Tensors]:
    dims = {"d_out": 1032, "rank": 24, "tokens": tokens, "dtype": "bf16", "adapter": "bf16", "gpu": "cpu"}
    spec = KernelSpec.create(op, **{**dims, **values})
    inputs, scaling = make_inputs(spec, tokens, case=case, device="cuda")
    return spec, inputs, scaling, definition(spec, inputs, scaling)


def each(tensors: Tensors, name: str) -> list[torch.Tensor]:
    """The tensors of a group's projections with this name; none if there are none."""
    return [tensors[f"{name}_{number}"] for number in (1, 2, 3) if f"{name}_{number}" in tensors]


def complaint(spec: KernelSpec, found: list[torch.Tensor], exact: Tensors) -> str | None:
    return worst_error(spec, dict(zip(exact, found, strict=True)), exact)[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 16), (500, 24), (500, 384), (700, 1)])
@pytest.mark.parametrize("case", ["mixed", "large_activations"])
def test_the_operators_of_a_gated_mlp_are_right(
    activation: str, biased: bool, tokens: int, rank: int, case: str
) -> None:
    flags = {"bias": biased, **({} if activation == "silu" else {activation: True})}
    spec, t, scaling, exact = drawn("compose_swiglu", tokens, case, rank=rank, **flags)
    common = [t[name] for name in ("h", "lora_B_gate", "lora_B_up", "g_gate", "g_up")]
    biases = (t.get("bias_gate"), t.get("bias_up"))
    out = operators.compose_swiglu(t["gate"], t["up"], *common, *biases, scaling, activation)
    assert complaint(spec, [out], exact) is None
    again = operators.compose_swiglu(t["gate"], t["up"], *common, *biases, scaling, activation)
    assert torch.equal(again, out)

    spec, t, scaling, exact = drawn("compose_swiglu_backward", tokens, case, rank=rank, magnitude="bf16", **flags)
    common = [t[name] for name in ("h", "lora_B_gate", "lora_B_up", "g_gate", "g_up", "norm_gate", "norm_up")]
    rest = (t.get("bias_gate"), t.get("bias_up"), scaling, activation, torch.bfloat16)
    results = operators.compose_swiglu_backward(t["dout"], t["gate"], t["up"], *common, *rest)
    assert complaint(spec, results, exact) is None
    gate, up = t["gate"].clone(), t["up"].clone()
    again = operators.compose_swiglu_backward_(t["dout"], gate, up, *common, *rest)
    assert all(map(torch.equal, again, results))
    assert (again[0].data_ptr(), again[1].data_ptr()) == (gate.data_ptr(), up.data_ptr())


@pytest.mark.parametrize("widths", [(1032, 264), (1032, 264, 520), (64, 64, 64), (37, 5, 90)])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 16), (500, 24), (500, 384)])
def test_the_operators_of_a_group_are_right(widths: tuple[int, ...], tokens: int, rank: int) -> None:
    dims: dict[str, Any] = {**dict(zip(("d_out", "d_out_2", "d_out_3"), widths, strict=False)), "rank": rank}
    for biased in (False, True):
        spec, t, scaling, exact = drawn("lora_compose_group", tokens, bias=biased, **dims)
        bases, b, g = (each(t, name) for name in ("base", "lora_B", "g"))
        ys = operators.lora_compose_group(bases, t["h"], b, g, each(t, "bias"), scaling)
        assert complaint(spec, ys, exact) is None
        again = operators.lora_compose_group(bases, t["h"], b, g, each(t, "bias"), scaling)
        assert all(map(torch.equal, again, ys))

    spec, t, scaling, exact = drawn("compose_backward_group", tokens, magnitude="fp32", **dims)
    dys, bases, b, g, norms = (each(t, name) for name in ("dy", "base", "lora_B", "g", "norm"))
    results = operators.compose_backward_group(dys, bases, t["h"], b, g, norms, scaling, torch.float32)
    assert complaint(spec, results, exact) is None
    copies = [base.clone() for base in bases]
    again = operators.compose_backward_group_(dys, copies, t["h"], b, g, norms, scaling, torch.float32)
    assert all(map(torch.equal, again, results))
    assert [dyg.data_ptr() for dyg in again[: len(widths)]] == [copy.data_ptr() for copy in copies]


CHUNKED = [variant for variant in VARIANTS if "resident" in variant.switches]


@pytest.mark.parametrize("variant", CHUNKED, ids=lambda v: f"{v.op}-{v.name}")
@pytest.mark.parametrize("rank", [40, 384])
def test_an_adapter_that_stays_resident_is_right(variant: Variant, rank: int, gpu: Gpu) -> None:
    spec, inputs, scaling, exact = drawn(variant.op, 500, rank=rank, gpu=gpu.slug)
    params = {"block_t": 32, "block_n": 32, "block_k": 32, "chunk": 128, "resident": 1}
    params |= {name: values[0] for name, values in variant.choices(spec, gpu).items() if name.startswith("reduce")}
    config = Config.create(variant.name, **params, num_warps=4, num_stages=2)
    if reason := check_config(spec, config, gpu):
        pytest.skip(reason)
    outputs = make_outputs(spec, 500, "cuda")
    bind(render(spec, config)).launch(*inputs.values(), *outputs.values(), scaling)
    assert worst_error(spec, outputs, exact)[1] is None
