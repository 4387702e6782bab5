"""Tables of the committed measurements as Markdown: ``benchmarks/results/<gpu>/*.json``, ``cpu`` without a GPU.

python docs/figures.py benchmarks/results/h200/model.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OURS, PEFT = "doratune", "peft_eager"

Row = dict[str, Any]
Cases = dict[tuple[str, str], dict[str, Row]]
"""The rows by what was measured (sizes, and dtypes with flags) and by implementation."""


@dataclass(frozen=True)
class Table:
    """A title and lines of cells, the first line being the head."""

    title: str
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        head, *body = self.lines
        rule = ("---", "---", *("---:" for _ in head[2:]))
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body)) + "\n"


def read(*files: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """The environments and the rows of result files; of several files, ``run`` names the one that a row is from."""
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [
        {**row, "run": file.stem if len(files) > 1 else ""}
        for file, document in zip(files, documents, strict=True)
        for row in document["rows"]
    ]
    return [document["env"] for document in documents], rows


def environment(envs: Sequence[dict[str, Any]]) -> str:
    """What was measured where and when, in a line."""
    env = envs[0]
    names = {"torch": "PyTorch", "triton": "Triton", "peft": "PEFT", "transformers": "transformers"}
    versions = ", ".join(f"{name} {env[key]}" for key, name in names.items() if env.get(key))
    commits = " and ".join(sorted({each["doratune_commit"][:7] for each in envs}))
    where = f"{env['cpu']} processor, no GPU" if "cpu" in env else f"{env['gpu']}, driver {env['driver']}"
    return f"{where}, {versions}; doratune {commits}, {env['date']}."


def tables(rows: Sequence[Row], only: str | None = None) -> list[Table]:
    """The tables of each benchmark and operation, or those of the operation ``only``."""
    groups: dict[tuple[str, str], Cases] = {}
    for row in rows:
        if only in (None, row["op"]):
            cases = groups.setdefault((row["bench"], row["op"]), {})
            cases.setdefault((_sizes(row), _dtypes(row)), {})[row["impl"]] = row
    return [table for (bench, op), cases in groups.items() for table in _tables(bench, op, cases)]


def markdown(files: Sequence[Path], only: str | None = None) -> str:
    """The environment and the tables of result files."""
    envs, rows = read(*files)
    return "\n".join([environment(envs), "", *(table.markdown() for table in tables(rows, only))])


def _sizes(row: Row) -> str:
    sizes = "×".join(map(str, row["shape"]))
    return ", ".join(filter(None, [row["run"], row.get("model"), sizes, row["rank"] and f"r = {row['rank']}"]))


def _dtypes(row: Row) -> str:
    adapter = row.get("adapter")
    parts = [row["dtype"], adapter and f"{adapter} adapters", *(row.get("flags") or ())]
    if row["bench"] == "quality":
        parts += [f"rate {row['rate']:g}"] if row["op"] == "learning-rate" else []
        parts += [f"seed {row['seed']}"] if row["op"] in ("adapt", "precision") else []
        parts += [f"against {row['against']}"] if "against" in row else []
    return ", ".join(filter(None, parts))


def _tables(bench: str, op: str, cases: Cases) -> list[Table]:
    names = list(dict.fromkeys(name for by_name in cases.values() for name in by_name))
    if bench == "kernels":
        return [_beside_peers(op, names, cases)]
    if bench == "search":
        return [_searches(op, cases)]
    if bench == "coverage":
        return [_columns(f"{op}: shares of the kernels of random models", _COVERAGE_FIGURES, cases)]
    if bench == "quality":
        return [_every(f"{op}: {_QUALITY[op]}", cases, {name: _quality(name, op) for name in names})]
    if bench == "host":
        return [_every(f"{op}: host time of a call, µs", cases, {name: _cell(name, "cpu_us", 1) for name in names})]
    if bench in ("model", "layer"):
        times = {name: _cell(name, "us", 1 if bench == "model" else 3, 1e-3) for name in names}
        memory = {name: _cell(name, "peak_mb", 0) for name in names}
        tables = [_every(f"{op}: time, ms", cases, times)]
        rest = [("peak memory above the weights, MB", memory)]
        if bench == "model":
            rest.append(("the host's own time, ms", {name: _cell(name, "host_us", 1, 1e-3) for name in names}))
            rest.append(("kernel launches", {name: _cell(name, "launches", 0) for name in names}))
            rest.append(("accelerate, ms", {name: _cell(name, "accelerate_us", 0, 1e-3) for name in names}))
        for title, columns in rest:
            if any(cell(by_name) for cell in columns.values() for by_name in cases.values()):
                tables.append(_every(f"{op}: {title}", cases, columns))
        return tables
    return [_every(f"{op}: GPU time, µs", cases, {name: _cell(name, "us", 1) for name in names})]


Cell = Callable[[dict[str, Row]], str]


def _cell(name: str, field: str, digits: int, scale: float = 1.0) -> Cell:
    def cell(by_name: dict[str, Row]) -> str:
        value = by_name[name].get(field) if name in by_name else None
        return "" if value is None else f"{value * scale:.{digits}f}"

    return cell


def _beside_peers(op: str, names: Sequence[str], cases: Cases) -> Table:
    """doratune's time and floor, each peer's time over doratune's, memory, and the variant that ran."""

    def over_ours(peer: str) -> Cell:
        return lambda by_name: f"{by_name[peer]['us'] / by_name[OURS]['us']:.2f}" if peer in by_name else ""

    columns = {"µs": _cell(OURS, "us", 1), "floor µs": _cell(OURS, "floor_us", 1)}
    columns |= {peer: over_ours(peer) for peer in names if peer != OURS}
    columns |= {f"{name}, MB": _cell(name, "peak_mb", 1) for name in (OURS, PEFT) if name in names}
    columns["variant"] = lambda by_name: (by_name[OURS]["config"] or "").split(":")[0]
    measured = {case: by_name for case, by_name in cases.items() if OURS in by_name}
    return _every(f"{op}: doratune's GPU time, and the peers' as multiples of it", measured, columns)


