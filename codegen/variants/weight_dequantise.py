"""The variant of ``weight_dequantise``: W in a weight format, decoded and written."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..ops import OPERAND_BYTES
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, dtype_bytes, fit, tiles_for, up_to
from .compose import refuse_tile
from .packed_norm import instructions


class WeightDequantiseTile(Variant):
    """One [block_m, block_k] tile of W per program: its words are read once, decoded in registers and written."""

    op = "weight_dequantise"
    name = "tile"
    packed = True

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_m": up_to((1, 2, 4, 8, 16, 32), spec.d_out),
            "block_k": up_to((64, 128, 256, 512, 1024, 2048, 4096), spec.d_in),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (2,),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_m=fit(block_m, spec.d_out, smallest=1),
                block_k=fit(block_k, spec.d_in, smallest=64),
                num_warps=warps,
                num_stages=2,
            )
            for block_m, block_k, warps in (
                (4, 1024, 4),
                (1, 2048, 4),
                (8, 256, 4),
                (2, 1024, 4),
                (16, 128, 4),
                (1, 512, 1),
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        return tiles_for(config, source, spec, gpu, self.choices(spec, gpu), {"block_m": "d_out", "block_k": "d_in"})

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return refuse_tile(config["block_m"], config["block_k"], config.num_warps)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        form = spec.format
        assert form is not None
        elements = spec.d_out * spec.d_in
        stored = sum(each.elements * OPERAND_BYTES[each.dtype] for each in form.operands(spec.d_out, spec.d_in))
        moved = stored + elements * dtype_bytes(spec.activation)
        halves = 2 if form.of.packing == "halves" and spec.d_in % 4 == 0 and spec.d_out % 2 == 0 else 1
        tiles = ceil_div(spec.d_out // halves, config["block_m"]) * ceil_div(spec.d_in, config["block_k"])
        return (
            Work(
                "dequantise_kernel",
                programs=tiles,
                dram_bytes=moved,
                l2_bytes=moved,
                steps=1,
                vector_ops=elements * instructions(spec),
            ),
        )
