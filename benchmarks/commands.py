"""``doratune bench``: parse, run a benchmark, print. Nothing heavy is loaded before a benchmark runs."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DoratuneError, UsageError
from ..printable import shortened
from ..temporaries import write_whole
from ..terminal.console import (
    FiniteRange,
    NamedPath,
    Seconds,
    config_option,
    counting,
    jobs_range,
    json_option,
    line,
    message,
    print_json,
    print_table,
    rank_range,
    store_option,
)
from ..text_file import is_results
from .quality.sizes import SIZES

if TYPE_CHECKING:
    from .results import Outcome
    from .targets import Verdict

F = Callable[..., Any]
Measured = tuple["Outcome", Mapping[str, str]]
"""What a benchmark found, and the versions of its peers."""

_PATH = NamedPath()
_COUNT, _SEVERAL = click.IntRange(min=1, max=2**24), click.IntRange(min=2, max=2**24)


class _Output(NamedPath):
    """A file to write. What keeps it from being written is said before the benchmark runs, which takes minutes."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-":
            self.fail("it is no file; --json prints on standard output", param, ctx)
        try:
            path = Path(os.fsdecode(super().convert(value, param, ctx))).expanduser()
            if path.exists() and not (path.is_file() or path.is_char_device()):
                self.fail("it is not a file that can be written at once; name another file", param, ctx)
            missing = [each for each in path.absolute().parents if not each.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(path if path.exists() else path.parent, os.W_OK)
            for folder in missing:  # made when there is something to write
                folder.rmdir()
        except (OSError, ValueError, RuntimeError) as error:
            self.fail(f"cannot be written ({getattr(error, 'strerror', None) or error}); name another file", param, ctx)
        if not writable:
            self.fail("cannot be written; name another file", param, ctx)
        return path


class _Results(_Output):
    """A results file to write. An earlier one is replaced, and any other file is left as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if path.is_file() and not is_results(path):
            self.fail(
                f"{shortened(str(path), 200)} exists and is no results file; name another, or remove it", param, ctx
            )
        return path


def _write_results(output: Path, text: str) -> None:
    """Write the results wholly or not at all, in a folder that is made if it is missing."""
    try:
        write_whole(output, text)
    except OSError as error:
        reason = error.strerror or error
        raise DoratuneError(f"--output {output}: the results were not written ({reason}); name another file") from error


_OUTPUT, _PICTURE = _Results(), _Output()
_NO_ROOM = re.compile(r"out of memory|allocate|storage size|Overflow when unpacking|numel: integer|larger than")
"""In PyTorch's errors for tensors that are too large."""


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
        click.option("--output", type=_OUTPUT, metavar="FILE", help="Write the results here as JSON."),
        click.option("--rounds", type=_SEVERAL, default=rounds, show_default=True, help="Timing rounds."),
        click.option("--commit", help="The commit measured; read from git by default."),
        click.option("--targets", is_flag=True, help="Print how the results stand against the targets."),
        json_option,
    )

    def command_of(measure: Callable[..., Measured]) -> F:
        @functools.wraps(measure)
        def command(output: Path | None, commit: str | None, targets: bool, as_json: bool, **request: Any) -> None:
            with _enough_memory():
                outcome, versions = measure(**request)
            _write(outcome, versions, output=output, commit=commit, as_json=as_json)
            if targets:
                from .targets import judge

                _print_targets(judge(outcome.rows), to_stderr=as_json)
            for note in dict.fromkeys(outcome.notes):
                message(f"note: {note}")
            for failure in outcome.failures:
                message(f"inaccurate: {failure}")
            if outcome.failures:
                sys.exit(1)

        return add(command)

    return command_of


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn PyTorch's errors for tensors that do not fit, or could fit nowhere, into a message."""
    try:
        yield
    except (MemoryError, RuntimeError, TypeError, OverflowError) as error:
        if not (isinstance(error, MemoryError) or _NO_ROOM.search(str(error))):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DoratuneError(f"the benchmark does not fit into memory ({reason}); choose smaller sizes") from error


