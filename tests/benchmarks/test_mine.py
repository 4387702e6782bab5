"""A user's own model is measured in the time that was given, with what is here: what does not fit, fails or is missing
is named, and every ratio has its interval. These run on a CPU, where times mean nothing.
"""

from __future__ import annotations

import gc
import json
import math
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn

from doratune.benchmarks import adapted, mine, shapes
from doratune.benchmarks.adapted import Contender, in_time, measure
from doratune.benchmarks.deadline import Budget
from doratune.benchmarks.fit import CALLS, MEMORY_SHARE, Cost, Costs, Fit, fit
from doratune.benchmarks.intervals import LEAST_ROUNDS, disturbance, interval
from doratune.benchmarks.mine import Asked, Mine, adapted_layers, bench_mine
from doratune.benchmarks.mine_picture import figure_of
from doratune.benchmarks.mine_report import cases_of, markdown, mine_table, verdict
from doratune.benchmarks.results import Outcome, read_rows
from doratune.benchmarks.shapes import read_model_config
from doratune.benchmarks.tasks import Request
from doratune.cli import main
from doratune.errors import DoratuneError, UsageError
from doratune.terminal.deadline import TimeUpError
from doratune.tuner.machine import Machine
from doratune.tuner.models import find_model

from ..command_line import RUNNER
from .conftest import TINY

