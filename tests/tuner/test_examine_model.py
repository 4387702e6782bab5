"""``doctor`` says of a model which kernels the stores have, and what ``accelerate`` would do with its layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doratune.cache.entry import MEASURED, PREDICTED
from doratune.cli import main
from doratune.codegen.spec import KernelSpec
from doratune.tuner import coverage
from doratune.tuner import examine_model as examining
from doratune.tuner.coverage import by_op, cover, kernels_of
from doratune.tuner.examine_model import examine_model
from doratune.tuner.jobs import plan_jobs
from doratune.tuner.models import find_model

from ..command_line import RUNNER

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))


def config(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**TINY, **fields}))
    return file


def resolved(spec: KernelSpec, store: str | None) -> tuple[Any, None, Any]:
    """What a lookup of the test's stores gives, by the kernel's number of tokens."""
    provenance = {1: MEASURED, 16: PREDICTED}.get(spec.tokens)
    entry = None if spec.tokens == 128 else SimpleNamespace(evaluation=SimpleNamespace(provenance=provenance))
    step = "exact" if provenance else "default" if entry is None else "nearest"
    bound = SimpleNamespace(loss=0.041 if step == "nearest" else None)
    return SimpleNamespace(step=step, entry=entry, bound=bound), None, SimpleNamespace(kernels=[1] * (spec.tokens == 1))


def test_kernels_are_counted_as_measured_predicted_near_or_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "resolve_binaries", resolved)
    specs = plan_jobs(find_model("llama-8b"), ranks=[8], gpu="a100", ops=["lora_compose"], tokens=[1, 16, 128, 512])
    (row,) = by_op(cover(specs))
    assert row.op == "lora_compose"
    assert row.by_status == dict.fromkeys(("measured", "predicted", "near", "default"), row.kernels // 4)
    assert row.binaries == row.kernels // 4
    assert row.loss() == f"≤ 5 %, unknown for {row.kernels // 2}"
    assert row.values()["near"] == row.kernels // 4


def test_the_shipped_store_has_measured_kernels_of_the_model_that_it_was_made_for() -> None:
    specs = [
        spec
        for spec in kernels_of(find_model("llama-8b"), ranks=[384], dtype="bf16", gpu="h200")
        if spec.op == "weight_norm"
    ]
    (row,) = by_op(cover(specs))
    assert row.by_status["measured"] == row.kernels
    assert (row.loss(), row.unknown) == ("≤ 0 %", 0)


def test_layers_say_what_would_run_them_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "cover", lambda specs, store: [])
    report = examine_model(None, config(tmp_path, quantization_config={"quant_method": "gptq"}), gpu="h200", ranks=[8])
    layers = {layers.name: layers for layers in report.layers}
    assert layers["model.layers.*.self_attn.q_proj"].runs == "kernels"
    assert layers["model.layers.*.self_attn.q_proj"].count == 2
    assert layers["model.layers.*.self_attn.q_proj"].base == "Linear"
    assert "with the activation (silu)" in layers["model.layers.*.mlp.gate_proj"].why
    assert layers["lm_head"].runs == "none"
    assert "output head" in layers["lm_head"].why
    assert any("gptq: PEFT's code" in note for note in report.notes)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    file = config(
        tmp_path, architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    )
    done = RUNNER.invoke(main, ["doctor", "--config", str(file), "--gpu", "h200"])
    assert done.exit_code == 2
    assert "executes none of it" in done.stderr
    assert not marker.exists()


def test_without_a_gpu_layers_are_examined_and_kernels_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "ask", lambda *_: {"layers": [], "problem": ""})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = examine_model("llama-8b", None)
    assert report.gpu is None
    assert report.kernels == ()
    assert "--gpu" in report.notes[-1]
    done = RUNNER.invoke(main, ["doctor", "--model", "llama-8b", "--json"])
    assert json.loads(done.stdout)["model"]["gpu"] is None


def test_the_command_prints_kernels_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"name": "layers.*.q_proj", "count": 2, "base": "[bold]Linear", "runs": "peft", "why": "it is sharded"}
    monkeypatch.setattr(examining, "ask", lambda *_: {"layers": [layer], "problem": ""})
    monkeypatch.setattr(examining, "kernels_of", lambda *args, **named: kernels_of(*args, **named)[:2])
    command = ["doctor", "--model", "llama-8b", "--gpu", "h200"]
    done = RUNNER.invoke(main, command)
    assert done.exit_code == 0, done.stderr
    for text in ("kernels on h200", "[bold]Linear", "PEFT's code", "it is sharded"):
        assert text in done.stdout
    assert "2 of 2 kernels of llama-3.1-8b are measured on h200" in done.stderr
    told = json.loads(RUNNER.invoke(main, [*command, "--json"]).stdout)["model"]
    assert told["layers"] == [layer]
    assert [row["status"] for row in told["kernels"]] == ["measured", "measured"]
    assert told["operations"][0]["measured"] == 2
