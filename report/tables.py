"""Tables of texts: behind each plot of the page, and what the Markdown report consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..cache.entry import MEASURED
from ..printable import printable
from ..tuner.coverage import NEAR, STATUSES, Covered, OpCoverage
from ..tuner.gain import percent
from .peers import Comparison, Results, Share
from .searches import Importance, Search
from .sources import Here, StoreRead, environments
from .step import Step
from .winners import Winner, shape_text

TEXT, CODE, NUMBER = "text", "code", "number"
MOST_ROWS = 1000
"""Rows of a table on the page; ``doratune report --json`` has all."""
MOST_LINES = 40
"""Lines of a plot at most; the table behind it has the others."""
MOST_LOSS = 0.10
"""A lookup whose bound is at most this is a good one, as ``doratune bench coverage`` counts."""


@dataclass(frozen=True)
class Table:
    """``columns`` are names with their kind (:data:`TEXT`, :data:`CODE`, :data:`NUMBER`); ``more`` rows are left out.

    Cells are plain text: whoever writes them out escapes them.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0

    @classmethod
    def of(cls, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> Table:
        """A table of at most :data:`MOST_ROWS` rows; what would act on a terminal or a page's text is escaped."""
        texts = [tuple(printable("" if cell is None else cell) for cell in row) for row in rows]
        return cls(tuple(columns), tuple(texts[:MOST_ROWS]), max(0, len(texts) - MOST_ROWS))

    def first(self, count: int) -> Table:
        """The first ``count`` rows."""
        return Table(self.columns, self.rows[:count], self.more + max(0, len(self.rows) - count))


def floors_table(winners: Iterable[Winner]) -> Table:
    """Each winner and its floor, those that lose most time to it first."""
    ordered = sorted(winners, key=lambda winner: (winner.entry.evaluation.floor_us or 0.0) - (winner.us or 0.0))
    columns = (
        ("operation", TEXT),
        ("shape", TEXT),
        ("GPU", TEXT),
        ("µs", NUMBER),
        ("floor µs", NUMBER),
        ("× floor", NUMBER),
        ("how known", TEXT),
        ("config", CODE),
    )
    return Table.of(
        columns,
        (
            (
                winner.spec.op,
                shape_text(winner.spec),
                winner.spec.gpu,
                _us(winner.us),
                _us(winner.entry.evaluation.floor_us),
                "" if winner.over_floor is None else f"{winner.over_floor:.2f}",
                winner.entry.evaluation.provenance,
                winner.entry.config,
            )
            for winner in ordered
        ),
    )


def finals_table(winners: Iterable[Winner]) -> Table:
    """Each winner that played against what ran before, the largest gain first."""
    columns = (
        ("operation", TEXT),
        ("shape", TEXT),
        ("before", TEXT),
        ("before µs", NUMBER),
        ("µs", NUMBER),
        ("gain", NUMBER),
        ("20 to 80 % of the rounds", NUMBER),
        ("margin", NUMBER),
        ("confidence", NUMBER),
        ("rounds", NUMBER),
        ("notices", TEXT),
    )
    rows = []
    for winner in sorted(winners, key=lambda winner: -(winner.gain or 0.0)):
        final, before, gain = winner.entry.final, winner.before, winner.gain
        if final is None or before is None or gain is None:
            continue
        spread = winner.gain_spread()
        rows.append(
            (
                winner.spec.op,
                shape_text(winner.spec),
                ", ".join(before.origins) + (", stayed" if winner.stayed else ""),
                _us(before.us),
                _us(final.winner.us),
                percent(gain),
                "" if spread is None else f"{percent(spread[0])} to {percent(spread[1])}",
                percent(1.0 + final.margin),
                f"{final.confidence:.3f}",
                len(final.winner.samples_us),
                "; ".join(final.notices),
            )
        )
    return Table.of(columns, rows)


def peers_table(found: Iterable[Comparison]) -> Table:
    """A row for each case and peer: both times, and the peer's over doratune's."""
    columns = (
        ("case", TEXT),
        ("peer", TEXT),
        ("doratune µs", NUMBER),
        ("peer µs", NUMBER),
        ("peer ÷ doratune", NUMBER),
        ("20 to 80 % of the rounds", NUMBER),
        ("file", TEXT),
    )
    return Table.of(
        columns,
        (
            (
                one.case,
                one.peer,
                _us(one.ours_us),
                _us(one.us),
                f"{one.ratio:.2f}",
                "" if one.low is None or one.high is None else f"{one.low:.2f} to {one.high:.2f}",
                one.source,
            )
            for one in found
        ),
    )


def shares_table(shares: Iterable[Share]) -> Table:
    """A row for each operation of ``doratune bench coverage``."""
    listed = list(shares)
    names = list(dict.fromkeys(name for share in listed for name in share.shares))
    columns = (("operation", TEXT), ("GPU", TEXT), ("kernels", NUMBER), *((name, NUMBER) for name in names))
    rows = ((one.op, one.gpu, one.kernels, *(f"{one.shares[name]:.1%}" for name in names)) for one in listed)
    return Table.of(columns, rows)


def searches_table(searches: Iterable[Search]) -> Table:
    """A row for each search, the longest first."""
    columns = (
        ("operation", TEXT),
        ("shape", TEXT),
        ("GPU", TEXT),
        ("how known", TEXT),
        ("trials", NUMBER),
        ("rejected", NUMBER),
        ("trials until within 1 %", NUMBER),
        ("best µs", NUMBER),
        ("best config", CODE),
    )
    return Table.of(
        columns,
        (
            (
                one.spec.op,
                shape_text(one.spec),
                one.spec.gpu,
                one.provenance,
                len(one.tried),
                one.rejected,
                one.within(0.01),
                _us(one.best_us),
                one.best,
            )
            for one in sorted(searches, key=lambda one: -len(one.tried))
        ),
    )


def trials_table(search: Search) -> Table:
    """Every trial of one search, in its order."""
    rows = ((number, _us(us) or "rejected", config) for number, (config, us) in enumerate(search.tried, 1))
    return Table.of((("trial", NUMBER), ("µs", NUMBER), ("config", CODE)), rows)


def importance_table(search: Search) -> Table:
    """The importance of each parameter of the variant that won one search."""
    rows = ((name, f"{share:.2f}") for name, share in search.importances().items())
    return Table.of((("parameter", CODE), ("importance", NUMBER)), rows)


def importances_table(rows: Iterable[Importance]) -> Table:
    """The median importance of each parameter."""
    columns = (
        ("operation", TEXT),
        ("variant", TEXT),
        ("parameter", CODE),
        ("importance", NUMBER),
        ("searches", NUMBER),
    )
    return Table.of(columns, ((row.op, row.variant, row.parameter, f"{row.share:.2f}", row.searches) for row in rows))


def steps_table(steps: Iterable[Step]) -> Table:
    """The parts of each step, with how they are known."""
    columns = (("step", TEXT), ("part", TEXT), ("how known", TEXT), ("ms", NUMBER), ("share", NUMBER))
    rows = []
    for step in steps:
        parts = step.parts()
        total = sum(parts.values()) or 1.0
        for (part, known), us in parts.items():
            rows.append((str(step.case), part, known, f"{us / 1e3:.2f}", f"{us / total:.1%}"))
        if step.case.step_us is not None:
            measured = f"measured, {step.case.source}"
            rows.append((str(step.case), "the whole step", measured, f"{step.case.step_us / 1e3:.2f}", ""))
    return Table.of(columns, rows)


def calls_table(step: Step) -> Table:
    """The kernels and products of one step, those that take most first."""
    columns = (
        ("part", TEXT),
        ("kernel or product", CODE),
        ("calls", NUMBER),
        ("µs of one", NUMBER),
        ("ms in all", NUMBER),
        ("how known", TEXT),
    )
    rows = sorted(step.calls, key=lambda call: -call.total_us)
    return Table.of(
        columns,
        (
            (call.part, call.spec, f"{call.count:g}", _us(call.us), f"{call.total_us / 1e3:.2f}", call.known)
            for call in rows
        ),
    )


def bounds_table(operations: Iterable[OpCoverage]) -> Table:
    """The kernels of a model by operation: how many are known in which way, and the bound of the others."""
    statuses = ((status, NUMBER) for status in STATUSES)
    columns = (("operation", TEXT), ("kernels", NUMBER), *statuses, ("with binaries", NUMBER), ("may lose", TEXT))
    rows = ((one.op, one.kernels, *one.by_status.values(), one.binaries, one.loss()) for one in operations)
    return Table.of(columns, rows)


def classes_of(covered: Iterable[Covered]) -> dict[str, dict[str, int]]:
    """For each way in which a kernel is known, how many of each operation are; ways that none has are left out."""
    names = (MEASURED, "predicted", "near, bound ≤ 10 %", "near, larger bound", "near, no bound", "built-in default")
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for one in covered:
        name = one.status
        if one.status == NEAR:
            bounded = "no bound" if one.loss is None else "bound ≤ 10 %" if one.loss <= MOST_LOSS else "larger bound"
            name = f"near, {bounded}"
        elif one.status not in found:
            name = "built-in default"
        found[name][one.spec.op] = found[name].get(one.spec.op, 0) + 1
    return {name: counts for name, counts in found.items() if counts}


def here_table(here: Here) -> Table:
    """The environment that made the report."""
    rows = [("made at", here.created_at), ("doratune", here.doratune), ("commit", here.commit), ("Python", here.python)]
    rows += [*here.packages, ("GPUs here", ", ".join(here.gpus) or "none")]
    return Table.of((("what", TEXT), ("version", TEXT)), rows)


def stores_table(stores: Iterable[StoreRead]) -> Table:
    """The stores that were read."""
    columns = (("store", CODE), ("named by", TEXT), ("entries", NUMBER), ("damaged rows", NUMBER))
    return Table.of(columns, ((one.location, one.origin, len(one.entries), len(one.damaged)) for one in stores))


def environments_table(winners: Iterable[Winner]) -> Table:
    """Where the winners were tuned: one row for each GPU and set of versions."""
    columns = (
        ("GPU", TEXT),
        ("driver's name", TEXT),
        ("driver", TEXT),
        ("Triton", TEXT),
        ("PyTorch", TEXT),
        ("doratune", TEXT),
        ("winners", NUMBER),
    )
    return Table.of(
        columns,
        (
            (env.gpu, env.gpu_name, env.driver, env.triton, env.torch, env.doratune, count)
            for env, count in environments(winner.entry for winner in winners)
        ),
    )


def results_table(results: Iterable[Results]) -> Table:
    """The results files that were read."""
    names = ("gpu", "driver", "torch", "triton", "doratune_commit", "date")
    columns = (("file", CODE), *((name.replace("doratune_", ""), TEXT) for name in names), ("rows", NUMBER))
    rows = ((one.path, *(one.env.get(name, "") for name in names), len(one.rows)) for one in results)
    return Table.of(columns, rows)


def _us(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1.0:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{1 if value >= 10 else 2}f}"
