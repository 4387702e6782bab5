"""Read recorded tables, ``benchmarks/tables/<gpu>/<op>.json.gz``: for each spec, the measured time of each config.

A file is gzipped JSON::

    {"schema": 1, "gpu": "h100", "env": {"gpu_name": …, "driver": …, "torch": …, "triton": …, "doratune_commit": …,
     "date": …}, "configs": [config, …],
     "specs": {spec: {"us": [[index of the config, microseconds, kind], …], "rejected": [[index, reason], …]}}}

A time of kind 1 may be followed by the config's short measurement, in microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...codegen.spec import Config, KernelSpec, SpecError
from ...errors import UsageError

SCHEMA = 1
SUFFIX = ".json.gz"
TABLES = Path(__file__).parent
"""The folder of the committed tables, with a folder for each GPU."""

SHORT, FINAL, CENSORED = 0, 1, 2
"""The kinds of a time: of one short measurement; timed in turn with the spec's other best configs; of a first replay
only, which showed that the config is far behind."""

KINDS = (SHORT, FINAL, CENSORED)


class TableError(UsageError):
    """A recorded table is missing or malformed; the message names the file and the part."""


@dataclass(frozen=True)
class Timing:
    """The GPU time of a config in microseconds, and which :data:`KINDS` of measurement it is.

    ``short_us`` is the short measurement of a config that was also timed in turn, None if it was not kept.
    """

    us: float
    kind: int
    short_us: float | None = None


@dataclass(frozen=True)
class SpecTable:
    """What was measured for one spec.

    Attributes:
        spec: the spec; its GPU is the table's.
        times: the time of each config that ran and was accurate.
        rejected: the reason of each config that failed.
    """

    spec: KernelSpec
    times: Mapping[Config, Timing]
    rejected: Mapping[Config, str] = field(default_factory=dict)

    @cached_property
    def finalists(self) -> Mapping[Config, float]:
        """The microseconds of the configs that were timed in turn; of all that were not censored if none were."""
        finals = {config: timing.us for config, timing in self.times.items() if timing.kind == FINAL}
        return finals or {config: timing.us for config, timing in self.times.items() if timing.kind != CENSORED}

    @cached_property
    def best(self) -> tuple[Config, float]:
        """The fastest config of the table and its microseconds; of equals, the first by name."""
        us, _, config = min((us, str(config), config) for config, us in self.finalists.items())
        return config, us

    @property
    def best_us(self) -> float:
        """The microseconds of :attr:`best`."""
        return self.best[1]

    def us(self, config: Config) -> float | None:
        """The best estimate of a config's microseconds; None if it is not in the table, or was rejected.

        A config outside the final that one short measurement puts before the final's winner counts as equal to it: it
        was faster by its noise, or it would have been in the final.
        """
        timing = self.times.get(config)
        if timing is None:
            return None
        return timing.us if config in self.finalists else max(timing.us, self.best_us)

    def regret(self, config: Config) -> float | None:
        """The time of ``config`` over the best of the table; None as for :meth:`us`."""
        us = self.us(config)
        return None if us is None else us / self.best_us


@dataclass(frozen=True)
class Table:
    """One file: the specs of one operation on one GPU.

    Attributes:
        path: the file.
        gpu: the GPU's slug.
        op: the operation.
        env: where it was measured: ``gpu_name``, ``driver``, ``torch``, ``triton``, ``doratune_commit``, ``date``.
        specs: the measured specs, in the file's order.
    """

    path: Path
    gpu: str
    op: str
    env: Mapping[str, str]
    specs: Mapping[KernelSpec, SpecTable]

    def __iter__(self) -> Iterator[SpecTable]:
        return iter(self.specs.values())

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, spec: KernelSpec) -> SpecTable:
        return self.specs[spec]


def table_path(gpu: str, op: str, folder: Path = TABLES) -> Path:
    """The file of an operation's table on a GPU."""
    return folder / gpu / f"{op}{SUFFIX}"


