"""A target is met or missed by what the rows say, against the peer of the same case and no other; what was not measured
is neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from doratune.benchmarks.results import OURS, Row, read_rows
from doratune.benchmarks.targets import MET, MISSED, TARGETS, UNMEASURED, Verdict, judge

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def row(impl: str, us: float | None, **values: Any) -> Row:
    case = {"bench": "kernels", "op": "weight_norm", "shape": [4096, 4096], "rank": 384, "dtype": "bf16"}
    facts = {"adapter": "bf16", "flags": [], "us": us, "floor_us": 10.0, "rel_err": 1e-7, "peak_mb": 5.0}
    return {**case, "impl": impl, **facts, **values}


def verdict(rows: list[Row], figure: str, what: str | None = None) -> Verdict:
    (found,) = (v for v in judge(rows) if v.target.figure == figure and what in (None, v.target.what))
    return found


@pytest.mark.parametrize(("us", "outcome"), [(27.9, MET), (28.1, MISSED)])
def test_a_time_is_held_against_the_peer_of_its_case(us: float, outcome: str) -> None:
    other = row("cublas_product", 1000.0, shape=[4096, 14336])
    rows = [row(OURS, us), row("cublas_product", 20.0), other]
    found = verdict(rows, "time / cublas_product", "r = 384, 4096×4096")
    assert found.measured == pytest.approx(us / 20.0)
    assert found.outcome == outcome
    assert found.case == "weight_norm 4096×4096 r=384 bf16"


@pytest.mark.parametrize(("us", "outcome"), [(139.0, MISSED), (141.0, MET)])
def test_a_speedup_must_be_at_least_its_bound(us: float, outcome: str) -> None:
    assert verdict([row(OURS, 20.0), row("peft_eager", us)], "peft_eager / time").outcome == outcome


def test_runs_are_not_compared_with_each_other() -> None:
    ours, peer = [row(OURS, 20.0)], [row("peft_eager", 1000.0)]
    assert {v.outcome for v in judge(ours, peer) if v.target.figure == "peft_eager / time"} == {UNMEASURED}
    assert {v.outcome for v in judge(ours + peer) if v.target.figure == "peft_eager / time"} == {MET}


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    verdicts = judge([row(OURS, 20.0), row("peft_eager", 200.0)])
    outcomes = {(v.target.op, v.target.figure): v.outcome for v in verdicts}
    assert outcomes["weight_norm", "peft_eager / time"] == MET
    assert outcomes["weight_norm", "dorafactors / time"] == UNMEASURED
    assert outcomes["compose_forward", "copy / time"] == UNMEASURED
    assert judge([]) == []


@pytest.mark.parametrize("change", [{"dtype": "fp16", "adapter": "fp16"}, {"adapter": "fp32"}, {"flags": ["autocast"]}])
def test_the_targets_of_plain_bf16_leave_other_forms_alone(change: dict[str, Any]) -> None:
    rows = [row(OURS, 1.0, **change), row("cublas_product", 100.0, **change)]
    times = [v for v in judge(rows) if v.target.figure == "time / cublas_product"]
    assert times
    assert {v.outcome for v in times} == {UNMEASURED}
    assert verdict(rows, "rel_err").outcome == MET  # accuracy is promised for every form


def test_the_workspace_bound_follows_the_shape() -> None:
    bound = 8 * (8192 * 384 + 384**2) / 1e6 + 1.0
    for megabytes, outcome in ((bound - 0.1, MET), (bound + 0.1, MISSED)):
        found = verdict([row(OURS, 300.0, shape=[8192, 28672], peak_mb=megabytes)], "peak_mb")
        assert (found.bound, found.outcome) == (pytest.approx(bound), outcome)


def test_an_inaccurate_kernel_misses_however_fast_it_is() -> None:
    rows = [row(OURS, 1.0, complaint="norm is off by 0.1 where 1e-05 is allowed", rel_err=0.1)]
    missed = [v for v in judge(rows) if v.outcome == MISSED]
    assert {v.target.figure for v in missed} >= {"rel_err", "outputs beyond their bounds"}


def test_the_worst_of_many_rows_speaks_for_all() -> None:
    errors = {4096: 1e-7, 8192: 2e-5, 16384: 1e-6}
    rows = [row(OURS, 1.0, shape=[size, 4096], rel_err=error) for size, error in errors.items()]
    found = verdict(rows, "rel_err")
    assert (found.measured, found.outcome) == (2e-5, MISSED)
    assert "8192×4096" in found.case


def test_nan_is_missed() -> None:
    assert verdict([row(OURS, 20.0, rel_err=float("nan"))], "rel_err").outcome == MISSED


def test_every_target_selects_a_case_that_is_measured() -> None:
    """A target whose condition no case fulfils would stay "not measured" for ever."""
    from doratune.benchmarks.kernels import kernel_cases
    from doratune.codegen.ops import OPS
    from doratune.codegen.spec import FLAGS

    rows = []
    for case in kernel_cases("h200"):
        spec = case.spec
        shape = [size for size in (case.tokens, spec.d_out, spec.d_in) if size]
        flags = [flag for flag in FLAGS if getattr(spec, flag)]
        dtypes = {"dtype": spec.weight or spec.activation, "adapter": spec.adapter or None}
        rows.append(row(OURS, 1.0, op=spec.op, shape=shape, rank=spec.rank or None, flags=flags, **dtypes))
    for target in TARGETS:
        if target.bench == "kernels" and target.op in OPS:
            assert any(r["op"] == target.op and target.where(r) for r in rows), target.what


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_results_can_be_judged(path: Path) -> None:
    rows = read_rows(path)
    if not {r["bench"] for r in rows} & {target.bench for target in TARGETS}:
        pytest.skip("no target asks for this benchmark")
    verdicts = judge(rows)
    assert any(v.outcome != UNMEASURED for v in verdicts)
    ours = [r for r in rows if r["impl"] == OURS]
    assert len(ours) == len(
        {
            json.dumps([r.get(name) for name in ("op", "shape", "rank", "dtype", "adapter", "flags", "model")])
            for r in ours
        }
    )
