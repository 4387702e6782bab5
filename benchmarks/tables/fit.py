"""Fit the performance model to the recorded tables: ``python -m doratune.benchmarks.tables.fit [--check]``.

Writes ``codegen/fit.json``. With ``--check`` nothing is written: each spec is left out of the fit in turn, and the
configs of its table are ranked by what was fitted to the others.

The target is the logarithm of a config's time over the best of its spec, at most :data:`FARTHEST`. Each spec has a
level of its own, so that only differences within a spec are explained. Configs near the best count more
(:data:`WEIGHT_SCALE`), and all specs count alike. The coefficients are found by ridge regression.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...codegen.fit import FIT_FILE, Fit, Polynomial, features, terms
from ...codegen.gpu import find_gpu
from ...codegen.spec import Config, KernelSpec
from ...codegen.variants import default_config
from .read import TABLES, Table, read_tables, recorded

FARTHEST = math.log(2.5)
WEIGHT_SCALE = 0.2
"""The weight of a config falls by a factor e for each so much of the target."""
RIDGE = 10.0
SPEC_WEIGHT = 100.0
LEAST_SPREAD = 1e-3
"""A feature that varies less over the configs of a variant is left out."""
DIGITS = 6


@dataclass(frozen=True)
class _Rows:
    """The configs of one operation as rows of a linear regression.

    Of each spec: ``gram`` and ``right`` are its part of the normal equations.
    """

    polynomials: dict[str, Polynomial]
    starts: dict[str, int]
    width: int
    gram: dict[KernelSpec, torch.Tensor]
    right: dict[KernelSpec, torch.Tensor]

    def coefficients(self, without: Collection[KernelSpec] = ()) -> torch.Tensor:
        kept = [spec for spec in self.gram if spec not in without]
        gram = sum((self.gram[spec] for spec in kept), RIDGE * torch.eye(self.width, dtype=torch.float64))
        right = sum((self.right[spec] for spec in kept), torch.zeros(self.width, dtype=torch.float64))
        solved: torch.Tensor = torch.linalg.solve(gram, right)
        return solved

    def fitted(self, without: Collection[KernelSpec] = ()) -> dict[str, Polynomial]:
        """The polynomial of each variant, fitted to all specs but these."""
        found = self.coefficients(without).tolist()
        return {
            variant: Polynomial(
                **{
                    **vars(shape),
                    "coefficients": tuple(found[self.starts[variant] :][: len(shape.coefficients)]),
                }
            )
            for variant, shape in self.polynomials.items()
        }


class Fitting:
    """The fit of all tables, and what it would be without some of their specs."""

    def __init__(self, tables: Iterable[Table]) -> None:
        self.by_op: dict[str, list[Table]] = {}
        for table in tables:
            self.by_op.setdefault(table.op, []).append(table)
        self.gpus = tuple(dict.fromkeys(table.gpu for tables in self.by_op.values() for table in tables))
        self._rows: dict[str, _Rows] = {}
        self._default_losses: dict[str, dict[KernelSpec, float]] = {}

    def fit(self, without: Collection[KernelSpec] = (), ops: Collection[str] | None = None) -> Fit:
        """The fit to all specs but those ``without``, of all operations or some."""
        wanted = [op for op in self.by_op if ops is None or op in ops]
        polynomials = {
            (op, variant): polynomial for op in wanted for variant, polynomial in self._of(op).fitted(without).items()
        }
        gpus = {table.gpu for op in wanted for table in self.by_op[op]}
        losses = {op: [loss for spec, loss in self._defaults(op).items() if spec not in without] for op in wanted}
        averages = {op: statistics.mean(found) for op, found in losses.items() if found}
        return Fit(frozenset(find_gpu(gpu).architecture for gpu in gpus), polynomials, averages)

    def _defaults(self, op: str) -> dict[KernelSpec, float]:
        """The logarithm of the default config's time over the best's, of the specs where it was measured."""
        if op not in self._default_losses:
            parts = [part for table in self.by_op[op] for part in table]
            regrets = {part.spec: part.regret(default_config(part.spec, find_gpu(part.spec.gpu))) for part in parts}
            self._default_losses[op] = {spec: math.log(regret) for spec, regret in regrets.items() if regret}
        return self._default_losses[op]

    def _of(self, op: str) -> _Rows:
        if op not in self._rows:
            self._rows[op] = _rows(self.by_op[op])
        return self._rows[op]


def _rows(tables: Sequence[Table]) -> _Rows:
    parts = [part for table in tables for part in table]
    values: dict[str, list[tuple[KernelSpec, Config, dict[str, float]]]] = {}
    for part in parts:
        for config in part.times:
            row = features(part.spec, config, find_gpu(part.spec.gpu))
            values.setdefault(config.variant, []).append((part.spec, config, row))
    polynomials = {variant: _shape([row for _, _, row in rows]) for variant, rows in sorted(values.items())}
    starts, width = {}, 0
    for variant, shape in polynomials.items():
        starts[variant] = width
        width += len(shape.coefficients)
    entries: dict[KernelSpec, list[tuple[Config, int, list[float]]]] = {}
    for variant, rows in values.items():
        shape = polynomials[variant]
        for spec, config, named in rows:
            entries.setdefault(spec, []).append((config, starts[variant], terms(shape.names, shape.scaled(named))))
    gram, right = {}, {}
    for part in parts:
        matrix = torch.zeros(len(entries[part.spec]), width, dtype=torch.float64)
        target = torch.zeros(len(entries[part.spec]), dtype=torch.float64)
        for index, (config, start, point) in enumerate(entries[part.spec]):
            matrix[index, start : start + len(point)] = torch.tensor(point, dtype=torch.float64)
            target[index] = min(math.log(part.regret(config) or 1.0), FARTHEST)
        weights = torch.exp(-target / WEIGHT_SCALE)
        weights = SPEC_WEIGHT * weights / weights.sum()
        share = weights / weights.sum()
        matrix = matrix - share @ matrix
        target = target - share @ target
        gram[part.spec] = matrix.T @ (matrix * weights[:, None])
        right[part.spec] = matrix.T @ (target * weights)
    return _Rows(polynomials, starts, width, gram, right)


def _shape(rows: Sequence[dict[str, float]]) -> Polynomial:
    """The polynomial of a variant without its coefficients: its features, their ranges and scales."""
    names = sorted({name for row in rows for name in row})
    matrix = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)
    spread = matrix.std(dim=0, correction=0)
    kept = [index for index in range(len(names)) if spread[index] > LEAST_SPREAD]
    chosen = tuple(names[index] for index in kept)

    def rounded(numbers: torch.Tensor) -> tuple[float, ...]:
        return tuple(_rounded(number) for number in numbers[kept].tolist())

    count = len(terms(chosen, [0.0] * len(chosen)))
    return Polynomial(
        chosen,
        rounded(matrix.amin(dim=0)),
        rounded(matrix.amax(dim=0)),
        rounded(matrix.mean(dim=0)),
        rounded(spread),
        (0.0,) * count,
    )


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def document(fit: Fit, sources: Sequence[str]) -> dict[str, Any]:
    """The JSON form of a fit."""
    ops: dict[str, dict[str, Any]] = {}
    for (op, variant), polynomial in sorted(fit.polynomials.items()):
        part = {name: list(values) for name, values in vars(polynomial).items()}
        part["coefficients"] = [_rounded(value) for value in polynomial.coefficients]
        ops.setdefault(op, {})[variant] = part
    losses = {op: _rounded(loss) for op, loss in sorted(fit.default_losses.items())}
    return {
        "architectures": sorted(fit.architectures),
        "tables": sorted(sources),
        "default_losses": losses,
        "ops": ops,
    }


def _check(fitting: Fitting) -> None:
    for op, tables in fitting.by_op.items():
        regrets = []
        for part in (part for table in tables for part in table):
            fit = fitting.fit([part.spec], [op])
            gpu = find_gpu(part.spec.gpu)
            chosen = min(part.times, key=lambda config: fit.relative_us(part.spec, config, gpu))
            regrets.append(part.regret(chosen) or math.inf)
        regrets.sort()
        middle, high = regrets[len(regrets) // 2], regrets[math.ceil(0.95 * len(regrets)) - 1]
        print(
            f"{op:23} {len(regrets):3} specs: median {middle:.3f}, 95th percentile {high:.3f}, worst {regrets[-1]:.3f}"
        )


def main() -> None:
    """Parse the command line; check the fit or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TABLES)
    parser.add_argument("--output", type=Path, default=FIT_FILE)
    parser.add_argument("--check", action="store_true", help="rank each table by what was fitted to the other specs")
    given = parser.parse_args()
    tables = [table for gpu in recorded(given.folder) for table in read_tables(gpu, given.folder)]
    fitting = Fitting(tables)
    if given.check:
        _check(fitting)
        return
    text = json.dumps(document(fitting.fit(), [f"{table.gpu}/{table.op}" for table in tables]), indent=None)
    given.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {given.output}: {len(text) // 1024} KiB from {sum(map(len, tables))} specs")


if __name__ == "__main__":
    main()
