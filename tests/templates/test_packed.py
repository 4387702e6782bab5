"""The norms of a W in a weight format agree with the fp64 norm of what the format decodes to: every format, where each
term dominates, for rows and blocks that divide nothing; and a wrong decode does not pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import Variant, check_config, find_variant
from doratune.codegen.weight_formats import KINDS, parse_format, stored_as
from doratune.nn.norm_layer import products_of
from doratune.nn.norm_table import places_of
from doratune.tuner.inputs import CASES

from ..nn.test_stored_norm_pass import aligned, layer, wanted
from .asm import assembler  # noqa: F401  a fixture
from .interpreter import GPU, IDS, complaint_of

pytestmark = pytest.mark.usefixtures("assembler")

FORMATS = [
    "nf4",
    "nf4.256.nested",
    "fp4.128",
    "int8",
    "ao8",
    "ao8.tensor",
    "ao8.block",
    "ao8.block.zeros.scales_fp32",
    "hqq8",
    "hqq8.strided",
    "hqq4",
    "hqq4.strided",
    "fp8",
    "fp8.tensor",
    "fp8.tile",
    "fp8.exact",
    "fp8.tile.exact",
]
SINGLE, GROUPED = find_variant("weight_norm", "packed"), find_variant("weight_norm_group", "packed")
SHAPES = [(32, 64, 16), (37, 53, 5), (64, 72, 16)]
"""(d_out, d_in, rank): blocks along rows; rows that begin inside a word; blocks that begin inside a row."""
CONFIG = (
    "packed:block_k=64,block_m=32,block_n=16,finish_ranks=16,finish_rows=32,gram_block=16,gram_block_k=32,gram_split=1,"
    "overlap=0,rank_tiles=1,split_k=1,num_warps=2,num_stages=2"
)


def config_of(**values: int) -> Config:
    config = Config.parse(CONFIG)
    return replace(config, params=tuple({**dict(config.params), **values}.items()))


def spec_of(op: str, form: str, shape: tuple[int, int, int], dtype: str = "fp16", **values: object) -> KernelSpec:
    d_out, d_in, rank = shape
    dims = {"d_out": d_out, "d_in": d_in, "rank": rank, "layers": 2, "gpu": "h200"}
    usual = {"adapter": "fp32", "magnitude": "fp32", "autocast": dtype != "fp32"}
    return KernelSpec.create(op, **{**dims, **usual, "weight": stored_as(form, dtype), **values})


def portable(source: Source) -> Source:
    """With the one product that the interpreter does not know in the form that it does."""
    return replace(source, text=source.text.replace("bf16x6", "ieee"))


def refused(form: str, shape: tuple[int, int, int]) -> bool:
    return parse_format(form).refuse(*shape[:2]) is not None


def test_every_kind_of_format_is_here() -> None:
    assert {parse_format(form).kind for form in FORMATS} == KINDS.keys()
    spreads = {(parse_format(form).kind, parse_format(form).spread) for form in FORMATS}
    assert spreads == {(name, spread) for name, kind in KINDS.items() for spread in kind.spreads}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_format_is_right_for_any_shape(form: str, shape: tuple[int, int, int]) -> None:
    if refused(form, shape):
        pytest.skip("no such shape in this format")
    ops = ("weight_norm", "weight_norm_group") if shape == SHAPES[0] else ("weight_norm_group",)
    for op in ops:
        spec = spec_of(op, form, shape, save=op == "weight_norm")
        assert complaint_of(render(spec, config_of(finish_rows=16)), 1, case="cross_term") is None, op


@pytest.mark.parametrize("form", ["nf4", "int8", "hqq4", "fp8"])
def test_each_term_is_right_where_it_dominates(form: str) -> None:
    """Of few rows: those of which the terms cancel are added up one after another, which takes the interpreter long."""
    spec = spec_of("weight_norm", form, (16, 64, 16))
    source = render(spec, config_of(gram_split=2, block_m=16, finish_rows=16))
    for case in CASES:
        assert complaint_of(source, 1, case=case) is None, case


@pytest.mark.parametrize("form", ["nf4.nested", "hqq8", "int8"])
@pytest.mark.parametrize(
    "values",
    [
        {"save": True, "dtype": "fp32"},
        {"autocast": False, "save": True},
        {"magnitude": None, "adapter": "fp16", "autocast": False},
    ],
    ids=["fp32", "exact-adapters", "bare"],
)
def test_other_dtypes_and_operands(form: str, values: dict[str, object]) -> None:
    spec = spec_of("weight_norm", form, SHAPES[0], **values)  # type: ignore[arg-type]
    assert complaint_of(render(spec, config_of()), 1) is None


@pytest.mark.parametrize("form", ["nf4.nested", "hqq4", "fp8.tile.exact"])
@pytest.mark.parametrize("changed", [{"split_k": 2, "gram_split": 2}, {"split_k": 3}, {"rank_tiles": 2}], ids=str)
def test_shares_and_groups_of_ranks_add_up(form: str, changed: dict[str, int]) -> None:
    op = "weight_norm_group" if changed.get("split_k") == 2 else "weight_norm"
    spec = spec_of(op, form, (64, 192, 40), save=op == "weight_norm")
    assert complaint_of(render(spec, config_of(block_m=64, **changed)), 1, case="cross_term") is None


@pytest.mark.parametrize("op", ["weight_norm", "weight_norm_group"])
def test_rows_that_nearly_cancel_are_added_up_again_from_the_codes(op: str) -> None:
    """The case ``mixed`` of a group has such rows; here W is what s*B@A takes away, as far as its codes can be that."""
    for form in ("nf4.nested", "hqq4.strided", "int8"):
        spec = spec_of(op, form, (16, 64, 16), save=op == "weight_norm")
        source = render(spec, config_of(block_m=16, finish_rows=16))
        assert complaint_of(source, 1) is None, form
        broken = replace(source, text=source.text.replace("w + s_wide * ba", "w + 0.9 * s_wide * ba"))
        assert op == "weight_norm" or complaint_of(broken, 1) is not None, form


@pytest.mark.parametrize("form", ["nf4.nested", "fp4", "int8", "hqq4", "fp8"])
def test_what_other_gpus_decode_without_ptx_is_the_same(form: str) -> None:
    spec = spec_of("weight_norm", form, SHAPES[0], gpu="gfx942", save=True)
    source = render(spec, config_of())
    assert "asm" not in source.text
    assert complaint_of(portable(source), 1) is None


BREAKAGES = [
    ("nf4", "words >> 4", "words >> 0", "halves of a byte exchanged"),
    ("nf4", "(w_0, w_4)", "(w_4, w_0)", "elements out of order"),
    ("nf4", "[:, :, None]", "[:, :, None] * 1.0001", "scales 1e-4 off"),
    ("nf4.nested", "+ scale_offset)", ")", "offset of the scales left out"),
    ("nf4.128.nested", "number // 256", "number // 128", "outer scales of other blocks"),
    ("int8", "0.007874", "0.007812", "128 steps in place of 127"),
    ("hqq4", "- zero", "- 1.01 * zero", "zero points 1 % off"),
    ("hqq4", ">> half", ">> 0", "only one half of the rows"),
    ("hqq4", "rounded(value_of(words) - zero", "(value_of(words) - zero", "a rounding left out"),
    ("fp8", "2.0**120", "2.0**119", "exponents off by one"),
    ("fp8.tile", "// 128", "// 64", "scales of other tiles"),
    ("nf4", "squares += w_7 * w_7", "squares += w_6 * w_7", "a square of two elements"),
]


@pytest.mark.parametrize(("form", "text", "broken", "what"), BREAKAGES, ids=[row[3] for row in BREAKAGES])
def test_a_wrong_decode_is_caught(form: str, text: str, broken: str, what: str) -> None:
    spec = spec_of("weight_norm", form, (160, 256, 16), save=True)
    source = render(spec, config_of(block_m=128, block_k=64))
    head, kernel, rest = source.text.partition("def sums_kernel")
    changed = head.replace(text, broken) + kernel + rest.replace(text, broken)
    assert changed != source.text, f"the template no longer says {text!r}: name another place to break"
    assert complaint_of(replace(source, text=changed), 1) is not None


@pytest.mark.parametrize("variant", [SINGLE, GROUPED], ids=IDS.get)
@pytest.mark.parametrize("form", FORMATS)
def test_the_first_config_is_one_that_the_gpu_accepts(variant: Variant, form: str) -> None:
    spec = spec_of(variant.op, form, (4096, 4096, 64), "bf16")
    assert check_config(spec, variant.seeds(spec, GPU)[0], GPU) is None


@pytest.mark.parametrize("form", ["nf4.nested.fp32", "int8.fp32", "hqq4.fp32"])
def test_a_grouped_norm_finds_the_tensors_of_layers_wherever_they_are(form: str) -> None:
    """As a norm pass starts it: each tensor of each layer in memory of its own, in any order."""
    layers = [aligned(layer(form, seed)) for seed in (2, 0, 1)]
    fits, anchors, places = places_of(layers)
    assert len(fits) == 3
    how = products_of(layers[0])
    assert how is not None
    shape = (*layers[0].weight.shape, layers[0].lora_A.shape[0])
    spec = spec_of("weight_norm_group", str(how.weight), shape, "fp32")
    launch = load_module(render(spec, config_of(block_m=16, finish_rows=16))).launch
    for row in (places, places[::-1]):
        norm, g = torch.full((2, 3, spec.d_out), float("nan"))
        launch(torch.tensor(row), *anchors, norm, g, layers[0].scaling)
        for each, *values in zip(layers if row is places else layers[::-1], norm, g, strict=True):
            for value, exact in zip(values, wanted(each), strict=True):
                torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)
