"""The ``measure`` evaluator: the accuracy gate, then the time on this machine's GPU."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from .. import __version__
from ..cache.entry import MEASURED, Environment, Evaluation
from ..codegen.compile import judge_failure
from ..codegen.cost import floor_us
from ..codegen.gpu import Gpu
from ..codegen.render import Source
from ..codegen.spec import KernelSpec
from ..errors import DoratuneError, UsageError
from ..runtime.binding import bind
from ..runtime.device import find_device
from ..runtime.reference import definition
from .accuracy import Judge
from .evaluation import (
    ContenderFailed,
    ContextLostError,
    Evaluator,
    FinalTimes,
    GpuLostError,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    Resources,
)
from .final import CHECK_ROUNDS, Rounds, most_rounds
from .fusion import product_of, run_unfused
from .gate import GATE_LAYERS, Gate, gate_tokens
from .inputs import make_inputs, make_outputs
from .machine import Machine
from .timing import (
    LAUNCH_US,
    SHORT_GRAPH_CALLS,
    Graph,
    GraphPool,
    Rotation,
    Turns,
    interleaved_us,
    median_us,
    once_us,
    replay_us,
    rotations,
)

CHECKED_ROWS = 64
"""Rows of the full-size output that are compared with fp64 after timing."""

GIVE_UP = 1.6
"""A candidate whose first replay takes this many times the best so far is not timed further."""

MEMORY_SHARE = 0.7
"""Share of the free GPU memory that the rotating inputs may take; the rest is for fp64 references and workspaces."""

KEPT = 8
"""Gates and rotating inputs that are kept, so that kernels which are searched in turn do not make them each time."""

KEPT_SHARE = 0.4
"""Share of the GPU's memory that they may take; those of the present kernel are kept in any case."""

KEPT_LAUNCHES = 64
"""Loaded candidates that are kept: for other token buckets, which share their code, and for the final."""

GRAPH_US = 400.0
"""A graph repeats calls until they would take about this long at their floor, so that its own launch counts little."""

WARM_UP_MS = 10.0
"""GPU time of replays before the rounds of a final, for clocks to rise."""

Tensors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Inputs and outputs, by name."""

Launch = Callable[..., None]

_Made = TypeVar("_Made")

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


class _Kept:
    """What was made for several kernels, the last used at the end; ``most_bytes`` in all, at most."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._made: OrderedDict[object, tuple[object, int]] = OrderedDict()

    def get(self, key: object, beside: object, kind: type[_Made], size: int, make: Callable[[], _Made]) -> _Made:
        """What was made under ``key``, or is now made of ``size`` bytes; what is used with it, ``beside``, stays."""
        if key not in self._made:
            for oldest in [other for other in self._made if other != beside]:
                if len(self._made) < KEPT and self._bytes() + size <= self.most_bytes:
                    break
                del self._made[oldest]
            try:
                made = make()
            except torch.cuda.OutOfMemoryError:
                self.clear()
                torch.cuda.empty_cache()
                made = make()
            self._made[key] = made, size
        self._made.move_to_end(key)
        found = self._made[key][0]
        assert isinstance(found, kind)
        return found

    def drop(self, key: object) -> None:
        self._made.pop(key, None)

    def clear(self) -> None:
        self._made.clear()

    def _bytes(self) -> int:
        return sum(size for _, size in self._made.values())


