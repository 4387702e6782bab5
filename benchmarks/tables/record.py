"""Record tables on a GPU: ``python -m doratune.benchmarks.tables.record --output FOLDER``.

A family is the specs that differ in their token bucket only; they share their compiled code, so a config is compiled
once and timed for all of them. The configs of a family are those that the performance model puts within
:data:`WITHIN` times its best for one of the specs: all of them where the space is small, else as many random ones as
the time allows. Half of each batch are neighbours of the best so far, since a search ends among these. At the end the
winners of every other family are timed, as a lookup would carry them over, and the best of each spec are timed in turn.

Kinds of times: 0 one short measurement, 1 timed in turn with the other best, 2 the first replay only, of a config that
is far behind.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...codegen.compile import CompileError
from ...codegen.gpu import Gpu
from ...codegen.ops import OPS
from ...codegen.render import render
from ...codegen.spec import Config, KernelSpec
from ...errors import DoratuneError
from ...runtime.binding import bind
from ...runtime.device import find_device, gpu_of
from ...tuner.evaluation import BROKEN, Rejected
from ...tuner.measure import MeasureEvaluator
from ...tuner.measure import _gpu_answers as gpu_answers
from ...tuner.predict import estimate_us, shortlist
from ...tuner.space import Space
from ...tuner.timing import Graph, interleaved_us
from ...tuner.workers import Compiled, CompilePool
from ..results import environment
from .specs import recorded_specs

SCHEMA = 1
SHORT, IN_TURN, CENSORED = 0, 1, 2

WITHIN = 2.0
"""Configs whose estimate is more than this many times the best estimate are left out."""

ENUMERATED = 20_000
"""A variant with more combinations is sampled."""

LEAST_POOL = 100
"""The best estimates of a spec are in its pool wherever they lie."""

BATCH = 48
TIMING_MS = 8.0
LEAST_REPLAYS, MOST_REPLAYS = 5, 25
BEST = 12
"""Configs of a spec that are timed in turn at the end."""
ROUNDS = 21
NEAR = 6
"""The best configs whose neighbours are tried."""

_SHARES = (0.72, 0.16)
"""Shares of the time for the batches and for the other families' winners; the rest is for the final timing."""


@dataclass
class _Table:
    """What is recorded of one spec."""

    us: dict[Config, tuple[float, int]] = field(default_factory=dict)
    rejected: dict[Config, str] = field(default_factory=dict)

    def best(self, count: int) -> list[Config]:
        timed = [(us, str(config), config) for config, (us, kind) in self.us.items() if kind != CENSORED]
        return [config for _, _, config in sorted(timed)[:count]]


class _Timer:
    """The inputs of one spec on the GPU, and the timing of its candidates."""

    def __init__(self, spec: KernelSpec, gpu: Gpu, device: torch.device) -> None:
        self._evaluator = MeasureEvaluator(gpu, device)
        self._spec = spec
        self._evaluator._prepare(spec)

    def gate(self, launch: Any) -> None:
        self._evaluator._gate(self._spec, launch)

    def capture(self, launch: Any) -> Graph:
        assert self._evaluator._rotation is not None
        return self._evaluator._rotation.capture(lambda tensors: self._evaluator._launch(self._spec, launch, tensors))

    def time(self, launch: Any, best_us: float) -> tuple[float, int]:
        graph = self.capture(launch)
        graph.replay()
        first = graph.replay_us()
        if first > WITHIN * 1.1 * best_us:
            return first, CENSORED
        count = int(TIMING_MS * 1000 / max(first * graph.calls, 1.0))
        return statistics.median(graph.replays_us(max(LEAST_REPLAYS, min(MOST_REPLAYS, count)))), SHORT


