"""Who plays in the final of a search, who wins, and what the entry says of it; several lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from doratune.cache.store import Store
from doratune.codegen.render import Source
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import default_config
from doratune.tuner import search
from doratune.tuner.effort import EFFORTS, STANDARD
from doratune.tuner.evaluation import (
    ContenderFailed,
    FinalTimes,
    GpuLostError,
    GpuMemoryError,
    Rejected,
    Undecided,
)
from doratune.tuner.incumbents import Incumbents, built_in
from doratune.tuner.search import FAILED, PARTIAL, TUNED, UNFINISHED, TuneResult
from doratune.tuner.space import Space

from .fakes import FORWARD, GPU, SPECS, FakeEvaluator, FakePool, forward_spec, steps_from

ONE = SPECS[:1]
Tune = Callable[..., TuneResult]


class Finalist(FakeEvaluator):
    """Trials cost ``cost``, the rounds of a final ``final_cost``; ``fail`` may raise for a source of a final."""

    def __init__(self, cost: Callable[[KernelSpec, Config], float]) -> None:
        super().__init__(cost)
        self.final_cost = cost
        self.fail: Callable[[Config], Exception | None] = lambda config: None

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        self.finals.append([source.config for source in sources])
        for place, source in enumerate(sources):
            error = self.fail(source.config)
            if isinstance(error, Rejected | GpuLostError):
                raise ContenderFailed(place, error)
            if error is not None:
                raise error
        times = [self.final_cost(source.spec, source.config) for source in sources]
        return FinalTimes(tuple((us,) * 8 for us in times), settled=True, notices=("clocks moved: a little",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.sqlite", create=True) as opened:
        yield opened


@pytest.fixture
def tune(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Tune:
    monkeypatch.setattr(search, "CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))

    def run(specs: list[KernelSpec], *evaluators: FakeEvaluator, **options: object) -> TuneResult:
        url = f"sqlite:///{tmp_path / 'studies.sqlite'}"
        return search.tune(specs, evaluators=evaluators, store=store, gpu=GPU, **{"study_storage": url, **options})

    return run


INCUMBENT = replace(FORWARD, num_warps=8)
"""Three doublings from the planted optimum: 6 % slower by :func:`steps_from`."""


def ran_before(config: Config) -> Callable[[KernelSpec], Incumbents]:
    def incumbents(spec: KernelSpec) -> Incumbents:
        found = built_in(spec, GPU)
        return replace(found, played=((config, "architecture"), *found.played), without=config)

    return incumbents


def test_a_config_that_is_faster_beyond_the_noise_wins_and_the_entry_says_whom_it_beat(
    tune: Tune, store: Store
) -> None:
    evaluator = Finalist(steps_from(FORWARD))
    tune(ONE, evaluator, incumbents=ran_before(INCUMBENT), effort=STANDARD)
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.final is not None
    assert entry.config == entry.final.winner.config
    beaten = {contender.config: contender for contender in entry.final.beaten}
    assert beaten[INCUMBENT].origins == ("architecture",)
    assert "default" in beaten[default_config(ONE[0], GPU)].origins
    assert entry.lookup_regret == pytest.approx(beaten[INCUMBENT].us / entry.final.winner.us)
    assert entry.final.notices == ("clocks moved: a little",)
    assert entry.evaluation.samples_us == entry.final.winner.samples_us
    assert evaluator.finals[0][0] == INCUMBENT, "what runs today plays first"


def test_a_tie_goes_to_the_incumbent_though_its_trial_was_slower(tune: Tune, store: Store) -> None:
    evaluator = Finalist(steps_from(FORWARD))
    evaluator.final_cost = lambda spec, config: 100.0 if config == INCUMBENT else 99.8
    tune(ONE, evaluator, incumbents=ran_before(INCUMBENT))
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.config == INCUMBENT
    assert entry.lookup_regret == 1.0
    assert entry.final is not None
    assert entry.final.margin < 0.0


def test_what_the_store_had_plays_before_what_a_lookup_gives(tune: Tune, store: Store) -> None:
    first = Finalist(steps_from(INCUMBENT))
    tune(ONE, first, incumbents=ran_before(INCUMBENT))
    assert store.get(ONE[0]) is not None
    second = Finalist(steps_from(FORWARD))
    tune(ONE, second, incumbents=ran_before(FORWARD), effort=EFFORTS["full"])
    assert second.finals[0][0] == INCUMBENT
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.final is not None
    assert "exact" in next(c.origins for c in entry.final.contenders if c.config == INCUMBENT)


def test_a_contender_that_fails_in_the_final_does_not_win(tune: Tune, store: Store) -> None:
    evaluator = Finalist(steps_from(FORWARD))
    tried: list[Config] = []

    def fail(config: Config) -> Exception | None:
        return Rejected("did not end within 20 s") if config.num_warps == FORWARD.num_warps else None

    evaluator.fail = fail
    tune(ONE, evaluator, incumbents=ran_before(INCUMBENT))
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.config.num_warps != FORWARD.num_warps
    tried = [config for played in evaluator.finals for config in played]
    assert any(config.num_warps == FORWARD.num_warps for config in tried), "one of them was among the best"


def test_if_every_contender_fails_none_of_them_wins(tune: Tune, store: Store) -> None:
    evaluator = Finalist(steps_from(FORWARD))
    evaluator.fail = lambda config: Rejected("did not end within 20 s")
    tune(ONE, evaluator)
    entry = store.get(ONE[0])
    assert entry is None or entry.config not in evaluator.finals[0]
    one = Finalist(steps_from(FORWARD))
    one.fail = evaluator.fail
    result = tune(SPECS[1:2], one, trials=1)
    assert result.rows[0].outcome == FAILED
    assert "failed in the final: did not end within 20 s" in result.rows[0].note
    assert store.get(SPECS[1]) is None


def test_a_final_that_cannot_be_played_leaves_the_search_open_and_the_incumbent_in_doubt(
    tune: Tune, store: Store
) -> None:
    near = replace(FORWARD, num_warps=2)  # 2 % slower: too near for single timings
    evaluator = Finalist(steps_from(FORWARD))
    evaluator.fail = lambda config: GpuMemoryError("the free memory does not hold the tensors")
    result = tune(ONE, evaluator, incumbents=ran_before(near))
    assert result.fault == ""
    assert result.rows[0].outcome == PARTIAL
    assert "the final could not be played" in result.rows[0].note
    entry = store.get(ONE[0])
    assert entry is not None
    assert (entry.config, entry.final, entry.lookup_regret) == (near, None, None)


def test_configs_that_a_trial_shows_to_be_far_behind_do_not_play_but_incumbents_do(tune: Tune) -> None:
    far = replace(FORWARD, num_warps=8, params=(("block_n", 1024), ("block_t", 16)))
    evaluator = Finalist(steps_from(FORWARD))
    tune(ONE, evaluator, incumbents=ran_before(far))
    (played,) = evaluator.finals
    best = min(evaluator.cost(ONE[0], config) for config in played)
    incumbents = {far, default_config(ONE[0], GPU)}
    assert incumbents <= set(played)
    assert all(evaluator.cost(ONE[0], config) <= 1.03 * best for config in played if config not in incumbents)


def test_an_incumbent_outside_the_search_space_plays(tune: Tune, store: Store) -> None:
    outside = replace(FORWARD, num_stages=3)
    assert outside not in Space(ONE[0], GPU)
    evaluator = Finalist(steps_from(outside))
    for _ in range(2):  # the second run reads the first one's trials
        result = tune(ONE, evaluator, incumbents=ran_before(outside), effort=EFFORTS["quick"])
        entry = store.get(ONE[0])
        assert entry is not None
        assert entry.config == outside
        store.remove(ONE[0])
    assert result.rows[0].outcome == TUNED


def test_two_lanes_share_the_families_and_each_measures_a_kernel_as_a_whole(tune: Tune) -> None:
    meet = threading.Barrier(2, timeout=20)

    class Lane(Finalist):
        def evaluate(self, source: Source, compiled: object) -> object:  # type: ignore[override]
            if not self.evaluated:
                meet.wait()  # both lanes work at the same time
            return super().evaluate(source, compiled)  # type: ignore[arg-type]

    specs = [forward_spec(4096, d_out) for d_out in (1024, 2048, 4096, 8192)]
    lanes = [Lane(steps_from(FORWARD)), Lane(steps_from(FORWARD))]
    result = tune(specs, *lanes, trials=8)
    assert [row.outcome for row in result.rows] == [TUNED] * 4
    measured = [{spec for spec, _ in lane.evaluated} for lane in lanes]
    assert measured[0] & measured[1] == set()
    assert measured[0] | measured[1] == set(specs)
    assert all(lane.closed for lane in lanes)


def test_a_lane_whose_gpu_is_lost_leaves_its_kernels_to_the_other(tune: Tune) -> None:
    def lost(spec: KernelSpec, config: Config) -> float:
        raise GpuLostError("the GPU does not answer")

    specs = [forward_spec(4096, d_out) for d_out in (1024, 2048, 4096, 8192)]
    sound = Finalist(steps_from(FORWARD))
    result = tune(specs, Finalist(lost), sound, trials=8)
    assert result.fault == ""
    outcomes = [row.outcome for row in result.rows]
    assert outcomes.count(FAILED) <= 1, "the kernel under evaluation when the GPU was lost is left to the next run"
    assert outcomes.count(TUNED) >= 3


def test_without_any_lane_left_the_run_ends_with_the_reason(tune: Tune) -> None:
    def lost(spec: KernelSpec, config: Config) -> float:
        raise GpuLostError("the GPU does not answer")

    result = tune(SPECS, Finalist(lost), Finalist(lost))
    assert "the GPU does not answer" in result.fault


def test_the_time_limit_still_lets_the_finals_be_played(tune: Tune, store: Store) -> None:
    evaluator = Finalist(steps_from(FORWARD))
    evaluator.pause = 0.05
    result = tune(ONE, evaluator, timeout=1.5, trials=400, effort=EFFORTS["full"])
    assert result.stopped == "timeout"
    assert result.rows[0].outcome == PARTIAL
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.final is not None


def test_incumbents_play_though_the_study_is_full_already(tune: Tune, store: Store) -> None:
    tune(ONE, Finalist(steps_from(INCUMBENT)), trials=6)
    store.remove(ONE[0])  # as with another store: the study has its six trials
    again = Finalist(steps_from(FORWARD))
    result = tune(ONE, again, trials=6, incumbents=ran_before(FORWARD))
    assert FORWARD in [config for _, config in again.evaluated]
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config == FORWARD


def test_an_incumbent_that_could_not_be_judged_is_not_replaced(tune: Tune, store: Store) -> None:
    tune(ONE, Finalist(steps_from(INCUMBENT)), incumbents=ran_before(INCUMBENT), effort=EFFORTS["quick"])
    before = store.get(ONE[0])
    assert before is not None
    assert before.config == INCUMBENT

    def cost(spec: KernelSpec, config: Config) -> float:
        if config == INCUMBENT:
            raise Undecided("killed from outside")
        return steps_from(INCUMBENT)(spec, config)

    # A new study: the incumbent has no trial there.
    second = Finalist(cost)
    result = tune(ONE, second, study_storage="sqlite:///" + str(Path(store.location).with_name("other.sqlite")))
    assert result.rows[0].outcome == UNFINISHED
    assert "what runs today could not be judged: killed from outside" in result.rows[0].note
    assert store.get(ONE[0]) == before


def test_a_kernel_under_evaluation_when_its_gpu_is_lost_is_tuned_on_the_other(tune: Tune) -> None:
    seen: list[Config] = []

    def lost(spec: KernelSpec, config: Config) -> float:
        seen.append(config)
        raise GpuLostError("the GPU does not answer")

    result = tune(SPECS, Finalist(lost), Finalist(steps_from(FORWARD)), trials=8)  # one family of three buckets
    assert len(seen) == 1
    assert result.fault == ""
    assert [row.outcome for row in result.rows][1:] == [TUNED, TUNED]


def test_an_incumbent_that_could_not_be_judged_is_tried_once_more(tune: Tune, store: Store) -> None:
    failures = iter([Undecided("killed from outside")])

    def cost(spec: KernelSpec, config: Config) -> float:
        error = next(failures, None) if config == INCUMBENT else None
        if error is not None:
            raise error
        return steps_from(INCUMBENT)(spec, config)

    result = tune(ONE, Finalist(cost), incumbents=ran_before(INCUMBENT))
    assert result.rows[0].outcome == TUNED
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config == INCUMBENT


def test_a_built_in_default_that_cannot_be_judged_hinders_nothing(tune: Tune) -> None:
    default = default_config(ONE[0], GPU)

    def cost(spec: KernelSpec, config: Config) -> float:
        if config == default:
            raise Undecided("out of memory")
        return steps_from(FORWARD)(spec, config)

    assert tune(ONE, Finalist(cost)).rows[0].outcome == TUNED


def test_a_kernel_that_cannot_be_judged_costs_no_lane(tune: Tune) -> None:
    poison = forward_spec(4096, 1024)

    def cost(spec: KernelSpec, config: Config) -> float:
        if spec == poison:
            raise Undecided("killed from outside")
        return steps_from(FORWARD)(spec, config)

    specs = [poison, *(forward_spec(4096, d_out) for d_out in (2048, 4096, 8192))]
    result = tune(specs, Finalist(cost), Finalist(cost), trials=8)
    assert result.fault == ""
    assert [row.outcome for row in result.rows] == [FAILED, TUNED, TUNED, TUNED]
    assert "killed from outside" in result.rows[0].note
