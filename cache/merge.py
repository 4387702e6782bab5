"""Merge stores: plan which entries and binaries a store takes over from others, then do it in a separate step.

Of several entries of one spec a measured one goes before a predicted one, and that before a default. Between equals the
*preference* decides: the ``faster``, the ``newer``, or ``refuse``, which takes over nothing where entries differ. Times
of two machines differ by their clocks, so an entry that is faster by less than :data:`TIE` stays away.

A damaged row costs that row: the plan lists it with its reason. Binaries are machine code, so they come only from
sources that may supply them; the others' entries are taken all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ..codegen.spec import KernelSpec
from .entry import DEFAULT, MEASURED, PREDICTED, Binary, BinaryKey, Entry, Signature
from .errors import CorruptRowError, MergeConflictError
from .signing import row_digest
from .store import Store

FASTER, NEWER, REFUSE = "faster", "newer", "refuse"
PREFERENCES = (FASTER, NEWER, REFUSE)

ADD, REPLACE, KEEP = "add", "replace", "keep"

TIE = 0.01
"""The share of its time by which an entry must be faster than that of the store: two measurements of one kernel differ
by as much."""

_CONFLICTS_NAMED = 5
_ORDER = (MEASURED, PREDICTED, DEFAULT)


@dataclass(frozen=True)
class Change:
    """What becomes of one spec's entry: ``action`` is ``add``, ``replace`` or ``keep``.

    ``entry`` is the one that the store will have, ``other`` the one that loses (None where there is none), ``source``
    the location of the store that has the former, and ``why`` says what decided.
    """

    spec: KernelSpec
    action: str
    entry: Entry
    other: Entry | None
    source: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What a merge does: a change for each spec that a source has, the binaries to take, and what is skipped and why.

    ``equal`` counts the entries that the store has already, word for word.
    """

    changes: tuple[Change, ...]
    binaries: tuple[Binary, ...]
    signatures: frozenset[Signature]
    skipped: tuple[str, ...]
    equal: int = 0

    @property
    def taken(self) -> list[Entry]:
        return [change.entry for change in self.changes if change.action != KEEP]

    def count(self, action: str) -> int:
        return sum(change.action == action for change in self.changes)


@dataclass
class _Best:
    entry: Entry
    source: str
    why: str = "the store has no entry of it"
    other: Entry | None = None


@dataclass
class _Merge:
    prefer: str
    best: dict[KernelSpec, _Best] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    conflicts: list[KernelSpec] = field(default_factory=list)
    equal: int = 0

    def offer(self, entry: Entry, source: str) -> None:
        known = self.best.get(entry.spec)
        if known is None:
            self.best[entry.spec] = _Best(entry, source)
            return
        if _content(known.entry) == _content(entry):
            self.equal += 1
            return
        wins, why = _judge(entry, known.entry, self.prefer)
        if wins is None:
            self.conflicts.append(entry.spec)
        elif wins:
            self.best[entry.spec] = _Best(entry, source, why, known.entry)
        elif known.other is None:
            known.other, known.why = entry, why


def plan(
    sources: Sequence[Store],
    target: Store | None,
    *,
    prefer: str = FASTER,
    refusal: Callable[[Store], str | None] = lambda store: None,
    signed: Callable[[Store, Sequence[Binary]], Sequence[bool]] | None = None,
) -> Plan:
    """Plan to merge ``sources`` into ``target`` (None for a new store). Nothing is written.

    Args:
        prefer: one of :data:`PREFERENCES`.
        refusal: why a source's binaries are not taken, or None. signed: which of its binaries are taken all the same.

    Raises:
        MergeConflictError: with ``refuse``, entries of one spec and provenance differ.
        StoreError: a store cannot be read.
    """
    merge = _Merge(prefer)
    if target is not None:
        for entry in _readable(target, merge.skipped):
            merge.best[entry.spec] = _Best(entry, target.location)
    before = {spec: best.entry for spec, best in merge.best.items()}
    offered: set[KernelSpec] = set()
    for source in sources:
        for entry in _readable(source, merge.skipped):
            offered.add(entry.spec)
            merge.offer(entry, source.location)
    if merge.conflicts:
        named = ", ".join(map(str, merge.conflicts[:_CONFLICTS_NAMED]))
        more = ", …" if len(merge.conflicts) > _CONFLICTS_NAMED else ""
        raise MergeConflictError(
            f"{len(merge.conflicts)} specs have entries that differ, so nothing is merged: {named}{more}. "
            "Let the faster or the newer one win (--prefer)"
        )
    changes = []
    for spec in sorted(offered, key=str):
        best, old = merge.best[spec], before.get(spec)
        if old is best.entry:
            if best.other is not None:
                changes.append(Change(spec, KEEP, best.entry, best.other, best.source, best.why))
            continue
        changes.append(Change(spec, ADD if old is None else REPLACE, best.entry, old, best.source, best.why))
    digests = {best.entry.code_digest for best in merge.best.values()}
    binaries = binaries_for(digests, sources, target, refusal=refusal, signed=signed, skipped=merge.skipped)
    taken = [change.entry for change in changes if change.action != KEEP]
    signatures = signatures_of((*taken, *binaries), sources)
    return Plan(tuple(changes), tuple(binaries), signatures, tuple(merge.skipped), merge.equal)


