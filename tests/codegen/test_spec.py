"""A spec and a config are values that print and parse back exactly, hold only what matters, and refuse what is wrong
with a message that names the field and what would be right."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import doratune.codegen.spec as spec_module
from doratune.codegen.ops import DTYPE_BYTES, OPS
from doratune.codegen.spec import FLAGS, TOKEN_BUCKETS, Config, KernelSpec, SpecError, bucket_tokens

from ..specs import dtype_for
from ..strategies import flags_of


@st.composite
def specs(draw: st.DrawFn) -> KernelSpec:
    op = draw(st.sampled_from(sorted(OPS)))
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    adapter = draw(st.sampled_from([dtype, "fp32"]))
    rounds = "autocast" in OPS[op].flags and adapter == "fp32" != dtype
    return KernelSpec.create(
        op,
        d_out=draw(st.integers(1, 1 << 20)),
        d_in=draw(st.integers(1, 1 << 20)),
        rank=draw(st.integers(1, 4096)),
        tokens=draw(st.integers(1, 1 << 20)),
        dtype=dtype_for(op, dtype),
        adapter=adapter,
        magnitude=draw(st.sampled_from([None, "fp32", "bf16"])),
        gpu=draw(st.sampled_from(["h200", "rtx4090", "sm_90", "gfx942", "cpu"])),
        autocast=rounds and draw(st.booleans()),
        **draw(flags_of(op)),
    )


@given(specs())
def test_a_spec_prints_and_parses_back(spec: KernelSpec) -> None:
    assert KernelSpec.parse(str(spec)) == spec
    assert hash(KernelSpec.parse(str(spec))) == hash(spec)


@given(
    st.dictionaries(st.sampled_from(["block_t", "block_n", "split_k"]), st.integers(0, 4096)),
    st.integers(0, 32),
    st.integers(0, 8),
)
def test_a_config_prints_and_parses_back(params: dict[str, int], warps: int, stages: int) -> None:
    config = Config.create("tile", num_warps=warps, num_stages=stages, **params)
    assert Config.parse(str(config)) == config
    assert Config.from_dict(config.to_dict()) == config


def test_what_an_operation_does_not_depend_on_is_no_part_of_its_spec() -> None:
    def compose(d_in: int) -> KernelSpec:
        return KernelSpec.create(
            "lora_compose",
            d_out=8,
            d_in=d_in,
            rank=4,
            tokens=3,
            dtype="bf16",
            adapter="bf16",
            magnitude="fp32",
            gpu="h200",
        )

    assert compose(16) == compose(999)
    assert str(compose(16)) == "lora_compose/d_out=8/rank=4/tokens=16/activation=bf16/adapter=bf16@h200"


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 1), (2, 16), (16, 16), (17, 128), (4096, 4096), (4097, 8192), (10**6, 32768)]
)
def test_token_counts_fall_into_the_smallest_bucket_that_holds_them(tokens: int, bucket: int) -> None:
    assert bucket_tokens(tokens) == bucket
    assert bucket in TOKEN_BUCKETS


GOOD = "lora_compose/d_out=64/rank=8/tokens=16/activation=bf16/adapter=bf16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD, "names no GPU"),
        (GOOD + "@", "names no GPU"),
        (GOOD + "@H 200!", "gpu must be a name such as h200"),
        (GOOD.replace("lora_compose", "lora_compse") + "@h200", "did you mean lora_compose"),
        (GOOD.replace("rank", "rnk") + "@h200", "unknown field 'rnk'; did you mean rank"),
        (GOOD.replace("rank=8", "rank=8.5") + "@h200", "rank='8.5' is not a whole number"),
        (GOOD.replace("rank=8", "rank=0") + "@h200", "rank=0: must be an integer of at least 1"),
        (GOOD.replace("/rank=8", "") + "@h200", "lora_compose takes d_out, rank, tokens"),
        (GOOD.replace("rank=8", "rank=8/rank=9") + "@h200", "rank is given twice"),
        (GOOD.replace("tokens=16", "tokens=17") + "@h200", "not a token bucket; use 128"),
        (GOOD.replace("activation=bf16", "activation=bf8") + "@h200", "unsupported dtype; use one of bf16, fp16, fp32"),
        (GOOD.replace("adapter=bf16", "adapter=fp16") + "@h200", "adapters are bf16 or fp32"),
        (GOOD.replace("/adapter=bf16", "") + "@h200", "needs the adapter dtype"),
        (GOOD + "/d_in=4@h200", "does not depend on d_in"),
        (GOOD + "/weight=bf16@h200", "does not depend on the weight dtype"),
        (GOOD + "/biass@h200", "unknown flag 'biass'; did you mean bias"),
        (GOOD + "/bias/delta@h200", "bias and delta exclude each other"),
        ("compose_backward/d_out=4/tokens=1/activation=bf16/bias/output@h200", "y - b has no digits left"),
        (GOOD + "/autocast@h200", "got bf16 adapters and bf16 tensors"),
        (GOOD.replace("bf16", "fp32") + "/autocast@h200", "got fp32 adapters and fp32 tensors"),
        ("compose_forward/d_out=4/tokens=1/activation=bf16/autocast@h200", "compose_forward has no flag 'autocast'"),
        (
            "compose_backward_exact/d_out=4/d_in=4/rank=4/tokens=1/weight=bf16/activation=fp16/adapter=bf16@h200",
            "activation=fp16 with bf16 weights: a product takes one dtype for both",
        ),
        ("compose_backward/d_out=4/tokens=1/activation=bf16/save@h200", "has no flag 'save'"),
        (
            "dora_linear_forward/d_out=4/d_in=4/rank=2/tokens=1/weight=bf16/activation=fp16/adapter=fp32@h200",
            "activation=fp16 with bf16 weights: a product takes one dtype for both",
        ),
        ("", "names no GPU"),
    ],
)
def test_a_typo_in_a_spec_is_named_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        KernelSpec.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("rank", [0, -3, 2.5, "8", True, None])
def test_a_rank_that_is_no_positive_integer_is_refused_for_every_operation_that_has_one(rank: object) -> None:
    with pytest.raises(SpecError, match="rank"):
        KernelSpec.create("lora_compose", d_out=8, rank=rank, tokens=1, dtype="bf16", adapter="bf16", gpu="h200")


@pytest.mark.parametrize(
    "text",
    [
        "tile",
        "tile:block_n=4",
        "tile:block_n=x,num_warps=1,num_stages=1",
        "Tile!:num_warps=1,num_stages=1",
        "t:num_warps=1,num_warps=2",
    ],
)
def test_a_malformed_config_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        Config.parse(text)


@pytest.mark.parametrize("data", [None, [], {"variant": "tile"}, {"variant": "t", "num_warps": "4", "num_stages": 1}])
def test_json_that_is_no_config_is_refused(data: object) -> None:
    with pytest.raises(SpecError):
        Config.from_dict(data)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(spec_module).failed == 0
    assert set(FLAGS) == {"bias", "delta", "save", "output", "autocast", "gelu", "gelu_tanh"}


def test_floors_count_every_operand_once() -> None:
    spec = KernelSpec.create("compose_forward", d_out=100, tokens=16, dtype="bf16", bias=True, save=True, gpu="h200")
    assert spec.contract.floor_bytes(spec) == 4 * 16 * 100 * 2 + 100 * 4 + 100 * 2
    exact = KernelSpec.create(
        "compose_backward_exact", d_out=100, d_in=50, rank=4, tokens=16, dtype="bf16", adapter="bf16", gpu="h200"
    )
    assert exact.contract.floor_bytes(exact) == 3 * 100 * 4  # where y can be divided by every g
    assert exact.contract.operand_bytes(exact) == 3 * 100 * 4 + 2 * (16 * (100 + 50 + 4) + 100 * 54)
    norm = KernelSpec.create("weight_norm", d_out=100, d_in=50, rank=4, dtype="bf16", adapter="fp32", gpu="h200")
    assert norm.contract.floor_bytes(norm) == 100 * 50 * 2 + 4 * (50 + 100) * 4 + 2 * 100 * 4
    assert norm.contract.matrix_flops(norm) == 2 * 100 * 50 * 4
