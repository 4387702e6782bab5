"""A picture of what ``doratune bench mine`` found: the times of each case as bars, by plotly (the extra ``report``)."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ..errors import DoratuneError, UsageError
from ..internals.versions import import_fault
from ..printable import printable, shortened
from ..temporaries import write_whole
from .mine import Mine
from .mine_report import cases_of, name_of, ratio_text
from .results import COMPILED, OURS, Row

_EXTRA = "pip install 'doratune[report]'"
KINDS = (".html", ".svg", ".png")
_OURS, _OTHERS = "#2a6fb0", "#9aa5b1"


def check_picture(path: Path) -> None:
    """Find out before minutes of measuring whether a picture can be drawn.

    Raises:
        UsageError: its kind is unknown, or plotly (for SVG and PNG also kaleido) is not installed.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"--picture {path}: unknown kind {path.suffix!r}; end the name with {', '.join(KINDS)}")
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--picture: {import_fault('plotly', error, _EXTRA)}") from error
    if path.suffix.lower() != ".html":
        try:
            import kaleido  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--picture {path}: {path.suffix} needs kaleido and a Chrome, .html neither; "
                + import_fault("kaleido", error, _EXTRA)
            ) from error


def draw(mine: Mine, gpu: str, path: Path) -> None:
    """Write the picture. HTML holds all that it shows, plotly included; SVG and PNG are drawn by a Chrome.

    Raises:
        DoratuneError: it cannot be drawn or written.
    """
    figure = figure_of(mine, gpu)
    try:
        if path.suffix.lower() == ".html":
            write_whole(path, figure.to_html(include_plotlyjs=True))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.write_image(str(path))
    except Exception as error:  # kaleido and Chrome fail in many ways
        remedy = "name another file" if isinstance(error, OSError) else "a name that ends in .html needs no browser"
        raise DoratuneError(
            f"the picture {shortened(str(path), 200)} cannot be drawn: {type(error).__name__}: "
            f"{shortened(str(error), 500)}; {remedy}"
        ) from error


def figure_of(mine: Mine, gpu: str) -> Any:
    """The figure: a plot for each case, a bar for each contender."""
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    cases = cases_of(mine.outcome.rows)
    sizes = [len(case.rows) for case in cases]
    figure = make_subplots(
        rows=len(cases),
        cols=1,
        subplot_titles=[_text(case.title) for case in cases],
        row_heights=[float(size) for size in sizes],
        vertical_spacing=min(0.15, 0.4 / len(cases)),
    )
    for place, case in enumerate(cases, 1):
        rows = case.rows[::-1]  # the first is drawn at the bottom
        bar = Bar(
            x=[row["us"] / 1e3 for row in rows],
            y=[_text(name_of(row["impl"])) for row in rows],
            text=[_label(row) for row in rows],
            orientation="h",
            marker_color=[_OURS if row["impl"].removesuffix(COMPILED) == OURS else _OTHERS for row in rows],
            textposition="inside",
            insidetextanchor="start",
        )
        figure.add_trace(bar, row=place, col=1)
    figure.update_xaxes(title_text="ms", row=len(cases), col=1)
    figure.update_layout(
        title=_text(f"{mine.name} on {gpu}: {mine.layers} of {mine.all_layers} layers, rank {mine.asked.rank}"),
        showlegend=False,
        template="plotly_white",
        height=160 + 40 * sum(sizes) + 60 * len(cases),
        width=900,
    )
    return figure


def _label(row: Row) -> str:
    ratio = ratio_text(row)
    return f"{row['us'] / 1e3:.2f} ms" + (f", doratune takes {ratio} of it" if ratio else "")


def _text(text: str) -> str:
    """A text in which plotly finds no tags."""
    return html.escape(printable(text))
