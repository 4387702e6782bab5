"""Every operation has a built-in config for every shape, also for the smallest."""

from __future__ import annotations

import pytest

from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import check_config, default_configs

from ..specs import dtype_for

SHAPES = [(1, 1, 1), (1, 4096, 1), (4096, 1, 1), (3, 5, 2), (16, 16, 16), (8, 24, 4), (28672, 8192, 768)]


@pytest.mark.parametrize("gpu", ["h100-sxm", "a100", "rtx4090", "mi300x", "sm_120"])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_has_a_config_that_fits(op: str, gpu: str) -> None:
    target = find_gpu(gpu)
    for d_out, d_in, rank in SHAPES:
        for tokens in (1, 128, 32768):
            for dtype, adapter in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
                spec = KernelSpec.create(
                    op,
                    d_out=d_out,
                    d_in=d_in,
                    rank=rank,
                    tokens=tokens,
                    dtype=dtype_for(op, dtype),
                    adapter=adapter,
                    gpu=target.slug,
                )
                found = default_configs(spec, target)
                assert found, spec
                assert [check_config(spec, config, target) for config in found] == [None] * len(found)
