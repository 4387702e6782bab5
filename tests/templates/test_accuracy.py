"""Every kernel variant agrees with the fp64 definition within DESIGN's bounds, on inputs where each term dominates,
for any shape; and the gate that says so does catch a kernel with a wrong term.

Runs in Triton's interpreter, in fp32 and fp16 (its bf16 products are wrong); tests/gpu runs the same in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doratune.codegen.module import load_module
from doratune.codegen.ops import OPS
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import Variant, check_config, find_variant
from doratune.nn.norm_cache import NormCache
from doratune.nn.norm_layer import NormLayer
from doratune.nn.norm_table import places_of
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import CASES, make_inputs, make_outputs

from ..strategies import accepted_configs
from .interpreter import (
    GPU,
    IDS,
    INTERPRETED,
    complaint_of,
    forms,
    interpretable,
    served_spec,
    small_config,
    spec_of,
)

pytestmark = pytest.mark.usefixtures("interpreter")

CASE_TABLE = [
    pytest.param(variant, form, id=f"{IDS[variant]}-{'-'.join(form) or 'plain'}")
    for variant in INTERPRETED
    for form in forms(variant.op)
]


@pytest.mark.parametrize(("variant", "form"), CASE_TABLE)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_term_is_right_where_it_dominates(variant: Variant, form: dict[str, object], dtype: str) -> None:
    if variant.descriptors and dtype == "fp32":
        pytest.skip("tensor descriptors feed 16-bit products only")
    if "autocast" in form and dtype == "fp32":
        pytest.skip("there is nothing to round")
    spec = served_spec(variant, dtype, **form)
    source = render(spec, small_config(variant, spec))
    for case in CASES:
        assert complaint_of(source, 37, case=case) is None, case


@pytest.mark.parametrize("variant", [v for v in INTERPRETED if "adapter" in OPS[v.op].dtypes], ids=IDS.get)
def test_fp32_adapters_with_16_bit_weights_lose_nothing(variant: Variant) -> None:
    spec = served_spec(variant, "fp16", adapter="fp32")
    if variant.op != "weight_norm" and variant.unavailable(spec, GPU) is not None:
        pytest.skip("the variant leaves fp32 adapters to others")
    source = render(spec, small_config(variant, spec))
    for case in ("random", "cross_term", "large_lora", "negative_scaling", "mixed"):
        assert complaint_of(source, 37, case=case) is None, case


@pytest.mark.parametrize("variant", [v for v in INTERPRETED if "autocast" in OPS[v.op].flags], ids=IDS.get)
def test_autocast_is_seen_to_round_the_adapters(variant: Variant) -> None:
    """In products that adapters dominate, exact and rounded ones cannot pass for each other."""
    rounded, exact = (spec_of(variant.op, "fp16", adapter="fp32", autocast=autocast) for autocast in (True, False))
    inputs, scaling = make_inputs(exact, 37, case="mixed")
    for name in {"lora_A", "lora_B"} & inputs.keys():
        inputs[name] = (inputs[name].half() * (1.0 + 2.0**-12)).float() if variant.op != "weight_norm" else inputs[name]
    for spec, other in ((rounded, exact), (exact, rounded)):
        outputs = make_outputs(spec, 37)
        load_module(render(spec, small_config(variant, spec))).launch(*inputs.values(), *outputs.values(), scaling)
        assert worst_error(spec, outputs, definition(spec, inputs, scaling))[1] is None
        assert worst_error(spec, outputs, definition(other, inputs, scaling))[0] > 0.0


def test_a_grouped_norm_finds_layers_wherever_they_are() -> None:
    """As a norm pass starts it: each layer in memory of its own, in any order, at distances from the lowest ones."""
    variant = find_variant("weight_norm_group", "tiles")
    spec = spec_of(variant.op, "fp16", d_in=32, rank=32)
    stacks, scaling = make_inputs(spec, 5, case="random")
    layers = []
    for index in (3, 0, 4, 1, 2):
        tensors = [stacks[operand.name][index].clone() for operand in spec.contract.inputs[1:]]
        layers.append(NormLayer(*tensors, scaling, NormCache()))
    fits, anchors, places = places_of(layers)
    assert fits == layers
    outputs = make_outputs(spec, 5)
    launch = load_module(render(spec, small_config(variant, spec))).launch
    launch(torch.tensor(places), *anchors, *outputs.values(), scaling)
    for layer, norm, g in zip(layers, *outputs.values(), strict=True):
        exact = (layer.weight.double() + scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
        torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(g.double(), layer.magnitude.double() / exact, rtol=1e-5, atol=0.0)


def test_dg_from_the_output_catches_a_wrong_bound() -> None:
    variant = find_variant("compose_backward", "columns")
    spec = spec_of("compose_backward", "fp16", output=True)
    source = render(spec, small_config(variant, spec))
    for broken in (">= SMALLEST_GAIN", "dg, axis=0) / tl.where(divisible, g, 1.0)"):
        assert broken in source.text
    assert complaint_of(source, 37) is None
    mutant = replace(source, text=source.text.replace("tl.where(divisible, g, 1.0)", "1.0"))
    assert complaint_of(mutant, 37) is not None
    assert complaint_of(replace(source, text=source.text.replace(">= SMALLEST_GAIN", "> 0.0")), 37) is not None


@pytest.mark.parametrize("op", ["compose_backward_exact"])
@pytest.mark.parametrize("gains", ["all", "last", "nan"])
def test_columns_that_y_says_nothing_about_are_exact_wherever_they_are(op: str, gains: str) -> None:
    variant = find_variant(op, "tiles")
    spec = spec_of(op, "fp16", d_out=150)
    source = render(spec, small_config(variant, spec))
    inputs, scaling = make_inputs(spec, 37, case="random")
    inputs["g"][slice(None) if gains == "all" else slice(-1, None)] = float("nan") if gains == "nan" else 0.0
    exact = definition(spec, inputs, scaling)
    outputs = {"dg_exact": inputs["dg"]}  # also in place
    load_module(source).launch(*inputs.values(), inputs["dg"], scaling)
    assert worst_error(spec, outputs, exact)[1] is None


@pytest.mark.parametrize("magnitude", ["fp32", "fp16"])
def test_the_gradient_of_a_magnitude_is_judged(magnitude: str) -> None:
    spec = spec_of("compose_backward_exact", "fp16", d_out=150, magnitude=magnitude)
    source = render(spec, small_config(find_variant("compose_backward_exact", "tiles"), spec))
    assert complaint_of(source, 37) is None
    broken = source.text.replace("dg / tl.maximum(norm", "dg / tl.maximum(1.01 * norm")
    assert complaint_of(replace(source, text=broken), 37) is not None


def test_the_gradient_of_a_magnitude_over_a_norm_of_zero_is_finite() -> None:
    spec = spec_of("compose_backward_exact", "fp16", d_out=150, magnitude="fp32")
    source = render(spec, small_config(find_variant("compose_backward_exact", "tiles"), spec))
    inputs, scaling = make_inputs(spec, 37, case="mixed")
    inputs["norm"][::7] = 0.0
    exact = definition(spec, inputs, scaling)["dmagnitude"]
    dmagnitude = torch.full((150,), float("nan"))
    load_module(source).launch(*inputs.values(), dmagnitude, scaling)
    assert dmagnitude.isfinite().all()
    torch.testing.assert_close(dmagnitude.double(), exact, rtol=1e-3, atol=1e-3)


TOKENS = [
    pytest.param(variant, tokens, id=f"{tokens}-{IDS[variant]}")
    for variant in INTERPRETED
    for tokens in ([1, 2, 15, 16, 17, 129, 300] if "tokens" in OPS[variant.op].dims else [1])
]


@pytest.mark.parametrize(("variant", "tokens"), TOKENS)
def test_a_kernel_tuned_for_one_token_count_is_right_for_any_other(variant: Variant, tokens: int) -> None:
    spec = spec_of(variant.op, "fp16", tokens=16)
    for config in variant.seeds(spec, GPU)[:2]:
        assert complaint_of(render(spec, interpretable(config)), tokens) is None


@st.composite
def shapes_and_configs(draw: st.DrawFn) -> tuple[KernelSpec, Config, int]:
    """A spec of any small shape, a config that its variant does not refuse, and a number of tokens."""
    variant = draw(st.sampled_from(INTERPRETED))
    step = 8 if variant.descriptors else 1  # tensor descriptors need rows of a multiple of 16 bytes
    size = st.integers(1, 12 if step > 1 else 90).map(lambda value: value * step)
    tokens = draw(st.integers(1, 90))
    dtype = "fp16" if variant.descriptors else draw(st.sampled_from(["fp32", "fp16"]))
    exact = not (variant.descriptors and variant.op == "dora_linear_forward")  # that variant takes no fp32 adapters
    adapter = draw(st.sampled_from([dtype, "fp32"])) if exact else dtype
    spec = spec_of(variant.op, dtype, adapter, d_out=draw(size), d_in=draw(size), rank=draw(size), tokens=tokens)
    choices = {**variant.choices(spec, GPU)}
    if "programs" in choices:
        choices["programs"] = (1, 2, 3)
    if "split_k" in choices:
        choices["split_k"] = (1, 2, 4)
    start = next(config for config in variant.seeds(spec, GPU) if variant.refuse(spec, config, GPU) is None)
    accepted = accepted_configs(start, choices, lambda config: variant.refuse(spec, config, GPU) is None)
    return spec, draw(accepted), tokens


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=shapes_and_configs(), seed=st.integers(0, 1 << 30))
def test_any_shape_is_right_with_any_config_the_gpu_accepts(case: tuple[KernelSpec, Config, int], seed: int) -> None:
    spec, config, tokens = case
    assert complaint_of(render(spec, interpretable(config)), tokens, seed=seed) is None


BREAKAGES = [
    ("weight_norm-fused", "acc = tl.dot(w, a, acc", "acc = tl.dot(w, a * 0.98, acc", "cross term 2 % off"),
    ("weight_norm-fused", "0.5 * scaling * gram", "0.505 * scaling * gram", "Gram term 1 % off"),
    ("weight_norm-fused", "(2.0 * scaling) * dots", "(2.0 * scaling) * dots + 1e-6", "constant added"),
    ("weight_norm-tma", "part = (step // GRAM_STEPS) * RANK", "part = 0 * step", "low part replaced by the high part"),
    ("weight_norm-tma fp32", "part = (step % 2) * RANK", "part = 0 * step", "A's low part replaced by the high part"),
    ("weight_norm-tma fp32", "tl.where(product == 1, RANK, 0)", "0", "A's low part left out of G"),
    ("weight_norm-tma fp32", "== 0, D_OUT, 0)", "== 9, D_OUT, 0)", "B's low part left out of G's term"),
    ("lora_compose-tma fp32", "part = (step % 2) * D_OUT", "part = 0 * step", "B's low part replaced by the high part"),
    ("weight_norm-library", "2.0 * tl.sum(cross", "1.98 * tl.sum(cross", "the library's cross term 1 % off"),
    ("weight_norm-library", "range(0, WA_SHARES)", "range(1, WA_SHARES)", "a share of W @ A.T left out"),
    ("weight_norm-library", "range(0, SHARES)", "range(1, SHARES)", "a share of G left out"),
    ("weight_norm-library", "/ 2.0**14", "/ 2.0**30", "G beyond fp16"),
    (
        "weight_norm-library fp32",
        "wa += tl.load(wa_ptrs + RANK",
        "wa += 0.0 * tl.load(wa_ptrs",
        "A's low part left out",
    ),
    ("lora_compose-library", "scaling * lora", "tl.abs(scaling) * lora", "sign of s lost"),
    ("lora_compose-library fp32", "copy_(lora_b - high)", "copy_(high)", "B's low part replaced by the high part"),
    ("dora_linear_forward-library", "base + scaling", "0.99 * base + scaling", "base product 1 % off"),
    ("lora_compose-tile", "+ scaling * lora", "+ tl.abs(scaling) * lora", "sign of s lost"),
    ("lora_compose-tma", "g * inner", "(g * 1.002) * inner", "g off by one bf16 step"),
    ("dora_linear_forward-tile", "acc *= scaling", "acc *= tl.abs(scaling)", "sign of s lost"),
    ("dora_linear_forward-tile", "acc = tl.dot(x, w, acc)", "acc = tl.dot(x, w * 0.99, acc)", "base product 1 % off"),
    (
        "dora_linear_forward-tma_persistent",
        "range(tl.program_id(0), t_tiles * N_TILES",
        "range(tl.program_id(0), t_tiles * N_TILES - 1",
        "last tile left out",
    ),
    ("dora_linear_forward-split_k", "range(share * BLOCK_K, RANK", "range(0 * BLOCK_K, RANK", "ranks counted twice"),
    ("dora_linear_forward-split_k", "tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)", "a share left out"),
    ("compose_forward-tile", "y = g * inner", "y = inner", "g forgotten"),
    ("compose_backward-columns", "dg += dy * inner", "dg += dy * inner * (start < 24)", "last rows of a chunk dropped"),
    ("compose_backward_exact-tiles", "inner += scaling * share", "inner += 1.01 * scaling * share", "B's term 1 % off"),
    ("compose_backward_exact-tiles", "inner += share", "inner += share * (first == 0)", "x's later columns dropped"),
    ("compose_backward_exact-tiles", "tl.where(tiny, sums, dg)", "sums", "good columns replaced too"),
    ("adapter_backward-rows", "g * product", "g * g * product", "g twice"),
    ("adapter_backward-rows", "sums += b * product", "sums += 0.99 * b * product", "rank-r term 1 % off"),
    ("adapter_backward-rows", "product = scaling *", "product = tl.abs(scaling) *", "sign of s lost"),
    ("weight_norm_exact-rows", "w + s_wide * ba", "w + 0.999 * s_wide * ba", "BA 1e-3 off where it takes W away"),
    ("weight_norm_exact-rows", "weight_sq + s * s * summands", "weight_sq", "A's rows that are alike not noticed"),
    ("weight_norm_exact-rows", "tl.where(lane == i, cancels, 0)", "1 + 0 * cancels", "good rows replaced too"),
    ("compose_swiglu-tile", "h_ptrs + RANK + start", "h_ptrs + start", "up multiplied with gate's h"),
    ("compose_swiglu-tma", "g_up * (up", "1.002 * g_up * (up", "g of up off by one bf16 step"),
    ("compose_swiglu-tma fp32", "part = (step % 2) * D_OUT", "part = 0 * step", "low parts replaced by the high parts"),
    ("compose_swiglu-tile", "+ scaling * lora_gate", "+ tl.abs(scaling) * lora_gate", "sign of s lost"),
    ("compose_swiglu_backward-tile", "(1.0 + y_gate *", "(1.0 + 0.99 * y_gate *", "slope of the activation 1 % off"),
    ("compose_swiglu_backward-tile", "dy_up * inner_up", "dy_up * up.to(tl.float32)", "rank-r term of dg left out"),
    ("compose_swiglu_backward-tile", "dy_gate * inner_gate", "dy_gate * y_gate", "g in dg"),
    ("compose_swiglu_backward-tile", "range(0, chunks", "range(BLOCK_C, chunks", "first chunks left out"),
    ("compose_swiglu_backward-tile", "range(0, CHUNK,", "range(BLOCK_T, CHUNK,", "first rows left out"),
    ("lora_compose_group-tile", "h_ptr + RANK", "h_ptr", "the second projection multiplied with the first one's h"),
    ("lora_compose_group-tile", "g_ptr = g_2_ptr", "g_ptr = g_1_ptr", "the second projection with the first one's g"),
    ("lora_compose_group-tile", "+ scaling * lora", "+ tl.abs(scaling) * lora", "sign of s lost"),
    ("compose_backward_group-tile", "scaling * lora)", "0.98 * scaling * lora)", "rank-r term of dg 2 % off"),
    (
        "compose_backward_group-tile",
        "range(0, CHUNK,",
        "range(BLOCK_T, CHUNK,",
        "first rows of a group's chunk left out",
    ),
    ("compose_backward_group-tile", "range(0, chunks,", "range(BLOCK_C, chunks,", "first chunks of a group left out"),
    (
        "compose_backward-columns",
        "tl.store(dyg_ptrs",
        "tl.store(dg_chunks_ptr if False else dyg_ptrs + 0 * start",
        "control: nothing broken",
    ),
]


@pytest.mark.parametrize(("which", "text", "broken", "what"), BREAKAGES, ids=[row[3] for row in BREAKAGES])
def test_the_gate_catches_a_wrong_term(which: str, text: str, broken: str, what: str) -> None:
    which, _, adapter = which.partition(" ")
    variant = next(v for v in INTERPRETED if IDS[v] == which)
    spec = spec_of(variant.op, "fp16", adapter or None, tokens=64)
    source = render(spec, small_config(variant, spec))
    assert text in source.text, f"the template no longer says {text!r}: name another place to break"
    mutant = replace(source, text=source.text.replace(text, broken))
    if what.startswith("control"):
        assert not [case for case in CASES if complaint_of(mutant, 61, case=case)]
    elif what == "sign of s lost":
        assert complaint_of(mutant, 61, case="negative_scaling")
    else:
        assert complaint_of(mutant, 61, case="mixed"), f"the mixed case does not notice: {what}"


LIBRARY = [variant for variant in INTERPRETED if variant.library]


@pytest.fixture
def library_settings() -> Iterator[None]:
    """What a user may ask of PyTorch's products: speed for digits. Set back afterwards."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision, matmul.allow_fp16_accumulation = "tf32", True
    yield
    matmul.fp32_precision, matmul.allow_fp16_accumulation = "none", False


