"""A report says for every entry what it is and how its time is known, and of a run what it gained and what failed.

Nothing predicted passes for measured, and a gain is what the final measured against what ran before.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from doratune.cache.entry import MEASURED, PREDICTED, BinaryKey, Contender, Entry, Environment, Evaluation, Final
from doratune.codegen.spec import Config, KernelSpec
from doratune.terminal.tables import Table
from doratune.tuner.gain import SHOWN, gains_of, ran_before
from doratune.tuner.outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, Tuned, TuneResult, kind_of_reason
from doratune.tuner.projections import LeftOut, Model, Projection
from doratune.tuner.report import (
    StoredEntry,
    closing_lines,
    entries_table,
    final_table,
    gains_table,
    layer_lines,
    report,
    report_table,
)

CONFIG = Config.create("tile", block_t=4, block_n=1024, num_warps=4, num_stages=2)
ENTRY = Entry(
    spec=KernelSpec.create("compose_forward", d_out=4096, tokens=512, dtype="fp16", gpu="h200"),
    config=CONFIG,
    template_digest="t",
    source_digest="s",
    source="",
    evaluation=Evaluation(PREDICTED, us=12.34, floor_us=9.0, registers=40, spills=0, shared_bytes=4096),
    environment=Environment("h200", "sm_90", "3.7.1"),
)
NORM = replace(
    ENTRY,
    spec=KernelSpec.create("weight_norm", d_out=4096, d_in=1024, rank=16, dtype="bf16", adapter="fp32", gpu="h200"),
    evaluation=Evaluation(MEASURED, us=5.0, floor_us=4.0, unfused_us=6.0),
)


def shown(table: Table) -> str:
    """A table as it is printed, 200 characters wide."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_json_rows_hold_every_field_and_null_where_one_does_not_apply() -> None:
    result = TuneResult((Tuned(ENTRY.spec, TUNED, ENTRY), Tuned(NORM.spec, TUNED, NORM)))
    document = json.loads(json.dumps(report(result, name=MODEL.name, model=MODEL, gpu="h200", store="/s")))
    rows = document.pop("rows")
    about = {"kernels_of": "tiny", "model": "tiny", "gpu": "h200", "store": "/s"}
    for name in ("projections", "not_tuned", "notes"):
        assert document.pop(name)
    assert document == {
        **about,
        "outcomes": {"tuned": 2, "kept": 0, "partial": 0, "unfinished": 0, "failed": 0},
        "gains": {"kernels": 0, "stayed": 0, "unknown": 2, "median": None, "worst": [], "best": []},
        "trials": 0,
        "seconds": 0.0,
        "rejected": {},
        "undecided": {},
        "disturbed_finals": {},
        "failed": [],
        "stopped": "",
        "fault": "",
    }
    assert rows[0] == {
        "op": "compose_forward",
        "spec": str(ENTRY.spec),
        "d_out": 4096,
        "d_in": None,
        "rank": None,
        "tokens": 512,
        "layers": None,
        "dtype": "fp16",
        "variant": "tile",
        "config": str(CONFIG),
        "registers": 40,
        "spills": 0,
        "shared_bytes": 4096,
        "us": 12.34,
        "floor_us": 9.0,
        "over_floor": pytest.approx(12.34 / 9.0),
        "before": None,
        "before_us": None,
        "gain": None,
        "margin": None,
        "confidence": None,
        "unfused_us": None,
        "provenance": "predicted",
        "outcome": "tuned",
    }
    assert list(rows[1]) == list(rows[0])
    assert rows[1]["unfused_us"] == 6.0
    assert (rows[1]["d_in"], rows[1]["tokens"], rows[1]["dtype"], rows[1]["registers"]) == (1024, None, "bf16", None)
    assert KernelSpec.parse(rows[1]["spec"]) == NORM.spec
    assert Config.parse(rows[0]["config"]) == CONFIG


def test_the_json_says_which_kernels_failed_and_why_the_run_ended() -> None:
    rows = (Tuned(ENTRY.spec, TUNED, ENTRY), Tuned(NORM.spec, FAILED, None, "the disk is full"))
    result = TuneResult(rows, "fault", "the disk is full: free space")
    document = json.loads(json.dumps(report(result, name=MODEL.name, model=MODEL, gpu="h200", store="/s")))
    assert [row["spec"] for row in document["rows"]] == [str(ENTRY.spec)]
    assert document["failed"] == [{"spec": str(NORM.spec), "reason": "the disk is full"}]
    assert (document["stopped"], document["fault"]) == ("fault", "the disk is full: free space")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([ENTRY], "times predicted by a model, not measured"),
        ([NORM], "times measured"),
        ([ENTRY, NORM], "not all times are measured"),
        ([], "no kernels"),
    ],
)
def test_the_title_says_how_the_times_are_known(entries: list[Entry], says: str) -> None:
    assert says in str(report_table(entries, name="llama-8b", gpu="h200").title)


