"""What is compared of few tokens is one layer, whatever W is stored in; a wrong request is refused."""

from __future__ import annotations

import pytest
import torch

from doratune.benchmarks.measuring import SCALING, load
from doratune.benchmarks.packed import FORMATS
from doratune.benchmarks.packed_linear import TOKENS, _unfused, bench_packed_linear, spec_of
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError
from doratune.runtime.reference import definition
from doratune.tuner.fusion import composition_of, product_of
from doratune.tuner.inputs import make_inputs, make_outputs

GPU = find_gpu("h200")


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_layers_differ_in_how_w_is_stored_alone(tokens: int) -> None:
    plain, *packed = (spec_of((4096, 4096), 16, tokens, weight, GPU) for weight in ("bf16", *FORMATS))
    for spec in packed:
        assert str(spec).replace(f"weight={spec.weight}", "weight=bf16", 1) == str(plain)
        assert spec.contract.floor_bytes(spec) < 0.6 * plain.contract.floor_bytes(plain)


@pytest.mark.parametrize("weight", ["fp32", "nf4.nested.fp32", "hqq8.fp32"])
def test_what_is_unfused_computes_the_layer(weight: str) -> None:
    sizes = {"d_out": 64, "d_in": 128, "rank": 8, "tokens": 4}
    spec = KernelSpec.create("dora_linear_forward", **sizes, dtype=weight, adapter="fp32", gpu="cpu")
    assert load(spec).spec == spec
    composition = composition_of(spec)
    assert composition is not None
    inputs, _ = make_inputs(spec, 4)
    outputs = make_outputs(spec, 4)
    _unfused(load(composition), {id(inputs): product_of(spec, inputs)}, (inputs, outputs))
    exact = definition(spec, inputs, SCALING)["y"]
    assert torch.linalg.norm(outputs["y"].double() - exact) < 1e-4 * torch.linalg.norm(exact)


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown weight format 'nf5'"):
        bench_packed_linear([(64, 64)], formats=["nf5"])
    with pytest.raises(UsageError, match="tokens=17: packed weights are for 1 to 16 tokens"):
        bench_packed_linear([(64, 64)], tokens=[17])
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs a GPU"):
            bench_packed_linear([(64, 64)])
