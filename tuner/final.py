"""The final: the best configs of a search and the incumbents, timed in turn in one process, and who wins.

**The comparison.** Sample i of every contender comes from round i, so clocks that drift over the rounds cancel in the
logarithm of the ratio of two contenders' samples. Ratios far from their median (an interrupt, another process) are cut
to :data:`CUT` standard deviations; what remains has a mean and a standard error. A contender *beats* another one if the
mean exceeds both :data:`TIE` and the confidence interval (Student's t, :data:`DOUBT` on one side). Otherwise the two
are tied.

**The decision.** The first incumbent, what runs today, stays unless another contender beats it. Then the winner is
another incumbent that no contender beats and that is no slower than the first; else the first challenger that beats it
and that no other contender beats. So ties go to the incumbent of the highest priority.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..cache.entry import Contender, Final
from . import student
from .evaluation import FinalTimes
from .machine import CLOCKS_MOVED, Machine, find_disturbance

TIE = 0.003
"""Differences below this share of the time are ties: a shape's time differs by as much from process to process."""

NEAR = 0.005
"""Contenders whose difference is shown to be below this share need no more rounds."""

DOUBT = 0.001
"""The chance, in one comparison of equal kernels, that one seems to beat the other. A final makes up to some dozen
comparisons, and looks at its rounds several times."""

CUT = 3.0
"""Ratios farther than this many standard deviations from their median are cut to that."""

RESOLUTION = 0.0005
"""The least standard deviation of a ratio: clocks that tick coarsely may give many equal samples."""

RESAMPLES = 1000
"""Resamplings of the rounds for the confidence."""

CHECK_ROUNDS = 8
"""Rounds between two checks whether the order is settled, and the fewest of a final."""

MOST_ROUNDS = 60
BUDGET_MS = 200.0
"""GPU time of a final's rounds; the first :data:`CHECK_ROUNDS` are played in any case."""

REPEATS = 2
"""How often disturbed rounds are repeated."""

WAIT_SECONDS = 1.0
"""The wait before disturbed rounds are repeated, for clocks to settle and other processes to end."""


@dataclass(frozen=True)
class _Comparison:
    """How much longer one contender takes than another, as a logarithm, and the standard error of that."""

    mean: float
    error: float
    rounds: int

    @property
    def margin(self) -> float:
        """What a difference must exceed to be no tie."""
        return max(TIE, student.quantile(1.0 - DOUBT, self.rounds - 1) * self.error)

    @property
    def beaten(self) -> bool:
        """Whether the one is slower beyond the noise."""
        return self.mean > self.margin

    @property
    def near(self) -> bool:
        """Whether the difference is shown to be below :data:`NEAR`."""
        return abs(self.mean) + 2.0 * self.error <= NEAR


def settled(samples: Sequence[Sequence[float]]) -> bool:
    """Whether more rounds would change nothing: the fastest contender beats every other one or is shown to be near it.

    ``samples`` are microseconds, for each contender one a round.
    """
    if len(samples[0]) < CHECK_ROUNDS:
        return False
    fastest = _fastest(samples)
    against = [_compare(times, samples[fastest]) for place, times in enumerate(samples) if place != fastest]
    return all(comparison.beaten or comparison.near for comparison in against)


def decide(contenders: Sequence[Contender], *, settled: bool = True, notices: Sequence[str] = ()) -> Final:
    """The outcome of a final: who won, and how sure that is.

    ``contenders`` are in the order in which ties are decided: incumbents by priority, then challengers. Each has at
    least two samples. ``settled`` and ``notices`` are those of the :class:`~.evaluation.FinalTimes`. Equal arguments
    give an equal result.
    """
    samples = [contender.samples_us for contender in contenders]
    first = _winner(samples, [contender.incumbent for contender in contenders])
    winner = contenders[first]
    others = sorted((c for place, c in enumerate(contenders) if place != first), key=lambda contender: contender.us)
    against = [_compare(other.samples_us, winner.samples_us) for other in others]
    noise = against[0].margin if against else TIE
    return Final(
        contenders=(winner, *others),
        confidence=_confidence([_ratios(other.samples_us, winner.samples_us) for other in others], noise),
        noise=noise,
        settled=settled,
        notices=tuple(notices),
    )


