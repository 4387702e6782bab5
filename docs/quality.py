"""What methods of adaptation reached, in words and tables made of one file of ``doratune bench quality`` alone.

python docs/quality.py benchmarks/results/cpu/quality.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from figures import environment

Row = dict[str, Any]
Document = dict[str, Any]

LORA, DORA, PEFT_DORA, FULL = "peft_lora", "doratune", "peft_dora", "full"
METHODS = {
    LORA: "LoRA",
    "peft_rslora": "rsLoRA",
    DORA: "DoRA",
    PEFT_DORA: "DoRA, by PEFT's own code",
    "row_scaled_lora": "LoRA with row scales",
    FULL: "full fine-tuning",
}
ABSENT = "–"


def read(file: Path) -> Document:
    """The document of a results file."""
    document: Document = json.loads(file.read_text(encoding="utf-8"))
    return document


def what_ran(document: Document) -> str:
    """The model, its text, the runs and the environment."""
    base = _one(document, "pretrain")
    size = _size(document)
    trained_on = ", ".join(
        f"{row['bytes']['train'] / 1e6:.1f} MB of {row['impl']}" for row in _rows(document, "corpus")
    )
    runs = Counter(row["op"] for row in document["rows"])
    seeds = _count_text({len({row["seed"] for row in group}) for group in _by_method(_rows(document, "adapt"))})
    return (
        f"{base['parameters'] / 1e6:.2f} million parameters in {size['layers']} layers, d = {size['hidden']}, "
        f"{size['seq']} bytes in a sequence, {size['batch']} sequences in a batch; pre-trained for "
        f"{size['pretrain_steps']} steps, adapted for {size['steps']}. Text: {trained_on}; learning rates are chosen "
        f"on {_held_out(document, 'validation')} and losses reported on {_held_out(document, 'test')} held-out bytes "
        f"of code. {runs['learning-rate']} runs to choose learning rates, {runs['adapt']} adaptations ({seeds} seeds "
        f"of each method), {runs['precision']} runs for the dtypes. {environment([document['env']])}"
    )


def learned(document: Document) -> str:
    """The pre-trained model's losses beside those of counting bytes."""
    base = _one(document, "pretrain")
    lines, all_below = [], True
    for row in _rows(document, "corpus"):
        loss = base[f"{row['impl']}_test_loss"]
        all_below &= loss is not None and loss < row["bigram_loss"]
        counted = [f"{row[name]:.3f}" for name in ("unigram_loss", "bigram_loss")]
        lines.append((row["impl"], *counted, "diverged" if loss is None else f"{loss:.3f}"))
    said = (
        "The pre-trained model predicts both better than counts of pairs of bytes do: it has learned."
        if all_below
        else "The pre-trained model does not predict both better than counts of pairs of bytes do: it has not learned, "
        "and the rest of this page says nothing."
    )
    head = ("test split, nats per byte", "counts of bytes", "counts of pairs", "pre-trained on documentation")
    return f"{said}\n\n{_table(head, lines)}"


