"""The variant of ``adapter_backward``: dB and dg (or dm) in one pass over the [d_out, rank] product."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, dtype_bytes, fit, tiles_for, up_to
from .compose import refuse_tile

MANY_RANKS = 128
"""Above this a program that takes a row's ranks at once is faster on an H100, by 7 to 40 % at rank 384."""


class AdapterBackwardRows(Variant):
    """Each program sums ``block_n`` rows in steps of ``block_r`` ranks."""

    op = "adapter_backward"
    name = "rows"

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_n": up_to((4, 8, 16, 32, 64), spec.d_out),
            "block_r": up_to((16, 32, 64, 128, 256, 512), spec.rank),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (1, 2, 3),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        shapes = ((16, 128, 4), (4, 512, 4), (8, 512, 8), (16, 512, 8), (32, 64, 8), (64, 16, 8))
        return tuple(
            Config.create(
                self.name,
                block_n=fit(block_n, spec.d_out, smallest=4),
                block_r=fit(block_r, spec.rank),
                num_warps=min(warps, fit(block_n, spec.d_out, smallest=4) * fit(block_r, spec.rank) // 32),
                num_stages=2,
            )
            for block_n, block_r, warps in (shapes if spec.rank <= MANY_RANKS else (*shapes[1:], shapes[0]))
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        return tiles_for(config, source, spec, gpu, choices, {"block_n": "d_out", "block_r": "rank"})

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return refuse_tile(config["block_n"], config["block_r"], config.num_warps)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        moved = spec.d_out * (spec.rank * (4 + dtype_bytes(spec.activation) + dtype_bytes(spec.adapter)) + 16)
        return (
            Work(
                "adapter_backward_kernel",
                programs=ceil_div(spec.d_out, config["block_n"]),
                dram_bytes=moved,
                l2_bytes=moved,
                steps=ceil_div(spec.rank, config["block_r"]),
            ),
        )
