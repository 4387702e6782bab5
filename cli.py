"""The command line: parse, call, print. :mod:`.terminal.console` prints results and ends failed commands."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import __version__
from .benchmarks.commands import bench
from .cache_commands import cache
from .errors import DoratuneError, UsageError
from .report.command import report as report_command
from .terminal.console import (
    Dtype,
    Group,
    LocationText,
    NamedPath,
    Seconds,
    config_option,
    jobs_range,
    json_option,
    line,
    message,
    print_json,
    print_table,
    rank_range,
    store_option,
    trust_option,
)
from .terminal.deadline import TimeUpError
from .terminal.interrupts import INTERRUPTED, kill_descendants


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="doratune")
def main() -> None:
    """Tuned Triton kernels for DoRA: tune a model once, keep the winners in a store, load them from Python.

    \b
    doratune tune --model llama-8b               tune every kernel of a model
    doratune emit SPEC                           print a kernel's source
    doratune explain SPEC                        say which kernel would run, and why
    doratune report --open                       show what was tuned, as a page
    """


@main.command()
@click.option("--model", metavar="NAME", help="A known model, such as llama-8b; see `doratune models`.")
@config_option
@click.option(
    "--spec", "specs", multiple=True, metavar="SPEC", help="Only this kernel, instead of a model's; repeatable."
)
@click.option(
    "--specs",
    "spec_file",
    type=NamedPath(),
    metavar="FILE",
    help="Only the kernels listed in FILE, or on standard input if it is -: one spec a line.",
)
@click.option(
    "--rank", "ranks", type=int, multiple=True, default=(384,), show_default=True, help="Adapter rank; repeatable."
)
@click.option(
    "--dtype", type=Dtype(), default="bf16", show_default=True, help="Of weights and activations: bf16, fp16, fp32."
)
@click.option("--weight", metavar="FORMAT", help="How a quantised W is stored: nf4, nf4.nested, int8, hqq4.128, fp8, …")
@click.option("--adapter-dtype", type=Dtype(), help="Of A and B; as --dtype by default. PEFT keeps adapters in fp32.")
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
    type=Seconds(),
    metavar="SECONDS",
    help="Stop the run after this time; the winners so far are kept.",
)
@click.option("--jobs", type=jobs_range, help="Compile workers; one for each core by default.")
@click.option("--device", metavar="DEVICES", help="The GPUs to measure on: cuda:1, or cuda:0,cuda:1, or all.")
@store_option
@click.option(
    "--study-storage",
    type=LocationText(),
    metavar="PATH|URL",
    help="Optuna storage for the searches: a SQLite file or a URL; a file beside the user's store by default.",
)
@click.option(
    "--binaries/--no-binaries", default=True, help="Also store the winners' compiled kernels (the default), or not."
)
@json_option
def tune(as_json: bool, **options: Any) -> None:
    """Tune the kernels that DoRA on a model's linear projections needs, or listed ones, and store the winners.

    Stopping it, by Ctrl-C for instance, loses at most the running trials: the same command continues, and finished
    kernels are not searched again.
    """
    began = time.monotonic()
    from .tuner.models import requested_model

    listed = bool(options["specs"]) or options["spec_file"] is not None
    if listed:
        _refuse_given(_OF_A_MODEL, "leave it out: a spec says all of its kernel")
    # A model is read while PyTorch is imported here.
    model = None if listed else requested_model(options["model"], options["config"])

    from .tuner.gain import gains_of
    from .tuner.progress import standard_error_progress
    from .tuner.report import closing_lines, gains_table, report, report_table
    from .tuner.tune_model import Request, tune_model

    try:
        run = tune_model(Request(**options), standard_error_progress(), model, began)
    except TimeUpError:
        kill_descendants(os.getpid())  # such as the process that reads a config: Python would wait for it
        raise
    if as_json:
        print_json(report(run.result, name=run.name, model=run.model, gpu=run.gpu.slug, store=run.store))
    else:
        entries = [row.entry for row in run.result.rows if row.entry is not None]
        print_table(report_table(entries, name=run.name, gpu=run.gpu.slug))
        gains = gains_of(run.result.tuned)
        if gains.moved:
            print_table(gains_table(gains))
    for row in run.result.failed:
        message(f"failed: {row.spec}: {row.note}")
    for closing in closing_lines(run.result):
        message(closing)
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


_OF_A_MODEL = ("model", "config", "ranks", "dtype", "weight", "adapter_dtype", "autocast", "ops", "tokens")
"""The parameters of ``tune`` that say which kernels of a model are meant."""


def _refuse_given(names: tuple[str, ...], remedy: str) -> None:
    """Refuse an option of the running command that was given beside ``--spec`` or ``--specs``."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
            raise UsageError(f"{option.opts[0]} means nothing beside --spec and --specs; {remedy}")


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
@trust_option
@json_option
def explain(spec: str, store: str | None, trusted: tuple[str, ...], as_json: bool) -> None:
    """Say which config would run for SPEC, which step of the lookup found it, what was refused on the way, whether a
    store has the binary or it must be compiled, and what was upgraded since the entry was measured."""
    from .codegen.spec import KernelSpec
    from .runtime.loader import resolve_binaries
    from .runtime.present import changes_since, upgrade_warning

    wanted = KernelSpec.parse(spec)
    resolution, _, binaries = resolve_binaries(wanted, store, trusted)
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


