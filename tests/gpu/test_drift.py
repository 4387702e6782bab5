"""On a GPU: a winner that is not the fastest any more is found and replaced, and ``explain`` then finds the present
versions in its entry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import doratune
from doratune.cache.entry import MEASURED, SEARCH, Contender, Entry, Evaluation, Final
from doratune.cache.store import Store
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import check_config, default_config
from doratune.runtime.device import find_device, gpu_of
from doratune.tuner.drift_report import HELD, MOVED
from doratune.tuner.drift_store import DriftRequest, drift_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

SLOW = Config.create("tile", block_t=1, block_n=64, num_warps=1, num_stages=2)
"""Tiles of 64 elements: four times as slow as the best (benchmarks/tables/h100-sxm)."""


def test_a_winner_from_before_an_upgrade_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doratune.tuner.measure import MeasureEvaluator

    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path))
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    gpu = gpu_of(find_device("cuda"))
    spec = KernelSpec.create("compose_forward", d_out=4096, tokens=4096, dtype="bf16", gpu=gpu.slug)
    assert check_config(spec, SLOW, gpu) is None
    evaluator = MeasureEvaluator(gpu)
    here = evaluator.environment()
    evaluator.close()
    source, fast = render(spec, SLOW), default_config(spec, gpu)
    contenders = (Contender(SLOW, (SEARCH,), (100.0, 100.0)), Contender(fast, ("default",), (103.0, 103.0)))
    entry = Entry(
        spec,
        SLOW,
        template_digest(spec.op, SLOW.variant),
        source.digest,
        source.text,
        Evaluation(MEASURED, us=100.0, samples_us=(100.0, 100.0), trials=40),
        replace(here, triton="3.0.0", driver="450.1"),
        final=Final(contenders, 0.999, 0.003, True),
    )
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(entry)
    assert "versions  measured under Triton 3.0.0, driver 450.1; here " in doratune.explain(spec)

    result = drift_store(DriftRequest(jobs=2, apply=True))
    (row,) = result.rows
    assert (row.outcome, row.config, row.adopted) == (MOVED, fast, True), row.notes
    assert row.loss is not None
    assert row.loss > 0.05

    explained = doratune.explain(spec)
    assert f"config    {fast}" in explained
    assert "versions  " not in explained, "nvidia-smi and the evaluator agree on the driver and the GPU's name"
    assert drift_store(DriftRequest(jobs=2, apply=True)).rows == ()
    (again,) = drift_store(DriftRequest(jobs=2, everything=True)).rows
    assert (again.outcome, again.config) == (HELD, fast), again.notes
