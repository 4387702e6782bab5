"""What a recording run has measured is written as a table that can be read again."""

from __future__ import annotations

from pathlib import Path

from doratune.benchmarks.tables.read import CENSORED, FINAL, SHORT, read_table, table_path
from doratune.benchmarks.tables.record import _Family, _write, families_of
from doratune.benchmarks.tables.specs import recorded_specs
from doratune.codegen.gpu import find_gpu

from ..tuner.fakes import FakeEvaluator

GPU = find_gpu("h100-sxm")


def test_a_run_writes_what_it_timed_in_turn_shortly_and_not_at_all(tmp_path: Path) -> None:
    specs = [spec for spec in recorded_specs(GPU.slug) if spec.op == "compose_swiglu" and spec.rank == 384]
    family = _Family(families_of(specs)[0], GPU, FakeEvaluator(lambda spec, config: 10.0))
    first, second, third, fourth = family.first[:4]
    spec = family.specs[0]
    table = family.tables[spec]
    table.us = {first: (10.0, FINAL), second: (12.0, SHORT), third: (50.0, CENSORED)}
    table.short_us[first] = 10.5
    table.rejected[fourth] = "inaccurate: out is off by 3"
    _write(tmp_path / GPU.slug, [family], GPU, "0123456")
    read = read_table(table_path(GPU.slug, spec.op, tmp_path))
    assert list(read.specs) == [spec], "nothing was timed for the others"
    timings = {config: (timing.us, timing.kind, timing.short_us) for config, timing in read[spec].times.items()}
    assert timings == {first: (10.0, FINAL, 10.5), second: (12.0, SHORT, None), third: (50.0, CENSORED, None)}
    assert read[spec].rejected == {fourth: "inaccurate: out is off by 3"}


def test_every_operation_of_a_step_is_recorded() -> None:
    """Where an operation has no table, lookups know no model of it, and near entries are believed whatever they say."""
    assert {spec.op for spec in recorded_specs(GPU.slug)} >= {
        "weight_norm_group",
        "lora_compose",
        "lora_compose_group",
        "compose_swiglu",
        "compose_swiglu_backward",
        "compose_backward",
        "compose_backward_group",
        "adapter_backward",
    }
