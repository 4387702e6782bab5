"""Timed calls use the rotating inputs in turn, so often that neither a warm L2 nor a graph's launch is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.gpu import find_gpu
from doratune.tuner.timing import (
    FLUSHING,
    MAX_SETS,
    MIN_REPLAYS,
    SHORT_GRAPH_CALLS,
    Rotation,
    Turns,
    interleaved_us,
    replay_us,
)

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


def rotation(set_bytes: int, *, free: int = 1 << 20, unused: int = 0, **calls: bool | int) -> Rotation[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (free - unused, 1 << 30))
        patch.setattr(torch.cuda, "memory_reserved", lambda: 1000 + unused)
        patch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
        return Rotation(lambda seed: seed, set_bytes, GPU, memory_share=0.5, **calls)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("set_bytes", "free", "count"),
    [
        (500, 1 << 20, 5),
        (1, 1 << 20, MAX_SETS),
        (5_000, 1 << 20, 2),
        (FLUSHING * 1000, 1 << 20, 1),
        (500, 4000, 4),
        (5_000, 4000, 1),
    ],
    ids=["twice the L2", "at most", "at least two", "one that flushes the L2", "that fit", "one in any case"],
)
def test_there_are_as_many_sets_as_exceed_the_l2_twice_and_fit_the_memory(
    set_bytes: int, free: int, count: int
) -> None:
    assert rotation(set_bytes, free=free).sets == list(range(count))


def test_memory_that_pytorch_holds_unused_is_free() -> None:
    assert rotation(500, free=4000, unused=3000).sets == list(range(4))


def test_every_set_takes_its_turn_and_short_calls_are_repeated() -> None:
    called: list[int] = []
    for call in rotation(500).calls(called.append):
        call()
    assert called == [0, 1, 2, 3, 4]
    called.clear()
    for call in rotation(500, short=True).calls(called.append):
        call()
    assert called == [0, 1, 2, 3, 4] * (SHORT_GRAPH_CALLS // 5)
    called.clear()
    for call in rotation(500, least_calls=11).calls(called.append):
        call()
    assert called == [0, 1, 2, 3, 4] * 3


def test_graphs_are_timed_in_turn_after_one_replay_each() -> None:
    log: list[str] = []
    graphs = {"a": Clock("a", [1.0, 2.0], log), "b": Clock("b", [3.0, 4.0], log)}
    assert interleaved_us(graphs, rounds=2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}  # type: ignore[arg-type]
    assert log == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("best_us", "count"), [(0.0, 5), (210.0, 5), (190.0, MIN_REPLAYS), (20.0, 1)], ids=["first", "near", "slow", "far"]
)
def test_a_graph_is_replayed_the_less_the_farther_it_is_behind(best_us: float, count: int) -> None:
    graph = Clock("a", [250.0] + [200.0] * 60, [], calls=8)
    expected = [250.0] if count == 1 else [200.0] * count
    assert replay_us(graph, best_us=best_us, give_up=3.0) == expected  # type: ignore[arg-type]


def test_a_short_graph_is_replayed_often_and_the_first_replay_does_not_count() -> None:
    graph = Clock("a", [9.0] + [2.0] * 60, [], calls=100)
    assert replay_us(graph) == [2.0] * 11  # type: ignore[arg-type]


def test_turns_alternate_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            assert self.at == now[0], "only the last one is waited for"

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Ticking(Clock):
        def replay(self) -> None:
            super().replay()
            now[0] += next(self.us)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    log: list[str] = []
    graphs = [Ticking("a", [1.0, 2.0, 3.0], log, calls=10), Ticking("b", [4.0, 5.0, 6.0], log, calls=1)]
    turns = Turns(graphs)  # type: ignore[arg-type]
    assert turns.play(1) == [[100.0], [4000.0]]
    assert turns.play(2) == [[200.0, 300.0], [5000.0, 6000.0]]
    assert log == ["a", "b", "b", "a", "a", "b"]
