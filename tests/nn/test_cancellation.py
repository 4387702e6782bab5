"""Where W + sBA nearly cancels, or the summands of BA do, w keeps its bound of 1e-5 against fp64 in every row, from
every function that computes it, and the layer's error is at most that of PEFT's dense formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import doratune
from doratune.codegen.spec import KernelSpec
from doratune.nn import kernels
from doratune.nn.functional import dora_linear
from doratune.nn.norm import norm_and_gain_of, norm_of
from doratune.runtime import reference
from doratune.runtime.reference import TORCH_DTYPES, cancels, definition
from doratune.tuner.accuracy import NORM_ERROR

D_OUT = 96
S = 0.75
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)


def factors(rank: int, d_in: int = 320) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, d_in) * d_in**-0.5, torch.randn(D_OUT, rank) * 0.02


def against_the_weight(share: float, rank: int = 24, scaling: float = S, dtype: torch.dtype = torch.float32) -> Factors:
    """W, A and B with s*BA = -share*W, but for the rounding of W."""
    a, b = (factor.to(dtype) for factor in factors(rank))
    return ((-scaling / share) * (b.double() @ a.double())).to(dtype), a, b


def among_themselves(difference: float, weight: float = 0.0, rank: int = 24) -> Factors:
    """Rows of A that differ by ``difference`` in pairs, which B subtracts from each other; W ``weight`` times usual."""
    a, b = factors(rank // 2)
    twice = torch.cat([a, a + difference * torch.randn_like(a) * a.shape[1] ** -0.5])
    return 0.02 * weight * torch.randn(D_OUT, a.shape[1]), twice, torch.cat([b, -b], dim=1)


def parallel(difference: float, rank: int = 24) -> Factors:
    """Rows of A that are all alike, and rows of B that sum to 0."""
    a, b = factors(rank)
    a = a[:1] + difference * a
    return torch.zeros(D_OUT, a.shape[1]), a, b - b.mean(dim=1, keepdim=True)


def in_some_rows(share: float) -> Factors:
    weight, a, b = against_the_weight(share)
    weight[torch.arange(D_OUT) % 5 != 3] = 0.02 * torch.randn(weight.shape[1])
    return weight, a, b


def exact_norm(factors: Factors, scaling: float = S) -> torch.Tensor:
    weight, a, b = (factor.double() for factor in factors)
    return (weight + scaling * (b @ a)).norm(dim=1)


def error(norm: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((norm.double() - exact) / exact).abs().max())


CANCELLING: dict[str, Callable[[], Factors]] = {
    "-0.9 W": lambda: against_the_weight(0.9),
    "-0.999 W": lambda: against_the_weight(0.999),
    "-0.9999 W": lambda: against_the_weight(0.9999),
    "rounding is left of W": lambda: against_the_weight(1.0),
    "some rows": lambda: in_some_rows(0.999),
    "alike in pairs": lambda: among_themselves(1e-2),
    "alike in pairs beside a small W": lambda: among_themselves(1e-3, weight=1e-2),
    "all alike": lambda: parallel(1e-3),
}


@pytest.mark.parametrize("given", [False, True], ids=["nW computed", "nW given"])
@pytest.mark.parametrize("case", CANCELLING)
def test_w_keeps_its_digits_in_every_row(case: str, given: bool) -> None:
    tensors = CANCELLING[case]()
    squares = tensors[0].double().square().sum(dim=1).float() if given else None
    assert error(doratune.weight_norm(*tensors, S, weight_sq=squares), exact_norm(tensors)) <= NORM_ERROR


@pytest.mark.parametrize("rank", [1, 2, 24, 768])
@pytest.mark.parametrize("scaling", [0.75, -0.7, 16.0])
def test_at_any_rank_and_scaling(rank: int, scaling: float) -> None:
    tensors = against_the_weight(0.999, rank, scaling)
    assert error(doratune.weight_norm(*tensors, scaling), exact_norm(tensors, scaling)) <= NORM_ERROR


@pytest.mark.parametrize("adapter", ["16 bits", "fp32", "rounded by autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_w_of_16_bits(dtype: torch.dtype, adapter: str) -> None:
    """W + sBA is then the rounding of W (2**-9 of it in bf16), which is an exact number too."""
    weight, a, b = against_the_weight(1.0, dtype=dtype)
    if adapter != "16 bits":
        a, b = a.float() * (1.0 + 2.0**-12), b.float()
    with torch.autocast("cpu", dtype, enabled=adapter == "rounded by autocast"):
        norm = doratune.weight_norm(weight, a, b, S)
    seen = (a.to(dtype), b.to(dtype)) if adapter == "rounded by autocast" else (a, b)
    exact = exact_norm((weight, *seen))
    assert (exact < 0.01 * weight.double().norm(dim=1)).all()
    assert error(norm, exact) <= NORM_ERROR


def test_an_exactly_zero_sum_has_norm_zero_and_the_layer_stays_finite() -> None:
    a, b = (torch.randint(-4, 5, shape).float() for shape in ((3, 40), (D_OUT, 3)))
    weight = -2.0 * (b @ a)
    norm = doratune.weight_norm(weight, a, b, 2.0)
    assert torch.equal(norm, torch.zeros(D_OUT))
    y = dora_linear(torch.ones(2, 40), weight, a, b, torch.ones(D_OUT), 2.0)
    assert torch.equal(y, torch.zeros(2, D_OUT))


def test_rows_that_are_zero_or_not_a_number_stay_so() -> None:
    weight, a, b = against_the_weight(0.999)
    weight[3], b[3], weight[5] = 0.0, 0.0, float("nan")
    norm = doratune.weight_norm(weight, a, b, S)
    assert norm[3] == 0.0
    assert norm.isnan().nonzero().flatten().tolist() == [5]


def peft_layer(x: torch.Tensor, tensors: Factors, magnitude: torch.Tensor) -> torch.Tensor:
    """PEFT's formula in the tensors' dtype: the dense W + sBA and its norm."""
    weight, a, b = tensors
    gain = magnitude / torch.linalg.norm(weight + S * (b @ a), dim=1)
    return gain * (x @ weight.T) + gain * S * (x @ a.T @ b.T)


@pytest.mark.parametrize("wide", [False, True], ids=["fp32 m", "fp64 m"])
@pytest.mark.parametrize("case", ["-0.999 W", "some rows", "alike in pairs"])
def test_a_layer_is_as_near_to_fp64_as_the_dense_formula(case: str, wide: bool) -> None:
    tensors, x = CANCELLING[case](), torch.randn(64, 320)
    magnitude = (1.0 + 0.1 * torch.randn(D_OUT)).to(torch.float64 if wide else torch.float32)
    exact = peft_layer(x.double(), tuple(t.double() for t in tensors), magnitude.double())  # type: ignore[arg-type]

    def off(y: torch.Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    y = dora_linear(x, *tensors, magnitude, S)
    assert off(y) <= 1.5 * off(peft_layer(x, tensors, magnitude.float()))
    assert off(y) <= 1e-3


def test_the_gradient_of_m_is_that_of_the_exact_norm() -> None:
    tensors, x = CANCELLING["-0.999 W"](), torch.randn(64, 320)
    grads = {}
    for dtype in (torch.float32, torch.float64):
        magnitude = torch.ones(D_OUT, dtype=dtype, requires_grad=True)
        weight, a, b = (tensor.to(dtype) for tensor in tensors)
        dora_linear(x.to(dtype), weight, a, b, magnitude, S).square().sum().backward()
        assert magnitude.grad is not None
        grads[dtype] = magnitude.grad.double()
    assert float((grads[torch.float32] - grads[torch.float64]).norm() / grads[torch.float64].norm()) <= 1e-3


def test_a_module_merges_with_the_exact_norm() -> None:
    weight, a, b = CANCELLING["some rows"]()
    layer = doratune.nn.DoRALinear(320, D_OUT, a.shape[0], S * a.shape[0], bias=False)
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        for parameter, value in zip(layer.adapter, (a, b, torch.ones(D_OUT)), strict=True):
            parameter.copy_(value)
    merged = layer.to_linear().weight.double()
    exact = weight.double() + S * (b.double() @ a.double())
    exact /= exact.norm(dim=1, keepdim=True)
    assert float((merged.norm(dim=1) - 1.0).abs().max()) <= 1e-4
    assert float((merged - exact).norm() / exact.norm()) <= 1e-4  # the merged entries are those of an fp32 sum


def test_under_torch_compile_too() -> None:
    tensors = CANCELLING["-0.999 W"]()
    compiled = torch.compile(lambda *t: doratune.weight_norm(*t, S), fullgraph=True, backend="aot_eager")
    assert error(compiled(*tensors), exact_norm(tensors)) <= NORM_ERROR


@pytest.mark.parametrize("rank", [8, 384])
def test_no_row_is_recomputed_for_an_ordinary_adapter(rank: int) -> None:
    """An adapter as large as W, a far larger one, and one parallel to W."""
    a, b = factors(rank)
    weight = 0.02 * torch.randn(D_OUT, 320)
    for w, factor in ((weight, b), (weight, 100.0 * b), (0.3 * (b @ a), b), (-10.0 * (b @ a), b), (0.0 * weight, b)):
        squares = w.square().sum(dim=1)
        norm = (w + S * (factor @ a)).norm(dim=1)
        assert not cancels(norm, squares, a, factor, S).any()


def test_any_number_of_rows_is_recomputed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = CANCELLING["-0.999 W"]()
    largest = []
    dense = reference._dense_rows

    def watched(inputs: Any, scaling: float, rows: torch.Tensor, elements: int) -> torch.Tensor:
        largest.append(elements)
        return dense(inputs, scaling, rows, elements)

    monkeypatch.setattr(reference, "_dense_rows", watched)
    monkeypatch.setattr(reference, "_WIDENED_ELEMENTS", 1000)
    assert error(doratune.weight_norm(*tensors, S), exact_norm(tensors)) <= NORM_ERROR
    assert largest == [1000]


class Launched:
    """Replaces a GPU's kernel: computes with the eager reference and records its start."""

    def __init__(self, started: list[str], key: tuple[Any, ...]) -> None:
        op, d_out, d_in, rank, tokens, dtype, adapter, flags, magnitude, _ = key
        names = {value: name for name, value in TORCH_DTYPES.items()}
        self._spec = KernelSpec.create(
            op, d_out=d_out, d_in=d_in, rank=rank, tokens=tokens, dtype=names[dtype], adapter=names[adapter],
            magnitude=magnitude and names[magnitude], gpu="cpu", **dict.fromkeys(flags, True),
        )  # fmt: skip
        self._started = started

    def launch(self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], scaling: float) -> None:
        self._started.append(self._spec.op)
        operands = self._spec.contract.inputs_of(self._spec)
        given = {operand.name: tensor for operand, tensor in zip(operands, inputs, strict=True)}
        for operand in operands:
            assert given[operand.name].dtype == TORCH_DTYPES[operand.dtype_of(self._spec)]
            assert given[operand.name].stride(-1) == 1, "launched, it would be copied"
        results = reference.reference(self._spec, given, scaling)
        for output, result in zip(outputs, results.values(), strict=True):
            output.copy_(result)


