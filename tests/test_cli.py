"""The command line prints results on standard output and everything else on standard error; with --json standard
output is one JSON object. A mistake is named with its remedy, without a traceback, with exit code 2 for a wrong request
and 1 for a failure, and leaves the files it met as they were.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import Result

from doratune import __version__
from doratune.cache.entry import PREDICTED, Evaluation
from doratune.cache.store import Store
from doratune.cli import main
from doratune.codegen.gpu import Gpu
from doratune.terminal.console import PRINTABLE
from doratune.tuner.evaluation import Rejected

from .command_line import RUNNER
from .tuner.fakes import FORWARD as BEST
from .tuner.fakes import GPU, FakeEvaluator, FakePool, steps_from
from .tuner.upgrades import FORWARD, SAME, SECOND, SWAPPED, Machine, Times, an_entry

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / "kernels.json"
SPEC = "compose_forward/d_out=64/tokens=1/activation=bf16@sm_90"
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
QUICK = [
    "--op",
    "compose_forward",
    "--tokens",
    "1",
    "--evaluator",
    "predict",
    "--effort",
    "quick",
    "--trials",
    "2",
    "--jobs",
    "1",
]


def run(*args: str, home: Path) -> Result:
    """Run ``doratune`` with these arguments for a user whose folder is ``home``."""
    return RUNNER.invoke(main, list(args), env={"DORATUNE_HOME": str(home), "DORATUNE_CACHE_PATH": None})


def done(result: Result) -> str:
    """The standard output of a command that must have worked."""
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(result: Result, exit_code: int) -> str:
    """The message of a command that must have failed in the user's terms, with nothing on standard output."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Error: " in result.stderr
    return result.stderr.split("Error: ", 1)[1].strip()


def files_in(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of the files."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def tune_tiny(home: Path, config: Path, *more: str) -> Result:
    """Tune a few kernels of a tiny model without a GPU."""
    return run("tune", "--config", str(config), "--gpu", "sm_90", *QUICK, *more, home=home)


@dataclass(frozen=True)
class Tuned:
    """A user's folder after a tuning run, and what the run printed."""

    home: Path
    config: Path
    result: Result


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A tiny model, really tuned: its kernels compiled, their times predicted."""
    folder = tmp_path_factory.mktemp("tuned")
    config = folder / "tiny" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(TINY))
    return Tuned(folder / "home", config, tune_tiny(folder / "home", config, "--json"))


@pytest.fixture(autouse=True)
def _no_prebuilt_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stores that come with the package take no part, nor does the wait for another process to fill a new one."""
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path / "prebuilt")
    monkeypatch.setattr("doratune.cache.create._CLAIM_SECONDS", 0.05)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    return config


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


# Every command.


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(main))
GROUPS = [(), *sorted({path[:-1] for path in COMMANDS if len(path) > 1})]