def _write(
    outcome: Outcome, versions: Mapping[str, str], *, output: Path | None, commit: str | None, as_json: bool
) -> None:
    from .results import document, environment, ratios_table, results_table

    text = document(environment(commit, **versions), outcome.rows)
    if output is not None:
        _write_results(output, text)
    if as_json:
        click.echo(text, nl=False)
    else:
        print_table(results_table(outcome.rows))
        if any("ratio" in row for row in outcome.rows):
            print_table(ratios_table(outcome.rows))


def _print_targets(verdicts: Sequence[Verdict], *, to_stderr: bool = False) -> None:
    from .targets import targets_table

    print_table(targets_table(verdicts), to_stderr=to_stderr)
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
    message(", ".join(counts) or "no targets for these benchmarks")


def _peers(
    dorafactors: Path | None, axolotl: Path | None, unsloth: Path | None, liger: bool
) -> tuple[Any, dict[str, str]]:
    """The peers that take part, and their entries in the environment."""
    from .adapted import Peers

    peer, versions = _peer(dorafactors)
    functions: dict[str, Any] = {}
    if axolotl is not None:
        from .axolotl import Axolotl

        functions["axolotl"] = Axolotl(axolotl)
    if unsloth is not None:
        from .unsloth import Unsloth

        functions["unsloth"] = Unsloth(unsloth)
    versions.update({name: found.version for name, found in functions.items()})
    if liger:
        from .liger import liger_version

        versions["liger_kernel"] = liger_version()
    return Peers(peer, **functions, liger=liger), versions


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


def _op_option(*names: str) -> Callable[[F], F]:
    return click.option(
        "--op",
        "ops",
        type=click.Choice(names),
        multiple=True,
        default=("step", "inference"),
        show_default=True,
        help="What to measure; repeatable.",
    )


_quant_option = click.option(
    "--quant", type=click.Choice(["nf4", "int8", "fp8", "hqq"]), help="The adapted layers' W in this format."
)
_device_option = click.option("--device", metavar="DEVICE", help="cuda, cuda:1, …; cpu only to try the command out.")
_loss_option = click.option(
    "--loss-tokens",
    type=_COUNT,
    default=1024,
    show_default=True,
    help="The loss is over the last ones, of all sequences together.",
)
_checkpointing_option = click.option(
    "--checkpointing/--no-checkpointing", default=True, show_default=True, help="Gradient checkpointing in the step."
)
_context_option = click.option(
    "--context",
    type=_COUNT,
    default=256,
    show_default=True,
    help="Cached tokens of each, in --op decode.",
)


def _decode_option(counts: tuple[int, ...]) -> Callable[[F], F]:
    return click.option(
        "--decode-tokens",
        type=_COUNT,
        multiple=True,
        default=counts,
        show_default=True,
        help="Sequences that --op decode gives one more token each; repeatable.",
    )