def carry_out(planned: Plan, target: Store) -> int:
    """Write what was planned, and return the number of entries stored.

    An entry is not stored where another process has stored one of a better provenance since.

    Raises:
        StoreError: the store cannot be written.
    """
    stored = target.put_all(planned.taken)
    for binary in planned.binaries:
        target.put_binary(binary)
    if planned.signatures:
        target.put_signatures(planned.signatures)
    return stored


def _readable(store: Store, skipped: list[str]) -> list[Entry]:
    entries, damaged = store.readable_entries()
    skipped += map(str, damaged)
    return entries


def _content(entry: Entry) -> tuple[object, ...]:
    return entry.config, entry.source_digest, entry.evaluation, entry.environment, entry.created_at


def _judge(new: Entry, old: Entry, prefer: str) -> tuple[bool | None, str]:
    """Whether ``new`` goes before ``old``, and why; None where that is for the user to say."""
    ranks = [_ORDER.index(entry.evaluation.provenance) for entry in (new, old)]
    if ranks[0] != ranks[1]:
        better, worse = (new, old) if ranks[0] < ranks[1] else (old, new)
        return better is new, f"{better.evaluation.provenance} goes before {worse.evaluation.provenance}"
    if prefer == REFUSE:
        return None, ""
    if prefer == NEWER or new.evaluation.provenance != MEASURED:
        return _by_age(new, old)
    if new.template_digest != old.template_digest:
        wins, why = _by_age(new, old)
        return wins, f"{why}, and their templates differ"
    us, known = new.evaluation.us, old.evaluation.us
    if us is None or known is None or us == known:
        return _by_age(new, old)
    gain = known / us - 1.0
    if abs(gain) <= TIE:
        return False, f"a tie: {us:.4g} and {known:.4g} us"
    return gain > 0, f"{min(us, known):.4g} us is faster than {max(us, known):.4g} us"


def _by_age(new: Entry, old: Entry) -> tuple[bool, str]:
    ages = [_instant(entry.created_at) for entry in (new, old)]
    if ages[0] == ages[1]:
        return False, "they are of the same age"
    newer = new if ages[0] > ages[1] else old
    return newer is new, f"of {newer.created_at or 'an unknown date'}, the newer one"


def _instant(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def binaries_for(
    digests: Set[str],
    sources: Sequence[Store],
    target: Store | None = None,
    *,
    refusal: Callable[[Store], str | None],
    skipped: list[str],
    signed: Callable[[Store, Sequence[Binary]], Sequence[bool]] | None = None,
) -> list[Binary]:
    """The sources' binaries of these code digests that ``target`` lacks; of several of one key the first.

    ``refusal`` and ``signed`` are those of :func:`plan`. What is left out is added to ``skipped``, with the reason.
    """
    known: set[BinaryKey] = set() if target is None else {*target.binary_keys()}
    found: list[Binary] = []
    for source in sources:
        wanted = [key for key in source.binary_keys() if key.code_digest in digests and key not in known]
        reason = refusal(source) if wanted else None
        if reason is not None and signed is None:
            skipped.append(f"{source.location}: its {len(wanted)} binaries are not taken: {reason}")
            continue
        read = [*_readable_binaries(source, wanted, skipped)]
        if reason is not None and signed is not None:
            trusted = [binary for binary, is_signed in zip(read, signed(source, read), strict=True) if is_signed]
            if len(trusted) < len(read):
                unsigned = len(read) - len(trusted)
                skipped.append(f"{source.location}: {unsigned} unsigned binaries are not taken: {reason}")
            read = trusted
        for binary in read:
            known.add(BinaryKey(binary.code_digest, binary.kernel, binary.triton, binary.architecture))
        found += read
    return found


def signatures_of(rows: Iterable[Entry | Binary], sources: Sequence[Store]) -> frozenset[Signature]:
    """The signatures that the sources have of these rows."""
    digests = {row_digest(row) for row in rows}
    return frozenset(one for source in sources for one in source.signatures(digests)) if digests else frozenset()


def _readable_binaries(store: Store, keys: Iterable[BinaryKey], skipped: list[str]) -> Iterator[Binary]:
    for key in keys:
        try:
            binary = store.get_binary(*key)
        except CorruptRowError as error:
            skipped.append(str(error))
        else:
            if binary is not None:
                yield binary
