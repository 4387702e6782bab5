"""The interface of evaluators: given a candidate, return its time or raise why it is out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
    """A candidate faulted and destroyed the GPU context of the process that ran it: only a new process can go on.

    :class:`~.isolation.IsolatedEvaluator` replaces the process and raises a plain :class:`Rejected`.
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


class ContenderFailed(DoratuneError):
    """A source of a final failed. The caller drops it and repeats the final without it.

    Attributes:
        index: its place among the sources of the call.
        cause: the failure, as :meth:`Evaluator.evaluate` would have raised it.
    """

    def __init__(self, index: int, cause: DoratuneError) -> None:
        super().__init__(str(cause))
        self.index = index
        self.cause = cause

    def __reduce__(self) -> tuple[type[ContenderFailed], tuple[int, DoratuneError]]:
        return type(self), (self.index, self.cause)


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


@dataclass(frozen=True)
class FinalTimes:
    """The rounds of a final.

    Attributes:
        samples_us: microseconds of one call, for each source one a round; sample i of every source is from round i.
        settled: the order held before the budget of rounds ended.
        notices: what disturbed the rounds, in words; empty if nothing did.
    """

    samples_us: tuple[tuple[float, ...], ...]
    settled: bool
    notices: tuple[str, ...] = ()


class Evaluator(ABC):
    """Judges candidates, one at a time. Each call blocks, and only one is under way at a time.

    Attributes:
        provenance: ``measured`` or ``predicted``, as in :class:`~doratune.cache.entry.Evaluation`.
        gpu: the GPU the times are for.
        running: called right before code of a candidate runs, with its place among the sources of the call; with None
            before several run in turn. From then on a crash or a hang is a candidate's doing.
    """

    provenance: ClassVar[str]
    gpu: Gpu
    running: Callable[[int | None], None] = staticmethod(lambda index: None)

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

    def final(self, sources: Sequence[Source]) -> FinalTimes | None:
        """Time ``sources`` of one spec in turn, in rounds, until their order is settled or the budget of rounds ends.

        The order of ``sources`` does not matter for the times. An evaluator that measures nothing returns None.

        Raises:
            ContenderFailed: one of them does not run.
            Undecided, ToolchainError: they could not be timed.
        """
        return None

    def finish(self, spec: KernelSpec) -> None:  # noqa: B027
        """Release what is kept for candidates of ``spec``: its search is over."""

    def cancel(self) -> None:  # noqa: B027
        """End a call under way in another thread, where that is possible: it raises Undecided. No other call follows
        but :meth:`close`."""

    def close(self) -> None:  # noqa: B027
        """Release everything."""
