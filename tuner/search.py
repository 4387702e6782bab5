"""The search: from specs to winners in the store.

Each spec has one Optuna study (see :mod:`.studies`). Its first configs are the variants' seeds, the winner of the
nearest token bucket, what a store already knows, and the performance model's shortlist; after that Optuna's sampler
proposes. Several studies are under way at once, so that the workers compile for some while this process evaluates, one
candidate at a time, for another. Token buckets of one shape follow one another, since a winner mostly holds for its
neighbours too.

**What is kept.** A winner is stored as soon as its search ends, and its binaries soon after. A spec is skipped when the
store has an entry of the same template whose provenance is better, or equal with a finished search of at least this
effort: the study says so, or, without the study, the entry was tuned with at least the effort's patience in trials. At
the end, binaries that the store lacks for the installed Triton are made, also for such entries, and fused
kernels are timed against their unfused sequence (:mod:`.fusion`).

**What fails.** Only a property of a config is recorded against it: a compile error, a limit exceeded, a compiler that
crashes or does not end, an inaccurate result, a memory fault. Any other failure (a disk, a tool, the GPU, memory, a
killed worker) says nothing about the config: the next run tries it again. If no candidate can be judged any more, the
run ends and says why (``TuneResult.fault``): at once if the cause is known, else after :data:`IN_A_ROW` candidates.

**Stopping.** At the time limit, on Ctrl-C and on SIGTERM the candidate under evaluation is finished and nothing new is
started. A search cut short stores its best so far only when all its seeds were tried, and stays open: the next run
continues from its trials. A run that is killed loses the candidates under way.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import FrameType

import optuna

from ..cache.entry import DEFAULT, MEASURED, PREDICTED, Entry
from ..cache.store import Store
from ..codegen.compile import CompileError, judge_failure
from ..codegen.gpu import Gpu
from ..codegen.render import Source, render, template_digest
from ..codegen.spec import Config, KernelSpec
from ..codegen.variants import check_config, default_config
from ..errors import DoratuneError
from .campaign import Campaign
from .effort import STANDARD, Budget, Effort
from .evaluation import (
    BROKEN,
    ContextLostError,
    Evaluator,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    floor_us,
)
from .fusion import composition_of, needs_timing, with_unfused_time
from .outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, Tuned, TuneResult
from .packing import Packing
from .predict import shortlist
from .progress import SilentProgress
from .sampler import ModelSampler
from .space import Space
from .studies import (
    Candidate,
    KernelStudy,
    searched_with,
    study_name,
)
from .study_storage import default_study_storage, open_study_storage, quiet, release
from .workers import POLL_SECONDS, Compiled, CompilePool, default_jobs

BEHIND = 1.25
"""A candidate whose estimate is more than this many times the best one so far is not compiled."""

IN_A_ROW = 3
"""After this many candidates in a row that cannot be judged the run ends; if their tensors do not fit the GPU's memory,
only the search of that kernel."""

_STUDIES_PER_WORKER = 2
_RANKS = (DEFAULT, PREDICTED, MEASURED)
_VERDICTS = (Rejected, CompileError)
"""The failures that are a property of the config: trying it again would give the same."""


@dataclass(frozen=True)
class StandIns:
    """Parts of a search that a replay of recorded times replaces; None leaves a part as it is."""

    pool: Callable[[Gpu, int | None], CompilePool] | None = None
    space: Callable[[KernelSpec, Gpu], Space] | None = None
    sampler: Callable[[Space, int], optuna.samplers.BaseSampler] | None = None
    """Makes Optuna's sampler for a space from a seed."""
    storage: optuna.storages.BaseStorage | None = None


