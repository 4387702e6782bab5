"""The ``measure`` evaluator: the accuracy gate, then the time on this machine's GPU."""

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
from .fusion import run_unfused
from .inputs import make_inputs, make_outputs
from .timing import SHORT_TOKENS, Rotation, interleaved_us, median_us, replay_us

GATE_TOKENS = 512
"""Tokens of the gate's inputs, less a few so that the last tile is ragged. Timing uses the full bucket."""

CHECKED_ROWS = 64
"""Rows of the full-size output that are compared with fp64 after timing."""

GIVE_UP = 3.0
"""A candidate whose first replay takes this many times the best so far is not timed further."""

MEMORY_SHARE = 0.7
"""Share of the free GPU memory that the rotating inputs may take; the rest is for fp64 references and workspaces."""

Tensors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Inputs and outputs, by name."""

_REFUSED_LAUNCHES = (
    "out of resource",
    "too many resources requested for launch",
    "invalid configuration argument",
    "Triton Error [CUDA]: invalid argument",  # a grid or tensor map beyond what the GPU takes
)
"""Driver messages for a launch that asks for more than the GPU has."""

_KERNEL_FAULTS = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "device-side assert",
)
"""Driver messages for a fault in the kernel's own code, which ends the context."""

_LAUNCH_FAILURE = "unspecified launch failure"


class NoGpuError(UsageError):
    """Measuring was requested, but PyTorch sees no GPU."""

    def __init__(self) -> None:
        super().__init__(
            "--evaluator measure needs a GPU and PyTorch sees none; use --evaluator predict, or run where the GPU is"
        )


class MeasureEvaluator(Evaluator):
    """Gate and time candidates on one GPU.

    The gate compares a candidate with the fp64 definition on inputs where each term dominates, twice, into poisoned
    outputs: both runs must be within the bounds and equal in every bit. Then it is timed on random inputs that rotate
    through more memory than the L2 holds, and some rows of the timed outputs are checked as well.

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
        self._rotation: Rotation[Tensors] | None = None
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
        self._rotate_inputs(spec)
        self._spec = spec  # only now: when memory ran out, the next candidate tries again

    def _rotate_inputs(self, spec: KernelSpec) -> None:
        """Make the inputs and outputs that the timed calls use in turn."""

        def make(seed: int) -> Tensors:
            inputs, self._scaling = make_inputs(spec, spec.tokens, case="random", seed=100 + seed, device=self.device)
            return inputs, make_outputs(spec, spec.tokens, self.device)

        self._rotation = Rotation(
            make,
            spec.contract.operand_bytes(spec),
            self.gpu,
            memory_share=MEMORY_SHARE,
            short=spec.tokens <= SHORT_TOKENS,
        )

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
            samples = self._time(spec, launch)
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

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float]:
        """Time a fused kernel and its unfused sequence in turn, on random inputs that rotate as a candidate's do.

        Raises: as :meth:`evaluate`, for one of them.
        """
        spec = fused.spec
        self.finish(spec)
        try:
            with _judged(fused):
                self._rotate_inputs(spec)
                assert self._rotation is not None
                launch, compose = bind(fused).launch, bind(composition).launch
                graphs = {
                    "fused": self._rotation.capture(lambda tensors: self._launch(spec, launch, tensors)),
                    "unfused": self._rotation.capture(
                        lambda tensors: run_unfused(composition.spec, compose, *tensors, self._scaling)
                    ),
                }
                samples = interleaved_us(graphs)
        finally:
            self.finish(spec)
        return median_us(samples["fused"]), median_us(samples["unfused"])

    def finish(self, spec: KernelSpec) -> None:
        """Release the inputs."""
        self._spec = self._rotation = None
        self._gate_inputs, self._gate_exact, self._gate_outputs = {}, {}, {}

    def close(self) -> None:
        """Return the GPU memory to the driver."""
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

    def _time(self, spec: KernelSpec, launch: Callable[..., None]) -> list[float]:
        assert self._rotation is not None
        for tensor in self._rotation.sets[-1][1].values():  # so that an earlier candidate's output is not checked
            tensor.fill_(float("nan"))
        graph = self._rotation.capture(lambda tensors: self._launch(spec, launch, tensors))
        return replay_us(graph, give_up_us=GIVE_UP * self._best_us.get(spec, 0.0))

    def _launch(self, spec: KernelSpec, launch: Callable[..., None], tensors: Tensors) -> None:
        inputs, outputs = tensors
        scalars = (self._scaling,) if spec.contract.scaling else ()
        launch(*inputs.values(), *outputs.values(), *scalars)

    def _check_rows(self, spec: KernelSpec) -> float:
        """Compare some rows of the timed outputs with fp64: the first, the last and some in between."""
        if not spec.tokens:
            return 0.0  # the gate has run at this very size
        assert self._rotation is not None
        inputs, outputs = self._rotation.sets[-1]
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
    """Convert a failure inside the block to the error that says whether ``source`` is to blame.

    ``started`` is False before the candidate has run: then it cannot be to blame.
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
            "Stop other processes on the GPU, or choose other token counts with --tokens"
        )
    if started and any(text in reason for text in _REFUSED_LAUNCHES):
        return Rejected(f"does not run: {reason}")
    return judge_failure(failure, f"{which} does not run")


def _gpu_answers() -> bool:
    """Whether the GPU still works for this process; after a memory fault every later call fails too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@functools.cache
def driver_version() -> str:
    """The version of the GPU driver, as nvidia-smi or the kernel module reports it."""
    tool = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip:
        tool = ["cat", "/sys/module/amdgpu/version"]
    try:
        answer = subprocess.run(tool, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        answer = []
    return answer[0] if answer else f"unknown ({platform.release()})"
