"""Record tables on a GPU: ``python -m doratune.benchmarks.tables.record --output FOLDER``.

A family is the specs that differ in their token bucket only; they share their compiled code, so a config is compiled
once and timed for all of them. The configs of a family are those that the performance model puts within
:data:`WITHIN` times its best for one of the specs: all of them where the space is small, else as many random ones as
the time allows. Half of each batch are neighbours of the best so far, since a search ends among these. At the end the
winners of every other family are timed, as a lookup would carry them over, and the best of each spec are timed in turn.

The specs are those of :mod:`.specs`, or of a list (``--specs``); with ``--entries STORE`` the winners of that store's
entries of the operation come right after the built-in configs.

Kinds of times: 0 one short measurement; 1 timed in turn with the other best, and then the short measurement is kept as
a fourth value; 2 the first replay only, of a config that is far behind.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.entry import MEASURED
from ...cache.store import Store
from ...codegen.compile import CompileError
from ...codegen.cost import estimate_us
from ...codegen.gpu import Gpu
from ...codegen.ops import OPS
from ...codegen.render import render
from ...codegen.spec import Config, KernelSpec
from ...errors import DoratuneError
from ...runtime.device import find_device, gpu_of
from ...tuner.evaluation import BROKEN, Evaluator, Rejected
from ...tuner.isolation import IsolatedEvaluator
from ...tuner.measure import MeasureEvaluator
from ...tuner.predict import shortlist
from ...tuner.space import Space
from ...tuner.spec_list import read_spec_list
from ...tuner.workers import Compiled, CompilePool
from ..results import environment
from .read import TableError
from .specs import recorded_specs

SCHEMA = 1
SHORT, IN_TURN, CENSORED = 0, 1, 2

WITHIN = 2.0
"""Configs whose estimate is more than this many times the best estimate are left out."""

ENUMERATED = 20_000
"""A variant with more combinations is sampled."""

LEAST_POOL = 100
"""The best estimates of a spec are in its pool wherever they lie."""

BATCH = 24
BEST = 12
"""Configs of a spec that are timed in turn at the end."""
NEAR = 6
"""The best configs whose neighbours are tried."""

_SHARES = (0.72, 0.16)
"""Shares of the time for the batches and for the other families' winners; the rest is for the final timing."""


@dataclass
class _Table:
    """What is recorded of one spec."""

    us: dict[Config, tuple[float, int]] = field(default_factory=dict)
    rejected: dict[Config, str] = field(default_factory=dict)
    short_us: dict[Config, float] = field(default_factory=dict)
    """The short measurements of what was timed in turn later."""

    def best(self, count: int) -> list[Config]:
        timed = [(us, str(config), config) for config, (us, kind) in self.us.items() if kind != CENSORED]
        return [config for _, _, config in sorted(timed)[:count]]


