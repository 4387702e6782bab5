"""What a killed process left is removed by the next one; what belongs to a living one, or may, is not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from doratune import temporaries
from doratune.temporaries import ORPHAN_SECONDS, remove_orphans, temporary_name, write_whole


def of_a_dead_process() -> str:
    """The name that a process chose which has ended since."""
    code = "from doratune.temporaries import temporary_name; print(temporary_name('store.sqlite'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip()


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = of_a_dead_process()
    (tmp_path / dead).mkdir()
    (tmp_path / dead / "tmp.ptx").touch()
    for suffix in ("-wal", "-shm", "-journal"):
        (tmp_path / f"{dead}{suffix}").touch()
    kept = [temporary_name("store.sqlite"), "store.sqlite", ".hidden.new", "store.sqlite-journal", f"{dead}.txt"]
    for name in kept:
        (tmp_path / name).touch()
    remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("name", [".a.sqlite.123-4567-0badcafe-01234567.new", ".a.sqlite.123-01234567.new"])
def test_what_another_machine_or_an_earlier_version_made_is_removed_when_it_is_old(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    remove_orphans(tmp_path)
    assert (tmp_path / name).exists()
    old = time.time() - ORPHAN_SECONDS - 60
    os.utime(tmp_path / name, (old, old))
    remove_orphans(tmp_path)
    assert not (tmp_path / name).exists()


def test_the_number_of_a_later_process_protects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = temporary_name("a")
    (tmp_path / mine).touch()
    monkeypatch.setattr(temporaries, "started", lambda pid: "1")
    remove_orphans(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_long_names_fit_and_missing_folders_are_no_error(tmp_path: Path) -> None:
    (tmp_path / temporary_name("x" * 250)).touch()
    remove_orphans(tmp_path / "nowhere")


def test_a_file_is_written_wholly_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file"
    write_whole(file, "first")
    file.chmod(0o600)
    write_whole(file, "second")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("second", 0o600)

    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as opened:
            opened.write(text[:1])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write_whole(file, "third")
    assert failure.value.filename == str(file)
    assert file.read_text() == "second"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
