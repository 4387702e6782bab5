"""``doratune report``: parse, gather, write. Nothing heavy is loaded before the command runs."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ..terminal.console import (
    LocationText,
    NamedPath,
    config_option,
    json_option,
    line,
    message,
    print_json,
    rank_range,
    store_option,
    tokens_range,
)


@click.command()
@click.option(
    "--format",
    "format",
    type=click.Choice(["html", "md", "png"]),
    default="html",
    show_default=True,
    help="One page, tables for a pull request, or an image of each plot for slides.",
)
@click.option(
    "-o",
    "--output",
    type=NamedPath(),
    metavar="PATH",
    help="The file to write, with --format png the folder. By default doratune-report.html or doratune-report here; "
    "md goes to standard output, as does html with -o -.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
@click.option(
    "--results",
    type=NamedPath(),
    multiple=True,
    metavar="FILE",
    help="A results file of `doratune bench`: doratune beside its peers; repeatable.",
)
@click.option("--model", metavar="NAME", help="A known model: its kernels, its step, and what untuned shapes may lose.")
@config_option
@click.option("--gpu", default="auto", show_default=True, metavar="NAME", help="Only this GPU: h200, rtx4090, sm_90, …")
@click.option(
    "--rank",
    "ranks",
    type=rank_range,
    multiple=True,
    help="Only this adapter rank; repeatable. With a model by default that of most entries.",
)
@click.option(
    "--tokens", type=tokens_range, help="Tokens of the model's training step. By default those of most entries."
)
@store_option
@click.option(
    "--study-storage",
    type=LocationText(),
    metavar="PATH|URL",
    help="The Optuna storage of the searches, as of `doratune tune`; a file beside the user's store by default.",
)
@json_option
def report(
    format: str,
    output: Path | None,
    open_page: bool,
    results: tuple[Path, ...],
    model: str | None,
    config: Path | None,
    gpu: str,
    ranks: tuple[int, ...],
    tokens: int | None,
    store: str | None,
    study_storage: str | None,
    as_json: bool,
) -> None:
    """Show what was tuned and what it brought: winners, gains, peers, searches, a model's step, what is not known.

    \b
    doratune report --open                            a page in the browser
    doratune report --model llama-8b --gpu h200       also the model's step and the bound of untuned shapes
    doratune report --format md                       tables for a pull request

    The page needs nothing beside itself and requests nothing. --json prints the values instead of writing a report.
    """
    if open_page and (format != "html" or as_json):
        raise UsageError("--open shows the page: leave out --json, and --format or take html")
    if open_page and output == Path("-"):
        raise UsageError("--open shows a file: leave out -o -")
    if as_json and output is not None:
        raise UsageError("--json prints on standard output and writes no report: leave out --output")
    from .output import check, write

    if not as_json:
        check(format, output)
    from .data import Request, gather

    found = gather(Request(store, study_storage, results, model, config, gpu=gpu, ranks=ranks, tokens=tokens))
    if as_json:
        print_json(found.values())
        return
    from .sections import document

    text, files = write(found, document(found), format, output)
    if text:
        click.echo(text, nl=False)
    for file in files:
        line(file)
    if found.empty and found.results:
        message("nothing was tuned yet, and no row of the results files can be shown")
    elif found.empty:
        message("nothing was tuned yet: `doratune tune --model llama-8b` tunes a model")
    elif format == "png" and not files:
        message("there is nothing to plot")
    if open_page:
        import webbrowser

        if not webbrowser.open(files[0].absolute().as_uri()):
            message(f"no browser could be opened here; open {files[0]} in one")
