"""An evaluator for other processes to run, whose candidates do what their text says: return, hang, exit or fail.

Processes import it as a module of its own, so its folder must be on Python's path. Run as a script, it is a parent for
the tests to kill.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from doratune.cache.entry import MEASURED, Environment, Evaluation
from doratune.codegen.compile import CompileError
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import Source
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner.evaluation import (
    ContenderFailed,
    ContextLostError,
    Evaluator,
    FinalTimes,
    GpuLostError,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
    Resources,
    Undecided,
)
from doratune.tuner.isolation import IsolatedEvaluator

GPU = find_gpu("h200")
SPEC = KernelSpec.create("compose_forward", d_out=4096, tokens=1024, dtype="bf16", gpu="h200")
COMPILED = (Resources("fake_kernel", 64, 0, 1024, 4),)


def candidate(behaviour: str) -> Source:
    """A candidate that does what its text says."""
    return Source(SPEC, Config.create("tile", num_warps=1, num_stages=2), behaviour)


GOOD = candidate("good")


class Actor(Evaluator):
    """Does what the text of a candidate says. ``folder`` remembers across processes what was done once."""

    provenance = MEASURED

    def __init__(self, folder: Path) -> None:
        self.gpu = GPU
        self.folder = folder
        (folder / f"child-{os.getpid()}").touch()
        self.finished: list[str] = []

    def environment(self) -> Environment:
        return Environment(gpu="h200", architecture="sm_90", triton="0.0", gpu_name=f"{os.getpid()}")

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        self._prepare(source)
        self.running(0)
        return Evaluation(MEASURED, us=self._run(source), registers=compiled[0].registers, trials=len(self.finished))

    def final(self, sources: Sequence[Source]) -> FinalTimes | None:
        for index, source in enumerate(sources):
            self.running(index)
            try:
                self._run(source)
            except ContextLostError as lost:
                raise ContenderFailed(index, lost) from lost
        self.running(None)
        for source in sources:
            if source.text.startswith("in rounds: "):
                self._act(source.text.removeprefix("in rounds: "))
        return FinalTimes(tuple((float(len(source.text)),) for source in sources), settled=True)

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float] | None:
        self.running(0)
        return self._run(fused), self._run(composition)

    def finish(self, spec: KernelSpec) -> None:
        self.finished.append(str(spec))

    def _prepare(self, source: Source) -> None:
        if source.text.startswith("before: "):
            self._act(source.text.removeprefix("before: "))

    def _run(self, source: Source) -> float:
        if not source.text.startswith(("before: ", "in rounds: ")):
            self._act(source.text)
        return float(len(source.text))

    def _act(self, text: str) -> None:
        if text.startswith("once: "):
            done = self.folder / "done"
            if done.exists():
                return
            done.touch()
            text = text.removeprefix("once: ")
        verb, _, what = text.partition(" ")
        if verb == "hang":
            threading.Event().wait()
        elif verb == "exit":
            sys.exit(int(what))
        elif verb == "signal":
            os.kill(os.getpid(), signal.Signals[what])
            time.sleep(60.0)
        elif verb == "raise":
            raise ERRORS[what]()


ERRORS: dict[str, Callable[[], Exception]] = {
    "rejected": lambda: Rejected("inaccurate: y is off"),
    "context": lambda: ContextLostError("broke the GPU context: an illegal memory access"),
    "launch": lambda: LaunchFailureError("the GPU failed: unspecified launch failure"),
    "lost": lambda: GpuLostError("the GPU failed: device lost"),
    "memory": lambda: GpuMemoryError("does not fit"),
    "compile": lambda: CompileError("ptxas: no"),
    "other": lambda: KeyError("surprise"),
    "strange": lambda: Strange(1, 2),
}


class Strange(Undecided):
    """An error that is not made from its message."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.sum = first + second


def broken() -> Evaluator:
    raise GpuLostError("the GPU does not answer")


def gone() -> Evaluator:
    os._exit(7)


def run(folder: Path, doing: str) -> None:
    isolated = IsolatedEvaluator(functools.partial(Actor, folder), GPU)
    isolated.evaluate(GOOD, COMPILED)
    (folder / "evaluated").touch()
    isolated.evaluate(candidate(doing), COMPILED)
    time.sleep(60.0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
