"""A final keeps the incumbent unless a challenger is faster beyond the noise, chooses the faster kernel where there is
one, gives the same result for the same samples, and says what disturbed it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doratune.cache.entry import Contender, Final
from doratune.codegen.spec import Config
from doratune.tuner import final as module
from doratune.tuner.evaluation import FinalTimes
from doratune.tuner.final import (
    BUDGET_MS,
    CHECK_ROUNDS,
    MOST_ROUNDS,
    NEAR,
    REPEATS,
    TIE,
    WAIT_SECONDS,
    Rounds,
    decide,
    most_rounds,
    settled,
)
from doratune.tuner.machine import Machine, find_disturbance

SIMULATIONS = 200
CONFIGS = [Config.create("tile", num_warps=4, num_stages=stages) for stages in range(1, 12)]
UNDISTURBED = Machine(ask=lambda arguments: pytest.fail("the driver was asked though nothing was disturbed"))

Play = Callable[[int], list[list[float]]]


def rounds_of(
    true_us: Sequence[float], noise: float, chance: random.Random, *, spikes: float = 0.0, drift: float = 0.0
) -> Play:
    """Plays rounds of kernels with these times: with noise of each sample, upward spikes, and clocks that drift."""
    played = 0

    def play(rounds: int) -> list[list[float]]:
        nonlocal played
        samples: list[list[float]] = [[] for _ in true_us]
        for _ in range(rounds):
            clock = 1.0 + drift * played / MOST_ROUNDS
            for times, us in zip(samples, true_us, strict=True):
                spike = chance.expovariate(5.0) if chance.random() < spikes else 0.0
                times.append(us * clock * math.exp(chance.gauss(0.0, noise)) * (1.0 + spike))
            played += 1
        return samples

    return play


def contenders_of(samples: Sequence[Sequence[float]], incumbents: int) -> list[Contender]:
    return [
        Contender(CONFIGS[place], ("default",) if place < incumbents else ("search",), tuple(times))
        for place, times in enumerate(samples)
    ]


def play_final(play: Play, contenders: int, incumbents: int = 1) -> Final:
    times = Rounds(play, Machine(ask=lambda arguments: None), lambda seconds: None).times(contenders)
    return decide(contenders_of(times.samples_us, incumbents), settled=times.settled, notices=times.notices)


def winners(
    true_us: Sequence[float],
    noise: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    incumbents: int = 1,
    spikes: float = 0.0,
    drift: float = 0.0,
) -> list[int]:
    """Who wins each of many simulated finals."""
    monkeypatch.setattr(module, "RESAMPLES", 1)  # the confidence, which costs the most, decides nothing
    chance = random.Random(7)
    found = []
    for _ in range(SIMULATIONS):
        play = rounds_of(true_us, noise, chance, spikes=spikes, drift=drift)
        found.append(CONFIGS.index(play_final(play, len(true_us), incumbents).winner.config))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "spikes"), [(0.002, 0.0), (0.01, 0.0), (0.007, 0.05)])
def test_equal_kernels_keep_the_incumbent(noise: float, spikes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = winners([100.0] * 6, noise, monkeypatch, spikes=spikes, drift=0.05 if spikes else 0.0)
    assert found.count(0) >= 0.97 * SIMULATIONS


@pytest.mark.parametrize("spikes", [0.0, 0.05])
def test_a_challenger_that_is_2_percent_faster_wins(spikes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = winners([102.0, 100.0, 103.0, 105.0], 0.007, monkeypatch, spikes=spikes, drift=0.05 if spikes else 0.0)
    assert found.count(1) >= 0.95 * SIMULATIONS


@pytest.mark.parametrize("noise", [0.002, 0.007])
@pytest.mark.parametrize(
    ("true_us", "incumbents"),
    [
        ([101.1, 100.0, 101.5, 100.3], 1),
        ([100.0, 101.1, 101.2, 101.3, 101.4, 101.5, 101.6, 101.7], 1),
        ([103.0, 101.2, 100.0, 100.2], 3),
        ([103.0, 101.2, 100.0], 2),
    ],
)
def test_a_kernel_more_than_1_percent_slower_hardly_ever_wins(
    true_us: list[float], incumbents: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = winners(true_us, noise, monkeypatch, incumbents=incumbents)
    assert sum(true_us[place] > 1.01 * min(true_us) for place in found) <= 0.01 * SIMULATIONS


def exact(*true_us: float, incumbents: int = 1, rounds: int = 16) -> Final:
    return decide(contenders_of([[us] * rounds for us in true_us], incumbents))


@pytest.mark.parametrize(
    ("true_us", "incumbents", "winner"),
    [
        ([100.0], 1, 0),
        ([100.0, 99.9], 1, 0),
        ([100.0, 99.0], 1, 1),
        ([100.0, 99.0], 2, 1),
        ([100.0, 99.9], 2, 0),
        ([102.0, 100.0, 99.9], 2, 1),
        ([102.0, 100.0, 99.0], 2, 2),
        ([100.0, 102.0, 99.9], 2, 0),
        ([100.0, 99.0, 98.9], 1, 1),
        ([99.0, 100.0, 99.1], 0, 0),
        ([100.0, 99.85, 99.6], 2, 1),
    ],
    ids=str,
)
def test_ties_go_to_the_first_incumbent_then_by_order(true_us: list[float], incumbents: int, winner: int) -> None:
    final = exact(*true_us, incumbents=incumbents)
    assert final.winner.config == CONFIGS[winner]
    assert [other.us for other in final.beaten] == sorted(us for place, us in enumerate(true_us) if place != winner)


def test_a_final_says_how_sure_it_is() -> None:
    alone, clear, tied = exact(100.0), exact(100.0, 95.0), exact(100.0, 99.9)
    assert (alone.confidence, alone.margin) == (1.0, 0.0)
    assert clear.confidence == 1.0
    assert clear.margin == pytest.approx(0.0526, abs=1e-3)
    assert tied.confidence == 1.0, "a tie within the noise is none that another one wins"
    assert tied.margin == pytest.approx(-0.001, abs=1e-5)
    assert tied.noise == TIE
    chance = random.Random(3)
    doubtful = decide(contenders_of(rounds_of([100.0, 99.4], 0.02, chance)(10), 1), settled=False, notices=("why",))
    assert doubtful.noise > TIE
    assert 0.5 < doubtful.confidence <= 1.0
    assert not doubtful.settled
    assert doubtful.notices == ("why",)


@given(
    st.lists(st.lists(st.floats(1.0, 1e4), min_size=10, max_size=10), min_size=1, max_size=5),
    st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_any_samples_give_one_final_and_always_the_same(samples: list[list[float]], incumbents: int) -> None:
    contenders = contenders_of(samples, incumbents)
    final = decide(contenders)
    assert final == decide(contenders)
    assert sorted(map(str, final.contenders)) == sorted(map(str, contenders))
    assert [other.us for other in final.beaten] == sorted(other.us for other in final.beaten)
    assert 0.0 <= final.confidence <= 1.0
    assert final.noise >= TIE


@given(st.floats(0.1, 1e5), st.integers(2, 6), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_units_and_a_common_drift_change_nothing(scale: float, count: int, seed: int) -> None:
    samples = rounds_of([100.0 + place for place in range(count)], 0.005, random.Random(seed))(16)
    drifted = [[us * scale * (1.0 + 0.01 * i) for i, us in enumerate(times)] for times in samples]
    first, second = decide(contenders_of(samples, 1)), decide(contenders_of(drifted, 1))
    assert first.winner.config == second.winner.config
    assert first.confidence == pytest.approx(second.confidence, abs=0.01)


def test_rounds_end_when_the_order_is_clear_or_the_rest_is_near() -> None:
    assert not settled([[100.0] * (CHECK_ROUNDS - 1), [120.0] * (CHECK_ROUNDS - 1)])
    assert settled([[100.0] * CHECK_ROUNDS, [120.0] * CHECK_ROUNDS])
    assert settled([[100.0] * CHECK_ROUNDS, [100.0 * (1.0 + NEAR / 2.0)] * CHECK_ROUNDS])
    assert settled([[100.0] * CHECK_ROUNDS])
    noisy = rounds_of([100.0, 100.7], 0.01, random.Random(1))
    assert not settled(noisy(CHECK_ROUNDS))


@pytest.mark.parametrize(
    ("true_us", "noise", "rounds"), [([100.0, 120.0], 0.005, CHECK_ROUNDS), ([100.0, 100.6], 0.02, MOST_ROUNDS)]
)
def test_a_final_plays_as_long_as_it_must(true_us: list[float], noise: float, rounds: int) -> None:
    times = Rounds(rounds_of(true_us, noise, random.Random(5)), UNDISTURBED).times(2)
    assert [len(samples) for samples in times.samples_us] == [rounds] * 2
    assert times.settled == (rounds < MOST_ROUNDS)
    assert times.notices == ()


def test_long_rounds_are_fewer_but_enough_to_compare() -> None:
    assert most_rounds(0.5) == MOST_ROUNDS
    assert most_rounds(20.0) == int(BUDGET_MS / 20.0)
    assert most_rounds(500.0) == CHECK_ROUNDS


class Played:
    """Rounds of two kernels that are disturbed in the first ``disturbed`` repetitions."""

    def __init__(self, disturbed: int, disturb: Callable[[int], float]) -> None:
        self.disturbed, self.disturb = disturbed, disturb
        self.repetition, self.round = 0, 0
        self.slept: list[float] = []
        self.asked: list[Sequence[str]] = []

    def play(self, rounds: int) -> list[list[float]]:
        samples: list[list[float]] = [[], []]
        for _ in range(rounds):
            factor = self.disturb(self.round) if self.repetition < self.disturbed else 1.0
            samples[0].append(100.0 * factor * (1.0 + 1e-4 * (self.round % 3)))
            samples[1].append(110.0 * factor * (1.0 - 1e-4 * (self.round % 3)))
            self.round += 1
        return samples

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.repetition, self.round = self.repetition + 1, 0

    def times(self, answers: dict[str, str]) -> FinalTimes:
        def ask(arguments: Sequence[str]) -> str | None:
            self.asked.append(arguments)
            return next((text for name, text in answers.items() if name in arguments[-2]), None)

        return Rounds(self.play, Machine("GPU-1", ask, own=frozenset((10, 11))), self.sleep).times(2)


def clock_change(played: int) -> float:
    return 1.0 if played < CHECK_ROUNDS // 2 else 1.3


def interruptions(played: int) -> float:
    return 1.5 if played % 3 == 1 else 1.0


def test_clocks_that_moved_while_the_order_held_are_told_and_nothing_is_repeated() -> None:
    played = Played(1, clock_change)
    times = played.times({"clocks_event_reasons": "0x0000000000000004\n"})
    assert times.notices == (
        "clocks moved: calls took 30.0% longer at the end than at first, the GPU is slowed by the power limit",
        "the order held all the same",
    )
    assert times.settled
    assert played.slept == []


def test_clocks_that_moved_before_the_order_was_settled_are_waited_for_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = Played(1, lambda played: 1.0 if played < MOST_ROUNDS // 2 else 1.3)
    monkeypatch.setattr("doratune.tuner.final.settled", lambda samples: played.repetition > 0)
    times = played.times({"clocks_event_reasons": "0x0000000000000024\n"})
    assert times.notices == (
        "clocks moved: calls took 30.0% longer at the end than at first, "
        "the GPU is slowed by the power limit; the GPU is slowed by its temperature",
        "undisturbed after 1 repetition",
    )
    assert times.settled
    assert max(times.samples_us[0]) < 101.0, "the disturbed rounds are not used"
    assert played.slept == [WAIT_SECONDS]
    assert all(arguments[:2] == ["-i", "GPU-1"] for arguments in played.asked)


def test_a_second_process_on_the_gpu_is_told() -> None:
    played = Played(REPEATS + 1, interruptions)
    times = played.times({"compute-apps": "10\n4711\n11\n", "clocks_event_reasons": "0x0\n"})
    assert len(times.notices) == REPEATS + 2
    assert all(
        "interruptions" in notice and "1 other process on the GPU (4711)" in notice for notice in times.notices[:-1]
    )
    assert times.notices[-1] == f"still so after {REPEATS} repetitions"
    assert len(played.slept) == REPEATS


@pytest.mark.parametrize(
    "answers",
    [{}, {"compute-apps": "[Not Supported]\n", "clocks": "[N/A]\n"}, {"compute-apps": "1\n2\n", "clocks": "0x1\n"}],
    ids=["no nvidia-smi", "not supported", "ids of another namespace"],
)
def test_a_machine_that_tells_no_cause_fails_nothing(answers: dict[str, str]) -> None:
    times = Played(1, clock_change).times(answers)
    assert times.notices[0].endswith("for no reason that the driver tells")


def test_an_older_driver_is_asked_for_its_name_of_the_reasons() -> None:
    times = Played(1, clock_change).times({"clocks_throttle_reasons": "0x0000000000000008\n"})
    assert "a hardware slowdown" in times.notices[0]


def test_nvidia_smi_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert Machine().causes() == []


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("contenders", [1, 3])
def test_noise_alone_is_no_disturbance(noise: float, contenders: int) -> None:
    chance = random.Random(11)
    found = [find_disturbance(rounds_of([100.0] * contenders, noise, chance)(CHECK_ROUNDS)) for _ in range(SIMULATIONS)]
    assert sum(text is not None for text in found) <= 0.02 * SIMULATIONS


def test_a_noisy_incumbent_that_is_slower_does_not_win_because_a_challenger_beats_the_first() -> None:
    chance = random.Random(3)
    slower = 0
    for _ in range(200):
        noise = {10.0: 0.002, 10.2: 0.03, 9.8: 0.002}
        samples = {us: [us * math.exp(chance.gauss(0.0, sd)) for _ in range(8)] for us, sd in noise.items()}
        first, second, challenger = contenders_of([samples[10.0], samples[10.2], samples[9.8]], incumbents=2)
        slower += decide([first, second, challenger]).winner == second
    assert slower <= 10  # 2 % slower, and known to 1 %
