"""The pages on what doratune brings and where it does not help, made of the committed measurements alone.

python docs/benefits.py brings
python docs/benefits.py models
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

from comparisons import (
    COMPILED,
    OURS,
    Comparison,
    Measured,
    Row,
    Source,
    age,
    case_of,
    gpu_of,
    gpus_of,
    newest,
    read_results,
    size_of,
    time_of,
)

from doratune.benchmarks.quantised import QUANTS
from doratune.benchmarks.shapes import SHAPES

LORA, DORA = "peft_lora", "peft_dora"
MODES = {
    "step": "Training step",
    "inference": "Forward pass without gradients",
    "decode": "One more token",
    "first-step": "First step of a process",
}
NAMES = {LORA: "PEFT LoRA", DORA: "PEFT DoRA", "axolotl_lora": "axolotl LoRA", "axolotl_dora": "axolotl DoRA"}
NAMES |= {"unsloth_lora": "Unsloth LoRA"}
NOT_MEASURED, ABSENT = "not measured", "–"


def brings(measured: Measured) -> str:
    """What was measured at all, then for each GPU and mode doratune's time over each peer's."""
    parts = [_overview(measured)]
    found = newest(measured.of("model"))
    for gpu in gpus_of([source for source, _ in measured.rows]):
        name = _gpu_name(measured, gpu)
        here = [one for one in found if gpu_of(one.source) == gpu]
        if not here:
            parts.append(f"**{name}**: models are not measured.")
        for op, title in MODES.items():
            of_mode = [one for one in here if one.ours["op"] == op]
            if of_mode:
                parts += [f"**{name}: {title.lower()}**", _modes_table(of_mode)]
    return "\n\n".join(parts)


def _overview(measured: Measured) -> str:
    """What was measured on which GPU, and when; what was not is named."""
    gpus = gpus_of([source for source, _ in measured.rows])
    wanted: dict[str, Callable[[Row], bool]] = {}
    for name, _ in SHAPES.values():
        for op in ("step", "inference", "decode"):
            wanted[f"{name}, {MODES[op].lower()}"] = _is_model(
                lambda row, name=name, op=op: (row["model"], row["op"], row["dtype"]) == (name, op, "bf16")
            )
    wanted["first step"] = _is_model(lambda row: row["op"] == "first-step")
    wanted["under torch.compile"] = _is_model(lambda row: row["impl"] == OURS + COMPILED)
    for flag, what in (
        ("liger", "with Liger's kernels"),
        ("ddp", "several GPUs, DDP"),
        ("fsdp2", "several GPUs, FSDP2"),
    ):
        wanted[what] = _is_model(lambda row, flag=flag: flag in (row.get("flags") or ()))
    for quant in QUANTS:
        wanted[f"base weights in {quant}"] = _is_model(lambda row, quant=quant: row["dtype"] == quant)
    for bench, what in (("norms", "all norms of a model"), ("packed", "norms of quantised weights")):
        wanted[what] = lambda row, bench=bench: row["bench"] == bench
    wanted["kernels"] = lambda row: row["bench"] == "kernels"
    wanted["the host's time of a call"] = lambda row: row["bench"] == "host"
    lines = []
    for what, selects in wanted.items():
        cells = []
        for gpu in gpus:
            sources = [source for source, row in measured.rows if gpu_of(source) == gpu and selects(row)]
            cells.append(min(sources, key=age).measured if sources else NOT_MEASURED)
        lines.append((what, *cells))
    return _table(("", *(_gpu_name(measured, gpu) for gpu in gpus)), lines)


def _is_model(selects: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: row["bench"] == "model" and selects(row)


def _modes_table(found: Sequence[Comparison]) -> str:
    """A line for each case, a column for each peer."""
    order = [*NAMES, *sorted({_plain(one) for one in found} - NAMES.keys())]
    peers = list(dict.fromkeys(_peer(one) for one in sorted(found, key=lambda one: order.index(_plain(one)))))
    cases: dict[object, dict[str, Comparison]] = {}
    for one in found:
        cases.setdefault((one.source, case_of(one.ours), one.ours["impl"]), {})[_peer(one)] = one
    lines = []
    for by_peer in sorted(cases.values(), key=_order):
        first = next(iter(by_peer.values()))
        row = first.ours
        lora = by_peer.get(NAMES[LORA])
        memory = lora.share("peak_mb") if lora else None
        ratios = [f"{by_peer[peer].ratio:.2f}" if peer in by_peer else ABSENT for peer in peers]
        lines.append(
            (
                row["model"],
                _sizes(row),
                row["rank"],
                row["dtype"],
                _form(row),
                *ratios,
                ABSENT if memory is None else f"{memory:.2f}",
                f"{time_of(row) / 1e3:.1f}",
                first.source.measured,
            )
        )
    head = ("model", "layers × tokens", "rank", "base", "adapters", *(f"time / {peer}" for peer in peers))
    return _table((*head, f"memory / {NAMES[LORA]}", "ms", "measured"), lines)


def _order(by_peer: dict[str, Comparison]) -> tuple[object, ...]:
    row = next(iter(by_peer.values())).ours
    return (size_of(row["model"]), -row["shape"][0], row["rank"], row["dtype"], _form(row))


# Where it does not help.


def models(measured: Measured) -> str:
    """Cases of models with bf16 weights in which doratune takes as long as a peer or longer."""
    found = [one for one in newest(measured.of("model", "layer")) if one.ours["dtype"] not in QUANTS]
    return _at_or_above([one for one in found if one.ours["op"] != "first-step"], "comparisons of models and layers")


def quantised(measured: Measured) -> str:
    """The same with quantised weights, and norms of quantised weights beside those of bf16 ones."""
    found = [one for one in newest(measured.of("model", "layer")) if one.ours["dtype"] in QUANTS]
    parts = [_at_or_above(found, "comparisons on quantised bases"), _packed(measured)]
    return "\n\n".join(parts)


def _packed(measured: Measured) -> str:
    """doratune's norm of a W in a format over that of a bf16 W of its shape."""
    rows = [(source, row) for source, row in measured.rows if row["bench"] == "packed" and row["impl"] == OURS]
    if not rows:
        return "Norms of quantised weights beside those of bf16 weights: not measured."

    def case(source: Source, row: Row) -> tuple[object, ...]:
        return (source, tuple(row["shape"]), row["rank"], tuple(row.get("flags") or ()))

    plain = {case(source, row): row for source, row in rows if row["dtype"] == "bf16"}
    ratios = [
        (row["us"] / plain[case(source, row)]["us"], source, row)
        for source, row in rows
        if row["dtype"] != "bf16" and case(source, row) in plain
    ]
    slower = sorted((each for each in ratios if each[0] >= 1.0), key=lambda each: -each[0])
    said = _counted(len(slower), len(ratios), "norms of quantised weights take as long as that of a bf16 W, or longer")
    lines = [
        (gpu_of(source), f"{_sizes(row)}, r = {row['rank']}", row["dtype"], f"{ratio:.2f}", source.measured)
        for ratio, source, row in slower
    ]
    return said + ("\n\n" + _table(("GPU", "W", "format", "time / bf16", "measured"), lines) if lines else "")


