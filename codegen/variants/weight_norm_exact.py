"""The variant of ``weight_norm_exact``: rows of W + sBA summed directly where the norm has lost its digits."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, dtype_bytes, fit, up_to

RANKS = 8
"""Ranks that a step of an exact row adds up at a time; the template says the same."""

SQUARE_COLS = 256
"""Columns of A that a program squares at a time where it does so itself; the template says the same."""

APART_COLS = 1024
"""The same in the launch of its own."""

MAX_ELEMENTS = 64
"""Elements of a tile that a thread may hold."""

MOST_REPEATED_BYTES = 1 << 17
"""Bytes of A up to which, by default, every program squares A's rows itself: a multiprocessor reads them from the L2 in
about the time of the launch that this saves (64 bytes a clock)."""


class WeightNormExactRows(Variant):
    """Programs look at ``block_m`` norms and their terms' size, and redo the rows where the terms nearly cancel.

    For the size they need B, ``block_r`` ranks at a time, and rowsum(A*A), which with ``apart`` is a launch of its own
    and otherwise made by every program. A row is redone in fp64, ``block_k`` columns at a time, one row after another:
    there are almost never any.
    """

    op = "weight_norm_exact"
    name = "rows"
    switches = frozenset({"apart"})

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
                block_r=fit(128 if apart else 32, spec.rank),
                block_k=fit(256, spec.d_in, smallest=128),
                num_warps=4,
                num_stages=2,
            )
            for apart, block_m in ((int(not small), 32), (1, 32), (1, 64), (0, 64))
        )

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        threads = config.num_warps * gpu.warp_size
        tiles = [(config["block_m"], config["block_r"]), (2 * RANKS, config["block_k"])]  # of fp64: two registers each
        if not config["apart"]:
            tiles.append((config["block_r"], SQUARE_COLS))
        for rows, cols in tiles:
            if rows * cols > MAX_ELEMENTS * threads:
                return f"{rows * cols // threads} elements a thread ({rows}x{cols} on {config.num_warps} warps)"
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
            steps=steps if config["apart"] else steps * ceil_div(spec.d_in, SQUARE_COLS),
        )
        return (squares, rows) if config["apart"] else (rows,)
