"""What a report says, section by section: words, tables, and the plots that show them.

A section without data says how to get it, and has no plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..tuner.gain import percent
from . import tables
from .data import Report
from .document import Block, Document, Figure, Fold, Section
from .peers import Comparison
from .searches import LEAST_TRIALS, Search, importances_by_op, shown_searches
from .tables import MOST_LINES
from .winners import median_gain, shape_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

NEAR = 1.5
"""A winner within this factor of its floor counts as near it."""


def document(report: Report) -> Document:
    """The report in words, tables and plots."""
    title = f"doratune: {report.model.name} on {report.gpu}" if report.model and report.gpu else "doratune"
    if report.empty:
        return Document(title, (), report.notes, (_start(report), _provenance(report)))
    sections = (_floors(report), _gains(report), _peers(report), _searches(report), _step(report), _bounds(report))
    return Document(title, _facts(report), report.notes, (*sections, _provenance(report)))


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    winners, found = report.winners, []
    if winners:
        measured = sum(winner.measured for winner in winners)
        found.append(("kernels with a winner", f"{len(winners)}"))
        found.append(("measured, predicted", f"{measured}, {len(winners) - measured}"))
        found.append(("GPUs", ", ".join(sorted({winner.spec.gpu for winner in winners}))))
        ratios = sorted(winner.over_floor for winner in winners if winner.over_floor is not None)
        if ratios:
            found.append(("median time ÷ floor", f"{ratios[len(ratios) // 2]:.2f}"))
        gain = median_gain(winners)
        if gain is not None:
            found.append(("median gain over what ran before", percent(gain)))
    if report.searches.found:
        trials = sum(len(search.tried) for search in report.searches.found)
        found.append(("searches, configs tried", f"{len(report.searches.found)}, {trials}"))
    if report.covered:
        measured = sum(one.status == "measured" for one in report.covered)
        found.append(("kernels of the model measured", f"{measured} of {len(report.covered)}"))
    return tuple(found)


def _start(report: Report) -> Section:
    return Section(
        "start",
        "Nothing was tuned yet",
        (
            "The stores below have no winner, there is no search, and "
            + ("no row of the results files can be shown." if report.results else "no results file was given."),
            "Tune a model first. Without a GPU the kernels are compiled and their order is predicted. Then make this "
            "report again.",
        ),
        ("doratune tune --model llama-8b --rank 16 --gpu h200 --effort quick", "doratune report --open"),
    )


def _floors(report: Report) -> Section:
    winners = report.winners
    if not winners:
        return Section(
            "winners",
            "Winners and their floors",
            ("The stores have no winner for what was asked.",),
            ("doratune tune --model llama-8b",),
        )
    timed = [winner for winner in winners if winner.over_floor is not None]
    words = ["A floor is the least time that a kernel's bytes and flops allow at the GPU's attainable rates."]
    measured = sum(winner.measured for winner in winners)
    if measured < len(winners):
        words.append(
            f"{len(winners) - measured} of {len(winners)} times are predicted by a performance model and not measured: "
            "they rank configs of one kernel and are no evidence of speed."
        )
    other = sum(winner.other_template for winner in winners)
    if other:
        were = "was" if other == 1 else "were"
        words.append(
            f"{count(other, 'winner')} {were} tuned with another template than the installed one: a lookup takes such "
            "an entry only where the emitted text is the same. `doratune tune` tunes the others again."
        )
    block = Block("floors", "Time over floor", tables.floors_table(winners))
    if timed:
        near = sum((winner.over_floor or 0.0) <= NEAR for winner in timed)
        block = replace(
            block,
            alt=f"A mark for each of {len(timed)} winners: its floor in µs rightward, its time over that floor upward.",
            finding=f"{near} of {count(len(timed), 'winner')} take at most {NEAR} times their floor.",
            caption="Filled marks are measured, open ones predicted.",
            figure=_figure("floors", timed),
        )
    return Section("winners", "Winners and their floors", tuple(words), blocks=(block,))


def _gains(report: Report) -> Section:
    title = "Gains over what ran before"
    winners = [winner for winner in report.winners if winner.gain is not None]
    if not winners:
        why = "No winner has a final against what a lookup gave before its search. "
        why += "Finals are timed on a GPU, when kernels are measured; predicted searches have none."
        return Section("gains", title, (why,))
    moved = [winner for winner in winners if not winner.stayed]
    gain = median_gain(winners) or 1.0
    words = [
        "At the end of a search the best configs and the incumbent, which a lookup gave before, are timed in turn.",
        f"{len(winners) - len(moved)} of {len(winners)} kernels stayed with what ran before; median gain "
        f"{percent(gain)}.",
    ]
    if len(report.winners) > len(winners):
        words.append(f"Left out, since they have no such final: {count(len(report.winners) - len(winners), 'winner')}.")
    best = max(winners, key=lambda winner: winner.gain or 0.0)
    alt = (
        f"A line for each of {_shown(len(winners))} kernels, the gain in percent from left to right, from "
        f"{percent(min(winner.gain or 1.0 for winner in winners))} to {percent(best.gain or 1.0)} "
        f"({best.spec.op} {shape_text(best.spec)})."
    )
    table = tables.finals_table(winners)
    caption = "The lines span 20 to 80 % of the rounds; the dotted one is what ran before."
    block = Block("gains", "Gain by kernel", table, alt, caption=caption, figure=_figure("gains", winners))
    return Section("gains", title, tuple(words), blocks=(block,))


def _shown(kernels: int) -> str:
    return str(kernels) if kernels <= MOST_LINES else f"{MOST_LINES} of {kernels}"


def count(number: int, what: str) -> str:
    """A number of things: ``1 winner``, ``2 winners``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _peers(report: Report) -> Section:
    title = "Beside the peers"
    if not report.comparisons and not report.shares:
        why = "No results file was given. `doratune bench` measures doratune and its peers in turn on a GPU."
        return Section("peers", title, (why,), ("doratune report --results kernels.json --results model.json",))
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in report.comparisons:
        groups.setdefault((one.bench, one.op), []).append(one)
    blocks = []
    for place, ((bench, op), group) in enumerate(groups.items()):
        slower = sum(one.ratio > 1.0 for one in group)
        unit = "host time" if bench == "host" else "time"
        alt = f"A line for each case, a mark for each peer: its {unit} over doratune's. Right of 1 doratune is faster."
        finding = f"doratune is faster in {slower} of {count(len(group), 'comparison')}."
        name = f"{bench}: {op}" + (" (the host's time of a call)" if bench == "host" else "")
        figure = _figure("peers", group)
        blocks.append(Block(f"peers-{place}", name, tables.peers_table(group), alt, finding, figure=figure))
    if report.shares:
        alt = "A bar for each operation: the shares of kernels of random models with an entry, with a bound, with none."
        table = tables.shares_table(report.shares)
        figure = _figure("shares", list(report.shares))
        blocks.append(Block("shares", "Kernels of random models", table, alt, figure=figure))
    words = (
        "Each case is one run: doratune and its peers in turn in one process. Where a peer's time over doratune's is "
        "above 1, doratune is faster.",
    )
    return Section("peers", title, words, blocks=tuple(blocks))


