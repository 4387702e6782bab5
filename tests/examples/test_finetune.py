"""Training with doratune is the training that PEFT does: over 200 steps from one seed the losses stay as close to stock
PEFT's as stock PEFT's own stay when its sums are taken in another order.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import doratune

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"
SMALL = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
STEPS, BATCH = 200, 8
NOISE_FACTOR = 4.0
"""Another order of summation is one draw of rounding errors. Two draws show their size, not their largest."""

needs_accelerate = pytest.mark.skipif(
    not hasattr(doratune, "accelerate"), reason="this doratune has no accelerate() for PEFT models"
)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Sums of a fixed order, and no waiting of small operations for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_order(order: Callable[[int], Sequence[int]]) -> Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, Any]]:
    """Makes batches with their rows in another order: every sum over tokens is then taken in that order."""

    def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([rows[i][name] for i in order(len(rows))]) for name in rows[0]}

    return collate


def losses(
    folder: Path,
    *,
    order: Callable[[int], Sequence[int]] = range,
    change: Callable[[torch.nn.Module], object] = lambda model: None,
) -> torch.Tensor:
    """The losses of the 200 steps, with the model changed before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "TINY", {**example.TINY, **SMALL})
        model = example.make_model(None, rank=4, seed=0)
    change(model)
    data = example.Bytes(example.TEXT.read_text(encoding="utf-8"), 32)
    found = example.train(model, data, steps=STEPS, batch=BATCH, seed=0, output=folder, collate=in_order(order))
    assert len(found) == STEPS
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return losses(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def bound(stock: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far rounding may carry a loss: NOISE_FACTOR times what reordered reductions do to stock PEFT."""
    folder = tmp_path_factory.mktemp("reordered")
    others = [losses(folder, order=order) for order in (lambda n: range(n)[::-1], lambda n: [*range(1, n), 0])]
    noise = max(float((other - stock).abs().max()) for other in others)
    assert noise > 0.0, "the other order changed nothing: there is no noise to compare with"
    return NOISE_FACTOR * noise


def test_the_model_learns(stock: torch.Tensor) -> None:
    assert stock[-20:].mean() < 0.85 * stock[:5].mean()


@needs_accelerate
def test_training_with_doratune_follows_stock_peft_within_its_own_noise(
    stock: torch.Tensor, bound: float, tmp_path: Path
) -> None:
    ours = losses(tmp_path, change=doratune.accelerate)
    assert float((ours - stock).abs().max()) <= bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="the noise of bf16 training hides an error as small as this one")
def test_a_norm_that_is_wrong_by_one_part_in_ten_thousand_leaves_the_noise(
    stock: torch.Tensor, bound: float, tmp_path: Path
) -> None:
    def spoil(model: torch.nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__ == "DoraLinearLayer":
                norm: Any = module.get_weight_norm
                module.get_weight_norm = lambda *args, norm=norm, **kwargs: norm(*args, **kwargs) * 1.0001  # type: ignore[assignment]

    assert float((losses(tmp_path, change=spoil) - stock).abs().max()) > 10 * bound


@pytest.mark.parametrize("stock_only", [True, pytest.param(False, marks=needs_accelerate)], ids=["stock", "doratune"])
def test_the_script_trains_a_config_and_saves_adapters_that_peft_loads(
    stock_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({**example.TINY, **SMALL}))
    output = tmp_path / "adapters"
    arguments = ["--config", str(config.parent), "--steps", "4", "--rank", "4", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["finetune.py", *arguments, *(["--stock"] if stock_only else [])])
    example.main()
    assert "in 4 steps; adapters in" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.parent))
    loaded = PeftModel.from_pretrained(base, output)
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert len(trained) == 2 * 7
    assert all(bool(p.any()) for p in trained)  # B starts at zero


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**example.TINY, "vocab_size": 100}))
    with pytest.raises(SystemExit, match="a vocabulary of 100 has no room for the 256 bytes"):
        example.make_model(tmp_path, rank=4, seed=0)
