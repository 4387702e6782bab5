"""The kernels against what people run today, in one process and interleaved, on the same inputs.

    python benchmarks/kernels.py --output benchmarks/results/h200/kernels.json

``weight_norm`` runs beside PEFT's own ``get_weight_norm`` (PEFT from PyPI, with the identity product that its layer
does before), a dense B @ A in PyTorch, and the bare cuBLAS product W @ A.T that any factored norm needs at least;
``lora_compose`` beside PEFT's eager formula, plain LoRA and the bare product h @ B.T; the elementwise operations beside
their eager formulas and the copy ceiling. GPU time comes from CUDA graph replays over inputs that rotate through more
memory than the L2 holds; peak memory is what one call adds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch

import doratune
from doratune.codegen.gpu import Gpu
from doratune.codegen.spec import KernelSpec
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.evaluation import floor_us
from doratune.tuner.inputs import make_inputs, make_outputs
from doratune.tuner.measure import driver_version
from doratune.tuner.timing import capture, interleaved_us, rotations

NORM_SHAPES = [
    (4096, 4096, 64),
    (4096, 4096, 384),
    (14336, 4096, 384),
    (4096, 14336, 384),
    (8192, 8192, 384),
    (8192, 28672, 384),
]
TOKEN_SHAPES = [(1, 4096), (16, 4096), (4096, 4096), (8192, 4096), (4096, 14336)]
BACKWARD_SHAPES = [(8192, 4096), (4096, 14336), (16384, 8192)]
RANK = 384
SCALING = 0.75

Inputs = Mapping[str, torch.Tensor]
Implementation = Callable[[Inputs, Inputs], object]
"""Runs on a set of inputs and outputs; only doratune writes the outputs."""


def peft_norm() -> Implementation:
    """PEFT's weight norm: its method, after the B @ A that its DoRA layer makes by sending the identity through."""
    from peft.tuners.lora.dora import DoraLinearLayer

    layer = DoraLinearLayer(fan_in_fan_out=False)

    def run(inputs: Inputs, _: Inputs) -> torch.Tensor:
        weight = inputs["weight"]
        eye = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
        lora_weight = (eye @ inputs["lora_A"].T @ inputs["lora_B"].T).T
        norm: torch.Tensor = layer.get_weight_norm(weight, lora_weight, SCALING)
        return norm

    return run


def dense_norm(inputs: Inputs, _: Inputs) -> torch.Tensor:
    """The norm of the dense W + sBA."""
    return torch.linalg.norm(inputs["weight"] + SCALING * (inputs["lora_B"] @ inputs["lora_A"]), dim=1)


def peft_compose(inputs: Inputs, _: Inputs) -> torch.Tensor:
    """PEFT's eager formula from h on, its result added to the base output."""
    g = inputs["g"].to(inputs["base"].dtype)
    lora = inputs["h"] @ inputs["lora_B"].T if "h" in inputs else inputs["lora"]
    return inputs["base"] + ((g - 1) * inputs["base"] + g * lora * SCALING)


def plain_lora(inputs: Inputs, _: Inputs) -> torch.Tensor:
    """LoRA without DoRA: product, scale, add."""
    return inputs["base"] + (inputs["h"] @ inputs["lora_B"].T) * SCALING