pytest.importorskip("peft")
pytest.importorskip("transformers")
CPU = torch.device("cpu")
ENV = {"gpu": "GPU", "driver": "1", "torch": "2", "doratune_commit": "abc", "date": "2026-01-01"}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """On one thread: small operations only wait for other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # garbage is collected before each round: going through PEFT and transformers took half of the time
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def bench(*args: str) -> Result:
    return RUNNER.invoke(main, ["bench", "mine", *args])


SMALL = ("--device", "cpu", "--rank", "4", "--seq", "8", "--loss-tokens", "4", "--rounds", "6", "--no-compile")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The command on a model of three layers, really measured, and its folder."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my-model.json").write_text(json.dumps({**TINY, "num_hidden_layers": 3}))
    config, output = str(folder / "my-model.json"), str(folder / "out.json")
    return bench("--config", config, *SMALL, "--op", "step", "--op", "decode", "--json", "--output", output), folder


def test_a_config_is_measured_in_every_contender_with_intervals_and_said_in_markdown(
    measured: tuple[Result, Path],
) -> None:
    result, folder = measured
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["schema"] == 1
    assert data["model"] == {"name": "my-model", "layers": 2, "all_layers": 3}
    assert data["cuts"] == ["2 of 3 layers: this is a CPU"]
    assert [(row["op"], row["impl"]) for row in data["rows"]] == [
        (op, impl) for op in ("step", "decode") for impl in ("peft_lora", "peft_dora", "doratune")
    ]
    for row in data["rows"]:
        assert row["rounds"] == 6
        if row["impl"] != "doratune":
            assert row["ratio_low"] < row["ratio_mean"] < row["ratio_high"]
    for part in (
        "`my-model`",
        "2 of 3 decoder layers",
        "a CPU",
        "these times mean nothing",
        "95% interval",
        "this is a CPU",
    ):
        assert part in data["markdown"]
    assert read_rows(folder / "out.json") == data["rows"], "a results file like any other"


def test_without_a_gpu_it_is_refused_unless_the_cpu_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused = bench("--config", str(tiny))
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "needs a GPU" in refused.stderr
    assert "--device cpu" in refused.stderr


@pytest.mark.parametrize("named", [(), ("--model", "llama-8b", "--config", "x.json")])
def test_one_model_is_named(named: tuple[str, ...]) -> None:
    refused = bench(*named, "--device", "cpu")
    assert refused.exit_code == 2
    assert "name either a model" in refused.stderr


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(tiny: Path, tmp_path: Path) -> None:
    refused = bench("--config", str(tiny), "--device", "cpu", "--picture", str(tmp_path / "times.gif"))
    assert refused.exit_code == 2
    assert ".html, .svg, .png" in refused.stderr


def asked(tiny: Path, **more: Any) -> Asked:
    values: dict[str, Any] = {"config": tiny, "rank": 4, "seq": 8, "loss_tokens": 4, "rounds": 6, "ops": ("inference",)}
    return Asked(**{**values, "device": "cpu", "compiled": False, "layers": 1, **more})


def test_a_contender_that_fails_costs_only_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = bench_mine(asked(tiny, compiled=True))
    assert [row["impl"] for row in found.outcome.rows] == ["peft_lora", "peft_dora", "doratune"]
    failed = [note for note in found.outcome.notes if "no C++ compiler" in note]
    assert [note.split(" ")[0] for note in failed] == ["doratune_compiled", "peft_lora_compiled", "peft_dora_compiled"]
    assert "no C++ compiler" in markdown(found, ENV)


def test_liger_is_named_where_it_takes_no_part(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mine, "liger_version", lambda: "0.6")
    notes = bench_mine(asked(tiny)).outcome.notes
    assert notes == ["Liger's kernels left out: they need a GPU"]


def test_a_run_whose_time_is_up_is_left_out_and_the_first_one_is_not(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(measuring: Any, runs: int) -> Fit:
        measuring.budget.seconds = 0.0
        return Fit(2, 60.0)

    monkeypatch.setattr(mine, "COMPILED_LAYERS", 1)
    monkeypatch.setattr(mine._Measuring, "_fit", fitted)
    found = bench_mine(asked(tiny, layers=2, compiled=True))
    assert {row["impl"] for row in found.outcome.rows} == {"peft_lora", "peft_dora", "doratune"}
    assert "1 layer, compiled: left out: the time was up" in found.outcome.notes
    assert any("torch.compile on 1 layers" in cut for cut in found.cuts)


def test_a_first_call_that_does_not_end_is_ended_in_the_minutes_given(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "measure", lambda *_, **__: time.sleep(60.0))
    begin = time.monotonic()
    ended = bench("--config", str(tiny), *SMALL, "--minutes", "0.05")
    assert time.monotonic() - begin < 20.0
    assert ended.exit_code == 1
    assert "one layer did not end in the time that was given, --minutes 0.05; give more --minutes, or" in ended.stderr


def test_a_layer_whose_calls_would_take_longer_than_the_minutes_is_refused_with_what_is_enough(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "fit", lambda *_, **__: Fit(1, 600.0))
    refused = bench("--config", str(tiny), *SMALL, "--minutes", "2")
    assert refused.exit_code == 1
    assert "one layer takes about 600 s, and 1" in refused.stderr
    assert "s are left; give --minutes 12, or choose a smaller --seq" in refused.stderr


def test_two_layers_that_do_not_end_in_time_leave_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = mine._Measuring._probe

    def slow_with_two(measuring: Any, layers: int, *args: Any) -> Cost:
        if layers == 2:
            measuring.budget.seconds = measuring.budget.spent + 60.0
            raise TimeUpError("the time was up")
        return probe(measuring, layers, *args)

    monkeypatch.setattr(mine._Measuring, "_probe", slow_with_two)
    found = bench_mine(asked(tiny, layers=2, liger=False))
    assert (found.layers, found.cuts) == (1, ["1 of 2 layers: two fail: the time was up"])


def test_sizes_that_no_memory_holds_end_in_one_message(tiny: Path) -> None:
    refused = bench("--config", str(tiny), "--device", "cpu", "--seq", str(2**24), "--batch", str(2**24), "--no-liger")
    assert (refused.exit_code, refused.stdout) == (1, "")
    (told,) = (line for line in refused.stderr.splitlines() if line.startswith("Error: "))
    assert len(told) <= 1000
    assert "does not fit into memory" in told
    assert told.endswith("choose smaller sizes")


def test_on_a_cpu_memory_that_is_not_free_is_an_error_and_one_message(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def no_room(*args: object, **options: object) -> None:
        limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
        raise MemoryError

    monkeypatch.setattr(mine, "measure", no_room)
    refused = bench("--config", str(tiny), *SMALL)
    assert refused.exit_code == 1
    assert refused.stderr.endswith("does not fit into memory (MemoryError); choose smaller sizes\n")
    assert resource.RLIM_INFINITY not in limits


def test_where_nothing_can_be_measured_the_reason_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **options: object) -> dict[str, object]:
        options["notes"].append("peft_dora left out: OutOfMemoryError: no")  # type: ignore[attr-defined]
        return {}

    monkeypatch.setattr(mine, "measure", failing)
    with pytest.raises(DoratuneError, match="OutOfMemoryError: no"):
        bench_mine(asked(tiny))


def test_a_config_whose_layers_have_a_transposed_weight_is_measured(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    found = bench_mine(asked(tmp_path / "other.json", liger=False))
    assert [row["impl"] for row in found.outcome.rows] == ["peft_lora", "peft_dora", "doratune"]
    assert found.outcome.failures == []


def test_of_a_model_that_sees_the_language_part_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "read_config", lambda path: find_model("llama-8b"))  # which would build its vision, too
    (tmp_path / "sees.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}})
    )
    _, config = read_model_config("", tmp_path / "sees.json", 1)
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("gemma3_text", 64, 1)


def test_a_config_of_no_language_model_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(mine, "random_model", refuse)
    with pytest.raises(UsageError, match="Unrecognized configuration class; name the config of one"):
        bench_mine(asked(tiny, liger=False))


def test_every_linear_layer_but_the_head_gets_an_adapter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj, self.mlp, self.norm = (
                nn.Linear(2, 2),
                nn.ModuleDict({"up": nn.Linear(2, 2)}),
                nn.LayerNorm(2),
            )
            self.lm_head = nn.Linear(2, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    assert adapted_layers(Model()) == ["qkv_proj", "up"]


def test_a_model_s_own_kind_of_linear_layer_is_adapted_as_peft_does() -> None:
    class FalconLinear(nn.Linear):
        """As the falcon family has them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.lm_head = FalconLinear(2, 2), nn.Linear(2, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    assert adapted_layers(Model()) == ["dense"]


def test_a_model_that_is_no_causal_one_is_refused_without_the_list_of_those(tmp_path: Path) -> None:
    config = {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    (tmp_path / "t5.json").write_text(json.dumps({**config, "vocab_size": 64}))
    refused = bench("--config", str(tmp_path / "t5.json"), *SMALL)
    assert refused.exit_code == 2
    assert "make no causal language model with DoRA of the config of t5" in refused.stderr
    assert "name the config of one" in refused.stderr
    assert "GPT2Config" not in refused.stderr


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--output", "precious", "exists and is no results file"),
        ("--output", '{"mine": 1}', "exists and is no results file"),
        ("--output", None, "--json prints on standard output"),
        ("--picture", None, "it is no file"),
    ],
)
def test_a_file_that_is_not_to_be_written_is_refused_and_left(
    option: str, text: str | None, told: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if text is not None:
        Path("file").write_text(text)
    refused = bench("--config", str(tiny), *SMALL, option, "-" if text is None else "file")
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert [path.read_text() for path in folder.iterdir()] == ([] if text is None else [text])


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("torch_dtype", "float7", "transformers cannot read it: AttributeError"),
        ("_attn_implementation", "flash_attention_2", "make no causal language model with DoRA of the config"),
    ],
)
def test_a_config_that_transformers_trips_over_is_named(field: str, value: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({**TINY, field: value}))
    refused = bench("--config", str(tmp_path / "odd.json"), *SMALL)
    assert refused.exit_code == 2, refused.output
    assert told in refused.stderr


