"""Differences are paired by seed; what the runs do not show is not said."""

from __future__ import annotations

from typing import Any

import pytest

from doratune.benchmarks.quality.arms import DORA, FULL, LORA, PEFT_DORA
from doratune.benchmarks.quality.clock import CLOCK
from doratune.benchmarks.quality.runs import ADAPT, PRECISION
from doratune.benchmarks.quality.summary import (
    CURVES,
    CURVES_APART,
    EQUAL_STEPS,
    EQUAL_TIME,
    loss_at,
    sentences,
    summarise,
    verdict,
)


def adapt_row(impl: str, seed: int, loss: float | None, *, rank: int | None = 8) -> dict[str, Any]:
    row = {"bench": "quality", "op": ADAPT, "impl": impl, "model": "m", "shape": [1, 2], "rank": rank, "dtype": "bf16"}
    row |= {"adapter": "fp32", "flags": ["autocast"], "seed": seed, "rate": 1e-3, "edge": False, "parameters": 5}
    held_out = None if loss is None else [loss + 0.4, loss]
    return {**row, "start_loss": 3.0, "loss": loss, "at": [1, 2], "held_out_loss": held_out}


def clock_row(impl: str, step_ms: float, *, rank: int | None = 8) -> dict[str, Any]:
    return {"bench": "quality", "op": CLOCK, "impl": impl, "rank": rank, "step_ms": step_ms}


def test_a_difference_is_paired_by_seed_and_taken_to_lora() -> None:
    noise = [0.5, -0.3, 0.1, -0.2, 0.0]  # of a seed; far larger than the difference
    rows = [adapt_row(LORA, seed, 2.0 + wide) for seed, wide in enumerate(noise)]
    rows += [adapt_row(DORA, seed, 1.99 + wide + 1e-4 * wide) for seed, wide in enumerate(noise)]
    rows += [adapt_row(FULL, seed, 2.0 + wide + 0.01 * (-1) ** seed, rank=None) for seed, wide in enumerate(noise)]
    found = {row["impl"]: row for row in summarise(rows) if row["op"] == EQUAL_STEPS}
    assert found.keys() == {DORA, FULL}
    assert found[DORA]["mean"] == pytest.approx(-0.01, abs=1e-5)
    assert found[DORA]["high"] < 0.0
    assert verdict(found[DORA]) == "lower than peft_lora"
    assert verdict(found[FULL]) == "no difference is seen"
    assert found[FULL]["rank"] == 8, "full fine-tuning is compared with LoRA of every rank"
    assert found[DORA]["p_holm"] == pytest.approx(2.0 * found[DORA]["p"])
    words = sentences(summarise(rows))
    assert any("no difference is seen" in sentence for sentence in words)


def test_an_interval_without_zero_is_no_finding_when_there_were_many_comparisons() -> None:
    row = {"low": 0.001, "high": 0.01, "mean": 0.005, "p_holm": 0.2, "comparisons": 12, "against": LORA}
    assert verdict(row) == "no difference is seen after correction for 12 comparisons"
    assert verdict({**row, "p_holm": 0.01}) == "higher than peft_lora"


def test_without_a_gpu_nothing_is_said_of_equal_time() -> None:
    rows = [adapt_row(name, seed, 2.0) for name in (LORA, DORA) for seed in range(2)]
    found = summarise(rows)
    assert not [row for row in found if row["op"] == EQUAL_TIME]
    assert sentences([*rows, *found])[-1] == "equal time: not measured: a GPU times steps, after the runs"


def test_at_equal_time_the_slower_one_is_read_off_before_its_end() -> None:
    slow = adapt_row(DORA, 1, 2.0)  # 3.0 at the start, 2.4 after the first step, 2.0 after the second
    assert loss_at(slow, 1.5) == pytest.approx(2.2)
    assert loss_at(slow, 0.5) == pytest.approx(2.7)
    assert loss_at(slow, 9.0) == 2.0
    rows = [adapt_row(name, seed, 2.0) for name in (LORA, DORA) for seed in (1, 2)]
    rows += [clock_row(LORA, 1500.0), clock_row(DORA, 2000.0)]
    (time,) = [row for row in summarise(rows) if row["op"] == EQUAL_TIME]
    assert time["mean"] == pytest.approx(0.2)
    (steps,) = [row for row in summarise(rows) if row["op"] == EQUAL_STEPS]
    assert steps["mean"] == 0.0
    assert {row["impl"]: row["step_ms"] for row in summarise(rows) if row["op"] == "reached"} == {
        LORA: 1500,
        DORA: 2000,
    }


def test_a_loss_that_was_not_finite_on_the_way_is_no_loss_at_equal_time() -> None:
    slow = [adapt_row(DORA, seed, 2.0) for seed in (1, 2, 3)]
    slow[0]["held_out_loss"][0] = None
    assert loss_at(slow[0], 1.5) is None
    rows = [
        *slow,
        *(adapt_row(LORA, seed, 2.0) for seed in (1, 2, 3)),
        clock_row(LORA, 1500.0),
        clock_row(DORA, 2000.0),
    ]
    (time,) = [row for row in summarise(rows) if row["op"] == EQUAL_TIME]
    assert (time["mean"], time["diverged"]) == (pytest.approx(0.2), 1)


def test_equal_time_needs_the_clock_of_every_method() -> None:
    rows = [adapt_row(name, seed, 2.0) for name in (LORA, DORA) for seed in (1, 2)]
    assert not [row for row in summarise([*rows, clock_row(LORA, 1.0)]) if row["op"] == EQUAL_TIME]


def test_seeds_that_diverged_and_rates_at_the_edge_are_told() -> None:
    rows = [adapt_row(LORA, seed, 2.0) for seed in range(4)]
    rows += [{**adapt_row(DORA, seed, 1.9 - 0.01 * seed if seed else None), "edge": True} for seed in range(4)]
    (said,) = [sentence for sentence in sentences(summarise(rows)) if "doratune" in sentence]
    assert "a learning rate is at the edge of its grid" in said
    assert "1 seeds diverged" in said


def test_the_distance_of_curves_is_to_the_fp32_one_of_the_same_seed() -> None:
    def curve(impl: str, dtype: str, adapter: str, seed: int, off: float) -> dict[str, Any]:
        row = {**adapt_row(impl, seed, 2.0), "op": PRECISION, "dtype": dtype, "adapter": adapter, "flags": []}
        return {**row, "train_loss": [seed + 3.0 + off, seed + 2.0 - off]}

    rows = []
    for seed in (1, 2, 3):
        rows.append(curve(PEFT_DORA, "fp32", "fp32", seed, 0.0))
        rows.append(curve(PEFT_DORA, "bf16", "bf16", seed, 0.2 + 0.001 * seed))
        rows.append(curve(DORA, "bf16", "bf16", seed, 0.1 + 0.002 * seed))
    found = summarise(rows)
    means = {row["impl"]: row["mean"] for row in found if row["op"] == CURVES}
    assert means == {PEFT_DORA: pytest.approx(0.202), DORA: pytest.approx(0.104)}
    (apart,) = [row for row in found if row["op"] == CURVES_APART]
    assert apart["mean"] == pytest.approx(-0.098)
    assert verdict(apart) == "lower than peft_dora"
