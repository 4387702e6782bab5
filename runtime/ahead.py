"""Compile kernels in parallel before they are launched.

Triton compiles a kernel when it is loaded, one after another. :func:`compile_ahead` compiles all that are going to be
needed at once: it starts one clean Python process (:mod:`~doratune.codegen.compile_server`), which forks a worker for
each core. The user's process is never forked: it may hold a CUDA context and threads. Nor is its main module imported
again, so scripts need no ``if __name__ == "__main__"`` and notebooks work. The results come through Triton's cache on
disk. Whatever fails there is only not ready: the first launch compiles it, and raises what is to be raised.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing.spawn
import os
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from ..internals.triton import (
    cache_folder,
    compile_launcher,
    has_descriptors,
    is_compiled,
    launcher_is_compiled,
    launchers_of,
    why_compile,
)
from .kernel import Kernel, Request
from .loader import stores_open
from .local_ranks import local_rank, share_of_cores
from .lock_folder import lock_folder
from .no_jit import NotCompiledError, no_jit

if TYPE_CHECKING:
    from ..codegen.compile_server import Task

PROCESSES = "DORATUNE_COMPILE_PROCESSES"
"""The environment variable that sets how many processes compile; 0 compiles nothing ahead."""

MOST_PROCESSES = 32
"""More do not make a model's first step faster: it has some 30 kernels, and the slowest takes seconds."""

TOLD_AFTER_SECONDS = 2.0
"""A compile that takes longer is announced."""

SILENT_SECONDS = 120.0
"""A server that finishes no kernel for so long is given up."""

_log = logging.getLogger("doratune")
_ROOT = __name__.partition(".")[0]


class ServerError(Exception):
    """The compile server does not start, ended early or stopped answering."""


class Compiled(NamedTuple):
    """The outcome of a :class:`Batch`: kernels compiled, and kernels that were not."""

    kernels: int
    failed: int


def compile_ahead(requests: Iterable[Request]) -> Compiled:
    """Compile what ``requests`` need and load it, so that launches find it ready.

    What is stored as a binary or in Triton's cache is only loaded. If one kernel alone is missing, its first launch
    compiles it. No error is raised: a warning says if the processes cannot be used.
    """
    return Batch(requests).finish()


