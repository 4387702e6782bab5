"""What is compared of packed and plain weights is the same norm; a wrong request is refused. tests/gpu times it."""

from __future__ import annotations

import pytest
import torch

from doratune.benchmarks.packed import FORMATS, MODES, SHAPES, bench_packed, spec_of, weight_shape
from doratune.codegen.gpu import find_gpu
from doratune.errors import UsageError

GPU = find_gpu("h200")


@pytest.mark.parametrize("mode", MODES)
def test_the_norms_differ_in_how_w_is_stored_alone(mode: str) -> None:
    plain, *packed = (spec_of((4096, 4096), 16, weight, mode, GPU) for weight in ("bf16", *FORMATS))
    for spec in packed:
        assert str(spec).replace(spec.weight, "bf16", 1) == str(plain)
        assert spec.contract.floor_bytes(spec) < 0.6 * plain.contract.floor_bytes(plain)


def test_a_shape_is_read() -> None:
    assert [weight_shape(shape) for shape in SHAPES] == [(4096, 4096), (14336, 4096), (8192, 28672)]
    for wrong in ("4096", "4096x", "0x4096", "4096×4096"):
        with pytest.raises(UsageError, match="give d_out and d_in"):
            weight_shape(wrong)


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown weight format 'nf5'"):
        bench_packed([(64, 64)], formats=["nf5"])
    with pytest.raises(UsageError, match="unknown mode"):
        bench_packed([(64, 64)], modes=["taken"])
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs a GPU"):
            bench_packed([(64, 64)])
