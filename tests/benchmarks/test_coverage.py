"""A coverage counts the kernels that a lookup serves well, its draws are the same for everybody, and its plan names the
specs whose tuning serves most of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doratune.benchmarks import coverage as module
from doratune.benchmarks.coverage import (
    BOUNDED,
    EXACT,
    LOOSE,
    UNKNOWN,
    Coverage,
    Looked,
    draw_specs,
    lacking,
    measure_coverage,
    plan,
)
from doratune.codegen.spec import KernelSpec


def spec(tokens: int, op: str = "lora_compose", rank: int = 64) -> KernelSpec:
    return KernelSpec.create(op, d_out=4096, rank=rank, tokens=tokens, dtype="bf16", adapter="bf16", gpu="h200")


def test_equal_seeds_give_equal_draws_of_the_wanted_size() -> None:
    drawn = draw_specs("h200", draws=6, kernels=3, seed=7)
    assert drawn == draw_specs("h200", draws=6, kernels=3, seed=7)
    assert drawn != draw_specs("h200", draws=6, kernels=3, seed=8)
    assert [len(specs) for specs in drawn] == [3] * 6
    assert all(each.rank <= 384 and each.op in module.ASKED for specs in drawn for each in specs)
    (everything,) = draw_specs("h200", draws=1, kernels=0, seed=7)
    assert len(everything) > 40


def test_a_share_counts_kernels_and_a_draw_counts_if_all_of_its_kernels_do() -> None:
    verdicts = [(0, EXACT), (0, BOUNDED), (1, EXACT), (1, LOOSE), (2, UNKNOWN), (2, UNKNOWN)]
    looked = tuple(Looked(draw, spec(16 << index), verdict, None) for index, (draw, verdict) in enumerate(verdicts))
    found = Coverage("h200", 3, tuple(replace(each, spec=spec(16)) for each in looked))
    assert found.covered == 0.5
    assert found.whole_draws == pytest.approx(1 / 3)
    total = found.rows()[0]
    assert (total["impl"], total["kernels"], total["covered"], total[UNKNOWN]) == ("all", 6, 0.5, pytest.approx(1 / 3))
    assert [each.verdict for each in lacking(found.looked)] == [UNKNOWN], "each spec once"


def test_the_plan_takes_the_spec_that_serves_most_first_and_leaves_what_is_served() -> None:
    crowd = [spec(tokens) for tokens in (1024, 2048, 4096)]
    apart = spec(1, rank=8)
    looked = [Looked(0, each, UNKNOWN, None) for each in (*crowd * 5, apart)] + [Looked(0, spec(16), EXACT, 0.0)]
    chosen = plan(Coverage("h200", 1, tuple(looked)), 9)
    assert chosen[0].spec == spec(2048), "the middle one"
    assert chosen[0].serves == 15
    assert {choice.spec for choice in chosen} == {*crowd, apart}
    assert chosen[-1].spec == apart, "one kernel alone"


def test_a_kernel_with_a_larger_bound_counts_more() -> None:
    near = [Looked(0, spec(4096), LOOSE, 0.11), Looked(0, spec(1, rank=8), LOOSE, 0.9)]
    assert plan(Coverage("h200", 1, tuple(near)), 1)[0].spec == spec(1, rank=8)


def test_the_shipped_entries_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path))
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    tuned = KernelSpec.create("compose_backward", d_out=4096, tokens=4096, dtype="bf16", gpu="h200")
    monkeypatch.setattr(module, "draw_specs", lambda *_, **__: [[tuned], [replace(tuned, gpu="a100")]])
    found = measure_coverage("h200", draws=2)
    assert [each.verdict for each in found.looked] == [EXACT, UNKNOWN]
    assert found.whole_draws == 0.5
