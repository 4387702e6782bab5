"""``doratune bench``: parse, run a benchmark, print. Nothing heavy is loaded before a benchmark runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .results import Outcome, Row

F = Callable[..., Any]

_PATH = click.Path(path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


_peer_option = click.option(
    "--peer-path", type=_PATH, metavar="DIR", help="A checkout of sockeye44/dorafactors to run too."
)


def _results_options(rounds: int) -> Callable[[F], F]:
    """The options that every benchmark has; ``rounds`` is the default number of timing rounds."""
    options = (
        _json_option,
        click.option("--targets", is_flag=True, help="Print how the results stand against the targets."),
        click.option("--commit", help="The commit measured; asked of git by default."),
        click.option("--rounds", type=click.IntRange(min=2), default=rounds, show_default=True, help="Timing rounds."),
        click.option("--output", type=_PATH, metavar="FILE", help="Write the results here as JSON."),
    )

    def add(command: F) -> F:
        for option in options:
            command = option(command)
        return command

    return add


def _finish(
    outcome: Outcome,
    versions: Mapping[str, str],
    *,
    output: Path | None,
    commit: str | None,
    targets: bool,
    as_json: bool,
) -> None:
    """Write and print what was measured; exit with 1 after a failure."""
    from .results import document, environment, results_table

    text = document(environment(commit, **versions), outcome.rows)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text, nl=False)
    else:
        _print(results_table(outcome.rows))
    if targets:
        _print_targets([outcome.rows], to_stderr=as_json)
    for note in dict.fromkeys(outcome.notes):
        click.echo(f"note: {note}", err=True)
    for failure in outcome.failures:
        click.echo(f"inaccurate: {failure}", err=True)
    if outcome.failures:
        sys.exit(1)


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _print(table: Any, *, to_stderr: bool = False) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    Console(stderr=to_stderr, width=None if console.is_terminal else 200).print(table)


def _print_targets(runs: list[list[Row]], *, to_stderr: bool = False) -> None:
    from .targets import judge, targets_table

    verdicts = judge(*runs)
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
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operation, or the projections q,k,v or gate,up; repeatable.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Only this peer beside doratune; repeatable.")
@_peer_option
@_results_options(rounds=30)
def kernels(ops: tuple[str, ...], peers: tuple[str, ...], rounds: int, peer_path: Path | None, **results: Any) -> None:
    """The kernels on a GPU: against PEFT, torch.compile, dense B@A, cuBLAS, dorafactors and the floor.

    Also the projections of one x (q,k,v and gate,up): h in one product, beside one product for each.
    """
    from .kernels import bench_kernels

    dorafactors, versions = _peer(peer_path)
    outcome = bench_kernels(ops=ops, peers=peers, rounds=rounds, dorafactors=dorafactors, progress=_progress)
    _finish(outcome, versions, **results)


def _adapter_options(command: F) -> F:
    """The options of benchmarks that put adapters on layers."""
    for option in (
        click.option("--device", metavar="DEVICE", help="cuda, cuda:1, …; cpu only tries the command out."),
        click.option(
            "--impl", "implementations", multiple=True, metavar="NAME", help="Only this implementation; repeatable."
        ),
        click.option(
            "--op",
            "ops",
            type=click.Choice(["step", "inference"]),
            multiple=True,
            default=("step", "inference"),
            show_default=True,
            help="What to measure; repeatable.",
        ),
        click.option("--modes", default="autocast,bf16", show_default=True, help="fp32 adapters under autocast, bf16."),
        click.option("--rank", type=click.IntRange(min=1), default=384, show_default=True, help="Adapter rank."),
        click.option("--config", type=_PATH, metavar="FILE", help="A Hugging Face config.json instead of llama-8b."),
    ):
        command = option(command)
    return command


@bench.command()
@_adapter_options
@click.option("--model", default="llama-8b", show_default=True, metavar="NAME", help="A known model's projections.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(4096,),
    show_default=True,
    help="Rows of x; repeatable.",
)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Also under torch.compile.")
@_peer_option
@_results_options(rounds=20)
def layer(
    peer_path: Path | None, output: Path | None, commit: str | None, targets: bool, as_json: bool, **request: Any
) -> None:
    """One linear layer with an adapter: PEFT's LoRA and DoRA, dorafactors, doratune; forward and backward."""
    from .layer import bench_layer

    dorafactors, versions = _peer(peer_path)
    outcome = bench_layer(dorafactors=dorafactors, progress=_progress, **request)
    _finish(outcome, versions, output=output, commit=commit, targets=targets, as_json=as_json)


@bench.command()
@_adapter_options
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers, instead of the config's number.")
@click.option("--seq", type=click.IntRange(min=2), default=4096, show_default=True, help="Tokens of the one sequence.")
@click.option(
    "--loss-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="The loss is over the last ones."
)
@click.option(
    "--checkpointing/--no-checkpointing", default=True, show_default=True, help="Gradient checkpointing in the step."
)
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="Also under torch.compile.")
@_peer_option
@_results_options(rounds=5)
def model(
    peer_path: Path | None, output: Path | None, commit: str | None, targets: bool, as_json: bool, **request: Any
) -> None:
    """A whole model of random weights, by default of Llama-8B's shape: training step, inference, peak memory."""
    from .model import bench_model

    dorafactors, versions = _peer(peer_path)
    outcome = bench_model(dorafactors=dorafactors, progress=_progress, **request)
    _finish(outcome, versions, output=output, commit=commit, targets=targets, as_json=as_json)


@bench.command()
@_results_options(rounds=30)
def host(rounds: int, **results: Any) -> None:
    """What a call costs the host: a load_kernel hit and a launch, beside Triton's own ways to launch."""
    from .host import bench_host

    _finish(bench_host(rounds=rounds, progress=_progress), {}, **results)


@bench.command("targets")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_json_option
def bench_targets(files: tuple[Path, ...], as_json: bool) -> None:
    """Print how the results in FILES stand against the targets. Needs no GPU."""
    from .results import SCHEMA, read_rows
    from .targets import judge

    runs = [read_rows(file) for file in files]
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "verdicts": [verdict.row() for verdict in judge(*runs)]}, indent=2))
    else:
        _print_targets(runs)
