"""Write a report: one HTML file, Markdown, or a folder of images. What is no report is never replaced."""

from __future__ import annotations

from pathlib import Path

from ..errors import DoratuneError, UsageError
from ..internals.versions import installed
from ..temporaries import write_whole
from .data import Report
from .document import Document
from .markdown import markdown
from .page import GENERATOR, page

HTML, MARKDOWN, PNG = "html", "md", "png"
FORMATS = (HTML, MARKDOWN, PNG)
DEFAULTS = {HTML: Path("doratune-report.html"), PNG: Path("doratune-report")}
"""Where a report goes that no output is named for, in the current folder; Markdown goes to standard output."""

STANDARD_OUTPUT = Path("-")
_MARK = f"<!-- {GENERATOR} -->"
"""Begins a report in Markdown."""
_HEAD = 2048
"""Bytes at the beginning of a file by which a report is known."""


class MissingPackageError(DoratuneError):
    """A package that draws the plots is not installed."""


def check(format: str, output: Path | None) -> None:
    """Say before the stores are read, which takes seconds, what will keep the report from being written.

    Raises:
        MissingPackageError: plotly is not installed. UsageError: the output exists and is no report, or is a folder.
    """
    if format != MARKDOWN and installed("plotly") is None:
        raise MissingPackageError(
            f"--format {format} draws its plots with plotly, which is not installed; run: "
            "pip install 'doratune[report]'. --format md and --json need no plots"
        )
    target = output or DEFAULTS.get(format)
    if target == STANDARD_OUTPUT and format == PNG:
        raise UsageError("-o -: images do not go to standard output; name a folder for them")
    if target is None or target == STANDARD_OUTPUT:
        return
    above = next((each for each in target.parents if each.exists()), None)
    if above is not None and not above.is_dir():
        raise UsageError(f"{target}: {above} is a file and no folder; name another path with -o")
    if target.parts[:1] and target.parts[0].startswith("~"):  # a shell replaces it, unless there is no such user
        raise UsageError(f"{target}: there is no such user's folder; name a path without ~")
    if format == PNG:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file: name a folder for the images with -o, one is made for each plot")
    elif target.is_dir():
        raise UsageError(f"{target} is a folder: name a file with -o, such as {target / 'report'}.{format}")
    elif target.exists() and not target.is_file():  # to read a pipe would wait for whoever writes to it
        raise UsageError(f"{target} is not a file: name another with -o")
    elif target.exists() and not _is_report(target, format):
        raise UsageError(f"{target} exists and is no report of doratune: name another file with -o, or remove it")


def write(report: Report, document: Document, format: str, output: Path | None) -> tuple[str, list[Path]]:
    """Write the report; return the text for standard output, and the files that were written.

    Raises:
        ImageError: the images cannot be drawn. OSError: the output cannot be written.
    """
    if format == MARKDOWN:
        text = f"{_MARK}\n{markdown(document)}"
        if output is None or output == STANDARD_OUTPUT:
            return text, []
        write_whole(output, text)
        return "", [output]
    target = output or DEFAULTS[format]
    if format == HTML and output == STANDARD_OUTPUT:
        return page(document), []
    if format == HTML:
        write_whole(target, page(document))
        return "", [target]
    from .images import write_images

    return "", write_images(document, target, source_line(report))


def source_line(report: Report) -> str:
    """What the figures of a slide rest on, in a line."""
    here = report.here
    gpus = sorted({winner.spec.gpu for winner in report.winners})
    known = sorted({winner.entry.evaluation.provenance for winner in report.winners})
    parts = [f"doratune {here.doratune}, commit {here.commit[:12]}, {here.created_at[:10]}"]
    if gpus:
        parts.append(f"winners for {', '.join(gpus)}: {' and '.join(known)}")
    files = [f"{file.name} ({file.env.get('gpu', '')} {file.env.get('date', '')})" for file in report.results]
    return "; ".join([*parts, *files])


def _is_report(path: Path, format: str) -> bool:
    """Whether a file begins as a report does; one that only quotes its mark is none."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if format == MARKDOWN:
        return head.startswith(_MARK.encode())
    mark = f'<meta name="generator" content="{GENERATOR} '.encode()
    return mark in head[: head.find(b"<title>")] and head.startswith(b"<!doctype html>\n<html")
