"""The variants of ``weight_norm`` and ``weight_norm_group`` that decode a stored W on specialised warps."""

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
    gram_work,
    instructions,
    packed_bytes,
)
from .weight_norm import SUM_BLOCK
from .weight_norm_group import MOST_UNITS
from .weight_norm_warp_specialized import LONG_SUM_BLOCK, half_gram_work

MOST_FEW_RANKS = 32
"""Up to so many ranks decoding decides, and the variant's steps of 64 ranks are half empty."""

ROWS, STEP = 128, 64
"""Rows of W per program, and columns of W per stage of the ring."""

PIECE_ROWS = 64
"""Rows of B that a group of decoding warps loads at a time."""

FINISH_ROWS = 32
"""Rows that a program of the last kernel finishes."""

GRAM_BLOCK, GRAM_BLOCK_K, GRAM_BUFFERS = 64, 128, 4
"""Rows and columns of a tile of G of a single layer, columns of A in a step of its sum, and pipeline stages."""

FEW_REGISTERS, DECODER_REGISTERS = 56, 104
"""Registers of a thread that decodes, beside more than :data:`MANY_SUMS` sums in one that multiplies, and else. Four
such warps beside eight that multiply leave these 224: for 192 sums of 384 ranks, and for addresses. With 216 the
assembler moves sums to memory and waits for each product."""

MANY_SUMS, MOST_SUMS = 128, 192
"""Sums per thread from which on the decoders have few registers, and at most."""


