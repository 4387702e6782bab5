"""The runs of the study in their order, each done once: learning rates, then seeds, the clock, then precisions."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import torch
from torch import nn

from ..adapted import MODES, Mode
from ..results import Row
from .arms import DORA, FP32, FULL, LORA, PEFT_DORA, ROW_SCALED, RSLORA, Arm
from .base import mode_of
from .clock import CLOCK, time_steps
from .rates import at_the_edge, best_exponent, next_exponent
from .runs import ADAPT, PRECISION, RATE, Processes, Run, make
from .sizes import Size
from .training import Deadline, OutOfTimeError, Text

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


@dataclass
class Study:
    """One pre-trained model and its adaptations.

    ``rows`` has those of earlier calls, and gets one for each run; ``save`` is called after it. Runs are made one after
    another, or in ``processes``.
    """

    size: Size
    seeds: int
    base: nn.Module
    text: Text
    rows: list[Row]
    save: Callable[[], None]
    deadline: Deadline
    progress: Callable[[str], None]
    processes: Processes | None = None
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
        self._make_all((RATE, ADAPT))
        self._time_steps()
        self._make_all((PRECISION,))

    def left(self) -> str:
        """What is not done yet, in words."""
        count = Counter(row["op"] for row in self.rows)
        adaptations = self.seeds * len(self._adapted()) - count[ADAPT]
        unknown = [arm for arm in arms(self.size) if self._next_exponent(arm) is not None]
        parts = [f"the learning rates of {len(unknown)} methods"] if unknown else []
        parts += [f"{adaptations} adaptations"] if adaptations > 0 else []
        precisions = self.seeds * len(PRECISIONS) - count[PRECISION]
        parts += [f"{precisions} runs of precisions"] if precisions > 0 else []
        parts += ["the times of a step"] if self._untimed() else []
        return ", ".join(parts)

    def _adapted(self) -> list[Arm]:
        """The methods that are reported: with PEFT's own DoRA at one rank."""
        return [*arms(self.size), Arm(PEFT_DORA, self.size.checked_rank)]

    def _seeds(self) -> Iterator[int]:
        yield from range(RATE_SEED + 1, RATE_SEED + 1 + self.seeds)

    def _planned(self, ops: Collection[str]) -> Iterator[Run]:
        """What can be run now and is not done, in order: a seed needs its method's learning rate."""
        mode = mode_of(self.device)
        known = {}
        for arm in arms(self.size):
            exponent = self._next_exponent(arm)
            if exponent is None:
                losses = rate_losses(self.rows, arm)
                known[arm] = best_exponent(losses), at_the_edge(losses)
            elif RATE in ops:
                yield Run(RATE, arm, mode, RATE_SEED, exponent)
        for op, each in ((ADAPT, [(arm, mode) for arm in self._adapted()]), (PRECISION, self._precisions())):
            for seed in self._seeds() if op in ops else ():
                for arm, kept in each:
                    rate = known.get(Arm(DORA, arm.rank) if arm.name == PEFT_DORA else arm)
                    run = None if rate is None else Run(op, arm, kept, seed, *rate)
                    if run is not None and not self._is_done(run):
                        yield run

    def _precisions(self) -> list[tuple[Arm, Mode]]:
        return [(Arm(name, self.size.checked_rank), mode) for name, mode in PRECISIONS]

    def _is_done(self, run: Run) -> bool:
        facts = run.facts(self.size)
        return any(all(row.get(name) == value for name, value in facts.items()) for row in self.rows)

    def _next_exponent(self, arm: Arm) -> int | None:
        return next_exponent(rate_losses(self.rows, arm), GUESSES[arm.name])

    def _make_all(self, ops: Collection[str]) -> None:
        running: dict[Future[Row], tuple[Run, float]] = {}
        most = 1 if self.processes is None else self.processes.count
        late = False
        try:
            while True:
                begun = [run for run, _ in running.values()]
                for run in [run for run in self._planned(ops) if run not in begun][: most - len(running)]:
                    if self.deadline.left < self._expected(run):
                        late = True  # what is late is not begun
                    elif not late:
                        now = time.monotonic()
                        running[self._begin(run)] = run, now
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, began = running.pop(future)
                    try:
                        self._add(run, began, future.result())
                    except OutOfTimeError:
                        late = True
        finally:
            for future in running:
                future.cancel()
        if late:
            raise OutOfTimeError

    def _begin(self, run: Run) -> Future[Row]:
        self.progress(str(run))
        if self.processes is not None:
            return self.processes.submit(run)
        done: Future[Row] = Future()
        try:
            done.set_result(make(run, self.size, self.base, self.text, self.deadline))
        except OutOfTimeError as late:
            done.set_exception(late)
        return done

    def _expected(self, run: Run) -> float:
        return self.took.get(_kind(run), max(self.took.values(), default=0.0))

    def _add(self, run: Run, begin: float, row: Row) -> None:
        self.rows.append(row)
        self.took[_kind(run)] = time.monotonic() - begin
        self.ran[run.op] += 1
        self.save()

    def _untimed(self) -> bool:
        return self.device.type == "cuda" and not any(row["op"] == CLOCK for row in self.rows)

    def _time_steps(self) -> None:
        """Time a step of each method; a CPU's times say nothing about a GPU."""
        if self._untimed():
            self.progress("the time of a step of each method, in turn")
            mode = mode_of(self.device)
            self.rows += time_steps(self._adapted(), mode, self.base, self.text, self.size, self.deadline)
            self.ran[CLOCK] += 1
            self.save()


def _kind(run: Run) -> tuple[object, ...]:
    return run.arm, run.mode, run.op == PRECISION


def rate_losses(rows: Sequence[Row], arm: Arm) -> dict[int, float]:
    """The validation loss by the exponent of the learning rate; infinite where training diverged."""
    return {
        row["exponent"]: math.inf if row["loss"] is None else row["loss"]
        for row in rows
        if (row["op"], row["impl"], row["rank"]) == (RATE, arm.name, arm.rank)
    }