def memory(measured: Measured) -> str:
    """Cases of models whose peak memory is that of PEFT's LoRA or more."""
    found = [one for one in newest(measured.of("model")) if _plain(one) == LORA and one.share("peak_mb") is not None]
    return _at_or_above(
        found, "comparisons of peak memory with PEFT LoRA", lambda one: one.share("peak_mb") or 0.0, "memory"
    )


def host(measured: Measured) -> str:
    """The host's own time: of models, where a small one waits for it, and of a call."""
    found = [one for one in newest(measured.of("model")) if one.share("host_us") is not None and _plain(one) == LORA]
    parts = [
        _at_or_above(
            found,
            "comparisons of a model's host time with PEFT LoRA",
            lambda one: one.share("host_us") or 0.0,
            "host time",
        )
    ]
    calls = newest(measured.of("host"))
    return "\n\n".join([*parts, _at_or_above(calls, "comparisons of the host's time of a call", what="host time")])


def kernels(measured: Measured) -> str:
    """Kernels in whose place a peer, or doratune's other way to do the same, is faster."""
    found = newest(measured.of("kernels", "norms", "grouped"))
    return _at_or_above(found, "comparisons of kernels with what runs in their place")


def first_step(measured: Measured) -> str:
    """First steps that take as long as a peer's or longer."""
    found = [one for one in newest(measured.of("model")) if one.ours["op"] == "first-step"]
    return _at_or_above(found, "comparisons of first steps")


