"""Runs, models and stored entries as tables for people and as values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.entry import MEASURED, PREDICTED, BinaryKey, Entry, Final
from ..cache.errors import CorruptRowError
from ..cache.store import Store
from ..printable import printable
from ..terminal.tables import Table
from .gain import Gains, gain, gains_of, percent, ran_before
from .outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, TuneResult
from .projections import LeftOut, Model, Projection
from .tally import duration

_SHAPE = ("d_out", "d_in", "rank", "tokens", "layers")


def row_of(entry: Entry) -> dict[str, Any]:
    """One entry as a row of the JSON report; what does not apply to its operation is null. Times are microseconds."""
    spec, evaluation, final = entry.spec, entry.evaluation, entry.final
    before = ran_before(final) if final is not None else None
    return {
        "op": spec.op,
        "spec": str(spec),
        **{name: getattr(spec, name) or None for name in _SHAPE},
        **({"widths": list(spec.widths)} if spec.members > 1 else {}),
        "dtype": spec.weight or spec.activation,
        "variant": entry.config.variant,
        "config": str(entry.config),
        "registers": evaluation.registers,
        "spills": evaluation.spills,
        "shared_bytes": evaluation.shared_bytes,
        "us": evaluation.us,
        "floor_us": evaluation.floor_us,
        "over_floor": _over_floor(entry),
        "before": str(before.config) if before is not None else None,
        "before_us": before.us if before is not None else None,
        "gain": gain(entry),
        "margin": final.margin if final is not None else None,
        "confidence": final.confidence if final is not None else None,
        "unfused_us": evaluation.unfused_us,
        "provenance": evaluation.provenance,
    }


def layers_of(model: Model | None) -> dict[str, Any]:
    """A model's linear layers as values for JSON: those that are tuned, and what is not, with the reason."""
    if model is None:
        return {"projections": [], "not_tuned": [], "notes": []}
    return {
        "projections": [vars(projection) for projection in model.projections],
        "not_tuned": [vars(left) for left in model.left_out],
        "notes": list(model.notes),
    }


def layer_lines(model: Model) -> list[str]:
    """A model's linear layers as text: a line for each shape, then for whatever is not tuned, then the notes."""
    shapes: dict[tuple[int, int, bool], list[Projection]] = {}
    for projection in model.projections:
        shapes.setdefault((projection.d_out, projection.d_in, projection.bias), []).append(projection)
    total = sum(projection.count for projection in model.projections)
    lines = [f"{model.name}: {total} linear layers to put DoRA on"]
    for (d_out, d_in, bias), group in shapes.items():
        names = ", ".join(f"{projection.name} ×{projection.count}" for projection in group)
        lines.append(f"  [{d_out}, {d_in}]{' with bias' if bias else ''}: {names}")
    lines += [f"not tuned: {left_out_text(left)}" for left in model.left_out]
    return lines + [f"note: {note}" for note in model.notes]


def left_out_text(left: LeftOut) -> str:
    """What is not tuned, and why."""
    return f"{left.name} {list(left.shape)} ×{left.count}: {left.why}"


def report(result: TuneResult, *, name: str, model: Model | None, gpu: str, store: str) -> dict[str, Any]:
    """The whole report as values for JSON: what was tuned, GPU slug, store, a row for each entry, the linear layers.

    ``name`` says what was tuned; ``model`` is None, and its layers are none, where that was a list of specs.

    ``outcomes`` counts the specs by outcome; ``gains`` are those of the kernels that this run tuned; ``failed`` has the
    specs without a winner and why; the other counts, ``stopped`` and ``fault`` are those of the result.
    """
    return {
        "kernels_of": name,
        "model": None if model is None else model.name,
        "gpu": gpu,
        "store": store,
        "rows": [{**row_of(row.entry), "outcome": row.outcome} for row in result.rows if row.entry is not None],
        "outcomes": {outcome: result.count(outcome) for outcome in (TUNED, KEPT, PARTIAL, UNFINISHED, FAILED)},
        "gains": gains_of(result.tuned).values(),
        "trials": result.trials,
        "seconds": round(result.seconds, 3),
        "rejected": dict(result.rejected),
        "undecided": dict(result.undecided),
        "disturbed_finals": result.disturbed,
        "failed": [{"spec": str(row.spec), "reason": row.note} for row in result.failed],
        "stopped": result.stopped,
        "fault": result.fault,
        **layers_of(model),
    }


