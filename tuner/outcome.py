"""What became of the specs of a tuning run."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.entry import Entry
from ..codegen.spec import KernelSpec

TUNED, KEPT, PARTIAL, UNFINISHED, FAILED = "tuned", "kept", "partial", "unfinished", "failed"


@dataclass(frozen=True)
class Tuned:
    """What became of one spec.

    ``outcome`` is ``tuned``; ``kept`` (the store had it); ``partial`` (stopped, but the seeds were tried and the best
    is stored); ``unfinished`` (stopped before that; nothing stored); ``failed`` (every candidate was rejected, or none
    could be judged). ``entry`` is what the store holds for the spec now, None when nothing; ``note`` says why it ended.
    """

    spec: KernelSpec
    outcome: str
    entry: Entry | None
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the entry was already there."""
        return self.outcome == KEPT


@dataclass(frozen=True)
class TuneResult:
    """The rows of a run in the order of its specs.

    ``stopped`` is empty, ``timeout``, ``interrupt`` or ``fault``; then ``fault`` says what is wrong and what to do.
    """

    rows: tuple[Tuned, ...]
    stopped: str = ""
    fault: str = ""

    def count(self, outcome: str) -> int:
        """How many specs ended in this way."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def failed(self) -> tuple[Tuned, ...]:
        """The rows of the specs for which nothing was found; each ``note`` is the reason."""
        return tuple(row for row in self.rows if row.outcome == FAILED)
