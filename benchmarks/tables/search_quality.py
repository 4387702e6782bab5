"""How good a search is: searches replayed over recorded tables, compared with the best config of each table.

A search's *regret* is the recorded time of its winner over that of the table's best config. ``until`` counts the
candidates evaluated when the first one within 1 % of the best was among them.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from ...cache.store import Store
from ...codegen.cost import estimate_us
from ...codegen.gpu import Gpu, find_gpu
from ...codegen.spec import Config, KernelSpec
from ...errors import UsageError, near_names
from ...tuner.effort import EFFORTS, STANDARD, Effort
from ...tuner.search import StandIns, tune
from ...tuner.space import Space
from ..results import Row
from .read import TABLES, SpecTable, Table, read_tables
from .replay import ReplayEvaluator, ReplayPool, ReplaySpace, ReplayStorage

if TYPE_CHECKING:
    from ...terminal.tables import Table as RichTable

NEAR, FAR, WANTED = 1.01, 1.03, 0.95
"""The target: of the regrets of standard searches the share :data:`WANTED` is at most :data:`NEAR`, and none is above
:data:`FAR`."""

RESAMPLES = 1000
"""Resamplings for the intervals."""

COVERED = 0.95
"""The share of resamplings that an interval covers."""

MakeSampler = Callable[[Space, int], optuna.samplers.BaseSampler]


def _tpe(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # Optuna calls the multivariate and group options experimental, on every use.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, n_startup_trials=4, seed=seed
        )


SAMPLERS: dict[str, MakeSampler | None] = {
    "model": None,
    "tpe": _tpe,
    "tpe-univariate": lambda space, seed: optuna.samplers.TPESampler(n_startup_trials=4, seed=seed),
    "gp": lambda space, seed: optuna.samplers.GPSampler(n_startup_trials=4, seed=seed, warn_independent_sampling=False),
    "cma-es": lambda space, seed: optuna.samplers.CmaEsSampler(
        n_startup_trials=4, seed=seed, warn_independent_sampling=False
    ),
    "random": lambda space, seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Ways to propose configs after the seeds: doratune's own (None), and Optuna's; ``gp`` needs scipy, ``cma-es`` cmaes.
"""


@dataclass(frozen=True)
class Searched:
    """One replayed search of one spec.

    ``regret`` is of the winner, ``seen`` of the best candidate that was evaluated. ``until`` is None if none was within
    1 %. ``compiled`` counts the candidates that no other token bucket of the run had compiled before.
    """

    spec: KernelSpec
    seed: int
    evaluated: int
    compiled: int
    until: int | None
    regret: float
    seen: float


