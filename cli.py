"""The command line: parse, call, print.

Results go to standard output, everything else to standard error; with ``--json`` standard output holds one JSON object
and nothing more. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .benchmarks.commands import bench
from .errors import DoratuneError, UsageError, near_names

if TYPE_CHECKING:
    from rich.table import Table

    from .tuner.projections import Model, Projection

    _TextType = click.ParamType[str]
else:
    _TextType = click.ParamType  # a generic class since click 8.4

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class _Group(click.Group):
    """Prints a doratune failure as one message, without a traceback, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DoratuneError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


class _Dtype(_TextType):
    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from .codegen.ops import DTYPE_BYTES

        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        name = names.get(str(value).lower(), str(value).lower())
        if name not in DTYPE_BYTES:
            self.fail(f"unsupported dtype {value!r}; use one of {', '.join(DTYPE_BYTES)}", param, ctx)
        return name


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
store_option = click.option(
    "--store", metavar="PATH|URL", help="A store to use: a SQLite file, or sqlite:///… or postgresql://…"
)


def _print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": 1, **data}, indent=2))


def _print_table(table: Table) -> None:
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="doratune")
def main() -> None:
    """Tuned Triton kernels for DoRA: tune a model once, keep the winners in a store, load them from Python.

    \b
    doratune tune --model llama-8b               tune every kernel of a model
    doratune emit SPEC                           print a kernel's source
    doratune explain SPEC                        say which kernel would run, and why
    """


@main.command()
@click.option("--model", metavar="NAME", help="A known model, such as llama-8b; see `doratune models`.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Hugging Face config.json (or its folder) instead of a known model.",
)
@click.option(
    "--rank", "ranks", type=int, multiple=True, default=(384,), show_default=True, help="Adapter rank; repeatable."
)
@click.option(
    "--dtype", type=_Dtype(), default="bf16", show_default=True, help="Of weights and activations: bf16, fp16, fp32."
)
@click.option("--adapter-dtype", type=_Dtype(), help="Of A and B; as --dtype by default. PEFT keeps adapters in fp32.")
@click.option("--autocast", is_flag=True, help="Round fp32 adapters to --dtype, as torch.autocast does; else exact.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operation; repeatable.")
@click.option("--tokens", type=int, multiple=True, help="Only this token count's bucket; repeatable.")
@click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="Target: auto, h200, rtx4090, sm_90, …")
@click.option(
    "--evaluator",
    type=click.Choice(["auto", "measure", "predict"]),
    default="auto",
    show_default=True,
    help="Time kernels on the GPU here, or compile them and predict; auto measures when the target is here.",
)
@click.option(
    "--effort",
    type=click.Choice(["quick", "standard", "full"]),
    default="standard",
    show_default=True,
    help="How hard to search.",
)
@click.option("--trials", type=int, help="Configurations to try for each kernel, instead of the effort's number.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End the whole run in time; what is found is kept.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Compile workers; one for each core by default.")
@click.option("--device", metavar="DEVICE", help="The GPU to measure on, such as cuda:1.")
@store_option
@click.option(
    "--study-storage",
    metavar="PATH|URL",
    help="Optuna storage for the searches: a SQLite file or a URL; a file beside the user's store by default.",
)
@click.option(
    "--binaries/--no-binaries", default=True, help="Also store the winners' compiled kernels (the default), or not."
)
@json_option
def tune(as_json: bool, **options: Any) -> None:
    """Tune the kernels that DoRA on a model's linear projections needs, and store the winners.

    Stopping it, with Ctrl-C or however, loses the running trials at most: the same command goes on from there, and
    finished kernels are not searched again.
    """
    from .tuner.models import requested_model

    model = requested_model(options["model"], options["config"])  # read while PyTorch is imported here

    from .tuner.progress import standard_error_progress
    from .tuner.report import report_json, report_table
    from .tuner.tune_model import Request, tune_model

    run = tune_model(Request(**options), standard_error_progress(), model)
    if as_json:
        click.echo(report_json(run.result, model=run.model, gpu=run.gpu.slug, store=run.store))
    else:
        entries = [row.entry for row in run.result.rows if row.entry is not None]
        _print_table(report_table(entries, model=run.model.name, gpu=run.gpu.slug))
    for row in run.result.failed:
        click.echo(f"failed: {row.spec}: {row.note}", err=True)
    click.echo(run.summary(), err=True)
    if run.result.stopped == "interrupt":
        sys.exit(INTERRUPTED)
    if run.result.fault:
        raise DoratuneError(run.result.fault)
    if run.result.failed:
        sys.exit(1)


