"""The search: from specs to winners in the store.

Each spec has one Optuna study (see :mod:`.studies`). Its first configs are the variants' seeds, the winner of the
nearest token bucket, what a store already knows, and the performance model's shortlist; after that Optuna's sampler
proposes. Several studies are under way at once, so that the workers compile for some while this process evaluates, one
candidate at a time, for another. Token buckets of one shape follow one another, since a winner mostly holds for its
neighbours too.

**What is kept.** A winner is stored as soon as its search ends, and its binaries soon after. A spec is skipped when the
store has an entry of the same template whose provenance is better, or equal with a finished search of at least this
effort: the study says so, or, where the study is not at hand, the entry was tuned with at least the effort's patience
in trials. The binaries of such entries are made last, where the store lacks them for the installed Triton; and so is
what says whether the fusion of a kernel pays (:mod:`.unfused`).

**What fails.** Only a property of a config is recorded against it: a compile error, a limit exceeded, a compiler that
crashes or does not end, an inaccurate result, a memory fault. Whatever else fails (a disk, a tool, the GPU, memory, a
killed worker) says nothing of the config: it is tried again by the next run. Where nothing can be judged any more, the
run ends and says why (``TuneResult.fault``): at once where the cause is known, else after :data:`IN_A_ROW` candidates.

**Stopping.** At the time limit, on Ctrl-C and on SIGTERM the candidate being evaluated is finished and nothing new is
begun. A search cut short stores its best so far only when all its seeds were tried, and stays open: the next run goes
on from its trials. A run that is killed loses the candidates under way.
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

from ..cache.entry import DEFAULT, MEASURED, PREDICTED, Binary, Entry
from ..cache.store import Store
from ..codegen.compile import BrokenToolchainError, CompileError, judge_failure
from ..codegen.gpu import Gpu
from ..codegen.module import declared_kernels
from ..codegen.render import Source, render, template_digest
from ..codegen.spec import Config, KernelSpec
from ..codegen.variants import check_config, default_config
from ..errors import DoratuneError
from .effort import STANDARD, Budget, Effort
from .evaluation import (
    BrokenEnvironmentError,
    ContextLostError,
    Evaluator,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    floor_us,
)
from .predict import shortlist
from .progress import SilentProgress
from .space import Space
from .studies import (
    Candidate,
    KernelStudy,
    default_study_storage,
    open_study_storage,
    quiet,
    release,
    searched_with,
    study_name,
)
from .unfused import composition_of
from .workers import POLL_SECONDS, Compiled, CompilePool, default_jobs

TUNED, KEPT, PARTIAL, UNFINISHED, FAILED = "tuned", "kept", "partial", "unfinished", "failed"

BEHIND = 1.25
"""A candidate guessed to take this many times the best guess so far is not compiled."""

IN_A_ROW = 3
"""So many candidates one after another that cannot be judged end the run, or the kernel where only its tensors do not
fit the GPU's memory."""

_STUDIES_PER_WORKER = 2
_RANKS = (DEFAULT, PREDICTED, MEASURED)
_VERDICTS = (Rejected, CompileError)
"""What says that a config is out, on whatever day it is tried."""
_BROKEN = (BrokenToolchainError, BrokenEnvironmentError)
"""What says that no config can be judged now."""


