"""The kernels against what people run today, in one process and interleaved, on the same inputs.

GPU time comes from CUDA graph replays over inputs that rotate through more memory than the L2 holds; peak memory is
what one call adds. Whatever computes a whole operation is first compared with fp64, doratune also where each term of
the operation dominates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.gpu import Gpu
from ..codegen.ops import OPERAND_BYTES, OPS, WIDTHS
from ..codegen.spec import KernelSpec
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..runtime.reference import definition
from ..tuner.accuracy import worst_error
from ..tuner.inputs import make_inputs, make_outputs
from ..tuner.timing import SHORT_TOKENS, Rotation
from .dorafactors import Dorafactors
from .groups import GROUP_PEERS, GROUPS, GroupCase, group_cases, run_group
from .measuring import MEMORY_SHARE, SCALING, check_names, left_out, load, require_gpu, time_in_turn
from .peers import PEERS, Inputs, Peer, Run, peers_of
from .results import OURS, Outcome, Row, spec_columns, timing

NORM_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
TOKEN_SHAPES = ((1, 4096), (16, 4096), (64, 4096), (4096, 4096), (8192, 4096), (4096, 14336))
LINEAR_SHAPES = (*TOKEN_SHAPES, (512, 4096), (1, 14336), (16, 14336), (64, 14336), (512, 14336))
ELEMENTWISE_SHAPES = ((8192, 4096), (4096, 14336), (16384, 8192))
GATED_SHAPES = ((16, 14336), (2048, 4864), (2048, 8192), (4096, 14336))
GROUP_SHAPES = ((16, 4096, 1024, 1024), (2048, 896, 128, 128), (2048, 2048, 512, 512), (4096, 4096, 1024, 1024))
RANK, SMALL_RANK, LOW_RANK = 384, 64, 16


@dataclass(frozen=True)
class Case:
    """A kernel at a token count, which may lie inside the spec's bucket; 0 for an operation without tokens."""

    spec: KernelSpec
    tokens: int = 0

    def __str__(self) -> str:
        return str(self.spec)


def kernel_cases(gpu: str, ops: Collection[str] = ()) -> Iterator[Case]:
    """What is measured on ``gpu``: every shape in bf16, some in the other dtypes and with fp32 adapters.

    ``ops`` are the operations to measure, all when empty.
    """

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
            for tokens, d_out in TOKEN_SHAPES if op == "lora_compose" else LINEAR_SHAPES:
                yield case(op, tokens=tokens, d_out=d_out, d_in=4096)
            for form in forms(op):
                yield from (case(op, tokens=tokens, d_out=4096, d_in=4096, **form) for tokens in (16, 4096))
        elif op in ("compose_swiglu", "compose_swiglu_backward"):
            for tokens, d_out in GATED_SHAPES:
                yield from (case(op, tokens=tokens, d_out=d_out, rank=rank) for rank in (LOW_RANK, RANK))
        elif op in ("swiglu_forward", "swiglu_backward"):
            yield from (case(op, tokens=tokens, d_out=d_out) for tokens, d_out in GATED_SHAPES[1:])
        elif op in ("lora_compose_group", "compose_backward_group"):
            for tokens, *widths in GROUP_SHAPES:
                dims: dict[str, Any] = dict(zip(WIDTHS, widths, strict=False))
                yield from (case(op, tokens=tokens, rank=rank, **dims) for rank in (LOW_RANK, RANK))
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

    ``ops`` may also name the groups of projections in :data:`~.groups.GROUPS`. ``rounds`` is the number of interleaved
    timing rounds; ``progress`` gets a line as each case begins.

    Raises:
        UsageError: there is no GPU, or an operation or peer does not exist.
    """
    check_names("operation", ops, (*OPS, *GROUPS))
    check_names("peer", peers, (*PEERS, *GROUP_PEERS))
    require_gpu()
    gpu = gpu_of(find_device("cuda"))
    cases: list[Case | GroupCase] = [*kernel_cases(gpu.slug, ops), *group_cases(gpu.slug, ops)]
    outcome = Outcome()
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case}")
        if isinstance(case, Case):
            chosen = [p for p in peers_of(case.spec, SCALING, dorafactors) if not peers or p.name in peers]
            run_case(case, chosen, gpu, rounds, outcome)
        else:
            run_group(case, [name for name in GROUP_PEERS if not peers or name in peers], gpu, rounds, outcome)
        torch.compiler.reset()  # else the formulas' next shapes count as recompilations, of which PyTorch allows few
        torch.cuda.empty_cache()
    return outcome


def run_case(case: Case, peers: Sequence[Peer], gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    """Compare doratune and its peers with fp64, then time them in turn; one row for each."""
    spec, kernel = case.spec, load(case.spec, case.tokens)
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
        except Exception as failure:  # the other peers continue
            outcome.notes.append(f"{spec}: {left_out(peer.name, failure)}")
    del inputs, outputs, exact
    torch.cuda.empty_cache()
    samples, peaks = _time(case, running, gpu, rounds, outcome.notes)
    kernels = {OURS: kernel, **{peer.name: peer.kernel for peer in peers}}
    for name in samples:
        row = kernel_row(case, name, samples[name], gpu, kernels[name])
        error = errors.get(name, math.nan)
        row |= {"rel_err": error if math.isfinite(error) else None, "peak_mb": peaks[name]}
        if name == OURS:
            row["complaint"] = complaint
        outcome.rows.append(row)


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
    """Microseconds of one call in each round, and the peak memory of one call, by implementation."""
    spec, tokens = case.spec, case.tokens or 1

    def make(seed: int) -> tuple[Inputs, Inputs]:
        inputs, _ = make_inputs(spec, tokens, case="random", seed=seed, device="cuda")
        return inputs, make_outputs(spec, tokens, "cuda")

    def on_a_set(run: Run) -> Callable[[tuple[Inputs, Inputs]], object]:
        return lambda tensors: run(*tensors)

    short = 0 < case.tokens <= SHORT_TOKENS
    rotation = Rotation(make, _work(case)[0], gpu, memory_share=MEMORY_SHARE, short=short)
    runs = {name: on_a_set(run) for name, run in running.items()}
    return time_in_turn(runs, rotation, rounds=rounds, case=str(spec), notes=notes)


def kernel_row(case: Case, impl: str, samples_us: Sequence[float], gpu: Gpu, kernel: Kernel | None = None) -> Row:
    """The row of one implementation, without its accuracy and memory; ``kernel`` is doratune's kernel in it, if any."""
    moved, flops = _work(case)
    return {
        "bench": "kernels",
        **spec_columns(case.spec, case.tokens),
        "impl": impl,
        "config": None if kernel is None else str(kernel.config),
        "provenance": None if kernel is None else kernel.provenance,
        **timing(samples_us),
        "floor_us": gpu.floor_us(moved, flops, case.spec.wide),
    }


def _work(case: Case) -> tuple[int, int]:
    """Bytes and matrix flops of the operation at the case's token count, which may lie inside its bucket."""
    spec, contract = case.spec, case.spec.contract
    operands = contract.inputs_of(spec) + contract.outputs_of(spec)
    moved = sum(o.elements(spec, case.tokens or None) * OPERAND_BYTES[o.dtype_of(spec)] for o in operands)
    flops = contract.matrix_flops(spec)
    return moved, flops * case.tokens // spec.tokens if spec.tokens else flops
