"""GPU time without launch overhead and without a warm L2: CUDA graphs of calls over rotating inputs, replayed.

A :class:`Rotation` holds the inputs and captures what is to be timed; :func:`replay_us` times one graph,
:func:`interleaved_us` several in turn.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..codegen.gpu import Gpu

TIMING_BUDGET_MS = 40.0
"""GPU time spent on the replays of one measurement."""

MIN_REPLAYS, MAX_REPLAYS = 7, 50

MAX_SETS = 32
"""Input sets at most."""

SHORT_TOKENS = 1024
"""Calls of at most this many tokens are short: a graph repeats them."""

SHORT_GRAPH_CALLS = 64
"""Short calls in a graph, at least about this many, so that the graph's own launch does not count."""

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Graph:
    """A captured CUDA graph of ``calls`` calls."""

    graph: torch.cuda.CUDAGraph
    calls: int

    def replay(self) -> None:
        self.graph.replay()

    def replay_us(self) -> float:
        """Replay once; return the microseconds of one call."""
        (us,) = self.replays_us(1)
        return us

    def replays_us(self, count: int) -> list[float]:
        """Replay ``count`` times without waiting in between; return the microseconds of one call in each replay."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            start.record()
            self.replay()
            end.record()
        events[-1][1].synchronize()
        return [1000.0 * float(start.elapsed_time(end)) / self.calls for start, end in events]


class Rotation(Generic[Inputs]):
    """Sets of inputs that calls use in turn, so that a set has left the L2 before its turn comes again.

    ``make`` draws the set of a seed (0, 1, …) on the current GPU; ``set_bytes`` is what one call reads and writes of
    it. There are enough sets to exceed the L2 of ``gpu`` twice, but no more than ``memory_share`` of the free memory
    holds. ``short`` calls are repeated within a graph.
    """

    def __init__(
        self, make: Callable[[int], Inputs], set_bytes: int, gpu: Gpu, *, memory_share: float, short: bool
    ) -> None:
        free_bytes = int(memory_share * torch.cuda.mem_get_info()[0])
        count = max(1, min(rotations(set_bytes, gpu.l2_bytes), free_bytes // set_bytes))
        self.sets = [make(seed) for seed in range(count)]
        self.repeats = max(1, SHORT_GRAPH_CALLS // count) if short else 1

    def calls(self, run: Callable[[Inputs], object]) -> Sequence[Callable[[], object]]:
        """The calls of a graph: ``run`` on each set in turn, all of it ``repeats`` times."""
        return [functools.partial(run, one) for one in self.sets] * self.repeats

    def capture(self, run: Callable[[Inputs], object]) -> Graph:
        """Capture ``run`` on every set in turn."""
        calls = self.calls(run)
        return Graph(capture(calls), len(calls))


def rotations(set_bytes: int, l2_bytes: int) -> int:
    """The number of input sets after which the first one has left the L2."""
    return max(2, min(MAX_SETS, -(-2 * l2_bytes // max(set_bytes, 1)) + 1))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture ``calls`` one after another into a CUDA graph, after running each once to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_us(graph: Graph, *, give_up_us: float = 0.0) -> list[float]:
    """Time replays of a graph for :data:`TIMING_BUDGET_MS`; return the microseconds of one call in each replay.

    When the first replay takes more than ``give_up_us`` a call (0: never), only that one is returned.
    """
    graph.replay()
    first = graph.replay_us()
    if give_up_us and first > give_up_us:
        return [first]
    replay_ms = first * graph.calls / 1000.0
    return graph.replays_us(int(min(MAX_REPLAYS, max(MIN_REPLAYS, TIMING_BUDGET_MS / max(replay_ms, 1e-3)))))


def interleaved_us(graphs: Mapping[str, Graph], *, rounds: int = 20) -> dict[str, list[float]]:
    """Time one replay of each graph in turn, ``rounds`` times, so that a drift of the clocks affects all alike.

    Returns the microseconds of one call in each round, by the graphs' names.
    """
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(graph.replay_us())
    return samples


def median_us(samples: Sequence[float]) -> float:
    """The median of timing samples in microseconds."""
    return statistics.median(samples)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect Python's garbage before the block and not inside it, where it would add to the time of a call."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
