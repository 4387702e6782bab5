"""The variants of ``lora_compose_group`` and ``compose_backward_group``: projections of one x in one launch."""

from __future__ import annotations

from collections.abc import Mapping

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import Work, ceil_div
from .chunks import FEW_TOKENS, LOW_RANK, MIDDLE_RANK, ChunkedSums, ChunkedTile, narrow, refuse_reduction

SHORT_TOKENS = 1024
"""Up to this many tokens chunks of several tiles leave multiprocessors without one."""

FEWEST_TOKENS, SMALL_RANK = 16, 32
"""Up to these the seeds of one projection are the best of a group's too."""

TALL = (64, 32, 64, 4, 5)
"""block_t, block_n, block_k, num_warps and num_stages of a tile for 17 to 128 tokens and more than 64 ranks: B is read
less often than by tiles of 16 rows. On an H100 it takes 12 % less time forward and 3 % less backward (rank 256, 128
tokens); at rank 344 the backward winner is such a tile too."""

REDUCED = 16
"""Chunks that the kernel which adds them loads at a time by default."""


class _GroupTile(ChunkedTile):
    """What the two share: where one projection is narrow, short chunks fill the GPU better."""

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().seeds(spec, gpu)
        few = FEWEST_TOKENS < spec.tokens <= FEW_TOKENS
        tall = gpu.architecture == "sm_90" and narrow(spec) and few and spec.rank > LOW_RANK
        return (self._config(spec, *TALL), *found) if tall else found

    def low_rank_seeds(self, spec: KernelSpec) -> tuple[Config, ...]:
        *long, short, smallest = super().low_rank_seeds(spec)
        return (short, *long, smallest)


class LoraComposeGroupTile(_GroupTile):
    """The projections' tiles one after another in one grid; a program picks its projection by its number."""

    op = "lora_compose_group"
    passes = 2

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().seeds(spec, gpu)
        if gpu.architecture != "sm_90" or not narrow(spec) or spec.rank <= SMALL_RANK:
            return found
        # By the recorded tables of an H100.
        if spec.tokens <= FEW_TOKENS:
            first = self._config(spec, 16, 16, 64, 2, 4)
            return (first, *found) if spec.rank > MIDDLE_RANK and spec.tokens <= FEWEST_TOKENS else found
        streamed = self._config(spec, 64, 64, 64, 8, 3)
        resident = self._config(spec, 64, 64, 64, 2, 2, chunk=256, resident=1)
        if spec.rank <= LOW_RANK:
            wide = self._config(spec, 64, 128, 64, 8, 3)
            return (wide, streamed, *found) if spec.tokens <= SHORT_TOKENS else (streamed, *found)
        if spec.rank > MIDDLE_RANK:
            return found
        return (resident, *found) if spec.tokens > SHORT_TOKENS else (streamed, *found, resident)


class ComposeBackwardGroupTile(_GroupTile, ChunkedSums):
    """The same grid; the second launch adds the sums of one tile's columns per program."""

    op = "compose_backward_group"
    passes = 3

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {**super().choices(spec, gpu), "reduce_c": (8, 16, 32)}

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        found = super().seeds(spec, gpu)
        if gpu.architecture != "sm_90" or spec.tokens <= FEW_TOKENS or spec.rank <= LOW_RANK or not narrow(spec):
            return found
        return (self._config(spec, 64, 64, 64, 4, 3, chunk=512, resident=1), *found)

    def _config(
        self, spec: KernelSpec, t: int, n: int, k: int, warps: int, stages: int, chunk: int = 0, resident: int = 0
    ) -> Config:
        tile = super()._config(spec, t, n, k, warps, stages, chunk, resident)
        params = {**dict(tile.params), "reduce_c": REDUCED}
        return Config.create(self.name, **params, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        return super().refuse(spec, config, gpu) or refuse_reduction(config["reduce_c"], config["block_n"])

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        tiles = sum(ceil_div(width, config["block_n"]) for width in spec.widths)
        return (*super().work(spec, config), self.added(spec, config, tiles))
