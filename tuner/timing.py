"""GPU time without launch overhead and without a warm L2: CUDA graphs of calls over rotating inputs, replayed.

A :class:`Rotation` holds the inputs and captures what is to be timed; :func:`replay_us` times one graph,
:func:`interleaved_us` and :class:`Turns` several in turn.
"""

from __future__ import annotations

import functools
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..codegen.gpu import Gpu
from .garbage import uncollected

TIMING_BUDGET_MS = 10.0
"""GPU time spent on the replays of one candidate: enough to choose who plays in the final, which times precisely."""

MIN_REPLAYS, MAX_REPLAYS = 3, 50

BEHIND = 1.2
"""A candidate whose first replay takes this many times the best so far is replayed :data:`MIN_REPLAYS` times only."""

LAUNCH_US = 1000.0
"""What a single call takes at most on top of its GPU time, between two events, on a slow host."""

FLUSHING = 6
"""A call that reads and writes this many times the L2 leaves hardly anything there of what it touched first."""

MAX_SETS = 32
"""Input sets at most."""

SHORT_TOKENS = 1024
"""Calls of at most this many tokens are short: a graph repeats them."""

SHORT_GRAPH_CALLS = 64
"""Short calls in a graph, at least about this many, so that the graph's own launch does not count."""

LEAST_FREE = 0.125
"""Share of the GPU's memory that is free for a capture."""

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
        self,
        make: Callable[[int], Inputs],
        set_bytes: int,
        gpu: Gpu,
        *,
        memory_share: float,
        short: bool = False,
        least_calls: int = 1,
    ) -> None:
        most = int(memory_share * free_bytes()) // set_bytes
        count = max(1, min(rotations(set_bytes, gpu.l2_bytes), most))
        self.sets = [make(seed) for seed in range(count)]
        self.repeats = max(1, SHORT_GRAPH_CALLS // count) if short else -(-least_calls // count)

    def calls(self, run: Callable[[Inputs], object]) -> Sequence[Callable[[], object]]:
        """The calls of a graph: ``run`` on each set in turn, all of it ``repeats`` times."""
        return [functools.partial(run, one) for one in self.sets] * self.repeats

    def capture(self, run: Callable[[Inputs], object], pool: GraphPool | None = None) -> Graph:
        """Capture ``run`` on every set in turn; the graph's memory is that of ``pool``, or its own."""
        calls = self.calls(run)
        return Graph(capture(calls) if pool is None else pool.capture(calls), len(calls))


class GraphPool:
    """Memory that graphs share, which may then be replayed in any order, but one at a time.

    Memory that a graph has for itself stays reserved after it, until PyTorch releases all that it does not use.
    """

    def __init__(self) -> None:
        self._latest: torch.cuda.CUDAGraph | None = None  # keeps the memory until another graph has taken it over
        self._stream: torch.cuda.Stream | None = None  # cuBLAS has a workspace for each stream

    def capture(self, calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        """As the function of this name."""
        self._stream = self._stream or torch.cuda.Stream()
        self._latest = capture(calls, None if self._latest is None else self._latest.pool(), self._stream)
        return self._latest


def free_bytes() -> int:
    """The memory of the current GPU that PyTorch can still allocate, with what it has reserved but does not use."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


def rotations(set_bytes: int, l2_bytes: int) -> int:
    """The number of input sets after which the first one has left the L2; one of many times the L2 needs no others."""
    if set_bytes >= FLUSHING * l2_bytes:
        return 1
    return max(2, min(MAX_SETS, -(-2 * l2_bytes // max(set_bytes, 1)) + 1))


def capture(
    calls: Sequence[Callable[[], object]],
    pool: tuple[int, int] | None = None,
    stream: torch.cuda.Stream | None = None,
) -> torch.cuda.CUDAGraph:
    """Capture ``calls`` one after another into a CUDA graph, after running the first one to warm up.

    ``pool`` is the memory pool of a graph that lives, to be shared with it; ``stream`` is where to capture, by default
    a new one. This is ``torch.cuda.graph``, but PyTorch's unused memory is returned to the driver only where it runs
    short: that takes longer than the capture.

    Raises:
        RuntimeError: the capture failed, or the calls started nothing, which would be timed as something fast.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    if free < total * LEAST_FREE:
        torch.cuda.empty_cache()  # during a capture nothing can be returned
    graph = torch.cuda.CUDAGraph()
    # The destructor of another graph would end the capture.
    with uncollected(), torch.cuda.stream(stream):
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            for call in calls:
                call()
        except BaseException:
            with suppress(RuntimeError):  # that the capture failed
                graph.capture_end()
            raise
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            graph.capture_end()
    for warning in said:
        if "CUDA Graph is empty" in str(warning.message):
            raise RuntimeError("the calls started nothing on the stream that is captured")
        warnings.warn(warning.message, warning.category, stacklevel=2)
    return graph


def once_us(call: Callable[[], object]) -> float:
    """The microseconds of one call, with up to :data:`LAUNCH_US` for its launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))


def replay_us(graph: Graph, *, best_us: float = 0.0, give_up: float = 0.0) -> list[float]:
    """Time replays of a graph for :data:`TIMING_BUDGET_MS`; return the microseconds of one call in each replay.

    When the first replay takes more than ``give_up`` times ``best_us`` a call, only that one is returned; when it takes
    more than :data:`BEHIND` times ``best_us``, :data:`MIN_REPLAYS`. With 0 for ``best_us`` all are returned. The first
    replay also warms up, so it is not among several.
    """
    first = graph.replay_us()
    if best_us and first > give_up * best_us:
        return [first]
    if best_us and first > BEHIND * best_us:
        return graph.replays_us(MIN_REPLAYS)
    replay_ms = first * graph.calls / 1000.0
    return graph.replays_us(int(min(MAX_REPLAYS, max(MIN_REPLAYS, TIMING_BUDGET_MS / max(replay_ms, 1e-3)))))


class Turns:
    """Graphs that are replayed in turn, round by round.

    Every other round goes backwards, so that each graph follows its one neighbour as often as the other.
    """

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = graphs
        self._rounds = 0

    def play(self, rounds: int) -> list[list[float]]:
        """Play ``rounds`` rounds without waiting in between; return microseconds of one call by graph and round."""
        events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(rounds):
            order = range(len(self._graphs)) if self._rounds % 2 == 0 else reversed(range(len(self._graphs)))
            for place in order:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                self._graphs[place].replay()
                end.record()
                events.append((place, start, end))
            self._rounds += 1
        events[-1][2].synchronize()
        samples: list[list[float]] = [[] for _ in self._graphs]
        for place, start, end in events:
            samples[place].append(1000.0 * float(start.elapsed_time(end)) / self._graphs[place].calls)
        return samples


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
    gc.collect()
    with uncollected():
        yield
