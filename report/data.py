"""Gather what a report says, as typed values: nothing here knows how it will look."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.stack import PREBUILT
from ..codegen.gpu import find_gpu
from ..codegen.spec import bucket_tokens
from ..tuner.coverage import Covered, OpCoverage, by_op, cover, kernels_of
from ..tuner.models import requested_model
from ..tuner.projections import Model
from .peers import Comparison, Results, Share, comparisons, our_steps, read_results, repeated, shares_of
from .searches import Searches, read_searches
from .sources import Here, StoreRead, here, read_stores
from .step import Case, Step, measured_cases, steps_of, with_norms
from .winners import Winner, best_of

RANK = 384
"""The rank of ``doratune tune`` where none is named and the stores have no entry with a rank."""
TOKENS = 4096
"""Tokens of a training step where neither a results file nor the user's stores say more."""


@dataclass(frozen=True)
class Request:
    """What a report is about, as the options of ``doratune report`` say it."""

    store: str | None = None
    study_storage: str | None = None
    results: Sequence[Path] = ()
    model: str | None = None
    config: Path | None = None
    gpu: str = "auto"
    ranks: Sequence[int] = ()
    tokens: int | None = None


@dataclass(frozen=True)
class Report:
    """All that a report says. ``covered`` is empty and ``steps`` may be where no model is named; ``notes`` say why."""

    winners: tuple[Winner, ...]
    comparisons: tuple[Comparison, ...]
    without_ours: int
    shares: tuple[Share, ...]
    searches: Searches
    steps: tuple[Step, ...]
    model: Model | None
    gpu: str | None
    ranks: tuple[int, ...]
    covered: tuple[Covered, ...]
    stores: tuple[StoreRead, ...]
    results: tuple[Results, ...]
    here: Here
    notes: tuple[str, ...] = ()
    asked: str = ""
    """The options that name the model, for the commands that a report proposes."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (
            self.winners or self.comparisons or self.shares or self.searches.found or self.covered or self.steps
        )

    def operations(self) -> list[OpCoverage]:
        """The kernels of the model by operation."""
        return by_op(self.covered)

    def values(self) -> dict[str, Any]:
        """The report as values for JSON."""
        return {
            "here": self.here.values(),
            "stores": [store.values() for store in self.stores],
            "studies": {"location": self.searches.location, "note": self.searches.note},
            "results": [file.values() for file in self.results],
            "winners": [winner.values() for winner in self.winners],
            "peers": [one.values() for one in self.comparisons],
            "coverage": [{**vars(share), "shares": dict(share.shares)} for share in self.shares],
            "searches": [search.values() for search in self.searches.found],
            "steps": [step.values() for step in self.steps],
            "model": None if self.model is None else self.model.name,
            "gpu": self.gpu,
            "ranks": list(self.ranks),
            "kernels": [{**vars(one), "spec": str(one.spec)} for one in self.covered],
            "notes": list(self.notes),
        }


def gather(request: Request) -> Report:
    """Read the stores, the studies and the results files, and look up the kernels of the model if one is named.

    Raises:
        UsageError: an unknown model or GPU, a config or a results file that cannot be read.
        StoreError: a store cannot be read. StudyStorageError: the named study storage cannot be read.
    """
    named = request.model is not None or request.config is not None
    asked = requested_model(request.model, request.config) if named else None
    results = tuple(read_results(path) for path in request.results)
    measured = our_steps(results)
    stores = tuple(read_stores(request.store, prebuilt=named or bool(measured)))
    model = asked() if asked is not None else None
    notes: list[str] = []
    gpu = _gpu(request.gpu, stores)
    ranks = tuple(request.ranks) or _ranks(stores) if model is not None else tuple(request.ranks)
    covered: tuple[Covered, ...] = ()
    if model is not None and gpu is None:
        notes.append("no GPU is here and the stores name none, so no kernels were looked up; name one with --gpu")
    elif model is not None and gpu is not None:
        covered = tuple(cover(kernels_of(model, ranks=ranks, dtype="bf16", gpu=gpu), request.store))
    winners = _winners(stores, covered, request, gpu)
    specs = {winner.spec for winner in winners}
    searches = read_searches(request.study_storage, specs)
    found, alone = comparisons(results)
    cases = measured_cases(results, model)
    if model is not None and gpu is not None and not cases:
        tokens = _tokens(stores) if request.tokens is None else bucket_tokens(request.tokens)
        cases = [Case(model, gpu, rank, tokens) for rank in ranks]
    if alone:
        rows = "row of the results files has" if alone == 1 else "rows of the results files have"
        notes.append(f"{alone} {rows} no doratune on the same case, and cannot be compared")
    again = repeated(results)
    if again:
        rows = "row of the results files repeats" if again == 1 else "rows of the results files repeat"
        notes.append(f"{again} {rows} a case of the same file and implementation; of each the last one counts")
    return Report(
        winners=tuple(winners),
        comparisons=tuple(found),
        without_ours=alone,
        shares=tuple(shares_of(results)),
        searches=searches,
        steps=tuple(steps_of([with_norms(case, results) for case in cases], request.store)),
        model=model,
        gpu=gpu,
        ranks=ranks,
        covered=covered,
        stores=stores,
        results=results,
        here=here(),
        notes=tuple(notes),
        asked=f"--config {shlex.quote(str(request.config))}" if request.config else f"--model {request.model}",
    )


def _winners(
    stores: Sequence[StoreRead], covered: Sequence[Covered], request: Request, gpu: str | None
) -> list[Winner]:
    """The winners of the model's kernels in every store, or all of the stores that are not the package's."""
    own = [store for store in stores if covered or store.origin != PREBUILT]
    best = best_of((store.location, entry) for store in own for entry in store.entries)
    if covered:
        wanted = {one.spec for one in covered}
        return [winner for winner in best if winner.spec in wanted]
    if request.gpu != "auto":
        best = [winner for winner in best if winner.spec.gpu == gpu]
    if request.ranks:
        best = [winner for winner in best if winner.spec.rank in (0, *request.ranks)]
    return best


def _gpu(name: str, stores: Sequence[StoreRead]) -> str | None:
    """The GPU that is named, else the one here, else the one that most entries of the user's stores are for."""
    import torch

    from ..tuner.reachable import named_gpu

    if name != "auto":
        return find_gpu(name).slug
    if torch.cuda.is_available():
        return named_gpu(name)
    counts = _counts(stores, "gpu")
    return str(max(counts, key=lambda gpu: counts[gpu])) if counts else None


def _ranks(stores: Sequence[StoreRead]) -> tuple[int, ...]:
    """The rank that most entries of the user's stores have."""
    counts = _counts(stores, "rank")
    return (max(counts, key=lambda rank: counts[rank]),) if counts else (RANK,)


def _tokens(stores: Sequence[StoreRead]) -> int:
    """The token bucket that most entries of the user's stores have; among equals :data:`TOKENS`, or the largest."""
    counts = _counts(stores, "tokens")
    return max(counts, key=lambda tokens: (counts[tokens], tokens == TOKENS, tokens)) if counts else TOKENS


def _counts(stores: Sequence[StoreRead], name: str) -> Counter[Any]:
    """How many entries of the user's own stores have each value of a field of their spec, which others lack."""
    own = (store for store in stores if store.origin != PREBUILT)
    values = (getattr(entry.spec, name) for store in own for entry in store.entries)
    return Counter(value for value in values if value)
