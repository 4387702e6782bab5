"""The variants of ``lora_compose_group`` and ``compose_backward_group``: projections of one x in one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Work, ceil_div
from .chunks import (
    FEW_TOKENS,
    LOW_RANK,
    MIDDLE_RANK,
    ChunkedSums,
    ChunkedTile,
    chunk_programs,
    in_halves,
    narrow,
    refuse_reduction,
)

SHORT_TOKENS = 1024
"""Up to this many tokens chunks of several tiles leave multiprocessors without one."""

FEWEST_TOKENS, SMALL_RANK = 16, 32
"""Up to so many tokens reading B takes all the time; up to this rank the products take hardly any."""

TALL = (64, 32, 64, 4, 5)
"""block_t, block_n, block_k, num_warps and num_stages of a tile for 17 to 128 tokens and more than 64 ranks: B is read
less often than by tiles of 16 rows. On an H100 it takes 12 % less time forward and 3 % less backward (rank 256, 128
tokens); at rank 344 the backward winner is such a tile too."""

WIDE = 8192
"""A projection of so many columns has enough of them for wide tiles also where there are 16 tokens or fewer."""
MANY_COLUMNS = 6144
"""From so many columns of a group on, tiles of 64 columns are enough for 17 to 128 tokens."""

FILLED, FILLED_LATER = 0.7, 0.8
"""The share of the multiprocessors that have a program, on average, from which B is kept in shared memory: in a launch
of one wave, and of more."""

REDUCED = 16
"""Chunks that the kernel which adds them loads at a time by default."""


class _GroupTile(ChunkedTile):
    """What the two share: where one projection is narrow, short chunks fill the GPU better.

    The seeds of :meth:`hopper_seeds` are by recorded tables of an H100 and an H200 (``benchmarks/tables``). They count
    the programs of a launch, of which long chunks leave too few for short inputs and narrow projections.
    """

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().seeds(spec, gpu)
        if gpu.architecture != "sm_90" or not narrow(spec):
            return found
        return tuple(dict.fromkeys((*self.hopper_seeds(spec, gpu), *found)))

    def hopper_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """The seeds for Hopper's GPUs and 16-bit factors that come before the others."""
        if not FEWEST_TOKENS < spec.tokens <= FEW_TOKENS or spec.rank <= LOW_RANK:
            return ()
        tall, wide = self._config(spec, *TALL), self._config(spec, 64, 64, 64, 4, 3)
        return (wide, tall) if sum(spec.widths) >= MANY_COLUMNS else (tall, wide)

    def low_rank_seeds(self, spec: KernelSpec) -> tuple[Config, ...]:
        *long, short, smallest = super().low_rank_seeds(spec)
        return (short, *long, smallest)


class LoraComposeGroupTile(_GroupTile):
    """The projections' tiles one after another in one grid; a program picks its projection by its number."""

    op = "lora_compose_group"
    passes = 2

    def hopper_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().hopper_seeds(spec, gpu)
        if spec.rank <= 16:
            return found
        if spec.tokens <= FEWEST_TOKENS:
            if spec.rank <= MIDDLE_RANK:
                return found
            wide = self._config(spec, 16, 128, 64, 8, 4)
            narrowest = self._config(spec, 16, 16, 64, 2, 4)
            return (wide, narrowest) if max(spec.widths) >= WIDE else (narrowest, wide)
        if spec.tokens <= FEW_TOKENS:
            return found if spec.rank > LOW_RANK else (self._config(spec, 32, 64, 64, 4, 3),)
        if spec.rank <= LOW_RANK:
            return self._long_seeds(spec, gpu)
        if spec.tokens > SHORT_TOKENS:
            return self._resident_seeds(spec, gpu) if spec.rank <= MIDDLE_RANK else ()
        if spec.rank > MIDDLE_RANK:
            return (self._config(spec, 64, 128, 64, 8, 3),)
        streamed = self._config(spec, 64, 64, 64, 8, 3)
        if spec.rank > 128 or spec.tokens <= 512:
            return (streamed,)
        chunk = 512 if chunk_programs(spec, 512, 64) >= gpu.multiprocessors else 64
        return (self._config(spec, 64, 64, 128, 4, 3, chunk=chunk), streamed)

    def _long_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Seeds for low ranks, of which a program holds all: long chunks where they leave programs enough."""
        long = self._config(spec, 16, 128, 64, 4, 4, chunk=256)
        if spec.rank <= SMALL_RANK:
            return (long,) if chunk_programs(spec, 256, 128) >= 16 * gpu.multiprocessors else ()
        streamed = self._config(spec, 64, 64, 64, 8, 3)
        if spec.tokens <= SHORT_TOKENS:
            return (self._config(spec, 64, 128, 64, 8, 3), streamed)
        middle = self._config(spec, 64, 64, 64, 4, 3, chunk=256)
        if chunk_programs(spec, 256, 128) >= 8 * gpu.multiprocessors:
            return (long, middle, streamed)
        tiles = chunk_programs(spec, 64, 64)
        if tiles >= 16 * gpu.multiprocessors:
            return (middle, streamed) if tiles >= 52 * gpu.multiprocessors else (streamed, middle)
        return (self._config(spec, 32, 64, 64, 4, 3, chunk=128), streamed)

    def _resident_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Seeds for middle ranks and many tokens: B stays in shared memory, or in registers."""
        resident = self._config(spec, 64, 64, 64, 2, 2, chunk=256, resident=1)
        if spec.rank <= 128 and chunk_programs(spec, 512, 128) >= 8 * gpu.multiprocessors:
            return (self._config(spec, 32, 128, 128, 4, 3, chunk=512), resident)
        if 64 < spec.rank <= 96:
            return (self._config(spec, 64, 64, 128, 8, 3, chunk=512), resident)
        if in_halves(spec.rank):
            return (self._config(spec, 64, 64, 32, 4, 3, chunk=512, resident=1), resident)
        return (resident,)


