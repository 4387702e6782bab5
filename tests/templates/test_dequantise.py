"""A W in a weight format is decoded to the bits of the eager dequantiser, which has those of the libraries
(tests/runtime/test_dequantise.py): every format, for rows and groups that divide nothing; and a wrong one does not
pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import check_config, default_config, default_configs, find_variant
from doratune.codegen.weight_formats import stored_as
from doratune.runtime.reference import reference
from doratune.tuner.inputs import CASES, make_inputs, make_outputs

from .asm import assembler  # noqa: F401  a fixture
from .interpreter import GPU, complaint_of
from .test_packed import FORMATS, refused

pytestmark = pytest.mark.usefixtures("assembler")

TILE = find_variant("weight_dequantise", "tile")
EVEN = (64, 256, 0)
SHAPES = [EVEN, (37, 53, 0), (64, 200, 0), (48, 1032, 0), (37, 64, 0), (1, 512, 0), (258, 384, 0)]
"""(d_out, d_in, no rank): groups along rows; rows that begin inside a word; groups that begin inside a row; a last tile
that is not full; halves of bytes in one row; one row; more than one tile of rows that share a scale."""


def config_of(block_m: int = 8, block_k: int = 128, warps: int = 2) -> Config:
    return Config.create("tile", block_m=block_m, block_k=block_k, num_warps=warps, num_stages=2)


def spec_of(form: str, shape: tuple[int, int, int], dtype: str = "fp16", gpu: str = "h200") -> KernelSpec:
    return KernelSpec.create(
        "weight_dequantise",
        d_out=shape[0],
        d_in=shape[1],
        weight=stored_as(form, dtype),
        activation=dtype,
        gpu=gpu,
    )


def differing(source: Source, case: str = "mixed") -> int:
    """The elements of W whose bits are not those of the eager dequantiser."""
    inputs, _ = make_inputs(source.spec, 1, case=case)
    dense = make_outputs(source.spec, 1)["dense"]
    load_module(source).launch(*inputs.values(), dense)
    return int((dense != reference(source.spec, inputs)["dense"]).sum())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_format_has_the_bits_of_the_dequantiser_for_any_shape(form: str, shape: tuple[int, int, int]) -> None:
    if refused(form, shape):
        pytest.skip("no such shape in this format")
    assert differing(render(spec_of(form, shape), config_of())) == 0


@pytest.mark.parametrize("form", ["nf4.nested", "int8", "ao8.block.zeros", "hqq4", "hqq8.strided", "fp8"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_it_is_as_right_as_every_kernel_in_other_dtypes_and_cases(form: str, dtype: str) -> None:
    source = render(spec_of(form, EVEN, dtype), config_of(block_m=16))
    for case in CASES:
        assert complaint_of(source, 1, case=case) is None, case
        if (form, dtype) != ("int8", "fp32"):  # a scale times 1/127 is not always a scale over 127
            assert differing(source, case) == 0, case


@pytest.mark.parametrize("form", ["nf4", "hqq4", "hqq8.strided", "fp8.tile"])
@pytest.mark.parametrize("tile", [(1, 64), (4, 512), (32, 128)], ids=str)
def test_every_tile_gives_the_same(form: str, tile: tuple[int, int]) -> None:
    for shape in (EVEN, (50, 1000, 0)):
        if not refused(form, shape):
            assert differing(render(spec_of(form, shape), config_of(*tile))) == 0, shape


def test_the_output_may_be_rows_of_a_larger_matrix() -> None:
    spec = spec_of("hqq4", (48, 256, 0))
    inputs, _ = make_inputs(spec, 1)
    wide = torch.full((48, 269), float("nan"), dtype=torch.float16)
    load_module(render(spec, config_of())).launch(*inputs.values(), wide[:, 5:-8])
    assert torch.equal(wide[:, 5:-8], reference(spec, inputs)["dense"])
    assert wide[:, :5].isnan().all()
    assert wide[:, -8:].isnan().all()


def test_codes_that_are_no_numbers_stay_so() -> None:
    spec = spec_of("fp8", (16, 64, 0))
    inputs, _ = make_inputs(spec, 1, case="random")
    inputs["weight"][:256] = torch.arange(256, dtype=torch.uint8)
    dense = make_outputs(spec, 1)["dense"].zero_()
    load_module(render(spec, config_of())).launch(*inputs.values(), dense)
    wanted = reference(spec, inputs)["dense"]
    assert int(wanted.isnan().sum()) == 2
    assert torch.equal(dense.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("form", ["nf4.nested", "fp4", "int8", "hqq4", "fp8"])
def test_what_other_gpus_decode_without_ptx_is_the_same(form: str) -> None:
    source = render(spec_of(form, EVEN, gpu="gfx942"), config_of())
    assert "asm" not in source.text
    assert differing(source) == 0


BREAKAGES = [
    ("nf4", "words >> 4", "words >> 0", "halves of a byte exchanged"),
    ("nf4", "tl.join(w_0, w_4)", "tl.join(w_4, w_0)", "columns out of order"),
    ("nf4.nested", "+ scale_offset", "", "offset of the scales left out"),
    ("nf4.128.nested", "number // 256", "number // 128", "outer scales of other blocks"),
    ("int8", "0.007874", "0.007812", "128 steps in place of 127"),
    ("hqq4", "- zero", "- 1.01 * zero", "zero points 1 % off"),
    ("hqq4", "stored >> 4", "stored", "only one half of the rows"),
    ("hqq4", "rows + D_OUT // 2", "rows", "the other half's rows not written"),
    ("fp8", "2.0**120", "2.0**119", "exponents off by one"),
    ("fp8.tile", "// 128 * 4", "// 128 * 3", "scales of other tiles"),
]


@pytest.mark.parametrize(("form", "text", "broken", "what"), BREAKAGES, ids=[row[3] for row in BREAKAGES])
def test_a_wrong_term_is_caught(form: str, text: str, broken: str, what: str) -> None:
    source = render(spec_of(form, (160, 512, 0)), config_of())
    assert text in source.text, f"the template no longer says {text!r}: name another place to break"
    mutant = replace(source, text=source.text.replace(text, broken))
    assert complaint_of(source, 1) is None
    assert complaint_of(mutant, 1) is not None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_built_in_config_is_one_that_the_gpu_accepts(form: str, dtype: str) -> None:
    spec = spec_of(form, (4096, 14336, 0), dtype)
    assert default_config(spec, GPU) == TILE.seeds(spec, GPU)[0]
    assert len(default_configs(spec, GPU)) == len(TILE.seeds(spec, GPU))
    assert all(check_config(spec, config, GPU) is None for config in TILE.seeds(spec, GPU))


def test_a_plain_w_is_refused_in_words() -> None:
    with pytest.raises(SpecError, match=r"weight='bf16': weight_dequantise reads a W in a weight format \(nf4, fp4"):
        KernelSpec.create("weight_dequantise", d_out=64, d_in=64, dtype="bf16", gpu="h200")
    with pytest.raises(SpecError, match="activation=fp16 with nf4 weights"):
        replace(spec_of("nf4", EVEN, "bf16"), activation="fp16")
