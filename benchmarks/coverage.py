"""How much of what users may run the stores cover: kernels of random models, ranks and dtypes, looked up.

A draw is a model of ``doratune models``, a rank up to 384 and dtypes. Of its kernels some are looked up. A kernel is
*covered* if a store has a measured entry of exactly its spec, or if the lookup's bound on the loss is at most
:data:`MOST_LOSS`. What is not covered is listed by operation and dtypes, with the reason.

:func:`plan` says where minutes of a GPU raise that share most: it chooses specs one after another, each the one whose
measurement brings an entry nearest to the uncovered ones, which count by what they may lose now.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.bound import FAR_DISTANCE
from ..cache.distance import distance
from ..cache.entry import MEASURED
from ..codegen.gpu import find_gpu
from ..codegen.spec import KernelSpec
from ..runtime.loader import resolve, stores_open
from ..tuner.jobs import plan_jobs
from ..tuner.models import list_models
from .results import Row

if TYPE_CHECKING:
    from ..terminal.tables import Table
    from ..tuner.projections import Model

DRAWS = 500
KERNELS = 8
"""Kernels that are looked up of each draw."""
MOST_LOSS = 0.10

RANKS = (8, 16, 32, 64, 128, 256, 384)
"""What most users take. One draw in :data:`ODD_RANK` has another multiple of 8 up to the last one."""
ODD_RANK = 4

DTYPES = ("bf16", "fp32")
"""Of the adapters beside bf16 weights. fp32 is PEFT's default, under autocast."""

ASKED = (
    "weight_norm_group",
    "lora_compose",
    "lora_compose_group",
    "compose_swiglu",
    "compose_swiglu_backward",
    "swiglu_forward",
    "swiglu_backward",
    "compose_backward",
    "compose_backward_group",
    "adapter_backward",
)
"""The operations of a usual step and of inference. Others run where nothing is in its usual place: under a hook, or
where norms are computed layer by layer."""

_UNKNOWN_LOSS = 1.0
"""What a kernel without a bound counts in a plan."""
_CANDIDATES = 400
"""Specs of one kind that a plan considers, the most frequent ones."""

EXACT, BOUNDED, LOOSE, UNKNOWN = "exact", "bounded", "bound > 10 %", "no bound"


@dataclass(frozen=True)
class Looked:
    """One kernel of a draw: its spec, the verdict, and the bound on the lookup's loss, None where there is none."""

    draw: int
    spec: KernelSpec
    verdict: str
    loss: float | None

    @property
    def covered(self) -> bool:
        return self.verdict in (EXACT, BOUNDED)


@dataclass(frozen=True)
class Coverage:
    """The kernels of all draws on one GPU."""

    gpu: str
    draws: int
    looked: tuple[Looked, ...]

    def share(self, *verdicts: str) -> float:
        """The share of the kernels with one of these verdicts."""
        return sum(each.verdict in verdicts for each in self.looked) / max(1, len(self.looked))

    @property
    def covered(self) -> float:
        return self.share(EXACT, BOUNDED)

    @property
    def whole_draws(self) -> float:
        """The share of the draws of which every kernel is covered."""
        lacking = {each.draw for each in self.looked if not each.covered}
        return 1.0 - len(lacking) / self.draws

    def groups(self) -> dict[tuple[str, str], list[Looked]]:
        """The kernels by operation and by dtypes."""
        found: dict[tuple[str, str], list[Looked]] = defaultdict(list)
        for each in self.looked:
            found[each.spec.op, dtypes_of(each.spec)].append(each)
        return dict(sorted(found.items()))

    def rows(self) -> list[Row]:
        """One row of a results file for each operation (as its ``impl``), and one of all."""
        by_op: dict[str, list[Looked]] = {"all": [*self.looked]}
        for (op, _), looked in self.groups().items():
            by_op.setdefault(op, []).extend(looked)
        return [
            {
                "bench": "coverage",
                "op": "coverage",
                "shape": [],
                "rank": None,
                "dtype": "",
                "impl": op,
                "draws": self.draws,
                "kernels": len(looked),
                **{verdict: sum(each.verdict == verdict for each in looked) / len(looked) for verdict in VERDICTS},
                "covered": sum(each.covered for each in looked) / len(looked),
                **({"whole_draws": self.whole_draws} if op == "all" else {}),
            }
            for op, looked in by_op.items()
        ]


