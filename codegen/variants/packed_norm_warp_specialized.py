"""The variants of ``weight_norm`` and ``weight_norm_group`` that decode a stored W on specialised warps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    BARRIER_BYTES,
    WARPGROUP,
    Variant,
    Work,
    ceil_div,
    covering,
    dtype_bytes,
    fit,
    format_unavailable,
    multiprocessors_of,
    nearest,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    tma_unavailable,
    up_to,
    warp_specialization_unavailable,
)
from .packed_norm import (
    EXACT_COLS,
    FINISH_WARPS,
    GRAM_STAGES,
    GRAM_WARPS,
    LONGEST_SUM,
    MOST_SMALL_RANKS,
    RANKS,
    finish_work,
    gram_work,
    instructions,
    packed_bytes,
)
from .weight_norm_group import MOST_UNITS

ROWS, STEP = 128, 64
"""Rows of W per program, and columns of W per stage of the ring."""

PIECE_ROWS = 32
"""Rows of B that a group of decoding warps loads at a time."""

FEW_REGISTERS, DECODER_REGISTERS = 56, 104
"""Registers of a thread that decodes, beside more than :data:`MANY_SUMS` sums in one that multiplies, and else. Four
such warps beside eight that multiply leave these 224: for 192 sums of 384 ranks, and for addresses. With 216 the
assembler moves sums to memory and waits for each product."""

MANY_PRODUCTS = 4096
"""Products of a tile of the last kernel up to which four warps make them, and eight beyond."""

MANY_SUMS, MOST_SUMS = 128, 192
"""Sums per thread from which on the decoders have few registers, and at most."""


class WeightNormPackedWarpSpecialized(Variant):
    """The sums of the ``packed`` variant on specialised warps, for Hopper: four or eight warps decode, others multiply.

    ``decoders`` groups decode tiles of W into shared memory while ``num_warps`` other warps multiply those before.

    A program takes 128 rows, ``rank_tiles`` tiles of ``rank_block`` ranks and one of ``split_k`` shares of the columns.
    G, and the roots, are made as there.
    """

    op = "weight_norm"
    name = "packed_warp_specialized"
    packed = True
    descriptors = True
    interpreted = False
    counts = frozenset({"rank_tiles", "split_k", "gram_split", "decoders"})
    constants: ClassVar[Mapping[str, object]] = {
        "block_m": ROWS,
        "block_k": STEP,
        "piece_rows": PIECE_ROWS,
        "few_registers": FEW_REGISTERS,
        "decoder_registers": DECODER_REGISTERS,
        "many_sums": MANY_SUMS,
        "gram_warps": GRAM_WARPS,
        "gram_stages": GRAM_STAGES,
        "finish_warps": FINISH_WARPS,
        "many_products": MANY_PRODUCTS,
        "ranks": RANKS,
        "exact_cols": EXACT_COLS,
        "most_units": MOST_UNITS,
    }

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        reason = format_unavailable(spec, self.packed)
        form = spec.format
        if reason is not None or form is None:
            return reason
        if spec.wide != "bf16" or (spec.adapter != "bf16" and not spec.autocast):
            return "the variant multiplies bf16 values of W by bf16 adapters only"
        if form.of.packing == "halves" or form.zeros or form.spread == "strided":
            return f"the variant decodes no zero points, strided groups or packed halves, W is {spec.weight}"
        if form.exact and form.spread == "tile":
            return f"the variant applies the scales of {spec.weight} to no product of a part of a row"
        if spec.d_in % max(STEP, form.group):
            return f"rows of {spec.d_in} elements are not whole steps of {STEP} and groups of {form.group or 1}"
        return warp_specialization_unavailable(spec, gpu) or tma_unavailable(gpu, ("bf16",), (spec.d_in,))

    def default_order(self, spec: KernelSpec) -> int:
        """First where it ran on a GPU and was faster: many ranks, nf4 with plain scales of 64, one layer, A rounded.

        On an H100 (Triton 3.6) the norm from nf4 at rank 384 took 0.64 times the ``packed`` variant's time at
        14336x4096 and 0.60 times at 4096x4096, interleaved in one run that no results file has yet. At rank 64 it took
        0.94 to 0.98 times, at rank 16 1.05. Other formats, groups of layers and bf16 adapters have run on none: a
        search, which checks what it times, may choose it there.
        """
        form = spec.format
        usual = form is not None and form.kind == "nf4" and form.group == 64 and not form.nested
        return -1 if usual and spec.autocast and not spec.layers and spec.rank > MOST_SMALL_RANKS else 2

    def carries(self, source: KernelSpec, spec: KernelSpec) -> bool:
        return (source.rank > MOST_SMALL_RANKS) is (spec.rank > MOST_SMALL_RANKS)

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "rank_block": up_to((16, 32, 64, 128), spec.rank),
            "rank_tiles": tuple(t for t in (1, 2, 3) if t == 1 or (t - 1) * 64 < spec.rank),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8) if s == 1 or spec.d_in // s >= 256),
            "decoders": (1, 2),
            "gram_block": up_to((16, 32, 64), spec.rank),
            "gram_block_k": up_to((32, 64, 128), spec.d_in),
            "gram_split": tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or spec.d_in // s >= 128),
            "finish_rows": up_to((16, 32, 64, 128), spec.d_out),
            "finish_ranks": up_to((16, 32, 64, 128), spec.rank),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5, 6, 8),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        choices = self.choices(spec, gpu)
        layers = max(spec.layers, 1)
        many = spec.rank > MOST_SMALL_RANKS
        found = []
        for rank_block, decoders, warps, stages in ((128, 1, 8, 3), (64, 2, 4, 6), (64, 1, 4, 6), (16, 1, 4, 3)):
            rank_block = fit(rank_block, spec.rank)
            rank_tiles = min(3 if warps == 8 else 1, ceil_div(spec.rank, rank_block))
            programs = layers * ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, rank_block * rank_tiles)
            least = ceil_div(spec.d_in, LONGEST_SUM)
            splits = [s for s in choices["split_k"] if s >= least] or choices["split_k"][-1:]
            gram_tiles = layers * ceil_div(spec.rank, 64) ** 2
            found.append(
                Config.create(
                    self.name,
                    rank_block=rank_block,
                    rank_tiles=rank_tiles,
                    split_k=max([min(splits), *(s for s in splits if s * programs <= gpu.multiprocessors)]),
                    decoders=decoders,
                    gram_block=fit(64, spec.rank),
                    gram_block_k=fit(64, spec.d_in, smallest=32),
                    gram_split=max(
                        s for s in choices["gram_split"] if s == 1 or s * gram_tiles <= 3 * gpu.multiprocessors
                    ),
                    finish_rows=fit(128 if many else 32, spec.d_out),
                    finish_ranks=fit(64, spec.rank),
                    num_warps=warps,
                    num_stages=stages,
                )
            )
        if not many:
            found = [*found[1:], found[0]]
        return tuple(dict.fromkeys(found))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        ranks = {
            name: covering(choices[name], config[name], source.rank, spec.rank)
            for name in ("rank_block", "gram_block", "finish_ranks")
        }
        rank_tiles = min(config["rank_tiles"], ceil_div(spec.rank, ranks["rank_block"]))
        tiles = (
            max(source.layers, 1) * _programs(source, config["rank_block"] * config["rank_tiles"]),
            max(spec.layers, 1) * _programs(spec, ranks["rank_block"] * rank_tiles),
        )
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
        gram_split = nearest(choices["gram_split"], config["gram_split"])
        return tuple({**ranks, "rank_tiles": rank_tiles, "gram_split": gram_split, "split_k": s} for s in splits)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        rank_block, rank_tiles, split_k = config["rank_block"], config["rank_tiles"], config["split_k"]
        gram, gram_k, decoders = config["gram_block"], config["gram_block_k"], config["decoders"]
        if config.num_warps not in (WARPGROUP, 2 * WARPGROUP) or decoders > 2:
            return f"num_warps must be {WARPGROUP} or {2 * WARPGROUP} and decoders 1 or 2, got {config}"
        if rank_block < 16 or rank_block > 128 or rank_tiles > 3:
            return f"{rank_tiles} rank tiles of {rank_block} are not up to 3 tiles of 16 to 128"
        if (rank_tiles - 1) * rank_block >= spec.rank:
            return f"rank {spec.rank} needs fewer than rank_tiles={rank_tiles} tiles of {rank_block}"
        sums = ROWS * rank_block * rank_tiles // (config.num_warps * gpu.warp_size)
        threads = (config.num_warps + decoders * WARPGROUP) * gpu.warp_size
        each = gpu.registers_per_multiprocessor // threads // 8 * 8
        decoding = FEW_REGISTERS if sums > MANY_SUMS else DECODER_REGISTERS
        left = each + (each - decoding) * decoders * WARPGROUP // config.num_warps
        if sums > min(MOST_SUMS, left - 32):
            return f"{sums} sums per thread do not fit the {left} registers beside those of {decoders} decoders"
        steps = spec.d_in // STEP
        if (split_k - 1) * ceil_div(steps, split_k) >= steps:
            return f"split_k={split_k} leaves some shares without work"
        if config["gram_split"] * gram_k > max(spec.d_in, gram_k):
            return f"gram_split={config['gram_split']} leaves some shares without work"
        if ceil_div(spec.d_in, split_k) > LONGEST_SUM:
            return (
                f"split_k must be at least {ceil_div(spec.d_in, LONGEST_SUM)}: sums of more than {LONGEST_SUM} columns"
            )
        stage = (ROWS + rank_block * rank_tiles) * STEP * 2
        return (
            refuse_shared_memory(1, config.num_stages * stage + BARRIER_BYTES, gpu)
            or refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS)
            or refuse_shared_memory(GRAM_STAGES, 2 * gram * gram_k * dtype_bytes(spec.adapter), gpu)
            or refuse_dot_tile(config["finish_rows"], config["finish_ranks"], config["finish_ranks"], FINISH_WARPS)
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        form = spec.format
        assert form is not None
        split_k, layers, width = config["split_k"], max(spec.layers, 1), dtype_bytes(spec.adapter)
        ranks = config["rank_block"] * config["rank_tiles"]
        rows, groups = ceil_div(spec.d_out, ROWS), ceil_div(spec.rank, ranks)
        squared = config["decoders"] if spec.layers or spec.save else 0
        sums = layers * spec.d_out * 4 * split_k * (squared + groups)
        stored = packed_bytes(spec, spec.d_out, spec.d_in) * layers
        return (
            *gram_work(spec, config),
            Work(
                "sums_kernel",
                programs=layers * rows * groups * split_k,
                dram_bytes=stored + layers * spec.rank * (spec.d_in * 2 + spec.d_out * width) + sums,
                l2_bytes=layers * rows * groups * (packed_bytes(spec, ROWS, spec.d_in) + ranks * spec.d_in * 2) + sums,
                steps=ceil_div(spec.d_in // STEP, split_k),
                matrix_flops=2 * layers * rows * ROWS * groups * ranks * spec.d_in,
                matrix_dtype="bf16",
                vector_ops=layers * rows * ROWS * groups * spec.d_in * instructions(spec),
            ),
            finish_work(spec, config, sums),
        )


class WeightNormGroupPackedWarpSpecialized(WeightNormPackedWarpSpecialized):
    """The same for all layers of a shape, which a table names: a column for each tensor that W is stored in."""

    op = "weight_norm_group"


def _programs(spec: KernelSpec, ranks: int) -> int:
    return ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, ranks)
