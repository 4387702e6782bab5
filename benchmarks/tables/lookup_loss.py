"""What a lookup loses without tuning, on recorded tables: ``python -m doratune.benchmarks.tables.lookup_loss``.

For each spec of a table the lookup is asked as if the spec had never been measured: the stores hold the winners of all
other specs (and, with ``--sister``, those of another GPU, the same shape included), and the performance model is fitted
without it. The loss is the table's time of the chosen config over the table's best.

A chosen config that is not in the table counts as the measured one of the same variant that differs in the fewest
parameters, and is reported as *missing*.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ...cache.bound import Bound, bound_of
from ...cache.distance import distance
from ...cache.entry import MEASURED, SEARCH, Contender, Entry, Environment, Evaluation, Final
from ...cache.lookup import Resolution
from ...cache.neighbours import Regret
from ...cache.store import Store
from ...codegen.gpu import find_gpu
from ...codegen.render import render, template_digest
from ...codegen.spec import TILE_DTYPES, Config, KernelSpec
from ...runtime.loader import resolve_in
from .fit import Fitting
from .read import (
    SHORT,
    TABLES,
    SpecTable,
    Table,
    Timing,
    read_table,
    read_tables,
    recorded,
    table_path,
    write_table,
)

FINALISTS = 3
"""Contenders that an entry keeps of its final."""


@dataclass(frozen=True)
class Loss:
    """What one lookup lost.

    Attributes:
        spec: the spec that was left out.
        config: the chosen config.
        step: the step of the lookup that brought it.
        regret: its time over the best of the table.
        missing: the config is not in the table; ``regret`` is that of the nearest one.
        rejected: the config failed on the GPU; ``regret`` is infinite.
    """

    spec: KernelSpec
    config: Config
    step: str
    regret: float
    missing: bool = False
    rejected: bool = False


def winners(table: Table, *, finals: bool = True) -> list[Entry]:
    """The entries that a search would have stored: the best of each spec, with the runners-up if ``finals``."""
    return [_entry(part, finals=finals) for part in table]


def _entry(part: SpecTable, *, finals: bool) -> Entry:
    gpu = find_gpu(part.spec.gpu)
    ranked = sorted(part.finalists.items(), key=lambda pair: (pair[1], str(pair[0])))[:FINALISTS]
    final = Final(
        tuple(Contender(config, (SEARCH,), (us,)) for config, us in ranked), confidence=1.0, noise=0.005, settled=True
    )
    config, us = part.best
    source = render(part.spec, config)
    return Entry(
        spec=part.spec,
        config=config,
        template_digest=template_digest(part.spec.op, config.variant),
        source_digest=source.digest,
        source=source.text,
        evaluation=Evaluation(MEASURED, us=us, samples_us=(us,)),
        environment=Environment(gpu.slug, gpu.architecture, triton="", gpu_name=gpu.name),
        final=final if finals else None,
    )


def losses(table: Table, stores: Sequence[Iterable[Entry]], fitting: Fitting) -> list[Loss]:
    """What a lookup loses at each spec of ``table`` with these stores.

    An entry of the very spec is left out, and the model is fitted without the spec, on whatever GPU.
    """
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = []
        for index, entries in enumerate(stores):
            store = opened.enter_context(Store.open(folder / f"{index}.sqlite", create=True))
            store.put_all(entries)
            stack.append(store)
        found = []
        for part in table:
            fit = fitting.fit([replace(part.spec, gpu=gpu) for gpu in fitting.gpus], [table.op])
            found.append(loss_of(part, resolve_in(part.spec, stack, exact=False, fit=fit)))
        return found


def loss_of(part: SpecTable, resolution: Resolution) -> Loss:
    """The loss of what a lookup gave for the spec of ``part``."""
    config = resolution.config
    regret = part.regret(config)
    if regret is not None:
        return Loss(part.spec, config, resolution.step, regret)
    if config in part.rejected:
        return Loss(part.spec, config, resolution.step, math.inf, rejected=True)
    near = nearest_measured(part, config)
    regret = part.regret(near) if near is not None else None
    return Loss(part.spec, config, resolution.step, math.inf if regret is None else regret, missing=True)


def nearest_measured(part: SpecTable, config: Config) -> Config | None:
    """The measured config of the variant that differs in the fewest parameters, then the least; then the slowest."""

    def apart(other: Config) -> tuple[int, float, float, str]:
        pairs = [(config.num_warps, other.num_warps), (config.num_stages, other.num_stages)]
        pairs += [(value, other[name]) for name, value in config.params]
        ratios = [abs(math.log((one + 1) / (two + 1))) for one, two in pairs if one != two]
        return len(ratios), sum(ratios), -part.times[other].us, str(other)

    return min((other for other in part.times if other.variant == config.variant), key=apart, default=None)


def bounds(table: Table, found: Sequence[Loss]) -> list[tuple[Bound, Loss]]:
    """The bound that each lookup would print, from the losses of the other specs, with its own loss."""
    pairs = []
    for loss in found:
        others = [
            Regret(other.spec.gpu, str(other.spec), distance(loss.spec, other.spec), other.regret)
            for other in found
            if other.spec != loss.spec
            and all(getattr(other.spec, role) == getattr(loss.spec, role) for role in TILE_DTYPES)
        ]
        pairs.append((bound_of(table.op, table.gpu, others), loss))
    return pairs


def _same_dtypes(one: KernelSpec, other: KernelSpec) -> bool:
    return all(getattr(one, role) == getattr(other, role) for role in TILE_DTYPES)


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def summary(table: Table, found: Sequence[Loss]) -> str:
    """One line: how many specs, their median, 95th percentile and worst regret, how often the bound held."""
    regrets = [loss.regret for loss in found]
    known = [(bound.loss, loss) for bound, loss in bounds(table, found) if bound.loss is not None]
    held = sum(loss.regret - 1.0 <= bound for bound, loss in known)
    text = (
        f"{table.gpu:9} {table.op:23} {len(found):3} {statistics.median(regrets):6.3f} {quantile(regrets, 0.95):6.3f}"
    )
    text += f" {max(regrets):6.3f}   bound {held}/{len(known)}"
    if known:
        text += f" (median {100 * statistics.median(bound for bound, _ in known):.0f} %)"
    missing, rejected = sum(loss.missing for loss in found), sum(loss.rejected for loss in found)
    return text + (f"  {missing} missing" if missing else "") + (f"  {rejected} rejected" if rejected else "")


def _write_missing(table: Table, found: Sequence[Loss], folder: Path) -> None:
    """Write a table of the missing configs. Its times are those of their neighbours and mean nothing."""
    missing = {
        loss.spec: SpecTable(loss.spec, {loss.config: Timing(loss.regret * table[loss.spec].best_us, SHORT)})
        for loss in found
        if loss.missing and math.isfinite(loss.regret)
    }
    if missing:
        write_table(replace(table, specs=missing), table_path(".", table.op, folder))


def main() -> None:
    """Parse the command line, print a line for each table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TABLES)
    parser.add_argument("--gpu", help="only the tables of this GPU")
    parser.add_argument("--ops", nargs="*", help="only these operations")
    parser.add_argument("--sister", metavar="GPU", help="also with the winners of this GPU")
    parser.add_argument("--no-finals", action="store_true", help="entries without the runners-up of their finals")
    parser.add_argument("--verbose", action="store_true", help="print each spec")
    parser.add_argument(
        "--missing", type=Path, metavar="FOLDER", help="write the missing configs there, for record --begin-with"
    )
    given = parser.parse_args()
    fitting = Fitting(table for gpu in recorded(given.folder) for table in read_tables(gpu, given.folder))
    for gpu, ops in recorded(given.folder).items():
        for op in ops:
            if given.gpu not in (None, gpu) or (given.ops and op not in given.ops):
                continue
            table = read_table(table_path(gpu, op, given.folder))
            stores = [winners(table, finals=not given.no_finals)]
            if given.sister and op in recorded(given.folder).get(given.sister, ()):
                stores.append(
                    winners(read_table(table_path(given.sister, op, given.folder)), finals=not given.no_finals)
                )
            found = losses(table, stores, fitting)
            print(summary(table, found))
            if given.missing:
                _write_missing(table, found, given.missing)
            for loss in sorted(found, key=lambda loss: -loss.regret) if given.verbose else ():
                note = " missing" if loss.missing else ""
                print(f"    {loss.regret:.3f} {loss.spec} {loss.step}: {loss.config}{note}")


if __name__ == "__main__":
    main()