@main.command()
@click.argument("spec")
@click.option(
    "--config", metavar="CONFIG", help="A config such as 'tile:block_n=128,…'; by default the one that would run."
)
@store_option
@json_option
def emit(spec: str, config: str | None, store: str | None, as_json: bool) -> None:
    """Print the source of the kernel for SPEC, as it would run.

    SPEC reads like lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200.
    """
    from .runtime.loader import emit as emit_source

    provenance, source = emit_source(spec, config=config, store=store)
    if as_json:
        _print_json(
            {
                "spec": str(source.spec),
                "config": str(source.config),
                "provenance": provenance,
                "digest": source.digest,
                "source": source.text,
            }
        )
    else:
        click.echo(source.text, nl=False)


@main.command()
@click.argument("spec")
@store_option
@json_option
def explain(spec: str, store: str | None, as_json: bool) -> None:
    """Say which config would run for SPEC, which step of the lookup found it, what was refused on the way, and whether
    a store has the binary or it must be compiled."""
    from .codegen.spec import KernelSpec
    from .runtime.loader import resolve_binaries

    wanted = KernelSpec.parse(spec)
    resolution, _, binaries = resolve_binaries(wanted, store)
    if as_json:
        entry = resolution.entry
        _print_json(
            {
                "spec": str(wanted),
                "step": resolution.step,
                "config": str(resolution.config),
                "provenance": entry.evaluation.provenance if entry else "default",
                "entry": str(entry.spec) if entry else None,
                "store": resolution.store,
                "distance": resolution.distance,
                "refused": [vars(refusal) for refusal in resolution.trace],
                "binary": {
                    "store": binaries.store,
                    "note": binaries.note,
                    "passed_over": list(binaries.passed_over),
                },
            }
        )
    else:
        click.echo(resolution.explain(binaries.explain()))


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="The model of this config.json instead."
)
@json_option
def models(config: Path | None, as_json: bool) -> None:
    """List the known models and their linear projections [d_out, d_in], or all linear layers of one config.json.

    A config's layers are those of transformers' class for it; the last column says which get no DoRA adapter, and why.
    """
    from .tuner.models import list_models, read_config

    known = list_models() if config is None else (read_config(config),)
    if as_json:
        from .tuner.report import layers_of

        named = ("name", "hf_id", "layers")
        _print_json(
            {"models": [{**{name: getattr(model, name) for name in named}, **layers_of(model)} for model in known]}
        )
    elif config is None:
        _print_table(_known_models(known))
    else:
        _print_table(_layers(known[0]))
        for note in known[0].notes:
            click.echo(f"note: {note}", err=True)


def _known_models(known: Iterable[Model]) -> Table:
    from rich.table import Table

    table = Table("model", "Hugging Face id", "layers", "projections")
    for model in known:
        shapes: dict[str, list[str]] = {}
        for projection in model.projections:
            shapes.setdefault(f"[{projection.d_out}, {projection.d_in}]", []).append(projection.name)
        table.add_row(
            model.name,
            model.hf_id,
            str(model.layers),
            "; ".join(f"{' '.join(names)} {shape}" for shape, names in shapes.items()),
        )
    return table


def _layers(model: Model) -> Table:
    from rich.table import Table

    from .tuner.projections import LeftOut

    table = Table("layer", "shape", "bias", "how many", "first one", "DoRA", title=model.name)
    layers: list[Projection | LeftOut] = [*model.projections, *model.left_out]
    for layer in layers:
        why = f"no: {layer.why}" if isinstance(layer, LeftOut) else "yes"
        first = layer.modules[0] if layer.modules else ""
        table.add_row(layer.name, str(list(layer.shape)), "bias" if layer.bias else "", str(layer.count), first, why)
    return table


@main.group(cls=_Group)
def cache() -> None:
    """Look at the stores of tuned kernels."""


@cache.command("path")
@store_option
@json_option
def cache_path(store: str | None, as_json: bool) -> None:
    """Print the stores that a lookup asks, in order."""
    from .cache.stack import stack_places

    layers = stack_places(store)
    if as_json:
        _print_json(
            {"layers": [{"location": str(layer).rsplit(" (", 1)[0], "origin": layer.origin} for layer in layers]}
        )
    else:
        for layer in layers:
            click.echo(str(layer))


def _each_store(store: str | None, visit: Callable[[Any], None]) -> None:
    """Open the stack, or the one store named, read-only, and close it afterwards."""
    from .cache.stack import open_stack
    from .cache.store import Store

    layers = open_stack() if store is None else [Store.open(store, readonly=True)]
    try:
        for layer in layers:
            visit(layer)
    finally:
        for layer in layers:
            layer.close()


