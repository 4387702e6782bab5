"""Progress of a tuning run: a bar on a terminal, a line now and then elsewhere, nothing in tests."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..codegen.spec import KernelSpec
from ..printable import printable
from .tally import Tally

LINE_SECONDS = 15.0
"""Seconds between two lines where standard error is no terminal."""

Clock = Callable[[], float]


class SilentProgress:
    """Prints nothing; the base of the others. Lanes call :meth:`current` from threads of their own."""

    def start(self, total: int, kept: int, lanes: int = 1) -> None:
        """A run of ``total`` kernels on ``lanes`` GPUs begins, ``kept`` of which the store has already."""

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
        ``incumbent_us`` the time of what runs today. The first call for a kernel comes before its first trial of this
        run: its ``trials`` are those of earlier runs."""

    def queue(self, compiling: int) -> None:
        """So many compiles are waited for."""

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        """A kernel is finished: ``tuned``, ``partial`` or ``failed``, or ``kept`` if another worker tuned it."""

    def note(self, text: str) -> None:
        """A message, such as that the run is stopping."""

    def notice(self, kind: str, text: str) -> None:
        """A message that many kernels may cause: of each ``kind`` only the first is printed."""

    def close(self) -> None:
        """The run is over."""


class _Counting(SilentProgress):
    """Keeps the tally of a run; the subclasses say it.

    ``clock`` returns seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tally = Tally(clock())
        self._lock = threading.Lock()
        self._noticed: set[str] = set()

    def start(self, total: int, kept: int, lanes: int = 1) -> None:
        with self._lock:
            self._tally = Tally(self._clock(), total - kept, lanes)

    def current(
        self,
        spec: KernelSpec,
        trials: int,
        budget: int,
        best_us: float | None,
        floor_us: float,
        incumbent_us: float | None = None,
    ) -> None:
        with self._lock:
            self._tally.current(spec, trials, budget, best_us, floor_us, incumbent_us)
            self._changed()

    def queue(self, compiling: int) -> None:
        with self._lock:
            self._tally.compiling = compiling
            self._changed()

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        with self._lock:
            self._tally.finish(spec, outcome, us, floor_us)
            self._changed()

    def notice(self, kind: str, text: str) -> None:
        if kind not in self._noticed:
            self._noticed.add(kind)
            self.note(text)

    def _changed(self) -> None:
        """Called with the lock held whenever the tally has changed."""


class LineProgress(_Counting):
    """Plain lines on a stream, at most one every :data:`LINE_SECONDS` besides notes, and one after the last kernel."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream
        self._next = clock() + LINE_SECONDS
        self._ended = False

    def start(self, total: int, kept: int, lanes: int = 1) -> None:
        super().start(total, kept, lanes)
        self._next, self._ended = self._clock() + LINE_SECONDS, False
        kept_text = f", {kept} of them kept from the store" if kept else ""
        self.note(f"{total} kernel{'' if total == 1 else 's'}{kept_text}")

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def _changed(self) -> None:
        now, ends = self._clock(), self._tally.ended and not self._ended
        if now >= self._next or ends:
            self._next = now + LINE_SECONDS
            self._ended = self._tally.ended
            self.note("; ".join([self._tally.kernels(now), *self._tally.state(now), *self._tally.latest]))


class BarProgress(_Counting):
    """A bar on a terminal, and below it two lines: trials, compiles and time left; the kernel that was tried last.

    ``doing`` is the word before the bar.
    """

    def __init__(self, console: Console, doing: str = "tuning", clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        columns = (TextColumn(doing), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = _BarWithLines(*columns, console=console, transient=True, lines=self._lines)
        self._task: TaskID | None = None

    def start(self, total: int, kept: int, lanes: int = 1) -> None:
        super().start(total, kept, lanes)
        self._task = self._bar.add_task("", total=total - kept)
        if kept:
            self.note(f"{kept} of {total} kernels kept from the store")
        self._bar.start()

    def done(self, spec: KernelSpec, outcome: str, us: float | None, floor_us: float) -> None:
        super().done(spec, outcome, us, floor_us)
        if self._task is not None:
            self._bar.advance(self._task)

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        self._bar.stop()

    def _lines(self) -> list[str]:
        with self._lock:
            return ["; ".join(self._tally.state(self._clock())), *self._tally.latest]


class _BarWithLines(Progress):
    """Rich's bars with lines of text below them, which are cut at the terminal's width."""

    def __init__(
        self, *columns: ProgressColumn, console: Console, transient: bool, lines: Callable[[], list[str]]
    ) -> None:
        self._lines_below = lines
        super().__init__(*columns, console=console, transient=transient)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in self._lines_below():
            yield Text(printable(line), no_wrap=True, overflow="ellipsis")


def standard_error_progress(doing: str = "tuning") -> SilentProgress:
    """The progress that suits standard error: a bar when it is a terminal, else lines."""
    console = Console(stderr=True)
    # FORCE_COLOR, which CI systems set, makes rich take any stream for a terminal.
    moving = console.is_terminal and sys.stderr.isatty() and not console.is_dumb_terminal
    return BarProgress(console, doing) if moving else LineProgress(sys.stderr)
