"""The variants for a gated MLP: ``compose_swiglu`` and its backward compose gate and up in one tile, ``swiglu_forward``
and its backward are elementwise passes over a gate and an up that are composed already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..ops import DECODE_TOKENS
from ..spec import Config, KernelSpec
from .base import (
    ADAPTER_CONSTANTS,
    MAX_TMA_BOX,
    Variant,
    Work,
    adapter_parts,
    adapter_parts_work,
    ceil_div,
    covering,
    dtype_bytes,
    fit,
    tiles_for,
    tma_unavailable,
    up_to,
)
from .chunks import (
    FEW_TOKENS,
    LOW_RANK,
    MIDDLE_RANK,
    ChunkedSums,
    ChunkedTile,
    chunk_programs,
    in_halves,
    narrow,
    refuse_products,
    refuse_reduction,
)
from .compose import ElementwiseColumns, ElementwiseTile

LONG_CHUNK_RANK, LONG_CHUNK_COLUMNS = 32, 16384
"""Above this rank, from so many columns on, a program takes 512 rows: by an H100's recorded table 2 to 14 % faster."""

SHORT_TOKENS = 1024
"""Up to this many tokens long chunks of rows do not fill the GPU."""

ENOUGH_PROGRAMS = 760
"""So many programs with long chunks of rows hide each other's waits."""

NARROW_RANK = 256
"""Up to this rank tiles of 64 columns on one group of warps are 5 to 7 % faster on an H100 than tiles of 128 on two."""


class SwigluTile(ChunkedTile):
    """Both rank-r products, loaded by pointers, with the compositions and the activation as their epilogue."""

    op = "compose_swiglu"
    passes = 3
    products = 2

    def low_rank_seeds(self, spec: KernelSpec) -> tuple[Config, ...]:
        found = super().low_rank_seeds(spec)
        if spec.rank <= LONG_CHUNK_RANK or spec.d_out < LONG_CHUNK_COLUMNS:
            return found
        return (self._config(spec, 16, 128, 64, 4, 4, chunk=512), *found)  # there are programs enough


class SwigluTma(Variant):
    """One output tile per program with tensor descriptors: from Hopper on, no thread computes addresses.

    A kernel before rounds fp32 adapters (autocast) or splits them in two; the products then run over twice the ranks.
    """

    op = "compose_swiglu"
    name = "tma"
    descriptors = True
    constants: ClassVar[Mapping[str, object]] = ADAPTER_CONSTANTS

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        return tma_unavailable(gpu, (spec.activation,), (spec.d_out, spec.rank))

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((16, 32, 64, 128), spec.tokens),
            "block_n": up_to((16, 32, 64, 128, 256), spec.d_out),
            "block_k": up_to((16, 32, 64, 128), spec.rank),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(self._config(spec, *shape) for shape in self._shapes(spec, gpu))

    def default_order(self, spec: KernelSpec) -> int:
        return 0 if spec.tokens > FEW_TOKENS and spec.rank > LOW_RANK else 2

    def _shapes(self, spec: KernelSpec, gpu: Gpu) -> tuple[tuple[int, int, int, int, int], ...]:
        if spec.tokens <= FEW_TOKENS:
            return ((16, 32, 64, 4, 3), (64, 32, 64, 4, 3))
        if spec.rank <= LOW_RANK:
            return ((32, 128, 64, 4, 2), (64, 64, 64, 4, 2), (64, 64, 32, 4, 2))
        shapes = ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2))
        if gpu.architecture != "sm_90":
            return shapes
        large = ((128, 64, 64, 4, 2), (128, 128, 64, 8, 3))
        return (*(large if spec.rank <= NARROW_RANK else large[::-1]), *shapes)

    def _config(self, spec: KernelSpec, t: int, n: int, k: int, warps: int, stages: int) -> Config:
        sides = {"block_t": fit(t, spec.tokens), "block_n": fit(n, spec.d_out), "block_k": fit(k, spec.rank)}
        return Config.create(self.name, **sides, num_warps=warps, num_stages=stages)

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        block_k = covering(choices["block_k"], config["block_k"], source.rank, spec.rank)
        found = tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})
        return tuple({**values, "block_k": block_k} for values in found)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        box = max(config["block_t"], config["block_n"])
        if box > MAX_TMA_BOX:
            return f"a tile side must be at most {MAX_TMA_BOX} for the tensor memory accelerator, got {box}"
        return refuse_products(spec, config, gpu, dtype_bytes(spec.activation), 2)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        tiles_t, tiles_n = ceil_div(spec.tokens, block_t), ceil_div(spec.d_out, block_n)
        parts, width, shape = adapter_parts(spec), dtype_bytes(spec.activation), (spec.d_out, spec.rank)
        streamed = 3 * spec.tokens * spec.d_out * width
        k_steps = ceil_div(spec.rank, block_k) * parts
        return (
            *adapter_parts_work(spec, shape, shape),
            Work(
                "compose_swiglu_kernel",
                programs=tiles_t * tiles_n,
                dram_bytes=streamed + 2 * spec.rank * width * (spec.tokens + parts * spec.d_out),
                l2_bytes=streamed + tiles_t * tiles_n * 2 * spec.rank * width * parts * (block_t + block_n),
                steps=k_steps + 1,
                matrix_flops=4 * tiles_t * block_t * tiles_n * block_n * k_steps * block_k,
                matrix_dtype=spec.activation,
            ),
        )


