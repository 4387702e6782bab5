"""``doratune cache``: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import DoratuneError, UsageError, near_names
from .printable import printable
from .terminal.console import (
    Dtype,
    LocationText,
    NamedPath,
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
    tokens_range,
    trust_option,
)
from .terminal.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from .cache.signing import SigningKey
    from .cache.store import Store
    from .tuner.reachable import Reach


_PATH = NamedPath()


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


MOST_DAMAGED = 20
"""Damaged rows that a listing names."""


def _report_damage(damaged: list[str]) -> None:
    for problem in damaged[:MOST_DAMAGED]:
        message(f"damaged: {problem}")
    if len(damaged) > MOST_DAMAGED:
        message(f"damaged: {len(damaged) - MOST_DAMAGED} more rows; `doratune cache verify` lists all")


@click.group()
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
            line(place)


@cache.command("ls")
@click.option("--op", metavar="OP", help="Only this operation.")
@click.option("--gpu", metavar="NAME", help="Only this GPU.")
@store_option
@json_option
def cache_ls(op: str | None, gpu: str | None, store: str | None, as_json: bool) -> None:
    """List the entries of every store, or of one."""
    from .tuner.garbage import uncollected

    with uncollected():  # going through modules and thousands of entries again and again takes a fifth of a listing
        _list(op, gpu, store, as_json)


def _list(op: str | None, gpu: str | None, store: str | None, as_json: bool) -> None:
    from .codegen.gpu import find_gpu
    from .codegen.ops import OPS
    from .tuner.report import entries_of, entries_table, row_of

    if op is not None and op not in OPS:
        raise UsageError(f"unknown operation {op!r}{near_names(op, OPS)} (known: {', '.join(OPS)})")
    slug = None if gpu is None else find_gpu(gpu).slug
    with _stores(store) as stores:
        read = [entries_of(opened, op=op, gpu=slug) for opened in stores]
    found = [one for entries, _ in read for one in entries]
    damaged = [str(error) for _, errors in read for error in errors]
    if as_json:
        rows = [{"store": one.store, **row_of(one.entry), "binaries": one.made_for} for one in found]
        print_json({"rows": rows, "damaged": damaged})
    else:
        print_table(entries_table(found))
        message(f"{len(found)} entries")
    _report_damage(damaged)


@cache.command("show")
@click.argument("spec")
@click.option("--source", is_flag=True, help="Print the emitted source that was tuned.")
@store_option
@json_option
def cache_show(spec: str, source: bool, store: str | None, as_json: bool) -> None:
    """Show the stored entry of SPEC in each store that has one."""
    from .cache.errors import CorruptRowError
    from .codegen.spec import KernelSpec
    from .tuner.report import StoredEntry, final_table

    wanted = KernelSpec.parse(spec)
    with _stores(store) as stores:
        found, damaged = [], []
        for opened in stores:
            try:
                entry = opened.get(wanted)
            except CorruptRowError as error:
                damaged.append(str(error))
                continue
            if entry is not None:
                found.append(StoredEntry(opened.location, entry, opened.binary_keys(entry.code_digest)))
    _report_damage(damaged)
    if not found:
        raise DoratuneError(f"no store has an entry for {wanted}; `doratune explain` says what would run instead")
    if as_json:
        print_json({"entries": [one.values() for one in found]})
        return
    for one in found:
        for name, value in one.facts().items():
            line(f"{name:16} {'-' if value in (None, '') else value}")
        for key in one.binaries:
            line(f"{'binary':16} {key.kernel}, Triton {key.triton}, {key.architecture}")
        if one.entry.final is not None:
            print_table(final_table(one.entry.final))
        if source:
            click.echo(f"\n{printable(one.entry.source, lines=True)}", nl=False)


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which kernels a model can launch."""
    options = (
        click.option("--model", metavar="NAME", help="A known model, such as llama-8b; see `doratune models`."),
        config_option,
        click.option(
            "--rank",
            "ranks",
            type=rank_range,
            multiple=True,
            default=(384,),
            show_default=True,
            help="Adapter rank; repeatable.",
        ),
        click.option("--dtype", type=Dtype(), default="bf16", show_default=True, help="Of weights and activations."),
        click.option("--adapter-dtype", type=Dtype(), help="Of A, B and m; as --dtype by default. PEFT's own is fp32."),
        click.option(
            "--weight", metavar="FORMAT", help="How a quantised base stores W: nf4, nf4.nested, int8, hqq4.64, …"
        ),
        click.option(
            "--tokens",
            type=tokens_range,
            multiple=True,
            help="Only calls of this many tokens (batch times sequence), rounded up to a bucket; repeatable. All by "
            "default.",
        ),
        click.option(
            "--target",
            "targets",
            metavar="NAME",
            multiple=True,
            help="Only layers of this name, as in PEFT's target_modules; repeatable. Every linear layer by default.",
        ),
        click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="auto, h200, rtx4090, sm_90, …"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _reach(options: dict[str, Any]) -> Reach:
    from .tuner.reachable import Reach, named_gpu

    names = ("model", "config", "ranks", "dtype", "adapter_dtype", "weight", "tokens", "targets")
    return Reach(named_gpu(options["gpu"]), **{name: options[name] for name in names})


_output_option = click.option("-o", "--output", required=True, type=_PATH, metavar="FILE", help="The file to write.")
_replace_option = click.option("--replace", is_flag=True, help="Replace the file if it is a store.")
_sign_option = click.option(
    "--sign",
    type=NamedPath(),
    metavar="KEY",
    help="Sign every row with this Ed25519 private key, a file.",
)


def _signing_key(path: Path | None) -> SigningKey | None:
    from .cache.signing import read_signing_key

    return None if path is None else read_signing_key(path)


@cache.command("build")
@_model_options
@_output_option
@_replace_option
@click.option("--jobs", type=jobs_range, help="Compile workers; one for each core by default.")
@_sign_option
@store_option
@trust_option
@json_option
def cache_build(
    output: Path,
    replace: bool,
    jobs: int | None,
    sign: Path | None,
    store: str | None,
    trusted: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Write a store that starts every kernel of a model without a compile.

    It has every kernel that the model's DoRA layers can launch under `accelerate`, in training and inference, each with
    the config that a lookup takes here, and their binaries for the installed Triton: those that the stores have, the
    others compiled. The GPU need not be here.
    """
    from .tuner.build_store import build_store

    key = _signing_key(sign)
    with counting("compiling") as tell:
        made = build_store(
            _reach(options), output, store=store, trusted=trusted, replace=replace, jobs=jobs, sign=key, tell=tell
        )
    if as_json:
        print_json(vars(made) | {"binaries": made.binaries})
        return
    steps = ", ".join(f"{count} {step}" for step, count in made.steps.items())
    line(
        f"{made.path}: {made.kernels} kernels of {made.model} on {made.gpu} ({steps}), {made.binaries} binaries "
        f"({made.compiled} compiled, {made.copied} copied), {made.bytes / 1e6:.1f} MB"
    )


@cache.command("verify")
@_model_options
@click.option("--no-jit", is_flag=True, help="With a model: ask for a binary of each kernel that starts here.")
@store_option
@trust_option
@json_option
def cache_verify(no_jit: bool, store: str | None, trusted: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Check stores, or prove that they have every kernel of a model.

    Without a model: each store's file, schema, rows, digests and binaries. Other Tritons' binaries cannot be checked.

    With a model: that a store has an entry of every kernel that the model can launch; with --no-jit, that none would
    be compiled, as DORATUNE_NO_JIT=1 demands.

    \b
    Exit code 0: nothing is wrong or missing.
    Exit code 1: something is; it is listed.
    """
    if options["model"] is None and options["config"] is None:
        if no_jit:
            raise UsageError("--no-jit asks for the kernels of a model: name one with --model or --config")
        _verify_stores(store, as_json)
        return
    from .tuner.verify_model import verify_model

    found = verify_model(_reach(options), store=store, trusted=trusted, no_jit=no_jit)
    if as_json:
        missing = [{"spec": str(each.spec), "reason": each.reason} for each in found.missing]
        print_json(vars(found) | {"missing": missing, "complete": found.complete})
    else:
        for each in found.missing:
            line(f"{each.spec}: {each.reason}")
    what = "would be compiled" if no_jit else "have no entry"
    message(f"{len(found.missing)} of {found.kernels} kernels of {found.model} on {found.gpu} {what}")
    if not found.complete:
        raise click.exceptions.Exit(1)


def _verify_stores(store: str | None, as_json: bool) -> None:
    from .tuner.verify_store import verify_stores

    checked = verify_stores(store)
    problems = [problem for each in checked for problem in each.problems]
    if as_json:
        rows = [vars(each) | {"problems": [vars(problem) for problem in each.problems]} for each in checked]
        print_json({"stores": rows})
    else:
        for problem in problems:
            line(f"{problem.kind}: {problem.what}")
        for each in checked:
            unchecked = f", of which {each.elsewhere} cannot be checked here" if each.elsewhere else ""
            verdict = f"{len(each.problems)} problems" if each.problems else "no problems"
            held = f"{each.entries} entries, {each.binaries} binaries{unchecked}"
            line(f"{each.store}: {held}: {verdict}")
    if problems:
        raise click.exceptions.Exit(1)


@cache.command("export")
@click.option("--model", metavar="NAME", help="Only the kernels of this model; see `doratune models`.")
@config_option
@click.option("--rank", "ranks", type=rank_range, multiple=True, help="Only this rank; repeatable.")
@click.option("--gpu", metavar="NAME", help="Only this GPU.")
@_output_option
@_replace_option
@click.option("--binaries/--no-binaries", default=True, help="With the compiled kernels (the default), or without.")
@click.option("--measured", is_flag=True, help="Only measured entries.")
@_sign_option
@store_option
@trust_option
@json_option
def cache_export(
    model: str | None,
    config: Path | None,
    ranks: tuple[int, ...],
    gpu: str | None,
    output: Path,
    replace: bool,
    binaries: bool,
    measured: bool,
    sign: Path | None,
    store: str | None,
    trusted: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the entries of your stores, or those of one model or GPU, to one compact file.

    Of several stores' entries of one spec it is the one that a lookup takes. Nothing is tuned or compiled: `cache
    build` writes everything that a model needs.
    """
    from .tuner.export_model import export_stores
    from .tuner.models import requested_model

    asked = None if model is None and config is None else requested_model(model, config)()
    key = _signing_key(sign)
    with _stores(store) as stores:
        made = export_stores(
            stores,
            output,
            model=asked,
            gpu=gpu,
            ranks=ranks,
            binaries=binaries,
            measured=measured,
            replace=replace,
            sign=key,
            trusted=trusted,
        )
    for text in made.skipped:
        message(f"left out: {text}")
    if as_json:
        print_json(vars(made) | {"skipped": list(made.skipped)})
    else:
        line(f"{made.path}: {made.entries} entries, {made.binaries} binaries, {made.bytes / 1e6:.1f} MB")


@cache.command("merge")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option(
    "--prefer",
    type=click.Choice(["faster", "newer", "refuse"]),
    default="faster",
    show_default=True,
    help="Which of two entries of one spec and provenance wins; refuse: merge nothing if there are such.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.option(
    "--store",
    type=LocationText(),
    metavar="PATH|URL",
    help="The store to merge into, made if missing; your own by default.",
)
@trust_option
@json_option
def cache_merge(
    sources: tuple[str, ...], prefer: str, dry_run: bool, store: str | None, trusted: tuple[str, ...], as_json: bool
) -> None:
    """Merge the entries and binaries of other stores into your own.

    Measured entries go before predicted ones, and these before defaults. Damaged rows are skipped and listed. Binaries
    come only from sources that may supply them to you, see DORATUNE_TRUST.
    """
    from .tuner.merge_stores import merge_stores, merge_table

    result = merge_stores(sources, store, prefer=prefer, dry_run=dry_run, trusted=trusted)
    for text in result.plan.skipped:
        message(f"skipped: {text}")
    if as_json:
        print_json(result.values())
        return
    if result.plan.changes:
        print_table(merge_table(result.plan))
    message(result.summary())


@cache.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--check", is_flag=True, help="Exit with code 1 if they differ.")
@json_option
def cache_diff(first: str, second: str, check: bool, as_json: bool) -> None:
    """Say in which entries and binaries two stores differ."""
    from .tuner.merge_stores import diff_stores, diff_table, diff_values

    found = diff_stores(first, second)
    for text in found.damaged:
        message(f"damaged: {text}")
    if as_json:
        print_json(diff_values(found))
    else:
        if found.entries:
            print_table(diff_table(found))
        only = [len(keys) for keys in found.binaries]
        message(
            f"{len(found.entries)} entries differ, {found.same} are the same; binaries in A alone: {only[0]}, in B "
            f"alone: {only[1]}"
        )
    if check and found:
        raise click.exceptions.Exit(1)


@cache.command("package")
@click.argument("stores", nargs=-1, required=True, metavar="STORE…")
@click.option("-o", "--output", required=True, type=_PATH, metavar="FOLDER", help="Where to write the wheel.")
@click.option("--name", metavar="NAME", help="Of the package; doratune-cache-sm90 for an H100, and so on, by default.")
@trust_option
@json_option
def cache_package(
    stores: tuple[str, ...], output: Path, name: str | None, trusted: tuple[str, ...], as_json: bool
) -> None:
    """Make a wheel of stores with binaries: who installs it compiles nothing that they have.

    It holds data only, for one architecture and one version of Triton, such as `cache build` writes. Lookups find the
    stores of every installed package of this kind.
    """
    from .tuner.package_store import package_stores

    made = package_stores(stores, output, name=name, trusted=trusted)
    if as_json:
        print_json(vars(made))
        return
    line(
        f"{made.path}: {made.name} {made.version}, {made.entries} entries, {made.binaries} binaries for "
        f"{made.architecture}, {made.bytes / 1e6:.1f} MB"
    )


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
            line(f"{count} binaries deleted from {opened.location}")


@cache.command("drift")
@click.option("--op", metavar="OP", help="Only this operation.")
@click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="The GPU here; others are refused.")
@click.option("--device", metavar="DEVICE", help="The GPU to measure on, such as cuda:1.")
@click.option("--jobs", type=jobs_range, help="Compile workers; one for each core by default.")
@click.option("--all", "everything", is_flag=True, help="Also winners that were measured under the present versions.")
@click.option("--lookups", is_flag=True, help="Each against what a lookup without it gives today: renews the bounds.")
@click.option("--apply", is_flag=True, help="Store the results: new winners, and the present versions of the others.")
@click.option("--check", is_flag=True, help="Exit with code 1 if a winner is no longer the fastest.")
@store_option
@json_option
def cache_drift(as_json: bool, check: bool, **options: Any) -> None:
    """Measure your winners again after an upgrade, each against the configs that it beat.

    Of your own store or the one named, the winners for the GPU here are measured whose Triton, PyTorch, driver, GPU
    name or template differs from the present one. Without --apply nothing is written. A run with --apply that was
    stopped continues where it was.

    With --lookups each is measured against the config that a lookup without it gives today, if that is another; the
    bounds that explain prints rest on these losses. Those of searches were measured while the store had fewer entries.
    If it is stopped, it begins with the first again.

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
