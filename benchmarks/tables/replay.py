"""Run searches over a recorded table instead of a GPU: nothing is compiled, and times are the recorded ones plus noise.

:func:`replay` is :func:`doratune.tuner.search.tune` with stand-ins. ``ReplayEvaluator`` answers with recorded times,
``ReplayPool`` compiles nothing and counts what it was asked for, ``ReplayStorage`` keeps studies in memory, and
``ReplaySpace`` deals with configs that are not in the table. Of those,

* one that the model puts beyond :data:`WITHIN` times its best was left out of the table on purpose. It costs its trial
  and cannot win: the time that it is given is that far behind;
* one that the model does not exclude (large spaces are sampled) stands for the nearest recorded config of its variant,
  in steps of its parameters. To refuse it instead would end a search in a large space at once, since one of some
  hundred draws is recorded. The nearest one makes the search a little easier than it is, since tables are denser near
  the best.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy
import optuna

from ...cache.entry import MEASURED, Binary, Environment, Evaluation
from ...codegen.cost import estimate_us, floor_us
from ...codegen.gpu import Gpu
from ...codegen.render import Source
from ...codegen.spec import Config, KernelSpec
from ...tuner.evaluation import ContenderFailed, Evaluator, FinalTimes, Rejected, Resources
from ...tuner.final import Rounds, most_rounds
from ...tuner.machine import Machine
from ...tuner.space import Space
from .read import FINAL, SpecTable

WITHIN = 2.0
"""Configs with an estimate of more than this many times the best one are not recorded."""

SHORT_NOISE, OUTLIER_NOISE, OUTLIERS = 0.003, 0.015, 0.1
"""Standard deviations of a short measurement, as a share: of most, and of one in ten. On an H100, configs of equal code
(adapter_backward, weight_norm_exact with another ``num_stages``) differ by a standard deviation of 0.1 to 0.35 %, and
one in ten by over 1.2 to 2 % where the kernel takes under 3 us."""

ROUND_NOISE = 0.004
"""The standard deviation of one contender's time in one round of a final, as a share. The medians of 21 rounds of such
configs differ by a standard deviation of 0.1 to 0.2 %."""

CALLS = 20
"""Calls of each contender in one round of a final, for the budget of rounds."""

DRIFT = 0.004
"""The standard deviation of what a whole round differs by: it meets all contenders alike."""


class ReplaySpace(Space):
    """The search space of a spec, where a config that was not recorded is told apart; see the module's docstring.

    It remembers what it worked out about a config, for the next search in it.
    """

    def __init__(self, table: SpecTable, gpu: Gpu, also: Iterable[Config] = ()) -> None:
        super().__init__(table.spec, gpu, also)
        self.table = table
        self.least_estimate = min(estimate_us(table.spec, config, gpu) for config in table.times)
        inside = [config for config in (*table.times, *table.rejected) if super(ReplaySpace, self).__contains__(config)]
        self._grids: dict[str, tuple[list[Config], numpy.ndarray]] = {}
        for variant in self.choices:
            recorded = [config for config in inside if config.variant == variant]
            points = numpy.array([self._point(config) for config in recorded], dtype=numpy.int64)
            self._grids[variant] = recorded, points
        self.recorded = frozenset(inside)
        self.seeds = tuple(seed for seed in self.seeds if seed in self.recorded)
        self._refusals: dict[Config, str | None] = {}
        self._known_estimates: dict[Config, float] = {}
        self._stand_ins: dict[Config, Config] = {}

    def __contains__(self, config: Config) -> bool:
        """Whether ``config`` was recorded: what is proposed by name must be."""
        return config in self.recorded

    def suggest(self, trial: optuna.Trial) -> Config:
        return self.stand_in(super().suggest(trial))

    def refuse(self, config: Config) -> str | None:
        if config not in self._refusals:
            self._refusals[config] = super().refuse(config)
        return self._refusals[config]

    def estimate(self, config: Config) -> float:
        if config not in self._known_estimates:
            self._known_estimates[config] = super().estimate(config)
        return self._known_estimates[config]

    def stand_in(self, config: Config) -> Config:
        """``config`` itself if it was recorded, is refused or is far behind; or the nearest."""
        if config not in self._stand_ins:
            self._stand_ins[config] = self._nearest(config)
        return self._stand_ins[config]

    def _nearest(self, config: Config) -> Config:
        recorded, points = self._grids[config.variant]
        if not recorded or config in self.recorded or self.refuse(config) is not None or self.is_far(config):
            return config
        steps = numpy.abs(points - numpy.array(self._point(config))).sum(axis=1)
        return recorded[int(steps.argmin())]

    def draw(self, chance: random.Random, near: Sequence[Config] = ()) -> Config:
        return self.stand_in(super().draw(chance, near))

    def moves(self, config: Config) -> Iterator[Config]:
        return map(self.stand_in, super().moves(config))

    def steps(self, config: Config) -> Iterator[Config]:
        return map(self.stand_in, super().steps(config))

    def all(self) -> Iterator[Config]:
        return map(self.stand_in, super().all())

    def is_far(self, config: Config) -> bool:
        """Whether the model puts ``config`` beyond :data:`WITHIN` times its best."""
        return self.estimate(config) > WITHIN * self.least_estimate

    def _point(self, config: Config) -> list[int]:
        values = {**dict(config.params), "num_warps": config.num_warps, "num_stages": config.num_stages}
        return [choices.index(values[name]) for name, choices in self.choices[config.variant].items()]


class ReplayEvaluator(Evaluator):
    """Answers with the times of recorded tables, each call with noise of its own.

    The noise depends on ``seed``, the spec, the config and how often it was asked for, so the order of the kernels does
    not matter. ``evaluated`` has what was asked for, in order. The environment names the seed, so that each seed has
    studies of its own.
    """

    provenance = MEASURED

    def __init__(self, tables: Iterable[SpecTable], gpu: Gpu, *, seed: int = 0) -> None:
        self.gpu = gpu
        self.tables = {table.spec: table for table in tables}
        self.seed = seed
        self.evaluated: list[tuple[KernelSpec, Config]] = []
        self._noise = short_noise(self.tables.values())

    def environment(self) -> Environment:
        name = f"replay of {self.gpu.name}, seed {self.seed}"
        return Environment(gpu=self.gpu.slug, architecture=self.gpu.architecture, triton="0.0", gpu_name=name)

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """The recorded time of a candidate, with the noise of a short measurement.

        Raises:
            Rejected: it was rejected when the table was recorded.
        """
        spec, config = source.spec, source.config
        self.evaluated.append((spec, config))
        chance = random.Random(f"{self.seed} {spec} {config} {self.evaluated.count((spec, config))}")
        noise = OUTLIER_NOISE if chance.random() < OUTLIERS else self._noise
        us = self.true_us(spec, config) * math.exp(chance.gauss(0.0, noise))
        return Evaluation(MEASURED, us=us, floor_us=floor_us(spec, self.gpu), samples_us=(us,))

    def true_us(self, spec: KernelSpec, config: Config) -> float:
        """The time of a config without noise; for one that is not in the table, :data:`WITHIN` times the best.

        Raises:
            Rejected: it was rejected when the table was recorded.
        """
        table = self.tables[spec]
        if config in table.rejected:
            raise Rejected(table.rejected[config])
        us = table.us(config)
        return WITHIN * table.best_us if us is None else us

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        """Time ``sources`` in turn, as :class:`~doratune.tuner.final.Rounds` does: each round drifts for all alike.

        Raises:
            ContenderFailed: one of them was rejected when the table was recorded.
        """
        times = [self._contender_us(place, source) for place, source in enumerate(sources)]
        silent = Machine(ask=lambda arguments: None)
        chance = random.Random(f"{self.seed} {sources[0].spec} {[str(source.config) for source in sources]}")
        rounds = Rounds(lambda count: _play(times, count, chance), silent, sleep=lambda seconds: None)
        return rounds.times(len(times), most_rounds(sum(times) * CALLS / 1e3))

    def _contender_us(self, place: int, source: Source) -> float:
        try:
            return self.true_us(source.spec, source.config)
        except Rejected as reason:
            raise ContenderFailed(place, reason) from reason


def _play(times: Sequence[float], count: int, chance: random.Random) -> list[list[float]]:
    """``count`` rounds of contenders that take ``times`` microseconds."""
    drifts = [chance.gauss(0.0, DRIFT) for _ in range(count)]
    return [[us * math.exp(drift + chance.gauss(0.0, ROUND_NOISE)) for drift in drifts] for us in times]


class ReplayPool:
    """Stands in for the compile pool: every compile is done at once, and ``compiled`` keeps the sources' code digests.

    A config is compiled once for all token buckets that share its code: ``compiled`` counts what a real run pays for.
    """

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.jobs = jobs or 1
        self.compiled: set[str] = set()

    def start(self) -> None:
        """There is nothing to start."""

    def submit(self, source: Source) -> Future[tuple[Resources, ...]]:
        self.compiled.add(source.code_digest)
        future: Future[tuple[Resources, ...]] = Future()
        future.set_result(_NOTHING)
        return future

    def binaries(self, source: Source) -> Future[tuple[Binary, ...]]:
        raise AssertionError("a replay makes no binaries")

    def wait(self, futures: Collection[Future[Any]], seconds: float = 0.0) -> None:
        """Wait until one of the futures is done, such as the turn of a search."""
        wait(futures, timeout=seconds or None, return_when=FIRST_COMPLETED)

    def kill(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """Nothing is kept."""


class ReplayStorage(optuna.storages.InMemoryStorage):
    """Keeps the studies of replays in memory, where no other worker needs to know that this one lives."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Do nothing."""


_NOTHING = (Resources("replayed", registers=0, spills=0, shared_bytes=0, num_warps=1),)


def short_noise(tables: Iterable[SpecTable]) -> float:
    """The standard deviation of a short measurement, as a share: from the configs that were measured both ways.

    Those were chosen since their short measurement was short, so the deviations are taken from their own median. With
    fewer than 20 such configs it is :data:`SHORT_NOISE`.
    """
    deviations: list[float] = []
    for table in tables:
        pairs = [timing for timing in table.times.values() if timing.kind == FINAL and timing.short_us is not None]
        ratios = [math.log((timing.short_us or timing.us) / timing.us) for timing in pairs]
        if len(ratios) > 2:
            middle = statistics.median(ratios)
            deviations += [abs(ratio - middle) for ratio in ratios]
    if len(deviations) < 20:
        return SHORT_NOISE
    return statistics.median(deviations) / 0.6745  # of a normal distribution
