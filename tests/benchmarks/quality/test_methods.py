"""Every method begins as the same model, trains only what is its own and sees the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from doratune.benchmarks.adapted import MODES
from doratune.benchmarks.quality.arms import (
    DORA,
    FP32,
    FULL,
    LORA,
    PEFT_DORA,
    ROW_SCALED,
    RSLORA,
    Arm,
    build,
    trained,
)
from doratune.benchmarks.quality.base import in_fp32, load, rounded, save, untrained
from doratune.benchmarks.quality.corpus import TEST, make_domain
from doratune.benchmarks.quality.row_scaled import RowScaledLoRA
from doratune.benchmarks.quality.sizes import SIZES
from doratune.benchmarks.quality.study import METHODS
from doratune.benchmarks.quality.training import Deadline, OutOfTimeError, Text, evaluated, held_out_loss, train

from .planted import TINY, planted

CPU = torch.device("cpu")
RANK = 4


@pytest.fixture(scope="module")
def base() -> nn.Module:
    model = rounded(untrained(TINY, CPU))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that losses differ from ln 256 and from each other
    return model


@pytest.fixture(scope="module")
def text() -> Text:
    domain = make_domain("planted", planted("words"), train_bytes=10**5, held_out_bytes=TINY.held_out_bytes)
    return Text.of(domain, TINY, CPU)


def run(model: nn.Module, text: Text, *, steps: int = 3, seed: int = 1, **options: Any) -> list[float]:
    options = {"mode": FP32, "split": TEST, "evaluations": 1, "deadline": Deadline(), "rate": 1e-2, **options}
    return train(model, text=text, size=TINY, steps=steps, seed=seed, **options).train


def test_weights_are_rounded_to_bf16_and_positions_are_not(tmp_path: Path, base: nn.Module, text: Text) -> None:
    exact = {name: value for name, value in untrained(TINY, CPU).named_buffers() if value.is_floating_point()}
    assert exact
    save(base, tmp_path / "base.safetensors", {"text": "words"})
    again = load(tmp_path / "base.safetensors", TINY, CPU, {"text": "words"})
    for model in (base, again, in_fp32(base)):
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], value) for name, value in exact.items())
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    losses = [held_out_loss(in_fp32(model), FP32, text, TEST, TINY) for model in (base, again)]
    assert losses[0] == losses[1]


EVERY = [Arm(name, RANK) for name in (*METHODS, PEFT_DORA)] + [Arm(FULL, None)]


@pytest.mark.parametrize("arm", EVERY, ids=str)
def test_a_method_begins_as_the_base_model_and_trains_only_what_is_its_own(
    arm: Arm, base: nn.Module, text: Text
) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = build(arm, base, FP32, seed=1)
    start = held_out_loss(in_fp32(base), FP32, text, TEST, TINY)
    assert held_out_loss(model, FP32, text, TEST, TINY) == pytest.approx(start, rel=1e-6)

    found = {name: value.detach().clone() for name, value in trained(model).items()}
    kinds = {kind for kind in ("lora_A", "lora_B", "magnitude") if any(kind in name for name in found)}
    if arm.name == FULL:
        assert len(found) == len(before)
    else:
        layers = 7 * TINY.layers
        assert kinds == {"lora_A", "lora_B"} | (set() if arm.name in (LORA, RSLORA) else {"magnitude"})
        assert len(found) == layers * len(kinds)
    frozen = {name: value.clone() for name, value in model.named_parameters() if name not in found}

    run(model, text)
    assert held_out_loss(model, FP32, text, TEST, TINY) != pytest.approx(start, rel=1e-4)
    unmoved = [name for name, value in trained(model).items() if torch.equal(value, found[name])]
    if arm.name != FULL:  # there the embeddings of bytes that the text lacks do not move, but rows of them do
        assert unmoved == []
    for name, value in model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("arm", EVERY, ids=str)
def test_a_method_under_autocast_begins_and_trains_as_in_fp32_within_rounding(
    arm: Arm, base: nn.Module, text: Text
) -> None:
    autocast = MODES["autocast"]
    start = held_out_loss(base, autocast, text, TEST, TINY)
    model = build(arm, base, autocast, seed=1)
    assert held_out_loss(model, autocast, text, TEST, TINY) == pytest.approx(start, rel=2e-4)
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    exact = run(build(arm, base, FP32, seed=1), text)
    assert run(model, text, mode=autocast) == pytest.approx(exact, rel=1e-2)
    assert exact[-1] != pytest.approx(exact[0], rel=1e-2), "training changes more than the bound allows for rounding"


def test_the_scaling_of_every_method_is_what_its_layers_have(base: nn.Module) -> None:
    for arm in EVERY[:-1]:
        model = build(arm, base, FP32, seed=1)
        found = {
            module.scaling["default"] if isinstance(module.scaling, dict) else module.scaling
            for module in model.modules()
            if hasattr(module, "lora_A")
        }
        assert found == {16.0 / RANK**0.5 if arm.name == RSLORA else 16.0 / RANK}


def test_every_method_of_a_rank_begins_with_the_same_a(base: nn.Module) -> None:
    drawn = []
    for arm in EVERY[:-1]:
        model = build(arm, base, FP32, seed=3)
        drawn.append([value for name, value in trained(model).items() if "lora_A" in name])
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))
    assert all(0.9 < float(a.detach().abs().max()) * a.shape[1] ** 0.5 <= 1.0 for a in drawn[0])
    model = build(EVERY[0], base, FP32, seed=4)
    assert not torch.equal(drawn[0][0], next(value for name, value in trained(model).items() if "lora_A" in name))


def test_dora_by_doratune_follows_pefts_within_rounding(base: nn.Module, text: Text) -> None:
    ours, theirs = (run(build(Arm(name, RANK), base, FP32, seed=1), text, steps=4) for name in (DORA, PEFT_DORA))
    assert ours == pytest.approx(theirs, rel=1e-5)
    lora = run(build(Arm(LORA, RANK), base, FP32, seed=1), text, steps=4)
    assert lora != pytest.approx(theirs, rel=1e-5), "what differs from DoRA is told apart"


def test_row_scaled_lora_is_its_formula_and_not_doras() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=False)
    layer = RowScaledLoRA(linear, rank=2, scaling=0.5)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.rand(5) + 0.5)
    dense = linear.weight + 0.5 * layer.lora_B @ layer.lora_A
    scaled = (layer.magnitude / linear.weight.norm(dim=1))[:, None] * dense
    torch.testing.assert_close(layer(x), x @ scaled.T)
    dora = (layer.magnitude / dense.norm(dim=1))[:, None] * dense
    assert not torch.allclose(layer(x), x @ dora.T, rtol=1e-2)


def test_methods_see_the_same_bytes_and_the_seed_decides_which(text: Text) -> None:
    def inputs(steps: int, seed: int) -> list[torch.Tensor]:
        return [batch for batch, _ in text.batches(TINY, steps, seed)]

    first, longer, other = inputs(3, 1), inputs(5, 1), inputs(3, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, longer, strict=False))
    assert not torch.equal(first[0], other[0])
    for batch, targets in text.batches(TINY, 1, 1):
        assert torch.equal(batch[:, 1:], targets[:, :-1])
        assert batch.shape == (TINY.batch, TINY.seq)
    blocks = text.held_out[TEST]
    assert blocks.shape == (TINY.blocks, TINY.seq + 1)
    assert torch.equal(blocks[0, -1:], blocks[1, :1]), "every held-out byte but the first is predicted once"


def test_full_fine_tuning_learns(base: nn.Module, text: Text) -> None:
    losses = run(build(Arm(FULL, None), base, FP32, seed=1), text, steps=30, rate=3e-3)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_held_out_losses_are_spread_and_the_last_one_is_after_the_last_step() -> None:
    assert evaluated(250, 12)[-1] == 250
    assert len(evaluated(250, 12)) == 12
    assert evaluated(3, 12) == [1, 2, 3]
    assert evaluated(7, 1) == [7]


def test_training_stops_when_the_time_is_over(base: nn.Module, text: Text) -> None:
    with pytest.raises(OutOfTimeError):
        run(build(Arm(LORA, RANK), base, FP32, seed=1), text, deadline=Deadline.after(-1.0))


def test_adapters_have_the_dtypes_of_the_mode(base: nn.Module) -> None:
    for mode, frozen, adapter in (
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("autocast", torch.bfloat16, torch.float32),
    ):
        for arm in (Arm(DORA, RANK), Arm(PEFT_DORA, RANK), Arm(ROW_SCALED, RANK)):
            model = build(arm, base, MODES[mode], seed=1)
            assert {value.dtype for value in trained(model).values()} == {adapter}
            assert next(p.dtype for n, p in model.named_parameters() if "embed" in n) == frozen


def test_full_fine_tuning_keeps_weights_in_fp32_and_the_residual_stream_as_the_others_have_it(base: nn.Module) -> None:
    for mode, stream in ((MODES["autocast"], torch.bfloat16), (FP32, torch.float32)):
        model = build(Arm(FULL, None), base, mode, seed=1)
        assert {value.dtype for value in trained(model).values()} == {torch.float32}
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        assert embeddings(torch.zeros(1, 2, dtype=torch.long)).dtype == stream


def test_the_sizes_of_the_study_are_those_of_its_ratios() -> None:
    full = SIZES["full"]
    assert full.ranks == (8, 32, 128)
    assert full.checked_rank == 32
    assert full.blocks * full.seq + 1 <= full.held_out_bytes
