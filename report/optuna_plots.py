"""Optuna's own plots of one search, in the page's colours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
import plotly.graph_objects as go

from .plots import trial_step
from .searches import Search
from .theme import SYMBOLS

SLICED = 4
"""Parameters in a slice plot, the most important ones: more are too narrow to read."""


def optuna_plot(search: Search, key: str) -> go.Figure:
    """One plot of a search with a timed trial: its ``history``, or its ``importances`` or a ``slice`` where it has
    importances."""
    study = search.study(variants=key == "history")
    assert study is not None
    if key == "history":
        return _history(study)
    names = list(search.importances())
    return _importances(study, names) if key == "importances" else _slice(study, names[:SLICED])


def _history(study: optuna.Study) -> go.Figure:
    with _quiet():
        figure = optuna.visualization.plot_optimization_history(study, target_name="µs")
    figure.update_xaxes(dtick=trial_step(len(study.trials)))
    return _restyled(figure, height=360)


def _importances(study: optuna.Study, names: list[str]) -> go.Figure:
    with _quiet():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        figure = optuna.visualization.plot_param_importances(study, evaluator=evaluator, params=names, target_name="µs")
    figure.update_layout(xaxis_title="importance", yaxis_title="")
    longest = max((value for trace in figure.data for value in trace.x), default=1.0)
    figure.update_xaxes(range=[0.0, 1.2 * longest])  # room for the figure beside the longest bar
    return _restyled(figure, height=110 + 30 * len(names))


def _slice(study: optuna.Study, names: list[str]) -> go.Figure:
    with _quiet():
        figure = optuna.visualization.plot_slice(study, params=names, target_name="µs")
    figure.update_layout(width=None)
    figure.update_traces(marker={"showscale": False, "colorscale": None, "opacity": 0.7, "size": 8})
    return _restyled(figure, height=380, one_role=True)


def _restyled(figure: go.Figure, *, height: int, one_role: bool = False) -> go.Figure:
    """Without Optuna's title, its traces without points, and its colours, which are for light backgrounds."""
    figure.data = [trace for trace in figure.data if len(trace.x)]
    figure.update_layout(title=None, template=None, height=height, showlegend=len(figure.data) > 1 and not one_role)
    for place, trace in enumerate(figure.data):
        role = 0 if one_role else place
        trace.update(meta={"role": role})
        if trace.type == "scatter":
            trace.marker.update(color=None, line=None, symbol=SYMBOLS[role])
            trace.line.color = None
        else:
            trace.marker.color = None
    return figure


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that a part of it is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
