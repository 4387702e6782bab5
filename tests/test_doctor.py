"""``doctor`` lists what is installed, whether it is tested, and what is broken."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from doratune import doctor
from doratune.cache.entry import PREDICTED
from doratune.cache.store import Store
from doratune.cli import main
from doratune.internals import torch as torch_internals
from doratune.internals import versions
from doratune.runtime import present

from .cache.world import a_binary, a_spec, an_entry
from .command_line import RUNNER
from .test_versions import ROOT, pins


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def found(what: str, store: str | None = None) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine(store) if finding.what == what]


def test_the_versions_that_the_tests_pin_are_tested() -> None:
    for package in versions.TESTED:
        (oldest,), (newest,) = found(package), found(package)
        assert oldest.verdict == newest.verdict == doctor.OK
    for package, ends in (versions.TESTED | versions.STORAGE).items():
        for end, column in zip(ends, ("oldest", "newest"), strict=True):
            assert ".".join(map(str, end)) == ".".join(pins(column)[package].split(".")[:2])


def test_an_untested_package_that_quantises_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, verdict in (("0.50.2", doctor.OK), ("0.51.0", doctor.UNTESTED)):
        monkeypatch.setattr(doctor, "installed", lambda package, version=version: version)
        (bitsandbytes,) = found("bitsandbytes")
        assert (bitsandbytes.verdict, bitsandbytes.found) == (verdict, version)
        assert "with 0.48 to 0.50" in bitsandbytes.remark


def test_optional_packages_and_pairs_are_those_that_the_tests_pin() -> None:
    for package, ends in {**versions.TESTED_BESIDE, **versions.STORAGE}.items():
        pinned = [Version(pins(column)[package]).release[:2] for column in ("oldest", "newest")]
        assert list(ends) == pinned, package
    pairs = [(pins(column)["torch"], pins(column)["triton"]) for column in ("oldest", "newest")]
    default = dict(re.findall(r"^(torch|triton)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pairs.insert(1, (default["torch"], default["triton"]))
    assert list(versions.TESTED_PAIRS) == [tuple(Version(one).release[:2] for one in pair) for pair in pairs]


@pytest.mark.parametrize(
    ("torch", "triton", "verdict"), [("2.10.0", "3.6.1", doctor.OK), ("2.10.0", "3.9.0", doctor.UNTESTED)]
)
def test_two_tested_versions_may_be_untested_together(
    torch: str, triton: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed", {"torch": torch, "triton": triton}.get)
    (pair,) = found("torch with triton")
    assert (pair.found, pair.verdict) == (f"{torch} with {triton}", verdict)
    assert "2.10 with 3.6" in pair.remark


@pytest.mark.parametrize(
    ("version", "verdict"), [("2.9.1", doctor.UNTESTED), ("2.13.0+cu130", doctor.OK), ("3.0", doctor.UNTESTED)]
)
def test_a_version_outside_the_range_is_untested(version: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: version if package == "torch" else "3.7.1")
    (torch,) = found("torch")
    assert (torch.found, torch.verdict) == (version, verdict)
    assert versions.tested_range("torch") in torch.remark


def test_a_package_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "peft" else "3.7.1")
    (peft,) = found("peft")
    assert (peft.found, peft.verdict) == ("not installed", doctor.MISSING)


def test_private_names_that_are_gone_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "missing", lambda: ["torch._C._one", "torch._C._two"])
    (internals,) = found("torch internals")
    assert (internals.found, internals.verdict) == ("2 missing", doctor.UNTESTED)
    assert "torch._C._one, torch._C._two" in internals.remark


def test_stores_are_counted_and_broken_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "team.sqlite"
    with Store.open(path, create=True) as store:
        store.put(an_entry(a_spec()))
    first, *_ = found("store", str(path))
    assert (first.found, first.verdict, first.remark) == (f"{path} (store)", doctor.OK, "1 entry")
    path.write_bytes(b"no database" * 100)
    first, *others = found("store", str(path))
    assert first.verdict == doctor.BROKEN
    assert str(path) in first.remark
    assert others, "the prebuilt ones are looked at all the same"


def test_a_store_whose_binaries_are_not_trusted_is_remarked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doratune.cache.permissions._private_group", lambda path, found: False)
    path = tmp_path / "team.sqlite"
    with Store.open(path, create=True) as store:
        store.put_binary(a_binary())
    for mode, remark in (
        (0o644, "0 entries"),
        (0o664, "0 entries; its binaries are not used unless they are signed: "),
    ):
        path.chmod(mode)
        first, *_ = found("store", str(path))
        assert first.verdict == doctor.OK
        assert (first.remark == remark) if mode == 0o644 else first.remark.startswith(remark)


@pytest.fixture
def gpu_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the driver's tool prints of the GPU."""
    monkeypatch.setattr(present, "_QUERY", ["echo", request.param])
    present._boards.cache_clear()
    yield
    present._boards.cache_clear()


