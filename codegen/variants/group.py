"""The variants of ``lora_compose_group`` and ``compose_backward_group``: projections of one x in one launch."""

from __future__ import annotations

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
    narrow,
    refuse_reduction,
)

SHORT_TOKENS = 1024
"""Up to this many tokens chunks of several tiles leave multiprocessors without one."""

FEWEST_TOKENS, SMALL_RANK = 16, 32
"""Up to these the seeds of one projection are the best of a group's too."""

TALL = (64, 32, 64, 4, 5)
"""block_t, block_n, block_k, num_warps and num_stages of a tile for 17 to 128 tokens and more than 64 ranks: B is read
less often than by tiles of 16 rows. On an H100 it takes 12 % less time forward and 3 % less backward (rank 256, 128
tokens); at rank 344 the backward winner is such a tile too."""

WIDE_COLUMNS = 14336
"""From so many columns on, tiles of 16 columns are too many for 16 tokens or fewer."""

FILLED = 0.7
"""The share of the multiprocessors that have a program from which a launch of one wave is worth it."""

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
        few = FEWEST_TOKENS < spec.tokens <= FEW_TOKENS
        return (self._config(spec, *TALL),) if few and spec.rank > LOW_RANK else ()

    def low_rank_seeds(self, spec: KernelSpec) -> tuple[Config, ...]:
        *long, short, smallest = super().low_rank_seeds(spec)
        return (short, *long, smallest)


class LoraComposeGroupTile(_GroupTile):
    """The projections' tiles one after another in one grid; a program picks its projection by its number."""

    op = "lora_compose_group"
    passes = 2

    def hopper_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().hopper_seeds(spec, gpu)
        if spec.rank <= FEWEST_TOKENS:
            return found
        if spec.tokens <= FEWEST_TOKENS:
            if spec.rank <= MIDDLE_RANK:
                return found
            wide = self._config(spec, 16, 64, 64, 4, 5)
            narrowest = self._config(spec, 16, 16, 64, 2, 4)
            return (wide, narrowest) if sum(spec.widths) >= WIDE_COLUMNS else (narrowest, wide)
        if spec.tokens <= FEW_TOKENS:
            return found if spec.rank > LOW_RANK else (self._config(spec, 32, 64, 64, 4, 3),)
        long = (self._config(spec, 16, 128, 64, 4, 4, chunk=256),)
        long = long if chunk_programs(spec, 256, 128) >= 16 * gpu.multiprocessors else ()
        if spec.rank <= SMALL_RANK:
            return long
        streamed = self._config(spec, 64, 64, 64, 8, 3)
        resident = self._config(spec, 64, 64, 64, 2, 2, chunk=256, resident=1)
        if spec.rank <= LOW_RANK:
            wide = self._config(spec, 64, 128, 64, 8, 3)
            return (wide, streamed) if spec.tokens <= SHORT_TOKENS else (*long, streamed)
        if spec.rank > MIDDLE_RANK:
            return (self._config(spec, 64, 128, 64, 8, 3),) if spec.tokens <= SHORT_TOKENS else ()
        if spec.tokens <= SHORT_TOKENS:
            return (streamed,)
        whole = self._config(spec, 32, 128, 128, 4, 3, chunk=512)
        many = spec.rank <= 128 and chunk_programs(spec, 512, 128) >= 8 * gpu.multiprocessors
        return (whole, resident) if many else (resident,)


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
            tall = (self._config(spec, *TALL),)
            return tall if spec.rank > MIDDLE_RANK else (self._config(spec, 64, 32, 64, 4, 3, resident=1), *tall)
        return self._long_seeds(spec, gpu) if spec.rank <= LOW_RANK else self._high_rank_seeds(spec, gpu)

    def _long_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Seeds for low ranks: chunks as long as leave some programs for each multiprocessor."""
        enough = 4 * gpu.multiprocessors
        if spec.rank > SMALL_RANK:
            found = self._config(spec, 32, 64, 64, 4, 3, chunk=512, reduce_c=32)
            return (found,) if chunk_programs(spec, 512, 64) >= enough else ()
        if spec.rank > 16:
            middle = self._config(spec, 16, 128, 64, 4, 4, chunk=256)
            return (middle,) if chunk_programs(spec, 256, 128) >= 2 * gpu.multiprocessors else ()
        if spec.tokens <= 4096:
            return ()
        long = self._config(spec, 32, 128, 64, 8, 3, chunk=512)
        middle = self._config(spec, 16, 128, 64, 4, 3, chunk=256)
        return (long, middle) if chunk_programs(spec, 512, 128) >= enough else (middle,)

    def _high_rank_seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """B stays in shared memory, where the programs of that, one on a multiprocessor, fill the last wave too."""
        block_k = 32 if 0 < spec.rank % 64 <= 32 and spec.rank <= MIDDLE_RANK else 64
        resident = self._config(spec, 64, 64, block_k, 4, 3, chunk=512, resident=1)
        if spec.tokens > SHORT_TOKENS:
            return (resident,)
        programs = chunk_programs(spec, 512, 64)
        filled = programs / (ceil_div(programs, gpu.multiprocessors) * gpu.multiprocessors)
        if filled >= FILLED and programs <= gpu.multiprocessors:
            return (resident,)
        if spec.rank <= MIDDLE_RANK and spec.tokens > 512:
            return (self._config(spec, 64, 32, 64, 4, 3, chunk=512, resident=1), resident)
        streamed = (64, 64, 64, 4, 3) if spec.tokens > 512 else (64, 128, 64, 8, 3)
        return (self._config(spec, *streamed), resident)

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
