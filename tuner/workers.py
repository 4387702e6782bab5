"""Compiling candidates in other processes, so that all cores work and a crashing compiler ends only its candidate.

**When a worker dies**, every job of its pool fails, so each is repeated alone. If the worker dies again, its exit code
says why. A crash of the compiler, if it has compiled other sources, and 60 s of processor time are properties of the
config (:class:`CompilerCrashError`). A kill from outside, as when memory runs out, and a compile that waits are not
(:class:`~.evaluation.Undecided`).

Every job also fills Triton's cache on disk: when the search later loads the kernel on a GPU, or wants the binary of a
winner, nothing is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from ..cache.entry import Binary
from ..codegen.binary import check, pack
from ..codegen.compile import CompiledKernel, CompileError, compile_source, prepare_launchers
from ..codegen.compile_process import (
    COMPILE_SECONDS,
    STUCK_SECONDS,
    prepare_worker,
    starting,
    time_limit,
    usable_cores,
)
from ..codegen.gpu import Gpu, find_gpu
from ..codegen.render import Source, render
from ..codegen.spec import Config, KernelSpec
from ..temporaries import remove_at_end, remove_orphans, temporary_name
from .evaluation import BrokenEnvironmentError, Resources, Undecided

POLL_SECONDS = 0.2
"""How long :meth:`CompilePool.wait` sleeps at most, so that its caller can look at the clock and at signals."""

Compiled = tuple[Resources, ...]

_Result = TypeVar("_Result")
_Job = Callable[[str, str, str], _Result]

_CRASHES = frozenset((signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP))
_EXIT_SECONDS = 10


class CompilerCrashError(CompileError):
    """The compiler crashed on this text alone, or used :data:`COMPILE_SECONDS` of processor time on it."""


class WorkerLostError(Undecided):
    """The worker ended for a reason outside the compiler; the message says how, and what to do."""


def default_jobs() -> int:
    """The number of compile workers for this machine: its usable cores, one left to the search where there are many."""
    cores = usable_cores()
    return cores - 1 if cores > 4 else cores


class CompilePool:
    """A pool of compile workers for one GPU that remembers what it compiled.

    Token buckets of one shape share their code, so the result for a code digest serves all of them. Not for use from
    several threads. The workers end with their parent, however that ends.
    """

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.gpu = gpu
        self.jobs = jobs or default_jobs()
        self._results: dict[str, Future[Compiled]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._solo: ProcessPoolExecutor | None = None
        self._solo_worker: BaseProcess | None = None
        self._suspects: queue.SimpleQueue[tuple[Source, Future[Compiled]]] = queue.SimpleQueue()
        self._suspect: tuple[Source, Future[Compiled], Future[Compiled]] | None = None
        self._compiles = False  # whether the compiler has finished any source
        self._temporary: str | None = None

    def start(self) -> None:
        """Start the workers without waiting for them, so that they import Triton while the caller does else.

        A machine that cannot start them says so at the first :meth:`submit`.
        """
        with contextlib.suppress(OSError, ImportError, NotImplementedError), starting():
            if self._pool is None:
                self._pool = self._workers(self.jobs)
            self._pool.submit(_nothing)

    def submit(self, source: Source) -> Future[Compiled]:
        """Queue ``source`` for compiling, or return the future of the same code.

        The future gives the resources of each kernel, or raises:

            OverLimitError: it needs more than the GPU has.
            CompilerCrashError: the compiler crashed on it, or took over :data:`COMPILE_SECONDS`.
            CompileError: Triton or the assembler refused it.
            WorkerLostError: its worker was killed, or it did not end within :data:`STUCK_SECONDS`.
            BrokenToolchainError, BrokenEnvironmentError: nothing compiles here.
            ToolchainError: it failed for a reason that need not lie in the text.
        """
        known = self._results.get(source.code_digest)
        if known is None or _is_undecided(known):
            known = self._results[source.code_digest] = Future()
            self._start(source, compile_job).add_done_callback(functools.partial(self._settle, source, known))
        return known

    def binaries(self, source: Source) -> Future[tuple[Binary, ...]]:
        """Queue making the binaries of every kernel of ``source``, for contiguous operands.

        The future raises as that of :meth:`submit`. If a worker dies, nothing is repeated.
        """
        made: Future[tuple[Binary, ...]] = Future()
        self._start(source, binaries_job).add_done_callback(functools.partial(_settle_binaries, source, made))
        return made

    def wait(self, futures: Collection[Future[Any]], seconds: float = POLL_SECONDS) -> None:
        """Return when one more of ``futures`` is done, or after ``seconds``."""
        self._try_suspects()
        wait(futures, timeout=min(seconds, POLL_SECONDS), return_when=FIRST_COMPLETED)

    def kill(self) -> None:
        """End the workers and their assemblers at once. Their jobs fail; :meth:`close` comes next."""
        for pool in (self._pool, self._solo):
            for worker in [*(pool._processes or {}).values()] if pool is not None else ():
                kill_with_tools(worker)

    def close(self) -> None:
        """Cancel the jobs that have not started, wait for the others, and end the workers."""
        for pool in (self._pool, self._solo):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._solo = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _workers(self, jobs: int) -> ProcessPoolExecutor:
        if self._temporary is None:
            folder = Path(tempfile.gettempdir())
            remove_orphans(folder)
            made = folder / temporary_name("doratune")
            made.mkdir(mode=0o700)
            self._temporary = str(made)
            remove_at_end(self._temporary)
        return _workers(jobs, self._temporary)

    def _start(self, source: Source, job: _Job[_Result]) -> Future[_Result]:
        try:
            if self._pool is None:
                self._pool = self._workers(self.jobs)
            try:
                return _send(self._pool, source, self.gpu, job)
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool = self._workers(self.jobs)
                return _send(self._pool, source, self.gpu, job)
        except (OSError, ImportError, NotImplementedError) as error:
            return _failed(error)

    def _settle(self, source: Source, known: Future[Compiled], job: Future[Compiled]) -> None:
        """Pass a finished job's outcome on. Runs in a thread of the pool."""
        if job.cancelled():
            known.cancel()
        elif isinstance(job.exception(), BrokenProcessPool):
            # When one job kills its worker, all jobs under way fail. Running each alone shows which one it was.
            self._suspects.put((source, known))
        else:
            self._pass_on(job, known)

    def _try_suspects(self) -> None:
        if self._suspect is not None and self._suspect[2].done():
            source, known, job = self._suspect
            self._suspect = None
            if isinstance(job.exception(), BrokenProcessPool):
                self._solo = None
                known.set_exception(self._post_mortem(source))
            else:
                self._pass_on(job, known)
        if self._suspect is None and not self._suspects.empty():
            source, known = self._suspects.get()
            self._suspect = (source, known, self._start_alone(source))

    def _start_alone(self, source: Source) -> Future[Compiled]:
        try:
            if self._solo is None:
                self._solo = self._workers(1)
            job = _send(self._solo, source, self.gpu, compile_job)
        except BrokenProcessPool as error:  # it was killed between two jobs
            self._solo = None
            return _failed(error)
        except (OSError, ImportError, NotImplementedError) as error:
            return _failed(error)
        self._solo_worker = next(iter((self._solo._processes or {}).values()), None)  # for its exit code
        return job

    def _post_mortem(self, source: Source) -> CompilerCrashError | WorkerLostError | BrokenEnvironmentError:
        """Why the worker that ran alone died."""
        code = _exit_code(self._solo_worker)
        which = f"{source.spec} with {source.config}"
        if code is None or code >= 0:
            return BrokenEnvironmentError(
                f"compile workers do not start: one ended with exit code {code} and may have printed the reason "
                "above; check that a new Python process can import doratune and Triton, and that a script guards "
                'its call with if __name__ == "__main__":'
            )
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        if -code == signal.SIGPROF:
            return CompilerCrashError(f"the compiler took over {COMPILE_SECONDS} s of processor time on {which}")
        if -code in _CRASHES and self._compiles:
            return CompilerCrashError(f"the compiler crashed ({name}) on {which}, also when it ran alone")
        if -code in _CRASHES:
            return WorkerLostError(
                f"the compiler crashed ({name}) on {which}, and has compiled nothing else so far; check the memory "
                "that processes may use (ulimit -a) and the installation of Triton"
            )
        if -code == signal.SIGALRM:
            return WorkerLostError(
                f"compiling {which} did not end in {STUCK_SECONDS} s; the machine is busy or a disk hangs: repeat when "
                "it is idle, or with fewer workers (--jobs)"
            )
        if -code == signal.SIGKILL:
            return WorkerLostError(
                f"the compile worker was killed (SIGKILL) on {which}, as Linux does where memory runs out (see dmesg); "
                "give the job more memory or fewer workers (--jobs)"
            )
        return WorkerLostError(f"the compile worker was ended by {name} on {which}; run again and do not end it")

    def _pass_on(self, job: Future[Compiled], known: Future[Compiled]) -> None:
        error = job.exception()
        if error is None:
            self._compiles = True
            known.set_result(job.result())
        else:
            self._compiles = self._compiles or isinstance(error, CompileError)
            known.set_exception(error)


