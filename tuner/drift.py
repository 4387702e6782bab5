"""After an upgrade: measure the winners of a store again, each against the configs that it beat.

A winner was the fastest under the Triton, PyTorch, driver and template of its day. Its entry keeps the final that it
won, so few configs need measuring to learn whether it still is: the winner and its recorded runners-up pass the
accuracy gate again and are timed in turn. An entry without a final is measured against the config that a lookup without
it would give. Ties go to the winner.

Only entries whose environment or template differs from the present one are measured. With ``apply``, the result of each
is stored at once, with the present environment: a run that is interrupted or killed has lost nothing, and the next one
continues with the rest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from ..cache.entry import MEASURED, SEARCH, Contender, Entry, Evaluation, Final
from ..cache.store import Store
from ..cache.upgrade import Change, changes
from ..codegen.compile import CompileError, judge_failure
from ..codegen.cost import floor_us
from ..codegen.gpu import Gpu
from ..codegen.render import Source, render, template_digest
from ..codegen.spec import Config, KernelSpec, SpecError
from ..codegen.variants import check_config
from ..errors import DoratuneError, UsageError
from .drift_report import BROKEN, HELD, MOVED, UNJUDGED, Drifted, DriftResult
from .evaluation import BROKEN as NOTHING_WORKS
from .evaluation import (
    ContenderFailed,
    ContextLostError,
    Evaluator,
    GpuMemoryError,
    Rejected,
    Undecided,
)
from .final import decide
from .fusion import composition_of, with_unfused_time
from .kernel_search import IN_A_ROW
from .packing import Packing
from .progress import SilentProgress
from .workers import POLL_SECONDS, Compiled, CompilePool

EXACT = "exact"
"""The origin of the stored winner: the step of the lookup that gives it."""

Without = Callable[[KernelSpec], "tuple[Config, str] | None"]
"""Return the config that a lookup gives for a spec if its entry is not in the store, and the lookup's step."""

_VERDICTS = (Rejected, CompileError)
"""The failures that are a property of the config."""
SAME = "a lookup without the entry gives the same config"
"""Then there is nothing to measure a winner of the present versions against."""
_AHEAD = 2
"""Entries for each worker whose configs are compiled ahead."""
_DIGITS = 12
"""Of a template's digest, where it is shown."""


def drift(
    store: Store,
    evaluator: Evaluator,
    *,
    without: Without,
    op: str | None = None,
    everything: bool = False,
    lookups: bool = False,
    apply: bool = False,
    jobs: int | None = None,
    progress: SilentProgress | None = None,
) -> DriftResult:
    """Measure the winners in ``store`` again that are for the evaluator's GPU.

    Entries that were measured under the present versions are skipped, unless ``everything``. With ``op`` only those of
    that operation are looked at. With ``lookups`` each is measured against the config that a lookup without it gives
    today, and one of the present versions against that alone, if it is another config; if it loses, also against those
    that it beat. ``apply`` stores the results; without it nothing is written. ``jobs`` is the number of compile
    workers. The evaluator is closed at the end.

    Damaged rows, and entries that cannot be measured, are named in the result; the others go on.

    Raises:
        UsageError: the evaluator measures nothing.
        StoreError: the store cannot be read, or cannot be written with ``apply``.
    """
    said = progress or SilentProgress()
    pool = CompilePool(evaluator.gpu, jobs)
    try:
        if evaluator.provenance != MEASURED:
            raise UsageError(f"winners are measured again, and this evaluator's times are {evaluator.provenance}")
        if apply:
            store.put_all(())  # raises before anything is measured if the store cannot be written
        return _Run(store, evaluator, pool, without, everything, lookups, apply, said).measure(op)
    finally:
        said.close()
        pool.close()
        evaluator.close()


@dataclass
class _Player:
    """A config that is measured: the outcome of its compile and gate, and why it is ``out``, if it is."""

    config: Config
    origins: tuple[str, ...]
    source: Source | None = None
    compiled: Future[Compiled] | None = None
    evaluation: Evaluation | None = None
    out: str = ""


@dataclass
class _Job:
    """An entry to measure: its winner first among the players."""

    entry: Entry
    changes: tuple[Change, ...]
    players: list[_Player]
    notes: list[str] = field(default_factory=list)
    lookup_only: bool = False
    """Whether a winner of the present versions meets only what a lookup without it gives."""

    @property
    def champion(self) -> _Player:
        return self.players[0]

    @property
    def text_changed(self) -> bool:
        """Whether the installed template renders another text for the winner than was tuned."""
        source = self.champion.source
        return source is not None and source.digest != self.entry.source_digest


