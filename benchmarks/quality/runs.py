"""One run of the study: a method trained once, here or in a process of several that share a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapted import Mode
from ..results import Row
from . import base as base_model
from .arms import FP32, FULL, Arm, build, exact_products, trained
from .corpus import TEST, VALIDATION, Domain
from .rates import rate_of
from .sizes import Size
from .training import Deadline, Text, held_out_loss, train

RATE, ADAPT, PRECISION = "learning-rate", "adapt", "precision"


def dtypes(arm: Arm, mode: Mode) -> Row:
    """The fields of a row that say what is kept in which dtype."""
    frozen = "fp32" if mode == FP32 or arm.name == FULL else "bf16"
    return {"dtype": frozen, "adapter": None if arm.name == FULL else mode.adapter, "flags": mode.flags}


def facts_of(arm: Arm, mode: Mode, size: Size) -> Row:
    """The fields of a row that name a method, the model and the dtypes."""
    return {"impl": arm.name, **size.case, "rank": arm.rank, **dtypes(arm, mode)}


@dataclass(frozen=True)
class Run:
    """A method, trained once. ``exponent`` gives the learning rate; ``edge``: it is at the edge of what was tried."""

    op: str
    arm: Arm
    mode: Mode
    seed: int
    exponent: int
    edge: bool | None = None

    @property
    def rate(self) -> float:
        return rate_of(self.exponent)

    def facts(self, size: Size) -> Row:
        """The fields of its row that tell it from all others."""
        found = {"op": self.op, **facts_of(self.arm, self.mode, size), "seed": self.seed}
        return {**found, "exponent": self.exponent} if self.op == RATE else found

    def __str__(self) -> str:
        kept = " ".join([self.mode.adapter, *self.mode.flags])
        return f"{self.op}: {self.arm}, {kept}, learning rate {self.rate:g}, seed {self.seed}"


def make(run: Run, size: Size, base: nn.Module, text: Text, deadline: Deadline) -> Row:
    """Train, and return the row.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    split = VALIDATION if run.op == RATE else TEST
    evaluations = size.evaluations if run.op == ADAPT else 1
    steps = size.precision_steps if run.op == PRECISION else size.steps
    with exact_products():
        model = build(run.arm, base, run.mode, run.seed)
        start = held_out_loss(model, run.mode, text, split, size)
        options: dict[str, Any] = {"rate": run.rate, "steps": steps, "seed": run.seed, "split": split}
        curve = train(model, run.mode, text, size, evaluations=evaluations, deadline=deadline, **options)
    row: Row = {
        "bench": "quality",
        **run.facts(size),
        "rate": run.rate,
        "edge": run.edge,
        "parameters": sum(parameter.numel() for parameter in trained(model).values()),
        "start_loss": finite(start),
        "loss": finite(curve.held_out[-1]),
    }
    if run.op == PRECISION:
        return {**row, "train_loss": [finite(value) for value in curve.train]}
    return {**row, "at": curve.at, "held_out_loss": [finite(value) for value in curve.held_out]}


def finite(value: float) -> Any:
    """The value to eight digits, null where there is none in JSON."""
    return float(f"{value:.8g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Pretrained:
    """What a process makes runs with: the file of the pre-trained weights, what they are of, the text, the device."""

    size: Size
    base: Path
    of: Mapping[str, str]
    domain: Domain
    device: str


class Processes:
    """Processes that make runs at the same time. A small model leaves most of a GPU idle: each waits for its Python.

    Losses are those of runs one after another, but for the rounding of sums; times would not be.
    """

    def __init__(self, count: int, source: Pretrained, deadline: Deadline) -> None:
        self.count = count
        self._pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (source, deadline))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, run: Run) -> Future[Row]:
        """Begin ``run``; its future raises what :func:`make` raises."""
        return self._pool.submit(_make, run)


_held: tuple[Size, nn.Module, Text, Deadline]
"""In a process of :class:`Processes`."""


def _begin(source: Pretrained, deadline: Deadline) -> None:
    global _held
    device = torch.device(source.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = base_model.load(source.base, source.size, device, source.of)
    _held = source.size, model, Text.of(source.domain, source.size, device), deadline


def _make(run: Run) -> Row:
    size, model, text, deadline = _held
    return make(run, size, model, text, deadline)
