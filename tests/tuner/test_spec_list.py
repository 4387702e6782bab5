"""A list of specs is tuned as it is written: each kernel once, on one GPU; a bad line is named with what to do."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from doratune.benchmarks import coverage
from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError
from doratune.terminal.deadline import TimeUpError
from doratune.tuner import tune_model as tune_model_module
from doratune.tuner.spec_list import STANDARD_INPUT, SpecListError, read_spec_list
from doratune.tuner.tune_model import Request, tune_model

ONE = "compose_forward/d_out=64/tokens=1/activation=bf16@h200"
TWO = "compose_forward/d_out=128/tokens=1/activation=bf16@h200"


def listed(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "plan.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_has_a_spec_a_line_with_comments_and_each_counts_once(tmp_path: Path) -> None:
    path = listed(tmp_path, f"\ufeff# a plan\n\n  {TWO}  # serves 7 of the kernels\r\n{ONE}\n{TWO}\n")
    found = read_spec_list([ONE], path)
    assert [str(spec) for spec in found.specs] == [TWO, ONE]
    assert (found.gpu, found.name) == ("h200", f"specs from {path} and 1 spec of --spec")


def test_standard_input_is_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{ONE}\n".encode())))
    found = read_spec_list(file=STANDARD_INPUT)
    assert ([str(spec) for spec in found.specs], found.name) == ([ONE], "specs from standard input")


def test_what_a_plan_prints_is_read_again(tmp_path: Path) -> None:
    specs = [KernelSpec.parse(spec) for spec in (ONE, TWO)]
    found = coverage.Coverage("h200", 1, tuple(coverage.Looked(0, spec, coverage.UNKNOWN, None) for spec in specs))
    lines = [choice.line() for choice in coverage.plan(found, 2)]
    assert {*read_spec_list(file=listed(tmp_path, "\n".join(lines))).specs} == {*specs}


def test_a_gpu_goes_by_its_usual_name_whoever_names_it() -> None:
    found = read_spec_list([ONE.replace("@h200", "@sm_90a")], gpu="SM 90")
    assert (found.gpu, found.specs[0].gpu) == ("sm_90", "sm_90")


BAD_LINES = {
    "compose_forwrd/d_out=64/tokens=1/activation=bf16@h200": ("compose_forwrd", "did you mean compose_forward"),
    "compose_forward/d_out=64/tokens=1/activation=bf16": ("names no GPU", "@h200"),
    "compose_forward/d_out=64/tokens=1/activation=bf16@h201": ("unknown GPU 'h201'", "did you mean h200"),
    "compose_forward/d_out=64/tokens=3/activation=bf16@h200": ("tokens=3 is not a token bucket", "use 16"),
    "compose_forward/d_out=64/tokens=1/activation=bf16@h100-sxm": ("for h100-sxm", "each GPU in a run of its own"),
    "[/b]\x1b[2J" + "x" * 5000: ("must have at most 512", "Mend or remove this spec"),
}


@pytest.mark.parametrize(("bad", "parts"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_fault_and_remedy(tmp_path: Path, bad: str, parts: tuple[str, ...]) -> None:
    path = listed(tmp_path, f"{ONE}\n# fine so far\n{bad}\n")
    with pytest.raises(SpecListError) as refused:
        read_spec_list(file=path)
    said = str(refused.value)
    assert said.startswith(f"{path}, line 3: ")
    assert all(part in said for part in parts), said
    assert len(said) <= 1000
    assert said.isprintable()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "has no spec; write one a line"),
        ("# nothing\n\n", "has no spec; write one a line"),
        (b"\xff\xfe\x00", "cannot read specs from"),
    ],
)
def test_a_file_without_specs_is_refused(tmp_path: Path, content: str | bytes, part: str) -> None:
    with pytest.raises(SpecListError, match=part):
        read_spec_list(file=listed(tmp_path, content))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["a folder", "missing"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "plan")  # type: ignore[operator]
    with pytest.raises(SpecListError, match="name a text file with one spec a line"):
        read_spec_list(file=tmp_path / "plan")


def test_another_gpu_than_that_of_the_specs_is_refused() -> None:
    with pytest.raises(SpecListError, match="--spec: this spec is for h200, and --gpu says h100-sxm"):
        read_spec_list([ONE], gpu="h100-sxm")


@pytest.mark.parametrize("named", [{"model": "llama-8b"}, {"config": Path("config.json")}], ids=str)
def test_specs_and_a_model_exclude_each_other(named: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="leave --model and --config out"):
        tune_model(Request(specs=(ONE,), **named))  # type: ignore[arg-type]


def test_a_list_that_is_read_for_longer_than_the_time_limit_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_model_module, "read_spec_list", lambda *_, **__: time.sleep(30.0))
    store = tmp_path / "store.sqlite"
    begin = time.monotonic()
    with pytest.raises(TimeUpError) as ended:
        tune_model(Request(spec_file=tmp_path / "plan", timeout=0.2, store=str(store)))
    assert time.monotonic() - begin < 15.0
    assert "the time limit, --timeout 0.2, was up before it was known which kernels to tune" in str(ended.value)
    assert "give more time or name fewer kernels" in str(ended.value)
    assert not store.exists()


@pytest.mark.parametrize(("spent", "left"), [(100.0, 0.0), (20.0, 30.0)])
def test_the_time_limit_counts_from_the_start_of_the_command(
    spent: float, left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def stop(*args: object, timeout: float, **options: object) -> None:
        given.append(timeout)
        raise UsageError("stop here")

    monkeypatch.setattr(tune_model_module, "tune", stop)
    request = Request(specs=(ONE,), timeout=50.0, store=str(tmp_path / "store.sqlite"), evaluator="predict")
    with pytest.raises(UsageError, match="stop here"):
        tune_model(replace(request, study_storage=str(tmp_path / "s.sqlite")), began=time.monotonic() - spent)
    assert given[0] == pytest.approx(left, abs=10.0)
