"""The variant of ``dora_linear_forward`` that reads a W in a weight format, for few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from ..gpu import Gpu
from ..ops import OPERAND_BYTES
from ..spec import Config, KernelSpec
from ..weight_formats import TILE
from .base import (
    MIN_DOT,
    Variant,
    Work,
    ceil_div,
    dot_passes,
    dtype_bytes,
    fit,
    multiprocessors_of,
    power_of_two,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    up_to,
)
from .dora_linear import EXACT_BLOCK_K, FINISH_COLUMNS
from .packed_norm import MAX_ELEMENTS, instructions, packed_bytes

RANKS = 64
"""Ranks of one step of the rank-r product; of fp32 products :data:`~.dora_linear.EXACT_BLOCK_K`."""

MAX_FP32_ELEMENTS = 32
"""Elements of W's tile per thread at most where its values are fp32: each is split into parts."""

BLOCK_T = MIN_DOT
"""Tokens of a tile: all that a spec may ask for."""

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class DoraLinearPacked(Variant):
    """``split_k`` programs share each tile's sum over W, which they decode in registers; a second kernel composes.

    With ``split_k`` 1 there is no second kernel. A step takes ``block_k`` columns: one product for each of the 8 (or 4)
    codes of a word. With ``overlap`` 1 the second kernel starts while the first still runs.
    """

    op = "dora_linear_forward"
    name = "packed"
    packed = True
    counts = frozenset({"split_k"})
    switches = frozenset({"overlap"})
    constants: ClassVar[Mapping[str, object]] = {
        "block_t": BLOCK_T,
        "finish_n": FINISH_COLUMNS,
        "most_ranks": RANKS,
        "most_fp32_ranks": EXACT_BLOCK_K,
    }

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        pieces = _pieces(spec)
        return {
            "block_n": up_to((16, 32, 64, 128), spec.d_out),
            "block_k": up_to(tuple(pieces * words for words in _words(spec)), spec.d_in),
            "split_k": tuple(s for s in SPLITS if s == 1 or spec.d_in // s >= 16 * pieces),
            "overlap": (0, 1) if gpu.has_tma else (0,),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        pieces, choices = _pieces(spec), self.choices(spec, gpu)
        shapes: tuple[tuple[int, int, int, int, int], ...]
        if spec.wide == "fp32":  # the parts of fp32 operands take registers
            shapes = ((32, 16, 4, 4, 2), (16, 16, 4, 4, 2))
        else:
            shapes = (
                (64, 32, 4, 4, 3),
                (64, 16, 4, 4, 4),
                (32, 32, 4, 2, 3),
                (16, 32, 8, 1, 3),
                (128, 16, 2, 8, 3),
                (32, 16, 4, 2, 2),
            )
        shapes = (*shapes, (16, 16, 4, 2, 1))
        configs = []
        for block_n, words, rounds, warps, stages in shapes:
            block_n, block_k = fit(block_n, spec.d_out), fit(pieces * words, spec.d_in, smallest=pieces * MIN_DOT)
            tiles = ceil_div(spec.d_out, block_n)
            wanted = max(1, min(rounds * gpu.multiprocessors // tiles, spec.d_in // block_k))
            split_k = max(s for s in choices["split_k"] if s <= wanted and not _idles(spec, block_k, s))
            configs.append(
                Config.create(
                    self.name,
                    block_n=block_n,
                    block_k=block_k,
                    split_k=split_k,
                    overlap=int(gpu.has_tma and split_k > 1),
                    num_warps=warps,
                    num_stages=stages,
                )
            )
        return tuple(dict.fromkeys(configs))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        tiles = (ceil_div(source.d_out, config["block_n"]), ceil_div(spec.d_out, config["block_n"]))
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, self.choices(spec, gpu)["split_k"])
        return tuple({"split_k": split, "overlap": int(gpu.has_tma and split > 1)} for split in splits)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_n, block_k, split_k = config["block_n"], config["block_k"], config["split_k"]
        pieces, form = _pieces(spec), spec.format
        assert form is not None
        words = block_k // pieces
        if config["overlap"] and not gpu.has_tma:
            return f"{gpu.slug} ({gpu.architecture}) has no programmatic dependent launch: overlap must be 0"
        if config["overlap"] and split_k == 1:
            return "there is one kernel, which overlaps nothing: overlap must be 0 where split_k is 1"
        if words < MIN_DOT:
            return (
                f"block_k must be at least {pieces * MIN_DOT}, got {block_k}: a product takes {MIN_DOT} words of a row"
            )
        if spec.wide == "fp32" and words > EXACT_BLOCK_K:
            most = pieces * EXACT_BLOCK_K
            return f"block_k must be at most {most} in fp32, got {block_k}: longer products lose digits"
        if form.spread == "tile" and block_k > TILE:
            return f"block_k must be at most {TILE}, got {block_k}: {TILE} columns share a scale"
        each = block_n * block_k // (config.num_warps * gpu.warp_size)
        if each > (MAX_ELEMENTS if spec.wide != "fp32" else MAX_FP32_ELEMENTS):
            return f"{each} elements of W per thread ({block_n}x{block_k} on {config.num_warps} warps) do not fit"
        if _idles(spec, block_k, split_k):
            return f"split_k={split_k} leaves some shares without work"
        ranks = _ranks(spec)
        width = dtype_bytes(spec.activation)
        stage = packed_bytes(spec, block_n, block_k) + BLOCK_T * block_k * width
        lora = (block_n * dtype_bytes(spec.adapter) + BLOCK_T * width) * ranks
        # Beside the stages: x by pieces, and W where the compiler moves it after decoding.
        apart = (BLOCK_T + block_n) * block_k * width
        return (
            refuse_dot_tile(block_n, BLOCK_T, words, config.num_warps)
            or refuse_shared_memory(1, config.num_stages * stage + apart, gpu)
            or refuse_shared_memory(config.num_stages, lora, gpu)
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_n, block_k, split_k = config["block_n"], config["block_k"], config["split_k"]
        form, ranks = spec.format, _ranks(spec)
        assert form is not None
        width, adapter = dtype_bytes(spec.activation), dtype_bytes(spec.adapter)
        rows, columns = ceil_div(spec.d_out, block_n), ceil_div(spec.tokens, BLOCK_T)
        tiles = rows * columns
        stored = sum(each.elements * OPERAND_BYTES[each.dtype] for each in form.operands(spec.d_out, spec.d_in))
        of_tokens = (spec.d_in + spec.rank) * width
        read = stored + spec.d_out * spec.rank * adapter + spec.tokens * of_tokens
        tile = packed_bytes(spec, block_n, spec.d_in) + block_n * spec.rank * adapter + BLOCK_T * of_tokens
        partials = split_k * spec.tokens * spec.d_out * 4 if split_k > 1 else 0
        written = spec.tokens * spec.d_out * width * (2 if spec.save else 1)
        here, later = (written, 0) if split_k == 1 else (0, written)
        dtype, passes = dot_passes(spec.activation, spec.activation)
        _, lora_passes = dot_passes(spec.activation, spec.adapter)
        inner = spec.d_in * passes + ceil_div(spec.rank, ranks) * ranks * lora_passes
        product = Work(
            "product_kernel",
            programs=tiles * split_k,
            dram_bytes=read + here,
            l2_bytes=tiles * tile + partials + here,
            steps=ceil_div(spec.d_in, block_k * split_k) + ceil_div(spec.rank, ranks * split_k),
            matrix_flops=2 * tiles * block_n * BLOCK_T * inner,
            matrix_dtype=dtype,
            # Values of inner, unlike the squares of a norm, are not made on the way.
            vector_ops=tiles * block_n * spec.d_in * instructions(replace(spec, save=False)),
        )
        if split_k == 1:
            return (product,)
        programs = spec.tokens * ceil_div(spec.d_out, FINISH_COLUMNS)
        return product, Work("finish_kernel", programs, dram_bytes=later, l2_bytes=partials + later, steps=1)


def _pieces(spec: KernelSpec) -> int:
    """The codes of a 32-bit word; 1 where rows do not begin at a word, so that each element is loaded alone."""
    form = spec.format
    codes = 8 if form is not None and form.of.packing == "pairs" else 4
    return codes if spec.d_in % codes == 0 else 1


def _idles(spec: KernelSpec, block_k: int, split_k: int) -> bool:
    """Whether the last of ``split_k`` shares has no columns."""
    return (split_k - 1) * ceil_div(spec.d_in, block_k * split_k) * block_k >= spec.d_in


def _words(spec: KernelSpec) -> tuple[int, ...]:
    """The words (or elements) of a row that one product may take."""
    return (16, 32) if spec.wide == "fp32" else (16, 32, 64)


def _ranks(spec: KernelSpec) -> int:
    """The ranks of one step, as the template has them."""
    return min(RANKS if spec.wide != "fp32" else EXACT_BLOCK_K, max(MIN_DOT, power_of_two(spec.rank)))
