"""The kernels against what people run today, in one process and interleaved, on the same inputs.

GPU time comes from CUDA graph replays over inputs that rotate through more memory than the L2 holds; peak memory is
what one call adds. Everything that computes a whole operation is held against fp64 first, doratune also where each term
of the operation dominates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.gpu import Gpu
from ..codegen.ops import DTYPE_BYTES, OPS
from ..codegen.spec import FLAGS, KernelSpec
from ..errors import UsageError, near_names
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..runtime.loader import load_kernel
from ..runtime.reference import TORCH_DTYPES, definition
from ..tuner.accuracy import worst_error
from ..tuner.inputs import make_inputs, make_outputs
from ..tuner.timing import capture, interleaved_us, rotations
from .dorafactors import Dorafactors
from .peers import PEERS, Inputs, Peer, Run, peers_of
from .results import OURS, Outcome, Row, peak_mb, require_gpu, timing

NORM_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
TOKEN_SHAPES = ((1, 4096), (16, 4096), (64, 4096), (4096, 4096), (8192, 4096), (4096, 14336))
ELEMENTWISE_SHAPES = ((8192, 4096), (4096, 14336), (16384, 8192))
RANK, SMALL_RANK = 384, 64
SCALING = 0.75

MEMORY_SHARE = 0.5
"""Share of the free GPU memory for the rotating inputs; peers that make dense matrices need the rest."""

SHORT_GRAPH_CALLS = 64
"""Calls in a graph at least, where one call is short, so that starting the graph weighs nothing."""


@dataclass(frozen=True)
class Case:
    """A kernel at a token count, which may lie inside the spec's bucket; 0 for an operation without tokens."""

    spec: KernelSpec
    tokens: int = 0


def kernel_cases(gpu: str, ops: Collection[str] = ()) -> Iterator[Case]:
    """What is measured on ``gpu``: every shape in bf16, some in the other dtypes and with fp32 adapters.

    Raises:
        UsageError: an operation that does not exist.
    """
    for op in ops:
        if op not in OPS:
            raise UsageError(f"unknown operation {op!r}{near_names(op, OPS)} (known: {', '.join(OPS)})")

    def case(op: str, dtype: str = "bf16", adapter: str | None = None, tokens: int = 0, **values: Any) -> Case:
        sizes = {"rank": RANK, **values, "tokens": tokens or None}
        return Case(KernelSpec.create(op, **sizes, dtype=dtype, adapter=adapter or dtype, gpu=gpu), tokens)

    def forms(op: str) -> Iterator[dict[str, Any]]:
        """The dtypes other than plain bf16: PEFT's fp32 adapters kept exact and, where there is a flag, rounded."""
        if "adapter" in OPS[op].dtypes:
            yield {"adapter": "fp32"}
            if "autocast" in OPS[op].flags:
                yield {"adapter": "fp32", "autocast": True}
        yield {"dtype": "fp16"}
        yield {"dtype": "fp32"}

    for op in ops or OPS:
        if op == "weight_norm":
            for d_out, d_in in NORM_SHAPES:
                yield from (case(op, d_out=d_out, d_in=d_in, rank=rank) for rank in (SMALL_RANK, RANK))
            for form in forms(op):
                yield from (case(op, d_out=d_out, d_in=d_in, **form) for d_out, d_in in NORM_SHAPES[:2])
        elif op in ("lora_compose", "dora_linear_forward"):
            for tokens, d_out in TOKEN_SHAPES:
                yield case(op, tokens=tokens, d_out=d_out, d_in=4096)
            for form in forms(op):
                yield from (case(op, tokens=tokens, d_out=4096, d_in=4096, **form) for tokens in (16, 4096))
        elif op in ("compose_forward", "compose_backward"):
            for tokens, d_out in ELEMENTWISE_SHAPES:
                yield case(op, tokens=tokens, d_out=d_out)
                if "output" in OPS[op].flags:
                    yield case(op, tokens=tokens, d_out=d_out, output=True)
            for form in forms(op):
                yield case(op, tokens=ELEMENTWISE_SHAPES[0][0], d_out=ELEMENTWISE_SHAPES[0][1], **form)


