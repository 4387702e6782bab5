"""Where the training step of a model goes: norms, compositions, products, and the rest.

Norms and compositions are the calls of the kernels that a step runs, times what the stores know of each: its measured
time, else its predicted one, else its floor. The products of cuBLAS count at the GPU's attainable rates. The rest
(attention, embeddings, the loss, the optimiser, what cuBLAS takes beyond those rates) is known only where a whole step
was measured: it is what remains of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..benchmarks.results import OURS
from ..cache.entry import MEASURED, PREDICTED
from ..codegen.cost import floor_us
from ..codegen.gpu import Gpu, find_gpu, gpu_of_device, known_gpus
from ..codegen.ops import DTYPE_BYTES, IN_ONE_KERNEL, IN_PLACE, adds_in_place, composes_apart
from ..codegen.spec import TOKEN_BUCKETS, KernelSpec, bucket_tokens
from ..errors import UsageError
from ..runtime.loader import resolve, stores_open
from ..tuner.jobs import plan_jobs
from ..tuner.models import find_model
from ..tuner.projections import Model, Projection
from .peers import Results, our_steps

NORMS, COMPOSITIONS, PRODUCTS, REST = "norms", "compositions", "products", "the rest"
PARTS = (NORMS, COMPOSITIONS, PRODUCTS, REST)
FLOOR, RATES, REMAINS = "floor", "attainable rates", "measured step less the others"
"""How a time is known, beside ``measured`` and ``predicted``."""
KNOWN = (MEASURED, PREDICTED, FLOOR, RATES, REMAINS)

_DTYPE = "bf16"
_ALL_NORMS = "all norms in one pass"


@dataclass(frozen=True)
class Case:
    """A training step: ``tokens`` in a batch, adapters of a dtype, and whether blocks are computed again backward.

    ``layers`` are those of the run, where it had other than the model's. ``step_us`` is doratune's measured step, and
    ``source`` the results file that it is from. ``norms_us`` are all norms of the model, as ``doratune bench norms``
    measured them.
    """

    model: Model
    gpu: str
    rank: int
    tokens: int
    adapter: str = _DTYPE
    autocast: bool = False
    checkpointing: bool = False
    layers: int | None = None
    step_us: float | None = None
    source: str = ""
    norms_us: float | None = None

    def __str__(self) -> str:
        words = [self.model.name, f"r {self.rank}", f"{self.tokens} tokens", f"{self.adapter} adapters"]
        if self.layers != self.model.layers and self.layers is not None:
            words.insert(1, f"{self.layers} layers")
        flags = (("autocast", self.autocast), ("checkpointing", self.checkpointing))
        return ", ".join([*words, *(name for name, there in flags if there)]) + f" on {self.gpu}"


@dataclass(frozen=True)
class Call:
    """``count`` calls of one kernel, or of one kind of product (``op`` is ``products``), and the time of one."""

    part: str
    op: str
    spec: str
    count: float
    us: float
    known: str

    @property
    def total_us(self) -> float:
        return self.count * self.us


@dataclass(frozen=True)
class Step:
    """The calls of a step, and the parts that they add up to, in microseconds."""

    case: Case
    calls: tuple[Call, ...]

    @property
    def rest_us(self) -> float | None:
        """What remains of the measured step; None if none was measured, or if the parts exceed it."""
        if self.case.step_us is None:
            return None
        remains = self.case.step_us - sum(call.total_us for call in self.calls)
        return remains if remains > 0.0 else None

    def parts(self) -> dict[tuple[str, str], float]:
        """Microseconds by part and by how they are known, in the order of both; only what is not zero."""
        found: dict[tuple[str, str], float] = {}
        for call in self.calls:
            key = (call.part, call.known)
            found[key] = found.get(key, 0.0) + call.total_us
        if self.rest_us is not None:
            found[REST, REMAINS] = self.rest_us
        order = sorted(found, key=lambda key: (PARTS.index(key[0]), KNOWN.index(key[1])))
        return {key: found[key] for key in order if found[key] > 0.0}

    def values(self) -> dict[str, Any]:
        """The step as values for JSON."""
        case = self.case
        return {
            "case": str(case),
            "model": case.model.name,
            "gpu": case.gpu,
            "rank": case.rank,
            "tokens": case.tokens,
            "adapter": case.adapter,
            "autocast": case.autocast,
            "checkpointing": case.checkpointing,
            "step_us": case.step_us,
            "source": case.source,
            "parts": [{"part": part, "known": known, "us": us} for (part, known), us in self.parts().items()],
            "calls": [{**vars(call), "total_us": call.total_us} for call in self.calls],
        }


def measured_cases(results: Sequence[Results], model: Model | None) -> list[Case]:
    """The steps of doratune that results files have, of ``model`` or of any model of the table."""
    found = []
    for file, row in our_steps(results):
        known, gpu = model or _known_model(row["model"]), _known_gpu(file.env.get("gpu", ""))
        if known is None or gpu is None or row["rank"] is None or len(row["shape"]) != 2:
            continue
        if model is not None and row["model"] != model.name and _known_model(row["model"]) != model:
            continue
        layers, tokens = row["shape"]
        flags = row["flags"]
        if tokens <= TOKEN_BUCKETS[-1] and {*flags} <= {"autocast", "checkpointing"} and row["dtype"] == _DTYPE:
            adapter = row["adapter"] if row["adapter"] in DTYPE_BYTES else _DTYPE
            case = Case(known, gpu.slug, row["rank"], tokens, adapter, "autocast" in flags, "checkpointing" in flags)
            found.append(replace(case, layers=layers, step_us=row["us"], source=file.name))
    return found


def with_norms(case: Case, results: Sequence[Results]) -> Case:
    """The case with the time of its norms, where a results file has it for this model, rank, GPU and mode."""
    layers = sum(each.count for each in case.model.projections)
    for file in results:
        gpu = _known_gpu(file.env.get("gpu", ""))
        if gpu is None or gpu.slug != case.gpu:
            continue
        for row in file.rows:
            norms = row["bench"] == "norms" and row["impl"] == OURS and row["us"] is not None
            mode = (row["rank"], row["adapter"], "autocast" in row["flags"]) == (case.rank, case.adapter, case.autocast)
            # A run with fewer layers than the model says so by its counts, which are the shape.
            if norms and mode and sum(row["shape"]) == layers and _known_model(row["model"]) == case.model:
                return replace(case, norms_us=row["us"])
    return case


def steps_of(cases: Iterable[Case], store: str | None) -> list[Step]:
    """Look up the kernels of each step; ``store`` as in a lookup.

    Raises:
        StoreError: a store cannot be read.
    """
    with stores_open():
        return [Step(case, tuple(_calls(case, store))) for case in cases]


def _calls(case: Case, store: str | None) -> list[Call]:
    gpu = find_gpu(case.gpu)
    share = 1.0 if not (case.layers and case.model.layers) else case.layers / case.model.layers
    counts: dict[tuple[str, str, str], float] = {}
    times: dict[str, tuple[float, str]] = {}

    def count(part: str, op: str, text: str, number: int, again: bool) -> None:
        # A norm pass is one call for all layers of a shape: with a share of the layers its time shrinks alike.
        runs = number * share * (2.0 if again and case.checkpointing else 1.0)
        counts[part, op, text] = counts.get((part, op, text), 0.0) + runs

    if case.norms_us is not None:
        times[_ALL_NORMS] = case.norms_us, MEASURED
        count(NORMS, "weight_norm_group", _ALL_NORMS, 1, False)
    for spec, number, again in _kernels(case):
        if case.norms_us is not None and spec.op == "weight_norm_group":
            continue
        if str(spec) not in times:
            times[str(spec)] = _time(spec, gpu, store)
        part = NORMS if spec.op.startswith("weight_norm") else COMPOSITIONS
        count(part, spec.op, str(spec), number, again)
    for name, shape, us, number in _products(case, gpu):
        text = f"{name} with W {list(shape)}"
        times[text] = us, RATES
        count(PRODUCTS, "products", text, number, name in _OF_FORWARD)
    return [Call(part, op, text, number, *times[text]) for (part, op, text), number in counts.items()]


_OF_FORWARD = {"x Wᵀ", "x Aᵀ", "Y += h Bᵀ"}
"""The products that a checkpointed block runs a second time."""


def _kernels(case: Case) -> Iterable[tuple[KernelSpec, int, bool]]:
    """The kernels of one step without checkpointing, each with the number of its calls, and whether a checkpointed
    block runs them a second time."""
    model = case.model
    groups, gates = model.grouped(), model.gated()
    ups = [each for each in model.projections if each.name == "up_proj" and gates]
    together = {id(each) for each in (*(one for group in groups for one in group), *gates, *ups)}
    for group in groups:
        if find_gpu(case.gpu).architecture == "sm_90" and composes_apart(
            case.rank, bucket_tokens(case.tokens), [each.d_out for each in group], _DTYPE
        ):
            together -= {*map(id, group)}
            continue
        yield from _specs(case, group, "lora_compose_group", group[0].count, again=True)
        yield from _specs(case, group, "compose_backward_group", group[0].count)
    for gate in gates:
        pair = (gate, *ups[:1])
        in_place = adds_in_place(case.rank, bucket_tokens(case.tokens), _DTYPE)
        forward, backward = IN_PLACE if in_place else IN_ONE_KERNEL
        if any(each.name == "down_proj" for each in model.projections):
            # Again for dA of down, which does not keep it, or in the recompute of a checkpoint, which does.
            yield from _specs(case, pair, forward, 2 * gate.count)
        else:
            yield from _specs(case, pair, forward, gate.count, again=True)
        yield from _specs(case, pair, backward, gate.count)
    for each in model.projections:
        if id(each) not in together:
            yield from _specs(case, (each,), "lora_compose", each.count, again=True)
            yield from _specs(case, (each,), "compose_backward", each.count)
        yield from _specs(case, (each,), "adapter_backward", each.count)
    yield from _specs(case, model.projections, "weight_norm_group", 1)


def _specs(
    case: Case, projections: Sequence[Projection], op: str, count: int, *, again: bool = False
) -> Iterable[tuple[KernelSpec, int, bool]]:
    part = replace(case.model, projections=tuple(projections))
    planned = plan_jobs(
        part,
        ranks=[case.rank],
        dtype=_DTYPE,
        adapter_dtype=case.adapter,
        autocast=case.autocast,
        gpu=case.gpu,
        ops=[op],
        tokens=[bucket_tokens(case.tokens)],
    )
    return [(spec, count, again) for spec in planned]


def _time(spec: KernelSpec, gpu: Gpu, store: str | None) -> tuple[float, str]:
    resolution, _ = resolve(spec, store)
    entry = resolution.entry
    if resolution.step == "exact" and entry is not None and entry.evaluation.us is not None:
        known = entry.evaluation.provenance
        if known in (MEASURED, PREDICTED):
            return entry.evaluation.us, known
    return floor_us(spec, gpu), FLOOR


def _products(case: Case, gpu: Gpu) -> Iterable[tuple[str, tuple[int, int], float, int]]:
    """Each product of a layer of a shape: its name, the microseconds of one, and how many a step without checkpointing
    runs. W is frozen and has no gradient. ``Y += h Bᵀ`` is of a gate and an up that are not composed in one kernel."""
    shapes: dict[tuple[int, int], int] = {}
    for each in case.model.projections:
        shapes[each.shape] = shapes.get(each.shape, 0) + each.count
    tokens, rank = case.tokens, case.rank
    for (d_out, d_in), count in shapes.items():
        sizes = {
            "x Wᵀ": (tokens, d_in, d_out),
            "x Aᵀ": (tokens, d_in, rank),
            "dY W": (tokens, d_out, d_in),
            "dY B": (tokens, d_out, rank),
            "dh A": (tokens, rank, d_in),
            "dhᵀ x": (rank, tokens, d_in),
            "dYᵀ h": (d_out, tokens, rank),
        }
        for name, (m, k, n) in sizes.items():
            moved = DTYPE_BYTES[_DTYPE] * (m * k + k * n + m * n)
            yield name, (d_out, d_in), gpu.floor_us(moved, 2.0 * m * k * n, _DTYPE), count
    if adds_in_place(rank, bucket_tokens(tokens), _DTYPE):
        for gate in case.model.gated():
            moved = DTYPE_BYTES[_DTYPE] * (tokens * rank + rank * gate.d_out + 2 * tokens * gate.d_out)
            us = gpu.floor_us(moved, 2.0 * tokens * rank * gate.d_out, _DTYPE)
            yield "Y += h Bᵀ", gate.shape, us, 2 * gate.count


def _known_model(name: str | None) -> Model | None:
    try:
        return find_model(name) if name else None
    except UsageError:
        return None


def _known_gpu(name: str) -> Gpu | None:
    """The listed GPU of a driver's name."""
    for gpu in known_gpus():
        if gpu_of_device(name, gpu.architecture) is gpu:
            return gpu
    return None
