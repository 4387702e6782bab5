"""A campaign of processes killed (SIGKILL) at random moments while they write, export, merge or migrate: the next open
finds every store readable, with all that was acknowledged, and leaves no other file.

``pytest tests/cache/test_kills.py --kills 200 --timeout 0`` kills so many; a few by default. The moments are random,
the seed is fixed.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from doratune.cache.store import Store

from .test_migrations import RELEASED
from .test_processes import CROWD

SAMPLE = 8
SECONDS = 0.25
"""The longest time from the first acknowledgement to the kill: several commits, and several exports."""

_BEGIN = CROWD.split("fork =")[0] + "print('begins', flush=True)\n"

WRITE = """
with Store.open("store.sqlite", create=True) as store:
    for rank in range(1, 100_000):
        store.put(entry(rank))
        print(rank, flush=True)
"""

EXPORT = """
with Store.open("store.sqlite", create=True) as store:
    for rank in range(1, 41):
        store.put(entry(rank))
    for number in range(100_000):
        store.export(f"export-{number % 3}.sqlite", replace=True)
        print(f"export-{number % 3}.sqlite", flush=True)
"""

MERGE = """
from doratune.cache.merge import carry_out, plan
with Store.open("other.sqlite", create=True) as other, Store.open("store.sqlite", create=True) as store:
    for first in range(1, 100_000, 20):
        for rank in range(first, first + 20):
            other.put(entry(rank))
        carry_out(plan([other], store), store)
        for rank in range(first, first + 20):
            print(rank, flush=True)
"""

MIGRATE = """
import os, shutil
for number in range(100_000):
    shutil.copyfile("older.sqlite", "older-copy.sqlite")
    os.replace("older-copy.sqlite", f"migrated-{number}.sqlite")
    with Store.open(f"migrated-{number}.sqlite") as store:
        assert len(store.entries()) >= 2
    print(f"migrated-{number}.sqlite", flush=True)
"""


def _older(folder: Path, chance: random.Random) -> None:
    with closing(sqlite3.connect(folder / "older.sqlite")) as connection:
        connection.executescript(chance.choice(RELEASED).read_text(encoding="utf-8"))


WORK: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "write": (WRITE, lambda folder, chance: None),
    "export": (EXPORT, lambda folder, chance: None),
    "merge": (MERGE, lambda folder, chance: None),
    "migrate": (MIGRATE, _older),
}


def killed(script: str, folder: Path, after: float) -> list[str]:
    """Run ``script`` in ``folder``, kill it so many seconds after it has begun, and return what it acknowledged."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _BEGIN + script]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(after)
        assert process.poll() is None, "it was to work until it is killed"
        os.kill(process.pid, signal.SIGKILL)
        return [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("work", WORK)
def test_a_process_that_is_killed_costs_nothing_that_it_acknowledged(
    work: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script, prepare = WORK[work]
    kills = (int(request.config.getoption("--kills")) or SAMPLE) // len(WORK)
    chance = random.Random(work)
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder, chance)
        said = killed(script, folder, chance.uniform(0.0, SECONDS))
        Store.open(folder / "store.sqlite", create=True).close()  # the next to come removes what the killed one left
        stores = [path for path in folder.glob("*.sqlite") if not path.name.startswith((".", "older"))]
        for path in stores:
            with Store.open(path) as store:
                assert store.verify() == [], (number, path.name)
        if work in ("write", "merge"):
            with Store.open(folder / "store.sqlite", readonly=True) as store:
                ranks = {entry.spec.rank for entry in store.entries()}
            assert ranks >= {*map(int, said)}, number
        else:
            assert {path.name for path in stores} >= {*said}, number
            for name in said:
                with Store.open(folder / name, readonly=True) as store:
                    assert len(store.entries()) >= (40 if work == "export" else 2), (number, name)
        names = {path.name for path in stores} | ({"older.sqlite", "older-copy.sqlite"} if work == "migrate" else set())
        logs = {f"{name}{suffix}" for name in names for suffix in ("-wal", "-shm")}
        left = {path.name for path in folder.iterdir()} - names - logs
        assert not left, (number, left)
