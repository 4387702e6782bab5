"""No shape is left out: ranks from 1 to 1024, sizes that nothing divides, one row, one column; with the built-in config
on every GPU, and no offset that a large tensor makes overflow."""

from __future__ import annotations

import re

import pytest

from doratune.codegen.gpu import ARCHITECTURES, find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import Variant, check_config, default_config, find_variant

from ..specs import EVEN, dtype_for, every_variant, read_by
from .interpreter import GPU, IDS, INTERPRETED, complaint_of, interpretable, spec_of

SHAPES = [(151, 89, 1), (1, 1, 1), (271, 115, 100), (40, 96, 384), (48, 72, 1024), (136, 1160, 24)]
"""(d_out, d_in, rank); the last three also suit tensor descriptors."""


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
@pytest.mark.parametrize(("dtype", "adapter"), [("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")])
@pytest.mark.parametrize("variant", INTERPRETED, ids=IDS.get)
def test_odd_shapes_are_right_with_the_variants_first_config(
    variant: Variant, dtype: str, adapter: str, d_out: int, d_in: int, rank: int
) -> None:
    if variant.op == "weight_norm_exact":
        d_out = min(d_out, 40)  # the rows are redone one after another
    spec = spec_of(variant.op, dtype, adapter, d_out=d_out, d_in=d_in, rank=rank, tokens=16)
    if adapter != dtype and "adapter" not in OPS[spec.op].dtypes:
        pytest.skip("the operation has no adapter")
    if rank > 100 and (adapter == "fp32" or variant.library):
        pytest.skip("many ranks take the interpreter long: in one dtype, and of emitted products, only")
    if variant.descriptors and (dtype == "fp32" or any(getattr(spec, dim) % 8 for dim in ("d_out", "d_in", "rank"))):
        pytest.skip("tensor descriptors take 16-bit rows of a multiple of 16 bytes")
    if adapter != dtype and spec.op == "dora_linear_forward" and variant.descriptors:
        pytest.skip("the variant leaves fp32 adapters to others")
    config = next(c for c in variant.seeds(spec, GPU) if variant.refuse(spec, c, GPU) is None)
    assert complaint_of(render(spec, interpretable(config)), 19) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_gpu_has_a_config_for_every_shape_and_dtype(architecture: str) -> None:
    gpu = find_gpu(architecture)
    large = [(4304, 1152, 100), (2706, 8192, 384), (8192, 28672, 1024), (151936, 3584, 24)]
    for op, contract in OPS.items():
        for d_out, d_in, rank in SHAPES + large:
            for dtype, adapter in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
                for tokens in (1, 128, 32768):
                    for flag in (None, *contract.flags):
                        if flag == "autocast" and (dtype, adapter) != ("bf16", "fp32"):
                            continue
                        dims = {"d_out": d_out, "d_in": d_in, "rank": rank, "tokens": tokens, "layers": 8}
                        flags = {flag: True} if flag else {}
                        dtypes = {"dtype": dtype_for(op, dtype), "adapter": adapter}
                        spec = KernelSpec.create(op, **dims, **dtypes, gpu=architecture, **flags)
                        assert check_config(spec, default_config(spec, gpu), gpu) is None


@every_variant
def test_what_is_multiplied_by_a_size_is_64_bits_wide(variant: Variant) -> None:
    """Of program numbers and rows; inside a tile, and times RANK, nothing reaches 2**31."""
    spec = KernelSpec.create(variant.op, **read_by(variant, EVEN))
    text = render(spec, variant.seeds(spec, GPU)[0]).text
    wide = {"part", *re.findall(r"^ *(\w+) = .*int64", text, flags=re.MULTILINE)}
    if variant.name.endswith("warp_specialized"):
        wide |= {"share", "partial", "i"}  # one of the shares; what could overflow is refused, see below
    for line in text.splitlines():
        for factor in re.findall(r"([\w.()\[\], :+]*?)\s\* (?:D_OUT|D_IN|\(RANK \* RANK\))", line):
            assert "int64" in factor or not factor.strip() or wide & set(re.findall(r"\w+", factor)), line


def test_so_many_shares_of_g_that_their_offsets_overflow_are_refused() -> None:
    variant = find_variant("weight_norm", "warp_specialized")
    dims = {"d_out": 128, "d_in": 1 << 22, "rank": 1024}
    spec = KernelSpec.create("weight_norm", **dims, dtype="bf16", adapter="bf16", gpu="h200")
    refused = [variant.refuse(spec, config, GPU) for config in variant.seeds(spec, GPU)]
    assert refused[0] is not None
    assert "offsets" in refused[0]
    assert check_config(spec, default_config(spec, GPU), GPU) is None
