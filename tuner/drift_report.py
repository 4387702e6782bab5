"""What became of the winners that were measured again after an upgrade (:mod:`.drift`): values, JSON and a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cache.entry import Entry, Environment, Final
from ..cache.upgrade import Change
from ..codegen.spec import Config
from ..terminal.tables import Table

BROKEN, MOVED, UNJUDGED, HELD = "broken", "moved", "unjudged", "held"
OUTCOMES = (BROKEN, MOVED, UNJUDGED, HELD)
"""The worst first."""


@dataclass(frozen=True)
class Drifted:
    """What became of one winner.

    ``outcome`` is ``held`` (still the fastest of those measured, or as fast within the noise), ``moved`` (another
    config is faster beyond the noise), ``broken`` (the winner no longer compiles, starts or is accurate; ``notes``
    begin with the reason) or ``unjudged`` (it could not be measured, and nothing shows that it is to blame; likewise).

    ``entry`` is as it was in the store; ``changes`` are what differs here from its environment. ``config`` is the
    fastest config now, None if there is none or it is not known. ``loss`` is how much longer the stored winner takes
    than ``config``, as a share, from the ``final`` that timed both in turn; None if there was no such final. ``us`` and
    ``us_before`` are the stored winner's own time now and when it was stored, in microseconds: they come from different
    runs, so they tell of clocks and temperature too. ``adopted``: the store now holds the result.
    """

    entry: Entry
    outcome: str
    changes: tuple[Change, ...] = ()
    config: Config | None = None
    loss: float | None = None
    us: float | None = None
    us_before: float | None = None
    final: Final | None = None
    notes: tuple[str, ...] = ()
    adopted: bool = False

    def values(self) -> dict[str, Any]:
        """The row as values for JSON."""
        played = self.final.contenders if self.final else ()
        return {
            "spec": str(self.entry.spec),
            "outcome": self.outcome,
            "changes": [vars(change) for change in self.changes],
            "config": str(self.entry.config),
            "fastest": None if self.config is None else str(self.config),
            "loss": self.loss,
            "us": self.us,
            "us_before": self.us_before,
            "contenders": [{"config": str(one.config), "us": one.us} for one in played],
            "settled": self.final.settled if self.final else None,
            "confidence": self.final.confidence if self.final else None,
            "notes": list(self.notes),
            "adopted": self.adopted,
        }


@dataclass(frozen=True)
class DriftResult:
    """A run: its rows in the order of measuring, and what was not measured.

    ``gpu`` is the slug of the GPU here and ``environment`` the present one. ``current`` counts the entries that were
    measured under the present versions already, ``untimed`` those that were predicted or defaults, ``elsewhere`` those
    for other GPUs by slug. ``damaged`` names the rows of the store that cannot be read. ``left`` counts the entries
    that the run did not reach; with ``lookups`` the same command begins with the first again. ``stopped`` is empty,
    ``interrupt`` or ``fault``; then ``fault`` says what is wrong.
    """

    store: str
    gpu: str
    environment: Environment
    apply: bool
    lookups: bool = False
    rows: tuple[Drifted, ...] = ()
    current: int = 0
    untimed: int = 0
    elsewhere: dict[str, int] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    left: int = 0
    stopped: str = ""
    fault: str = ""

    def count(self, outcome: str) -> int:
        """How many rows ended in this way."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def failed(self) -> bool:
        """Whether a broken winner is still in the store, or an entry could not be read or measured."""
        broken = any(row.outcome == BROKEN and not row.adopted for row in self.rows)
        return broken or bool(self.count(UNJUDGED) or self.damaged or self.fault)

    @property
    def outdated(self) -> bool:
        """Whether the store still holds a winner that is not the fastest any more, or none at all."""
        return any(row.outcome in (BROKEN, MOVED) and not row.adopted for row in self.rows)

    def values(self) -> dict[str, Any]:
        """The run as values for JSON. Times are microseconds, ``loss`` is a share."""
        return {
            "store": self.store,
            "gpu": self.gpu,
            "environment": asdict(self.environment),
            "applied": self.apply,
            "rows": [row.values() for row in self.rows],
            "skipped": {"current": self.current, "not_measured": self.untimed, "other_gpus": self.elsewhere},
            "damaged": list(self.damaged),
            "left": self.left,
            "stopped": self.stopped,
            "fault": self.fault,
        }

    def summary(self) -> str:
        """The outcomes in a sentence, what was skipped, and what to do."""
        counts = [f"{self.count(outcome)} {outcome}" for outcome in reversed(OUTCOMES) if self.count(outcome)]
        lost = [row.loss for row in self.rows if row.outcome == MOVED and row.loss is not None]
        worst = f", the worst by {100.0 * max(lost):.1f} %" if lost else ""
        outcomes = f": {', '.join(counts)}{worst}" if counts else ""
        parts = [f"{len(self.rows)} measured again in {self.store}{outcomes}"]
        if self.left:
            stopped = "interrupted" if self.stopped == "interrupt" else "the run broke off"
            again = ": the same command continues with them" if self.apply and not self.lookups else ""
            parts.append(f"{stopped}, {self.left} left{again}")
        if self.current:
            parts.append(f"{self.current} skipped: measured under the present versions (--all measures them too)")
        if self.untimed:
            parts.append(f"{self.untimed} skipped: never measured")
        if self.elsewhere:
            others = ", ".join(f"{count} for {gpu}" for gpu, count in sorted(self.elsewhere.items()))
            parts.append(f"{others} skipped: the GPU here is {self.gpu}")
        if self.rows and not self.apply:
            parts.append("nothing was written; --apply writes it to the store")
        return "; ".join(parts)


def drift_table(rows: Iterable[Drifted]) -> Table:
    """A line for each winner, the worst first."""
    table = Table(title="winners measured again")
    for name in ("outcome", "spec", "stored config", "fastest now"):
        table.add_column(name)
    for name in ("loss", "µs then", "µs now"):
        table.add_column(name, justify="right")
    table.add_column("changed since")
    table.caption = (
        "loss: timed in turn in this run; then and now: different runs, so clocks and temperature differ too"
    )
    for row in sorted(rows, key=lambda row: (OUTCOMES.index(row.outcome), -(row.loss or 0.0), str(row.entry.spec))):
        fastest = "" if row.config is None else "the same" if row.config == row.entry.config else str(row.config)
        cells = (
            row.outcome + (", adopted" if row.adopted else ""),
            str(row.entry.spec),
            str(row.entry.config),
            fastest,
            "" if row.loss is None else f"{100.0 * row.loss:.1f} %",
            *("" if us is None else f"{us:.2f}" for us in (row.us_before, row.us)),
            ", ".join(f"{change.what} {change.then}" for change in row.changes),
        )
        table.add_row(*cells)
    return table
