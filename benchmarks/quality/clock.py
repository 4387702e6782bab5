"""The time of a training step of each method: all of them in turn, while nothing else runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...tuner.timing import no_collection
from ..adapted import Mode
from ..results import Row
from .arms import Arm, build
from .runs import facts_of
from .sizes import Size
from .training import Deadline, Text, optimizer_of, step

CLOCK = "clock"
ROUNDS, STEPS = 7, 10
"""Rounds, in each of which every method makes so many steps; the first round is not counted."""
SEED, RATE = 0, 1e-4


def time_steps(
    arms: Sequence[Arm], mode: Mode, base: nn.Module, text: Text, size: Size, deadline: Deadline
) -> Iterator[Row]:
    """A row for each of ``arms``: the median over rounds of a step's milliseconds on the GPU's clock.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    device = text.train.device
    running: list[tuple[nn.Module, Any]] = []
    for arm in arms:
        deadline.check()
        model = build(arm, base, mode, SEED).train()
        running.append((model, optimizer_of(model, RATE, device)))
    samples: list[list[float]] = [[] for _ in arms]
    for count in range(ROUNDS + 1):
        for (model, optimizer), found in zip(running, samples, strict=True):
            deadline.check()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            with no_collection():
                start.record()
                for inputs, targets in text.batches(size, STEPS, SEED):
                    step(model, optimizer, mode, inputs, targets)
                end.record()
            torch.cuda.synchronize(device)
            if count:
                found.append(start.elapsed_time(end) / STEPS)
    for arm, found in zip(arms, samples, strict=True):
        facts = {"bench": "quality", "op": CLOCK, **facts_of(arm, mode, size)}
        yield {**facts, "step_ms": statistics.median(found), "step_ms_samples": [round(ms, 4) for ms in found]}