@cache.command("ls")
@click.option("--op", metavar="OP", help="Only this operation.")
@click.option("--gpu", metavar="NAME", help="Only this GPU.")
@store_option
@json_option
def cache_ls(op: str | None, gpu: str | None, store: str | None, as_json: bool) -> None:
    """List the entries of every store, or of one."""
    from rich.table import Table

    from .codegen.gpu import find_gpu
    from .codegen.ops import OPS
    from .tuner.report import row_of

    if op is not None and op not in OPS:
        raise UsageError(f"unknown operation {op!r}{near_names(op, OPS)} (known: {', '.join(OPS)})")
    slug = None if gpu is None else find_gpu(gpu).slug
    rows: list[tuple[str, Any, list[str]]] = []

    def look(layer: Any) -> None:
        made: dict[str, set[str]] = {}
        for key in layer.binary_keys():
            made.setdefault(key.code_digest, set()).add(f"{key.triton} {key.architecture}")
        for entry in layer.entries(op=op, gpu=slug):
            rows.append((layer.location, entry, sorted(made.get(entry.code_digest, ()))))

    _each_store(store, look)
    if as_json:
        _print_json(
            {"rows": [{"store": location, **row_of(entry), "binaries": made} for location, entry, made in rows]}
        )
        return
    table = Table("spec", "config", "µs", "floor µs", "provenance", "tuned on", "binaries", "store")
    for location, entry, made in rows:
        row = row_of(entry)
        table.add_row(
            row["spec"],
            row["config"],
            "" if row["us"] is None else f"{row['us']:.2f}",
            "" if row["floor_us"] is None else f"{row['floor_us']:.2f}",
            row["provenance"],
            entry.environment.gpu_name or entry.environment.gpu,
            ", ".join(made),
            location,
        )
    _print_table(table)
    click.echo(f"{len(rows)} entries", err=True)


@cache.command("show")
@click.argument("spec")
@click.option("--source", is_flag=True, help="Print the emitted source that was tuned.")
@store_option
@json_option
def cache_show(spec: str, source: bool, store: str | None, as_json: bool) -> None:
    """Show the stored entry of SPEC in each store that has one."""
    from .cache.entry import BinaryKey, Entry
    from .codegen.spec import KernelSpec

    wanted = KernelSpec.parse(spec)
    found: list[tuple[str, Entry, list[BinaryKey]]] = []

    def look(layer: Any) -> None:
        entry = layer.get(wanted)
        if entry is not None:
            found.append((layer.location, entry, layer.binary_keys(entry.code_digest)))

    _each_store(store, look)
    if not found:
        raise DoratuneError(f"no store has an entry for {wanted}; `doratune explain` says what would run instead")
    facts = [
        {
            "store": location,
            "spec": str(entry.spec),
            "config": str(entry.config),
            **{name: value for name, value in vars(entry.evaluation).items() if name != "samples_us"},
            **vars(entry.environment),
            "template_digest": entry.template_digest,
            "source_digest": entry.source_digest,
            "created_at": entry.created_at,
        }
        for location, entry, _ in found
    ]
    if as_json:
        _print_json(
            {
                "entries": [
                    {**fact, "binaries": [key._asdict() for key in keys], "source": entry.source}
                    for fact, (_, entry, keys) in zip(facts, found, strict=True)
                ]
            }
        )
        return
    for fact, (_, entry, keys) in zip(facts, found, strict=True):
        for name, value in fact.items():
            click.echo(f"{name:16} {'-' if value in (None, '') else value}")
        for key in keys:
            click.echo(f"{'binary':16} {key.kernel}, Triton {key.triton}, {key.architecture}")
        if source:
            click.echo(f"\n{entry.source}", nl=False)


@cache.command("prune")
@click.option("--other-triton", is_flag=True, help="Also those that another Triton than the installed one compiled.")
@store_option
@json_option
def cache_prune(other_triton: bool, store: str | None, as_json: bool) -> None:
    """Delete the binaries that no entry has any more, from your own store or the one named."""
    from importlib.metadata import version

    from .cache.stack import user_store_path
    from .cache.store import Store

    with Store.open(store or user_store_path()) as opened:
        count = opened.prune_binaries(triton=version("triton") if other_triton else None)
        if as_json:
            _print_json({"store": opened.location, "pruned": count})
        else:
            click.echo(f"{count} binaries deleted from {opened.location}")


main.add_command(bench)


if __name__ == "__main__":
    main()
