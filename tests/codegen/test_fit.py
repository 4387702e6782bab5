"""The fitted model compares configs of one spec on the architectures that were measured, and quickly."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest

from doratune.codegen.fit import FIT_FILE, SIDE, Polynomial, features, fitted, read_fit, terms
from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.spec import TOKEN_BUCKETS, Config, KernelSpec
from doratune.codegen.variants import default_configs

H200 = find_gpu("h200")
MEASURED_OPS = sorted({op for op, _ in fitted().polynomials})


def spec_of(op: str, gpu: str = "h200", **changes: object) -> KernelSpec:
    shape = {"d_out": 4096, "d_in": 4096, "rank": 384, "tokens": 4096, "dtype": "bf16", "adapter": "bf16"}
    return KernelSpec.create(op, **{**shape, "gpu": gpu, **changes})


def test_what_the_first_built_in_config_loses_is_not_known_of_exact_fp32_adapters() -> None:
    fit = fitted()
    assert fit.default_loss(spec_of("lora_compose")) == fit.default_losses["lora_compose"]
    assert fit.default_loss(spec_of("lora_compose", adapter="fp32", autocast=True)) is not None
    assert fit.default_loss(spec_of("lora_compose", adapter="fp32")) is None
    assert replace(fit, default_losses={}).default_loss(spec_of("lora_compose")) is None


@pytest.mark.parametrize("op", MEASURED_OPS)
def test_every_config_of_a_covered_spec_gets_a_finite_time(op: str) -> None:
    for d_out, rank in ((48, 8), (4096, 384), (1 << 17, 4096)):
        for tokens in TOKEN_BUCKETS:
            spec = spec_of(op, d_out=d_out, rank=rank, tokens=tokens)
            assert fitted().covers(spec, H200)
            for config in default_configs(spec, H200):
                if (op, config.variant) in fitted().polynomials:
                    us = fitted().relative_us(spec, config, H200)
                    assert math.isfinite(us)
                    assert 1e-3 < us < 1e3  # clamped features: no polynomial runs away


def test_other_architectures_and_fp32_tensors_are_not_covered() -> None:
    spec = spec_of("lora_compose")
    assert fitted().covers(spec, find_gpu("h100-sxm"))
    assert fitted().covers(replace(spec, adapter="fp32"), H200)
    assert not fitted().covers(replace(spec, gpu="a100"), find_gpu("a100"))
    assert not fitted().covers(replace(spec, activation="fp32", adapter="fp32"), H200)
    assert fitted().relative_us(spec, Config.parse("cluster:num_warps=4,num_stages=2"), H200) == math.inf


def test_what_measurements_showed_is_what_the_fit_says() -> None:
    """On an H100 at 14336 x 4096 tokens, r=384, warp-specialised tiles take two thirds of 64 x 64 pointer loads."""
    spec = spec_of("lora_compose", "h100-sxm", d_out=14336)
    gpu = find_gpu("h100-sxm")
    fast = Config.parse("warp_specialized:block_k=64,block_n=128,block_t=64,consumers=3,num_warps=4,num_stages=8")
    slow = Config.parse("tile:block_k=32,block_n=32,block_t=32,num_warps=4,num_stages=2")
    assert fitted().relative_us(spec, fast, gpu) < 0.8 * fitted().relative_us(spec, slow, gpu)


def test_the_polynomial_is_what_its_terms_say() -> None:
    names = ("a", "b", f"{SIDE}c")
    values = terms(names, [2.0, 3.0, 5.0])
    assert values == [1.0, 2.0, 3.0, 5.0, 4.0, 6.0, 9.0, 25.0]
    made = Polynomial(names, (0.0, 0.0, 0.0), (8.0, 3.0, 9.0), (0.0,) * 3, (1.0,) * 3, tuple(range(8)))
    given = {"a": 2.0, "b": 30.0, f"{SIDE}c": 5.0}  # b is clamped to 3
    assert made(given) == sum(index * value for index, value in enumerate(values))
    assert made({"a": 2.0}) == sum(index * value for index, value in enumerate(terms(names, [2.0, 0.0, 0.0])))


def test_the_features_of_every_operation_have_names_that_the_fit_knows() -> None:
    for op in MEASURED_OPS:
        spec = spec_of(op)
        for config in default_configs(spec, H200):
            polynomial = fitted().polynomials.get((op, config.variant))
            if polynomial is not None:
                unknown = set(polynomial.names) - set(features(spec, config, H200))
                assert not {name for name in unknown if not name.startswith(SIDE)}


def test_the_file_is_small_and_read_as_it_is_written() -> None:
    text = FIT_FILE.read_text(encoding="utf-8")
    assert len(text) < 100_000
    data = json.loads(text)
    assert set(data["ops"]) <= set(OPS)
    fit = read_fit(data)
    for (op, variant), polynomial in fit.polynomials.items():
        assert len(polynomial.coefficients) == len(terms(polynomial.names, [0.0] * len(polynomial.names))), (
            op,
            variant,
        )


def test_one_comparison_takes_a_fraction_of_a_millisecond() -> None:
    spec = spec_of("weight_norm")
    configs = default_configs(spec, H200)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for config in configs:
            fitted().relative_us(spec, config, H200)
        best = min(best, (time.perf_counter() - start) / len(configs))
    assert best < 1e-3