def eager_backward(inputs: Inputs, _: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """dYg and dg in eager PyTorch."""
    return inputs["g"].to(inputs["dy"].dtype) * inputs["dy"], (inputs["dy"] * inputs["inner"]).sum(dim=0)


def product(left: str, right: str) -> Implementation:
    """The bare cuBLAS product that the operation needs at least."""
    return lambda inputs, _: inputs[left] @ inputs[right].T


def copies(inputs: Inputs, outputs: Inputs) -> None:
    """As many bytes as the operation moves, by device copies: every output written from an input of its size."""
    streamed = [tensor for tensor in inputs.values() if tensor.ndim == 2]
    half = streamed[0].numel() * (len(streamed) + 1) // 2  # a copy reads and writes
    whole, part = divmod(half, streamed[0].numel())
    destination = next(iter(outputs.values())).view(-1)
    for index in range(whole):
        destination.copy_(streamed[index].view(-1))
    if part:
        destination[:part].copy_(streamed[-1].view(-1)[:part])


def cases(gpu: Gpu, peft: bool) -> list[tuple[KernelSpec, dict[str, Implementation]]]:
    """The specs and their peers."""
    found: list[tuple[KernelSpec, dict[str, Implementation]]] = []

    def spec(op: str, **values: int) -> KernelSpec:
        return KernelSpec.create(op, **{"rank": RANK, **values}, dtype="bf16", adapter="bf16", gpu=gpu.slug)

    for d_out, d_in, rank in NORM_SHAPES:
        peers: dict[str, Implementation] = {"peft_eager": peft_norm()} if peft else {}
        peers |= {"dense_ba": dense_norm, "cublas_product": product("weight", "lora_A")}
        found.append((spec("weight_norm", d_out=d_out, d_in=d_in, rank=rank), peers))
    for tokens, d_out in TOKEN_SHAPES:
        found.append(
            (
                spec("lora_compose", d_out=d_out, tokens=tokens),
                {"peft_eager": peft_compose, "lora_eager": plain_lora, "cublas_product": product("h", "lora_B")},
            )
        )
    for tokens, d_out in BACKWARD_SHAPES:
        found.append(
            (spec("compose_forward", d_out=d_out, tokens=tokens), {"peft_eager": peft_compose, "copy": copies})
        )
        found.append((spec("compose_backward", d_out=d_out, tokens=tokens), {"eager": eager_backward, "copy": copies}))
    return found


def run_case(spec: KernelSpec, peers: dict[str, Implementation], gpu: Gpu, rounds: int) -> list[dict[str, Any]]:
    """Check doratune against fp64, then time it and its peers in turn; one row for each."""
    tokens = spec.tokens or 1
    kernel = doratune.load_kernel(
        spec.op, d_out=spec.d_out, d_in=spec.d_in or 1, rank=spec.rank or 1, tokens=tokens, device="cuda"
    )

    def ours(inputs: Inputs, outputs: Inputs) -> None:
        kernel.launch(tuple(inputs.values()), tuple(outputs.values()), SCALING if spec.contract.scaling else None)

    inputs, _ = make_inputs(spec, tokens, case="random", device="cuda")
    outputs = make_outputs(spec, tokens, "cuda")
    ours(inputs, outputs)
    error, complaint = worst_error(spec, outputs, definition(spec, inputs, SCALING))
    if complaint:
        raise SystemExit(f"{spec}: {complaint}")

    implementations = {"doratune": ours, **peers}
    count = rotations(spec.contract.operand_bytes(spec), gpu.l2_bytes)
    sets = [
        (make_inputs(spec, tokens, case="random", seed=seed, device="cuda")[0], make_outputs(spec, tokens, "cuda"))
        for seed in range(count)
    ]
    peaks, graphs = {}, []
    for name, run in implementations.items():
        peaks[name] = peak_mb(functools.partial(run, *sets[0]))
        repeats = max(1, 64 // count) if tokens <= 1024 and spec.op != "weight_norm" else 1
        calls = [functools.partial(run, *one) for one in sets] * repeats
        graphs.append((capture(calls), len(calls)))
    rows = []
    for name, samples in zip(implementations, interleaved_us(graphs, rounds=rounds), strict=True):
        low, *_, high = statistics.quantiles(samples, n=5)
        rows.append(
            {
                "bench": "kernels",
                "op": spec.op,
                "shape": [getattr(spec, dim) for dim in ("tokens", "d_out", "d_in") if getattr(spec, dim)],
                "rank": spec.rank or None,
                "dtype": spec.weight or spec.activation,
                "impl": name,
                "config": str(kernel.config) if name == "doratune" else None,
                "provenance": kernel.provenance if name == "doratune" else None,
                "us": statistics.median(samples),
                "us_p20": low,
                "us_p80": high,
                "floor_us": floor_us(spec, gpu),
                "rel_err": error if name == "doratune" else None,
                "peak_mb": peaks[name],
            }
        )
    return rows


def peak_mb(call: Callable[[], object]) -> float:
    """The megabytes (10**6 bytes) that a call adds to the memory in use while it runs, its result included."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def environment(commit: str | None) -> dict[str, str]:
    """What the results hold for."""
    import triton

    if commit is None:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=True
        ).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["peft"] = importlib.metadata.version("peft")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        **versions,
        "doratune_commit": commit,
        "date": date.today().isoformat(),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a case: doratune's time, then every peer's as a multiple of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "op", "shape", "rank", "doratune µs", "floor µs", "peers (× doratune's time)", "peak MB (doratune / peers)"
    )
    for ours in (row for row in rows if row["impl"] == "doratune"):
        peers = [
            r
            for r in rows
            if (r["op"], r["shape"], r["rank"]) == (ours["op"], ours["shape"], ours["rank"]) and r is not ours
        ]
        table.add_row(
            ours["op"],
            "×".join(map(str, ours["shape"])),
            str(ours["rank"] or ""),
            f"{ours['us']:.1f}",
            f"{ours['floor_us']:.1f}",
            ", ".join(f"{peer['impl']} {peer['us'] / ours['us']:.2f}" for peer in peers),
            f"{ours['peak_mb']:.0f} / " + ", ".join(f"{peer['peak_mb']:.0f}" for peer in peers),
        )
    Console(width=180).print(table)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write the results here as JSON.")
@click.option("--rounds", default=30, show_default=True, help="Interleaved timing rounds.")
@click.option("--commit", help="The commit measured; asked of git by default.")
def main(output: Path | None, rounds: int, commit: str | None) -> None:
    """Measure the kernels against their peers on the GPU here."""
    if not torch.cuda.is_available():
        raise click.UsageError("benchmarks need a GPU and PyTorch sees none")
    gpu = gpu_of(find_device("cuda"))
    try:
        peft_norm()
        peft = True
    except ImportError:
        click.echo("PEFT is not installed: its weight norm is left out (pip install 'doratune[peft]')", err=True)
        peft = False
    rows: list[dict[str, Any]] = []
    for spec, peers in cases(gpu, peft):
        rows += run_case(spec, peers, gpu, rounds)
        torch.cuda.empty_cache()
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"schema": 1, "env": environment(commit), "rows": rows}, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
