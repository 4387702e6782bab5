"""The search: from specs to winners in the store.

Each spec has one Optuna study (see :mod:`.studies`). Its first configs are the incumbents, the best of the nearest
token bucket, what did well for similar specs, the variants' seeds and the performance model's shortlist; after that
Optuna's sampler proposes. The best of them play a final against the incumbents (:mod:`.kernel_search`). Several
searches are under way at once, so that the workers compile for some while each GPU, a *lane*, measures for another.
Token buckets of one shape, a *family*, follow one another on one lane, since a winner mostly holds for its neighbours
too; which families this process searches is decided with the other workers, if there are any (:mod:`.campaign`).

**What is kept.** A winner is stored as soon as its search ends, and its binaries soon after. A spec is skipped when the
store has an entry of the same template whose provenance is better, or equal with a finished search of at least this
effort: the study says so, or, without the study, the entry was tuned with at least the effort's least patience in
trials. At the end, binaries that the store lacks for the installed Triton are made, also for such entries, and fused
kernels are timed against their unfused sequence (:mod:`.fusion`).

**What fails.** Only a property of a config is recorded against it: a compile error, a limit exceeded, a compiler that
crashes or does not end, an inaccurate result, a memory fault, a kernel that hangs. Any other failure (a disk, a tool,
the GPU, memory, a killed worker) says nothing about the config: the next run tries it again. A lane on which no
candidate can be judged any more is given up, at once if the cause is known, else after
:data:`~.kernel_search.IN_A_ROW` candidates; without lanes the run ends and says why (``TuneResult.fault``).

**Stopping.** At the time limit, on Ctrl-C and on SIGTERM the candidates under evaluation are finished and nothing new
is started; on a signal they have :data:`STOP_SECONDS` for it, and compiles under way are ended. After the time limit,
searches that have tried their seeds still play their finals, for at most :data:`LAST_FINALS_SECONDS`. A search cut
short stores its best so far only when all its seeds were tried, and stays open: the next run continues from its trials.
A run that is killed loses the candidates under way.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import optuna

from ..cache.entry import DEFAULT, MEASURED, PREDICTED, Entry
from ..cache.store import Store
from ..codegen.cost import floor_us
from ..codegen.gpu import Gpu
from ..codegen.render import Source, render, template_digest
from ..codegen.spec import Config, KernelSpec
from ..codegen.variants import check_config
from ..errors import UsageError
from ..terminal.interrupts import take_as_request
from .campaign import Campaign
from .effort import STANDARD, Budget, Effort
from .evaluation import BROKEN, ContextLostError, Evaluator
from .fusion import composition_of, needs_timing, with_unfused_time
from .incumbents import Incumbents, built_in
from .kernel_search import BEHIND, FINAL, OVER, TRYING, KernelSearch, Lane
from .launcher import was_launched
from .outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, Tuned, TuneResult, disturbances, kind_of_reason
from .packing import Packing
from .predict import shortlist
from .progress import SilentProgress
from .sampler import ModelSampler
from .space import Space
from .studies import KernelStudy, searched_with, study_name
from .study_storage import default_study_storage, open_study_storage, quiet, release, storage_file
from .workers import POLL_SECONDS, Compiled, CompilePool, default_jobs

SIBLINGS = 4
"""How many of the best configs of the nearest token bucket are tried for the next one."""

STARTS = 2
"""How many configs of similar specs are tried beside the winner of a sister GPU."""

NEAR_BUCKET = 2
"""Doublings of the tokens within which a bucket's winners make few trials enough for the next."""

LAST_FINALS_SECONDS = 20.0
"""How long the searches that a time limit cut short may take for their finals."""

PREPARE_SECONDS = 1.0
"""How long it may take, however little is left of the time limit, to know what to tune, and then what the store has."""

ROWS_SECONDS = 0.5
"""How long the store is read at the end for what it has of specs that were not begun."""

STOP_SECONDS = 1.5
"""How long a candidate under evaluation may take after Ctrl-C before it is ended."""

SWITCH_SECONDS = 0.0005
"""How long the main thread keeps Python's lock while a lane wants it, in place of 5 ms: a lane needs it several times
for each candidate."""

_STUDIES_PER_WORKER = 2
_RANKS = (DEFAULT, PREDICTED, MEASURED)


