"""``cache drift`` takes the user's own store or the one named, and asks the stack what a lookup would give without an
entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from doratune.cache.entry import Entry
from doratune.cache.store import Store
from doratune.codegen.fit import fitted
from doratune.errors import UsageError
from doratune.tuner import drift_store as module
from doratune.tuner.drift_report import MOVED
from doratune.tuner.drift_store import DriftRequest, drift_store
from doratune.tuner.tune_model import Request

from .fakes import GPU, FakePool, forward_spec
from .upgrades import SECOND, SWAPPED, THIRD, Machine, an_entry


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path / "prebuilt")
    return tmp_path / "home"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The GPU here, on which the runner-up has become the fastest."""
    machine = Machine(SWAPPED)
    monkeypatch.setattr(module, "choose_evaluators", lambda request: (GPU, [machine]))
    monkeypatch.setattr("doratune.tuner.drift.CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))
    return machine


def put(path: Path, *entries: Entry) -> str:
    path.parent.mkdir(exist_ok=True)
    with Store.open(path, create=True) as store:
        store.put_all(entries)
        return store.location


def test_without_a_name_it_is_the_users_own_store(home: Path, machine: Machine) -> None:
    own = put(home / "store.sqlite", an_entry())
    result = drift_store(DriftRequest(apply=True))
    assert (result.store, result.rows[0].outcome) == (own, MOVED)
    with Store.open(own, readonly=True) as store:
        assert [entry.config for entry in store.entries()] == [SECOND]


def test_a_named_store_is_measured_and_the_own_one_left(home: Path, machine: Machine, tmp_path: Path) -> None:
    own = put(home / "store.sqlite", an_entry())
    team = put(tmp_path / "team.sqlite", an_entry())
    assert drift_store(DriftRequest(store=team, apply=True)).store == team
    with Store.open(own, readonly=True) as store:
        assert store.entries() == [an_entry()]


@pytest.mark.parametrize("named", [False, True])
def test_a_winner_without_a_final_meets_what_the_other_stores_and_entries_give(
    home: Path, machine: Machine, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubted = replace(fitted(), default_losses={})  # or the first built-in config would go before a distant entry
    monkeypatch.setattr("doratune.codegen.fit.fitted", lambda: doubted)
    path = tmp_path / "team.sqlite" if named else home / "store.sqlite"
    near = an_entry(forward_spec(2048), THIRD, environment=machine.here)
    location = put(path, an_entry(beaten=()), near)
    request = DriftRequest(store=location if named else None)
    drift_store(request)
    assert machine.finals == [(an_entry().config, THIRD)], "the nearest entry of the same store"
    machine.finals.clear()
    elsewhere = put(tmp_path / "exact.sqlite", an_entry(winner=SECOND))
    if not named:  # a named store takes the place of the path's
        monkeypatch.setenv("DORATUNE_CACHE_PATH", elsewhere)
        drift_store(request)
        assert machine.finals == [(an_entry().config, SECOND)], "the exact entry of another store"
        machine.finals.clear()
        drift_store(replace(request, op="compose_forward", lookups=True))
        assert machine.finals[0] == (an_entry().config, THIRD), "a lookup without any entry of the spec"


def test_the_gpu_and_the_device_are_those_that_are_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(request: Request) -> None:
        assert (request.gpu, request.device, request.evaluator) == ("h200", "cuda:1", "measure")
        raise UsageError("chosen")

    put(home / "store.sqlite", an_entry())
    monkeypatch.setattr(module, "choose_evaluators", choose)
    with pytest.raises(UsageError, match="chosen"):
        drift_store(DriftRequest(gpu="h200", device="cuda:1"))


def test_without_apply_a_store_is_only_read(
    home: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = put(tmp_path / "team.sqlite", an_entry())
    opened: list[bool] = []
    open_store: Callable[..., Store] = Store.open

    def watched(location: str, *, create: bool = False, readonly: bool = False) -> Store:
        opened.append(readonly)
        return open_store(location, create=create, readonly=readonly)

    monkeypatch.setattr(Store, "open", watched)
    drift_store(DriftRequest(store=team))
    assert set(opened) == {True}


def test_an_unknown_operation_is_named_before_anything_is_opened(home: Path) -> None:
    with pytest.raises(UsageError, match="'compose_forwards'; did you mean compose_forward"):
        drift_store(replace(DriftRequest(), op="compose_forwards"))
    assert not home.exists()
