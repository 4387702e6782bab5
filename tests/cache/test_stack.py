"""The stack is what the user named, in that order, then their own store, then the prebuilt ones; a broken store is an
error that names it, never a silent gap."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from doratune.cache import stack
from doratune.cache.errors import LocationError, MissingStoreError, NotAStoreError
from doratune.cache.stack import home, open_stack, prebuilt_paths, stack_places, user_store_path
from doratune.cache.store import Store

from .world import a_spec, an_entry


@pytest.fixture(autouse=True)
def _one_prebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prebuilt").mkdir()
    monkeypatch.setattr(stack, "_PREBUILT_FOLDER", tmp_path / "prebuilt")
    _store(tmp_path / "prebuilt" / "h200.sqlite")


def _store(path: Path) -> str:
    with Store.open(path, create=True) as store:
        store.put(an_entry())
    return str(path)


def test_the_home_folder_is_the_platforms_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / "home"
    assert user_store_path() == tmp_path / "home" / "store.sqlite"
    monkeypatch.delenv("DORATUNE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home().name == "doratune"
    assert home() != tmp_path / "home"


def test_the_search_path_comes_first_then_the_users_store_then_the_prebuilt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    team, url = tmp_path / "team.sqlite", "postgresql://me@host:5432/db"
    monkeypatch.setenv("DORATUNE_CACHE_PATH", f"{team}{os.pathsep}{url}")
    _store(user_store_path())
    found = [(place.location, place.origin) for place in stack_places()]
    assert found == [
        (str(team), "DORATUNE_CACHE_PATH"),
        (url, "DORATUNE_CACHE_PATH"),
        (str(user_store_path()), "user"),
        (str(prebuilt_paths()[0]), "prebuilt"),
    ]


def test_a_named_store_takes_the_place_of_the_search_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DORATUNE_CACHE_PATH", "/not/asked/for")
    found = [place.origin for place in stack_places(str(tmp_path / "named.sqlite"))]
    assert found == ["store", "prebuilt"]


def test_a_store_named_twice_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _store(user_store_path())
    monkeypatch.setenv("DORATUNE_CACHE_PATH", f"{own}{os.pathsep}sqlite:///{own}")
    assert [place.origin for place in stack_places()] == ["DORATUNE_CACHE_PATH", "prebuilt"]


def test_a_user_without_a_store_reads_the_prebuilt_one_and_gets_no_files() -> None:
    [store] = open_stack()
    assert store.get(a_spec()) == an_entry()
    assert store.readonly
    assert not home().exists()


def test_a_store_of_the_search_path_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_CACHE_PATH", "/nowhere/team.sqlite")
    with pytest.raises(MissingStoreError, match=r"/nowhere/team\.sqlite.*DORATUNE_CACHE_PATH"):
        open_stack()


def test_a_named_store_that_is_missing_is_an_error() -> None:
    with pytest.raises(MissingStoreError, match=r"/nowhere/own\.sqlite"):
        open_stack("/nowhere/own.sqlite")


def test_a_broken_store_of_the_user_is_an_error_not_a_gap() -> None:
    user_store_path().parent.mkdir(parents=True)
    user_store_path().write_text("not a database at all")
    with pytest.raises(NotAStoreError, match=r"home/store\.sqlite"):
        open_stack()


def test_a_search_path_that_names_no_store_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_CACHE_PATH", "mysql://me@host/db")
    with pytest.raises(LocationError, match="mysql"):
        open_stack()


def test_a_place_prints_without_its_password() -> None:
    place = stack_places("postgresql://me:s3cret@host/db")[0]
    assert str(place) == "postgresql://me:***@host/db (store)"


def test_the_stores_in_the_package_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for path in prebuilt_paths():
        with Store.open(path, readonly=True) as store:
            assert store.verify() == []