def _searches(report: Report) -> Section:
    title, found = "Searches", report.searches.found
    if not found:
        why = report.searches.note or "the study storage has no search of these kernels"
        return Section("searches", title, (f"Study storage {report.searches.location}: {why}.",))
    trials = sum(len(search.tried) for search in found)
    rejected = sum(search.rejected for search in found)
    tried = "1 search" if len(found) == 1 else f"{len(found)} searches"
    words = [f"{tried} tried {count(trials, 'config')} and rejected {rejected}."]
    withins = sorted(number for search in found if (number := search.within(0.01)) is not None)
    if withins:
        half = count(withins[len(withins) // 2], "trial")
        words.append(f"Half of them had a config within 1 % of their best after {half}.")
    blocks = []
    timed = [search for search in found if search.best_us is not None]
    if timed:
        alt = (
            f"A line for each of {len(timed)} searches: the best time so far over the best of all, trial by trial; "
            "it falls to 1."
        )
        blocks.append(Block("history", "History", tables.searches_table(found), alt, figure=_figure("history", timed)))
    rows = importances_by_op(found)
    if rows:
        most = max(rows, key=lambda row: row.share)
        alt = (
            "A bar for each parameter of each operation's variants, the five most important ones: how much of the "
            f"time's variation it explains. The longest is {most.parameter} of {most.op}, {most.share:.2f}."
        )
        table, figure = tables.importances_table(rows), _figure("importances", rows)
        blocks.append(Block("importances", "Parameter importance", table, alt, figure=figure))
    else:
        words.append(f"No search has {LEAST_TRIALS} timed trials of one variant: too few for parameter importances.")
    folds = tuple(fold for search in shown_searches(found) if (fold := _fold(search)).blocks)
    return Section("searches", title, tuple(words), blocks=tuple(blocks), folds=folds)


_OPTUNA = {
    "history": ("Optimisation history", "The time of each trial, and the best so far."),
    "importances": ("Parameter importances", "The importance of each parameter of variant {}."),
    "slice": ("Times by parameter", "The time of each trial of variant {} by the value of important parameters."),
}
"""Optuna's plots of a search: their titles, and what they show."""


def _fold(search: Search) -> Fold:
    """Optuna's plots of one search, those that its trials allow."""
    named = f"{search.spec.op} {shape_text(search.spec)}"
    variant = "" if search.best is None else search.best.variant
    blocks = tuple(
        Block(
            f"optuna-{search.spec.op}-{key}",
            f"{title}: {named}",
            tables.importance_table(search) if key == "importances" else tables.trials_table(search),
            alt.format(variant),
            figure=_optuna_figure(search, key),
            wide=key == "slice",
        )
        for key, (title, alt) in _OPTUNA.items()
        if key == "history" or search.importances()
    )
    return Fold(f"Optuna's plots of {named}", blocks)


def _step(report: Report) -> Section:
    title = "Where a training step goes"
    if not report.steps:
        why = "Name a model, or give a results file of `doratune bench model`."
        return Section("step", title, (why,), ("doratune report --model llama-8b",))
    words = [
        "Norms and compositions are kernels of doratune: the times of their entries, or their floors where they were "
        "never tuned. Products run on cuBLAS and count at the GPU's attainable rates, so their part is a lower bound.",
    ]
    if any(step.rest_us is not None for step in report.steps):
        words.append(
            "The rest is what remains of the measured step: attention, embeddings, the loss, gaps between kernels, "
            "and what cuBLAS takes beyond attainable rates. The calls are those of this version; a step that another "
            "version measured may have run others."
        )
    if any(step.case.step_us is None for step in report.steps):
        words.append(
            "Where no step was measured, the rest is not known: give a results file of `doratune bench model` for it."
        )
    alt = "; ".join(
        f"{step.case}: "
        + ", ".join(f"{part} ({known}) {us / 1e3:.2f} ms" for (part, known), us in step.parts().items())
        for step in report.steps
    )
    steps = list(report.steps)
    blocks = [Block("steps", "Parts of a step", tables.steps_table(steps), alt, figure=_figure("steps", steps))]
    blocks += [
        Block(f"calls-{place}", f"Calls of {step.case}", tables.calls_table(step), detail=True)
        for place, step in enumerate(steps)
    ]
    return Section("step", title, tuple(words), blocks=tuple(blocks))


def _bounds(report: Report) -> Section:
    title = "What shapes that were not tuned may lose"
    if not report.covered or report.model is None:
        return Section(
            "bounds", title, ("Name a model to look its kernels up.",), ("doratune report --model llama-8b",)
        )
    classes = tables.classes_of(report.covered)
    untuned = sum(one.status not in ("measured", "predicted") for one in report.covered)
    ranks = ", ".join(map(str, report.ranks))
    words = [
        f"{len(report.covered)} kernels of {report.model.name} at rank {ranks} on {report.gpu}, as a lookup serves "
        f"them; {untuned} have no entry of their own and get the config of another shape or a built-in one. The bound "
        "says what such a choice loses at most in 95 % of the lookups that were measured."
    ]
    commands: tuple[str, ...] = ()
    if untuned:
        words.append("Tuning them replaces the bound by a winner:")
        rank = " ".join(f"--rank {one}" for one in report.ranks)
        commands = (f"doratune tune {report.asked} {rank} --gpu {report.gpu}",)
    alt = "A bar for each operation; " + ", ".join(f"{name}: {sum(by.values())}" for name, by in classes.items()) + "."
    table = tables.bounds_table(report.operations())
    block = Block("bounds", "Kernels of the model", table, alt, figure=_figure("bounds", classes))
    return Section("bounds", title, tuple(words), commands, (block,))


def _provenance(report: Report) -> Section:
    blocks = [Block("here", "This report", tables.here_table(report.here))]
    if report.winners:
        blocks.append(Block("environments", "Where winners were tuned", tables.environments_table(report.winners)))
    if report.stores:
        blocks.append(Block("stores", "Stores", tables.stores_table(report.stores)))
    if report.results:
        blocks.append(Block("results", "Results files", tables.results_table(report.results)))
    words = [
        f"Study storage: {report.searches.location}" + (f" ({report.searches.note})" if report.searches.note else "")
    ]
    if not report.stores:
        words.append("No store exists yet.")
    damaged = [problem for store in report.stores for problem in store.damaged]
    words += [f"Damaged: {problem}" for problem in damaged[:5]]
    if len(damaged) > 5:
        words.append(f"{len(damaged) - 5} more damaged rows; `doratune cache verify` lists all.")
    return Section("provenance", "Provenance", tuple(words), blocks=tuple(blocks))


def _figure(name: str, data: Sequence[Any] | Any) -> Figure:
    """A function that makes a plot of :mod:`.plots`, which imports plotly only then."""

    def make() -> go.Figure:
        from . import plots

        figure: go.Figure = getattr(plots, name)(data)
        return figure

    return make


def _optuna_figure(search: Search, key: str) -> Figure:
    def make() -> go.Figure:
        from .optuna_plots import optuna_plot

        return optuna_plot(search, key)

    return make
