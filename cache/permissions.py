"""Who can change a file: judged by owners and permissions of the file, its folder and all folders above, as SSH does
before it uses a key.

A file is a user's own if only that user and root can change it. Otherwise :func:`why_not_own` says who else can, and
:func:`why_open_to_everybody` whether that is everybody. Paths must be resolved, so that a symbolic link's target is
judged. SQLite's log and journal beside a store are part of it: who can write one of them writes the store.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = 0
SIDECARS = ("-wal", "-shm", "-journal")
"""What SQLite puts beside a database, and reads before it."""


def why_not_own(path: Path) -> str | None:
    """Why ``path`` is not only this user's: who else can change it, and the remedy; None if nobody but root can."""
    return _first_stranger(_chain(path))


def why_folder_not_own(folder: Path) -> str | None:
    """The same for what is put into ``folder``: who else can do so, or put another folder in its place."""
    return _first_stranger(_folders(folder, *folder.parents))


def _first_stranger(chain: Iterable[tuple[Path, os.stat_result, bool]]) -> str | None:
    for each, found, sticky in chain:
        if found.st_uid not in (os.geteuid(), ROOT):
            return f"{each} belongs to {_user(found.st_uid)}, who is neither you ({_user(os.geteuid())}) nor root"
        if found.st_mode & stat.S_IWOTH and not sticky:
            return f"everybody can write {each} (mode {_mode(found)}); chmod go-w {each}"
        if found.st_mode & stat.S_IWGRP and not sticky and not _private_group(each, found):
            return f"the group {_group(found.st_gid)} can write {each} (mode {_mode(found)}); chmod go-w {each}"
    return None


def why_open_to_everybody(path: Path) -> str | None:
    """Why anybody at all can change ``path``, with the remedy, or None if only owners and groups can."""
    for each, found, sticky in _chain(path):
        if found.st_mode & stat.S_IWOTH and not sticky:
            return f"everybody can write {each} (mode {_mode(found)}); chmod go-w {each}"
        if found.st_uid not in (os.geteuid(), ROOT) and _anybody_may_add(each.parent):
            return f"everybody can put a file in the place of {each}; move it to a folder that only its owner can write"
    return None


def key_exposed(path: Path) -> str | None:
    """Why a private key is not secret, with the remedy, or None if only its owner can read and write it."""
    found = path.expanduser().stat()
    if found.st_uid not in (os.geteuid(), ROOT):
        return f"belongs to {_user(found.st_uid)}, who is neither you ({_user(os.geteuid())}) nor root"
    if found.st_mode & 0o077:
        return f"others can read or write it (mode {_mode(found)}); chmod 600 {path}"
    return None


def _chain(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """The file, what SQLite keeps beside it, its folder and the folders above, with what the system says of each.

    The last value tells whether a write permission is harmless because the folder has the sticky bit, in which nobody
    can replace what belongs to another. The file's own folder is never harmless: there anybody could put a log beside
    the store.
    """
    yield path, path.stat(), False
    for name in SIDECARS:
        beside = path.with_name(path.name + name)
        try:
            yield beside, beside.lstat(), False
        except FileNotFoundError:
            continue
    yield from _folders(*path.parents)


def _folders(*folders: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    for place, folder in enumerate(folders):
        found = folder.stat()
        yield folder, found, place > 0 and bool(found.st_mode & stat.S_ISVTX)


def _anybody_may_add(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IWOTH)


def _private_group(path: Path, found: os.stat_result) -> bool:
    """Whether the group of a file is the owner's private one, with the owner's name and nobody else in it.

    Such groups are the default of many systems, together with a umask that lets the group write.
    """
    try:
        group, owner = grp.getgrgid(found.st_gid), pwd.getpwuid(found.st_uid)
    except KeyError:
        return False
    alone = group.gr_name == owner.pw_name and owner.pw_gid == found.st_gid and {*group.gr_mem} <= {owner.pw_name}
    return alone and not _has_access_list(path)


def _has_access_list(path: Path) -> bool:
    """Whether the group's permission stands for a list of users and groups instead."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):  # a file system without them, or a system that is not Linux
        return False


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):o}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
