"""The variants of ``weight_norm_group``: the norms and gains of all layers of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from ..gpu import Gpu, find_gpu
from ..spec import Config, KernelSpec
from .base import (
    BARRIER_BYTES,
    FP32_PASSES,
    WARPGROUP,
    Variant,
    Work,
    ceil_div,
    covering,
    dot_passes,
    dtype_bytes,
    fit,
    multiprocessors_of,
    nearest,
    power_of_two,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    tma_unavailable,
    up_to,
    warp_specialization_unavailable,
)
from .weight_norm import FP32_IN_16_BIT_PASSES

GRAM_WARPS, GRAM_STAGES = 4, 3
"""Warps and pipeline stages of the kernel that makes G = A @ A.T of every layer."""

FINISH_WARPS = 4
"""Warps of the kernel that takes the roots."""

RANKS, EXACT_COLS = 8, 256
"""Ranks and columns that one step of a row that is added up again takes."""

ROWS, STEP = 128, 64
"""Rows of W per tile, and columns per pipeline stage, of the variant with specialised warps."""

FINISH_ROWS = 128
"""Rows that a program of its last kernel finishes."""

ROUND_BLOCK = 2048
"""Values that a program of the kernel that rounds fp32 adapters takes of A and of B."""

MOST_UNITS = 2**31 - 1
"""The extent of the dimension that counts units of the table: coordinates of tensor maps are 32-bit."""

MOST_TILED_RANKS = 64
"""Ranks up to which the tiled variant is the default: beyond them its products take longer than reading W, and the
variant with specialised warps hides more of that."""

MOST_ROUNDED_RANKS, FEW_ELEMENTS = 32, 1 << 22
"""Where fp32 adapters are rounded the tiled variant does that in every program, the other one once: there it is the
default up to these ranks, for matrices of more elements. At rank 64 it then takes 1 to 15 % more on an H200, and for
smaller ones 10 to 30 % less; without rounding 16 to 21 % less."""

FEW_ROWS = 1024
"""Up to so many rows W is read fast, and G, which one program makes for each of its blocks, takes a good part: smaller
blocks of it, and shorter sums, are 6 to 21 % faster on an H100 (ranks 72 and 128, 1024 rows). At ranks up to 16 short
steps are, by 4 to 11 %. Beyond 128 ranks there are blocks enough: smaller ones are 7 to 14 % slower at ranks 248, 256
and 384, and 1 % faster at 288."""

LONGEST_SUM = 8192
"""Columns of W in one sum of W @ A.T by default, as in the variants of ``weight_norm``."""

LONGEST_DEEP_SUM = 17408
"""The same for 65 to 128 ranks and many rows: so many were measured, and accurate. More sums took up to 20 % longer."""

MAX_ELEMENTS = 64
"""Elements of W's tile per thread at most: each takes a register for its square."""


