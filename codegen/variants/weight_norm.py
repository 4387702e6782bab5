"""The variants of ``weight_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    ADAPTER_CONSTANTS,
    FP32_PASSES,
    MAX_TMA_BOX,
    Variant,
    Work,
    adapter_parts,
    adapter_parts_work,
    ceil_div,
    dot_passes,
    dtype_bytes,
    fit,
    multiprocessors_of,
    nearest,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    tma_unavailable,
    up_to,
)

FP32_IN_16_BIT_PASSES = 18
"""16-bit products that take as long as one of fp32 operands: three at half the rate, after splitting the operands
(in fp16 at rank 384 the ``fused`` variant took 2.7 times as long as bf16's best on one H200: 86.0 and 31.5 us at
4096x4096, measured at commit 22cca23)."""

GRAM_WARPS = 4
"""Warps of the kernel that makes the shares of G = A @ A.T."""

FUSED_GRAM_STAGES, TMA_GRAM_STAGES = 3, 4
"""Pipeline stages of that kernel, with pointer loads and with tensor descriptors."""

SUM_BLOCK = 512
"""Elements of G that a program of the kernel that adds the shares writes."""

SQUARE_COLS = 512
"""Columns of W that a program squares at a time."""

ADD_ROWS, SQUARE_ROWS = 128, 8
"""Rows per program of the finishing kernel, where it only adds partial sums and where it also squares W."""


class WeightNormFused(Variant):
    """G = A @ A.T in shares, one product over [W | B] with row dots as its epilogue, a sum over the partial row dots.

    ``split_k`` divides the inner sum among programs: the row dots are linear in it, so a share costs one more row of
    fp32 partial sums and no atomics.
    """

    op = "weight_norm"
    name = "fused"
    constants: ClassVar[Mapping[str, object]] = {
        "gram_warps": GRAM_WARPS,
        "gram_stages": FUSED_GRAM_STAGES,
        "sum_block": SUM_BLOCK,
        "square_cols": SQUARE_COLS,
        "square_rows": SQUARE_ROWS,
        "add_rows": ADD_ROWS,
    }

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_m": up_to((32, 64, 128, 256), spec.d_out),
            "block_n": up_to((16, 32, 64, 128, 256), spec.rank),
            "block_k": up_to((32, 64, 128), spec.d_in),
            "split_k": tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or spec.d_in // s >= 256),
            "gram_block": up_to((16, 32, 64, 128), spec.rank),
            "gram_block_k": up_to((32, 64, 128), spec.d_in),
            "gram_share": up_to((128, 256, 512, 1024, 2048), spec.d_in),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        block_n = fit(128, spec.rank)
        narrow = dtype_bytes(spec.weight) == 2 and spec.adapter == spec.weight
        exact = spec.adapter == "fp32"  # several products for one: the operands' split parts take registers
        gram = {
            "gram_block": fit(32 if exact else 64, spec.rank),
            "gram_block_k": 32 if exact else 64,
            "gram_share": 512,
        }
        # Before Hopper the operands of a product pass through registers, which a deep tile fills.
        deepest = 64 if narrow and gpu.has_tma else 32
        configs = []
        for block_m, split_rounds, block_k, warps, stages in (
            (128, 2, 64, 8, 4),
            (128, 1, 64, 8, 3),
            (64, 2, 64, 4, 4),
            (128, 2, 128, 8, 3),
            (64, 2, 32, 4, 3),
            (32, 2, 32, 4, 2),
        )[: 2 if spec.weight == "bf16" and gpu.has_tma else None]:  # the variants with tensor descriptors are faster
            tiles = ceil_div(spec.d_out, block_m) * ceil_div(spec.rank, block_n)
            wanted = max(1, split_rounds * gpu.multiprocessors // tiles)
            split_k = 1
            while split_k * 2 <= min(wanted, 16) and spec.d_in // (split_k * 2) >= 256:
                split_k *= 2
            configs.append(
                Config.create(
                    self.name,
                    block_m=block_m,
                    block_n=block_n,
                    block_k=min(block_k, deepest),
                    split_k=split_k,
                    num_warps=warps,
                    num_stages=stages if narrow else 2,
                    **gram,
                )
            )
        return tuple(configs)

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        found: list[Mapping[str, int]] = []
        for ranks in self._rank_blocks(config, source, spec, gpu):
            block_n = ranks["block_n"] * ranks.get("rank_tiles", 1)
            before = config["block_n"] * dict(config.params).get("rank_tiles", 1)
            tiles = (
                ceil_div(source.d_out, config["block_m"]) * ceil_div(source.rank, before),
                ceil_div(spec.d_out, config["block_m"]) * ceil_div(spec.rank, block_n),
            )
            inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
            splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
            found += [{**ranks, "split_k": split} for split in splits]
        return tuple(found)

    def _rank_blocks(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        """How the ranks can be divided: as before, and in one block where one covered them before."""
        choices = self.choices(spec, gpu)["block_n"]
        found = [nearest(choices, config["block_n"])]
        if config["block_n"] >= source.rank:
            found.append(choices[-1])
        return tuple({"block_n": block_n} for block_n in dict.fromkeys(found))

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
        gram, gram_k = config["gram_block"], config["gram_block_k"]
        width, adapter = dtype_bytes(spec.weight), dtype_bytes(spec.adapter)
        return (
            refuse_dot_tile(block_m, block_n, block_k, config.num_warps)
            or refuse_shared_memory(config.num_stages, (block_m * width + block_n * adapter) * block_k, gpu)
            or (
                f"gram_share must be at least gram_block_k={gram_k}, got {config['gram_share']}"
                if config["gram_share"] < gram_k
                else None
            )
            or refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS)
            or refuse_shared_memory(FUSED_GRAM_STAGES, 2 * gram * gram_k * adapter, gpu)
            or (
                f"split_k={config['split_k']} leaves some shares without work"
                if config["split_k"] * block_k > max(spec.d_in, block_k)
                else None
            )
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        adapter = spec.weight if spec.autocast else spec.adapter
        dtype, passes = dot_passes(spec.weight, adapter)
        gram_passes = 2
        if adapter != "bf16":  # B meets G in fp32
            gram_passes = FP32_PASSES if dtype == "fp32" else FP32_IN_16_BIT_PASSES
        return self._work(spec, config, config["block_n"], adapter, dtype, (passes, gram_passes))

    def _work(
        self,
        spec: KernelSpec,
        config: Config,
        block_n: int,
        gram_dtype: str,
        dtype: str,
        passes: tuple[int, int],
        parts: int = 0,
    ) -> tuple[Work, ...]:
        """The launches, where a program covers ``block_n`` ranks and makes ``passes`` (products of W, products of G).

        ``parts`` is the number of parts of each adapter in W's dtype, 0 where kernels load the adapters as they are.
        """
        block_m, block_k = config["block_m"], config["block_k"]
        split_k, gram = config["split_k"], config["gram_block"]
        width = dtype_bytes(spec.weight)
        adapter = parts * width or dtype_bytes(spec.adapter)
        reads = max(parts, 1)
        rows, ranks = ceil_div(spec.d_out, block_m), ceil_div(spec.rank, block_n)
        gram_tiles = ceil_div(spec.rank, gram) ** 2
        padded = 2 * rows * block_m * ranks * block_n
        partials = ranks * split_k * spec.d_out * 4
        tile_bytes = rows * ranks * (block_m * width * reads + block_n * adapter) * spec.d_in
        weight_bytes = spec.d_out * spec.d_in * width
        shares = ceil_div(spec.d_in, config["gram_share"])
        share_bytes = shares * spec.rank * spec.rank * 4
        return (
            Work(
                "gram_shares_kernel",
                programs=gram_tiles * shares,
                dram_bytes=spec.rank * spec.d_in * adapter,
                l2_bytes=gram_tiles * 2 * gram * spec.d_in * adapter + share_bytes,
                steps=ceil_div(config["gram_share"], config["gram_block_k"]) * (2 * reads - 1),
                matrix_flops=2 * gram_tiles * gram * gram * spec.d_in * (2 * reads - 1),
                matrix_dtype=gram_dtype,
            ),
            Work(
                "half_gram_kernel",
                programs=ceil_div(spec.rank * spec.rank, SUM_BLOCK),
                dram_bytes=0,
                l2_bytes=share_bytes + spec.rank * spec.rank * 4,
                steps=shares,
            ),
            Work(
                "row_dots_kernel",
                programs=rows * ranks * split_k,
                dram_bytes=weight_bytes + (spec.rank * spec.d_in + spec.d_out * spec.rank) * adapter + partials,
                l2_bytes=tile_bytes + rows * ranks * (block_m * adapter + block_n * 4) * spec.rank + partials,
                steps=ceil_div(spec.d_in, block_k * split_k) * reads + ceil_div(spec.rank, block_k * split_k),
                matrix_flops=padded * (spec.d_in * passes[0] + spec.rank * passes[1]),
                matrix_dtype=dtype,
            ),
            Work(
                "finish_kernel",
                programs=ceil_div(spec.d_out, SQUARE_ROWS if spec.save else ADD_ROWS),
                dram_bytes=weight_bytes * spec.save + 2 * spec.d_out * 4,
                l2_bytes=partials + weight_bytes * spec.save + 2 * spec.d_out * 4,
                steps=ranks * split_k + (ceil_div(spec.d_in, SQUARE_COLS) if spec.save else 0),
            ),
        )


class WeightNormTma(WeightNormFused):
    """The same sums with tensor descriptors, and several rank tiles per program, so that W is read once.

    ``rank_tiles`` tiles of ``block_n`` ranks share every tile of W: at rank 384, three tiles of 128. G is stored as a
    high and a low bf16 part, with a relative error below 2**-17. With ``overlap`` 1 a kernel starts while the one
    before still runs (programmatic dependent launch), so that the product with W hides the time for G. A kernel before
    rounds fp32 adapters (autocast) or splits them in two; each tile of W is then multiplied by both parts of A.
    """

    name = "tma"
    descriptors = True
    counts = frozenset({"rank_tiles", "split_k"})
    switches = frozenset({"overlap"})
    constants: ClassVar[Mapping[str, object]] = {
        **WeightNormFused.constants,
        **ADAPTER_CONSTANTS,
        "gram_stages": TMA_GRAM_STAGES,
    }

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        if spec.weight != "bf16":
            return f"the variant is for bf16 weights only: half_gram in {spec.weight} would overflow or lose digits"
        return tma_unavailable(gpu, (spec.weight,), (spec.d_in, spec.rank))

    def default_order(self, spec: KernelSpec) -> int:
        return 0

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_m": up_to((64, 128, 256), spec.d_out),
            "block_n": up_to((16, 32, 64, 128, 256), spec.rank),
            "rank_tiles": tuple(t for t in (1, 2, 3, 4) if t == 1 or (t - 1) * 64 < spec.rank),
            "block_k": up_to((32, 64, 128), spec.d_in),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8, 16) if s == 1 or spec.d_in // s >= 256),
            "gram_block": up_to((16, 32, 64, 128), spec.rank),
            "gram_block_k": up_to((32, 64, 128), spec.d_in),
            "gram_share": up_to((128, 256, 512, 1024, 2048), spec.d_in),
            "overlap": (0, 1),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5, 6),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        block_n = fit(128, spec.rank)
        tiles_n = ceil_div(spec.rank, block_n)
        most = 3 if adapter_parts(spec) == 1 else 2  # fp32 rows of B take registers beside the sums
        configs = []
        for block_m, rank_tiles, block_k, rounds, warps, stages in (
            (128, min(most, tiles_n), 64, 1, 8, 3),
            (128, 1, 64, 3, 8, 3),
            (128, min(2, tiles_n), 64, 2, 8, 4),
            (64, min(most, tiles_n), 64, 1, 4, 3),
        ):
            tiles = ceil_div(spec.d_out, block_m) * ceil_div(tiles_n, rank_tiles)
            split_k = max(1, min(rounds * gpu.multiprocessors // tiles, 16, spec.d_in // 256))
            split_k = max(s for s in (1, 2, 3, 4, 6, 8, 16) if s <= split_k)
            configs.append(
                Config.create(
                    self.name,
                    block_m=block_m,
                    block_n=block_n,
                    rank_tiles=rank_tiles,
                    block_k=block_k,
                    split_k=split_k,
                    gram_block=fit(64, spec.rank),
                    gram_block_k=64,
                    gram_share=512,
                    overlap=1,
                    num_warps=warps,
                    num_stages=stages,
                )
            )
        return tuple(configs)

    def _rank_blocks(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        found: list[Mapping[str, int]] = []
        for block_n in dict.fromkeys((nearest(choices["block_n"], config["block_n"]), fit(128, spec.rank))):
            most = ceil_div(spec.rank, block_n)
            ranks = config["block_n"] * config["rank_tiles"]
            wanted = most if ranks >= source.rank else max(1, round(ranks / block_n))
            found.append({"block_n": block_n, "rank_tiles": min(wanted, most, max(choices["rank_tiles"]))})
        return tuple(found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
        rank_tiles, gram, gram_k = config["rank_tiles"], config["gram_block"], config["gram_block_k"]
        if max(block_m, block_n, block_k, gram, gram_k) > MAX_TMA_BOX:
            return f"a tile side must be at most {MAX_TMA_BOX} for the tensor memory accelerator"
        if (rank_tiles - 1) * block_n >= spec.rank:
            return f"rank {spec.rank} needs fewer than rank_tiles={rank_tiles} tiles of {block_n}"
        return (
            refuse_dot_tile(block_m, block_n * rank_tiles, block_k, config.num_warps)
            or refuse_shared_memory(config.num_stages, (block_m + block_n * rank_tiles) * block_k * 2, gpu)
            or (
                f"gram_share must be at least gram_block_k={gram_k}, got {config['gram_share']}"
                if config["gram_share"] < gram_k
                else None
            )
            or refuse_dot_tile(gram, gram, gram_k, GRAM_WARPS)
            or refuse_shared_memory(TMA_GRAM_STAGES, 2 * gram * gram_k * 2, gpu)
            or (
                f"split_k={config['split_k']} leaves some shares without work"
                if config["split_k"] * block_k > max(spec.d_in, block_k)
                else None
            )
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        parts = adapter_parts(spec)
        ranks = config["block_n"] * config["rank_tiles"]
        main = self._work(spec, config, ranks, spec.weight, spec.weight, (parts, parts + 1), parts)
        return adapter_parts_work(spec, (spec.rank, spec.d_in), (spec.d_out, spec.rank)) + main
