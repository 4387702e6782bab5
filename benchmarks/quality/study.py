"""The runs of the study in their order, each done once: learning rates, then seeds, then precisions."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapted import MODES, Mode
from ..results import Row
from .arms import DORA, FP32, FULL, LORA, PEFT_DORA, ROW_SCALED, RSLORA, Arm, build, exact_products, trained
from .base import mode_of
from .corpus import TEST, VALIDATION
from .rates import at_the_edge, best_exponent, next_exponent, rate_of
from .sizes import Size
from .training import Curve, Deadline, OutOfTimeError, Text, held_out_loss, train

RATE, ADAPT, PRECISION = "learning-rate", "adapt", "precision"
METHODS = (LORA, RSLORA, DORA, ROW_SCALED)
GUESSES = {LORA: 1, RSLORA: 0, DORA: 1, ROW_SCALED: 1, FULL: -1}
"""Exponents of the learning rate to begin with."""

RATE_SEED = 0
"""Learning rates are chosen with this seed, on the validation split; reported are others, on the test split."""

REFERENCE = (PEFT_DORA, FP32)
PRECISIONS: tuple[tuple[str, Mode], ...] = (
    REFERENCE,
    (DORA, FP32),
    (PEFT_DORA, MODES["bf16"]),
    (DORA, MODES["bf16"]),
    (PEFT_DORA, MODES["autocast"]),
    (DORA, MODES["autocast"]),
)
"""Implementations of DoRA whose curves are compared with the first one's; the second differs by rounding only."""


def arms(size: Size) -> list[Arm]:
    """The methods at every rank, and full fine-tuning."""
    return [*(Arm(name, rank) for rank in size.ranks for name in METHODS), Arm(FULL, None)]


def dtypes(arm: Arm, mode: Mode) -> Row:
    """The fields of a row that say what is kept in which dtype."""
    frozen = "fp32" if mode == FP32 or arm.name == FULL else "bf16"
    return {"dtype": frozen, "adapter": None if arm.name == FULL else mode.adapter, "flags": mode.flags}


