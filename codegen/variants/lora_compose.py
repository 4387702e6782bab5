"""The variants of ``lora_compose``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from ..gpu import Gpu, find_gpu
from ..spec import Config, KernelSpec
from .base import (
    ADAPTER_CONSTANTS,
    BARRIER_BYTES,
    MAX_TMA_BOX,
    MIN_DOT,
    WARPGROUP,
    Variant,
    Work,
    adapter_parts,
    adapter_parts_work,
    ceil_div,
    covering,
    dot_passes,
    dtype_bytes,
    fit,
    refuse_dot_tile,
    refuse_shared_memory,
    tiles_for,
    tma_unavailable,
    up_to,
    warp_specialization_unavailable,
)

FEW_TOKENS = 128
"""Up to this many tokens, reading B takes most of the time, and narrow tiles spread it over the GPU."""

FEWEST_TOKENS = 16
LOWEST_RANK, LOW_RANK = 32, 64
WIDE = 8192
"""Tokens, ranks and columns between which Hopper's built-in configs differ, by the recorded tables of an H100."""

REGISTERS_OF_CONSUMERS = {2: 240, 3: 160}
"""Registers per thread of the warp groups that multiply, by their number; the loading warp has the rest."""


class LoraComposeTile(Variant):
    """One output tile per program: the rank-r product, loaded by pointers, composed with base before it is stored."""

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
        shapes: Iterable[tuple[int, int, int, int, int]]
        if spec.tokens <= FEW_TOKENS:
            shapes = (
                (16, 32, 128, 4, 4),
                (64, 32, 64, 4, 5),
                (64, 16, 128, 4, 4),
                (64, 64, 64, 4, 5),
                (32, 32, 64, 8, 3),
            )
            if gpu.architecture == "sm_90" and spec.tokens > FEWEST_TOKENS and spec.rank > LOWEST_RANK:
                shapes = dict.fromkeys((shapes[1 if spec.rank <= LOW_RANK else 3], *shapes))
        elif narrow and gpu.has_tma:
            shapes = (
                (128, 128, 64, 8, 3),
                (32, 64, 64, 4, 3),
                (64, 32, 64, 2, 3),
                (64, 32, 64, 4, 4),
                (64, 64, 64, 4, 2),
                (16, 64, 64, 8, 5),
            )
            if gpu.architecture == "sm_90" and spec.rank <= LOW_RANK:
                shapes = dict.fromkeys((shapes[1 if spec.rank <= LOWEST_RANK else 4], *shapes))
        elif narrow:  # before Hopper the operands of a product pass through registers, which a deep tile fills
            shapes = ((128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3))
        else:  # the split parts of fp32 operands take registers
            shapes = ((64, 128, 32, 8, 2), (128, 128, 32, 8, 2), (64, 32, 32, 4, 4), (64, 64, 64, 4, 2))
            if gpu.architecture == "sm_90" and spec.rank <= LOW_RANK:
                shapes = dict.fromkeys((shapes[3], *shapes))
        shapes = (*shapes, (32, 32, 32, 2, 3) if spec.tokens <= FEW_TOKENS else (64, 64, 32, 4, 2))
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens),
                block_n=fit(block_n, spec.d_out),
                block_k=fit(block_k if narrow or spec.autocast else min(block_k, 32), spec.rank),
                num_warps=warps,
                num_stages=stages if narrow else 2,
            )
            for block_t, block_n, block_k, warps, stages in shapes
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        block_k = covering(choices["block_k"], config["block_k"], source.rank, spec.rank)
        found = tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})
        return tuple({**values, "block_k": block_k} for values in found)

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
        """The main launch: ``passes`` products in ``dtype``, ``adapter`` bytes per element of B, ``rereads`` of h."""
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


def _fills_with_tall_tiles(spec: KernelSpec) -> bool:
    """Whether tiles of up to 128 tokens and 64 columns fill Hopper at few tokens: smaller ones load B more often."""
    sm_90 = find_gpu(spec.gpu).architecture == "sm_90"
    return sm_90 and FEWEST_TOKENS < spec.tokens <= FEW_TOKENS and spec.rank > LOW_RANK and spec.d_out >= WIDE