@pytest.mark.parametrize("variant", LIBRARY, ids=IDS.get)
@pytest.mark.parametrize(("dtype", "adapter"), [("fp32", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")])
def test_digits_that_the_user_spares_the_library_are_not_lost_here(
    variant: Variant, dtype: str, adapter: str, library_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(*_: object, **__: object) -> None:
        pytest.fail("the library multiplies with fewer digits than the bounds need")

    spec = spec_of(variant.op, dtype, adapter)
    inputs, scaling = make_inputs(spec, 37)
    outputs, exact = make_outputs(spec, 37), definition(spec, inputs, scaling)
    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, used)
    load_module(render(spec, small_config(variant, spec))).launch(*inputs.values(), *outputs.values(), scaling)
    assert worst_error(spec, outputs, exact)[1] is None
    matmul = torch.backends.cuda.matmul
    assert (matmul.fp32_precision, matmul.allow_fp16_accumulation) == ("tf32", True), "the settings are the user's"


@pytest.mark.parametrize("variant", LIBRARY, ids=IDS.get)
@pytest.mark.parametrize(("dtype", "adapter"), [("fp32", "fp32"), ("fp16", "fp32")])
def test_the_librarys_products_are_neither_autocast_nor_recorded(variant: Variant, dtype: str, adapter: str) -> None:
    spec = spec_of(variant.op, dtype, adapter)
    inputs, scaling = make_inputs(spec, 37)
    launch = load_module(render(spec, small_config(variant, spec))).launch
    plain, under_autocast = make_outputs(spec, 37), make_outputs(spec, 37)
    launch(*inputs.values(), *plain.values(), scaling)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        launch(*inputs.values(), *under_autocast.values(), scaling)
    for name, output in under_autocast.items():
        assert torch.equal(output, plain[name])
        assert not output.requires_grad


@pytest.mark.parametrize("d_in", [1024, 1025, 2500])
def test_a_long_fp32_sum_of_the_library_is_whole(d_in: int) -> None:
    for op in ("dora_linear_forward", "weight_norm"):
        variant = find_variant(op, "library")
        spec = spec_of(op, "fp32", d_in=d_in)
        assert complaint_of(render(spec, variant.seeds(spec, GPU)[0]), 37) is None


@pytest.mark.parametrize("size", [1e-18, 1e-3, 1.0, 60.0])
def test_g_of_any_size_has_a_unit_in_16_bits(size: float) -> None:
    """In fp16 itself G would overflow from |A| = 16 on at 256 columns, and underflow below 1e-4."""
    variant = find_variant("weight_norm", "library")
    spec = spec_of("weight_norm", "fp16", save=True)
    inputs, scaling = make_inputs(spec, 1)
    inputs["weight"].zero_()
    inputs["lora_A"] = (inputs["lora_A"].float() * spec.d_in**0.5 * size).half()
    outputs = make_outputs(spec, 1)
    load_module(render(spec, small_config(variant, spec))).launch(*inputs.values(), *outputs.values(), scaling)
    assert worst_error(spec, outputs, definition(spec, inputs, scaling))[1] is None


def test_configs_of_these_tests_are_ones_the_tuner_could_choose() -> None:
    for variant in INTERPRETED:
        spec = spec_of(variant.op, "fp16", tokens=64, d_in=1024)
        if variant.unavailable(spec, GPU) is None:
            assert check_config(spec, small_config(variant, spec), GPU) is None


def test_source_is_a_value() -> None:
    spec = spec_of("compose_forward", "fp16")
    first, second = (render(spec, Config.parse("tile:block_n=64,block_t=4,num_warps=4,num_stages=2")) for _ in range(2))
    assert isinstance(first, Source)
    assert (first, first.digest) == (second, second.digest)