_adapter_options = _options(
    click.option("--config", type=_PATH, metavar="FILE", help="A Hugging Face config.json instead of a known model."),
    click.option("--modes", default="autocast,bf16", show_default=True, help="fp32 adapters under autocast, bf16."),
    click.option(
        "--impl", "implementations", multiple=True, metavar="NAME", help="Only this implementation; repeatable."
    ),
    _quant_option,
    _device_option,
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
@_op_option("step", "inference")
@click.option("--rank", type=rank_range, default=384, show_default=True, help="Adapter rank.")
@click.option("--model", default="llama-8b", show_default=True, metavar="NAME", help="A known model's projections.")
@click.option(
    "--tokens",
    type=_COUNT,
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
@_op_option("step", "inference", "decode", "first-step")
@click.option(
    "--shape",
    type=click.Choice(["0.5b", "1b", "8b"]),
    default="8b",
    show_default=True,
    help="Sizes of Qwen2.5-0.5B, Llama-3.2-1B or Llama-3.1-8B, without --config.",
)
@click.option("--layers", type=_COUNT, help="Decoder layers, instead of the config's number.")
@click.option(
    "--rank",
    "ranks",
    type=_COUNT,
    multiple=True,
    default=(384,),
    show_default=True,
    help="Adapter rank; repeatable.",
)
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="Sequences.")
@click.option("--seq", type=_SEVERAL, default=4096, show_default=True, help="Tokens of a sequence.")
@_loss_option
@_checkpointing_option
@_decode_option((1, 4, 16))
@_context_option
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="Also under torch.compile.")
@_peer_option
@click.option(
    "--axolotl-path", type=_PATH, metavar="DIR", help="A checkout of axolotl, or its unpacked wheel, to run too."
)
@click.option(
    "--unsloth-path", type=_PATH, metavar="DIR", help="A checkout of Unsloth, or its unpacked wheel, to run too."
)
@click.option(
    "--parallel",
    type=click.Choice(["ddp", "fsdp2"]),
    help="Training steps on several GPUs instead: under DDP, or under FSDP2 with decoder layers as blocks.",
)
@click.option("--processes", type=jobs_range, default=2, show_default=True, help="Of --parallel, one for each GPU.")
@click.option(
    "--store", type=_PATH, metavar="FILE", help="Run --op first-step with this store too, which may hold binaries."
)
@click.option("--liger", is_flag=True, help="Liger's kernels in the model, for every implementation.")
@click.option(
    "--counts/--no-counts", default=True, show_default=True, help="Also count launches, and time the host alone."
)
@click.option(
    "--minutes",
    type=FiniteRange(min=0.0, max=1440.0, min_open=True),
    help="About how long to take at most: rounds are left out, then what has no time at all.",
)
@_with_results(rounds=5)
def model(
    peer_path: Path | None, axolotl_path: Path | None, unsloth_path: Path | None, liger: bool, **request: Any
) -> Measured:
    """A whole model of random weights, by default of Llama-8B's shape: training step, prefill, decode, peak memory."""
    from .model import bench_model

    peers, versions = _peers(peer_path, axolotl_path, unsloth_path, liger)
    return bench_model(peers=peers, progress=message, **request), versions


@bench.command()
@click.option("--model", metavar="NAME", help="A known model, such as llama-8b; see `doratune models`.")
@config_option
@_op_option("step", "inference", "decode")
@click.option("--rank", type=rank_range, default=16, show_default=True, help="Adapter rank.")
@click.option("--layers", type=_COUNT, help="Decoder layers at most; by default as many as fit.")
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="Sequences.")
@click.option("--seq", type=_SEVERAL, help="Tokens of a sequence; 2048 by default, 32 on a CPU.")
@_loss_option
@_checkpointing_option
@_decode_option((1,))
@_context_option
@click.option("--modes", default="autocast", show_default=True, help="autocast (fp32 adapters), bf16, or both.")
@_quant_option
@_device_option
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Also under torch.compile.")
@click.option("--liger/--no-liger", default=True, show_default=True, help="Also with Liger's kernels, if installed.")
@click.option(
    "--rounds",
    type=click.IntRange(min=6, max=2**24),  # an interval needs as many
    default=20,
    show_default=True,
    help="Timing rounds at most.",
)
@click.option(
    "--minutes",
    type=FiniteRange(min=0.0, max=1440.0, min_open=True),
    default=3.0,
    show_default=True,
    help="About how long to take; layers and rounds are cut to fit.",
)
@click.option("--output", type=_OUTPUT, metavar="FILE", help="Write the results here as JSON, as the others do.")
@click.option("--picture", type=_PICTURE, metavar="FILE", help="Draw the times into this .html, .svg or .png.")
@click.option("--commit", help="The commit measured; read from git by default.")
@json_option
def mine(output: Path | None, picture: Path | None, commit: str | None, as_json: bool, **request: Any) -> None:
    """Your own model on your GPU in minutes: PEFT's LoRA and DoRA and doratune, also with torch.compile and Liger.

    Weights are random; nothing is downloaded. It prints a table, how sure it is, and a text for an issue.
    """
    from .mine import Asked, bench_mine
    from .mine_picture import check_picture, draw
    from .mine_report import markdown, mine_table, place_of, values
    from .results import document, environment

    if picture is not None:
        check_picture(picture)
        if output is not None and output.resolve() == picture.resolve():
            raise UsageError("--output and --picture name the same file; name two")
    with _enough_memory():
        found = bench_mine(Asked(**request), progress=message)
    env = environment(commit, **found.versions)
    if output is not None:
        _write_results(output, document(env, found.outcome.rows))
    if as_json:
        print_json(values(found, env))
    else:
        print_table(mine_table(found))
        click.echo(f"\n{markdown(found, env)}", nl=False)
    if picture is not None:
        draw(found, place_of(found, env), picture)
    message(f"{found.layers} of {found.all_layers} layers, {found.seconds:.0f} s")
    for note in dict.fromkeys([*found.cuts, *found.outcome.notes]):
        message(f"note: {note}")
    for failure in found.outcome.failures:
        message(f"inaccurate: {failure}")
    if found.outcome.failures:
        sys.exit(1)