class WeightNormPackedWarpSpecialized(Variant):
    """The sums of the ``packed`` variant on specialised warps, for Hopper: four or eight warps decode, others multiply.

    ``decoders`` groups decode tiles of W into shared memory while ``num_warps`` other warps multiply those before.
    A program takes 128 rows, ``rank_tiles`` tiles of ``rank_block`` ranks and one of ``split_k`` shares of the sums.
    B @ (s/2)G is part of the sums, so what is left to the last kernel are the roots, and the rows that nearly cancel.
    G is made while W is already multiplied, in shares of ``gram_share`` columns which ``gram_programs`` programs add.
    """

    op = "weight_norm"
    name = "packed_warp_specialized"
    packed = True
    descriptors = True
    interpreted = False
    counts = frozenset({"rank_tiles", "split_k", "decoders", "gram_share", "gram_programs"})
    constants: ClassVar[Mapping[str, object]] = {
        **ADAPTER_CONSTANTS,
        "block_m": ROWS,
        "block_k": STEP,
        "piece_rows": PIECE_ROWS,
        "finish_rows": FINISH_ROWS,
        "few_registers": FEW_REGISTERS,
        "decoder_registers": DECODER_REGISTERS,
        "many_sums": MANY_SUMS,
        "gram_block": GRAM_BLOCK,
        "gram_block_k": GRAM_BLOCK_K,
        "gram_warps": GRAM_WARPS,
        "gram_stages": GRAM_BUFFERS,
        "sum_block": SUM_BLOCK,
        "long_sum_block": LONG_SUM_BLOCK,
        "finish_warps": FINISH_WARPS,
        "ranks": RANKS,
        "exact_cols": EXACT_COLS,
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
        return warp_specialization_unavailable(spec, gpu) or tma_unavailable(gpu, ("bf16",), (spec.d_in, spec.rank))

    def default_order(self, spec: KernelSpec) -> int:
        """First above rank 64, and from rank 33 on for one layer at a time.

        In a check on an H100 (Triton 3.6, no results file), in formats of 4 and 8 bits and with adapters in bf16 and
        fp32, it took at rank 384 0.34 to 0.72 times the ``packed`` variant's time for one layer and 0.77 to 0.97 times
        for groups; at rank 64 0.66 to 1.04 and 0.90 to 1.37 times; at ranks 16 and 32 more.
        """
        return -1 if spec.rank > (MOST_SMALL_RANKS if spec.layers else MOST_FEW_RANKS) else 2

    def carries(self, source: KernelSpec, spec: KernelSpec) -> bool:
        return (source.rank > MOST_SMALL_RANKS) is (spec.rank > MOST_SMALL_RANKS)

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "rank_block": (64,) if spec.rank <= 64 else (64, 128),
            "rank_tiles": tuple(t for t in (1, 2, 3) if t == 1 or (t - 1) * 64 < spec.rank),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8) if s == 1 or spec.d_in // s >= 256),
            "decoders": (1, 2),
            **self._gram_choices(spec),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5, 6, 8),
        }

    def _gram_choices(self, spec: KernelSpec) -> Mapping[str, tuple[int, ...]]:
        return {"gram_share": up_to((256, 512, 1024), spec.d_in), "gram_programs": (4, 16, _every(spec))}

    def _gram_seed(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, int]:
        return {
            "gram_share": fit(1024 if spec.rank > MOST_SMALL_RANKS else 256, spec.d_in, smallest=256),
            "gram_programs": min(_every(spec), gpu.multiprocessors),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        choices = self.choices(spec, gpu)
        layers = max(spec.layers, 1)
        found = []
        few, many = ((64, 2, 4, 6), (64, 1, 4, 6), (64, 1, 8, 4)), ((128, 1, 8, 3), (64, 1, 8, 3), (64, 2, 4, 6))
        for rank_block, decoders, warps, stages in many if spec.rank > MOST_SMALL_RANKS else few:
            rank_tiles = min(3 if warps == 8 else 1, ceil_div(spec.rank, rank_block))
            programs = layers * _programs(spec, rank_block * rank_tiles)
            least = ceil_div(spec.d_in, LONGEST_SUM)
            splits = [s for s in choices["split_k"] if s >= least] or choices["split_k"][-1:]
            found.append(
                Config.create(
                    self.name,
                    rank_block=rank_block,
                    rank_tiles=rank_tiles,
                    split_k=max([min(splits), *(s for s in splits if s * programs <= gpu.multiprocessors)]),
                    decoders=decoders,
                    **self._gram_seed(spec, gpu),
                    num_warps=warps,
                    num_stages=stages,
                )
            )
        return tuple(dict.fromkeys(found))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        rank_block = nearest(choices["rank_block"], config["rank_block"])
        ranks = config["rank_block"] * config["rank_tiles"]
        most = ceil_div(spec.rank, rank_block)
        rank_tiles = min(3, most if ranks >= source.rank else max(1, round(ranks / rank_block)), most)
        tiles = (
            max(source.layers, 1) * _programs(source, ranks),
            max(spec.layers, 1) * _programs(spec, rank_block * rank_tiles),
        )
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
        gram = {
            name: nearest(choices[name], config[name]) for name in self._gram_choices(spec) if name != "gram_programs"
        }
        if "gram_programs" in choices:
            gram["gram_programs"] = min(config["gram_programs"], _every(spec))
        return tuple({**gram, "rank_block": rank_block, "rank_tiles": rank_tiles, "split_k": s} for s in splits)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        rank_block, rank_tiles, split_k = config["rank_block"], config["rank_tiles"], config["split_k"]
        decoders = config["decoders"]
        if config.num_warps not in (WARPGROUP, 2 * WARPGROUP) or decoders > 2:
            return f"num_warps must be {WARPGROUP} or {2 * WARPGROUP} and decoders 1 or 2, got {config}"
        if rank_block not in (64, 128) or rank_tiles > 3:
            return f"{rank_tiles} rank tiles of {rank_block} are not up to 3 tiles of 64 or 128"
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
        if ceil_div(spec.d_in, split_k) > LONGEST_SUM:
            return (
                f"split_k must be at least {ceil_div(spec.d_in, LONGEST_SUM)}: sums of more than {LONGEST_SUM} columns"
            )
        stage = (ROWS + rank_block * rank_tiles) * STEP * 2
        return refuse_shared_memory(1, config.num_stages * stage + BARRIER_BYTES, gpu) or self._refuse_gram(
            spec, config, gpu
        )

    def _refuse_gram(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        share = config["gram_share"]
        if share % GRAM_BLOCK_K:
            return f"gram_share must be a multiple of {GRAM_BLOCK_K}, got {share}"
        if ceil_div(spec.d_in, share) * spec.rank * spec.rank >= 2**31:
            return f"gram_share={share}: partial sums need 64-bit offsets"
        return None

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        form = spec.format
        assert form is not None
        split_k, layers, width = config["split_k"], max(spec.layers, 1), dtype_bytes(spec.adapter)
        ranks = config["rank_block"] * config["rank_tiles"]
        rows, groups = ceil_div(spec.d_out, ROWS), ceil_div(spec.rank, ranks)
        squared = config["decoders"] if spec.layers or spec.save else 0
        sums = layers * spec.d_out * 4 * split_k * (squared + 2 * groups)
        stored = packed_bytes(spec, spec.d_out, spec.d_in) * layers
        inner = spec.d_in + 2 * ceil_div(spec.rank, STEP) * STEP
        vectors = layers * spec.d_out * 12
        return (
            *self._gram_work(spec, config),
            Work(
                "sums_kernel",
                programs=layers * rows * groups * split_k,
                dram_bytes=stored + layers * spec.rank * (spec.d_in * 2 + spec.d_out * width) + sums,
                l2_bytes=layers * rows * groups * (packed_bytes(spec, ROWS, spec.d_in) + ranks * inner * 2) + sums,
                steps=ceil_div(inner // STEP, split_k),
                matrix_flops=2 * layers * rows * ROWS * groups * ranks * inner,
                matrix_dtype="bf16",
                vector_ops=layers * rows * ROWS * groups * spec.d_in * instructions(spec),
            ),
            Work(
                "finish_kernel",
                programs=layers * ceil_div(spec.d_out, FINISH_ROWS),
                dram_bytes=sums + vectors,
                l2_bytes=sums + vectors,
                steps=1,
            ),
        )

    def _gram_work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        return (
            *adapter_parts_work(spec, (spec.rank, spec.d_in)),
            *half_gram_work(spec, config, GRAM_BLOCK, GRAM_BLOCK_K, spec.rank * spec.rank),
        )


class WeightNormGroupPackedWarpSpecialized(WeightNormPackedWarpSpecialized):
    """The same for all layers of a shape, which a table names: a column for each tensor that W is stored in.

    Two kernels before make G of every layer, and A rounded, in ``gram_split`` shares as in the ``packed`` variant.
    """

    op = "weight_norm_group"
    counts = frozenset({"rank_tiles", "split_k", "decoders", "gram_split"})
    constants: ClassVar[Mapping[str, object]] = {
        **{
            name: value
            for name, value in WeightNormPackedWarpSpecialized.constants.items()
            if name not in {*ADAPTER_CONSTANTS, "gram_block", "gram_block_k", "sum_block", "long_sum_block"}
        },
        "gram_stages": GRAM_STAGES,
        "most_units": MOST_UNITS,
    }

    def _gram_choices(self, spec: KernelSpec) -> Mapping[str, tuple[int, ...]]:
        return {
            "gram_block": up_to((16, 32, 64), spec.rank),
            "gram_block_k": up_to((32, 64, 128), spec.d_in),
            "gram_split": tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or spec.d_in // s >= 128),
        }

    def _gram_seed(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, int]:
        tiles = spec.layers * ceil_div(spec.rank, 64) ** 2
        splits = self._gram_choices(spec)["gram_split"]
        return {
            "gram_block": fit(64, spec.rank),
            "gram_block_k": fit(64, spec.d_in, smallest=32),
            "gram_split": max(s for s in splits if s == 1 or s * tiles <= gpu.multiprocessors),
        }

    def _refuse_gram(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        gram, gram_k = config["gram_block"], config["gram_block_k"]
        if config["gram_split"] * gram_k > max(spec.d_in, gram_k):
            return f"gram_split={config['gram_split']} leaves some shares without work"
        return refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS) or refuse_shared_memory(
            GRAM_STAGES, 2 * gram * gram_k * dtype_bytes(spec.adapter), gpu
        )

    def _gram_work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        return gram_work(spec, config)


def _programs(spec: KernelSpec, ranks: int) -> int:
    return ceil_div(spec.d_out, ROWS) * ceil_div(spec.rank, ranks)


def _every(spec: KernelSpec) -> int:
    """The programs that add up G if each takes :data:`~.weight_norm.SUM_BLOCK` elements."""
    return ceil_div(spec.rank * spec.rank, SUM_BLOCK)
