"""Liger's kernels go where its own function puts them, and transformers has its own functions back afterwards.

A stand-in takes the place of its package, whose kernels need a GPU (tests/gpu/test_bench.py runs them).
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from doratune.benchmarks.adapted import MODES, Peers, contender, with_dora
from doratune.benchmarks.liger import add_swiglu, liger, loss_of
from doratune.benchmarks.shapes import TARGETS, random_model, read_model_config
from doratune.cli import main
from doratune.errors import UsageError

from ..command_line import RUNNER

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


class LigerSwiGLUMLP(nn.Module):
    """Liger's MLP: the stand-in counts its calls."""

    calls = 0

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        LigerSwiGLUMLP.calls += 1
        y: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> Any:
    raise NotImplementedError


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Liger's function was called with."""
    given: dict[str, Any] = {}

    def apply(model: nn.Module, **options: Any) -> None:
        given.update(options, model=model)
        sys.modules[type(model).__module__].apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]

    names = ("", ".transformers", ".transformers.monkey_patch", ".transformers.swiglu")
    modules = {f"liger_kernel{name}": ModuleType(f"liger_kernel{name}") for name in names}
    modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]
    modules["liger_kernel.transformers.swiglu"].LigerSwiGLUMLP = LigerSwiGLUMLP  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.2.3" if name == "liger-kernel" else version(name)
    )
    return given


@pytest.fixture
def base(tiny: Path) -> nn.Module:
    return random_model(read_model_config("8b", tiny, None)[1], CPU)


def test_transformers_has_its_own_functions_back_afterwards(base: nn.Module, stand_in: dict[str, Any]) -> None:
    modeling = sys.modules[type(base).__module__]
    before = modeling.apply_rotary_pos_emb
    with liger(base, "llama"):
        assert modeling.apply_rotary_pos_emb is rotary
    assert modeling.apply_rotary_pos_emb is before
    assert stand_in["model"] is base
    put_in = {name for name, value in stand_in.items() if value is True}
    assert put_in == {"rms_norm", "rope", "fused_linear_cross_entropy"}, "SwiGLU is put in for each contender"


def test_what_liger_does_not_know_or_is_missing_is_an_error(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no kernels for models of type 'banana'"), liger(base, "banana"):
        pass

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    result = RUNNER.invoke(main, ["bench", "model", "--liger", "--device", "cpu"])
    assert result.exit_code == 2
    assert "pip install liger-kernel" in result.stderr


@pytest.mark.parametrize(("name", "calls"), [("peft_lora", 2), ("peft_dora", 2), ("doratune", 0)])
def test_mlps_that_a_contender_runs_itself_keep_their_activation(base: nn.Module, name: str, calls: int) -> None:
    adapted = with_dora(base, MODES["bf16"], rank=4, targets=TARGETS)
    model = contender(name, adapted, Peers(liger=True)).model
    LigerSwiGLUMLP.calls = 0
    ids = torch.randint(0, 64, (2, 9))
    found = model(input_ids=ids).logits.detach()
    assert LigerSwiGLUMLP.calls == calls
    expected = contender("peft_lora" if "lora" in name else "peft_dora", adapted).model(input_ids=ids).logits.detach()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert add_swiglu(model) == 0, "a second time changes nothing"


def test_ligers_loss_is_over_the_last_tokens_of_each_sequence() -> None:
    ids = torch.arange(20).view(2, 10)

    class Model(nn.Module):
        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            kept, labels = given["logits_to_keep"], given["shift_labels"]
            assert torch.equal(input_ids[:, kept] + 1, labels), "each kept position predicts the token after it"
            assert torch.equal(labels, ids[:, -3:])
            return type("Output", (), {"loss": torch.tensor(7.0)})

    assert float(loss_of(Model(), ids, 3)) == 7.0
