"""Compiling candidates in other processes, so that all cores work and a crashing compiler ends only its candidate.

Every job also fills Triton's cache on disk: when the search later loads the kernel on a GPU, or wants the binary of a
winner, nothing is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ..cache.entry import Binary
from ..codegen.binary import check, pack
from ..codegen.compile import CompiledKernel, CompileError, compile_source
from ..codegen.gpu import Gpu, find_gpu
from ..codegen.render import Source, render
from ..codegen.spec import Config, KernelSpec
from .evaluation import Resources

COMPILE_SECONDS = 90
"""A compile that takes longer is ended: a kernel of this package takes one to three seconds."""

POLL_SECONDS = 0.2
"""How long :meth:`CompilePool.wait` sleeps at most, so that its caller can look at the clock and at signals."""

Compiled = tuple[Resources, ...]

_Result = TypeVar("_Result")
_Job = Callable[[str, str, str], _Result]

_INTERPRETER = "TRITON_INTERPRET"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class CompilerCrashError(CompileError):
    """The compiler took its process down with it, or did not come to an end."""


def default_jobs() -> int:
    """The number of compile workers for this machine: its usable cores, one left to the search where there are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - 1 if cores > 4 else cores


class CompilePool:
    """A pool of compile workers for one GPU, with a memory of what was compiled.

    Token buckets of one shape share their code, so the result for a code digest serves all of them. Not for use from
    several threads. The workers end with their parent, however that ends.
    """

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.gpu = gpu
        self.jobs = jobs or default_jobs()
        self._results: dict[str, Future[Compiled]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._solo: ProcessPoolExecutor | None = None
        self._suspects: queue.SimpleQueue[tuple[Source, Future[Compiled]]] = queue.SimpleQueue()
        self._suspect: tuple[Source, Future[Compiled], Future[Compiled]] | None = None

    def submit(self, source: Source) -> Future[Compiled]:
        """Compile ``source`` some time soon, or return what is known of the same code.

        The future gives the resources of each kernel, or raises:

            OverLimitError: it needs more than the GPU has.
            CompilerCrashError: its compile killed the worker or took over :data:`COMPILE_SECONDS`.
            CompileError: Triton or the assembler refused it.
        """
        known = self._results.get(source.code_digest)
        if known is None:
            known = self._results[source.code_digest] = Future()
            self._start(source, compile_job).add_done_callback(functools.partial(self._settle, source, known))
        return known

    def binaries(self, source: Source) -> Future[tuple[Binary, ...]]:
        """Have the binaries of every kernel of ``source`` made for a store, for contiguous operands.

        The future raises a CompileError as :meth:`submit` does, or a BrokenProcessPool where a worker crashed: then
        nothing is tried again.
        """
        return self._start(source, binaries_job)

    def wait(self, futures: Collection[Future[Any]], seconds: float = POLL_SECONDS) -> None:
        """Return when one more of ``futures`` is done, or after ``seconds``."""
        self._try_suspects()
        wait(futures, timeout=min(seconds, POLL_SECONDS), return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Drop what has not been started, wait for what has, and end the workers."""
        for pool in (self._pool, self._solo):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._solo = None

    def _start(self, source: Source, job: _Job[_Result]) -> Future[_Result]:
        if self._pool is None:
            self._pool = _workers(self.jobs)
        try:
            return _send(self._pool, source, self.gpu, job)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = _workers(self.jobs)
            return _send(self._pool, source, self.gpu, job)

    def _settle(self, source: Source, known: Future[Compiled], job: Future[Compiled]) -> None:
        """Pass a finished job's outcome on. Runs in a thread of the pool."""
        if job.cancelled():
            known.cancel()
        elif isinstance(job.exception(), BrokenProcessPool):
            # Every job under way fails when one kills its worker; which one it was shows when each runs alone.
            self._suspects.put((source, known))
        else:
            _pass_on(job, known)

    def _try_suspects(self) -> None:
        if self._suspect is not None and self._suspect[2].done():
            source, known, job = self._suspect
            self._suspect = None
            if isinstance(job.exception(), BrokenProcessPool):
                self._solo = None
                known.set_exception(
                    CompilerCrashError(
                        f"the compiler crashed, or took over {COMPILE_SECONDS} s, on {source.spec} with {source.config}"
                    )
                )
            else:
                _pass_on(job, known)
        if self._suspect is None and not self._suspects.empty():
            source, known = self._suspects.get()
            if self._solo is None:
                self._solo = _workers(1)
            self._suspect = (source, known, _send(self._solo, source, self.gpu, compile_job))


def _pass_on(job: Future[Compiled], known: Future[Compiled]) -> None:
    error = job.exception()
    if error is not None:
        known.set_exception(error)
    else:
        known.set_result(job.result())


def _workers(jobs: int) -> ProcessPoolExecutor:
    # Spawned, because the search may hold a CUDA context and threads, neither of which survives a fork.
    return ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_prepare_worker, initargs=(os.getpid(),)
    )


def _send(pool: ProcessPoolExecutor, source: Source, gpu: Gpu, job: _Job[_Result]) -> Future[_Result]:
    with _without_interpreter():
        return pool.submit(job, str(source.spec), str(source.config), gpu.slug)


@contextmanager
def _without_interpreter() -> Iterator[None]:
    """Hide the switch of Triton's CPU interpreter from workers that start meanwhile: under it nothing compiles.

    It must be gone before the worker starts, since the parent's main module, which a spawned process imports first, may
    import Triton.
    """
    switch = os.environ.pop(_INTERPRETER, None)
    try:
        yield
    finally:
        if switch is not None:
            os.environ[_INTERPRETER] = switch


def _prepare_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside LLVM, where no Python handler runs
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def compile_job(spec: str, config: str, gpu: str) -> Compiled:
    """Compile one kernel for a GPU, all given in their text forms; runs in a worker.

    Raises:
        CompileError: as :func:`~doratune.codegen.compile.compile_source`.
    """
    compiled = _compiled(render(KernelSpec.parse(spec), Config.parse(config)), find_gpu(gpu))
    return tuple(Resources(k.name, k.registers, k.spills, k.shared_bytes, k.num_warps) for k in compiled)


def binaries_job(spec: str, config: str, gpu: str) -> tuple[Binary, ...]:
    """The same, for the binaries. Triton's cache on disk has them when the kernel was compiled for a search before.

    Raises:
        CompileError: as :func:`~doratune.codegen.compile.compile_source`.
        BinaryError: the installed Triton makes binaries with facts that no lookup would accept.
    """
    import triton

    source, target = render(KernelSpec.parse(spec), Config.parse(config)), find_gpu(gpu)
    made = tuple(
        Binary(source.code_digest, kernel.name, triton.__version__, target.architecture, *pack(kernel.handle))
        for kernel in _compiled(source, target)
    )
    for binary in made:
        check(source, binary.kernel, target.triton_target(), binary.metadata, binary.image)
    return made


def _compiled(source: Source, gpu: Gpu) -> tuple[CompiledKernel, ...]:
    signal.alarm(COMPILE_SECONDS)
    try:
        return compile_source(source, gpu)
    finally:
        signal.alarm(0)
