"""doratune's performance targets as data, and the judging of measured rows by them.

A target compares doratune's row of a case with a peer's row of the same case, or with a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .quantised import QUANTS
from .results import OURS, UNCHECKED, Row, case_name, case_of

if TYPE_CHECKING:
    from ..terminal.tables import Table

Measure = Callable[[Row, Mapping[str, Row]], float | None]
"""A figure from one row and its peers in the same case, by implementation; None where data is missing."""

MET, MISSED, UNMEASURED = "met", "missed", "not measured"

LARGE_WEIGHT = 32_000_000
"""Elements of W, or of [tokens, d_out], from which launch costs and tails do not count."""


@dataclass(frozen=True)
class Target:
    """One promise: a figure of every row that ``where`` selects is at most, or at least, ``bound``.

    ``worst_only`` gives one verdict, that of the worst row, where every row counts but only the worst is worth a line.
    ``impl`` is whose rows are judged; ``source`` says where the promise was made; ``bound`` may depend on the row.
    """

    source: str
    what: str
    bench: str
    op: str
    where: Callable[[Row], bool]
    figure: str
    measure: Measure
    bound: float | Callable[[Row], float]
    at_least: bool = False
    worst_only: bool = False
    impl: str = OURS


@dataclass(frozen=True)
class Verdict:
    """A target on one case: what was measured (None: nothing) and ``met``, ``missed`` or ``not measured``."""

    target: Target
    case: str
    measured: float | None
    bound: float | None

    @property
    def outcome(self) -> str:
        if self.measured is None or self.bound is None:
            return UNMEASURED
        ahead = self.measured >= self.bound if self.target.at_least else self.measured <= self.bound
        return MET if ahead else MISSED  # NaN is missed

    def row(self) -> dict[str, Any]:
        """The verdict as values for JSON."""
        target = self.target
        return {
            "source": target.source,
            "target": target.what,
            "case": self.case,
            "figure": target.figure,
            "at_least": target.at_least,
            "bound": self.bound,
            "measured": self.measured,
            "outcome": self.outcome,
        }


def times(peer: str) -> tuple[str, Measure]:
    """doratune's time as a multiple of a peer's."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        return row["us"] / group[peer]["us"] if row["us"] and peer in group and group[peer]["us"] else None

    return f"time / {peer}", measure


def speedup(peer: str) -> tuple[str, Measure]:
    """A peer's time as a multiple of doratune's."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        return group[peer]["us"] / row["us"] if row["us"] and peer in group and group[peer]["us"] else None

    return f"{peer} / time", measure


def host_times(peer: str) -> tuple[str, Measure]:
    """doratune's time on the host as a multiple of a peer's."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        return row["cpu_us"] / group[peer]["cpu_us"] if peer in group else None

    return f"host time / {peer}", measure


def host_above(peer: str) -> tuple[str, Measure]:
    """The microseconds of the host that doratune takes more than a peer."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        return row["cpu_us"] - group[peer]["cpu_us"] if peer in group else None

    return f"host µs above {peer}", measure


def share(name: str, peer: str) -> tuple[str, Measure]:
    """A field of doratune's row as a multiple of a peer's."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        theirs = group[peer].get(name) if peer in group else None
        return row[name] / theirs if theirs and row.get(name) is not None else None

    return f"{name} / {peer}", measure


def memory_times(peer: str) -> tuple[str, Measure]:
    """doratune's peak memory as a multiple of a peer's."""

    def measure(row: Row, group: Mapping[str, Row]) -> float | None:
        theirs = group[peer].get("peak_mb") if peer in group else None
        return row["peak_mb"] / theirs if theirs and row.get("peak_mb") is not None else None

    return f"peak memory / {peer}", measure


def field(name: str) -> tuple[str, Measure]:
    """A field of the row itself."""
    return name, lambda row, _: row.get(name)


def above_floor(row: Row, _: Mapping[str, Row]) -> float | None:
    return row["us"] / row["floor_us"] if row["us"] and row.get("floor_us") else None


def inaccurate(row: Row, _: Mapping[str, Row]) -> float | None:
    return float(bool(row.get("complaint")))


