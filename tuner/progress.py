"""Progress of a tuning run: a bar on a terminal, a line now and then elsewhere, nothing in tests."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..codegen.spec import KernelSpec

LINE_SECONDS = 15.0
"""Seconds between two lines where standard error is no terminal."""


class SilentProgress:
    """Prints nothing; the base of the others."""

    def start(self, total: int, kept: int) -> None:
        """A run of ``total`` kernels begins, ``kept`` of which the store has already."""

    def current(
        self,
        spec: KernelSpec,
        trials: int,
        budget: int,
        best_us: float | None,
        floor_us: float,
        incumbent_us: float | None = None,
    ) -> None:
        """A kernel has seen ``trials`` of at most ``budget`` configs; ``best_us`` is the fastest so far,
        ``incumbent_us`` the time of what runs today."""

    def queue(self, compiling: int) -> None:
        """So many compiles are waited for."""

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        """A kernel is finished: ``tuned``, ``partial`` or ``failed``."""

    def note(self, text: str) -> None:
        """A message, such as that the run is stopping."""

    def close(self) -> None:
        """The run is over."""


class LineProgress(SilentProgress):
    """Plain lines on a stream, at most one every :data:`LINE_SECONDS` besides notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = self._done = 0
        self._next = self._began = time.monotonic()

    def start(self, total: int, kept: int) -> None:
        self._total, self._done = total, kept
        self._began = time.monotonic()
        self.note(f"{total} kernels" + (f", {kept} of them kept from the store" if kept else ""))
        self._next = self._began + LINE_SECONDS

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        self._done += 1
        now = time.monotonic()
        if now >= self._next or self._done == self._total:
            self._next = now + LINE_SECONDS
            time_text = f": {us:.1f} us (floor {floor_us:.1f})" if us is not None else ""
            self.note(f"{self._done}/{self._total} after {now - self._began:.0f} s, {outcome} {spec}{time_text}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress(SilentProgress):
    """A bar on a terminal: kernels done, time left, the current kernel and its best time against its floor.

    ``doing`` is the word before the bar.
    """

    def __init__(self, console: Console, doing: str = "tuning") -> None:
        self._console = console
        self._bar = Progress(
            TextColumn(doing),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def start(self, total: int, kept: int) -> None:
        # Kept kernels take no time: counting them would make the time left too short.
        self._task = self._bar.add_task("", total=total - kept)
        if kept:
            self.note(f"{kept} of {total} kernels kept from the store")
        self._bar.start()

    def current(
        self,
        spec: KernelSpec,
        trials: int,
        budget: int,
        best_us: float | None,
        floor_us: float,
        incumbent_us: float | None = None,
    ) -> None:
        if self._task is not None:
            best = "" if best_us is None else f" best {best_us:.1f} us, floor {floor_us:.1f}"
            self._bar.update(self._task, description=f"{spec} {trials}/{budget}{best}")

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        if self._task is not None:
            self._bar.advance(self._task)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def standard_error_progress(doing: str = "tuning") -> SilentProgress:
    """The progress that suits standard error: a bar when it is a terminal, else lines."""
    console = Console(stderr=True)
    return BarProgress(console, doing) if console.is_terminal else LineProgress(sys.stderr)