class SwigluBackwardTile(ChunkedSums):
    """Gate and up are composed again, and both dyg and the sums follow from them."""

    op = "compose_swiglu_backward"
    passes = 5
    products = 2

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        reduced = {"reduce_c": (8, 16, 32), "reduce_n": up_to((32, 64, 128), spec.d_out)}
        return {**super().choices(spec, gpu), **reduced}

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Found in searches on an H100, in us with the config that came first before: 128 tokens at 14336 columns and
        r = 384 29 and 45, at 9728 and r = 64 13 and 15; 1024 tokens at 11008 and r = 64 49 and 62."""
        found = super().seeds(spec, gpu)
        if not narrow(spec):
            return found
        if DECODE_TOKENS < spec.tokens <= FEW_TOKENS:  # tiles of 16 rows would read B again for each
            tall = (64, 64, 64, 8, 3, 0) if spec.rank > LOW_RANK else (16, 64, 64, 4, 3, 64)
            return (self._config(spec, *tall), *found)
        first = self._hopper_seeds(spec, gpu) if gpu.architecture == "sm_90" else ()
        if FEW_TOKENS < spec.tokens <= SHORT_TOKENS and 32 < spec.rank <= LOW_RANK:
            first = (*first, self._config(spec, 16, 64, 64, 4, 4, chunk=256))
        if spec.tokens > FEW_TOKENS and LOW_RANK < spec.rank <= MIDDLE_RANK and not spec.bias:
            first = (*first, self._config(spec, 16, 64, 64, 4, 3, chunk=256, resident=1))
        return tuple(dict.fromkeys((*first, *found)))

    def _hopper_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """By recorded tables of an H100 and an H200: longer chunks for low ranks, where they leave programs enough."""
        if spec.tokens <= FEW_TOKENS:
            return ()
        if spec.rank > LOW_RANK:
            if spec.bias or spec.rank > MIDDLE_RANK or chunk_programs(spec, 512, 128) < ENOUGH_PROGRAMS:
                return ()
            block_k = 32 if in_halves(spec.rank) else 64
            return (self._config(spec, 16, 128, block_k, 4, 3, chunk=512, resident=1),)
        if spec.rank > 32:
            if spec.tokens <= 512:
                return () if spec.d_out >= LONG_CHUNK_COLUMNS else (self._config(spec, 16, 64, 64, 4, 3, chunk=64),)
            long = self._config(spec, 32, 64, 64, 4, 3, chunk=512)
            return (long,) if chunk_programs(spec, 512, 64) >= 2 * gpu.multiprocessors else ()
        if spec.tokens <= 512:
            return ()
        return (self._config(spec, 16, 64, 64, 4, 4, chunk=256 if spec.rank > 16 and spec.tokens > 1024 else 128),)

    def high_rank_shapes(self, spec: KernelSpec, gpu: Gpu) -> tuple[tuple[int, int, int, int, int], ...]:
        spare = gpu.architecture == "sm_90"  # elsewhere operands of a product take registers
        n = 64 if spare or not spec.bias else 32  # with biases there are two more sums
        first = (64, n, 64, 4 if spare and not spec.bias else 8, 3)
        return (first, (64, n, 64, 8, 3), (64, n, 32, 8, 2), (32, 32, 32, 4, 2))

    def _config(
        self, spec: KernelSpec, t: int, n: int, k: int, warps: int, stages: int, chunk: int = 0, resident: int = 0
    ) -> Config:
        tile = super()._config(spec, t, n, k, warps, stages, chunk, resident)
        params = {**dict(tile.params), "reduce_c": 32, "reduce_n": fit(64, spec.d_out, smallest=32)}
        return Config.create(self.name, **params, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return super().refuse(spec, config, gpu) or refuse_reduction(config["reduce_c"], config["reduce_n"])

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        added = self.added(spec, config, ceil_div(spec.d_out, config["reduce_n"]))
        return (*super().work(spec, config), added)


class SwigluForwardTile(ElementwiseTile):
    """act(gate)*up from gate and up with their rank-r products."""

    op = "swiglu_forward"

    def shapes(self, spec: KernelSpec) -> tuple[tuple[int, int, int], ...]:
        return ((8, 128, 8), (1, 1024, 8), *super().shapes(spec))


class SwigluBackwardColumns(ElementwiseColumns):
    """dYg and the sums of gate and of up."""

    op = "swiglu_backward"
    passes = 5
    projections = 2
    most_elements = 32

    def shapes(self, spec: KernelSpec) -> tuple[tuple[int, int, int, int, int, int, int], ...]:
        """In the order of the average times in recorded tables of an H100 and an H200."""
        few, some, many = (4, 4, 128, 8, 32, 2, 3), (64, 8, 64, 16, 64, 4, 3), (256, 16, 64, 16, 32, 4, 3)
        enough = chunk_programs(spec, 256, 64) >= ENOUGH_PROGRAMS
        first = few if spec.tokens <= FEW_TOKENS else many if enough else some
        others = (
            (256, 8, 64, 64, 64, 4, 2),
            (64, 16, 64, 16, 32, 4, 3),
            (16, 2, 256, 8, 32, 1, 3),
            (64, 16, 64, 16, 32, 2, 3),
        )
        return tuple(dict.fromkeys((first, few, some, many, *others)))
