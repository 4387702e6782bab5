"""The eager dequantiser gives, bit for bit, the matrix that each library's own layer multiplies by."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from doratune.codegen.weight_formats import FP4_TABLE, NF4_TABLE, WeightFormat
from doratune.runtime.dequantise import dequantise

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [(48, 128), (96, 40), (37, 53)]
"""Even sizes, rows that are no multiple of a block, and an odd number of elements."""


def weight(shape: tuple[int, int], dtype: str = "bf16") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def assert_same(form: WeightFormat, tensors: dict[str, torch.Tensor], theirs: torch.Tensor) -> None:
    d_out, d_in = theirs.shape
    for stored in form.operands(d_out, d_in):
        assert tensors[stored.name].numel() == stored.elements, stored
    assert torch.equal(dequantise(form, tensors, d_out, d_in), theirs.float())


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_4_bit(kind: str, dtype: str, nested: int, group: int, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if Version(version("bitsandbytes")) < Version("0.49"):
        pytest.skip("on a CPU it rounds scales to 16 bits and has other FP4 codes; such layers are left to themselves")
    w = weight(shape, dtype).view(1, -1)
    packed, state = functional.quantize_4bit(w, blocksize=group, quant_type=kind, compress_statistics=bool(nested))
    # As one row: its kernels for a CPU begin a block with each row, against how it packs them and its kernels for CUDA.
    theirs = functional.dequantize_4bit(packed, state).view(shape)
    tensors = {"weight": packed, "scales": state.absmax}
    if nested:
        inner = state.state2
        tensors |= {"scale_table": inner.code, "outer_scales": inner.absmax, "scale_offset": state.offset}
        assert inner.blocksize == nested
    table = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}[kind]
    assert torch.equal(state.code, torch.tensor(table))
    assert_same(WeightFormat(kind, group=group, nested=nested, dtype=dtype), tensors, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_8_bit(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, absmax, _ = functional.int8_vectorwise_quant(weight(shape, "fp16"))
    theirs = functional.int8_vectorwise_dequant(codes, absmax)
    found = dequantise(WeightFormat("int8"), {"weight": codes.view(torch.uint8), "scales": absmax}, *shape)
    torch.testing.assert_close(found, theirs.float(), rtol=3e-7, atol=0.0)  # it multiplies by 1/127 in fp32


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (128, 40), (64, 31)])
def test_hqq(bits: int, axis: int, dtype: str, shape: tuple[int, int]) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    w = weight(shape, "fp32")
    packed, meta = quantize.Quantizer.quantize(
        w, nbits=bits, group_size=32 if axis else 64, axis=axis, device="cpu", compute_dtype=DTYPES[dtype]
    )
    meta |= {name: meta[name].to(DTYPES[dtype]) for name in ("scale", "zero")}  # as HQQLinear does
    meta["compute_dtype"] = DTYPES[dtype]
    theirs = quantize.Quantizer.dequantize(packed, meta)
    form = WeightFormat(f"hqq{bits}", "block" if axis else "strided", 32 if axis else 64, dtype=dtype)
    tensors = {"weight": packed, "scales": meta["scale"], "zeros": meta["zero"]}
    assert packed.dtype is torch.uint8
    assert_same(form, tensors, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_torchao_int8_applies_scales_to_the_product(granularity: str, dtype: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    if not hasattr(quantization, "Int8Tensor"):
        pytest.skip("this torchao has no Int8Tensor")
    chosen = getattr(quantization, granularity)()
    w = quantization.Int8Tensor.from_hp(weight((48, 96), dtype), granularity=chosen)
    assert w.zero_point is None or not w.zero_point.any()
    form = WeightFormat("ao8", "row" if granularity == "PerRow" else "tensor", dtype=dtype)
    tensors = {"weight": w.qdata.view(torch.uint8), "scales": w.scale}
    assert form.exact
    expected = w.qdata.double() * w.scale.double().reshape(-1, 1)
    found = dequantise(form, tensors, 48, 96, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0.0)
    x = weight((5, 96), dtype)
    torch.testing.assert_close(torch.nn.functional.linear(x, w).double(), x.double() @ found.T, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_torchao_groups(zeros: bool, dtype: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    mapping = quantization.MappingType.ASYMMETRIC if zeros else quantization.MappingType.SYMMETRIC
    w = quantization.IntxUnpackedToInt8Tensor.from_hp(
        weight((48, 96), dtype), (1, 32), torch.int4, mapping_type=mapping
    )
    assert zeros or not w.zero_point.any()
    tensors = {"weight": w.qdata.view(torch.uint8), "scales": w.scale, "zeros": w.zero_point}
    assert_same(WeightFormat("ao8", "block", zeros=zeros, dtype=dtype), tensors, w.dequantize())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor", "PerBlock"])
def test_torchao_float8(granularity: str, dtype: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    shape = (256, 384)
    made = getattr(quantization, granularity)
    chosen = made([128, 128]) if granularity == "PerBlock" else made()
    w = quantization.Float8Tensor.from_hp(weight(shape, dtype), granularity=chosen)
    spread = {"PerRow": "row", "PerTensor": "tensor", "PerBlock": "tile"}[granularity]
    tensors = {"weight": w.qdata.view(torch.uint8), "scales": w.scale}
    assert_same(WeightFormat("fp8", spread, dtype=dtype), tensors, w.dequantize())