def find_sampler(name: str) -> MakeSampler | None:
    """The sampler of this name, None for doratune's own.

    Raises:
        UsageError: there is none.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}{near_names(name, SAMPLERS)} (known: {', '.join(SAMPLERS)})")
    return SAMPLERS[name]


class Searches:
    """Replays searches over the specs of some tables of one GPU."""

    def __init__(self, tables: Iterable[SpecTable]) -> None:
        self.tables = {table.spec: table for table in tables}
        (slug,) = {spec.gpu for spec in self.tables}
        self.gpu: Gpu = find_gpu(slug)
        self._spaces = {spec: ReplaySpace(table, self.gpu) for spec, table in self.tables.items()}

    def run(
        self, seed: int, *, sampler: str = "model", effort: Effort = STANDARD, trials: int | None = None
    ) -> list[Searched]:
        """Search every spec once, as ``doratune tune`` does in an empty store."""
        evaluator = ReplayEvaluator(self.tables.values(), self.gpu, seed=seed)
        stand_ins = StandIns(
            ReplayPool,  # type: ignore[arg-type]
            lambda spec, gpu, also=(): self._spaces[spec],
            find_sampler(sampler),
            ReplayStorage(),
        )
        with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "store.sqlite", create=True) as store:
            result = tune(
                list(self.tables),
                evaluators=[evaluator],
                store=store,
                gpu=self.gpu,
                effort=effort,
                trials=trials,
                study_storage="memory",
                binaries=False,
                stand_ins=stand_ins,
            )
        if result.fault:
            raise RuntimeError(f"the replay ended early: {result.fault}")
        winners = {row.spec: row.entry.config for row in result.rows if row.entry is not None}
        return list(self._judge(seed, evaluator, winners))

    def _judge(self, seed: int, evaluator: ReplayEvaluator, winners: Mapping[KernelSpec, Config]) -> Iterator[Searched]:
        compiled: set[tuple[KernelSpec, Config]] = set()
        own: dict[KernelSpec, list[Config]] = {spec: [] for spec in self.tables}
        fresh = dict.fromkeys(self.tables, 0)
        for spec, config in evaluator.evaluated:
            own[spec].append(config)
            shared = (spec.family, config)
            fresh[spec] += shared not in compiled
            compiled.add(shared)
        for spec, configs in own.items():
            table = self.tables[spec]
            regrets = [table.regret(config) or float("inf") for config in configs]
            until = next((place for place, regret in enumerate(regrets, 1) if regret <= NEAR), None)
            regret = table.regret(winners[spec]) if spec in winners else None
            yield Searched(
                spec, seed, len(configs), fresh[spec], until, regret or float("inf"), min(regrets, default=float("inf"))
            )


def predicted_regret(table: SpecTable, gpu: Gpu) -> float:
    """The regret of the config that the performance model puts first, of those recorded: a tuning without a GPU."""
    return table.regret(min(table.times, key=lambda config: (estimate_us(table.spec, config, gpu), str(config)))) or 0.0


def seeds_regret(table: SpecTable, gpu: Gpu) -> float:
    """The regret of the best seed that was recorded."""
    regrets = [table.regret(seed) for seed in Space(table.spec, gpu).seeds]
    return min((regret for regret in regrets if regret is not None), default=float("inf"))


def interval(
    groups: Sequence[Sequence[float]], figure: Callable[[Sequence[float]], float], seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of a figure of all values; whole groups (the searches of one spec) are resampled."""
    chance = random.Random(seed)
    found = sorted(
        figure([value for group in chance.choices(groups, k=len(groups)) for value in group]) for _ in range(RESAMPLES)
    )
    cut = round((1.0 - COVERED) / 2.0 * (RESAMPLES - 1))
    return found[cut], found[-1 - cut]


def share_near(regrets: Sequence[float]) -> float:
    """The share of regrets of at most :data:`NEAR`."""
    return sum(regret <= NEAR for regret in regrets) / len(regrets)


def shortfalls(regrets: Sequence[float]) -> list[str]:
    """How the regrets of standard searches miss the target, in words; empty if they meet it."""
    share = share_near(regrets)
    missed = [f"{share:.1%} of the winners are within {NEAR}, fewer than {WANTED:.0%}"] if share < WANTED else []
    return missed + (
        [f"the worst winner takes {max(regrets):.3f} of the best, over {FAR}"] if max(regrets) > FAR else []
    )


def quality_row(op: str, name: str, searched: Sequence[Searched]) -> Row:
    """A row of results: the figures of searches of one operation, or of all."""
    by_spec: dict[KernelSpec, list[float]] = {}
    for one in searched:
        by_spec.setdefault(one.spec, []).append(one.regret)
    low, high = interval(list(by_spec.values()), share_near)
    untils = [one.until if one.until is not None else float("inf") for one in searched]
    median_until = statistics.median(untils)
    return {
        **_regret_row(op, name, [one.regret for one in searched], len(by_spec)),
        "within_1_low": low,
        "within_1_high": high,
        "until": None if median_until == float("inf") else median_until,
        "evaluated": statistics.fmean(one.evaluated for one in searched),
        "compiled": statistics.fmean(one.compiled for one in searched),
    }


def _regret_row(op: str, name: str, regrets: Sequence[float], specs: int) -> Row:
    ordered = sorted(regrets)
    return {
        "bench": "search",
        "op": op,
        "shape": [],
        "rank": None,
        "dtype": "",
        "impl": name,
        "specs": specs,
        "searches": len(regrets),
        "within_1": share_near(regrets),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "worst": ordered[-1],
    }