@pytest.mark.parametrize(
    ("entries", "name"), [([ENTRY], "predicted µs"), ([NORM], "measured µs"), ([ENTRY, NORM], "µs"), ([], "µs")]
)
def test_the_time_column_says_how_its_times_are_known(entries: list[Entry], name: str) -> None:
    headers = [column.header for column in report_table(entries, name="llama-8b", gpu="h200").columns]
    assert headers[-4:] == [name, "floor µs", "× floor", "provenance"]


def test_the_table_shows_shapes_resources_and_times() -> None:
    text = shown(report_table([ENTRY, NORM], name="llama-8b", gpu="h200"))
    for part in ("4096x1024, r 16", "40/0/4096", "-/-/-", "12.3", "9.0", "1.37", "512", "predicted", "measured"):
        assert part in text


MODEL = Model(
    "tiny",
    "",
    2,
    (
        Projection("q", 64, 32, True, 2, ("a.q", "b.q")),
        Projection("k", 64, 32, True, 1),
        Projection("o", 8, 64, False, 4),
    ),
    ("as its class has it",),
    (LeftOut("lm_head", (99, 32), False, 1, True, "the output head"),),
)


def test_the_layers_of_a_run_are_in_its_json() -> None:
    document = json.loads(json.dumps(report(TuneResult(()), name="m", model=MODEL, gpu="h200", store="/s")))
    assert document["projections"][0] == {
        "name": "q",
        "d_out": 64,
        "d_in": 32,
        "bias": True,
        "count": 2,
        "modules": ["a.q", "b.q"],
    }
    assert document["not_tuned"][0]["shape"] == [99, 32]
    assert document["not_tuned"][0]["why"] == "the output head"
    assert document["notes"] == ["as its class has it"]


def test_the_layers_of_a_run_are_told_in_lines() -> None:
    assert layer_lines(MODEL) == [
        "tiny: 7 linear layers to put DoRA on",
        "  [64, 32] with bias: q ×2, k ×1",
        "  [8, 64]: o ×4",
        "not tuned: lm_head [99, 32] ×1: the output head",
        "note: as its class has it",
    ]


# What a run gained.

OTHER = Config.create("tile", block_t=2, block_n=128, num_warps=1, num_stages=2)
THIRD = Config.create("tile", block_t=8, block_n=128, num_warps=1, num_stages=2)


def tuned(us: float, before: float | None, d_out: int = 4096, origin: str = "nearest") -> Entry:
    """A winner of ``us`` microseconds against what ran before; None if that did not play."""
    contenders = [Contender(CONFIG, ("search",), (us,) * 8), Contender(THIRD, ("search",), (us * 1.5,) * 8)]
    if before is not None:
        contenders.insert(1, Contender(OTHER, (origin, "default"), (before,) * 8))
    return replace(
        ENTRY,
        spec=replace(ENTRY.spec, d_out=d_out),
        evaluation=Evaluation(MEASURED, us=us, floor_us=10.0),
        final=Final(tuple(contenders), 0.987, 0.004, True),
    )


def stayed(us: float, d_out: int) -> Entry:
    """A kernel whose incumbent won."""
    final = Final((Contender(CONFIG, ("exact",), (us,)), Contender(OTHER, ("default",), (9.0 * us,))), 1.0, 0.003, True)
    return replace(tuned(us, None, d_out), final=final)


@pytest.mark.parametrize(
    ("origins", "before"),
    [
        ([("search",), ("default",), ("exact",)], 2),  # a store's own entry is what ran
        ([("search",), ("default",), ("nearest",)], 2),
        ([("default",), ("search",), ("architecture",)], 2),
        ([("search",), ("exact", "nearest"), ("default",)], 1),
        ([("search",), ("default",)], 1),
        ([("default",), ("search",)], 0),
        ([("search",), ("search",)], None),
    ],
)
def test_what_ran_before_is_the_first_that_a_lookup_gave(origins: list[tuple[str, ...]], before: int | None) -> None:
    contenders = tuple(Contender(CONFIG, why, (float(place),)) for place, why in enumerate(origins, 1))
    found = ran_before(Final(contenders, 1.0, 0.003, True))
    assert found == (None if before is None else contenders[before])


