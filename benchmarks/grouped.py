"""Projections that share x with one product for their h, and the layer as one kernel instead of two.

    python -m doratune.benchmarks.grouped --output benchmarks/results/h200/grouped.json

``q,k,v`` and ``gate,up`` of llama-8b: x·[A_q; A_k; A_v]ᵀ as one product and ``lora_compose`` on slices of it
(``doratune``), beside one product for each projection (``separate``); both without their ``lora_compose`` too
(``h_grouped``, ``h_separate``). ``linear``: ``dora_linear_forward`` (``doratune``) beside cuBLAS's x·Wᵀ followed by
``lora_compose`` over it (``cublas_compose``), and beside x·Wᵀ alone (``cublas_base``), which is less than the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ..codegen.gpu import Gpu
from ..codegen.spec import KernelSpec
from ..errors import UsageError
from ..runtime.device import find_device, gpu_of
from ..runtime.loader import Kernel, load_kernel
from ..runtime.reference import definition
from ..tuner.accuracy import worst_error
from ..tuner.inputs import make_inputs
from ..tuner.models import find_model
from ..tuner.timing import capture, interleaved_us, rotations
from .results import OURS, Outcome, Row, document, environment, peak_mb, require_gpu, results_table, timing

MODEL = "llama-8b"
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
GROUP_TOKENS = (16, 4096)
LINEAR_SHAPES = ((4096, 4096), (14336, 4096))
LINEAR_TOKENS = (1, 16, 64, 512, 4096)
RANK = 384
SCALING = 0.75

SHORT_GRAPH_CALLS = 64
"""Calls in a graph at least, where one call is short, so that starting the graph weighs nothing."""

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Tensors], object]
"""Runs on one set of tensors; every result goes into a tensor of the set."""


def _kernel(op: str, d_out: int, d_in: int, tokens: int) -> Kernel:
    return load_kernel(op, d_out=d_out, d_in=d_in, rank=RANK, tokens=tokens, device="cuda")


def _inputs(op: str, d_out: int, d_in: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    kernel = _kernel(op, d_out, d_in, tokens)
    return make_inputs(kernel.spec, tokens, case="random", seed=seed, device="cuda")[0]


def bench_group(names: Sequence[str], tokens: int, gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    """Time the projections ``names`` of one layer, which share x, with one product for h and with one for each."""
    widths = {p.name: p.d_out for p in find_model(MODEL).projections if p.name in names}
    (d_in,) = {p.d_in for p in find_model(MODEL).projections if p.name in names}
    kernels = {name: _kernel("lora_compose", widths[name], d_in, tokens) for name in names}
    slices = {name: slice(index * RANK, (index + 1) * RANK) for index, name in enumerate(names)}

    def make(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        made = {"x": normal(tokens, d_in), "A": normal(len(names) * RANK, d_in) * d_in**-0.5}
        made["h"] = made["x"].new_empty(tokens, len(names) * RANK)
        for name in names:
            drawn = _inputs("lora_compose", widths[name], d_in, tokens, seed)
            made |= {f"{name}.{part}": drawn[part] for part in ("base", "lora_B", "g")}
            made[f"{name}.h"] = made["x"].new_empty(tokens, RANK)
            made[f"{name}.y"] = torch.empty_like(drawn["base"])
        return made

    def h_grouped(t: Tensors) -> None:
        torch.mm(t["x"], t["A"].T, out=t["h"])

    def h_separate(t: Tensors) -> None:
        for name in names:
            torch.mm(t["x"], t["A"][slices[name]].T, out=t[f"{name}.h"])

    def compose(t: Tensors, name: str, h: torch.Tensor) -> None:
        given = {"base": t[f"{name}.base"], "h": h, "lora_B": t[f"{name}.lora_B"], "g": t[f"{name}.g"]}
        kernels[name](**given, scaling=SCALING, out=t[f"{name}.y"])

    def grouped(t: Tensors) -> None:
        h_grouped(t)
        for name in names:
            compose(t, name, t["h"][:, slices[name]])

    def separate(t: Tensors) -> None:
        h_separate(t)
        for name in names:
            compose(t, name, t[f"{name}.h"])

    checked, errors = make(0), dict.fromkeys((OURS, "separate"), 0.0)
    for impl, run in ((OURS, grouped), ("separate", separate)):
        run(checked)
        for name, kernel in kernels.items():
            used = {part: checked[f"{name}.{part}"] for part in ("base", "lora_B", "g")}
            used["h"] = checked["h"][:, slices[name]] if impl == OURS else checked[f"{name}.h"]
            exact = definition(kernel.spec, used, SCALING)
            error, complaint = worst_error(kernel.spec, {"y": checked[f"{name}.y"]}, exact)
            errors[impl] = max(errors[impl], error)
            if complaint:
                outcome.failures.append(f"{impl} {name} at {tokens} tokens: {complaint}")
    runs = {OURS: grouped, "separate": separate, "h_grouped": h_grouped, "h_separate": h_separate}
    # Least traffic: x, A, B and base read, y written; h stays in the L2 where it fits.
    moved = 2 * (tokens * d_in + len(names) * RANK * d_in + sum((RANK + 2 * tokens) * n for n in widths.values()))
    flops = 2 * tokens * RANK * (len(names) * d_in + sum(widths.values()))
    case = {
        "op": ",".join(name.removesuffix("_proj") for name in names),
        "model": MODEL,
        "shape": [tokens, *widths.values(), d_in],
        "config": ", ".join(str(kernel.config) for kernel in kernels.values()),
        "provenance": ", ".join(sorted({kernel.provenance for kernel in kernels.values()})),
        "floor_us": gpu.floor_us(moved, flops, "bf16"),
    }
    outcome.rows += _time(case, runs, make, errors, gpu, rounds)


def bench_linear(d_out: int, d_in: int, tokens: int, gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    """Time one layer from x and h on: as one kernel, and as cuBLAS's product and ``lora_compose``."""
    linear = _kernel("dora_linear_forward", d_out, d_in, tokens)
    compose = _kernel("lora_compose", d_out, d_in, tokens)

    def make(seed: int) -> dict[str, torch.Tensor]:
        made = _inputs("dora_linear_forward", d_out, d_in, tokens, seed)
        base = made["x"].new_empty(tokens, d_out)
        return {**made, "base": base, "y": torch.empty_like(base)}

    def one_kernel(t: Tensors) -> None:
        linear(t["x"], t["weight"], t["h"], t["lora_B"], t["g"], scaling=SCALING, out=t["y"])

    def cublas_base(t: Tensors) -> None:
        torch.mm(t["x"], t["weight"].T, out=t["base"])

    def cublas_compose(t: Tensors) -> None:
        cublas_base(t)
        compose(t["base"], t["h"], t["lora_B"], t["g"], scaling=SCALING, out=t["base"])

    checked = make(0)
    exact = definition(linear.spec, {name: checked[name] for name in ("x", "weight", "h", "lora_B", "g")}, SCALING)
    one_kernel(checked)
    error, complaint = worst_error(linear.spec, {"y": checked["y"]}, exact)
    if complaint:
        outcome.failures.append(f"{linear.spec} at {tokens} tokens, {linear.config}: {complaint}")
    cublas_compose(checked)  # rounds the base product to bf16 on the way, so its error may be larger
    errors = {OURS: error, "cublas_compose": worst_error(linear.spec, {"y": checked["base"]}, exact)[0]}
    case = {
        "op": "linear",
        "model": None,
        "shape": [tokens, d_out, d_in],
        "config": f"{linear.config}; cublas_compose: {compose.config}",
        "provenance": ", ".join(sorted({linear.provenance, compose.provenance})),
        "floor_us": _linear_floor_us(linear.spec, tokens, gpu),
    }
    runs = {OURS: one_kernel, "cublas_compose": cublas_compose, "cublas_base": cublas_base}
    outcome.rows += _time(case, runs, make, errors, gpu, rounds)


