"""The processes of a launcher agree on a folder for their locks that nobody else can write, or have none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doratune.runtime import ahead
from doratune.runtime.lock_folder import lock_folder

OTHER = 4242


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's run-time folder."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_systems_run_time_folder_goes_first_and_the_own_folder_next(home: Path, runtime: Path) -> None:
    assert lock_folder() == runtime / "doratune"
    assert (runtime / "doratune").stat().st_mode & 0o777 == 0o700
    os.environ["XDG_RUNTIME_DIR"] = ""
    assert lock_folder() == home / "locks"
    assert (home / "locks").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o1777])
def test_a_run_time_folder_that_is_not_private_is_passed_over(home: Path, runtime: Path, mode: int) -> None:
    runtime.chmod(mode)
    assert lock_folder() == home / "locks"


def test_a_folder_that_another_user_made_is_never_used(
    home: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runtime / "doratune").mkdir(mode=0o700)
    _belongs_to_another(monkeypatch, runtime / "doratune")
    assert lock_folder() == home / "locks"
    _belongs_to_another(monkeypatch, home)
    assert lock_folder() is None


def test_a_folder_that_others_can_write_or_replace_is_never_used(home: Path) -> None:
    (home / "locks").mkdir(parents=True, mode=0o700)
    for each, mode in ((home / "locks", 0o770), (home, 0o777)):
        before = each.stat().st_mode
        each.chmod(mode)
        assert lock_folder() is None
        each.chmod(before)
    assert lock_folder() == home / "locks"


def test_a_link_in_the_place_of_the_folder_is_judged_by_what_it_names(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (home / "locks").symlink_to(shared)
    assert lock_folder() is None


def test_without_a_folder_each_process_compiles_for_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("no folder")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ahead._shared(["a", "b"]) == (None, ["b", "a"])  # type: ignore[list-item, comparison-overlap]


def test_a_launchers_processes_get_the_same_folder_which_is_not_in_the_systems_temporary_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    folders = set()
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        folders.add(ahead._shared(["a", "b"])[0])  # type: ignore[list-item]
    assert folders == {str(home / "locks")}
    assert not [*temporary.iterdir()]


def _belongs_to_another(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    stat: Callable[..., os.stat_result] = os.stat

    def reported(asked: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        found = stat(asked, *args, **kwargs)
        return os.stat_result((*found[:4], OTHER, *found[5:10])) if str(asked) == str(path) else found

    monkeypatch.setattr(os, "stat", reported)
