"""What the stores hold of a model's kernels: which are measured, which have binaries, what the others may lose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.entry import MEASURED, PREDICTED
from ..codegen.spec import KernelSpec
from ..runtime.loader import resolve_binaries, stores_open
from .jobs import plan_jobs
from .models import Model

NEAR, DEFAULT = "near", "default"
"""Statuses beside ``measured`` and ``predicted``: the config of another shape or GPU, or a built-in one."""
STATUSES = (MEASURED, PREDICTED, NEAR, DEFAULT)


@dataclass(frozen=True)
class Covered:
    """One kernel as a lookup would serve it.

    ``status`` is one of :data:`STATUSES`. ``binary``: a store has the binary for the installed Triton. ``loss`` is the
    bound of what it may lose against the best config, as a share of its time; 0 where it was measured, None if unknown.
    """

    spec: KernelSpec
    status: str
    binary: bool
    loss: float | None


@dataclass(frozen=True)
class OpCoverage:
    """The kernels of one operation: their number, how many of each status and with binaries.

    ``worst_loss`` is the largest bound of those whose bound is known, None if there are none; ``unknown`` counts the
    others.
    """

    op: str
    kernels: int
    by_status: dict[str, int]
    binaries: int
    worst_loss: float | None
    unknown: int

    def values(self) -> dict[str, Any]:
        return {"op": self.op, "kernels": self.kernels, **self.by_status} | {
            "binaries": self.binaries,
            "worst_loss": self.worst_loss,
            "unknown": self.unknown,
        }

    def loss(self) -> str:
        """The expected loss as text, such as ``≤ 4 %, unknown for 3``."""
        known = [] if self.worst_loss is None else [f"≤ {math.ceil(100 * self.worst_loss - 1e-9)} %"]
        rest = [] if not self.unknown else ["unknown" if not known else f"unknown for {self.unknown}"]
        return ", ".join(known + rest)


def kernels_of(model: Model, *, ranks: Sequence[int], dtype: str, gpu: str) -> list[KernelSpec]:
    """The kernels that DoRA on a model runs, those that ``doratune tune`` tunes."""
    return plan_jobs(model, ranks=ranks, dtype=dtype, gpu=gpu)


def cover(specs: Iterable[KernelSpec], store: str | None = None) -> list[Covered]:
    """Look up each kernel as ``load_kernel`` would; ``store`` as there.

    Raises:
        StoreError: a store cannot be read.
    """
    with stores_open():
        return [_covered(spec, store) for spec in specs]


def by_op(found: Iterable[Covered]) -> list[OpCoverage]:
    """Count by operation, in the order of the kernels."""
    groups: dict[str, list[Covered]] = {}
    for one in found:
        groups.setdefault(one.spec.op, []).append(one)
    return [_count(op, group) for op, group in groups.items()]


def _covered(spec: KernelSpec, store: str | None) -> Covered:
    resolution, _, binaries = resolve_binaries(spec, store)
    entry = resolution.entry
    if resolution.step == "exact" and entry is not None:
        provenance = entry.evaluation.provenance
        loss = 0.0 if provenance == MEASURED else None
        return Covered(spec, provenance, bool(binaries.kernels), loss)
    loss = resolution.bound.loss if resolution.bound is not None else None
    return Covered(spec, DEFAULT if entry is None else NEAR, bool(binaries.kernels), loss)


def _count(op: str, group: Sequence[Covered]) -> OpCoverage:
    losses = [one.loss for one in group if one.loss is not None]
    return OpCoverage(
        op,
        len(group),
        {status: sum(one.status == status for one in group) for status in STATUSES},
        sum(one.binary for one in group),
        max(losses, default=None),
        len(group) - len(losses),
    )
