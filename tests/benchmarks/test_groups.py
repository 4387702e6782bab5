"""Grouped and separate projections compute the same outputs, and a row of a group says what was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from doratune.benchmarks import groups
from doratune.benchmarks.groups import (
    GROUP_PEERS,
    GROUPS,
    RANK,
    GroupCase,
    group_cases,
    implementations,
    run_group,
    worst_of_group,
)
from doratune.benchmarks.results import OURS, Outcome, case_of, document
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.runtime.kernel import Kernel

GPU = find_gpu("h200")


@pytest.fixture
def case() -> GroupCase:
    """Two small projections of one x, on the CPU."""
    values: dict[str, Any] = {"rank": RANK, "tokens": 16, "dtype": "bf16", "adapter": "bf16", "gpu": "cpu"}
    specs = {name: KernelSpec.create("lora_compose", d_out=d_out, **values) for name, d_out in (("q", 48), ("k", 32))}
    return GroupCase("q,k", 16, 96, specs)


def kernels_of(case: GroupCase) -> dict[str, Kernel]:
    return {name: Kernel(spec, torch.device("cpu")) for name, spec in case.specs.items()}


def test_grouped_and_separate_projections_agree_with_the_definition_and_with_each_other(case: GroupCase) -> None:
    runs = implementations(case, kernels_of(case))
    assert list(runs) == [OURS, *GROUP_PEERS]
    results = {}
    for impl in (OURS, "separate"):
        tensors = case.make(0, "cpu")
        runs[impl](tensors)
        assert worst_of_group(case, impl, tensors)[1] is None
        results[impl] = [tensors["q.y"], tensors["k.y"]]
        other = "separate" if impl == OURS else OURS
        assert worst_of_group(case, other, tensors)[1] is not None, "its h is that of this implementation alone"
    for ours, separate in zip(results[OURS], results["separate"], strict=True):
        assert torch.allclose(ours, separate, rtol=0.02, atol=0.05)


def test_the_products_alone_are_those_of_the_whole(case: GroupCase) -> None:
    runs = implementations(case, kernels_of(case))
    tensors = case.make(0, "cpu")
    runs["h_grouped"](tensors)
    runs["h_separate"](tensors)
    for name in case.specs:
        assert torch.allclose(tensors["h"][:, case.columns(name)], tensors[f"{name}.h"], rtol=0.02, atol=0.05)


@pytest.fixture
def measured(case: GroupCase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run_group`` on CPU tensors, with given times instead of a clock."""
    make = GroupCase.make
    loaded = kernels_of(case)
    monkeypatch.setattr(groups, "load", lambda spec: next(k for k in loaded.values() if k.spec == spec))
    monkeypatch.setattr(GroupCase, "make", lambda self, seed: make(self, seed, "cpu"))
    monkeypatch.setattr(groups, "Rotation", lambda *_, **__: None)
    monkeypatch.setattr(
        groups, "time_in_turn", lambda runs, *_, **__: ({name: [1.0, 2.0] for name in runs}, dict.fromkeys(runs))
    )

    def run(peers: tuple[str, ...] = GROUP_PEERS) -> Outcome:
        outcome = Outcome()
        run_group(case, peers, GPU, 2, outcome)
        return outcome

    return run


def test_a_group_has_a_row_for_each_implementation(case: GroupCase, measured: Any) -> None:
    outcome = measured()
    assert outcome.failures == []
    assert [row["impl"] for row in outcome.rows] == [OURS, *GROUP_PEERS]
    for row in outcome.rows:
        assert (row["bench"], row["op"], row["model"], row["shape"]) == ("kernels", "q,k", "llama-8b", [16, 48, 32, 96])
        assert row["us"] == 1.5
        assert (row["rel_err"] is None) == row["impl"].startswith("h_")
    moved = 2 * (16 * 96 + 2 * RANK * 96 + (RANK + 32) * 48 + (RANK + 32) * 32)
    assert outcome.rows[0]["floor_us"] == pytest.approx(GPU.floor_us(moved, 2 * 16 * RANK * (2 * 96 + 80), "bf16"))
    assert [row["impl"] for row in measured(("h_grouped",)).rows] == [OURS, "h_grouped"]


def test_an_inaccurate_group_is_a_failure_with_its_case(
    case: GroupCase, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernel, "__call__", lambda self, out, **_: out.fill_(float("nan")))
    outcome = measured(("separate",))
    assert [failure.split(":")[0] for failure in outcome.failures] == [f"{case}, {OURS}", f"{case}, separate"]
    assert "q: y is off by nan" in outcome.rows[0]["complaint"]
    json.loads(document({}, outcome.rows), parse_constant=pytest.fail)


def test_every_group_is_another_case() -> None:
    cases = list(group_cases("h200"))
    assert {case.op for case in cases} == set(GROUPS)
    assert {case.tokens for case in cases} == {16, 4096}
    facts = [{"bench": "kernels", "op": case.op, "shape": [case.tokens, *case.widths, case.d_in]} for case in cases]
    assert len({case_of(row) for row in facts}) == len(cases)
    assert [case.op for case in group_cases("h200", ("gate,up", "weight_norm"))] == ["gate,up"] * 2
    assert next(iter(group_cases("h200", ("q,k,v",)))).widths == (4096, 1024, 1024)
