"""GPU time, free of launch overhead and of a warm L2: CUDA graph replays over rotating inputs."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

TIMING_BUDGET_MS = 40.0
"""GPU time spent on the replays of one measurement."""

MIN_REPLAYS, MAX_REPLAYS = 7, 50


@contextmanager
def no_collection() -> Iterator[None]:
    """Python collects its garbage now and not inside the block, where it would fall on whoever is being timed."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


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


def replay_us(
    graph: torch.cuda.CUDAGraph, calls: int, *, budget_ms: float = TIMING_BUDGET_MS, give_up_us: float = 0.0
) -> list[float]:
    """Time replays of a graph of ``calls`` calls; returns the microseconds of one call in each replay.

    The number of replays follows from ``budget_ms``. When the first replay already takes more than ``give_up_us`` a
    call (0: never), only that one is returned.
    """
    graph.replay()
    first = _timed_ms(graph)
    if give_up_us and 1000.0 * first / calls > give_up_us:
        return [1000.0 * first / calls]
    replays = int(min(MAX_REPLAYS, max(MIN_REPLAYS, budget_ms / max(first, 1e-3))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1000.0 * start.elapsed_time(end) / calls for start, end in events]


def interleaved_us(graphs: Sequence[tuple[torch.cuda.CUDAGraph, int]], *, rounds: int = 20) -> list[list[float]]:
    """Time several graphs (with their numbers of calls) in turn, ``rounds`` times, so that drift hits all alike."""
    samples: list[list[float]] = [[] for _ in graphs]
    for graph, _ in graphs:
        graph.replay()
    for _ in range(rounds):
        for index, (graph, calls) in enumerate(graphs):
            samples[index].append(1000.0 * _timed_ms(graph) / calls)
    return samples


def median_us(samples: Sequence[float]) -> float:
    """The median of timing samples in microseconds."""
    return statistics.median(samples)


def rotations(bytes_per_set: int, l2_bytes: int, most: int = 32) -> int:
    """How many input sets to rotate over so that a set has left the L2 before its turn comes again."""
    return max(2, min(most, -(-2 * l2_bytes // max(bytes_per_set, 1)) + 1))


def _timed_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