VERDICTS = (EXACT, BOUNDED, LOOSE, UNKNOWN)


def dtypes_of(spec: KernelSpec) -> str:
    """The dtypes of a spec in a few words."""
    parts = [spec.weight or spec.activation]
    if spec.adapter not in ("", parts[0]):
        parts.append(f"{spec.adapter} adapters{' under autocast' if spec.autocast else ''}")
    return ", ".join(parts)


def draw_specs(gpu: str, *, draws: int = DRAWS, kernels: int = KERNELS, seed: int = 0) -> list[list[KernelSpec]]:
    """The specs that are looked up of each draw. Equal seeds give equal draws, whatever the stores hold."""
    chance = random.Random(seed)
    models = list_models()
    drawn = []
    for _ in range(draws):
        model = chance.choice(models)
        rank = chance.choice(RANKS)
        if chance.randrange(ODD_RANK) == 0:
            rank = 8 * chance.randint(1, RANKS[-1] // 8)
        specs = usual_specs(model, rank, chance.choice(DTYPES), gpu)
        drawn.append(specs if not kernels else chance.sample(specs, min(kernels, len(specs))))
    return drawn


def usual_specs(model: Model, rank: int, adapter: str, gpu: str) -> list[KernelSpec]:
    """The kernels of training steps and of inference of a model in bf16, with adapters in ``adapter``.

    Autocast rounds fp32 adapters before the compositions, which therefore run as with bf16 ones. The norms round them
    themselves.
    """
    autocast = adapter == "fp32"
    return plan_jobs(model, ranks=[rank], dtype="bf16", adapter_dtype=adapter, autocast=autocast, gpu=gpu, ops=ASKED)


def measure_coverage(
    gpu: str,
    *,
    draws: int = DRAWS,
    kernels: int = KERNELS,
    seed: int = 0,
    store: str | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Coverage:
    """Look up kernels of ``draws`` random models, ranks and dtypes on ``gpu``; ``kernels`` of each draw, or all if 0.

    Raises:
        UnknownGpuError: no GPU of this name is listed. StoreError: a store cannot be read.
    """
    slug = find_gpu(gpu).slug
    drawn = draw_specs(slug, draws=draws, kernels=kernels, seed=seed)
    distinct = {spec: None for specs in drawn for spec in specs}
    verdicts: dict[KernelSpec, tuple[str, float | None]] = {}
    with stores_open():
        for done, spec in enumerate(distinct, 1):
            verdicts[spec] = judge(spec, store)
            tell(done, len(distinct))
    looked = [Looked(index, spec, *verdicts[spec]) for index, specs in enumerate(drawn) for spec in specs]
    return Coverage(slug, draws, tuple(looked))


def judge(spec: KernelSpec, store: str | None = None) -> tuple[str, float | None]:
    """What a lookup says of its loss at ``spec``: the verdict and the bound."""
    resolution, _ = resolve(spec, store)
    entry = resolution.entry
    if resolution.step == "exact" and entry is not None:
        return (EXACT, 0.0) if entry.evaluation.provenance == MEASURED else (UNKNOWN, None)
    loss = None if resolution.bound is None else resolution.bound.loss
    if loss is None:
        return UNKNOWN, None
    return (BOUNDED if loss <= MOST_LOSS else LOOSE), loss


@dataclass(frozen=True)
class Choice:
    """A spec to tune, and how many of the drawn kernels that are not covered it would be nearest to."""

    spec: KernelSpec
    serves: int

    def line(self) -> str:
        """The choice as a line that ``doratune tune --specs`` reads."""
        return f"{self.spec}  # serves {self.serves} of the kernels"


def plan(coverage: Coverage, count: int) -> list[Choice]:
    """The ``count`` specs whose tuning serves the uncovered kernels best, the most useful first.

    A kernel counts by the loss that it may have now, and less with each unit of its distance from the nearest chosen
    spec; beyond :data:`~doratune.cache.bound.FAR_DISTANCE` an entry says nothing of it.
    """
    uncovered = [each for each in coverage.looked if not each.covered]
    weights: Counter[KernelSpec] = Counter()
    for each in uncovered:
        weights[each.spec] += 1
    worst = {each.spec: _UNKNOWN_LOSS if each.loss is None else each.loss for each in uncovered}
    kinds: dict[tuple[str, str], list[KernelSpec]] = defaultdict(list)
    for spec in weights:
        kinds[spec.op, dtypes_of(spec)].append(spec)
    problems = [_Kind(specs, weights, worst) for specs in kinds.values()]
    chosen: list[Choice] = []
    while problems and len(chosen) < count:
        best = max(problems, key=lambda kind: kind.gain)
        if best.gain <= 0:
            break
        chosen.append(best.take())
    return chosen


class _Kind:
    """The uncovered specs of one operation and dtypes, and the next best one to tune."""

    def __init__(
        self, specs: Sequence[KernelSpec], weights: Counter[KernelSpec], worst: dict[KernelSpec, float]
    ) -> None:
        self._weights = [weights[spec] for spec in specs]
        self._values = [weights[spec] * worst[spec] for spec in specs]
        order = sorted(range(len(specs)), key=lambda index: (-self._values[index], str(specs[index])))
        self._candidates = [specs[index] for index in order[:_CANDIDATES]]
        self._near = [[_nearness(spec, candidate) for spec in specs] for candidate in self._candidates]
        self._reached = [0.0] * len(specs)
        self._find()

    def _find(self) -> None:
        gains = [
            sum(
                value * (near - reached)
                for value, near, reached in zip(self._values, row, self._reached, strict=True)
                if near > reached
            )
            for row in self._near
        ]
        self._best = max(range(len(gains)), key=gains.__getitem__)
        self.gain = gains[self._best]

    def take(self) -> Choice:
        row, spec = self._near[self._best], self._candidates[self._best]
        serves = sum(
            weight for weight, near, reached in zip(self._weights, row, self._reached, strict=True) if near > reached
        )
        self._reached = [max(pair) for pair in zip(row, self._reached, strict=True)]
        self._find()
        return Choice(spec, serves)


def _nearness(spec: KernelSpec, candidate: KernelSpec) -> float:
    """1 for the spec itself, 0 from the distance on at which an entry says nothing."""
    apart = distance(spec, candidate)
    return math.exp(-apart / 2.0) if apart <= FAR_DISTANCE else 0.0


def coverage_table(coverage: Coverage) -> Table:
    """The verdicts by operation and dtypes."""
    from ..terminal.tables import Table

    table = Table(title=f"{coverage.gpu}: {coverage.draws} draws, {len(coverage.looked)} kernels")
    table.add_column("operation: dtypes")  # in one column, or the table would not fit 80 characters
    for name in ("kernels", *VERDICTS, "worst bound"):
        table.add_column(name, justify="right")
    for (op, dtypes), looked in coverage.groups().items():
        shares = [f"{sum(each.verdict == verdict for each in looked) / len(looked):.0%}" for verdict in VERDICTS]
        losses = [each.loss for each in looked if each.loss is not None]
        table.add_row(f"{op}: {dtypes}", str(len(looked)), *shares, f"{max(losses):.0%}" if losses else "-")
    return table


def lacking(looked: Iterable[Looked]) -> list[Looked]:
    """The uncovered kernels, each once, sorted by their text."""
    return sorted({each.spec: each for each in looked if not each.covered}.values(), key=lambda each: str(each.spec))
