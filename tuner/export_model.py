"""``doratune cache export``: the entries of a model, or of a GPU, from the stores into one file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cache.entry import DEFAULT, MEASURED, PREDICTED, Binary, Entry
from ..cache.errors import StoreAccessError
from ..cache.location import Location
from ..cache.merge import binaries_for, signatures_of
from ..cache.signing import SigningKey
from ..cache.store import Store
from ..cache.trust import trust
from ..codegen.gpu import find_gpu
from ..codegen.spec import KernelSpec
from ..errors import DoratuneError
from .build_store import scratch_store
from .projections import Model

_ORDER = (MEASURED, PREDICTED, DEFAULT)


class NothingToExportError(DoratuneError):
    """No store has an entry of what is to be exported."""


@dataclass(frozen=True)
class Export:
    """A finished export. ``skipped`` are the damaged rows and the binaries that were left out, each with the reason."""

    path: str
    entries: int
    binaries: int
    bytes: int
    skipped: tuple[str, ...]


def export_stores(
    stores: Sequence[Store],
    output: str | Path,
    *,
    model: Model | None = None,
    gpu: str | None = None,
    ranks: Sequence[int] = (),
    binaries: bool = True,
    measured: bool = False,
    replace: bool = False,
    sign: SigningKey | None = None,
    trusted: Iterable[str] = (),
) -> Export:
    """Write the entries that a lookup would take from ``stores`` to one file: the first measured one of each spec.

    ``model``: only those of the shapes of its projections, whatever their dtypes. ``ranks``: only those of these ranks,
    and those that have none. ``measured``: only measured ones. Binaries of
    stores that others can write are left out, unless ``trusted`` or ``DORATUNE_TRUST`` names them.

    Raises:
        UnknownGpuError: no GPU of this name is listed.
        StoreAccessError: the file exists, or cannot be written. NothingToExportError: no store has such an entry.
    """
    target = Location.parse(output)
    if target.path is not None and target.path.exists() and not replace:
        raise StoreAccessError(f"export to {target}: the file exists and is left as it is; name another or replace it")
    slug = None if gpu is None else find_gpu(gpu).slug
    skipped: list[str] = []
    best: dict[KernelSpec, Entry] = {}
    for store in stores:
        entries, damaged = store.readable_entries()
        skipped += map(str, damaged)
        for entry in entries:
            if slug in (None, entry.spec.gpu):
                known = best.get(entry.spec)
                if known is None or _rank(entry) < _rank(known):
                    best[entry.spec] = entry
    best = {
        spec: entry
        for spec, entry in best.items()
        if (model is None or _is_of(model, spec))
        and (not ranks or spec.rank in (0, *ranks))
        and (not measured or entry.evaluation.provenance == MEASURED)
    }
    if not best:
        of = " ".join(filter(None, (f"of {model.name}" if model else "", slug and f"for {slug}")))
        raise NothingToExportError(
            f"no store has an entry {of}: `doratune tune` makes them, `doratune cache build` all"
        )
    rows: list[Entry | Binary] = [*best.values()]
    with scratch_store() as fresh:
        fresh.put_all(best.values())
        if binaries:
            codes = {entry.code_digest for entry in best.values()}
            made = binaries_for(codes, stores, refusal=trust(trusted).refusal, skipped=skipped)
            for binary in made:
                fresh.put_binary(binary)
            rows += made
        fresh.put_signatures(signatures_of(rows, stores))
        fresh.export(output, replace=replace, binaries=binaries, sign=sign)
    size = 0 if target.path is None else target.path.stat().st_size
    return Export(str(target), len(best), len(rows) - len(best), size, tuple(skipped))


def _rank(entry: Entry) -> int:
    return _ORDER.index(entry.evaluation.provenance)


def _is_of(model: Model, spec: KernelSpec) -> bool:
    """Whether a kernel is of shapes that the model's projections have; its flags and dtypes do not matter."""
    shapes = {projection.shape for projection in model.projections}
    widths = {d_out for d_out, _ in shapes}
    return {*spec.widths} <= widths and (not spec.d_in or (spec.d_out, spec.d_in) in shapes)