def _plain(row: Row) -> bool:
    """bf16 throughout, without flags; compose_backward may take its output, which moves the same bytes."""
    return (
        row["dtype"] == "bf16" and row.get("adapter") in (None, "bf16") and not set(row.get("flags") or ()) - {"output"}
    )


def _norm(rank: int, condition: Callable[[int, int], bool] = lambda d_out, d_in: True) -> Callable[[Row], bool]:
    return lambda row: _plain(row) and row["rank"] == rank and condition(*row["shape"])


def _tokens(condition: Callable[[int], bool]) -> Callable[[Row], bool]:
    return lambda row: _plain(row) and row["rank"] == 384 and condition(row["shape"][0])


def _large(row: Row) -> bool:
    return _plain(row) and math.prod(row["shape"]) >= LARGE_WEIGHT


def _factored_mb(row: Row) -> float:
    """Megabytes for the factored norm's workspace: 8 bytes for each of d_out·r + r² values (fp32, twice), and 1 MB."""
    return float(8 * (row["shape"][0] * row["rank"] + row["rank"] ** 2) / 1e6 + 1.0)


_KERNELS = "issue 3"
_RUNTIME = "issue 4"


_UNIT = "issue 14"
_QUANTISED = "issue 15"

_SMALL = ("llama-1b", "qwen2.5-0.5b")


def _as_it_is(row: Row) -> bool:
    """One sequence on one GPU, in the model as transformers has it, its weights in bf16."""
    return row["dtype"] == "bf16" and not set(row["flags"]) - {"autocast", "checkpointing"}


def _llama(layers: int, ranks: Collection[int] = (384,)) -> Callable[[Row], bool]:
    return lambda row: (
        row["model"] == "llama-8b" and row["shape"] == [layers, 4096] and row["rank"] in ranks and _as_it_is(row)
    )


def _large_model(row: Row) -> bool:
    return _llama(32, (16, 384))(row) and "checkpointing" in row["flags"]


def _bare(row: Row) -> bool:
    return bool(row["dtype"] == "bf16" and row["flags"] == [])


def _small_model(row: Row) -> bool:
    return row["model"] in _SMALL and row["rank"] == 16 and row["shape"][1] == 2048 and _bare(row)


def _smallest_model(row: Row) -> bool:
    return _small_model(row) and row["model"] == _SMALL[-1]


def _small_decode(row: Row) -> bool:
    plain = row["dtype"] == "bf16" and not set(row["flags"]) & {"autocast", "liger"}
    return row["model"] in _SMALL and row["rank"] == 16 and plain


def _quantised(row: Row) -> bool:
    return row["model"] == "llama-8b" and row["rank"] in (16, 64) and row["dtype"] in QUANTS


def _quantised_step(row: Row) -> bool:
    return _quantised(row) and "checkpointing" in row["flags"]


def _four_layers(row: Row) -> bool:
    return _llama(4, (16, 384))(row) and "checkpointing" not in row["flags"]


def _flagged(flag: str) -> Callable[[Row], bool]:
    return lambda row: flag in row["flags"]


def _unit(
    what: str,
    where: Callable[[Row], bool],
    measure: tuple[str, Measure],
    bound: float,
    *,
    op: str = "step",
    **more: Any,
) -> Target:
    return Target(_UNIT, what, "model", op, where, *measure, bound, **more)


def _norms(what: str, rank: int, peer: str, bound: float) -> Target:
    def where(row: Row) -> bool:
        return bool(row["model"] == "llama-3.1-8b" and row["rank"] == rank)

    return Target(_UNIT, what, "norms", "weight_norm_group", where, *times(peer), bound)


def _quant(what: str, op: str, where: Callable[[Row], bool], peer: str, bound: float) -> Target:
    return Target(_QUANTISED, what, "model", op, where, *times(peer), bound)


def _whole(adapter: str) -> Callable[[Row], bool]:
    return lambda row: _llama(32)(row) and row["adapter"] == adapter and "checkpointing" in row["flags"]


def _uncheckpointed(row: Row) -> bool:
    return _llama(4)(row) and "checkpointing" not in row["flags"]


