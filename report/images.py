"""The plots as PNG images for slides, drawn by kaleido in a Chrome or Chromium of this machine."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

from ..errors import DoratuneError
from ..printable import printable
from ..temporaries import remove_at_end, temporary_name
from .document import Block, Document
from .page import GENERATOR, figure_of
from .plots import plain
from .theme import LIGHT, SCHEMES, paint, template

WIDTH, LEAST_HEIGHT, SCALE = 1280, 720, 1.5
"""CSS pixels of an image, and pixels of the image for each."""
_FONT = 17
_SPACE = 160
"""Pixels that the title, the line below it and the legend take."""

_SECONDS = 90

_HEADER = 33
"""Bytes of a PNG's signature and header chunk, with which every one begins."""
_MARK = b"tEXtSoftware\0" + GENERATOR.encode()
"""Name and text of the chunk by which a later report knows that an image may be replaced."""

BROWSER = "BROWSER_PATH"
"""The environment variable that names the browser for kaleido."""

_INSTALL = f"install one (apt-get install chromium), or name it in {BROWSER}. --format html and md need none"


class ImageError(DoratuneError):
    """The images cannot be drawn."""


def write_images(document: Document, folder: Path, source: str) -> list[Path]:
    """Write one image for each plot into ``folder``; ``source`` is the line below each title. Return the files.

    All are drawn before the first gets its name: where one fails, what an earlier report left stays as it was.

    Raises:
        ImageError: kaleido or a browser is missing, the browser failed, or a file of an image's name is no image of
            an earlier report.
    """
    kaleido, errors = _kaleido()
    named = os.environ.get(BROWSER)
    if named and not Path(named).is_file():  # some versions of kaleido begin with it all the same
        raise ImageError(f"no Chrome or Chromium was found in {BROWSER}, {printable(named)}; {_INSTALL}")
    paths = [folder / f"{block.key}.png" for block in document.figures]
    for path in paths:
        if os.path.lexists(path) and not is_image(path):
            raise ImageError(f"{path} exists and is no image of doratune: name another folder with -o, or remove it")
    if not paths:
        return []
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    fresh = above / temporary_name(folder.name or "report")
    try:
        fresh.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # and not the temporary folder's name
    remove_at_end(str(fresh))
    try:
        _draw(document, fresh, source, kaleido, errors)
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            made = fresh / path.name
            made.write_bytes(marked(made.read_bytes()))
            os.replace(made, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return paths


def is_image(path: Path) -> bool:
    """Whether a file is an image of an earlier report."""
    try:
        with path.open("rb") as file:
            return _MARK in file.read(_HEADER + 2 * len(_MARK))
    except OSError:
        return False


def marked(png: bytes) -> bytes:
    """A PNG image with a text chunk after its header that says who made it."""
    chunk = struct.pack(">I", len(_MARK) - 4) + _MARK + struct.pack(">I", zlib.crc32(_MARK))
    return png[:_HEADER] + chunk + png[_HEADER:]


def _draw(document: Document, folder: Path, source: str, kaleido: Any, errors: Any) -> None:
    paths = [folder / f"{block.key}.png" for block in document.figures]
    drawn = [
        {
            "fig": _slide(block, source),
            "path": str(path),
            "opts": {"format": "png", "width": WIDTH, "scale": SCALE, "height": _height(block)},
        }
        for block, path in zip(document.figures, paths, strict=True)
    ]
    try:
        # Without MathJax, which would be fetched from the network.
        failed = kaleido.write_fig_from_object_sync(drawn, kopts={"mathjax": False, "timeout": _SECONDS}) or ()
    except errors.ChromeNotFoundError:
        raise ImageError(f"no Chrome or Chromium was found to draw the images; {_INSTALL}") from None
    except (errors.BrowserFailedError, errors.BrowserClosedError, errors.KaleidoError, OSError) as error:
        raise ImageError(
            f"the browser that draws the images failed: {_line(error)}; --format html needs none"
        ) from error
    if failed:
        raise ImageError(f"{len(failed)} of {len(paths)} images could not be drawn: {_line(failed[0])}")


def _kaleido() -> tuple[Any, Any]:
    try:
        import kaleido
        from kaleido import errors
    except ImportError:
        raise ImageError("kaleido is not installed; run: pip install 'doratune[report]'") from None
    return kaleido, errors


def _slide(block: Block, source: str) -> dict[str, Any]:
    """The plot with its title and source above, large enough for a screen across a room."""
    figure = paint(figure_of(block), LIGHT)
    layout = figure["layout"]
    layout.update(
        template=template(LIGHT, _FONT),
        title={
            "text": plain(block.title),
            "subtitle": {"text": plain(source, 150), "font": {"size": 13, "color": SCHEMES[LIGHT]["muted"]}},
            "x": 0.01,
            "font": {"size": 26},
        },
        height=_height(block),
        margin={"l": 16, "r": 24, "t": 100, "b": 170},
    )
    legend = {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0.01, "x": 0}
    layout["legend"] = {**layout.get("legend", {}), **legend}
    return figure


def _height(block: Block) -> int:
    assert block.figure is not None
    return max(LEAST_HEIGHT, int(block.figure().layout.height or 0) + _SPACE)


def _line(error: Exception) -> str:
    """The first line of what an error says; some of kaleido's have a tuple of lines."""
    said = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return next(iter(said.strip().splitlines()), type(error).__name__)
