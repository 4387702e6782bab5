"""What the variants share that compose in the epilogue of rank-r products, a chunk of rows per program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    Variant,
    Work,
    ceil_div,
    covering,
    dot_passes,
    dtype_bytes,
    fit,
    nearest,
    refuse_dot_tile,
    refuse_shared_memory,
    tiles_for,
    up_to,
)
from .compose import REDUCE_WARPS, refuse_tile

FEW_TOKENS = 128
"""Up to this many tokens, reading B takes most of the time, and narrow tiles spread it over the GPU."""

LOW_RANK = 64
"""Up to this rank the passes over [tokens, d_out] take most of the time: B stays in registers, rows stream by."""

MIDDLE_RANK = 192
"""Up to this rank B, of a gated pair of both projections, leaves room for rows that stream by."""


class ChunkedTile(Variant):
    """A program composes ``chunk`` rows of ``block_n`` columns, ``block_t`` at a time.

    If ``block_k`` covers the rank, or B is ``resident``, it loads its rows of B once, and loads of later rows overlap
    with the work on earlier ones (``num_stages``). Otherwise the products run over the rank in steps of ``block_k``.
    """

    name = "tile"
    switches = frozenset({"resident"})
    passes: ClassVar[int]
    """Passes over [tokens, width]: matrices read and written."""
    products: ClassVar[int] = 1
    """Products of rank r for an element: two where gate and up are composed together."""

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((16, 32, 64, 128), spec.tokens),
            "block_n": up_to((16, 32, 64, 128, 256), max(spec.widths)),
            "block_k": up_to((16, 32, 64, 128), spec.rank),
            "chunk": up_to((16, 32, 64, 128, 256, 512), spec.tokens),
            "resident": (0, 1) if narrow(spec) and spec.rank > 16 else (0,),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        if spec.tokens <= FEW_TOKENS:
            shapes = (
                (16, 32, 64, 4, 3),
                (16, 64, 64, 8, 2),
                (32, 32, 64, 4, 3),
                (64, 32, 64, 4, 3),
                (32, 32, 32, 2, 2),
            )
            return tuple(self._config(spec, *shape) for shape in shapes)
        if not narrow(spec):  # the split parts of fp32 operands take registers
            split = ((64, 64, 32, 8, 2), (64, 32, 32, 4, 2), (32, 32, 32, 4, 2))
            return tuple(self._config(spec, *shape) for shape in split)
        if spec.rank <= LOW_RANK:
            return self.low_rank_seeds(spec)
        return tuple(self._config(spec, *shape) for shape in self.high_rank_shapes(spec, gpu))

    def low_rank_seeds(self, spec: KernelSpec) -> tuple[Config, ...]:
        """The seeds for ranks to :data:`LOW_RANK`."""
        long = (
            self._config(spec, 16, 64, 64, 4, 4, chunk=64),
            self._config(spec, 16, 128, 64, 4, 4, chunk=256),
            self._config(spec, 32, 64, 64, 8, 3, chunk=512),
        )
        short = (self._config(spec, 32, 64, 64, 4, 2), self._config(spec, 32, 32, 32, 4, 2))
        return (long[1], long[0], long[2], *short) if spec.rank > 32 else (*long, *short)

    def high_rank_shapes(self, spec: KernelSpec, gpu: Gpu) -> tuple[tuple[int, int, int, int, int], ...]:
        """block_t, block_n, block_k, num_warps and num_stages of the seeds for ranks above :data:`LOW_RANK`."""
        return ((64, 128, 64, 8, 4), (64, 128, 64, 8, 3), (64, 64, 64, 8, 3), (64, 64, 32, 8, 2))

    def _config(
        self, spec: KernelSpec, t: int, n: int, k: int, warps: int, stages: int, chunk: int = 0, resident: int = 0
    ) -> Config:
        """A config whose programs compose ``chunk`` rows, or one tile's."""
        block_t = fit(t, spec.tokens)
        return Config.create(
            self.name,
            block_t=block_t,
            block_n=fit(n, max(spec.widths)),
            block_k=fit(k if narrow(spec) or spec.autocast else min(k, 32), spec.rank),
            chunk=fit(chunk, spec.tokens) if chunk else block_t,
            resident=resident,
            num_warps=warps,
            num_stages=stages if narrow(spec) else 2,
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        chunk = nearest(choices["chunk"], config["chunk"])
        block_k = covering(choices["block_k"], config["block_k"], source.rank, spec.rank)
        found = tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})
        resident = int(config["resident"] and narrow(spec) and block_k < spec.rank)
        bound = {"block_k": block_k, "resident": resident}
        return tuple({**values, **bound, "chunk": max(chunk, values["block_t"])} for values in found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        if config["block_t"] > config["chunk"]:
            return f"block_t must be at most chunk={config['chunk']}, got {config['block_t']}"
        if not config["resident"]:
            return refuse_products(spec, config, gpu, dtype_bytes(spec.adapter), self.products)
        block_k = config["block_k"]
        if spec.rank <= block_k or not narrow(spec):
            return (
                f"resident must be 0 unless all factors have one 16-bit dtype and block_k={block_k} is below the rank"
            )
        ranks = self.products * ceil_div(spec.rank, block_k) * block_k
        moving = ranks * config["block_t"] + (self.passes - 1) * config["block_t"] * config["block_n"]
        needed = 2 * (ranks * config["block_n"] + max(config.num_stages - 1, 1) * moving)
        return refuse_dot_tile(
            self.products * config["block_t"], config["block_n"], block_k, config.num_warps
        ) or refuse_shared_memory(1, needed, gpu)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        chunks = ceil_div(spec.tokens, config["chunk"])
        tiles_t = ceil_div(spec.tokens, config["block_t"])
        columns = sum(ceil_div(width, config["block_n"]) for width in spec.widths) * config["block_n"]
        dtype, passes = dot_passes(spec.activation, spec.activation if spec.autocast else spec.adapter)
        width, adapter = dtype_bytes(spec.activation), dtype_bytes(spec.adapter)
        streamed = spec.tokens * sum(spec.widths) * width * self.passes + self.sums(spec, config)
        loaded = tiles_t if spec.rank > config["block_k"] and not config["resident"] else chunks  # rows of B
        factors = self.products * spec.rank * columns * (spec.tokens * width // config["block_n"] + loaded * adapter)
        k_steps = ceil_div(spec.rank, config["block_k"])
        multiplied = self.products * tiles_t * config["block_t"] * columns * k_steps * config["block_k"]
        once = self.products * spec.rank * (spec.tokens * width * spec.members + sum(spec.widths) * adapter)
        return (
            Work(
                f"{self.op}_kernel",
                programs=chunks * columns // config["block_n"],
                dram_bytes=streamed + once,
                l2_bytes=streamed + factors,
                steps=ceil_div(min(config["chunk"], spec.tokens), config["block_t"]) * (k_steps + 1),
                matrix_flops=2 * multiplied * passes,
                matrix_dtype=dtype,
            ),
        )

    def sums(self, spec: KernelSpec, config: Config) -> int:
        """Bytes of the sums over chunks; 0 in a forward pass."""
        return 0


class ChunkedSums(ChunkedTile):
    """A program also sums its rows, and a second kernel adds the chunks' sums."""

    constants: ClassVar[Mapping[str, object]] = {"reduce_warps": REDUCE_WARPS}

    def sums(self, spec: KernelSpec, config: Config) -> int:
        count = self.products * (2 if spec.bias else 1)
        return ceil_div(spec.tokens, config["chunk"]) * sum(spec.widths) * 4 * count

    def added(self, spec: KernelSpec, config: Config, programs: int) -> Work:
        """The launch that adds the chunks."""
        return Work(
            "add_chunks_kernel",
            programs=programs,
            dram_bytes=sum(spec.widths) * 4 * self.products,
            l2_bytes=self.sums(spec, config),
            steps=ceil_div(ceil_div(spec.tokens, config["chunk"]), config["reduce_c"]),
        )


def chunk_programs(spec: KernelSpec, chunk: int, block_n: int) -> int:
    """The programs of a launch whose programs take ``chunk`` rows of ``block_n`` columns."""
    return ceil_div(spec.tokens, chunk) * sum(ceil_div(width, block_n) for width in spec.widths)


def in_halves(rank: int) -> bool:
    """Whether steps of 32 ranks waste fewer than steps of 64."""
    return 0 < rank % 64 <= 32


def narrow(spec: KernelSpec) -> bool:
    """Whether all factors have one 16-bit dtype as they are."""
    return dtype_bytes(spec.activation) == 2 and spec.adapter == spec.activation


def refuse_products(spec: KernelSpec, config: Config, gpu: Gpu, adapter: int, products: int) -> str | None:
    """Why tiles of ``products`` products cannot work, or None; ``adapter`` are the bytes of an element of B."""
    block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
    stage = products * (block_t * dtype_bytes(spec.activation) + block_n * adapter) * block_k
    return refuse_dot_tile(products * block_t, block_n, block_k, config.num_warps) or refuse_shared_memory(
        config.num_stages, stage, gpu
    )


def refuse_reduction(rows: int, cols: int) -> str | None:
    """Why the tile of the kernel that adds chunks cannot work, or None."""
    return refuse_tile(rows, cols, REDUCE_WARPS)
