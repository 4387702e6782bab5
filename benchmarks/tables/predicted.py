"""Would entries that are only predicted help? ``python -m doratune.benchmarks.tables.predicted GPU FILE`` says.

For a GPU without measurements a store could hold, for each spec, the config that the roofline model predicts to be the
fastest. The recorded tables say what that config loses, and what a lookup loses that finds no entry at all and chooses
among the built-in configs by the same model. Neither knows a measurement of the GPU, as on one that nobody has tuned.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ...codegen.cost import estimate_us
from ...codegen.fit import Fit
from ...codegen.gpu import find_gpu
from ...runtime.loader import resolve_in
from ..results import Row, document, environment
from .lookup_loss import loss_of, quantile
from .read import TABLES, Table, read_table, recorded, table_path

PREDICTED, LOOKUP = "predicted entry", "lookup without entries"

NO_FIT = Fit(frozenset(), {})
"""A performance model that was fitted to nothing, so that a lookup takes the roofline model."""


def regrets(table: Table) -> dict[str, list[float]]:
    """The regrets of both ways at each spec of a table."""
    gpu = find_gpu(table.gpu)
    found: dict[str, list[float]] = {PREDICTED: [], LOOKUP: []}
    for part in table:
        best = min(part.times, key=lambda config: (estimate_us(part.spec, config, gpu), str(config)))
        found[PREDICTED].append(part.regret(best) or math.inf)
        found[LOOKUP].append(loss_of(part, resolve_in(part.spec, [], exact=False, fit=NO_FIT)).regret)
    return found


def rows(tables: Sequence[Table]) -> list[Row]:
    """Rows of a results file: for each operation, and all together, one of each way."""
    by_op = {table.op: regrets(table) for table in tables}
    by_op["all"] = {way: [regret for found in by_op.values() for regret in found[way]] for way in (PREDICTED, LOOKUP)}
    return [
        {
            "bench": "search",
            "op": op,
            "shape": [],
            "rank": None,
            "dtype": "",
            "impl": way,
            "specs": len(values),
            "within_1": sum(value <= 1.01 for value in values) / len(values),
            "median": statistics.median(values),
            "p95": quantile(values, 0.95),
            "worst": max(values),
        }
        for op, found in by_op.items()
        for way, values in found.items()
    ]


def main() -> None:
    """Write the rows of a GPU's tables to a file: the arguments are its name and the file."""
    gpu, output = find_gpu(sys.argv[1]), Path(sys.argv[2])
    made = rows([read_table(table_path(gpu.slug, op, TABLES)) for op in recorded(TABLES)[gpu.slug]])
    env = environment() | {"gpu": gpu.name, "driver": "none"}  # the tables' GPU need not be here
    output.write_text(document(env, made), encoding="utf-8")


if __name__ == "__main__":
    main()
