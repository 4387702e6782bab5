"""What ``doratune bench mine`` found, for a terminal, for a file, and as Markdown to paste into an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..printable import printable
from .intervals import CONFIDENCE
from .mine import Mine
from .results import COMPILED, OURS, Row, case_of

if TYPE_CHECKING:
    from ..terminal.tables import Table

_NAMES = {"peft_lora": "PEFT LoRA", "peft_dora": "PEFT DoRA", OURS: "doratune"}
_OPS = {"step": "training step", "inference": "forward without gradients", "decode": "one more token"}
_ADAPTERS = {"autocast": "fp32 adapters under autocast", "": "bf16 adapters"}
_BAR = 16
"""Characters of a bar in the table."""


@dataclass(frozen=True)
class Case:
    """The rows of contenders that were timed in turn, and what they did."""

    title: str
    rows: tuple[Row, ...]

    @property
    def slowest_us(self) -> float:
        return max(float(row["us"]) for row in self.rows)


def cases_of(rows: Iterable[Row]) -> list[Case]:
    """The cases of the rows, in their order."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(case_of(row), []).append(row)
    return [Case(_title(group[0]), tuple(group)) for group in groups.values()]


def name_of(impl: str) -> str:
    """The name of a contender for people."""
    plain = impl.removesuffix(COMPILED)
    return _NAMES.get(plain, plain) + (", compiled" if impl.endswith(COMPILED) else "")


def ratio_text(row: Row) -> str:
    """doratune's time over this row's, with its interval; empty where there is none."""
    if row.get("ratio_mean") is None:
        return ""
    return f"{row['ratio_mean']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


def place_of(mine: Mine, env: Mapping[str, str]) -> str:
    """The GPU's name."""
    return env["gpu"] if mine.device == "cuda" else "a CPU"


def verdict(row: Row) -> str:
    """The interval in words."""
    if row.get("ratio_mean") is None:
        return ""
    if row["ratio_high"] < 1.0:
        return "doratune is faster"
    return "doratune is slower" if row["ratio_low"] > 1.0 else "no difference shown"


def mine_table(mine: Mine) -> Table:
    """One line for each contender of each case, with a bar of its time."""
    from ..terminal.tables import Table, bar

    percent = f"{CONFIDENCE:.0%}"
    table = Table("what", "contender", "ms", "", f"doratune's time over it ({percent})", "", "peak MB", "rounds")
    for case in cases_of(mine.outcome.rows):
        for place, row in enumerate(case.rows):
            table.add_row(
                case.title if place == 0 else "",
                name_of(row["impl"]),
                f"{row['us'] / 1e3:.2f}",
                bar(row["us"] / case.slowest_us, _BAR),
                ratio_text(row),
                verdict(row),
                "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                row["rounds"],
            )
        table.add_section()
    return table


def markdown(mine: Mine, env: Mapping[str, str]) -> str:
    """The result as Markdown: model, GPU, versions, commit, times, ratios with intervals, memory, what was left out."""
    rows = mine.outcome.rows
    lines = [f"**doratune bench mine: {_code(mine.name)}** on {_plain(place_of(mine, env))}: {_sizes(mine)}.", ""]
    head = ("what", "contender", "ms", "doratune's time over it", "peak MB above the weights")
    lines += [_line(head), _line(["---", "---", "---:", "---:", "---:"])]
    for case in cases_of(rows):
        for row in case.rows:
            memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            lines.append(_line([case.title, name_of(row["impl"]), f"{row['us'] / 1e3:.2f}", ratio_text(row), memory]))
    lines += ["", " ".join(_sentences(mine, env))]
    return "\n".join(lines) + "\n"


def values(mine: Mine, env: Mapping[str, str]) -> dict[str, Any]:
    """The result for JSON: a results file's fields, and more."""
    return {
        "env": dict(env),
        "rows": mine.outcome.rows,
        "model": {"name": mine.name, "layers": mine.layers, "all_layers": mine.all_layers},
        "cuts": mine.cuts,
        "notes": list(dict.fromkeys(mine.outcome.notes)),
        "failures": mine.outcome.failures,
        "seconds": mine.seconds,
        "markdown": markdown(mine, env),
    }


def _title(row: Row) -> str:
    flags = [flag for flag in row["flags"] if flag not in ("autocast", "checkpointing")]
    adapters = _ADAPTERS["autocast" if "autocast" in row["flags"] else ""]
    layers, count = row["shape"]
    size = f"{layers} layer{'s' if layers > 1 else ''}, {count} {'sequences' if row['op'] == 'decode' else 'tokens'}"
    return ", ".join([_OPS[row["op"]], size, adapters, *flags])


def _sizes(mine: Mine) -> str:
    asked, request = mine.asked, mine.request
    whole = f"all {mine.all_layers}" if mine.layers == mine.all_layers else f"{mine.layers} of {mine.all_layers}"
    parts = [f"{whole} decoder layers with random weights", f"rank {asked.rank} on every linear layer"]
    parts += [f"{request.batch} × {request.seq} tokens", f"base weights {asked.quant or 'bf16'}"]
    return ", ".join([*parts, "gradient checkpointing in the step" if request.checkpointing else "no checkpointing"])


def _sentences(mine: Mine, env: Mapping[str, str]) -> list[str]:
    rounds = sorted({row["rounds"] for row in mine.outcome.rows})
    names = ("driver", "torch", "triton", "peft", "transformers", "liger_kernel")
    versions = ", ".join(f"{name} {_plain(env[name])}" for name in names if env.get(name))
    said = [f"{versions}; doratune {_plain(env['doratune_commit'])}, {env['date']}."]
    if mine.device == "cpu":
        said.append("Measured on a CPU: these times mean nothing.")
    count = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    said.append(
        f"Contenders of one case ran in turn in one process, {count} rounds. In brackets: the {CONFIDENCE:.0%} "
        "interval of the mean ratio over the rounds (trimmed, of logarithms); another process may differ by more."
    )
    said += [f"Cut: {_plain(cut)}." for cut in mine.cuts]
    said += [f"Note: {_plain(note)}." for note in dict.fromkeys(mine.outcome.notes)]
    said += [f"Inaccurate: {_plain(failure)}." for failure in mine.outcome.failures]
    return said


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if set(cell) <= {*'-:'} else _plain(cell) for cell in cells)} |"


def _plain(text: object) -> str:
    """A text that Markdown shows as it is: no link, no mention, no table cell, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#@~])", r"\\\1", printable(text)).rstrip(".")


def _code(text: object) -> str:
    """A text as code."""
    return f"`{printable(text).replace('`', '')}`"
