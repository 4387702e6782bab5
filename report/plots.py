"""The plots, as plotly figures without colours: those come with the scheme (:mod:`.theme`).

Every text that may come from a store or a file goes through :func:`plain`, since plotly reads some HTML in labels.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ..printable import printable, shortened
from .peers import Comparison, Share
from .searches import Importance, Search
from .step import KNOWN, PARTS, Step
from .tables import MOST_LINES
from .theme import PATTERNS, SYMBOLS
from .winners import Winner, shape_text

_MOST_PARAMETERS = 5
_MOST_POWERS = 6
"""Powers of ten with a tick on a logarithmic axis, about."""
_TEXT = 120
_NAME = 36
"""Characters of a name in a legend, and of a line of an axis label, at most: more does not fit a narrow screen."""
_LABEL = 22
_LINE_HEIGHT, _FRAME = 38, 110


def plain(text: object, most: int = _TEXT) -> str:
    """A text as plotly shows it letter by letter: without markup, and of at most ``most`` characters."""
    return html.escape(printable(shortened(str(text), most)), quote=False)


def floors(winners: Sequence[Winner]) -> go.Figure:
    """Each winner's time over its floor against the floor; filled marks are measured, open ones are not."""
    figure = go.Figure()
    known = [winner for winner in winners if winner.over_floor is not None]
    for role, (op, group) in enumerate(_groups(known, lambda winner: winner.spec.op).items()):
        symbol = SYMBOLS[role % len(SYMBOLS)]
        figure.add_scatter(
            name=plain(op, _NAME),
            x=[winner.entry.evaluation.floor_us for winner in group],
            y=[winner.over_floor for winner in group],
            mode="markers",
            marker={"symbol": [symbol if one.measured else f"{symbol}-open" for one in group], "size": 9},
            hovertext=[_told(winner) for winner in group],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=1, y1=1)
    figure.update_xaxes(type="log", title="floor, µs", exponentformat="none", dtick=1)
    ratios = [winner.over_floor or 1.0 for winner in known]
    ticks = _log_ticks([*ratios, 1.0])
    figure.update_yaxes(type="log", title="time ÷ floor", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return _framed(figure, height=460)


def gains(winners: Sequence[Winner]) -> go.Figure:
    """How much faster each winner is than what ran before: the median, and 20 to 80 % of the final's rounds."""
    ordered = _extremes(sorted(winners, key=lambda winner: winner.gain or 0.0))
    several = len({winner.spec.gpu for winner in ordered}) > 1
    lines = {id(winner): _line(winner, several) for winner in ordered}
    figure = go.Figure()
    for role, (stayed, name) in enumerate(((False, "another config than before"), (True, "what ran before won"))):
        group = [winner for winner in ordered if winner.stayed is stayed]
        if not group:
            continue
        points = [_percent(winner.gain or 1.0) for winner in group]
        spreads = [winner.gain_spread() or (winner.gain or 1.0,) * 2 for winner in group]
        figure.add_scatter(
            name=name,
            x=points,
            y=[lines[id(winner)] for winner in group],
            mode="markers",
            marker={"symbol": SYMBOLS[role], "size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, _percent(high) - at) for (_, high), at in zip(spreads, points, strict=True)],
                "arrayminus": [max(0.0, at - _percent(low)) for (low, _), at in zip(spreads, points, strict=True)],
                "thickness": 2,
                "width": 4,
            },
            hovertext=[_told(winner) for winner in group],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.add_shape(type="line", yref="paper", x0=0, x1=0, y0=0, y1=1)
    figure.update_xaxes(title="gain, %")
    figure.update_yaxes(categoryorder="array", categoryarray=[*lines.values()], range=[-0.7, len(ordered) - 0.3])
    return _framed(figure, lines=len(ordered))


def peers(found: Sequence[Comparison]) -> go.Figure:
    """Each peer's time over doratune's, a line for each case."""
    several = len({one.source for one in found}) > 1
    names = {id(one): _case(one, several) for one in found}
    cases = list(dict.fromkeys(names.values()))[:MOST_LINES]
    figure = go.Figure()
    for role, (peer, group) in enumerate(_groups(found, lambda one: one.peer).items()):
        shown = [one for one in group if names[id(one)] in cases]
        if not shown:
            continue
        figure.add_scatter(
            name=plain(peer, _NAME),
            x=[one.ratio for one in shown],
            y=[names[id(one)] for one in shown],
            mode="markers",
            marker={"symbol": SYMBOLS[role % len(SYMBOLS)], "size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, (one.high or one.ratio) - one.ratio) for one in shown],
                "arrayminus": [max(0.0, one.ratio - (one.low or one.ratio)) for one in shown],
            },
            hovertext=[f"{plain(one.case)}<br>{plain(one.peer)}: {one.ratio:.2f} × doratune" for one in shown],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.add_shape(type="line", yref="paper", x0=1, x1=1, y0=0, y1=1)
    ticks = _log_ticks([*(one.ratio for one in found), 1.0])
    figure.update_xaxes(type="log", title="peer ÷ doratune", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(categoryorder="array", categoryarray=cases[::-1], range=[-0.7, len(cases) - 0.3])
    return _framed(figure, lines=len(cases))


def shares(found: Sequence[Share]) -> go.Figure:
    """Of the kernels of random models: the share with an entry, with a bound, with none; a bar for each operation."""
    names = list(dict.fromkeys(name for share in found for name in share.shares))
    lines = [_wrapped(f"{share.op} {share.gpu}") for share in found][:MOST_LINES]
    counts = {name: [100.0 * share.shares[name] for share in found[:MOST_LINES]] for name in names}
    return _stacked(lines, counts, "kernels, %", lambda value: f"{value:.0f} %")


def history(searches: Sequence[Search]) -> go.Figure:
    """The best time so far over the best of all, by trial: a line for each search, a colour for each operation."""
    figure = go.Figure()
    for role, (op, group) in enumerate(_groups(searches, lambda search: search.spec.op).items()):
        xs: list[int | None] = []
        ys: list[float | None] = []
        for search in group:
            line = search.history()
            first = len(search.tried) - len(line) + 1
            xs += [*range(first, len(search.tried) + 1), None]
            ys += [*line, None]
        figure.add_scatter(
            name=plain(op, _NAME),
            x=xs,
            y=ys,
            mode="lines+markers",
            line={"shape": "hv", "width": 1.5},
            marker={"symbol": SYMBOLS[role % len(SYMBOLS)], "size": 5},
            opacity=0.8,
            hovertemplate=f"{plain(op)}<br>trial %{{x}}: %{{y:.3f}} × the best<extra></extra>",
            meta={"role": role},
        )
    most = max(len(search.tried) for search in searches)
    figure.update_xaxes(title="trial", rangemode="tozero", dtick=trial_step(most))
    ticks = _log_ticks([*(value for search in searches for value in search.history()), 1.0])
    figure.update_yaxes(
        type="log", title="best so far ÷ best", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]
    )
    return _framed(figure, height=420)


def importances(rows: Sequence[Importance]) -> go.Figure:
    """The most important parameters of each operation's variants."""
    figure = go.Figure()
    lines: list[str] = []
    for role, (op, group) in enumerate(_groups(rows, lambda row: row.op).items()):
        by_variant = _groups(group, lambda row: row.variant)
        shown = [row for several in by_variant.values() for row in several[:_MOST_PARAMETERS]]
        names = [plain(f"{row.variant}: {row.parameter}") + f"<br>{plain(op)}" for row in shown]
        lines += names
        figure.add_bar(
            name=plain(op, _NAME),
            y=names,
            x=[row.share for row in shown],
            orientation="h",
            marker={
                "pattern": {"shape": PATTERNS[role % len(PATTERNS)], "fillmode": "overlay", "fgopacity": 0.3, "size": 7}
            },
            hovertext=[
                f"{name}: {row.share:.2f}, {row.searches} searches" for name, row in zip(names, shown, strict=True)
            ],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.update_xaxes(title="importance", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=lines[::-1])
    return _framed(figure, lines=len(lines))


def steps(found: Sequence[Step]) -> go.Figure:
    """The parts of each training step, stacked; patterns say how each is known."""
    figure = go.Figure()
    lines = {id(step): _wrapped(str(step.case), 6) for step in found}
    for part in PARTS:
        for known in KNOWN:
            timed = [(step, step.parts()[part, known]) for step in found if (part, known) in step.parts()]
            if not timed:
                continue
            values = [us / 1e3 for _, us in timed]
            figure.add_bar(
                name=f"{part}: {known}",
                y=[lines[id(step)] for step, _ in timed],
                x=values,
                orientation="h",
                marker={
                    "pattern": {
                        "shape": PATTERNS[KNOWN.index(known)],
                        "fillmode": "overlay",
                        "fgopacity": 0.3,
                        "size": 7,
                    }
                },
                text=[f"{value:.3g}" for value in values],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                hovertext=[f"{part}, {known}: {value:.2f} ms" for value in values],
                hoverinfo="text",
                meta={"role": PARTS.index(part)},
            )
    figure.update_layout(barmode="stack", legend={"traceorder": "normal"}, uniformtext={"mode": "hide", "minsize": 10})
    figure.update_xaxes(title="ms")
    figure.update_yaxes(categoryorder="array", categoryarray=[*lines.values()][::-1])
    return _framed(figure, lines=3 * len(found) + 3)


def bounds(classes: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """How the kernels of a model are known, a bar for each operation."""
    ops = list(dict.fromkeys(op for counts in classes.values() for op in counts))
    counts = {name: [float(by_op.get(op, 0)) for op in ops] for name, by_op in classes.items()}
    return _stacked([plain(op) for op in ops], counts, "kernels", lambda value: f"{value:g}")


def _stacked(
    lines: Sequence[str], counts: Mapping[str, Sequence[float]], title: str, text: Callable[[float], str]
) -> go.Figure:
    """A stacked bar for each of ``lines``; ``counts`` has a value of each line by name."""
    figure = go.Figure()
    for role, (name, values) in enumerate(counts.items()):
        if not any(values):
            continue
        figure.add_bar(
            name=plain(name, _NAME),
            y=lines,
            x=values,
            orientation="h",
            marker={
                "pattern": {"shape": PATTERNS[role % len(PATTERNS)], "fillmode": "overlay", "fgopacity": 0.3, "size": 7}
            },
            text=[text(value) if value else "" for value in values],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            hovertext=[f"{line}<br>{plain(name)}: {text(value)}" for line, value in zip(lines, values, strict=True)],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.update_layout(barmode="stack", legend={"traceorder": "normal"}, uniformtext={"mode": "hide", "minsize": 10})
    figure.update_xaxes(title=title)
    figure.update_yaxes(categoryorder="array", categoryarray=[*lines][::-1])
    return _framed(figure, lines=len(lines))


def _framed(figure: go.Figure, *, lines: int = 0, height: int = 0) -> go.Figure:
    return figure.update_layout(height=height or _FRAME + _LINE_HEIGHT * lines, showlegend=True)


def _groups(items: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return dict(sorted(groups.items()))


def _extremes(ordered: Sequence[Winner]) -> list[Winner]:
    """All, or the first and the last where there are too many to read."""
    half = MOST_LINES // 2
    return [*ordered] if len(ordered) <= MOST_LINES else [*ordered[:half], *ordered[-half:]]


def _line(winner: Winner, gpu: bool) -> str:
    return f"{plain(winner.spec.op)}<br>{plain(shape_text(winner.spec))}" + (
        f" on {plain(winner.spec.gpu)}" if gpu else ""
    )


def _case(one: Comparison, several: bool) -> str:
    return _wrapped(one.case.replace(f"{one.op} ", "", 1) + (f" ({one.source})" if several else ""))


def _wrapped(text: str, most: int = 2) -> str:
    """A text in at most ``most`` short lines."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, _LABEL, max_lines=most, placeholder=" …"))


def _told(winner: Winner) -> str:
    """What a mark says when it is pointed at."""
    evaluation = winner.entry.evaluation
    lines = [f"{winner.spec.op} {shape_text(winner.spec)}", str(winner.entry.config)]
    if evaluation.us is not None and evaluation.floor_us:
        lines.append(f"{evaluation.us:.2f} µs {evaluation.provenance}, floor {evaluation.floor_us:.2f} µs")
    if winner.gain is not None and winner.entry.final is not None:
        final = winner.entry.final
        lines.append(f"gain {_percent(winner.gain):.1f} %, margin {100 * final.margin:.1f} %")
        lines.append(f"confidence {final.confidence:.3f}, {len(final.winner.samples_us)} rounds")
    return "<br>".join(map(plain, lines))


def _percent(ratio: float) -> float:
    return 100.0 * (ratio - 1.0)


def trial_step(trials: int) -> int:
    """Trials between two ticks of an axis: whole numbers, few enough for a narrow screen."""
    return max(1, math.ceil(trials / 8))


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Round values over a range of ratios, few enough to be read at any width."""
    low, high = min(values), max(values)
    if high / low < 2.0:
        step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 6.0)
        first = math.floor(low / step)
        return [round(step * place, 6) for place in range(first, math.ceil(high / step) + 1) if place > 0]
    steps: tuple[float, ...] = (
        (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 4.0 else (1, 2, 5) if high / low < 200 else (1,)
    )
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // _MOST_POWERS))
    return [step * 10.0**power for power in powers for step in steps]
