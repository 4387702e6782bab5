"""The interface of evaluators: given a candidate, return its time or raise why it is out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..cache.entry import Environment, Evaluation
from ..codegen.compile import BrokenToolchainError
from ..codegen.gpu import Gpu
from ..codegen.render import Source
from ..codegen.spec import Config, KernelSpec
from ..errors import DoratuneError


class Rejected(DoratuneError):
    """A candidate cannot win: it is inaccurate, does not launch, or exceeds a limit. The message is the reason.

    Raised only for a property of the config, since the study records it permanently.
    """


class ContextLostError(Rejected):
    """A candidate faulted and destroyed the process's GPU context: it is rejected, and the run must end.

    The same command continues in a new process without the candidate.
    """


class Undecided(DoratuneError):
    """A candidate could not be judged, and nothing shows that its config is to blame: the next run tries it again."""


class GpuMemoryError(Undecided):
    """The free memory of the GPU does not hold the tensors of a kernel; other kernels may fit."""


class BrokenEnvironmentError(Undecided):
    """No candidate can be judged now. The message says what is wrong, where, and what to do."""


class GpuLostError(BrokenEnvironmentError):
    """The GPU no longer answers this process, and no candidate is known to be the cause."""


class LaunchFailureError(GpuLostError):
    """The GPU context ended with an error that a failing GPU or a faulty kernel can cause."""


BROKEN = (BrokenToolchainError, BrokenEnvironmentError)
"""The failures after which no candidate can be judged."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses; what a worker sends back of a
    :class:`~doratune.codegen.compile.CompiledKernel`.

    ``registers`` are per thread, ``spills`` bytes of local memory per thread, ``shared_bytes`` per block.
    """

    name: str
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int


class Evaluator(ABC):
    """Judges candidates, one at a time, in the process of the search.

    Attributes:
        provenance: ``measured`` or ``predicted``, as in :class:`~doratune.cache.entry.Evaluation`.
        gpu: the GPU the times are for.
    """

    provenance: ClassVar[str]
    gpu: Gpu

    @abstractmethod
    def environment(self) -> Environment:
        """The environment that the evaluations are valid for."""

    def screen(self, spec: KernelSpec, config: Config) -> float | None:
        """An estimate in microseconds before the compile, or None if this evaluator makes none.

        The search does not compile candidates whose estimate is far behind the best one so far.
        """
        return None

    @abstractmethod
    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """Judge one candidate; ``compiled`` has its kernels in the order of the text.

        Raises:
            Rejected: the candidate cannot win.
            CompileError: the compiler refuses it when it runs again here.
            Undecided, ToolchainError: it could not be judged.
        """

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float] | None:
        """Time a fused kernel and its unfused sequence (:mod:`.fusion`) in turn; microseconds of each.

        An evaluator that measures nothing returns None.

        Raises:
            Rejected, CompileError: one of them does not run.
            Undecided, ToolchainError: they could not be timed.
        """
        return None

    def finish(self, spec: KernelSpec) -> None:  # noqa: B027
        """Release what is kept for candidates of ``spec``: its search is over."""

    def close(self) -> None:  # noqa: B027
        """Release everything."""


def floor_us(spec: KernelSpec, gpu: Gpu) -> float:
    """The least microseconds of any kernel of ``spec`` on ``gpu``: its bytes and flops at the GPU's peak rates."""
    contract = spec.contract
    return gpu.floor_us(contract.floor_bytes(spec), contract.matrix_flops(spec), spec.weight or spec.activation)
