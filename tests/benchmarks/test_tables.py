"""A recorded table reads back as it was written, and a damaged one is refused with the place that is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doratune.benchmarks.tables.read import (
    CENSORED,
    FINAL,
    SHORT,
    SpecTable,
    Table,
    TableError,
    Timing,
    read_table,
    read_tables,
    recorded,
    table_path,
    write_table,
)
from doratune.codegen.spec import Config, KernelSpec

SPEC = KernelSpec.create("compose_forward", d_out=4096, tokens=4096, dtype="bf16", gpu="h100")
FAST, NEAR, NOISY, SLOW, BROKEN = (
    Config.create("tile", block_t=block_t, block_n=256, num_warps=4, num_stages=2) for block_t in (1, 2, 4, 8, 16)
)
DATA: dict[str, Any] = {
    "schema": 1,
    "gpu": "h100",
    "env": {"gpu_name": "NVIDIA H100 80GB HBM3", "driver": "580"},
    "configs": [str(config) for config in (FAST, NEAR, NOISY, SLOW, BROKEN)],
    "specs": {
        str(SPEC): {
            "us": [[0, 10.0, FINAL], [1, 10.1, FINAL, 10.3], [2, 9.9, SHORT], [3, 30.0, CENSORED]],
            "rejected": [[4, "inaccurate: y is off"]],
        }
    },
}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


def test_a_table_gives_each_configs_time_over_the_best_that_was_timed_in_turn(tmp_path: Path) -> None:
    table = read_table(write(table_path("h100", "compose_forward", tmp_path), DATA))
    assert (table.gpu, table.op, table.env["driver"], len(table)) == ("h100", "compose_forward", "580", 1)
    part = table[SPEC]
    assert part.best == (FAST, 10.0)
    assert part.regret(NEAR) == pytest.approx(1.01)
    assert part.times[NEAR].short_us == 10.3
    assert part.regret(NOISY) == 1.0, "a short measurement does not beat the winner of the final"
    assert part.regret(SLOW) == 3.0
    assert part.regret(BROKEN) is None
    assert part.regret(Config.create("tile", block_t=32, block_n=64, num_warps=4, num_stages=2)) is None
    assert part.rejected == {BROKEN: "inaccurate: y is off"}


def test_without_a_final_the_best_is_the_fastest_that_was_measured(tmp_path: Path) -> None:
    part = SpecTable(SPEC, {FAST: Timing(10.0, SHORT), SLOW: Timing(5.0, CENSORED)})
    assert part.best == (FAST, 10.0)


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = read_table(write(table_path("h100", "compose_forward", tmp_path), DATA))
    path = table_path("h100", "again", tmp_path)
    write_table(table, path)
    again = read_table(path)
    assert again == Table(path, table.gpu, table.op, table.env, table.specs)
    written = path.read_bytes()
    write_table(table, path)
    assert path.read_bytes() == written
    assert recorded(tmp_path) == {"h100": ("again", "compose_forward")}
    assert len(read_tables("h100", tmp_path)) == 2


Damage = Callable[[dict[str, Any]], object]


def times(data: dict[str, Any]) -> list[Any]:
    rows = data["specs"][str(SPEC)]["us"]
    assert isinstance(rows, list)
    return rows


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data.update(schema=2), "schema is 2; this doratune reads schema 1"),
        (lambda data: data.pop("configs"), "configs is missing"),
        (lambda data: data.update(gpu="h200"), "for another GPU than the table's, h200"),
        (lambda data: data["configs"].__setitem__(0, "tile"), "config 'tile' lacks"),
        (lambda data: data["configs"].__setitem__(1, str(FAST)), "a config twice"),
        (lambda data: data["specs"].clear(), "no specs"),
        (lambda data: data["specs"].update({"compose_backwards@h100": {}}), "unknown operation"),
        (lambda data: times(data).append([5, 1.0, SHORT]), "5 is no index of the 5 configs"),
        (lambda data: times(data).append([-1, 1.0, SHORT]), "-1 is no index"),
        (lambda data: times(data).append([0, 1.0, SHORT]), "is there twice"),
        (lambda data: times(data).append([4, 1.0, SHORT]), "both measured and rejected"),
        (lambda data: times(data)[0].__setitem__(1, -1.0), "takes -1.0 microseconds"),
        (lambda data: times(data)[0].__setitem__(1, "fast"), "takes 'fast' microseconds"),
        (lambda data: times(data)[0].__setitem__(2, 7), "kind 7"),
        (lambda data: times(data).clear(), "no config with a measured time"),
    ],
)
def test_a_damaged_table_is_refused_with_the_file_and_the_place(damage: Damage, complaint: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(DATA))
    damage(data)
    path = write(tmp_path / "h100" / "compose_forward.json.gz", data)
    with pytest.raises(TableError) as caught:
        read_table(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_cut_file_is_refused(tmp_path: Path) -> None:
    path = table_path("h100", "compose_forward", tmp_path)
    with pytest.raises(TableError, match="no recorded table"):
        read_table(path)
    write(path, DATA)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TableError, match="not gzipped JSON"):
        read_table(path)
    with pytest.raises(TableError, match=r"no recorded tables of 'h200'.*there: h100"):
        read_tables("h200", tmp_path)
