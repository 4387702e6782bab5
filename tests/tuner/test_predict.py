"""Predicted times respect the floor and the obvious: more bytes, spills or idle multiprocessors are slower."""

from __future__ import annotations

import random
import statistics

import pytest

from doratune.cache.entry import PREDICTED
from doratune.codegen.cost import LAUNCH_GAP_US, estimate_us, floor_us, resident_programs
from doratune.codegen.gpu import Gpu, find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import render
from doratune.codegen.spec import TOKEN_BUCKETS, Config, KernelSpec
from doratune.codegen.variants import default_config, find_variant
from doratune.tuner.evaluation import Rejected, Resources
from doratune.tuner.predict import PredictEvaluator, predict_us, shortlist
from doratune.tuner.space import Space

from ..specs import dtype_for

GPUS = ("h200", "a100", "rtx4090", "b200", "mi300x")
H200 = find_gpu("h200")
BACKWARD = Config.create(
    "columns", block_n=512, block_t=4, chunk=64, reduce_c=32, reduce_n=64, num_warps=4, num_stages=2
)


def spec_of(op: str, gpu: Gpu = H200, **changes: object) -> KernelSpec:
    shape = {
        "d_out": 4096,
        "d_in": 4096,
        "rank": 384,
        "tokens": 4096,
        "dtype": dtype_for(op, "bf16"),
        "adapter": "bf16",
    }
    return KernelSpec.create(op, **{**shape, "dtype": dtype_for(op, "bf16"), "gpu": gpu.slug, **changes})


def resources(spec: KernelSpec, config: Config, **changes: int) -> tuple[Resources, ...]:
    values = {"registers": 64, "spills": 0, "shared_bytes": 16384, "num_warps": config.num_warps, **changes}
    return tuple(Resources(work.kernel, **values) for work in find_variant(spec.op, config.variant).work(spec, config))


def predicted(spec: KernelSpec, config: Config, **changes: int) -> float:
    return predict_us(spec, config, resources(spec, config, **changes), H200)


