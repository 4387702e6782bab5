"""Rows of measurements: their fields, the environment they are valid for, and files and tables of rows.

A row is one implementation on one case. ``case_of`` names the fields that make a case; rows of one case and one run
were measured in the same process and in turn, and may be compared.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..codegen.spec import FLAGS, KernelSpec
from ..errors import UsageError
from ..printable import brief, shortened
from ..text_file import json_type, read_object, reason_of
from ..tuner.measure import driver_version

if TYPE_CHECKING:
    from ..terminal.tables import Table

SCHEMA = 1
OURS = "doratune"
_MOST_PATH = 200
"""Characters of a path in a message."""

COMPILED = "_compiled"
"""Ends the names of implementations under torch.compile."""

UNCHECKED = "unchecked"
"""The call of doratune's own layers, which have checked their tensors: a ``load_kernel`` hit and ``Kernel.launch``."""
_CASE = ("bench", "model", "op", "shape", "rank", "dtype", "adapter", "flags")

Row = dict[str, Any]


@dataclass
class Outcome:
    """The rows of a run, notes on peers that were left out, and doratune's inaccurate kernels."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def case_of(row: Mapping[str, Any]) -> tuple[object, ...]:
    """The case of a row: what was measured, without the implementation. Missing fields count as empty."""
    values = (row.get(name) for name in _CASE)
    return tuple((tuple(value) if isinstance(value, list) else value) or None for value in values)


def case_name(row: Mapping[str, Any]) -> str:
    """The case as text: ``weight_norm 4096×4096 r=384 bf16``; adapters and flags only where they differ."""
    parts = [row.get("model"), row["op"], "×".join(map(str, row["shape"]))]
    parts += [f"r={row['rank']}" if row["rank"] else None, row["dtype"]]
    if row.get("adapter") not in (None, row["dtype"]):
        parts.append(f"{row['adapter']} adapters")
    return " ".join([*filter(None, parts), *(row.get("flags") or ())])


def spec_columns(spec: KernelSpec, tokens: int) -> Row:
    """The fields of a row that a kernel's spec and its number of tokens give."""
    sizes = (tokens, *spec.widths, spec.d_in)
    return {
        "op": spec.op,
        "shape": [size for size in sizes if size],
        "rank": spec.rank or None,
        "dtype": spec.weight or spec.activation,
        "adapter": spec.adapter or None,
        "flags": [flag for flag in FLAGS if getattr(spec, flag)],
    }


