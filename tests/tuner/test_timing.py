"""Timed calls use the rotating inputs in turn, so often that neither a warm L2 nor a graph's launch is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.gpu import find_gpu
from doratune.tuner.timing import MAX_SETS, SHORT_GRAPH_CALLS, Rotation, interleaved_us, replay_us

GPU = replace(find_gpu("h200"), l2_bytes=1000)


class Clock:
    """Stands in for a captured graph: each replay takes the next of the given times, in microseconds of one call."""

    def __init__(self, name: str, us: list[float], log: list[str], calls: int = 10) -> None:
        self.name, self.us, self.log, self.calls = name, iter(us), log, calls

    def replay(self) -> None:
        self.log.append(self.name)

    def replay_us(self) -> float:
        self.replay()
        return next(self.us)

    def replays_us(self, count: int) -> list[float]:
        return [self.replay_us() for _ in range(count)]


def rotation(set_bytes: int, *, free: int = 1 << 20, short: bool = False) -> Rotation[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 30))
        return Rotation(lambda seed: seed, set_bytes, GPU, memory_share=0.5, short=short)


@pytest.mark.parametrize(
    ("set_bytes", "free", "count"),
    [(500, 1 << 20, 5), (1, 1 << 20, MAX_SETS), (10_000, 1 << 20, 2), (500, 4000, 4), (10_000, 4000, 1)],
    ids=["twice the L2", "at most", "at least two", "that fit", "one in any case"],
)
def test_there_are_as_many_sets_as_exceed_the_l2_twice_and_fit_the_memory(
    set_bytes: int, free: int, count: int
) -> None:
    assert rotation(set_bytes, free=free).sets == list(range(count))


def test_every_set_takes_its_turn_and_short_calls_are_repeated() -> None:
    called: list[int] = []
    for call in rotation(500).calls(called.append):
        call()
    assert called == [0, 1, 2, 3, 4]
    called.clear()
    for call in rotation(500, short=True).calls(called.append):
        call()
    assert called == [0, 1, 2, 3, 4] * (SHORT_GRAPH_CALLS // 5)


def test_graphs_are_timed_in_turn_after_one_replay_each() -> None:
    log: list[str] = []
    graphs = {"a": Clock("a", [1.0, 2.0], log), "b": Clock("b", [3.0, 4.0], log)}
    assert interleaved_us(graphs, rounds=2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}  # type: ignore[arg-type]
    assert log == ["a", "b"] * 3


@pytest.mark.parametrize(("give_up_us", "count"), [(0.0, 20), (5000.0, 20), (100.0, 1)])
def test_a_graph_far_behind_is_replayed_once(give_up_us: float, count: int) -> None:
    graph = Clock("a", [200.0] * 60, [])
    assert replay_us(graph, give_up_us=give_up_us) == [200.0] * count  # type: ignore[arg-type]
