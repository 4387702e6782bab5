"""What judges the kernels misses nothing: a value that is wrong, unwritten or infinite anywhere is a complaint, however
right the rest is, and a result within the bounds is none."""

from __future__ import annotations

import pytest
import torch

from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.runtime.reference import definition, reference
from doratune.tuner.accuracy import BANDS, worst_error
from doratune.tuner.inputs import CASES, make_inputs

from ..specs import dtype_for

TOKENS, WIDTH = 24, 64
BAD = {"unwritten": float("nan"), "infinite": float("inf"), "wrong": 3.0}
OUTPUTS = [(op, operand.name) for op, contract in OPS.items() for operand in contract.outputs if not operand.when]


def judged(op: str, dtype: str = "fp16") -> tuple[KernelSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    sizes = {"d_out": WIDTH, "d_in": 96, "rank": 8, "tokens": TOKENS}
    spec = KernelSpec.create(op, **sizes, dtype=dtype_for(op, dtype), adapter=dtype, gpu="h200")
    inputs, scaling = make_inputs(spec, TOKENS)
    return spec, reference(spec, inputs, scaling), definition(spec, inputs, scaling)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_right_result_is_no_complaint(op: str, dtype: str) -> None:
    error, complaint = worst_error(*judged(op, dtype))
    assert complaint is None
    assert (error == 0.0) == (op == "weight_dequantise")  # whose values are rounded by definition
    assert error < 0.05  # in fp16, columns with g of 1e-6 are subnormal and keep few digits


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("band", range(BANDS))
@pytest.mark.parametrize(("op", "name"), OUTPUTS)
def test_one_bad_value_in_any_band_of_columns_is_noticed(op: str, name: str, band: int, bad: str) -> None:
    spec, outputs, exact = judged(op)
    width = outputs[name].shape[-1]
    column = band * (width // BANDS) + (width > BANDS)
    place = outputs[name][..., column] if outputs[name].ndim == 1 else outputs[name][5, column : column + 1]
    place.copy_(torch.full_like(place, BAD[bad]) if bad != "wrong" else place * BAD[bad] + 1.0)
    _, complaint = worst_error(spec, outputs, exact)
    assert complaint is not None
    assert complaint.startswith(name)


def test_an_unwritten_first_output_is_noticed_though_the_second_is_right() -> None:
    spec, outputs, exact = judged("compose_backward")
    outputs["dyg"].fill_(float("nan"))
    error, complaint = worst_error(spec, outputs, exact)
    assert error != error
    assert complaint is not None
    assert complaint.startswith("dyg")


@pytest.mark.parametrize("case", CASES)
def test_every_case_draws_finite_inputs_of_the_contracts_shapes(case: str) -> None:
    for op in OPS:
        dims = {"d_out": 40, "d_in": 64, "rank": 4, "tokens": 16, "layers": 16}
        spec = KernelSpec.create(op, **dims, dtype=dtype_for(op, "fp16"), adapter="fp16", gpu="h200")
        inputs, _ = make_inputs(spec, 16, case=case)
        for operand in spec.contract.inputs_of(spec):
            assert list(inputs[operand.name].shape) == [*operand.sizes(spec, 16)]
            assert bool(inputs[operand.name].isfinite().all())
