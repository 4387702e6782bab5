"""``doratune bench``: parse, run a benchmark, print. Nothing heavy is loaded before a benchmark runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import json_option, message, print_json, print_table

if TYPE_CHECKING:
    from .results import Outcome, Row

F = Callable[..., Any]
Measured = tuple["Outcome", Mapping[str, str]]
"""What a benchmark found, and the versions of its peers."""

_PATH = click.Path(path_type=Path)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; help lists them in this order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _with_results(rounds: int) -> Callable[[Callable[..., Measured]], F]:
    """Make a command of a function that measures: with the options of every benchmark, its results written and printed.

    ``rounds`` is the default number of timing rounds. The command exits with 1 if a kernel is inaccurate.
    """
    add = _options(
        click.option("--output", type=_PATH, metavar="FILE", help="Write the results here as JSON."),
        click.option("--rounds", type=click.IntRange(min=2), default=rounds, show_default=True, help="Timing rounds."),
        click.option("--commit", help="The commit measured; read from git by default."),
        click.option("--targets", is_flag=True, help="Print how the results stand against the targets."),
        json_option,
    )

    def command_of(measure: Callable[..., Measured]) -> F:
        @functools.wraps(measure)
        def command(output: Path | None, commit: str | None, targets: bool, as_json: bool, **request: Any) -> None:
            outcome, versions = measure(**request)
            _write(outcome, versions, output=output, commit=commit, as_json=as_json)
            if targets:
                _print_targets([outcome.rows], to_stderr=as_json)
            for note in dict.fromkeys(outcome.notes):
                message(f"note: {note}")
            for failure in outcome.failures:
                message(f"inaccurate: {failure}")
            if outcome.failures:
                sys.exit(1)

        return add(command)

    return command_of


def _write(
    outcome: Outcome, versions: Mapping[str, str], *, output: Path | None, commit: str | None, as_json: bool
) -> None:
    from .results import document, environment, results_table

    text = document(environment(commit, **versions), outcome.rows)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text, nl=False)
    else:
        print_table(results_table(outcome.rows))


def _print_targets(runs: list[list[Row]], *, to_stderr: bool = False) -> None:
    from .targets import judge, targets_table

    verdicts = judge(*runs)
    print_table(targets_table(verdicts), to_stderr=to_stderr)
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
    message(", ".join(counts) or "no targets for these benchmarks")


def _peer(path: Path | None) -> tuple[Any, dict[str, str]]:
    """dorafactors, where a checkout is given, and its entry in the environment."""
    if path is None:
        return None, {}
    from .dorafactors import Dorafactors

    peer = Dorafactors(path)
    return peer, {"dorafactors": peer.version}


_peer_option = click.option(
    "--peer-path", type=_PATH, metavar="DIR", help="A checkout of sockeye44/dorafactors to run too."
)

_adapter_options = _options(
    click.option("--config", type=_PATH, metavar="FILE", help="A Hugging Face config.json instead of llama-8b."),
    click.option("--rank", type=click.IntRange(min=1), default=384, show_default=True, help="Adapter rank."),
    click.option("--modes", default="autocast,bf16", show_default=True, help="fp32 adapters under autocast, bf16."),
    click.option(
        "--op",
        "ops",
        type=click.Choice(["step", "inference"]),
        multiple=True,
        default=("step", "inference"),
        show_default=True,
        help="What to measure; repeatable.",
    ),
    click.option(
        "--impl", "implementations", multiple=True, metavar="NAME", help="Only this implementation; repeatable."
    ),
    click.option("--device", metavar="DEVICE", help="cuda, cuda:1, …; cpu only to try the command out."),
)
"""Of benchmarks that put adapters on layers."""


@click.group()
def bench() -> None:
    """Measure doratune beside what people run today, in one process and interleaved."""


@bench.command()
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operation, q,k,v or gate,up; repeatable.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Only this peer beside doratune; repeatable.")
@_peer_option
@_with_results(rounds=30)
def kernels(peer_path: Path | None, **request: Any) -> Measured:
    """The kernels on a GPU: against PEFT, torch.compile, dense B@A, cuBLAS, dorafactors and the floor.

    Also the projections of one x (q,k,v and gate,up): with one product for all h, and with one for each.
    """
    from .kernels import bench_kernels

    dorafactors, versions = _peer(peer_path)
    return bench_kernels(dorafactors=dorafactors, progress=message, **request), versions


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
@_with_results(rounds=20)
def layer(peer_path: Path | None, **request: Any) -> Measured:
    """One linear layer with an adapter: PEFT's LoRA and DoRA, dorafactors, doratune; forward and backward."""
    from .layer import bench_layer

    dorafactors, versions = _peer(peer_path)
    return bench_layer(dorafactors=dorafactors, progress=message, **request), versions


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
@_with_results(rounds=5)
def model(peer_path: Path | None, **request: Any) -> Measured:
    """A whole model of random weights, by default of Llama-8B's shape: training step, inference, peak memory."""
    from .model import bench_model

    dorafactors, versions = _peer(peer_path)
    return bench_model(dorafactors=dorafactors, progress=message, **request), versions


@bench.command()
@_with_results(rounds=30)
def host(rounds: int) -> Measured:
    """What a call costs the host: a load_kernel hit and a launch, beside Triton's own ways to launch."""
    from .host import bench_host

    return bench_host(rounds=rounds, progress=message), {}


@bench.command()
@click.option("--gpu", metavar="GPU", help="The GPU whose recorded tables are searched; by default every one.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operation; repeatable.")
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    default=("model",),
    show_default=True,
    metavar="NAME",
    help="model (doratune's own), tpe, tpe-univariate, random, gp (needs scipy), cma-es (needs cmaes); repeatable.",
)
@click.option(
    "--effort",
    "efforts",
    multiple=True,
    default=("quick", "standard", "full"),
    show_default=True,
    metavar="LEVEL",
    help="How hard the searches try; repeatable.",
)
@click.option("--trials", type=click.IntRange(min=1), help="Instead of the effort's number of configs for each kernel.")
@click.option("--seeds", type=click.IntRange(min=1), default=30, show_default=True, help="Searches of each kernel.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; by default one for each core.")
@click.option("--output", type=_PATH, metavar="FILE", help="Write the results here as JSON.")
@click.option("--commit", help="The commit measured; read from git by default.")
@json_option
def search(gpu: str | None, output: Path | None, commit: str | None, as_json: bool, **request: Any) -> None:
    """How good the tuner's search is: replayed over recorded tables, against the best config of each. Needs no GPU."""
    from ..errors import UsageError
    from .results import document, measured_commit
    from .tables.read import recorded
    from .tables.search_quality import bench_search, quality_table

    gpus = [gpu] if gpu is not None else [*recorded()]
    if output is not None and len(gpus) > 1:
        raise UsageError(f"--output takes the results of one GPU; name one with --gpu ({', '.join(gpus)})")
    for slug in gpus:
        rows, env = bench_search(slug, progress=message, **request)
        text = document({**env, "doratune_commit": measured_commit(commit)}, rows)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        if as_json:
            click.echo(text, nl=False)
        else:
            print_table(quality_table(slug, rows))


@bench.command("targets")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def bench_targets(files: tuple[Path, ...], as_json: bool) -> None:
    """Print how the results in FILES stand against the targets. Needs no GPU."""
    from .results import read_rows
    from .targets import judge

    runs = [read_rows(file) for file in files]
    if as_json:
        print_json({"verdicts": [verdict.row() for verdict in judge(*runs)]})
    else:
        _print_targets(runs)
