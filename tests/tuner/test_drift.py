"""After an upgrade each winner is measured against the configs that it beat: what moved is said, and by how much, and
is adopted only on request. Whatever fails or stops the run, nothing in the store is lost.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doratune.cache.entry import MEASURED, PREDICTED, SEARCH, Binary, Entry, Evaluation
from doratune.cache.errors import ReadOnlyStoreError, StoreError
from doratune.cache.store import Store
from doratune.cache.upgrade import Change, changes
from doratune.codegen.compile import BrokenToolchainError, CompileError
from doratune.codegen.module import declared_kernels
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import default_config
from doratune.errors import DoratuneError, UsageError
from doratune.tuner import drift as module
from doratune.tuner.drift import EXACT, drift
from doratune.tuner.drift_report import BROKEN, HELD, MOVED, UNJUDGED, Drifted, DriftResult, drift_table
from doratune.tuner.evaluation import (
    ContextLostError,
    Evaluator,
    GpuMemoryError,
    Rejected,
    Undecided,
)
from doratune.tuner.fusion import composition_of
from doratune.tuner.progress import SilentProgress

from .fakes import FORWARD, GPU, SPECS, FakePool, forward_spec
from .upgrades import (
    AFTER,
    BEFORE,
    CONFIGS,
    ONE,
    SAME,
    SECOND,
    SWAPPED,
    THIRD,
    UPGRADES,
    Machine,
    Times,
    an_entry,
    nothing,
)

Run = Callable[..., DriftResult]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.sqlite", create=True) as opened:
        yield opened


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))

    def measure(machine: Evaluator, **options: Any) -> DriftResult:
        return drift(options.pop("store", store), machine, **{"without": nothing, **options})

    return measure


def only(result: DriftResult) -> Drifted:
    (row,) = result.rows
    return row


def stored(store: Store, spec: KernelSpec = ONE) -> Entry:
    entry = store.get(spec)
    assert entry is not None
    return entry


# What is measured.


@pytest.mark.parametrize("what", UPGRADES)
def test_an_upgrade_of_anything_is_noticed(run: Run, store: Store, what: str) -> None:
    store.put(an_entry())
    row = only(run(Machine(SAME, UPGRADES[what])))
    assert [change.what for change in row.changes] == [what]
    assert row.outcome == HELD


def test_winners_of_the_present_versions_are_not_measured(run: Run, store: Store) -> None:
    store.put_all([an_entry(SPECS[0]), an_entry(SPECS[1], environment=AFTER)])
    machine = Machine(SAME)
    result = run(machine)
    assert [row.entry.spec for row in result.rows] == [SPECS[0]]
    assert {spec for spec, _ in machine.evaluated} == {SPECS[0]}
    assert result.current == 1
    assert "1 skipped: measured under the present versions" in result.summary()


def test_all_measures_them_too(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER))
    assert only(run(Machine(SAME), everything=True)).changes == ()


def test_only_the_winner_and_those_it_beat_are_measured(run: Run, store: Store) -> None:
    store.put(an_entry())
    machine = Machine(SAME)
    run(machine)
    assert machine.evaluated == [(ONE, config) for config in CONFIGS]
    assert machine.finals == [CONFIGS]


def test_an_operation_can_be_named(run: Run, store: Store) -> None:
    store.put(an_entry())
    assert len(run(Machine(SAME), op="compose_forward").rows) == 1
    assert run(Machine(SAME), op="weight_norm").rows == ()


def test_entries_that_were_never_measured_are_counted_and_left(run: Run, store: Store) -> None:
    store.put(an_entry(evaluation=Evaluation(PREDICTED, us=20.0)))
    result = run(Machine(SAME))
    assert (result.rows, result.untimed) == ((), 1)
    assert "1 skipped: never measured" in result.summary()


def test_a_store_with_entries_of_other_gpus_only_says_so(run: Run, store: Store) -> None:
    others = [replace(ONE, gpu="a100"), replace(ONE, gpu="h100-sxm"), replace(SPECS[1], gpu="h100-sxm")]
    store.put_all(an_entry(spec) for spec in others)
    machine = Machine(SAME)
    result = run(machine)
    assert (result.rows, machine.evaluated) == ((), [])
    assert result.elsewhere == {"a100": 1, "h100-sxm": 2}
    assert "1 for a100, 2 for h100-sxm skipped: the GPU here is h200" in result.summary()
    assert not result.failed


def test_an_evaluator_that_measures_nothing_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(SAME)
    monkeypatch.setattr(Machine, "provenance", PREDICTED)
    with pytest.raises(UsageError, match="predicted"):
        run(machine)
    assert machine.closed


# What moved.


def test_a_runner_up_that_became_faster_is_told_with_the_loss_and_nothing_is_written(run: Run, store: Store) -> None:
    store.put(an_entry())
    before = store.entries()
    result = run(Machine(SWAPPED))
    row = only(result)
    assert (row.outcome, row.config, row.adopted) == (MOVED, SECOND, False)
    assert row.loss == pytest.approx(0.05, abs=0.003)
    assert (result.outdated, result.failed) == (True, False)
    assert "1 moved, the worst by 5." in result.summary()
    assert "--apply" in result.summary()
    assert store.entries() == before


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clocks_that_changed_for_all_alike_move_no_winner(run: Run, store: Store, factor: float) -> None:
    store.put(an_entry())
    row = only(run(Machine({config: factor * us for config, us in SAME.items()})))
    assert (row.outcome, row.config, row.loss) == (HELD, FORWARD, 0.0)
    assert (row.us_before, row.us) == (100.0, pytest.approx(factor * 101.0, rel=0.01))


def test_a_difference_within_the_noise_moves_no_winner(run: Run, store: Store) -> None:
    store.put(an_entry())
    row = only(run(Machine({**SAME, SECOND: 99.9})))
    assert (row.outcome, row.config) == (HELD, FORWARD)


def test_apply_adopts_the_new_winner_with_its_final(run: Run, store: Store) -> None:
    store.put(an_entry())
    result = run(Machine(SWAPPED), apply=True)
    entry = stored(store)
    assert only(result).adopted
    assert not result.outdated
    assert (entry.config, entry.environment, entry.evaluation.us) == (SECOND, AFTER, 100.0)
    assert (entry.source, entry.source_digest) == (render(ONE, SECOND).text, render(ONE, SECOND).digest)
    assert entry.evaluation.trials == 40
    assert entry.created_at > "2026-01-01"
    assert entry.final is not None
    assert entry.final.winner.config == SECOND
    assert [one.config for one in entry.final.beaten] == [FORWARD, THIRD]
    assert entry.final.margin == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("times", [SAME, SWAPPED])
def test_what_was_applied_is_current_and_not_measured_again(run: Run, store: Store, times: Times) -> None:
    store.put(an_entry())
    run(Machine(times), apply=True)
    assert changes(stored(store).environment, AFTER) == ()
    machine = Machine(times)
    assert run(machine, apply=True).rows == ()
    assert machine.evaluated == []


def test_a_winner_that_held_keeps_its_config_and_gets_the_new_final(run: Run, store: Store) -> None:
    store.put(an_entry())
    run(Machine({FORWARD: 50.0, SECOND: 60.0, THIRD: 70.0}), apply=True)
    entry = stored(store)
    assert (entry.config, entry.evaluation.us) == (FORWARD, 50.0)
    assert entry.final is not None
    assert entry.final.margin == pytest.approx(0.2, abs=0.01)
    assert entry.final.winner.origins == (EXACT,)


def test_after_a_second_upgrade_the_beaten_winner_plays_as_a_config_of_the_search(run: Run, store: Store) -> None:
    store.put(an_entry())
    run(Machine(SWAPPED), apply=True)
    run(Machine(SAME, UPGRADES["Triton"]), apply=True)
    entry = stored(store)
    assert entry.config == FORWARD
    assert entry.final is not None
    assert {one.config: one.origins for one in entry.final.contenders} == {
        SECOND: (EXACT,),
        FORWARD: (SEARCH,),
        THIRD: (SEARCH,),
    }


def test_what_disturbed_a_final_and_an_order_that_is_open_are_told(run: Run, store: Store) -> None:
    store.put(an_entry())
    machine = Machine(SAME)
    machine.settled, machine.notices = False, ("clocks fell by 3 %",)
    assert only(run(machine)).notes == (
        "clocks fell by 3 %",
        "the order was not settled within the budget of rounds",
    )


# Without a recorded final.


def test_without_a_final_the_winner_meets_what_a_lookup_gives(run: Run, store: Store) -> None:
    store.put(an_entry(beaten=()))
    machine = Machine(SWAPPED)
    row = only(run(machine, without=lambda spec: (SECOND, "nearest")))
    assert machine.finals == [(FORWARD, SECOND)]
    assert (row.outcome, row.config) == (MOVED, SECOND)
    assert "no runner-up is recorded: compared with what a lookup gives (nearest)" in row.notes
    assert row.us_before == 101.0, "an evaluation is compared with an evaluation"


@pytest.mark.parametrize("given", [None, (FORWARD, "nearest")])
def test_a_winner_without_rivals_is_measured_alone_and_says_so(
    run: Run, store: Store, given: tuple[Config, str] | None
) -> None:
    store.put(an_entry(beaten=()))
    row = only(run(Machine(SAME), without=lambda spec: given, apply=True))
    assert (row.outcome, row.loss, row.adopted) == (HELD, None, True)
    assert row.notes[0] == "no runner-up is recorded: a lookup without the entry gives the same config"
    assert (stored(store).environment, stored(store).evaluation.us) == (AFTER, 100.0)


def test_a_lookup_that_fails_costs_the_comparison_only(run: Run, store: Store) -> None:
    def broken(spec: KernelSpec) -> None:
        raise StoreError("store team.sqlite: the disk failed")

    store.put(an_entry(beaten=()))
    row = only(run(Machine(SAME), without=broken))
    assert row.outcome == HELD
    assert "a lookup without the entry fails: store team.sqlite: the disk failed" in row.notes[0]


# The regret of the lookup.


@pytest.mark.parametrize(
    ("times", "given", "regret"),
    [
        (SAME, THIRD, pytest.approx(1.10, abs=0.003)),
        (SWAPPED, THIRD, pytest.approx(1.10, abs=0.003)),
        (SAME, default_config(ONE, GPU), 1.1),  # it did not play: what was known of the same winner
        (SWAPPED, default_config(ONE, GPU), None),  # nothing is known of the new one
    ],
)
def test_the_regret_of_the_lookup_is_that_of_the_new_final(
    run: Run, store: Store, times: Times, given: Config, regret: Any
) -> None:
    store.put(an_entry())
    run(Machine(times), without=lambda spec: (given, "nearest"), apply=True)
    assert stored(store).lookup_regret == regret


def test_lookups_meets_the_winner_with_what_a_lookup_gives_today_alone(run: Run, store: Store) -> None:
    before = an_entry(environment=AFTER)
    store.put(before)
    machine = Machine(SAME)
    row = only(run(machine, without=lambda spec: (THIRD, "nearest"), lookups=True, apply=True))
    assert machine.finals == [(FORWARD, THIRD)]
    assert (row.outcome, row.adopted) == (HELD, True)
    assert stored(store) == replace(before, lookup_regret=pytest.approx(1.10, abs=0.003))


def test_lookups_measures_nothing_where_a_lookup_gives_the_winner_itself(run: Run, store: Store) -> None:
    before = an_entry(environment=AFTER)
    store.put(before)
    machine = Machine(SAME)
    row = only(run(machine, without=lambda spec: (FORWARD, "nearest"), lookups=True))
    assert (row.outcome, row.notes[-1]) == (HELD, "not measured")
    assert stored(store) == before, "nothing is written without --apply"
    run(machine, without=lambda spec: (FORWARD, "nearest"), lookups=True, apply=True)
    assert (machine.evaluated, machine.finals) == ([], [])
    assert stored(store) == replace(before, lookup_regret=1.0)


def test_lookups_adopts_what_a_lookup_gives_if_that_is_faster(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER))
    row = only(run(Machine(SWAPPED), without=lambda spec: (SECOND, "nearest"), lookups=True, apply=True))
    assert (row.outcome, row.config, row.adopted) == (MOVED, SECOND, True)
    assert (stored(store).config, stored(store).lookup_regret) == (SECOND, 1.0)


def test_lookups_keeps_what_was_known_where_a_lookup_fails(run: Run, store: Store) -> None:
    def broken(spec: KernelSpec) -> None:
        raise StoreError("store team.sqlite: the disk failed")

    store.put(an_entry(environment=AFTER))
    result = run(Machine(SAME), without=broken, lookups=True, apply=True)
    row = only(result)
    assert row.notes == ("a lookup without the entry fails: store team.sqlite: the disk failed",)
    assert (row.outcome, row.adopted, result.failed) == (UNJUDGED, False, True)
    assert stored(store).lookup_regret == 1.1


def test_a_winner_that_loses_to_a_lookup_also_meets_those_that_it_beat(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER))
    times = {FORWARD: 110.0, SECOND: 100.0, THIRD: 105.0}
    row = only(run(Machine(times), without=lambda spec: (THIRD, "nearest"), lookups=True, apply=True))
    assert (row.outcome, row.config) == (MOVED, SECOND)
    after = stored(store)
    assert after.final is not None
    assert {one.config for one in after.final.contenders} == set(CONFIGS)
    assert after.lookup_regret == pytest.approx(1.05, abs=0.003)


def test_a_winner_that_is_broken_is_replaced_by_the_fastest_whatever_a_lookup_gives(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER))
    machine = Machine(SAME)
    machine.faults[FORWARD] = Rejected("inaccurate: y is off by 3")
    row = only(run(machine, without=lambda spec: (THIRD, "nearest"), lookups=True, apply=True))
    assert (row.outcome, row.config, row.adopted) == (BROKEN, SECOND, True)
    assert stored(store).config == SECOND


def test_all_and_lookups_meets_both(run: Run, store: Store) -> None:
    store.put(an_entry(beaten=(SECOND,), environment=AFTER))
    machine = Machine(SWAPPED)
    row = only(run(machine, without=lambda spec: (THIRD, "nearest"), lookups=True, everything=True))
    assert machine.finals == [(FORWARD, THIRD, SECOND)]
    assert (row.outcome, row.config) == (MOVED, SECOND)


def test_a_stopped_run_of_lookups_does_not_promise_to_continue(run: Run, store: Store) -> None:
    stopped = DriftResult("s.sqlite", GPU.slug, AFTER, apply=True, lookups=True, left=2, stopped="interrupt")
    assert "continues" not in stopped.summary()
    assert "continues" in replace(stopped, lookups=False).summary()


def test_lookups_after_an_upgrade_meets_what_it_beat_too(run: Run, store: Store) -> None:
    store.put(an_entry(beaten=(SECOND,)))
    machine = Machine(SAME)
    run(machine, without=lambda spec: (THIRD, "nearest"), lookups=True, apply=True)
    assert machine.finals == [(FORWARD, THIRD, SECOND)]
    assert stored(store).lookup_regret == pytest.approx(1.10, abs=0.003)
    assert stored(store).environment == AFTER


# Winners that are broken.

BREAKAGES: dict[str, Callable[[Machine, pytest.MonkeyPatch], None]] = {
    "inaccurate: y is off by 3": lambda machine, patch: machine.faults.update(
        {FORWARD: Rejected("inaccurate: y is off by 3")}
    ),
    "refused by ptxas": lambda machine, patch: patch.setattr(
        FakePool,
        "crashing",
        staticmethod(lambda config: CompileError("refused by ptxas") if config == FORWARD else None),
    ),
    "does not run: invalid argument": lambda machine, patch: machine.late.update(
        {FORWARD: Rejected("does not run: invalid argument")}
    ),
    "does not suit the installed template: block_n is too large": lambda machine, patch: patch.setattr(
        module, "check_config", lambda spec, config, gpu: "block_n is too large" if config == FORWARD else None
    ),
}


@pytest.mark.parametrize("reason", BREAKAGES)
def test_a_broken_winner_is_told_with_its_reason_and_stays_without_apply(
    run: Run, store: Store, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(an_entry())
    before = store.entries()
    machine = Machine(SAME)
    BREAKAGES[reason](machine, monkeypatch)
    result = run(machine)
    row = only(result)
    assert (row.outcome, row.config, row.notes[0]) == (BROKEN, SECOND, reason)
    assert result.failed
    assert store.entries() == before


@pytest.mark.parametrize("reason", BREAKAGES)
def test_apply_replaces_a_broken_winner_by_the_fastest_that_is_sound(
    run: Run, store: Store, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(an_entry())
    machine = Machine({**SAME, THIRD: 90.0})
    BREAKAGES[reason](machine, monkeypatch)
    result = run(machine, apply=True)
    assert only(result).adopted
    assert not result.failed
    assert stored(store).config == THIRD
    final = stored(store).final
    assert final is not None
    assert [one.config for one in final.contenders] == [THIRD, SECOND]


def test_the_last_sound_config_replaces_a_broken_winner_without_a_final(run: Run, store: Store) -> None:
    store.put(an_entry(beaten=(SECOND,)))
    machine = Machine(SAME)
    machine.faults[FORWARD] = Rejected("inaccurate")
    run(machine, apply=True)
    assert (stored(store).config, stored(store).final) == (SECOND, None)


def test_where_all_recorded_configs_are_broken_what_a_lookup_gives_replaces_them(run: Run, store: Store) -> None:
    store.put(an_entry(beaten=(SECOND,)))
    machine = Machine(SAME)
    machine.faults = dict.fromkeys((FORWARD, SECOND), Rejected("inaccurate"))
    row = only(run(machine, apply=True, without=lambda spec: (THIRD, "default")))
    assert (row.outcome, row.config, row.adopted) == (BROKEN, THIRD, True)
    assert stored(store).config == THIRD


def test_where_nothing_is_sound_the_entry_stays_and_the_run_fails(run: Run, store: Store) -> None:
    store.put(an_entry())
    before = store.entries()
    machine = Machine(SAME)
    machine.faults = dict.fromkeys(CONFIGS, Rejected("inaccurate"))
    result = run(machine, apply=True)
    assert (only(result).outcome, only(result).config, only(result).adopted) == (BROKEN, None, False)
    assert result.failed
    assert store.entries() == before


def test_a_runner_up_that_is_broken_drops_out_and_the_others_play(run: Run, store: Store) -> None:
    store.put(an_entry())
    machine = Machine(SAME)
    machine.late[SECOND] = Rejected("does not run: out of resource")
    row = only(run(machine))
    assert machine.finals == [CONFIGS, (FORWARD, THIRD)]
    assert row.outcome == HELD
    assert row.notes == (f"{SECOND} is out: does not run: out of resource",)


# What could not be judged.


def test_an_entry_that_cannot_be_judged_stays_as_it_is_and_the_others_go_on(run: Run, store: Store) -> None:
    store.put_all(map(an_entry, SPECS))
    before = stored(store, SPECS[1])
    machine = Machine(SAME)

    def cost(spec: KernelSpec, config: Config) -> float:
        if spec == SPECS[1] and config == SECOND:
            raise GpuMemoryError("the GPU's free memory does not hold the tensors")
        return SAME[config]

    machine.cost = cost
    result = run(machine, apply=True)
    assert {row.entry.spec: row.outcome for row in result.rows} == {
        SPECS[0]: HELD,
        SPECS[1]: UNJUDGED,
        SPECS[2]: HELD,
    }
    assert stored(store, SPECS[1]) == before
    assert stored(store, SPECS[2]).environment == AFTER
    assert result.failed


def test_a_failure_in_a_final_that_is_nobodys_fault_leaves_the_entry(run: Run, store: Store) -> None:
    store.put(an_entry())
    machine = Machine(SWAPPED)
    machine.late[SECOND] = Undecided("the worker was killed")
    row = only(run(machine, apply=True))
    assert (row.outcome, row.notes) == (UNJUDGED, ("the worker was killed",))
    assert stored(store) == an_entry()


@pytest.mark.parametrize(
    ("failure", "measured"), [(BrokenToolchainError("no compiler"), 1), (Undecided("the worker was killed"), 3)]
)
def test_where_nothing_works_the_run_ends_and_says_why(
    run: Run, store: Store, failure: DoratuneError, measured: int
) -> None:
    specs = [forward_spec(4096, d_out) for d_out in (1024, 2048, 4096, 8192, 16384)]
    store.put_all(map(an_entry, specs))
    machine = Machine(SAME)
    machine.faults = dict.fromkeys(CONFIGS, failure)
    result = run(machine, apply=True)
    assert (result.stopped, result.fault) == ("fault", f"{failure}. The same command continues from here")
    assert (len(result.rows), result.left) == (measured, 5 - measured)
    assert f"the run broke off, {5 - measured} left" in result.summary()
    assert run(Machine(SAME), apply=True).count(HELD) == 5
    assert machine.closed


@pytest.mark.parametrize(
    ("failure", "failing"),
    [
        (GpuMemoryError("the GPU's free memory does not hold the tensors"), (0, 1, 2, 3, 4)),
        (Undecided("the worker was killed"), (0, 1, 3, 4)),
    ],
)
def test_failures_of_single_kernels_do_not_end_the_run(
    run: Run, store: Store, failure: DoratuneError, failing: tuple[int, ...]
) -> None:
    specs = sorted((forward_spec(4096, d_out) for d_out in (1024, 2048, 4096, 8192, 16384)), key=str)
    store.put_all(map(an_entry, specs))
    machine = Machine(SAME)

    def cost(spec: KernelSpec, config: Config) -> float:
        if specs.index(spec) in failing:
            raise failure
        return SAME[config]

    machine.cost = cost
    result = run(machine)
    assert [row.outcome for row in result.rows] == [UNJUDGED if i in failing else HELD for i in range(5)]
    assert result.stopped == ""


def test_a_config_that_destroys_the_gpu_context_ends_the_run(run: Run, store: Store) -> None:
    store.put_all(map(an_entry, SPECS))
    machine = Machine(SAME)
    machine.faults[SECOND] = ContextLostError("tile broke the GPU context")
    result = run(machine, apply=True)
    assert [row.outcome for row in result.rows] == [UNJUDGED]
    assert result.stopped == "fault"
    assert stored(store, only(result).entry.spec).environment.driver == BEFORE.driver


def test_a_damaged_row_is_named_and_the_others_are_measured(run: Run, store: Store) -> None:
    store.put_all(map(an_entry, SPECS))
    with closing(sqlite3.connect(store.location)) as connection:
        connection.execute("UPDATE doratune_entries SET config = '{' WHERE spec = ?", (str(SPECS[1]),))
        connection.commit()
    result = run(Machine(SAME), apply=True)
    (problem,) = result.damaged
    assert str(SPECS[1]) in problem
    assert store.location in problem
    assert {row.entry.spec for row in result.rows if row.adopted} == {SPECS[0], SPECS[2]}
    assert result.failed


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_measured(run: Run, store: Store) -> None:
    store.put(an_entry())
    machine = Machine(SAME)
    with Store.open(store.location, readonly=True) as opened:
        with pytest.raises(ReadOnlyStoreError, match="opened read-only"):
            run(machine, store=opened, apply=True)
        assert machine.evaluated == []
        assert only(run(Machine(SWAPPED), store=opened)).outcome == MOVED, "without --apply it is measured"


def test_an_entry_that_another_process_has_replaced_is_left_to_it(run: Run, store: Store) -> None:
    store.put(an_entry())
    newer = an_entry(winner=THIRD)
    machine = Machine(SWAPPED)

    def cost(spec: KernelSpec, config: Config) -> float:
        store.put(newer)
        return SWAPPED[config]

    machine.cost = cost
    row = only(run(machine, apply=True))
    assert (row.adopted, row.notes[-1]) == (False, "another process has changed the entry since: left as it is")
    assert stored(store) == newer


# Templates.


def test_a_template_that_renders_the_same_text_is_no_change(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER, template_digest="f" * 64))
    assert run(Machine(SAME)).rows == ()


def test_a_template_that_renders_another_text_is_a_change_and_the_next_search_goes_on(run: Run, store: Store) -> None:
    store.put(an_entry(environment=AFTER, template_digest="f" * 64, source_digest="e" * 64))
    row = only(run(Machine(SAME), apply=True))
    installed = template_digest(ONE.op, "tile")
    assert row.changes == (Change("template", "f" * 12, installed[:12]),)
    assert "its template now renders another text: a lookup refuses the entry as it is stored" in row.notes
    entry = stored(store)
    assert (entry.template_digest, entry.source_digest) == (installed, render(ONE, FORWARD).digest)
    assert entry.evaluation.trials == 3, "forty trials of another text say nothing about this one"


def test_a_template_that_takes_another_parameter_now_breaks_its_winners(run: Run, store: Store) -> None:
    older = Config.create("tile", block_t=2, num_warps=1, num_stages=2)
    store.put(an_entry(config=older, environment=AFTER, template_digest="f" * 64))
    row = only(run(Machine(SAME)))
    assert row.outcome == BROKEN
    assert "tile takes block_n, block_t, got block_t" in row.notes[0]


def test_a_variant_that_is_no_longer_there_breaks_its_winners(run: Run, store: Store) -> None:
    gone = Config.create("gone", block_t=2, block_n=128, num_warps=1, num_stages=2)
    store.put(an_entry(config=gone, environment=AFTER))
    row = only(run(Machine(SAME), apply=True))
    assert (row.outcome, row.adopted) == (BROKEN, True)
    assert row.changes[0].here == "none"
    assert "gone" in row.notes[0]
    assert stored(store).config == FORWARD


# Binaries and fused kernels.


def test_binaries_are_made_anew_for_entries_that_had_some(run: Run, store: Store) -> None:
    store.put_all([an_entry(ONE), an_entry(forward_spec(4096, 8192))])
    source = render(ONE, FORWARD)
    for name in declared_kernels(source):
        store.put_binary(Binary(source.code_digest, name, "3.6.0", "sm_90", "{}", b"cubin"))
    run(Machine(SWAPPED, replace(AFTER, triton="0.0")), apply=True)  # the version of the fake pool's binaries
    made = [key for key in store.binary_keys() if key.triton == "0.0"]
    assert {key.code_digest for key in made} == {render(ONE, SECOND).code_digest}
    assert {key.kernel for key in made} == set(declared_kernels(render(ONE, SECOND)))


FUSED = KernelSpec.create(
    "dora_linear_forward", d_out=4096, d_in=4096, rank=64, tokens=4096, dtype="bf16", adapter="bf16", gpu="h200"
)


def a_fused_entry() -> Entry:
    evaluation = Evaluation(MEASURED, us=100.0, samples_us=(100.0,), unfused_us=120.0)
    return an_entry(FUSED, default_config(FUSED, GPU), beaten=(), evaluation=evaluation)


def test_a_fused_kernel_is_timed_against_its_unfused_sequence_again(run: Run, store: Store) -> None:
    composition = composition_of(FUSED)
    assert composition is not None
    store.put(a_fused_entry())
    machine = Machine({})
    asked = []

    def fusion(fused: Source, composed: Source) -> tuple[float, float]:
        asked.append((fused.spec, composed.spec))
        return 50.0, 40.0

    machine.fusion = fusion
    run(machine, apply=True, without=lambda spec: (default_config(spec, GPU), "default"))
    assert asked == [(FUSED, composition)]
    entry = stored(store, FUSED)
    assert entry.evaluation.us == 200.0
    assert entry.evaluation.unfused_us == pytest.approx(160.0)
    assert not entry.evaluation.fusion_pays


def test_a_fused_kernel_is_timed_against_the_new_winner_of_its_composition(run: Run, store: Store) -> None:
    composition = composition_of(FUSED)
    assert composition is not None
    older = default_config(composition, GPU)
    newer = replace(older, num_warps=older.num_warps * 2)
    store.put_all([a_fused_entry(), an_entry(composition, older, beaten=[newer])])
    machine = Machine({older: 60.0, newer: 40.0})
    composed: list[Config] = []

    def fusion(fused: Source, composition: Source) -> tuple[float, float]:
        composed.append(composition.config)
        return 50.0, 40.0

    machine.fusion = fusion
    run(machine, apply=True)
    assert stored(store, composition).config == newer
    assert composed == [newer]


def test_a_fusion_that_cannot_be_timed_is_left_open(run: Run, store: Store) -> None:
    def refuse(fused: Source, composed: Source) -> tuple[float, float]:
        raise GpuMemoryError("too large")

    store.put(a_fused_entry())
    machine = Machine({})
    machine.fusion = refuse
    row = only(run(machine, apply=True, without=lambda spec: (default_config(spec, GPU), "default")))
    assert (row.adopted, row.notes[-1]) == (True, "not timed against its unfused sequence: too large")
    assert stored(store, FUSED).evaluation.unfused_us is None


# Stopping.


def test_an_interrupted_run_has_stored_what_it_judged_and_the_next_one_does_the_rest(run: Run, store: Store) -> None:
    store.put_all(map(an_entry, SPECS))
    machine = Machine(SWAPPED)

    def cost(spec: KernelSpec, config: Config) -> float:
        if len(machine.evaluated) == 5:  # in the middle of the second entry
            raise KeyboardInterrupt
        return SWAPPED[config]

    machine.cost = cost
    result = run(machine, apply=True)
    assert (result.stopped, len(result.rows), result.left) == ("interrupt", 1, 2)
    assert "interrupted, 2 left: the same command continues with them" in result.summary()
    assert machine.closed
    again = Machine(SWAPPED)
    assert run(again, apply=True).count(MOVED) == 2
    assert {spec for spec, _ in again.evaluated} == set(SPECS) - {result.rows[0].entry.spec}
    assert {entry.config for entry in store.entries()} == {SECOND}


def test_a_run_that_is_killed_loses_nothing_and_the_next_one_does_the_rest(
    run: Run, store: Store, tmp_path: Path
) -> None:
    store.put_all(map(an_entry, SPECS))
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.tuner.upgrades", str(tmp_path)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True)
    deadline = time.monotonic() + 120
    while (not log.exists() or len(log.read_text().splitlines()) < 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert len(log.read_text().splitlines()) < 9, "it was killed before its end"
    assert store.verify() == []
    done = {entry.spec for entry in store.entries() if entry.environment == AFTER}
    assert 1 <= len(done) < 3
    assert {entry.spec for entry in store.entries()} == set(SPECS)
    again = Machine(SWAPPED)
    run(again, apply=True)
    assert {spec for spec, _ in again.evaluated} == set(SPECS) - done
    assert {(entry.config, entry.environment) for entry in store.entries()} == {(SECOND, AFTER)}


# What is said.


def test_progress_counts_the_entries_and_ends(run: Run, store: Store) -> None:
    said: list[object] = []

    class Heard(SilentProgress):
        def start(self, total: int, kept: int) -> None:
            said.append(total)

        def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
            said.append((spec, outcome))

        def close(self) -> None:
            said.append("closed")

    store.put_all(map(an_entry, SPECS))
    run(Machine(SAME), progress=Heard())
    assert said == [3, *((spec, HELD) for spec in sorted(SPECS, key=str)), "closed"]


def test_the_table_begins_with_the_worst(run: Run, store: Store) -> None:
    store.put_all(map(an_entry, SPECS))
    machine = Machine(SAME)
    machine.cost = lambda spec, config: (SWAPPED if spec == SPECS[2] else SAME)[config]
    table = drift_table(run(machine).rows)
    assert [str(cell) for cell in table.columns[0].cells] == [MOVED, HELD, HELD]
    losses = [str(cell) for cell in table.columns[4].cells]
    assert losses[0].startswith("5.")
    assert losses[1:] == ["0.0 %", "0.0 %"]
