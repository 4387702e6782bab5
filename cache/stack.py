"""Which stores are searched, in which order: a named store or the search path, the user's own, the prebuilt ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from .errors import NoHomeError, OlderStoreError, StoreError
from .location import Location, split_locations

if TYPE_CHECKING:
    from .store import Store

HOME_VARIABLE = "DORATUNE_HOME"
PATH_VARIABLE = "DORATUNE_CACHE_PATH"
USER = "user"
PREBUILT = "prebuilt"

_PREBUILT_FOLDER = Path(__file__).resolve().parent / "prebuilt"


@dataclass(frozen=True)
class Place:
    """A store of the stack.

    ``origin`` says who named it: ``store``, ``DORATUNE_CACHE_PATH``, ``user`` or ``prebuilt``. ``location`` is as given
    and may hold a password; ``str()`` of it does not.
    """

    location: str
    origin: str

    def __str__(self) -> str:
        return f"{Location.parse(self.location)} ({self.origin})"


def home() -> Path:
    """The user's doratune folder: ``DORATUNE_HOME``, else the platform's place for user data. It may not exist yet.

    Raises:
        NoHomeError: the system knows no home directory for this user, as in a container with a user id of its own, or
            none for the ``~`` in ``DORATUNE_HOME``.
    """
    named = os.environ.get(HOME_VARIABLE, "").strip()
    try:
        if named:
            return Path(named).expanduser().absolute()
        found = platformdirs.user_data_path("doratune")
    except (RuntimeError, OSError):
        if named:
            raise NoHomeError(
                f"{HOME_VARIABLE}={named} names no folder (where it leads to is not known); set it to an absolute path"
            ) from None
        raise _homeless() from None
    if not found.is_absolute():  # an unresolved ~, or an XDG_DATA_HOME that XDG says to ignore
        raise _homeless()
    return found


def _homeless() -> NoHomeError:
    return NoHomeError(
        "this user has no home directory for a store of their own (HOME and XDG_DATA_HOME give no absolute path); "
        f"set {HOME_VARIABLE} to a folder that can be written, or name the files themselves (doratune tune: both "
        "--store FILE and --study-storage FILE)"
    )


def user_store_path() -> Path:
    """The file of the user's own store. It may not exist yet.

    Raises:
        NoHomeError: as :func:`home`.
    """
    return home() / "store.sqlite"


def _own_place() -> list[Place]:
    """The user's own store, where there is one: a user without a home, or who may not enter it, has none.

    Raises:
        NoHomeError: ``DORATUNE_HOME`` names no folder.
    """
    named = bool(os.environ.get(HOME_VARIABLE, "").strip())  # then it is never passed over
    try:
        path = user_store_path()
    except NoHomeError:
        if named:
            raise
        return []
    try:
        there = path.exists()
    except OSError:  # a folder on the way refuses: opening the store says which
        there = named
    return [Place(str(path), USER)] if there else []


def prebuilt_paths() -> list[Path]:
    """The stores that come with the package, sorted by name."""
    return sorted(_PREBUILT_FOLDER.glob("*.sqlite"))


def stack_places(store: str | None = None) -> list[Place]:
    """Return the stack in search order, each store once.

    First ``store`` or else every item of ``DORATUNE_CACHE_PATH`` (see
    :func:`~doratune.cache.location.split_locations`), then the user's store where it exists, then the prebuilt ones.

    Raises:
        LocationError: a named location is not a path or a known URL. NoHomeError: ``DORATUNE_HOME`` names no folder.
    """
    if store is not None:
        named = [Place(str(store), "store")]
    else:
        named = [Place(item, PATH_VARIABLE) for item in split_locations(os.environ.get(PATH_VARIABLE, ""))]
    unique: dict[Location, Place] = {}
    for place in (*named, *_own_and_prebuilt()):
        unique.setdefault(Location.parse(place.location), place)
    return list(unique.values())


def trusted_locations() -> frozenset[str]:
    """The user's own store and the prebuilt ones, each as its ``Store.location``: what nobody else writes."""
    return frozenset(str(Location.parse(place.location)) for place in _own_and_prebuilt())


def _own_and_prebuilt() -> list[Place]:
    return [*_own_place(), *(Place(str(path), PREBUILT) for path in prebuilt_paths())]


def open_stack(store: str | None = None) -> list[Store]:
    """Open the stack of :func:`stack_places` read-only. The caller closes the stores.

    The user's own store is migrated first where an older doratune wrote it.

    Raises:
        StoreError: a store cannot be opened. A broken store is never passed over: the kernels chosen would silently be
            others than the ones it holds.
        LocationError: a named location is not a path or a known URL. NoHomeError: ``DORATUNE_HOME`` names no folder.
    """
    stores: list[Store] = []
    try:
        for place in stack_places(store):
            stores.append(_open(place))
    except BaseException:
        for opened in stores:
            opened.close()
        raise
    return stores


def _open(place: Place) -> Store:
    from .store import Store  # here, so that the paths above can be asked for without SQLAlchemy

    try:
        return Store.open(place.location, readonly=True)
    except OlderStoreError:
        if place.origin != USER:
            raise
        Store.open(place.location).close()
        return Store.open(place.location, readonly=True)
    except StoreError as error:
        if place.origin == PATH_VARIABLE:  # an environment variable is easily forgotten
            raise type(error)(f"{error} (the store is named by {PATH_VARIABLE})") from error
        raise
