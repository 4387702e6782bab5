"""The variant of ``compose_backward_exact``: dg of the columns whose gain is too small to divide y by."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, dtype_bytes, fit, nearest, refuse_dot_tile, refuse_shared_memory, up_to


class BackwardExactTiles(Variant):
    """Each program reads ``block_n`` gains and ends if y can be divided by all of them; else it repeats the product.

    A program covers ``chunk`` tokens in steps of ``block_t`` and sums ``k_share`` values at a time on the tensor cores.
    Columns with tiny gains are rare, so few programs are best: large chunks, wide tiles.
    """

    op = "compose_backward_exact"
    name = "tiles"

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "chunk": up_to((16, 64, 256, 1024, 4096), spec.tokens),
            "block_t": up_to((16, 32, 64, 128), spec.tokens),
            "block_n": up_to((16, 32, 64, 128), spec.d_out),
            "block_k": (16, 32, 64),
            "k_share": (64, 128, 256, 512),
            "finish_n": up_to((64, 256, 512, 1024), spec.d_out),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        narrow = dtype_bytes(spec.activation) == 2 and spec.adapter == spec.activation
        return tuple(
            Config.create(
                self.name,
                chunk=fit(chunk, spec.tokens),
                block_t=fit(block_t, spec.tokens),
                block_n=fit(block_n, spec.d_out),
                block_k=block_k if narrow else min(block_k, 32),
                k_share=k_share,
                finish_n=fit(finish_n, spec.d_out, smallest=64),
                num_warps=4,
                num_stages=stages if narrow else 2,
            )
            for chunk, block_t, block_n, block_k, k_share, finish_n, stages in (
                (256, 32, 64, 32, 128, 256, 2),
                (4096, 128, 64, 64, 512, 256, 3),
                (1024, 128, 128, 16, 256, 64, 2),
                (1024, 64, 32, 16, 128, 256, 2),
                (1024, 16, 128, 64, 512, 256, 2),
                (256, 32, 32, 32, 128, 256, 2),
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        chunk = nearest(self.choices(spec, gpu)["chunk"], config["chunk"])
        return ({"chunk": chunk, "block_t": min(config["block_t"], chunk)},)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        if block_t > config["chunk"]:
            return f"block_t must be at most chunk={config['chunk']}, got {block_t}"
        if block_k > config["k_share"]:
            return f"block_k must be at most k_share={config['k_share']}, got {block_k}"
        stage = (block_t * dtype_bytes(spec.activation) + block_n * dtype_bytes(spec.adapter)) * block_k
        return refuse_dot_tile(block_t, block_n, block_k, config.num_warps) or refuse_shared_memory(
            2 * config.num_stages, stage, gpu
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        programs = ceil_div(spec.tokens, config["chunk"]) * ceil_div(spec.d_out, config["block_n"])
        return (
            Work(
                "column_sums_kernel",
                programs=programs,
                dram_bytes=spec.d_out * 4,
                l2_bytes=programs * config["block_n"] * 4,
                steps=1,
            ),
            Work(
                "choose_columns_kernel",
                programs=ceil_div(spec.d_out, config["finish_n"]),
                dram_bytes=spec.d_out * 12,
                l2_bytes=spec.d_out * 12,
                steps=1,
            ),
        )
