"""The specs that are recorded: shapes of public models, ranks from 16 to 768, token buckets from 16 to 8192.

Specs of one family (equal but for their token bucket) share their compiled code, so each family has several buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...codegen.spec import KernelSpec

_NORMS = (
    (4096, 4096, 16),
    (4096, 4096, 64),
    (4096, 4096, 384),
    (4096, 4096, 768),
    (14336, 4096, 384),
    (4096, 14336, 384),
    (1024, 4096, 16),
    (1024, 4096, 384),
    (8192, 8192, 64),
    (8192, 8192, 384),
    (896, 896, 16),
    (4864, 896, 64),
    (2048, 8192, 128),
    (5120, 25600, 64),
    (1152, 6912, 24),
    (3584, 3584, 128),
)
"""(d_out, d_in, rank) of the norms, bf16."""

_GROUPED_NORMS = (
    (4096, 4096, 16),
    (4096, 4096, 384),
    (14336, 4096, 64),
    (1024, 5120, 128),
    (4096, 14336, 16),
    (2048, 2048, 256),
    (8192, 3072, 384),
    (4864, 896, 16),
    (5120, 5120, 32),
)
"""The same, of 32 layers at once."""

_ATTENTION = (
    ((4096, 1024, 1024), 16),
    ((4096, 1024, 1024), 64),
    ((4096, 1024, 1024), 384),
    ((8192, 1024, 1024), 128),
    ((2048, 1024, 1024), 32),
    ((5120, 1024, 1024), 256),
    ((896, 128, 128), 16),
    ((4096, 4096, 4096), 8),
)
"""Outputs of q, k and v, and their rank."""

_GATED = (
    (14336, 16),
    (14336, 384),
    (28672, 64),
    (11008, 256),
    (8192, 128),
    (4864, 16),
    (17408, 32),
    (9728, 384),
)
"""Outputs of gate and up, and their rank."""

_WIDTHS = (896, 1024, 2048, 4096, 14336)
_TOKENS = (128, 1024, 4096)
_FEW_TO_MANY = (16, 512, 4096)


def recorded_specs(gpu: str) -> Iterator[KernelSpec]:
    """The recorded specs for the GPU with this slug, one operation after another."""

    def spec(op: str, adapter: str = "bf16", **values: int | bool | str) -> KernelSpec:
        return KernelSpec.create(op, dtype="bf16", adapter=adapter, gpu=gpu, **values)

    for op in ("weight_norm", "weight_norm_exact"):
        for d_out, d_in, rank in _NORMS:
            yield spec(op, d_out=d_out, d_in=d_in, rank=rank)
    yield spec("weight_norm", "fp32", d_out=4096, d_in=4096, rank=384, autocast=True)
    yield spec("weight_norm", "fp32", d_out=2048, d_in=2048, rank=64)
    composed = ((4096, 384), (14336, 384), (1024, 384), (4096, 16), (8192, 64), (896, 16), (2048, 64), (1152, 24))
    for d_out, rank in composed:
        for tokens in (16, 128, 1024) if rank < 64 else _TOKENS:
            yield spec("lora_compose", d_out=d_out, rank=rank, tokens=tokens)
    yield spec("lora_compose", "fp32", d_out=4096, rank=64, tokens=2048, autocast=True)
    yield spec("lora_compose", "fp32", d_out=2048, rank=16, tokens=2048)
    for op in ("compose_forward", "compose_backward"):
        for d_out in _WIDTHS:
            for tokens in _TOKENS:
                yield spec(op, d_out=d_out, tokens=tokens)
    for d_out in _WIDTHS:
        for rank in (16, 64, 384):
            yield spec("adapter_backward", d_out=d_out, rank=rank)
    small = ((896, 896, 16), (2048, 2048, 64), (1024, 4096, 64))
    linear = ((4096, 4096, 384), (14336, 4096, 384), (4096, 14336, 16), *small)
    for d_out, d_in, rank in linear:
        for tokens in (16, 128, 2048):
            yield spec("dora_linear_forward", d_out=d_out, d_in=d_in, rank=rank, tokens=tokens)
    for d_out, d_in, rank in linear:
        for tokens in (512, 4096):
            yield spec("compose_backward_exact", d_out=d_out, d_in=d_in, rank=rank, tokens=tokens)
    for d_out, d_in, rank in _GROUPED_NORMS:
        yield spec("weight_norm_group", d_out=d_out, d_in=d_in, rank=rank, layers=32)
    yield spec("weight_norm_group", "fp32", d_out=4096, d_in=4096, rank=64, layers=32, autocast=True)
    for op, magnitude in (("lora_compose_group", ""), ("compose_backward_group", "bf16")):
        for (first, second, third), rank in _ATTENTION:
            for tokens in _FEW_TO_MANY:
                sizes: dict[str, Any] = {"d_out": first, "d_out_2": second, "d_out_3": third}
                yield spec(op, **sizes, rank=rank, tokens=tokens, magnitude=magnitude)
    for op, magnitude in (("swiglu_forward", ""), ("swiglu_backward", "bf16")):
        for d_out in (4864, 14336, 28672):
            for tokens in (512, 4096):
                yield spec(op, d_out=d_out, tokens=tokens, magnitude=magnitude)
    for op, magnitude in (("compose_swiglu", ""), ("compose_swiglu_backward", "bf16")):
        for d_out, rank in _GATED:
            for tokens in _FEW_TO_MANY:
                yield spec(op, d_out=d_out, rank=rank, tokens=tokens, magnitude=magnitude)