class Batch:
    """Kernels that are compiled by other processes, while this one does else until :meth:`finish`.

    Args:
        requests: the kernels. The processes start as soon as the first that must be compiled is known.
        besides: a batch under way, whose kernels this one need not compile.
    """

    def __init__(self, requests: Iterable[Request], besides: Batch | None = None) -> None:
        self._tasks: dict[str, Task] = {}
        self._waiting: dict[str, list[Request]] = {}
        self._missing: dict[Request, int] = {}
        self._ready: list[Request] = []
        self._last: list[Request] = []
        self._launchers: dict[str, Future[None]] = {}
        self._besides = besides
        self._processes = _processes()
        self._server: _Server | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._problem: Exception | None = None
        self.refused: dict[str, None] = {}
        """The specs of kernels that would have to be compiled although ``DORATUNE_NO_JIT`` is set."""
        try:
            with stores_open():
                self._collect(requests)
        except BaseException:
            self._close()
            raise
        self._ask()
        for request in self._ready:
            self._load(request)

    def _collect(self, requests: Iterable[Request]) -> None:
        if no_jit():
            self._ready += dict.fromkeys(request for request in requests if not request[0].is_loaded(request[1]))
            return
        for request in requests:
            if self._processes < 1 or why_compile() is not None or not _can_start():
                return
            if request not in self._missing and not request[0].is_loaded(request[1]):
                self._add(request)

    def _add(self, request: Request) -> None:
        needs = needs_of(*request)
        known: Collection[str] = () if self._besides is None else self._besides._tasks
        mine = [task for task in needs.tasks if task.digest not in known]
        self._missing[request] = len(mine)
        for task in mine:
            self._tasks.setdefault(task.digest, task)
            self._waiting.setdefault(task.digest, []).append(request)
        if mine and self._server is None and self._problem is None:
            try:
                self._server = _Server(self._processes)
            except OSError as problem:
                self._problem = problem
        for text in needs.launchers:
            if text not in self._launchers:
                self._threads = self._threads or ThreadPoolExecutor(self._processes, "doratune")
                self._launchers[text] = self._threads.submit(compile_launcher, text)
        if not mine:  # loading waits for launchers in C, and for what the batch besides compiles
            (self._last if needs.tasks or needs.launchers else self._ready).append(request)

    def _ask(self) -> None:
        if len(self._tasks) < 2:  # the first launch compiles it
            self._end_server()
        elif self._server is not None:
            self._server.ask(sorted(self._tasks.values(), key=lambda task: -len(task.text)))  # the longest is not last

    def finish(self) -> Compiled:
        """Wait until all are compiled, and load them. What is long is told."""
        failed = len(self._tasks)
        try:
            if self._server is not None:
                for digest, problem in self._server.answers():
                    if problem is not None:
                        _log.info("%s was not compiled ahead: %s", self._tasks[digest].name, problem)
                        continue
                    failed -= 1
                    for request in self._waiting[digest]:
                        self._missing[request] -= 1
                        if not self._missing[request]:
                            self._load(request)
            for future in self._launchers.values():
                error = future.exception()
                if error is not None:
                    _log.info("a C launcher was not compiled ahead: %r", error)
        except (OSError, ServerError) as problem:
            self._problem = problem
        finally:
            self._close()
        for request in self._last:
            self._load(request)
        if self._problem is not None:
            warnings.warn(
                "doratune compiles kernels one after another, because compiling them in parallel failed: "
                f"{self._problem}. {PROCESSES}=0 switches that off",
                RuntimeWarning,
                stacklevel=2,
            )
        return Compiled(len(self._tasks) - failed, failed)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter
            self._close()

    def _load(self, request: Request) -> None:
        kernel, alignments = request
        try:
            kernel.load(alignments)
        except NotCompiledError:
            self.refused[str(kernel.spec)] = None
        except Exception:  # the launch raises it again
            pass

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _close(self) -> None:
        self._end_server()
        self._besides = None
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


class Needs(NamedTuple):
    """What must be compiled before a kernel can start: its GPU code, and the texts of its C launchers."""

    tasks: Sequence[Task] = ()
    launchers: Sequence[str] = ()


def needs_of(kernel: Kernel, alignments: tuple[int, ...]) -> Needs:
    """The compiles that loading and starting ``kernel`` would need and that Triton's cache does not have.

    Up to Triton 3.6 a start takes launchers in C. Compiling one starts the C compiler, for which threads suffice.
    """
    from ..codegen.compile import launch_options, triton_source
    from ..codegen.compile_server import Task
    from ..codegen.gpu import find_gpu
    from ..codegen.module import kernel_names

    unbound = kernel.unbound(alignments)
    if unbound is None:
        return Needs()
    source, module, known, binaries = unbound
    target = find_gpu(source.spec.gpu).triton_target()
    facts = (tuple(known.items()), (target.backend, target.arch, target.warp_size))
    tasks: list[Task] = []
    launchers: list[str] = []
    for name in kernel_names(module):
        code = triton_source(source, getattr(module, name), known)
        descriptors = None
        if binaries:
            descriptors = json.loads(binaries[name].metadata).get("tensordesc_meta")
        elif not is_compiled(code, target, launch_options(source, name)):
            tasks.append(Task(str(source.spec), str(source.config), source.text, name, *facts))
        if descriptors is not None or not has_descriptors(code):  # else the task makes them
            launchers += [text for text in launchers_of(code, descriptors) if not launcher_is_compiled(text)]
    return Needs(tasks, launchers)


def _processes() -> int:
    """How many processes may compile: the variable :data:`PROCESSES`, or this process's share of the host's cores.

    Raises:
        UsageError: the variable is not a number.
    """
    from ..codegen.compile_process import usable_cores

    given = os.environ.get(PROCESSES, "").strip()
    if given:
        if not given.isdecimal():
            raise UsageError(f"{PROCESSES}={given}: expected a number of processes, or 0 to compile nothing ahead")
        return int(given)
    usable = usable_cores()
    with contextlib.suppress(UsageError):  # a variable that only looks like a launcher's
        usable = share_of_cores(os.environ, usable, os.cpu_count() or 1) or usable
    return min(usable, MOST_PROCESSES)


