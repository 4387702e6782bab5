"""Which stores are searched, in which order: a named store or the search path, the user's own, the prebuilt ones."""

from __future__ import annotations

import importlib.util
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
PACKAGED = "doratune_stores"
"""The folder of the stores of installed packages of binaries."""
USER = "user"
PREBUILT = "prebuilt"

_PREBUILT_FOLDER = Path(__file__).resolve().parent / "prebuilt"


@dataclass(frozen=True)
class Place:
    """A store of the stack.

    ``origin`` tells who named it: ``store``, ``DORATUNE_CACHE_PATH``, ``user`` or ``prebuilt``. ``location``
    is as given and may contain a password; ``str()`` of the place does not.
    """

    location: str
    origin: str

    def __str__(self) -> str:
        return f"{Location.parse(self.location)} ({self.origin})"


def home() -> Path:
    """The user's doratune folder: ``DORATUNE_HOME``, else in the platform's folder for user data. It may not exist yet.

    Raises:
        NoHomeError: this user has no home directory, as in a container with an arbitrary user id, or the ``~`` in
            ``DORATUNE_HOME`` cannot be resolved.
    """
    named = os.environ.get(HOME_VARIABLE, "").strip()
    try:
        if named:
            return Path(named).expanduser().absolute()
        found = platformdirs.user_data_path("doratune")
    except (RuntimeError, OSError):
        if named:
            raise NoHomeError(
                f"{HOME_VARIABLE}={named} cannot be resolved to a folder; set it to an absolute path"
            ) from None
        raise _homeless() from None
    if not found.is_absolute():  # an unresolved ~, or an XDG_DATA_HOME that XDG says to ignore
        raise _homeless()
    return found


def _homeless() -> NoHomeError:
    return NoHomeError(
        "this user has no home directory for a store (HOME and XDG_DATA_HOME give no absolute path); "
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
    """The user's own store if it exists; none for a user without a home directory or without access to it.

    Raises:
        NoHomeError: ``DORATUNE_HOME`` cannot be resolved.
    """
    named = bool(os.environ.get(HOME_VARIABLE, "").strip())  # then an error is raised
    try:
        path = user_store_path()
    except NoHomeError:
        if named:
            raise
        return []
    try:
        there = path.exists()
    except OSError:  # a parent folder denies access: opening the store says which
        there = named
    return [Place(str(path), USER)] if there else []


def prebuilt_paths() -> list[Path]:
    """The stores in the package, then those of installed packages of binaries, each sorted by name.

    Such a package (``doratune cache package`` makes them) has its stores in a folder :data:`PACKAGED` beside the other
    installed packages. The folder is found as Python finds a package, and nothing in it is imported.
    """
    found = sorted(_PREBUILT_FOLDER.glob("*.sqlite"))
    spec = importlib.util.find_spec(PACKAGED)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        found += sorted(Path(folder).glob("*.sqlite"))
    return found


def stack_places(store: str | None = None) -> list[Place]:
    """Return the stack in search order, each store once.

    First ``store`` or else every item of ``DORATUNE_CACHE_PATH`` (see
    :func:`~doratune.cache.location.split_locations`), then the user's store where it exists, then the prebuilt ones.

    Raises:
        LocationError: a named location is not a path or a known URL. NoHomeError: ``DORATUNE_HOME`` cannot be resolved.
    """
    if store is not None:
        named = [Place(str(store), "store")]
    else:
        named = [Place(item, PATH_VARIABLE) for item in split_locations(os.environ.get(PATH_VARIABLE, ""))]
    unique: dict[Location, Place] = {}
    for place in (*named, *_own_place(), *(Place(str(path), PREBUILT) for path in prebuilt_paths())):
        unique.setdefault(Location.parse(place.location), place)
    return list(unique.values())


def user_location() -> str | None:
    """The ``Store.location`` of the user's own store, or None where there is none."""
    return next((str(Location.parse(place.location)) for place in _own_place()), None)


def open_stack(store: str | None = None) -> list[Store]:
    """Open the stack of :func:`stack_places` read-only. The caller closes the stores.

    If the user's own store has an older schema, it is migrated first.

    Raises:
        StoreError: a store cannot be opened. A broken store is not skipped, because then other kernels than its own
            would be chosen silently.
        LocationError: a named location is not a path or a known URL. NoHomeError: ``DORATUNE_HOME`` cannot be resolved.
    """
    stores: list[Store] = []
    try:
        for place in stack_places(store):
            stores.append(open_place(place))
    except BaseException:
        for opened in stores:
            opened.close()
        raise
    return stores


def open_place(place: Place) -> Store:
    """Open one store of the stack read-only. If the user's own store has an older schema, it is migrated first.

    Raises:
        StoreError: it cannot be opened.
    """
    from .store import Store  # here, so that the functions above do not import SQLAlchemy

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
