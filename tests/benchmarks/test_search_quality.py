"""A standard search finds a config within 1 % of the best of the recorded tables nineteen times in twenty, and never
one 3 % behind; a search that is broken misses that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import optuna
import pytest

from doratune.benchmarks.tables import search_quality
from doratune.benchmarks.tables.read import FINAL, SHORT, SpecTable, Timing, read_tables, recorded
from doratune.benchmarks.tables.replay import WITHIN, ReplayEvaluator, ReplaySpace
from doratune.benchmarks.tables.search_quality import (
    SAMPLERS,
    Searched,
    Searches,
    find_sampler,
    interval,
    share_near,
    shortfalls,
)
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import Config, KernelSpec
from doratune.errors import UsageError
from doratune.tuner.evaluation import ContenderFailed, Rejected
from doratune.tuner.sampler import ModelSampler
from doratune.tuner.space import Space

GPU = find_gpu("h100-sxm")
SPEC = KernelSpec.create("compose_forward", d_out=4096, tokens=4096, dtype="bf16", gpu=GPU.slug)
HARD = ("dora_linear_forward", "weight_norm")
"""Operations whose seeds alone, or the built-in config and a search without them, are not good enough."""


def tile(block_t: int, block_n: int = 256, num_warps: int = 4) -> Config:
    return Config.create("tile", block_t=block_t, block_n=block_n, num_warps=num_warps, num_stages=2)


def planted() -> SpecTable:
    """A table in which every power of two that ``block_t`` is off 8 costs 20 %."""
    space = Space(SPEC, GPU)
    valid = [config for config in space.all() if space.refuse(config) is None]
    times = {config: 1000.0 * 1.2 ** abs(config["block_t"].bit_length() - 4) for config in valid}
    kinds = {config: FINAL if us == 1000.0 else SHORT for config, us in times.items()}
    return SpecTable(SPEC, {config: Timing(us, kinds[config]) for config, us in times.items()})


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100-sxm"])  # others' tables hold too few configs for a search
def test_standard_searches_meet_the_target(gpu: str) -> None:
    searched = [one for table in read_tables(gpu) for one in Searches(table).run(seed=0)]
    assert len(searched) >= 8 * 12
    assert shortfalls([one.regret for one in searched]) == []


class Backwards(ModelSampler):
    """A sampler with its sign wrong."""

    def _most_promising(self, left: Sequence[Config], *past: object) -> Config:
        return max(left, key=lambda config: (self._estimates[config], str(config)))


@pytest.mark.slow
def test_a_broken_sampler_misses_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "backwards", Backwards)
    (gpu, *_) = recorded()
    tables = [table for table in read_tables(gpu) if table.op in HARD]
    regrets = {
        name: [one.regret for table in tables for one in Searches(table).run(seed=0, sampler=name)]
        for name in ("model", "backwards")
    }
    assert share_near(regrets["backwards"]) < share_near(regrets["model"])
    assert shortfalls(regrets["backwards"])


@pytest.mark.slow
def test_a_search_without_its_seeds_misses_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seedless(ReplaySpace):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.seeds = ()

    monkeypatch.setattr(search_quality, "ReplaySpace", Seedless)
    (gpu, *_) = recorded()
    tables = [table for table in read_tables(gpu) if table.op in HARD]
    assert shortfalls([one.regret for table in tables for one in Searches(table).run(seed=0)])


def test_the_target_counts_every_winner() -> None:
    assert shortfalls([1.0] * 95 + [1.02] * 5) == []
    (complaint,) = shortfalls([1.0] * 94 + [1.02] * 6)
    assert complaint == "94.0% of the winners are within 1.01, fewer than 95%"
    (complaint,) = shortfalls([1.0] * 99 + [1.04])
    assert complaint == "the worst winner takes 1.040 of the best, over 1.03"


def test_a_search_finds_the_planted_optimum_and_equal_seeds_give_equal_searches() -> None:
    searches = Searches([planted()])
    (first,) = searches.run(seed=1)
    assert first.regret == 1.0
    assert first.until is not None
    assert first.until <= first.evaluated
    assert searches.run(seed=1) == [first]
    others = [searches.run(seed=seed, sampler="random")[0] for seed in range(2, 6)]
    assert len({(one.evaluated, one.until, one.seen) for one in others}) > 1


def test_noise_depends_on_the_seed_and_the_call_and_not_on_what_else_was_asked() -> None:
    table, source = planted(), render(SPEC, tile(8))

    def times(seed: int, calls: int) -> list[float | None]:
        evaluator = ReplayEvaluator([table], GPU, seed=seed)
        return [evaluator.evaluate(source, ()).us for _ in range(calls)]

    assert times(1, 2) == times(1, 2)
    assert len({*times(1, 3), *times(2, 3)}) == 6
    evaluator = ReplayEvaluator([table], GPU, seed=1)
    evaluator.evaluate(render(SPEC, tile(4)), ())
    assert evaluator.evaluate(source, ()).us == times(1, 1)[0]


def test_what_was_rejected_on_the_gpu_is_rejected_again() -> None:
    bad = tile(16)
    table = SpecTable(SPEC, {tile(8): Timing(10.0, FINAL)}, {bad: "inaccurate: y is off"})
    evaluator = ReplayEvaluator([table], GPU)
    with pytest.raises(Rejected, match="inaccurate: y is off"):
        evaluator.evaluate(render(SPEC, bad), ())
    with pytest.raises(ContenderFailed, match="inaccurate") as caught:
        evaluator.final([render(SPEC, tile(8)), render(SPEC, bad)])
    assert caught.value.index == 1


def test_a_final_orders_contenders_by_their_recorded_times() -> None:
    evaluator = ReplayEvaluator([planted()], GPU, seed=3)
    times = evaluator.final([render(SPEC, tile(4)), render(SPEC, tile(8)), render(SPEC, tile(16))])
    assert times.settled
    slow, fast, other = (sum(samples) for samples in times.samples_us)
    assert fast < min(slow, other)


def test_what_was_left_out_as_far_behind_costs_a_trial_and_other_gaps_stand_for_their_neighbour() -> None:
    recorded_configs = [tile(4, 512), tile(16, 128)]
    table = SpecTable(SPEC, {config: Timing(10.0, FINAL) for config in recorded_configs})
    space = ReplaySpace(table, GPU)
    near = tile(4, 1024)
    assert not space.is_far(near)
    assert space.stand_in(near) == tile(4, 512)
    far = next(config for config in Space(SPEC, GPU).all() if space.refuse(config) is None and space.is_far(config))
    assert space.stand_in(far) == far
    us = ReplayEvaluator([table], GPU).true_us(SPEC, far)
    assert us == WITHIN * table.best_us


def test_an_interval_covers_its_figure_and_resamples_whole_groups() -> None:
    chance = random.Random(0)
    groups = [[float(chance.random() < 0.9)] * 30 for _ in range(40)]
    flat = [value for group in groups for value in group]
    mean = sum(flat) / len(flat)
    low, high = interval(groups, lambda values: sum(values) / len(values))
    alone_low, alone_high = interval([[value] for value in flat], lambda values: sum(values) / len(values))
    assert low <= mean <= high
    assert high - low > 2.0 * (alone_high - alone_low)


@pytest.mark.parametrize("name", ["model", "tpe", "random"])
def test_each_sampler_searches(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (one,) = Searches([planted()]).run(seed=0, sampler=name)
    assert isinstance(one, Searched)
    assert one.regret == 1.0


def test_an_unknown_sampler_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"unknown sampler 'tp'; did you mean tpe.*known: model, tpe"):
        find_sampler("tp")
