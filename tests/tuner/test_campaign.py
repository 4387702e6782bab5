"""Workers that share a study storage share out the kernels: nothing is done twice, and what a worker leaves when it is
stopped or killed another one finishes. On a real PostgreSQL server and in a SQLite file, by processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from doratune.cache.entry import Environment
from doratune.cache.store import Store
from doratune.codegen.spec import KernelSpec
from doratune.tuner import campaign, study_storage
from doratune.tuner.campaign import RETRIES, Campaign, plan_name
from doratune.tuner.outcome import FAILED, KEPT, TUNED
from doratune.tuner.study_storage import StudyStorageError, open_study_storage, patiently, release

from ..postgresql import Server
from .fakes import forward_spec

HERE = Environment(gpu="h200", architecture="sm_90", triton="3.6", torch="2.10", driver="570", gpu_name="NVIDIA H200")
FAMILIES = [forward_spec(1, 1024 * n) for n in range(1, 9)]


@pytest.fixture(scope="module")
def nursery() -> Iterator[BaseContext]:
    """Where workers are forked from a process that has imported everything: PyTorch alone takes seconds."""
    sys.path.insert(0, str(Path(__file__).parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaign_worker"])
    yield context
    sys.path.remove(str(Path(__file__).parent))


class Workers:
    """Processes of ``campaign_worker.py`` that share a storage, a store and a log of what they evaluate."""

    def __init__(self, nursery: BaseContext, url: str, store: str, folder: Path) -> None:
        self.url, self.store, self.folder = url, store, folder
        self._nursery = nursery
        self._processes: dict[str, BaseProcess] = {}
        folder.mkdir(exist_ok=True)

    def start(self, *names: str, **options: Any) -> None:
        import campaign_worker

        for name in names:
            given = {"name": name, "url": self.url, "store": self.store, "folder": str(self.folder), "host": name}
            worker = campaign_worker.Options(**{**given, **options})
            self._processes[name] = self._nursery.Process(target=campaign_worker.run, args=(worker,))
            self._processes[name].start()

    def stop(self, name: str, number: signal.Signals) -> None:
        process = self._processes[name]
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)

    def exit_code(self, name: str) -> int | None:
        self._processes[name].join(120)
        return self._processes[name].exitcode

    def errors(self, name: str) -> str:
        file = self.folder / f"{name}.stderr"
        return file.read_text() if file.exists() else ""

    def end(self, name: str) -> dict[str, Any]:
        """Wait for a worker's end and return its outcomes."""
        assert self.exit_code(name) == 0, self.errors(name)
        assert self.errors(name) == ""
        result: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return result

    def evaluated(self) -> list[tuple[str, float, str]]:
        """Each evaluation begun: the worker, the time, and the spec with its config."""
        log = self.folder / "log"
        return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []

    def wait_until(self, count: int, name: str) -> None:
        """Wait until a worker has begun so many evaluations."""
        deadline = time.monotonic() + 60
        while sum(worker == name for worker, _, _ in self.evaluated()) < count:
            assert self._processes[name].is_alive(), self.errors(name)
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def twice(self) -> list[str]:
        """What was evaluated more than once."""
        return [what for what, count in Counter(what for _, _, what in self.evaluated()).items() if count > 1]

    def stored(self) -> int:
        """The number of trials in the kernels' studies; every trial of a plan must have ended."""
        storage = open_study_storage(self.url)
        count = 0
        try:
            for summary in optuna.get_all_study_summaries(storage):
                trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
                assert all(trial.state.is_finished() for trial in trials)
                count += 0 if summary.study_name.startswith("plan ") else len(trials)
        finally:
            release(storage)
        return count

    def kill_all(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join(60)


@pytest.fixture(params=["postgresql", "sqlite"])
def workers(request: pytest.FixtureRequest, nursery: BaseContext, tmp_path: Path) -> Iterator[Workers]:
    if request.param == "postgresql":
        url = store = str(request.getfixturevalue("postgresql_url"))
    else:
        url, store = str(tmp_path / "studies.sqlite"), str(tmp_path / "store.sqlite")
    group = Workers(nursery, url, store, tmp_path)
    yield group
    group.kill_all()


@pytest.fixture
def on_postgresql(nursery: BaseContext, postgresql_url: str, tmp_path: Path) -> Iterator[Workers]:
    group = Workers(nursery, postgresql_url, postgresql_url, tmp_path)
    yield group
    group.kill_all()


def all_stored(workers: Workers, last: int = 6) -> None:
    with Store.open(workers.store) as store:
        entries = {entry.spec for entry in store.entries()}
    assert entries == {forward_spec(tokens, 1024 * n) for n in range(1, last + 1) for tokens in (1024, 2048)}


@pytest.mark.slow
def test_two_workers_do_twice_as_much_and_nothing_twice(
    on_postgresql: Workers, nursery: BaseContext, tmp_path: Path
) -> None:
    many: dict[str, Any] = {"last": 8, "pause": 0.1}
    alone = Workers(nursery, on_postgresql.url, str(tmp_path / "alone.sqlite"), tmp_path / "alone")
    alone.start("alone", gpu_name="another", **many)  # another GPU's plan and studies
    alone.end("alone")
    on_postgresql.start("a", "b", **many)
    ends = [on_postgresql.end(name) for name in ("a", "b")]

    def rate(group: Workers) -> float:
        """Evaluations a second while every worker of the group was at work."""
        begun = group.evaluated()
        names = {name for name, _, _ in begun}
        first = max(min(at for worker, at, _ in begun if worker == name) for name in names)
        last = min(max(at for worker, at, _ in begun if worker == name) for name in names)
        return sum(first <= at <= last for _, at, _ in begun) / (last - first)

    gain = rate(on_postgresql) / rate(alone)
    print(f"two workers: {gain:.2f} times the trials a second of one")
    assert gain >= 1.5
    assert on_postgresql.twice() == []
    assert sorted(what for _, _, what in on_postgresql.evaluated()) == sorted(w for _, _, w in alone.evaluated())
    done = Counter(spec for end in ends for spec, (outcome, _) in end["rows"].items() if outcome == TUNED)
    assert len(done) == 16
    assert set(done.values()) == {1}  # each by one worker; the other one found it in the store
    assert {outcome for end in ends for outcome, _ in end["rows"].values()} == {TUNED, KEPT}
    all_stored(on_postgresql, last=8)


@pytest.mark.slow
def test_what_a_killed_worker_held_is_finished_by_another(workers: Workers) -> None:
    workers.start("killed", "other")
    workers.wait_until(8, "killed")
    workers.wait_until(3, "other")
    workers.stop("killed", signal.SIGKILL)
    under_way = [what for worker, _, what in workers.evaluated() if worker == "killed"][-1]
    end = workers.end("other")
    assert end["stopped"] == ""
    assert {outcome for outcome, _ in end["rows"].values()} <= {TUNED, KEPT}
    assert set(workers.twice()) <= {under_way}
    assert workers.stored() == len({what for _, _, what in workers.evaluated()})  # what was evaluated is not lost
    all_stored(workers)


@pytest.mark.slow
def test_the_same_command_on_the_same_host_need_not_wait_for_the_heartbeat(workers: Workers) -> None:
    patient: dict[str, Any] = {"host": "", "interval": 100, "grace": 1000}
    workers.start("killed", **patient)
    workers.wait_until(8, "killed")
    workers.stop("killed", signal.SIGKILL)
    workers.start("again", **patient)
    assert {outcome for outcome, _ in workers.end("again")["rows"].values()} <= {TUNED, KEPT}
    assert len(workers.twice()) <= 1
    all_stored(workers)


@pytest.mark.slow
def test_workers_come_and_go(workers: Workers) -> None:
    long: dict[str, Any] = {"last": 10, "pause": 0.1, "interval": 100, "grace": 1000}  # no heartbeat is waited for
    workers.start("first", "second", **long)
    workers.wait_until(6, "first")
    workers.stop("first", signal.SIGTERM)
    assert workers.end("first")["stopped"] == "interrupt"
    workers.start("late", **long)
    for name in ("second", "late"):
        assert {outcome for outcome, _ in workers.end(name)["rows"].values()} <= {TUNED, KEPT}
    assert workers.twice() == []
    assert {worker for worker, _, _ in workers.evaluated()} == {"first", "second", "late"}
    assert workers.stored() == len(workers.evaluated())
    all_stored(workers, last=10)


@pytest.mark.slow
def test_five_workers_started_at_one_moment_do_nothing_twice(workers: Workers) -> None:
    names = [f"w{n}" for n in range(5)]
    workers.start(*names, grace=60)
    for name in names:
        assert {outcome for outcome, _ in workers.end(name)["rows"].values()} <= {TUNED, KEPT}
    assert workers.twice() == []
    all_stored(workers)


@pytest.mark.slow
def test_a_kernel_that_kills_its_workers_is_given_up(on_postgresql: Workers) -> None:
    victims = [f"victim{attempt}" for attempt in range(RETRIES + 1)]
    on_postgresql.start("steady", last=2, pause=5.0, grace=600)  # a run is under way all the time
    on_postgresql.wait_until(1, "steady")
    deadly: dict[str, Any] = {"first": 3, "last": 3, "deadly": 3, "host": ""}
    for name in victims:
        on_postgresql.start(name, **deadly)
        assert on_postgresql.exit_code(name) == 9, on_postgresql.errors(name)
    on_postgresql.start("last", **deadly)
    rows = on_postgresql.end("last")["rows"]
    failed = {spec: note for spec, (outcome, note) in rows.items() if outcome == FAILED}
    assert set(failed) == {str(forward_spec(tokens, 3072)) for tokens in (1024, 2048)}
    assert all(f"{RETRIES + 1} workers" in note for note in failed.values())


@pytest.mark.slow
def test_a_database_that_restarts_costs_nothing(on_postgresql: Workers, postgresql_server: Server) -> None:
    on_postgresql.start("a", "b", grace=20)
    for name in ("a", "b"):
        on_postgresql.wait_until(5, name)
    postgresql_server.stop()
    time.sleep(1.0)
    postgresql_server.start()
    for name in ("a", "b"):
        if on_postgresql.exit_code(name) != 0:  # the store, which is not waited for
            assert "the database cannot be reached" in on_postgresql.errors(name)
            assert "Traceback" not in on_postgresql.errors(name)
    on_postgresql.start("c")
    assert {outcome for outcome, _ in on_postgresql.end("c")["rows"].values()} <= {TUNED, KEPT}
    assert on_postgresql.twice() == []
    assert on_postgresql.stored() == len(on_postgresql.evaluated())
    all_stored(on_postgresql)


# One process, several campaigns: each with a storage of its own, as in processes.

Join = Callable[..., Campaign]


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return str(tmp_path / "studies.sqlite")


@pytest.fixture
def join(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Join]:
    """Joins the plan at ``url``; ``done`` is a store's families."""
    study_storage.quiet()
    monkeypatch.setattr(campaign, "POLL_SECONDS", 0.0)
    opened: list[tuple[Campaign, optuna.storages.BaseStorage]] = []

    def join_plan(
        families: list[KernelSpec],
        done: set[KernelSpec] | None = None,
        environment: Environment = HERE,
        **options: Any,
    ) -> Campaign:
        storage = open_study_storage(url)
        stored = set() if done is None else done
        joined = Campaign(
            storage,
            families,
            lacks=lambda family: family not in stored,
            environment=environment,
            provenance="measured",
            url=url,
            **options,
        )
        opened.append((joined, storage))
        return joined

    yield join_plan
    for joined, storage in opened:
        joined.close()
        release(storage)


def plan_states(url: str) -> Counter[TrialState]:
    storage = open_study_storage(url)
    try:
        study = optuna.load_study(study_name=plan_name(HERE, "measured"), storage=storage)
        return Counter(trial.state for trial in study.trials)
    finally:
        release(storage)


def plan_workers(url: str) -> list[object]:
    storage = open_study_storage(url)
    try:
        study = optuna.load_study(study_name=plan_name(HERE, "measured"), storage=storage)
        return [trial.user_attrs.get("worker") for trial in study.trials]
    finally:
        release(storage)


def beat_was(url: str, seconds: float) -> None:
    """Let the last heartbeat of everything be so many seconds ago."""
    storage = open_study_storage(url)
    assert isinstance(storage, optuna.storages.RDBStorage)
    with storage.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            ago = f"datetime(heartbeat, '-{seconds} seconds')"
        else:
            ago = f"heartbeat - interval '{seconds} seconds'"
        connection.exec_driver_sql(f"UPDATE trial_heartbeats SET heartbeat = {ago}")
    release(storage)


def test_families_are_handed_out_in_order_and_each_once(join: Join) -> None:
    done: set[KernelSpec] = set()
    one, two = join(FAMILIES, done), join(FAMILIES, done)
    order = [one.claim(), two.claim(), one.claim(), two.claim()]
    assert order == FAMILIES[:4]
    for worker, family in zip((one, two, one, two), FAMILIES[:4], strict=True):
        done.add(family)
        worker.finished(family)
    while one.waiting:
        taken = [(worker, family) for worker in (one, two) if (family := worker.claim()) is not None]
        assert len({family for _, family in taken}) == len(taken)
        assert not done & {family for _, family in taken}
        for worker, family in taken:
            done.add(family)
            worker.finished(family)
    assert done == set(FAMILIES)
    assert two.claim() is None
    assert not two.waiting


def test_one_worker_does_not_take_everything(join: Join) -> None:
    first = join(FAMILIES)
    taken = [family for _ in FAMILIES if (family := first.claim()) is not None]
    assert len(taken) == 4
    second = join(FAMILIES)
    assert second.claim() == FAMILIES[4]


def test_a_worker_that_is_alone_takes_everything_at_once(join: Join) -> None:
    first = join(FAMILIES, all_at_once=True)
    assert [first.claim() for _ in FAMILIES] == FAMILIES


def test_what_is_released_is_handed_out_again(join: Join, url: str) -> None:
    first, second = join(FAMILIES[:2]), join(FAMILIES[:2])
    assert [first.claim(), first.claim(), first.claim()] == [*FAMILIES[:2], None]
    assert second.claim() is None
    assert second.waiting
    first.close()
    assert plan_workers(url) == [{}, {}]  # so that nobody takes its next worker for dead when this one is
    assert [second.claim(), second.claim()] == FAMILIES[:2]


def test_a_worker_without_a_heartbeat_loses_its_families_and_notices(join: Join, url: str) -> None:
    asleep, other = join(FAMILIES[:1]), join(FAMILIES[:1])
    assert asleep.claim() == FAMILIES[0]
    assert asleep.holds(FAMILIES[0])
    assert other.claim() is None
    beat_was(url, study_storage.HEARTBEAT.grace + 5)
    assert other.claim() is None  # it queues the family
    assert other.claim() == FAMILIES[0]
    asleep._last_beat -= study_storage.HEARTBEAT.grace + 5
    assert not asleep.holds(FAMILIES[0])
    asleep.finished(FAMILIES[0])  # harmless
    assert other.holds(FAMILIES[0])
    other.finished(FAMILIES[0])
    assert plan_states(url) == {TrialState.FAIL: 1, TrialState.COMPLETE: 1}


def test_a_heartbeat_keeps_the_families(join: Join, url: str) -> None:
    one, other = join(FAMILIES[:1]), join(FAMILIES[:1])
    assert one.claim() == FAMILIES[0]
    beat_was(url, study_storage.HEARTBEAT.grace + 5)
    one._beat()
    assert other.claim() is None
    assert other.claim() is None
    assert one.holds(FAMILIES[0])


def test_a_family_is_given_up_after_some_workers_and_a_new_run_tries_it_last(join: Join, url: str) -> None:
    waits = join(FAMILIES[:2])
    assert waits.claim() == FAMILIES[0]
    for _ in range(RETRIES + 1):
        victim = join(FAMILIES[:2])
        assert victim.claim() == FAMILIES[1]
        victim._held.clear()  # killed
        beat_was(url, study_storage.HEARTBEAT.grace + 5)
        waits._beat()
        assert waits.claim() is None
        if waits.given_up:
            break
        waits._wanted.pop(FAMILIES[1])  # so that the next victim takes it
        assert plan_states(url)[TrialState.WAITING] == 1
        waits._wanted[FAMILIES[1]] = None
    assert f"{RETRIES + 1} workers" in waits.given_up[FAMILIES[1]]
    assert not waits.waiting
    late = join(FAMILIES[:2])
    assert list(late.given_up) == [FAMILIES[1]]
    waits.close()
    late.close()
    new_run = join(FAMILIES[1::-1])
    assert [new_run.claim(), new_run.claim()] == FAMILIES[:2]


def test_workers_with_stores_of_their_own_both_fill_them(join: Join) -> None:
    here: set[KernelSpec] = set()
    there: set[KernelSpec] = set()
    one, two = join(FAMILIES[:1], here), join(FAMILIES[:1], there)
    family = one.claim()
    assert family == FAMILIES[0]
    assert two.claim() is None
    here.add(family)
    one.finished(family)
    assert two.claim() is None  # it queues the family again
    assert two.claim() == family
    assert one.claim() is None
    assert not one.waiting


def test_a_run_with_more_kernels_adds_them_and_a_later_run_can_ask_again(join: Join, url: str) -> None:
    done: set[KernelSpec] = set()
    first = join(FAMILIES[:2], done)
    second = join(FAMILIES[1:3], done)
    assert plan_states(url) == {TrialState.WAITING: 3}
    assert second.claim() == FAMILIES[1]
    assert second.claim() == FAMILIES[2]
    for family in FAMILIES[1:3]:
        second.finished(family)
        done.add(family)
    assert first.claim() == FAMILIES[0]
    assert first.claim() is None
    first.finished(FAMILIES[0])
    assert not first.waiting
    again = join(FAMILIES[:1])  # with more effort, say
    assert again.claim() == FAMILIES[0]


@pytest.mark.parametrize(("field", "value"), [("gpu_name", "NVIDIA H100"), ("triton", "3.7")])
def test_another_gpu_or_triton_has_its_own_plan(join: Join, field: str, value: str) -> None:
    here, there = join(FAMILIES[:1]), join(FAMILIES[:1], environment=replace(HERE, **{field: value}))
    assert here.claim() == FAMILIES[0]
    assert there.claim() == FAMILIES[0]


def test_a_plan_of_another_gpu_under_this_ones_name_is_refused(join: Join, url: str) -> None:
    join(FAMILIES[:1])
    storage = open_study_storage(url)
    optuna.load_study(study_name=plan_name(HERE, "measured"), storage=storage).set_user_attr("gpu_name", "NVIDIA L4")
    release(storage)
    with pytest.raises(StudyStorageError, match=r"gpu_name 'NVIDIA L4', and this is 'NVIDIA H200'.*--study-storage"):
        join(FAMILIES[:1])


def test_a_worker_with_another_driver_is_noticed(join: Join) -> None:
    one, two = join(FAMILIES), join(FAMILIES, environment=replace(HERE, driver="580"))
    one.claim()
    two.claim()
    assert len(two.notices) == 1
    assert "driver 570, this one 580" in two.notices[0]
    assert one.notices == []


def test_a_failure_of_the_database_ends_no_heartbeat(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_storage.HEARTBEAT, "interval", 0.01)
    worker = join(FAMILIES[:1])
    assert worker.claim() == FAMILIES[0]
    record, calls = worker._record_heartbeat, []

    def fails_once(trial_id: int) -> None:
        calls.append(trial_id)
        if len(calls) == 1:
            raise optuna.exceptions.StorageInternalError("gone")
        record(trial_id)

    monkeypatch.setattr(worker, "_record_heartbeat", fails_once)
    deadline = time.monotonic() + 30
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(calls) >= 3
    assert worker.holds(FAMILIES[0])
    thread = worker._thread
    worker.close()
    assert not thread.is_alive()


def test_a_database_that_never_answers_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr(study_storage, "PATIENCE_SECONDS", 0.3)
    place = "postgresql://me:s3cret@127.0.0.1:1/db"
    with pytest.raises(StudyStorageError, match=r"me:\*\*\*@127.0.0.1:1/db.*--study-storage") as caught:
        open_study_storage(place)
    assert "s3cret" not in str(caught.value)

    def answers_late() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise optuna.exceptions.StorageInternalError from study_storage.OperationalError("", {}, Exception("gone"))
        return "at last"

    tries: list[int] = []
    monkeypatch.setattr(study_storage, "PATIENCE_SECONDS", 5.0)
    assert patiently(place, answers_late) == "at last"


def test_many_threads_of_one_worker_claim_each_family_once(join: Join) -> None:
    families = [forward_spec(1, 256 * n) for n in range(1, 33)]
    worker = join(families)
    claimed: list[KernelSpec] = []

    def lane() -> None:
        while worker.waiting:
            family = worker.claim()
            if family is not None:
                claimed.append(family)
                worker.finished(family)

    lanes = [threading.Thread(target=lane) for _ in range(4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    assert sorted(map(str, claimed)) == sorted(map(str, families))


def test_a_worker_with_several_gpus_holds_more_and_one_whose_claim_fails_midway_none(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = join(FAMILIES, lanes=4)
    attribute = wide._storage.set_trial_user_attr
    calls: list[int] = []

    def fails_once(trial_id: int, key: str, value: Any) -> None:
        calls.append(trial_id)
        if len(calls) == 1:
            raise optuna.exceptions.StorageInternalError from study_storage.OperationalError("", {}, Exception("gone"))
        attribute(trial_id, key, value)

    monkeypatch.setattr(wide._storage, "set_trial_user_attr", fails_once)
    taken = [wide.claim() for _ in FAMILIES]
    assert taken == [*FAMILIES[1:], None]  # the first is nobody's until the grace period is over
    assert not wide.holds(FAMILIES[0])
    assert wide.waiting


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_no_connection_is_left_behind(join: Join, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    monkeypatch.setattr(study_storage.HEARTBEAT, "interval", 0.01)

    def others() -> int:
        with psycopg.connect(url) as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'doratune' AND pid <> pg_backend_pid()"
            row = connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    before = others()
    worker = join(FAMILIES)
    worker.claim()
    time.sleep(0.1)  # the heartbeat has a connection, too
    assert others() > before
    worker.close()
    release(worker._storage)
    deadline = time.monotonic() + 10
    while others() > before and time.monotonic() < deadline:  # a server notices a closed connection a little later
        time.sleep(0.02)
    assert others() == before


def test_a_run_that_is_to_stop_queues_no_more_and_the_next_one_does(join: Join, url: str) -> None:
    left = iter([False, False])
    stopped = join(FAMILIES, stopping=lambda: next(left, True))
    assert plan_states(url)[TrialState.WAITING] == 2
    stopped.close()
    join(FAMILIES)
    assert plan_states(url)[TrialState.WAITING] == len(FAMILIES)
