"""Few tokens through quantised projections read the stored W in one kernel each, where stores say that it pays: the
values are those of the decoded W, and nothing else asks for a base product. Everywhere else nothing is different."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from doratune.codegen.ops import EPS
from doratune.codegen.weight_formats import parse_format
from doratune.nn import kernels
from doratune.nn.norm_cache import NormCache
from doratune.nn.norm_layer import StoredLayer
from doratune.nn.stored_group import compose_stored
from doratune.nn.stored_norm import StoredMatrix
from doratune.nn.stored_plan import StoredPlan, StoredProjection
from doratune.runtime.dequantise import dequantise
from doratune.runtime.reference import TORCH_DTYPES
from doratune.tuner.quantise import quantise

from .layers import KernelOnPaper, kernels_on_paper

__all__ = ["kernels_on_paper"]

WIDTHS, D_IN, RANK = (48, 24, 17), 128, 6
OP = "dora_linear_forward"


class Products:
    """A source of products by a decoded W, which counts them, and the times that it decodes."""

    keeps_dtype = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, multiplies_from: int | None) -> None:
        self.weight, self.bias, self.dtype = weight, bias, weight.dtype
        self.calls = self.decoded = 0
        self.multiplies_from = multiplies_from

    def product(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        self.decoded += 1
        return self.weight.to(dtype, copy=True)


def made(
    form: str, widths: Sequence[int] = WIDTHS[:1], *, bias: bool = False, multiplies_from: int | None = None
) -> list[StoredProjection]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    projections = []
    for width in widths:
        stored = parse_format(form)
        tensors = quantise(stored, 0.1 * normal(width, D_IN))
        matrix = StoredMatrix(stored, tuple(tensors.values()), width, D_IN)
        dtype = TORCH_DTYPES[stored.dtype]
        a, b = 0.1 * normal(RANK, D_IN), normal(width, RANK)
        a, b, m = (nn.Parameter(each.to(dtype)) for each in (a, b, 1.0 + 0.1 * normal(width)))
        layer = StoredLayer(matrix, a, b, m, 0.75, NormCache())
        held = normal(width).to(dtype) if bias else None
        weight = dequantise(stored, tensors, width, D_IN)

        def ask(own: StoredLayer = layer, weight: torch.Tensor = weight) -> torch.Tensor:
            return (weight.double() + own.scaling * own.lora_B.double() @ own.lora_A.double()).norm(dim=1).float()

        source = Products(weight.to(dtype), held, multiplies_from)
        projections.append(StoredProjection(layer, layer.tensors, held, source, source.product, ask))
    return projections


def exact(x: torch.Tensor, one: StoredProjection) -> torch.Tensor:
    layer = one.layer
    source: Any = one.source
    dense = source.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    y = layer.magnitude.double() / dense.norm(dim=1).clamp_min(EPS) * (x.double() @ dense.T)
    return y if one.bias is None else y + one.bias.double()


@pytest.fixture
def paying(
    kernels_on_paper: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[object, ...]], Callable[[], dict[str, int]]]:
    """Every fusion pays; the keys that are asked for, and the launches by operation."""
    asked: list[tuple[object, ...]] = []

    def pays(*key: object) -> KernelOnPaper:
        asked.append(key)
        kernel: Any = kernels.kernel_for(*key)  # type: ignore[arg-type]
        return kernel

    monkeypatch.setattr(kernels, "paying_kernel_for", pays)
    return asked, kernels_on_paper


def run(projections: Sequence[StoredProjection], x: torch.Tensor) -> tuple[Sequence[torch.Tensor], int]:
    """The outputs, and the base products that were made."""
    with torch.no_grad():
        outputs = compose_stored(x, StoredPlan(projections))
    return outputs, sum(one.source.calls for one in projections)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["nf4.fp32", "nf4.nested.fp16", "fp4", "hqq4.fp16", "ao8", "ao8.block", "fp8.tile"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_need_no_base_product(form: str, count: int, bias: bool, paying: Any) -> None:
    widths = WIDTHS[:count] if "tile" in form or "nf4" in form or "fp4" in form else (48, 32, 16)[:count]
    projections = made(form, widths, bias=bias)
    for lead in ((1,), (3, 5), (16,)):
        x = torch.randn(*lead, D_IN).to(projections[0].layer.lora_A.dtype)
        outputs, products = run(projections, x)
        assert products == 0
        for y, one in zip(outputs, projections, strict=True):
            wanted = exact(x, one).detach()
            assert y.shape == wanted.shape
            assert y.dtype is x.dtype
            assert not y.requires_grad
            bound = 4 * torch.finfo(x.dtype).eps
            assert float((y.double() - wanted).norm() / wanted.norm()) < max(bound, 1e-6)
            y.add_(1.0)  # a view could not be changed
    _, launches = paying
    assert launches() == {OP: 3 * count, "lora_compose" if count == 1 else "lora_compose_group": 0}


def test_a_pass_in_which_nothing_is_trained_needs_none_either(paying: Any) -> None:
    projections = made("nf4.fp32")
    for tensor in projections[0].layer[1:4]:
        tensor.requires_grad_(False)
    plan, x = StoredPlan(projections), torch.randn(2, D_IN)
    source: Any = projections[0].source
    y = compose_stored(x, plan)[0]
    assert source.calls == 0
    assert torch.allclose(y.double(), exact(x, projections[0]), rtol=1e-4, atol=1e-5)
    compose_stored(x.requires_grad_(), plan)
    assert source.calls == 1


def training(projections: Sequence[StoredProjection]) -> None:
    outputs = compose_stored(torch.randn(2, D_IN, dtype=projections[0].layer.lora_A.dtype), StoredPlan(projections))
    sum(y.float().sum() for y in outputs).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 3])
def test_where_gradients_are_wanted_the_products_are_made(count: int, paying: Any) -> None:
    projections = made("nf4.fp32", WIDTHS[:count])
    training(projections)
    asked, launches = paying
    assert asked == []
    assert OP not in launches()
    assert [one.source.calls for one in projections] == [1] * count  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "tokens", "dtype"),
    [
        ("nf4.fp32", 17, torch.float32),
        ("int8.fp32", 1, torch.float32),
        ("nf4", 1, torch.float32),
        ("hqq8.fp16", 1, torch.float32),
        ("ao8.fp16", 1, torch.float32),
    ],
    ids=["more-tokens", "rounded-x", "W-rounded-to-bf16", "W-rounded-to-fp16", "scales-of-another-dtype"],
)
def test_what_no_kernel_computes_asks_for_none(form: str, tokens: int, dtype: torch.dtype, paying: Any) -> None:
    projections = made(form)
    for one in projections:
        source: Any = one.source
        source.weight, source.dtype = source.weight.to(dtype), dtype
    plan, x = StoredPlan(projections), torch.randn(tokens, D_IN, dtype=dtype)
    with torch.no_grad():
        compose_stored(x, plan)
    asked, launches = paying
    assert asked == []
    assert OP not in launches()
    assert projections[0].source.calls == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("lacking", [0, 2])
def test_a_group_of_which_one_does_not_pay_makes_its_products(
    lacking: int, paying: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    projections = made("nf4.fp32", WIDTHS)
    pays = kernels.paying_kernel_for
    width = WIDTHS[lacking]
    monkeypatch.setattr(kernels, "paying_kernel_for", lambda *key: None if key[1] == width else pays(*key))
    assert run(projections, torch.randn(4, D_IN))[1] == 3
    assert paying[1]()["lora_compose_group"] == 1


def test_without_an_entry_a_call_asks_once_for_each_bucket_and_dtype(
    kernels_on_paper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(kernels, "paying_kernel_for", lambda *key: asked.append(key))
    projections = made("nf4.fp32")
    plan = StoredPlan(projections)
    with torch.no_grad():
        for tokens in (1, 1, 3, 16, 2, 40, 1):
            compose_stored(torch.randn(tokens, D_IN), plan)
    assert [key[4] for key in asked] == [1, 16]
    assert {key[:4] + key[5:8] for key in asked} == {(OP, 48, D_IN, RANK, "nf4.fp32", torch.float32, ())}
    assert projections[0].source.calls == 7  # type: ignore[union-attr]


def test_base_products_that_are_given_are_used(paying: Any) -> None:
    """Whoever has made them may have changed them."""
    [one] = made("nf4.fp32")
    source: Any = one.source
    plan, x = StoredPlan([one._replace(source=None)]), torch.randn(4, D_IN)
    with torch.no_grad():
        base = 2.0 * source.product(x)
        y = compose_stored(x, plan, [base.clone()])[0]
        layer = one.layer
        wanted = layer.magnitude / one.ask() * (base + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T)  # type: ignore[operator]
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_the_kernels_that_are_compiled_ahead_are_those_that_start(paying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes_of(_: object, operands: Sequence[torch.Tensor]) -> tuple[object, ...]:
        return tuple([tuple(operand.shape) for operand in operands])

    monkeypatch.setattr(KernelOnPaper, "alignments_of", shapes_of, raising=False)
    plan = StoredPlan(made("nf4.nested.fp32", WIDTHS, bias=True))
    few = [*plan.requests(3, torch.float32, train=False)]
    assert [kernel.spec.op for kernel, _ in few] == [OP] * 3  # type: ignore[attr-defined]
    for (kernel, shapes), width in zip(few, WIDTHS, strict=True):
        spec: Any = kernel.spec  # type: ignore[attr-defined]
        operands = (*spec.contract.inputs_of(spec), *spec.contract.outputs_of(spec))
        assert shapes == tuple(operand.sizes(spec, 3) for operand in operands)
        assert spec.d_out == width
    many = [*plan.requests(40, torch.float32, train=False)]
    assert "lora_compose_group" in {kernel.spec.op for kernel, _ in many}  # type: ignore[attr-defined]
    trained = {kernel.spec.op for kernel, _ in plan.requests(3, torch.float32, train=True)}  # type: ignore[attr-defined]
    assert trained == {"lora_compose_group", "compose_backward_group", "weight_dequantise"}


def gradients(projections: Sequence[StoredProjection], x: torch.Tensor) -> list[torch.Tensor]:
    """y of each projection, and the gradients of x, A, B and m where every y has ones."""
    leaves = [x, *[tensor for one in projections for tensor in one.layer[1:4]]]
    outputs = compose_stored(x, StoredPlan(projections))
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]


@pytest.mark.parametrize(
    "form", ["hqq4.fp32", "hqq8.strided.fp32", "fp8.tile.fp32", "ao8.block.fp32", "nf4.nested.fp32"]
)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kernel_decodes_w_for_the_products_and_for_the_gradient_of_x(
    form: str, count: int, bias: bool, kernels_on_paper: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = (48, 32, 16)[:count]
    x = torch.randn(40, D_IN, requires_grad=True)
    projections = made(form, widths, bias=bias, multiplies_from=1)
    found = gradients(projections, x)
    sources: list[Any] = [one.source for one in projections]
    assert [(source.calls, source.decoded) for source in sources] == [(0, 0)] * count
    assert kernels_on_paper()["weight_dequantise"] == 2 * count
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "kernel_for", lambda *key: None)
        others = made(form, widths, bias=bias, multiplies_from=1)
        wanted = gradients(others, x)
    assert [(one.source.calls, one.source.decoded) for one in others] == [(1, 1)] * count  # type: ignore[union-attr]
    for got, other in zip(found, wanted, strict=True):
        assert torch.allclose(got, other, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_product_is_another_keeps_it_and_a_kernel_decodes_w_for_its_gradient(
    kernels_on_paper: Callable[[], dict[str, int]],
) -> None:
    projections = made("int8.fp32", (48, 32))
    gradients(projections, torch.randn(40, D_IN, requires_grad=True))
    assert [(one.source.calls, one.source.decoded) for one in projections] == [(1, 0)] * 2  # type: ignore[union-attr]
    assert kernels_on_paper()["weight_dequantise"] == 2


@pytest.mark.parametrize("trains", [False, True])
def test_values_of_another_dtype_than_the_products_are_decoded_by_their_source(trains: bool, paying: Any) -> None:
    projections = made("hqq8.fp16", (48, 32), multiplies_from=1)
    for one in projections:
        source: Any = one.source
        source.weight = source.weight.float()
    x = torch.randn(40, D_IN, requires_grad=trains)
    if trains:
        gradients(
            [
                one._replace(
                    layer=one.layer._replace(
                        lora_A=nn.Parameter(one.layer.lora_A.detach().float()),
                        lora_B=nn.Parameter(one.layer.lora_B.detach().float()),
                    )
                )
                for one in projections
            ],
            x,
        )
    else:
        run(projections, x)
    assert [one.source.calls for one in projections] == [1, 1]  # type: ignore[union-attr]
    assert "weight_dequantise" not in paying[1]()


def test_inference_decodes_nothing_twice_and_nothing_for_products_of_its_own(kernels_on_paper: Any) -> None:
    projections = made("hqq4.fp32", (48, 32, 16), multiplies_from=1)
    assert run(projections, torch.randn(1, D_IN))[1] == 0
    assert kernels_on_paper()["weight_dequantise"] == 3
    own = made("nf4.fp32")
    assert run(own, torch.randn(1, D_IN))[1] == 1
    assert kernels_on_paper()["weight_dequantise"] == 3


def test_a_product_is_made_of_the_decoded_w_from_the_tokens_on_that_its_source_names(kernels_on_paper: Any) -> None:
    projections = made("nf4.fp32", multiplies_from=512)
    for tokens, decoded in ((128, 0), (129, 1), (600, 2)):
        run(projections, torch.randn(tokens, D_IN))
        assert kernels_on_paper().get("weight_dequantise", 0) == decoded
    assert projections[0].source.calls == 1  # type: ignore[union-attr]
