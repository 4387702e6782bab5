"""A user without a home directory is served by the stores that ship; what needs a folder says so in one sentence.

Containers run under user ids that the system does not know, with HOME unset, or with the HOME of somebody else.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

import doratune
from doratune.cache.errors import NoHomeError, StoreError
from doratune.cache.stack import home, open_stack, stack_places
from doratune.cli import main

from ..command_line import RUNNER

SPEC = "lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200"
TUNE = ["tune", "--model", "llama-8b", "--gpu", "h200", "--op", "compose_forward", "--tokens", "1", "--trials", "1"]
READING = [["cache", "path"], ["cache", "ls"], ["explain", SPEC], ["emit", SPEC], ["models"]]
UNKNOWN_ID = 54321


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has an id that the system does not know, and no variable that leads to a home."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_DATA_HOME", "DORATUNE_HOME", "DORATUNE_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)


HOMES = [
    {},
    {"HOME": ""},
    {"HOME": "relative"},
    {"HOME": "/" + "x" * 300},  # whoever looks there gets an OSError, as from a folder that may not be entered
    {"HOME": "/nonexistent"},
    {"HOME": "/"},
    {"DORATUNE_HOME": ""},
    {"DORATUNE_HOME": "  "},
    {"XDG_DATA_HOME": ""},
    {"XDG_DATA_HOME": "relative"},
    {"XDG_DATA_HOME": "~/data"},
    {"XDG_DATA_HOME": "/nonexistent"},
]


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("variables", HOMES, ids=str)
def test_reading_needs_no_home(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert {place.origin for place in stack_places()} == {"prebuilt"}
    for args in READING:
        result = RUNNER.invoke(main, args)
        assert result.exit_code == 0, result.output
        assert result.stdout
    assert "exact" in RUNNER.invoke(main, ["explain", SPEC]).stdout, "the shipped store serves"


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("args", [TUNE, [*TUNE, "--store", "STORE"], ["cache", "prune"]], ids=" ".join)
def test_what_writes_says_what_to_do(args: list[str], tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    result = RUNNER.invoke(main, [str(store) if arg == "STORE" else arg for arg in args])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: this user has no home directory")
    assert result.stderr.count("\n") == 1
    for remedy in ("DORATUNE_HOME", "--store", "--study-storage"):
        assert remedy in result.stderr
    assert not store.exists()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_the_named_files_are_a_remedy(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the message asks for runs: what is searched here is nothing, since the time is up at once."""
    store, studies = tmp_path / "store.sqlite", tmp_path / "studies.sqlite"
    named = ["--store", form.format(store), "--study-storage", form.format(studies), "--timeout", "0"]
    result = RUNNER.invoke(main, [*TUNE, *named])
    assert "Could not parse" not in result.output
    assert studies.exists()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("found", ["~/.local/share/doratune", "relative/doratune"])
def test_a_path_that_platformdirs_leaves_relative_is_no_home(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its earlier versions do not raise; a store would then be looked for below the current folder."""
    monkeypatch.setattr(platformdirs, "user_data_path", lambda name: Path(found))
    with pytest.raises(NoHomeError):
        home()
    assert {place.origin for place in stack_places()} == {"prebuilt"}


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("named", ["~/mine", "~nobody-of-that-name/mine"])
def test_a_named_home_that_is_none_is_never_passed_over(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_HOME", named)
    for args in [["cache", "path"], ["explain", SPEC], TUNE]:
        result = RUNNER.invoke(main, args)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: DORATUNE_HOME={named} cannot be resolved to a folder")
        assert "absolute path" in result.stderr


@pytest.mark.usefixtures("homeless")
def test_a_named_home_that_may_not_be_entered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORATUNE_HOME", "/" + "x" * 300)
    with pytest.raises(StoreError, match="cannot be read"):
        open_stack()


@pytest.mark.usefixtures("homeless")
def test_a_home_of_ones_own_name_serves_as_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("DORATUNE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local" / "share" / "doratune"


@pytest.mark.usefixtures("homeless")
def test_kernels_load_without_a_home() -> None:
    kernel = doratune.load_kernel("lora_compose", d_out=64, d_in=64, rank=8, tokens=16, device="cpu")
    assert kernel.provenance == "reference"


# As a program, under a user id of its own.


def as_stranger(*args: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``doratune`` as a user whom the system does not know, who may read every file but write none of them."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root can run a program under another user id, with setpriv")
    rights = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]  # Python may lie in /root
    become = [setpriv, f"--reuid={UNKNOWN_ID}", f"--regid={UNKNOWN_ID}", "--clear-groups", *rights]
    if subprocess.run([*become, sys.executable, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root take another user id")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [*become, sys.executable, "-B", "-m", "doratune.cli", *args]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("args", [["cache", "path"], ["explain", SPEC]], ids=" ".join)
@pytest.mark.parametrize("variables", [{}, {"HOME": "/root"}], ids=str)
def test_a_stranger_reads_the_shipped_store(args: list[str], variables: dict[str, str], tmp_path: Path) -> None:
    done = as_stranger(*args, cwd=tmp_path, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "prebuilt" in done.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "this user has no home directory"),
        ({"HOME": "/nonexistent"}, "cannot be made in /nonexistent/.local/share/doratune"),
        ({"HOME": "/"}, "cannot be made in /.local/share/doratune (Permission denied)"),
        ({"DORATUNE_HOME": "/root/doratune"}, "cannot be made in /root/doratune (Permission denied)"),
    ],
    ids=str,
)
def test_a_stranger_who_tunes_is_told_what_to_set(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = as_stranger(*TUNE, "--evaluator", "predict", cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "DORATUNE_HOME" in done.stderr


@pytest.fixture
def strangers_folder() -> Iterator[Path]:
    """A folder that the stranger may write, below one that others may only enter; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="doratune-"))
    folder.chmod(0o755)
    place = folder / "place"
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, UNKNOWN_ID, UNKNOWN_ID)
    yield place
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_stranger_whom_tritons_cache_refuses_is_told_so_and_tunes_once_it_is_named(strangers_folder: Path) -> None:
    place, outside = strangers_folder, strangers_folder.parent
    arguments = [*TUNE, "--evaluator", "predict", "--jobs", "1", "--no-binaries", "--json"]
    refused = as_stranger(*arguments, cwd=outside, DORATUNE_HOME=str(place))
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr
    assert "TRITON_CACHE_DIR" in refused.stderr
    assert '"stopped": "fault"' in refused.stdout
    mended = as_stranger(*arguments, cwd=outside, DORATUNE_HOME=str(place), TRITON_CACHE_DIR=str(place / "triton"))
    assert mended.returncode == 0, mended.stderr
    assert "3 tuned in" in mended.stderr