@bench.command()
@click.option("--model", "name", default="llama-8b", show_default=True, metavar="NAME", help="A known model's layers.")
@click.option(
    "--rank",
    "ranks",
    type=_COUNT,
    multiple=True,
    default=(16, 384),
    show_default=True,
    help="Adapter rank; repeatable.",
)
@click.option("--modes", default="autocast,bf16", show_default=True, help="fp32 adapters under autocast, bf16.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Only this peer beside doratune; repeatable.")
@click.option("--most-layers", type=_COUNT, help="Of each shape, where the GPU cannot hold all.")
@_with_results(rounds=9)
def norms(name: str, modes: str, peers: tuple[str, ...], **request: Any) -> Measured:
    """All norms of a model at once on a GPU: beside each layer's own launches, reading W, and the bare products."""
    from ..tuner.models import find_model
    from .norms import NORM_PEERS, bench_norms

    chosen = [mode.strip() for mode in modes.split(",")]
    return bench_norms(find_model(name), modes=chosen, peers=peers or NORM_PEERS, progress=message, **request), {}


@bench.command()
@click.option("--shape", "shapes", multiple=True, metavar="D_OUTxD_IN", help="Of W, such as 4096x4096; repeatable.")
@click.option("--rank", "ranks", type=click.IntRange(min=1), multiple=True, help="Adapter rank; repeatable.")
@click.option("--weight", "formats", multiple=True, metavar="FORMAT", help="A weight format, such as nf4; repeatable.")
@click.option("--modes", default="given,made", show_default=True, help="nW given, or made by the same kernel.")
@_with_results(rounds=9)
def packed(
    shapes: tuple[str, ...], ranks: tuple[int, ...], formats: tuple[str, ...], modes: str, **request: Any
) -> Measured:
    """The norm of a quantised W on a GPU, read as it is stored, beside the norm of a bf16 W of the same shape."""
    from .packed import FORMATS, RANKS, SHAPES, bench_packed, weight_shape

    sizes = [weight_shape(shape) for shape in shapes or SHAPES]
    chosen = [mode.strip() for mode in modes.split(",")]
    return bench_packed(sizes, ranks or RANKS, formats or FORMATS, modes=chosen, progress=message, **request), {}