class _Family:
    """The specs that share their code, their tables, and the configs still to be tried."""

    def __init__(self, specs: Sequence[KernelSpec], gpu: Gpu, device: torch.device) -> None:
        self.specs = tuple(specs)
        self.gpu, self.device = gpu, device
        self.spaces = {spec: Space(spec, gpu) for spec in self.specs}
        self.tables = {spec: _Table() for spec in self.specs}
        self.chance = random.Random(str(self.specs[0]))
        self.asked: set[Config] = set()
        starts = (
            itertools.chain(space.seeds, shortlist(space, 12 // len(self.specs))) for space in self.spaces.values()
        )
        self.first = list(dict.fromkeys(itertools.chain.from_iterable(starts)))
        self.pool = self._pool()
        self._timers: dict[KernelSpec, _Timer] = {}

    def suits(self, config: Config) -> list[KernelSpec]:
        """The specs that can run a config of the space."""
        return [spec for spec, space in self.spaces.items() if config in space and space.refuse(config) is None]

    def _pool(self) -> list[Config]:
        near: dict[Config, None] = {}
        for spec, space in self.spaces.items():
            found = [config for config in self._combinations(space) if space.refuse(config) is None]
            estimates = sorted((estimate_us(spec, config, self.gpu), str(config), config) for config in found)
            limit = WITHIN * estimates[0][0] if estimates else 0.0
            near |= {config: None for rank, (us, _, config) in enumerate(estimates) if us <= limit or rank < LEAST_POOL}
        mixed = list(near)
        self.chance.shuffle(mixed)
        return mixed

    def _combinations(self, space: Space) -> Iterator[Config]:
        for variant, choices in space.choices.items():
            names = list(choices)
            if math.prod(map(len, choices.values())) <= ENUMERATED:
                combinations: Iterable[tuple[int, ...]] = itertools.product(*choices.values())
            else:
                combinations = (
                    tuple(self.chance.choice(values) for values in choices.values()) for _ in range(ENUMERATED // 4)
                )
            for values in combinations:
                yield Config.create(variant, **dict(zip(names, values, strict=True)))

    def next_batch(self, count: int) -> list[Config]:
        """Configs not asked for yet: known starts, then half random ones and half neighbours of the best."""
        batch: list[Config] = []

        def add(config: Config) -> None:
            if config not in self.asked and self.suits(config):
                self.asked.add(config)
                batch.append(config)

        while self.first and len(batch) < count:
            add(self.first.pop(0))
        for _ in range(20 * count):
            if len(batch) >= count:
                break
            spec = self.chance.choice(self.specs)
            best = [config for config in self.tables[spec].best(NEAR) if config in self.spaces[spec]]
            if best and self.chance.random() < 0.5:
                add(self.spaces[spec].draw(self.chance, near=best))
            elif self.pool:
                add(self.pool.pop())
        return batch

    def timer(self, spec: KernelSpec) -> _Timer:
        if spec not in self._timers:
            self._timers[spec] = _Timer(spec, self.gpu, self.device)
        return self._timers[spec]

    def release(self) -> None:
        self._timers.clear()
        torch.cuda.empty_cache()

    def evaluate(self, config: Config, compiled: Future[Compiled]) -> None:
        """Time one config for every spec of the family that can run it."""
        specs = self.suits(config)
        try:
            compiled.result()
            launch = bind(render(specs[0], config)).launch
            self.timer(specs[0]).gate(launch)
        except (Rejected, CompileError) as reason:
            for spec in specs:
                self.tables[spec].rejected[config] = str(reason).splitlines()[0][:120]
            return
        for spec in specs:
            table = self.tables[spec]
            best = min((us for us, _ in table.us.values()), default=math.inf)
            table.us[config] = self.timer(spec).time(launch, best)

    def fill(self, document: dict[str, Any]) -> None:
        """Take over what an earlier process of this run recorded."""
        configs = [Config.parse(text) for text in document["configs"]]
        for spec, table in self.tables.items():
            recorded = document["specs"].get(str(spec), {"us": (), "rejected": ()})
            table.us |= {configs[number]: (us, kind) for number, us, kind in recorded["us"]}
            table.rejected |= {configs[number]: reason for number, reason in recorded["rejected"]}
            self.asked |= table.us.keys() | table.rejected.keys()

    def begin_with(self, document: dict[str, Any]) -> None:
        """Try the configs of an older table first."""
        configs = [Config.parse(text) for text in document["configs"]]
        for spec in self.specs:
            recorded = document["specs"].get(str(spec), {"us": ()})
            self.first += [configs[number] for number, _, kind in recorded["us"] if kind != CENSORED]

    def knows(self, config: Config) -> bool:
        """Whether a config was timed or rejected."""
        return any(config in table.us or config in table.rejected for table in self.tables.values())

    def time_in_turn(self, deadline: float) -> None:
        """Time the best of each spec in turn."""
        for spec, table in self.tables.items():
            if time.monotonic() > deadline:
                return
            graphs, configs = {}, table.best(BEST)
            for config in configs:
                graphs[str(config)] = self.timer(spec).capture(bind(render(spec, config)).launch)
            samples = interleaved_us(graphs, rounds=ROUNDS)
            for config in configs:
                table.us[config] = (statistics.median(samples[str(config)]), IN_TURN)


def families_of(specs: Iterable[KernelSpec]) -> list[list[KernelSpec]]:
    """The specs by family, in order."""
    families: dict[KernelSpec, list[KernelSpec]] = {}
    for spec in specs:
        families.setdefault(replace(spec, tokens=1) if spec.tokens else spec, []).append(spec)
    return list(families.values())


class _Lost(Exception):
    """A candidate broke the GPU context of this process; it is recorded as rejected."""


def record(families: Sequence[_Family], *, end: float, jobs: int, gpu: Gpu, winners: _Winners) -> None:
    """Fill the tables of ``families`` until about ``end``, by the monotonic clock.

    Raises:
        _Lost: a candidate broke the GPU context: another process must go on.
    """
    began = time.monotonic()
    ends = [began + (end - began) * share for share in itertools.accumulate(_SHARES)]
    pool = CompilePool(gpu, jobs)
    print(f"{len(families)} families, pools {[len(family.pool) for family in families]}", flush=True)
    try:
        _explore(families, pool, ends[0])
        print(f"explored after {time.monotonic() - began:.0f} s: {_sizes(families)}", flush=True)
        winners.publish(families)
        _carry_over(families, winners, pool, ends[1])
        print(f"carried over after {time.monotonic() - began:.0f} s: {_sizes(families)}", flush=True)
        for family in families:
            family.time_in_turn(end)
            family.release()
        print(f"timed in turn after {time.monotonic() - began:.0f} s", flush=True)
    finally:
        pool.close()


class _Winners:
    """The best configs of all families, also of those that other processes of this run record."""

    def __init__(self, folder: Path, part: int, parts: int) -> None:
        self.folder, self.part, self.parts = folder, part, parts

    def publish(self, families: Sequence[_Family]) -> None:
        """Tell the other processes the best two configs of each spec."""
        best = {
            str(spec): [str(c) for c in table.best(2)] for family in families for spec, table in family.tables.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f".winners{self.part}"
        fresh.write_text(json.dumps(best))
        fresh.rename(self.folder / f"winners{self.part}.json")

    def of(self, op: str, rank: int, end: float) -> list[Config]:
        """The configs at place ``rank`` of every spec of ``op``; waits for the other processes until ``end``."""
        paths = [self.folder / f"winners{part}.json" for part in range(self.parts)]
        while not all(path.exists() for path in paths) and time.monotonic() < end:
            time.sleep(0.2)
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        best = [configs for specs in found for spec, configs in specs.items() if spec.split("/")[0] == op]
        return list(dict.fromkeys(Config.parse(configs[rank]) for configs in best if len(configs) > rank))


def _sizes(families: Sequence[_Family]) -> list[int]:
    return [len(family.tables[family.specs[0]].us) for family in families]


def _explore(families: Sequence[_Family], pool: CompilePool, end: float) -> None:
    active = list(families)
    waiting: list[tuple[_Family, list[tuple[Config, Future[Compiled]]]]] = []
    while (active or waiting) and time.monotonic() < end:
        while active and len(waiting) < 3:
            family = active.pop(0)
            batch = family.next_batch(BATCH)
            if batch:
                waiting.append((family, [(config, _submit(pool, family, config)) for config in batch]))
        if not waiting:
            break
        family, batch_under_way = waiting.pop(0)
        for config, compiled in batch_under_way:
            while not compiled.done():
                pool.wait([compiled])
            _evaluate(family, config, compiled)
            if time.monotonic() >= end:
                return
        active.append(family)


def _carry_over(families: Sequence[_Family], winners: _Winners, pool: CompilePool, end: float) -> None:
    """Time the winners of the other families, turn by turn: first the best of each, then the second best."""
    for rank in range(2):
        jobs = [
            (family, config, _submit(pool, family, config))
            for family in families
            for config in winners.of(family.specs[0].op, rank, end)
            if not family.knows(config) and family.suits(config)
        ]
        for family, config, compiled in jobs:
            while not compiled.done():
                pool.wait([compiled])
                if time.monotonic() >= end:
                    return
            _evaluate(family, config, compiled)
            if time.monotonic() >= end:
                return


def _submit(pool: CompilePool, family: _Family, config: Config) -> Future[Compiled]:
    return pool.submit(render(family.suits(config)[0], config))


def _evaluate(family: _Family, config: Config, compiled: Future[Compiled]) -> None:
    try:
        family.evaluate(config, compiled)
    except BROKEN:
        raise
    except (DoratuneError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        print(f"{family.specs[0]} {config}: {reason}", flush=True)
        if not gpu_answers():
            for spec in family.suits(config):
                family.tables[spec].us.pop(config, None)
                family.tables[spec].rejected[config] = reason
            raise _Lost from error


def _document(op: str, families: Sequence[_Family], gpu: Gpu, commit: str | None) -> dict[str, Any]:
    numbers: dict[Config, int] = {}
    specs = {}
    for family in families:
        for spec, table in family.tables.items():
            if spec.op == op and table.us:
                specs[str(spec)] = {
                    "us": [
                        [numbers.setdefault(config, len(numbers)), float(f"{us:.5g}"), kind]
                        for config, (us, kind) in table.us.items()
                    ],
                    "rejected": [
                        [numbers.setdefault(config, len(numbers)), reason] for config, reason in table.rejected.items()
                    ],
                }
    return {
        "schema": SCHEMA,
        "gpu": gpu.slug,
        "env": environment(commit) if specs else {},
        "configs": [str(config) for config in numbers],
        "specs": specs,
    }


def _read(folder: Path | None, op: str) -> dict[str, Any]:
    path = None if folder is None else folder / f"{op}.json.gz"
    if path is None or not path.exists():
        return {"configs": [], "specs": {}}
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def _write(folder: Path, families: Sequence[_Family], gpu: Gpu, commit: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for op in OPS:
        document = _document(op, families, gpu, commit)
        if document["specs"]:
            text = json.dumps(document, separators=(",", ":"), sort_keys=True)
            with gzip.GzipFile(folder / f"{op}.json.gz", "wb", mtime=0) as file:
                file.write(text.encode())


def main() -> None:
    """Parse the command line, record, write a file for each operation.

    Where a candidate breaks the GPU context, what is recorded is written, and the process replaced by one that goes on.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ops", nargs="*", help="only these operations")
    parser.add_argument("--part", type=int, default=0, help="which part of the families, from 0")
    parser.add_argument("--parts", type=int, default=1, help="processes that share the families, each with its own GPU")
    parser.add_argument("--shared", type=Path, metavar="FOLDER", help="where these processes exchange their winners")
    parser.add_argument("--begin-with", type=Path, metavar="FOLDER", help="older tables whose configs are tried first")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--jobs", type=int, default=15)
    parser.add_argument("--commit", help="the commit measured; read from git by default")
    parser.add_argument("--continue", dest="going_on", action="store_true", help="continue what --output holds")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    device = find_device("cuda")
    gpu = gpu_of(device)
    specs = [spec for spec in recorded_specs(gpu.slug) if not given.ops or spec.op in given.ops]
    groups = families_of(specs)[given.part :: given.parts]
    families = [_Family(group, gpu, device) for group in groups]
    for family in families:
        op = family.specs[0].op
        family.begin_with(_read(given.begin_with, op))
        family.fill(_read(given.output if given.going_on else None, op))
    winners = _Winners(given.shared or given.output / "winners", given.part, given.parts)
    try:
        record(families, end=end, jobs=given.jobs, gpu=gpu, winners=winners)
    except _Lost:
        _write(given.output, families, gpu, given.commit)
        left = ["--seconds", str(end - time.monotonic())]
        again = [sys.executable, "-m", "doratune.benchmarks.tables.record", *sys.argv[1:], *left, "--continue"]
        os.execv(sys.executable, again)
    _write(given.output, families, gpu, given.commit)


if __name__ == "__main__":
    main()
