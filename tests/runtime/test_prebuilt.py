"""The prebuilt stores have an entry for every kernel of llama-8b at rank 384 in bf16 on an H200, and for those that a
step of common models runs on an H100, measured with the templates of this checkout."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import doratune
from doratune.benchmarks.coverage import ASKED
from doratune.benchmarks.tables.read import read_table, table_path
from doratune.cache.entry import MEASURED
from doratune.cache.stack import prebuilt_paths
from doratune.cache.store import Store
from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import check_config, default_configs
from doratune.runtime.loader import resolve
from doratune.tuner.jobs import plan_jobs
from doratune.tuner.models import find_model

MODEL = find_model("llama-8b")

NEVER_TUNED = {op for op in OPS if "group" in op or "swiglu" in op}
"""Operations of which an H200 has entries for other shapes: it runs the H100's."""


@pytest.fixture(autouse=True)
def no_other_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path))


def test_every_kernel_of_llama_8b_is_found_exact_and_measured() -> None:
    specs = [spec for spec in plan_jobs(MODEL, ranks=[384], gpu="h200") if spec.op not in NEVER_TUNED]
    assert len(specs) == 141
    for spec in specs:
        if spec.op == "adapter_backward":  # its entries are of the form without m
            spec = replace(spec, magnitude="")
        resolution, source = resolve(spec)
        assert (resolution.step, resolution.entry and resolution.entry.evaluation.provenance) == ("exact", MEASURED)
        assert resolution.entry is not None
        assert source.digest == resolution.entry.source_digest


@pytest.mark.parametrize(("model", "rank", "tokens"), [("llama-8b", 16, 4096), ("qwen2.5-0.5b", 16, 2048)])
def test_the_kernels_of_a_step_on_an_h100_are_found_exact_and_measured(model: str, rank: int, tokens: int) -> None:
    specs = plan_jobs(find_model(model), ranks=[rank], gpu="h100-sxm", tokens=[tokens], ops=ASKED)
    assert {spec.op for spec in specs} == {*ASKED} - {"swiglu_forward", "swiglu_backward"}, "these are of many ranks"
    for spec in specs:
        resolution, _ = resolve(spec)
        assert resolution.entry is not None, spec
        assert (resolution.step, resolution.entry.evaluation.provenance) == ("exact", MEASURED), spec


def test_every_fused_entry_states_whether_its_fusion_pays() -> None:
    pays = {}
    for spec in plan_jobs(MODEL, ranks=[384], gpu="h200", ops=["dora_linear_forward"]):
        resolution, _ = resolve(spec)
        assert resolution.entry is not None
        assert resolution.entry.evaluation.unfused_us is not None
        pays[spec.d_out, spec.d_in, spec.tokens] = resolution.fusion_pays
    assert all(pays[shape] for shape in pays if shape[2] <= 16)
    assert not all(pays.values())


def test_no_entry_is_stale() -> None:
    """After a change of a template, tune again and replace the file."""
    assert sum(path.stat().st_size for path in prebuilt_paths()) <= 10_000_000
    for path in prebuilt_paths():
        with Store.open(path, readonly=True) as store:
            entries = store.entries()
            assert entries
            for entry in entries:
                assert entry.template_digest == template_digest(entry.spec.op, entry.config.variant), entry.spec
                assert entry.source_digest == render(entry.spec, entry.config).digest, entry.spec
                assert check_config(entry.spec, entry.config, find_gpu(entry.spec.gpu)) is None
                evaluation = entry.evaluation
                assert evaluation.us is not None
                assert evaluation.floor_us is not None
                assert evaluation.us > 0.9 * evaluation.floor_us
                if evaluation.error is None:  # a recorded table keeps none: what is not accurate is not in it
                    table = read_table(table_path(entry.spec.gpu, entry.spec.op))
                    assert (entry.config, evaluation.us) == table[entry.spec].best
                assert entry.environment.gpu_name


def test_built_in_configs_for_few_tokens_or_few_rows_came_close_in_the_finals_that_they_played() -> None:
    """Tall tiles for groups of 17 to 128 tokens, and blocks of G by the rank for norms of 1,024 rows."""
    behind = []
    (path,) = (path for path in prebuilt_paths() if path.stem == "h100-sxm")
    with Store.open(path, readonly=True) as store:
        for entry in store.entries():
            spec, final = entry.spec, entry.final
            grouped = spec.op in ("lora_compose_group", "compose_backward_group") and 16 < spec.tokens <= 128
            few_rows = spec.op == "weight_norm_group" and spec.d_out == 1024
            if final is None or spec.rank <= 64 or not (grouped or few_rows):
                continue
            timed = {contender.config: contender.us for contender in final.contenders}
            built_in = default_configs(spec, find_gpu(spec.gpu))[0]
            if built_in in timed:
                behind.append(timed[built_in] / final.winner.us)
    assert len(behind) >= 9
    assert max(behind) <= 1.015


def test_built_in_configs_came_close_in_the_finals_of_an_h200() -> None:
    """Of the specs drawn at random, whose entries keep what a lookup lost; some configs did not play there."""
    behind: dict[str, list[float]] = defaultdict(list)
    drawn = 0
    (path,) = (path for path in prebuilt_paths() if path.stem == "h200")
    with Store.open(path, readonly=True) as store:
        for entry in store.entries():
            spec, final = entry.spec, entry.final
            if final is None or entry.lookup_regret is None or spec.op == "weight_dequantise":
                continue
            drawn += 1
            timed = {contender.config: contender.us for contender in final.contenders}
            built_in = default_configs(spec, find_gpu(spec.gpu))[0]
            if built_in in timed:
                behind[spec.op].append(timed[built_in] / final.winner.us)
    assert drawn == 6 * 44
    assert sum(map(len, behind.values())) >= 0.75 * drawn
    for op, found in behind.items():
        assert statistics.mean(found) <= (1.055 if op == "swiglu_backward" else 1.04), op


def test_the_norm_that_also_gives_g_takes_the_config_of_the_plain_one() -> None:
    spec = KernelSpec.create(
        "weight_norm", d_out=4096, d_in=4096, rank=384, dtype="bf16", adapter="bf16", magnitude="fp32", gpu="h200"
    )
    resolution, source = resolve(spec)
    assert resolution.step == "nearest"
    assert resolution.entry is not None
    assert (resolution.entry.spec.d_out, resolution.entry.spec.d_in, resolution.entry.spec.rank) == (4096, 4096, 384)
    assert "magnitude_ptr" in source.text


def test_an_untuned_shape_says_so() -> None:
    text = doratune.explain("weight_norm_exact/d_out=5120/d_in=5120/rank=320/weight=bf16/adapter=bf16@h200")
    assert "step      architecture" in text or "step      nearest" in text
    assert "(on its own shape: measured" in text


def test_a_config_for_many_tokens_is_not_taken_for_few_as_it_is() -> None:
    """The only fp32 compositions are of 4096 tokens: at 16, seven rows of eight in their tiles would be padding."""
    sizes = {"d_out": 4096, "rank": 384, "dtype": "fp32", "adapter": "fp32", "gpu": "h200"}
    few, _ = resolve(KernelSpec.create("lora_compose", tokens=16, **sizes))  # type: ignore[arg-type]
    assert few.rederived
    assert few.config["block_t"] == 16
    assert "block_t must be at most 16 for 16 tokens, got 128" in few.explain()
    many, _ = resolve(KernelSpec.create("lora_compose", tokens=1024, **sizes))  # type: ignore[arg-type]
    assert many.step == "nearest"
