"""What a recording run has measured is written as a table that can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from doratune.benchmarks.tables.read import CENSORED, FINAL, SHORT, Table, TableError, read_table, table_path
from doratune.benchmarks.tables.record import _Family, _winners_of, _write, families_of, join
from doratune.benchmarks.tables.specs import recorded_specs
from doratune.cache.entry import MEASURED, PREDICTED
from doratune.cache.store import Store
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_configs

from ..tuner.fakes import FakeEvaluator, entry_of

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


def test_the_winners_of_a_store_are_tried_after_the_built_in_configs(tmp_path: Path) -> None:
    first, second, third = (
        KernelSpec.create(
            "compose_swiglu", d_out=4864, rank=rank, tokens=4096, dtype="bf16", adapter="bf16", gpu=GPU.slug
        )
        for rank in (16, 32, 64)
    )
    won, predicted = default_configs(first, GPU)[0], default_configs(second, GPU)[-1]
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put_all([entry_of(first, won, MEASURED), entry_of(second, predicted, PREDICTED)])
    assert _winners_of(str(tmp_path / "store.sqlite"), "compose_swiglu") == (won,)
    assert _winners_of(str(tmp_path / "store.sqlite"), "swiglu_forward") == ()
    family = _Family([third], GPU, FakeEvaluator(lambda spec, config: 10.0))
    seeds = len(family.first)
    family.begin_with_winners([won])
    assert family.first[seeds:] == [won]


def test_parts_of_a_run_are_joined(tmp_path: Path) -> None:
    specs = [spec for spec in recorded_specs(GPU.slug) if spec.op == "compose_swiglu" and spec.rank == 384]
    for number, spec in enumerate(specs[:2]):
        family = _Family([spec], GPU, FakeEvaluator(lambda spec, config: 10.0))
        family.tables[spec].us = {family.first[number]: (10.0 + number, SHORT), family.first[2]: (20.0, FINAL)}
        family.tables[spec].rejected = {family.first[3]: "inaccurate"}
        _write(tmp_path / str(number) / GPU.slug, [family], GPU, "0123456")
    folders = [tmp_path / part / GPU.slug for part in ("0", "1")]
    join(folders, tmp_path / "all" / GPU.slug)
    joined = read_table(table_path(GPU.slug, "compose_swiglu", tmp_path / "all"))
    assert list(joined.specs) == specs[:2]
    for folder, spec in zip(folders, specs, strict=False):
        assert joined[spec] == apart_of(folder)[spec]
    join([folders[0], folders[0]], tmp_path / "twice" / GPU.slug)
    assert read_table(table_path(GPU.slug, "compose_swiglu", tmp_path / "twice")).specs == apart_of(folders[0]).specs


def apart_of(folder: Path) -> Table:
    return read_table(table_path(GPU.slug, "compose_swiglu", folder.parent))


def test_parts_that_are_missing_or_of_another_run_are_not_joined(tmp_path: Path) -> None:
    (spec, *_) = [spec for spec in recorded_specs(GPU.slug) if spec.op == "compose_swiglu"]
    for commit in ("0123456", "89abcde"):
        family = _Family([spec], GPU, FakeEvaluator(lambda spec, config: 10.0))
        family.tables[spec].us = {family.first[0]: (10.0, SHORT)}
        _write(tmp_path / commit, [family], GPU, commit)
    with pytest.raises(TableError, match="has no table"):
        join([tmp_path / "0123456", tmp_path / "nowhere"], tmp_path / "all")
    with pytest.raises(TableError, match="several GPUs, environments or commits"):
        join([tmp_path / "0123456", tmp_path / "89abcde"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


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
