"""What a search counts and says: its trials, what was rejected and why, its finals' gains, no flood of notices."""

from __future__ import annotations

import io
import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doratune.cache.entry import Binary, Evaluation
from doratune.cache.store import Store
from doratune.codegen.compile import CompileError
from doratune.codegen.render import Source
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config
from doratune.errors import DoratuneError
from doratune.tuner import search
from doratune.tuner.evaluation import FinalTimes, Rejected, Resources, Undecided
from doratune.tuner.gain import gains_of
from doratune.tuner.incumbents import Incumbents
from doratune.tuner.outcome import FAILED, KEPT, TUNED, TuneResult
from doratune.tuner.progress import LineProgress, SilentProgress
from doratune.tuner.report import closing_lines
from doratune.tuner.space import Space

from .fakes import FORWARD, GPU, SPECS, TRIALS, FakeEvaluator, FakePool, forward_spec, steps_from

ONE = SPECS[:1]
SLOW = max(Space(ONE[0], GPU).seeds, key=lambda config: steps_from(FORWARD)(ONE[0], config))

Tune = Callable[..., TuneResult]


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
        options = {"study_storage": url, "trials": TRIALS, **options}
        return search.tune(specs, evaluators=evaluators, store=store, gpu=GPU, **options)  # type: ignore[arg-type]

    return run


class Judging(FakeEvaluator):
    """Raises ``verdicts`` for the configs it meets in these places, counted from 0; its finals have ``notices``."""

    def __init__(self, verdicts: dict[int, DoratuneError] | None = None, notices: tuple[str, ...] = ()) -> None:
        super().__init__(steps_from(FORWARD))
        self.verdicts = verdicts or {}
        self.notices = notices

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        evaluation = super().evaluate(source, compiled)
        if len(self.evaluated) - 1 in self.verdicts:
            raise self.verdicts[len(self.evaluated) - 1]
        return evaluation

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        return replace(super().final(sources), notices=self.notices)


# Counts.


def test_a_run_counts_its_trials_and_why_configs_were_rejected(tune: Tune) -> None:
    evaluator = Judging(
        {
            1: Rejected("inaccurate: y is off by 0.3 where 0.1 is allowed"),
            3: Rejected("did not end within 20 s"),
            6: Rejected("inaccurate: y is off by 0.2 where 0.1 is allowed"),
            8: Undecided("the process that measures was ended by SIGKILL, also when it was repeated"),
        }
    )
    result = tune(SPECS, evaluator)
    assert result.count(TUNED) == 3
    assert result.trials == len(evaluator.evaluated)
    assert dict(result.rejected) == {"inaccurate": 2, "did not end": 1}
    assert dict(result.undecided) == {"the process that measures ended": 1}
    assert f"rejected: 3 of {result.trials} configs: 2 inaccurate, 1 did not end" in closing_lines(result)


def test_what_the_compiler_rejects_counts_too(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Space(ONE[0], GPU).seeds[1]
    error = CompileError("does not compile: arange's range must be a power of 2")
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: error if config == bad else None))
    assert dict(tune(ONE, Judging()).rejected) == {"does not compile": 1}


def test_a_kernel_that_failed_is_counted_with_its_reasons(tune: Tune) -> None:
    evaluator = Judging(dict.fromkeys(range(100), Rejected("inaccurate: all of it")))
    result = tune(ONE, evaluator)
    assert result.count(FAILED) == 1
    assert dict(result.rejected) == {"inaccurate": len(evaluator.evaluated)}


def test_a_second_run_counts_only_what_it_did_itself(tune: Tune) -> None:
    tune(ONE, Judging({1: Rejected("inaccurate: y")}))
    second = tune(ONE, Judging())
    assert second.count(KEPT) == 1
    assert (second.trials, dict(second.rejected)) == (0, {})
    more = Judging()
    third = tune(ONE, more, trials=4 * TRIALS)
    assert third.trials == len(more.evaluated) > 0
    assert dict(third.rejected) == {}


def test_a_run_that_is_cut_short_counts_what_it_tried(tune: Tune) -> None:
    class Interrupted(Judging):
        def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
            if len(self.evaluated) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().evaluate(source, compiled)

    evaluator = Interrupted({0: Rejected("inaccurate: y")})
    result = tune(ONE, evaluator)
    assert (result.stopped, dict(result.rejected)) == ("interrupt", {"inaccurate": 1})
    # The signal reaches the main thread a little later: another trial may have begun.
    assert 3 <= result.trials == len(evaluator.evaluated) < TRIALS


# Gains.


