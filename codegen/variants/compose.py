"""Elementwise passes over [tokens, d_out], and the variants of ``compose_forward`` and ``compose_backward``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Variant, Work, ceil_div, dtype_bytes, fit, tiles_for, up_to

MAX_ELEMENTS = 64
"""Elements of a tile per thread for each operand; more leaves no registers for loads in flight."""

FEW_TOKENS, SOME_TOKENS = 128, 2048
"""Up to so many tokens the backward pass begins with chunks of 4 and of 16 rows: longer ones do not fill the GPU. By an
H100's recorded table, taken for every GPU."""

REDUCE_WARPS = 4
"""Warps of the kernel that adds the chunks."""


def refuse_tile(rows: int, cols: int, warps: int, most: int = MAX_ELEMENTS) -> str | None:
    """Why an elementwise [rows, cols] tile on ``warps`` warps cannot work, or None; ``most`` elements a thread can."""
    per_thread = rows * cols // (warps * 32)
    if per_thread > most:
        return f"{per_thread} elements per thread ({rows}x{cols} on {warps} warps) do not fit the registers"
    if per_thread < 1:
        return f"a {rows}x{cols} tile leaves threads of {warps} warps idle"
    return None


class ElementwiseTile(Variant):
    """One [block_t, block_n] tile per program."""

    name = "tile"
    passes: ClassVar[int] = 3
    """Matrices [tokens, d_out] that are read and written."""

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((1, 2, 4, 8, 16, 32), spec.tokens),
            "block_n": up_to((64, 128, 256, 512, 1024, 2048, 4096), spec.d_out),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (2,),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens, smallest=1),
                block_n=fit(block_n, spec.d_out, smallest=64),
                num_warps=warps,
                num_stages=2,
            )
            for block_t, block_n, warps in self.shapes(spec)
        )

    def shapes(self, spec: KernelSpec) -> tuple[tuple[int, int, int], ...]:
        """block_t, block_n and num_warps of the seeds."""
        return ((4, 1024, 4), (2, 512, 8), (16, 128, 2), (32, 64, 8), (4, 256, 8))

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        return tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return refuse_tile(config["block_t"], config["block_n"], config.num_warps)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        moved = spec.tokens * spec.d_out * dtype_bytes(spec.activation) * (self.passes + spec.save)
        return (
            Work(
                f"{self.op}_kernel",
                programs=ceil_div(spec.tokens, config["block_t"]) * ceil_div(spec.d_out, config["block_n"]),
                dram_bytes=moved,
                l2_bytes=moved,
                steps=1,
            ),
        )


class ForwardTile(ElementwiseTile):
    """The composition from base and lora."""

    op = "compose_forward"


class ElementwiseColumns(Variant):
    """Each program sums ``chunk`` rows of a column tile; a second kernel adds the chunks."""

    name = "columns"
    passes: ClassVar[int] = 3
    """Matrices [tokens, d_out] that are read and written."""
    projections: ClassVar[int] = 1
    """Projections that have sums of their own."""
    most_elements: ClassVar[int] = MAX_ELEMENTS
    constants: ClassVar[Mapping[str, object]] = {"reduce_warps": REDUCE_WARPS}

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "chunk": up_to((1, 4, 16, 32, 64, 128, 256), spec.tokens),
            "block_t": up_to((1, 2, 4, 8, 16), spec.tokens),
            "block_n": up_to((64, 128, 256, 512, 1024, 2048), spec.d_out),
            "reduce_c": (8, 16, 32, 64),
            "reduce_n": up_to((32, 64, 128), spec.d_out),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (1, 2, 3, 4),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                chunk=fit(chunk, spec.tokens, smallest=1),
                block_t=fit(block_t, spec.tokens, smallest=1),
                block_n=fit(block_n, spec.d_out, smallest=64),
                reduce_c=reduce_c,
                reduce_n=fit(reduce_n, spec.d_out, smallest=32),
                num_warps=warps,
                num_stages=stages,
            )
            for chunk, block_t, block_n, reduce_c, reduce_n, warps, stages in dict.fromkeys(self.shapes(spec))
        )

    def shapes(self, spec: KernelSpec) -> tuple[tuple[int, int, int, int, int, int, int], ...]:
        """chunk, block_t, block_n, reduce_c, reduce_n, num_warps and num_stages of the seeds."""
        few, some, many = (4, 4, 128, 8, 32, 1, 3), (16, 16, 128, 64, 32, 1, 4), (64, 16, 64, 16, 32, 1, 4)
        first = few if spec.tokens <= FEW_TOKENS else some if spec.tokens <= SOME_TOKENS else many
        return (
            first,
            *(few, some, many, (64, 16, 128, 64, 32, 1, 1), (64, 16, 128, 8, 32, 2, 3), (64, 4, 512, 32, 64, 4, 2)),
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        found = tiles_for(config, source, spec, gpu, choices, {"chunk": "tokens", "block_n": "d_out"})
        return tuple({**values, "block_t": min(config["block_t"], values["chunk"])} for values in found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        if config["block_t"] > config["chunk"]:
            return f"block_t must be at most chunk={config['chunk']}, got {config['block_t']}"
        return refuse_tile(config["block_t"], config["block_n"], config.num_warps, self.most_elements) or refuse_tile(
            config["reduce_c"], config["reduce_n"], REDUCE_WARPS
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        chunks, tiles_n = ceil_div(spec.tokens, config["chunk"]), ceil_div(spec.d_out, config["block_n"])
        moved = spec.tokens * spec.d_out * dtype_bytes(spec.activation) * self.passes
        sums = chunks * spec.d_out * 4 * (2 if spec.bias else 1) * self.projections
        return (
            Work(
                f"{self.op}_kernel",
                programs=chunks * tiles_n,
                dram_bytes=moved + sums,
                l2_bytes=moved + sums,
                steps=ceil_div(min(config["chunk"], spec.tokens), config["block_t"]),
            ),
            Work(
                "add_chunks_kernel",
                programs=ceil_div(spec.d_out, config["reduce_n"]),
                dram_bytes=spec.d_out * 4 * self.projections,
                l2_bytes=sums,
                steps=ceil_div(chunks, config["reduce_c"]),
            ),
        )


class BackwardColumns(ElementwiseColumns):
    """dYg and the sums of one projection."""

    op = "compose_backward"
