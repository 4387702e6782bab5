"""A config carried to another shape has the parameters re-derived that follow the shape, and stays valid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.spec import Config, KernelSpec, SpecError
from doratune.codegen.variants import MOST_CARRIED, carried, check_config, default_configs, variants_of
from doratune.codegen.weight_formats import stored_as

from ..specs import dtype_for

H200, A100 = find_gpu("h200"), find_gpu("a100")
SHAPES = ((4096, 4096, 384, 4096), (1024, 4096, 16, 16), (14336, 4096, 64, 128), (896, 896, 16, 1024), (48, 40, 8, 1))


def spec_of(op: str, shape: tuple[int, int, int, int], gpu: str = "h200", **changes: object) -> KernelSpec:
    d_out, d_in, rank, tokens = shape
    values = {
        "d_out": d_out,
        "d_in": d_in,
        "rank": rank,
        "tokens": tokens,
        "dtype": dtype_for(op, "bf16"),
        "adapter": "bf16",
    }
    return KernelSpec.create(op, **{**values, "gpu": gpu, **changes})


@pytest.mark.parametrize("op", OPS)
def test_a_config_carried_to_its_own_shape_is_itself(op: str) -> None:
    for shape in SHAPES:
        spec = spec_of(op, shape)
        for config in default_configs(spec, H200):
            assert carried(config, spec, spec, H200)[0] == config


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_what_is_carried_is_valid_of_the_same_variant_and_limited(op: str, gpu: str) -> None:
    target = find_gpu(gpu)
    for source in (spec_of(op, shape) for shape in SHAPES):
        for wanted in (spec_of(op, shape, gpu) for shape in SHAPES):
            for config in default_configs(source, H200):
                found = carried(config, source, wanted, target)
                assert len(set(found)) == len(found) <= MOST_CARRIED
                assert all(each.variant == config.variant for each in found)
                assert all(check_config(wanted, each, target) is None for each in found)


NORM = spec_of("weight_norm", (4096, 4096, 384, 1))
WON = Config.parse(
    "warp_specialized:gram_block=64,gram_block_k=128,gram_programs=288,gram_share=1024,gram_stages=6,rank_block=128,"
    "rank_tiles=3,split_k=4,num_warps=8,num_stages=3"
)


def test_a_split_follows_the_number_of_tiles() -> None:
    """32 blocks of rows in 4 shares fill the GPU once; 64 blocks do so in 2, and 128 in 1."""
    for d_out, split in ((8192, 2), (16384, 1), (2048, 8)):
        found = carried(WON, NORM, replace(NORM, d_out=d_out, d_in=8192), H200)
        assert split in {config["split_k"] for config in found}
        assert found[0] == WON  # also as it is


def test_the_rank_tiles_and_the_work_for_g_follow_the_rank() -> None:
    for wanted in (replace(NORM, rank=64), replace(NORM, rank=16)):
        for config in carried(WON, NORM, wanted, H200):
            assert config["rank_block"] * config["rank_tiles"] < wanted.rank + config["rank_block"]
            assert config["gram_programs"] == -(-(wanted.rank**2) // 512)


def test_a_tile_of_many_tokens_shrinks_for_few() -> None:
    many = spec_of("lora_compose", (4096, 4096, 64, 4096))
    won = Config.parse("tile:block_k=64,block_n=64,block_t=128,num_warps=4,num_stages=3")
    for config in carried(won, many, replace(many, tokens=16), H200):
        assert config["block_t"] == 16


def test_programs_follow_the_multiprocessors_of_the_gpu() -> None:
    spec = spec_of("dora_linear_forward", SHAPES[0])
    won = next(config for config in default_configs(spec, H200) if config.variant == "tma_persistent")
    here = find_gpu("h100-pcie")
    found = carried(won, spec, replace(spec, gpu=here.slug), here)
    rounds = won["programs"] // H200.multiprocessors
    assert rounds * here.multiprocessors in {config["programs"] for config in found}


def test_a_variant_that_the_gpu_lacks_carries_nothing() -> None:
    assert carried(WON, NORM, replace(NORM, gpu="a100"), A100) == ()


def test_an_entry_of_a_gpu_that_is_not_listed_can_be_carried() -> None:
    assert WON in carried(WON, replace(NORM, gpu="rtx9090"), replace(NORM, d_out=8192), H200)


def test_other_parameters_are_refused_with_those_that_the_variant_takes() -> None:
    with pytest.raises(SpecError, match=r"tile takes block_k, block_n, block_t, num_stages, num_warps, got block_x"):
        carried(
            Config.parse("tile:block_x=1,num_warps=4,num_stages=2"), *[spec_of("lora_compose", SHAPES[0])] * 2, H200
        )
    with pytest.raises(SpecError, match="no variant 'cluster'"):
        carried(Config.parse("cluster:num_warps=4,num_stages=2"), *[spec_of("lora_compose", SHAPES[0])] * 2, H200)


def test_every_variant_is_tried() -> None:
    names = {variant.name for op in OPS for variant in variants_of(spec_of(op, SHAPES[0]), H200)}
    tried = {config.variant for op in OPS for config in default_configs(spec_of(op, SHAPES[0]), H200)}
    assert tried == names


@pytest.mark.parametrize("weight", ["nf4", "int8", "fp8"])
def test_few_ranks_of_packed_codes_say_nothing_of_many(weight: str) -> None:
    """At few ranks decoding is what takes time, at many the products: measured, one's config is slow at the other."""

    def spec(rank: int) -> KernelSpec:
        stored = stored_as(weight, "bf16")
        return KernelSpec.create(
            "weight_norm", d_out=4096, d_in=4096, rank=rank, weight=stored, adapter="bf16", gpu="h200"
        )

    (config, *_) = default_configs(spec(64), H200)
    assert carried(config, spec(64), spec(16), H200)
    assert carried(config, spec(64), replace(spec(64), d_out=14336), H200)
    assert carried(config, spec(64), spec(384), H200) == ()
    assert carried(default_configs(spec(384), H200)[0], spec(384), spec(64), H200) == ()
