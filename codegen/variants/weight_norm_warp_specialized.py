"""The variant of ``weight_norm`` with specialised warps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    ADAPTER_CONSTANTS,
    BARRIER_BYTES,
    WARPGROUP,
    Variant,
    Work,
    adapter_parts_work,
    ceil_div,
    multiprocessors_of,
    nearest,
    power_of_two,
    refuse_shared_memory,
    split_for,
    tma_unavailable,
    up_to,
    warp_specialization_unavailable,
)
from .weight_norm import SUM_BLOCK

ROWS, STEP = 128, 64
"""Rows of W per program, and columns of W per pipeline stage."""

LONG_SUM_BLOCK = 4096
"""Elements of G that a program adds at a time where there are few programs; else :data:`SUM_BLOCK`."""


class WeightNormWarpSpecialized(Variant):
    """The sums of the ``tma`` variant on specialised warps, for Hopper: one warp loads while eight multiply.

    Where nW is not given, two more warps square W's tiles in shared memory, so W is read once. G is symmetric, so
    B @ G @ B.T is summed over the blocks on and below the diagonal only: at rank 384 this saves a third of those
    products and of the work for G. ``gram_programs`` programs add the shares of G while ``row_dots_kernel`` already
    multiplies on the other multiprocessors.
    """

    op = "weight_norm"
    name = "warp_specialized"
    descriptors = True
    interpreted = False
    counts = frozenset({"rank_tiles", "split_k", "gram_share", "gram_programs", "gram_stages"})

    constants: ClassVar[Mapping[str, object]] = {
        **ADAPTER_CONSTANTS,
        "block_m": ROWS,
        "block_k": STEP,
        "sum_block": SUM_BLOCK,
        "long_sum_block": LONG_SUM_BLOCK,
    }

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        if spec.weight != "bf16":
            return f"the variant is for bf16 weights only: parts of G in {spec.weight} would overflow or lose digits"
        return warp_specialization_unavailable(spec, gpu) or tma_unavailable(
            gpu, (spec.weight,), (spec.d_in, spec.rank)
        )

    def default_order(self, spec: KernelSpec) -> int:
        return -1  # every search on an H200 chose it, except for 14336x4096 at rank 64

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "rank_block": (64,) if spec.rank <= 64 else (64, 128),
            "rank_tiles": tuple(t for t in (1, 2, 3) if t == 1 or (t - 1) * 64 < spec.rank),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8) if s == 1 or spec.d_in // s >= 256),
            "gram_block": (64,) if spec.rank <= 64 else (64, 128),
            "gram_block_k": (64, 128),
            "gram_share": tuple({**dict.fromkeys(up_to((256, 512, 1024), spec.d_in)), self._one_wave(spec, gpu): None}),
            "gram_stages": (3, 4, 5, 6),
            "gram_programs": (4, 8, 16, ceil_div(spec.rank * spec.rank, SUM_BLOCK)),
            "num_warps": (8,),
            "num_stages": (2, 3, 4, 5, 6),
        }

    def _one_wave(self, spec: KernelSpec, gpu: Gpu) -> int:
        """The number of columns in a share with which the tiles of G, 64 by 64, fill the GPU once."""
        tiles = ceil_div(spec.rank, 64) * (ceil_div(spec.rank, 64) + 1) // 2
        return ceil_div(ceil_div(spec.d_in, max(1, gpu.multiprocessors // tiles)), 128) * 128

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        rank_block = 64 if spec.rank <= 64 else 128
        every = ceil_div(spec.rank * spec.rank, SUM_BLOCK)
        most = max(1, min(8, spec.d_in // 256))

        def seed(
            tile: int, tiles: int, share: int, programs: int, stages: int, rounds: int = 1, gram_stages: int = 6
        ) -> Config:
            tiles = min(tiles, ceil_div(spec.rank, tile))
            one_round = gpu.multiprocessors // (ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, tile * tiles))
            return Config.create(
                self.name,
                rank_block=tile,
                rank_tiles=tiles,
                split_k=min(rounds * max(1, min(one_round, most)), most),
                gram_block=64,
                gram_block_k=128,
                gram_share=share,
                gram_stages=gram_stages,
                gram_programs=programs,
                num_warps=8,
                num_stages=stages,
            )

        found = [seed(rank_block, 3, 1024, every, 3)]
        if spec.rank <= 64:
            found += [seed(64, 1, 1024, 4, 5), seed(64, 1, 256, 8, 4, gram_stages=3), seed(64, 1, 1024, 4, 5, rounds=2)]
        else:
            found += [
                seed(128, 3, self._one_wave(spec, gpu), every, 3),
                seed(128, 3, 1024, 4, 3),
                seed(64, 3, 1024, every, 3, gram_stages=4),
                seed(128, 3, 1024, every, 3, rounds=2),
                seed(64, 1, 512, 4, 6),
            ]
        return tuple(dict.fromkeys(found))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        programs, sums = config["gram_programs"], ceil_div(source.rank * source.rank, SUM_BLOCK)
        # One share of G for each program, or a program for each block of its sum: both follow the shape.
        gram = {
            "gram_share": self._one_wave(spec, gpu)
            if config["gram_share"] == self._one_wave(source, gpu)
            else nearest(choices["gram_share"], config["gram_share"]),
            "gram_programs": ceil_div(spec.rank * spec.rank, SUM_BLOCK)
            if programs == sums
            else nearest(choices["gram_programs"], programs),
        }
        ranks = config["rank_block"] * config["rank_tiles"]
        found: list[Mapping[str, int]] = []
        for rank_block in dict.fromkeys(
            (nearest(choices["rank_block"], config["rank_block"]), choices["rank_block"][-1])
        ):
            most = ceil_div(spec.rank, rank_block)
            wanted = most if ranks >= source.rank else max(1, round(ranks / rank_block))
            rank_tiles = min(wanted, most, 3)
            tiles = (
                ceil_div(source.d_out, ROWS) * ceil_div(source.rank, ranks),
                ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, rank_block * rank_tiles),
            )
            inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
            splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
            found += [{**gram, "rank_block": rank_block, "rank_tiles": rank_tiles, "split_k": each} for each in splits]
        return tuple(found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        rank_block, rank_tiles = config["rank_block"], config["rank_tiles"]
        gram, gram_k = config["gram_block"], config["gram_block_k"]
        if config.num_warps != 2 * WARPGROUP:
            return f"num_warps must be {2 * WARPGROUP} for {ROWS} rows, got {config.num_warps}"
        if rank_block not in (64, 128) or gram not in (64, 128) or gram_k not in (64, 128) or rank_tiles > 3:
            tiles = f"{rank_tiles} rank tiles of {rank_block} and tiles of G of {gram}x{gram_k}"
            return f"{tiles} cannot be built from 64-row products"
        if (rank_tiles - 1) * rank_block >= spec.rank:
            return f"rank {spec.rank} needs fewer than rank_tiles={rank_tiles} tiles of {rank_block}"
        stage_rows = power_of_two(ROWS + rank_block * rank_tiles)
        return (
            refuse_shared_memory(config.num_stages, stage_rows * STEP * 2 + BARRIER_BYTES // 2, gpu)
            or refuse_shared_memory(config["gram_stages"], 2 * gram * gram_k * 2, gpu)
            or (
                f"gram_share must be a multiple of gram_block_k={gram_k}, got {config['gram_share']}"
                if config["gram_share"] % gram_k
                else None
            )
            or (
                f"gram_share={config['gram_share']}, split_k={config['split_k']}: partial sums need 64-bit offsets"
                if max(
                    ceil_div(spec.d_in, config["gram_share"]) * spec.rank * spec.rank,
                    ceil_div(spec.rank, rank_block * rank_tiles) * config["split_k"] * spec.d_out,
                )
                >= 2**31
                else None
            )
            or (
                f"split_k={config['split_k']} leaves some shares without work"
                if config["split_k"] * STEP > max(spec.d_in, STEP)
                else None
            )
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        rank_block, split_k = config["rank_block"], config["split_k"]
        ranks = rank_block * config["rank_tiles"]
        rows, groups = ceil_div(spec.d_out, ROWS), ceil_div(spec.rank, ranks)
        blocks = ceil_div(spec.rank, rank_block)
        lower = blocks * (blocks + 1) // 2 * rank_block * rank_block
        partials = (groups + spec.save) * split_k * spec.d_out * 4
        vectors = 2 * spec.d_out * 4
        weight_bytes = spec.d_out * spec.d_in * 2
        return (
            *adapter_parts_work(spec, (spec.rank, spec.d_in), (spec.d_out, spec.rank)),
            *half_gram_work(spec, config, config["gram_block"], config["gram_block_k"], lower),
            Work(
                "row_dots_kernel",
                programs=rows * groups * split_k,
                dram_bytes=weight_bytes + (spec.rank * spec.d_in + spec.d_out * spec.rank) * 2 + vectors,
                l2_bytes=rows * groups * (ROWS + ranks) * (spec.d_in + spec.rank) * 2 + 2 * partials + vectors,
                steps=ceil_div(spec.d_in, STEP * split_k) + ceil_div(2 * spec.rank, STEP * split_k),
                matrix_flops=2 * rows * ROWS * (groups * ranks * spec.d_in + 2 * lower),
                matrix_dtype=spec.weight,
            ),
        )


def half_gram_work(spec: KernelSpec, config: Config, block: int, block_k: int, added: int) -> tuple[Work, ...]:
    """The launches that make the lower half of G = A @ A.T in tiles of ``block``, and add up ``added`` of its elements.

    ``config`` has ``gram_share``, the columns of A in one partial sum, and ``gram_programs``, those that add these.
    """
    rows, shares = ceil_div(spec.rank, block), ceil_div(spec.d_in, config["gram_share"])
    tiles, programs, elements = rows * (rows + 1) // 2, config["gram_programs"], spec.rank * spec.rank
    sum_block = LONG_SUM_BLOCK if programs * LONG_SUM_BLOCK <= elements else SUM_BLOCK
    return (
        Work(
            "gram_shares_kernel",
            programs=tiles * shares,
            dram_bytes=spec.rank * spec.d_in * 2,
            l2_bytes=tiles * (2 * block * spec.d_in * 2 + shares * block * block * 4),
            steps=ceil_div(config["gram_share"], block_k),
            matrix_flops=2 * tiles * block * block * spec.d_in,
            matrix_dtype=spec.wide,
        ),
        Work(
            "lower_gram_kernel",
            programs=programs,
            dram_bytes=0,
            l2_bytes=added * (shares * 4 + 4),
            steps=shares * ceil_div(elements, sum_block * programs),
        ),
    )