def tune(
    specs: Sequence[KernelSpec],
    *,
    evaluator: Evaluator,
    store: Store,
    gpu: Gpu,
    effort: Effort = STANDARD,
    trials: int | None = None,
    timeout: float | None = None,
    jobs: int | None = None,
    study_storage: str | None = None,
    known: Callable[[KernelSpec], Config | None] | None = None,
    binaries: bool = True,
    progress: SilentProgress | None = None,
    stand_ins: StandIns | None = None,
) -> TuneResult:
    """Find and store the best config of every spec, as far as ``effort`` and ``timeout`` (seconds) allow.

    ``trials`` replaces the effort's number of configs for each kernel. ``jobs`` is the number of compile workers, by
    default one for each core. ``study_storage`` is the path of a SQLite file or a URL for Optuna, by default a
    file in the user's folder. ``known`` returns a config that did well for a similar spec, which is tried early.
    ``binaries`` also stores the compiled kernels of the winners.
    ``stand_ins`` replaces parts of the search for a replay without a compiler or a GPU.
    The evaluator is closed at the end. A script that calls this needs Python's ``if __name__ == "__main__":`` guard,
    since the workers import the main module.

    If nothing can be compiled or measured any more, the run ends and the result says why. Nothing of this is recorded:
    the same call continues once the machine is repaired.

    Raises:
        SpecError: a spec has no variant for this GPU.
        StoreError, StudyStorageError: a database failed.
        UsageError: ``trials`` is below 1.
    """
    quiet()
    budget = effort.budget(evaluator.provenance)
    if trials is not None:
        budget = budget.with_trials(trials)
    url = study_storage or default_study_storage()
    deadline = None if timeout is None else time.monotonic() + timeout
    given = stand_ins or StandIns()
    pool = (given.pool or CompilePool)(gpu, jobs)
    storage = given.storage or open_study_storage(url)
    said = progress or SilentProgress()
    run = _Run(evaluator, store, gpu, effort, budget, storage, url, pool, known, binaries, said, given)
    try:
        with _interruption(run):
            run.search(list(dict.fromkeys(specs)), deadline)
    except KeyboardInterrupt:  # a second Ctrl-C: at once
        run.stopped = "interrupt"
    finally:
        run.progress.close()
        pool.close()
        evaluator.close()
        release(storage)
    return TuneResult(tuple(run.row(spec) for spec in specs), run.stopped, run.fault)


@contextmanager
def _interruption(run: _Run) -> Iterator[None]:
    """Make the first Ctrl-C or SIGTERM a request to stop; a second Ctrl-C raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        run.stopped = "interrupt"
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask_to_stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Search:
    """A spec's search under way: its study and the batch that is being compiled."""

    study: KernelStudy
    floor_us: float
    first: Iterator[Config]
    best_estimate: float
    batch: list[tuple[Candidate, Source, Future[Compiled]]]

    @property
    def spec(self) -> KernelSpec:
        return self.study.space.spec

    @property
    def compiled(self) -> bool:
        return all(future.done() for _, _, future in self.batch)


