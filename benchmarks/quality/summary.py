"""What the runs say: means over seeds, paired differences, distances of curves; as rows and as sentences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..results import Row
from .arms import DORA, LORA, PEFT_DORA
from .clock import CLOCK
from .intervals import Interval, holm
from .runs import ADAPT, PRECISION
from .study import REFERENCE

if TYPE_CHECKING:
    from ...terminal.tables import Table

REACHED, EQUAL_STEPS, EQUAL_TIME = "reached", "equal-steps", "equal-time"
CURVES, CURVES_APART = "curve-distance", "curve-distance-difference"
SUMMARIES = (REACHED, EQUAL_STEPS, EQUAL_TIME, CURVES, CURVES_APART)
LEVEL = 0.05

Pair = Callable[[Row, Row], float | None]
Clock = Mapping[tuple[str, int | None], float]
"""Milliseconds of a step, by method and rank."""


def summarise(rows: Sequence[Row]) -> list[Row]:
    """The summary rows of the runs in ``rows``.

    A difference is a method's loss minus LoRA's of the same rank (of full fine-tuning: LoRA's of every rank), and
    doratune's minus that of PEFT's DoRA, seed by seed. ``p_holm`` is corrected for all differences of an operation.
    """
    adapted = [row for row in rows if row["op"] == ADAPT]
    clock = {(row["impl"], row["rank"]): row["step_ms"] for row in rows if row["op"] == CLOCK}
    found = _reached(adapted, clock) + _differences(adapted, EQUAL_STEPS, _equal_steps)
    if all((row["impl"], row["rank"]) in clock for row in adapted):
        found += _differences(adapted, EQUAL_TIME, functools.partial(_equal_time, clock))
    return found + _curves([row for row in rows if row["op"] == PRECISION])


def _reached(adapted: Sequence[Row], clock: Clock) -> list[Row]:
    found = []
    for group in _groups(adapted):
        first, losses = group[0], [row["loss"] for row in group if row["loss"] is not None]
        if losses:
            facts: Row = {name: first[name] for name in ("rate", "edge", "parameters")}
            facts["step_ms"] = clock.get((first["impl"], first["rank"]))
            facts["diverged"] = len(group) - len(losses)
            found.append({**_case(first, REACHED), **facts, **_interval(losses)})
    return found


def _differences(adapted: Sequence[Row], op: str, pair: Pair) -> list[Row]:
    found = []
    groups = list(_groups(adapted))
    for group in groups:
        first = group[0]
        for other in groups:
            if _is_baseline(other[0], first):
                by_seed = {row["seed"]: row for row in other}
                pairs = [(row, by_seed[row["seed"]]) for row in group if row["seed"] in by_seed]
                values = [value for mine, theirs in pairs if (value := pair(mine, theirs)) is not None]
                if values:
                    case = {**_case(first, op), "rank": other[0]["rank"], "against": other[0]["impl"]}
                    edge = bool(first["edge"] or other[0]["edge"])
                    found.append({**case, "edge": edge, **_interval(values), "diverged": len(pairs) - len(values)})
    return _corrected(found)


def _is_baseline(other: Row, row: Row) -> bool:
    if other["impl"] == PEFT_DORA:
        return bool(row["impl"] == DORA and row["rank"] == other["rank"])
    return bool(other["impl"] == LORA and row["impl"] != LORA and row["rank"] in (None, other["rank"]))


def _equal_steps(mine: Row, theirs: Row) -> float | None:
    return None if None in (mine["loss"], theirs["loss"]) else mine["loss"] - theirs["loss"]


def _equal_time(clock: Clock, mine: Row, theirs: Row) -> float | None:
    """The difference when the faster of the two has made all its steps."""
    if None in (mine["loss"], theirs["loss"]):
        return None
    each_ms = [clock[row["impl"], row["rank"]] for row in (mine, theirs)]
    when = min(row["at"][-1] * ms for row, ms in zip((mine, theirs), each_ms, strict=True))
    ends = [loss_at(row, when / ms) for row, ms in zip((mine, theirs), each_ms, strict=True)]
    return None if ends[0] is None or ends[1] is None else ends[0] - ends[1]


def loss_at(row: Row, steps: float) -> float | None:
    """The held-out loss of a run after so many steps, on straight lines between its evaluations.

    None where one of the two beside it was not finite.
    """
    marks, losses = [0.0, *row["at"]], [row["start_loss"], *row["held_out_loss"]]
    for k in range(1, len(marks)):
        if steps <= marks[k]:
            if None in losses[k - 1 : k + 1]:
                return None
            share = (steps - marks[k - 1]) / (marks[k] - marks[k - 1])
            return float(losses[k - 1] + share * (losses[k] - losses[k - 1]))
    return float(losses[-1])


def _curves(rows: Sequence[Row]) -> list[Row]:
    """Distances of curves to the reference, and doratune's minus PEFT's in the same dtypes."""
    name, mode = REFERENCE
    by_kind: dict[tuple[str, str, bool, str], dict[int, Row]] = {}
    for row in rows:
        kind = (row["impl"], row["adapter"], "autocast" in row["flags"], row["dtype"])
        by_kind.setdefault(kind, {})[row["seed"]] = row
    reference = by_kind.get((name, mode.adapter, mode.autocast, "fp32"), {})
    distances: dict[tuple[str, str, bool, str], dict[int, float]] = {}
    found, apart = [], []
    for kind, by_seed in by_kind.items():
        if by_seed is reference:
            continue
        shared = {seed: _distance(row, reference[seed]) for seed, row in by_seed.items() if seed in reference}
        distances[kind] = {seed: value for seed, value in shared.items() if value is not None}
        values = [*distances[kind].values()]
        first = next(iter(by_seed.values()))
        if values:
            found.append({**_case(first, CURVES), **_interval(values), "diverged": len(shared) - len(values)})
        stock = distances.get((PEFT_DORA, *kind[1:]))
        if first["impl"] == DORA and stock:
            pairs = [value - stock[seed] for seed, value in distances[kind].items() if seed in stock]
            if pairs:
                apart.append({**_case(first, CURVES_APART), "against": PEFT_DORA, "edge": False, **_interval(pairs)})
    return found + _corrected(apart)


def _distance(row: Row, reference: Row) -> float | None:
    """The root mean square, over all steps, of the difference of two runs' training losses on the same batches."""
    pairs = list(zip(row["train_loss"], reference["train_loss"], strict=True))
    if any(None in pair for pair in pairs):
        return None
    return math.sqrt(sum((mine - theirs) ** 2 for mine, theirs in pairs) / len(pairs))


def _groups(rows: Iterable[Row]) -> Iterable[list[Row]]:
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["impl"], row["rank"]), []).append(row)
    return groups.values()