@pytest.mark.parametrize("path", [*GROUPS, *COMMANDS], ids=" ".join)
def test_every_command_and_group_has_help(path: tuple[str, ...], home: Path) -> None:
    said = done(run(*path, "--help", home=home))
    assert said.startswith("Usage: ")
    assert "--help" in said
    assert done(run(*path, "-h", home=home)) == said
    assert not home.exists()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_of_a_command_is_explained(path: tuple[str, ...]) -> None:
    assert COMMANDS[path].help
    options = [option for option in COMMANDS[path].params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_version_is_the_package_version(home: Path) -> None:
    assert done(run("--version", home=home)) == f"doratune, version {__version__}\n"


RUNS = {
    ("tune",): None,  # needs a config of the test's own, see below
    ("models",): ["models"],
    ("emit",): ["emit", SPEC],
    ("explain",): ["explain", SPEC],
    ("doctor",): ["doctor"],
    ("report",): ["report", "--format", "md", "--results", str(RESULTS)],
    ("convert",): None,  # needs an adapter: tests/adapters/test_commands.py
    ("cache", "path"): ["cache", "path"],
    ("cache", "ls"): ["cache", "ls"],
    ("cache", "show"): ["cache", "show", SPEC],
    ("cache", "prune"): ["cache", "prune"],
    ("cache", "verify"): ["cache", "verify"],
    ("cache", "build"): None,  # these five need stores of their own: see tests/tuner/test_build_store.py
    ("cache", "export"): None,
    ("cache", "merge"): None,
    ("cache", "diff"): None,
    ("cache", "package"): None,
    ("cache", "drift"): None,  # measures: see below
    ("bench", "kernels"): None,  # these eight measure: see tests/benchmarks and tests/gpu
    ("bench", "layer"): None,
    ("bench", "model"): None,
    ("bench", "mine"): None,
    ("bench", "host"): None,
    ("bench", "norms"): None,
    ("bench", "dequantise"): None,
    ("bench", "packed"): None,
    ("bench", "packed-linear"): None,
    ("bench", "quality"): None,
    ("bench", "search"): None,  # takes minutes: see tests/benchmarks
    ("bench", "coverage"): ["bench", "coverage", "--gpu", "h200", "--draws", "2", "--kernels", "2"],
    ("bench", "targets"): ["bench", "targets", str(RESULTS)],
}


def test_every_command_that_takes_json_is_tried_here() -> None:
    assert {
        path for path, command in COMMANDS.items() if any(p.name == "as_json" for p in command.params)
    } == RUNS.keys()


@pytest.mark.parametrize("args", [args for args in RUNS.values() if args], ids=" ".join)
def test_with_json_standard_output_is_one_object_of_schema_1(args: list[str], tuned: Tuned) -> None:
    data = json.loads(done(run(*args, "--json", home=tuned.home)))
    assert data["schema"] == 1
    assert len(data) > 1


@pytest.mark.parametrize("args", [args for args in RUNS.values() if args], ids=" ".join)
def test_without_json_standard_output_is_for_reading(args: list[str], tuned: Tuned) -> None:
    said = done(run(*args, home=tuned.home))
    assert len(said.split()) > 1
    with pytest.raises(ValueError):
        json.loads(said)


# A tuning run, and what it leaves.


def test_a_run_ends_with_a_row_for_each_kernel(tuned: Tuned) -> None:
    data = json.loads(done(tuned.result))
    assert (data["schema"], data["model"], data["gpu"]) == (1, "tiny", "sm_90")
    assert data["store"] == str(tuned.home / "store.sqlite")
    assert [row["spec"] for row in data["rows"]] == [SPEC, SPEC.replace("d_out=64", "d_out=128")]
    for row in data["rows"]:
        assert row["provenance"] == "predicted"
        assert row["us"] >= row["floor_us"] > 0
        assert row["registers"] > 0
        assert row["over_floor"] == row["us"] / row["floor_us"]
    assert (data["outcomes"]["tuned"], data["trials"], data["rejected"]) == (2, 4, {})
    assert data["gains"]["median"] is None, "nothing predicted passes for a gain"
    assert "2 tuned in" in tuned.result.stderr
    assert "2 of 2 kernels after" in tuned.result.stderr
    assert "\x1b" not in tuned.result.output


def test_a_second_run_keeps_the_kernels_without_searching(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(self: object, source: object) -> None:
        raise AssertionError("the second run compiles a kernel")

    monkeypatch.setattr("doratune.tuner.workers.CompilePool.submit", compiled)
    monkeypatch.setattr("doratune.tuner.workers.CompilePool.binaries", compiled)
    before = json.loads(done(run("cache", "show", SPEC, "--json", home=tuned.home)))
    again = tune_tiny(tuned.home, tuned.config, "--json")
    first, second = json.loads(tuned.result.stdout), json.loads(done(again))
    assert [row.pop("outcome") for row in [*first["rows"], *second["rows"]]] == ["tuned"] * 2 + ["kept"] * 2
    assert second["rows"] == first["rows"]
    assert (second["outcomes"]["kept"], second["trials"]) == (2, 0)
    assert "2 kept in" in again.stderr
    assert json.loads(done(run("cache", "show", SPEC, "--json", home=tuned.home))) == before
    table = tune_tiny(tuned.home, tuned.config)
    assert "compose_forward" in done(table)
    assert "times predicted by a model, not measured" in table.stdout


@pytest.mark.slow
def test_a_run_on_a_broken_machine_says_why_and_the_same_command_succeeds_once_it_is_mended(
    tiny: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    broken = tune_tiny(home, tiny, "--json")
    assert broken.exit_code == 1
    data = json.loads(broken.stdout)
    (failed,) = data["failed"]
    assert failed["spec"] == SPEC
    assert f"Not a directory ({tmp_path / 'file' / 'cache'})" in failed["reason"]
    assert data["rows"] == []
    assert data["stopped"] == "fault"
    for told in (f"failed: {SPEC}: {failed['reason']}", "1 unfinished, 1 failed in", f"Error: {data['fault']}"):
        assert told in broken.stderr
    assert "TRITON_CACHE_DIR" in data["fault"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    mended = tune_tiny(home, tiny, "--json")
    assert [row["spec"] for row in json.loads(done(mended))["rows"]] == [SPEC, SPEC.replace("d_out=64", "d_out=128")]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate counts as compiled, so that no worker need start."""
    monkeypatch.setattr("doratune.tuner.search.CompilePool", FakePool)


@pytest.mark.usefixtures("no_compiler")
def test_kernels_that_fail_are_told_with_their_reasons(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(self: object, source: object, compiled: object) -> None:
        raise Rejected("no program fits a multiprocessor")

    monkeypatch.setattr("doratune.tuner.predict.PredictEvaluator.evaluate", reject)
    first, second = tune_tiny(home, tiny), tune_tiny(home, tiny, "--json")
    assert "rejected: 4 of 4 configs: 4 no program fits a multiprocessor" in first.stderr
    for result in (first, second):
        assert result.exit_code == 1
        assert result.stderr.count(": every config was rejected: no program fits a multiprocessor") == 2
        assert "Error" not in result.stderr
    assert [row["reason"] for row in json.loads(second.stdout)["failed"]] == [
        "every config was rejected: no program fits a multiprocessor"
    ] * 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    """An H200 on which kernels take the longer, the farther their config is from one that is no default."""
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))

    def evaluators(request: object) -> tuple[Gpu, list[FakeEvaluator]]:
        return GPU, [FakeEvaluator(steps_from(BEST))]

    monkeypatch.setattr("doratune.tuner.tune_model.choose_evaluators", evaluators)


MEASURE = ["tune", "--op", "compose_forward", "--tokens", "1", "--trials", "10", "--config"]
MEASURED = "compose_forward/d_out=128/tokens=1/activation=bf16@h200"


@pytest.mark.usefixtures("measured")
def test_a_measured_run_ends_with_what_it_gained_and_a_second_one_gains_nothing(tiny: Path, home: Path) -> None:
    first = run(*MEASURE, str(tiny), home=home)
    said = done(first)
    for part in ("gained over what ran before", "µs before", "× floor", "gain", MEASURED):
        assert part in said
    assert "gains: 0 of 2 kernels stayed with what ran before, median gain " in first.stderr
    assert " where the config changed\n2 tuned in " in first.stderr
    second = run(*MEASURE, str(tiny), home=home)
    assert "gained over" not in done(second)
    assert "gains:" not in second.stderr
    data = json.loads(done(run(*MEASURE, str(tiny), "--json", home=home)))
    assert data["gains"]["kernels"] == 0
    assert [row["gain"] > 1.0 for row in data["rows"]] == [True, True]


@pytest.mark.usefixtures("measured")
def test_the_gains_of_a_run_as_json(tiny: Path, home: Path) -> None:
    result = run(*MEASURE, str(tiny), "--json", home=home)
    data = json.loads(done(result))
    gains = data["gains"]
    assert (gains["kernels"], gains["stayed"], gains["unknown"]) == (2, 0, 0)
    rows = {row["spec"]: row for row in data["rows"]}
    for one in gains["best"]:
        assert one["gain"] == one["before_us"] / one["us"] == rows[one["spec"]]["gain"] > 1.0
        assert one["origins"][0] == "default"
    assert "gained over" not in result.output


@pytest.mark.usefixtures("measured")
def test_cache_show_tells_of_the_final_and_cache_ls_of_the_gain(tiny: Path, home: Path) -> None:
    done(run(*MEASURE, str(tiny), home=home))
    said = done(run("cache", "show", MEASURED, "--source", home=home))
    (entry,) = json.loads(done(run("cache", "show", MEASURED, "--json", home=home)))["entries"]
    final = entry["final"]
    for part in ("final", "origins", "rounds", "confidence 1.000", final["contenders"][1]["config"]):
        assert part in said
    assert said.endswith(entry["source"])
    assert final["contenders"][0]["config"] == entry["config"]
    assert any(one["origins"][0] == "default" for one in final["contenders"])
    assert entry["lookup_regret"] > 1.0
    listing = ["cache", "ls", "--store", str(home / "store.sqlite")]
    rows = json.loads(done(run(*listing, "--json", home=home)))["rows"]
    listed = done(run(*listing, home=home))
    assert "gain" in listed
    for row in rows:
        assert f"{100 * (row['gain'] - 1):.1f} %" in listed


@pytest.mark.usefixtures("no_compiler")
def test_the_plan_of_a_coverage_is_tuned_kernel_by_kernel(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Evaluation(PREDICTED, us=1e5, floor_us=1.0)
    monkeypatch.setattr("doratune.tuner.predict.PredictEvaluator.evaluate", lambda *_: slow)
    asked = ["--gpu", "h100-sxm", "--draws", "4", "--kernels", "2"]
    planned = run("bench", "coverage", *asked, "--list", "--plan", "3", home=home)
    plan = tmp_path / "plan.txt"
    plan.write_text(done(planned))
    assert "are covered" in planned.stderr
    command = ["tune", "--specs", str(plan), "--evaluator", "predict", "--trials", "2"]
    data = json.loads(done(run(*command, "--json", home=home)))
    assert (data["kernels_of"], data["model"], data["gpu"]) == (f"specs from {plan}", None, "h100-sxm")
    assert [row["spec"] for row in data["rows"]] == [line.split("  #")[0] for line in plan.read_text().splitlines()]
    assert (data["outcomes"]["tuned"], data["projections"]) == (3, [])
    assert f"specs from {plan} on h100-sxm: " in done(run(*command, home=home)).replace("\n", " ")


@pytest.mark.usefixtures("measured")
def test_a_listed_kernel_is_measured_as_one_of_a_model_and_tests_the_lookup(tiny: Path, home: Path) -> None:
    done(run(*MEASURE, str(tiny), "--store", str(home / "model.sqlite"), home=home))
    done(run("tune", "--spec", MEASURED, "--trials", "10", "--store", str(home / "listed.sqlite"), home=home))
    shown = [
        json.loads(done(run("cache", "show", MEASURED, "--store", str(home / name), "--json", home=home)))["entries"]
        for name in ("model.sqlite", "listed.sqlite")
    ]
    (of_a_model,), (listed,) = shown
    for entry in (of_a_model, listed):
        assert entry.pop("store")
        assert entry.pop("created_at")
    assert listed == of_a_model
    assert listed["lookup_regret"] > 1.0


@pytest.mark.parametrize(
    "option", [["--model", "llama-8b"], ["--rank", "384"], ["--autocast"], ["--op", "x"]], ids=" ".join
)
def test_an_option_that_chooses_among_a_models_kernels_is_refused_beside_specs(option: list[str], home: Path) -> None:
    said = mistake(run("tune", "--spec", SPEC, *option, home=home), 2)
    assert said == f"{option[0]} means nothing beside --spec and --specs; leave it out: a spec says all of its kernel"
    assert not home.exists()


@pytest.mark.usefixtures("no_compiler")
def test_an_interrupted_run_exits_with_130(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, source: object, compiled: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise Rejected("whatever")

    monkeypatch.setattr("doratune.tuner.predict.PredictEvaluator.evaluate", interrupted)
    result = tune_tiny(home, tiny)
    assert result.exit_code == 130
    assert "interrupted: the same command continues from here" in result.stderr


def test_explain_finds_the_tuned_kernel(tuned: Tuned) -> None:
    data = json.loads(done(run("explain", SPEC, "--json", home=tuned.home)))
    assert (data["spec"], data["entry"], data["step"], data["provenance"]) == (SPEC, SPEC, "exact", "predicted")
    assert (data["distance"], data["refused"]) == (0.0, [])
    assert (data["bound"], data["weighed"], data["rederived"]) == (None, [], False)
    assert data["store"] == str(tuned.home / "store.sqlite")
    said = done(run("explain", SPEC, home=tuned.home))
    assert data["config"] in said
    assert "exact: an entry of exactly this spec" in said
    assert "predicted, never timed" in said


def test_explain_says_how_to_trust_a_store_that_others_can_write_and_trusts_it(
    tuned: Tuned, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.cache.permissions._private_group", lambda path, found: False)
    monkeypatch.setattr("doratune.runtime.binaries.why_compile", lambda: None)
    team = tmp_path / "team.sqlite"
    with Store.open(tuned.home / "store.sqlite", readonly=True) as store:
        store.export(team)
    team.chmod(0o664)
    command = ["explain", SPEC, "--store", str(team)]
    said = done(run(*command, home=home))
    assert f"binary    compiled at the first call: {team}: its binaries are not used: the group" in said
    assert f"chmod go-w {team}; to use them all the same, set DORATUNE_TRUST={team}, or name" in said
    data = json.loads(done(run(*command, "--trust", str(tmp_path), "--json", home=home)))
    assert data["binary"]["store"] == str(team)
    refused = run(*command, "--trust", __file__, home=home)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "neither a store, a folder nor a file of Ed25519 public keys" in refused.stderr


def test_explain_says_which_neighbour_serves_a_kernel_that_was_not_tuned(tuned: Tuned) -> None:
    other = SPEC.replace("tokens=1/", "tokens=16/")
    data = json.loads(done(run("explain", other, "--json", home=tuned.home)))
    assert SPEC in {each["entry"] for each in data["weighed"]}
    assert data["weighed"][0]["config"] == data["config"]
    assert data["weighed"][0]["step"] == data["step"]
    assert (data["bound"]["loss"], data["bound"]["measured"]) == (None, 0)


def test_without_a_store_explain_says_default(home: Path) -> None:
    data = json.loads(done(run("explain", SPEC, "--json", home=home)))
    assert (data["step"], data["provenance"], data["entry"], data["store"]) == ("default", "default", None, None)
    assert not home.exists()


def test_cache_lists_the_tuned_kernels(tuned: Tuned) -> None:
    store = str(tuned.home / "store.sqlite")
    rows = json.loads(done(run("cache", "ls", "--json", home=tuned.home)))["rows"]
    assert {row["spec"] for row in rows if row["store"] == store} >= {SPEC, SPEC.replace("64", "128")}
    table = run("cache", "ls", "--store", store, home=tuned.home)
    assert "predicted" in done(table)
    assert table.stderr == "2 entries\n"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--op", "compose_forward", "--gpu", "sm_90"], 2),
        (["--gpu", "SM-90a"], 2),
        (["--gpu", "h200"], 0),
        (["--op", "weight_norm"], 0),
    ],
)
def test_cache_lists_what_is_asked_for(options: list[str], count: int, tuned: Tuned) -> None:
    store = str(tuned.home / "store.sqlite")
    assert (
        len(json.loads(done(run("cache", "ls", "--store", store, *options, "--json", home=tuned.home)))["rows"])
        == count
    )


def test_cache_path_names_the_stores_in_order(tuned: Tuned, tmp_path: Path) -> None:
    own, team = str(tuned.home / "store.sqlite"), str(tmp_path / "team.sqlite")
    assert done(run("cache", "path", home=tuned.home)).splitlines()[0] == f"{own} (user)"
    stores = json.loads(done(run("cache", "path", "--store", team, "--json", home=tuned.home)))["stores"]
    assert stores[:2] == [{"location": team, "origin": "store"}, {"location": own, "origin": "user"}]


def test_cache_show_tells_all_about_an_entry(tuned: Tuned) -> None:
    (entry,) = json.loads(done(run("cache", "show", SPEC, "--json", home=tuned.home)))["entries"]
    assert (entry["spec"], entry["provenance"], entry["gpu"]) == (SPEC, "predicted", "sm_90")
    assert entry["created_at"] > "2020"
    said = done(run("cache", "show", SPEC, "--source", home=tuned.home))
    assert entry["source_digest"] in said
    assert said.endswith(entry["source"])


def test_the_tuned_kernel_has_its_binary_and_every_command_that_tells_of_it_says_so(tuned: Tuned) -> None:
    store = str(tuned.home / "store.sqlite")
    triton = version("triton")
    data = json.loads(done(run("explain", SPEC, "--json", home=tuned.home)))
    assert data["binary"] == {"store": store, "note": f"for Triton {triton} on sm_90", "passed_over": []}
    assert f"binary    in {store}, for Triton {triton} on sm_90" in done(run("explain", SPEC, home=tuned.home))
    (entry,) = json.loads(done(run("cache", "show", SPEC, "--json", home=tuned.home)))["entries"]
    (key,) = entry["binaries"]
    assert (key["kernel"], key["triton"], key["architecture"]) == ("compose_forward_kernel", triton, "sm_90")
    said = done(run("cache", "show", SPEC, home=tuned.home))
    assert f"compose_forward_kernel, Triton {triton}, sm_90" in said
    rows = json.loads(done(run("cache", "ls", "--store", store, "--json", home=tuned.home)))["rows"]
    assert [row["binaries"] for row in rows] == [[f"{triton} sm_90"]] * 2


def test_without_a_binary_explain_says_that_the_kernel_is_compiled(home: Path) -> None:
    said = done(run("explain", SPEC, home=home))
    assert "binary    compiled at the first call: no store has a binary for Triton" in said


@pytest.mark.slow
def test_a_run_without_binaries_leaves_none_and_the_next_one_makes_them(tiny: Path, home: Path) -> None:
    done(tune_tiny(home, tiny, "--no-binaries"))
    with Store.open(home / "store.sqlite", readonly=True) as store:
        assert (len(store.entries()), store.binary_keys()) == (2, [])
    assert "2 kernels kept from the store lack their binary" in tune_tiny(home, tiny).stderr
    with Store.open(home / "store.sqlite", readonly=True) as store:
        assert len(store.binary_keys()) == 2


def test_prune_deletes_the_binaries_that_serve_no_entry(tuned: Tuned, home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    with Store.open(tuned.home / "store.sqlite", readonly=True) as store:
        store.export(copy)
    with Store.open(copy) as store:
        first, second = store.entries()
        store.remove(first.spec)
        (binary,) = store.binaries(second.code_digest)
        store.put_binary(replace(binary, triton="1.0"))
    said = json.loads(done(run("cache", "prune", "--store", str(copy), "--json", home=home)))
    assert said == {"schema": 1, "store": str(copy), "pruned": 1}
    assert done(run("cache", "prune", "--other-triton", "--store", str(copy), home=home)) == (
        f"1 binaries deleted from {copy}\n"
    )
    with Store.open(copy, readonly=True) as store:
        assert store.binaries() == [binary]


def test_emit_prints_the_tuned_kernel_as_python(tuned: Tuned) -> None:
    text = done(run("emit", SPEC, home=tuned.home))
    compile(text, "emitted", "exec")
    assert "def launch(" in text
    assert "@triton.jit" in text
    data = json.loads(done(run("emit", SPEC, "--json", home=tuned.home)))
    (entry,) = json.loads(done(run("cache", "show", SPEC, "--json", home=tuned.home)))["entries"]
    assert (data["source"], data["digest"], data["provenance"]) == (text, entry["source_digest"], "predicted")
    assert (data["spec"], data["config"]) == (SPEC, entry["config"])


def test_emit_prints_a_config_of_ones_own(home: Path) -> None:
    config = "tile:block_n=32,block_t=2,num_warps=2,num_stages=1"
    data = json.loads(done(run("emit", SPEC, "--config", config, "--json", home=home)))
    assert (data["config"], data["provenance"]) == (config, "given")
    assert "32" in data["source"]


def test_a_model_can_be_named_by_its_folder(tuned: Tuned) -> None:
    assert json.loads(done(tune_tiny(tuned.home, tuned.config.parent, "--json")))["model"] == "tiny"


# Mistakes in what was asked for: exit code 2.

MISTAKES = [
    (["tune"], ["name either a model (--model llama-8b) or a config (--config path/to/config.json)"]),
    (["tune", "--model", "llama-8b", "--config", "TINY"], ["name either a model", "or a config"]),
    (["tune", "--model", "llama-8", "--gpu", "h200"], ["unknown model 'llama-8'; did you mean llama-8b", "--config"]),
    (["tune", "--model", "lama-3.1-8b"], ["unknown model 'lama-3.1-8b'", "llama-3.1-8b", "`doratune models`"]),
    (["tune", "--config", "missing.json", "--gpu", "h200"], ["missing.json: no such file; give a model's config.json"]),
    (["tune", "--config", "TINY", "--gpu", "h20"], ["unknown GPU 'h20'; did you mean h200", "sm_90"]),
    (["tune", "--config", "TINY", "--gpu", "h100"], ["unknown GPU 'h100'; did you mean h100-sxm, h100-pcie?"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--rank", "0"], ["rank 0: a rank is an integer of at least 1"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--rank", "-8"], ["rank -8: a rank is an integer of at least 1"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--rank", "x"], ["'--rank': 'x' is not a valid integer"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--rank", "8", "--rank", "8"], ["rank 8 is given more than once"]),
    (
        ["tune", "--config", "TINY", "--gpu", "h200", "--dtype", "fp8"],
        ["unsupported dtype 'fp8'; use one of bf16, fp16"],
    ),
    (
        ["tune", "--config", "TINY", "--gpu", "h200", "--adapter-dtype", "fp16"],
        ["adapter dtype fp16 with bf16", "fp32"],
    ),
    (["tune", "--config", "TINY", "--gpu", "h200", "--tokens", "0"], ["tokens=0", "at least 1"]),
    (
        ["tune", "--config", "TINY", "--gpu", "h200", "--op", "lora_compse"],
        ["'lora_compse'; did you mean lora_compose, lora_compose_group?"],
    ),
    (["tune", "--config", "TINY", "--gpu", "h200", "--trials", "0"], ["trials=0", "at least 1 trial"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--effort", "quik"], ["'quik' is not one of 'quick', 'standard'"]),
    (
        ["tune", "--config", "TINY", "--gpu", "h200", "--evaluator", "guess"],
        ["'guess' is not one of 'auto', 'measure'"],
    ),
    (["tune", "--config", "TINY", "--gpu", "h200", "--timeout", "-1"], ["'--timeout': -1.0 is not in the range"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--jobs", "0"], ["'--jobs': 0 is not in the range"]),
    (
        ["tune", "--config", "TINY", "--gpu", "h200", "--store", "redis://x"],
        ["unknown scheme 'redis'", "use a file"],
    ),
    (["tune", "--config", "TINY", "--gpu", "auto"], ["no GPU is visible to PyTorch", "--gpu h200"]),
    (["tune", "--config", "TINY", "--evaluator", "measure"], ["needs a GPU", "use --evaluator predict"]),
    (["tune", "--config", "TINY", "--gpu", "h200", "--evaluator", "measure"], ["needs a GPU", "--evaluator predict"]),
    (["emit", "SPEC", "--config", "tile"], ["config 'tile' lacks num_stages and num_warps"]),
    (["emit", "SPEC", "--config", "tlie:num_warps=1,num_stages=1"], ["no variant 'tlie'; did you mean tile?"]),
    (
        ["emit", "SPEC", "--config", "tile:block_n=48,block_t=1,num_warps=1,num_stages=1"],
        ["cannot serve", "block_n must be a power of two, got 48"],
    ),
    (["cache", "ls", "--op", "compose_forwards"], ["'compose_forwards'; did you mean compose_forward"]),
    (["cache", "ls", "--gpu", "h20"], ["unknown GPU 'h20'; did you mean h200"]),
    (["cache", "ls", "--store", ""], ["not a file; use a file path"]),
    (["cache", "path", "--store", "sqlite://"], ["not a plain file", "use a file path, sqlite:////absolute/path"]),
    (["cache", "drift", "--op", "compose_forwards"], ["'compose_forwards'; did you mean compose_forward"]),
    (["cache", "drift", "--jobs", "0"], ["'--jobs': 0 is not in the range"]),
    (["cache", "frobnicate"], ["No such command 'frobnicate'"]),
    (["tunes"], ["No such command 'tunes'"]),
    (["explain"], ["Missing argument 'SPEC'"]),
    (["models", "--jsn"], ["No such option", "--json"]),
]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("args", "said"), MISTAKES, ids=lambda value: " ".join(value[:8]))
def test_a_wrong_request_names_the_fault_and_the_remedy(
    args: list[str], said: list[str], tiny: Path, home: Path, tmp_path: Path
) -> None:
    places = {"TINY": str(tiny), "SPEC": SPEC}
    before = files_in(tmp_path)
    message = mistake(run(*(places.get(arg, arg) for arg in args), home=home), 2)
    for part in said:
        assert part in message
    assert {path for path in files_in(tmp_path) if path not in before} <= {"home", "home/store.sqlite"}


NINES = "9" * 5000
LONG = "/" + "a" * 300 + "/b"
HOSTILE = {
    "location": ["", " ", ":memory:", "sqlite:///:memory:", "sqlite:///a?b", "file:x", "~no-such-user/x", "FIFO", LONG],
    "integer": ["", "x", "0", "-1", "1.5", "nan", NINES],
    "integer range": ["", "x", "0", "1e3", str(10**30), NINES],
    "float range": ["", "x", "-1", "nan", "inf", "-inf", NINES],
    "config": ["", LONG, "FIFO", "/dev/full", "~no-such-user/x", "x" * 5000],
    "output": ["", LONG, "/proc/x/y.json", "/dev/null/x", ".", "FIFO", "~no-such-user/x"],
    "files": ["", LONG, "FIFO", "DEEP", "FOREIGN", "/dev/null"],
    "spec": ["", "@", "x@h200", "/" * 5000 + "@h200", f"compose_forward/d_out={NINES}/tokens=1/activation=bf16@h200"]
    + [f"weight_norm/d_out=64/d_in={size}/rank=8/weight=bf16/adapter=bf16@h200" for size in (10000000019, 2**24 + 1)]
    + [f"weight_norm/d_out=64/d_in=64/rank={10**30}/weight=bf16/adapter=bf16@h200"]
    + [SPEC.replace("sm_90", "x" * 5000)],
    "specs": ["", LONG, "FIFO", "DEEP", "FOREIGN", "/dev/null", "~no-such-user/x", "x" * 5000],
    "choice": ["", "nope", "x" * 5000, "\x1b[2J[/b]"],
    "kernel's config": ["", "x" * 5000, f"tile:block_n={NINES},num_warps=1,num_stages=1", "tile:num_warps=4"],
}
"""Values that no command may accept, by what the option takes."""


def kind_of(path: tuple[str, ...], parameter: click.Parameter) -> str:
    """The key of :data:`HOSTILE` for a parameter; empty for one of another kind."""
    if parameter.name in ("specs", "spec_file"):
        return "spec" if parameter.name == "specs" else "specs"
    if parameter.name in ("config", "output", "files", "spec"):
        return "kernel's config" if (path, parameter.name) == (("emit",), "config") else parameter.name
    return parameter.type.name if parameter.type.name in HOSTILE else ""


def bad_calls() -> Iterator[list[str]]:
    for path, command in COMMANDS.items():
        yield [*path, "--nope"]
        yield [*path, "--" + "x" * 5000]
        given = [SPEC] if any(parameter.name == "spec" for parameter in command.params) else []
        given += ["--config", "TINY", "--gpu", "h200"] if path == ("tune",) else []
        for parameter in command.params:
            if path == ("doctor",) and parameter.name == "store":  # a store that is none is a finding there
                continue
            for value in HOSTILE.get(kind_of(path, parameter), ()):
                if path in (("cache", "path"), ("cache", "verify")) and value in ("FIFO", LONG):  # the same there
                    continue
                option = [parameter.opts[0]] if isinstance(parameter, click.Option) else ["--"]
                kept = [] if option == ["--"] or parameter.name in ("specs", "spec_file") else given
                yield [*path, *kept, *option, value]


def test_a_bad_call_of_any_command_ends_with_one_message(home: Path, tmp_path: Path, tiny: Path) -> None:
    """The kinds of mistakes that scripts make: an empty variable, a number without end, a file that is none."""
    places = {"FIFO": tmp_path / "fifo", "DEEP": tmp_path / "deep.json", "FOREIGN": tmp_path / "foreign.json"}
    os.mkfifo(places["FIFO"])
    places["DEEP"].write_text("[" * 100_000)
    row = {"bench": "model", "op": "step", "impl": "doratune", "us": "soon"}
    places["FOREIGN"].write_text(json.dumps({"schema": 1, "rows": [row]}))
    before, wrong, count = files_in(tmp_path), [], 0
    for args in bad_calls():
        count += 1
        result = run(*(str({**places, "TINY": tiny}.get(arg, arg)) for arg in args), home=home)
        said = result.stderr.rpartition("Error: ")[2].strip()
        clean = isinstance(result.exception, SystemExit) and result.exit_code in (1, 2)
        if not clean or not 10 <= len(said) <= 1000 or "Error: " not in result.stderr or "secret" in said:
            wrong.append(([arg[:60] for arg in args], result.exit_code, repr(result.exception)[:200], said[:200]))
    assert wrong == []
    assert count >= 300
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_fits_a_terminal_of_few_characters(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=PRINTABLE)
    stream.write("2.4 µs × 3 … ☃ \udcff")
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert said == {"ascii": "2.4 us x 3 ... \\u2603 \\udcff", "latin-1": "2.4 µs × 3 ... \\u2603 \\udcff"}[encoding]


def test_every_text_of_the_package_is_read_as_utf_8(home: Path) -> None:
    """In the C locale without UTF-8 mode, and with output that takes ASCII alone."""
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "DORATUNE_HOME": str(home)}
    environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for args in (["emit", SPEC], ["models"]):
        command = [sys.executable, "-m", "doratune", *args]
        said = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert said.returncode == 0, said.stderr
        assert said.stdout.decode("utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("args", [["--help"], ["models"], ["models", "--json"]])
def test_output_that_finds_no_space_is_one_message(args: list[str], home: Path) -> None:
    environment = {**os.environ, "DORATUNE_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "doratune", *args]
    with open("/dev/full", "w") as full:
        said = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("Error: No space left on device: the output was not written whole")
    assert said.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["explain", "emit", "cache show"])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("compose_forwad/d_out=64/tokens=1/activation=bf16@h200", "'compose_forwad'; did you mean compose_forward"),
        (
            "compose_forward/dout=64/tokens=1/activation=bf16@h200",
            "unknown field 'dout'; did you mean d_out, d_out_3, d_out_2?",
        ),
        ("compose_forward/d_out=64/tokens=1/activation=bf16/bais@h200", "unknown flag 'bais'; did you mean bias?"),
        ("compose_forward/d_out=6x4/tokens=1/activation=bf16@h200", "d_out='6x4' is not a whole number"),
        ("compose_forward/d_out=64/tokens=3/activation=bf16@h200", "tokens=3 is not a token bucket; use 16"),
        ("compose_forward/d_out=64/tokens=1/activation=fp8@h200", "activation='fp8': unsupported dtype; use one of"),
        ("compose_forward/d_out=64/tokens=1/rank=8/activation=bf16@h200", "does not depend on rank: leave it out"),
        ("compose_forward/d_out=64/tokens=1/activation=bf16", "names no GPU: end it with @h200"),
        ("compose_forward/d_out=64/d_out=64/tokens=1/activation=bf16@h200", "d_out is given twice"),
        ("", "names no GPU"),
    ],
)
def test_a_typo_in_a_spec_is_named(command: str, spec: str, said: str, home: Path) -> None:
    assert said in mistake(run(*command.split(), spec, home=home), 2)


@pytest.mark.parametrize("command", ["explain", "emit"])
def test_an_unknown_gpu_in_a_spec_is_named(command: str, home: Path) -> None:
    message = mistake(run(command, SPEC.replace("sm_90", "sm_91"), home=home), 2)
    assert message.startswith("unknown GPU 'sm_91'; did you mean sm_90")
    assert "For another GPU name its architecture" in message


def without(field: str) -> str:
    return json.dumps({name: value for name, value in TINY.items() if name != field})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(TINY)[:-9], ["not valid JSON (line 1, column", "download the model's config.json again"]),
        ("", ["not valid JSON", "download"]),
        ("[1, 2]", ["expected a JSON object, found a list", "give a model's config.json"]),
        (without("hidden_size"), ["hidden_size", "is missing", "an integer of at least 1"]),
        (without("num_hidden_layers"), ["num_hidden_layers", "is missing"]),
        (without("intermediate_size"), ["intermediate_size", "is missing"]),
        (json.dumps({**TINY, "hidden_size": "64"}), ["hidden_size", "'64'", "not an integer of at least 1"]),
        (json.dumps({**TINY, "num_hidden_layers": 10**9}), ["num_hidden_layers", "more than any model has"]),
        (json.dumps({**TINY, "architectures": ["X"], "auto_map": {"AutoModel": "x.X"}}), ["executes none of it"]),
        (json.dumps({**TINY, "num_attention_heads": 0}), ["num_attention_heads", "0", "not an integer of at least 1"]),
        (json.dumps({**TINY, "num_key_value_heads": 3}), ["num_key_value_heads", "does not divide"]),
        ("\udcff", ["cannot be read as text", "give a model's config.json"]),
    ],
)
def test_a_config_that_is_no_model_is_refused(text: str, said: list[str], home: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes(text.encode(errors="surrogateescape"))
    before = files_in(tmp_path)
    message = mistake(run("tune", "--config", str(config), "--gpu", "h200", home=home), 2)
    assert str(config) in message
    for part in said:
        assert part in message
    assert files_in(tmp_path) == before


# Stores that cannot be used: exit code 1, and what is there stays as it is.


def text_file(path: Path, sound: Path) -> None:
    path.write_text("spec,config\n")


def empty_file(path: Path, sound: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path, sound: Path) -> None:
    path.mkdir()


def truncated(path: Path, sound: Path) -> None:
    copy(sound, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def header_alone(path: Path, sound: Path) -> None:
    copy(sound, path)
    path.write_bytes(path.read_bytes()[:100])


def foreign_database(path: Path, sound: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
        connection.commit()


def newer_schema(path: Path, sound: Path) -> None:
    copy(sound, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE doratune_schema SET version_num = '9999'")
        connection.commit()


def copy(store: Path, path: Path) -> None:
    """Copy a store whole into one file."""
    with Store.open(store, readonly=True) as opened:
        opened.export(path)


BROKEN: list[tuple[Callable[[Path, Path], None], list[str]]] = [
    (text_file, ["not a SQLite database and is left as it is", "name another"]),
    (empty_file, ["the file is empty", "delete it so that a store can be made there, or name another"]),
    (folder, ["this is a folder", "name a file, such as"]),
    (truncated, ["the file is damaged", "Restore it from a copy"]),
    (header_alone, ["the file is ", "name another|Restore it from a copy"]),
    (foreign_database, ["holds no doratune store and is left as it is", "name another"]),
    (newer_schema, ["written by a newer doratune (schema 9999", "upgrade doratune or use another store"]),
]

USES = {
    "tune": ["tune", "--config", "TINY", "--gpu", "sm_90", *QUICK],
    "emit": ["emit", SPEC],
    "explain": ["explain", SPEC],
    "cache ls": ["cache", "ls"],
    "cache show": ["cache", "show", SPEC],
    "cache prune": ["cache", "prune"],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("spoil", "said"), BROKEN, ids=lambda value: value.__name__ if callable(value) else "")
def test_a_store_that_cannot_be_used_is_named_and_left_as_it_is(
    use: str, spoil: Callable[[Path, Path], None], said: list[str], tuned: Tuned, tiny: Path, home: Path, tmp_path: Path
) -> None:
    place = tmp_path / "stores"
    place.mkdir()
    store = place / "team.sqlite"
    spoil(store, tuned.home / "store.sqlite")
    before = files_in(place)
    args = [str(tiny) if arg == "TINY" else arg for arg in USES[use]]
    message = mistake(run(*args, "--store", str(store), home=home), 1)
    assert message.startswith(f"store {store}")
    for part in said:
        assert any(choice in message for choice in part.split("|")), message
    assert files_in(place) == before


@pytest.mark.parametrize("use", [use for use in USES if use != "tune"])
def test_a_store_that_is_missing_is_named_and_not_made(use: str, home: Path, tmp_path: Path) -> None:
    store = tmp_path / "missing.sqlite"
    message = mistake(run(*USES[use], "--store", str(store), home=home), 1)
    assert message.startswith(f"store {store}: there is no such file; check the path")
    assert f"doratune tune --store {store}" in message
    assert files_in(tmp_path) == {}


def test_a_store_named_by_the_environment_says_so(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "missing.sqlite"
    env = {"DORATUNE_HOME": str(home), "DORATUNE_CACHE_PATH": str(store)}
    message = mistake(RUNNER.invoke(main, ["explain", SPEC], env=env), 1)
    assert f"store {store}: there is no such file" in message
    assert "named by DORATUNE_CACHE_PATH" in message


def test_a_store_cannot_be_made_below_a_file(tiny: Path, home: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    store = tiny / "store.sqlite"
    message = mistake(tune_tiny(home, tiny, "--store", str(store)), 1)
    assert message.startswith(f"store {store}: cannot be ")
    assert "name a folder that you can write, or set DORATUNE_HOME" in message
    assert files_in(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where nobody can make a file")
def test_a_store_cannot_be_made_where_nobody_can_write(tiny: Path, home: Path) -> None:
    message = mistake(tune_tiny(home, tiny, "--store", "/proc/doratune/store.sqlite"), 1)
    assert message.startswith("store /proc/doratune/store.sqlite: cannot be made in /proc/doratune")
    assert "name a folder that you can write" in message


def test_a_home_that_is_a_file_is_named(tiny: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    message = mistake(tune_tiny(tiny, tiny), 1)
    assert str(tiny) in message
    assert "DORATUNE_HOME" in message
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("use", ["explain", "cache ls", "tune"])
def test_a_users_own_store_that_is_damaged_is_named_and_left_as_it_is(
    use: str, tuned: Tuned, tiny: Path, home: Path
) -> None:
    home.mkdir()
    store = home / "store.sqlite"
    truncated(store, tuned.home / "store.sqlite")
    before = store.read_bytes()
    args = [str(tiny) if arg == "TINY" else arg for arg in USES[use]]
    assert mistake(run(*args, home=home), 1).startswith(f"store {store}: the file is damaged")
    assert store.read_bytes() == before


def test_studies_that_cannot_be_kept_are_named(tiny: Path, home: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a database")
    message = mistake(tune_tiny(home, tiny, "--study-storage", f"sqlite:///{notes}"), 1)
    assert message.startswith(f"study storage sqlite:///{notes}: ")
    assert "name another with --study-storage" in message
    assert notes.read_text() == "not a database"


def test_an_entry_nobody_has_is_a_failure_that_points_to_explain(tuned: Tuned) -> None:
    other = SPEC.replace("d_out=64", "d_out=96")
    message = mistake(run("cache", "show", other, home=tuned.home), 1)
    assert message == f"no store has an entry for {other}; `doratune explain` says what would run instead"


# After an upgrade.

Upgraded = Callable[..., Result]


@pytest.fixture
def upgraded(home: Path, monkeypatch: pytest.MonkeyPatch) -> Upgraded:
    """Run ``doratune cache drift`` on a store with one winner, from before an upgrade of the driver."""
    monkeypatch.setattr("doratune.tuner.drift.CompilePool", FakePool)
    monkeypatch.setattr(FakePool, "crashing", staticmethod(lambda config: None))
    home.mkdir()
    with Store.open(home / "store.sqlite", create=True) as store:
        store.put(an_entry())

    def drift(times: Times, *args: str, broken: bool = False) -> Result:
        machine = Machine(times)
        if broken:
            machine.faults[FORWARD] = Rejected("inaccurate: y is off by 3")
        monkeypatch.setattr("doratune.tuner.drift_store.choose_evaluators", lambda request: (GPU, [machine]))
        return run("cache", "drift", *args, home=home)

    return drift


@pytest.mark.parametrize(
    ("times", "args", "broken", "exit_code"),
    [
        (SAME, [], False, 0),
        (SAME, ["--check"], False, 0),
        (SWAPPED, [], False, 0),
        (SWAPPED, ["--check"], False, 1),
        (SWAPPED, ["--check", "--apply"], False, 0),
        (SAME, [], True, 1),
        (SAME, ["--apply"], True, 0),
    ],
)
def test_the_exit_code_says_whether_the_store_can_be_left_as_it_is(
    upgraded: Upgraded, times: Times, args: list[str], broken: bool, exit_code: int
) -> None:
    assert upgraded(times, *args, broken=broken).exit_code == exit_code


def test_what_moved_is_a_table_and_a_sentence(upgraded: Upgraded) -> None:
    result = upgraded(SWAPPED)
    said = done(result)
    for part in ("moved", "driver 550.54", "compose_forward/", "5."):
        assert part in said
    assert "1 measured again in" in result.stderr
    assert "1 moved, the worst by 5." in result.stderr
    assert "nothing was written; --apply writes it to the store" in result.stderr


def test_what_moved_as_json(upgraded: Upgraded, home: Path) -> None:
    data = json.loads(done(upgraded(SWAPPED, "--json")))
    assert (data["schema"], data["store"], data["gpu"]) == (1, str(home / "store.sqlite"), "h200")
    (row,) = data["rows"]
    assert (row["outcome"], row["config"], row["fastest"]) == ("moved", str(FORWARD), str(SECOND))
    assert row["loss"] == pytest.approx(0.05, abs=0.003)
    assert row["changes"] == [{"what": "driver", "then": "550.54", "here": "580.1"}]
    assert not row["adopted"]


def test_apply_stores_the_new_winner_and_a_second_run_has_nothing_to_do(upgraded: Upgraded, home: Path) -> None:
    assert "moved, adopted" in done(upgraded(SWAPPED, "--apply"))
    again = upgraded(SWAPPED, "--apply")
    assert done(again) == ""
    assert "1 skipped: measured under the present versions" in again.stderr
    shown = json.loads(done(run("cache", "show", str(an_entry().spec), "--json", home=home)))["entries"][0]
    assert (shown["config"], shown["driver"]) == (str(SECOND), "580.1")


def test_a_broken_winner_is_told_with_its_reason(upgraded: Upgraded) -> None:
    result = upgraded(SAME, broken=True)
    assert f"broken: {an_entry().spec}: inaccurate: y is off by 3" in result.stderr


def test_apply_to_a_store_that_cannot_be_written_is_refused(
    upgraded: Upgraded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    message = mistake(upgraded(SWAPPED, "--apply"), 1)
    assert "cannot be written" in message
    assert "store.sqlite" in message


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_nothing_can_be_measured_again(tuned: Tuned) -> None:
    message = mistake(run("cache", "drift", home=tuned.home), 2)
    assert message.startswith("cache drift measures kernels, and PyTorch sees no GPU")


def test_without_a_store_there_is_nothing_to_measure_again(home: Path) -> None:
    assert "there is no such file" in mistake(run("cache", "drift", home=home), 1)
    assert not home.exists()


# As a process of its own.


def process(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "DORATUNE_CACHE_PATH"} | {
        "DORATUNE_HOME": str(home)
    }
    command = [sys.executable, "-m", "doratune.cli", *args]
    return subprocess.run(command, env=env, cwd=home.parent, capture_output=True, text=True, timeout=120)


def test_in_its_own_process_it_prints_the_result_alone(tuned: Tuned) -> None:
    done = process("explain", SPEC, "--json", home=tuned.home)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["step"] == "exact"


def test_in_its_own_process_it_fails_with_one_message(tuned: Tuned, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    shutil.copy(tuned.config, store)
    done = process("cache", "ls", "--json", "--store", str(store), home=tuned.home)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: store {store}: the file is not a SQLite database")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_models_lists_every_linear_layer_of_a_config_and_says_which_get_no_adapter(tiny: Path, home: Path) -> None:
    (model,) = json.loads(done(run("models", "--config", str(tiny), "--json", home=home)))["models"]
    assert {layer["name"]: (layer["d_out"], layer["d_in"], layer["count"]) for layer in model["projections"]} == {
        "q_proj": (64, 64, 1),
        "k_proj": (64, 64, 1),
        "v_proj": (64, 64, 1),
        "o_proj": (64, 64, 1),
        "gate_proj": (128, 64, 1),
        "up_proj": (128, 64, 1),
        "down_proj": (64, 128, 1),
    }
    assert [layer["modules"] for layer in model["not_tuned"]] == [["lm_head"]]
    table = run("models", "--config", str(tiny), home=home)
    assert "model.layers.0.mlp.gate_proj" in done(table)
    assert "no: the output head, which PEFT's all-linear leaves out" in table.stdout
    assert "note: the layers of transformers" in table.stderr


def test_tune_tells_what_it_tunes_for_before_it_tunes(tuned: Tuned) -> None:
    data = json.loads(tuned.result.stdout)
    assert [layer["name"] for layer in data["projections"]][:2] == ["q_proj", "k_proj"]
    listed, kernels = tuned.result.stderr.index("[128, 64]: gate_proj ×1"), tuned.result.stderr.index("2 kernels")
    assert tuned.result.stderr.startswith("tiny: 7 linear layers to put DoRA on\n")
    assert listed < kernels


def test_a_reader_that_stops_early_gets_no_traceback(tuned: Tuned) -> None:
    command = [sys.executable, "-m", "doratune.cli", "models", "--json"]
    with subprocess.Popen(
        command, cwd=tuned.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `head` does when it has enough
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_command_that_is_used_without_its_group_first_still_has_the_short_help(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Click keeps the help option of the first call."""
    from doratune.benchmarks.commands import bench

    command = bench.commands["norms"]
    monkeypatch.setattr(command, "_help_option", None, raising=False)
    command.make_context("norms", [])
    assert done(run("bench", "norms", "-h", home=home)).startswith("Usage: ")
