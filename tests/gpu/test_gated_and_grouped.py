"""On a real GPU the kernels of gated MLPs and of groups are right in bf16 as layers run them, by the operators: with
each activation, projections of different widths, over the memory of inputs. Equal inputs give equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from doratune.codegen.gpu import Gpu
from doratune.codegen.ops import APART_COLUMNS, APART_TOKENS, IN_PLACE_RANK
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config
from doratune.nn import group_plan, kernels, operators
from doratune.nn.group import project, project_mlp
from doratune.nn.group_plan import Plan, Projection
from doratune.nn.norm_cache import NormCache
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 500, 3000])
@pytest.mark.parametrize("case", ["mixed", "large_activations"])
def test_the_operators_of_a_gated_mlp_that_is_composed_already_are_right(
    activation: str, biased: bool, tokens: int, case: str
) -> None:
    flags = {"bias": biased, **({} if activation == "silu" else {activation: True})}
    spec, t, _, exact = drawn("swiglu_forward", tokens, case, **flags)
    given = (t["gate"], t["up"], t["g_gate"], t["g_up"], t.get("bias_gate"), t.get("bias_up"), activation)
    out = operators.swiglu_forward(*given)
    assert complaint(spec, [out], exact) is None
    assert torch.equal(operators.swiglu_forward(*given), out)

    spec, t, _, exact = drawn("swiglu_backward", tokens, case, magnitude="bf16", **flags)
    common = [t[name] for name in ("g_gate", "g_up", "norm_gate", "norm_up")]
    rest = (t.get("bias_gate"), t.get("bias_up"), activation, torch.bfloat16)
    results = operators.swiglu_backward(t["dout"], t["gate"], t["up"], *common, *rest)
    assert complaint(spec, results, exact) is None
    gate, up = t["gate"].clone(), t["up"].clone()
    again = operators.swiglu_backward_(t["dout"], gate, up, *common, *rest)
    assert all(map(torch.equal, again, results))
    assert (again[0].data_ptr(), again[1].data_ptr()) == (gate.data_ptr(), up.data_ptr())


def test_projections_of_many_ranks_are_composed_apart_and_as_right_as_in_one_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients against those of fp64, by a launch for each projection and by one for all."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * std).bfloat16()

    d_in, rank, widths = 264, IN_PLACE_RANK + 8, (APART_COLUMNS, 264, 136)
    x, dys = normal(APART_TOKENS + 80, d_in), [normal(APART_TOKENS + 80, width) for width in widths]
    parts = []
    for width in widths:
        w, a, b = normal(width, d_in, std=0.06), normal(rank, d_in, std=0.06), normal(width, rank, std=0.06)
        m = torch.linalg.vector_norm(w.double() + b.double() @ a.double(), dim=1) * 1.1
        parts.append(Projection(w, a, b, m.bfloat16(), normal(width), 1.0, NormCache()))
    wide = [one._replace(**{name: getattr(one, name).double() for name in one._fields[:5]}) for one in parts]

    def gradients(own: list[Projection], x: torch.Tensor, run: Any) -> list[torch.Tensor]:
        leaves = [x.requires_grad_(), *[tensor.requires_grad_() for one in own for tensor in one[1:4]]]
        ys = run(x, own)
        return [*ys, *torch.autograd.grad(ys, leaves, [dy.to(x.dtype) for dy in dys])]

    def formula(x: torch.Tensor, own: list[Projection]) -> list[torch.Tensor]:
        dense = [one.weight + one.lora_B @ one.lora_A for one in own]
        gains = [one.magnitude / each.norm(dim=1).detach() for one, each in zip(own, dense, strict=True)]
        return [x @ (g[:, None] * w).T + one.bias for g, w, one in zip(gains, dense, own, strict=True)]

    exact = gradients(wide, x.double(), formula)
    errors, counts = [], []
    for apart in (False, True):
        plan = Plan(parts)
        monkeypatch.setattr(group_plan, "composes_apart", lambda *_, apart=apart: apart)
        found = gradients(parts, x, lambda x, own, plan=plan: project(x, plan, torch.bfloat16))
        counts.append(len(plan.at(x, trains=True).apart))
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert counts == [0, len(widths) if kernels.specialises_warps(plan.at(x, trains=True).compose) else 0]
    assert all(two < 1.5 * one + 1e-3 for one, two in zip(*errors, strict=True)), errors
    assert max(errors[1]) < 0.02


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_mlp_of_many_ranks_is_about_as_right_as_one_that_computes_its_products_twice(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients against those of fp64, with products added to gate and up in memory and with kernels that do all."""

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * std).bfloat16()

    generator = torch.Generator("cuda").manual_seed(0)
    d_in, d_ff, rank = 264, 1032, IN_PLACE_RANK + 8
    x, dy = normal(500, d_in), normal(500, d_in)
    parts = []
    for d_out, columns in ((d_ff, d_in), (d_ff, d_in), (d_in, d_ff)):
        w, a, b = normal(d_out, columns, std=0.06), normal(rank, columns, std=0.06), normal(d_out, rank, std=0.06)
        m = torch.linalg.vector_norm(w.double() + b.double() @ a.double(), dim=1) * 1.1
        parts.append(Projection(w, a, b, m.bfloat16(), None, 1.0, NormCache()))

    def gradients(dtype: torch.dtype, run: Any) -> list[torch.Tensor]:
        own = [one._replace(**{n: getattr(one, n).to(dtype) for n in one._fields[:4]}) for one in parts]
        leaves = [x.to(dtype), *[tensor for one in own for tensor in one[1:4]]]
        for leaf in leaves:
            leaf.requires_grad_()
        y = run(leaves[0], own)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def formula(x: torch.Tensor, own: list[Projection]) -> torch.Tensor:
        def one(x: torch.Tensor, p: Projection) -> torch.Tensor:
            adapted = p.weight + p.lora_B @ p.lora_A
            return x @ (p.magnitude / adapted.norm(dim=1).detach())[:, None].mul(adapted).T

        return one(torch.nn.functional.silu(one(x, own[0])) * one(x, own[1]), own[2])

    def mlp(x: torch.Tensor, own: list[Projection]) -> torch.Tensor:
        plans = Plan(own[:2], "silu"), Plan(own[2:])
        if checkpointed:
            return checkpoint(lambda x: project_mlp(x * 1.0, *plans, x.dtype), x, use_reentrant=False)  # type: ignore[no-any-return]
        return project_mlp(x, *plans, x.dtype)

    exact, errors = gradients(torch.float64, formula), []
    for in_place in (False, True):
        monkeypatch.setattr(group_plan, "adds_in_place", lambda *_, in_place=in_place: in_place)
        found = gradients(torch.bfloat16, mlp)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    once, twice = errors
    assert all(two < 1.5 * one + 1e-3 for one, two in zip(once, twice, strict=True)), errors
    assert max(twice) < 0.02


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
