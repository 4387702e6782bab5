"""Projections that read the same x: one product for all their h, beside one product for each.

``doratune`` computes h = x·[A_q; A_k; A_v]ᵀ in one product and composes from slices of it; ``separate`` computes each h
by itself. ``h_grouped`` and ``h_separate`` are those products alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..codegen.gpu import Gpu
from ..codegen.spec import KernelSpec
from ..runtime.kernel import Kernel
from ..runtime.reference import definition
from ..tuner.accuracy import worst_error
from ..tuner.inputs import make_inputs
from ..tuner.models import find_model
from ..tuner.timing import SHORT_TOKENS, Rotation
from .measuring import MEMORY_SHARE, SCALING, load, time_in_turn
from .results import OURS, Outcome, timing

MODEL = "llama-8b"
GROUPS = {"q,k,v": ("q_proj", "k_proj", "v_proj"), "gate,up": ("gate_proj", "up_proj")}
"""By operation, as rows name it."""
GROUP_PEERS = ("separate", "h_grouped", "h_separate")
GROUP_TOKENS = (16, 4096)
RANK = 384

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Tensors], object]
"""Runs on one set of tensors; every result goes into a tensor of the set."""


@dataclass(frozen=True)
class GroupCase:
    """The projections of an operation in :data:`GROUPS` at a token count, in bf16.

    ``specs`` are their ``lora_compose``, by the projection's name; ``d_in`` is the width of the x that they share.
    """

    op: str
    tokens: int
    d_in: int
    specs: Mapping[str, KernelSpec]

    def __str__(self) -> str:
        return f"{self.op} of {MODEL} at {self.tokens} tokens"

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(spec.d_out for spec in self.specs.values())

    def columns(self, name: str) -> slice:
        """Where the h of a projection lies in the h of all."""
        index = list(self.specs).index(name)
        return slice(index * RANK, (index + 1) * RANK)

    def floor_us(self, gpu: Gpu) -> float:
        """The least time: x, A, B and base read, y written; h stays in the L2 where it fits."""
        elements = self.tokens * self.d_in + len(self.specs) * RANK * self.d_in
        elements += sum((RANK + 2 * self.tokens) * d_out for d_out in self.widths)
        flops = 2 * self.tokens * RANK * (len(self.specs) * self.d_in + sum(self.widths))
        return gpu.floor_us(2 * elements, flops, "bf16")

    def make(self, seed: int, device: str = "cuda") -> dict[str, torch.Tensor]:
        """Random inputs and room for the results."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        made = {"x": normal(self.tokens, self.d_in), "A": normal(len(self.specs) * RANK, self.d_in) * self.d_in**-0.5}
        made["h"] = made["x"].new_empty(self.tokens, len(self.specs) * RANK)
        for name, spec in self.specs.items():
            drawn = make_inputs(spec, self.tokens, case="random", seed=seed, device=device)[0]
            made |= {f"{name}.{part}": drawn[part] for part in ("base", "lora_B", "g")}
            made[f"{name}.h"] = made["x"].new_empty(self.tokens, RANK)
            made[f"{name}.y"] = torch.empty_like(drawn["base"])
        return made


def group_cases(gpu: str, ops: Collection[str] = ()) -> Iterator[GroupCase]:
    """The groups that ``ops`` names, all when it is empty, at every token count."""
    projections = {projection.name: projection for projection in find_model(MODEL).projections}
    for op in GROUPS if not ops else [op for op in GROUPS if op in ops]:
        (d_in,) = {projections[name].d_in for name in GROUPS[op]}
        for tokens in GROUP_TOKENS:
            sizes = {name: projections[name].d_out for name in GROUPS[op]}
            specs = {
                name: KernelSpec.create(
                    "lora_compose", d_out=d_out, rank=RANK, tokens=tokens, dtype="bf16", adapter="bf16", gpu=gpu
                )
                for name, d_out in sizes.items()
            }
            yield GroupCase(op, tokens, d_in, specs)


