"""The counts of a tuning run while it is under way, in words, and how long the rest will take."""

from __future__ import annotations

from dataclasses import dataclass

from ..codegen.spec import KernelSpec
from .outcome import FAILED, KEPT


@dataclass
class _Search:
    """A kernel under way: its trials of earlier runs, those until now, and the most it may have."""

    before: int
    trials: int
    budget: int

    @property
    def here(self) -> int:
        return self.trials - self.before


class Tally:
    """What a run has done since the second ``began`` of its clock.

    ``total`` kernels are to be done, without those that the store had already, which take no time; ``lanes`` is the
    number of GPUs. ``compiling`` is how many compiles are waited for; ``latest`` is the kernel that was tried or
    finished last, in words, and empty before the first.
    """

    def __init__(self, began: float, total: int = 0, lanes: int = 1) -> None:
        self.total, self.lanes = total, lanes
        self.finished = self.compiling = self.trials = 0
        self.latest: list[str] = []
        self._began = began
        self._open: dict[KernelSpec, _Search] = {}
        self._by_us: list[_Search] = []
        """The kernels that this run finished itself."""

    @property
    def ended(self) -> bool:
        """Whether all kernels are finished."""
        return self.finished >= self.total

    def current(
        self,
        spec: KernelSpec,
        trials: int,
        budget: int,
        best_us: float | None,
        floor_us: float,
        incumbent_us: float | None,
    ) -> None:
        """Count the trials of a kernel; see :meth:`~.progress.SilentProgress.current`."""
        search = self._open.setdefault(spec, _Search(trials, trials, budget))
        self.trials += trials - search.trials
        search.trials = trials
        if search.here or not self.latest:
            best = f", best {_us(best_us)} µs ({_beside(floor_us, incumbent_us)})" if best_us is not None else ""
            self.latest = [f"{trials} of {budget} trials{best}: {spec}"]  # a narrow terminal cuts the end

    def finish(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        """Count a finished kernel. Those that another worker tuned took no time here, but are done all the same."""
        self.finished += 1
        search = self._open.pop(spec, None)
        if outcome == KEPT:
            return
        self._by_us.append(search or _Search(0, 0, 1))
        time = f" to {_us(us)} µs ({_beside(floor_us, None)})" if us is not None and outcome != FAILED else ""
        self.latest = [f"{outcome}{time}: {spec}"]

    def seconds_left(self, now: float) -> float | None:
        """How long the other kernels will take, None before the first is finished.

        The unit of work is the trial. A kernel under way needs as much of its budget as the finished ones did, one that
        has not begun as many trials as the finished ones had. Trials of earlier runs are no work of this one. Kernels
        that other workers finished count as work, so that the estimate holds while they take part.
        """
        if self.ended:
            return 0.0
        if not self._by_us:
            return None
        # A kernel that an earlier run had tried to the end still plays its final here.
        spent = sum(max(1, search.here) for search in self._by_us) + sum(search.here for search in self._open.values())
        tried = sum(max(1, search.trials) for search in self._by_us)
        share = min(1.0, tried / sum(max(1, search.budget) for search in self._by_us))
        typical = tried / len(self._by_us)
        others = (self.finished - len(self._by_us)) * typical
        under_way = sum(max(1.0, share * search.budget - search.trials) for search in self._open.values())
        not_begun = max(0, self.total - self.finished - len(self._open)) * typical
        return (now - self._began) * (under_way + not_begun) / (spent + others)

    def kernels(self, now: float) -> str:
        """The kernels done, and the time that took."""
        kernels = "kernel" if self.total == 1 else "kernels"
        return f"{self.finished} of {self.total} {kernels} after {duration(now - self._began)}"

    def state(self, now: float) -> list[str]:
        """Time left, trials, compiles and GPUs."""
        left = self.seconds_left(now)
        rate = self.trials / max(now - self._began, 1e-9)
        parts = [f"{self.trials} trials" + (f", {rate:.1f} a second" if self.trials else "")]
        if not self.ended:
            parts.insert(0, "time left not known yet" if left is None else f"about {duration(left)} left")
        if self.compiling:
            parts.append(f"{self.compiling} compiles waited for")
        if self.lanes > 1:
            parts.append(f"{self.lanes} GPUs")
        return parts


def duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``6 min``, ``1 h 20 min``."""
    minutes = round(seconds / 60.0)
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _beside(floor_us: float, incumbent_us: float | None) -> str:
    """What a time is compared with: the floor, and what runs today."""
    today = "" if incumbent_us is None else f", today {_us(incumbent_us)}"
    return f"floor {_us(floor_us)}{today}"


def _us(value: float) -> str:
    return f"{value:.{1 if value >= 10.0 else 2}f}"
