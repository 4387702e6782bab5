"""The ``measure`` evaluator: the accuracy gate, then GPU time on the GPU at hand."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .. import __version__
from ..cache.entry import MEASURED, Environment, Evaluation
from ..codegen.compile import judge_failure
from ..codegen.gpu import Gpu
from ..codegen.render import Source
from ..codegen.spec import KernelSpec
from ..errors import DoratuneError, UsageError
from ..runtime.binding import bind
from ..runtime.device import find_device
from ..runtime.reference import definition
from .accuracy import worst_error
from .evaluation import (
    ContextLostError,
    Evaluator,
    GpuLostError,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    Resources,
    floor_us,
)
from .inputs import make_inputs, make_outputs
from .timing import capture, interleaved_us, median_us, replay_us, rotations
from .unfused import run_unfused

GATE_TOKENS = 512
"""Tokens of the gate's own inputs, less a few so that the last tile is ragged; timing runs the full bucket."""

CHECKED_ROWS = 64
"""Rows of the full-size output that are held against fp64 after timing."""

GIVE_UP = 3.0
"""A candidate whose first replay takes this many times the best so far is not timed further."""

MEMORY_SHARE = 0.7
"""Share of the free GPU memory that the rotating inputs may take; the rest is for fp64 references and workspaces."""

SHORT_GRAPH_CALLS = 64
"""Calls in a graph at least, where one call is short, so that starting the graph weighs nothing."""


_REFUSED_LAUNCHES = (
    "out of resource",
    "too many resources requested for launch",
    "invalid configuration argument",
    "Triton Error [CUDA]: invalid argument",  # a grid or tensor map beyond what the GPU takes
)
"""What the driver says of a launch that asks for more than the GPU has."""

_KERNEL_FAULTS = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "device-side assert",
)
"""What the driver says where a kernel's own code faulted, and ended the context."""

_LAUNCH_FAILURE = "unspecified launch failure"


class NoGpuError(UsageError):
    """Measuring was asked for where PyTorch sees no GPU."""

    def __init__(self) -> None:
        super().__init__(
            "--evaluator measure needs a GPU and PyTorch sees none; use --evaluator predict, or run where the GPU is"
        )