def _linear_floor_us(spec: KernelSpec, tokens: int, gpu: Gpu) -> float:
    """The floor at ``tokens`` tokens, which may be fewer than the spec's bucket."""
    operands = spec.contract.inputs_of(spec) + spec.contract.outputs_of(spec)
    moved = sum(o.elements(spec, tokens) * (4 if o.dtype_of(spec) == "fp32" else 2) for o in operands)
    return gpu.floor_us(moved, spec.contract.matrix_flops(spec) * tokens / spec.tokens, spec.weight)


def _time(
    case: Mapping[str, Any],
    runs: Mapping[str, Run],
    make: Callable[[int], dict[str, torch.Tensor]],
    errors: Mapping[str, float],
    gpu: Gpu,
    rounds: int,
) -> list[Row]:
    """Time ``runs`` in turn over sets that rotate through more memory than the L2 holds; one row for each."""
    first = make(100)
    count = rotations(sum(t.numel() * t.element_size() for t in first.values()), gpu.l2_bytes)
    sets = [first, *(make(100 + index) for index in range(1, count))]
    repeats = max(1, SHORT_GRAPH_CALLS // count) if case["shape"][0] <= 1024 else 1
    graphs, peaks = [], {}
    for impl, run in runs.items():
        peaks[impl] = peak_mb(functools.partial(run, first))
        calls = [functools.partial(run, one) for one in sets] * repeats
        graphs.append((capture(calls), len(calls)))
    return [
        {
            "bench": "grouped",
            **case,
            "rank": RANK,
            "dtype": "bf16",
            "impl": impl,
            **timing(samples),
            "rel_err": errors.get(impl),
            "peak_mb": peaks[impl],
        }
        for impl, samples in zip(runs, interleaved_us(graphs, rounds=rounds), strict=True)
    ]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write the results here as JSON.")
@click.option("--rounds", type=click.IntRange(min=2), default=30, show_default=True, help="Interleaved timing rounds.")
@click.option("--commit", help="The commit measured; asked of git by default.")
def main(output: Path | None, rounds: int, commit: str | None) -> None:
    """Measure grouped projections and the one-kernel layer on the GPU here."""
    from rich.console import Console

    try:
        require_gpu()
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    gpu = gpu_of(find_device("cuda"))
    outcome = Outcome()
    for names in GROUPS:
        for tokens in GROUP_TOKENS:
            bench_group(names, tokens, gpu, rounds, outcome)
            torch.cuda.empty_cache()
    for d_out, d_in in LINEAR_SHAPES:
        for tokens in LINEAR_TOKENS:
            bench_linear(d_out, d_in, tokens, gpu, rounds, outcome)
            torch.cuda.empty_cache()
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(document(environment(commit), outcome.rows), encoding="utf-8")
    Console(width=180).print(results_table(outcome.rows))
    for failure in outcome.failures:
        click.echo(f"inaccurate: {failure}", err=True)
    if outcome.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
