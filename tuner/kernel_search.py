"""The search of one kernel: what is tried, which configs play in the final, and what the entry says.

A search is *trying* until its study says that it may stop. Then the best configs and all incumbents are timed in turn,
the *final*, and the search is *over*. Its owner changes: the run's main thread starts compiles
(:meth:`~KernelSearch.fill`, :meth:`~KernelSearch.begin_final`), a lane's thread then takes a turn
(:meth:`~KernelSearch.turn`), one candidate after another, and gives it back. Only the owner touches it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

from ..cache.entry import MEASURED, SEARCH, Contender, Entry, Environment, Evaluation, Final
from ..codegen.compile import CompileError, ToolchainError, judge_failure
from ..codegen.render import Source, render, template_digest
from ..codegen.spec import Config, KernelSpec
from ..errors import DoratuneError
from .effort import Budget, Effort
from .evaluation import (
    BROKEN,
    ContenderFailed,
    Evaluator,
    FinalTimes,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    Undecided,
)
from .final import decide
from .incumbents import Incumbents
from .studies import Candidate, KernelStudy
from .workers import Compiled, CompilePool

TRYING, FINAL, OVER = "trying", "final", "over"

FAR = 1.025
"""Configs that a trial shows to be slower than this many times the best do not play in the final: a single timing is
off by less, but for very short kernels."""

BEHIND = 1.25
"""A candidate whose estimate is more than this many times the best one so far is not compiled."""

IN_A_ROW = 3
"""After this many candidates in a row that cannot be judged a lane ends; if their tensors do not fit the GPU's memory,
only the search of that kernel."""

UNSURE = 0.02
"""Where no final is played, a measured config must be faster than the incumbents by this share of the time: single
timings differ by as much."""

T = TypeVar("T")

_VERDICTS = (Rejected, CompileError)
"""The failures that are a property of the config: trying it again would give the same."""


@dataclass
class KernelSearch:
    """A search under way.

    Attributes:
        study: its trials.
        budget: when it may stop.
        first: configs to try before the sampler is asked.
        batch: candidates that are being compiled or wait for their evaluation.
        final: the outcome of the final, None before it and where none is played.
        given_up: why the search cannot go on in this run, if so.
        broken: why nothing can be judged any more on this lane, if so.
        failed: the configs that failed in the final, with the reason. They do not win.
        retried: whether incumbents that could not be judged were tried again.
        trials_here: how many configs this run has tried.
        rejected_here: why each of those that are rejected is out.
        compiled: the configs that the run has compiled for this kernel or another token bucket of its shape.
    """

    study: KernelStudy
    incumbents: Incumbents
    budget: Budget
    effort: Effort
    first: Iterator[Config]
    screen: Callable[[KernelSpec, Config], float | None]
    best_estimate: float = float("inf")
    stage: str = TRYING
    batch: list[tuple[Candidate, Source, Future[Compiled]]] = field(default_factory=list)
    finalists: list[tuple[Config, Source, Future[Compiled]]] = field(default_factory=list)
    final: Final | None = None
    given_up: str = ""
    broken: str = ""
    failed: dict[Config, str] = field(default_factory=dict)
    retried: bool = False
    trials_here: int = 0
    rejected_here: list[str] = field(default_factory=list)
    compiled: set[Config] = field(default_factory=set)

    @property
    def spec(self) -> KernelSpec:
        return self.study.space.spec

    @property
    def waiting(self) -> list[Future[Compiled]]:
        """The compiles that the next turn waits for: that of the first candidate, or those of all finalists."""
        jobs = [future for _, _, future in (self.batch[:1] if self.stage == TRYING else self.finalists)]
        return [future for future in jobs if not future.done()]

    @property
    def compiling(self) -> int:
        """How many of its compiles are not done yet."""
        return sum(not future.done() for _, _, future in (*self.batch, *self.finalists))

    @property
    def best_us(self) -> float | None:
        return self.study.best[1].us if self.study.best else None

    @property
    def incumbent_us(self) -> float | None:
        """The time of the first incumbent that a trial has timed: what runs today, in most cases."""
        timed = (self.study.evaluated.get(config) for config in self.incumbents.configs)
        return next((evaluation.us for evaluation in timed if evaluation is not None), None)

    def fill(self, pool: CompilePool, count: int) -> bool:
        """Start compiling the next candidates; return whether there are any.

        The incumbents come first, whatever the budget: without them no final says what may be replaced. Then at most
        ``count`` at once, within the budget.
        """
        study = self.study
        for config in self.incumbents.configs:
            self._submit(study.propose(config), pool)
        room = min(count, self.budget.trials - len(study.evaluated))
        while len(self.batch) < room and study.stop(self.budget) is None:
            known = next(self.first, None)
            self._submit(study.propose(known) if known is not None else study.ask(self._behind), pool)
        return bool(self.batch)

    def _submit(self, candidate: Candidate | None, pool: CompilePool) -> None:
        if candidate is not None:
            source = render(self.spec, candidate.config)
            self.batch.append((candidate, source, pool.submit(source)))
            self.compiled.add(candidate.config)

    def _behind(self, config: Config) -> float | None:
        """The estimate for a config that is not worth a compile, or None."""
        us = self.screen(self.spec, config)
        if us is None:
            return None
        self.best_estimate = min(self.best_estimate, us)
        return us if us > BEHIND * self.best_estimate else None

    def begin_final(self, pool: CompilePool) -> None:
        """Choose who plays, and make sure that it is compiled: an earlier process may have timed it."""
        self.stage = FINAL
        self.finalists.clear()
        timed = self._timed()
        incumbents = [config for config in self.incumbents.configs if config in timed]
        limit = FAR * min(timed.values(), default=0.0)
        ranked = sorted((us, str(config), config) for config, us in timed.items() if us <= limit)
        challengers = [config for _, _, config in ranked if config not in incumbents][: self.effort.finalists]
        for config in (*incumbents, *challengers):
            source = render(self.spec, config)
            self.finalists.append((config, source, pool.submit(source)))

    def turn(self, lane: Lane, stopping: Callable[[], bool]) -> None:
        """Evaluate the compiled batch, or play the final, on a lane."""
        began, stage = time.monotonic(), self.stage
        try:
            if self.stage == TRYING:
                self._evaluate_batch(lane, stopping)
            elif not stopping():
                self._play(lane)
        except BROKEN as failure:
            self.broken = str(failure)
        finally:
            lane.busy_seconds[stage] += time.monotonic() - began

    def _evaluate_batch(self, lane: Lane, stopping: Callable[[], bool]) -> None:
        while self.batch and self.batch[0][2].done() and not stopping():
            candidate, source, future = self.batch.pop(0)
            try:
                evaluation = lane.evaluator.evaluate(source, future.result())
            except Exception as error:
                failure = error if isinstance(error, DoratuneError) else judge_failure(error, f"{source.spec} fails")
                if isinstance(failure, LaunchFailureError) and self.study.suspect(candidate):
                    failure = Rejected(f"{failure}; the same happened in an earlier run")
                if isinstance(failure, _VERDICTS):
                    self.study.reject(candidate, str(failure))
                    self.rejected_here.append(str(failure))
                    lane.undecided_in_a_row = 0
                elif not self._set_aside(lane, candidate, failure):
                    return
            else:
                self.study.accept(candidate, evaluation)
                lane.undecided_in_a_row = lane.given_up_in_a_row = 0
            self.trials_here += 1
            lane.show(self)

    def _set_aside(self, lane: Lane, candidate: Candidate, failure: DoratuneError) -> bool:
        """Leave a candidate that could not be judged to the next run; return whether the search continues now."""
        self.study.set_aside(candidate, str(failure))
        lane.undecided_in_a_row += 1
        if not isinstance(failure, BROKEN) and lane.undecided_in_a_row < IN_A_ROW:
            return True
        lane.undecided_in_a_row = 0
        if isinstance(failure, BROKEN):
            self.broken = str(failure)
            return False
        self.given_up = str(failure)
        if not isinstance(failure, GpuMemoryError):  # that kernel, or the lane: the next kernel shows it
            lane.given_up_in_a_row += 1
            if lane.given_up_in_a_row >= lane.patience:
                self.broken = str(failure)
        return False

    @property
    def doubt(self) -> str:
        """Why an incumbent from a store could not be judged, so that nothing may take its place; empty if all were.

        The built-in default is replaced all the same: then what was measured is better.
        """
        undecided, stored = (
            self.study.undecided,
            (config for config, step in self.incumbents.played if step != "default"),
        )
        return next((undecided[config] for config in stored if config in undecided), "")

    def retry_incumbents(self) -> bool:
        """Let incumbents that could not be judged be tried once more; return whether there are any."""
        again = [config for config in self.incumbents.configs if config in self.study.undecided]
        if self.retried or not again:
            return False
        self.retried = True
        for config in again:
            self.study.retry(config)
        return True

    def _play(self, lane: Lane) -> None:
        """Play the final. A contender that fails is out, and the others play again."""
        contenders = [(config, source) for config, source, future in self.finalists if not _failed(future)]
        while contenders:
            try:
                times = lane.evaluator.final([source for _, source in contenders])
            except ContenderFailed as failed:
                if isinstance(failed.cause, BROKEN):
                    raise failed.cause from failed
                config, _ = contenders.pop(failed.index)
                self.failed[config] = str(failed.cause)
                continue
            except (Undecided, ToolchainError) as failure:
                if isinstance(failure, BROKEN):
                    raise
                self.given_up = f"the final could not be played: {failure}"
                return
            if times is not None:
                self.final = self._decided([config for config, _ in contenders], times)
            break
        self.stage = OVER

    def _decided(self, configs: Sequence[Config], times: FinalTimes) -> Final:
        contenders = []
        for config, samples in zip(configs, times.samples_us, strict=True):
            origins = self.incumbents.origins(config)
            contenders.append(Contender(config, origins or (SEARCH,), samples))
        contenders.sort(key=lambda contender: not contender.incumbent)  # stable: incumbents first
        return decide(contenders, settled=times.settled, notices=times.notices)

    def winner(self) -> tuple[Config, Evaluation] | None:
        """The winner and its evaluation, None if no config runs."""
        if self.final is not None:
            config = self.final.winner.config
            timed = self.study.evaluated[config]
            assert timed is not None
            samples = self.final.winner.samples_us
            return config, replace(timed, us=statistics.median(samples), samples_us=samples)
        timed_us = {config: us for config, us in self._timed().items() if config not in self.failed}
        if not timed_us:
            return None
        best = min(timed_us, key=timed_us.__getitem__)  # the earlier one among equals
        timed = self.study.evaluated[best]
        if timed is not None and timed.provenance == MEASURED:
            limit = (1.0 + UNSURE) * timed_us[best]
            best = next(
                (config for config in self.incumbents.configs if timed_us.get(config, limit + 1.0) <= limit), best
            )
        evaluation = self.study.evaluated[best]
        return None if evaluation is None else (best, evaluation)

    def lookup_regret(self, winner: Config) -> float | None:
        """The time of what a lookup without the new entry gives, over the winner's, from the final."""
        if self.final is None:
            return None
        if self.incumbents.without == winner:
            return 1.0
        times = {contender.config: contender.us for contender in self.final.contenders}
        without = times.get(self.incumbents.without)
        return None if without is None else max(1.0, without / times[winner])

    def entry(self, environment: Environment) -> Entry | None:
        """The winner's entry, None if no config runs."""
        found = self.winner()
        if found is None:
            return None
        config, evaluation = found
        source = render(self.spec, config)
        return Entry(
            spec=self.spec,
            config=config,
            template_digest=template_digest(self.spec.op, config.variant),
            source_digest=source.digest,
            source=source.text,
            evaluation=replace(evaluation, trials=len(self.study.evaluated)),
            environment=environment,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            final=self.final,
            lookup_regret=self.lookup_regret(config),
        )

    def _timed(self) -> dict[Config, float]:
        """The microseconds of each config that runs."""
        found = {config: evaluation.us for config, evaluation in self.study.evaluated.items() if evaluation is not None}
        return {config: us for config, us in found.items() if us is not None}

    def best_configs(self, count: int) -> list[Config]:
        """The best configs, the winner first: starts for the next token bucket."""
        found = self.winner()
        timed = sorted((us, str(config), config) for config, us in self._timed().items())
        first = [found[0]] if found else []
        return list(dict.fromkeys([*first, *(config for _, _, config in timed)]))[:count]

    def why_none(self) -> str:
        """Why the search ended without a winner."""
        if self.study.undecided:
            return [*self.study.undecided.values()][-1]
        if self.failed:
            return f"every config failed in the final: {[*self.failed.values()][-1]}"
        return "every config was rejected: " + (self.study.reasons or ["there is none"])[-1]