def _case(row: Row, op: str) -> Row:
    names = ("impl", "model", "shape", "rank", "dtype", "adapter", "flags")
    return {"bench": "quality", "op": op, **{name: row[name] for name in names}}


def _interval(values: Sequence[float]) -> Row:
    found = Interval.of(values)
    return {"seeds": found.n, "mean": found.mean, "low": found.low, "high": found.high, "p": found.p}


def _corrected(rows: list[Row]) -> list[Row]:
    """The rows with Holm's p over all of them that have one, and what they say."""
    known = [row for row in rows if row["p"] is not None]
    for row in rows:
        row["p_holm"], row["comparisons"] = None, len(known)
    for row, p in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = p
    for row in rows:
        row["says"] = verdict(row)
    return rows


def verdict(row: Row) -> str:
    """What a difference says."""
    if row["low"] is None:
        return "not known: one seed has no interval"
    if row["low"] <= 0.0 <= row["high"]:
        return "no difference is seen"
    if row["p_holm"] >= LEVEL:
        return f"no difference is seen after correction for {row['comparisons']} comparisons"
    return f"{'lower' if row['mean'] < 0.0 else 'higher'} than {row['against']}"


def sentences(rows: Sequence[Row]) -> list[str]:
    """The differences in words, one for each."""
    units = {EQUAL_STEPS: "held-out loss at equal steps", EQUAL_TIME: "held-out loss at equal time"}
    found = []
    for row in rows:
        if row["op"] not in units and row["op"] != CURVES_APART:
            continue
        kept = f"{row['adapter']} adapters, {row['dtype']} weights"
        what = units.get(row["op"], f"distance to the fp32 curve, {kept}")
        text = f"{what}, r={row['rank']}: {row['impl']} − {row['against']} {interval_text(row)}: {row['says']}"
        text += "; a learning rate is at the edge of its grid" if row["edge"] else ""
        found.append(text + (f"; {row['diverged']} seeds diverged" if row.get("diverged") else ""))
    if any(row["op"] == ADAPT for row in rows) and not any(row["op"] == EQUAL_TIME for row in rows):
        found.append("equal time: not measured: a GPU times steps, after the runs")
    return found


def interval_text(row: Row) -> str:
    """``+0.0123 (+0.0100 to +0.0146)``; losses and distances without the sign, distances to two digits."""
    form = ("+" if "against" in row else "") + (".2g" if row["op"] in (CURVES, CURVES_APART) else ".4f")
    if row["low"] is None:
        return f"{row['mean']:{form}}"
    return f"{row['mean']:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def quality_table(rows: Sequence[Row]) -> Table:
    """A line for each summary row."""
    from ...terminal.tables import Table

    table = Table("what", "r", "method", "mean, 95 % interval", "seeds", "p, Holm", "rate", "ms a step", "says")
    for row in rows:
        if row["op"] in SUMMARIES:
            table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> Iterable[object]:
    def number(name: str, form: str) -> str:
        value: Any = row.get(name)
        return "" if value is None else format(value, form)

    dtypes = f", {row['dtype']} weights, {row['adapter']} adapters" if row["op"] in (CURVES, CURVES_APART) else ""
    method = f"{row['impl']} − {row['against']}" if "against" in row else row["impl"]
    edge = " (edge of the grid)" if row.get("edge") else ""
    return (
        row["op"] + dtypes,
        row["rank"] or "",
        method,
        interval_text(row),
        row["seeds"],
        number("p_holm", ".3g"),
        number("rate", "g") + edge,
        number("step_ms", ".1f"),
        row.get("says", ""),
    )
