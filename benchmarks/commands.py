"""``doratune bench``: parse, run a benchmark, print. Nothing heavy is loaded before a benchmark runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .results import Row

F = Callable[..., Any]

_PATH = click.Path(path_type=Path)


def _results_options(command: F) -> F:
    """The options that every benchmark has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output."),
        click.option("--targets", is_flag=True, help="Print how the results stand against the targets."),
        click.option("--commit", help="The commit measured; asked of git by default."),
        click.option("--peer-path", type=_PATH, metavar="DIR", help="A checkout of sockeye44/dorafactors to run too."),
        click.option("--rounds", type=click.IntRange(min=2), default=30, show_default=True, help="Timing rounds."),
        click.option("--output", type=_PATH, metavar="FILE", help="Write the results here as JSON."),
    ):
        command = option(command)
    return command


def _finish(
    rows: list[Row],
    env: Mapping[str, str],
    *,
    output: Path | None,
    as_json: bool,
    targets: bool,
    notes: list[str],
    failures: list[str],
) -> None:
    """Write and print what was measured; exit with 1 after a failure."""
    from .results import document, results_table

    text = document(env, rows)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text, nl=False)
    else:
        _print(results_table(rows))
    if targets:
        _print_targets(rows, to_stderr=as_json)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    for failure in failures:
        click.echo(f"inaccurate: {failure}", err=True)
    if failures:
        sys.exit(1)


def _print(table: Any, *, to_stderr: bool = False) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    Console(stderr=to_stderr, width=None if console.is_terminal else 200).print(table)


def _print_targets(rows: list[Row], *, to_stderr: bool = False) -> None:
    from .targets import judge, targets_table

    verdicts = judge(rows)
    _print(targets_table(verdicts), to_stderr=to_stderr)
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
    click.echo(", ".join(counts) or "no targets for these benchmarks", err=True)


def _peer(path: Path | None) -> tuple[Any, dict[str, str]]:
    """dorafactors, where a checkout is given, and its entry in the environment."""
    if path is None:
        return None, {}
    from .dorafactors import Dorafactors

    peer = Dorafactors(path)
    return peer, {"dorafactors": peer.version}


@click.group()
def bench() -> None:
    """Measure doratune beside what people run today, in one process and interleaved."""


@bench.command()
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operation; repeatable.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Only this peer beside doratune; repeatable.")
@_results_options
def kernels(
    ops: tuple[str, ...],
    peers: tuple[str, ...],
    output: Path | None,
    rounds: int,
    peer_path: Path | None,
    commit: str | None,
    targets: bool,
    as_json: bool,
) -> None:
    """The kernels on a GPU: against PEFT, torch.compile, dense B@A, cuBLAS, dorafactors and the floor."""
    from .kernels import bench_kernels
    from .results import environment

    dorafactors, versions = _peer(peer_path)
    outcome = bench_kernels(
        ops=ops,
        peers=peers,
        rounds=rounds,
        dorafactors=dorafactors,
        progress=lambda line: click.echo(line, err=True),
    )
    _finish(
        outcome.rows,
        environment(commit, **versions),
        output=output,
        as_json=as_json,
        targets=targets,
        notes=outcome.notes,
        failures=outcome.failures,
    )


@bench.command("targets")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def bench_targets(files: tuple[Path, ...]) -> None:
    """Print how the results in FILES stand against the targets. Needs no GPU."""
    from .results import read_rows

    _print_targets([row for file in files for row in read_rows(file)])