def losses(document: Document) -> str:
    """The loss that each method reached at each rank, with its interval, and what adaptation brought at all."""
    reached = _rows(document, "reached")
    start = _one(document, "pretrain")["loss"]
    if start is None:
        return "The pre-trained model diverged: nothing that is adapted from it says anything."
    if not reached:
        return "Every adaptation diverged." if _rows(document, "adapt") else "Not run."
    diverged = {
        (group[0]["impl"], group[0]["rank"]): f"all {len(group)} diverged"
        for group in _by_method(_rows(document, "adapt"))
        if all(row["loss"] is None for row in group)
    }
    ranks = _ranks([*reached, *_rows(document, "adapt")])
    lines = []
    for name, title in METHODS.items():
        of_method = {row["rank"]: row for row in reached if row["impl"] == name}
        told = {rank: _loss(row) for rank, row in of_method.items()}
        told |= {rank: words for (impl, rank), words in diverged.items() if impl == name}
        cells = [told.get(rank, ABSENT) for rank in ranks]
        if None in told:  # full fine-tuning has no rank
            cells = [told[None], *[""] * (len(ranks) - 1)]
        if told:
            lines.append((title, *cells))
    best = min(row["mean"] for row in reached)
    worst = max(row["mean"] for row in reached)
    largest = max((abs(row["mean"]) for row in _against_lora(document) if row["impl"] != FULL), default=0.0)
    said = (
        f"Every adaptation begins at {start:.4f} nats per byte of code and ends between {best:.4f} and {worst:.4f}: it "
        f"lowers the loss by {start - worst:.3f} to {start - best:.3f}. The largest difference between an adapter and "
        f"LoRA of the same rank is {largest:.4f}, {largest / (start - worst):.0%} of the smallest of these gains."
        if worst < start
        else f"Some adaptations end above the {start:.4f} nats per byte of code at which they begin: they did not "
        "learn."
    )
    head = ("mean over seeds, 95 % interval", *(_rank(document, rank) for rank in ranks))
    return f"{said}\n\n{_table(head, lines)}"


def differences(document: Document) -> str:
    """Each difference at equal steps with its interval, and what they say by method."""
    rows = _rows(document, "equal-steps")
    if not rows:
        return "Not run."
    counts = Counter(_sign(row) for row in rows)
    said = [
        f"Of {len(rows)} differences at equal steps {counts['lower'] or 'none'} {_are(counts['lower'])} lower, "
        f"{counts['higher'] or 'none'} {_are(counts['higher'])} higher, and {counts[''] or 'none'} "
        f"{_are(counts[''])} within the intervals or not significant after Holm's correction for "
        f"{max(row['comparisons'] for row in rows)} comparisons. Lower is better.",
    ]
    costs = _costs(document)
    told = [row for row in rows if _sign(row)]
    small = sum(
        abs(row["mean"]) < max(_cost(costs, row["impl"], row), _cost(costs, row["against"], row)) for row in told
    )
    if told:
        said[0] += (
            f" Of the {len(told)} that differ, {small or 'none'} {_are(small)} smaller than what the neighbouring "
            "learning rate costs one of the two methods: there a finer grid could change the outcome."
        )
    for pair in dict.fromkeys((row["impl"], row["against"]) for row in rows):
        of_pair = [row for row in rows if (row["impl"], row["against"]) == pair]
        found = []
        for sign, words in (("lower", "lower"), ("higher", "higher"), ("", "no difference is seen")):
            ranks = [f"r = {row['rank']}" for row in of_pair if _sign(row) == sign]
            found += [f"{words} at {', '.join(ranks)}"] if ranks else []
        said.append(f"- {METHODS[pair[0]]} beside {METHODS[pair[1]]}: {'; '.join(found)}.")
    lines = [
        (
            f"{METHODS[row['impl']]} − {METHODS[row['against']]}",
            f"{row['rank']}",
            _signed(row["mean"]),
            _interval(row),
            ABSENT if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "; ".join([_says(row), *_doubts(row)]),
        )
        for row in rows
    ]
    head = ("difference, nats per byte", "r", "mean", "95 % interval", "Holm's p", "it says")
    return "\n".join([said[0], "", *said[1:], "", _table(head, lines)])