class _Family:
    """The specs that share their code, their tables, and the configs still to be tried."""

    def __init__(self, specs: Sequence[KernelSpec], gpu: Gpu, evaluator: Evaluator) -> None:
        self.specs = tuple(specs)
        self.gpu, self.evaluator = gpu, evaluator
        self.spaces = {spec: Space(spec, gpu) for spec in self.specs}
        self.tables = {spec: _Table() for spec in self.specs}
        self.chance = random.Random(str(self.specs[0]))
        self.asked: set[Config] = set()
        starts = (
            itertools.chain(space.seeds, shortlist(space, 12 // len(self.specs))) for space in self.spaces.values()
        )
        self.first = list(dict.fromkeys(itertools.chain.from_iterable(starts)))
        self.pool = self._pool()

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

    def evaluate(self, config: Config, compiled: Future[Compiled]) -> None:
        """Time one config for every spec of the family that can run it."""
        for spec in self.suits(config):
            table = self.tables[spec]
            try:
                evaluation = self.evaluator.evaluate(render(spec, config), compiled.result())
            except (Rejected, CompileError) as reason:
                table.rejected[config] = str(reason).splitlines()[0][:120]
                continue
            assert evaluation.us is not None
            table.us[config] = evaluation.us, SHORT if len(evaluation.samples_us) > 1 else CENSORED

    def begin_with(self, document: dict[str, Any]) -> None:
        """Try the configs of an older table first."""
        configs = [Config.parse(text) for text in document["configs"]]
        for spec in self.specs:
            recorded = document["specs"].get(str(spec), {"us": ()})
            self.first += [configs[row[0]] for row in recorded["us"] if row[2] != CENSORED]

    def begin_with_winners(self, configs: Iterable[Config]) -> None:
        """Try configs that won at other specs early."""
        self.first += configs

    def knows(self, config: Config) -> bool:
        """Whether a config was timed or rejected."""
        return any(config in table.us or config in table.rejected for table in self.tables.values())

    def time_in_turn(self, end: float) -> None:
        """Time the best of each spec in turn, until about ``end``."""
        for spec, table in self.tables.items():
            configs = table.best(BEST)
            if time.monotonic() > end or not configs:
                return
            times = self.evaluator.final([render(spec, config) for config in configs])
            assert times is not None
            for config, samples in zip(configs, times.samples_us, strict=True):
                table.short_us[config] = table.us[config][0]
                table.us[config] = statistics.median(samples), IN_TURN
            self.evaluator.finish(spec)


def families_of(specs: Iterable[KernelSpec]) -> list[list[KernelSpec]]:
    """The specs by family, in order."""
    families: dict[KernelSpec, list[KernelSpec]] = {}
    for spec in specs:
        families.setdefault(spec.family, []).append(spec)
    return list(families.values())


def record(families: Sequence[_Family], *, end: float, jobs: int, gpu: Gpu, winners: _Winners) -> None:
    """Fill the tables of ``families`` until about ``end``, by the monotonic clock."""
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
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
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
    except DoratuneError as error:
        print(f"{family.specs[0]} {config}: {str(error).splitlines()[0]}", flush=True)


def _document(op: str, families: Sequence[_Family], gpu: Gpu, commit: str | None) -> dict[str, Any]:
    numbers: dict[Config, int] = {}
    specs = {}
    for family in families:
        for spec, table in family.tables.items():
            if spec.op == op and table.us:
                specs[str(spec)] = {
                    "us": [
                        [numbers.setdefault(config, len(numbers)), _rounded(us), kind]
                        + [_rounded(table.short_us[each]) for each in (config,) if each in table.short_us]
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


def _rounded(us: float) -> float:
    return float(f"{us:.5g}")


def _winners_of(store: str | None, op: str) -> tuple[Config, ...]:
    """The configs of a store's measured entries of an operation, without repetition."""
    if store is None:
        return ()
    with Store.open(store, readonly=True) as opened:
        entries = [entry for entry in opened.entries() if entry.spec.op == op]
    return tuple(dict.fromkeys(entry.config for entry in entries if entry.evaluation.provenance == MEASURED))


def _read(folder: Path | None, op: str) -> dict[str, Any]:
    path = None if folder is None else folder / f"{op}.json.gz"
    if path is None or not path.exists():
        return {"configs": [], "specs": {}}
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def _write(folder: Path, families: Sequence[_Family], gpu: Gpu, commit: str | None) -> None:
    for op in OPS:
        _write_document(folder, op, _document(op, families, gpu, commit))


def _write_document(folder: Path, op: str, document: dict[str, Any]) -> None:
    if document["specs"]:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, separators=(",", ":"), sort_keys=True)
        with gzip.GzipFile(folder / f"{op}.json.gz", "wb", mtime=0) as file:
            file.write(text.encode())


def join(folders: Sequence[Path], output: Path) -> None:
    """Write the tables of several parts of one run as one; of a spec in several the first counts.

    Raises:
        TableError: a folder has no table, or the parts are of several GPUs, environments or commits.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        tables = {op: document for op in OPS if (document := _read(folder, op))["specs"]}
        if not tables:
            raise TableError(f"{folder} has no table; name the folders that the parts of a run were written to")
        for op, document in tables.items():
            found.setdefault(op, []).append(document)
    every = [document for documents in found.values() for document in documents]
    for document in every:
        if any(document[key] != every[0][key] for key in ("gpu", "env")):
            raise TableError("the parts are of several GPUs, environments or commits, whose times cannot be compared")
    for op, documents in found.items():
        numbers: dict[str, int] = {}
        specs: dict[str, Any] = {}
        for document in documents:
            for spec, recorded in document["specs"].items():
                if spec in specs:
                    continue
                specs[spec] = {
                    key: [
                        [numbers.setdefault(document["configs"][row[0]], len(numbers)), *row[1:]]
                        for row in recorded[key]
                    ]
                    for key in ("us", "rejected")
                }
        _write_document(output, op, {**documents[0], "configs": list(numbers), "specs": specs})


def main() -> None:
    """Parse the command line, record, write a file for each operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ops", nargs="*", help="only these operations")
    parser.add_argument("--part", type=int, default=0, help="which part of the families, from 0")
    parser.add_argument("--parts", type=int, default=1, help="processes that share the families, each with its own GPU")
    parser.add_argument("--shared", type=Path, metavar="FOLDER", help="where these processes exchange their winners")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FOLDER", help="only join the tables of these parts")
    parser.add_argument("--begin-with", type=Path, metavar="FOLDER", help="older tables whose configs are tried first")
    parser.add_argument("--specs", type=Path, metavar="FILE", help="these specs, one a line, instead of the usual ones")
    parser.add_argument("--entries", metavar="STORE", help="a store whose winners are tried early")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--jobs", type=int, default=15)
    parser.add_argument("--commit", help="the commit measured; read from git by default")
    given = parser.parse_args()
    if given.join:
        try:
            return join(given.join, given.output)
        except TableError as error:
            parser.error(str(error))
    end = time.monotonic() + given.seconds
    device = find_device("cuda")
    gpu = gpu_of(device)
    known = read_spec_list(file=given.specs, gpu=gpu.slug).specs if given.specs else recorded_specs(gpu.slug)
    specs = [spec for spec in known if not given.ops or spec.op in given.ops]
    groups = families_of(specs)[given.part :: given.parts]
    won = {op: _winners_of(given.entries, op) for op in {spec.op for spec in specs}}
    evaluator = IsolatedEvaluator(functools.partial(MeasureEvaluator, gpu, str(device)), gpu)
    evaluator.start()
    families = [_Family(group, gpu, evaluator) for group in groups]
    for family in families:
        family.begin_with(_read(given.begin_with, family.specs[0].op))
        family.begin_with_winners(won[family.specs[0].op])
    winners = _Winners(given.shared or given.output / "winners", given.part, given.parts)
    try:
        record(families, end=end, jobs=given.jobs, gpu=gpu, winners=winners)
    finally:
        evaluator.close()
        _write(given.output, families, gpu, given.commit)


if __name__ == "__main__":
    main()