@bench.command("packed-linear")
@click.option("--shape", "shapes", multiple=True, metavar="D_OUTxD_IN", help="Of W, such as 4096x4096; repeatable.")
@click.option("--rank", "ranks", type=click.IntRange(min=1), multiple=True, help="Adapter rank; repeatable.")
@click.option("--weight", "formats", multiple=True, metavar="FORMAT", help="A weight format, such as nf4; repeatable.")
@click.option("--tokens", "tokens", type=click.IntRange(min=1), multiple=True, help="Tokens, up to 16; repeatable.")
@_with_results(rounds=9)
def packed_linear(
    shapes: tuple[str, ...],
    ranks: tuple[int, ...],
    formats: tuple[str, ...],
    tokens: tuple[int, ...],
    **request: Any,
) -> Measured:
    """A layer that decodes from a quantised W on a GPU, in one kernel: beside its product and composition apart."""
    from .packed import FORMATS, weight_shape
    from .packed_linear import RANKS, SHAPES, TOKENS, bench_packed_linear

    sizes = [weight_shape(shape) for shape in shapes or SHAPES]
    chosen = ranks or RANKS, formats or FORMATS, tokens or TOKENS
    return bench_packed_linear(sizes, *chosen, progress=message, **request), {}


@bench.command()
@click.option("--shape", "shapes", multiple=True, metavar="D_OUTxD_IN", help="Of W, such as 4096x4096; repeatable.")
@click.option("--quant", "quants", multiple=True, metavar="KIND", help="nf4, int8, fp8 or hqq; repeatable.")
@_with_results(rounds=9)
def dequantise(shapes: tuple[str, ...], quants: tuple[str, ...], **request: Any) -> Measured:
    """W of quantised layers decoded on a GPU, beside the decoding of the layer's own package."""
    from .dequantise import SHAPES, bench_dequantise
    from .packed import weight_shape
    from .quantised import QUANTS

    sizes = [weight_shape(shape) for shape in shapes or SHAPES]
    return bench_dequantise(sizes, quants or QUANTS, progress=message, **request), {}


@bench.command()
@_with_results(rounds=30)
def host(rounds: int) -> Measured:
    """What a call costs the host: a load_kernel hit and a launch, beside Triton's own ways to launch."""
    from .host import bench_host

    return bench_host(rounds=rounds, progress=message), {}


