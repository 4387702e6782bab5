"""The fused DoRA linear layer of few tokens from a quantised W, beside its unfused sequence and beside a bf16 W.

Every row is ``dora_linear_forward`` at one shape, rank and number of tokens; ``dtype`` says how W is stored. The impl
``doratune`` is the one kernel; ``unfused`` is the product that a layer would run without it
(:mod:`~doratune.tuner.fusion`), then the composition. All are timed in turn in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..codegen.gpu import Gpu
from ..codegen.ops import DECODE_TOKENS
from ..codegen.spec import KernelSpec
from ..codegen.weight_formats import is_format, stored_as
from ..errors import UsageError
from ..runtime.ahead import compile_ahead
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..runtime.reference import definition
from ..tuner.accuracy import worst_error
from ..tuner.fusion import composition_of, product_of, run_unfused
from ..tuner.inputs import make_inputs, make_outputs
from ..tuner.timing import Graph, GraphPool, Rotation, interleaved_us
from .measuring import MEMORY_SHARE, SCALING, load, require_gpu
from .packed import FORMATS, PLAIN, contiguous
from .results import OURS, Outcome, Row, spec_columns, timing

SHAPES = ("4096x4096", "14336x4096", "8192x28672")
RANKS = (16, 64)
TOKENS = (1, 4, DECODE_TOKENS)
ROUNDS = 9
UNFUSED = "unfused"

Tensors = dict[str, torch.Tensor]
Sets = Rotation[tuple[Tensors, Tensors]]


def spec_of(shape: tuple[int, int], rank: int, tokens: int, weight: str, gpu: Gpu) -> KernelSpec:
    """The spec of a layer with W [d_out, d_in] in ``weight``, bf16 or a weight format."""
    stored = stored_as(weight, PLAIN) if is_format(weight) else weight
    sizes = {"d_out": shape[0], "d_in": shape[1], "rank": rank, "tokens": tokens}
    return KernelSpec.create("dora_linear_forward", **sizes, dtype=stored, adapter=PLAIN, gpu=gpu.slug)


def bench_packed_linear(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int] = RANKS,
    formats: Sequence[str] = FORMATS,
    tokens: Sequence[int] = TOKENS,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Check and time the layer from each of ``formats`` and from bf16, fused and unfused, in turn; a row for each.

    Raises:
        UsageError: an unknown format, too many tokens, or there is no GPU.
    """
    for form in formats:
        stored_as(form, PLAIN)
    for count in tokens:
        if not 1 <= count <= DECODE_TOKENS:
            raise UsageError(f"tokens={count}: packed weights are for 1 to {DECODE_TOKENS} tokens")
    require_gpu()
    gpu = gpu_of(find_device("cuda"))
    outcome = Outcome()
    for shape in shapes:
        for rank in ranks:
            for count in tokens:
                progress(f"{count} tokens through {shape[0]}x{shape[1]} at rank {rank}")
                specs = [spec_of(shape, rank, count, weight, gpu) for weight in (PLAIN, *formats)]
                _run([(load(spec), _composition(spec)) for spec in specs], count, gpu, rounds, outcome)
    return outcome


def _composition(spec: KernelSpec) -> Kernel:
    composition = composition_of(spec)
    assert composition is not None
    return load(composition)


def _run(kernels: Sequence[tuple[Kernel, Kernel]], tokens: int, gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    compile_ahead((kernel, contiguous(kernel)) for pair in kernels for kernel in pair)
    graphs, rows, kept, pool = {}, [], [], GraphPool()
    for kernel, composition in kernels:
        spec = kernel.spec
        error = _check(kernel, tokens, outcome)
        sets = _rotation(spec, tokens, gpu)
        products = {id(inputs): product_of(spec, inputs) for inputs, _ in sets.sets}
        kept.append((sets, products))  # a graph does not keep its inputs
        runs: dict[str, Callable[[tuple[Tensors, Tensors]], object]] = {
            OURS: functools.partial(_launch, kernel),
            UNFUSED: functools.partial(_unfused, composition, products),
        }
        for impl, run in runs.items():
            calls = sets.calls(run)
            graphs[f"{spec} {impl}"] = Graph(pool.capture(calls), len(calls))
            rows.append(_row(kernel if impl == OURS else composition, spec, tokens, impl, gpu, error))
    for row, samples in zip(rows, interleaved_us(graphs, rounds=rounds).values(), strict=True):
        outcome.rows.append({**row, **timing(samples)})


def _check(kernel: Kernel, tokens: int, outcome: Outcome) -> float:
    spec = kernel.spec
    inputs, scaling = make_inputs(spec, tokens, device="cuda")
    outputs = make_outputs(spec, tokens, "cuda")
    kernel.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    error, complaint = worst_error(spec, outputs, definition(spec, inputs, scaling))
    if complaint:
        outcome.failures.append(f"{spec}: {complaint}")
    return error


def _row(kernel: Kernel, spec: KernelSpec, tokens: int, impl: str, gpu: Gpu, error: float) -> Row:
    contract = spec.contract
    return {
        "bench": "packed-linear",
        **spec_columns(spec, tokens),
        "impl": impl,
        "config": str(kernel.config),
        "provenance": kernel.provenance,
        "floor_us": gpu.floor_us(contract.floor_bytes(spec), contract.matrix_flops(spec), spec.wide),
        "rel_err": error if impl == OURS else None,
    }


def _launch(kernel: Kernel, tensors: tuple[Tensors, Tensors]) -> None:
    inputs, outputs = tensors
    kernel.launch(tuple(inputs.values()), tuple(outputs.values()), SCALING)


def _unfused(
    composition: Kernel, products: dict[int, Callable[..., torch.Tensor]], tensors: tuple[Tensors, Tensors]
) -> None:
    inputs, outputs = tensors

    def launch(*given: Any) -> None:
        *operands, y, scaling = given
        composition(*operands, scaling=scaling, out=y)

    run_unfused(composition.spec, launch, products[id(inputs)], inputs, outputs, SCALING)


def _rotation(spec: KernelSpec, tokens: int, gpu: Gpu) -> Sets:
    """Sets of inputs and outputs that do not fit the L2 together."""

    def make(seed: int) -> tuple[Tensors, Tensors]:
        inputs, _ = make_inputs(spec, tokens, case="random", seed=seed, device="cuda")
        return inputs, make_outputs(spec, tokens, "cuda")

    return Rotation(make, spec.contract.operand_bytes(spec), gpu, memory_share=MEMORY_SHARE / 8)
