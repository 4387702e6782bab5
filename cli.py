"""The command line: parse, call, print. :mod:`.console` says how results are printed and failures end a command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .benchmarks.commands import bench
from .console import Group, json_option, message, print_json, print_table
from .errors import DoratuneError, UsageError, near_names

if TYPE_CHECKING:
    from .cache.store import Store

    _TextType = click.ParamType[str]
else:
    _TextType = click.ParamType  # a generic class since click 8.4

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class _Dtype(_TextType):
    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from .codegen.ops import DTYPE_BYTES

        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        name = names.get(str(value).lower(), str(value).lower())
        if name not in DTYPE_BYTES:
            self.fail(f"unsupported dtype {value!r}; use one of {', '.join(DTYPE_BYTES)}", param, ctx)
        return name


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Hugging Face config.json (or its folder) instead of a known model.",
)
store_option = click.option(
    "--store", metavar="PATH|URL", help="A store to use: a SQLite file, or sqlite:///… or postgresql://…"
)


@contextmanager
def _stores(named: str | None) -> Iterator[list[Store]]:
    """The stores that a lookup asks, or the one named, open for reading."""
    from .cache.stack import open_stack
    from .cache.store import Store

    stores = open_stack() if named is None else [Store.open(named, readonly=True)]
    try:
        yield stores
    finally:
        for store in stores:
            store.close()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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
@config_option
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
    help="Stop the run after this time; the winners so far are kept.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Compile workers; one for each core by default.")
@click.option("--device", metavar="DEVICES", help="The GPUs to measure on: cuda:1, or cuda:0,cuda:1, or all.")
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

    Stopping it, by Ctrl-C for instance, loses at most the running trials: the same command continues, and finished
    kernels are not searched again.
    """
    from .tuner.models import requested_model

    model = requested_model(options["model"], options["config"])  # read while PyTorch is imported here

    from .tuner.gain import gains_of
    from .tuner.progress import standard_error_progress
    from .tuner.report import closing_lines, gains_table, report, report_table
    from .tuner.tune_model import Request, tune_model

    run = tune_model(Request(**options), standard_error_progress(), model)
    if as_json:
        print_json(report(run.result, model=run.model, gpu=run.gpu.slug, store=run.store))
    else:
        entries = [row.entry for row in run.result.rows if row.entry is not None]
        print_table(report_table(entries, model=run.model.name, gpu=run.gpu.slug))
        gains = gains_of(run.result.tuned)
        if gains.moved:
            print_table(gains_table(gains))
    for row in run.result.failed:
        message(f"failed: {row.spec}: {row.note}")
    for line in closing_lines(run.result):
        message(line)
    message(run.summary())
    if run.result.stopped == "interrupt":
        sys.exit(INTERRUPTED)
    if run.result.fault:
        raise DoratuneError(run.result.fault)
    unfinished = run.result.count("unfinished") if not run.result.stopped else 0
    if unfinished:
        message(f"{unfinished} kernels could not be finished: the same command tries them again")
    if run.result.failed or unfinished:
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

    SPEC is written as in lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200.
    """
    from .runtime.loader import emit as emit_source

    provenance, source = emit_source(spec, config=config, store=store)
    if as_json:
        print_json(
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
    """Say which config would run for SPEC, which step of the lookup found it, what was refused on the way, whether a
    store has the binary or it must be compiled, and what was upgraded since the entry was measured."""
    from .codegen.spec import KernelSpec
    from .runtime.loader import resolve_binaries
    from .runtime.present import changes_since, upgrade_warning

    wanted = KernelSpec.parse(spec)
    resolution, _, binaries = resolve_binaries(wanted, store)
    if as_json:
        entry = resolution.entry
        print_json(
            {
                "spec": str(wanted),
                "step": resolution.step,
                "config": str(resolution.config),
                "provenance": entry.evaluation.provenance if entry else "default",
                "entry": str(entry.spec) if entry else None,
                "store": resolution.store,
                "distance": resolution.distance,
                "rederived": resolution.rederived,
                "bound": vars(resolution.bound) if resolution.bound else None,
                "weighed": [
                    {
                        "config": str(each.offer.config),
                        "step": each.offer.step,
                        "entry": str(each.offer.candidate.spec) if each.offer.candidate else None,
                        "store": each.offer.store,
                        "rederived": each.offer.rederived,
                        "expected_loss": each.loss,
                    }
                    for each in resolution.weighed
                ],
                "refused": [vars(refusal) for refusal in resolution.trace],
                "upgraded": [vars(change) for change in changes_since(entry)] if entry else [],
                "binary": {
                    "store": binaries.store,
                    "note": binaries.note,
                    "passed_over": list(binaries.passed_over),
                },
            }
        )
    else:
        click.echo(resolution.explain(binaries.explain(), upgrade_warning(resolution)))


@main.command()
@config_option
@json_option
def models(config: Path | None, as_json: bool) -> None:
    """List the known models and their linear projections [d_out, d_in], or all linear layers of one config.json.

    A config's layers are those of transformers' class for it; the last column says which get no DoRA adapter, and why.
    """
    from .tuner.models import list_models, read_config
    from .tuner.report import layers_of, layers_table, models_table

    if as_json:
        known = list_models() if config is None else (read_config(config),)
        named = ("name", "hf_id", "layers")
        print_json(
            {"models": [{**{name: getattr(model, name) for name in named}, **layers_of(model)} for model in known]}
        )
    elif config is None:
        print_table(models_table(list_models()))
    else:
        model = read_config(config)
        print_table(layers_table(model))
        for note in model.notes:
            message(f"note: {note}")


@main.command()
@store_option
@json_option
def doctor(store: str | None, as_json: bool) -> None:
    """Say which versions, GPUs, C compiler and stores are here, and whether they are tested. Exit code 1 if something
    keeps doratune from working."""
    from .doctor import BROKEN, examine, findings_table

    findings = examine(store)
    if as_json:
        print_json({"findings": [vars(finding) for finding in findings]})
    else:
        print_table(findings_table(findings))
    if any(finding.verdict == BROKEN for finding in findings):
        raise click.exceptions.Exit(1)


@main.group()
def cache() -> None:
    """Inspect the stores of tuned kernels."""


@cache.command("path")
@store_option
@json_option
def cache_path(store: str | None, as_json: bool) -> None:
    """Print the stores that a lookup asks, in order."""
    from .cache.stack import stack_places

    places = stack_places(store)
    if as_json:
        print_json(
            {"stores": [{"location": str(place).rsplit(" (", 1)[0], "origin": place.origin} for place in places]}
        )
    else:
        for place in places:
            click.echo(str(place))


@cache.command("ls")
@click.option("--op", metavar="OP", help="Only this operation.")
@click.option("--gpu", metavar="NAME", help="Only this GPU.")
@store_option
@json_option
def cache_ls(op: str | None, gpu: str | None, store: str | None, as_json: bool) -> None:
    """List the entries of every store, or of one."""
    from .codegen.gpu import find_gpu
    from .codegen.ops import OPS
    from .tuner.report import entries_of, entries_table, row_of

    if op is not None and op not in OPS:
        raise UsageError(f"unknown operation {op!r}{near_names(op, OPS)} (known: {', '.join(OPS)})")
    slug = None if gpu is None else find_gpu(gpu).slug
    with _stores(store) as stores:
        found = [entry for opened in stores for entry in entries_of(opened, op=op, gpu=slug)]
    if as_json:
        print_json({"rows": [{"store": one.store, **row_of(one.entry), "binaries": one.made_for} for one in found]})
    else:
        print_table(entries_table(found))
        message(f"{len(found)} entries")


@cache.command("show")
@click.argument("spec")
@click.option("--source", is_flag=True, help="Print the emitted source that was tuned.")
@store_option
@json_option
def cache_show(spec: str, source: bool, store: str | None, as_json: bool) -> None:
    """Show the stored entry of SPEC in each store that has one."""
    from .codegen.spec import KernelSpec
    from .tuner.report import StoredEntry, final_table

    wanted = KernelSpec.parse(spec)
    with _stores(store) as stores:
        found = [
            StoredEntry(opened.location, entry, opened.binary_keys(entry.code_digest))
            for opened in stores
            if (entry := opened.get(wanted)) is not None
        ]
    if not found:
        raise DoratuneError(f"no store has an entry for {wanted}; `doratune explain` says what would run instead")
    if as_json:
        print_json({"entries": [one.values() for one in found]})
        return
    for one in found:
        for name, value in one.facts().items():
            click.echo(f"{name:16} {'-' if value in (None, '') else value}")
        for key in one.binaries:
            click.echo(f"{'binary':16} {key.kernel}, Triton {key.triton}, {key.architecture}")
        if one.entry.final is not None:
            print_table(final_table(one.entry.final))
        if source:
            click.echo(f"\n{one.entry.source}", nl=False)


@cache.command("prune")
@click.option("--other-triton", is_flag=True, help="Also the binaries of other Triton versions than the installed one.")
@store_option
@json_option
def cache_prune(other_triton: bool, store: str | None, as_json: bool) -> None:
    """Delete the binaries that no entry refers to, from your own store or the one named."""
    from importlib.metadata import version

    from .cache.stack import user_store_path
    from .cache.store import Store

    with Store.open(store or user_store_path()) as opened:
        count = opened.prune_binaries(triton=version("triton") if other_triton else None)
        if as_json:
            print_json({"store": opened.location, "pruned": count})
        else:
            click.echo(f"{count} binaries deleted from {opened.location}")


@cache.command("drift")
@click.option("--op", metavar="OP", help="Only this operation.")
@click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="The GPU here; others are refused.")
@click.option("--device", metavar="DEVICE", help="The GPU to measure on, such as cuda:1.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compile workers; one for each core by default.")
@click.option("--all", "everything", is_flag=True, help="Also winners that were measured under the present versions.")
@click.option("--apply", is_flag=True, help="Store the results: new winners, and the present versions of the others.")
@click.option("--check", is_flag=True, help="Exit with code 1 if a winner is no longer the fastest.")
@store_option
@json_option
def cache_drift(as_json: bool, check: bool, **options: Any) -> None:
    """Measure your winners again after an upgrade, each against the configs that it beat.

    Of your own store or the one named, the winners for the GPU here are measured whose Triton, PyTorch, driver, GPU
    name or template differs from the present one. Without --apply nothing is written. A run with --apply that was
    stopped continues where it was.

    \b
    Exit code 0: measured, whatever moved.
    Exit code 1: a winner is broken (does not compile, is inaccurate) and stays in the store, or one could not be read
    or measured; with --check, also if a winner moved and that was not applied.
    """
    from .tuner.drift_report import BROKEN, UNJUDGED, drift_table
    from .tuner.drift_store import DriftRequest, drift_store
    from .tuner.progress import standard_error_progress

    result = drift_store(DriftRequest(**options), standard_error_progress("measuring"))
    if as_json:
        print_json(result.values())
    elif result.rows:
        print_table(drift_table(result.rows))
    for row in result.rows:
        if row.outcome in (BROKEN, UNJUDGED):
            message(f"{row.outcome}: {row.entry.spec}: {row.notes[0]}")
    for problem in result.damaged:
        message(f"damaged: {problem}")
    message(result.summary())
    if result.stopped == "interrupt":
        sys.exit(INTERRUPTED)
    if result.fault:
        raise DoratuneError(result.fault)
    if result.failed or (check and result.outdated):
        sys.exit(1)


main.add_command(bench)


if __name__ == "__main__":
    main()
