"""A run for a model starts from what was measured before: the stores that a lookup asks give its first configs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from doratune.cache.entry import MEASURED
from doratune.cache.store import Store
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config, variants_of
from doratune.tuner.incumbents import incumbents_of
from doratune.tuner.space import Space

from .fakes import entry_of


def spec_of(rank: int, gpu: str = "l40s") -> KernelSpec:
    return KernelSpec.create("lora_compose", d_out=4096, rank=rank, tokens=4096, dtype="bf16", adapter="bf16", gpu=gpu)


@pytest.mark.parametrize(
    ("provenance", "gpu", "known"),
    [(MEASURED, "l40s", True), (MEASURED, "rtx4090", True), (MEASURED, "a100", False)],
)
def test_the_config_of_a_near_kernel_of_the_architecture_is_tried_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provenance: str, gpu: str, known: bool
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    path = tmp_path / "team.sqlite"
    monkeypatch.setenv("DORATUNE_CACHE_PATH", str(path))
    there = spec_of(128, gpu)
    seeds = Space(spec_of(96), find_gpu("l40s")).seeds
    config = replace(seeds[0], num_stages=5)
    assert config not in seeds
    with Store.open(path, create=True) as store:
        store.put(entry_of(there, config, provenance))
    found = incumbents_of(spec_of(96), find_gpu("l40s"))
    default = default_config(spec_of(96), find_gpu("l40s"))
    assert (default, "default") in found.played
    assert (config in (*found.configs, *found.starts)) == known
    assert not found.known, "half the rank is not almost the same kernel"


@pytest.mark.parametrize(("gpu", "known"), [("rtx4090", True), ("l40s", False)])
def test_few_trials_are_enough_where_a_sister_gpu_knows_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, known: bool
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    there = spec_of(128 if gpu == "l40s" else 96, gpu)
    config = variants_of(there, find_gpu(gpu))[0].seeds(there, find_gpu(gpu))[-1]
    with Store.open(tmp_path / "named.sqlite", create=True) as store:
        store.put(entry_of(there, config, MEASURED))
    found = incumbents_of(spec_of(96), find_gpu("l40s"), str(tmp_path / "named.sqlite"))
    assert found.known == known
    if known:
        assert found.played[0] == (config, "architecture")
        assert found.without == config


def test_the_entry_of_the_very_spec_is_the_first_incumbent_and_left_out_of_the_lookup_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    gpu = find_gpu("l40s")
    seeds = variants_of(spec_of(96), gpu)[0].seeds(spec_of(96), gpu)
    with Store.open(tmp_path / "named.sqlite", create=True) as store:
        store.put(entry_of(spec_of(96), seeds[-1], MEASURED))
    found = incumbents_of(spec_of(96), gpu, str(tmp_path / "named.sqlite"))
    assert found.played[0] == (seeds[-1], "exact")
    assert found.without != seeds[-1]
    assert (found.without, "default") in found.played
