"""An evaluator in a process of its own, so that a candidate that hangs, crashes or exits costs only itself.

The child runs any other :class:`~.evaluation.Evaluator`; calls and their results cross a pipe. Before the child runs
code of a candidate it says so (``Evaluator.running``), so that what ends it later is the candidate's doing:

=================================================  ==================================================================
what happens                                       what the call does
=================================================  ==================================================================
a candidate does not end within its limit          ``Rejected``; the child is killed and replaced
a candidate exits, or crashes by a signal          ``Rejected`` with the exit code or the signal; replaced
a candidate's fault destroys the GPU's context     ``Rejected`` with the reason; replaced
``unspecified launch failure``                     repeated in a new child; twice: ``Rejected``
the child dies or is killed for another reason     repeated in a new child; twice: ``Undecided``
the GPU does not answer                            repeated in a new child; twice: ``GpuLostError``
the child does not start, twice                    ``BrokenEnvironmentError``
preparing does not end within its limit            ``Undecided``; replaced
any other error of the evaluator                   raised as it is; errors of other kinds as ``judge_failure`` says
=================================================  ==================================================================

The GPU memory of a dead child is released by the driver. A child ends with its parent, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..cache.entry import MEASURED, Environment, Evaluation
from ..codegen.compile import judge_failure
from ..codegen.compile_process import end_with_parent, starting
from ..codegen.gpu import Gpu
from ..codegen.render import Source
from ..codegen.spec import KernelSpec
from ..errors import DoratuneError
from .evaluation import (
    BrokenEnvironmentError,
    ContenderFailed,
    ContextLostError,
    Evaluator,
    FinalTimes,
    GpuLostError,
    LaunchFailureError,
    Rejected,
    Resources,
    Undecided,
)
from .workers import kill_with_tools

_KILLED_FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
"""Signals that a candidate does not cause: the kernel kills where memory runs out, a user or a batch system ends."""

_END_SECONDS = 60
"""How long a killed child may take to end: the driver first waits for its GPU to stop."""


@dataclass(frozen=True)
class Limits:
    """Seconds that the steps of a call may take.

    Attributes:
        start: the child's start, with its import of PyTorch and its first contact with the GPU.
        prepare: all before a candidate runs: inputs, references, loading the kernel.
        run: running one candidate; a slow one takes tenths of a second.
        rounds: running several candidates in turn.
    """

    start: float = 300.0
    prepare: float = 180.0
    run: float = 20.0
    rounds: float = 60.0


class _Ended(Exception):
    """The child ended during a call, or was killed because a step took too long.

    Attributes:
        step: ``start``, ``prepare``, ``run`` or ``rounds``, a field of :class:`Limits`.
        index: the candidate that ran in the step ``run``.
        code: the exit code, negative for a signal; None if it was killed because of the limit.
    """

    def __init__(self, step: str, index: int | None, code: int | None) -> None:
        super().__init__(step, index, code)
        self.step, self.index, self.code = step, index, code


class IsolatedEvaluator(Evaluator):
    """Runs the evaluator that ``factory`` makes in a child process, which it replaces when it fails.

    ``factory`` must be picklable: a function or class of a module, or a ``functools.partial`` of one. A script needs
    Python's ``if __name__ == "__main__":`` guard, since the child imports the main module. ``environment`` is what
    :meth:`environment` returns, if it is known already; otherwise the child is asked.

    Calls block. One thread at a time may make them; :meth:`close` may come from any thread and ends a call under way.
    """

    provenance = MEASURED

    def __init__(
        self,
        factory: Callable[[], Evaluator],
        gpu: Gpu,
        *,
        environment: Environment | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.gpu = gpu
        self._factory = pickle.dumps(factory)
        self._environment = environment
        self._limits = limits or Limits()
        self._child: Future[_Child] | None = None
        self._lock = threading.Lock()
        self._closed = False
        # A child ends with the thread that started it (PR_SET_PDEATHSIG), so that must be one that lives on.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="doratune-isolation")

    def start(self) -> None:
        """Start the child without waiting for it, so that it imports and initialises while the caller does else."""
        with self._lock:
            if self._closed:
                raise Undecided("the evaluator is closed")
            if self._child is None:
                self._child = self._starter.submit(_Child, self._factory, self._limits)

    def environment(self) -> Environment:
        """The environment of the evaluator in the child.

        Raises: what making the evaluator raises; BrokenEnvironmentError, if the child does not start.
        """
        if self._environment is None:
            self._environment = self._call("environment", (), "the environment")
        return self._environment

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        """Judge one candidate in the child. Raises: see the table of this module."""
        evaluation: Evaluation = self._call("evaluate", (source, tuple(compiled)), _name(source))
        return evaluation

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float] | None:
        """Time a fused kernel and its unfused sequence in the child. Raises: see the table of this module."""
        times: tuple[float, float] | None = self._call("fusion_times", (fused, composition), _name(fused))
        return times

    def final(self, sources: Sequence[Source]) -> FinalTimes | None:
        """Play a final in the child.

        If the child ends while several sources run in turn, each one is run alone to find the one to blame.

        Raises:
            ContenderFailed: a source failed; its cause is as in the table of this module.
            Undecided, BrokenEnvironmentError: as in the table.
        """
        sources = tuple(sources)
        which = f"the final of {sources[0].spec}"
        try:
            times: FinalTimes | None = self._call("final", (sources,), which)
        except Rejected as rejected:  # one of several; which one is not known
            if len(sources) == 1:
                raise ContenderFailed(0, rejected) from rejected
            for index, source in enumerate(sources):
                try:
                    self._call("final", ((source,),), _name(source))
                except ContenderFailed as failed:
                    raise ContenderFailed(index, failed.cause) from failed
                except Rejected as alone:
                    raise ContenderFailed(index, alone) from alone
            raise Undecided(f"{rejected}; each contender runs when it is alone") from rejected
        return times

    def finish(self, spec: KernelSpec) -> None:
        """Let the child release what it keeps for ``spec``."""
        with self._lock:
            child = self._child
        if child is not None and child.done() and child.exception() is None:
            child.result().tell("finish", (spec,))

    def cancel(self) -> None:
        """End the child, and with it a call under way in another thread."""
        with self._lock:
            self._closed = True
        self._discard()

    def close(self) -> None:
        """End the child. A call under way in another thread raises Undecided."""
        self.cancel()
        self._starter.shutdown(wait=True)

    def _call(self, method: str, arguments: tuple[object, ...], which: str) -> Any:
        """Run a method of the evaluator in the child, again in a new child where that may help."""
        for last in (False, True):
            contender: int | None = None
            try:
                return self._once(method, arguments)
            except _Ended as ended:
                verdict = _verdict(ended, which, self._limits)
                failure, repeat = verdict or _undecided(ended, which), verdict is None
                if isinstance(verdict, Rejected) and method == "final":
                    contender = ended.index
            except ContenderFailed as failed:
                failure, repeat = self._after(failed.cause, last)
                contender = failed.index
            except (ContextLostError, GpuLostError) as lost:
                failure, repeat = self._after(lost, last)
            if self._closed:
                raise Undecided(f"{which}: the evaluator was closed")
            if last or not repeat:
                raise failure if contender is None else ContenderFailed(contender, failure)
        raise AssertionError("the second attempt raises or returns")

    def _after(self, failure: DoratuneError, last: bool) -> tuple[DoratuneError, bool]:
        """Replace the child if ``failure`` cost its GPU context; return what to raise, and whether to try again."""
        if isinstance(failure, ContextLostError | GpuLostError):
            self._replace()
        if isinstance(failure, ContextLostError):
            return Rejected(str(failure)), False
        if isinstance(failure, LaunchFailureError) and last:
            return Rejected(f"{failure}; the same happened in another process"), False
        return failure, isinstance(failure, GpuLostError)

    def _once(self, method: str, arguments: tuple[object, ...]) -> Any:
        self.start()
        with self._lock:
            started = self._child
        if started is None:  # closed by another thread
            raise _Ended("prepare", None, None)
        try:
            child = started.result()
        except (OSError, ImportError, RuntimeError) as error:
            self._discard()
            raise BrokenEnvironmentError(
                f"the process that measures cannot be started: {error}; check the limits on processes, memory and open "
                "files"
            ) from error
        try:
            return child.call(method, arguments, self.running)
        except _Ended:
            self._replace()
            raise
        except _NotMade as failure:
            self._discard()
            raise failure.error from failure
        except DoratuneError:
            raise
        except BaseException:  # such as Ctrl-C: the answer would come to the next call
            self._discard()
            raise

    def _replace(self) -> None:
        """End the child and start the next one, which becomes ready while the caller goes on."""
        self._discard()
        if not self._closed:
            self.start()

    def _discard(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None and not child.cancel():
            try:
                child.result().end()
            except (OSError, ImportError, RuntimeError):
                return  # it was never started


class _NotMade(Exception):
    """The evaluator could not be made in the child; ``error`` says why."""

    def __init__(self, error: DoratuneError) -> None:
        super().__init__(str(error))
        self.error = error


class _Child:
    """A child process and the pipe to it."""

    def __init__(self, factory: bytes, limits: Limits) -> None:
        self._limits = limits
        self._ready = False
        context = multiprocessing.get_context("spawn")  # a CUDA context and threads do not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, os.getpid(), factory), name="doratune-measure", daemon=True
        )
        self._since = time.monotonic()
        with starting():
            self._process.start()
        theirs.close()  # so that the pipe ends when the child does

    def tell(self, method: str, arguments: tuple[object, ...]) -> None:
        """Run a method of the evaluator some time, without an answer."""
        try:
            self._pipe.send((method, arguments, False))
        except OSError:
            return  # it is dead, and so keeps nothing

    def call(self, method: str, arguments: tuple[object, ...], running: Callable[[int | None], None]) -> Any:
        """Run a method of the evaluator and return what it returns, or raise what it raises.

        Raises:
            _Ended: the child ended, or a step took too long and the child was killed.
            _NotMade: the child could not make the evaluator.
        """
        step, index = "prepare" if self._ready else "start", None
        deadline = (time.monotonic() if self._ready else self._since) + getattr(self._limits, step)
        try:
            self._pipe.send((method, arguments, True))
            while True:
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.end()
                    raise _Ended(step, index, None)
                kind, value = self._pipe.recv()
                if kind == "ready":
                    self._ready = True
                    step = "prepare"
                elif kind == "running":
                    index = value
                    step = "rounds" if index is None else "run"
                    running(index)
                elif kind == "result":
                    return value
                elif kind == "not made":
                    self.end()
                    raise _NotMade(_rebuilt(value))
                else:
                    raise _rebuilt(value)
                deadline = time.monotonic() + getattr(self._limits, step)
        except (EOFError, OSError):
            raise _Ended(step, index, self.end()) from None

    def end(self) -> int | None:
        """Kill the child if it lives, wait until it is gone, and return its exit code.

        Raises:
            GpuLostError: it cannot be killed, which happens where the driver waits for its GPU.
        """
        kill_with_tools(self._process)
        deadline = time.monotonic() + _END_SECONDS
        while self._process.exitcode is None and time.monotonic() < deadline:
            self._process.join(0.1)  # another thread may wait for it too, and get the exit code first
        if self._process.exitcode is None:
            raise GpuLostError(
                f"process {self._process.pid} does not end after SIGKILL: its GPU may hang. Check it with nvidia-smi "
                "and the system's log (dmesg)"
            )
        return self._process.exitcode


def _verdict(ended: _Ended, which: str, limits: Limits) -> DoratuneError | None:
    """What the child's end says of the candidate that ran; None if it says nothing and the call is worth repeating."""
    ran = ended.step in ("run", "rounds")
    if ended.code is None:
        seconds = getattr(limits, ended.step)
        if ran:
            return Rejected(f"did not end within {seconds:g} s")
        return Undecided(
            f"{which}: preparing it did not end within {seconds:g} s; the machine is busy, or a disk or the GPU hangs"
        )
    if not ran or -ended.code in _KILLED_FROM_OUTSIDE:
        return None
    return Rejected(f"its process {_ending(ended.code)}")