def closing_lines(result: TuneResult) -> list[str]:
    """What a run tried and gained, what was rejected and why, what disturbed its finals: a line for each there is."""
    gains = gains_of(result.tuned).sentence()
    lines = [f"tried: {result.trials} configs in {duration(result.seconds)}"] if result.trials else []
    if gains:
        lines.append(f"gains: {gains}")
    if result.rejected:
        rejected = sum(result.rejected.values())
        lines.append(f"rejected: {rejected} of {result.trials} configs: {_counts(result.rejected)}")
    if result.undecided:
        lines.append(f"could not be judged, tried again in the next run: {_counts(result.undecided)}")
    for kind, count in result.disturbed.items():
        finals = "final" if count == 1 else "finals"
        lines.append(f"{kind} in {count} {finals}; `doratune cache show SPEC` says more")
    return lines


def report_table(entries: Sequence[Entry], *, name: str, gpu: str) -> Table:
    """A table of the entries for a terminal; its title says what was tuned, and when times are only predicted.

    The column ``gain`` is there only if an entry has a final with what ran before its search.
    """
    gains = any(gain(entry) is not None for entry in entries)
    table = Table(title=f"{name} on {gpu}: {_how_known(entries)}")
    for name in ("op", "shape", "tokens", "variant", "config"):
        table.add_column(name)
    numbers = ("reg/spill/smem", _time_column(entries), "floor µs", "× floor", *(("gain",) if gains else ()))
    for name in numbers:
        table.add_column(name, justify="right")
    table.add_column("provenance")
    for entry in entries:
        spec, config, evaluation = entry.spec, entry.config, entry.evaluation
        shape = "+".join(map(str, spec.widths)) + (f"x{spec.d_in}" if spec.d_in else "")
        shape = f"{spec.layers} of {shape}" if spec.layers else shape
        params = str(config).partition(":")[2].replace(",", " ")
        used = (evaluation.registers, evaluation.spills, evaluation.shared_bytes)
        table.add_row(
            spec.op,
            shape + (f", r {spec.rank}" if spec.rank else ""),
            str(spec.tokens) if spec.tokens else "",
            config.variant,
            params,
            "/".join("-" if value is None else str(value) for value in used),
            _us(evaluation.us),
            _us(evaluation.floor_us),
            _ratio(_over_floor(entry)),
            *((_gain(entry),) if gains else ()),
            evaluation.provenance,
        )
    return table


def gains_table(gains: Gains) -> Table:
    """The kernels that gained least and most among those that run another config than before, the worst first.

    The column ``before`` says which steps of a lookup gave what ran before.
    """
    table = Table(title="gained over what ran before")
    table.add_column("spec")
    table.add_column("before")
    for name in ("µs before", "µs now", "gain"):
        table.add_column(name, justify="right")
    for of_kind in (gains.worst, gains.best[::-1]):
        for one in of_kind:
            before = ", ".join(one.before.origins)
            table.add_row(str(one.spec), before, _us(one.before.us), _us(one.now.us), percent(one.gain))
        table.add_section()
    return table


def models_table(models: Iterable[Model]) -> Table:
    """A line for each known model: its projections by shape."""
    table = Table("model", "Hugging Face id", "layers", "projections")
    for model in models:
        shapes: dict[tuple[int, int], list[str]] = {}
        for projection in model.projections:
            shapes.setdefault(projection.shape, []).append(projection.name)
        projections = "; ".join(f"{' '.join(names)} {list(shape)}" for shape, names in shapes.items())
        table.add_row(model.name, model.hf_id, str(model.layers), projections)
    return table


def layers_table(model: Model) -> Table:
    """A line for each kind of linear layer of one model; the last column says whether it gets DoRA, or why not."""
    table = Table("layer", "shape", "bias", "how many", "first one", "DoRA", title=model.name)
    layers: list[Projection | LeftOut] = [*model.projections, *model.left_out]
    for layer in layers:
        why = f"no: {layer.why}" if isinstance(layer, LeftOut) else "yes"
        first = layer.modules[0] if layer.modules else ""
        table.add_row(layer.name, str(list(layer.shape)), "bias" if layer.bias else "", str(layer.count), first, why)
    return table


