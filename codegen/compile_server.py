"""A Python process that compiles kernels in parallel for another one: ``main`` is all it runs.

It reads the path of a file from its standard input, and from the file, which it removes, a JSON object: the
``processes`` to use, the folder of ``locks`` or null, and the ``tasks`` (:class:`Task`, or :class:`LauncherTask` of one
item). It compiles each in a process forked from this one, which has loaded Triton, but neither PyTorch nor CUDA. The
results are in Triton's cache on disk, where the parent's own compile finds them. For each finished task it prints a
JSON array: the task's index, and null or the reason why it failed.

With ``locks``, several servers may get the same tasks at once, as the processes of a launcher do: each task is compiled
by one of them, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from ..internals.triton import preload
from .compile_process import INTERPRETER, prepare_worker, time_limit

_BUSY = "another process compiles it"


class Task(NamedTuple):
    """One kernel of an emitted text to compile; with tensor descriptors, also its C launchers.

    ``spec`` and ``config`` are the text forms of the source's. ``alignments`` are the bytes that divide the address and
    row stride of each operand, with its name. ``target`` is the GPU's backend, architecture and warp size as Triton
    names them.
    """

    spec: str
    config: str
    text: str
    kernel: str
    alignments: Sequence[tuple[str, int]]
    target: tuple[str, int | str, int]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kernel} of {self.spec}"

    @property
    def digest(self) -> str:
        """Equal for tasks that compile the same code."""
        from .digest import code_digest

        what = [code_digest(self.text), self.kernel, [[*pair] for pair in self.alignments], *self.target]
        return hashlib.sha256(repr(what).encode()).hexdigest()


def main() -> None:
    """Serve one request, and exit."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a compiler prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.environ.pop(INTERPRETER, None)
    sys.modules.setdefault("torch", _NoTorch("torch"))
    _preload()
    path = Path(sys.stdin.readline().rstrip("\n"))
    if not path.name:  # there is nothing to compile after all
        return
    request = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    try:
        serve([Task(*task) for task in request["tasks"]], request["processes"], request["locks"], answers)
    except BrokenPipeError:  # the parent is gone; the workers end with this process
        os._exit(1)


def serve(tasks: Sequence[Task], processes: int, locks: str | None, answers: IO[str]) -> None:
    """Compile ``tasks`` in ``processes`` processes and write an answer for each as it finishes.

    If a process dies (a crash of the compiler, or no memory), the tasks without an answer are tried once more, in fewer
    processes.
    """
    left = dict(enumerate(tasks))
    for number in (processes, max(1, processes // 4)):
        died = ""
        for index, outcome in _outcomes(left, number, locks):
            if isinstance(outcome, BrokenProcessPool):
                died = "a compile process died"
                break
            del left[index]
            answers.write(json.dumps([index, outcome]) + "\n")
            answers.flush()
        if not left:
            return
    for index in left:
        answers.write(json.dumps([index, died]) + "\n")
    answers.flush()


def _outcomes(
    tasks: Mapping[int, Task], processes: int, locks: str | None
) -> Iterator[tuple[int, str | BrokenProcessPool | None]]:
    """The index and the outcome of each task as it finishes."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=prepare_worker, initargs=(os.getpid(),)) as pool:
        under_way: dict[Future[str | None], int] = {}
        busy: list[int] = []
        try:
            for index, task in tasks.items():
                under_way[pool.submit(compile_task, task, locks, False)] = index
            while under_way:
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    index = under_way.pop(future)
                    if future.result() == _BUSY:
                        busy.append(index)
                    else:
                        yield index, future.result()
                while busy and len(under_way) < processes:  # nothing else to do: wait for the other server
                    index = busy.pop()
                    under_way[pool.submit(compile_task, tasks[index], locks, True)] = index
        except BrokenProcessPool as problem:
            yield -1, problem


class _NoTorch(ModuleType):
    """In place of PyTorch, whose import takes seconds: emitted modules use it in ``launch``, which is not run here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # it has no path, no spec, …
            raise AttributeError(name)
        return _Unused()


class _Unused:
    def __getattr__(self, name: str) -> _Unused:
        return self

    def __call__(self, *_: object, **__: object) -> _Unused:
        return self


def _preload() -> None:
    """Import and compute what every compile needs, once for all processes."""
    from . import compile as compile_module  # noqa: F401
    from .spec import Config, KernelSpec  # noqa: F401

    preload()


def compile_task(task: Task, locks: str | None, patient: bool) -> str | None:
    """Compile one task into Triton's cache; return why that failed, or None.

    If another process compiles the same task, a ``patient`` call waits for it; another returns at once.
    """
    with _lock(task, locks, patient) as mine:
        if not mine:
            return _BUSY
        try:
            with time_limit():
                _compile(task)
        except Exception as error:  # the parent compiles it again, and raises
            return f"{type(error).__name__}: {error}"
    return None


def _compile(task: Task) -> None:
    from triton.backends.compiler import GPUTarget

    from ..internals.triton import has_descriptors, prepare_launcher
    from .compile import build
    from .module import load_module
    from .render import Source
    from .spec import Config, KernelSpec

    source = Source(KernelSpec.parse(task.spec), Config.parse(task.config), task.text)
    kernel = getattr(load_module(source), task.kernel)
    compiled = build(source, kernel, GPUTarget(*task.target), dict(task.alignments))
    if has_descriptors(compiled.src):  # its launcher depends on the result
        prepare_launcher(compiled)


@contextlib.contextmanager
def _lock(task: Task, folder: str | None, patient: bool) -> Iterator[bool]:
    """Hold the lock of a task; yields False if another process holds it and this call is not ``patient``."""
    if folder is None:
        yield True
        return
    import fcntl

    path = Path(folder) / task.digest
    try:
        file = path.open("w")
    except OSError:  # no lock: the kernel may be compiled twice
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
        with contextlib.suppress(OSError):  # whoever opens the file from now on finds the result in Triton's cache
            path.unlink()