def quality_table(gpu: str, rows: Iterable[Row]) -> RichTable:
    """One line a row."""
    from ...terminal.tables import Table as RichTable

    table = RichTable("operation", "search", "searches", "≤ 1.01", "median", "95 %", "worst", "evaluated", "until 1 %")
    table.title = f"Regret of searches on recorded tables, {gpu}"
    for row in rows:
        share = f"{row['within_1']:.1%}"
        if "within_1_low" in row:
            share += f" ({row['within_1_low']:.1%} to {row['within_1_high']:.1%})"
        until = row.get("until")
        table.add_row(
            row["op"],
            row["impl"],
            str(row["searches"]),
            share,
            *(f"{row[name]:.3f}" for name in ("median", "p95", "worst")),
            f"{row['evaluated']:.1f}" if "evaluated" in row else "",
            "" if until is None else f"{until:.0f}",
        )
    return table


ALL = "all operations"


def bench_search(
    gpu: str,
    *,
    ops: Sequence[str] = (),
    samplers: Sequence[str] = ("model",),
    efforts: Sequence[str] = ("quick", "standard", "full"),
    trials: int | None = None,
    seeds: int = 30,
    folder: Path = TABLES,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[Row], dict[str, str]]:
    """Replay searches over the tables of ``gpu``; return rows of figures, and the environment of the recordings.

    Each sampler and effort searches each spec ``seeds`` times, each time with other noise and other draws.

    Raises:
        TableError: the GPU has no tables. UsageError: an unknown operation, sampler or effort.
    """
    tables = read_tables(gpu, folder)
    unknown = set(ops) - {table.op for table in tables}
    if unknown:
        raise UsageError(f"no table of {', '.join(sorted(unknown))} (there: {', '.join(t.op for t in tables)})")
    tables = tuple(table for table in tables if not ops or table.op in ops)
    for name in samplers:
        find_sampler(name)
    for name in efforts:
        if name not in EFFORTS:
            raise UsageError(f"unknown effort {name!r}{near_names(name, EFFORTS)} (known: {', '.join(EFFORTS)})")
    workers = jobs or os.cpu_count() or 1
    tasks = [
        (table, sampler, effort, trials, tuple(range(start, seeds, _CHUNKS)))
        for sampler in samplers
        for effort in efforts
        for table in tables
        for start in range(min(_CHUNKS, seeds))
    ]
    found: dict[tuple[str, str], list[Searched]] = {}
    with ProcessPoolExecutor(workers) as pool:
        for (table, sampler, effort, _, _), done in zip(tasks, pool.map(_search, tasks), strict=True):
            name = f"{sampler}, {trials} trials" if trials else f"{sampler}, {effort}"
            found.setdefault((name, table.op), []).extend(done)
            progress(f"{name}: {table.op}, {len(done)} searches")
    rows = [row for table in tables for row in _given_rows(table)]
    for name in dict.fromkeys(name for name, _ in found):
        everything = [one for (other, _), searched in found.items() if other == name for one in searched]
        rows += [quality_row(op, name, searched) for (other, op), searched in found.items() if other == name]
        rows.append(quality_row(ALL, name, everything))
    envs = [table.env for table in tables]
    return rows, dict(envs[0])


_CHUNKS = 2
"""Tasks for each table, sampler and effort: their seeds are shared out."""

_Task = tuple[Table, str, str, int | None, tuple[int, ...]]


def _search(task: _Task) -> list[Searched]:
    table, sampler, effort, trials, seeds = task
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searches = Searches(table)
    return [one for seed in seeds for one in searches.run(seed, sampler=sampler, effort=EFFORTS[effort], trials=trials)]


def _given_rows(table: Table) -> list[Row]:
    """The figures of what needs no search."""
    gpu = find_gpu(table.gpu)
    return [
        _regret_row(table.op, "predicted best", [predicted_regret(part, gpu) for part in table], len(table)),
        _regret_row(table.op, "best seed", [seeds_regret(part, gpu) for part in table], len(table)),
    ]
