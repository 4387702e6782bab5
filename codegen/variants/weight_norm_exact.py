"""The variant of ``weight_norm_exact``: rows of W + sBA summed directly where cancellation made w inaccurate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, covering, dtype_bytes, fit, up_to

RANKS = 8
"""Ranks that one step of an exact row adds."""

REPEATED_COLS, APART_COLS = 256, 1024
"""Columns of A that a program squares at a time: where every program squares A, and in a launch of its own."""

MAX_ELEMENTS = 64
"""Elements of a tile per thread at most."""

MOST_REPEATED_BYTES = 1 << 17
"""Bytes of A up to which, by default, every program squares A's rows: a multiprocessor reads them from the L2 in about
the time of the launch that this saves (64 bytes per clock)."""


class WeightNormExactRows(Variant):
    """Each program compares ``block_m`` norms with the size of their terms and recomputes rows that nearly cancel.

    The size needs B, ``block_r`` ranks at a time, and rowsum(A*A): a launch of its own with ``apart`` 1, else computed
    by every program. Rows are recomputed in fp64, ``block_k`` columns at a time, one after another: they are very rare.
    """

    op = "weight_norm_exact"
    name = "rows"
    switches = frozenset({"apart"})
    constants: ClassVar[Mapping[str, object]] = {
        "ranks": RANKS,
        "repeated_cols": REPEATED_COLS,
        "apart_cols": APART_COLS,
    }

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "apart": (0, 1),
            "block_m": up_to((16, 32, 64, 128), spec.d_out),
            "block_r": up_to((16, 32, 64, 128), spec.rank),
            "block_k": up_to((128, 256, 512), spec.d_in),
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        small = spec.rank * spec.d_in * dtype_bytes(spec.adapter) <= MOST_REPEATED_BYTES
        return tuple(
            Config.create(
                self.name,
                apart=apart,
                block_m=fit(block_m, spec.d_out),
                block_r=fit(block_r, spec.rank),
                block_k=fit(block_k, spec.d_in, smallest=128),
                num_warps=warps,
                num_stages=stages,
            )
            for apart, block_m, block_r, block_k, warps, stages in (
                (int(not small), 32, 32 if small else 128, 256, 4, 2),
                (1, 16, 32, 512, 4, 2),
                (1, 16, 64, 512, 8, 2),
                (1, 16, 128, 128, 2, 2),
                (1, 32, 64, 256, 2, 3),
                (0, 128, 16, 512, 8, 2),
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        block_r = covering(choices["block_r"], config["block_r"], source.rank, spec.rank)
        return tuple({"apart": apart, "block_r": block_r} for apart in (config["apart"], 1 - config["apart"]))

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        threads = config.num_warps * gpu.warp_size
        tiles = [(config["block_m"], config["block_r"]), (2 * RANKS, config["block_k"])]  # fp64: two registers each
        if not config["apart"]:
            tiles.append((config["block_r"], REPEATED_COLS))
        for rows, cols in tiles:
            if rows * cols > MAX_ELEMENTS * threads:
                return f"{rows * cols // threads} elements per thread ({rows}x{cols} on {config.num_warps} warps)"
        return None

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        width = dtype_bytes(spec.adapter)
        adapter, programs = spec.rank * spec.d_in * width, ceil_div(spec.d_out, config["block_m"])
        vectors = spec.d_out * (spec.rank * width + 4 * (5 if spec.magnitude else 3))
        squares = Work(
            "adapter_squares_kernel",
            programs=spec.rank,
            dram_bytes=adapter,
            l2_bytes=adapter,
            steps=ceil_div(spec.d_in, APART_COLS),
        )
        steps = ceil_div(spec.rank, config["block_r"])
        rows = Work(
            "exact_rows_kernel",
            programs=programs,
            dram_bytes=vectors + (0 if config["apart"] else adapter),
            l2_bytes=vectors + (0 if config["apart"] else programs * adapter),
            steps=steps if config["apart"] else steps * ceil_div(spec.d_in, REPEATED_COLS),
        )
        return (squares, rows) if config["apart"] else (rows,)
