"""The product of few tokens with a W in a weight format, composed in one kernel, agrees with fp64 of what the format
decodes to: every format, where each term dominates, for rows and blocks that divide nothing; and a wrong one does not
pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import check_config, default_config, find_variant
from doratune.codegen.weight_formats import stored_as
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import CASES, make_inputs, make_outputs

from .asm import assembler  # noqa: F401  a fixture
from .interpreter import GPU, complaint_of
from .test_packed import FORMATS, portable, refused

pytestmark = pytest.mark.usefixtures("assembler")

PACKED = find_variant("dora_linear_forward", "packed")
EVEN, RAGGED = (64, 256, 16), (37, 53, 5)
SHAPES = [EVEN, RAGGED, (64, 200, 24), (48, 1032, 40)]
"""(d_out, d_in, rank): blocks along rows; rows that begin inside a word; blocks that begin inside a row; the last words
of a row inside a tile, and rows beyond the last one."""
CONFIG = Config.parse("packed:block_k=128,block_n=32,overlap=0,split_k=2,num_warps=2,num_stages=2")


def config_of(**values: int) -> Config:
    return replace(CONFIG, params=tuple({**dict(CONFIG.params), **values}.items()))


def spec_of(form: str, shape: tuple[int, int, int], dtype: str = "fp16", **values: object) -> KernelSpec:
    d_out, d_in, rank = shape
    dims = {"d_out": d_out, "d_in": d_in, "rank": rank, "tokens": 16, "gpu": "h200"}
    usual = {"adapter": dtype, "bias": True, "dtype": dtype}
    return KernelSpec.create("dora_linear_forward", **{**dims, **usual, "weight": stored_as(form, dtype), **values})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_format_is_right_for_any_shape(form: str, shape: tuple[int, int, int]) -> None:
    if refused(form, shape):
        pytest.skip("no such shape in this format")
    spec = spec_of(form, shape)
    for split_k in (1, 2):
        source = render(spec, config_of(split_k=split_k))
        assert complaint_of(source, 5) is None, split_k
        assert complaint_of(source, 16, case="zero_scaling") is None, split_k


@pytest.mark.parametrize("form", ["nf4.nested", "int8", "hqq4", "fp8"])
def test_each_term_is_right_where_it_dominates(form: str) -> None:
    source = render(spec_of(form, (96, 256, 40), save=True), config_of())
    for case in CASES:
        assert complaint_of(source, 3, case=case) is None, case


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
def test_a_kernel_for_few_tokens_is_right_for_any_number(tokens: int) -> None:
    for split_k in (1, 3):
        assert complaint_of(render(spec_of("nf4", (64, 512, 16)), config_of(split_k=split_k)), tokens) is None


@pytest.mark.parametrize("form", ["nf4.nested", "hqq8", "int8", "fp8.tile.exact"])
@pytest.mark.parametrize(
    "values",
    [{"dtype": "fp32"}, {"adapter": "fp32"}, {"bias": False}, {"save": True}, {"rank": 1}, {"rank": 200}],
    ids=str,
)
def test_other_dtypes_and_operands(form: str, values: dict[str, object]) -> None:
    spec = spec_of(form, EVEN, **values)  # type: ignore[arg-type]
    for split_k in (1, 2):
        assert complaint_of(render(spec, config_of(split_k=split_k)), 7) is None, split_k


@pytest.mark.parametrize("form", ["nf4", "nf4.256.nested", "hqq4", "hqq8.strided", "fp8.tile"])
@pytest.mark.parametrize("changed", [{"split_k": 3}, {"split_k": 8}, {"block_n": 16}, {"block_n": 64}], ids=str)
def test_shares_and_tiles_add_up(form: str, changed: dict[str, int]) -> None:
    assert complaint_of(render(spec_of(form, (64, 1024, 40)), config_of(**changed)), 4) is None


def test_operands_may_be_rows_of_larger_matrices() -> None:
    """As h is, of which each projection of a group has some columns."""
    spec = spec_of("nf4.nested", (48, 256, 24), save=True)
    inputs, scaling = make_inputs(spec, 6)
    exact = definition(spec, inputs, scaling)
    outputs = make_outputs(spec, 6)
    for tensors in (inputs, outputs):
        for name in tensors.keys() & {"x", "h", "lora_B", "y", "inner"}:
            wide = torch.full(
                (len(tensors[name]), tensors[name].shape[1] + 13), float("nan"), dtype=tensors[name].dtype
            )
            tensors[name] = wide[:, 5:-8].copy_(tensors[name])
    for split_k in (1, 2):
        launch = load_module(render(spec, config_of(split_k=split_k))).launch
        launch(*inputs.values(), *outputs.values(), scaling)
        assert worst_error(spec, outputs, exact)[1] is None
        for output in outputs.values():
            around = output._base
            assert around is not None
            assert around[:, :5].isnan().all()
            assert around[:, -8:].isnan().all()
            output.fill_(float("nan"))


@pytest.mark.parametrize("form", ["nf4.nested", "fp4", "int8", "hqq4", "fp8"])
def test_what_other_gpus_decode_without_ptx_is_the_same(form: str) -> None:
    source = render(spec_of(form, EVEN, gpu="gfx942"), config_of())
    assert "asm" not in source.text
    assert complaint_of(portable(source), 5) is None


BREAKAGES = [
    ("nf4", "words >> 4", "words >> 0", "halves of a byte exchanged"),
    ("nf4", "x_2, x_6 = tl.split(even_odd)", "x_6, x_2 = tl.split(even_odd)", "columns of x out of order"),
    ("nf4", "[:, :, None]", "[:, :, None] * 1.001", "scales 1e-3 off"),
    ("nf4.nested", "+ scale_offset)", ")", "offset of the scales left out"),
    ("nf4.128.nested", "number // 256", "number // 128", "outer scales of other blocks"),
    ("nf4", "share * (K_STEPS * BLOCK_W) +", "0 * (K_STEPS * BLOCK_W) +", "a share read twice"),
    ("nf4", "tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)", "a share left out"),
    ("nf4", "share * BLOCK_R, RANK", "0 * BLOCK_R, RANK", "ranks counted twice"),
    ("nf4", "scaling * lora", "tl.abs(scaling) * lora", "sign of s lost"),
    ("nf4", "other=0.0) * inner", "other=0.0) * 0.0 + inner", "g forgotten"),
    ("nf4", "w.to(tl.float16)", "(w * 0.99).to(tl.float16)", "base product 1 % off"),
    ("int8", "0.007874", "0.007812", "128 steps in place of 127"),
    ("hqq4", "- zero", "- 1.01 * zero", "zero points 1 % off"),
    ("hqq4", ">> half", ">> 0", "only one half of the rows"),
    ("hqq4", "next_w * scale", "next_w", "every other column without its scale"),
    ("fp8", "2.0**120", "2.0**119", "exponents off by one"),
    ("fp8.tile", "* BLOCK_K) // 128", "* BLOCK_K) // 256", "scales of other tiles"),
    ("fp8.tile.exact", "acc += scale * product", "acc += product", "scales of tiles forgotten"),
]


@pytest.mark.parametrize(("form", "text", "broken", "what"), BREAKAGES, ids=[row[3] for row in BREAKAGES])
def test_a_wrong_term_is_caught(form: str, text: str, broken: str, what: str) -> None:
    source = render(spec_of(form, (160, 512, 80)), config_of())
    assert text in source.text, f"the template no longer says {text!r}: name another place to break"
    mutant = replace(source, text=source.text.replace(text, broken))
    case = "negative_scaling" if what == "sign of s lost" else "mixed"
    assert complaint_of(source, 5, case=case) is None
    assert complaint_of(mutant, 5, case=case) is not None


def test_a_value_is_rounded_as_the_library_rounds_it() -> None:
    """The fp64 definition multiplies by rounded values: by others, what is left of a sum that cancels is another."""
    spec = spec_of("nf4", (64, 512, 16), bias=False)
    inputs, _ = make_inputs(spec, 4, case="random")
    inputs["x"][:, 1::2] = -inputs["x"][:, ::2]
    inputs["h"].zero_()
    exact = definition(spec, inputs, 0.0)
    outputs = make_outputs(spec, 4)
    load_module(render(spec, config_of())).launch(*inputs.values(), *outputs.values(), 0.0)
    assert worst_error(spec, outputs, exact)[1] is None
    wide = definition(replace(spec, weight="nf4.fp32", activation="fp32", adapter="fp32"), inputs, 0.0)
    assert worst_error(spec, {"y": wide["y"].half()}, exact)[1] is not None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_first_config_is_one_that_the_gpu_accepts(form: str, dtype: str) -> None:
    for tokens in (1, 16):
        spec = spec_of(form, (4096, 4096, 64), dtype, tokens=tokens)
        assert default_config(spec, GPU).variant == "packed"
        assert check_config(spec, PACKED.seeds(spec, GPU)[0], GPU) is None


def test_what_no_kernel_is_for_is_refused_in_words() -> None:
    with pytest.raises(SpecError, match="for at most 16 tokens, got tokens=128"):
        spec_of("nf4", EVEN, tokens=128)
    with pytest.raises(SpecError, match="activation=fp16 with nf4 weights"):
        replace(spec_of("nf4", EVEN, "bf16"), activation="fp16")
    with pytest.raises(SpecError, match="lora_compose"):
        KernelSpec.parse("lora_compose/d_out=64/rank=8/tokens=1/weight=nf4/activation=bf16/adapter=bf16@h200")
    plain = find_variant("dora_linear_forward", "split_k")
    assert plain.unavailable(spec_of("nf4", EVEN), GPU) == "the variant reads plain weights, W is nf4.fp16"
    config = config_of(split_k=1, overlap=1)
    assert "overlaps nothing" in str(check_config(spec_of("nf4", EVEN), config, GPU))
    assert "at least 128" in str(check_config(spec_of("nf4", EVEN), config_of(block_k=64), GPU))
