"""A store is this user's own if nobody but the user and root can change it: the file, what SQLite keeps beside it, its
folder, and the folders above."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doratune.cache import permissions
from doratune.cache.permissions import why_not_own, why_open_to_everybody

OTHER = 4242
"""The number of another user, whom this machine does not know."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A file in a folder of its own, whose owner alone can write."""
    folder = tmp_path / "team" / "kernels"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent):
        each.chmod(0o755)
    path = folder / "store.sqlite"
    path.touch()
    path.chmod(0o644)
    return path


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Has a file or folder belong to another user, as the system reports it."""
    owners: dict[str, int] = {}
    stat = os.stat

    def reported(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        found = stat(path, *args, **kwargs)
        owner = owners.get(os.fspath(path)) if isinstance(path, str | Path) else None
        return found if owner is None else os.stat_result((*found[:4], owner, *found[5:10]))

    monkeypatch.setattr(os, "stat", reported)
    return lambda path, owner: owners.update({str(path): owner})


@pytest.fixture(autouse=True)
def _no_private_groups(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "private_group" not in request.fixturenames:
        monkeypatch.setattr(permissions, "_private_group", lambda path, found: False)


def test_a_file_that_only_its_owner_can_write_is_their_own(store: Path) -> None:
    for mode in (0o644, 0o444, 0o600):
        store.chmod(mode)
        assert why_not_own(store) is None
        assert why_open_to_everybody(store) is None


@pytest.mark.parametrize("which", ["file", "log", "index", "journal", "folder", "parent"])
@pytest.mark.parametrize(("mode", "who"), [(0o020, "the group"), (0o002, "everybody"), (0o022, "everybody")])
def test_what_others_can_write_is_not_your_own(store: Path, which: str, mode: int, who: str) -> None:
    beside = {"log": "-wal", "index": "-shm", "journal": "-journal"}
    path = {"file": store, "folder": store.parent, "parent": store.parent.parent}.get(which)
    if path is None:
        path = store.with_name(store.name + beside[which])
        path.touch(0o600)
    path.chmod(path.stat().st_mode | mode)
    reason = why_not_own(store)
    assert reason is not None
    assert reason.startswith(who)
    assert f"can write {path} (mode {path.stat().st_mode & 0o7777:o}); chmod go-w {path}" in reason
    assert (why_open_to_everybody(store) is not None) == (who == "everybody")
    path.chmod(path.stat().st_mode & ~0o022)
    assert why_not_own(store) is None


@pytest.mark.parametrize("which", ["file", "folder", "parent"])
def test_what_belongs_to_another_user_is_not_your_own_and_to_root_is(
    store: Path, which: str, owned: Callable[[Path, int], None]
) -> None:
    path = {"file": store, "folder": store.parent, "parent": store.parent.parent}[which]
    owned(path, permissions.ROOT)
    assert why_not_own(store) is None
    owned(path, OTHER)
    assert (why_not_own(store) or "").startswith(f"{path} belongs to user {OTHER}, who is neither you (")
    assert why_open_to_everybody(store) is None


def test_a_user_of_another_number_does_not_own_what_this_one_does(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root runs with a user's store, or a user with another's: the same question."""
    monkeypatch.setattr(permissions, "ROOT", -1)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert f"belongs to {pwd.getpwuid(os.getuid()).pw_name}, who is neither you (user {OTHER})" in str(
        why_not_own(store)
    )


def test_a_log_beside_the_store_must_have_the_same_owner(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite reads it before the store."""
    log = store.with_name(store.name + "-wal")
    log.touch(0o644)
    lstat = Path.lstat
    other = SimpleNamespace(st_uid=OTHER, st_gid=0, st_mode=0o100644)
    monkeypatch.setattr(Path, "lstat", lambda path: other if path == log else lstat(path))
    assert str(why_not_own(store)).startswith(f"{log} belongs to user {OTHER}")


def test_in_a_folder_with_the_sticky_bit_nobody_replaces_what_is_yours(
    store: Path, owned: Callable[[Path, int], None]
) -> None:
    parent = store.parent.parent
    parent.chmod(0o1777)
    assert why_not_own(store) is None
    assert why_open_to_everybody(store) is None
    owned(parent, OTHER)
    assert f"{parent} belongs to" in str(why_not_own(store))


def test_beside_a_store_in_a_folder_with_the_sticky_bit_anybody_could_put_a_log(store: Path) -> None:
    store.parent.chmod(0o1777)
    assert f"everybody can write {store.parent} (mode 1777)" in str(why_not_own(store))
    assert f"everybody can write {store.parent} (mode 1777)" in str(why_open_to_everybody(store))


def test_a_name_in_a_folder_with_the_sticky_bit_is_nobodys_before_it_is_taken(
    store: Path, owned: Callable[[Path, int], None]
) -> None:
    """Trust goes by the name, and where another user's folder is gone anybody can make one of that name."""
    store.parent.parent.chmod(0o1777)
    owned(store.parent, OTHER)
    assert f"everybody can put a file in the place of {store.parent}" in str(why_open_to_everybody(store))


@pytest.fixture
def private_group(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the system report that the group of this user's files has this name and these members."""
    user = pwd.getpwuid(os.getuid())

    def set_group(name: str = user.pw_name, members: tuple[str, ...] = (), *, primary: bool = True) -> None:
        group = SimpleNamespace(gr_name=name, gr_mem=[*members])
        owner = SimpleNamespace(pw_name=user.pw_name, pw_gid=os.getgid() if primary else os.getgid() + 1)
        monkeypatch.setattr(grp, "getgrgid", lambda number: group)
        monkeypatch.setattr(pwd, "getpwuid", lambda number: owner)

    return set_group


def test_the_group_that_is_its_owner_alone_may_write(
    store: Path, private_group: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many systems give each user such a group, and a umask that lets it write."""
    user = pwd.getpwuid(os.getuid()).pw_name
    store.chmod(0o664)
    os.chown(store, -1, os.getgid())
    private_group()
    assert why_not_own(store) is None
    private_group(members=(user,))
    assert why_not_own(store) is None
    for other in ({"members": (user, "bob")}, {"members": ("bob",)}, {"name": "staff"}, {"primary": False}):
        private_group(**other)
        assert "chmod go-w" in str(why_not_own(store)), other
    private_group()
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"], raising=False)
    assert "chmod go-w" in str(why_not_own(store)), "the list may name other users"