def test_the_gain_is_the_time_of_what_ran_before_over_the_winners(tune: Tune) -> None:
    def incumbents(spec: KernelSpec) -> Incumbents:
        default = default_config(spec, GPU)
        return Incumbents(played=((SLOW, "nearest"), (default, "default")), without=SLOW)

    evaluator = Judging()
    result = tune(ONE, evaluator, incumbents=incumbents)
    (entry,) = result.tuned
    gains = gains_of(result.tuned)
    (gained,) = gains.moved
    assert (gained.before.config, gained.before.origins) == (SLOW, ("nearest",))
    assert gained.gain == pytest.approx(evaluator.cost(ONE[0], SLOW) / evaluator.cost(ONE[0], entry.config))
    assert gained.gain > 1.05


def test_a_kernel_whose_incumbent_wins_stays(tune: Tune) -> None:
    result = tune(ONE, Judging(), incumbents=lambda spec: Incumbents(played=((FORWARD, "exact"),), without=FORWARD))
    gains = gains_of(result.tuned)
    assert (gains.stayed, gains.median, gains.unknown) == (1, 1.0, 0)
    assert closing_lines(result)[1] == "gains: 1 of 1 kernels stayed with what ran before, median gain 0.0 %"


# While it runs.

MOVED = "clocks moved: calls took 3.0% longer at the end than at first, the GPU is slowed by the power limit"


def test_notices_of_many_finals_are_one_line_a_kind_and_a_count_at_the_end(tune: Tune) -> None:
    stream = io.StringIO()
    result = tune(SPECS, Judging(notices=(MOVED, MOVED, "still so after 2 repetitions")), progress=LineProgress(stream))
    told = [line for line in stream.getvalue().splitlines() if "clocks moved" in line]
    assert len(told) == 1
    assert told[0].endswith(f"in the final, {MOVED}; still so after 2 repetitions")
    assert "clocks moved in 3 finals; `doratune cache show SPEC` says more" in closing_lines(result)


class Heard(SilentProgress):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.began: tuple[int, int, int] | None = None
        self.calls: list[tuple[KernelSpec, int, float | None, float | None]] = []
        self.finished: Counter[str] = Counter()
        self.queued: list[int] = []

    def start(self, total: int, kept: int, lanes: int = 1) -> None:
        self.began = total, kept, lanes

    def current(
        self,
        spec: KernelSpec,
        trials: int,
        budget: int,
        best_us: float | None,
        floor_us: float,
        incumbent_us: float | None = None,
    ) -> None:
        self.calls.append((spec, trials, best_us, incumbent_us))

    def queue(self, compiling: int) -> None:
        self.queued.append(compiling)

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        self.finished[outcome] += 1


def test_a_run_says_how_many_kernels_and_gpus_it_has_and_each_trial(tune: Tune) -> None:
    tune(ONE, Judging())
    heard, evaluators = Heard(), (Judging(), Judging())
    specs = [*ONE, *(forward_spec(4096, d_out) for d_out in (512, 1024))]
    result = tune(specs, *evaluators, progress=heard)
    assert heard.began == (3, 1, 2)
    assert heard.finished == {TUNED: 2}
    for spec in specs[1:]:
        trials = [count for each, count, _, _ in heard.calls if each == spec]
        assert trials == list(range(max(trials) + 1)), "the first call comes before the first trial"
    assert result.trials == sum(len(evaluator.evaluated) for evaluator in evaluators)
    default = {spec: evaluators[0].cost(spec, default_config(spec, GPU)) for spec in specs}
    assert all(incumbent == default[spec] for spec, trials, _, incumbent in heard.calls if trials)


class SlowPool(FakePool):
    """A pool whose jobs are done, one at a time, only while they are waited for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.under_way: dict[Future[Any], Future[Any]] = {}

    def submit(self, source: Source) -> Future[tuple[Resources, ...]]:
        return self._later(super().submit(source))

    def binaries(self, source: Source) -> Future[tuple[Binary, ...]]:
        return self._later(super().binaries(source))

    def _later(self, made: Future[Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.under_way[future] = made
        return future

    def wait(self, futures: Collection[Future[Any]], seconds: float = 0.0) -> None:
        first = next((future for future in futures if future in self.under_way), None)
        if first is not None:
            first.set_result(self.under_way.pop(first).result())
        else:
            super().wait(futures, seconds)


@pytest.mark.parametrize("binaries", [False, True])
def test_a_run_says_how_many_compiles_it_waits_for(tune: Tune, monkeypatch: pytest.MonkeyPatch, binaries: bool) -> None:
    monkeypatch.setattr(search, "CompilePool", SlowPool)
    heard = Heard()
    assert tune(ONE, Judging(), progress=heard, binaries=binaries).count(TUNED) == 1
    seeds = len(Space(ONE[0], GPU).seeds)
    assert max(heard.queued) >= min(seeds, 4)
    falls = [after for before, after in itertools.pairwise(heard.queued) if after == before - 1]
    assert len(falls) > 3, "each compile that ends is one less"
    assert (heard.queued[-1] == 1) == binaries, "the last one is the winner's binary"
