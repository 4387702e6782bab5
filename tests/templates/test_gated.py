"""The kernels of a gated MLP at the ends of their activations, and over the memory of their inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.ops import OPS
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import Variant
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

from .interpreter import GPU as H200
from .interpreter import IDS, INTERPRETED, complaint_of, small_config, spec_of

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # of NumPy, in place of the infinity that is wanted
]

GATED = [variant for variant in INTERPRETED if "swiglu" in variant.op]
BACKWARD = [variant for variant in GATED if variant.op.endswith("_backward")]
ACTIVATIONS = [{}, {"gelu": True}, {"gelu_tanh": True}]

every_gated = pytest.mark.parametrize("variant", GATED, ids=IDS.get)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda flags: "".join(flags) or "silu")


def run(
    variant: Variant,
    spec: KernelSpec,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    scaling: float,
) -> None:
    scalars = (scaling,) if spec.contract.scaling else ()
    load_module(render(spec, small_config(variant, spec))).launch(*inputs.values(), *outputs.values(), *scalars)


@every_gated
@every_activation
@pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
def test_far_from_zero_the_activation_is_its_limit_and_no_nan(
    variant: Variant, activation: dict[str, bool], size: float
) -> None:
    """exp(1e4) is infinite in fp32; of the activation nothing is left there but 0 or y itself."""
    dtype = "fp16" if variant.descriptors else "fp32"
    spec = spec_of(variant.op, dtype, **activation)
    inputs, scaling = make_inputs(spec, 37, case="random")
    inputs["gate"] = inputs["gate"].sign().mul(size)
    inputs["gate"][:, ::5] = 0.0
    outputs = make_outputs(spec, 37)
    run(variant, spec, inputs, outputs, scaling)
    assert all(bool(tensor.isfinite().all()) for tensor in outputs.values())
    assert worst_error(spec, outputs, definition(spec, inputs, scaling))[1] is None


@every_gated
@every_activation
def test_every_activation_is_right_with_a_bias_and_with_a_magnitude(
    variant: Variant, activation: dict[str, bool]
) -> None:
    roles = {"magnitude": "fp16"} if variant in BACKWARD else {}
    spec = spec_of(variant.op, "fp16", bias=True, d_out=120, **activation, **roles)
    for case in ("mixed", "large_activations", "negative_scaling"):
        assert complaint_of(render(spec, small_config(variant, spec)), 37, case=case) is None, case


@every_gated
@pytest.mark.parametrize("over", [("gate", "up"), ("up", "gate")])
@pytest.mark.parametrize("d_out", [80, 120])
def test_an_output_may_be_the_memory_of_an_input(variant: Variant, over: tuple[str, str], d_out: int) -> None:
    spec = spec_of(variant.op, "fp16", d_out=d_out)
    inputs, scaling = make_inputs(spec, 37)
    exact = definition(spec, inputs, scaling)
    matrices = [operand.name for operand in spec.contract.outputs_of(spec) if len(operand.shape) == 2]
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = {**make_outputs(spec, 37), **{name: given[base] for name, base in zip(matrices, over, strict=False)}}
    run(variant, spec, given, outputs, scaling)
    assert worst_error(spec, outputs, exact)[1] is None


@pytest.mark.parametrize("variant", BACKWARD, ids=IDS.get)
@pytest.mark.parametrize("magnitude", ["fp32", "fp16"])
def test_the_gradient_of_a_magnitude_over_a_norm_of_zero_is_finite(variant: Variant, magnitude: str) -> None:
    spec = spec_of(variant.op, "fp32", magnitude=magnitude)
    inputs, scaling = make_inputs(spec, 37)
    inputs["norm_up"][::7] = 0.0
    inputs["up"][:, ::7] = 0.0
    if spec.rank:
        inputs["lora_B_up"][::7] = 0.0
    outputs = make_outputs(spec, 37)
    run(variant, spec, inputs, outputs, scaling)
    assert not outputs["dmagnitude_up"][::7].any()
    assert worst_error(spec, outputs, definition(spec, inputs, scaling))[1] is None


@pytest.mark.parametrize("variant", BACKWARD, ids=IDS.get)
def test_a_division_by_the_norm_that_is_off_is_noticed(variant: Variant) -> None:
    spec = spec_of(variant.op, "fp16", magnitude="fp32")
    source = render(spec, small_config(variant, spec))
    assert complaint_of(source, 37) is None
    broken = source.text.replace("/ tl.maximum(norm_up", "/ tl.maximum(1.01 * norm_up")
    assert broken != source.text
    assert complaint_of(replace(source, text=broken), 37) is not None


@pytest.mark.parametrize("rank", [1, 8, 16, 24, 384])
@every_gated
def test_every_rank_is_right(variant: Variant, rank: int) -> None:
    if "rank" not in OPS[variant.op].dims:
        pytest.skip("the operation has no rank")
    if variant.descriptors and rank % 8:
        pytest.skip("tensor descriptors need rows of a multiple of 16 bytes")
    spec = spec_of(variant.op, "fp16", rank=rank, d_out=72, tokens=4096)
    config = next(config for config in variant.seeds(spec, H200) if variant.refuse(spec, config, H200) is None)
    assert complaint_of(render(spec, config), 19) is None