def _winner(samples: Sequence[Sequence[float]], incumbent: Sequence[bool]) -> int:
    """The place of the winner: the first incumbent unless it is beaten; else another unbeaten incumbent that is no
    slower; else the first unbeaten challenger that beats it."""
    places = range(len(samples))
    beaten = [any(_compare(samples[a], samples[b]).beaten for b in places if b != a) for a in places]
    unbeaten = [place for place in places if not beaten[place]]
    first = next((place for place in places if incumbent[place]), None)
    if first is None:
        return (unbeaten or [_fastest(samples)])[0]
    if not beaten[first]:
        return first
    better = [place for place in unbeaten if _compare(samples[first], samples[place]).beaten]
    # Another incumbent that is tied with what beats the first one may be slower than the first one, if it is noisy.
    others = [p for p in unbeaten if incumbent[p] and _compare(samples[p], samples[first]).mean <= 0.0]
    standing = [place for place in places if incumbent[place] and place != first]
    clear = [a for a in better if all(_compare(samples[b], samples[a]).beaten for b in standing if b != a)]
    return (others or clear or better or [_fastest(samples)])[0]


def _fastest(samples: Sequence[Sequence[float]]) -> int:
    """The place of the contender with the least time, each compared with the first in the same rounds."""
    slower = [0.0] + [_compare(times, samples[0]).mean for times in samples[1:]]
    return min(range(len(samples)), key=slower.__getitem__)


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """The logarithms of ``times`` over ``others``, round by round, those far from their median cut."""
    logs = [math.log(a / b) for a, b in zip(times, others, strict=True)]
    middle = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in logs)  # of a normal distribution
    reach = CUT * max(deviation, RESOLUTION)
    return [min(max(value, middle - reach), middle + reach) for value in logs]


def _compare(times: Sequence[float], others: Sequence[float]) -> _Comparison:
    ratios = _ratios(times, others)
    error = max(statistics.stdev(ratios), RESOLUTION) / math.sqrt(len(ratios))
    return _Comparison(statistics.fmean(ratios), error, len(ratios))


def _confidence(against: Sequence[Sequence[float]], noise: float) -> float:
    """The share of resamplings of the rounds in which no other contender is faster than the winner by over ``noise``.

    ``against`` are the ratios of each other contender to the winner.
    """
    if not against:
        return 1.0
    chance = random.Random(0)
    rounds = range(len(against[0]))
    held = 0
    for _ in range(RESAMPLES):
        drawn = chance.choices(rounds, k=len(rounds))
        held += all(sum([ratios[i] for i in drawn]) >= -noise * len(rounds) for ratios in against)
    return held / RESAMPLES


@dataclass
class Rounds:
    """Plays the rounds of a final.

    Attributes:
        play: given the number of rounds, plays them and returns microseconds of one call, for each contender one a
            round.
        machine: what is asked when the samples look disturbed.
        sleep: waits for so many seconds.
    """

    play: Callable[[int], Sequence[Sequence[float]]]
    machine: Machine
    sleep: Callable[[float], None] = field(default=time.sleep)

    def times(self, contenders: int, most: int = MOST_ROUNDS) -> FinalTimes:
        """Play until the order of ``contenders`` is settled, ``most`` rounds at most; repeat what was disturbed.

        Clocks that move meet all contenders of a round alike, so an order that is settled all the same needs no
        repetition: under a power limit long kernels would never find steady clocks. The samples are those of the last
        repetition. Every disturbance is a notice, also when repeating helped.
        """
        notices: list[str] = []
        for repeat in range(REPEATS + 1):
            samples, held = self._until_settled(contenders, most)
            disturbance = find_disturbance(samples)
            if disturbance is None:
                break
            causes = "; ".join(self.machine.causes())
            notices.append(f"{disturbance}, {causes or 'for no reason that the driver tells'}")
            if held and disturbance.startswith(CLOCKS_MOVED):
                return FinalTimes(_frozen(samples), held, (*notices, "the order held all the same"))
            if repeat < REPEATS:
                self.sleep(WAIT_SECONDS)
        else:
            return FinalTimes(_frozen(samples), held, (*notices, f"still so after {REPEATS} repetitions"))
        if notices:
            notices.append(f"undisturbed after {len(notices)} repetition{'s' if len(notices) > 1 else ''}")
        return FinalTimes(_frozen(samples), held, tuple(notices))

    def _until_settled(self, contenders: int, most: int) -> tuple[list[list[float]], bool]:
        samples: list[list[float]] = [[] for _ in range(contenders)]
        while True:
            played = len(samples[0])
            more = max(CHECK_ROUNDS if not played else 1, min(CHECK_ROUNDS, most - played))
            for times, new in zip(samples, self.play(more), strict=True):
                times.extend(new)
            if settled(samples):
                return samples, True
            if len(samples[0]) >= most:
                return samples, False


def most_rounds(round_ms: float) -> int:
    """The budget of rounds that take ``round_ms`` milliseconds of GPU time each."""
    return max(CHECK_ROUNDS, min(MOST_ROUNDS, int(BUDGET_MS / max(round_ms, 1e-3))))


def _frozen(samples: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(times) for times in samples)
