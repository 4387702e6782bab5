"""Store the winners of recorded tables: ``python -m doratune.benchmarks.tables.entries --output STORE --ops OP …``.

A table's best configs passed the accuracy gate and were timed in turn, as in the final of a search. What a lookup
would have lost without the entry is also known from the table: each spec is left out in turn, of the entries and of the
performance model (:mod:`.lookup_loss`). Nothing says whether the templates are still those that were measured: name
operations whose tables were recorded with the present ones. If the built-in configs were chosen by the same tables, the
losses are smaller than elsewhere: those that are shipped were written before (docs/results/coverage.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jinja2

from ... import __version__
from ...cache.entry import MEASURED, Entry, Environment
from ...cache.store import Store
from ...codegen.cost import floor_us
from ...codegen.gpu import find_gpu
from ...codegen.render import render, template_digest
from ...codegen.spec import SpecError
from ...runtime.loader import resolve
from .fit import Fitting
from .lookup_loss import losses, winners
from .read import TABLES, Table, read_table, read_tables, recorded, table_path


def entries_of(table: Table, fitting: Fitting) -> Iterator[Entry]:
    """An entry for each spec of a table, with its final, the lookup's regret and the table's environment."""
    gpu, env = find_gpu(table.gpu), table.env
    made = winners(table)
    known = {loss.spec: loss.regret for loss in losses(table, [made], fitting) if not (loss.missing or loss.rejected)}
    environment = Environment(
        gpu.slug, gpu.architecture, env["triton"], env["torch"], env["driver"], env["gpu"], __version__
    )
    for entry in made:
        floor, trials = floor_us(entry.spec, gpu), len(table[entry.spec].times)
        yield replace(
            entry,
            evaluation=replace(entry.evaluation, floor_us=floor, trials=trials),
            environment=environment,
            created_at=f"{env['date']}T00:00:00+00:00",
            lookup_regret=known.get(entry.spec),
        )


def renew(store: Store) -> int:
    """Renew the regrets of a store's measured entries where their finals timed what a lookup gives today.

    Returns how many changed. Others keep theirs: ``doratune cache drift --lookups`` measures them on a GPU.
    """
    changed = []
    for entry in store.entries():
        if entry.evaluation.provenance != MEASURED:
            continue
        given = resolve(entry.spec, store.location, exact=False)[0].config
        timed = {one.config: one.us for one in entry.final.contenders} if entry.final else {}
        if given == entry.config:
            regret: float | None = 1.0
        elif given in timed and entry.config in timed:
            regret = max(1.0, timed[given] / timed[entry.config])
        else:
            continue
        if regret != entry.lookup_regret:
            changed.append(replace(entry, lookup_regret=regret))
    store.put_all(changed)
    return len(changed)


def renew_digests(store: Store) -> int:
    """Renew the template digests of the entries whose templates changed and still render the text that was tuned.

    Returns how many changed. Others are stale: ``doratune cache drift`` measures them again on a GPU.
    """
    changed = []
    for entry in store.entries():
        try:
            digest, source = template_digest(entry.spec.op, entry.config.variant), render(entry.spec, entry.config)
        except (SpecError, jinja2.UndefinedError):  # a variant or a parameter that there is no more
            continue
        if digest != entry.template_digest and source.digest == entry.source_digest:
            changed.append(replace(entry, template_digest=digest))
    store.put_all(changed)
    return len(changed)


def main() -> None:
    """Parse the command line, write the entries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="STORE", help="a store, made if it is not there")
    parser.add_argument("--ops", nargs="*", default=(), help="the operations, whose tables are of present templates")
    parser.add_argument("--gpu", default="h100-sxm")
    parser.add_argument("--renew", action="store_true", help="also renew the digests, and the regrets from finals")
    parser.add_argument("--folder", type=Path, default=TABLES)
    given = parser.parse_args()
    fitting = Fitting(table for gpu in recorded(given.folder) for table in read_tables(gpu, given.folder))
    with Store.open(given.output, create=True) as store:
        for op in given.ops:
            made = list(entries_of(read_table(table_path(given.gpu, op, given.folder)), fitting))
            store.put_all(made)
            print(f"{op}: {len(made)} entries, {sum(entry.lookup_regret is not None for entry in made)} with a regret")
        if given.renew:
            print(f"{renew_digests(store)} digests of templates that render the same renewed")
            print(f"{renew(store)} regrets renewed from finals")


if __name__ == "__main__":
    main()