def test_minutes_are_a_number(tiny: Path) -> None:
    for minutes in ("nan", "inf", "0"):
        refused = bench("--config", str(tiny), *SMALL, "--minutes", minutes)
        assert refused.exit_code == 2
        assert "--minutes" in refused.stderr


def test_results_and_picture_go_to_two_files(tiny: Path, tmp_path: Path) -> None:
    same = str(tmp_path / "x.html")
    refused = bench("--config", str(tiny), *SMALL, "--output", same, "--picture", same)
    assert refused.exit_code == 2
    assert "name the same file" in refused.stderr


def test_an_earlier_results_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for earlier in ("", json.dumps({"schema": 1, "env": {}, "rows": []})):
        file.write_text(earlier)
        done = RUNNER.invoke(main, ["bench", "coverage", "--gpu", "h200", "--draws", "1", "--output", str(file)])
        assert done.exit_code == 0, done.output
        assert read_rows(file)


def test_a_known_model_has_its_table_s_sizes() -> None:
    name, config = read_model_config("", None, 3, model="llama-8b")
    sizes = (config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.vocab_size)
    assert (name, *sizes, config.num_hidden_layers) == ("llama-3.1-8b", 4096, 14336, 8, 128256, 3)


# What fits.

COSTS = Costs(Cost(1, 10e9, 3e9, 2e9, 1e5), Cost(2, 12e9, 4e9, 2.5e9, 1.5e5))


def test_the_layers_of_a_model_of_any_depth_are_found_at_once() -> None:
    found = fit(COSTS, 10**12, memory=None, seconds=100.0, contenders=3)
    longer = fit(COSTS, 10**12, memory=None, seconds=100.0 + 1e-6, contenders=3)
    assert 1 <= found.layers <= longer.layers < 10**6
    assert CALLS * 3 * COSTS.of(found.layers).us / 1e6 <= 100.0 < CALLS * 3 * COSTS.of(found.layers + 1).us / 1e6