def _model(
    what: str,
    where: Callable[[Row], bool],
    measure: tuple[str, Measure],
    bound: float,
    *,
    op: str = "step",
    **more: Any,
) -> Target:
    return Target(_RUNTIME, what, "model", op, where, *measure, bound, **more)


def _host(op: str, impl: str, measure: tuple[str, Measure], bound: float) -> Target:
    what = "load_kernel hit and launch" if impl == UNCHECKED else "hit, check of arguments and launch"
    return Target(_RUNTIME, what, "host", op, lambda row: True, *measure, bound, impl=impl)


def _kernel(
    op: str, what: str, where: Callable[[Row], bool], measure: tuple[str, Measure], bound: Any, **more: Any
) -> Target:
    return Target(_KERNELS, what, "kernels", op, where, *measure, bound, **more)


TARGETS: tuple[Target, ...] = (
    _kernel(
        "weight_norm", "r = 384, large W", _norm(384, lambda m, n: m * n >= LARGE_WEIGHT), times("cublas_product"), 1.25
    ),
    _kernel("weight_norm", "r = 384, 4096×4096", _norm(384, lambda m, n: m == n == 4096), times("cublas_product"), 1.4),
    _kernel("weight_norm", "r = 384", _norm(384), speedup("peft_eager"), 7.0, at_least=True),
    _kernel("weight_norm", "r = 384", _norm(384), speedup("dense_ba"), 3.0, at_least=True),
    _kernel("weight_norm", "r = 384", _norm(384), speedup("dorafactors"), 15.0, at_least=True),
    _kernel("weight_norm", "r = 64", _norm(64), times("cublas_product"), 1.6),
    _kernel("weight_norm", "accuracy", lambda row: True, field("rel_err"), 1e-5, worst_only=True),
    _kernel(
        "weight_norm",
        "transient memory",
        _norm(384, lambda m, n: (m, n) == (8192, 28672)),
        field("peak_mb"),
        _factored_mb,
    ),
    _kernel("lora_compose", "T ≥ 4096, r = 384", _tokens(lambda t: t >= 4096), times("cublas_product"), 1.30),
    _kernel("lora_compose", "T ≥ 4096, r = 384", _tokens(lambda t: t >= 4096), times("lora_eager"), 0.55),
    _kernel("lora_compose", "T = 1 and 16, r = 384", _tokens(lambda t: t in (1, 16)), times("cublas_product"), 1.2),
    _kernel("compose_forward", "share of the copy bandwidth", _large, speedup("copy"), 0.92, at_least=True),
    _kernel("compose_backward", "the three-pass floor", _large, ("time / floor", above_floor), 1.25),
    _kernel("compose_backward", "against dorafactors", _large, times("dorafactors"), 0.5),
    *(
        _kernel(op, "precision", lambda row: True, ("outputs beyond their bounds", inaccurate), 0, worst_only=True)
        for op in ("weight_norm", "lora_compose", "compose_forward", "compose_backward", "dora_linear_forward")
    ),
    _model("32 layers, autocast", _whole("fp32"), times("peft_lora"), 0.95),
    _model("32 layers, autocast", _whole("fp32"), speedup("peft_dora"), 2.1, at_least=True),
    _model("32 layers, autocast", _whole("fp32"), speedup("dorafactors"), 1.75, at_least=True),
    _model("32 layers, bf16 adapters", _whole("bf16"), times("peft_lora"), 1.02),
    _model("32 layers, bf16 adapters", _whole("bf16"), speedup("peft_dora"), 1.5, at_least=True),
    _model("32 layers, bf16 adapters", _whole("bf16"), speedup("dorafactors"), 1.7, at_least=True),
    _model("32 layers, without merging", _llama(32), times("peft_lora"), 0.85, op="inference"),
    _model("32 layers", lambda row: _whole(row["adapter"])(row), memory_times("peft_lora"), 1.02),
    _model("4 layers, compiled", _uncheckpointed, times("peft_lora_compiled"), 1.02, impl="doratune_compiled"),
    _unit("8B, checkpointing", _large_model, times("axolotl_lora"), 1.00),
    _unit("8B, checkpointing", _large_model, times("peft_lora"), 0.90),
    _unit("1B and 0.5B, 2048 tokens, bf16", _small_model, times("axolotl_lora"), 1.05),
    _unit("1B and 0.5B, 2048 tokens, bf16", _small_model, times("peft_lora"), 1.00),
    _unit("1B and 0.5B, 2048 tokens, bf16", _small_model, times("peft_dora"), 0.62),
    _unit("1B and 0.5B, prefill", _small_model, times("peft_lora"), 1.00, op="inference"),
    _unit("1B and 0.5B, 1 to 16 tokens", _small_decode, times("peft_lora"), 1.00, op="decode"),
    _unit("0.5B, launches of a step", _smallest_model, share("launches", "peft_lora"), 1.00),
    _unit("0.5B, the host's time of a step", _smallest_model, share("host_us", "peft_lora"), 1.00),
    _unit("4 layers of 8B, compiled", _four_layers, times("peft_lora_compiled"), 1.00, impl="doratune_compiled"),
    *(
        _unit("peak memory", where, memory_times(peer), bound)
        for where in (_large_model, _small_model)
        for peer, bound in (("peft_lora", 1.00), ("axolotl_lora", 1.05))
    ),
    _norms("all norms, r = 16", 16, "read", 1.15),
    _norms("all norms, r = 384", 384, "products", 1.15),
    _unit("first step, nothing compiled", _flagged("cold"), field("us"), 6e6, op="first-step"),
    _unit("first step, with binaries", _flagged("store"), times("peft_lora"), 1.5, op="first-step"),
    _unit("two GPUs, DDP", _flagged("ddp"), times("peft_lora"), 1.00),
    _unit("two GPUs, FSDP2", _flagged("fsdp2"), times("peft_lora"), 1.00),
    _quant("quantised 8B, checkpointing", "step", _quantised_step, "peft_lora", 1.05),
    _quant("quantised 8B, prefill", "inference", _quantised, "peft_lora", 1.05),
    _quant("quantised 8B, 1 to 16 tokens", "decode", _quantised, "peft_lora", 1.10),
    *(
        _host(op, impl, measure, 1.0)
        for impl in (UNCHECKED, OURS)
        for measure in (host_above("prebound"), host_times("jit"))
        for op in ("lora_compose", "weight_norm")
    ),
)
"""Every target that a benchmark can judge, in the order of the lists that they come from."""


