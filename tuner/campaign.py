"""Who tunes what: the workers that share a study storage hand out kernels among themselves.

What is handed out is a *family*: one operation and shape in all token buckets, which share code and winners. The queue
is an Optuna study, the *plan*, with one trial for each time that a family is to be done. A trial waits until a worker
makes it its own, in one transaction of the database; the worker then records a heartbeat for it (Optuna's) until the
family is finished. When a heartbeat has not come for the grace period, Optuna fails the trial, and the next worker
without work queues the family again. The measurements themselves are in the kernels' own studies (:mod:`.studies`),
which the next worker continues: a killed worker loses the candidate under evaluation and nothing else.

**One GPU model for each plan.** The name of the plan has the GPU's name, Triton's version and how times are obtained,
as the kernels' studies have: workers whose GPU or Triton differs have another plan in the same database and never mix
their times. The plan does not depend on the effort or on the model, so runs of different models that need the same
kernel do not search it at the same time either.

**What the store lacks.** Only the store says what is done. ``lacks`` is asked when a family is claimed, and again after
another worker has finished it: a worker with a store of its own then tunes the family too, from trials that exist.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from ..cache.entry import Environment
from ..codegen.spec import KernelSpec
from ..temporaries import machine, started
from .study_storage import HEARTBEAT, StudyStorageError, fail_stale, patiently

RETRIES = 3
"""How often a family is queued again after a worker ended without finishing or releasing it, before it is given up."""

LEAST_HELD = 4
"""Families that a worker may hold however few are left."""

POLL_SECONDS = 2.0
"""A worker that found nothing to claim asks the database again after this long."""

_JOIN_SECONDS = 15.0
_FAMILY, _WORKER = "family", "worker"
_OPEN = (TrialState.WAITING, TrialState.RUNNING)
_IDENTITY = ("gpu", "architecture", "gpu_name", "triton")
_ADVISORY_LOCK = 0x646F7262

T = TypeVar("T")


def plan_name(environment: Environment, provenance: str) -> str:
    """The name of the study that workers of this environment share."""
    return f"plan {provenance} {environment.gpu_name or environment.gpu} triton {environment.triton}"


@dataclass(frozen=True)
class _Claim:
    """A family that this worker holds: the number of its trial in the plan, and the clock when it was claimed."""

    number: int
    since: float


class Campaign:
    """A worker's part in the plan. Safe to use from several threads.

    ``families`` are handed out in their order. With ``all_at_once`` this worker takes all that it can, which is faster
    where it is the only one; otherwise it leaves some for who comes later. ``lacks`` says whether the store still needs
    a family. Once ``stopping`` says so, no more families are queued, which takes milliseconds for each.
    ``storage`` is one of :func:`~.study_storage.open_study_storage`, ``url`` its location for messages.
    ``lanes`` is how many GPUs this process measures on.

    Raises:
        StudyStorageError: the database failed, or its plan is of another GPU or Triton.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        families: Sequence[KernelSpec],
        *,
        lacks: Callable[[KernelSpec], bool],
        environment: Environment,
        provenance: str,
        url: str = "",
        all_at_once: bool = False,
        lanes: int = 1,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.given_up: dict[KernelSpec, str] = {}
        """Families that nobody will try again in this run, with the reason."""
        self.notices: list[str] = []
        """What the user should know about the other workers."""
        self._storage = storage
        self._url = url
        self._lacks = lacks
        self._all_at_once = all_at_once
        self._stopping = stopping
        self._record_heartbeat = getattr(storage, "record_heartbeat", lambda trial_id: None)  # none in memory
        self._families = {str(family): family for family in families}
        self._wanted = dict.fromkeys(families)
        self._held: dict[KernelSpec, _Claim] = {}
        versions = {"torch": environment.torch, "driver": environment.driver}
        self._worker = {**_this_process(), **versions, "lanes": lanes}
        self._state = threading.Lock()  # of _held and _wanted
        self._turn = threading.RLock()  # one thread claims at a time
        self._next_look = 0.0
        self._full = False  # whether the last look at the queue ended because this worker holds its share
        self._last_beat = time.time()
        self._study = self._patiently(lambda: self._join(environment, provenance))
        self._study_id = self._patiently(lambda: storage.get_study_id_from_name(self._study.study_name))
        self._patiently(lambda: self._queue(joining=True))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_closed, name="doratune heartbeat", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> bool:
        """Whether families of this run are queued or with other workers, so that :meth:`claim` may return one later."""
        with self._state:
            return any(family not in self._held for family in self._wanted)

    def claim(self) -> KernelSpec | None:
        """Make the next family this worker's own; None when there is none now, or it holds its share already.

        After None the database is not asked again for :data:`POLL_SECONDS`.
        """
        with self._turn:
            if not self.waiting or time.monotonic() < self._next_look:
                return None
            while (family := self._patiently(self._take)) is not None:
                if self._lacks(family):
                    return family
                self.finished(family)
            queued = not self._full and self._patiently(self._queue)
            self._next_look = 0.0 if queued else time.monotonic() + POLL_SECONDS
            return None

    def holds(self, family: KernelSpec) -> bool:
        """Whether the family is still this worker's. It is not after a heartbeat has failed to come for too long, as
        when the machine was suspended: another worker may then have it, and this one should stop working on it.
        """
        if time.time() - self._last_beat > HEARTBEAT.grace:
            self._beat()
        with self._state:
            return family in self._held

    def finished(self, family: KernelSpec) -> None:
        """Record that the family needs no more work. One that this worker has lost meanwhile may be finished too."""
        with self._state:
            claim = self._held.pop(family, None)
            self._wanted.pop(family, None)
        if claim is not None:
            seconds = time.monotonic() - claim.since
            self._patiently(lambda: self._set_state(claim.number, TrialState.COMPLETE, [seconds]))

    def released(self, family: KernelSpec) -> None:
        """Give the family back, unfinished: other workers may claim it at once, and this one will not."""
        with self._state:
            claim = self._held.pop(family, None)
            self._wanted.pop(family, None)
        if claim is None:
            return
        # Tried once: after a commit whose answer was lost, a second time could take it from its next worker. If the
        # database does not answer, the family is queued again after the grace period, since its heartbeat has ended.
        with suppress(SQLAlchemyError, optuna.exceptions.OptunaError, KeyError, RuntimeError):
            # Its next worker must not be taken for this one, which may have ended by then.
            self._storage.set_trial_user_attr(self._trial_id(claim.number), _WORKER, {})
            self._set_state(claim.number, TrialState.WAITING)

    def close(self) -> None:
        """Release every family held, and end the heartbeat. The storage stays open."""
        with self._state:
            self._wanted.clear()
            held = list(self._held)
        for family in held:
            self.released(family)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _join(self, environment: Environment, provenance: str) -> optuna.Study:
        study = optuna.create_study(
            study_name=plan_name(environment, provenance), storage=self._storage, load_if_exists=True
        )
        there = study.user_attrs
        for name in _IDENTITY:
            ours, theirs = getattr(environment, name), there.get(name)
            if theirs is None:
                study.set_user_attr(name, ours)
            elif theirs != ours:
                raise StudyStorageError(
                    f"study storage {self._url}: the study {study.study_name!r} is of {name} {theirs!r}, and this is "
                    f"{ours!r}; times of both must not mix. Name another storage with --study-storage"
                )
        return study

    def _take(self) -> KernelSpec | None:
        """Claim the first family that waits, if this worker does not hold its share yet."""
        trials = [
            trial for trial in self._study.get_trials(deepcopy=False, states=_OPEN) if _FAMILY in trial.user_attrs
        ]
        self._compare_workers(trials)
        first: dict[str, FrozenTrial] = {}
        for trial in trials:
            first.setdefault(trial.user_attrs[_FAMILY], trial)
        with self._state:
            ours = {name: family for name, family in self._families.items() if family in self._wanted}
            held = set(self._held)
        self._full = not self._all_at_once and len(held) >= _share(
            [trial for name, trial in first.items() if name in ours], self._worker
        )
        if self._full:
            return None
        for trial in trials:
            name = trial.user_attrs[_FAMILY]
            if name not in ours or trial.state != TrialState.WAITING:
                continue
            if first[name] is not trial:  # queued twice, by workers that joined at one moment: the first one counts
                self._set_state(trial.number, TrialState.PRUNED)
            elif self._make_ours(trial, ours[name]):
                return ours[name]
        return None

    def _make_ours(self, trial: FrozenTrial, family: KernelSpec) -> bool:
        trial_id = self._trial_id(trial.number)
        # First the heartbeat: Optuna takes a running trial that never had one for alive, for ever.
        self._record_heartbeat(trial_id)
        try:
            if not self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
        except RuntimeError:  # finished meanwhile
            return False
        # If this fails, the trial is nobody's and has no further heartbeat: it is queued again.
        self._storage.set_trial_user_attr(trial_id, _WORKER, self._worker)
        with self._state:
            self._held[family] = _Claim(trial.number, time.monotonic())
        return True

    def _queue(self, joining: bool = False) -> bool:
        """Queue the families wanted that no open trial stands for; return whether there were any."""
        with self._one_at_a_time() as ours:
            if not ours:
                return False
            fail_stale(self._study)
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and _has_ended(trial.user_attrs.get(_WORKER, {})):
                    self._set_state(trial.number, TrialState.FAIL)
            trials = self._study.get_trials(deepcopy=False)
            alone = all(trial.state != TrialState.RUNNING for trial in trials)
            histories: dict[str, list[FrozenTrial]] = {name: [] for name in self._families}
            for trial in trials:
                name = trial.user_attrs.get(_FAMILY)
                if name in histories and trial.state != TrialState.PRUNED:
                    histories[name].append(trial)
            with self._state:
                wanted = [family for family in self._wanted if family not in self._held]
            missing, last = [], []
            for family in wanted:
                history = histories[str(family)]
                if any(trial.state in _OPEN for trial in history):
                    continue
                failures = _failures(history)
                if failures <= RETRIES:
                    if joining or not history or failures or self._lacks(family):
                        missing.append(family)
                    else:
                        self._drop(family)
                elif joining and alone:  # a new run tries once more, but after everything else
                    last.append(family)
                else:
                    self.given_up[family] = (
                        f"given up: {failures} workers that had it ended without a word; see their logs. "
                        "A run that starts when no other worker is at work tries it again"
                    )
                    self._drop(family)
            for family in missing + last:
                if self._stopping():
                    break
                waiting = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={_FAMILY: str(family)})
                self._study.add_trial(waiting)
            return bool(missing or last)

    def _drop(self, family: KernelSpec) -> None:
        with self._state:
            self._wanted.pop(family, None)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[bool]:
        """Whether no other worker is queueing now. Elsewhere than on PostgreSQL they may be; see :meth:`_take`."""
        engine = getattr(self._storage, "engine", None)
        if engine is None or engine.dialect.name != "postgresql":
            yield True
            return
        with engine.connect() as connection, connection.begin():
            key = {"lock": _ADVISORY_LOCK, "study": self._study_id}
            yield bool(connection.execute(text("SELECT pg_try_advisory_xact_lock(:lock, :study)"), key).scalar())

    def _compare_workers(self, trials: Iterable[FrozenTrial]) -> None:
        """Note the workers whose PyTorch or driver differs from this one's."""
        for trial in trials:
            other = trial.user_attrs.get(_WORKER, {})
            for name in ("torch", "driver"):
                ours, theirs = self._worker[name], other.get(name, self._worker[name])
                notice = f"a worker on {other.get('host')} has {name} {theirs}, this one {ours}: their times may differ"
                if trial.state == TrialState.RUNNING and theirs != ours and notice not in self.notices:
                    self.notices.append(notice)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _set_state(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Change a trial's state, unless it is finished already."""
        with suppress(RuntimeError):
            self._storage.set_trial_state_values(self._trial_id(number), state, values)

    def _beat_until_closed(self) -> None:
        interval = HEARTBEAT.interval
        while not self._stop.wait(interval):
            self._beat()
        self._storage.remove_session()

    def _beat(self) -> None:
        """Record a heartbeat of what is held, and forget what is held no more."""
        with self._state:
            held = dict(self._held)
        try:
            trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if held else []
            running = {trial.number for trial in trials}
            for claim in held.values():
                if claim.number in running:
                    self._record_heartbeat(self._trial_id(claim.number))
        except (SQLAlchemyError, optuna.exceptions.OptunaError, KeyError):
            return  # the next one tries again; the grace period is several intervals long
        with self._state:
            for family, claim in held.items():
                if claim.number not in running and self._held.get(family) == claim:
                    del self._held[family]
        self._last_beat = time.time()

    def _patiently(self, work: Callable[[], T]) -> T:
        return patiently(self._url, work)


def _failures(history: Sequence[FrozenTrial]) -> int:
    """How often in a row a family's worker ended, up to now."""
    count = 0
    for trial in history:
        count = count + 1 if trial.state == TrialState.FAIL else 0
    return count


def _share(trials: Sequence[FrozenTrial], worker: dict[str, object]) -> int:
    """How many families one worker may hold now: half of its even share, so that there is work for who comes later
    and all end at about the same time; but :data:`LEAST_HELD` for each GPU, so that some can be compiled
    while one is measured.
    """
    names = ("machine", "pid", "started", "lanes")
    workers = {tuple(trial.user_attrs[_WORKER].get(name) for name in names) for trial in trials if _is_taken(trial)}
    workers.add(tuple(worker[name] for name in names))
    lanes: dict[tuple[object, ...], int] = {known: int(str(known[-1] or 1)) for known in workers}
    mine = lanes[tuple(worker[name] for name in names)]
    return mine * max(LEAST_HELD, math.ceil(len(trials) / (2 * sum(lanes.values()))))


def _is_taken(trial: FrozenTrial) -> bool:
    """Whether a worker has the trial; one that was released still names the worker it had."""
    return trial.state == TrialState.RUNNING and _WORKER in trial.user_attrs


def _this_process() -> dict[str, object]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine(), "pid": pid, "started": started(pid)}


def _has_ended(worker: dict[str, object]) -> bool:
    """Whether a worker is known to have ended: only a process of this machine can be, without waiting."""
    where, pid = worker.get("machine"), worker.get("pid")
    return bool(where) and where == machine() and isinstance(pid, int) and started(pid) != worker.get("started")