def test_what_is_measured_whole_is_not_said_to_be_cut() -> None:
    assert fit(COSTS, 1, memory=None, seconds=0.0, contenders=3).cuts == ()
    (cut,) = fit(COSTS, 2, memory=None, seconds=0.25, contenders=3).cuts
    assert cut.startswith("1 of 2 layers")
    assert cut.endswith("0.2 s are there")


def test_a_model_s_cost_is_a_line_in_its_layers() -> None:
    ten = COSTS.of(10)
    assert (ten.built, ten.held, ten.peak, ten.us) == pytest.approx((28e9, 12e9, 6.5e9, 5.5e5))
    assert ten.bytes == pytest.approx(28e9), "the weights are there in bf16 before they are quantised"


def test_as_many_layers_as_memory_and_time_allow() -> None:
    everything = fit(COSTS, 10, memory=1e12, seconds=1e6, contenders=3)
    assert (everything.layers, everything.cuts) == (10, ())
    assert everything.seconds == pytest.approx(CALLS * 3 * 0.55)
    short_of_memory = fit(COSTS, 10, memory=20e9 / MEMORY_SHARE, seconds=1e6, contenders=3)
    assert short_of_memory.layers == 6
    assert "6 of 10 layers: all need about 28.0 GB, and 20.0 GB are there" in short_of_memory.cuts
    short_of_time = fit(COSTS, 10, memory=None, seconds=CALLS * 3 * 0.21, contenders=3)
    assert short_of_time.layers == 3
    assert short_of_time.cuts[0].startswith("3 of 10 layers: all take about")
    assert fit(COSTS, 10, memory=1.0, seconds=0.0, contenders=3).layers == 1


def test_the_time_left_is_shared_by_the_contenders_of_the_runs() -> None:
    budget = Budget(100.0, time.monotonic() - 40.0)
    assert budget.left == pytest.approx(60.0, abs=1.0)
    assert budget.share([3.0, 6.0]) == pytest.approx(20.0, abs=1.0)
    assert Budget(1.0, time.monotonic() - 40.0).left == 0.0


class _Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def _running(*names: str) -> list[Contender]:
    return [Contender(name, _Named(name)) for name in names]


def test_rounds_end_in_time_but_for_those_that_an_interval_needs() -> None:
    options: dict[str, Any] = {"before": lambda: None, "rounds": 10_000, "device": CPU, "hide_host": False, "notes": []}
    begin = time.monotonic()
    samples = measure(_running("a", "b"), lambda model: time.sleep(0.005), until=begin + 1.0, **options)
    assert LEAST_ROUNDS < len(samples["a"].us) < 100
    late = measure(_running("a"), lambda model: None, until=begin, **options)
    assert len(late["a"].us) == LEAST_ROUNDS


def test_a_contender_that_fails_in_a_round_is_left_out_and_the_others_play_on() -> None:
    calls = dict.fromkeys("abc", 0)

    def call(model: nn.Module) -> None:
        calls[str(model.name)] += 1
        if model.name == "b" and calls["b"] > 8:
            raise torch.OutOfMemoryError("no room")

    notes: list[str] = []
    options: dict[str, Any] = {"before": lambda: None, "rounds": 9, "device": CPU, "hide_host": False, "notes": notes}
    samples = measure(_running("a", "b", "c"), call, **options)
    assert {name: len(sample.us) for name, sample in samples.items()} == {"a": 9, "c": 9}
    assert notes == ["b left out: OutOfMemoryError: no room"]


def test_who_comes_too_late_is_named() -> None:
    notes: list[str] = []
    running = _running("a", "b")
    assert list(in_time(running, None, notes, "step")) == list(in_time(running, time.monotonic() + 60, notes, "step"))
    assert notes == []
    assert list(in_time(running, time.monotonic() - 1, notes, "step")) == []
    assert notes == [f"step: {name} left out: the time was up before its turn" for name in "ab"]


# How sure.


@pytest.mark.parametrize("rounds", [6, 20])
def test_an_interval_holds_the_true_ratio_as_often_as_it_says(rounds: int) -> None:
    chance = random.Random(1)
    held = 0
    for _ in range(400):
        clocks = [chance.uniform(1.0, 1.5) for _ in range(rounds)]
        ours = [0.9 * clock * chance.lognormvariate(0.0, 0.02) for clock in clocks]
        found = interval(ours, [clock * chance.lognormvariate(0.0, 0.02) for clock in clocks])
        assert found is not None
        held += found.low <= 0.9 <= found.high
    assert 0.92 <= held / 400 <= 0.985