def rates(document: Document) -> str:
    """How the learning rate of each method was found, and how much its neighbours on the grid would have cost."""
    reached = {(row["impl"], row["rank"]): row for row in _rows(document, "reached")}
    costs = _costs(document)
    lines, tried, close = [], [], 0
    for group in _by_method(_rows(document, "learning-rate")):
        first = group[0]
        if (first["impl"], first["rank"]) not in costs:
            continue
        rate, cost = costs[first["impl"], first["rank"]]
        summary = reached.get((first["impl"], first["rank"]))
        half = None if summary is None or summary["low"] is None else (summary["high"] - summary["low"]) / 2.0
        close += cost is not None and half is not None and cost < half
        tried.append(len(group))
        lines.append(
            (
                METHODS[first["impl"]],
                first["rank"] or ABSENT,
                f"{first['parameters']:,}",
                f"{rate:g}",
                len(group),
                ABSENT if cost is None else f"{cost:.4f}",
                "" if summary is None or not summary["edge"] else "at the edge of what was tried",
            )
        )
    if not lines:
        return "Not run."
    said = (
        "The same search for every method and rank, by the loss on the validation split with one seed that no reported "
        f"run has: {_count_text({*tried})} rates, powers of two, until both neighbours of the best are worse. In "
        f"{close} of {len(lines)} searches the better neighbour costs less than half the width of the method's "
        "interval: another seed could have chosen it."
    )
    head = ("method", "r", "trained parameters", "learning rate", "rates tried", "a neighbour costs", "")
    return f"{said}\n\n{_table(head, lines)}"


def equal_time(document: Document) -> str:
    """Whether methods were compared at equal time, and what came out."""
    rows = _rows(document, "equal-time")
    if not rows and _rows(document, "clock"):
        return "Not compared: the time of a step was not taken for every method and rank, or no two of them converged."
    if not rows:
        return (
            "Not measured: the time of a step is taken on a GPU alone. On a CPU doratune runs its reference, whose "
            "time says nothing about its kernels."
        )
    lines = [
        (
            f"{METHODS[row['impl']]} − {METHODS[row['against']]}",
            f"{row['rank']}",
            _signed(row["mean"]),
            _interval(row),
            "; ".join([_says(row), *_doubts(row)]),
        )
        for row in rows
    ]
    times = [
        (
            METHODS[row["impl"]],
            ABSENT if row["rank"] is None else f"{row['rank']}",
            f"{row['step_ms']:.1f}",
            f"{min(row['step_ms_samples']):.1f} to {max(row['step_ms_samples']):.1f}",
        )
        for row in _rows(document, "clock")
    ]
    compared = _table(("difference, nats per byte", "r", "mean", "95 % interval", "it says"), lines)
    return f"{compared}\n\n{_table(('a step of', 'r', 'ms, median', 'all rounds'), times)}"


def precisions(document: Document) -> str:
    """How far the curves of DoRA in bf16 are from that of PEFT in fp32."""
    rows = _rows(document, "curve-distance")
    if not rows:
        return "Not run."
    lines = [
        (METHODS[row["impl"]], _kept(row), f"{row['mean']:.2g}", _interval(row, ".2g"))
        for row in sorted(rows, key=lambda row: (_kept(row), row["impl"]))
    ]
    said = [
        f"- {METHODS[row['impl']]} − {METHODS[row['against']]}, {_kept(row)}: {row['mean']:+.2g} "
        f"({_interval(row, '+.2g')}): {_says(row)}."
        for row in _rows(document, "curve-distance-difference")
    ]
    where = (
        "On a CPU both are PyTorch's own operations in bf16: the distances are those of its arithmetic, not of "
        "doratune's kernels.\n\n"
        if document["env"]["gpu"] == "none"
        else ""
    )
    head = ("run by", "dtypes", "distance, nats per byte", "95 % interval")
    rank = rows[0]["rank"]
    return (
        "The root mean square distance of the training loss, step by step, to that of PEFT's DoRA in fp32 at "
        f"r = {rank}. {where}{_table(head, lines)}" + ("\n\n" + "\n".join(said) if said else "")
    )