class LoraComposeTma(LoraComposeTile):
    """The same tiling with tensor descriptors: from Hopper on, no thread computes addresses.

    A kernel before rounds fp32 adapters (autocast) or splits them in two; the product then runs over twice the ranks.
    """

    name = "tma"
    descriptors = True
    constants: ClassVar[Mapping[str, object]] = ADAPTER_CONSTANTS

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        return tma_unavailable(gpu, (spec.activation,), (spec.d_out, spec.rank))

    def default_order(self, spec: KernelSpec) -> int:
        if find_gpu(spec.gpu).architecture == "sm_90" and spec.rank <= LOW_RANK:
            return 2  # on an H100 tiles loaded by pointers took 0.6 to 0.9 times as long
        return 0 if spec.tokens > FEW_TOKENS or _fills_with_tall_tiles(spec) else 2

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        if spec.tokens <= FEW_TOKENS:
            few = super().seeds(spec, gpu)[0]
            wide = {"block_t": fit(128, spec.tokens), "block_n": fit(64, spec.d_out), "block_k": fit(64, spec.rank)}
            tall = Config.create(self.name, **wide, num_warps=4, num_stages=4)
            return (tall, few) if _fills_with_tall_tiles(spec) else (few, tall)
        shapes: tuple[tuple[int, int, int], ...] = ((128, 128, 4), (128, 128, 8), (128, 64, 4), (64, 128, 4))
        if gpu.architecture == "sm_90":  # where specialised warps are faster
            shapes = shapes[:2]
        if gpu.architecture == "sm_100":  # the sum leaves tensor memory at once: too much for four warps
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
            return f"a tile side must be at most {MAX_TMA_BOX} for the tensor memory accelerator, got {box}"
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        return refuse_dot_tile(block_t, block_n, block_k, config.num_warps) or refuse_shared_memory(
            config.num_stages, (block_t + block_n) * block_k * dtype_bytes(spec.activation), gpu
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        parts = adapter_parts(spec)
        width = dtype_bytes(spec.activation)
        main = self._work(spec, config, spec.activation, parts, parts * width, rereads=parts)
        return adapter_parts_work(spec, (spec.d_out, spec.rank)) + main


class LoraComposeWarpSpecialized(Variant):
    """A persistent grid with specialised warps, for Hopper: one warp loads tiles, others multiply and compose in turn.

    At many tokens the L2 bounds the tiled variants: a tile of 128x128 loads 192 KB of h and B at rank 384 for 64 KB of
    base and y. Here a program keeps its block of B in shared memory for all its token tiles, which halves that traffic;
    and while one group of four warps composes and stores, another one multiplies.
    """

    op = "lora_compose"
    name = "warp_specialized"
    descriptors = True
    interpreted = False
    counts = frozenset({"consumers"})
    constants: ClassVar[Mapping[str, object]] = {**ADAPTER_CONSTANTS, "consumer_registers": REGISTERS_OF_CONSUMERS}

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        return warp_specialization_unavailable(spec, gpu) or tma_unavailable(
            gpu, (spec.activation,), (spec.d_out, spec.rank)
        )

    def default_order(self, spec: KernelSpec) -> int:
        """First for many tokens above rank 64, where on an H100 the ``tma`` variant took 1.1 to 1.4 times as long."""
        return -1 if spec.tokens > FEW_TOKENS and spec.rank > LOW_RANK else 3

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": (64, 128),
            "block_n": (32, 64, 128, 256),
            "block_k": (64,) if spec.rank > 32 else (32,),
            "consumers": (2, 3),
            "num_warps": (4,),
            "num_stages": (2, 3, 4, 5, 6, 7, 8),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_t=block_t,
                block_n=block_n,
                block_k=64 if spec.rank > 32 else 32,
                consumers=consumers,
                num_warps=4,
                num_stages=stages,
            )
            for block_t, block_n, consumers, stages in (
                (64, 128, 2, 8),
                (64, 128, 2, 6),
                (128, 64, 2, 6),
                (64, 128, 3, 8),
                (64, 32, 2, 4),
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        found: list[Mapping[str, int]] = []
        for block_n in (config["block_n"], max(config["block_n"] // 2, 32)):
            # The block of B stays in shared memory: a larger rank leaves room for fewer stages, or for narrower tiles.
            values = {**dict(config.params), "block_k": self.choices(spec, gpu)["block_k"][0], "block_n": block_n}
            for stages in range(config.num_stages, 1, -1):
                fewer = Config.create(self.name, **values, num_warps=config.num_warps, num_stages=stages)
                if self.refuse(spec, fewer, gpu) is None:
                    found.append({**values, "num_stages": stages})
                    break
        return tuple(found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        consumers = config["consumers"]
        if config.num_warps != WARPGROUP:
            return f"num_warps must be {WARPGROUP}, the warps of a group that multiplies, got {config.num_warps}"
        if consumers not in (2, 3):
            return f"consumers must be 2 or 3, got {consumers}"
        if block_t not in (64, 128) or not MIN_DOT <= block_n <= MAX_TMA_BOX or block_k not in (32, 64):
            return f"tiles of {block_t}x{block_n}x{block_k} cannot be built from 64-row products"
        registers = REGISTERS_OF_CONSUMERS[consumers]
        if block_t * block_n // (WARPGROUP * 32) > registers - 64:
            return f"{block_t}x{block_n} accumulators on {WARPGROUP} warps do not fit {registers} registers per thread"
        resident = block_n * ceil_div(spec.rank, block_k) * block_k
        elements = resident + config.num_stages * block_t * block_k + consumers * block_t * block_n
        return refuse_shared_memory(1, elements * 2 + BARRIER_BYTES, gpu)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_t, block_n = config["block_t"], config["block_n"]
        tiles_t, tiles_n = ceil_div(spec.tokens, block_t), ceil_div(spec.d_out, block_n)
        share = ceil_div(tiles_t * tiles_n, find_gpu(spec.gpu).multiprocessors)
        programs = ceil_div(tiles_t * tiles_n, share)
        streamed = spec.tokens * spec.d_out * 2 * (3 if spec.save else 2)
        ranks = ceil_div(spec.rank, config["block_k"]) * config["block_k"]
        factors = (spec.tokens * tiles_n + spec.d_out * ceil_div(programs, tiles_n)) * spec.rank * 2
        return (
            *adapter_parts_work(spec, (spec.d_out, spec.rank)),
            Work(
                "lora_compose_kernel",
                programs=programs,
                dram_bytes=streamed + (spec.tokens + spec.d_out) * spec.rank * 2,
                l2_bytes=streamed + factors,
                steps=share * (ranks // config["block_k"]),
                matrix_flops=2 * tiles_t * block_t * tiles_n * block_n * ranks,
                matrix_dtype=spec.activation,
            ),
        )