def test_an_interval_is_the_inverse_of_that_of_the_inverse_ratio_and_cuts_an_interrupted_round() -> None:
    ours, theirs = [1.0, 1.02, 0.99, 1.01, 1.0, 1.0], [2.0, 2.0, 2.01, 1.99, 2.0, 2.02]
    one, other = interval(ours, theirs), interval(theirs, ours)
    assert one is not None
    assert other is not None
    assert one.mean == pytest.approx(1 / other.mean)
    assert one.low == pytest.approx(1 / other.high)
    disturbed = interval([9.0, *ours[1:]], theirs)
    assert disturbed is not None
    assert math.isclose(disturbed.mean, one.mean, rel_tol=0.01)
    assert interval(ours[:5], theirs[:5]) is None


def test_moving_clocks_and_other_processes_are_noticed() -> None:
    steady, slowing = [100.0, 101.0, 100.5] * 5, [100.0 + 2 * place for place in range(15)]
    machine = Machine(ask=lambda arguments: "0x4" if "clocks" in arguments[0] else "7\n8", own=frozenset({7}))
    (note,) = disturbance("step", [slowing, slowing], machine)
    assert note.startswith("step: clocks moved: calls took")
    assert "1 other process on the GPU (8)" in note
    assert "the power limit" in note
    assert disturbance("step", [steady, steady], machine) == ["step: other processes on the GPU: 8"]
    assert disturbance("step", [steady], Machine(ask=lambda arguments: None)) == []
    assert disturbance("step", [slowing], None) == []


# What is said.


def row(impl: str, us: float, **more: Any) -> dict[str, Any]:
    case = {
        "bench": "model",
        "model": "m",
        "op": "step",
        "shape": [4, 8],
        "rank": 4,
        "dtype": "bf16",
        "adapter": "fp32",
    }
    return {**case, "flags": ["autocast"], "impl": impl, "us": us, "peak_mb": 7.0, "rounds": 9, **more}


def a_mine(name: str = "m") -> Mine:
    ratio = {"ratio_mean": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
    rows = [row("peft_lora", 2e3, **ratio), row("doratune", 1e3), row("peft_lora_compiled", 5e2)]
    outcome = Outcome(rows, ["peft_dora left out: OutOfMemoryError: it has no [room](http://x)"], [])
    return Mine(Asked(model="m"), name, 8, Request(), "cuda", 4, ["4 of 8 layers: all take long"], outcome)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.5, 0.9, "faster"), (1.1, 1.2, "slower"), (0.9, 1.1, "no difference shown")]
)
def test_an_interval_in_words(low: float, high: float, said: str) -> None:
    assert said in verdict({"ratio_mean": 1.0, "ratio_low": low, "ratio_high": high})
    assert verdict({}) == ""


def test_markdown_has_all_that_an_issue_needs_and_shows_texts_as_they_are() -> None:
    said = markdown(a_mine("m`<b>@you"), ENV)
    for part in (
        "4 of 8 decoder layers",
        "rank 16",
        "GPU",
        "torch 2",
        "doratune abc, 2026-01-01",
        "0.500 (0.400 to 0.600)",
    ):
        assert part in said
    assert r"it has no \[room\](http://x)" in said
    assert "`m<b>@you`" in said
    assert "4 of 8 layers: all take long" in said


def test_the_table_has_a_bar_for_each_contender() -> None:
    table = mine_table(a_mine())
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell) for cell in cells[1]] == ["PEFT LoRA", "doratune", "PEFT LoRA, compiled"]
    assert [len(bar) for bar in cells[3]] == [16, 8, 4]


def test_a_picture_has_a_bar_for_each_contender_and_no_tags_of_a_model_s_name() -> None:
    pytest.importorskip("plotly")
    figure = figure_of(a_mine("<b>m</b>"), "GPU")
    (bars,) = figure.data
    assert list(bars.x) == [0.5, 1.0, 2.0]
    assert list(bars.y) == ["PEFT LoRA, compiled", "doratune", "PEFT LoRA"]
    assert "0.500 (0.400 to 0.600)" in bars.text[2]
    assert figure.layout.title.text.startswith("&lt;b&gt;m")
    assert len(cases_of(a_mine().outcome.rows)) == len(figure.layout.annotations)


def test_warm_ups_are_in_the_plan() -> None:
    assert CALLS >= 1 + adapted.WARM_UPS + 2 + LEAST_ROUNDS