@dataclass
class _Run:
    evaluator: Evaluator
    store: Store
    gpu: Gpu
    effort: Effort
    budget: Budget
    storage: optuna.storages.BaseStorage
    url: str
    pool: CompilePool
    known: Callable[[KernelSpec], Config | None] | None
    binaries: bool
    progress: SilentProgress
    stand_ins: StandIns
    stopped: str = ""
    fault: str = ""

    def __post_init__(self) -> None:
        self._undecided_in_a_row = 0
        self._rows: dict[KernelSpec, Tuned] = {}
        self._deadline: float | None = None
        self._environment = self.evaluator.environment()
        self._packing = Packing(self.store, self.pool, self._environment, self.progress)

    def row(self, spec: KernelSpec) -> Tuned:
        return self._rows.get(spec) or Tuned(spec, UNFINISHED, self.store.get(spec), "not begun")

    def search(self, specs: list[KernelSpec], deadline: float | None) -> None:
        self._deadline = deadline
        space_of = self.stand_ins.space or Space
        spaces = {spec: space_of(spec, self.gpu) for spec in specs}
        for spec in specs:
            entry = self._kept(spaces[spec])
            if entry is not None:
                self._rows[spec] = Tuned(spec, KEPT, entry, "in the store already")
        self.progress.start(len(specs), len(self._rows))
        families: dict[KernelSpec, list[KernelSpec]] = {}
        for spec in specs:
            if spec not in self._rows:
                families.setdefault(_family(spec), []).append(spec)

        def lacks(family: KernelSpec) -> bool:
            """Whether the store still needs a spec of the family; what other workers have tuned is a row of ours."""
            for spec in families[family]:
                entry = None if spec in self._rows else self._kept(spaces[spec])
                if entry is not None:
                    self._rows[spec] = Tuned(spec, KEPT, entry, "in the store already")
            return any(spec not in self._rows for spec in families[family])

        campaign = Campaign(
            self.storage,
            list(families),
            lacks=lacks,
            environment=self._environment,
            provenance=self.evaluator.provenance,
            url=self.url,
        )
        try:
            self._share_out(campaign, families, spaces)
        finally:
            campaign.close()
        self._time_fusions()
        self._finish_binaries()

    def _share_out(
        self, campaign: Campaign, families: dict[KernelSpec, list[KernelSpec]], spaces: dict[KernelSpec, Space]
    ) -> None:
        """Search the families that the campaign gives this worker."""
        active: dict[KernelSpec, _Search] = {}
        most = max(2, _STUDIES_PER_WORKER * (self.pool.jobs or default_jobs()))
        while (active or campaign.waiting) and not self._stopping():
            # One search at a time in a family: the next token bucket starts from its winner.
            while len(active) < most and (family := campaign.claim()) is not None:
                active[family] = self._begin(spaces[next(spec for spec in families[family] if spec not in self._rows)])
            if not active:
                time.sleep(POLL_SECONDS)
                continue
            ready = next((family for family, search in active.items() if search.compiled), None)
            if ready is None:
                waiting = [future for search in active.values() for _, _, future in search.batch if not future.done()]
                self.pool.wait(waiting, POLL_SECONDS)
                continue
            search = active.pop(ready)
            if not campaign.holds(ready):
                continue  # another worker has it
            if self._evaluate(search):
                active[ready] = search  # at the end of the queue
            elif not self.fault:
                rest = [spec for spec in families[ready] if spec not in self._rows]
                if rest:
                    active[ready] = self._begin(spaces[rest[0]])
                else:
                    campaign.finished(ready)
            self._store_binaries()
        for search in active.values():
            self._cut_short(search)
        for family, reason in campaign.given_up.items():
            for spec in families[family]:
                self._rows.setdefault(spec, Tuned(spec, FAILED, self.store.get(spec), reason))

    def _break_off(self, fault: str) -> None:
        """End the run because of a fault of the machine."""
        self.stopped, self.fault = "fault", fault

    def _stopping(self) -> bool:
        if not self.stopped and self._deadline is not None and time.monotonic() >= self._deadline:
            self.stopped = "timeout"
        return bool(self.stopped)

    def _kept(self, space: Space) -> Entry | None:
        entry = self.store.get(space.spec)
        if entry is None or check_config(space.spec, entry.config, self.gpu) is not None:
            return None
        digest = template_digest(space.spec.op, entry.config.variant)
        if entry.template_digest != digest:
            if render(space.spec, entry.config).digest != entry.source_digest:
                return None
            entry = replace(entry, template_digest=digest)  # the template changed, but not its source for this spec
            self.store.put(entry)
        ours, theirs = _RANKS.index(self.evaluator.provenance), _RANKS.index(entry.evaluation.provenance)
        if theirs != ours:
            return entry if theirs > ours else None
        if entry.evaluation.trials >= self.budget.trials:
            return entry
        name = study_name(space, self._environment, self.evaluator.provenance)
        finished = searched_with(self.storage, name, self.url)
        if finished is None:
            return entry if entry.evaluation.trials >= self.budget.patience else None
        return entry if finished >= self.budget.trials else None

    def _begin(self, space: Space) -> _Search:
        spec = space.spec
        estimates = {config: self.evaluator.screen(spec, config) for config in space.seeds}
        known = [us for us in estimates.values() if us is not None]
        best_estimate = min(known, default=float("inf"))
        seeds = [config for config, us in estimates.items() if us is None or us <= BEHIND * best_estimate]
        floor = floor_us(spec, self.gpu)
        name = study_name(space, self._environment, self.evaluator.provenance)
        sampler = self.stand_ins.sampler or ModelSampler
        study = KernelStudy(space, self.storage, name, seeds=seeds, floor_us=floor, url=self.url, sampler=sampler)
        elsewhere = (self._neighbour(spec), self.known(spec) if self.known else None)
        before = self.store.get(spec)  # from an older template or a lower effort: a good start
        first = itertools.chain(
            () if before is None else (before.config,),
            seeds,
            (config for config in elsewhere if config is not None),
            _lazily(lambda: shortlist(space, self.effort.shortlist)),
        )
        search = _Search(study, floor, first, best_estimate, [])
        self._show(search)
        self._fill(search, max(self.effort.batch, 1 + len(seeds) + len(elsewhere)))
        return search

    def _neighbour(self, spec: KernelSpec) -> Config | None:
        """The winner of the nearest token bucket of the same shape that this run has finished or kept."""
        found = [
            (abs(other.tokens.bit_length() - spec.tokens.bit_length()), other.tokens, row.entry.config)
            for other, row in self._rows.items()
            if row.entry is not None and other != spec and _family(other) == _family(spec)
        ]
        return min(found)[2] if found else None

    def _fill(self, search: _Search, count: int) -> None:
        """Start compiling the next candidates: at most ``count``, within the budget."""
        study = search.study
        room = min(count, self.budget.trials - len(study.evaluated))
        while len(search.batch) < room and study.stop(self.budget) is None:
            known = next(search.first, None)
            if known is not None:
                candidate = study.propose(known)
            else:
                candidate = study.ask(lambda config: self._behind(search, config))
            if candidate is not None:
                source = render(study.space.spec, candidate.config)
                search.batch.append((candidate, source, self.pool.submit(source)))

    def _behind(self, search: _Search, config: Config) -> float | None:
        """The estimate for a config that is not worth a compile, or None."""
        us = self.evaluator.screen(search.spec, config)
        if us is None:
            return None
        search.best_estimate = min(search.best_estimate, us)
        return us if us > BEHIND * search.best_estimate else None

    def _evaluate(self, search: _Search) -> bool:
        """Evaluate a compiled batch and start the next; return whether the search continues."""
        while search.batch:
            if self._stopping():
                return True
            candidate, source, future = search.batch.pop(0)
            try:
                evaluation = self.evaluator.evaluate(source, future.result())
            except Exception as error:
                failure = error if isinstance(error, DoratuneError) else judge_failure(error, f"{source.spec} fails")
                if isinstance(failure, _VERDICTS):
                    self._reject(search, candidate, failure)
                elif not self._set_aside(search, candidate, failure):
                    return False
            else:
                search.study.accept(candidate, evaluation)
                self._undecided_in_a_row = 0
            self._show(search)
        if self.fault:
            return True
        self._fill(search, self.effort.batch)
        if search.batch:
            return True
        search.study.finish(self.budget)
        self.evaluator.finish(search.spec)
        self._close(search, TUNED, search.study.stop(self.budget) or "no configs left")
        return False

    def _reject(self, search: _Search, candidate: Candidate, verdict: DoratuneError) -> None:
        search.study.reject(candidate, str(verdict))
        self._undecided_in_a_row = 0
        if isinstance(verdict, ContextLostError):
            self._break_off(f"{verdict}. The same command continues from here without that config")

    def _set_aside(self, search: _Search, candidate: Candidate, failure: DoratuneError) -> bool:
        """Leave a candidate that could not be judged to the next run; return whether its search continues now."""
        if isinstance(failure, LaunchFailureError) and search.study.suspect(candidate):
            self._reject(search, candidate, ContextLostError(f"{failure}; the same happened in an earlier run"))
            return True
        reason = str(failure)
        search.study.set_aside(candidate, reason)
        self._undecided_in_a_row += 1
        if not isinstance(failure, BROKEN) and self._undecided_in_a_row < IN_A_ROW:
            return True
        self._undecided_in_a_row = 0
        if not isinstance(failure, GpuMemoryError):
            self._break_off(f"{reason}. The same command continues from here")
        self.evaluator.finish(search.spec)
        self._give_up(search, reason)
        return False

    def _give_up(self, search: _Search, reason: str) -> None:
        """End a search that cannot continue in this run."""
        if search.study.best is not None and search.study.seeded(self.budget):
            self._close(search, PARTIAL, reason)
        else:
            self._rows[search.spec] = Tuned(search.spec, FAILED, self.store.get(search.spec), reason)
            self.progress.done(search.spec, FAILED, None, search.floor_us)

    def _cut_short(self, search: _Search) -> None:
        study = search.study
        if study.best is not None and study.seeded(self.budget):
            self._close(search, PARTIAL, f"stopped after {len(study.evaluated)} trials")
        else:
            note = f"stopped after {len(study.evaluated)} trials"
            self._rows[search.spec] = Tuned(search.spec, UNFINISHED, self.store.get(search.spec), note)

    def _close(self, search: _Search, outcome: str, note: str) -> None:
        """Store the winner of a search and note the row."""
        spec, best = search.spec, search.study.best
        if best is None:
            outcome, note = FAILED, _why_none(search.study)
            self._rows[spec] = Tuned(spec, outcome, self.store.get(spec), note)
        else:
            config, evaluation = best
            source = render(spec, config)
            entry = Entry(
                spec=spec,
                config=config,
                template_digest=template_digest(spec.op, config.variant),
                source_digest=source.digest,
                source=source.text,
                evaluation=replace(evaluation, trials=len(search.study.evaluated)),
                environment=self._environment,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self.store.put(entry)
            undecided = search.study.undecided
            if undecided:
                note = f"{note}; configs that could not be judged: {len(undecided)}, {[*undecided.values()][-1]}"
                self.progress.note(f"{spec}: {note}")
            self._rows[spec] = Tuned(spec, outcome, self.store.get(spec), note)
            if self.binaries:
                self._packing.start(self._rows[spec].entry)
        self.progress.done(spec, outcome, best[1].us if best else None, search.floor_us)

    def _time_fusions(self) -> None:
        """Time each fused kernel against its unfused sequence if that was never done, or if its composition kernel was
        retuned."""
        if self.evaluator.provenance != MEASURED or self._stopping():
            return
        pending = []
        for row in self._rows.values():
            composition = composition_of(row.spec)
            if composition is None or row.entry is None:
                continue
            part = self._rows.get(composition)
            if needs_timing(row.entry, composition_is_new=part is not None and part.outcome == TUNED):
                sources = render(row.spec, row.entry.config), render(composition, self._config(composition))
                pending.append((row.entry, sources, [self.pool.submit(source) for source in sources]))
        if pending:
            self.progress.note(f"timing {len(pending)} fused kernels against their unfused sequence")
        for entry, sources, compiled in pending:
            while not self._stopping() and not all(future.done() for future in compiled):
                self.pool.wait([future for future in compiled if not future.done()], POLL_SECONDS)
            if self._stopping():
                return
            reason = self._time_fusion(entry, sources, compiled)
            if reason:
                self.progress.note(f"{entry.spec}: not timed against its unfused sequence: {reason}")

    def _time_fusion(
        self, entry: Entry, sources: tuple[Source, Source], compiled: Sequence[Future[Compiled]]
    ) -> str | None:
        """Store the time of a fused kernel's unfused sequence; return why it could not be measured, or None."""
        try:
            for future in compiled:
                future.result()
            times = self.evaluator.fusion_times(*sources)
        except Exception as failure:
            if isinstance(failure, (ContextLostError, *BROKEN)):
                self._break_off(f"{failure}. The same command continues from here")
            return str(failure) or type(failure).__name__
        if times is not None:
            self.store.put(with_unfused_time(entry, *times))
            self._rows[entry.spec] = replace(self._rows[entry.spec], entry=self.store.get(entry.spec))
        return None

    def _config(self, spec: KernelSpec) -> Config:
        """The best config that is known for ``spec``, which need not be one of this run."""
        entry = self.store.get(spec)
        if entry is not None and check_config(spec, entry.config, self.gpu) is None:
            return entry.config
        return (self.known(spec) if self.known else None) or default_config(spec, self.gpu)

    def _store_binaries(self) -> None:
        """Store the binaries that are made by now."""
        broken = self._packing.store_made()
        if broken is not None:
            self._break_off(f"{broken}. The winners so far are stored; the same command continues from here")

    def _finish_binaries(self) -> None:
        """Wait for the winners' binaries and make those that kept entries lack, unless the run is to stop."""
        if not self._stopping() and self.binaries:
            lacking = sum([self._packing.start(row.entry) for row in self._rows.values() if row.outcome == KEPT])
            if lacking:
                self.progress.note(f"{lacking} kernels kept from the store lack their binary; compiling them")
        self._store_binaries()
        while self._packing.under_way and not self._stopping():
            self.pool.wait(self._packing.under_way, POLL_SECONDS)
            self._store_binaries()

    def _show(self, search: _Search) -> None:
        best = search.study.best
        tried = len(search.study.evaluated)
        self.progress.current(search.spec, tried, self.budget.trials, best[1].us if best else None, search.floor_us)


def _family(spec: KernelSpec) -> KernelSpec:
    """The spec without its token bucket: same shape, same code."""
    return replace(spec, tokens=1) if spec.tokens else spec


def _why_none(study: KernelStudy) -> str:
    """Why a search ended without a winner."""
    if study.undecided:
        return [*study.undecided.values()][-1]
    return "every config was rejected: " + (study.reasons or ["there is none"])[-1]


def _lazily(make: Callable[[], Sequence[Config]]) -> Iterator[Config]:
    yield from make()