@dataclass
class Study:
    """One pre-trained model and its adaptations.

    ``rows`` has those of earlier calls, and gets one for each run; ``save`` is called after it.
    """

    size: Size
    seeds: int
    base: nn.Module
    text: Text
    rows: list[Row]
    save: Callable[[], None]
    deadline: Deadline
    progress: Callable[[str], None]
    took: dict[tuple[object, ...], float] = field(default_factory=dict)
    """The seconds of the last run of each kind in this call."""
    ran: Counter[str] = field(default_factory=Counter)

    @property
    def device(self) -> torch.device:
        return self.text.train.device

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            OutOfTimeError: the time is over, or the next run would not fit into it.
        """
        mode = mode_of(self.device)
        for arm in arms(self.size):
            self._find_rate(arm, mode)
        check = Arm(PEFT_DORA, self.size.checked_rank)
        for seed in self._seeds():
            for arm in [*arms(self.size), check]:
                facts = {"op": ADAPT, **self._facts(arm, mode), "seed": seed}
                if not self._done(facts):
                    rate, edge = self._rate(Arm(DORA, arm.rank) if arm == check else arm)
                    self._add(facts, arm, mode, rate=rate, edge=edge, steps=self.size.steps)
        for seed in self._seeds():
            for name, kind in PRECISIONS:
                arm = Arm(name, self.size.checked_rank)
                facts = {"op": PRECISION, **self._facts(arm, kind), "seed": seed}
                if not self._done(facts):
                    rate, edge = self._rate(Arm(DORA, arm.rank))
                    self._add(facts, arm, kind, rate=rate, edge=edge, steps=self.size.precision_steps)

    def left(self) -> str:
        """What is not done yet, in words."""
        count = Counter(row["op"] for row in self.rows)
        adaptations = self.seeds * (len(arms(self.size)) + 1) - count[ADAPT]
        unknown = [arm for arm in arms(self.size) if self._next_exponent(arm) is not None]
        parts = [f"the learning rates of {len(unknown)} methods"] if unknown else []
        parts += [f"{adaptations} adaptations"] if adaptations > 0 else []
        precisions = self.seeds * len(PRECISIONS) - count[PRECISION]
        parts += [f"{precisions} runs of precisions"] if precisions > 0 else []
        return ", ".join(parts)

    def _seeds(self) -> Iterator[int]:
        yield from range(RATE_SEED + 1, RATE_SEED + 1 + self.seeds)

    def _facts(self, arm: Arm, mode: Mode) -> Row:
        return {"impl": arm.name, **self.size.case, "rank": arm.rank, **dtypes(arm, mode)}

    def _done(self, facts: Row) -> bool:
        return any(all(row.get(name) == value for name, value in facts.items()) for row in self.rows)

    def _find_rate(self, arm: Arm, mode: Mode) -> None:
        while (exponent := self._next_exponent(arm)) is not None:
            facts = {"op": RATE, **self._facts(arm, mode), "seed": RATE_SEED, "exponent": exponent}
            self._add(facts, arm, mode, rate=rate_of(exponent), edge=None, steps=self.size.steps)

    def _next_exponent(self, arm: Arm) -> int | None:
        return next_exponent(rate_losses(self.rows, arm), GUESSES[arm.name])

    def _rate(self, arm: Arm) -> tuple[float, bool]:
        losses = rate_losses(self.rows, arm)
        return rate_of(best_exponent(losses)), at_the_edge(losses)

    def _add(self, facts: Row, arm: Arm, mode: Mode, *, rate: float, edge: bool | None, steps: int) -> None:
        """Make a run and its row; what is late is not begun."""
        kind = (arm.name, arm.rank, mode, steps)
        expected = self.took.get(kind, max(self.took.values(), default=0.0))
        if self.deadline.left < expected:
            raise OutOfTimeError
        kept = " ".join([mode.adapter, *mode.flags])
        self.progress(f"{facts['op']}: {arm}, {kept}, learning rate {rate:g}, seed {facts['seed']}")
        begin = time.monotonic()
        split = VALIDATION if facts["op"] == RATE else TEST
        evaluations = 1 if facts["op"] == PRECISION else self.size.evaluations
        with exact_products():
            model = build(arm, self.base, mode, facts["seed"])
            start = held_out_loss(model, mode, self.text, split, self.size)
            curve = train(
                model,
                mode,
                self.text,
                self.size,
                rate=rate,
                steps=steps,
                seed=facts["seed"],
                split=split,
                evaluations=evaluations,
                deadline=self.deadline,
            )
        parameters = sum(parameter.numel() for parameter in trained(model).values())
        run: Row = {"rate": rate, "edge": edge, "parameters": parameters, "start_loss": finite(start)}
        run |= self._curve(facts["op"], curve)
        self.rows.append({"bench": "quality", **facts, **run})
        self.took[kind] = time.monotonic() - begin
        self.ran[facts["op"]] += 1
        self.save()

    def _curve(self, op: str, curve: Curve) -> Row:
        """The fields of a run's curve. Times are only a GPU's; a loss that is not finite is null."""
        row: Row = {"loss": finite(curve.held_out[-1])}
        if op == PRECISION:
            return {**row, "train_loss": [finite(value) for value in curve.train]}
        gpu = self.device.type == "cuda"
        return {
            **row,
            "step_ms": 1e3 * curve.seconds[-1] / curve.at[-1] if gpu else None,
            "at": curve.at,
            "seconds": [round(value, 4) for value in curve.seconds] if gpu else None,
            "held_out_loss": [finite(value) for value in curve.held_out],
        }


def rate_losses(rows: Sequence[Row], arm: Arm) -> dict[int, float]:
    """The validation loss by the exponent of the learning rate; infinite where training diverged."""
    return {
        row["exponent"]: math.inf if row["loss"] is None else row["loss"]
        for row in rows
        if (row["op"], row["impl"], row["rank"]) == (RATE, arm.name, arm.rank)
    }


def finite(value: float) -> Any:
    """The value to eight digits, null where there is none in JSON."""
    return float(f"{value:.8g}") if math.isfinite(value) else None
