"""``doctor`` and ``convert`` on the command line: exit codes, JSON, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from doratune.adapters.fault import KINDS
from doratune.cli import main

from ..command_line import RUNNER
from .world import Q, Trained, edit


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))


def test_doctor_finds_nothing_in_a_sound_adapter(trained: Trained) -> None:
    done = RUNNER.invoke(main, ["doctor", "--adapter", str(trained.adapter), "--checkpoint", str(trained.checkpoint)])
    assert done.exit_code == 0, done.stderr
    assert "peft, 14 layers of rank 8, DoRA" in done.stdout
    assert "remedy" not in done.stdout


def test_doctor_fails_with_the_fault_its_place_and_its_remedy(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    edit(copied.adapter, lambda tensors, config: tensors.pop(f"{Q}.lora_magnitude_vector"))
    command = ["doctor", "--adapter", str(copied.adapter)]
    done = RUNNER.invoke(main, command)
    assert done.exit_code == 1
    kind = KINDS["magnitude_missing"]
    for text in (kind.what, kind.why, kind.remedy, Q):
        assert all(word in done.stdout for word in text.split())
    told = json.loads(RUNNER.invoke(main, [*command, "--json"]).stdout)
    (fault,) = told["faults"]
    assert (fault["kind"], fault["verdict"], fault["count"]) == ("magnitude_missing", "wrong", 1)
    assert fault["where"][0]["name"] == Q
    assert next(one for one in told["findings"] if one["what"] == "adapter")["verdict"] == "broken"


def test_doctor_says_what_is_wrong_where_a_rank_cannot_be_read(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    edit(copied.adapter, lambda tensors, config: tensors.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}))
    done = RUNNER.invoke(main, ["doctor", "--adapter", str(copied.adapter), "--json"])
    assert done.exit_code == 1
    assert [fault["kind"] for fault in json.loads(done.stdout)["faults"]] == ["shapes"]


def test_a_lossy_fault_is_told_and_does_not_fail(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    name = f"{Q}.lora_magnitude_vector"
    edit(copied.adapter, lambda tensors, config: tensors.update({name: tensors[name].bfloat16()}))
    done = RUNNER.invoke(main, ["doctor", "--adapter", str(copied.adapter), "--json"])
    assert done.exit_code == 0
    assert [fault["kind"] for fault in json.loads(done.stdout)["faults"]] == ["magnitude_rounded"]


def test_names_in_files_are_printed_as_text(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    evil = "model.[bold red]\x1b[2J\u202e"
    edit(copied.adapter, lambda tensors, config: tensors.update({evil: torch.ones(3)}))
    done = RUNNER.invoke(main, ["doctor", "--adapter", str(copied.adapter)])
    assert done.exit_code == 0
    assert "[bold red]" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert "\\x1b[2J" in done.stdout


def test_what_cannot_be_read_is_one_message(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"")
    done = RUNNER.invoke(main, ["doctor", "--adapter", str(folder)])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "pickled files are not read" in done.stderr


def test_convert_and_merge(trained: Trained, folder: Path) -> None:
    file = folder / "there.safetensors"
    done = RUNNER.invoke(main, ["convert", str(trained.adapter), str(file), "--to", "lycoris"])
    assert done.exit_code == 0, done.stderr
    assert "14 layers from peft to lycoris" in done.stdout
    command = ["convert", str(file), str(folder / "merged"), "--merge", str(trained.checkpoint), "--json"]
    told = json.loads(RUNNER.invoke(main, command).stdout)
    assert (told["source"], told["layers"], told["zero_rows"]) == ("lycoris", 14, 0)
    again = RUNNER.invoke(main, command)
    assert again.exit_code == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize("options", [[], ["--to", "peft", "--merge", "x"], ["--to", "kohya"]])
def test_a_wrong_request_is_a_usage_error(options: list[str], trained: Trained, folder: Path) -> None:
    done = RUNNER.invoke(main, ["convert", str(trained.adapter), str(folder / "there"), *options])
    assert done.exit_code == 2
    assert list(folder.iterdir()) == []