class ComposeBackwardGroupTile(_GroupTile, ChunkedSums):
    """The same grid; the second launch adds the sums of one tile's columns per program."""

    op = "compose_backward_group"
    passes = 3

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {**super().choices(spec, gpu), "reduce_c": (8, 16, 32)}

    def hopper_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        if spec.tokens <= FEWEST_TOKENS:
            return (self._config(spec, 16, 32, 64, 2, 5),) if spec.rank > MIDDLE_RANK else ()
        if spec.tokens <= FEW_TOKENS:
            if spec.rank <= LOW_RANK:
                return (self._config(spec, 32, 64, 64, 4, 2),)
            found = super().hopper_seeds(spec, gpu)
            return found if spec.rank > MIDDLE_RANK else (self._config(spec, 64, 32, 64, 4, 3, resident=1), *found)
        return self._long_seeds(spec, gpu) if spec.rank <= LOW_RANK else self._high_rank_seeds(spec, gpu)

    def _long_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Seeds for low ranks: chunks as long as leave some programs for each multiprocessor."""
        enough = 4 * gpu.multiprocessors
        if spec.rank > SMALL_RANK:
            found = self._config(spec, 32, 64, 64, 4, 3, chunk=512, reduce_c=32)
            return (found,) if chunk_programs(spec, 512, 64) >= enough else ()
        if spec.rank > 16:
            middle = self._config(spec, 16, 128, 64, 4, 4, chunk=256)
            if chunk_programs(spec, 256, 128) >= 2 * gpu.multiprocessors:
                return (middle,)
            return (self._config(spec, 16, 64, 64, 4, 4, chunk=256),) if spec.tokens > SHORT_TOKENS else ()
        if spec.tokens <= 4096:
            return ()
        long = self._config(spec, 32, 128, 64, 8, 3, chunk=512)
        middle = self._config(spec, 16, 128, 64, 4, 3, chunk=256)
        return (long, middle) if chunk_programs(spec, 512, 128) >= enough else (middle,)

    def _high_rank_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """B stays in shared memory where its programs, one on a multiprocessor, leave few of these without one."""
        block_k = 32 if in_halves(spec.rank) and spec.rank <= MIDDLE_RANK else 64
        resident = self._config(spec, 64, 64, block_k, 4, 3, chunk=512, resident=1)
        if spec.tokens > SHORT_TOKENS:
            return (resident,)
        few, middle = spec.tokens <= 512, spec.rank <= MIDDLE_RANK
        waves = chunk_programs(spec, 512, 64) / gpu.multiprocessors
        filled = waves / math.ceil(waves)
        if filled >= (FILLED if waves <= 1 else FILLED_LATER) or (few and middle and waves > 1):
            return (resident,)
        if middle and not few:
            return (self._config(spec, 64, 32, 64, 4, 3, chunk=512, resident=1), resident)
        larger = few and not middle and waves < 0.5  # fewer and larger tiles do no harm
        return (self._config(spec, *((64, 128, 64, 8, 3) if larger else (64, 64, 64, 4, 3))), resident)

    def _config(
        self,
        spec: KernelSpec,
        t: int,
        n: int,
        k: int,
        warps: int,
        stages: int,
        chunk: int = 0,
        resident: int = 0,
        reduce_c: int = REDUCED,
    ) -> Config:
        tile = super()._config(spec, t, n, k, warps, stages, chunk, resident)
        params = {**dict(tile.params), "reduce_c": reduce_c}
        return Config.create(self.name, **params, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return super().refuse(spec, config, gpu) or refuse_reduction(config["reduce_c"], config["block_n"])

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        tiles = sum(ceil_div(width, config["block_n"]) for width in spec.widths)
        return (*super().work(spec, config), self.added(spec, config, tiles))
