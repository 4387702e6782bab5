"""A search ends with the best config it could find in the store, whatever happens on the way.

Seeds go first; refused configs reach neither compiler nor evaluator, rejected ones never win; nothing is evaluated
twice; a run that is killed, interrupted or out of time goes on later where it was; the winners' binaries are stored.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch

from doratune.cache.entry import MEASURED, PREDICTED, Binary, Evaluation
from doratune.cache.store import Store
from doratune.codegen.compile import CompileError
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import check_config, default_config
from doratune.errors import DoratuneError, UsageError
from doratune.runtime.reference import definition, reference
from doratune.tuner import search
from doratune.tuner.effort import EFFORTS, STANDARD, find_effort
from doratune.tuner.evaluation import ContextLostError, Rejected, Resources, Undecided
from doratune.tuner.fusion import composition_of, product_of, run_unfused
from doratune.tuner.incumbents import Incumbents, built_in
from doratune.tuner.inputs import make_inputs, make_outputs
from doratune.tuner.progress import SilentProgress
from doratune.tuner.search import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, TuneResult
from doratune.tuner.space import Space
from doratune.tuner.study_storage import StudyStorageError, open_study_storage, release

from .fakes import FORWARD, GPU, SPECS, TRIALS, FakeEvaluator, FakePool, forward_spec, steps_from

BACKWARD_SPEC = KernelSpec.create("compose_backward", d_out=4096, tokens=4096, dtype="bf16", gpu="h200")
ONE = SPECS[:1]

Tune = Callable[..., TuneResult]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.sqlite", create=True) as opened:
        yield opened


@pytest.fixture
def tune(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Tune:
    monkeypatch.setattr(search, "CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))

    def run(specs: list[KernelSpec], evaluator: FakeEvaluator, **options: object) -> TuneResult:
        url = f"sqlite:///{tmp_path / 'studies.sqlite'}"
        return search.tune(specs, evaluators=[evaluator], store=store, gpu=GPU, **{"study_storage": url, **options})

    return run


def starting_with(config: Config) -> Callable[[KernelSpec], Incumbents]:
    """The built-in default as the incumbent, and ``config`` known to have done well for a similar spec."""
    return lambda spec: replace(built_in(spec, GPU), starts=(config,))


@pytest.mark.parametrize(("block_t", "block_n", "num_warps"), [(2, 128, 1), (8, 256, 8), (1, 2048, 2), (16, 64, 4)])
def test_the_planted_optimum_of_a_small_space_is_found(tune: Tune, block_t: int, block_n: int, num_warps: int) -> None:
    # 60 of 168 configs: drawn by chance, the four optima would all be found in one of sixty runs.
    target = Config.create("tile", block_t=block_t, block_n=block_n, num_warps=num_warps, num_stages=2)
    result = tune(ONE, FakeEvaluator(steps_from(target)), effort=EFFORTS["full"], trials=60)
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config == target


def test_the_sampler_beats_the_first_configs_and_chance_in_a_large_space(tune: Tune) -> None:
    space = Space(BACKWARD_SPEC, GPU)
    target = Config.create(
        "columns", block_n=256, block_t=1, chunk=16, reduce_c=8, reduce_n=128, num_warps=2, num_stages=3
    )
    cost = steps_from(target)
    evaluator = FakeEvaluator(cost)
    result = tune([BACKWARD_SPEC], evaluator, effort=EFFORTS["full"], trials=110)
    entry = result.rows[0].entry
    assert entry is not None
    found = cost(BACKWARD_SPEC, entry.config)
    chance = random.Random(0)
    drawn = (space.draw(chance) for _ in range(len(evaluator.evaluated)))
    by_chance = min(cost(BACKWARD_SPEC, config) for config in drawn if space.refuse(config) is None)
    known = len(space.seeds) + EFFORTS["full"].shortlist
    first = min(cost(spec, config) for spec, config in evaluator.evaluated[:known])
    assert found < by_chance
    assert found < first


def test_after_the_default_seeds_are_evaluated_in_turn_over_the_variants(tune: Tune) -> None:
    spec = KernelSpec.create("lora_compose", d_out=4096, rank=64, tokens=4096, dtype="bf16", adapter="bf16", gpu="h200")
    seeds = Space(spec, GPU).seeds
    evaluator = FakeEvaluator(steps_from(seeds[0]))
    tune([spec], evaluator)
    default = default_config(spec, GPU)
    first = [default, *(seed for seed in seeds if seed != default)]
    assert [config for _, config in evaluator.evaluated[: len(seeds)]] == first
    assert len({config.variant for config in seeds[:2]}) == 2


def test_refused_configs_reach_no_evaluator_and_repeated_ones_only_once(tune: Tune) -> None:
    target = Config.create(  # itself refused, so the sampler is drawn to refused configs
        "columns", block_n=2048, block_t=16, chunk=1, reduce_c=64, reduce_n=128, num_warps=1, num_stages=1
    )
    evaluator = FakeEvaluator(steps_from(target))
    tune([BACKWARD_SPEC], evaluator, trials=50)
    configs = [config for _, config in evaluator.evaluated]
    assert len(configs) > 20
    assert [config for config in configs if check_config(BACKWARD_SPEC, config, GPU) is not None] == []
    assert max(Counter(configs).values()) == 1


def test_what_is_known_from_elsewhere_is_tried_right_after_the_incumbents(tune: Tune) -> None:
    evaluator = FakeEvaluator(steps_from(FORWARD))
    result = tune(ONE, evaluator, incumbents=starting_with(FORWARD))
    seeds = Space(ONE[0], GPU).seeds
    assert FORWARD not in seeds
    assert [config for _, config in evaluator.evaluated[: len(seeds) + 1]] == [seeds[0], FORWARD, *seeds[1:]]
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config == FORWARD


def test_the_winner_of_a_template_that_has_changed_is_tried_first(
    tune: Tune, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(ONE, FakeEvaluator(steps_from(FORWARD)), incumbents=starting_with(FORWARD))
    entry = store.get(ONE[0])
    assert entry is not None
    assert entry.config == FORWARD
    store.put(replace(entry, template_digest="0" * 64, source_digest="0" * 64))
    monkeypatch.setattr("doratune.tuner.space.template_digest", lambda op, variant: "changed")
    again = FakeEvaluator(steps_from(FORWARD))
    tune(ONE, again, trials=1)
    assert again.evaluated[0] == (ONE[0], FORWARD)
    assert len(again.evaluated) == 2, "one trial is enough to have it back, beside the built-in default"


def test_what_is_known_from_elsewhere_does_not_hinder_where_it_does_not_fit(tune: Tune) -> None:
    alien = Config.create("tile", block_t=4096, block_n=4096, num_warps=1, num_stages=2)
    evaluator = FakeEvaluator(steps_from(FORWARD))
    assert tune(ONE, evaluator, incumbents=starting_with(alien)).rows[0].outcome == TUNED
    assert alien not in [config for _, config in evaluator.evaluated]


def test_a_rejected_config_never_wins_however_fast_it_would_be(tune: Tune) -> None:
    def cost(spec: KernelSpec, config: Config) -> float:
        if config.num_warps > 1:
            raise Rejected("inaccurate: y is off")
        return steps_from(FORWARD)(spec, config)

    result = tune(ONE, FakeEvaluator(cost))
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config.num_warps == 1


def test_a_spec_whose_every_config_is_rejected_fails_with_the_reason_and_stores_nothing(
    tune: Tune, store: Store
) -> None:
    def cost(spec: KernelSpec, config: Config) -> float:
        raise Rejected("inaccurate: y is off")

    result = tune(SPECS[:2], FakeEvaluator(cost))
    assert [row.outcome for row in result.rows] == [FAILED, FAILED]
    assert "y is off" in result.rows[0].note
    assert store.get(SPECS[0]) is None


def test_a_candidate_that_takes_the_gpu_context_along_costs_only_itself(tune: Tune) -> None:
    def cost(spec: KernelSpec, config: Config) -> float:
        if config.num_warps == 4:
            raise ContextLostError("broke the GPU context: an illegal memory access")
        return steps_from(FORWARD)(spec, config)

    evaluator = FakeEvaluator(cost)
    result = tune(ONE, evaluator)
    assert result.fault == ""
    assert max(Counter(config for _, config in evaluator.evaluated).values()) == 1
    assert any(config.num_warps == 4 for _, config in evaluator.evaluated)
    assert evaluator.closed
    assert result.rows[0].outcome == TUNED
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config.num_warps != 4


def test_a_candidate_whose_compile_crashes_does_not_end_the_run(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(config: Config) -> Exception | None:
        return CompileError("the compiler crashed") if config.num_warps == FORWARD.num_warps else None

    monkeypatch.setattr(FakePool, "crashing", staticmethod(crashing))
    evaluator = FakeEvaluator(steps_from(FORWARD))
    result = tune(ONE, evaluator)
    assert result.rows[0].outcome == TUNED
    assert result.rows[0].entry is not None
    assert result.rows[0].entry.config.num_warps != FORWARD.num_warps
    assert all(config.num_warps != FORWARD.num_warps for _, config in evaluator.evaluated)


def test_a_run_is_repeatable(tune: Tune, store: Store, tmp_path: Path) -> None:
    orders = []
    for name in ("a", "b"):
        evaluator = FakeEvaluator(steps_from(FORWARD))
        tune(SPECS, evaluator, study_storage=f"sqlite:///{tmp_path / name}")
        orders.append(evaluator.evaluated)
        for spec in SPECS:
            store.remove(spec)
    assert orders[0] == orders[1]
    assert len(orders[0]) > 3 * len(Space(SPECS[0], GPU).seeds)


def test_the_winner_of_one_token_bucket_is_tried_at_once_on_the_next(tune: Tune) -> None:
    evaluator = FakeEvaluator(steps_from(FORWARD))
    result = tune(SPECS[:2], evaluator)
    winner = result.rows[0].entry
    assert winner is not None
    seeds = len(Space(SPECS[1], GPU).seeds)
    second = [config for spec, config in evaluator.evaluated if spec == SPECS[1]]
    assert winner.config in second[: seeds + 1]


def test_the_entry_says_what_it_was_tuned_with(tune: Tune, store: Store) -> None:
    evaluator = FakeEvaluator(steps_from(FORWARD))
    tune(ONE, evaluator)
    entry = store.get(ONE[0])
    assert entry is not None
    source = render(ONE[0], entry.config)
    assert (entry.source, entry.source_digest) == (source.text, source.digest)
    assert entry.evaluation.trials == len(evaluator.evaluated)
    assert entry.evaluation.us == min(evaluator.cost(*tried) for tried in evaluator.evaluated)
    assert entry.evaluation.samples_us == (entry.evaluation.us,) * 8
    assert entry.environment == evaluator.environment()
    assert evaluator.closed


def test_a_kernel_at_its_floor_is_not_searched_further(tune: Tune) -> None:
    evaluator = FakeEvaluator(lambda spec, config: 1.001 * GPU.floor_us(3 * 2 * spec.d_out * spec.tokens, 0, "bf16"))
    result = tune(ONE, evaluator)
    assert result.rows[0].note == "at the floor"
    assert len(evaluator.evaluated) < STANDARD.measure.trials


def test_a_second_run_keeps_what_is_there_and_more_effort_goes_on_from_the_trials(tune: Tune) -> None:
    first, second, third = (FakeEvaluator(steps_from(FORWARD)) for _ in range(3))
    tune(SPECS, first)
    again = tune(SPECS, second)
    assert [row.outcome for row in again.rows] == [KEPT] * 3
    assert all(row.kept and row.entry is not None for row in again.rows)
    assert second.evaluated == []
    tune(SPECS, third, effort=EFFORTS["full"])
    assert third.evaluated != []
    assert not set(third.evaluated) & set(first.evaluated)


def test_every_level_of_effort_searches_what_the_level_before_left() -> None:
    levels = list(EFFORTS.values())
    for low, high in itertools.pairwise(levels):
        for provenance in (MEASURED, PREDICTED):
            assert low.budget(provenance).trials < high.budget(provenance).patience


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "searched"),
    [("template and text", True), ("template, not text", False), ("worse", True), ("better", False)],
)
def test_an_entry_is_replaced_when_its_template_changed_or_its_provenance_is_worse(
    tune: Tune, store: Store, change: str, searched: bool
) -> None:
    tune(ONE, FakeEvaluator(steps_from(FORWARD)))
    entry = store.get(ONE[0])
    assert entry is not None
    store.remove(ONE[0])
    if change.startswith("template"):
        entry = replace(entry, template_digest="0" * 64)
    if change == "template and text":
        entry = replace(entry, source_digest="0" * 64)
    if change == "worse":
        entry = replace(entry, evaluation=replace(entry.evaluation, provenance=PREDICTED))
    store.put(entry)
    evaluator = FakeEvaluator(steps_from(FORWARD))
    if change == "better":
        evaluator.provenance = PREDICTED  # type: ignore[misc]
    result = tune(ONE, evaluator, trials=None if change == "template, not text" else 160)
    assert (result.rows[0].outcome != KEPT) == searched
    kept = store.get(ONE[0])
    assert kept is not None
    assert kept.template_digest == template_digest("compose_forward", kept.config.variant)


def test_a_changed_search_space_starts_a_new_study(tune: Tune, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    first, second = FakeEvaluator(steps_from(FORWARD)), FakeEvaluator(steps_from(FORWARD))
    tune(ONE, first)
    store.remove(ONE[0])
    monkeypatch.setattr("doratune.tuner.space.template_digest", lambda op, variant: "changed")
    tune(ONE, second)
    assert second.evaluated[0] == first.evaluated[0]


def test_the_time_limit_stores_nothing_unsettled_and_leaves_the_rest_for_later(
    tune: Tune, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def cost(spec: KernelSpec, config: Config) -> float:
        nonlocal now
        now += 1.0
        return steps_from(FORWARD)(spec, config)

    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: now))
    slow = FakeEvaluator(cost)
    specs = [forward_spec(4096, d_out) for d_out in (512, 1024, 2048)]
    result = tune(specs, slow, timeout=2.5)
    assert result.stopped == "timeout"
    assert {row.outcome for row in result.rows} == {UNFINISHED}
    assert store.entries() == []
    rest = FakeEvaluator(steps_from(FORWARD))
    assert [row.outcome for row in tune(specs, rest).rows] == [TUNED] * 3
    assert len(slow.evaluated) == 3
    assert not set(rest.evaluated) & set(slow.evaluated)


def test_thousands_of_kernels_are_prepared_no_longer_than_the_time_limit(
    tune: Tune, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[KernelSpec] = []

    def slow(spec: KernelSpec) -> None:
        asked.append(spec)
        time.sleep(0.02)

    monkeypatch.setattr(store, "readable", slow)
    specs = [forward_spec(1, 64 * n) for n in range(1, 2001)]
    begin = time.monotonic()
    result = tune(specs, FakeEvaluator(steps_from(FORWARD)), timeout=0.3)
    assert time.monotonic() - begin < 10.0
    assert result.stopped == "timeout"
    assert result.count(UNFINISHED) == len(result.rows) == 2000
    assert len(asked) < 200


def test_after_the_time_limit_it_is_still_said_what_the_store_has(tune: Tune, store: Store) -> None:
    assert [row.outcome for row in tune(ONE, FakeEvaluator(steps_from(FORWARD))).rows] == [TUNED]
    (row,) = tune(ONE, FakeEvaluator(steps_from(FORWARD)), timeout=0.0).rows
    assert row.outcome == KEPT
    effort = EFFORTS["full"]
    (row,) = tune(ONE, FakeEvaluator(steps_from(FORWARD)), timeout=0.0, effort=effort).rows
    assert (row.outcome, row.entry) == (UNFINISHED, store.get(ONE[0]))


def test_compiles_under_way_at_the_time_limit_are_ended(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    monkeypatch.setattr(FakePool, "kill", lambda pool: killed.append(pool))
    tune(ONE, FakeEvaluator(steps_from(FORWARD)))
    assert killed == []
    tune([forward_spec(1, 512)], FakeEvaluator(steps_from(FORWARD)), timeout=0.0)
    assert len(killed) == 1


def test_a_search_cut_short_after_its_seeds_stores_its_best_but_stays_open(tune: Tune, store: Store) -> None:
    seeds = len(Space(ONE[0], GPU).seeds)
    evaluator = FakeEvaluator(steps_from(FORWARD))

    def cost(spec: KernelSpec, config: Config) -> float:
        if len(evaluator.evaluated) > seeds:
            os.kill(os.getpid(), signal.SIGINT)
        return steps_from(FORWARD)(spec, config)

    evaluator.cost = cost
    result = tune(ONE, evaluator, trials=40)
    assert result.stopped == "interrupt"
    assert result.rows[0].outcome == PARTIAL
    assert store.get(ONE[0]) is not None
    more = FakeEvaluator(steps_from(FORWARD))
    assert tune(ONE, more, trials=40).rows[0].outcome == TUNED
    assert not set(more.evaluated) & set(evaluator.evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_ended_in_the_middle_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(Path(__file__).with_name("fakes.py")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    # In the middle of the second of three specs.
    while not log.exists() or sum(str(SPECS[1]) in line for line in log.read_text().splitlines()) < 3:
        assert started.poll() is None, started.stderr and started.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(number)
    output, errors = started.communicate(timeout=30)
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert started.returncode == 0
        assert json.loads(output)["stopped"] == "interrupt"
        assert json.loads(output)["outcomes"][0] == TUNED
    with Store.open(tmp_path / "store.sqlite") as store:
        assert store.get(SPECS[0]) is not None
    before = log.read_text().splitlines()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(again.stdout)["outcomes"] == [KEPT, TUNED, TUNED]
    after = log.read_text().splitlines()[len(before) :]
    assert not any(str(SPECS[0]) in line for line in after)
    repeated = Counter(before + after)
    twice = [line for line, count in repeated.items() if count > 1]
    assert len(twice) <= (1 if number == signal.SIGKILL else 0)  # the one under way when it was killed
    for spec in SPECS:
        assert sum(line.startswith(str(spec)) for line in repeated) <= TRIALS
    storage = open_study_storage(f"sqlite:///{tmp_path / 'studies.sqlite'}")
    summaries = [s for s in optuna.get_all_study_summaries(storage) if not s.study_name.startswith("plan ")]
    states = {t.state for s in summaries for t in optuna.load_study(study_name=s.study_name, storage=storage).trials}
    release(storage)
    assert len(summaries) == 3
    assert states == {optuna.trial.TrialState.COMPLETE}


def test_the_study_storage_is_a_wal_file_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    storage = open_study_storage()
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    release(storage)
    assert [path.name for path in (tmp_path / "home").glob("studies.sqlite")] == ["studies.sqlite"]
    assert list((tmp_path / "home").glob(".*")) == []


@pytest.mark.parametrize("name", ["studies.sqlite", "a folder/100%41 #1.sqlite", "{what}.sqlite"])
def test_a_study_storage_is_named_by_its_path_or_its_url(name: str, tmp_path: Path) -> None:
    """Both open one file, whose name is taken as it stands."""
    path = tmp_path / name
    for location in (str(path), f"sqlite:///{path}"):
        storage = open_study_storage(location)
        optuna.create_study(study_name="one", storage=storage, load_if_exists=True)
        release(storage)
    assert [found for found in path.parent.iterdir() if found.is_file()] == [path]
    assert optuna.get_all_study_names(open_study_storage(str(path))) == ["one"]


def test_a_relative_study_storage_is_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    release(open_study_storage("studies.sqlite"))
    assert [path.name for path in tmp_path.iterdir()] == ["studies.sqlite"]


@pytest.mark.parametrize(
    "location", ["nonsense://here", "/proc/nowhere/studies.sqlite", "sqlite:////proc/nowhere/studies.sqlite"]
)
def test_an_unusable_study_storage_is_explained(location: str) -> None:
    with pytest.raises(DoratuneError, match=r"cannot be made|check the path or URL"):
        open_study_storage(location)


@pytest.mark.parametrize("name", ["what?.sqlite", "a?mode=ro&b.sqlite", "tab\t[x].sqlite"])
def test_a_study_storage_in_a_folder_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / name))
    release(open_study_storage())
    release(open_study_storage(str(tmp_path / name / "other.sqlite")))
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["other.sqlite", "studies.sqlite"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("location", ["", " ", ":memory:", "sqlite:///:memory:", "sqlite://", "file:a?mode=memory"])
def test_a_study_storage_in_memory_is_refused(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"study storage .* use a file path"):
        open_study_storage(location)
    assert list(tmp_path.iterdir()) == []


def in_studies(path: Path, statement: str) -> Path:
    """A study storage in which a statement was executed."""
    release(open_study_storage(str(path)))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    return path


def truncated(path: Path) -> Path:
    release(open_study_storage(str(path)))
    path.write_bytes(path.read_bytes()[:20_000])
    return path


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: in_studies(path, "UPDATE alembic_version SET version_num = 'v99.0.0'"), "updating optuna"),
        (lambda path: in_studies(path, "UPDATE alembic_version SET version_num = 'v2.6.0.a'"), "storage upgrade"),
        (lambda path: in_studies(path, "DROP TABLE studies"), "another application"),
        (lambda path: in_studies(path, "ALTER TABLE studies RENAME study_name TO name"), "damaged"),
        (truncated, "damaged|malformed"),
        (lambda path: path.write_bytes(b"notes\n" * 999) and path, "not a SQLite database"),
    ],
)
def test_a_damaged_study_storage_is_named_with_what_to_do(
    make: Callable[[Path], Path], complaint: str, tune: Tune, tmp_path: Path
) -> None:
    path = make(tmp_path / "broken.sqlite")
    with pytest.raises(StudyStorageError, match=complaint) as caught:
        tune(ONE, FakeEvaluator(steps_from(FORWARD)), trials=2, study_storage=str(path))
    assert str(path) in str(caught.value)
    assert "--study-storage" in str(caught.value)


def test_a_store_is_no_study_storage(tune: Tune, store: Store, tmp_path: Path) -> None:
    with pytest.raises(StudyStorageError, match="another application"):
        tune(ONE, FakeEvaluator(steps_from(FORWARD)), study_storage=str(tmp_path / "store.sqlite"))
    assert store.verify() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation", json.dumps('{"us": "fast"}')),
        ("evaluation", json.dumps("[" * 3000)),
        ("evaluation", json.dumps('{"provenance": "measured", "us": -1, "samples_us": []}')),
        ("config", json.dumps("tile:nonsense")),
        ("config", "17"),
    ],
)
def test_a_damaged_trial_costs_only_itself(key: str, value: str, tune: Tune, store: Store, tmp_path: Path) -> None:
    tune(ONE, FakeEvaluator(steps_from(FORWARD)), trials=6)
    store.remove(ONE[0])
    with closing(sqlite3.connect(tmp_path / "studies.sqlite")) as connection:
        first = "(SELECT min(trial_id) FROM trial_user_attributes WHERE key = 'evaluation')"
        changed = connection.execute(
            f"UPDATE trial_user_attributes SET value_json = ? WHERE key = ? AND trial_id = {first}", (value, key)
        ).rowcount
        connection.commit()
    assert changed == 1
    again = FakeEvaluator(steps_from(FORWARD))
    assert tune(ONE, again, trials=6).rows[0].outcome == TUNED
    assert len(again.evaluated) == 1


def test_a_candidate_that_hangs_is_ended_after_ctrl_c(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "STOP_SECONDS", 0.2)
    ended = threading.Event()

    class Hangs(FakeEvaluator):
        def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
            os.kill(os.getpid(), signal.SIGINT)
            assert ended.wait(30)
            raise Undecided("it was ended")

        def cancel(self) -> None:
            ended.set()

    began = time.monotonic()
    assert tune(ONE, Hangs(steps_from(FORWARD))).stopped == "interrupt"
    assert time.monotonic() - began < 10


def test_unknown_efforts_and_empty_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean standard"):
        find_effort("standart")
    with pytest.raises(UsageError, match="at least 1"):
        STANDARD.measure.with_trials(0)


# What says whether a fusion pays.

SIZES = {"d_out": 4096, "rank": 384, "tokens": 16, "dtype": "bf16", "adapter": "bf16", "gpu": "h200"}
FUSED = KernelSpec.create("dora_linear_forward", **SIZES, d_in=4096)  # type: ignore[arg-type]
COMPOSITION = KernelSpec.create("lora_compose", **SIZES)  # type: ignore[arg-type]


def flat(spec: KernelSpec, config: Config) -> float:
    return 20.0


class Timing(FakeEvaluator):
    """Finds each fused kernel to take 10 us, and its work one after another ``unfused_us``."""

    def __init__(self, unfused_us: float = 15.0) -> None:
        super().__init__(flat)
        self.timed: list[tuple[KernelSpec, Config, KernelSpec, Config]] = []
        self.unfused_us = unfused_us
        self.fusion = self.time

    def time(self, fused: Source, composition: Source) -> tuple[float, float]:
        self.timed.append((fused.spec, fused.config, composition.spec, composition.config))
        return 10.0, self.unfused_us


@pytest.mark.parametrize(("unfused_us", "pays"), [(15.0, True), (9.0, False)])
def test_a_fused_winner_is_timed_beside_the_best_composition(
    tune: Tune, store: Store, unfused_us: float, pays: bool
) -> None:
    evaluator = Timing(unfused_us)
    result = tune([FUSED, COMPOSITION], evaluator, trials=3)
    fused, composition = (store.get(spec) for spec in (FUSED, COMPOSITION))
    assert fused is not None
    assert composition is not None
    assert result.rows[0].entry == fused
    assert evaluator.timed == [(FUSED, fused.config, COMPOSITION, composition.config)]
    assert fused.evaluation.unfused_us == pytest.approx(20.0 * unfused_us / 10.0)  # on the entry's own clocks
    assert fused.evaluation.fusion_pays == pays
    assert composition.evaluation.unfused_us is None


def test_a_kept_fused_winner_is_timed_once_and_again_with_a_new_composition(tune: Tune, store: Store) -> None:
    tune([FUSED], FakeEvaluator(flat), trials=3)
    entry = store.get(FUSED)
    assert entry is not None
    assert entry.evaluation.unfused_us is None
    evaluator = Timing()
    for _ in range(2):
        result = tune([FUSED], evaluator, trials=3)
        assert [row.outcome for row in result.rows] == [KEPT]
    assert len(evaluator.timed) == 1
    tune([FUSED, COMPOSITION], Timing(31.0), trials=3)
    again = store.get(FUSED)
    assert again is not None
    assert again.evaluation.unfused_us == pytest.approx(62.0)
    assert replace(again.evaluation, unfused_us=None) == entry.evaluation


def test_what_cannot_be_timed_beside_is_told_and_stored_all_the_same(tune: Tune, store: Store) -> None:
    def fail(fused: Source, composition: Source) -> tuple[float, float]:
        raise Rejected("out of memory")

    evaluator, said = FakeEvaluator(flat), Notes()
    evaluator.fusion = fail
    assert tune([FUSED], evaluator, trials=3, progress=said).rows[0].outcome == TUNED
    assert any("out of memory" in note and str(FUSED) in note for note in said.notes)
    entry = store.get(FUSED)
    assert entry is not None
    assert not entry.evaluation.fusion_pays


def test_a_prediction_says_nothing_of_a_fusion(tune: Tune, store: Store) -> None:
    tune([FUSED], FakeEvaluator(flat), trials=3)

    class Predicting(Timing):
        provenance = PREDICTED

    evaluator = Predicting()
    tune([FUSED], evaluator, trials=3)
    assert not evaluator.timed


@pytest.mark.parametrize("flags", [(), ("bias",), ("save",), ("bias", "save")])
@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
def test_one_after_another_computes_what_the_fused_kernel_does(flags: tuple[str, ...], adapter: str) -> None:
    sizes = {**SIZES, "d_out": 48, "rank": 8, "gpu": "cpu", "adapter": adapter, **dict.fromkeys(flags, True)}
    spec = KernelSpec.create("dora_linear_forward", **sizes, d_in=32)  # type: ignore[arg-type]
    composition = composition_of(spec)
    assert composition is not None
    inputs, scaling = make_inputs(spec, 16)
    outputs = make_outputs(spec, 16)
    operands = composition.contract.inputs_of(composition)

    def launch(*given: object) -> None:
        *tensors, scaling = given
        by_name = dict(zip([operand.name for operand in operands], tensors, strict=False))
        results = reference(composition, by_name, scaling)  # type: ignore[arg-type]
        for out, result in zip(tensors[len(operands) :], results.values(), strict=True):
            out.copy_(result)  # type: ignore[attr-defined]

    run_unfused(composition, launch, product_of(spec, inputs), inputs, outputs, scaling)
    for name, exact in definition(spec, inputs, scaling).items():
        assert torch.linalg.norm(outputs[name].double() - exact) < 0.01 * torch.linalg.norm(exact)


@pytest.mark.parametrize("weight", ["nf4", "nf4.nested", "fp4.128", "nf4.32", "hqq4", "fp8.tile", "ao8"])
def test_the_product_of_a_stored_w_is_that_of_its_package_or_of_the_decoded_w(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = KernelSpec.create(
        "dora_linear_forward", d_out=96, d_in=256, rank=8, tokens=16, dtype=f"{weight}.fp32", adapter="fp32", gpu="h200"
    )
    inputs, _ = make_inputs(spec, 5, case="random")
    exact = definition(spec, {**inputs, "h": 0.0 * inputs["h"], "g": torch.ones(96)}, 0.0)["y"]
    theirs = []
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes

        if weight.startswith("fp4") and tuple(map(int, bitsandbytes.__version__.split(".")[:2])) < (0, 49):
            pytest.skip("this bitsandbytes has other FP4 codes on a CPU")
        multiply = bitsandbytes.matmul_4bit
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: (theirs.append(1), multiply(*a, **k))[1])
    memory = torch.empty(5, 96)
    y = product_of(spec, inputs)(inputs["x"], memory)
    assert torch.linalg.norm(y.double() - exact) < 1e-5 * torch.linalg.norm(exact)
    is_theirs = weight in ("nf4", "nf4.nested", "fp4.128") and find_spec("bitsandbytes") is not None
    assert bool(theirs) == is_theirs
    assert (y is memory) == (not is_theirs)


# Binaries.


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def digests(store: Store) -> set[str]:
    return {key.code_digest for key in store.binary_keys()}


def test_the_binaries_of_the_winners_are_stored_and_of_no_other_candidate(tune: Tune, store: Store) -> None:
    result = tune([*SPECS, BACKWARD_SPEC], FakeEvaluator(steps_from(FORWARD)), trials=TRIALS)
    entries = [row.entry for row in result.rows if row.entry is not None]
    assert len(entries) == 4
    assert digests(store) == {entry.code_digest for entry in entries}
    backward = {binary.kernel for binary in store.binaries(entries[-1].code_digest)}
    assert backward == {"compose_backward_kernel", "add_chunks_kernel"}
    assert store.prune_binaries() == 0


def test_who_wants_no_binaries_gets_none(tune: Tune, store: Store) -> None:
    tune(ONE, FakeEvaluator(steps_from(FORWARD)), trials=TRIALS, binaries=False)
    assert store.entries()
    assert store.binary_keys() == []


def test_entries_kept_from_a_store_without_their_binaries_get_them_in_the_next_run(tune: Tune, store: Store) -> None:
    tune(SPECS, FakeEvaluator(steps_from(FORWARD)), trials=TRIALS, binaries=False)
    said = Notes()
    again = tune(SPECS, FakeEvaluator(steps_from(FORWARD)), trials=TRIALS, progress=said)
    assert again.count(KEPT) == 3
    assert digests(store) == {entry.code_digest for entry in store.entries()}
    assert said.notes == ["3 kernels kept from the store lack their binary; compiling them"]
    third = Notes()
    tune(SPECS, FakeEvaluator(steps_from(FORWARD)), trials=TRIALS, progress=third)
    assert third.notes == []


def test_a_winner_whose_binary_cannot_be_made_is_stored_all_the_same(
    tune: Tune, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FakePool, source: object) -> Future[tuple[Binary, ...]]:
        future: Future[tuple[Binary, ...]] = Future()
        future.set_exception(CompileError("the worker died"))
        return future

    monkeypatch.setattr(FakePool, "binaries", fails)
    said = Notes()
    result = tune(ONE, FakeEvaluator(steps_from(FORWARD)), trials=TRIALS, progress=said)
    assert result.count(TUNED) == 1
    assert store.binary_keys() == []
    assert said.notes == [f"no binary of {ONE[0]}: the worker died"]