def judge(*runs: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Judge the rows of each run by the targets of their benchmarks; runs are never compared.

    A target gives a verdict for each case that it selects, or one ``not measured`` if it selects none.
    """
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for run, rows in enumerate(runs):
        for row in rows:
            groups.setdefault((run, *case_of(row)), {})[row["impl"]] = row
    benches = {row["bench"] for rows in runs for row in rows}
    verdicts: list[Verdict] = []
    for target in targets:
        if target.bench not in benches:
            continue
        found = [
            Verdict(target, case_name(row), target.measure(row, group), _bound(target, row))
            for group in groups.values()
            if (row := group.get(target.impl, {}))
            and (row["bench"], row["op"]) == (target.bench, target.op)
            and target.where(row)
        ]
        if target.worst_only:
            found = sorted(found, key=_badness)[-1:]
        verdicts += found or [Verdict(target, f"{target.op} {target.what}", None, None)]
    return verdicts


def _badness(verdict: Verdict) -> tuple[bool, float]:
    value = math.nan if verdict.measured is None else verdict.measured
    return math.isnan(value), -value if verdict.target.at_least else value


def _bound(target: Target, row: Row) -> float:
    return target.bound(row) if callable(target.bound) else float(target.bound)


def targets_table(verdicts: Iterable[Verdict]) -> Table:
    """One line a verdict."""
    from ..terminal.tables import Table

    table = Table("source", "target", "case", "figure", "bound", "measured", "outcome")
    for verdict in verdicts:
        sign = "≥" if verdict.target.at_least else "≤"
        table.add_row(
            verdict.target.source,
            verdict.target.what,
            verdict.case,
            verdict.target.figure,
            "" if verdict.bound is None else f"{sign} {verdict.bound:.4g}",
            "" if verdict.measured is None else f"{verdict.measured:.3g}",
            verdict.outcome,
        )
    return table
