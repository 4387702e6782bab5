"""The norm of a quantised W, read as it is stored, beside the norm of a bf16 W of the same shape.

Every row is ``weight_norm`` with m, from fp32 adapters under autocast and with nW given (``given``) or made on the way
(``made``), at one shape and rank; ``dtype`` says how W is stored. The kernel for bf16 leaves rows whose terms nearly
cancel to ``weight_norm_exact``; those for formats redo them. All are timed in turn in one process.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence

import torch

from ..codegen.compile import contiguous_alignments
from ..codegen.gpu import Gpu
from ..codegen.spec import KernelSpec
from ..codegen.weight_formats import is_format, stored_as
from ..errors import UsageError
from ..runtime.ahead import compile_ahead
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..runtime.loader import load_kernel
from ..runtime.reference import definition
from ..tuner.accuracy import worst_error
from ..tuner.inputs import make_inputs, make_outputs
from ..tuner.timing import Graph, GraphPool, Rotation, interleaved_us
from .measuring import MEMORY_SHARE, SCALING, check_names, require_gpu
from .results import OURS, Outcome, spec_columns, timing

PLAIN = "bf16"
FORMATS = ("nf4", "nf4.nested", "int8", "hqq4", "fp8")
SHAPES = ("4096x4096", "14336x4096", "8192x28672")
RANKS = (16, 64, 384)
MODES = ("given", "made")
ROUNDS = 9


def spec_of(shape: tuple[int, int], rank: int, weight: str, mode: str, gpu: Gpu) -> KernelSpec:
    """The spec of a norm from W [d_out, d_in] in ``weight``, bf16 or a weight format."""
    values = {"magnitude": "fp32", "autocast": True, "save": mode == "made", "adapter": "fp32", "gpu": gpu.slug}
    stored = stored_as(weight, PLAIN) if is_format(weight) else weight
    return KernelSpec.create("weight_norm", d_out=shape[0], d_in=shape[1], rank=rank, weight=stored, **values)


def weight_shape(text: str) -> tuple[int, int]:
    """The sizes in a text such as ``4096x14336``: d_out, then d_in.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise UsageError(f"shape {text!r}: give d_out and d_in of W, such as 14336x4096")
    return int(match[1]), int(match[2])


def bench_packed(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int] = RANKS,
    formats: Sequence[str] = FORMATS,
    *,
    modes: Collection[str] = MODES,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Check and time the norm from each of ``formats`` and from bf16, in turn; one row for each.

    Raises:
        UsageError: an unknown mode or format, or there is no GPU.
    """
    check_names("mode", modes, MODES)
    for form in formats:
        stored_as(form, PLAIN)
    require_gpu()
    gpu = gpu_of(find_device("cuda"))
    outcome = Outcome()
    cases = {
        (shape, rank, mode): [_load(spec_of(shape, rank, weight, mode, gpu)) for weight in (PLAIN, *formats)]
        for shape in shapes
        for rank in ranks
        for mode in modes
    }
    progress(f"compiling {sum(map(len, cases.values()))} kernels")
    compile_ahead((kernel, contiguous(kernel)) for kernels in cases.values() for kernel in kernels)
    for (shape, rank, mode), kernels in cases.items():
        progress(f"norms of {shape[0]}x{shape[1]} at rank {rank}, nW {mode}")
        _run(kernels, gpu, rounds, outcome)
    return outcome


def contiguous(kernel: Kernel) -> tuple[int, ...]:
    """The alignments of operands as :func:`~doratune.tuner.inputs.make_inputs` makes them."""
    return tuple(contiguous_alignments(kernel.spec).values())


def _run(kernels: Sequence[Kernel], gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    graphs, rotations, pool = {}, [], GraphPool()
    errors: dict[KernelSpec, float | None] = {}
    for kernel in kernels:
        spec = kernel.spec
        inputs, scaling = make_inputs(spec, 1, device="cuda")
        outputs = make_outputs(spec, 1, "cuda")
        kernel.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
        if spec.format is None:  # its rows that nearly cancel are another kernel's
            errors[spec] = None
        else:
            errors[spec], complaint = worst_error(spec, outputs, definition(spec, inputs, scaling))
            if complaint:
                outcome.failures.append(f"{spec}: {complaint}")
        del inputs, outputs
        torch.cuda.empty_cache()
        rotations.append(_rotation(spec, gpu))  # a graph does not keep its inputs
        calls = rotations[-1].calls(functools.partial(_launch, kernel))
        graphs[str(spec)] = Graph(pool.capture(calls), len(calls))
    for samples, kernel in zip(interleaved_us(graphs, rounds=rounds).values(), kernels, strict=True):
        spec = kernel.spec
        contract = spec.contract
        outcome.rows.append(
            {
                "bench": "packed",
                **spec_columns(spec, 0),
                "impl": OURS,
                "config": str(kernel.config),
                "provenance": kernel.provenance,
                **timing(samples),
                "floor_us": gpu.floor_us(contract.floor_bytes(spec), contract.matrix_flops(spec), spec.wide),
                "rel_err": errors[spec],
            }
        )


def _launch(kernel: Kernel, tensors: tuple[Tensors, Tensors]) -> None:
    kernel.launch(*tensors, SCALING)


def _load(spec: KernelSpec) -> Kernel:
    return load_kernel(
        spec.op,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=spec.rank,
        tokens=1,
        dtype=spec.weight if spec.format else torch.bfloat16,
        adapter_dtype=torch.float32,
        magnitude_dtype=torch.float32,
        save=spec.save,
        autocast=True,
        device="cuda",
    )


Tensors = tuple[torch.Tensor, ...]


def _rotation(spec: KernelSpec, gpu: Gpu) -> Rotation[tuple[Tensors, Tensors]]:
    """Sets of inputs and outputs that do not fit the L2 together."""

    def make(seed: int) -> tuple[Tensors, Tensors]:
        inputs, _ = make_inputs(spec, 1, case="random", seed=seed, device="cuda")
        return tuple(inputs.values()), tuple(make_outputs(spec, 1, "cuda").values())

    return Rotation(make, spec.contract.operand_bytes(spec), gpu, memory_share=MEMORY_SHARE / 8)