def test_the_gains_are_those_of_the_finals_with_the_kernels_that_stayed() -> None:
    entries = [tuned(100.0, 110.0, 512), tuned(100.0, 102.0, 1024), stayed(50.0, 2048), tuned(1.0, None, 8192)]
    gains = gains_of(entries)
    assert [one.spec.d_out for one in gains.moved] == [1024, 512]  # the worst first
    assert (gains.stayed, gains.unknown, gains.median) == (1, 1, pytest.approx(1.02))
    assert gains.sentence() == (
        "1 of 3 kernels stayed with what ran before, median gain 2.0 %, from 2.0 % to 10.0 % where the config changed, "
        "1 not compared with what ran before"
    )
    assert gains_of([]).sentence() == gains_of([ENTRY]).sentence() == ""


@pytest.mark.parametrize(("count", "worst", "best"), [(3, 0, 3), (7, 2, 5), (10, 5, 5), (30, 5, 5)])
def test_the_table_of_gains_begins_with_the_worst_and_ends_with_the_best(count: int, worst: int, best: int) -> None:
    gains = gains_of([tuned(100.0, 100.0 + place, 64 * place) for place in range(1, count + 1)])
    assert (len(gains.worst), len(gains.best)) == (worst, best)
    table = gains_table(gains)
    told = [str(cell) for cell in table.columns[-1].cells]
    expected = [*range(1, worst + 1), *range(count - best + 1, count + 1)]
    assert told == [f"{place}.0 %" for place in expected]
    assert len(told) <= 2 * SHOWN
    text = shown(table)
    for part in ("nearest, default", "101.0", "100.0", f"d_out={64 * count}/"):
        assert part in text


def test_a_loss_in_the_final_is_not_hidden() -> None:
    gains = gains_of([tuned(100.0, 99.0), tuned(100.0, 99.99, 512)])
    assert [str(cell) for cell in gains_table(gains).columns[-1].cells] == ["-1.0 %", "0.0 %"]


def test_kept_kernels_gained_nothing_in_this_run() -> None:
    before = tuned(100.0, 110.0)
    result = TuneResult((Tuned(before.spec, KEPT, before), Tuned(NORM.spec, UNFINISHED, before)))
    assert closing_lines(result) == []
    assert report(result, name=MODEL.name, model=MODEL, gpu="h200", store="/s")["gains"]["kernels"] == 0


def test_gains_are_in_the_rows_and_the_counts_of_the_json() -> None:
    entries = [tuned(100.0, 110.0, 512), stayed(50.0, 2048)]
    result = TuneResult(tuple(Tuned(entry.spec, PARTIAL, entry) for entry in entries))
    document = json.loads(json.dumps(report(result, name=MODEL.name, model=MODEL, gpu="h200", store="/s")))
    first, second = document["rows"]
    assert (first["before"], first["before_us"], first["gain"]) == (str(OTHER), 110.0, pytest.approx(1.1))
    assert (first["margin"], first["confidence"], first["over_floor"]) == (pytest.approx(0.1), 0.987, 10.0)
    assert (second["before"], second["gain"], second["outcome"]) == (str(CONFIG), 1.0, "partial")
    assert document["outcomes"]["partial"] == 2
    gains = document["gains"]
    assert (gains["kernels"], gains["stayed"], gains["median"]) == (2, 1, pytest.approx(1.05))
    assert gains["best"] == [
        {
            "spec": str(entries[0].spec),
            "before": str(OTHER),
            "origins": ["nearest", "default"],
            "before_us": 110.0,
            "us": 100.0,
            "gain": pytest.approx(1.1),
        }
    ]


@pytest.mark.parametrize(("entries", "there"), [([tuned(100.0, 103.0)], True), ([tuned(1.0, None)], False)])
def test_the_column_of_gains_is_there_where_one_is_known(entries: list[Entry], there: bool) -> None:
    stored = [StoredEntry("/s", entry, ()) for entry in entries]
    for table in (report_table(entries, name="m", gpu="h200"), entries_table(stored)):
        assert ("gain" in [column.header for column in table.columns]) == there
        assert ("3.0 %" in shown(table)) == there