def lookup(measured: Measured) -> str:
    """What no store covers, and what predicted entries lose."""
    lines = [
        (
            gpu_of(source),
            f"{row['covered']:.1%}",
            f"{row['no bound']:.1%}",
            f"{row['whole_draws']:.1%}",
            source.measured,
        )
        for source, row in measured.rows
        if row["bench"] == "coverage" and row["impl"] == "all"
    ]
    head = ("GPU", "kernels covered", "kernels without a bound", "models whose kernels are all covered", "measured")
    parts = [_table(head, lines) if lines else "Coverage: not measured."]
    predicted = [
        (source, row) for source, row in measured.rows if row["bench"] == "search" and row["impl"] in _PREDICTED
    ]
    if not predicted:
        return "\n\n".join([*parts, "What predicted entries lose: not measured."])
    for source, row in predicted:
        if row["op"] == "all" and row["impl"] == _PREDICTED[0]:
            others = [each for at, each in predicted if at == source and each["op"] == "all" and each is not row]
            beside = "".join(f"; a {each['impl']} {each['median'] - 1:.0%}" for each in others)
            parts.append(f"On {gpu_of(source)} a predicted entry loses a median of {row['median'] - 1:.0%}{beside}.")
    lines = [
        (
            gpu_of(source),
            row["op"],
            row["impl"],
            f"{row['median']:.2f}",
            f"{row['p95']:.2f}",
            f"{row['worst']:.2f}",
            source.measured,
        )
        for source, row in predicted
    ]
    head = ("GPU", "operation", "chosen by", "time / best, median", "95th percentile", "worst", "measured")
    return "\n\n".join([*parts, _table(head, lines)])


_PREDICTED = ("predicted entry", "lookup without entries")

SHORTFALLS: dict[str, Callable[[Measured], str]] = {
    "models": models,
    "quantised": quantised,
    "memory": memory,
    "host": host,
    "kernels": kernels,
    "first-step": first_step,
    "lookup": lookup,
}


def _at_or_above(
    found: Sequence[Comparison],
    of_what: str,
    figure: Callable[[Comparison], float] = lambda one: one.ratio,
    what: str = "time",
) -> str:
    """A sentence on how many of the comparisons are at 1 or above, and a table of these, the worst first."""
    if not found:
        return f"{of_what[0].upper()}{of_what[1:]}: not measured."
    worse = sorted((one for one in found if figure(one) >= 1.0), key=lambda one: -figure(one))
    said = _counted(len(worse), len(found), f"{of_what} are at 1 or above")
    if not worse:
        return said
    said += f" The median of these is {statistics.median(map(figure, worse)):.2f}, the worst {figure(worse[0]):.2f}."
    spreads = what == "time" and any(one.spread for one in worse)
    lines = [
        (
            gpu_of(one.source),
            _case(one.ours),
            _name(one.peer),
            f"{figure(one):.2f}",
            *([one.spread] if spreads else []),
            one.source.measured,
        )
        for one in worse
    ]
    head = ("GPU", "case", "beside", f"doratune's {what} over it", *(["spread"] if spreads else []), "measured")
    return f"{said}\n\n{_table(head, lines)}"


def _counted(some: int, all_of_them: int, what: str) -> str:
    return f"{some or 'None'} of {all_of_them} {what}."


def _case(row: Row) -> str:
    parts = [row.get("model"), MODES.get(row["op"], row["op"]).lower() if row["op"] in MODES else f"`{row['op']}`"]
    parts += [
        _sizes(row),
        row["rank"] and f"r = {row['rank']}",
        f"{row['dtype']} base",
        f"adapters {_form(row)}" if _form(row) else "",
    ]
    return ", ".join(str(part) for part in parts if part)


def _sizes(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def _form(row: Row) -> str:
    """Adapters' dtype, flags, and whether it is compiled."""
    parts = [row.get("adapter"), *(row.get("flags") or ()), "compiled" if row["impl"].endswith(COMPILED) else ""]
    return ", ".join(filter(None, parts))


def _plain(one: Comparison) -> str:
    return one.peer.removesuffix(COMPILED)


def _peer(one: Comparison) -> str:
    """The peer's name: that doratune is compiled too is said with the case."""
    return NAMES.get(_plain(one), _plain(one))


def _name(impl: str) -> str:
    """The peer's name; that of a kernel's peer as the page on peers has it."""
    plain = impl.removesuffix(COMPILED)
    if plain not in NAMES:
        return f"`{impl}`"
    return NAMES[plain] + (", compiled" if impl.endswith(COMPILED) else "")


def _gpu_name(measured: Measured, gpu: str) -> str:
    return next(source.gpu for source, _ in measured.rows if gpu_of(source) == gpu)


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    everything = read_results()
    for name in sys.argv[1:]:
        print(brings(everything) if name == "brings" else SHORTFALLS[name](everything))