@bench.command()
@click.option("--gpu", required=True, metavar="GPU", help="The GPU whose entries are judged; it need not be here.")
@click.option(
    "--draws", type=click.IntRange(min=1, max=100_000), default=500, show_default=True, help="Models, ranks and dtypes."
)
@click.option(
    "--kernels",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Looked up of each draw; 0: all.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option(
    "--plan",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Print the N specs to tune next, for `tune --specs`.",
)
@click.option("--list", "listed", is_flag=True, help="Also list every kernel that is not covered.")
@store_option
@click.option("--output", type=_OUTPUT, metavar="FILE", help="Write the results here as JSON.")
@click.option("--commit", help="The commit measured; read from git by default.")
@json_option
def coverage(
    gpu: str,
    count: int | None,
    listed: bool,
    output: Path | None,
    commit: str | None,
    as_json: bool,
    **request: Any,
) -> None:
    """How much of what users may run your stores cover: kernels of random models, ranks and dtypes, looked up.

    Covered is a kernel with a measured entry of its own, or with a bound of at most 10 % on what the lookup loses.
    With --plan the list of specs is all that goes to standard output, in the form that `doratune tune --specs` reads.
    """
    from ..codegen.gpu import find_gpu
    from .coverage import coverage_table, lacking, measure_coverage, plan
    from .results import document, environment

    with counting("looking up") as tell:
        found = measure_coverage(gpu, tell=tell, **request)
    if output is not None:
        env = environment(commit) | {"gpu": find_gpu(found.gpu).name, "driver": "none"}  # it need not be here
        _write_results(output, document(env, found.rows()))
    missing = lacking(found.looked)
    chosen = plan(found, count) if count else []
    if as_json:
        print_json(
            {
                "gpu": found.gpu,
                "covered": found.covered,
                "whole_draws": found.whole_draws,
                "rows": found.rows(),
                "lacking": [{"spec": str(e.spec), "verdict": e.verdict, "bound": e.loss} for e in missing],
                "plan": [{"spec": str(each.spec), "serves": each.serves} for each in chosen],
            }
        )
        return
    print_table(coverage_table(found), to_stderr=bool(count))
    for each in missing if listed else ():
        (message if count else line)(f"{each.verdict}: {each.spec}")
    for choice in chosen:
        line(choice.line())
    message(
        f"{found.covered:.1%} of the kernels are covered, and all kernels of {found.whole_draws:.1%} of the draws; "
        f"{len(missing)} spec{' is' if len(missing) == 1 else 's are'} not"
    )


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
@click.option("--trials", type=_COUNT, help="Instead of the effort's number of configs for each kernel.")
@click.option("--seeds", type=_COUNT, default=30, show_default=True, help="Searches of each kernel.")
@click.option("--jobs", type=jobs_range, help="Processes; by default one for each core.")
@click.option("--output", type=_OUTPUT, metavar="FILE", help="Write the results here as JSON.")
@click.option("--commit", help="The commit measured; read from git by default.")
@json_option
def search(gpu: str | None, output: Path | None, commit: str | None, as_json: bool, **request: Any) -> None:
    """How good the tuner's search is: replayed over recorded tables, against the best config of each. Needs no GPU."""
    from .results import document, measured_commit
    from .tables.read import recorded
    from .tables.search_quality import bench_search, quality_table

    gpus = [gpu] if gpu is not None else [*recorded()]
    if (output is not None or as_json) and len(gpus) > 1:
        option = "--json" if as_json else "--output"
        raise UsageError(f"{option} takes the results of one GPU; name one with --gpu ({', '.join(gpus)})")
    for slug in gpus:
        rows, env = bench_search(slug, progress=message, **request)
        text = document({**env, "doratune_commit": measured_commit(commit)}, rows)
        if output is not None:
            _write_results(output, text)
        if as_json:
            click.echo(text, nl=False)
        else:
            print_table(quality_table(slug, rows))


@bench.command()
@click.option(
    "--size",
    type=click.Choice([*SIZES]),
    default="full",
    show_default=True,
    help="The study; one for an hour on a CPU; one for minutes there; one to try the command out.",
)
@click.option("--seeds", type=_SEVERAL, default=5, show_default=True, help="Of each method, at its learning rate.")
@click.option("--minutes", type=Seconds(), default=9.0, show_default=True, help="To stop after.")
@click.option("--base", type=_PATH, metavar="FILE", help="The pre-trained weights; by default beside --output.")
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Runs at the same time; a GPU has room for several.",
)
@click.option("--device", metavar="DEVICE", help="cuda, cuda:1, …; cpu to try a small --size out.")
@click.option(
    "--output", type=_OUTPUT, metavar="FILE", help="Write the results here as JSON; runs that it has are not repeated."
)
@click.option("--commit", help="The commit measured; read from git by default.")
@json_option
def quality(output: Path | None, commit: str | None, as_json: bool, **request: Any) -> None:
    """What LoRA, rsLoRA, DoRA, LoRA with row scales and full fine-tuning reach on a small model trained from scratch.

    At equal steps and at equal time, each at its own learning rate; and what the dtypes of DoRA's adapters change.
    """
    from .quality.bench import bench_quality
    from .quality.summary import quality_table, sentences
    from .results import document

    with _enough_memory():
        outcome, env = bench_quality(output=output, commit=commit, progress=message, **request)
    if as_json:
        click.echo(document(env, outcome.rows), nl=False)
    else:
        print_table(quality_table(outcome.rows))
        for sentence in sentences(outcome.rows):
            line(sentence)
    for note in outcome.notes:
        message(f"note: {note}")


@bench.command("targets")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def bench_targets(files: tuple[Path, ...], as_json: bool) -> None:
    """Print how the results in FILES stand against the targets. Needs no GPU."""
    from .results import read_rows
    from .targets import judge

    runs = [read_rows(file) for file in files]
    try:
        verdicts = judge(*runs)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(
            f"{', '.join(map(str, files))}: a row is not one of doratune bench ({type(error).__name__}: {error}); "
            "name files that it wrote"
        ) from error
    if as_json:
        print_json({"verdicts": [verdict.row() for verdict in verdicts]})
    else:
        _print_targets(verdicts)
