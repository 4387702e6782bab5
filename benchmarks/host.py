"""What a call costs the host: loading a kernel that is loaded, and launching it, beside other ways to start the same.

All ways run in one process, on the same tensors, in turn, round after round; the GPU's time is not measured. Within a
round the host never waits: the GPU's queue holds all launches of a round, and it is emptied between rounds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from ..codegen.compile import build
from ..codegen.module import declared_kernels, kernel_names, load_module
from ..codegen.render import Source
from ..codegen.spec import KernelSpec
from ..internals.triton import current_target
from ..runtime.device import find_device, gpu_of
from ..runtime.kernel import Kernel
from ..runtime.loader import load_kernel, resolve
from ..runtime.reference import TORCH_DTYPES
from ..tuner.inputs import make_inputs, make_outputs
from ..tuner.timing import no_collection
from .measuring import SCALING, left_out, require_gpu
from .results import OURS, UNCHECKED, Outcome, Row, spec_columns, timing

QUEUED_LAUNCHES = 512
"""Launches in a round at most: the queue of a CUDA stream holds about 1024, beyond that the host waits for the GPU."""

Call = Callable[[], object]


def host_cases(gpu: str) -> Iterator[KernelSpec]:
    """A small shape, whose rows are too short for tensor descriptors, and large ones, whose kernels use descriptors."""
    yield KernelSpec.create("lora_compose", d_out=512, rank=4, tokens=16, dtype="bf16", adapter="bf16", gpu=gpu)
    large: dict[str, Any] = {"d_out": 4096, "d_in": 4096, "rank": 384, "dtype": "bf16", "adapter": "bf16", "gpu": gpu}
    yield KernelSpec.create("lora_compose", **large, tokens=4096)
    yield KernelSpec.create("weight_norm", **large)


def bench_host(*, rounds: int, progress: Callable[[str], object]) -> Outcome:
    """Measure every case.

    Raises:
        UsageError: there is no GPU.
    """
    require_gpu()
    device = find_device("cuda")
    outcome = Outcome()
    cases = list(host_cases(gpu_of(device).slug))
    for index, spec in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {spec}")
        run_case(spec, device, rounds, outcome)
    return outcome


def run_case(spec: KernelSpec, device: torch.device, rounds: int, outcome: Outcome) -> None:
    """Time the ways to start the kernels of ``spec``; one row for each that works."""
    load = functools.partial(
        load_kernel,
        spec.op,
        d_out=spec.d_out,
        d_in=spec.d_in or 1,
        rank=spec.rank,
        tokens=spec.tokens or 1,
        dtype=TORCH_DTYPES[spec.weight or spec.activation],
    )
    inputs = make_inputs(spec, spec.tokens or 1, case="random", device=device)[0]
    outputs = make_outputs(spec, spec.tokens or 1, device)
    kernel = load()
    source = resolve(kernel.spec)[1]
    working: dict[str, Call] = {}
    for impl, make in ways_to_start(load, source, inputs, outputs).items():
        try:
            call = make()
            call()
            torch.cuda.synchronize(device)
        except Exception as failure:  # the others continue
            if impl in (OURS, UNCHECKED, "hit", "launch"):
                raise
            outcome.notes.append(f"{spec}: {left_out(impl, failure)}")
        else:
            working[impl] = call
    repeats = QUEUED_LAUNCHES // len(declared_kernels(source))
    samples = host_us(working, rounds, repeats, functools.partial(torch.cuda.synchronize, device))
    outcome.rows += [host_row(spec, kernel, impl, us) for impl, us in samples.items()]


def ways_to_start(
    load: Callable[[], Kernel], source: Source, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> dict[str, Callable[[], Call]]:
    """For each implementation, a function that prepares its call and returns it."""
    given, made = tuple(inputs.values()), tuple(outputs.values())
    out = made[0]

    ways: dict[str, Callable[[], Call]] = {
        OURS: lambda: lambda: load()(*given, scaling=SCALING, out=out),
        UNCHECKED: lambda: lambda: load().launch(given, made, SCALING),
        "hit": lambda: load,
        "launch": lambda: functools.partial(load().launch, given, made, SCALING),
        "prebound": lambda: prebound(compiled_module(source), (*given, *made, SCALING)),
        "jit": lambda: functools.partial(load_module(source).launch, *given, *made, SCALING),
    }
    if source.spec.op == "lora_compose":
        base, h, factor = inputs["base"], inputs["h"], inputs["lora_B"].T
        ways["torch"] = lambda: lambda: torch.addmm(base, h, factor)
    return ways


def compiled_module(source: Source) -> ModuleType:
    """The emitted module with its jit functions replaced by Triton's compiled kernels, which doratune launches too."""
    module = load_module(source)
    target = current_target()
    for name in kernel_names(module):
        setattr(module, name, build(source, getattr(module, name), target))
    return module


def prebound(module: ModuleType, arguments: Sequence[Any]) -> Call:
    """A call that starts the kernels of ``launch`` with Triton's own runner, everything else prepared beforehand.

    Grids, workspace and descriptors are recorded from one run of ``launch``.
    """
    starts: list[Call] = []

    class Recorder:
        def __init__(self, compiled: Any) -> None:
            self._compiled = compiled

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            runner = self._compiled[(*grid, 1, 1)[:3]]

            def record(*operands: Any, **_: Any) -> None:  # the options are compiled in
                starts.append(functools.partial(runner, *operands))

            return record

    for name in kernel_names(module):
        setattr(module, name, Recorder(getattr(module, name)))
    module.launch(*arguments)
    if len(starts) == 1:
        return starts[0]

    def call() -> None:
        for start in starts:
            start()

    return call


def host_us(
    calls: Mapping[str, Call], rounds: int, repeats: int, synchronize: Callable[[], object]
) -> dict[str, list[float]]:
    """Microseconds of the host for one call, in each round, by implementation; they take turns."""
    samples: dict[str, list[float]] = {impl: [] for impl in calls}
    with no_collection():
        for round_ in range(rounds + 1):  # the first one warms up
            for impl, call in calls.items():
                synchronize()
                start = time.perf_counter_ns()
                for _ in range(repeats):
                    call()
                taken = time.perf_counter_ns() - start
                if round_:
                    samples[impl].append(taken / repeats / 1e3)
        synchronize()
    return samples


def host_row(spec: KernelSpec, kernel: Kernel, impl: str, samples_us: Sequence[float]) -> Row:
    """The row of one implementation: the host's time in ``cpu_us``, none of the GPU."""
    return {
        "bench": "host",
        **spec_columns(spec, spec.tokens),
        "impl": impl,
        "config": None if impl == "torch" else str(kernel.config),
        "provenance": None if impl == "torch" else kernel.provenance,
        **dict.fromkeys(("us", "us_p20", "us_p80")),
        **{f"cpu_{name}": value for name, value in timing(samples_us).items()},
        **dict.fromkeys(("floor_us", "rel_err", "peak_mb")),
    }