@dataclass(frozen=True)
class StoredEntry:
    """An entry, the location of its store, and the binaries that the store has for it."""

    store: str
    entry: Entry
    binaries: Sequence[BinaryKey]

    @property
    def made_for(self) -> list[str]:
        """The versions of Triton and the architectures of the binaries."""
        return sorted({f"{key.triton} {key.architecture}" for key in self.binaries})

    def facts(self) -> dict[str, Any]:
        """What is known of the entry in single values, without its source and its final."""
        entry = self.entry
        return {
            "store": self.store,
            "spec": str(entry.spec),
            "config": str(entry.config),
            **{name: value for name, value in vars(entry.evaluation).items() if name != "samples_us"},
            **vars(entry.environment),
            "template_digest": entry.template_digest,
            "source_digest": entry.source_digest,
            "created_at": entry.created_at,
            "lookup_regret": entry.lookup_regret,
        }

    def values(self) -> dict[str, Any]:
        """All that is known of the entry, as values for JSON."""
        final = self.entry.final
        return {
            **self.facts(),
            "final": None if final is None else final_values(final),
            "binaries": [key._asdict() for key in self.binaries],
            "source": self.entry.source,
        }


def final_values(final: Final) -> dict[str, Any]:
    """A final as values for JSON: its contenders with their samples, the winner first. Times are microseconds."""
    return {
        "confidence": final.confidence,
        "margin": final.margin,
        "noise": final.noise,
        "settled": final.settled,
        "notices": list(final.notices),
        "contenders": [
            {
                "config": str(contender.config),
                "origins": list(contender.origins),
                "us": contender.us,
                "slower": contender.us / final.winner.us - 1.0,
                "samples_us": list(contender.samples_us),
            }
            for contender in final.contenders
        ],
    }


def final_table(final: Final) -> Table:
    """A line for each contender of a final, the winner first, and below how sure the outcome is."""
    order = "the order held before the rounds ended" if final.settled else "the rounds ended before the order held"
    caption = f"confidence {final.confidence:.3f}, differences below {100.0 * final.noise:.1f} % are ties; {order}"
    table = Table(title="final")
    table.caption = "\n".join(map(printable, (caption, *final.notices)))
    table.add_column("config")
    table.add_column("origins")
    for name in ("µs", "slower", "rounds"):
        table.add_column(name, justify="right")
    for contender in final.contenders:
        slower = "" if contender is final.winner else percent(contender.us / final.winner.us)
        rounds = str(len(contender.samples_us))
        table.add_row(str(contender.config), ", ".join(contender.origins), f"{contender.us:.2f}", slower, rounds)
    return table


def entries_of(
    store: Store, *, op: str | None = None, gpu: str | None = None
) -> tuple[list[StoredEntry], list[CorruptRowError]]:
    """The entries of a store for an operation and a GPU, all when None, and the errors of the damaged rows there."""
    by_digest: dict[str, list[BinaryKey]] = {}
    for key in store.binary_keys():
        by_digest.setdefault(key.code_digest, []).append(key)
    entries, damaged = store.readable_entries(op=op, gpu=gpu)
    found = [
        StoredEntry(store.location, entry, by_digest.get(entry.code_digest, ()) if by_digest else ())
        for entry in entries
    ]
    return found, damaged


def entries_table(found: Iterable[StoredEntry]) -> Table:
    """A line for each stored entry. The column ``gain`` is there only if an entry has a final that tells."""
    listed = list(found)
    gains = any(gain(stored.entry) is not None for stored in listed)
    columns = ("spec", "config", "µs", "floor µs", *(("gain",) if gains else ()))
    table = Table(*columns, "provenance", "tuned on", "binaries", "store")
    for stored in listed:
        entry, evaluation = stored.entry, stored.entry.evaluation
        table.add_row(
            str(entry.spec),
            str(entry.config),
            *("" if us is None else f"{us:.2f}" for us in (evaluation.us, evaluation.floor_us)),
            *((_gain(entry),) if gains else ()),
            evaluation.provenance,
            entry.environment.gpu_name or entry.environment.gpu,
            ", ".join(stored.made_for),
            stored.store,
        )
    return table


def _how_known(entries: Sequence[Entry]) -> str:
    found = {entry.evaluation.provenance for entry in entries}
    if not found:
        return "no kernels"
    if found == {MEASURED}:
        return "times measured"
    if found == {PREDICTED}:
        return "times predicted by a model, not measured"
    return "not all times are measured, see the last column"


def _time_column(entries: Sequence[Entry]) -> str:
    found = {entry.evaluation.provenance for entry in entries}
    return f"{found.pop()} µs" if len(found) == 1 else "µs"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.{1 if value >= 1 else 2}f}"


def _over_floor(entry: Entry) -> float | None:
    us, floor = entry.evaluation.us, entry.evaluation.floor_us
    return us / floor if us is not None and floor else None


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gain(entry: Entry) -> str:
    found = gain(entry)
    return "-" if found is None else percent(found)


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
