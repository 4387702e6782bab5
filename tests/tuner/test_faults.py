"""What a broken machine does to a run is never held against a config: the run says what is wrong, records nothing, and
the same command succeeds once it is mended. What is a property of the config is recorded, and not tried again.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError

from doratune.cache.store import Store
from doratune.codegen.compile import BrokenToolchainError, CompileError, OverLimitError, ToolchainError, judge_failure
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner import search
from doratune.tuner.evaluation import (
    ContextLostError,
    GpuLostError,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
)
from doratune.tuner.kernel_search import IN_A_ROW
from doratune.tuner.search import FAILED, PARTIAL, TUNED, UNFINISHED, TuneResult
from doratune.tuner.space import Space
from doratune.tuner.study_storage import StudyStorageError, open_study_storage, release
from doratune.tuner.workers import CompilerCrashError, WorkerLostError

from .fakes import FORWARD, GPU, SPECS, TRIALS, FakeEvaluator, FakePool, steps_from

ONE = SPECS[:1]
SEEDS = Space(ONE[0], GPU).seeds

Tune = Callable[..., TuneResult]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.sqlite", create=True) as opened:
        yield opened


@pytest.fixture
def tune(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Tune:
    monkeypatch.setattr(search, "CompilePool", FakePool)

    def run(
        specs: list[KernelSpec],
        evaluator: FakeEvaluator,
        crashing: Callable[[Config], Exception | None] = lambda config: None,
        **options: object,
    ) -> TuneResult:
        monkeypatch.setattr(FakePool, "crashing", staticmethod(crashing))
        url = f"sqlite:///{tmp_path / 'studies.sqlite'}"
        given = {"study_storage": url, "trials": TRIALS, **options}
        return search.tune(specs, evaluators=[evaluator], store=store, gpu=GPU, **given)  # type: ignore[arg-type]

    return run


def sound() -> FakeEvaluator:
    return FakeEvaluator(steps_from(FORWARD))


def failing(error: Exception, when: Callable[[Config], bool] = lambda config: True) -> FakeEvaluator:
    def cost(spec: KernelSpec, config: Config) -> float:
        if when(config):
            raise error
        return steps_from(FORWARD)(spec, config)

    return FakeEvaluator(cost)


def trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = open_study_storage(f"sqlite:///{tmp_path / 'studies.sqlite'}")
    studies = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    names = [name for name in studies if not name.startswith("plan ")]
    found = [trial for name in names for trial in optuna.load_study(study_name=name, storage=storage).trials]
    release(storage)
    return found


BROKEN = {
    "a folder that refuses": PermissionError(errno.EACCES, "Permission denied", "/cache/key"),
    "a read-only disk": OSError(errno.EROFS, "Read-only file system", "/cache/key"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a path below a file": NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/cache"),
    "no ptxas": RuntimeError("Cannot find ptxas"),
    "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    "a broken import": ImportError("libtriton.so: undefined symbol"),
    "a lost GPU": GpuLostError("the GPU failed: CUDA error: device lost. Check it with nvidia-smi"),
    "a driver that is gone": GpuLostError("the GPU failed: CUDA error: unknown error. Check it with nvidia-smi"),
}
"""Failures after which nothing can be judged: the first one ends the run."""

DOUBTFUL = {
    "a killed worker": WorkerLostError("the compile worker was killed (SIGKILL); give the job more memory"),
    "a stuck compile": WorkerLostError("did not end in 180 s; repeat when the machine is idle"),
    "a tool's failure": subprocess.CalledProcessError(1, ["cuobjdump"]),
    "no memory": MemoryError(),
    "an error nobody knows": AssertionError("surprise"),
    "a toolchain error": ToolchainError("does not compile: KeyError: 'x'"),
}
"""Failures that another candidate may not meet."""


@pytest.mark.parametrize("where", ["compile", "evaluate"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_machine_ends_the_run_at_once_with_its_reason_and_the_next_run_succeeds(
    tune: Tune, store: Store, tmp_path: Path, kind: str, where: str
) -> None:
    error = BROKEN[kind]
    evaluator = failing(error) if where == "evaluate" else sound()
    result = tune(SPECS, evaluator, crashing=lambda config: error if where == "compile" else None)
    told = getattr(error, "strerror", None) or str(error).split(".")[0]
    assert result.stopped == "fault"
    assert told in result.fault
    assert result.fault.endswith("The same command continues from here")
    assert [row.outcome for row in result.rows] == [FAILED, UNFINISHED, UNFINISHED]
    assert told in result.failed[0].note
    assert len(evaluator.evaluated) <= 1, "the run ends at the first one"
    assert trials(tmp_path) == []
    assert store.entries() == []
    mended = sound()
    assert [row.outcome for row in tune(SPECS, mended).rows] == [TUNED] * 3
    assert mended.evaluated[0] == (ONE[0], SEEDS[0]), "the config that met the fault is tried again"


@pytest.mark.parametrize("where", ["compile", "evaluate"])
@pytest.mark.parametrize("kind", DOUBTFUL)
def test_failures_in_a_row_that_show_no_cause_end_the_run_and_the_next_run_succeeds(
    tune: Tune, store: Store, tmp_path: Path, kind: str, where: str
) -> None:
    error = DOUBTFUL[kind]
    evaluator = failing(error) if where == "evaluate" else sound()
    result = tune(SPECS, evaluator, crashing=lambda config: error if where == "compile" else None)
    assert result.stopped == "fault"
    assert (str(error) or type(error).__name__).split(";")[0] in result.failed[0].note
    assert (len(evaluator.evaluated) == IN_A_ROW) == (where == "evaluate")
    assert trials(tmp_path) == []
    assert store.entries() == []
    mended = sound()
    assert [row.outcome for row in tune(SPECS, mended).rows] == [TUNED] * 3
    assert mended.evaluated[0] == (ONE[0], SEEDS[0])


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_one_candidate_that_cannot_be_judged_stops_nothing_and_is_tried_again_by_the_next_run(
    tune: Tune, tmp_path: Path, kind: str
) -> None:
    unlucky = SEEDS[1]
    first = failing(DOUBTFUL[kind], lambda config: config == unlucky)
    result = tune(ONE, first)
    assert (result.rows[0].outcome, result.fault) == (TUNED, "")
    assert "could not be judged: 1" in result.rows[0].note
    assert [config for _, config in first.evaluated].count(unlucky) == 1
    assert str(unlucky) not in {trial.user_attrs["config"] for trial in trials(tmp_path)}
    second = sound()
    tune(ONE, second, trials=2 * TRIALS)
    assert unlucky in [config for _, config in second.evaluated]


VERDICTS = {
    "Triton refuses it": CompileError("does not compile: arange's range must be a power of 2"),
    "too much shared memory": OverLimitError("needs 300000 bytes of shared memory; a block has 232448"),
    "the compiler crashes": CompilerCrashError("the compiler crashed (SIGSEGV), also when it ran alone"),
    "endless compile": CompilerCrashError("the compiler took over 60 s of processor time"),
    "Triton's passes refuse it": RuntimeError("PassManager::run failed"),
    "inaccurate": Rejected("inaccurate: y is off by 0.1"),
    "out of registers": Rejected("does not run: out of resource: registers"),
}


@pytest.mark.parametrize("where", ["compile", "evaluate"])
@pytest.mark.parametrize("kind", VERDICTS)
def test_a_property_of_a_config_is_recorded_and_the_config_not_tried_again(
    tune: Tune, tmp_path: Path, kind: str, where: str
) -> None:
    error, bad = VERDICTS[kind], SEEDS[1]
    met: list[Config] = []

    def compiled(config: Config) -> Exception | None:
        if config == bad:
            met.append(config)
        return error if config == bad and where == "compile" else None

    first = failing(error, lambda config: config == bad and where == "evaluate")
    assert tune(ONE, first, crashing=compiled, binaries=False).rows[0].outcome == TUNED
    recorded = {trial.user_attrs["config"]: trial for trial in trials(tmp_path)}
    assert recorded[str(bad)].user_attrs["rejected"].endswith(str(error))
    assert met == [bad]
    tune(ONE, sound(), crashing=compiled, binaries=False, trials=2 * TRIALS)
    assert met == [bad]


def test_every_failed_kernel_has_its_reason_where_all_configs_are_rejected(tune: Tune) -> None:
    result = tune(SPECS, failing(Rejected("inaccurate: y is off")))
    assert [row.outcome for row in result.failed] == [FAILED] * 3
    assert all(row.note == "every config was rejected: inaccurate: y is off" for row in result.failed)
    assert (result.stopped, result.fault) == ("", "")


def test_a_kernel_too_large_for_the_gpus_memory_fails_alone_and_is_tried_again(tune: Tune, tmp_path: Path) -> None:
    def cost(spec: KernelSpec, config: Config) -> float:
        if spec == SPECS[1]:
            raise GpuMemoryError("the GPU's free memory does not hold the tensors; leave these out with --tokens")
        return steps_from(FORWARD)(spec, config)

    evaluator = FakeEvaluator(cost)
    result = tune(SPECS, evaluator)
    assert [row.outcome for row in result.rows] == [TUNED, FAILED, TUNED]
    assert "--tokens" in result.failed[0].note
    assert [spec for spec, _ in evaluator.evaluated].count(SPECS[1]) == IN_A_ROW
    assert [row.outcome for row in tune(SPECS, sound()).rows] == ["kept", TUNED, "kept"]


def test_a_fault_after_the_seeds_keeps_what_was_found(tune: Tune, store: Store) -> None:
    evaluator = failing(GpuLostError("the GPU failed"), lambda config: config not in SEEDS)
    result = tune(ONE, evaluator)
    assert result.rows[0].outcome == PARTIAL
    assert "the GPU failed" in result.rows[0].note
    assert store.get(ONE[0]) is not None
    assert tune(ONE, sound(), trials=2 * TRIALS).rows[0].outcome == TUNED


def test_a_launch_failure_is_held_against_a_config_only_when_it_comes_again_in_another_process(
    tune: Tune, tmp_path: Path
) -> None:
    error, bad = LaunchFailureError("the GPU failed: unspecified launch failure"), SEEDS[1]
    for expected in (False, True):
        result = tune(ONE, failing(error, lambda config: config == bad))
        assert ("unspecified launch failure" in result.fault) == (not expected)
        assert (str(bad) in {trial.user_attrs["config"] for trial in trials(tmp_path)}) == expected
    third = sound()
    assert tune(ONE, third, trials=2 * TRIALS).rows[0].outcome == TUNED
    assert bad not in [config for _, config in third.evaluated]


def test_a_launch_failure_of_a_bad_day_is_forgotten_when_the_config_works(tune: Tune, tmp_path: Path) -> None:
    error = LaunchFailureError("the GPU failed: unspecified launch failure")
    assert tune(ONE, failing(error)).stopped == "fault"
    mended = sound()
    assert tune(ONE, mended).rows[0].outcome == TUNED
    assert mended.evaluated[0] == (ONE[0], SEEDS[0])


def test_what_earlier_versions_rejected_without_saying_what_for_is_tried_again(tune: Tune, tmp_path: Path) -> None:
    result = tune(ONE, failing(Rejected("the disk was full")))
    assert result.rows[0].outcome == FAILED
    storage = open_study_storage(f"sqlite:///{tmp_path / 'studies.sqlite'}")
    with storage.engine.begin() as connection:  # type: ignore[attr-defined]
        # As they wrote it: one attribute for every kind of failure.
        connection.exec_driver_sql("UPDATE trial_user_attributes SET key = 'reason' WHERE key = 'rejected'")
    release(storage)
    mended = sound()
    assert tune(ONE, mended).rows[0].outcome == TUNED
    assert mended.evaluated[0] == (ONE[0], SEEDS[0])


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["INSERT INTO trials", "INSERT INTO study_user_attributes", "SELECT trials."])
def test_a_study_database_that_is_lost_ends_the_run_with_a_sentence_and_the_next_run_succeeds(
    tune: Tune, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.tuner.study_storage.PATIENCE_SECONDS", 1.0)

    def fail(connection: object, cursor: object, text: str, *rest: object) -> None:
        if text.startswith(statement):
            raise OperationalError(text, {}, Exception("server closed the connection unexpectedly"))

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(StudyStorageError, match=r"server closed the connection.*--study-storage"):
            tune(ONE, sound())
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", fail)
    assert tune(ONE, sound()).rows[0].outcome == TUNED


def test_binaries_that_a_broken_machine_cannot_make_end_the_run_with_its_reason(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    tune(SPECS, sound(), binaries=False)
    full = judge_failure(OSError(errno.ENOSPC, "No space left on device"), "a kernel")
    result = tune(SPECS, sound(), crashing=lambda config: full)
    assert "No space left on device" in result.fault
    assert "The winners so far are stored" in result.fault
    assert store.binary_keys() == []
    assert tune(SPECS, sound()).fault == ""
    assert store.binary_keys()


def test_a_context_that_a_config_broke_in_this_process_is_recorded_before_the_run_ends(
    tune: Tune, tmp_path: Path
) -> None:
    evaluator = failing(GpuLostError("the GPU does not answer"))
    broken = iter([ContextLostError("broke the GPU context: an illegal memory access")])

    def cost(spec: KernelSpec, config: Config) -> float:
        raise next(broken, GpuLostError("the GPU does not answer"))

    evaluator.cost = cost
    result = tune(ONE, evaluator)
    assert "the GPU does not answer" in result.fault
    assert [trial.user_attrs["config"] for trial in trials(tmp_path)] == [str(SEEDS[0])]


def test_a_broken_toolchain_is_told_with_its_place_and_remedy() -> None:
    fault = judge_failure(PermissionError(errno.EACCES, "Permission denied", "/cache/key"), "a kernel")
    assert isinstance(fault, BrokenToolchainError)
    assert "Permission denied (/cache/key)" in str(fault)
    assert "TRITON_CACHE_DIR" in str(fault)
