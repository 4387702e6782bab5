"""Results files of ``doratune bench``: doratune beside its peers, each case on one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..benchmarks.results import OURS, Row, case_name, case_of, counterpart, read_document
from ..printable import printable, shortened

_MOST_TEXT = 200
_TEXTS = ("bench", "op", "impl", "dtype")
_NUMBERS = ("us", "us_p20", "us_p80", "cpu_us", "floor_us", "ratio", "ratio_p20", "ratio_p80", "peak_mb", "busy_us")
_SHARES = ("exact", "bounded", "bound > 10 %", "no bound")
_LEAST, _MOST = 1e-6, 1e15
"""Bounds of a time in µs, a ratio or megabytes: ratios of two of them are finite, and no result is beyond them."""
_ROUNDING = 0.01
"""By which shares of one whole may miss 1: figures of a file may be rounded."""
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
    told, read = read_document(path)
    rows = tuple(map(_clean, read))
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
            by_impl = {row["impl"]: row for row in group}  # of rows of one name, as of two runs, the last one counts
            for row in by_impl.values():
                ours = by_impl.get(counterpart(row["impl"]))
                if ours is row:
                    continue
                if ours is None:
                    alone += 1
                    continue
                found.append(_compare(file, ours, row))
    return found, alone


def repeated(results: Iterable[Results]) -> int:
    """How many rows have a later one of the same case and implementation in their file, which counts instead."""
    timed = [[(case_of(row), row["impl"]) for row in file.rows if row["time"] is not None] for file in results]
    return sum(len(keys) - len(set(keys)) for keys in timed)


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
        if row["bench"] == "coverage" and _is_whole([row[name] for name in _SHARES])
    ]


def _is_whole(shares: Sequence[float | None]) -> bool:
    """Whether the shares are all known, and together everything."""
    known = [share for share in shares if share is not None]
    return len(known) == len(shares) and abs(sum(known) - 1.0) <= _ROUNDING


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
    return float(value) if _is_number(value) and _LEAST <= value <= _MOST else None


def _share(value: object) -> float | None:
    return float(value) if _is_number(value) and 0.0 <= value <= 1.0 else None


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number and no truth value. It may be an integer of any size, which no float holds, or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    return printable(shortened(str(value), _MOST_TEXT))
