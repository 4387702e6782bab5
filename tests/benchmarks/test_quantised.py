"""Quantised layers are measured as users have them: every implementation over the same codes and scales, in the dtypes
that the rows name.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from doratune.benchmarks.adapted import MODES, Peers, contender, shared_copy, with_dora
from doratune.benchmarks.dorafactors import PeerError
from doratune.benchmarks.fused import FusedFunctions
from doratune.benchmarks.layer import Projection
from doratune.benchmarks.quantised import QUANTS, held_tensors, quantise
from doratune.benchmarks.results import Row
from doratune.benchmarks.targets import UNMEASURED, judge
from doratune.cli import main
from doratune.errors import UsageError

from ..command_line import RUNNER
from .conftest import TINY

pytest.importorskip("peft")
CPU = torch.device("cpu")
NEEDS = {"nf4": "bitsandbytes", "fp8": "torchao", "hqq": "hqq"}
"""The formats that a CPU can run, and their packages."""


@pytest.fixture(params=NEEDS)
def quant(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param])
    return str(request.param)


def quantised(quant: str) -> nn.Module:
    torch.manual_seed(0)
    base = quantise(Projection(64, 128, CPU).requires_grad_(False), ["proj"], quant)
    return with_dora(base, MODES["bf16"], rank=4, targets=["proj"])


def test_every_implementation_runs_over_the_same_codes(quant: str) -> None:
    model = quantised(quant)
    x = torch.randn(5, 128).bfloat16()
    copied = shared_copy(model)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model.parameters()]
    assert [id(t) for t in held_tensors(copied)] == [id(t) for t in held_tensors(model)]
    with torch.no_grad():
        outputs = {name: contender(name, model).model(x) for name in ("peft_lora", "peft_dora", "doratune")}
    assert all(bool(y.isfinite().all()) for y in outputs.values())
    far, near = (float((outputs[name] - outputs["peft_dora"]).norm()) for name in ("peft_lora", "doratune"))
    assert near < 0.1 * far


def test_adapters_have_the_dtype_that_the_rows_name(quant: str) -> None:
    assert {p.dtype for p in quantised(quant).parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
def test_a_model_of_nf4_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}))
    options = ("--quant", "nf4", "--modes", "bf16", "--op", "inference", "--seq", "8", "--loss-tokens", "4")
    common = ("--device", "cpu", "--rank", "4", "--rounds", "2", "--impl", "peft_dora", "--impl", "doratune", "--json")
    result = RUNNER.invoke(main, ["bench", "model", "--config", str(path), *options, *common])
    assert result.exit_code == 0, result.output
    rows: list[Row] = json.loads(result.stdout)["rows"]
    assert [(row["impl"], row["dtype"], row["adapter"]) for row in rows] == [
        ("peft_dora", "nf4", "bf16"),
        ("doratune", "nf4", "bf16"),
    ]
    assert rows[1]["rel_err"] < 0.1


def test_rows_of_quantised_models_have_targets_of_their_own() -> None:
    case = {"bench": "model", "model": "llama-8b", "shape": [32, 4096], "rank": 16, "adapter": "bf16", "peak_mb": 1.0}
    for quant in (*QUANTS, "bf16"):
        facts = {**case, "dtype": quant, "op": "step", "flags": ["checkpointing"]}
        rows = [{**facts, "impl": "doratune", "us": 103.0}, {**facts, "impl": "peft_lora", "us": 100.0}]
        judged = [v for v in judge(rows) if v.outcome != UNMEASURED]
        assert {v.target.source for v in judged} == {"issue 14" if quant == "bf16" else "issue 15"}


def test_fused_functions_refuse_weights_that_they_would_misread(quant: str) -> None:
    functions = SimpleNamespace(apply_lora_mlp_swiglu=None, apply_lora_qkv=None, apply_lora_o=None)
    module: Any = ModuleType("theirs")
    module.__dict__.update(vars(functions))
    module.apply_lora_o = lambda *args: args
    module.apply_lora_qkv = module.apply_lora_mlp_swiglu = module.apply_lora_o
    theirs = FusedFunctions(module, "axolotl", biases=True)
    expected = "nothing to run" if quant == "nf4" else "not that of a "
    with pytest.raises(PeerError, match=expected):
        contender("axolotl_lora", quantised(quant), Peers(axolotl=theirs))  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_refused() -> None:
    base = Projection(64, 128, CPU)
    with pytest.raises(UsageError, match="unknown format 'nf5'"):
        quantise(base, ["proj"], "nf5")
    with pytest.raises(UsageError, match="needs a GPU"):
        quantise(base, ["proj"], "int8")
    options = ["bench", "model", "--quant", "nf4", "--device", "cpu"]
    for more in (["--parallel", "ddp"], ["--op", "first-step"]):
        result = RUNNER.invoke(main, [*options, *more])
        assert result.exit_code == 2
        assert "--quant measures in one process" in result.stderr