@dataclass(frozen=True)
class Tuned:
    """What became of one spec.

    ``outcome`` is ``tuned``; ``kept`` (the store had it); ``partial`` (stopped, but the seeds were tried and the best
    is stored); ``unfinished`` (stopped before that; nothing stored); ``failed`` (every candidate was rejected, or none
    could be judged). ``entry`` is what the store holds for the spec now, None when nothing; ``note`` says why it ended.
    """

    spec: KernelSpec
    outcome: str
    entry: Entry | None
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the entry was already there."""
        return self.outcome == KEPT


@dataclass(frozen=True)
class TuneResult:
    """The rows of a run in the order of its specs.

    ``stopped`` is empty, ``timeout``, ``interrupt`` or ``fault``; then ``fault`` says what is wrong and what to do.
    """

    rows: tuple[Tuned, ...]
    stopped: str = ""
    fault: str = ""

    def count(self, outcome: str) -> int:
        """How many specs ended in this way."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def failed(self) -> tuple[Tuned, ...]:
        """The rows of the specs for which nothing was found; each ``note`` is the reason."""
        return tuple(row for row in self.rows if row.outcome == FAILED)


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
) -> TuneResult:
    """Find and store the best config of every spec, as far as ``effort`` and ``timeout`` (seconds) allow.

    ``trials`` replaces the effort's number of configs for each kernel. ``jobs`` is the number of compile workers, by
    default one for each core. ``study_storage`` is the path of a SQLite file or a URL for Optuna, by default a
    file in the user's folder. ``known`` gives a config that did well for the like of a spec elsewhere; it is tried
    early. ``binaries`` also stores the compiled kernels of the winners.
    The evaluator is closed at the end. A script that calls this needs Python's ``if __name__ == "__main__":`` guard,
    since the workers import the main module.

    A machine on which nothing can be compiled or measured any more ends the run; the result says why. Nothing of it is
    recorded, so the same call goes on once it is mended.

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
    pool = CompilePool(gpu, jobs)
    storage = open_study_storage(url)
    said = progress or SilentProgress()
    run = _Run(evaluator, store, gpu, effort, budget, storage, url, pool, known, binaries, said)
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
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; a second Ctrl-C raises as usual."""
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
    """A spec under way: its study and the batch that is being compiled."""

    study: KernelStudy
    floor_us: float
    first: Iterator[Config]
    best_guess: float
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
    stopped: str = ""
    fault: str = ""

    def __post_init__(self) -> None:
        self._undecided_in_a_row = 0
        self._rows: dict[KernelSpec, Tuned] = {}
        self._deadline: float | None = None
        self._environment = self.evaluator.environment()
        self._packing: dict[str, tuple[KernelSpec, Future[tuple[Binary, ...]]]] = {}

    def row(self, spec: KernelSpec) -> Tuned:
        return self._rows.get(spec) or Tuned(spec, UNFINISHED, self.store.get(spec), "not begun")

    def search(self, specs: list[KernelSpec], deadline: float | None) -> None:
        self._deadline = deadline
        spaces = {spec: Space(spec, self.gpu) for spec in specs}
        for spec in specs:
            entry = self._kept(spaces[spec])
            if entry is not None:
                self._rows[spec] = Tuned(spec, KEPT, entry, "in the store already")
        self.progress.start(len(specs), len(self._rows))
        families: dict[KernelSpec, list[KernelSpec]] = {}
        for spec in specs:
            if spec not in self._rows:
                families.setdefault(_family(spec), []).append(spec)
        active: dict[KernelSpec, _Search] = {}
        most = max(2, _STUDIES_PER_WORKER * (self.pool.jobs or default_jobs()))
        while (families or active) and not self._stopping():
            # One search at a time in a family, so that its winner is there for the next token bucket.
            for family in [f for f in families if f not in active][: most - len(active)]:
                active[family] = self._begin(spaces[families[family].pop(0)])
                if not families[family]:
                    del families[family]
            ready = next((family for family, search in active.items() if search.compiled), None)
            if ready is None:
                waiting = [future for search in active.values() for _, _, future in search.batch if not future.done()]
                self.pool.wait(waiting, POLL_SECONDS)
                continue
            search = active.pop(ready)
            if self._evaluate(search):
                active[ready] = search  # now the last in line
            self._store_packed()
        for search in active.values():
            self._cut_short(search)
        self._time_unfused()
        self._finish_binaries()

    def _break_off(self, fault: str) -> None:
        """Have the run end because of what is wrong with the machine."""
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
            entry = replace(entry, template_digest=digest)  # the template has changed, but not in what it gives here
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
        guesses = {config: self.evaluator.screen(spec, config) for config in space.seeds}
        known = [guess for guess in guesses.values() if guess is not None]
        best_guess = min(known, default=float("inf"))
        seeds = [config for config, guess in guesses.items() if guess is None or guess <= BEHIND * best_guess]
        floor = floor_us(spec, self.gpu)
        name = study_name(space, self._environment, self.evaluator.provenance)
        study = KernelStudy(space, self.storage, name, seeds=seeds, floor_us=floor, url=self.url)
        elsewhere = (self._neighbour(spec), self.known(spec) if self.known else None)
        before = self.store.get(spec)  # of a template that has changed since, or of less effort: a good place to begin
        first = itertools.chain(
            () if before is None else (before.config,),
            seeds,
            (config for config in elsewhere if config is not None),
            _lazily(lambda: shortlist(space, self.effort.shortlist)),
        )
        search = _Search(study, floor, first, best_guess, [])
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
        """Have the next candidates compiled, at most ``count`` and what the budget leaves."""
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
        guess = self.evaluator.screen(search.spec, config)
        if guess is None:
            return None
        search.best_guess = min(search.best_guess, guess)
        return guess if guess > BEHIND * search.best_guess else None

    def _evaluate(self, search: _Search) -> bool:
        """Evaluate a compiled batch and start the next; return whether the search goes on."""
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
            self._break_off(f"{verdict}. The same command goes on from here without that config")

    def _set_aside(self, search: _Search, candidate: Candidate, failure: DoratuneError) -> bool:
        """Leave a candidate that could not be judged for another run; return whether its search goes on in this one."""
        if isinstance(failure, LaunchFailureError) and search.study.suspect(candidate):
            self._reject(search, candidate, ContextLostError(f"{failure}; the same happened in an earlier run"))
            return True
        reason = str(failure)
        search.study.set_aside(candidate, reason)
        self._undecided_in_a_row += 1
        if not isinstance(failure, _BROKEN) and self._undecided_in_a_row < IN_A_ROW:
            return True
        self._undecided_in_a_row = 0
        if not isinstance(failure, GpuMemoryError):
            self._break_off(f"{reason}. The same command goes on from here")
        self.evaluator.finish(search.spec)
        self._give_up(search, reason)
        return False

    def _give_up(self, search: _Search, reason: str) -> None:
        """End a search that cannot go on now."""
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
            self._pack(self._rows[spec].entry)
        self.progress.done(spec, outcome, best[1].us if best else None, search.floor_us)

    def _time_unfused(self) -> None:
        """Have kernels that fuse timed beside their work one after another, where nobody did or its part is new."""
        if self.evaluator.provenance != MEASURED or self._stopping():
            return
        pending = []
        for row in self._rows.values():
            composition = composition_of(row.spec)
            if composition is None or row.entry is None or row.entry.evaluation.provenance != MEASURED:
                continue
            part = self._rows.get(composition)
            if row.entry.evaluation.unfused_us is None or (part is not None and part.outcome == TUNED):
                sources = render(row.spec, row.entry.config), render(composition, self._config(composition))
                pending.append((row.entry, sources, [self.pool.submit(source) for source in sources]))
        if pending:
            self.progress.note(f"timing {len(pending)} fused kernels beside their work one after another")
        for entry, sources, compiled in pending:
            while not self._stopping() and not all(future.done() for future in compiled):
                self.pool.wait([future for future in compiled if not future.done()], POLL_SECONDS)
            if self._stopping():
                return
            reason = self._time_beside(entry, sources, compiled)
            if reason:
                self.progress.note(f"{entry.spec} is not timed beside its work one after another: {reason}")

    def _time_beside(
        self, entry: Entry, sources: tuple[Source, Source], compiled: Sequence[Future[Compiled]]
    ) -> str | None:
        """Store what the work of a fused kernel takes one after another; the reason if that cannot be had."""
        try:
            for future in compiled:
                future.result()
            times = self.evaluator.times_beside(*sources)
        except Exception as failure:
            if isinstance(failure, (ContextLostError, *_BROKEN)):
                self._break_off(f"{failure}. The same command goes on from here")
            return str(failure) or type(failure).__name__
        if times is not None and entry.evaluation.us is not None:
            unfused_us = entry.evaluation.us * times[1] / times[0]  # as on the clocks of the entry's own time
            self.store.put(replace(entry, evaluation=replace(entry.evaluation, unfused_us=unfused_us)))
            self._rows[entry.spec] = replace(self._rows[entry.spec], entry=self.store.get(entry.spec))
        return None

    def _config(self, spec: KernelSpec) -> Config:
        """The best config that is known for ``spec``, which need not be one of this run."""
        entry = self.store.get(spec)
        if entry is not None and check_config(spec, entry.config, self.gpu) is None:
            return entry.config
        return (self.known(spec) if self.known else None) or default_config(spec, self.gpu)

    def _pack(self, entry: Entry | None) -> bool:
        """Have the binaries of an entry made, unless the store has them; return whether they are under way."""
        if entry is None or not self.binaries:
            return False
        source = render(entry.spec, entry.config)
        digest = source.code_digest
        if digest in self._packing or digest != entry.code_digest:
            return digest in self._packing
        architecture, triton = self.gpu.architecture, self._environment.triton
        stored = {key.kernel for key in self.store.binary_keys(digest, triton, architecture)}
        if not stored.issuperset(declared_kernels(source)):
            self._packing[digest] = (entry.spec, self.pool.binaries(source))
        return digest in self._packing

    def _store_packed(self) -> None:
        """Store the binaries that are made by now."""
        for digest, (spec, future) in [*self._packing.items()]:
            if not future.done():
                continue
            del self._packing[digest]
            error = future.exception()
            if isinstance(error, _BROKEN):
                self._break_off(f"{error}. The winners so far are stored; the same command goes on from here")
                continue
            if error is not None:  # the winner is stored all the same: whoever loads it compiles it
                self.progress.note(f"no binary of {spec}: {error}")
                continue
            for binary in future.result():
                self.store.put_binary(binary)

    def _finish_binaries(self) -> None:
        """Wait for the binaries of the winners, and have those made that kept entries lack; not once it is to stop."""
        if not self._stopping():
            lacking = sum([self._pack(row.entry) for row in self._rows.values() if row.outcome == KEPT])
            if lacking:
                self.progress.note(f"{lacking} kernels kept from the store lack their binary; compiling them")
        self._store_packed()
        while self._packing and not self._stopping():
            self.pool.wait([future for _, future in self._packing.values()], POLL_SECONDS)
            self._store_packed()

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