@pytest.mark.usefixtures("gpu_here")
@pytest.mark.parametrize(
    ("gpu_here", "expected"),
    [
        ("NVIDIA H200, 590.2, 9.0", ["1 of 3"]),
        ("NVIDIA H200, 580.1, 9.0", []),
        ("NVIDIA H100 80GB HBM3, 590.2, 9.0", []),
    ],
    indirect=["gpu_here"],
)
def test_winners_from_before_an_upgrade_are_counted_in_the_users_own_store(
    expected: list[str], home: Path, tmp_path: Path
) -> None:
    here = replace(present.present_environment("h200"), architecture="sm_90")
    versions = {"triton": here.triton, "torch": here.torch}
    entries = [
        replace(an_entry(a_spec()), environment=replace(an_entry().environment, **versions)),  # under driver 580.1
        replace(an_entry(a_spec(rank=64)), environment=here),
        an_entry(a_spec("a100")),
        an_entry(a_spec(rank=32), PREDICTED),
    ]
    with Store.open(tmp_path / "team.sqlite", create=True) as store:
        store.put_all(entries)
    assert found("winners", str(tmp_path / "team.sqlite")) == []
    home.mkdir()
    (tmp_path / "team.sqlite").rename(home / "store.sqlite")
    winners = found("winners")
    assert [finding.found for finding in winners] == expected
    assert all(finding.verdict == doctor.UNTESTED and "cache drift" in finding.remark for finding in winners)


def test_nothing_is_written(home: Path) -> None:
    doctor.examine()
    assert not home.exists()


def test_the_command_prints_a_table_or_json_and_fails_where_something_is_broken(tmp_path: Path) -> None:
    done = RUNNER.invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert "tested with 2.10" in done.stdout
    found = json.loads(RUNNER.invoke(main, ["doctor", "--json"]).stdout)["findings"]
    assert {"torch", "triton", "peft", "Python", "C compiler"} <= {finding["what"] for finding in found}
    path = tmp_path / "[bold]no store.sqlite"
    path.write_bytes(b"no database" * 100)
    done = RUNNER.invoke(main, ["doctor", "--store", str(path)])
    assert done.exit_code == 1
    assert "[bold]no" in done.stdout, "a path is no markup"


@pytest.mark.parametrize("package", ["sqlalchemy", "optuna", "jinja2"])
def test_a_needed_package_that_does_not_import_is_broken(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def refuse(name: str, *args: Any) -> Any:
        if name == package:
            raise OSError("libcudart.so.13: cannot open shared object file")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (finding,) = found(package)
    assert (finding.verdict, finding.remark) == (
        doctor.BROKEN,
        "OSError: libcudart.so.13: cannot open shared object file",
    )


def test_what_cannot_be_examined_is_broken_and_the_rest_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "missing", lambda: 1 // 0)
    (finding,) = found("internals")
    assert (finding.verdict, finding.remark.split(":")[0]) == (doctor.BROKEN, "ZeroDivisionError")
    assert found("store")


@pytest.mark.parametrize(
    ("gpu", "amds", "verdict"),
    [(True, False, doctor.UNTESTED), (False, False, doctor.MISSING), (True, True, doctor.BROKEN)],
)
def test_without_a_c_compiler_no_kernel_starts_on_amds_gpus(
    gpu: bool, amds: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_is_amds", lambda: amds)
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(doctor, "_sees_gpu", lambda: gpu)
    (compiler,) = found("C compiler")
    assert (compiler.found, compiler.verdict) == ("/nowhere/cc", verdict)
