"""A weight format is a value that prints and parses back exactly, lists its tensors, and is refused with the remedy."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import doratune.codegen.weight_formats as module
from doratune.codegen.spec import KernelSpec, SpecError
from doratune.codegen.weight_formats import KINDS, FormatError, WeightFormat, is_format, wide_dtype


@st.composite
def formats(draw: st.DrawFn) -> WeightFormat:
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    spread = draw(st.sampled_from(kind.spreads))
    grouped = spread in ("block", "strided")
    return WeightFormat(
        name,
        spread,
        group=draw(st.sampled_from([32, 64, 128, 4096])) if grouped else 0,
        nested=draw(st.sampled_from([0, 128, 256])) if kind.nests else 0,
        zeros=kind.has_zeros and grouped and (not kind.optional_zeros or draw(st.booleans())),
        exact=not grouped and draw(st.booleans()),
        scales=kind.scales or draw(st.sampled_from(["bf16", "fp32"])),
        dtype=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
    )


@given(formats())
def test_a_format_prints_and_parses_back(form: WeightFormat) -> None:
    assert WeightFormat.parse(str(form)) == form
    assert is_format(str(form))
    assert wide_dtype(str(form)) == form.dtype


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("nf4.64.bf16", "nf4"),
        ("nf4.fp16.nested256.128", "nf4.128.nested.fp16"),
        ("int8.row.exact", "int8"),
        ("ao8.block.32", "ao8.block"),
        ("ao8.scales_bf16", "ao8"),
        ("hqq4.zeros", "hqq4"),
        ("fp8.tile.exact", "fp8.tile.exact"),
    ],
)
def test_what_is_usual_for_a_kind_is_left_out(text: str, plain: str) -> None:
    assert str(WeightFormat.parse(text)) == plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nf5", "unknown weight format 'nf5'; did you mean nf4"),
        ("nf4.nestd", "unknown part 'nestd'; did you mean nested"),
        ("nf4.64.128", "gives the group twice"),
        ("nf4.48", "must be a power of two"),
        ("nf4.row", "scales are spread by block, not by 'row'"),
        ("nf4.zeros", "it has no zero points"),
        ("nf4.exact", "only scales of rows, tiles or the tensor"),
        ("int8.64", "a group size belongs to block and strided scales only"),
        ("hqq4.nested", "its scales are never quantised"),
        ("fp8.scales_bf16", "its scales are fp32"),
        ("hqq4.scales_int8", "scales must be one of"),
    ],
)
def test_a_format_that_does_not_exist_is_refused_with_the_valid_ones(text: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        WeightFormat.parse(text)
    assert said in str(caught.value)


def test_the_tensors_of_nested_scales_end_in_partial_blocks() -> None:
    stored = WeightFormat.parse("nf4.nested").operands(37, 53)
    assert [(each.name, each.elements, each.dtype) for each in stored] == [
        ("weight", 981, "u8"),
        ("scales", 31, "u8"),
        ("scale_table", 256, "fp32"),
        ("outer_scales", 1, "fp32"),
        ("scale_offset", 1, "fp32"),
    ]


SPEC = "weight_norm/d_out=64/d_in=96/rank=8/weight={}/adapter={}@h100"


def test_a_format_in_a_spec_is_written_in_its_own_form_and_its_dtype_decides_the_others() -> None:
    spec = KernelSpec.parse(SPEC.format("nf4.64", "bf16"))
    assert str(spec) == SPEC.format("nf4", "bf16")
    assert (spec.wide, spec.format) == ("bf16", WeightFormat("nf4"))
    assert KernelSpec.parse(SPEC.format("nf4", "fp32/autocast")).autocast
    with pytest.raises(SpecError, match="adapter=bf16 with fp16 tensors"):
        KernelSpec.parse(SPEC.format("nf4.fp16", "bf16"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SPEC.format("nf5", "bf16"), "or a weight format (nf4, fp4"),
        (SPEC.format("nf4.row", "bf16"), "weight=nf4.row: nf4: scales are spread by block"),
        (SPEC.format("hqq4.4096", "bf16"), "needs a multiple of 4096 elements"),
        (SPEC.format("ao8.block.64", "bf16"), "d_in must be a multiple of 64"),
        (
            "weight_norm_exact/d_out=4/d_in=4/rank=4/weight=nf4/adapter=bf16@h100",
            "reads plain weights only (weight formats: weight_norm, weight_norm_group, dora_linear_forward, "
            "weight_dequantise)",
        ),
    ],
)
def test_a_spec_with_a_format_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        KernelSpec.parse(text)
    assert said in str(caught.value)


def test_the_bytes_of_a_norm_are_those_of_the_packed_weight() -> None:
    plain, packed = (KernelSpec.parse(SPEC.format(weight, "bf16")) for weight in ("bf16", "nf4"))
    saved = plain.contract.floor_bytes(plain) - packed.contract.floor_bytes(packed)
    assert saved == 64 * 96 * 2 - (64 * 96 // 2 + 64 * 96 // 64 * 4)


def test_a_table_has_a_column_for_each_tensor_of_a_layer() -> None:
    spec = KernelSpec.create("weight_norm_group", d_out=64, d_in=96, rank=8, weight="nf4.nested", adapter="fp32")
    assert spec.places == len(spec.contract.inputs_of(spec)) - 1 == 8


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