@pytest.mark.parametrize("magnitude", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [False, True], ids=["nW computed", "nW given"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_on_a_gpu_the_check_is_one_kernel_after_the_norms(
    magnitude: torch.dtype | None, given: bool, by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(kernels, "kernel_for", lambda *key: Launched(started, key))
    weight, a, b = CANCELLING["some rows"]()
    if by_columns:
        weight = weight.T.contiguous().T
    exact = exact_norm((weight, a, b))
    squares = weight.square().sum(dim=1) if given else None
    if magnitude is None:
        norm = norm_of(weight, a, b, S, squares)
    else:
        m = (1.0 + torch.rand(D_OUT)).to(magnitude)
        norm, g = norm_and_gain_of(weight, a, b, m, S, squares)
        assert error(g, m.double() / exact) <= 2.0 * NORM_ERROR
        assert g.dtype == (torch.float64 if magnitude is torch.float64 else torch.float32)
    assert error(norm, exact) <= NORM_ERROR
    assert started == ["weight_norm", "weight_norm_exact"]


def test_the_share_at_which_rows_are_redone_is_far_from_where_the_factored_norm_fails() -> None:
    """The factored norm alone keeps the bound down to a tenth of the share, with rounded fp32 sums."""
    for share in torch.linspace(0.05, 0.75, 15).tolist():
        weight, a, b = against_the_weight(share, rank=64)
        spec = KernelSpec.create(
            "weight_norm", d_out=D_OUT, d_in=320, rank=64, dtype="fp32", adapter="fp32", save=True, gpu="cpu"
        )
        inputs = {"weight": weight, "lora_A": a, "lora_B": b}
        factored = reference.reference(spec, inputs, S)["norm"]
        assert error(factored, definition(spec, inputs, S)["norm"]) <= NORM_ERROR