def _costs(document: Document) -> dict[tuple[str, int | None], tuple[float, float | None]]:
    """By method and rank the best learning rate, and how much loss the better one of its neighbours costs."""
    found: dict[tuple[str, int | None], tuple[float, float | None]] = {}
    for group in _by_method(_rows(document, "learning-rate")):
        by_exponent = {row["exponent"]: row for row in group if row["loss"] is not None}
        if by_exponent:
            best = min(sorted(by_exponent), key=lambda exponent: by_exponent[exponent]["loss"])
            beside = [by_exponent[best + step]["loss"] for step in (-1, 1) if best + step in by_exponent]
            cost = min(beside) - by_exponent[best]["loss"] if beside else None
            found[group[0]["impl"], group[0]["rank"]] = by_exponent[best]["rate"], cost
    return found


def _cost(costs: dict[tuple[str, int | None], tuple[float, float | None]], impl: str, row: Row) -> float:
    """What a neighbouring rate costs a method of a difference; PEFT's DoRA has doratune's rate."""
    key = (DORA if impl == PEFT_DORA else impl, None if impl == FULL else row["rank"])
    return costs.get(key, (0.0, None))[1] or 0.0


def _rows(document: Document, op: str) -> list[Row]:
    return [row for row in document["rows"] if row["op"] == op]


def _one(document: Document, op: str) -> Row:
    (row,) = _rows(document, op)
    return row


def _by_method(rows: Iterable[Row]) -> Iterator[list[Row]]:
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["impl"], row["rank"]), []).append(row)
    yield from groups.values()


def _against_lora(document: Document) -> list[Row]:
    return [row for row in _rows(document, "equal-steps") if row["against"] == LORA]


def _size(document: Document) -> dict[str, int]:
    """The whole numbers of the study's size."""
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)(?=,|$)", document["env"]["study"])}


def _held_out(document: Document, split: str) -> str:
    (row,) = (row for row in _rows(document, "corpus") if row["impl"] == "code")
    return f"{row['bytes'][split]:,}"


def _ranks(rows: Iterable[Row]) -> list[int]:
    return sorted({row["rank"] for row in rows} - {None})


def _rank(document: Document, rank: int) -> str:
    return f"r = {rank} ({Fraction(rank, _size(document)['hidden'])} of d)"


def _loss(row: Row) -> str:
    diverged = f", {row['diverged']} diverged" if row["diverged"] else ""
    if row["low"] is None:
        return f"{row['mean']:.4f}{diverged}"
    return f"{row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f}){diverged}"


def _interval(row: Row, form: str = "") -> str:
    """The interval of a row, in the ``form`` of its numbers, or of nats per byte with their signs."""
    if row["low"] is None:
        return ABSENT
    return " to ".join(f"{row[end]:{form}}" if form else _signed(row[end]) for end in ("low", "high"))


def _signed(nats: float) -> str:
    """A difference of losses to four decimals, to one digit where it has none there."""
    return f"{nats:+.4f}" if abs(nats) >= 5e-5 else f"{nats:+.1g}"


def _sign(row: Row) -> str:
    """``lower`` or ``higher`` where the file says so, else nothing."""
    word = str(row["says"]).split()[0]
    return word if word in ("lower", "higher") else ""


def _says(row: Row) -> str:
    return f"{_sign(row)} than {METHODS[row['against']]}" if _sign(row) else str(row["says"])


def _doubts(row: Row) -> list[str]:
    doubts = ["a learning rate is at the edge of what was tried"] if row["edge"] else []
    return doubts + ([f"{row['diverged']} seeds diverged"] if row.get("diverged") else [])


def _kept(row: Row) -> str:
    autocast = ", autocast" if "autocast" in row["flags"] else ""
    return f"{row['dtype']} weights, {row['adapter']} adapters{autocast}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _count_text(counts: set[int]) -> str:
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


PARTS: dict[str, Callable[[Document], str]] = {
    "what-ran": what_ran,
    "learned": learned,
    "losses": losses,
    "differences": differences,
    "rates": rates,
    "equal-time": equal_time,
    "precisions": precisions,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n\n".join(part(read(Path(name))) for part in PARTS.values()))
