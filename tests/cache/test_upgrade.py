"""What an upgrade changed is named, and what it may cost is read off the entry's final."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doratune.cache.entry import PREDICTED, Contender, Entry, Environment
from doratune.cache.upgrade import Change, changes, describe, warning

from .world import a_spec, an_entry, with_final

THEN = an_entry().environment
"""Triton 3.7.1, PyTorch 2.13.0, driver 580.1, on an H200."""


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (THEN, ()),
        (replace(THEN, triton="3.8.0"), (Change("Triton", "3.7.1", "3.8.0"),)),
        (replace(THEN, torch="2.14.0"), (Change("PyTorch", "2.13.0", "2.14.0"),)),
        (replace(THEN, driver="590.2"), (Change("driver", "580.1", "590.2"),)),
        (replace(THEN, gpu_name="NVIDIA H200 NVL"), (Change("GPU", "NVIDIA H200", "NVIDIA H200 NVL"),)),
        (replace(THEN, driver="", gpu_name=""), ()),  # where the driver cannot be asked
        (replace(THEN, driver="unknown (6.1.0)"), ()),
        (replace(THEN, doratune="9.9.9"), ()),  # the template's digest says whether that matters
        (replace(THEN, gpu="h100-sxm", driver="590.2", gpu_name="NVIDIA H100"), ()),  # another machine's driver
    ],
)
def test_what_differs_is_named(here: Environment, expected: tuple[Change, ...]) -> None:
    assert changes(THEN, here) == expected


def test_the_changes_are_one_phrase() -> None:
    found = changes(THEN, replace(THEN, triton="3.8.0", driver="590.2"))
    assert describe(found) == "Triton 3.7.1, driver 580.1; here 3.8.0, 590.2"


HERE = replace(THEN, triton="3.8.0")


def with_runner_up(us: float) -> Entry:
    entry = with_final()
    assert entry.final is not None
    beaten = replace(entry.final.beaten[0], samples_us=(us,))
    return replace(entry, final=replace(entry.final, contenders=(entry.final.winner, beaten)))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (with_runner_up(20.46), "runner-up took 2.3 % longer"),
        (with_runner_up(19.9), "as fast within the noise"),
        (an_entry(), "was not recorded, so what the change may cost is unknown"),
    ],
)
def test_the_warning_says_what_the_change_may_cost(entry: Entry, said: str) -> None:
    text = warning(entry, HERE)
    assert text is not None
    assert text.startswith("measured under Triton 3.7.1; here 3.8.0. ")
    assert said in text


def test_a_winner_that_played_alone_has_no_lead_to_read_off() -> None:
    entry = with_final()
    assert entry.final is not None
    alone = replace(entry.final, contenders=(Contender(entry.config, ("exact",), (20.0,)),))
    assert "No other config was timed" in str(warning(replace(entry, final=alone), HERE))


def test_there_is_no_warning_without_a_change_or_a_measurement() -> None:
    assert warning(with_final(), THEN) is None
    assert warning(an_entry(a_spec(), PREDICTED), HERE) is None
