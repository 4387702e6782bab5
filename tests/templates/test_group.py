"""The kernels of several projections of one x: each projection has its own width, memory and columns of h."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import Variant, check_config
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

from .interpreter import GPU, IDS, INTERPRETED, complaint_of, small_config, spec_of

pytestmark = pytest.mark.usefixtures("interpreter")

GROUPED = [variant for variant in INTERPRETED if variant.op in ("lora_compose_group", "compose_backward_group")]
CHUNKED = [variant for variant in INTERPRETED if "resident" in variant.switches]
WIDTHS = [(80, 48), (48, 80, 16), (16, 16, 16), (37, 5, 90)]

every_grouped = pytest.mark.parametrize("variant", GROUPED, ids=IDS.get)


def spec_for(variant: Variant, widths: tuple[int, ...], **values: object) -> KernelSpec:
    dims = dict(zip(("d_out", "d_out_2", "d_out_3"), widths, strict=False))
    return spec_of(variant.op, "fp16", **dims, **values)


@every_grouped
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rank", [1, 24])
def test_each_projection_is_right_whatever_the_others_widths(
    variant: Variant, widths: tuple[int, ...], rank: int
) -> None:
    roles = {"magnitude": "fp16"} if variant.op == "compose_backward_group" else {"bias": True}
    for added in ({}, roles):
        spec = spec_for(variant, widths, rank=rank, **added)
        for case in ("mixed", "negative_scaling", "large_activations"):
            assert complaint_of(render(spec, small_config(variant, spec)), 37, case=case) is None, (added, case)


@every_grouped
def test_outputs_may_be_the_memory_of_the_base_products(variant: Variant) -> None:
    spec = spec_for(variant, (48, 80, 16))
    inputs, scaling = make_inputs(spec, 37)
    exact = definition(spec, inputs, scaling)
    outputs = make_outputs(spec, 37)
    name = "y" if variant.op == "lora_compose_group" else "dyg"
    outputs |= {f"{name}_{number}": inputs[f"base_{number}"] for number in (1, 2, 3)}
    load_module(render(spec, small_config(variant, spec))).launch(*inputs.values(), *outputs.values(), scaling)
    assert worst_error(spec, outputs, exact)[1] is None


def resident(variant: Variant, spec: KernelSpec) -> Config:
    config = small_config(variant, spec)
    params = {**dict(config.params), "block_t": 16, "chunk": 32, "block_k": 16, "resident": 1}
    kept = Config.create(config.variant, **params, num_warps=2, num_stages=2)
    assert check_config(spec, kept, GPU) is None
    return kept


@pytest.mark.parametrize("variant", CHUNKED, ids=IDS.get)
@pytest.mark.parametrize("rank", [24, 40, 48])
def test_an_adapter_that_stays_resident_gives_the_same(variant: Variant, rank: int) -> None:
    spec = spec_of(variant.op, "fp16", rank=rank, d_out=72)
    source = render(spec, resident(variant, spec))
    assert complaint_of(source, 37) is None
    broken = source.text.replace("+ 2 * BLOCK_K", "+ BLOCK_K") if rank > 32 else source.text.replace("+ BLOCK_K", "")
    assert broken != source.text
    assert complaint_of(replace(source, text=broken), 37) is not None


@pytest.mark.parametrize("variant", CHUNKED, ids=IDS.get)
def test_an_adapter_is_resident_only_where_that_is_a_choice(variant: Variant) -> None:
    for values in ({"rank": 16}, {"rank": 24, "adapter": "fp32"}):
        spec = spec_of(variant.op, "fp16", **values)
        assert variant.choices(spec, GPU)["resident"] == (0,)
        config = small_config(variant, spec)
        kept = Config.parse(str(config).replace("resident=0", "resident=1"))
        assert "resident must be 0" in str(check_config(spec, kept, GPU))


@every_grouped
def test_the_text_has_what_two_or_three_projections_need(variant: Variant) -> None:
    two, three = (spec_for(variant, widths) for widths in ((64, 64), (64, 64, 64)))
    texts: list[Source] = [render(spec, small_config(variant, spec)) for spec in (two, three)]
    assert "base_3" not in texts[0].text
    assert "base_3_ptr" in texts[1].text
    assert all(torch.is_tensor(tensor) for tensor in make_outputs(three, 5).values())