_local_path = NamedPath()


@main.command()
@click.option("--model", metavar="NAME", help="Also a known model's kernels and layers; see `doratune models`.")
@click.option(
    "--config", type=_local_path, metavar="FILE", help="Also those of a Hugging Face config.json (or its folder)."
)
@click.option("--adapter", type=_local_path, metavar="DIR", help="Also an adapter: a folder of PEFT's, or one file.")
@click.option(
    "--checkpoint",
    type=_local_path,
    metavar="DIR",
    help="Also a model's weights in safetensors; with --adapter, the adapter is compared with them.",
)
@click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="The GPU of the model's kernels.")
@click.option(
    "--rank",
    "ranks",
    type=rank_range,
    multiple=True,
    default=(384,),
    show_default=True,
    help="Adapter rank; repeatable.",
)
@store_option
@json_option
def doctor(
    model: str | None,
    config: Path | None,
    adapter: Path | None,
    checkpoint: Path | None,
    gpu: str,
    ranks: tuple[int, ...],
    store: str | None,
    as_json: bool,
) -> None:
    """Say what is here, whether it is tested, and what is wrong: versions, GPUs, C compiler, stores.

    With a model also: which of its kernels the stores have, and what `accelerate` would do with its layers. Of an
    adapter or a checkpoint on disk: its faults, each with the remedy. No weights are loaded, and no code that comes
    with a model is run.

    Exit code 1 if something keeps doratune from working, or if training or serving would go wrong.
    """
    from .adapters.fault import goes_wrong
    from .doctor import BROKEN, examine, examine_files, faults_table, findings_table, model_tables
    from .tuner.examine_model import examine_model

    files, faults = examine_files(adapter, checkpoint)
    asked = model is not None or config is not None
    report = examine_model(model, config, gpu=gpu, ranks=ranks, store=store) if asked else None
    findings = [*examine(store), *files]
    if as_json:
        print_json(
            {
                "findings": [vars(finding) for finding in findings],
                "faults": [fault.values() for fault in faults],
                "model": report.values() if report else None,
            }
        )
    else:
        print_table(findings_table(findings))
        for table in model_tables(report) if report else []:
            print_table(table)
        if report and report.kernels:
            message(report.summary())
        for note in report.notes if report else ():
            message(f"note: {note}")
        if faults:
            print_table(faults_table(faults))
    if goes_wrong(faults) or any(finding.verdict == BROKEN for finding in findings):
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("source", type=_local_path)
@click.argument("target", type=_local_path)
@click.option("--to", metavar="FORMAT", help="peft or trtllm (TARGET is a folder), or lycoris (TARGET is a file).")
@click.option("--merge", type=_local_path, metavar="CHECKPOINT", help="Merge into a copy of this model's weights.")
@click.option("--from", "format", metavar="FORMAT", help="SOURCE's format, where its tensors do not say it: trtllm.")
@click.option(
    "--checkpoint",
    type=_local_path,
    metavar="DIR",
    help="The adapter's base model, for formats that need its norms (trtllm) or its layers' names (lycoris).",
)
@click.option("--prefix", default="lycoris", show_default=True, help="Before the names of layers, to lycoris.")
@json_option
def convert(
    source: Path,
    target: Path,
    to: str | None,
    merge: Path | None,
    format: str | None,
    checkpoint: Path | None,
    prefix: str,
    as_json: bool,
) -> None:
    """Convert the DoRA adapter SOURCE into another trainer's format, or merge it into its model's weights.

    TARGET must not exist; SOURCE and CHECKPOINT stay as they are. The result is compared with SOURCE on random inputs
    before it gets its name. Give one of --to and --merge.
    """
    if (to is None) == (merge is None):
        raise UsageError("name either a format (--to peft) or the checkpoint to merge into (--merge DIR)")
    if to is not None:
        from .adapters.convert import convert as convert_adapter

        done = convert_adapter(source, target, to=to, format=format, checkpoint=checkpoint, prefix=prefix)
        values, text = done.values(), done.describe()
    else:
        from .adapters.merge import merge as merge_adapter

        assert merge is not None
        merged = merge_adapter(source, merge, target, format=format)
        values, text = merged.values(), merged.describe()
    if as_json:
        print_json(values)
    else:
        line(text)


main.add_command(bench)
main.add_command(cache)
main.add_command(report_command)


if __name__ == "__main__":
    main()