def _is_undecided(known: Future[Compiled]) -> bool:
    """Whether a compile failed for a reason outside its source, so that it is worth another try."""
    if not known.done() or known.cancelled():
        return False
    return known.exception() is not None and not isinstance(known.exception(), CompileError)


def _settle_binaries(source: Source, made: Future[tuple[Binary, ...]], job: Future[tuple[Binary, ...]]) -> None:
    if job.cancelled():
        made.cancel()
        return
    error = job.exception()
    if isinstance(error, BrokenProcessPool):
        error = WorkerLostError(
            f"the worker died while it made the binaries of {source.spec}; where memory ran out (see dmesg), use fewer "
            "workers (--jobs)"
        )
    if error is not None:
        made.set_exception(error)
    else:
        made.set_result(job.result())


def _failed(error: Exception) -> Future[Any]:
    """A job that could not be handed to a worker."""
    job: Future[Any] = Future()
    if not isinstance(error, BrokenProcessPool):
        error = BrokenEnvironmentError(
            f"compile workers cannot be started: {error or type(error).__name__}; check the limits on processes, "
            "memory and open files and that /dev/shm can be written, or use fewer workers (--jobs)"
        )
    job.set_exception(error)
    return job


def _exit_code(worker: BaseProcess | None) -> int | None:
    """The exit code of a process that is ending. Its pool waits for it too, and may get the code first."""
    deadline = time.monotonic() + _EXIT_SECONDS
    while worker is not None and worker.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return None if worker is None else worker.exitcode


