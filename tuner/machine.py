"""What disturbs timings on a GPU: clocks that move, other processes, interruptions.

The samples show that something did (:func:`find_disturbance`); only then the driver is asked why (:class:`Machine`).
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MOVED = 0.02
"""Clocks have moved if the last third of the rounds took this share longer, or less, than the first third."""

CERTAIN = 8.0
"""And if that is this many times its standard error, which a few rounds show only roughly."""

CLOCKS_MOVED = "clocks moved"
"""How a disturbance by moving clocks begins."""

SPIKE = 0.10
"""A sample this share above its contender's median is a spike."""

SPIKY_SHARE = 0.10
"""Samples are disturbed if more than this share of them are spikes."""

ASK_SECONDS = 10
"""How long an answer of nvidia-smi is waited for."""

_SLOWED = {
    0x4: "the power limit",
    0x8: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature (hardware)",
    0x80: "the power supply",
}
"""Bits of NVML's clocks event reasons that mean a lower clock than the load asks for."""


def find_disturbance(samples: Sequence[Sequence[float]]) -> str | None:
    """What the samples of a final show of a disturbance, in words; None if nothing.

    ``samples`` are microseconds, for each contender one a round; there are at least three rounds.
    """
    medians = [statistics.median(times) for times in samples]
    levels = [
        statistics.median(math.log(us / median) for us, median in zip(of_round, medians, strict=True))
        for of_round in zip(*samples, strict=True)
    ]
    third = max(3, len(levels) // 3)
    shift = statistics.median(levels[-third:]) - statistics.median(levels[:third])
    # A drift hardly changes the steps from round to round, and a jump of the clocks only the largest.
    steps = sorted(abs(after - before) for before, after in itertools.pairwise(levels))[:-1]
    error = math.sqrt(statistics.fmean(step * step for step in steps) / third)
    if abs(shift) > max(MOVED, CERTAIN * error):
        share = abs(math.expm1(shift))
        return f"{CLOCKS_MOVED}: calls took {share:.1%} {'longer' if shift > 0 else 'less'} at the end than at first"
    spikes = sum(us > (1.0 + SPIKE) * median for times, median in zip(samples, medians, strict=True) for us in times)
    share = spikes / (len(samples) * len(samples[0]))
    if share > SPIKY_SHARE:
        return f"interruptions: {share:.0%} of the calls took over {SPIKE:.0%} longer than their median"
    return None


def _ask(arguments: Sequence[str]) -> str | None:
    """The output of nvidia-smi, None if it is not there or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Machine:
    """What the driver says of one GPU.

    Attributes:
        gpu: how nvidia-smi is told which GPU, its index or UUID; empty for all.
        ask: runs nvidia-smi with some arguments and returns its output, None if it is not there or fails.
        own: the process ids that are no other processes.
    """

    gpu: str = ""
    ask: Callable[[Sequence[str]], str | None] = _ask
    own: frozenset[int] = field(default_factory=lambda: frozenset((os.getpid(), os.getppid())))

    def causes(self) -> list[str]:
        """What may disturb timings now, in words; empty where the driver names nothing."""
        others = self.other_processes()
        shared = [f"{len(others)} other process{'es' if len(others) > 1 else ''} on the GPU ({_listed(others)})"]
        return (shared if others else []) + [f"the GPU is slowed by {reason}" for reason in self.slowed_by()]

    def other_processes(self) -> list[int]:
        """The other processes that compute on the GPU.

        In a container the driver may list ids of another namespace. Then this process is not among them, and which
        ones are others is unknown.
        """
        printed = self._query("--query-compute-apps=pid") or ""
        listed = [int(line) for line in printed.split() if line.isdigit()]
        return [process for process in listed if process not in self.own] if self.own & {*listed} else []

    def slowed_by(self) -> list[str]:
        """Why the GPU's clocks are lower than its load asks for."""
        for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the latter before driver 535
            printed = (self._query(f"--query-gpu={name}") or "").split()
            if printed and printed[0].startswith("0x"):
                reasons = int(printed[0], 16)
                return [text for bit, text in _SLOWED.items() if reasons & bit]
        return []

    def _query(self, query: str) -> str | None:
        return self.ask([*(["-i", self.gpu] if self.gpu else []), query, "--format=csv,noheader"])


def _listed(processes: Sequence[int]) -> str:
    return ", ".join(map(str, processes[:4])) + (", …" if len(processes) > 4 else "")