class _Timed:
    """The rotating inputs and outputs of one spec, and what some rows of the last outputs must be."""

    def __init__(self, spec: KernelSpec, gpu: Gpu, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        self.scaling = 1.0

        def make(seed: int) -> Tensors:
            inputs, self.scaling = make_inputs(spec, spec.count, case="random", seed=100 + seed, device=device)
            return inputs, make_outputs(spec, spec.count, device)

        self.rotation = Rotation(
            make,
            spec.contract.operand_bytes(spec),
            gpu,
            memory_share=MEMORY_SHARE,
            least_calls=min(SHORT_GRAPH_CALLS, int(GRAPH_US / max(floor_us(spec, gpu), 1e-3)) + 1),
        )

    @staticmethod
    def bytes(spec: KernelSpec, gpu: Gpu) -> int:
        """About how much memory the rotating inputs and outputs of ``spec`` take."""
        size = spec.contract.operand_bytes(spec)
        return rotations(size, gpu.l2_bytes) * size

    def run(self, launch: Launch, tensors: Tensors) -> None:
        inputs, outputs = tensors
        scalars = (self.scaling,) if self.spec.contract.scaling else ()
        launch(*inputs.values(), *outputs.values(), *scalars)

    def capture(self, launch: Launch, pool: GraphPool) -> Graph:
        return self.rotation.capture(functools.partial(self.run, launch), pool)

    def sample_us(self, launch: Launch, pool: GraphPool, best_us: float) -> list[float]:
        """Microseconds of one call, from replays of a graph; a single one if the call is far behind ``best_us``."""
        self.poison()
        once = once_us(functools.partial(self.run, launch, self.rotation.sets[0]))
        if best_us and once > 2.0 * GIVE_UP * best_us + LAUNCH_US:  # too slow for a graph of many calls
            return [once]
        return replay_us(self.capture(launch, pool), best_us=best_us, give_up=GIVE_UP)

    def poison(self) -> None:
        """Overwrite the last outputs, so that an earlier candidate's are not checked."""
        for tensor in self.rotation.sets[-1][1].values():
            tensor.fill_(float("nan"))

    def check(self) -> float:
        """Compare some rows of the last outputs with fp64: the first, the last and some in between.

        Returns the largest relative error.

        Raises:
            Rejected: they are inaccurate.
        """
        if not self.spec.count:
            return 0.0  # the gate has run at this very size
        rows, judge = self._expected
        outputs = self.rotation.sets[-1][1]
        error, complaint = judge.worst_error({name: t[rows] for name, t in outputs.items() if t.ndim == 2})
        if complaint:
            what = "tokens" if self.spec.tokens else "layers"
            raise Rejected(f"inaccurate at {self.spec.count} {what}: {complaint}")
        return error

    @functools.cached_property
    def _expected(self) -> tuple[torch.Tensor, Judge]:
        """The rows that are checked (of a grouped operation: the layers), and the judge of them."""
        spec, inputs = self.spec, self.rotation.sets[-1][0]
        checked = min(CHECKED_ROWS if spec.tokens else GATE_LAYERS, spec.count)
        rows = torch.linspace(0, spec.count - 1, checked, device=self._device).long()
        by_token = {operand.name for operand in spec.contract.inputs if operand.shape[0] == "tokens"} | {"table"}
        per_row = {name: tensor[rows] if name in by_token else tensor for name, tensor in inputs.items()}
        return rows, Judge(spec, definition(spec, per_row, self.scaling))


class MeasureEvaluator(Evaluator):
    """Gate and time candidates on one GPU.

    A candidate passes the gate (:mod:`.gate`); then it is timed on random inputs that rotate through more memory than
    the L2 holds, and some rows of the timed outputs are checked as well. ``machine`` is asked when the rounds of a
    final look disturbed, and ``sleep`` waits before they are repeated.

    Raises:
        NoGpuError: there is no GPU.
    """

    provenance = MEASURED

    def __init__(
        self,
        gpu: Gpu,
        device: torch.device | str = "cuda",
        *,
        machine: Machine | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not torch.cuda.is_available():
            raise NoGpuError()
        self.gpu = gpu
        self.device = find_device(device)
        torch.cuda.set_device(self.device)
        self._machine = machine
        self._sleep = sleep
        self._kept = _Kept(int(KEPT_SHARE * torch.cuda.mem_get_info()[1]))
        self._launches: OrderedDict[str, Launch] = OrderedDict()
        self._pool = GraphPool()
        self._best_us: dict[KernelSpec, float] = {}

    def environment(self) -> Environment:
        return environment_of(self.gpu, self.device)

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """Gate and time one candidate.

        Raises:
            Rejected: it asks for more than the GPU has, writes where it must not, is inaccurate, or gives different
                bits for equal inputs.
            ContextLostError: its code faulted, and left the GPU unusable for this process.
            GpuLostError: the GPU is unusable for another reason. GpuMemoryError: its tensors do not fit.
            CompileError, ToolchainError: as :func:`~doratune.codegen.compile.compile_source`.
        """
        spec = source.spec
        with _judged(_name(source), spec, started=False):
            torch.cuda.set_device(self.device)  # the calling thread's
            gate, timed = self._gate(spec), self._timed(spec)
        with _judged(_name(source), spec):
            launch = self._bind(source)
            self.running(0)
            error = gate.check(launch)
            samples = timed.sample_us(launch, self._pool, self._best_us.get(spec, 0.0))
            if len(samples) > 1:  # else it cannot win, and may not have written all outputs
                error = max(error, timed.check())
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

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        """Time ``sources`` in turn on rotating inputs, in rounds of one graph replay each (:mod:`.final`).

        Raises:
            ContenderFailed: one of them does not run.
            ContextLostError, GpuLostError: one of several that ran in turn faulted, or the GPU is unusable.
            GpuMemoryError: the tensors do not fit.
        """
        spec = sources[0].spec
        if any(source.spec != spec for source in sources):
            raise ValueError("the sources of a final are of one spec")
        which = f"the final of {spec}"
        with _judged(which, spec, started=False):
            torch.cuda.set_device(self.device)
            timed = self._timed(spec)
        graphs = []
        for index, source in enumerate(sources):
            try:
                with _judged(_name(source), spec):
                    launch = self._bind(source)
                    self.running(index)
                    graphs.append(timed.capture(launch, self._pool))
                    graphs[-1].replay()
                    torch.cuda.synchronize()
            except DoratuneError as failure:
                raise ContenderFailed(index, failure) from failure
        with _judged(which, spec):
            self.running(None)
            turns = Turns(graphs)
            round_ms = _round_ms(graphs, turns.play(1))
            turns.play(min(CHECK_ROUNDS, int(WARM_UP_MS / round_ms) + 1))
            rounds = Rounds(turns.play, self._machine or Machine(gpu_uuid(self.device)), self._sleep)
            return rounds.times(len(sources), most_rounds(round_ms) if len(sources) > 1 else CHECK_ROUNDS)

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float]:
        """Time a fused kernel and its unfused sequence in turn, on random inputs that rotate as a candidate's do.

        Raises: as :meth:`evaluate`, for one of them.
        """
        spec = fused.spec
        try:
            with _judged(_name(fused), spec):
                torch.cuda.set_device(self.device)
                timed = self._timed(spec)
                launch, compose = self._bind(fused), self._bind(composition)
                products = {id(inputs): product_of(spec, inputs) for inputs, _ in timed.rotation.sets}
                self.running(0)
                graphs = {
                    "fused": timed.capture(launch, self._pool),
                    "unfused": timed.rotation.capture(
                        lambda tensors: run_unfused(
                            composition.spec, compose, products[id(tensors[0])], *tensors, timed.scaling
                        ),
                        self._pool,
                    ),
                }
                samples = interleaved_us(graphs)
        finally:
            self.finish(spec)
        return median_us(samples["fused"]), median_us(samples["unfused"])

    def finish(self, spec: KernelSpec) -> None:
        """Release the rotating inputs; the gate may serve the next token bucket."""
        self._kept.drop(spec)
        self._best_us.pop(spec, None)

    def close(self) -> None:
        """Return the GPU memory to the driver."""
        self._kept.clear()
        self._launches.clear()
        self._pool = GraphPool()
        with contextlib.suppress(RuntimeError):  # a lost GPU has nothing to give back
            torch.cuda.empty_cache()

    def _gate(self, spec: KernelSpec) -> Gate:
        make = functools.partial(Gate, spec, self.device)
        return self._kept.get(_gate_key(spec), spec, Gate, Gate.bytes(spec), make)

    def _timed(self, spec: KernelSpec) -> _Timed:
        make = functools.partial(_Timed, spec, self.gpu, self.device)
        return self._kept.get(spec, _gate_key(spec), _Timed, _Timed.bytes(spec, self.gpu), make)

    def _bind(self, source: Source) -> Launch:
        key = source.code_digest
        if key not in self._launches:
            while len(self._launches) >= KEPT_LAUNCHES:
                self._launches.popitem(last=False)
            self._launches[key] = bind(source).launch
        self._launches.move_to_end(key)
        return self._launches[key]


def environment_of(gpu: Gpu, device: torch.device) -> Environment:
    """The environment of what is measured on ``device`` in this process or another one on this machine."""
    import triton

    return Environment(
        gpu=gpu.slug,
        architecture=gpu.architecture,
        triton=triton.__version__,
        torch=torch.__version__,
        driver=driver_version(),
        gpu_name=torch.cuda.get_device_name(device),
        doratune=__version__,
    )


def _gate_key(spec: KernelSpec) -> tuple[KernelSpec, int]:
    """Equal for specs that have the same gate."""
    return spec.family, gate_tokens(spec)


def _name(source: Source) -> str:
    return f"{source.config} of {source.spec}"


def _round_ms(graphs: Sequence[Graph], samples_us: Sequence[Sequence[float]]) -> float:
    """The milliseconds of one round."""
    return sum(graph.calls * us / 1000.0 for graph, [us] in zip(graphs, samples_us, strict=True))


def gpu_uuid(device: torch.device) -> str:
    """The UUID of a GPU as nvidia-smi takes it; empty where PyTorch does not tell."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


@contextmanager
def _judged(which: str, spec: KernelSpec, *, started: bool = True) -> Iterator[None]:
    """Convert a failure inside the block to the error that says whether the candidate of ``spec`` is to blame.

    ``which`` names it. ``started`` is False before the candidate has run: then it cannot be to blame.
    """
    try:
        yield
    except DoratuneError:
        raise
    except Exception as failure:
        raise _judge(which, spec, failure, started) from failure


def _judge(which: str, spec: KernelSpec, failure: Exception, started: bool) -> DoratuneError:
    reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
    if not _gpu_answers():
        if started and any(text in reason for text in _KERNEL_FAULTS):
            return ContextLostError(f"{which} broke the GPU context: {reason}")
        lost = LaunchFailureError if started and _LAUNCH_FAILURE in reason else GpuLostError
        return lost(f"the GPU failed at {which}: {reason}. Check it with nvidia-smi and the system's log (dmesg)")
    if isinstance(failure, torch.cuda.OutOfMemoryError) or "CUDA]: out of memory" in reason:
        return GpuMemoryError(
            f"the GPU's free memory does not hold the tensors of {spec}: {reason} "
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
