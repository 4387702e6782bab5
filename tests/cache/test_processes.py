"""Processes share a store without losing anything: sixteen make it at one moment, a killed one keeps its commits."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from doratune.cache.store import Store

# Each process opens (and so makes) the store and puts an entry of its own, all behind one barrier, several times over.
# The rounds run in a process of their own, because a fork of pytest would take its threads' locks along.
CROWD = """
import multiprocessing, sys
from dataclasses import replace
from doratune.cache.entry import Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.codegen.spec import Config, KernelSpec

SPEC = KernelSpec.create("lora_compose", d_out=4096, rank=1, tokens=1, dtype="bf16", adapter="bf16")
CONFIG = Config.create("tile", num_warps=4, num_stages=2)

def entry(rank):
    where = Environment("h200", "sm_90", "")
    return Entry(replace(SPEC, rank=rank), CONFIG, "t", "s", "", Evaluation("predicted"), where)

def join(barrier, place, rank):
    barrier.wait()
    with Store.open(place, create=True) as store:
        assert store.put(entry(rank))

fork = multiprocessing.get_context("fork")
for place in sys.argv[1:]:
    barrier = fork.Barrier(16)
    crowd = [fork.Process(target=join, args=(barrier, place, rank)) for rank in range(1, 17)]
    for process in crowd: process.start()
    for process in crowd: process.join()
    assert [process.exitcode for process in crowd] == [0] * 16, place
"""

WRITER = (
    CROWD.split("fork =")[0]
    + """
with Store.open(sys.argv[1], create=True) as store:
    for rank in range(1, 100_000):
        store.put(entry(rank))
        print(rank, flush=True)
"""
)


def _without_hard_links(script: str) -> str:
    return "import os\ndef link(*_): raise PermissionError(1, 'no hard links here')\nos.link = link\n" + script


@pytest.mark.parametrize("script", [CROWD, _without_hard_links(CROWD)], ids=["hard links", "no hard links"])
def test_sixteen_processes_make_one_sqlite_store_at_one_moment(
    tmp_path: Path, script: str, request: pytest.FixtureRequest
) -> None:
    """``--races 500 --timeout 0`` has each of both ways make so many stores."""
    rounds = int(request.config.getoption("--races")) or 3
    places = [str(tmp_path / f"store-{number}.sqlite") for number in range(rounds)]
    crowd = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
    assert crowd.returncode == 0, crowd.stderr
    for place in places:
        with Store.open(place, readonly=True) as store:
            assert sorted(entry.spec.rank for entry in store.entries()) == list(range(1, 17))
        with closing(sqlite3.connect(place)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not list(tmp_path.glob(".*"))  # nothing left of the race


def test_sixteen_processes_make_one_postgresql_store_at_one_moment(postgresql_url: str) -> None:
    crowd = subprocess.run([sys.executable, "-c", CROWD, postgresql_url], capture_output=True, text=True)
    assert crowd.returncode == 0, crowd.stderr
    with Store.open(postgresql_url) as store:
        assert len(store.entries()) == 16


@pytest.mark.parametrize("enough", [3, 40])
def test_a_writer_killed_in_the_middle_loses_nothing_committed(place: str, enough: int) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    committed = [int(writer.stdout.readline()) for _ in range(enough)]
    os.kill(writer.pid, signal.SIGKILL)
    committed += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    with Store.open(place) as store:
        assert {entry.spec.rank for entry in store.entries()} >= set(committed)
        assert store.verify() == []
