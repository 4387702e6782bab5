"""What a report says is what the stores, the studies and the results files hold: nothing is made up where they are
silent, and a time that was not measured is not called so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from doratune.cache.entry import MEASURED, PREDICTED
from doratune.cache.errors import StoreError
from doratune.codegen.cost import floor_us
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError
from doratune.report.data import Report, Request, gather
from doratune.report.peers import comparisons, read_results, shares_of
from doratune.report.searches import LEAST_TRIALS, Search, importances_by_op, read_searches, shown_searches, values_of
from doratune.report.step import (
    COMPOSITIONS,
    FLOOR,
    NORMS,
    PRODUCTS,
    RATES,
    REMAINS,
    REST,
    Case,
    Step,
    measured_cases,
    steps_of,
    with_norms,
)
from doratune.report.tables import classes_of
from doratune.report.winners import Winner, best_of, shape_text
from doratune.tuner.coverage import Covered
from doratune.tuner.models import find_model
from doratune.tuner.study_storage import StudyStorageError

from . import world


@pytest.fixture
def winners(tmp_path: Path) -> dict[KernelSpec, Winner]:
    """The winners of the usual store, by spec."""
    store = world.write_store(tmp_path / "s.sqlite", world.usual_entries())
    found = gather(Request(store=store, study_storage=str(_no_studies(tmp_path))))
    return {winner.spec: winner for winner in found.winners}


def _no_studies(folder: Path) -> Path:
    return Path(world.write_studies(folder / "none.sqlite", []))


# Winners, their floors, and what ran before.


def test_a_winner_is_told_beside_its_floor_and_what_ran_before(winners: dict[KernelSpec, Winner]) -> None:
    first, second, third, *_, last = world.specs()
    assert winners.keys() == {*world.specs()}
    assert winners[first].over_floor == pytest.approx(3.0)
    assert winners[first].gain == pytest.approx(1.25, rel=0.02)
    low, high = winners[first].gain_spread() or (0.0, 0.0)
    assert low < (winners[first].gain or 0.0) < high
    assert winners[second].stayed
    assert winners[second].gain == 1.0
    assert (winners[third].gain or 0.0) < 1.0  # a loss within the noise is not hidden
    assert winners[last].gain is winners[last].gain_spread() is winners[last].before is None
    assert not winners[last].measured


def test_of_two_stores_the_measured_entry_counts_and_then_the_earlier_store() -> None:
    spec = world.specs()[0]
    measured, predicted = world.entry(spec), world.entry(spec, gain=None, provenance=PREDICTED)
    (winner,) = best_of([("first", predicted), ("second", measured), ("third", measured)])
    assert (winner.store, winner.entry.evaluation.provenance, winner.others) == ("second", MEASURED, 2)


def test_two_kernels_are_not_called_the_same() -> None:
    spec = world.specs()[0]
    others = [replace(spec, bias=True), replace(spec, adapter="fp32"), replace(spec, activation="fp16", adapter="fp16")]
    assert [shape_text(each) for each in (spec, *others)] == [
        "1024 r 16, 16 tokens",
        "1024 r 16, 16 tokens, bias",
        "1024 r 16, 16 tokens, fp32 adapters",
        "1024 r 16, 16 tokens, fp16",
    ]
    norm = KernelSpec.create(
        "weight_norm_group", d_out=8, d_in=16, rank=4, layers=2, dtype="bf16", adapter="bf16", gpu="h200"
    )
    assert shape_text(norm) == f"{norm.layers} of 8×16 r 4"


def test_a_winner_of_another_template_is_not_passed_off_as_what_runs() -> None:
    entry = world.entry(world.specs()[0])
    gone = replace(entry.config, variant="gone")
    found = [entry, replace(entry, template_digest="older"), replace(entry, config=gone)]
    assert [Winner(each, "s").other_template for each in found] == [False, True, True]


def test_the_options_choose_winners_by_gpu_and_rank(tmp_path: Path) -> None:
    spec = world.specs()[0]
    others = [replace(spec, rank=64), replace(spec, gpu="h100-sxm")]
    store = world.write_store(tmp_path / "s.sqlite", [world.entry(each) for each in (spec, *others)])
    studies = str(_no_studies(tmp_path))

    def specs(**options: object) -> set[KernelSpec]:
        found = gather(Request(store=store, study_storage=studies, **options))  # type: ignore[arg-type]
        return {winner.spec for winner in found.winners}

    assert specs() == {spec, *others}
    assert specs(ranks=[64]) == {others[0]}
    assert specs(gpu="H100 SXM") == {others[1]}
    assert specs(ranks=[8]) == set()


def test_with_nothing_tuned_there_is_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    found = gather(Request())
    assert found.empty
    assert found.stores == ()  # the package's store is no work of the user's
    assert found.searches.note == "there is no study storage yet"
    assert not (tmp_path / "home").exists()  # to look makes nothing


def test_a_store_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere\.sqlite"):
        gather(Request(store=str(tmp_path / "nowhere.sqlite")))


# Peers.


def test_a_peer_is_compared_with_doratune_on_its_own_case(tmp_path: Path) -> None:
    results = read_results(world.write_results(tmp_path / "kernels.json", world.usual_rows()))
    found, alone = comparisons([results])
    assert [(one.case, one.peer, one.ratio) for one in found] == [
        ("lora_compose 4096×4096 r=16 bf16", "peft_eager", 2.5),
        ("lora_compose 16×4096 r=16 bf16", f"{world.HOSTILE} peer", 0.75),
    ]
    assert (found[0].low, found[0].high) == (2.0, pytest.approx(1 / 0.38))
    assert alone == 1


def test_compiled_peers_are_compared_with_compiled_doratune(tmp_path: Path) -> None:
    rows = [world.row("doratune", 10.0), world.row("doratune_compiled", 5.0), world.row("peft_compiled", 10.0)]
    (one,) = (
        c for c in comparisons([read_results(world.write_results(tmp_path / "c.json", rows))])[0] if "peft" in c.peer
    )
    assert one.ratio == 2.0


def test_the_hosts_time_is_what_a_benchmark_of_the_host_compares(tmp_path: Path) -> None:
    rows = [world.row(impl, None, bench="host", cpu_us=us) for impl, us in (("doratune", 9.0), ("peft", 18.0))]  # type: ignore[arg-type]
    ((one,), _) = comparisons([read_results(world.write_results(tmp_path / "host.json", rows))])
    assert one.ratio == 2.0


@pytest.mark.parametrize("us", [0, -1.0, "fast", None, True, 1e300, [1]])
def test_a_time_that_is_none_is_left_out(us: object, tmp_path: Path) -> None:
    path = world.write_results(tmp_path / "odd.json", [world.row("doratune", 1.0), world.row("peer", us)])  # type: ignore[arg-type]
    assert comparisons([read_results(path)]) == ([], 0)


@pytest.mark.parametrize("field", ["shape", "rank", "dtype", "adapter", "flags", "model"])
@pytest.mark.parametrize("value", [None, 3, "text", [{"a": 1}], {"a": []}, 1.5])
def test_odd_fields_of_a_results_file_never_fail(field: str, value: object, tmp_path: Path) -> None:
    rows = [world.row(impl, us, **{field: value}) for impl, us in (("doratune", 2.0), ("peer", 4.0))]
    ((one,), _) = comparisons([read_results(world.write_results(tmp_path / "odd.json", rows))])
    assert one.ratio == 2.0


def test_of_rows_of_one_case_and_name_the_last_one_counts_and_that_is_said(tmp_path: Path) -> None:
    rows = [world.row(impl, us) for impl, us in (("doratune", 9.0), ("peer", 9.0), ("doratune", 2.0), ("peer", 4.0))]
    path = world.write_results(tmp_path / "twice.json", rows)
    found = gather(Request(study_storage=str(_no_studies(tmp_path)), results=[path]))
    assert [(one.peer, one.ratio) for one in found.comparisons] == [("peer", 2.0)]
    assert any(note.startswith("2 rows of the results files repeat") for note in found.notes)


@pytest.mark.parametrize("us", [5e-324, 1e-300, 10**400, float("nan"), float("inf")])
def test_a_ratio_is_always_a_number_that_json_has(us: float, tmp_path: Path) -> None:
    rows = [world.row("doratune", us), world.row("peer", 1e14, ratio=us, ratio_p20=us, ratio_p80=us)]
    rows += [world.row("doratune", 1.0, rank=8), world.row("peer", 2.0, rank=8, ratio_p20=us, ratio_p80=us)]
    found, _ = comparisons([read_results(world.write_results(tmp_path / "odd.json", rows))])
    assert [(one.ratio, one.low, one.high) for one in found] == [(2.0, None, None)]


@pytest.mark.parametrize(
    "shares", [(10**400, 0, 0, 0), (True, False, False, False), (1, 1, 0, 0), (0, 0, 0, 0), (float("nan"), 0, 0, 1)]
)
def test_shares_that_are_not_those_of_one_whole_are_left_out(shares: tuple[float, ...], tmp_path: Path) -> None:
    first, second = world.coverage_rows()
    odd = dict(zip(("exact", "bounded", "bound > 10 %", "no bound"), shares, strict=True))
    path = world.write_results(tmp_path / "c.json", [first, {**second, **odd}])
    assert [share.op for share in shares_of([read_results(path)])] == ["all"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON (line 1, column 1"),
        ("null", "expected a JSON object, found null"),
        ("[1]", "expected a JSON object, found a list"),
        ("{}", "it has no field 'schema'"),
        ('{"schema": 1}', "it has no field 'rows'"),
        ('{"schema": 1, "rows": 3}', "expected a list of rows, found a number"),
        ('{"schema": 1, "rows": {}}', "expected a list of rows, found an object"),
        ('{"schema": 1, "rows": [1]}', "row 1 is no result but a number"),
        ('{"schema": 1, "rows": [{"bench": 1, "op": 2}]}', "row 1 is no result but an object without impl"),
        ('{"schema": 2, "rows": []}', "has schema 2, and this doratune reads schema 1"),
        ('{"schema": true, "rows": []}', "has schema True"),
        (json.dumps({"schema": "x" * 10**5, "rows": []}), "this doratune reads schema 1"),
        ("[" * 10**5, "nested too deeply"),
        ('{"schema": ' + "9" * 5000 + "}", "a number has too many digits"),
        (b"\xff\xfe{\0}\0", "UTF-16 text; save it as UTF-8"),
        (b"\x80", "not UTF-8 text (byte 0)"),
        (None, "No such file or directory;"),
    ],
)
def test_a_file_that_is_no_results_file_is_named_with_the_reason(
    text: str | bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as failure:
        read_results(path)
    said = str(failure.value)
    assert str(path) in said
    assert reason in said
    assert "Errno" not in said
    assert "subscriptable" not in said
    assert len(said) < 500


def test_a_measured_step_alone_is_something_to_show(tmp_path: Path) -> None:
    path = world.write_results(tmp_path / "m.json", [world.step_row(5e5)])
    found = gather(Request(study_storage=str(_no_studies(tmp_path)), results=[path]))
    assert len(found.steps) == 1
    assert not found.empty


# Searches.


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> list[Search]:
    """Searches of two kernels of one operation and of one of another."""
    path = world.write_studies(tmp_path_factory.mktemp("studies") / "s.sqlite", world.specs()[3:6])
    return list(read_searches(path, ()).found)


def test_a_search_is_what_the_tuner_recorded(searches: list[Search]) -> None:
    assert {search.spec for search in searches} == {*world.specs()[3:6]}
    for search in searches:
        assert search.provenance == MEASURED
        assert search.rejected >= 2
        timed = [us for _, us in search.tried if us is not None]
        assert search.best_us == min(timed)
        history = search.history()
        assert history == sorted(history, reverse=True)
        assert (history[-1], len(history)) == (1.0, len(search.tried))
        within = search.within(0.01)
        assert within is not None
        assert search.history()[within - 1] <= 1.01


def test_only_the_searches_of_what_is_shown_are_read(tmp_path: Path) -> None:
    path = world.write_studies(tmp_path / "s.sqlite", world.specs()[4:6], trials=2)
    wanted = world.specs()[4]
    assert [search.spec for search in read_searches(path, {wanted}).found] == [wanted]


def test_the_parameter_that_times_depend_on_is_the_most_important_one(searches: list[Search]) -> None:
    backward = [search for search in searches if search.spec.op == "compose_backward"]
    rows = importances_by_op(backward)
    assert rows[0].parameter == "num_warps"
    assert rows[0].searches == len(backward)
    for search in backward:
        assert sum(search.importances().values()) == pytest.approx(1.0)


def test_few_trials_tell_nothing_of_importance(searches: list[Search]) -> None:
    search = next(search for search in searches if search.importances())
    few = replace(search, tried=search.tried[: LEAST_TRIALS - 1])
    alike = replace(search, tried=tuple((config, 1.0) for config, _ in search.tried))
    rejected = replace(search, tried=tuple((config, None) for config, _ in search.tried))
    assert few.importances() == alike.importances() == rejected.importances() == {}
    assert (rejected.best, rejected.study(), rejected.history(), rejected.within(0.01)) == (None, None, [], None)


def test_the_trials_of_a_plot_are_those_of_the_winners_variant(searches: list[Search]) -> None:
    search = searches[0]
    study = search.study()
    assert study is not None
    assert search.best is not None
    ours = [(config, us) for config, us in search.tried if config.variant == search.best.variant]
    assert [trial.params for trial in study.trials] == [values_of(config) for config, _ in ours]
    assert [trial.value for trial in study.trials] == [us for _, us in ours]


def test_one_search_of_each_operation_is_shown_in_full(searches: list[Search]) -> None:
    assert sorted(search.spec.op for search in shown_searches(searches)) == ["compose_backward", "lora_compose"]


def test_a_named_storage_must_be_there_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(StudyStorageError, match=r"no such file; name that of `doratune tune`"):
        read_searches(str(tmp_path / "nowhere.sqlite"), ())
    (tmp_path / "text.sqlite").write_text("text")
    with pytest.raises(StudyStorageError, match="not a SQLite database"):
        read_searches(str(tmp_path / "text.sqlite"), ())
    assert not (tmp_path / "nowhere.sqlite").exists()


def test_a_broken_storage_of_the_users_own_costs_the_searches_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path))
    (tmp_path / "studies.sqlite").write_text("text")
    found = read_searches(None, ())
    assert found.found == ()
    assert "not a SQLite database" in found.note


# Where a step goes.


def test_the_parts_of_a_step_are_its_calls_times_what_is_known_of_each(tmp_path: Path) -> None:
    model = find_model("llama-8b")
    spec = world.specs()[3]  # of the o projection, and of the down projection
    store = world.write_store(tmp_path / "s.sqlite", [world.entry(spec)])
    (step,) = steps_of([Case(model, "h200", 16, 4096)], store)
    calls = {(call.op, call.spec): call for call in step.calls}
    compose = calls["lora_compose", str(spec)]
    assert (compose.count, compose.known) == (64, MEASURED)
    assert compose.us == world.entry(spec).evaluation.us
    norms = [call for call in step.calls if call.part == NORMS]
    assert {call.op for call in norms} == {"weight_norm_group"}
    assert all(call.known == FLOOR and call.count == 1 for call in norms)
    for call in norms:
        assert call.us == pytest.approx(floor_us(KernelSpec.parse(call.spec), find_gpu("h200")))
    assert {call.op for call in step.calls if call.part == COMPOSITIONS} == {
        *("lora_compose", "compose_backward", "lora_compose_group", "compose_backward_group"),
        *("compose_swiglu", "compose_swiglu_backward", "adapter_backward"),
    }
    parts = step.parts()
    assert parts[COMPOSITIONS, MEASURED] >= compose.total_us
    assert parts[PRODUCTS, RATES] > 0
    assert step.rest_us is None
    assert sum(parts.values()) == pytest.approx(sum(call.total_us for call in step.calls))


def test_a_checkpointed_block_runs_its_forward_pass_twice(tmp_path: Path) -> None:
    """The activation of an MLP is computed twice without checkpoints too, as it is not kept for the backward pass."""
    case = Case(find_model("qwen2.5-0.5b"), "h200", 16, 4096)
    once, twice = steps_of([case, replace(case, checkpointing=True)], None)
    for one, two in zip(once.calls, twice.calls, strict=True):
        again = one.op in ("lora_compose", "lora_compose_group") or one.spec.startswith(("x Wᵀ", "x Aᵀ"))
        if one.op == "compose_swiglu":
            assert one.count == two.count == 2 * 24
        else:
            assert two.count == one.count * (2 if again else 1), one


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_many_ranks_runs_other_kernels(checkpointing: bool) -> None:
    """On Hopper; an A100 composes q, k and v in one launch."""

    def counts(gpu: str, rank: int = 384) -> dict[str, float]:
        (step,) = steps_of([Case(find_model("llama-8b"), gpu, rank, 4096, checkpointing=checkpointing)], None)
        found: dict[str, float] = {}
        for call in step.calls:
            op = "added" if "Y +=" in call.spec else call.op
            found[op] = found.get(op, 0) + call.count
        return found

    many = counts("h100-sxm")
    assert many["swiglu_backward"] == 32
    assert many["swiglu_forward"] == 64
    assert not {"compose_swiglu", "compose_swiglu_backward"} & many.keys()
    assert many["added"] == 64 * (2 if checkpointing else 1)
    assert "lora_compose_group" not in many
    assert many["compose_backward"] == 32 * 5
    assert counts("a100")["lora_compose_group"] == 32 * (2 if checkpointing else 1)
    few = counts("h100-sxm", 64)
    assert "swiglu_backward" not in few
    assert "added" not in few
    assert few["lora_compose_group"] > 0


def test_the_rest_is_what_remains_of_a_measured_step(tmp_path: Path) -> None:
    rows = [world.step_row(5e5), world.step_row(1.0), world.step_row(5e5, shape=[16, 4096])]
    results = read_results(world.write_results(tmp_path / "model.json", rows))
    whole, impossible, half = steps_of(measured_cases([results], None), None)
    assert whole.case.model.name == "llama-3.1-8b"
    assert (whole.case.gpu, whole.case.rank, whole.case.checkpointing) == ("h200", 16, True)
    assert sum(whole.parts().values()) == pytest.approx(5e5)
    assert (REST, REMAINS) in whole.parts()
    assert impossible.rest_us is None  # the parts take longer than that
    assert half.parts()[PRODUCTS, RATES] == pytest.approx(whole.parts()[PRODUCTS, RATES] / 2)


def test_measured_norms_of_the_very_model_take_the_place_of_floors(tmp_path: Path) -> None:
    counts = [64, 64, 64, 32]  # layers by shape
    norms = world.step_row(3000.0, bench="norms", op="weight_norm_group", shape=counts, flags=[])
    others = [{"rank": 8}, {"adapter": "fp32", "flags": ["autocast"]}, {"shape": [4, 4]}, {"impl": "read"}]
    case = Case(find_model("llama-8b"), "h200", 16, 4096)
    wrong = read_results(world.write_results(tmp_path / "o.json", [{**norms, **odd} for odd in others]))
    elsewhere = read_results(world.write_results(tmp_path / "e.json", [norms], gpu="NVIDIA H100 80GB HBM3"))
    right = read_results(world.write_results(tmp_path / "n.json", [norms]))
    assert with_norms(case, [wrong, elsewhere]) == case
    (step,) = steps_of([with_norms(case, [wrong, right])], None)
    assert {key: us for key, us in step.parts().items() if key[0] == NORMS} == {(NORMS, MEASURED): 3000.0}


def test_a_step_rests_on_every_store_of_a_lookup_and_they_are_named(tmp_path: Path) -> None:
    store = world.write_store(tmp_path / "s.sqlite", [world.entry(world.specs()[0])])
    path = world.write_results(tmp_path / "m.json", [world.step_row(5e5, rank=384)])
    found = gather(Request(store=store, study_storage=str(_no_studies(tmp_path)), results=[path]))
    assert (COMPOSITIONS, MEASURED) in found.steps[0].parts()  # by the package's store
    assert [each.origin for each in found.stores][-1] == "prebuilt"
    assert [winner.spec for winner in found.winners] == [world.specs()[0]]  # whose winners are not the user's


@pytest.mark.parametrize(
    "odd",
    [
        {"model": "nobody's"},
        {"shape": [4096]},
        {"rank": None},
        {"flags": ["liger"]},
        {"dtype": "nf4"},
        {"impl": "peft"},
    ],
)
def test_a_step_of_another_kind_is_not_taken_apart(odd: dict[str, object], tmp_path: Path) -> None:
    row = {**world.step_row(5e5), **odd}
    assert measured_cases([read_results(world.write_results(tmp_path / "m.json", [row]))], None) == []


def test_a_step_on_a_gpu_that_is_not_listed_is_not_taken_apart(tmp_path: Path) -> None:
    path = world.write_results(tmp_path / "m.json", [world.step_row(5e5)], gpu="NVIDIA Nothing")
    assert measured_cases([read_results(path)], None) == []


# A model: what a lookup serves.


@pytest.fixture(scope="module")
def of_a_model(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report on a model of which two kernels were tuned."""
    folder = tmp_path_factory.mktemp("model")
    specs = [
        KernelSpec.create("lora_compose", d_out=896, rank=8, tokens=tokens, dtype="bf16", adapter="bf16", gpu="a100")
        for tokens in (16, 2048)
    ]
    store = world.write_store(folder / "s.sqlite", [world.entry(spec) for spec in specs])
    studies = world.write_studies(folder / "st.sqlite", [])
    return gather(Request(store=store, study_storage=studies, model="qwen2.5-0.5b"))


