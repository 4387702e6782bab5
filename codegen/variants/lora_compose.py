"""The variants of ``lora_compose``."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    MAX_TMA_BOX,
    Variant,
    Work,
    adapter_parts,
    adapter_parts_work,
    ceil_div,
    dot_passes,
    dtype_bytes,
    fit,
    refuse_dot_tile,
    refuse_shared_memory,
    tma_unavailable,
    up_to,
)

FEW_TOKENS = 128
"""Up to this many tokens the time goes into reading B, and narrow tiles spread it over the GPU."""


class LoraComposeTile(Variant):
    """One output tile per program: the rank-r product with pointer loads, composed with base before it is stored."""

    op = "lora_compose"
    name = "tile"

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((16, 32, 64, 128, 256), spec.tokens),
            "block_n": up_to((16, 32, 64, 128, 256), spec.d_out),
            "block_k": up_to((16, 32, 64, 128), spec.rank),
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        narrow = dtype_bytes(spec.activation) == 2 and spec.adapter == spec.activation
        shapes: tuple[tuple[int, int, int, int, int], ...]
        if spec.tokens <= FEW_TOKENS:
            shapes = ((16, 32, 128, 4, 4), (16, 64, 64, 4, 4), (32, 32, 128, 4, 3), (64, 64, 64, 4, 3))
        elif narrow and gpu.has_tma:
            shapes = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3))
        elif narrow:  # before Hopper the operands of a product pass through registers, which a deep tile exhausts
            shapes = ((128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3))
        else:  # the parts of fp32 operands need registers too
            shapes = ((64, 128, 32, 8, 2), (128, 128, 32, 8, 2), (64, 64, 32, 4, 2))
        shapes = (*shapes, (64, 64, 32, 4, 2))
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens),
                block_n=fit(block_n, spec.d_out),
                block_k=fit(block_k if narrow else min(block_k, 32), spec.rank),
                num_warps=warps,
                num_stages=stages if narrow else 2,
            )
            for block_t, block_n, block_k, warps, stages in shapes
        )

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        stage = (block_t * dtype_bytes(spec.activation) + block_n * dtype_bytes(spec.adapter)) * block_k
        return refuse_dot_tile(block_t, block_n, block_k, config.num_warps) or refuse_shared_memory(
            config.num_stages, stage, gpu
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        dtype, passes = dot_passes(spec.activation, spec.activation if spec.autocast else spec.adapter)
        return self._work(spec, config, dtype, passes, dtype_bytes(spec.adapter))

    def _work(
        self, spec: KernelSpec, config: Config, dtype: str, passes: int, adapter: int, rereads: int = 1
    ) -> tuple[Work, ...]:
        """The main launch: ``passes`` products in ``dtype``, for which B has ``adapter`` bytes and h is read again."""
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        tiles_t, tiles_n = ceil_div(spec.tokens, block_t), ceil_div(spec.d_out, block_n)
        width = dtype_bytes(spec.activation)
        streamed = spec.tokens * spec.d_out * width * (3 if spec.save else 2)
        factors = tiles_t * tiles_n * spec.rank * (block_t * width * rereads + block_n * adapter)
        return (
            Work(
                "lora_compose_kernel",
                programs=tiles_t * tiles_n,
                dram_bytes=streamed + spec.tokens * spec.rank * width + spec.d_out * spec.rank * adapter,
                l2_bytes=streamed + factors,
                steps=ceil_div(spec.rank, block_k) * rereads + 1,
                matrix_flops=2
                * tiles_t
                * block_t
                * tiles_n
                * block_n
                * ceil_div(spec.rank, block_k)
                * block_k
                * passes,
                matrix_dtype=dtype,
            ),
        )


class LoraComposeTma(LoraComposeTile):
    """The same tiling with tensor descriptors: on Hopper and later, tiles move without a thread computing addresses.

    fp32 adapters are rounded (autocast) or split in two by a kernel before: the product then runs over twice the ranks.
    """

    name = "tma"
    descriptors = True

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        return tma_unavailable(gpu, (spec.activation,), (spec.d_out, spec.rank))

    def default_order(self, spec: KernelSpec) -> int:
        return 0 if spec.tokens > FEW_TOKENS else 2

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        if spec.tokens <= FEW_TOKENS:
            return super().seeds(spec, gpu)
        shapes: tuple[tuple[int, int, int], ...] = ((128, 128, 4), (128, 128, 8), (128, 64, 4), (64, 128, 4))
        if gpu.architecture == "sm_100":  # the sum comes out of tensor memory at once: too much for four warps
            shapes = ((128, 128, 8), *shapes)
        return tuple(
            Config.create(
                self.name,
                block_t=block_t,
                block_n=fit(block_n, spec.d_out),
                block_k=fit(64, spec.rank),
                num_warps=warps,
                num_stages=3,
            )
            for block_t, block_n, warps in dict.fromkeys(shapes)
        )

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        box = max(config["block_t"], config["block_n"])
        if box > MAX_TMA_BOX:
            return f"a tile side of {box} exceeds the tensor memory accelerator's {MAX_TMA_BOX}"
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        return refuse_dot_tile(block_t, block_n, block_k, config.num_warps) or refuse_shared_memory(
            config.num_stages, (block_t + block_n) * block_k * dtype_bytes(spec.activation), gpu
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        parts = adapter_parts(spec)
        width = dtype_bytes(spec.activation)
        main = self._work(spec, config, spec.activation, parts, parts * width, rereads=parts)
        return adapter_parts_work(spec, spec.d_out * spec.rank) + main
