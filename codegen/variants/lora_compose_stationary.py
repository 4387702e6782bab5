"""``lora_compose`` with B kept where it is multiplied: the variant for many tokens on Hopper and later."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    MAX_TMA_BOX,
    Variant,
    Work,
    ceil_div,
    dtype_bytes,
    fit,
    refuse_dot_tile,
    tma_unavailable,
    up_to,
)

MAX_CHUNKS = 8
"""Blocks of ranks that the text writes out one by one."""

MAX_RANK = 512
"""The rank up to which 64 rows of B fit the registers of the four warps that multiply by them."""

MAX_KEPT_REGISTERS = 128
"""Registers a thread may spend on B; the rest is for the accumulators, base and addresses."""

MANY_TOKENS = 2048
"""From this many tokens on a program has tiles enough for B to be worth keeping."""

CONVERSION_BYTES = 4608
"""Shared memory in which base changes its layout, and barriers (read from binaries of Triton 3.6 and 3.7)."""


class LoraComposeStationary(Variant):
    """Programs that keep ``block_n`` rows of B in registers and walk over tiles of ``block_t`` tokens.

    ``programs_t`` programs share a column of tiles. A tile of the tiled variants reads its rows of h and of B from the
    L2, here those of h alone: at rank 384 and 128 columns that is 10 bytes for each element of y instead of 16 with
    tiles of 128 x 128, base and y included. ``block_k`` ranks are one product.
    """

    op = "lora_compose"
    name = "stationary"
    counts = frozenset({"programs_t"})
    descriptors = True

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        if spec.tokens < MANY_TOKENS:
            return f"with fewer than {MANY_TOKENS} tokens there are too few tiles for B to be worth keeping"
        if spec.rank > MAX_RANK:
            return f"rows of B of rank {spec.rank} do not fit the registers (up to {MAX_RANK} do)"
        return tma_unavailable(gpu, (spec.activation, spec.adapter), (spec.d_out, spec.rank))

    def default_order(self, spec: KernelSpec) -> int:
        return 3

    def _programs(self, spec: KernelSpec, block_n: int, slots: int) -> int:
        """Programs a column of tiles, so that ``slots`` programs run at once."""
        return max(1, slots // ceil_div(spec.d_out, block_n))

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        blocks_n = up_to((64, 128, 256), spec.d_out)
        programs = {
            self._programs(spec, block_n, slots * gpu.multiprocessors) for block_n in blocks_n for slots in (1, 2)
        }
        return {
            "block_t": up_to((16, 32, 64, 128), spec.tokens),
            "block_n": blocks_n,
            "block_k": tuple(
                k for k in up_to((16, 32, 64, 128, 256), spec.rank) if ceil_div(spec.rank, k) <= MAX_CHUNKS
            ),
            "programs_t": tuple(sorted(programs)),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        configs = []
        for block_t, block_n, slots, warps, stages in (
            (64, 128, 1, 8, 3),
            (32, 128, 1, 8, 4),
            (64, 128, 1, 8, 2),
            (64, 64, 2, 4, 2),
            (32, 64, 2, 4, 3),
            (16, 64, 2, 4, 2),
        ):
            wide = fit(block_n, spec.d_out, smallest=64)
            # As few products as leave least of the last one empty: three of 128 at rank 384.
            deep = min((64, 128, 256), key=lambda k: (ceil_div(spec.rank, k) * k, -k))
            configs.append(
                Config.create(
                    self.name,
                    block_t=fit(block_t, spec.tokens),
                    block_n=wide,
                    block_k=fit(deep, spec.rank),
                    programs_t=self._programs(spec, wide, slots * gpu.multiprocessors),
                    num_warps=warps,
                    num_stages=stages,
                )
            )
        return tuple(configs)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        chunks = ceil_div(spec.rank, block_k)
        if chunks > MAX_CHUNKS:
            return f"{chunks} blocks of {block_k} ranks: more than {MAX_CHUNKS} are not written out"
        if max(block_t, block_n, block_k) > MAX_TMA_BOX:
            return f"a tile side exceeds the tensor memory accelerator's {MAX_TMA_BOX}"
        kept = block_n * chunks * block_k // (2 * 32 * min(config.num_warps, block_n // 16))
        if kept > MAX_KEPT_REGISTERS:
            return f"{kept} registers a thread for {block_n} rows of B leave too few for the rest"
        width = dtype_bytes(spec.activation)
        stages = config.num_stages * block_t * chunks * block_k * width
        needed = stages + block_t * block_n * width * (2 if spec.save else 1) + CONVERSION_BYTES
        if gpu.architecture == "sm_100":  # its tensor cores read no registers: B is in shared memory there
            needed += block_n * chunks * block_k * width
        if needed > gpu.shared_bytes_per_block:
            limit = gpu.shared_bytes_per_block
            return f"{needed} bytes of shared memory for {config.num_stages} stages exceed {gpu.slug}'s {limit} a block"
        return refuse_dot_tile(block_n, block_t, block_k, config.num_warps)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        tiles_t, tiles_n = ceil_div(spec.tokens, block_t), ceil_div(spec.d_out, block_n)
        programs_t = min(tiles_t, config["programs_t"])
        walked = ceil_div(tiles_t, programs_t)
        width = dtype_bytes(spec.activation)
        streamed = spec.tokens * spec.d_out * width * (3 if spec.save else 2)
        kept = spec.d_out * spec.rank * width
        return (
            Work(
                "lora_compose_kernel",
                programs=programs_t * tiles_n,
                dram_bytes=streamed + kept + spec.tokens * spec.rank * width,
                l2_bytes=streamed + programs_t * kept + programs_t * tiles_n * walked * block_t * spec.rank * width,
                steps=1 + walked,
                matrix_flops=2
                * programs_t
                * tiles_n
                * walked
                * block_t
                * block_n
                * ceil_div(spec.rank, block_k)
                * block_k,
                matrix_dtype=spec.activation,
            ),
        )
