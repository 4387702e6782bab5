"""Every part of ``benchmarks/evidence.sh`` is a command that ``doratune bench`` understands, and a failure is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import doratune
from doratune.benchmarks.commands import bench
from doratune.cache_commands import cache

SCRIPT = Path(doratune.__file__).parent / "benchmarks" / "evidence.sh"
PARTS = [part for line in re.findall(r"^    ([\w. |-]+)\)", SCRIPT.read_text(), re.M) for part in line.split(" | ")]


def _run(folder: Path, body: str, *parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), **variables}
    command = ["bash", str(SCRIPT), str(folder / "out"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_script_has_parts() -> None:
    assert {"large", "0.5b", "norms", "fsdp2"} <= {*PARTS}


@pytest.mark.parametrize("variables", [{}, {"AXOLOTL": "/x", "COMMIT": "abc"}], ids=["alone", "peers"])
def test_every_part_is_a_command_that_bench_understands(tmp_path: Path, variables: dict[str, str]) -> None:
    calls = tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    done = _run(tmp_path, body, *PARTS, **variables)
    assert done.returncode == 0, done.stderr
    commands = [json.loads(line) for line in calls.read_text().splitlines()]
    builds = [command for command in commands if command[2] == "cache"]
    for command in builds:
        build = cache.commands[command[3]]
        assert build.make_context(command[3], command[4:]).params["output"]
        commands.remove(command)
    assert len(builds) == 2
    assert len(commands) == len(PARTS)
    files = set()
    for module, name, group, *arguments in commands:
        assert (module, name, group) == ("-m", "doratune.cli", "bench")
        command = bench.commands[arguments[0]]
        parsed = command.make_context(arguments[0], arguments[1:]).params
        files.add(parsed["output"])
        assert parsed["commit"] == variables.get("COMMIT")
    assert len(files) == len(PARTS)


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = _run(tmp_path, "print('no GPU'); sys.exit('norms' in sys.argv)", "norms", "host")
    assert done.returncode == 1
    assert "norms: exit code 1" in done.stdout
    assert "== host" in done.stdout


def test_the_part_without_a_compiler_runs_on_stored_binaries_alone(tmp_path: Path) -> None:
    body = (
        "import os; print(sys.argv[3], os.environ.get('DORATUNE_NO_JIT'), os.environ.get('CC'), '--store' in sys.argv)"
    )
    done = _run(tmp_path, body, "no-jit", CC="gcc")
    assert done.returncode == 0, done.stderr
    assert "cache None gcc False" in done.stdout
    assert "bench 1 /no/compiler True" in done.stdout
    failed = _run(tmp_path, "sys.exit('build' in sys.argv)", "no-jit")
    assert failed.returncode == 1
    assert "no-jit: no store" in failed.stdout


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = _run(tmp_path, "", "everything")
    assert done.returncode == 2
    assert "unknown part everything" in done.stderr