@pytest.mark.parametrize("slug", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_no_default_is_predicted_below_its_floor(op: str, slug: str) -> None:
    gpu = find_gpu(slug)
    for tokens in TOKEN_BUCKETS:
        spec = spec_of(op, gpu, tokens=tokens)
        config = default_config(spec, gpu)
        evaluation = PredictEvaluator(gpu).evaluate(render(spec, config), resources(spec, config))
        assert evaluation.provenance == PREDICTED
        assert evaluation.us is not None
        assert evaluation.us >= floor_us(spec, gpu) == evaluation.floor_us


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_exact")])
def test_a_default_on_a_large_shape_is_predicted_within_a_small_factor_of_its_floor(op: str) -> None:
    spec = spec_of(op, d_out=8192, d_in=8192, tokens=8192)
    assert 1.0 <= estimate_us(spec, default_config(spec, H200), H200) / floor_us(spec, H200) < 5.0


def test_exact_columns_are_predicted_to_cost_two_launches_where_there_are_none() -> None:
    spec = spec_of("compose_backward_exact", d_out=8192, d_in=8192, tokens=8192)
    assert 2 * LAUNCH_GAP_US < estimate_us(spec, default_config(spec, H200), H200) < 15.0


@pytest.mark.parametrize(("rank", "launches"), [(16, 1), (384, 2)])
def test_a_look_for_cancelling_rows_is_predicted_to_cost_little_beside_the_norm(rank: int, launches: int) -> None:
    spec, norm = (spec_of(op, d_out=4096, d_in=4096, rank=rank) for op in ("weight_norm_exact", "weight_norm"))
    us = estimate_us(spec, default_config(spec, H200), H200)
    assert launches * LAUNCH_GAP_US < us < 0.5 * estimate_us(norm, default_config(norm, H200), H200)


def test_more_bytes_take_longer() -> None:
    times = [predicted(spec_of("compose_backward", d_out=d_out), BACKWARD) for d_out in (2048, 4096, 8192)]
    assert times[0] < times[1] < times[2]


def best_of_each_variant(spec: KernelSpec) -> dict[str, float]:
    fitting = [config for config in Space(spec, H200).seeds if not Space(spec, H200).refuse(config)]
    return {
        variant: min(estimate_us(spec, config, H200) for config in fitting if config.variant == variant)
        for variant in dict.fromkeys(config.variant for config in fitting)
    }


@pytest.mark.parametrize("op", ["weight_norm", "lora_compose", "dora_linear_forward"])
def test_the_library_is_predicted_ahead_where_measurements_put_it_there(op: str) -> None:
    """On an H200 cuBLAS's fp32 product and a pass took less than the emitted kernel at 4096 tokens, in bf16 more."""
    for dtype in ("fp32", "bf16"):
        us = best_of_each_variant(spec_of(op, dtype=dtype, adapter=dtype))
        emitted = min(value for variant, value in us.items() if variant != "library")
        assert (us["library"] < emitted) == (dtype == "fp32"), us


@pytest.mark.parametrize("op", OPS)
def test_calls_into_the_library_are_what_makes_a_variant_one_of_the_library(op: str) -> None:
    for adapter in ("bf16", "fp32"):
        spec = spec_of(op, adapter=adapter)
        for config in Space(spec, H200).seeds:
            variant = find_variant(op, config.variant)
            assert variant.library == bool(variant.library_calls(spec, config))


def test_spills_take_longer() -> None:
    spec = spec_of("weight_norm")
    config = default_config(spec, H200)
    assert predicted(spec, config) < predicted(spec, config, spills=64) < predicted(spec, config, spills=512)


def test_programs_that_fill_a_part_of_the_gpu_take_longer() -> None:
    spec = spec_of("compose_backward", d_out=1024, tokens=1024)
    few = Config.create(
        "columns", block_n=1024, block_t=4, chunk=256, reduce_c=32, reduce_n=64, num_warps=4, num_stages=2
    )
    many = Config.create(
        "columns", block_n=256, block_t=4, chunk=16, reduce_c=32, reduce_n=64, num_warps=4, num_stages=2
    )
    assert predicted(spec, few) > 1.5 * predicted(spec, many)


def test_a_second_wave_takes_longer_than_the_first_alone() -> None:
    config = Config.create("tile", block_t=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    large = {"shared_bytes": 200_000}  # one program on a multiprocessor
    one = spec_of("lora_compose", d_out=128 * 132, tokens=128)
    two = spec_of("lora_compose", d_out=128 * 133, tokens=128)
    wider = spec_of("lora_compose", d_out=128 * 134, tokens=128)
    step, next_step = predicted(two, config, **large) - predicted(one, config, **large), 0.0
    next_step = predicted(wider, config, **large) - predicted(two, config, **large)
    assert step > 5 * max(next_step, 0.0)


def test_small_tiles_cannot_feed_the_tensor_cores() -> None:
    spec = spec_of("lora_compose", d_out=8192, tokens=8192)
    small = Config.create("tile", block_t=16, block_n=16, block_k=64, num_warps=2, num_stages=3)
    large = Config.create("tile", block_t=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    assert predicted(spec, small) > 2 * predicted(spec, large)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 13),  # 228 KiB of shared memory, 17 KiB each
        ({"registers": 128, "shared_bytes": 0}, 4),  # 65536 registers, 128 * 128 each
        ({"num_warps": 16, "registers": 32, "shared_bytes": 0}, 4),  # 2048 threads, 512 each
        ({"shared_bytes": 232_448}, 1),
        ({"shared_bytes": 300_000}, 0),
    ],
)
def test_occupancy_follows_the_scarcest_resource(changes: dict[str, int], programs: int) -> None:
    kernel = {"registers": 32, "spills": 0, "shared_bytes": 16384, "num_warps": 4, **changes}
    assert resident_programs(Resources("kernel", **kernel), H200) == programs


def test_a_kernel_that_fits_no_multiprocessor_is_rejected() -> None:
    with pytest.raises(Rejected, match="does not fit"):
        predicted(spec_of("compose_backward"), BACKWARD, shared_bytes=300_000)


def test_the_shortlist_is_valid_varied_and_ahead_of_a_plain_draw() -> None:
    space = Space(spec_of("weight_norm"), H200)
    chosen = shortlist(space, 4)
    assert len(set(chosen)) == 4
    assert all(config in space and space.refuse(config) is None for config in chosen)
    assert not set(chosen) & set(space.seeds)  # those are tried anyway
    best_seed = min(estimate_us(space.spec, config, H200) for config in space.seeds)
    assert estimate_us(space.spec, chosen[0], H200) <= 1.1 * best_seed
    chance = random.Random(0)
    plain = [config for config in (space.draw(chance) for _ in range(100)) if space.refuse(config) is None]
    middle = statistics.median(estimate_us(space.spec, config, H200) for config in plain)
    assert max(estimate_us(space.spec, config, H200) for config in chosen) < 0.7 * middle
    assert shortlist(space, 0) == ()
