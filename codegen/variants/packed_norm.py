"""The variants of ``weight_norm`` and ``weight_norm_group`` that read a W in a weight format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from ..weight_formats import TILE
from .base import (
    FP32_PASSES,
    Variant,
    Work,
    ceil_div,
    covering,
    dot_passes,
    dtype_bytes,
    fit,
    multiprocessors_of,
    nearest,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    up_to,
)
from .weight_norm import FP32_IN_16_BIT_PASSES

GRAM_WARPS, GRAM_STAGES = 4, 3
"""Warps and pipeline stages of the kernel that makes G = A @ A.T."""

FINISH_WARPS = 4
"""Warps of the kernel that takes the roots."""

RANKS, EXACT_COLS = 8, 256
"""Ranks and columns that one step of a row that is added up again takes."""

LONGEST_SUM = 8192
"""Columns of W in one sum of W @ A.T at most: tensor cores truncate a running sum, and with more columns its error may
pass the norm's bound (:data:`~doratune.codegen.ops.LEAST_SHARE`)."""

MAX_ELEMENTS = 128
"""Elements of W's tile per thread at most: each takes a register while it is decoded."""

MAX_HELD = 224
"""Registers per thread for sums and decoded elements together, from which on the compiler would have to spill."""


MOST_SMALL_RANKS = 64
"""Ranks up to which decoding takes longer than the products.

On an H100 the winners of int8 and fp8 at rank 64 (32 columns a step, two or four warps), taken at rank 384, took 1.05
to 2.0 times as long as the built-in config, each relative to the bf16 norm of its own run (``packed-tuned.json`` and
``packed-built-in.json`` of ``benchmarks/results/h100-sxm/before-after``). Those of rank 16 are as far
from what suits many ranks.
"""

WARPS_OF_SMALL_RANKS = 24
"""Warps on a multiprocessor that programs of few ranks are split into, at most: what their registers leave room for."""


