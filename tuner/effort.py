"""How hard a search tries: one table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..cache.entry import MEASURED
from ..errors import UsageError, near_names

MOST_TRIALS = 1_000_000


@dataclass(frozen=True)
class Budget:
    """When one kernel's search ends.

    ``trials`` is how many configurations are compiled and evaluated at most; ``patience`` after how many of them
    without a gain the search stops early.
    """

    trials: int
    patience: int

    def with_trials(self, trials: int) -> Budget:
        """The budget of ``trials`` configurations, with the patience in proportion.

        Raises:
            UsageError: ``trials`` is below 1 or above :data:`MOST_TRIALS`.
        """
        if trials > MOST_TRIALS:
            raise UsageError(f"trials={trials}: more than any space has configs; use at most {MOST_TRIALS}")
        if trials < 1:
            raise UsageError(f"trials={trials}: a search needs at least 1 trial for each kernel")
        return replace(self, trials=trials, patience=max(1, round(self.patience * trials / self.trials)))


@dataclass(frozen=True)
class Effort:
    """A row of :data:`EFFORTS`.

    ``measure`` is the budget of measured searches from scratch; ``beside`` of those that begin with the winners of a
    token bucket beside; ``sister`` of those that begin with the winner of the same kernel on a sister GPU, or of one
    that differs in a flag only. ``shortlist`` is how many configurations the performance model proposes before
    Optuna's sampler takes over; ``batch`` how many are compiled together before the sampler is asked again;
    ``finalists`` how many of the best play in the final, beside the incumbents.
    """

    name: str
    measure: Budget
    beside: Budget
    sister: Budget
    predict: Budget
    shortlist: int
    batch: int
    finalists: int

    def budget(self, provenance: str) -> Budget:
        """The budget for an evaluator of this provenance (``measured`` or ``predicted``)."""
        return self.measure if provenance == MEASURED else self.predict


# The measured budgets are chosen on recorded tables (docs, "How good a search is"): a kernel's seeds are some dozen,
# and 36 trials find a config within 1 % of the best in 19 of 20 searches. Without a GPU the cores are often few,
# and a predicted trial costs the compile all the same: hence fewer. The least patience of a level exceeds the trials of
# the level before, so a winner found with less effort is always searched again (see tuner.search).
_QUICK = Effort("quick", Budget(7, 7), Budget(6, 6), Budget(5, 5), Budget(4, 3), shortlist=0, batch=4, finalists=5)
STANDARD = Effort(
    "standard", Budget(36, 30), Budget(16, 14), Budget(9, 8), Budget(8, 5), shortlist=0, batch=4, finalists=12
)
_FULL = Effort(
    "full", Budget(60, 48), Budget(48, 42), Budget(40, 37), Budget(60, 24), shortlist=0, batch=6, finalists=16
)

EFFORTS: dict[str, Effort] = {effort.name: effort for effort in (_QUICK, STANDARD, _FULL)}


def find_effort(name: str) -> Effort:
    """The effort level of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in EFFORTS:
        raise UsageError(f"unknown effort {name!r}{near_names(name, EFFORTS)} (known: {', '.join(EFFORTS)})")
    return EFFORTS[name]
