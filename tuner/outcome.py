"""What became of the specs of a tuning run, and of the configs that it tried."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cache.entry import Entry, Final
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
    ``trials`` counts the configs that this run tried, ``seconds`` is how long it took. ``rejected`` counts those of
    them that were rejected, by :func:`kind_of_reason`, and ``undecided`` those that could not be judged and are tried
    again in the next run.
    """

    rows: tuple[Tuned, ...]
    stopped: str = ""
    fault: str = ""
    trials: int = 0
    seconds: float = 0.0
    rejected: Mapping[str, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)

    def count(self, outcome: str) -> int:
        """How many specs ended in this way."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def failed(self) -> tuple[Tuned, ...]:
        """The rows of the specs for which nothing was found; each ``note`` is the reason."""
        return tuple(row for row in self.rows if row.outcome == FAILED)

    @property
    def tuned(self) -> tuple[Entry, ...]:
        """The entries whose search ended in this run, also early."""
        return tuple(row.entry for row in self.rows if row.outcome in (TUNED, PARTIAL) and row.entry is not None)

    @property
    def disturbed(self) -> dict[str, int]:
        """In how many finals of this run there was a disturbance, by its kind, the most frequent first."""
        finals = [entry.final for entry in self.tuned if entry.final is not None]
        return dict(Counter(kind for final in finals for kind in disturbances(final)).most_common())


def disturbances(final: Final) -> dict[str, str]:
    """What disturbed a final, by kind (``clocks moved``), each with the whole notice and what was done about it."""
    # A disturbance is "kind: what was seen"; how it ended comes after all of them and has no colon.
    seen = [notice for notice in final.notices if ":" in notice]
    ends = [notice for notice in final.notices if ":" not in notice]
    return {notice.split(":")[0]: "; ".join((notice, *ends)) for notice in seen}


_KINDS = (
    ("inaccurate", "inaccurate"),
    ("not deterministic", "not deterministic"),
    ("writes out of bounds", "writes out of bounds"),
    ("writes into its input", "writes into its input"),
    ("bytes of shared memory", "over the limit of shared memory"),
    ("registers a block", "over the limit of registers"),
    ("does not fit a multiprocessor", "does not fit a multiprocessor"),
    ("the compiler crashed", "the compiler crashed"),
    ("the compiler took over", "the compiler did not end"),
    ("preparing it did not end", "preparing it did not end"),
    ("did not end within", "did not end"),
    ("its process", "ended its process"),
    ("broke the GPU context", "faulted on the GPU"),
    ("the GPU failed at", "faulted on the GPU"),
    ("the process that measures", "the process that measures ended"),
    ("the config may not be the cause", "failed to compile for another reason"),
    ("does not compile", "does not compile"),
    ("does not hold the tensors", "too little GPU memory"),
    ("does not run", "does not run"),
)
"""Words of a reason and the kind that they mean; the first that fits counts."""


def kind_of_reason(reason: str) -> str:
    """The kind of a reason for which a config is out, such as ``inaccurate``: what is the same for many configs.

    A reason of no known kind is cut before its first colon, semicolon or bracket; names and numbers become ``…``.
    """
    known = next((kind for words, kind in _KINDS if words in reason), None)
    if known is not None:
        return known
    first = re.split(r"[:;(]", reason, maxsplit=1)[0]
    return " ".join("…" if re.search(r"[\d/=]", word) else word for word in first.split()) or "for no stated reason"