def recorded(folder: Path = TABLES) -> dict[str, tuple[str, ...]]:
    """The operations that have a table, for each GPU's slug."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*/*{SUFFIX}")):
        found.setdefault(path.parent.name, []).append(path.name.removesuffix(SUFFIX))
    return {gpu: tuple(ops) for gpu, ops in found.items()}


def read_table(path: Path) -> Table:
    """Read one table.

    Raises:
        TableError: there is no such file, or it is no table of this schema; the message says where it is wrong.
    """
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise TableError(f"no recorded table {path}; record it on the GPU (benchmarks/README.md says how)") from None
    except (OSError, EOFError, ValueError) as error:
        raise TableError(f"{path}: not gzipped JSON ({error}); record it again or restore the file") from error
    try:
        return _Reader(path, data).table()
    except SpecError as error:
        raise TableError(f"{path}: {error}; the table was recorded by another version of doratune") from error


def read_tables(gpu: str, folder: Path = TABLES) -> tuple[Table, ...]:
    """Read all tables of a GPU, by operation.

    Raises:
        TableError: there is none; as :func:`read_table`.
    """
    known = recorded(folder)
    if gpu not in known:
        raise TableError(f"no recorded tables of {gpu!r} in {folder} (there: {', '.join(known) or 'none'})")
    return tuple(read_table(table_path(gpu, op, folder)) for op in known[gpu])


def write_table(table: Table, path: Path | None = None) -> None:
    """Write a table, to its own path by default. The same table always gives the same bytes."""
    numbers: dict[Config, int] = {}
    specs = {}
    for part in table:
        times = [
            [numbers.setdefault(config, len(numbers)), timing.us, timing.kind]
            + ([] if timing.short_us is None else [timing.short_us])
            for config, timing in part.times.items()
        ]
        rejected = [[numbers.setdefault(config, len(numbers)), reason] for config, reason in part.rejected.items()]
        specs[str(part.spec)] = {"us": times, "rejected": rejected}
    configs = [str(config) for config in numbers]
    data = {"schema": SCHEMA, "gpu": table.gpu, "env": dict(table.env), "configs": configs, "specs": specs}
    target = path or table.path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))


class _Reader:
    """Checks the parsed JSON of one file part by part."""

    def __init__(self, path: Path, data: Any) -> None:
        self.path, self.data = path, data

    def table(self) -> Table:
        data = self.data
        self.check(isinstance(data, dict), "expected a JSON object")
        schema = data.get("schema")
        self.check(schema == SCHEMA, f"schema is {schema!r}; this doratune reads schema {SCHEMA}")
        for name, kind in (("gpu", str), ("env", dict), ("configs", list), ("specs", dict)):
            self.check(isinstance(data.get(name), kind), f"{name} is missing, or no {kind.__name__}")
        texts = data["configs"]
        self.check(all(isinstance(text, str) for text in texts), "configs has an element that is no text")
        configs = [Config.parse(text) for text in texts]
        self.check(len(set(configs)) == len(configs), "configs has a config twice")
        specs = {}
        for text, part in data["specs"].items():
            spec = KernelSpec.parse(text)
            self.check(spec.gpu == data["gpu"], f"{text} is for another GPU than the table's, {data['gpu']}")
            specs[spec] = self.spec_table(spec, part, configs)
        self.check(bool(specs), "no specs")
        ops = {spec.op for spec in specs}
        self.check(len(ops) == 1, f"specs of several operations: {', '.join(sorted(ops))}")
        env = {str(name): str(value) for name, value in data["env"].items()}
        return Table(self.path, data["gpu"], ops.pop(), env, specs)

    def spec_table(self, spec: KernelSpec, part: Any, configs: list[Config]) -> SpecTable:
        self.check(
            isinstance(part, dict) and isinstance(part.get("us"), list) and isinstance(part.get("rejected", []), list),
            f"{spec}: expected an object with the lists us and rejected",
        )
        times: dict[Config, Timing] = {}
        for row in part["us"]:
            shaped = isinstance(row, list) and len(row) in (3, 4)
            self.check(shaped, f"{spec}: {row!r} is not [config, microseconds, kind]")
            config = self.config(spec, row[0], configs)
            kind = row[2]
            for us in (row[1], *row[3:]):
                valid = isinstance(us, (int, float)) and not isinstance(us, bool) and 0.0 < us < float("inf")
                self.check(valid, f"{spec}: {config} takes {us!r} microseconds, not a positive number")
            self.check(kind in KINDS, f"{spec}: {config} has kind {kind!r}, none of {', '.join(map(str, KINDS))}")
            self.check(config not in times, f"{spec}: {config} is there twice")
            times[config] = Timing(float(row[1]), kind, float(row[3]) if len(row) == 4 else None)
        self.check(any(timing.kind != CENSORED for timing in times.values()), f"{spec}: no config with a measured time")
        rejected: dict[Config, str] = {}
        for row in part.get("rejected", []):
            self.check(isinstance(row, list) and len(row) == 2, f"{spec}: {row!r} is not [config, reason]")
            config = self.config(spec, row[0], configs)
            self.check(config not in times, f"{spec}: {config} is both measured and rejected")
            rejected[config] = str(row[1])
        return SpecTable(spec, times, rejected)

    def config(self, spec: KernelSpec, number: Any, configs: list[Config]) -> Config:
        valid = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(configs)
        self.check(valid, f"{spec}: {number!r} is no index of the {len(configs)} configs")
        return configs[int(number)]

    def check(self, holds: bool, complaint: str) -> None:
        if not holds:
            raise TableError(f"{self.path}: {complaint}; record it again or restore the file")
