"""A candidate that hangs, crashes or exits costs only itself: it is rejected with the reason, and the next one is
evaluated. The children are processes with a fake evaluator; nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from doratune.cache.entry import MEASURED, Environment, Evaluation
from doratune.codegen.compile import CompileError, ToolchainError
from doratune.tuner.evaluation import (
    BrokenEnvironmentError,
    ContenderFailed,
    ContextLostError,
    FinalTimes,
    GpuLostError,
    GpuMemoryError,
    Rejected,
    Undecided,
)
from doratune.tuner.isolation import IsolatedEvaluator, Limits

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    from .actors import COMPILED, GOOD, GPU, SPEC, Actor, Strange, broken, candidate, gone
else:
    sys.path.append(str(FOLDER))  # of the children too
    from actors import COMPILED, GOOD, GPU, SPEC, Actor, Strange, broken, candidate, gone

LIMITS = Limits(start=60.0, prepare=1.0, run=1.0, rounds=1.0)


@pytest.fixture
def isolated(tmp_path: Path) -> Iterator[IsolatedEvaluator]:
    evaluator = IsolatedEvaluator(functools.partial(Actor, tmp_path), GPU, limits=LIMITS)
    yield evaluator
    evaluator.close()
    assert not multiprocessing.active_children(), "no process is left"


def children(folder: Path) -> int:
    return len(list(folder.glob("child-*")))


def assert_goes_on(isolated: IsolatedEvaluator) -> None:
    assert isolated.evaluate(GOOD, COMPILED).us == len("good")


def test_what_the_evaluator_returns_comes_back(isolated: IsolatedEvaluator, tmp_path: Path) -> None:
    assert isolated.environment().gpu == "h200"
    assert isolated.environment().gpu_name not in ("", str(os.getpid()))
    assert isolated.evaluate(GOOD, COMPILED) == Evaluation(MEASURED, us=4.0, registers=64)
    assert isolated.fusion_times(GOOD, candidate("longer")) == (4.0, 6.0)
    assert isolated.final([GOOD, candidate("longer")]) == FinalTimes(((4.0,), (6.0,)), settled=True)
    isolated.finish(SPEC)
    assert isolated.evaluate(GOOD, COMPILED).trials == 1, "the child was told to finish"
    assert children(tmp_path) == 1


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("hang", "did not end within 1 s"),
        ("exit 3", "exited with code 3"),
        ("exit 0", "exited with code 0"),
        ("signal SIGSEGV", "was ended by SIGSEGV"),
        ("signal SIGABRT", "was ended by SIGABRT"),
        ("raise context", "an illegal memory access"),
        ("raise launch", "unspecified launch failure; the same happened in another process"),
    ],
)
def test_a_candidate_that_takes_its_process_along_is_rejected_and_the_next_one_evaluated(
    isolated: IsolatedEvaluator, behaviour: str, said: str
) -> None:
    assert_goes_on(isolated)
    with pytest.raises(Rejected, match=said) as caught:
        isolated.evaluate(candidate(behaviour), COMPILED)
    assert not isinstance(caught.value, ContextLostError), "the run need not end"
    assert_goes_on(isolated)


@pytest.mark.parametrize(
    "behaviour",
    ["signal SIGKILL", "signal SIGTERM", "before: exit 3", "before: signal SIGSEGV", "raise launch", "raise lost"],
)
def test_what_may_have_another_cause_is_tried_again_in_a_new_process(
    isolated: IsolatedEvaluator, tmp_path: Path, behaviour: str
) -> None:
    before, _, act = behaviour.rpartition("before: ")
    source = candidate(f"before: once: {act}" if before or behaviour != act else f"once: {act}")
    assert isolated.evaluate(source, COMPILED).us == len(source.text)
    assert children(tmp_path) == 2


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        (
            "signal SIGKILL",
            Undecided,
            "SIGKILL, as Linux does where memory runs out .*also when it was repeated",
        ),
        ("before: exit 3", Undecided, "exited with code 3, also when it was repeated"),
        ("before: hang", Undecided, "preparing it did not end within 1 s"),
        ("raise lost", GpuLostError, "device lost"),
    ],
)
def test_what_is_no_property_of_the_config_is_no_verdict(
    isolated: IsolatedEvaluator, behaviour: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        isolated.evaluate(candidate(behaviour), COMPILED)
    assert not isinstance(caught.value, Rejected)
    assert_goes_on(isolated)


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        ("raise rejected", Rejected, "inaccurate: y is off"),
        ("raise memory", GpuMemoryError, "does not fit"),
        ("raise compile", CompileError, "ptxas: no"),
        ("raise other", ToolchainError, "KeyError: 'surprise'"),
        ("raise strange", Strange, "1 and 2"),
    ],
)
def test_other_errors_come_as_they_are_and_keep_the_process(
    isolated: IsolatedEvaluator, tmp_path: Path, behaviour: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        isolated.evaluate(candidate(behaviour), COMPILED)
    assert type(caught.value) is kind
    if isinstance(caught.value, Strange):
        assert caught.value.sum == 3
    assert_goes_on(isolated)
    assert children(tmp_path) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        *("hang", "exit 3", "signal SIGSEGV", "raise context"),
        *("in rounds: hang", "in rounds: exit 3", "in rounds: raise context"),
    ],
)
def test_a_contender_that_fails_in_a_final_is_named(isolated: IsolatedEvaluator, behaviour: str) -> None:
    with pytest.raises(ContenderFailed) as caught:
        isolated.final([GOOD, candidate(behaviour), GOOD])
    assert caught.value.index == 1
    assert isinstance(caught.value.cause, Rejected)
    assert str(caught.value) == str(caught.value.cause)
    assert isolated.final([GOOD, GOOD]) == FinalTimes(((4.0,), (4.0,)), settled=True)


def test_a_final_that_fails_only_when_several_run_names_none(isolated: IsolatedEvaluator) -> None:
    with pytest.raises(Undecided, match="each contender runs when it is alone"):
        isolated.final([GOOD, candidate("in rounds: once: exit 3")])
    assert_goes_on(isolated)


def test_an_evaluator_that_cannot_be_made_says_why() -> None:
    isolated = IsolatedEvaluator(broken, GPU, limits=LIMITS)
    with pytest.raises(GpuLostError, match="does not answer"):
        isolated.evaluate(GOOD, COMPILED)
    isolated.close()


def test_a_process_that_never_starts_is_a_broken_environment() -> None:
    isolated = IsolatedEvaluator(gone, GPU, limits=LIMITS)
    with pytest.raises(BrokenEnvironmentError, match="does not start: it exited with code 7"):
        isolated.environment()
    isolated.close()


def test_starting_does_not_wait(isolated: IsolatedEvaluator) -> None:
    since = time.monotonic()
    isolated.start()
    assert time.monotonic() - since < 0.2
    assert_goes_on(isolated)


def test_a_known_environment_starts_no_process(tmp_path: Path) -> None:
    known = Environment(gpu="h200", architecture="sm_90", triton="0.0")
    isolated = IsolatedEvaluator(functools.partial(Actor, tmp_path), GPU, environment=known)
    assert isolated.environment() is known
    isolated.close()
    assert children(tmp_path) == 0


def test_a_child_killed_between_two_calls_is_replaced(isolated: IsolatedEvaluator) -> None:
    os.kill(int(isolated.environment().gpu_name), signal.SIGKILL)
    assert_goes_on(isolated)
    isolated.finish(SPEC)


def test_closing_ends_a_call_under_way(tmp_path: Path) -> None:
    isolated = IsolatedEvaluator(functools.partial(Actor, tmp_path), GPU, limits=Limits())
    assert_goes_on(isolated)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            isolated.evaluate(candidate("hang"), COMPILED)
        except Exception as error:
            raised.append(error)

    lane = threading.Thread(target=wait)
    lane.start()
    time.sleep(0.5)
    isolated.close()
    lane.join(10.0)
    assert [type(error) for error in raised] == [Undecided]
    assert not multiprocessing.active_children()
    with pytest.raises(Undecided, match="closed"):
        isolated.evaluate(GOOD, COMPILED)


def test_the_child_outlives_the_thread_that_called_first(isolated: IsolatedEvaluator, tmp_path: Path) -> None:
    for _ in range(2):
        lane = threading.Thread(target=assert_goes_on, args=(isolated,))
        lane.start()
        lane.join()
    assert_goes_on(isolated)
    assert children(tmp_path) == 1


def test_a_call_costs_less_than_a_millisecond(isolated: IsolatedEvaluator) -> None:
    source = candidate("good" + " " * 20_000)
    isolated.evaluate(source, COMPILED)
    best = float("inf")
    for _ in range(20):
        since = time.perf_counter()
        for _ in range(10):
            isolated.evaluate(source, COMPILED)
        best = min(best, (time.perf_counter() - since) / 10)
    assert best < 1e-3


def test_a_call_that_is_interrupted_leaves_no_answer_to_the_next_one(isolated: IsolatedEvaluator) -> None:
    def interrupt(index: int | None) -> None:
        raise KeyboardInterrupt

    isolated.running = interrupt
    with pytest.raises(KeyboardInterrupt):
        isolated.evaluate(candidate("interrupted"), COMPILED)
    isolated.running = lambda index: None
    assert_goes_on(isolated)


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
@pytest.mark.parametrize("doing", ["good", "hang"])
def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path, doing: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, str(FOLDER / "actors.py"), str(tmp_path), doing],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "evaluated").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    [child] = [int(path.name.removeprefix("child-")) for path in tmp_path.glob("child-*")]
    assert alive(child)
    parent.kill()
    parent.wait()
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