@dataclass
class _Run:
    store: Store
    evaluator: Evaluator
    pool: CompilePool
    without: Without
    everything: bool
    lookups: bool
    apply: bool
    progress: SilentProgress

    def __post_init__(self) -> None:
        self._gpu: Gpu = self.evaluator.gpu
        self._environment = self.evaluator.environment()
        self._packing = Packing(self.store, self.pool, self._environment, self.progress)
        self._rows: list[Drifted] = []
        self._unjudged_in_a_row = 0
        self._fault = ""

    def measure(self, op: str | None) -> DriftResult:
        entries, damaged = self.store.readable_entries(op=op)
        here = [entry for entry in entries if entry.spec.gpu == self._gpu.slug]
        measured = [entry for entry in here if entry.evaluation.provenance == MEASURED]
        found = [(entry, self._changes(entry)) for entry in measured]
        due = [(entry, changed) for entry, changed in found if changed or self.everything or self.lookups]
        # A fused kernel is timed against its composition kernel, so that is settled first.
        due.sort(key=lambda one: (composition_of(one[0].spec) is not None, str(one[0].spec)))
        if due:
            self.progress.start(len(due), 0)
        stopped = ""
        try:
            self._measure_all(due)
        except KeyboardInterrupt:
            stopped = "interrupt"
            self.pool.kill()
        return DriftResult(
            store=self.store.location,
            gpu=self._gpu.slug,
            environment=self._environment,
            apply=self.apply,
            lookups=self.lookups,
            rows=tuple(self._rows),
            current=len(found) - len(due),
            untimed=len(here) - len(measured),
            elsewhere=dict(Counter(entry.spec.gpu for entry in entries if entry.spec.gpu != self._gpu.slug)),
            damaged=tuple(map(str, damaged)),
            left=len(due) - len(self._rows),
            stopped="fault" if self._fault else stopped,
            fault=self._fault,
        )

    def _changes(self, entry: Entry) -> tuple[Change, ...]:
        found = changes(entry.environment, self._environment)
        try:
            digest = template_digest(entry.spec.op, entry.config.variant)
            same = digest == entry.template_digest or self._renders_the_same(entry)
        except SpecError:  # there is no such variant any more
            digest, same = "none", False
        return found if same else (*found, Change("template", entry.template_digest[:_DIGITS], digest[:_DIGITS]))

    def _renders_the_same(self, entry: Entry) -> bool:
        """Whether another template renders the text that was tuned."""
        if check_config(entry.spec, entry.config, self._gpu) is not None:
            return False
        return render(entry.spec, entry.config).digest == entry.source_digest

    def _measure_all(self, due: Sequence[tuple[Entry, tuple[Change, ...]]]) -> None:
        waiting = iter(due)
        ahead: deque[_Job] = deque()
        while not self._fault:
            for entry, changed in waiting:
                ahead.append(self._job(entry, changed))
                if len(ahead) > _AHEAD * self.pool.jobs:
                    break
            if not ahead:
                break
            job = ahead.popleft()
            row = self._judged(job)
            if self.apply:
                row = self._adopted(job, row)
            self._rows.append(row)
            self.progress.done(row.entry.spec, row.outcome, row.us, floor_us(row.entry.spec, self._gpu))
            self.evaluator.finish(row.entry.spec)
            self._store_binaries()
        while self._packing.under_way and not self._fault:
            self.pool.wait(self._packing.under_way, POLL_SECONDS)
            self._store_binaries()

    def _job(self, entry: Entry, changed: tuple[Change, ...]) -> _Job:
        """Start compiling what an entry is measured with."""
        lookup_only = self.lookups and not changed and not self.everything
        origins = {} if lookup_only else _runners_up(entry)
        notes = []
        if self.lookups or not origins:
            given, note = self._given(entry)
            notes.append(note if origins or lookup_only else f"no runner-up is recorded: {note}")
            origins = {**given, **origins}
        if lookup_only and not origins:
            return _Job(entry, changed, [_Player(entry.config, (EXACT,))], notes, lookup_only)
        job = _Job(entry, changed, [self._player(entry.spec, entry.config, (EXACT,))], notes, lookup_only)
        job.players += [self._player(entry.spec, config, why) for config, why in origins.items()]
        if job.text_changed:
            job.notes.append("its template now renders another text: a lookup refuses the entry as it is stored")
        return job

    def _given(self, entry: Entry) -> tuple[dict[Config, tuple[str, ...]], str]:
        """What a lookup without the entry gives, if that is another config, and a note about the comparison."""
        try:
            given = self.without(entry.spec)
        except DoratuneError as error:
            return {}, f"a lookup without the entry fails: {error}"
        if given is None or given[0] == entry.config:
            return {}, SAME
        return {given[0]: (given[1],)}, f"compared with what a lookup gives ({given[1]})"

    def _player(self, spec: KernelSpec, config: Config, origins: tuple[str, ...]) -> _Player:
        try:
            unfit = check_config(spec, config, self._gpu)
            if unfit is not None:
                return _Player(config, origins, out=f"does not suit the installed template: {unfit}")
            source = render(spec, config)
        except SpecError as error:
            return _Player(config, origins, out=f"does not render here: {error}")
        return _Player(config, origins, source, self.pool.submit(source))

    def _judged(self, job: _Job) -> Drifted:
        """Measure one entry."""
        row = Drifted(job.entry, UNJUDGED, job.changes)
        if job.lookup_only and len(job.players) == 1:  # there is nothing to measure
            if job.notes == [SAME]:
                return replace(row, outcome=HELD, config=job.entry.config, notes=(*job.notes, "not measured"))
            return replace(row, notes=tuple(job.notes))
        try:
            final = self._played(job)
            if job.lookup_only and (final is None or final.winner.config != job.entry.config) and not self._fault:
                tried = {player.config for player in job.players}
                job.players += [
                    self._player(job.entry.spec, config, why)
                    for config, why in _runners_up(job.entry).items()
                    if config not in tried
                ]
                final = self._played(job)
        except DoratuneError as failure:
            self._set_aside(failure)
            return replace(row, notes=(str(failure), *job.notes))
        self._unjudged_in_a_row = 0
        champion = job.champion
        notes = [f"{player.config} is out: {player.out}" for player in job.players[1:] if player.out]
        notes += [*job.notes, *(final.notices if final else ())]
        if final is not None and not final.settled:
            notes.append("the order was not settled within the budget of rounds")
        best = self._best(job, final)
        if champion.out:
            return replace(
                row, outcome=BROKEN, config=best.config if best else None, final=final, notes=(champion.out, *notes)
            )
        assert champion.evaluation is not None
        us, before = champion.evaluation.us, job.entry.evaluation.us
        loss = None
        if final is not None:
            timed = {contender.config: contender.us for contender in final.contenders}
            loss = max(0.0, timed[champion.config] / final.winner.us - 1.0)
            if job.entry.final is not None:
                us, before = timed[champion.config], job.entry.final.winner.us
        config = best.config if best else champion.config
        outcome = HELD if config == champion.config else MOVED
        return replace(
            row, outcome=outcome, config=config, loss=loss, us=us, us_before=before, final=final, notes=tuple(notes)
        )

    def _played(self, job: _Job) -> Final | None:
        """Gate the players of a job and time those that pass in turn. None if fewer than two are left.

        Raises:
            DoratuneError: one of them could not be judged, so the order is not known.
        """
        spec, count = job.entry.spec, len(job.players)
        for place, player in enumerate(job.players):
            self.progress.current(spec, place, count, None, floor_us(spec, self._gpu))
            self._gate(player)
        if job.champion.out and all(player.out for player in job.players) and not self._fault:
            tried = {player.config for player in job.players}
            for config, origins in self._given(job.entry)[0].items():
                if config not in tried:
                    job.players.append(self._player(spec, config, origins))
                    self._gate(job.players[-1])
        while True:
            playing = [player for player in job.players if not player.out]
            if self._fault and not job.champion.out:
                raise Undecided(self._fault)
            if len(playing) < 2 or self._fault:
                return None
            sources = [player.source for player in playing if player.source is not None]
            try:
                times = self.evaluator.final(sources)
            except ContenderFailed as failed:
                if not isinstance(failed.cause, _VERDICTS):
                    raise failed.cause from failed
                self._put_out(playing[failed.index], failed.cause)
                continue
            if times is None:
                raise Undecided("the evaluator times nothing in turn")
            contenders = [
                Contender(player.config, player.origins, samples)
                for player, samples in zip(playing, times.samples_us, strict=True)
            ]
            return decide(contenders, settled=times.settled, notices=times.notices)

    def _gate(self, player: _Player) -> None:
        """Compile and evaluate a player.

        Raises:
            DoratuneError: it could not be judged.
        """
        if player.source is None or player.compiled is None:
            return
        while not player.compiled.done():
            self.pool.wait([player.compiled], POLL_SECONDS)
        try:
            player.evaluation = self.evaluator.evaluate(player.source, player.compiled.result())
        except Exception as error:
            what = f"{player.config} of {player.source.spec} does not run"
            failure = error if isinstance(error, DoratuneError) else judge_failure(error, what)
            if not isinstance(failure, _VERDICTS):
                raise failure from error
            self._put_out(player, failure)

    def _put_out(self, player: _Player, verdict: DoratuneError) -> None:
        """Note why a player cannot win; the run ends if it destroyed the GPU context."""
        player.out = str(verdict)
        if isinstance(verdict, ContextLostError):
            self._fault = f"{verdict}. The same command continues with the other entries"

    def _set_aside(self, failure: DoratuneError) -> None:
        self._unjudged_in_a_row += 1
        if isinstance(failure, NOTHING_WORKS) or (
            self._unjudged_in_a_row >= IN_A_ROW and not isinstance(failure, GpuMemoryError)
        ):
            self._fault = f"{failure}. The same command continues from here"

    def _best(self, job: _Job, final: Final | None) -> _Player | None:
        """The player that won, or that is left alone."""
        left = [player for player in job.players if not player.out and player.evaluation is not None]
        if final is not None:
            return next(player for player in left if player.config == final.winner.config)
        return left[0] if left and not self._fault else None

    def _adopted(self, job: _Job, row: Drifted) -> Drifted:
        """Store the result of one entry, if it has one."""
        before = job.entry
        best = self._best(job, row.final)
        only_regret = job.lookup_only and row.outcome == HELD
        unusable = best is None or best.source is None or best.evaluation is None
        if row.outcome == UNJUDGED or (unusable and not only_regret):
            return row
        if self.store.readable(before.spec) != before:
            return replace(row, notes=(*row.notes, "another process has changed the entry since: left as it is"))
        if only_regret:
            self.store.put(replace(before, lookup_regret=self._regret(before, before.config, row.final)))
            return replace(row, adopted=True)
        assert best is not None
        assert best.source is not None
        assert best.evaluation is not None
        # Trials of another text say nothing about this one: `doratune tune` searches again.
        trials = len(job.players) if job.text_changed else before.evaluation.trials
        entry = Entry(
            spec=before.spec,
            config=best.config,
            template_digest=template_digest(before.spec.op, best.config.variant),
            source_digest=best.source.digest,
            source=best.source.text,
            evaluation=replace(best.evaluation, trials=trials),
            environment=self._environment,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            final=row.final,
            lookup_regret=self._regret(before, best.config, row.final),
        )
        if before.evaluation.unfused_us is not None:
            entry, note = self._with_fusion(entry, best.source)
            row = replace(row, notes=(*row.notes, *note))
        packed = bool(self.store.binary_keys(before.code_digest))
        self.store.put(entry)
        if packed:
            self._packing.start(entry)
        return replace(row, adopted=True)

    def _regret(self, before: Entry, config: Config, final: Final | None) -> float | None:
        """How much longer the config takes that a lookup without the entry gives; what was known if it did not play."""
        known = before.lookup_regret if config == before.config else None
        try:
            given = self.without(before.spec)
        except DoratuneError:
            return known
        if self.lookups and given is not None and given[0] == config:
            return 1.0
        if given is None or final is None:
            return known
        timed = {contender.config: contender.us for contender in final.contenders}
        return timed[given[0]] / final.winner.us if given[0] in timed else known

    def _with_fusion(self, entry: Entry, source: Source) -> tuple[Entry, list[str]]:
        """The entry of a fused kernel with the present time of its unfused sequence; without one, and why, if that
        fails."""
        composition = composition_of(entry.spec)
        assert composition is not None
        try:
            stored = self.store.readable(composition)
            given = (stored.config, EXACT) if stored is not None else self.without(composition)
            if given is None:
                return entry, ["no composition kernel to time it against"]
            player = self._player(composition, given[0], (given[1],))
            if player.source is None or player.compiled is None:
                return entry, [f"not timed against its unfused sequence: {player.out}"]
            while not player.compiled.done():
                self.pool.wait([player.compiled], POLL_SECONDS)
            player.compiled.result()
            times = self.evaluator.fusion_times(source, player.source)
        except DoratuneError as failure:
            if isinstance(failure, NOTHING_WORKS):
                self._fault = f"{failure}. The same command continues from here"
            return entry, [f"not timed against its unfused sequence: {failure}"]
        return (entry, []) if times is None else (with_unfused_time(entry, *times), [])

    def _store_binaries(self) -> None:
        broken = self._packing.store_made()
        if broken is not None:
            self._fault = f"{broken}. What was applied so far is stored; the same command continues from here"


def _runners_up(entry: Entry) -> dict[Config, tuple[str, ...]]:
    """The other configs of the final that the entry's config won, and why they play again."""
    recorded = entry.final.contenders if entry.final else ()
    return {one.config: _origins(one) for one in recorded if one.config != entry.config}


def _origins(contender: Contender) -> tuple[str, ...]:
    """Why a contender of an earlier final plays again: it is no longer the exact entry, if it ever was."""
    return tuple(origin for origin in contender.origins if origin != EXACT) or (SEARCH,)