class Lane:
    """One GPU: its evaluator, and a thread in which searches take their turns.

    Attributes:
        evaluator: judges one candidate at a time.
        show: called after each candidate, in the lane's thread.
        search: the search whose turn it is, None while the lane is idle.
        undecided_in_a_row: candidates that could not be judged since the last one that was.
        given_up_in_a_row: kernels given up for that reason since the last candidate that could be judged; the lane is
            lost with as many as its ``patience``: one if it is the only lane, where the run can only end.
        lost: why nothing can be judged here any more, empty while it can.
        busy_seconds: how long the evaluator worked, by the stage of the searches.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        show: Callable[[KernelSearch], None] = lambda search: None,
        patience: int = 1,
    ) -> None:
        self.evaluator = evaluator
        self.show = show
        self.search: KernelSearch | None = None
        self.undecided_in_a_row = self.given_up_in_a_row = 0
        self.patience = patience
        self.lost = ""
        self.busy_seconds = {TRYING: 0.0, FINAL: 0.0}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="doratune-lane")

    def start(self, search: KernelSearch, stopping: Callable[[], bool]) -> Future[None]:
        """Begin the turn of a search."""
        self.search = search
        return self._thread.submit(search.turn, self, stopping)

    def submit(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Do other work in the lane's thread."""
        return self._thread.submit(work, *arguments)

    def close(self) -> None:
        """Wait for the turn under way, and end the evaluator."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.evaluator.close()


def _failed(future: Future[Compiled]) -> bool:
    return future.cancelled() or not future.done() or future.exception() is not None