def test_the_gpu_the_rank_and_the_tokens_are_those_of_the_stores(of_a_model: Report) -> None:
    assert (of_a_model.gpu, of_a_model.ranks) == ("a100", (8,))
    assert [step.case.tokens for step in of_a_model.steps] == [2048]


def test_every_kernel_of_a_model_is_looked_up(of_a_model: Report) -> None:
    classes = classes_of(of_a_model.covered)
    assert classes[MEASURED] == {"lora_compose": 2}
    assert sum(count for by_op in classes.values() for count in by_op.values()) == len(of_a_model.covered) > 100
    assert classes["near, no bound"]["lora_compose"] > 10
    assert len(of_a_model.winners) == 2


def test_a_bound_that_is_small_is_told_from_a_large_one_and_from_none() -> None:
    spec = world.specs()[0]
    losses = [("near", 0.05), ("near", 0.10), ("near", 0.5), ("near", None), ("default", None), (PREDICTED, None)]
    found = classes_of(Covered(spec, status, False, loss) for status, loss in losses)
    assert {name: sum(by_op.values()) for name, by_op in found.items()} == {
        "predicted": 1,
        "near, bound ≤ 10 %": 2,
        "near, larger bound": 1,
        "near, no bound": 1,
        "built-in default": 1,
    }


def test_the_values_are_json(of_a_model: Report) -> None:
    values = json.loads(json.dumps(of_a_model.values()))
    assert values["model"] == "qwen2.5-0.5b"
    assert len(values["winners"]) == 2
    assert values["winners"][0]["gain"] == pytest.approx(1.06, rel=0.02)
    assert len(values["kernels"]) == len(of_a_model.covered)
    assert values["stores"][0]["entries"] == 2


def test_a_step_without_a_measured_whole_has_no_rest(of_a_model: Report) -> None:
    step: Step = of_a_model.steps[0]
    assert REST not in {part for part, _ in step.parts()}