@dataclass(frozen=True)
class StandIns:
    """Parts of a search that a replay of recorded times replaces; None leaves a part as it is."""

    pool: Callable[[Gpu, int | None], CompilePool] | None = None
    space: Callable[..., Space] | None = None
    """Takes the arguments of :class:`~.space.Space`."""
    sampler: Callable[[Space, int], optuna.samplers.BaseSampler] | None = None
    """Makes Optuna's sampler for a space from a seed."""
    storage: optuna.storages.BaseStorage | None = None


def tune(
    specs: Sequence[KernelSpec],
    *,
    evaluators: Sequence[Evaluator],
    store: Store,
    gpu: Gpu,
    effort: Effort = STANDARD,
    trials: int | None = None,
    timeout: float | None = None,
    jobs: int | None = None,
    study_storage: str | None = None,
    incumbents: Callable[[KernelSpec], Incumbents] | None = None,
    binaries: bool = True,
    progress: SilentProgress | None = None,
    stand_ins: StandIns | None = None,
) -> TuneResult:
    """Find and store the best config of every spec, as far as ``effort`` and ``timeout`` (seconds) allow.

    Each of ``evaluators`` judges the candidates of some of the kernels at the same time as the others, on a GPU of its
    own; all are of one GPU model and of equal provenance. ``trials`` replaces the effort's number of configs for each
    kernel. ``jobs`` is the number of compile workers, by default one for each core. ``study_storage`` is the path of a
    SQLite file or a URL for Optuna, by default a file in the user's folder; workers that share it share the work.
    ``incumbents`` returns what lookups give for a spec; by default that is the entry of ``store`` and the built-in
    default. ``binaries`` also stores the compiled kernels of the winners. ``stand_ins`` replaces parts of the search
    for a replay without a compiler or a GPU.
    The evaluators are closed at the end. A script that calls this needs Python's ``if __name__ == "__main__":`` guard,
    since the workers import the main module.

    If nothing can be compiled or measured any more, the run ends and the result says why. Nothing of this is recorded:
    the same call continues once the machine is repaired.

    Raises:
        SpecError: a spec has no variant for this GPU.
        StoreError, StudyStorageError: a database failed.
        UsageError: ``trials`` is below 1.
    """
    quiet()
    if not evaluators:
        raise UsageError("tune needs at least one evaluator")
    provenance = evaluators[0].provenance
    budgets = [effort.measure, effort.beside, effort.sister] if provenance == MEASURED else [effort.predict] * 3
    if trials is not None:
        budgets = [budget.with_trials(trials) for budget in budgets]
    url = default_study_storage() if study_storage is None else study_storage
    began = time.monotonic()
    deadline = None if timeout is None else began + timeout
    given = stand_ins or StandIns()
    pool = (given.pool or CompilePool)(gpu, jobs)
    storage = given.storage or open_study_storage(url)
    said = progress or SilentProgress()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    run = _Run(evaluators, store, gpu, effort, budgets, storage, url, pool, incumbents, binaries, said, given)
    try:
        pool.start()
        with _interruption(run):
            run.search(list(dict.fromkeys(specs)), deadline)
    except KeyboardInterrupt:  # a second Ctrl-C: at once
        run.stopped = "interrupt"
        run.end_evaluations()
    finally:
        sys.setswitchinterval(interval)
        run.progress.close()
        if run.stopped in ("interrupt", "timeout"):
            pool.kill()  # nothing waits for what is under way
        pool.close()
        for lane in run.lanes:
            lane.close()
        release(storage)
    return TuneResult(
        tuple(run.rows(specs)),
        run.stopped,
        run.fault,
        trials=run.trials,
        seconds=time.monotonic() - began,
        rejected=dict(run.rejected.most_common()),
        undecided=dict(run.undecided.most_common()),
    )


def _end_by_watch(number: int, frame: FrameType | None) -> None:
    """The watch on Ctrl-C ends the process. A handler there must be: the watch is told by Python's."""