class WeightNormPacked(Variant):
    """W is read as it is stored and decoded in registers; nothing of its size is written.

    G in ``gram_split`` shares (and, with autocast, A rounded); the sums over W, where a program decodes each tile of
    ``block_m`` rows once for ``rank_tiles`` tiles of ``block_n`` ranks, over one of ``split_k`` shares of the columns;
    then the roots, and the rows that nearly cancel again. With ``overlap`` 1 a kernel starts while the one before
    still runs.
    """

    op = "weight_norm"
    name = "packed"
    packed = True
    counts = frozenset({"rank_tiles", "split_k", "gram_split"})
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
            "rank_tiles": tuple(t for t in (1, 2, 3) if t == 1 or (t - 1) * 64 < spec.rank),
            "block_k": up_to((32, 64, 128, 256), spec.d_in),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8, 16) if s == 1 or spec.d_in // s >= 256),
            "gram_block": up_to((16, 32, 64), spec.rank),
            "gram_block_k": up_to((32, 64, 128), spec.d_in),
            "gram_split": tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or spec.d_in // s >= 128),
            "finish_rows": up_to((16, 32, 64, 128), spec.d_out),
            "finish_ranks": up_to((16, 32, 64), spec.rank),
            "overlap": (0, 1) if gpu.has_tma else (0,),
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        choices = self.choices(spec, gpu)
        exact = _adapter(spec) == "fp32" or spec.wide == "fp32"  # several products for one, whose parts take registers
        form = spec.format
        assert form is not None
        # Zero points take registers; so do squares, where products are not those of warp groups.
        squares = (spec.save or spec.layers) and gpu.architecture != "sm_90"
        most = 1 if exact else 2 if form.zeros or squares else 3
        layers = max(spec.layers, 1)
        # On warp groups larger tiles of G's term fit the registers.
        wide_finish = spec.rank > MOST_SMALL_RANKS and not exact and gpu.architecture == "sm_90"
        # With few ranks decoding takes longest, and several programs on a multiprocessor hide what they wait for.
        tiles_first = [(64, 64, 128, 4, 3), (128, 64, 128, 8, 3), (128, 64, 64, 8, 3)]
        if spec.rank > MOST_SMALL_RANKS:
            tiles_first.reverse()
        tiles = [*tiles_first, (64, 64, 64, 4, 3), (64, 64, 64, 4, 2), (32, 32, 32, 4, 2), (16, 16, 32, 2, 3)]
        found = []
        for block_m, block_n, block_k, warps, stages in tiles:
            block_m, block_n = fit(block_m, spec.d_out), fit(block_n, spec.rank)
            # The number of tiles that pads the ranks least: at rank 384 two programs share a row block's.
            rank_tiles = min(
                range(1, min(most, ceil_div(spec.rank, block_n)) + 1),
                key=lambda t: (ceil_div(spec.rank, t * block_n) * t, -t),
            )
            block_k = fit(block_k if not exact else 32, spec.d_in, smallest=32)
            programs = layers * ceil_div(spec.d_out, block_m) * ceil_div(spec.rank, block_n * rank_tiles)
            least = ceil_div(spec.d_in, LONGEST_SUM)
            splits = [s for s in choices["split_k"] if s >= least and (s == 1 or s * block_k <= spec.d_in)]
            even = [s for s in splits if spec.d_in % (s * block_k) == 0] or splits or choices["split_k"][-1:]
            # Few ranks leave registers for several programs, of which each hides what the others wait for.
            resident = WARPS_OF_SMALL_RANKS // warps if spec.rank <= MOST_SMALL_RANKS else 3
            split_k = max([min(even), *(s for s in even if s * programs <= resident * gpu.multiprocessors)])
            gram_tiles = layers * ceil_div(spec.rank, 64) ** 2
            gram_split = max(s for s in choices["gram_split"] if s == 1 or s * gram_tiles <= 3 * gpu.multiprocessors)
            found.append(
                Config.create(
                    self.name,
                    block_m=block_m,
                    block_n=block_n,
                    rank_tiles=rank_tiles,
                    block_k=block_k,
                    split_k=split_k,
                    gram_block=fit(32 if exact else 64, spec.rank),
                    gram_block_k=fit(32 if exact or not gpu.has_tma else 64, spec.d_in, smallest=32),
                    gram_split=gram_split,
                    finish_rows=fit(64 if wide_finish else 32, spec.d_out),
                    finish_ranks=fit(64 if wide_finish or (spec.rank <= 64 and not exact) else 32, spec.rank),
                    overlap=int(gpu.has_tma),
                    num_warps=warps,
                    num_stages=stages if not exact else 2,
                )
            )
        return tuple(dict.fromkeys(found))

    def carries(self, source: KernelSpec, spec: KernelSpec) -> bool:
        return (source.rank > MOST_SMALL_RANKS) is (spec.rank > MOST_SMALL_RANKS)

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        ranks = {
            name: covering(choices[name], config[name], source.rank, spec.rank)
            for name in ("block_n", "gram_block", "finish_ranks")
        }
        rank_tiles = min(config["rank_tiles"], ceil_div(spec.rank, ranks["block_n"]))
        tiles = (
            max(source.layers, 1) * _programs(source, config, config["block_n"] * config["rank_tiles"]),
            max(spec.layers, 1) * _programs(spec, config, ranks["block_n"] * rank_tiles),
        )
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
        overlap = nearest(choices["overlap"], config["overlap"]) if config["overlap"] else 0
        gram_split = nearest(choices["gram_split"], config["gram_split"])
        return tuple(
            {**ranks, "rank_tiles": rank_tiles, "overlap": overlap, "gram_split": gram_split, "split_k": split}
            for split in splits
        )

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
        gram, gram_k, split_k = config["gram_block"], config["gram_block_k"], config["split_k"]
        rank_tiles = config["rank_tiles"]
        width, adapter = dtype_bytes(spec.wide), dtype_bytes(spec.adapter)
        threads = config.num_warps * gpu.warp_size
        if config["overlap"] and not gpu.has_tma:
            return f"{gpu.slug} ({gpu.architecture}) has no dependent launches"
        each, sums = block_m * block_k // threads, block_m * block_n * rank_tiles // threads
        if each > MAX_ELEMENTS or sums + each > MAX_HELD:
            return f"{sums} sums and {each} elements of W per thread do not fit the registers"
        if (rank_tiles - 1) * block_n >= spec.rank:
            return f"rank {spec.rank} needs fewer than rank_tiles={rank_tiles} tiles of {block_n}"
        if split_k * block_k > max(spec.d_in, block_k):
            return f"split_k={split_k} leaves some shares without work"
        if config["gram_split"] * gram_k > max(spec.d_in, gram_k):
            return f"gram_split={config['gram_split']} leaves some shares without work"
        if ceil_div(spec.d_in, split_k) > LONGEST_SUM:
            return (
                f"split_k must be at least {ceil_div(spec.d_in, LONGEST_SUM)}: sums of more than {LONGEST_SUM} columns"
            )
        form = spec.format
        if form is not None and form.spread == "tile" and (block_m > TILE or block_k > TILE):
            return f"tiles of {block_m}x{block_k} hold several scales of {TILE}x{TILE} elements"
        # Beside the stages: the decoded tile, and the largest of what the pipeline keeps of A.
        stage = packed_bytes(spec, block_m, block_k) + block_n * rank_tiles * block_k * adapter_bytes(spec)
        decoded = block_m * block_k * width
        return (
            refuse_dot_tile(block_m, block_n, block_k, config.num_warps)
            or refuse_shared_memory(1, config.num_stages * stage + decoded, gpu)
            or refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS)
            or refuse_shared_memory(GRAM_STAGES, 2 * gram * gram_k * adapter, gpu)
            or refuse_dot_tile(config["finish_rows"], config["finish_ranks"], config["finish_ranks"], FINISH_WARPS)
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        form = spec.format
        assert form is not None
        block_m, block_k, split_k = config["block_m"], config["block_k"], config["split_k"]
        layers, adapter, width = max(spec.layers, 1), _adapter(spec), dtype_bytes(spec.adapter)
        dtype, passes = dot_passes(spec.wide, adapter)
        ranks = config["block_n"] * config["rank_tiles"]
        rows, groups = ceil_div(spec.d_out, block_m), ceil_div(spec.rank, ranks)
        squared = bool(spec.layers) or spec.save
        sums = layers * spec.d_out * 4 * split_k * (squared + groups)
        stored = sum(layers * each.elements * _BYTES[each.dtype] for each in form.operands(spec.d_out, spec.d_in))
        read = adapter_bytes(spec)
        return (
            *gram_work(spec, config),
            Work(
                "sums_kernel",
                programs=layers * rows * groups * split_k,
                dram_bytes=stored + layers * spec.rank * (spec.d_in * read + spec.d_out * width) + sums,
                l2_bytes=layers * rows * groups * (packed_bytes(spec, block_m, spec.d_in) + ranks * spec.d_in * read)
                + sums,
                steps=ceil_div(spec.d_in, block_k * split_k),
                matrix_flops=2 * layers * rows * block_m * groups * ranks * spec.d_in * passes,
                matrix_dtype=dtype,
                vector_ops=layers * rows * block_m * groups * spec.d_in * instructions(spec),
            ),
            finish_work(spec, config, sums),
        )