def _can_start() -> bool:
    """Whether kernels compile here, and a new Python process can import this package: not in a frozen application."""
    from ..codegen.compile_process import INTERPRETER

    interprets = os.environ.get(INTERPRETER, "0") not in ("", "0")
    return not interprets and hasattr(os, "fork") and not getattr(sys, "frozen", False) and bool(_executable())


def _executable() -> str:
    found = multiprocessing.spawn.get_executable() or sys.executable
    return os.fsdecode(found) if found else ""


class _Server:
    """A compile server: a process that imports Triton while its tasks are collected, and gets them in a file.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, processes: int) -> None:
        self._most = processes
        self._processes = 0
        self._asked: list[Task] = []
        self._file = Path(os.devnull) / "none"
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [_executable(), "-c", f"from {_ROOT}.codegen.compile_server import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                start_new_session=True,  # Ctrl-C on a terminal is for this process, which ends the server
            )
        except BaseException:
            self._errors.close()
            raise

    def ask(self, tasks: Sequence[Task]) -> None:
        """Send the tasks. They go through a file, so that a server that does not read cannot block this process."""
        locks, self._asked = _shared(tasks)
        self._processes = min(self._most, len(tasks))
        request = {"processes": self._processes, "locks": locks, "tasks": self._asked}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json", delete=False) as file:
            json.dump(request, file)
        self._file = Path(file.name)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: the answers say so
            self._process.stdin.write(f"{file.name}\n".encode())
            self._process.stdin.close()

    def answers(self) -> Iterator[tuple[str, str | None]]:
        """The digest of each task as it finishes, and the reason if it failed.

        Raises:
            ServerError: the server ended before it had answered all, or stopped answering.
        """
        start = time.monotonic()
        assert self._process.stdout is not None
        told = False
        answered = 0
        for line in _lines(self._process.stdout, start + TOLD_AFTER_SECONDS):
            if line is None:
                _tell(f"compiling {len(self._asked)} kernels for this model ({self._processes} processes)")
                told = True
                continue
            index, problem = json.loads(line)
            answered += 1
            yield self._asked[index].digest, problem
        if told:
            _tell(f"compiled {answered} kernels in {time.monotonic() - start:.1f} s")
        if answered < len(self._asked):
            code = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ServerError(f"their server ended with exit code {code}: {''.join(last)[:300]}")

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._file.unlink()  # it was not read
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _shared(tasks: Sequence[Task]) -> tuple[str | None, list[Task]]:
    """Where a launcher's processes on this host agree on who compiles what, and the order in which this one begins."""
    try:
        found = local_rank(os.environ)
    except UsageError:
        found = None
    if found is None or found.size < 2:
        return None, [*tasks]
    folder = lock_folder()
    begin = found.rank * len(tasks) // found.size
    return None if folder is None else str(folder), [*tasks[begin:], *tasks[:begin]]


def _environment() -> dict[str, str]:
    """The environment of the server: it imports what this process can import, and shares its cache."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    folder = cache_folder()
    return environment if folder is None else {**environment, "TRITON_CACHE_DIR": folder}


def _lines(pipe: IO[bytes], tell_at: float) -> Iterator[bytes | None]:
    """The lines that arrive, and one None when it is ``tell_at`` by the clock.

    Raises:
        ServerError: nothing arrives for :data:`SILENT_SECONDS`.
    """
    buffer = b""
    silent_at = time.monotonic() + SILENT_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now >= tell_at:
                tell_at = float("inf")
                yield None
            if now >= silent_at:
                raise ServerError(f"no kernel was finished within {SILENT_SECONDS:.0f} s")
            if not selector.select(min(tell_at, silent_at) - now):
                continue
            read = os.read(pipe.fileno(), 1 << 16)
            if not read:
                return
            silent_at = time.monotonic() + SILENT_SECONDS
            *lines, buffer = (buffer + read).split(b"\n")
            yield from lines


def _tell(text: str) -> None:
    """Say ``text`` on a terminal, else in the log."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"doratune: {text}", file=sys.stderr, flush=True)
    else:
        _log.info(text)