class WeightNormGroupTiles(Variant):
    """Three launches for all layers of a shape: G of each; the sums over W, read once; the roots.

    A program of the second sums the squares of ``block_m`` rows of W and their products with ``block_n`` ranks, over
    one of ``split_k`` shares of the columns. With ``overlap`` 1 a kernel starts while the one before still runs, so
    the making of G hides behind the reading of W. The third makes the term of G from ``finish_rows`` rows of B.
    """

    op = "weight_norm_group"
    name = "tiles"
    switches = frozenset({"overlap"})
    constants: ClassVar[Mapping[str, object]] = {
        "gram_warps": GRAM_WARPS,
        "gram_stages": GRAM_STAGES,
        "finish_warps": FINISH_WARPS,
        "ranks": RANKS,
        "exact_cols": EXACT_COLS,
    }

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_m": up_to((16, 32, 64, 128), spec.d_out),
            "block_n": up_to((16, 32, 64, 128), spec.rank),
            "block_k": up_to((32, 64, 128, 256), spec.d_in),
            "split_k": tuple(s for s in (1, 2, 4, 8) if s == 1 or spec.d_in // s >= 256),
            "gram_block": up_to((16, 32, 64), spec.rank),
            "gram_block_k": up_to((32, 64, 128, 256), spec.d_in),
            "finish_rows": up_to((16, 32, 64, 128), spec.d_out),
            "finish_ranks": up_to((16, 32, 64, 128), spec.rank),
            "overlap": (0, 1) if gpu.has_tma else (0,),
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        narrow = dtype_bytes(spec.weight) == 2 and (spec.adapter == spec.weight or spec.autocast)
        exact = not narrow or spec.weight == "fp16"  # products in several passes, whose parts take registers
        gram_block, gram_block_k = (64, 128 if gpu.has_tma else 64) if not exact else (32, 32)
        while GRAM_STAGES * 2 * gram_block * gram_block_k * dtype_bytes(spec.adapter) > gpu.shared_bytes_per_block:
            gram_block_k //= 2
        many = spec.rank > MOST_TILED_RANKS  # sums and products of more than 64 ranks a row fill the registers
        finish_rows = 64 if gpu.architecture == "sm_90" and not exact else 32  # Triton 3.6 fails at 64 rows for sm_100
        deepest = 32 if not narrow else 128 if gpu.has_tma and not many else 64
        waves = 4 if spec.rank <= 16 else 2
        found = []
        shapes = [
            (64, 128, 128, 8 if many else 4, 3),
            (128, 64, 128, 8, 3),
            (64, 64, 64, 4, 4),
            (64, 64, 64, 4, 3),
            (32, 64, 64, 4, 2),
            (32, 32, 32, 4, 2),
        ]
        if gpu.architecture == "sm_90" and not exact:
            if spec.rank > 32:  # taller tiles, by the tables and searches of an H100 and an H200
                shapes.insert(0, shapes.pop(1) if not spec.autocast else (128, 64, 64, 4, 4))
            elif spec.d_out <= FEW_ROWS:
                shapes.insert(0, shapes.pop(3))
        for block_m, block_n, block_k, warps, stages in shapes:
            block_m, block_k = fit(block_m, spec.d_out), fit(min(block_k, deepest), spec.d_in)
            tiles = spec.layers * ceil_div(spec.d_out, block_m) * ceil_div(spec.rank, fit(block_n, spec.rank))
            split_k = max(
                s for s in self.choices(spec, gpu)["split_k"] if s == 1 or s * tiles <= waves * gpu.multiprocessors
            )
            found.append(
                Config.create(
                    self.name,
                    block_m=block_m,
                    block_n=fit(block_n, spec.rank),
                    block_k=block_k,
                    split_k=split_k,
                    gram_block=fit(gram_block, spec.rank),
                    gram_block_k=fit(gram_block_k, spec.d_in, smallest=32),
                    finish_rows=fit(finish_rows, spec.d_out),
                    finish_ranks=fit(32 if exact or many else 64, spec.rank),
                    overlap=int(gpu.has_tma),
                    num_warps=warps,
                    num_stages=stages if narrow else 2,
                )
            )
        return tuple(dict.fromkeys(found))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        ranks = {
            name: covering(choices[name], config[name], source.rank, spec.rank)
            for name in ("block_n", "gram_block", "finish_ranks")
        }
        tiles = (
            source.layers * ceil_div(source.d_out, config["block_m"]) * ceil_div(source.rank, config["block_n"]),
            spec.layers * ceil_div(spec.d_out, config["block_m"]) * ceil_div(spec.rank, ranks["block_n"]),
        )
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
        overlap = nearest(choices["overlap"], config["overlap"]) if config["overlap"] else 0
        return tuple({**ranks, "overlap": overlap, "split_k": split} for split in splits)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
        gram, gram_k = config["gram_block"], config["gram_block_k"]
        width, adapter = dtype_bytes(spec.weight), dtype_bytes(spec.adapter)
        if config["overlap"] and not gpu.has_tma:
            return f"{gpu.slug} ({gpu.architecture}) has no dependent launches"
        each = block_m * block_k // (config.num_warps * gpu.warp_size)
        if each > MAX_ELEMENTS:
            return f"{each} squares per thread ({block_m}x{block_k} on {config.num_warps} warps)"
        return (
            refuse_dot_tile(block_m, block_n, block_k, config.num_warps)
            or refuse_shared_memory(config.num_stages, (block_m * width + block_n * adapter) * block_k, gpu)
            or refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS)
            or refuse_shared_memory(GRAM_STAGES, 2 * gram * gram_k * adapter, gpu)
            or refuse_dot_tile(config["finish_rows"], config["finish_ranks"], config["finish_ranks"], FINISH_WARPS)
            or refuse_split(spec, config)
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
        adapter = spec.weight if spec.autocast else spec.adapter
        dtype, passes = dot_passes(spec.weight, adapter)
        width, wide = dtype_bytes(spec.weight), dtype_bytes(spec.adapter)
        rows, groups = ceil_div(spec.d_out, block_m), ceil_div(spec.rank, block_n)
        programs = spec.layers * rows * groups * config["split_k"]
        sums = sums_bytes(spec, groups, config["split_k"])
        weight_bytes = spec.layers * spec.d_out * spec.d_in * width
        adapter_bytes = spec.layers * spec.rank * (spec.d_in + spec.d_out) * wide
        return (
            gram_work(spec, config["gram_block"], config["gram_block_k"]),
            Work(
                "sums_kernel",
                programs=programs,
                dram_bytes=weight_bytes + adapter_bytes + sums,
                l2_bytes=spec.layers * rows * groups * (block_m * width + block_n * wide) * spec.d_in + sums,
                steps=ceil_div(spec.d_in, block_k * config["split_k"]),
                matrix_flops=2 * spec.layers * rows * block_m * groups * block_n * spec.d_in * passes,
                matrix_dtype=dtype,
            ),
            finish_work(spec, config["finish_rows"], config["finish_ranks"], sums),
        )


class WeightNormGroupWarpSpecialized(Variant):
    """The sums over W on specialised warps, for Hopper and many ranks: one warp loads, eight multiply, two square.

    A program takes tile after tile of 128 rows of one layer and ``rank_tiles`` tiles of ``rank_block`` ranks, and its
    loads go on while it finishes a tile. B @ (s/2)G is part of the sums, over the blocks on and below the diagonal of
    the symmetric G. Matrices are addressed by tensor maps of three dimensions, the first of which counts the units of
    the table, so one map serves all layers. A kernel before rounds fp32 adapters (autocast).
    """

    op = "weight_norm_group"
    name = "warp_specialized"
    descriptors = True
    interpreted = False
    counts = frozenset({"rank_tiles", "split_k"})
    constants: ClassVar[Mapping[str, object]] = {
        "block_m": ROWS,
        "block_k": STEP,
        "gram_warps": GRAM_WARPS,
        "gram_stages": GRAM_STAGES,
        "finish_warps": FINISH_WARPS,
        "ranks": RANKS,
        "exact_cols": EXACT_COLS,
        "finish_rows": FINISH_ROWS,
        "round_block": ROUND_BLOCK,
        "most_units": MOST_UNITS,
    }

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        if spec.weight != "bf16":
            return f"the variant is for bf16 weights only: parts of G in {spec.weight} would overflow or lose digits"
        return warp_specialization_unavailable(spec, gpu) or tma_unavailable(
            gpu, (spec.weight,), (spec.d_in, spec.rank)
        )

    def default_order(self, spec: KernelSpec) -> int:
        few = spec.d_out * spec.d_in <= FEW_ELEMENTS
        tiled = spec.rank <= (MOST_TILED_RANKS if few or not spec.autocast else MOST_ROUNDED_RANKS)
        return 2 if tiled else -1

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "rank_block": (64,) if spec.rank <= 64 else (64, 128),
            "rank_tiles": tuple(t for t in (1, 2, 3) if t == 1 or (t - 1) * 64 < spec.rank),
            "split_k": tuple(s for s in (1, 2, 3, 4) if s == 1 or spec.d_in // s >= 256),
            "gram_block": (64,) if spec.rank <= 64 else (64, 128),
            "gram_block_k": (64, 128),
            "num_warps": (8,),
            "num_stages": (2, 3, 4, 5, 6),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        ranks = (64 if spec.rank <= 64 else 128) * min(3, ceil_div(spec.rank, 64 if spec.rank <= 64 else 128))
        tiles = spec.layers * ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, ranks)
        least = ceil_div(spec.d_in, LONGEST_SUM)
        splits = [s for s in self.choices(spec, gpu)["split_k"] if s > least and s * tiles <= gpu.multiprocessors]
        split_k = max([least, *splits])
        wide, stages = (64 if spec.rank <= 64 else 128), (4 if spec.rank <= 128 else 3)
        shapes = [(wide, wide, 128 if spec.rank > 128 else 64, stages, split_k), (wide, 64, 128, 3, split_k)]
        if spec.rank <= 64:
            shapes.insert(0, (64, 64, 128, 4, split_k))
        elif spec.rank <= 128 and spec.d_out <= FEW_ROWS:  # G, by one program for each of its blocks, takes long
            shapes.insert(0, (wide, 64, 128, stages, max(split_k, 2)))
        elif spec.rank <= 128:
            shapes.insert(0, (wide, wide, 128, 6, ceil_div(spec.d_in, LONGEST_DEEP_SUM)))
        elif spec.rank <= 192:  # a program for all ranks
            shapes.insert(0, (64, 64, 128, stages, split_k))
        return tuple(
            dict.fromkeys(
                Config.create(
                    self.name,
                    rank_block=rank_block,
                    rank_tiles=min(3, ceil_div(spec.rank, rank_block)),
                    split_k=split_k,
                    gram_block=gram_block,
                    gram_block_k=gram_block_k,
                    num_warps=8,
                    num_stages=stages,
                )
                for rank_block, gram_block, gram_block_k, stages, split_k in (
                    *shapes,
                    (64, 64, 128, 3, split_k),
                    (64, 64, 128, 6, split_k),
                )
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        found = []
        kept = nearest(choices["rank_block"], config["rank_block"])
        for rank_block in dict.fromkeys((kept, choices["rank_block"][-1])):
            rank_tiles = min(3, ceil_div(spec.rank, rank_block))
            length = source.d_in / config["split_k"]
            split_k = nearest(choices["split_k"], spec.d_in / length)
            found.append({"rank_block": rank_block, "rank_tiles": rank_tiles, "split_k": split_k})
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
        if config["split_k"] * STEP > max(spec.d_in, STEP):
            return f"split_k={config['split_k']} leaves some shares without work"
        stage_rows = power_of_two(ROWS + rank_block * rank_tiles)
        return refuse_shared_memory(
            config.num_stages, stage_rows * STEP * 2 + BARRIER_BYTES // 2, gpu
        ) or refuse_shared_memory(GRAM_STAGES, 2 * gram * gram_k * 2, gpu)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        rank_block, split_k = config["rank_block"], config["split_k"]
        ranks = rank_block * config["rank_tiles"]
        rows, groups = ceil_div(spec.d_out, ROWS), ceil_div(spec.rank, ranks)
        blocks = ceil_div(spec.rank, rank_block)
        lower = blocks * (blocks + 1) // 2 * rank_block * rank_block
        tiles = spec.layers * rows * groups * split_k
        multiprocessors = find_gpu(spec.gpu).multiprocessors
        sums = spec.layers * spec.d_out * 4 * split_k * (1 + 2 * groups)
        adapters = spec.layers * spec.rank * (spec.d_in + spec.d_out)
        weight_bytes = spec.layers * spec.d_out * spec.d_in * 2
        rounding: tuple[Work, ...] = ()
        narrow = replace(spec, adapter=spec.weight, autocast=False)
        if spec.adapter != spec.weight:
            blocks_each = ceil_div(max(spec.rank * spec.d_in, spec.d_out * spec.rank), ROUND_BLOCK)
            rounding = (
                Work(
                    "round_kernel",
                    programs=spec.layers * blocks_each,
                    dram_bytes=adapters * 6,
                    l2_bytes=adapters * 6,
                    steps=1,
                ),
            )
        steps = ceil_div(spec.d_in, STEP * split_k) + ceil_div(2 * spec.rank, STEP * split_k)
        return (
            *rounding,
            gram_work(narrow, config["gram_block"], config["gram_block_k"]),
            Work(
                "sums_kernel",
                programs=min(tiles, multiprocessors),
                dram_bytes=weight_bytes + adapters * 2 + sums,
                l2_bytes=tiles * (ROWS + ranks) * (spec.d_in // split_k + spec.rank) * 2 + sums,
                steps=steps * ceil_div(tiles, multiprocessors),
                matrix_flops=2 * spec.layers * rows * ROWS * (groups * ranks * spec.d_in + 2 * lower),
                matrix_dtype=spec.weight,
            ),
            Work(
                "finish_kernel",
                programs=spec.layers * ceil_div(spec.d_out, FINISH_ROWS),
                dram_bytes=sums + spec.layers * spec.d_out * (8 + dtype_bytes(spec.magnitude)),
                l2_bytes=sums + spec.layers * spec.d_out * (8 + dtype_bytes(spec.magnitude)),
                steps=1,
            ),
        )


def refuse_split(spec: KernelSpec, config: Config) -> str | None:
    """Why the columns of W cannot be divided so, or None."""
    if config["split_k"] * config["block_k"] > max(spec.d_in, config["block_k"]):
        return f"split_k={config['split_k']} leaves some shares without work"
    return None


def sums_bytes(spec: KernelSpec, groups: int, split_k: int) -> int:
    """Bytes of the sums over W: for each row those of squares and of products, by share and group of ranks."""
    return spec.layers * spec.d_out * 4 * split_k * (1 + groups)


def gram_work(spec: KernelSpec, block: int, block_k: int, kept_bytes: int = 0) -> Work:
    """The launch that makes G of every layer; ``kept_bytes`` are those of rounded adapters that it also writes."""
    adapter, tiles = spec.weight if spec.autocast else spec.adapter, ceil_div(spec.rank, block)
    width, tiles = dtype_bytes(spec.adapter), tiles * (tiles + 1) // 2
    return Work(
        "gram_kernel",
        programs=spec.layers * tiles,
        dram_bytes=spec.layers * spec.rank * spec.d_in * width + kept_bytes,
        l2_bytes=spec.layers * (tiles * 2 * block * spec.d_in * width + spec.rank * spec.rank * 4) + kept_bytes,
        steps=ceil_div(spec.d_in, block_k),
        matrix_flops=2 * spec.layers * tiles * block * block * spec.d_in * (FP32_PASSES if adapter == "fp32" else 1),
        matrix_dtype=adapter,
    )


def finish_work(spec: KernelSpec, block_m: int, block_r: int, sums: int) -> Work:
    """The launch that adds the sums, makes the term of G and takes the roots."""
    adapter = spec.weight if spec.autocast else spec.adapter
    blocks, rows = ceil_div(spec.rank, block_r), ceil_div(spec.d_out, block_m)
    pairs = blocks * (blocks + 1) // 2
    width = dtype_bytes(spec.adapter)
    vectors = spec.layers * spec.d_out * (8 + dtype_bytes(spec.magnitude))
    factors = spec.layers * spec.d_out * spec.rank * width
    return Work(
        "finish_kernel",
        programs=spec.layers * rows,
        dram_bytes=factors + sums + vectors,
        l2_bytes=spec.layers * rows * pairs * (block_m * width + block_r * 4) * block_r + sums + vectors,
        steps=pairs + 1,
        matrix_flops=2
        * spec.layers
        * rows
        * block_m
        * pairs
        * block_r
        * block_r
        * (2 if adapter == "bf16" else FP32_PASSES if spec.weight == "fp32" else FP32_IN_16_BIT_PASSES),
        matrix_dtype="bf16" if adapter == "bf16" else spec.weight,
    )