class WeightNormGroupPacked(WeightNormPacked):
    """The same for all layers of a shape, which a table names: a column for each tensor that W is stored in."""

    op = "weight_norm_group"


def instructions(spec: KernelSpec) -> int:
    """Instructions that an element of W takes, about: as counted in sm_90's machine code at 128x128 tiles."""
    form = spec.format
    assert form is not None
    count = _INSTRUCTIONS[form.of.codes] + (4 if form.zeros else 0) + (2 if form.spread == "strided" else 0)
    if spec.d_in % (8 if form.of.packing == "pairs" else 4):
        count += _EACH_ALONE
    return count + (2 if spec.layers or spec.save else 0)


_INSTRUCTIONS = {"index": 7, "signed": 6, "unsigned": 8, "e4m3": 10}
"""By kind of code, without squares."""

_EACH_ALONE = 20
"""More where rows do not begin at a word, so that each element loads its own code and scale."""

_BYTES = {"u8": 1, "i8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def _adapter(spec: KernelSpec) -> str:
    """The dtype of the products' adapters."""
    return spec.wide if spec.autocast else spec.adapter


def adapter_bytes(spec: KernelSpec) -> int:
    """Bytes of an element of A as the sums read it: rounded with autocast."""
    return dtype_bytes(_adapter(spec))


def packed_bytes(spec: KernelSpec, rows: int, cols: int) -> int:
    """Bytes that a program loads for a tile of W: words, and a scale (and zero point) for each of them."""
    form = spec.format
    assert form is not None
    words = rows * cols * (8 if form.of.packing == "halves" else form.of.bits) // 8
    if not form.group:
        return words
    codes = (8 if form.of.packing == "pairs" else 4) if form.spread == "block" else 1
    return words + rows * cols // codes * (4 if form.of.packing == "pairs" else 2 * dtype_bytes(form.scales))


def _programs(spec: KernelSpec, config: Config, ranks: int) -> int:
    return ceil_div(spec.d_out, config["block_m"]) * ceil_div(spec.rank, ranks)


def gram_work(spec: KernelSpec, config: Config) -> tuple[Work, ...]:
    """The launches that make G, and A rounded."""
    layers, adapter, split = max(spec.layers, 1), _adapter(spec), config["gram_split"]
    block, width = config["gram_block"], dtype_bytes(spec.adapter)
    tiles, square = ceil_div(spec.rank, block) ** 2, layers * spec.rank * spec.rank * 4
    rounded = layers * spec.rank * spec.d_in * 2 * spec.autocast
    written = square * (split if split > 1 else 1)
    products = Work(
        "gram_kernel",
        programs=layers * tiles * split,
        dram_bytes=layers * spec.rank * spec.d_in * width + rounded,
        l2_bytes=layers * tiles * 2 * block * spec.d_in * width + written + rounded,
        steps=ceil_div(spec.d_in, config["gram_block_k"] * split),
        matrix_flops=2 * layers * tiles * block * block * spec.d_in * (FP32_PASSES if adapter == "fp32" else 1),
        matrix_dtype=adapter,
    )
    if split == 1:
        return (products,)
    added = Work("gram_sum_kernel", programs=layers * tiles, dram_bytes=0, l2_bytes=written + square, steps=split)
    return (products, added)


def finish_work(spec: KernelSpec, config: Config, sums: int) -> Work:
    """The launch that adds the sums, makes the term of G and takes the roots."""
    layers, adapter, width = max(spec.layers, 1), _adapter(spec), dtype_bytes(spec.adapter)
    block_m, block_r = config["finish_rows"], config["finish_ranks"]
    blocks, rows = ceil_div(spec.rank, block_r), ceil_div(spec.d_out, block_m)
    pairs = blocks * (blocks + 1) // 2
    vectors = layers * spec.d_out * 12
    passes = 2 if adapter == "bf16" else FP32_PASSES if spec.wide == "fp32" else FP32_IN_16_BIT_PASSES
    return Work(
        "finish_kernel",
        programs=layers * rows,
        dram_bytes=layers * spec.d_out * spec.rank * width + sums + vectors,
        l2_bytes=layers * rows * pairs * (block_m * width + block_r * 4) * block_r + sums + vectors,
        steps=pairs + 1,
        matrix_flops=2 * layers * rows * block_m * pairs * block_r * block_r * passes,
        matrix_dtype="bf16" if adapter == "bf16" else spec.wide,
    )