def bench_kernels(
    *,
    ops: Collection[str] = (),
    peers: Collection[str] = (),
    rounds: int = 30,
    dorafactors: Dorafactors | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure the kernels of ``ops`` (all when empty) beside their ``peers`` (all when empty) on the GPU here.

    ``rounds`` are interleaved timing rounds; ``progress`` is told of each case as it begins.

    Raises:
        UsageError: there is no GPU, or an operation or peer does not exist.
    """
    list(kernel_cases("h200", ops))  # a wrong name is told before a missing GPU
    for name in peers:
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}{near_names(name, PEERS)} (known: {', '.join(PEERS)})")
    require_gpu()
    gpu = gpu_of(find_device("cuda"))
    cases = list(kernel_cases(gpu.slug, ops))
    outcome = Outcome()
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case.spec}")
        chosen = [p for p in peers_of(case.spec, SCALING, dorafactors) if not peers or p.name in peers]
        run_case(case, chosen, gpu, rounds, outcome)
        torch.compiler.reset()  # else the formulas' next shapes count as recompilations, of which PyTorch allows few
        torch.cuda.empty_cache()
    return outcome


def run_case(case: Case, peers: Sequence[Peer], gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    """Hold doratune and its peers against fp64, then time them in turn; one row for each."""
    spec, kernel = case.spec, load_case(case)
    found: list[float] = []
    complaint = None
    for draw in ("mixed", "random"):
        inputs, outputs, exact = checked_set(case, draw)
        _ours(kernel)(inputs, outputs)
        error, wrong = worst_error(spec, outputs, exact)
        found.append(error)
        complaint = complaint or (wrong and f"{draw} inputs: {wrong}")
    if complaint:
        outcome.failures.append(f"{spec}, {kernel.config}: {complaint}")
    errors = {OURS: math.nan if any(map(math.isnan, found)) else max(found)}
    running: dict[str, Run] = {OURS: _ours(kernel)}
    for peer in peers:
        try:
            result = peer.run(inputs, outputs)
            if peer.outputs is not None:
                errors[peer.name] = worst_error(spec, peer.outputs(result, inputs), exact)[0]
            running[peer.name] = peer.run
        except Exception as failure:  # whatever a peer dies of, the others go on
            outcome.notes.append(_left_out(spec, peer.name, failure))
    del inputs, outputs, exact
    torch.cuda.empty_cache()
    samples, peaks = _time(case, running, gpu, rounds, outcome.notes)
    for name in samples:
        row = kernel_row(case, kernel, name, samples[name], gpu)
        error = errors.get(name, math.nan)
        row |= {"rel_err": error if math.isfinite(error) else None, "peak_mb": peaks[name]}
        if name == OURS:
            row["complaint"] = complaint
        outcome.rows.append(row)


def load_case(case: Case) -> Kernel:
    """The kernel that a user of ``load_kernel`` gets for the case."""
    spec = case.spec
    flags: dict[str, Any] = {flag: True for flag in FLAGS if getattr(spec, flag)}
    return load_kernel(
        spec.op,
        d_out=spec.d_out,
        d_in=spec.d_in or 1,
        rank=spec.rank or 1,
        tokens=case.tokens or 1,
        dtype=TORCH_DTYPES[spec.weight or spec.activation],
        adapter_dtype=TORCH_DTYPES[spec.adapter] if spec.adapter else None,
        device="cuda",
        **flags,
    )


def checked_set(
    case: Case, draw: str, device: str = "cuda"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, poisoned outputs and the exact outputs in fp64."""
    tokens = case.tokens or 1
    inputs, scaling = make_inputs(case.spec, tokens, case=draw, device=device)
    assert scaling == SCALING, f"{draw} inputs have their own scaling"
    return inputs, make_outputs(case.spec, tokens, device), definition(case.spec, inputs, SCALING)


def _ours(kernel: Kernel) -> Run:
    scaling = SCALING if kernel.spec.contract.scaling else None

    def run(inputs: Inputs, outputs: Inputs) -> None:
        kernel.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)

    return run


def _time(
    case: Case, running: Mapping[str, Run], gpu: Gpu, rounds: int, notes: list[str]
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Microseconds of one call in each round, and the peak memory of one call, by implementation.

    A peer that cannot be captured is left out, with a note.
    """
    spec, tokens = case.spec, case.tokens or 1
    set_bytes, _ = _work(case)
    roomy = int(MEMORY_SHARE * torch.cuda.mem_get_info()[0]) // set_bytes
    count = max(1, min(rotations(set_bytes, gpu.l2_bytes), roomy))
    sets = [
        (make_inputs(spec, tokens, case="random", seed=seed, device="cuda")[0], make_outputs(spec, tokens, "cuda"))
        for seed in range(count)
    ]
    short = bool(case.tokens) and case.tokens <= 1024
    repeats = max(1, SHORT_GRAPH_CALLS // count) if short else 1
    peaks: dict[str, float | None] = {}
    graphs = []
    for name, run in running.items():
        calls = [functools.partial(run, *one) for one in sets] * repeats
        try:
            peak = peak_mb(calls[0])
            graphs.append((capture(calls), len(calls)))
        except Exception as failure:
            if name == OURS:
                raise
            notes.append(_left_out(spec, name, failure))
        else:
            peaks[name] = peak
    return dict(zip(peaks, interleaved_us(graphs, rounds=rounds), strict=True)), peaks


def _left_out(spec: KernelSpec, peer: str, failure: Exception) -> str:
    reason = next(iter(str(failure).splitlines()), "")
    return f"{spec}: {peer} left out: {type(failure).__name__}: {reason}"


def kernel_row(case: Case, kernel: Kernel, impl: str, samples_us: Sequence[float], gpu: Gpu) -> Row:
    """The row of one implementation, without what was found out about its accuracy and memory."""
    spec = case.spec
    sizes = {"tokens": case.tokens, "d_out": spec.d_out, "d_in": spec.d_in}
    moved, flops = _work(case)
    ours = impl == OURS
    return {
        "bench": "kernels",
        "op": spec.op,
        "shape": [size for size in sizes.values() if size],
        "rank": spec.rank or None,
        "dtype": spec.weight or spec.activation,
        "adapter": spec.adapter or None,
        "flags": [flag for flag in FLAGS if getattr(spec, flag)],
        "impl": impl,
        "config": str(kernel.config) if ours else None,
        "provenance": kernel.provenance if ours else None,
        **timing(samples_us),
        "floor_us": gpu.floor_us(moved, flops, spec.weight or spec.activation),
    }


def _work(case: Case) -> tuple[int, int]:
    """Bytes and matrix flops of the operation at the case's own token count, which is not always its bucket's."""
    spec, contract = case.spec, case.spec.contract
    operands = contract.inputs_of(spec) + contract.outputs_of(spec)
    moved = sum(o.elements(spec, case.tokens or None) * DTYPE_BYTES[o.dtype_of(spec)] for o in operands)
    flops = contract.matrix_flops(spec)
    return moved, flops * case.tokens // spec.tokens if spec.tokens else flops
