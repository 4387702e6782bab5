"""A run for a model starts from what was measured before: the stores that a lookup asks give its first configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from doratune.cache.entry import MEASURED, PREDICTED, Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config, variants_of
from doratune.tuner.tune_model import measured_elsewhere


def spec_of(rank: int, gpu: str = "l40s") -> KernelSpec:
    return KernelSpec.create("lora_compose", d_out=4096, rank=rank, tokens=4096, dtype="bf16", adapter="bf16", gpu=gpu)


@pytest.mark.parametrize(
    ("provenance", "gpu", "known"),
    [(MEASURED, "l40s", True), (MEASURED, "rtx4090", True), (MEASURED, "a100", False), (PREDICTED, "l40s", False)],
)
def test_the_nearest_measured_config_is_known_and_a_predicted_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provenance: str, gpu: str, known: bool
) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    path = tmp_path / "team.sqlite"
    monkeypatch.setenv("DORATUNE_CACHE_PATH", str(path))
    there = spec_of(128, gpu)
    config = variants_of(there, find_gpu(gpu))[0].seeds(there, find_gpu(gpu))[-1]
    assert config != default_config(spec_of(96), find_gpu("l40s"))
    source = render(there, config)
    with Store.open(path, create=True) as store:
        store.put(
            Entry(
                spec=there,
                config=config,
                template_digest=template_digest("lora_compose", config.variant),
                source_digest=source.digest,
                source=source.text,
                evaluation=Evaluation(provenance, us=10.0, floor_us=5.0, trials=24),
                environment=Environment(gpu=gpu, architecture=find_gpu(gpu).architecture, triton="3.7.1"),
            )
        )
    assert measured_elsewhere(spec_of(96)) == (config if known else None)
