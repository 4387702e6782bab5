"""Whose binaries this process runs: the package's, those of this user's own stores, and those that the user trusts.

A binary is machine code. A store that others can change is theirs, whoever named it, and supplies no binary unless
``DORATUNE_TRUST`` (or ``--trust``) names

- the store, or a folder above it: its owner and group are trusted, but a file that everybody can write stays refused;
- a file of public keys: rows that one of these keys signed are trusted, in whichever store they are.

Entries are configs, validated values that are rendered by the installed templates; those of every store are used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import SigningError, TrustError
from .location import Location, split_locations
from .permissions import why_not_own, why_open_to_everybody
from .signing import PublicKey, holds_public_keys, read_public_keys
from .stack import prebuilt_paths

if TYPE_CHECKING:
    from .store import Store

TRUST_VARIABLE = "DORATUNE_TRUST"
_SQLITE_MAGIC = b"SQLite format 3\0"
_HEAD_BYTES = 1 << 12


@dataclass(frozen=True)
class Trust:
    """What this user trusts besides the package and files that nobody else can change.

    ``stores`` are the locations of stores and folders, ``keys`` the public keys.
    """

    stores: frozenset[str] = frozenset()
    keys: tuple[PublicKey, ...] = ()

    def refusal(self, store: Store) -> str | None:
        """Why the binaries of ``store`` are not used unless they are signed, and how to trust it; None if they are."""
        where = store.location
        if where in {str(Location.parse(path)) for path in prebuilt_paths()}:
            return None
        path = Location.parse(where).path
        if path is None:
            if _without_credentials(where) in self.stores:
                return None
            return f"a database is other people's; {_how(where)}"
        try:
            reason = why_not_own(path)
            if reason is not None and self._names(path):
                reason = why_open_to_everybody(path)
                return reason and f"{reason}, or sign it: trusting it does not help while everybody can write it"
        except OSError as problem:
            return f"who can write it cannot be determined ({problem.strerror})"
        return reason and f"{reason}; {_how(where)}"

    def _names(self, path: Path) -> bool:
        return any(str(each) in self.stores for each in (path, *path.parents))


def trust(named: Iterable[str] = ()) -> Trust:
    """What ``DORATUNE_TRUST`` and the items ``named`` trust; the items of the variable are separated as in ``PATH``.

    Raises:
        LocationError: an item is not a path or a known URL.
        TrustError: an item names a file that is neither a store nor a file of public keys.
        SigningError: a file of public keys is damaged, or everybody can write it.
        MissingCryptographyError: an item is a file of public keys, and the extra ``sign`` is not installed.
    """
    stores: set[str] = set()
    keys: dict[str, PublicKey] = {}
    for item in (*named, *split_locations(os.environ.get(TRUST_VARIABLE, ""))):
        location = Location.parse(item)
        if location.path is None:
            stores.add(_without_credentials(str(location)))
        elif _is_key_file(location.path):
            keys |= {key.fingerprint: key for key in _keys(location.path)}
        else:
            stores.add(str(location.path))
    return Trust(frozenset(stores), tuple(keys.values()))


def _keys(path: Path) -> tuple[PublicKey, ...]:
    open_to = why_open_to_everybody(path)
    if open_to is not None:
        raise SigningError(f"key {path}: {open_to}")
    return read_public_keys(path)


def _is_key_file(path: Path) -> bool:
    """Whether the file holds public keys. A folder, a store, and what is not there yet, hold none.

    Raises:
        TrustError: the file is something else.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as problem:
        raise TrustError(
            f"{TRUST_VARIABLE}: {path} cannot be read ({problem.strerror}); name a file that can"
        ) from None
    if holds_public_keys(head):
        return True
    if head.startswith(_SQLITE_MAGIC):
        return False
    raise TrustError(f"{TRUST_VARIABLE}: {path} is neither a store, a folder nor a file of Ed25519 public keys")


def _how(where: str) -> str:
    return f"to use them all the same, set {TRUST_VARIABLE}={where}, or name there the public key that signed them"


def _without_credentials(text: str) -> str:
    """A database's location without the password, which is no part of what is trusted."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1@", text)
