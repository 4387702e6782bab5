"""W of quantised layers decoded by ``weight_dequantise``, beside the decoding of the package that made the layer.

A row is a layer with W [d_out, d_in] in bf16, quantised by its package as users do (:mod:`.quantised`). ``package`` is
what the backward pass of doratune's layers takes without the kernel: the package's own function, where that is not slow
by itself. Both must give the same bits. All are timed in turn in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..codegen.gpu import Gpu
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..tuner.timing import Graph, GraphPool, Rotation, interleaved_us
from .measuring import MEMORY_SHARE, check_names, left_out, load, require_gpu
from .quantised import QUANTS, quantise
from .results import OURS, Outcome, Row, spec_columns, timing

SHAPES = ("4096x4096", "14336x4096", "8192x28672")
ROUNDS = 9
PACKAGE = "package"

Decode = Callable[[], torch.Tensor]


class Decoded:
    """A quantised layer without a bias, its kernel, and both ways to decode its W."""

    def __init__(self, shape: tuple[int, int], quant: str, seed: int = 0) -> None:
        from ..codegen.spec import KernelSpec
        from ..integrations.peft.base_layers import BaseLayer, read_base
        from ..integrations.peft.sources import source_of
        from ..integrations.peft.stored import StorageReader
        from ..nn.stored_norm import StoredMatrix

        torch.manual_seed(seed)
        d_out, d_in = shape
        linear = nn.Linear(d_in, d_out, bias=False, device="cuda", dtype=torch.bfloat16)
        layer: Any = quantise(nn.ModuleDict({"layer": linear}), ["layer"], quant).layer
        with torch.no_grad():
            layer(torch.zeros(1, d_in, device="cuda", dtype=torch.bfloat16))  # it decides in which dtype it computes
        base = cast(BaseLayer, read_base(layer, d_out, d_in, transposed=False))
        matrix = StorageReader("layer").read(layer, base, d_out, d_in)
        source = source_of(layer, base.kind)
        assert isinstance(matrix, StoredMatrix), matrix
        assert source is not None
        self.spec = KernelSpec.create(
            "weight_dequantise", d_out=d_out, d_in=d_in, dtype=str(matrix.form), gpu=gpu_of(find_device("cuda")).slug
        )
        self.kernel: Kernel = load(self.spec)
        self._tensors, self._layer = matrix.tensors, layer
        self.package: Decode = lambda: source.matrix(torch.bfloat16)

    def ours(self) -> torch.Tensor:
        dense = torch.empty(self.spec.d_out, self.spec.d_in, dtype=torch.bfloat16, device="cuda")
        self.kernel.launch(self._tensors, (dense,))
        return dense


def bench_dequantise(
    shapes: Sequence[tuple[int, int]],
    quants: Sequence[str] = QUANTS,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Check and time both ways to decode W of each shape in each of ``quants``; two rows for each.

    A package that is not installed is left out.

    Raises:
        UsageError: an unknown kind of layer, or there is no GPU.
    """
    check_names("kind of layer", quants, QUANTS)
    require_gpu()
    gpu = gpu_of(find_device("cuda"))
    outcome = Outcome()
    for shape in shapes:
        for quant in quants:
            progress(f"{shape[0]}x{shape[1]} in {quant}")
            try:
                _run(shape, quant, gpu, rounds, outcome)
            except Exception as failure:  # the others continue
                outcome.notes.append(left_out(quant, failure))
    return outcome


def _run(shape: tuple[int, int], quant: str, gpu: Gpu, rounds: int, outcome: Outcome) -> None:
    first = Decoded(shape, quant)
    spec = first.spec
    differing = int((first.ours() != first.package()).sum())
    if differing:
        outcome.failures.append(f"{spec}: {differing} values are not the package's")
    sets = Rotation(
        lambda seed: Decoded(shape, quant, seed), spec.contract.operand_bytes(spec), gpu, memory_share=MEMORY_SHARE / 8
    )
    pool, graphs, runs = GraphPool(), {}, {OURS: Decoded.ours, PACKAGE: lambda one: one.package()}
    for impl, run in runs.items():
        calls = sets.calls(run)
        graphs[impl] = Graph(pool.capture(calls), len(calls))
    for impl, samples in interleaved_us(graphs, rounds=rounds).items():
        outcome.rows.append(
            {**_row(first.kernel, impl, gpu), **timing(samples), "rel_err": 0.0 if not differing else None}
        )


def _row(kernel: Kernel, impl: str, gpu: Gpu) -> Row:
    spec = kernel.spec
    return {
        "bench": "dequantise",
        **spec_columns(spec, 0),
        "impl": impl,
        "config": str(kernel.config) if impl == OURS else None,
        "provenance": kernel.provenance if impl == OURS else None,
        "floor_us": gpu.floor_us(spec.contract.floor_bytes(spec), 0, spec.wide),
    }
