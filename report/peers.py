"""Results files of ``doratune bench``: doratune beside its peers, each case on one run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks.results import OURS, Row, case_name, case_of, counterpart, read_rows
from ..printable import printable, shortened
from ..tuner.text_file import read_text

_MOST_TEXT = 200
_TEXTS = ("bench", "op", "impl", "dtype")
_NUMBERS = ("us", "us_p20", "us_p80", "cpu_us", "floor_us", "ratio", "ratio_p20", "ratio_p80", "peak_mb", "busy_us")
_SHARES = ("exact", "bounded", "bound > 10 %", "no bound")
_ENVIRONMENT = ("gpu", "driver", "torch", "triton", "peft", "transformers", "doratune_commit", "date")


@dataclass(frozen=True)
class Results:
    """A results file: its path, the environment that it names, and its rows with fields of known types."""

    path: str
    env: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def values(self) -> dict[str, Any]:
        """The file as values for JSON, without its rows."""
        return {"path": self.path, "env": dict(self.env), "rows": len(self.rows)}


@dataclass(frozen=True)
class Comparison:
    """One peer on one case: microseconds of doratune and of the peer, measured in turn in the run of ``source``."""

    source: str
    bench: str
    op: str
    case: str
    peer: str
    ours_us: float
    us: float
    low: float | None = None
    high: float | None = None
    """The 20th and 80th percentile of :attr:`ratio` over the rounds, where the file has them."""

    @property
    def ratio(self) -> float:
        """The peer's time over doratune's: above 1 doratune is faster."""
        return self.us / self.ours_us

    def values(self) -> dict[str, Any]:
        """The comparison as values for JSON."""
        return {**vars(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Share:
    """Of the kernels of random models on a GPU: the shares with an entry of their own, with a bound, without one."""

    gpu: str
    op: str
    kernels: int
    shares: Mapping[str, float]


def read_results(path: Path) -> Results:
    """Read a results file. Fields of other types than ``doratune bench`` writes are left out.

    Raises:
        UsageError: it is not a results file.
    """
    rows = tuple(_clean(row) for row in read_rows(path))
    told = json.loads(read_text(path)).get("env")
    env = told if isinstance(told, dict) else {}
    known = {name: _text(env[name]) for name in _ENVIRONMENT if isinstance(env.get(name), str)}
    return Results(str(path), known, rows)


def comparisons(results: Iterable[Results]) -> tuple[list[Comparison], int]:
    """Every peer beside doratune, and how many rows have no doratune beside them on their case."""
    found: list[Comparison] = []
    alone = 0
    for file in results:
        cases: dict[tuple[object, ...], list[Row]] = {}
        for row in file.rows:
            if row["time"] is not None:
                cases.setdefault(case_of(row), []).append(row)
        for group in cases.values():
            by_impl = {row["impl"]: row for row in group}
            for row in group:
                ours = by_impl.get(counterpart(row["impl"]))
                if ours is row:
                    continue
                if ours is None:
                    alone += 1
                    continue
                found.append(_compare(file, ours, row))
    return found, alone


def _compare(file: Results, ours: Row, row: Row) -> Comparison:
    # The file's ratio is doratune's time over the peer's, so its low end is this one's high end.
    low, high = row["ratio_p80"], row["ratio_p20"]
    return Comparison(
        file.name,
        row["bench"],
        row["op"],
        case_name(row),
        row["impl"],
        ours["time"],
        row["time"],
        None if low is None else 1.0 / low,
        None if high is None else 1.0 / high,
    )


def shares_of(results: Iterable[Results]) -> list[Share]:
    """The rows of ``doratune bench coverage``: ``all`` operations, then each."""
    return [
        Share(file.env.get("gpu", ""), row["impl"], row["kernels"], {name: row[name] for name in _SHARES})
        for file in results
        for row in file.rows
        if row["bench"] == "coverage" and all(row[name] is not None for name in _SHARES)
    ]


def our_steps(results: Iterable[Results]) -> list[tuple[Results, Row]]:
    """The rows in which doratune's training step of a model was timed, with their files."""
    wanted = {"bench": "model", "op": "step", "impl": OURS}
    return [
        (file, row)
        for file in results
        for row in file.rows
        if row["us"] is not None and all(row[name] == value for name, value in wanted.items())
    ]


def _clean(row: Mapping[str, Any]) -> Row:
    """A row with every field that is read here, each of its type or empty."""
    model, adapter, rank, kernels = (row.get(name) for name in ("model", "adapter", "rank", "kernels"))
    clean: Row = {name: _text(row.get(name, "")) for name in _TEXTS}
    clean |= {
        "model": _text(model) if isinstance(model, str) else None,
        "adapter": _text(adapter) if isinstance(adapter, str) else None,
        "rank": rank if _is_size(rank) else None,
        "kernels": kernels if _is_size(kernels) else 0,
        "shape": [size for size in _list(row.get("shape")) if _is_size(size)],
        "flags": [_text(flag) for flag in _list(row.get("flags")) if isinstance(flag, str)],
        **{name: _number(row.get(name)) for name in _NUMBERS},
        **{name: _share(row.get(name)) for name in _SHARES},
    }
    clean["time"] = clean["cpu_us"] if clean["bench"] == "host" else clean["us"]
    return clean


def _list(value: object) -> Sequence[Any]:
    return value[:64] if isinstance(value, list) else []


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _number(value: object) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < 1e15
    return float(value) if known else None  # type: ignore[arg-type]


def _share(value: object) -> float | None:
    known = isinstance(value, (int, float)) and math.isfinite(value) and 0.0 <= value <= 1.0
    return float(value) if known else None  # type: ignore[arg-type]


def _text(value: object) -> str:
    return printable(shortened(str(value), _MOST_TEXT))