def timing(samples_us: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile of microseconds, under the names that rows have."""
    several = len(samples_us) > 1
    low, *_, high = statistics.quantiles(samples_us, n=5, method="inclusive") if several else [samples_us[0]] * 2
    return {"us": statistics.median(samples_us), "us_p20": low, "us_p80": high}


def environment(commit: str | None = None, **peers: str) -> dict[str, str]:
    """What the results are valid for: GPU, driver, versions of packages and ``peers``, commit and date.

    ``commit`` is read from git when None; outside a checkout it is the version.
    """
    versions = {"torch": str(torch.__version__)}
    for package in ("triton", "peft", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "driver": driver_version() if gpu else "none",
        **versions,
        **peers,
        "doratune_commit": measured_commit(commit),
        "date": date.today().isoformat(),
    }


def measured_commit(commit: str | None = None) -> str:
    """``commit``, or that of the checkout that this file is tracked in, or the version."""
    if commit is not None:
        return commit

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository around the environment
        return git("describe", "--always", "--dirty", "--abbrev=40").strip()
    except (OSError, subprocess.CalledProcessError):
        return f"{__version__}, not a git checkout"


def document(env: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The results as JSON text."""
    return json.dumps({"schema": SCHEMA, "env": env, "rows": rows}, indent=1) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        UsageError: it is not one.
    """
    return read_document(path)[1]


def read_document(path: Path) -> tuple[Any, list[Row]]:
    """The environment that a results file names, whatever it is, and its rows, which have ``bench``, ``op`` and
    ``impl``.

    Raises:
        UsageError: it is not a results file of this schema.
    """
    try:
        data = read_object(path)
        for name in ("schema", "rows"):
            if name not in data:
                raise ValueError(f"it has no field {name!r}")
        if not isinstance(data["rows"], list):
            raise ValueError(f"expected a list of rows, found {json_type(data['rows'])}")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{shown(path)} is not a results file of doratune bench: {reason_of(error)}; name one that "
            "`doratune bench` wrote"
        ) from error
    schema, rows = data["schema"], data["rows"]
    if type(schema) is not int or schema != SCHEMA:
        raise UsageError(
            f"{shown(path)} has schema {brief(schema)}, and this doratune reads schema {SCHEMA}; measure again with it"
        )
    for number, row in enumerate(rows, 1):
        lacking = ("bench", "op", "impl") if not isinstance(row, dict) else {"bench", "op", "impl"} - row.keys()
        if lacking:
            what = json_type(row) if not isinstance(row, dict) else f"an object without {', '.join(sorted(lacking))}"
            raise UsageError(
                f"{shown(path)}: row {number} is no result but {what}; name a file that `doratune bench` wrote"
            )
    return data.get("env"), rows


def shown(path: Path) -> str:
    """A path in a message, shortened; the empty one is the current folder."""
    return shortened(str(path), _MOST_PATH)


def results_table(rows: Iterable[Row]) -> Table:
    """One line a case: doratune's time, then every peer's as a multiple of it; plain times where doratune is absent."""
    from ..terminal.tables import Table

    table = Table("case", "doratune", "floor", "peers (× doratune's time)", "peak MB: doratune / peers")
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    for group in cases.values():
        ours = next((row for row in group if row["impl"] == OURS and _us(row)), None)
        peers = [row for row in group if row is not ours and _us(row)]
        times = [
            f"{peer['impl']} {_us(peer) / _us(ours):.2f}" if ours else f"{peer['impl']} {_time(_us(peer))}"
            for peer in peers
        ]
        table.add_row(
            case_name(group[0]),
            _time(_us(ours)) if ours else "",
            _time(group[0].get("floor_us")),
            ", ".join(times),
            " / ".join([_megabytes(ours), ", ".join(map(_megabytes, peers))]),
        )
    return table


def counterpart(impl: str) -> str:
    """The name of doratune's implementation that ``impl`` is compared with: both under torch.compile, or neither."""
    return OURS + COMPILED if impl.endswith(COMPILED) else OURS


def ratios_table(rows: Iterable[Row]) -> Table:
    """One line for each case and peer: doratune's time, peak memory, launches and host time over the peer's.

    Of the time also the 20th and 80th percentile over the rounds. Cases without doratune have no line.
    """
    from ..terminal.tables import Table

    table = Table("case", "doratune over", "time", "p20 to p80", "peak memory", "launches", "host time")
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    for group in cases.values():
        by_impl = {row["impl"]: row for row in group}
        for row in group:
            ours = by_impl.get(counterpart(row["impl"]))
            if ours is None or row.get("ratio") is None:
                continue
            low, high = row.get("ratio_p20"), row.get("ratio_p80")
            table.add_row(
                case_name(row),
                row["impl"],
                f"{row['ratio']:.3f}",
                "" if low is None or high is None else f"{low:.3f} to {high:.3f}",
                *(_over(ours, row, name) for name in ("peak_mb", "launches", "host_us")),
            )
    return table


def _over(ours: Row, theirs: Row, name: str) -> str:
    mine, other = ours.get(name), theirs.get(name)
    return f"{mine / other:.3f}" if mine is not None and other else ""


def _us(row: Row) -> float:
    """The GPU's time of a row, the host's in ``bench host``; 0 where there is none."""
    return row["us"] or (row.get("cpu_us") if row["bench"] == "host" else None) or 0.0


def _time(us: float | None) -> str:
    if us is None:
        return ""
    return f"{us:.1f} µs" if us < 1e4 else f"{us / 1e3:.1f} ms"


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row.get("peak_mb") is None else f"{row['peak_mb']:.0f}"