# What failed, and what was disturbed.


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("inaccurate: y is off by 0.3 where 0.1 is allowed", "inaccurate"),
        ("inaccurate at 16 tokens: y[3] is off by 2 where 1 is allowed", "inaccurate"),
        ("not deterministic: two runs on equal inputs differ", "not deterministic"),
        ("writes out of bounds: 3 bytes behind y", "writes out of bounds"),
        ("did not end within 20 s", "did not end"),
        ("its process was ended by SIGSEGV", "ended its process"),
        ("its process exited with code 3", "ended its process"),
        (f"k of {ENTRY.spec} needs 300000 bytes of shared memory; a block has 1", "over the limit of shared memory"),
        (f"k of {ENTRY.spec} needs 99999 registers a block; it has 1", "over the limit of registers"),
        (f"{ENTRY.spec} does not compile for h200 with tile:block_n=1: ptxas: no", "does not compile"),
        (f"the compiler took over 60 s of processor time on {ENTRY.spec}", "the compiler did not end"),
        ("the compiler crashed (SIGSEGV) on x, also when it ran alone", "the compiler crashed"),
        (f"{ENTRY.spec} with {CONFIG} broke the GPU context: CUDA error", "faulted on the GPU"),
        ("does not run: too many resources requested for launch", "does not run"),
        ("a new reason, of 3 kinds: details", "a new reason, of … kinds"),
        (f"{ENTRY.spec} (x)", "…"),
        ("", "for no stated reason"),
    ],
)
def test_reasons_are_grouped_by_what_they_have_in_common(reason: str, kind: str) -> None:
    assert kind_of_reason(reason) == kind


def test_what_was_rejected_and_disturbed_is_a_line_each() -> None:
    moved, spiky = "clocks moved: calls took 3 % longer, the GPU is slowed by its temperature", "interruptions: 7 %"
    entries = [
        replace(tuned(100.0, 110.0, 64 * place), final=replace(tuned(100.0, 110.0).final, notices=notices))
        for place, notices in enumerate([(moved, "undisturbed after 1 repetition"), (moved, moved, spiky), ()], 1)
    ]
    result = TuneResult(
        tuple(Tuned(entry.spec, TUNED, entry) for entry in entries),
        trials=40,
        seconds=100.0,
        rejected={"inaccurate": 12, "did not end": 1},
        undecided={"too little GPU memory": 2},
    )
    tried, gains, *others = closing_lines(result)
    assert tried == "tried: 40 configs in 2 min"
    assert gains.startswith("gains: 0 of 3 kernels stayed")
    assert others == [
        "rejected: 13 of 40 configs: 12 inaccurate, 1 did not end",
        "could not be judged, tried again in the next run: 2 too little GPU memory",
        "clocks moved in 2 finals; `doratune cache show SPEC` says more",
        "interruptions in 1 final; `doratune cache show SPEC` says more",
    ]
    document = report(result, name=MODEL.name, model=MODEL, gpu="h200", store="/s")
    assert document["rejected"] == {"inaccurate": 12, "did not end": 1}
    assert document["undecided"] == {"too little GPU memory": 2}
    assert document["disturbed_finals"] == {"clocks moved": 2, "interruptions": 1}


# One final.


def test_a_final_is_a_table_with_its_doubts() -> None:
    entry = tuned(100.0, 102.0)
    assert entry.final is not None
    text = shown(final_table(replace(entry.final, settled=False, notices=("clocks moved: [by 3 %]", "still so"))))
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "tile:" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [str(CONFIG), "search", "100.00", "", "8"],
        [str(OTHER), "nearest, default", "102.00", "2.0 %", "8"],
        [str(THIRD), "search", "150.00", "50.0 %", "8"],
    ]
    for part in ("confidence 0.987", "below 0.4 % are ties", "ended before the order held", "clocks moved: [by 3 %]"):
        assert part in text


def test_all_of_a_final_is_in_the_json_of_its_entry() -> None:
    entry = replace(tuned(100.0, 102.0), lookup_regret=1.02)
    values = json.loads(json.dumps(StoredEntry("/s", entry, (BinaryKey("d", "k", "3.7", "sm_90"),)).values()))
    final = values["final"]
    assert {name: final[name] for name in ("confidence", "noise", "settled", "notices")} == {
        "confidence": 0.987,
        "noise": 0.004,
        "settled": True,
        "notices": [],
    }
    assert final["margin"] == pytest.approx(0.02)
    assert [one["config"] for one in final["contenders"]] == [str(CONFIG), str(OTHER), str(THIRD)]
    assert final["contenders"][1]["origins"] == ["nearest", "default"]
    assert final["contenders"][1]["samples_us"] == [102.0] * 8
    assert final["contenders"][1]["slower"] == pytest.approx(0.02)
    assert values["lookup_regret"] == 1.02
    assert StoredEntry("/s", ENTRY, ()).values()["final"] is None
