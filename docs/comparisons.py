"""What the committed measurements say of doratune beside each peer: ratios by case, and when they were measured.

A comparison is of two rows of one case and one file, which were timed in turn. ``benefits.py`` makes pages of them.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import RESULTS

Row = dict[str, Any]
OURS, COMPILED = "doratune", "_compiled"
PARTS = ("cublas_product", "cublas_base", "copy", "h_grouped", "h_separate", "read", "products", "torch")
"""Peers that do less than the operation: what the rest costs, no other way to do it."""
OWN = ("unchecked", "launch", "hit", "doratune_tracked")
"""Parts of doratune's own call, and a choice that changes what is computed."""
CODE = ("codegen", "templates", "runtime", "nn", "integrations")
"""The folders whose code a step runs."""
_CASE = ("bench", "model", "op", "shape", "rank", "dtype", "adapter", "flags")


@dataclass(frozen=True)
class Source:
    """The file of a measurement: the GPU, the commit and the date that it names."""

    file: str
    gpu: str
    commit: str
    date: str

    @property
    def since(self) -> int | None:
        """The commits since then to the code that a step runs; None where git cannot tell."""
        return commits_since(self.commit)

    @property
    def measured(self) -> str:
        """When it was measured, in words."""
        since = "" if self.since is None else f", {self.since} commits since"
        return f"{self.date}, {self.commit[:7]}{since}"


@dataclass(frozen=True)
class Comparison:
    """doratune's row of a case beside a peer's."""

    source: Source
    ours: Row
    theirs: Row

    @property
    def peer(self) -> str:
        return str(self.theirs["impl"])

    @property
    def ratio(self) -> float:
        """doratune's time over the peer's; the host's in ``bench host``."""
        paired = self.theirs.get("ratio_mean") or self.theirs.get("ratio")
        return float(paired) if paired else time_of(self.ours) / time_of(self.theirs)

    @property
    def spread(self) -> str:
        """How far the ratio goes: its 95 % interval, or the 20th to 80th percentile of the rounds; empty if unknown."""
        for low, high, what in (("ratio_low", "ratio_high", "95 %"), ("ratio_p20", "ratio_p80", "p20 to p80")):
            if self.theirs.get(low) is not None:
                return f"{self.theirs[low]:.3f} to {self.theirs[high]:.3f} ({what})"
        return ""

    def share(self, field: str) -> float | None:
        """A field of doratune's row over the peer's."""
        mine, other = self.ours.get(field), self.theirs.get(field)
        return mine / other if mine is not None and other else None


@dataclass(frozen=True)
class Measured:
    """All rows of one GPU's files, each with its source."""

    rows: tuple[tuple[Source, Row], ...]

    @functools.cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """doratune beside every peer that does the whole operation, in every file."""
        cases: dict[object, dict[str, Row]] = {}
        for source, row in self.rows:
            cases.setdefault((source, case_of(row)), {})[row["impl"]] = row
        found = []
        for (source, _), rows in ((key, rows) for key, rows in cases.items() if isinstance(key, tuple)):
            for impl, row in rows.items():
                # A whole model is compared with doratune compiled, too; a kernel is the same either way.
                whole = row["bench"] in ("model", "layer")
                ours = rows.get(OURS + COMPILED if whole and impl.endswith(COMPILED) else OURS)
                if ours is None or row is ours or impl in PARTS + OWN or not (time_of(ours) and time_of(row)):
                    continue
                found.append(Comparison(source, ours, row))
        return tuple(found)

    def of(self, *benches: str) -> list[Comparison]:
        return [one for one in self.comparisons if one.ours["bench"] in benches]


def read_results(root: Path = RESULTS) -> Measured:
    """Every file of every GPU's folder; those in folders below (before and after a change) are left out, and losses:
    ``bench quality`` compares methods, which ``quality.py`` tells of.
    """
    rows: list[tuple[Source, Row]] = []
    for file in sorted(root.glob("*/*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        env = document["env"]
        source = Source(file.relative_to(root).as_posix(), env["gpu"], env["doratune_commit"], env["date"])
        rows += [(source, row) for row in document["rows"] if row["bench"] != "quality"]
    return Measured(tuple(rows))


def case_of(row: Row) -> tuple[object, ...]:
    """What was measured, without the implementation."""
    values = (row.get(name) for name in _CASE)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def time_of(row: Row) -> float:
    """Microseconds: the GPU's, or the host's where only those were measured; 0 where there are none."""
    return float(row.get("us") or row.get("cpu_us") or 0.0)


def newest(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Of comparisons of one case with one peer on one GPU those measured last: all of them, where several were."""
    latest: dict[object, list[Comparison]] = {}
    for one in comparisons:
        found = latest.setdefault((gpu_of(one.source), case_of(one.ours), one.peer), [])
        if found and age(one.source) < age(found[0].source):
            found.clear()
        if not found or age(one.source) == age(found[0].source):
            found.append(one)
    return [one for found in latest.values() for one in found]


def age(source: Source) -> tuple[int, ...]:
    """Sorts what was measured last first."""
    since = 10**9 if source.since is None else source.since
    return (*(-int(part) for part in source.date.split("-")), since)


def gpu_of(source: Source) -> str:
    """The name of a file's folder, which is the GPU's name in specs."""
    return source.file.split("/")[0]


def size_of(model: str | None) -> float:
    """The billions of parameters in a model's name, to sort by; 0 where it has none."""
    found = re.findall(r"(\d+(?:\.\d+)?)b\b", model or "")
    return float(found[-1]) if found else 0.0


def gpus_of(sources: Sequence[Source]) -> list[str]:
    """The folders of these files, in order."""
    return list(dict.fromkeys(gpu_of(source) for source in sources))


@functools.cache
def commits_since(commit: str) -> int | None:
    """How many commits have changed the code that a step runs since ``commit``; None outside of its repository."""
    command = ["git", "rev-list", "--count", f"{commit.removesuffix('-dirty')}..HEAD", "--", *CODE]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(done.stdout)
