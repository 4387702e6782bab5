"""The ``predict`` evaluator: the roofline model of :mod:`~doratune.codegen.cost` over the compiled kernels, for
choosing configs where there is no GPU. A predicted time is never below the floor.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import metadata

from .. import __version__
from ..cache.entry import PREDICTED, Environment, Evaluation
from ..codegen.cost import DoesNotFitError, estimate_us, floor_us, launch_us, library_us
from ..codegen.gpu import Gpu
from ..codegen.render import Source
from ..codegen.spec import Config, KernelSpec
from ..codegen.variants import find_variant
from .evaluation import Evaluator, Rejected, Resources
from .space import Space

SHORTLIST_DRAWS = 600
"""Configs drawn for :func:`shortlist`; ranking one takes some 30 us."""


class PredictEvaluator(Evaluator):
    """Predicts the time of compiled candidates for any known GPU; needs none."""

    provenance = PREDICTED

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def environment(self) -> Environment:
        return Environment(
            gpu=self.gpu.slug,
            architecture=self.gpu.architecture,
            triton=metadata.version("triton"),
            torch=metadata.version("torch"),
            doratune=__version__,
        )

    def screen(self, spec: KernelSpec, config: Config) -> float | None:
        return estimate_us(spec, config, self.gpu)

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """Predict the time of one candidate.

        Raises:
            Rejected: not even one program fits a multiprocessor.
        """
        us = predict_us(source.spec, source.config, compiled, self.gpu)
        return Evaluation(
            provenance=PREDICTED,
            us=us,
            floor_us=floor_us(source.spec, self.gpu),
            registers=max(kernel.registers for kernel in compiled),
            spills=max(kernel.spills for kernel in compiled),
            shared_bytes=max(kernel.shared_bytes for kernel in compiled),
        )


def predict_us(spec: KernelSpec, config: Config, compiled: Sequence[Resources], gpu: Gpu) -> float:
    """Microseconds of all launches of a compiled kernel on ``gpu``, at least the spec's floor.

    Raises:
        Rejected: not even one program fits a multiprocessor.
    """
    by_name = {kernel.name: kernel for kernel in compiled}
    launches = find_variant(spec.op, config.variant).work(spec, config)
    try:
        us = sum(launch_us(config, work, by_name[work.kernel], gpu) for work in launches)
    except DoesNotFitError as error:
        raise Rejected(str(error)) from None
    return max(us + library_us(spec, config, gpu), floor_us(spec, gpu))


def shortlist(space: Space, count: int) -> tuple[Config, ...]:
    """The ``count`` most promising configs of a space beside its seeds, no two differing in one parameter only."""
    if count < 1:
        return ()
    chance = random.Random(str(space.spec))
    draws = min(SHORTLIST_DRAWS, 4 * space.size())
    # Half from anywhere, half near the seeds: in a space of many parameters a plain draw seldom gets them all right.
    drawn = dict.fromkeys(space.draw(chance, near=space.seeds if turn % 2 else ()) for turn in range(draws))
    fitting = [config for config in drawn if config not in space.seeds and space.refuse(config) is None]
    ranked = sorted((estimate_us(space.spec, config, space.gpu), str(config), config) for config in fitting)
    chosen: list[Config] = []
    for us, _, config in ranked:
        if len(chosen) == count or us == float("inf"):
            break
        if all(_distance(config, other) > 1 for other in chosen):
            chosen.append(config)
    return tuple(chosen)


def _distance(one: Config, other: Config) -> int:
    """In how many values two configs differ; a different variant counts as all."""
    if one.variant != other.variant:
        return len(one.params) + 3
    pairs = zip(
        (*one.params, one.num_warps, one.num_stages), (*other.params, other.num_warps, other.num_stages), strict=True
    )
    return sum(left != right for left, right in pairs)
