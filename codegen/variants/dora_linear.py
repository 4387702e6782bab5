"""The variants of ``dora_linear_forward``: the base product, the rank-r product and the composition in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    MAX_TMA_BOX,
    Variant,
    Work,
    ceil_div,
    covering,
    dot_passes,
    dtype_bytes,
    fit,
    multiprocessors_of,
    nearest,
    refuse_dot_tile,
    refuse_shared_memory,
    split_for,
    tiles_for,
    tma_unavailable,
    up_to,
)

FEW_TOKENS = 128
"""Up to this many tokens, reading W takes longer than multiplying by it (H200: 745 TFLOP/s over 4.27 TB/s is 174)."""

EXACT_BLOCK_K = 32
"""The largest block_k of fp32 products: inside a step tensor cores truncate the running sum, between steps the addition
rounds. At 64 the truncation alone comes near the error bound of 1e-6."""

FINISH_COLUMNS = 256
"""Columns that a program of the finishing kernel adds."""


def _narrow(spec: KernelSpec) -> bool:
    """Whether every product takes one tensor-core product: 16-bit operands of one dtype."""
    return dtype_bytes(spec.activation) == 2 and spec.adapter == spec.activation


def _deepest(spec: KernelSpec, wanted: int) -> int:
    return wanted if _narrow(spec) else min(wanted, EXACT_BLOCK_K)


def _read_bytes(spec: KernelSpec, rows_t: int, rows_n: int) -> int:
    """Bytes of ``rows_t`` rows of x and h and of ``rows_n`` rows of W and B."""
    of_tokens = rows_t * (spec.d_in + spec.rank) * dtype_bytes(spec.activation)
    return of_tokens + rows_n * (spec.d_in * dtype_bytes(spec.weight) + spec.rank * dtype_bytes(spec.adapter))


def _written_bytes(spec: KernelSpec) -> int:
    return spec.tokens * spec.d_out * dtype_bytes(spec.activation) * (2 if spec.save else 1)


def _tile_flops(spec: KernelSpec, block_t: int, block_n: int, block_k: int) -> int:
    """Tensor-core operations of one output tile, padding and extra passes included."""
    base_passes = dot_passes(spec.activation, spec.weight)[1]
    lora_passes = dot_passes(spec.activation, spec.adapter)[1]
    steps = ceil_div(spec.d_in, block_k) * base_passes + ceil_div(spec.rank, block_k) * lora_passes
    return 2 * block_t * block_n * block_k * steps


class DoraLinearTile(Variant):
    """One output tile per program, loaded by pointers, in an order that keeps rows of x and W in the L2 cache."""

    op = "dora_linear_forward"
    name = "tile"
    counts = frozenset({"group_t"})

    def default_order(self, spec: KernelSpec) -> int:
        return 1

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((16, 32, 64, 128, 256), spec.tokens),
            "block_n": up_to((32, 64, 128, 256), spec.d_out),
            "block_k": up_to((32, 64, 128) if _narrow(spec) else (16, 32), spec.d_in),
            "group_t": (1, 4, 8, 16),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        narrow = _narrow(spec)
        shapes: tuple[tuple[int, int, int, int, int, int], ...]
        if spec.tokens <= FEW_TOKENS:
            shapes = ((64, 64, 64, 8, 4, 4), (16, 64, 128, 4, 4, 5), (16, 128, 64, 4, 4, 5))
        elif narrow:
            shapes = (
                (128, 256, 64, 8, 8, 3),
                (128, 128, 64, 8, 8, 3),
                (128, 128, 32, 8, 4, 4),
                (256, 128, 64, 8, 8, 3),
            )
        else:  # the split parts of fp32 operands take registers
            shapes = ((64, 128, 32, 8, 8, 2), (128, 128, 32, 8, 8, 2))
        shapes = (*shapes, (64, 64, 32, 8, 4, 2))
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens),
                block_n=fit(block_n, spec.d_out),
                block_k=fit(_deepest(spec, block_k), spec.d_in),
                group_t=group_t,
                num_warps=warps,
                num_stages=stages if narrow else 2,
            )
            for block_t, block_n, block_k, group_t, warps, stages in shapes
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        return tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        wide = max(dtype_bytes(spec.weight), dtype_bytes(spec.adapter))
        stage = (block_t * dtype_bytes(spec.activation) + block_n * wide) * block_k
        return (
            _refuse_depth(spec, block_k)
            or refuse_dot_tile(block_t, block_n, block_k, config.num_warps)
            or refuse_shared_memory(config.num_stages, stage, gpu)
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        tiles = ceil_div(spec.tokens, config["block_t"]) * ceil_div(spec.d_out, config["block_n"])
        return (self._product(spec, config, tiles, programs=tiles),)

    def _product(self, spec: KernelSpec, config: Config, tiles: int, programs: int) -> Work:
        """The launch with ``tiles`` tiles on ``programs`` programs; the program with the most tiles sets the time."""
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        walked = ceil_div(tiles, programs)
        return Work(
            "dora_linear_kernel",
            programs=programs,
            dram_bytes=_read_bytes(spec, spec.tokens, spec.d_out) + _written_bytes(spec),
            l2_bytes=programs * walked * _read_bytes(spec, block_t, block_n) + _written_bytes(spec),
            steps=walked * (ceil_div(spec.d_in, block_k) + ceil_div(spec.rank, block_k)),
            matrix_flops=programs * walked * _tile_flops(spec, block_t, block_n, block_k),
            matrix_dtype=dot_passes(spec.activation, spec.adapter)[0],
        )


class DoraLinearTmaPersistent(DoraLinearTile):
    """A persistent grid of ``programs`` programs, tiles loaded by tensor descriptors, y stored in ``parts`` parts."""

    name = "tma_persistent"
    counts = frozenset({"group_t", "programs", "parts"})
    descriptors = True

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        dtypes = (spec.activation, spec.weight, spec.adapter)
        return super().unavailable(spec, gpu) or tma_unavailable(gpu, dtypes, (spec.d_in, spec.rank, spec.d_out))

    def default_order(self, spec: KernelSpec) -> int:
        return 0 if spec.tokens > FEW_TOKENS else 3

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((64, 128, 256), spec.tokens),
            "block_n": up_to((64, 128, 256), spec.d_out),
            "block_k": up_to((32, 64, 128), spec.d_in),
            "group_t": (1, 4, 8, 16),
            "programs": (gpu.multiprocessors, 2 * gpu.multiprocessors),
            "parts": (1, 2),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens),
                block_n=fit(block_n, spec.d_out, smallest=32),
                block_k=fit(block_k, spec.d_in),
                group_t=group_t,
                programs=rounds * gpu.multiprocessors,
                parts=parts,
                num_warps=warps,
                num_stages=stages,
            )
            for block_t, block_n, block_k, group_t, rounds, parts, warps, stages in (
                (128, 256, 64, 8, 1, 2, 8, 4),
                (128, 256, 64, 16, 1, 1, 8, 3),
                (128, 256, 32, 4, 1, 2, 8, 5),
                (128, 128, 64, 8, 1, 1, 4, 5),
                (64, 64, 128, 8, 2, 1, 4, 5),
                (128, 128, 64, 8, 1, 1, 8, 2),
                (64, 64, 64, 8, 1, 1, 4, 2),
            )
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        rounds = config["programs"] / multiprocessors_of(source, gpu)
        return ({"programs": nearest(self.choices(spec, gpu)["programs"], rounds * gpu.multiprocessors)},)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        if max(block_t, block_n, block_k) > MAX_TMA_BOX:
            return f"a tile side must be at most {MAX_TMA_BOX} for the tensor memory accelerator"
        if config["parts"] > 2 or block_n // config["parts"] < 16:
            return f"y is stored in 1 or 2 parts of at least 16 columns, got {config['parts']} parts of {block_n}"
        width = dtype_bytes(spec.activation)
        stage = (block_t + block_n) * block_k * width
        # Three buffers exist at once: the pipeline's, the stored part of y, and h and B where they are one step.
        apart = block_t * block_n // config["parts"] * width + (stage if spec.rank <= block_k else 0)
        needed = config.num_stages * stage + apart
        if needed > gpu.shared_bytes_per_block:
            limit = gpu.shared_bytes_per_block
            return f"{needed} bytes of shared memory for tiles of x, W and y exceed {gpu.slug}'s {limit} per block"
        return super().refuse(spec, config, gpu)

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        tiles = ceil_div(spec.tokens, config["block_t"]) * ceil_div(spec.d_out, config["block_n"])
        return (self._product(spec, config, tiles, programs=min(tiles, config["programs"])),)


class DoraLinearSplitK(Variant):
    """For few tokens: ``split_k`` programs share each tile's sum, so that the whole GPU reads W; a second kernel adds.

    The shares are interleaved blocks of columns of W and of B, so each share has its part of both products. With
    ``overlap`` 1 the second kernel starts while the first still runs (programmatic dependent launch).
    """

    op = "dora_linear_forward"
    name = "split_k"
    counts = frozenset({"split_k"})
    switches = frozenset({"overlap"})
    constants: ClassVar[Mapping[str, object]] = {"finish_n": FINISH_COLUMNS}

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        if spec.tokens > FEW_TOKENS:
            return f"for more than {FEW_TOKENS} tokens there are enough tiles to fill a GPU without splitting the sum"
        return super().unavailable(spec, gpu)

    def default_order(self, spec: KernelSpec) -> int:
        return 0

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((16, 32, 64, 128), spec.tokens),
            "block_n": up_to((16, 32, 64, 128), spec.d_out),
            "block_k": up_to((32, 64, 128, 256) if _narrow(spec) else (16, 32), spec.d_in),
            "split_k": tuple(s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if s == 1 or spec.d_in // s >= 128),
            "overlap": (0, 1) if gpu.has_tma else (0,),
            "num_warps": (2, 4, 8),
            "num_stages": (2, 3, 4, 5, 6),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        narrow = _narrow(spec)
        configs = []
        for widest, block_n, block_k, rounds, warps, stages in (
            (128, 64, 128, 2, 4, 4),
            (64, 64, 64, 1, 8, 5),
            (32, 32, 128, 2, 4, 3),
            (16, 64, 64, 4, 4, 4),
            (128, 64, 64, 2, 4, 3),
            (128, 64, 32, 2, 4, 2),
        ):
            block_t = fit(widest, spec.tokens)
            tiles = ceil_div(min(spec.tokens, FEW_TOKENS), block_t) * ceil_div(spec.d_out, block_n)
            wanted = max(1, min(rounds * gpu.multiprocessors // tiles, 32, spec.d_in // 128))
            configs.append(
                Config.create(
                    self.name,
                    block_t=block_t,
                    block_n=fit(block_n, spec.d_out),
                    block_k=fit(_deepest(spec, block_k), spec.d_in),
                    split_k=max(s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if s <= wanted),
                    overlap=int(gpu.has_tma),
                    num_warps=warps,
                    num_stages=stages if narrow else 2,
                )
            )
        return tuple(configs)

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        block_t = covering(choices["block_t"], config["block_t"], source.tokens, spec.tokens)
        tiles = (
            ceil_div(source.tokens, config["block_t"]) * ceil_div(source.d_out, config["block_n"]),
            ceil_div(spec.tokens, block_t) * ceil_div(spec.d_out, config["block_n"]),
        )
        inner, busy = (source.d_in, spec.d_in), (multiprocessors_of(source, gpu), gpu.multiprocessors)
        splits = split_for(config["split_k"], tiles, inner, busy, choices["split_k"])
        return tuple({"block_t": block_t, "split_k": split} for split in splits)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        wide = max(dtype_bytes(spec.weight), dtype_bytes(spec.adapter))
        stage = (block_t * dtype_bytes(spec.activation) + block_n * wide) * block_k
        if config["overlap"] and not gpu.has_tma:
            return f"{gpu.slug} ({gpu.architecture}) has no programmatic dependent launch: overlap must be 0"
        return (
            _refuse_depth(spec, block_k)
            or refuse_dot_tile(block_n, block_t, block_k, config.num_warps)
            or refuse_shared_memory(config.num_stages, stage, gpu)
            or (
                f"split_k={config['split_k']} leaves some shares without work"
                if (config["split_k"] - 1) * block_k >= spec.d_in
                else None
            )
        )

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_t, block_n, block_k = config["block_t"], config["block_n"], config["block_k"]
        split_k = config["split_k"]
        tiles = ceil_div(spec.tokens, block_t) * ceil_div(spec.d_out, block_n)
        partials = split_k * spec.tokens * spec.d_out * 4
        return (
            Work(
                "shares_kernel",
                programs=tiles * split_k,
                dram_bytes=_read_bytes(spec, spec.tokens, spec.d_out),
                l2_bytes=tiles * _read_bytes(spec, block_t, block_n) + partials,
                steps=ceil_div(spec.d_in, block_k * split_k) + ceil_div(spec.rank, block_k * split_k),
                matrix_flops=tiles * _tile_flops(spec, block_t, block_n, block_k),
                matrix_dtype=dot_passes(spec.activation, spec.adapter)[0],
            ),
            Work(
                "finish_kernel",
                programs=spec.tokens * ceil_div(spec.d_out, FINISH_COLUMNS),
                dram_bytes=_written_bytes(spec),
                l2_bytes=partials + _written_bytes(spec),
                steps=1,
            ),
        )


def _refuse_depth(spec: KernelSpec, block_k: int) -> str | None:
    if spec.activation == "fp32" and block_k > EXACT_BLOCK_K:
        return f"block_k must be at most {EXACT_BLOCK_K} in fp32, got {block_k}: longer steps lose digits"
    return None