class MeasureEvaluator(Evaluator):
    """Gate and time candidates on one GPU.

    The gate compares a candidate with the fp64 definition on inputs where each term dominates, twice, into poisoned
    outputs: both runs must be within the bounds and equal in every bit. Only then is it timed, on random inputs that
    rotate through more memory than the L2 holds; some rows of the timed outputs are checked as well.

    Raises:
        NoGpuError: there is no GPU.
    """

    provenance = MEASURED

    def __init__(self, gpu: Gpu, device: torch.device | str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise NoGpuError()
        self.gpu = gpu
        self.device = find_device(device)
        torch.cuda.set_device(self.device)
        self._spec: KernelSpec | None = None
        self._best_us: dict[KernelSpec, float] = {}

    def environment(self) -> Environment:
        import triton

        return Environment(
            gpu=self.gpu.slug,
            architecture=self.gpu.architecture,
            triton=triton.__version__,
            torch=torch.__version__,
            driver=driver_version(),
            gpu_name=torch.cuda.get_device_name(self.device),
            doratune=__version__,
        )

    def _prepare(self, spec: KernelSpec) -> None:
        """Make the gate's inputs with their fp64 results, and the rotating inputs for timing."""
        if spec == self._spec:
            return
        if self._spec is not None:
            self.finish(self._spec)
        gate_tokens = spec.tokens if spec.tokens <= 16 else min(spec.tokens, GATE_TOKENS) - 3
        self._gate_inputs, self._gate_scaling = make_inputs(spec, gate_tokens, case="mixed", seed=1, device=self.device)
        self._gate_exact = definition(spec, self._gate_inputs, self._gate_scaling)
        self._gate_outputs = make_outputs(spec, gate_tokens, self.device)
        self._make_sets(spec)
        self._spec = spec  # only now: when memory ran out, the next candidate tries again

    def _make_sets(self, spec: KernelSpec) -> None:
        set_bytes = spec.contract.operand_bytes(spec)
        roomy = int(MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0]) // set_bytes
        count = max(1, min(rotations(set_bytes, self.gpu.l2_bytes), roomy))
        self._sets = []
        for seed in range(count):
            inputs, self._scaling = make_inputs(spec, spec.tokens, case="random", seed=100 + seed, device=self.device)
            self._sets.append((inputs, make_outputs(spec, spec.tokens, self.device)))

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """Gate and time one candidate.

        Raises:
            Rejected: it asks for more than the GPU has, is inaccurate, or gives different bits for equal inputs.
            ContextLostError: its code faulted, and left the GPU unusable for this process.
            GpuLostError: the GPU is unusable for another reason. GpuMemoryError: its tensors do not fit.
            CompileError, ToolchainError: as :func:`~doratune.codegen.compile.compile_source`.
        """
        spec = source.spec
        with _judged(source, started=False):
            self._prepare(spec)
        with _judged(source):
            launch = bind(source).launch
            error = self._gate(spec, launch)
            samples = self._time(launch)
            error = max(error, self._check_rows(spec))
        us = median_us(samples)
        self._best_us[spec] = min(us, self._best_us.get(spec, us))
        return Evaluation(
            provenance=MEASURED,
            us=us,
            floor_us=floor_us(spec, self.gpu),
            samples_us=tuple(samples),
            error=error,
            registers=max(kernel.registers for kernel in compiled),
            spills=max(kernel.spills for kernel in compiled),
            shared_bytes=max(kernel.shared_bytes for kernel in compiled),
        )

    def times_beside(self, fused: Source, composition: Source) -> tuple[float, float]:
        """Time both on random inputs that rotate as those of a candidate.

        Raises: as :meth:`evaluate`, for one of them.
        """
        spec = fused.spec
        self.finish(spec)
        try:
            with _judged(fused):
                self._make_sets(spec)
                launch, compose = bind(fused).launch, bind(composition).launch
                one = [
                    functools.partial(launch, *inputs.values(), *outputs.values(), self._scaling)
                    for inputs, outputs in self._sets
                ]
                apart = [
                    functools.partial(run_unfused, composition.spec, compose, inputs, outputs, self._scaling)
                    for inputs, outputs in self._sets
                ]
                repeats = self._repeats(spec)
                graphs = [(capture(calls * repeats), len(calls) * repeats) for calls in (one, apart)]
                samples = interleaved_us(graphs)
        finally:
            self.finish(spec)
        return median_us(samples[0]), median_us(samples[1])

    def finish(self, spec: KernelSpec) -> None:
        """Let go of the inputs."""
        self._spec = None
        self._sets = []
        self._gate_inputs, self._gate_exact, self._gate_outputs = {}, {}, {}

    def close(self) -> None:
        """Give the GPU memory back."""
        if self._spec is not None:
            self.finish(self._spec)
        with contextlib.suppress(RuntimeError):  # a lost GPU has nothing to give back
            torch.cuda.empty_cache()

    def _gate(self, spec: KernelSpec, launch: Callable[..., None]) -> float:
        scalars = (self._gate_scaling,) if spec.contract.scaling else ()
        runs = []
        for _ in range(2):
            for tensor in self._gate_outputs.values():
                tensor.fill_(float("nan"))
            launch(*self._gate_inputs.values(), *self._gate_outputs.values(), *scalars)
            runs.append({name: tensor.clone() for name, tensor in self._gate_outputs.items()})
        error, complaint = worst_error(spec, runs[0], self._gate_exact)
        if complaint:
            raise Rejected(f"inaccurate: {complaint}")
        if any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0]):
            raise Rejected("not deterministic: two runs on equal inputs differ")
        return error

    def _time(self, launch: Callable[..., None]) -> list[float]:
        assert self._spec is not None
        scalars = (self._scaling,) if self._spec.contract.scaling else ()
        calls = [
            functools.partial(launch, *inputs.values(), *outputs.values(), *scalars) for inputs, outputs in self._sets
        ] * self._repeats(self._spec)
        for tensor in self._sets[-1][1].values():  # what another candidate wrote must not pass for this one's
            tensor.fill_(float("nan"))
        graph = capture(calls)
        return replay_us(graph, len(calls), give_up_us=GIVE_UP * self._best_us.get(self._spec, 0.0))

    def _repeats(self, spec: KernelSpec) -> int:
        """How often a graph calls each of the rotating sets."""
        return max(1, SHORT_GRAPH_CALLS // len(self._sets)) if spec.tokens <= 1024 else 1

    def _check_rows(self, spec: KernelSpec) -> float:
        """Hold some rows of the timed outputs against fp64: the first, the last and a spread between."""
        inputs, outputs = self._sets[-1]
        if not spec.tokens:
            return 0.0  # the gate has run at this very size
        rows = torch.linspace(0, spec.tokens - 1, min(CHECKED_ROWS, spec.tokens), device=self.device).long()
        by_token = {operand.name for operand in spec.contract.inputs if operand.shape[0] == "tokens"}
        per_row = {name: tensor[rows] if name in by_token else tensor for name, tensor in inputs.items()}
        exact = definition(spec, per_row, self._scaling)
        written = {name: t[rows] for name, t in outputs.items() if t.ndim == 2}
        error, complaint = worst_error(spec, written, {name: exact[name] for name in written})
        if complaint:
            raise Rejected(f"inaccurate at {spec.tokens} tokens: {complaint}")
        return error


@contextmanager
def _judged(source: Source, *, started: bool = True) -> Iterator[None]:
    """Turn what fails inside the block into what it says of ``source``.

    ``started`` is false where the candidate has not run yet, so that nothing can be its fault.
    """
    try:
        yield
    except DoratuneError:
        raise
    except Exception as failure:
        raise _judge(source, failure, started) from failure


def _judge(source: Source, failure: Exception, started: bool) -> DoratuneError:
    reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
    which = f"{source.config} of {source.spec}"
    if not _gpu_answers():
        if started and any(text in reason for text in _KERNEL_FAULTS):
            return ContextLostError(f"{which} broke the GPU context: {reason}")
        lost = LaunchFailureError if started and _LAUNCH_FAILURE in reason else GpuLostError
        return lost(f"the GPU failed at {which}: {reason}. Check it with nvidia-smi and the system's log (dmesg)")
    if isinstance(failure, torch.cuda.OutOfMemoryError) or "CUDA]: out of memory" in reason:
        return GpuMemoryError(
            f"the GPU's free memory does not hold the tensors of {source.spec}: {reason} "
            "End what else uses the GPU, or leave these token counts out with --tokens"
        )
    if started and any(text in reason for text in _REFUSED_LAUNCHES):
        return Rejected(f"does not run: {reason}")
    return judge_failure(failure, f"{which} does not run")


def _gpu_answers() -> bool:
    """Whether the GPU still works for this process: a memory fault ends every later call of the process too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@functools.cache
def driver_version() -> str:
    """The version of the GPU driver, as its own tool reports it."""
    tool = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip:
        tool = ["cat", "/sys/module/amdgpu/version"]
    try:
        answer = subprocess.run(tool, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        answer = []
    return answer[0] if answer else f"unknown ({platform.release()})"