_SEARCH_FIGURES: dict[str, Callable[[Row], str]] = {
    "searches": lambda row: f"{row['searches']}",
    "kernels": lambda row: f"{row['specs']}",
    "regret ≤ 1.01": lambda row: f"{row['within_1']:.1%}",
    "95 % interval": lambda row: f"{row['within_1_low']:.1%} to {row['within_1_high']:.1%}",
    "regret, median": lambda row: f"{row['median']:.3f}",
    "regret, 95th percentile": lambda row: f"{row['p95']:.3f}",
    "regret, worst": lambda row: f"{row['worst']:.3f}",
    "candidates evaluated, mean": lambda row: f"{row['evaluated']:.1f}",
    "of them compiled for this kernel": lambda row: f"{row['compiled']:.1f}",
    "candidates until one is within 1 %, median": lambda row: "" if row["until"] is None else f"{row['until']:.0f}",
}


def _searches(op: str, cases: Cases) -> Table:
    """A column for each way to search, a line for each figure; what needs no search lacks some."""
    return _columns(f"{op}: searches on recorded tables", _SEARCH_FIGURES, cases)


_COVERAGE_FIGURES: dict[str, Callable[[Row], str]] = {
    "kernels looked up": lambda row: f"{row['kernels']}",
    "an entry of its own": lambda row: f"{row['exact']:.1%}",
    "bound ≤ 10 %": lambda row: f"{row['bounded']:.1%}",
    "a larger bound": lambda row: f"{row['bound > 10 %']:.1%}",
    "no bound": lambda row: f"{row['no bound']:.1%}",
    "covered: the first two": lambda row: f"{row['covered']:.1%}",
    "draws whose kernels are all covered": lambda row: f"{row['whole_draws']:.1%}",
}


_QUALITY = {
    "corpus": "bytes that are trained on, that the learning rate is chosen on, that are reported on",
    "pretrain": "loss of the pre-trained model on the other domain, nats per byte",
    "learning-rate": "loss on the validation split, nats per byte",
    "adapt": "loss on the test split, nats per byte",
    "precision": "loss on the test split, nats per byte",
    "clock": "milliseconds of a training step, in turn",
    "reached": "mean loss on the test split, nats per byte, 95 % interval, learning rate, ms a step",
    "equal-steps": "difference of the loss after equal steps, nats per byte, 95 % interval, Holm's p",
    "equal-time": "difference of the loss after equal time, nats per byte, 95 % interval, Holm's p",
    "curve-distance": "root mean square distance to the fp32 curve, nats per byte, 95 % interval",
    "curve-distance-difference": "difference of these distances, nats per byte, 95 % interval, Holm's p",
}
"""What the cells of each kind of row are; benchmarks/README.md says how it was found."""


def _quality(name: str, op: str) -> Cell:
    def cell(by_name: dict[str, Row]) -> str:
        row = by_name.get(name)
        if row is None:
            return ""
        if op == "corpus":
            return ", ".join(map(str, row["bytes"].values()))
        if op == "clock":
            return f"{row['step_ms']:.1f}"
        if "mean" not in row:
            return "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        form = ("+" if "against" in row else "") + (".2g" if op.startswith("curve") else ".4f")
        parts = [
            f"{row['mean']:{form}}" + ("" if row["low"] is None else f" ({row['low']:{form}} to {row['high']:{form}})")
        ]
        parts += [f"p {row['p_holm']:.2g}"] if row.get("p_holm") is not None else []
        parts += [f"rate {row['rate']:g}"] if "rate" in row else []
        parts += [f"{row['step_ms']:.1f} ms"] if row.get("step_ms") is not None else []
        parts += [row["says"]] if "says" in row else []
        parts += ["edge of the grid"] if row.get("edge") else []
        return ", ".join(parts + ([f"{row['diverged']} diverged"] if row.get("diverged") else []))

    return cell


def _columns(title: str, figures: dict[str, Callable[[Row], str]], cases: Cases) -> Table:
    """A column for each implementation, a line for each figure; a cell is empty where a row lacks the figure."""
    (by_name,) = cases.values()
    lines = []
    for figure, text in figures.items():
        cells = []
        for row in by_name.values():
            try:
                cells.append(text(row))
            except KeyError:
                cells.append("")
        lines.append((figure, "", *cells))
    return Table(title, (("figure", "", *by_name), *lines))


def _every(title: str, cases: Cases, columns: dict[str, Cell]) -> Table:
    lines = [(*case, *(cell(by_name) for cell in columns.values())) for case, by_name in cases.items()]
    return Table(title, (("sizes", "dtypes", *columns), *lines))


if __name__ == "__main__":
    print(markdown([*map(Path, sys.argv[1:])]))