def implementations(case: GroupCase, kernels: Mapping[str, Kernel]) -> dict[str, Run]:
    """What is timed, by name; ``kernels`` are those of the case's specs."""

    def h_grouped(t: Tensors) -> None:
        torch.mm(t["x"], t["A"].T, out=t["h"])

    def h_separate(t: Tensors) -> None:
        for name in kernels:
            torch.mm(t["x"], t["A"][case.columns(name)].T, out=t[f"{name}.h"])

    def compose(t: Tensors, name: str, h: torch.Tensor) -> None:
        given = {"base": t[f"{name}.base"], "h": h, "lora_B": t[f"{name}.lora_B"], "g": t[f"{name}.g"]}
        kernels[name](**given, scaling=SCALING, out=t[f"{name}.y"])

    def grouped(t: Tensors) -> None:
        h_grouped(t)
        for name in kernels:
            compose(t, name, t["h"][:, case.columns(name)])

    def separate(t: Tensors) -> None:
        h_separate(t)
        for name in kernels:
            compose(t, name, t[f"{name}.h"])

    return {OURS: grouped, "separate": separate, "h_grouped": h_grouped, "h_separate": h_separate}


def worst_of_group(case: GroupCase, impl: str, tensors: Tensors) -> tuple[float, str | None]:
    """The largest relative error of what an implementation left in ``tensors``, and what is wrong, or None."""
    worst, complaint = 0.0, None
    for name, spec in case.specs.items():
        used = {part: tensors[f"{name}.{part}"] for part in ("base", "lora_B", "g")}
        used["h"] = tensors["h"][:, case.columns(name)] if impl == OURS else tensors[f"{name}.h"]
        exact = definition(spec, used, SCALING)
        error, wrong = worst_error(spec, {"y": tensors[f"{name}.y"]}, exact)
        worst = error if math.isnan(error) else max(worst, error)
        complaint = complaint or (wrong and f"{name}: {wrong}")
    return worst, complaint


def run_group(case: GroupCase, peers: Collection[str], gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    """Check grouped and separate projections against fp64, then time them and ``peers`` in turn; one row for each."""
    kernels = {name: load(spec) for name, spec in case.specs.items()}
    runs = {name: run for name, run in implementations(case, kernels).items() if name == OURS or name in peers}
    checked = case.make(0)
    set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in checked.values())
    errors: dict[str, float | None] = {}
    complaints: dict[str, str | None] = {}
    for impl in [name for name in (OURS, "separate") if name in runs]:
        runs[impl](checked)
        error, complaints[impl] = worst_of_group(case, impl, checked)
        errors[impl] = error if math.isfinite(error) else None  # JSON has no NaN
        if complaints[impl]:
            outcome.failures.append(f"{case}, {impl}: {complaints[impl]}")
    del checked
    torch.cuda.empty_cache()
    rotation = Rotation(
        lambda seed: case.make(100 + seed),
        set_bytes,
        gpu,
        memory_share=MEMORY_SHARE,
        short=case.tokens <= SHORT_TOKENS,
    )
    samples, peaks = time_in_turn(runs, rotation, rounds=rounds, case=str(case), notes=outcome.notes)
    outcome.rows += [
        {
            "bench": "kernels",
            "model": MODEL,
            "op": case.op,
            "shape": [case.tokens, *case.widths, case.d_in],
            "rank": RANK,
            "dtype": "bf16",
            "adapter": "bf16",
            "flags": [],
            "impl": impl,
            "config": ", ".join(str(kernel.config) for kernel in kernels.values()),
            "provenance": ", ".join(sorted({kernel.provenance for kernel in kernels.values()})),
            **timing(samples[impl]),
            "floor_us": case.floor_us(gpu),
            "rel_err": errors.get(impl),
            "peak_mb": peaks[impl],
            **({"complaint": complaints[impl]} if impl == OURS else {}),
        }
        for impl in samples
    ]