@contextmanager
def _interruption(run: _Run) -> Iterator[None]:
    """Make the first Ctrl-C or SIGTERM a request to stop; a second Ctrl-C ends the process, or raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logged = logging.root.manager.disable

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        run.stopped = "interrupt"
        watched = take_as_request()
        signal.signal(signal.SIGINT, _end_by_watch if watched else signal.default_int_handler)

    for number in before:
        signal.signal(number, ask_to_stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        logging.disable(logged)


class _Run:
    """One call of :func:`tune`.

    ``budgets`` are those of :class:`~.effort.Effort`: from scratch, beside a token bucket, from a sister GPU's winner.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator],
        store: Store,
        gpu: Gpu,
        effort: Effort,
        budgets: Sequence[Budget],
        storage: optuna.storages.BaseStorage,
        url: str,
        pool: CompilePool,
        incumbents: Callable[[KernelSpec], Incumbents] | None,
        binaries: bool,
        progress: SilentProgress,
        stand_ins: StandIns,
    ) -> None:
        self.store, self.gpu, self.effort, self.progress = store, gpu, effort, progress
        self.budget, self.beside_budget, self.sister_budget = budgets
        self.storage, self.url, self.pool, self.binaries = storage, url, pool, binaries
        self.provenance = evaluators[0].provenance
        patience = 1 if len(evaluators) == 1 else 2
        self.lanes = [Lane(evaluator, self._show, patience) for evaluator in evaluators]
        self.stopped = self.fault = ""
        self.trials = 0
        self.rejected: Counter[str] = Counter()
        self.undecided: Counter[str] = Counter()
        shared = storage_file(url) is None
        self._alone = not shared and not was_launched(os.environ)
        self._space = stand_ins.space or Space
        self._sampler = stand_ins.sampler
        self._incumbents = incumbents
        self._rows: dict[KernelSpec, Tuned] = {}
        self._stored: dict[KernelSpec, Entry] = {}
        """What the store had at the beginning."""
        self._deadline: float | None = None
        self._best: dict[KernelSpec, list[tuple[int, list[Config]]]] = {}
        """Of each family: the token buckets finished in this run with their best configs."""
        self._compiled: dict[KernelSpec, set[Config]] = {}
        """Of each family: the configs that this run has compiled. Its token buckets share their code."""

    def rows(self, specs: Sequence[KernelSpec]) -> Iterator[Tuned]:
        """What became of each of the specs. Of thousands that were not begun the store is not read again."""
        end = time.monotonic() + ROWS_SECONDS
        for spec in specs:
            row = self._rows.get(spec)
            if row is None:
                entry = self.store.readable(spec) if time.monotonic() < end else self._stored.get(spec)
                row = Tuned(spec, UNFINISHED, entry, "not begun")
            yield row

    def search(self, specs: list[KernelSpec], deadline: float | None) -> None:
        self._deadline = deadline
        self._environment = self.lanes[0].evaluator.environment()
        self._packing = Packing(self.store, self.pool, self._environment, self.progress)
        families: dict[KernelSpec, list[KernelSpec]] = {}
        end = time.monotonic() + PREPARE_SECONDS
        for spec in specs:
            if self._stopping() and (self.stopped != "timeout" or time.monotonic() >= end):
                return
            entry = self._kept(spec)
            if entry is not None:
                self._keep(entry)
            else:
                families.setdefault(spec.family, []).append(spec)
        self.progress.start(len(specs), len(self._rows), len(self.lanes))

        def lacks(family: KernelSpec) -> bool:
            """Whether the store still needs a spec of the family; what other workers have tuned is a row of ours."""
            for spec in families[family]:
                entry = None if spec in self._rows else self._kept(spec)
                if entry is not None:
                    self._keep(entry)
                    self.progress.done(spec, KEPT, entry.evaluation.us, floor_us(spec, self.gpu))
            return any(spec not in self._rows for spec in families[family])

        campaign = Campaign(
            self.storage,
            list(families),
            lacks=lacks,
            environment=self._environment,
            provenance=self.provenance,
            url=self.url,
            all_at_once=self._alone,
            lanes=len(self.lanes),
            stopping=self._stopping,
        )
        try:
            self._share_out(campaign, families)
        finally:
            campaign.close()
        self._time_fusions()
        self._finish_binaries()

    def _share_out(self, campaign: Campaign, families: dict[KernelSpec, list[KernelSpec]]) -> None:
        """Search the families that the campaign gives this worker."""
        active: dict[KernelSpec, tuple[KernelSearch, Lane]] = {}
        turns: dict[Future[None], KernelSpec] = {}
        most = max(2, _STUDIES_PER_WORKER * (self.pool.jobs or default_jobs()))
        said = 0
        while (active or campaign.waiting) and not self._stopping():
            while len(active) < most and not self._stopping() and (family := campaign.claim()) is not None:
                lane = min(self._lanes(), key=lambda lane: sum(of is lane for _, of in active.values()))
                active[family] = self._next(families[family]), lane
            for notice in campaign.notices[said:]:
                self.progress.note(notice)
            said = len(campaign.notices)
            self._start_turns(active, turns)
            if not active:
                time.sleep(POLL_SECONDS)
                continue
            compiling = [future for search, _ in active.values() for future in search.waiting]
            self.progress.queue(sum(search.compiling for search, _ in active.values()))
            self.pool.wait([*turns, *compiling], POLL_SECONDS)
            for turn in [turn for turn in turns if turn.done()]:
                family = turns.pop(turn)
                self._after_turn(turn, family, active, campaign, families[family])
            self._store_binaries()
        if self.stopped == "interrupt":
            self.progress.note("stopping; Ctrl-C again ends the run at once")
            wait(turns, timeout=STOP_SECONDS)
            self.end_evaluations()
        for turn in turns:  # the candidates under evaluation are finished
            turn.result()
        self._last_finals(active)
        for search, _ in active.values():
            self._count(search)
            self._cut_short(search)
        for family, reason in campaign.given_up.items():
            for spec in families[family]:
                self._rows.setdefault(spec, Tuned(spec, FAILED, self.store.readable(spec), reason))

    def end_evaluations(self) -> None:
        """End the candidates that are still under evaluation; nothing is recorded of them."""
        for lane in self.lanes:
            lane.evaluator.cancel()

    def _lanes(self) -> list[Lane]:
        """The lanes that can still judge candidates."""
        return [lane for lane in self.lanes if not lane.lost]

    def _start_turns(
        self, active: dict[KernelSpec, tuple[KernelSearch, Lane]], turns: dict[Future[None], KernelSpec]
    ) -> None:
        """Give each idle lane a search whose candidates are compiled; those that waited longest go first."""
        for lane in self._lanes():
            if lane.search is not None:
                continue
            ready = (family for family, (search, of) in active.items() if of is lane and not search.waiting)
            family = next(ready, None)
            if family is not None:
                turns[lane.start(active[family][0], self._stopping)] = family

    def _after_turn(
        self,
        turn: Future[None],
        family: KernelSpec,
        active: dict[KernelSpec, tuple[KernelSearch, Lane]],
        campaign: Campaign,
        specs: list[KernelSpec],
    ) -> None:
        """Take a search back from its lane and decide how it goes on."""
        search, lane = active.pop(family)
        lane.search = None
        turn.result()  # raises what is no property of a candidate, such as a lost database
        if not campaign.holds(family):
            self._count(search)
            return  # another worker has it
        if search.broken:
            self._lose(lane, search.broken, active)
            if not self.fault and not search.given_up:
                search.broken = ""
                self._go_on(search)
                active[family] = search, self._lanes()[0]
                return
            search.given_up = search.given_up or search.broken
        if not search.given_up and search.stage != OVER:
            self._go_on(search)
            active[family] = search, lane  # at the end of the queue
            return
        lane.evaluator.finish(search.spec)
        self._count(search)
        if search.given_up:
            self._give_up(search)
        else:
            self._close(search, TUNED, search.study.stop(search.budget) or "no configs left")
        if self.fault:
            return
        if any(spec not in self._rows for spec in specs):
            active[family] = self._next(specs), self._lanes()[0] if lane.lost else lane
        else:
            campaign.finished(family)

    def _lose(self, lane: Lane, reason: str, active: dict[KernelSpec, tuple[KernelSearch, Lane]]) -> None:
        """Give up a lane on which nothing can be judged: its searches go to the others, or the run ends."""
        lane.lost = reason
        if not self._lanes():
            self._break_off(f"{reason}. The same command continues from here")
            return
        self.progress.note(f"one of {len(self.lanes)} GPUs is given up: {reason}")
        for family, (search, of) in [*active.items()]:
            if of is lane:
                active[family] = search, self._lanes()[0]

    def _go_on(self, search: KernelSearch) -> None:
        """Start what a search needs for its next turn."""
        if search.stage != TRYING or search.batch or search.fill(self.pool, self.effort.batch):
            return
        if search.retry_incumbents() and search.fill(self.pool, self.effort.batch):
            return
        search.study.finish(self.budget)
        search.begin_final(self.pool)

    def _break_off(self, fault: str) -> None:
        """End the run because of a fault of the machine."""
        self.stopped, self.fault = "fault", fault

    def _stopping(self) -> bool:
        if not self.stopped and self._deadline is not None and time.monotonic() >= self._deadline:
            self.stopped = "timeout"
        return bool(self.stopped)

    def _keep(self, entry: Entry) -> None:
        """Note the row of an entry that needs no search; what played in its final are starts for its neighbours."""
        spec = entry.spec
        self._rows[spec] = Tuned(spec, KEPT, entry, "in the store already")
        played = entry.final.contenders if entry.final is not None else ()
        configs = list(dict.fromkeys((entry.config, *(contender.config for contender in played))))
        self._best.setdefault(spec.family, []).append((spec.count, configs[:SIBLINGS]))

    def _kept(self, spec: KernelSpec) -> Entry | None:
        entry = self.store.readable(spec)
        if entry is None:
            return None
        self._stored[spec] = entry
        if check_config(spec, entry.config, self.gpu) is not None:
            return None
        digest = template_digest(spec.op, entry.config.variant)
        if entry.template_digest != digest:
            if render(spec, entry.config).digest != entry.source_digest:
                return None
            entry = replace(entry, template_digest=digest)  # the template changed, but not its source for this spec
            self.store.put(entry)
        ours, theirs = _RANKS.index(self.provenance), _RANKS.index(entry.evaluation.provenance)
        if theirs != ours:
            return entry if theirs > ours else None
        if entry.evaluation.trials >= self.budget.trials:
            return entry
        name = study_name(self._space(spec, self.gpu), self._environment, self.provenance)
        finished = searched_with(self.storage, name, self.url)
        if finished is None:
            least = min(budget.patience for budget in (self.budget, self.beside_budget, self.sister_budget))
            return entry if entry.evaluation.trials >= least else None
        return entry if finished >= self.budget.trials else None

    def _next(self, specs: Sequence[KernelSpec]) -> KernelSearch:
        """Begin the search of the first of a family's specs that has no row yet."""
        spec = next(spec for spec in specs if spec not in self._rows)
        incumbents = self._incumbents_of(spec)
        space = self._space(spec, self.gpu, (*incumbents.configs, *incumbents.starts))
        screen = self.lanes[0].evaluator.screen
        estimates = {config: screen(spec, config) for config in space.seeds}
        best_estimate = min((us for us in estimates.values() if us is not None), default=float("inf"))
        seeds = [config for config, us in estimates.items() if us is None or us <= BEHIND * best_estimate]
        siblings, near = self._siblings(spec)
        compiled = self._compiled.setdefault(spec.family, set())
        budget = self.budget
        if near:
            budget = self.beside_budget
        if incumbents.known:
            budget = self.sister_budget
        known = budget is not self.budget
        study = KernelStudy(
            space,
            self.storage,
            study_name(space, self._environment, self.provenance),
            seeds=incumbents.configs if known else seeds,
            floor_us=floor_us(spec, self.gpu),
            url=self.url,
            sampler=self._sampler or functools.partial(ModelSampler, compiled=compiled),
        )
        first = itertools.chain(
            incumbents.configs,
            siblings,
            incumbents.starts[:STARTS] if incumbents.known else incumbents.starts,
            seeds,
            _lazily(lambda: shortlist(space, self.effort.shortlist)),
        )
        search = KernelSearch(
            study,
            incumbents,
            budget,
            self.effort,
            first,
            screen,
            best_estimate,
            compiled=compiled,
        )
        self._show(search)
        count = len(incumbents.configs) + len(siblings) + (0 if known else len(seeds))
        if not search.fill(self.pool, max(self.effort.batch, count)):
            self._go_on(search)
        return search

    def _incumbents_of(self, spec: KernelSpec) -> Incumbents:
        found = built_in(spec, self.gpu) if self._incumbents is None else self._incumbents(spec)
        before = self.store.readable(spec)  # from an older template or a lower effort
        if before is not None and check_config(spec, before.config, self.gpu) is None:
            stored = (before.config, "exact")
            found = replace(found, played=tuple(dict.fromkeys((stored, *found.played))))
        return found

    def _siblings(self, spec: KernelSpec) -> tuple[list[Config], bool]:
        """The best configs of the token buckets of the same shape that this run has finished, the nearest first, and
        whether the nearest has so few times more or fewer tokens that its best are likely to be the best here.
        """
        found = sorted(
            (abs(tokens.bit_length() - spec.count.bit_length()), tokens, configs)
            for tokens, configs in self._best.get(spec.family, ())
        )
        near = [configs[:SIBLINGS] if rank == 0 else configs[:1] for rank, (_, _, configs) in enumerate(found)]
        siblings = list(dict.fromkeys(config for configs in near for config in configs))
        return siblings, bool(found) and found[0][0] <= NEAR_BUCKET

    def _give_up(self, search: KernelSearch) -> None:
        """End a search that cannot continue in this run."""
        if search.study.best is not None and search.study.seeded(search.budget):
            self._close(search, PARTIAL, search.given_up)
        else:
            self._rows[search.spec] = Tuned(search.spec, FAILED, self.store.readable(search.spec), search.given_up)
            self.progress.done(search.spec, FAILED, None, search.study.floor_us)

    def _last_finals(self, active: dict[KernelSpec, tuple[KernelSearch, Lane]]) -> None:
        """Play the finals of the searches that the time limit cut short."""
        if self.stopped != "timeout" or self.provenance != MEASURED:
            return
        end = time.monotonic() + LAST_FINALS_SECONDS
        turns = []
        for search, lane in active.values():
            if search.stage == TRYING and search.study.best is not None and search.study.seeded(search.budget):
                search.begin_final(self.pool)
            if search.stage == FINAL and not search.waiting and not lane.lost:
                turns.append(lane.start(search, lambda: time.monotonic() >= end))
        for turn in turns:
            turn.result()

    def _count(self, search: KernelSearch) -> None:
        """Add what a search tried to the counts of the run, once, when it ends."""
        self.trials += search.trials_here
        self.rejected.update(map(kind_of_reason, search.rejected_here))
        self.undecided.update(map(kind_of_reason, search.study.undecided.values()))

    def _cut_short(self, search: KernelSearch) -> None:
        study = search.study
        note = f"stopped after {len(study.evaluated)} trials"
        if search.spec in self._rows:
            return
        if study.best is not None and study.seeded(search.budget):
            self._close(search, PARTIAL, note)
        else:
            self._rows[search.spec] = Tuned(search.spec, UNFINISHED, self.store.readable(search.spec), note)

    def _close(self, search: KernelSearch, outcome: str, note: str) -> None:
        """Store the winner of a search and note the row."""
        spec, entry = search.spec, search.entry(self._environment)
        if entry is not None and search.doubt:
            outcome, note, entry = UNFINISHED, f"what runs today could not be judged: {search.doubt}", None
            self._rows[spec] = Tuned(spec, outcome, self.store.readable(spec), note)
            self.progress.notice("undecided", f"{spec}: {note}")
        elif entry is None:
            outcome, note = FAILED, search.why_none()
            self._rows[spec] = Tuned(spec, outcome, self.store.readable(spec), note)
        else:
            self.store.put(entry)
            undecided = search.study.undecided
            if undecided:
                note = f"{note}; configs that could not be judged: {len(undecided)}, {[*undecided.values()][-1]}"
                self.progress.notice("undecided", f"{spec}: {note}")
            for kind, notice in disturbances(entry.final).items() if entry.final else ():
                self.progress.notice(kind, f"{spec}: in the final, {notice}")
            self._rows[spec] = Tuned(spec, outcome, self.store.readable(spec), note)
            self._best.setdefault(spec.family, []).append((spec.count, search.best_configs(SIBLINGS)))
            if self.binaries:
                self._packing.start(self._rows[spec].entry)
        self.progress.done(spec, outcome, entry.evaluation.us if entry else None, search.study.floor_us)

    def _time_fusions(self) -> None:
        """Time each fused kernel against its unfused sequence if that was never done, or if its composition kernel was
        retuned."""
        if self.provenance != MEASURED or self._stopping():
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
            lane = self._lanes()[0]
            times = lane.submit(lane.evaluator.fusion_times, *sources).result()
        except Exception as failure:
            if isinstance(failure, (ContextLostError, *BROKEN)):  # without isolation the former is final too
                self._break_off(f"{failure}. The same command continues from here")
            return str(failure) or type(failure).__name__
        if times is not None:
            self.store.put(with_unfused_time(entry, *times))
            self._rows[entry.spec] = replace(self._rows[entry.spec], entry=self.store.readable(entry.spec))
        return None

    def _config(self, spec: KernelSpec) -> Config:
        """The best config that is known for ``spec``, which need not be one of this run."""
        entry = self.store.readable(spec)
        if entry is not None and check_config(spec, entry.config, self.gpu) is None:
            return entry.config
        return self._incumbents_of(spec).configs[0]

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
            self.progress.queue(len(self._packing.under_way))
            self.pool.wait(self._packing.under_way, POLL_SECONDS)
            self._store_binaries()

    def _show(self, search: KernelSearch) -> None:
        study = search.study
        self.progress.current(
            search.spec,
            len(study.evaluated),
            search.budget.trials,
            search.best_us,
            study.floor_us,
            search.incumbent_us,
        )


def _lazily(make: Callable[[], Sequence[Config]]) -> Iterator[Config]:
    yield from make()
