"""``doratune cache verify`` without a model: check everything that a store holds."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..cache.entry import BinaryKey, Entry
from ..cache.errors import CorruptRowError, StoreError
from ..cache.stack import Place, open_place, stack_places
from ..cache.store import Store
from ..codegen.binary import BinaryError, OtherSettingsError, check
from ..codegen.gpu import find_gpu
from ..codegen.module import declared_kernels
from ..codegen.render import render
from ..errors import DoratuneError

DAMAGED, OUTDATED, ORPHAN, UNREADABLE = "damaged", "outdated", "orphan", "unreadable"


@dataclass(frozen=True)
class Problem:
    """What is wrong in a store.

    ``kind`` is ``damaged`` (the file, its schema or a row), ``outdated`` (the installed templates render another text,
    so a lookup refuses the entry), ``orphan`` (a binary that no entry needs) or ``unreadable`` (a binary that would not
    be started here).
    """

    store: str
    kind: str
    what: str


@dataclass(frozen=True)
class Checked:
    """A store that was checked: how many entries and binaries it holds, and how many binaries only another Triton, or
    other settings of Triton, could start."""

    store: str
    entries: int
    binaries: int
    elsewhere: int
    problems: tuple[Problem, ...]


def verify_stores(store: str | None = None) -> list[Checked]:
    """Check one store, or every store that a lookup asks. A store that cannot be opened is a problem of it.

    Raises:
        LocationError, NoHomeError: a location does not name a store.
    """
    places = [Place(store, "store")] if store is not None else stack_places()
    return [_checked(place) for place in places]


def _checked(place: Place) -> Checked:
    where = str(place).rsplit(" (", 1)[0]
    try:
        with open_place(place) as store:
            return _check_all(store)
    except StoreError as error:
        return Checked(where, 0, 0, 0, (Problem(where, DAMAGED, str(error)),))


def _check_all(store: Store) -> Checked:
    problems = [Problem(store.location, DAMAGED, text) for text in store.verify()]
    entries, _ = store.readable_entries()  # the damaged ones are listed above
    by_code: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_code[entry.code_digest].append(entry)
        problems += [Problem(store.location, *found) for found in _wrong_with(entry)]
    keys = store.binary_keys()
    elsewhere = 0
    for key in keys:
        needed = by_code.get(key.code_digest)
        if not needed:
            what = f"{_name(key)}: no entry has its code; `cache prune` deletes it"
            problems.append(Problem(store.location, ORPHAN, what))
            continue
        try:
            if not _is_for_this_triton(key):
                elsewhere += 1
                continue
            _start_would_accept(store, key, needed[0])
        except OtherSettingsError:
            elsewhere += 1
        except CorruptRowError:
            continue  # listed above
        except DoratuneError as error:
            problems.append(Problem(store.location, UNREADABLE, f"{_name(key)}: {error}"))
    problems += [Problem(store.location, UNREADABLE, text) for text in _incomplete(keys, by_code)]
    return Checked(store.location, len(entries), len(keys), elsewhere, tuple(problems))


def _wrong_with(entry: Entry) -> Iterator[tuple[str, str]]:
    digest = hashlib.sha256(entry.source.encode()).hexdigest()
    if digest != entry.source_digest:
        yield DAMAGED, f"{entry.spec}: its source has the digest {digest[:12]}, not {entry.source_digest[:12]}"
        return
    try:
        rendered = render(entry.spec, entry.config).digest
    except DoratuneError as error:
        yield OUTDATED, f"{entry.spec}: does not render here: {error}"
        return
    if rendered != digest:
        yield OUTDATED, f"{entry.spec}: renders to {rendered[:12]}, and was tuned as {digest[:12]}"


def _is_for_this_triton(key: BinaryKey) -> bool:
    from triton import __version__

    return key.triton == str(__version__)


def _start_would_accept(store: Store, key: BinaryKey, entry: Entry) -> None:
    """Check a binary as a launch does.

    Raises:
        BinaryError: it would not be started. CorruptRowError: its row is damaged.
    """
    binary, gpu = store.get_binary(*key), find_gpu(entry.spec.gpu)
    if binary is None:  # deleted since
        return
    if gpu.architecture != key.architecture:
        raise BinaryError(f"it is for {key.architecture}, and its entry for {gpu.architecture}")
    source = render(entry.spec, entry.config)  # and not the text of the store, which nobody vouches for
    if source.code_digest != key.code_digest:
        raise BinaryError("its entry renders to other code here")
    if key.kernel not in declared_kernels(source):
        raise BinaryError(f"its code has no kernel {key.kernel!r}")
    check(source, key.kernel, gpu.triton_target(), binary.metadata, binary.image)


def _incomplete(keys: Sequence[BinaryKey], by_code: dict[str, list[Entry]]) -> Iterator[str]:
    """The sources of which only some kernels have a binary: a launch uses all or none."""
    made: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for key in keys:
        made[key.code_digest, key.triton, key.architecture].add(key.kernel)
    for (code, triton, architecture), kernels in sorted(made.items()):
        for entry in by_code.get(code, [])[:1]:
            try:
                source = render(entry.spec, entry.config)
            except DoratuneError:
                continue  # its entry is listed as outdated
            lacking = set(declared_kernels(source)) - kernels
            if lacking and source.code_digest == code:
                yield f"{entry.spec}: no binary of {', '.join(sorted(lacking))} for Triton {triton} on {architecture}"


def _name(key: BinaryKey) -> str:
    return f"binary {key.kernel} of code {key.code_digest[:12]}, Triton {key.triton}, {key.architecture}"