def _workers(jobs: int, temporary: str) -> ProcessPoolExecutor:
    # Spawned, because the search may hold a CUDA context and threads, neither of which survives a fork.
    return ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=prepare_worker, initargs=(os.getpid(), temporary)
    )


def kill_with_tools(worker: BaseProcess) -> None:
    """Kill a process that leads a group of its own, and the group: the assembler that it runs, for example."""
    with contextlib.suppress(OSError, TypeError):  # it leads none yet
        os.killpg(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    worker.kill()


def _send(pool: ProcessPoolExecutor, source: Source, gpu: Gpu, job: _Job[_Result]) -> Future[_Result]:
    with starting():
        return pool.submit(job, str(source.spec), str(source.config), gpu.slug)


def _nothing() -> None:
    """A job that starts a worker."""


def compile_job(spec: str, config: str, gpu: str) -> Compiled:
    """Compile one kernel for a GPU, all given in their text forms; runs in a worker.

    Raises:
        CompileError, ToolchainError: as :func:`~doratune.codegen.compile.compile_source`.
    """
    compiled = _compiled(render(KernelSpec.parse(spec), Config.parse(config)), find_gpu(gpu))
    prepare_launchers(compiled)
    return tuple(Resources(k.name, k.registers, k.spills, k.shared_bytes, k.num_warps) for k in compiled)


def binaries_job(spec: str, config: str, gpu: str) -> tuple[Binary, ...]:
    """Make the binaries of one kernel, from Triton's cache on disk if a search compiled it before.

    Raises:
        CompileError, ToolchainError: as :func:`~doratune.codegen.compile.compile_source`.
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
    with time_limit():
        return compile_source(source, gpu)
