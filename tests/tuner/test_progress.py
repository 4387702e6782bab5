"""While a run is under way it says, in few lines, what is done, what is awaited and how long the rest will take."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from doratune.codegen.spec import KernelSpec
from doratune.tuner.outcome import FAILED, KEPT, TUNED
from doratune.tuner.progress import LINE_SECONDS, BarProgress, LineProgress, SilentProgress, standard_error_progress
from doratune.tuner.tally import Tally, duration

from .fakes import forward_spec

SPECS = [forward_spec(tokens) for tokens in (1, 16, 128, 512, 1024, 4096)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream: io.StringIO, clock: Clock) -> LineProgress:
    return LineProgress(stream, clock)


def search(said: SilentProgress, spec: KernelSpec, trials: int, budget: int = 10, before: int = 0) -> None:
    """A search that goes through ``trials`` configs, after ``before`` of an earlier run."""
    for count in range(before, before + trials + 1):
        said.current(spec, count, budget, 12.34 if count else None, 9.0, 12.9 if count else None)


def last(stream: io.StringIO) -> str:
    return stream.getvalue().splitlines()[-1]


# What a line says.


def test_a_line_says_what_is_done_awaited_and_left_and_how_the_last_kernel_fares(
    lines: LineProgress, stream: io.StringIO, clock: Clock
) -> None:
    lines.start(8, kept=2, lanes=2)
    search(lines, SPECS[0], 10)
    lines.done(SPECS[0], TUNED, 12.3, 9.0)
    clock.now += 40.0
    lines.queue(14)
    search(lines, SPECS[1], 10)
    # 20 trials in 40 s; 4 kernels of 10 trials are to come, and the final of the second.
    clock.now += LINE_SECONDS - 15.0 + 20.0
    lines.queue(14)
    assert stream.getvalue().splitlines()[0] == "8 kernels, 2 of them kept from the store"
    assert last(stream) == (
        "1 of 6 kernels after 60 s; about 2 min left; 20 trials, 0.3 a second; 14 compiles waited for; 2 GPUs; "
        f"10 of 10 trials, best 12.3 µs (floor 9.00, today 12.9): {SPECS[1]}"
    )


def test_the_line_after_the_last_kernel_says_how_it_ended_and_has_no_time_left(
    lines: LineProgress, stream: io.StringIO, clock: Clock
) -> None:
    lines.start(1, kept=0)
    search(lines, SPECS[0], 3)
    clock.now += 2.0
    lines.done(SPECS[0], TUNED, 12.34, 9.0)
    lines.queue(0)
    assert stream.getvalue().splitlines() == [
        "1 kernel",
        f"1 of 1 kernel after 2 s; 3 trials, 1.5 a second; tuned to 12.3 µs (floor 9.00): {SPECS[0]}",
    ]


def test_a_kernel_that_failed_has_no_time(lines: LineProgress, stream: io.StringIO) -> None:
    lines.start(1, kept=0)
    lines.done(SPECS[0], FAILED, None, 9.0)
    assert last(stream).endswith(f"; failed: {SPECS[0]}")


def test_a_kernel_without_a_trial_does_not_take_the_place_of_one_that_was_tried(
    lines: LineProgress, stream: io.StringIO, clock: Clock
) -> None:
    lines.start(3, kept=0)
    search(lines, SPECS[0], 2)
    clock.now += LINE_SECONDS
    search(lines, SPECS[1], 0)
    assert f"2 of 10 trials, best 12.3 µs (floor 9.00, today 12.9): {SPECS[0]}" in last(stream)


def test_lines_come_at_most_every_fifteen_seconds_and_are_plain(
    lines: LineProgress, stream: io.StringIO, clock: Clock
) -> None:
    lines.start(len(SPECS), kept=0)
    for step in range(1200):  # five minutes
        clock.now += 0.25
        lines.queue(step % 7)
        search(lines, SPECS[step % 5], 1)
    assert len(stream.getvalue().splitlines()) == 1 + 300 // 15
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_of_a_kind_of_notice_the_first_is_printed(lines: LineProgress, stream: io.StringIO) -> None:
    for spec in SPECS:
        lines.notice("clocks moved", f"{spec}: clocks moved: by 3 %")
    lines.notice("interruptions", "interruptions: 7 %")
    assert stream.getvalue().splitlines() == [f"{SPECS[0]}: clocks moved: by 3 %", "interruptions: 7 %"]


# How long the rest will take.

Do = Callable[[Tally], None]


def tally(total: int, *steps: Do) -> Tally:
    made = Tally(0.0, total)
    for step in steps:
        step(made)
    return made


def tried(spec: KernelSpec, trials: int, budget: int = 10, before: int = 0) -> Do:
    def step(made: Tally) -> None:
        for count in (before, before + trials):
            made.current(spec, count, budget, 1.0, 1.0, None)

    return step


def ended(spec: KernelSpec, trials: int, budget: int = 10, before: int = 0) -> Do:
    def step(made: Tally) -> None:
        tried(spec, trials, budget, before)(made)
        made.finish(spec, TUNED, 1.0, 1.0)

    return step


def elsewhere(spec: KernelSpec) -> Do:
    return lambda made: made.finish(spec, KEPT, 1.0, 1.0)


@pytest.mark.parametrize(
    ("total", "steps", "left"),
    [
        # Nothing is known before a kernel is finished.
        (4, [tried(SPECS[0], 9)], None),
        # 10 trials took 100 s; three more kernels of 10.
        (4, [ended(SPECS[0], 10)], 300.0),
        # The one under way has 6 of its 10 trials left.
        (4, [ended(SPECS[0], 10), tried(SPECS[1], 4)], (6 + 20) / 14 * 100.0),
        # Finished ones needed half of their budget, so the one with 40 needs 20; the one not begun as many as they did.
        (4, [ended(SPECS[0], 5), ended(SPECS[1], 5), tried(SPECS[2], 10, 40)], (10 + 5) / 20 * 100.0),
        # Trials of an earlier run took no time in this one, and tell how many a kernel needs.
        (3, [ended(SPECS[0], 2, before=8)], 2 * 10 / 2 * 100.0),
        # A kernel beyond the others' share may still end with its next trial.
        (2, [ended(SPECS[0], 5), tried(SPECS[1], 8)], 1 / 13 * 100.0),
        # Other workers did two more in the same time: they count as done, and as pace.
        (4, [ended(SPECS[0], 10), elsewhere(SPECS[1]), elsewhere(SPECS[2])], 10 / 30 * 100.0),
        # A search that an earlier run had finished plays its final all the same.
        (2, [ended(SPECS[0], 0, before=10)], 10 / 1 * 100.0),
        (1, [ended(SPECS[0], 10)], 0.0),
        (0, [], 0.0),
    ],
)
def test_the_time_left_follows_from_the_work_done(total: int, steps: list[Do], left: float | None) -> None:
    found = tally(total, *steps).seconds_left(100.0)
    assert found == (None if left is None else pytest.approx(left))


def test_kept_kernels_take_no_part_in_the_time_left(clock: Clock) -> None:
    """100 of 102 were kept: the rest takes as long as the one that was tuned."""
    stream = io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(102, kept=100)
    search(lines, SPECS[0], 10)
    clock.now += 50.0
    lines.done(SPECS[0], TUNED, 1.0, 1.0)
    assert "1 of 2 kernels after 50 s; about 50 s left" in last(stream)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89.4, "89 s"), (90.0, "2 min"), (3500.0, "58 min"), (3600.0, "1 h 0 min"), (9000.0, "2 h 30 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# On a terminal.


def test_a_terminal_has_a_bar_with_two_lines_below(clock: Clock) -> None:
    bar = BarProgress(Console(file=io.StringIO(), force_terminal=True), "tuning", clock)
    bar.start(4, kept=1)
    search(bar, SPECS[0], 10)
    clock.now += 10.0
    bar.done(SPECS[0], TUNED, 12.3, 9.0)
    bar.queue(3)
    bar.close()
    shown = io.StringIO()
    Console(file=shown, width=60).print(bar._bar.get_renderable())
    first, second, third = shown.getvalue().splitlines()
    assert "tuning" in first
    assert "1/3" in first
    assert second == "about 20 s left; 10 trials, 1.0 a second; 3 compiles waited…"
    assert third == f"tuned to 12.3 µs (floor 9.00): {SPECS[0]}"[:59] + "…"


def test_notices_appear_above_the_bar_once(clock: Clock) -> None:
    printed = io.StringIO()
    bar = BarProgress(Console(file=printed, width=80, force_terminal=True), clock=clock)
    bar.start(2, kept=0)
    bar.notice("clocks moved", "one: clocks moved [twice]")
    bar.notice("clocks moved", "two: clocks moved")
    bar.close()
    assert printed.getvalue().count("one: clocks moved [twice]") == 1
    assert "two: clocks moved" not in printed.getvalue()


@pytest.mark.parametrize("variable", [None, "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_bar_where_standard_error_is_no_terminal(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(standard_error_progress(), LineProgress)