def _undecided(ended: _Ended, which: str) -> DoratuneError:
    """The failure if a child ended twice for no reason in the candidate."""
    assert ended.code is not None
    if ended.step == "start":
        return BrokenEnvironmentError(
            f"the process that measures does not start: it {_ending(ended.code)} and may have printed the reason "
            "above; check that a new Python process can import doratune and PyTorch, and that a script guards its "
            'call with if __name__ == "__main__":'
        )
    hint = ", as Linux does where memory runs out (see dmesg)" if -ended.code == signal.SIGKILL else ""
    return Undecided(f"{which}: the process that measures {_ending(ended.code)}{hint}, also when it was repeated")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"was ended by {signal.Signals(-code).name if -code in {*signal.Signals} else f'signal {-code}'}"


def _name(source: Source) -> str:
    return f"{source.config} of {source.spec}"


def _serve(pipe: Connection, parent: int, factory: bytes) -> None:
    """The child: make the evaluator, then answer calls until the pipe ends."""
    end_with_parent(parent)
    try:
        evaluator: Evaluator = pickle.loads(factory)()
    except Exception as error:
        pipe.send(("not made", _portable(error, "the process that measures does not start")))
        return
    evaluator.running = lambda index: pipe.send(("running", index))
    pipe.send(("ready", None))
    while True:
        try:
            method, arguments, answer = pipe.recv()
        except EOFError:
            return
        try:
            reply = ("result", getattr(evaluator, method)(*arguments))
        except SystemExit as leaving:
            os._exit(leaving.code if isinstance(leaving.code, int) else 1)  # at once: a teardown could hang
        except Exception as error:
            reply = ("error", _portable(error, f"{method} fails"))
        if answer:
            pipe.send(reply)


_Portable = tuple[type[DoratuneError], tuple[Any, ...], dict[str, Any]]
"""An exception as it crosses the pipe, for its class may not be made from its arguments."""


def _portable(error: Exception, what: str) -> _Portable:
    if not isinstance(error, DoratuneError):
        error = judge_failure(error, what)
    state = {name: value for name, value in vars(error).items() if name != "__notes__"}
    if isinstance(error, ContenderFailed):
        state["cause"] = _portable(error.cause, what)
    try:
        pickle.dumps((type(error), error.args, state))
    except Exception:  # whatever a class of someone else's raises
        return Undecided, (f"{type(error).__name__}: {error}",), {}
    return type(error), error.args, state


def _rebuilt(portable: _Portable) -> DoratuneError:
    kind, arguments, state = portable
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    vars(error).update(state)
    if isinstance(error, ContenderFailed):
        error.cause = _rebuilt(state["cause"])
    return error
