"""The colours of the page and of its plots, in light and in dark. One place, so that both are always complete.

Text has a contrast of at least 4.5 to its background, marks of 3 (WCAG 2.2, 1.4.3 and 1.4.11); tests compute them.
"""

from __future__ import annotations

from typing import Any

LIGHT, DARK = "light", "dark"

SCHEMES: dict[str, dict[str, str]] = {
    LIGHT: {
        "background": "#ffffff",
        "surface": "#f5f7fa",
        "text": "#1b2430",
        "muted": "#55616f",
        "line": "#d5dbe3",
        "accent": "#0b5fa5",
    },
    DARK: {
        "background": "#12161c",
        "surface": "#1b212a",
        "text": "#e6ebf2",
        "muted": "#a5b1c0",
        "line": "#3a4451",
        "accent": "#6cb6ff",
    },
}

MARKS: dict[str, tuple[str, ...]] = {
    LIGHT: ("#0b5fa5", "#c2410c", "#0f766e", "#9333a8", "#7a5c00", "#be185d", "#4b5563", "#1d7fbf"),
    DARK: ("#6cb6ff", "#ff9a5c", "#4fd1b5", "#d59bf0", "#e3c15a", "#ff8fb8", "#b6bec9", "#9fdcff"),
}
"""The colours of marks by role; a trace says its role in ``meta``."""

SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down"),
    *("pentagon", "bowtie", "hourglass", "star-diamond", "triangle-left"),
)
"""A shape for each role, so that colour is never the only difference; more than colours, so that few pairs repeat."""

PATTERNS = ("", "/", ".", "x", "-", "|", "+", "\\")

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'


def template(scheme: str, font_size: int = 13) -> dict[str, Any]:
    """The plotly template of a scheme."""
    colours = SCHEMES[scheme]
    axis = {
        "gridcolor": colours["line"],
        "linecolor": colours["muted"],
        "zerolinecolor": colours["line"],
        "tickcolor": colours["line"],
        "automargin": True,
        "title": {"standoff": 10},
    }
    layout = {
        "font": {"family": FONT, "size": font_size, "color": colours["text"]},
        "paper_bgcolor": colours["background"],
        "plot_bgcolor": colours["background"],
        "colorway": list(MARKS[scheme]),
        "xaxis": axis,
        "yaxis": {
            **axis,
            "ticks": "outside",
            "ticklen": 6,
            "tickcolor": colours["background"],
            "tickfont": {"size": font_size - 1},
        },
        "hoverlabel": {
            "bgcolor": colours["surface"],
            "bordercolor": colours["line"],
            "align": "left",
            "font": {"color": colours["text"], "size": 12},
        },
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        "margin": {"l": 8, "r": 12, "t": 24, "b": 40},
        "annotationdefaults": {"font": {"color": colours["muted"]}},
        "shapedefaults": {"line": {"color": colours["muted"], "width": 1.5, "dash": "dot"}},
    }
    return {"layout": layout}


def paint(figure: dict[str, Any], scheme: str) -> dict[str, Any]:
    """Give the traces of a figure the colours of their roles, as ``page.js`` does; the figure itself is changed."""
    for trace in figure["data"]:
        role = (trace.get("meta") or {}).get("role")
        if role is not None:
            colour = MARKS[scheme][role % len(MARKS[scheme])]
            for part in ("marker", "line", "error_x"):
                if part in trace:
                    trace[part]["color"] = colour
    return figure
