"""A converted adapter computes what its source does, by the formulas of the trainer that it is for.

What a format cannot hold is refused, and nothing is left behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from doratune.adapters import convert as converting
from doratune.adapters.convert import convert
from doratune.adapters.errors import AdapterError, ConversionError
from doratune.adapters.write import write_lycoris
from doratune.errors import UsageError

from ..integrations.peft.peft_models import shake
from .world import DOWN, PREFIX, K, Q, Tensors, Trained, adapted, edit, llama, train, weights_of

M = ".lora_magnitude_vector"
PEFT_FILE = "adapter_model.safetensors"


def flat(module: str) -> str:
    return "lycoris_" + module.replace(".", "_")


def by_lycoris(tensors: Tensors, name: str, weight: torch.Tensor) -> torch.Tensor:
    """W' as LyCORIS' LoConModule computes it, in fp64 (``make_weight``, ``apply_weight_decompose``)."""
    up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
    product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    adapted_weight = weight.double() + product * (tensors[f"{name}.alpha"].item() / down.shape[0])
    scale = tensors[f"{name}.dora_scale"].double()
    if scale.shape[0] == weight.shape[0]:  # wd_on_out
        norm = adapted_weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = adapted_weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return adapted_weight * (scale / norm)


def by_peft(folder: Path, module: str, weight: torch.Tensor, scaling: float) -> torch.Tensor:
    """W' of a PEFT adapter, in fp64."""
    tensors = load_file(folder / PEFT_FILE)
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
    adapted_weight = weight.double() + scaling * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    gain = tensors[f"{PREFIX}{module}{M}"].double().flatten() / adapted_weight.flatten(1).norm(dim=1)
    return adapted_weight * gain.reshape(-1, *[1] * (weight.ndim - 1))


def test_peft_to_lycoris_and_back_is_the_same_adapter(trained: Trained, folder: Path) -> None:
    there, back = folder / "there.safetensors", folder / "back"
    done = convert(trained.adapter, there, to="lycoris")
    assert (done.source, done.format, done.layers) == ("peft", "lycoris", 14)
    tensors, weights = load_file(there), weights_of(trained.checkpoint)
    for module in (Q, K, DOWN):
        assert tensors[f"{flat(module)}.dora_scale"].shape == (len(weights[f"{module}.weight"]), 1)
        expected = by_peft(trained.adapter, module, weights[f"{module}.weight"], 2.0)
        result = by_lycoris(tensors, flat(module), weights[f"{module}.weight"])
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    convert(there, back, to="peft")
    assert (back / "adapter_config.json").read_text() == (trained.adapter / "adapter_config.json").read_text()
    before, after = load_file(trained.adapter / PEFT_FILE), load_file(back / PEFT_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    model = PeftModel.from_pretrained(llama(), back)
    loaded = model.state_dict()[f"{PREFIX}{Q}{M}.default.weight"]
    assert torch.equal(loaded, before[f"{PREFIX}{Q}{M}"])


SETTINGS: list[dict[str, Any]] = [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 4, "down_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    {"use_dora": False},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings))
def test_a_file_without_doratunes_note_needs_the_checkpoint_for_names(settings: dict[str, Any], folder: Path) -> None:
    made = train(folder, **settings)
    there, bare, back = folder / "there.safetensors", folder / "bare.safetensors", folder / "back"
    convert(made.adapter, there, to="lycoris")
    save_file(load_file(there), bare)  # as LyCORIS saves it
    with pytest.raises(AdapterError, match="--checkpoint"):
        convert(bare, back, to="peft")
    convert(bare, back, to="peft", checkpoint=made.checkpoint)
    before, after = load_file(made.adapter / PEFT_FILE), load_file(back / PEFT_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = PeftModel.from_pretrained(llama(), back)
    source = PeftModel.from_pretrained(llama(), made.adapter)
    layers = dict(model.named_modules())
    for name, module in source.named_modules():
        if isinstance(module, LoraLayer):
            assert math.isclose(layers[name].scaling["default"], module.scaling["default"], rel_tol=1e-6)
            assert layers[name].use_dora == module.use_dora


def test_tensorrt_llm_gets_gains_and_gives_magnitudes_back(trained: Trained, folder: Path) -> None:
    there, back = folder / "there", folder / "back"
    with pytest.raises(UsageError, match="--checkpoint"):
        convert(trained.adapter, there, to="trtllm")
    convert(trained.adapter, there, to="trtllm", checkpoint=trained.checkpoint)
    before, tensors, weights = (
        load_file(trained.adapter / PEFT_FILE),
        load_file(there / PEFT_FILE),
        weights_of(trained.checkpoint),
    )
    assert (there / "adapter_config.json").read_text() == (trained.adapter / "adapter_config.json").read_text()
    for module in (Q, DOWN):
        a, b = (before[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
        weight = weights[f"{module}.weight"].double()
        # normalize_dora_vector of TensorRT-LLM's examples/dora/normalize_weights.py
        expected = before[f"{PREFIX}{module}{M}"].double() / torch.linalg.norm(weight + 2.0 * b @ a, dim=1)
        torch.testing.assert_close(tensors[f"{PREFIX}{module}{M}"].double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(tensors[f"{PREFIX}{module}.lora_B.weight"], before[f"{PREFIX}{module}.lora_B.weight"])
    convert(there, back, to="peft", checkpoint=trained.checkpoint)
    after = load_file(back / PEFT_FILE)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=3e-7, atol=0)
    save_file(tensors, there / PEFT_FILE)  # as TensorRT-LLM's own script saves it
    convert(there, folder / "named", to="peft", format="trtllm", checkpoint=trained.checkpoint)
    assert load_file(folder / "named" / PEFT_FILE).keys() == after.keys()


@pytest.mark.parametrize(("old", "new"), [(M, ".magnitude"), (M, ".weight_m_wdecomp.weight")])
def test_ai_toolkit_and_nvlabs_become_peft(old: str, new: str, trained: Trained, folder: Path) -> None:
    before = load_file(trained.adapter / PEFT_FILE)
    copied = trained.copy(folder)

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["lora_alpha"] = config["r"]  # ai-toolkit saves no alpha, and has a scaling of 1
        for name in [name for name in tensors if name.endswith(old)]:
            m = tensors.pop(name)
            tensors[name.removesuffix(old) + new] = m if "magnitude" in new else m[:, None]

    edit(copied.adapter, change)
    convert(copied.adapter, folder / "peft", to="peft")
    after = load_file(folder / "peft" / PEFT_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_convolutions_keep_their_shapes(folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 12, 3)
            self.out = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.conv(x).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    weight = net.conv.weight.detach().clone()
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["conv", "out"]))
    shake(model)
    model.save_pretrained(folder / "adapter")
    convert(folder / "adapter", folder / "there.safetensors", to="lycoris")
    tensors = load_file(folder / "there.safetensors")
    assert tensors["lycoris_conv.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors["lycoris_conv.dora_scale"].shape == (12, 1, 1, 1)
    merged = model.merge_and_unload().conv.weight
    torch.testing.assert_close(by_lycoris(tensors, "lycoris_conv", weight).float(), merged, rtol=1e-5, atol=1e-7)
    convert(folder / "there.safetensors", folder / "back", to="peft")
    before, after = (load_file(folder / name / PEFT_FILE) for name in ("adapter", "back"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_file({"conv.weight": weight, "out.weight": torch.randn(12, 12)}, folder / "base.safetensors")
    with pytest.raises(ConversionError, match="linear layers only"):
        convert(folder / "adapter", folder / "trt", to="trtllm", checkpoint=folder / "base.safetensors")


def on_inputs(trained: Trained, folder: Path) -> Path:
    """A LyCORIS file with wd_on_output=False: its dora_scale is [1, d_in]."""
    there = folder / "inputs.safetensors"
    convert(trained.adapter, folder / "outputs.safetensors", to="lycoris")
    tensors, weights = load_file(folder / "outputs.safetensors"), weights_of(trained.checkpoint)
    for name in [name for name in tensors if name.endswith(".dora_scale")]:
        weight = next(w for module, w in weights.items() if flat(module.removesuffix(".weight")) in name)
        tensors[name] = 1.01 * torch.linalg.norm(weight, dim=0, keepdim=True)
    with safe_open(folder / "outputs.safetensors", "pt") as opened:
        save_file(tensors, there, metadata=opened.metadata())
    return there


def along_inputs(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[K + M] = torch.ones(48)


def embedding() -> Tensors:
    """LoRA of an embedding, as PEFT saves it."""
    module = "model.embed_tokens"
    a, b = torch.ones(8, 96), torch.ones(48, 8)
    return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b, module + M: torch.ones(48)}


REFUSED: list[tuple[str, Callable[[Tensors, dict[str, Any]], object], str]] = [
    ("wrong axis of W", along_inputs, "lycoris"),
    ("modules_to_save", lambda tensors, config: tensors.update({"lm_head.weight": torch.ones(96, 48)}), "lycoris"),
    ("modules_to_save", lambda tensors, config: tensors.update({"lm_head.weight": torch.ones(96, 48)}), "trtllm"),
    ("NaN or infinite", lambda tensors, config: tensors[Q + M].fill_(float("nan")), "lycoris"),
    ("use_dora", lambda tensors, config: config.update(use_dora=False), "lycoris"),
    ("rank of the tensors", lambda tensors, config: config.update(r=4), "lycoris"),
    ("not both A and B|without A", lambda tensors, config: tensors.pop(f"{Q}.lora_A.weight"), "lycoris"),
    ("megatron_config", lambda tensors, config: config.update(megatron_config={"a": 1}), "lycoris"),
    ("layer_replication", lambda tensors, config: config.update(layer_replication=[[0, 1], [0, 1]]), "lycoris"),
    ("alora_invocation_tokens", lambda tensors, config: config.update(alora_invocation_tokens=[1]), "lycoris"),
    ("use_qalora", lambda tensors, config: config.update(use_qalora=True), "lycoris"),
    ("which changes W", lambda tensors, config: config.update(init_lora_weights="pissa_niter_4"), "lycoris"),
    ("which changes W", lambda tensors, config: config.update(init_lora_weights="OLoRA"), "trtllm"),
    ("an alpha of 0 as the rank", lambda tensors, config: config.update(lora_alpha=0), "lycoris"),
    ("is an embedding", lambda tensors, config: tensors.update(embedding()), "lycoris"),
    ("is an embedding", lambda tensors, config: tensors.update(embedding()), "trtllm"),
    ("TensorRT-LLM takes", lambda tensors, config: config.update(alpha_pattern={"q_proj": 5}), "trtllm"),
    ("already", lambda tensors, config: None, "peft"),
]


@pytest.mark.parametrize(("reason", "change", "to"), REFUSED, ids=[f"{one[0]}, to {one[2]}" for one in REFUSED])
def test_what_would_be_lost_is_refused_and_nothing_is_left(
    reason: str, change: Callable[[Tensors, dict[str, Any]], object], to: str, trained: Trained, folder: Path
) -> None:
    copied = trained.copy(folder)
    edit(copied.adapter, change)
    before = sorted(folder.rglob("*"))
    target = folder / ("target.safetensors" if to == "lycoris" else "target")
    with pytest.raises((AdapterError, ConversionError), match=reason):
        convert(copied.adapter, target, to=to, checkpoint=copied.checkpoint)
    assert sorted(folder.rglob("*")) == before


def test_a_layer_under_two_prefixes_is_refused(trained: Trained, folder: Path) -> None:
    convert(trained.adapter, folder / "there.safetensors", to="lycoris")
    tensors = load_file(folder / "there.safetensors")
    again = {name.replace("lycoris_", "lora_unet_"): 2 * value for name, value in tensors.items()}
    save_file({**tensors, **again}, folder / "twice.safetensors")
    with pytest.raises(AdapterError, match=r"are both model\.layers"):
        convert(folder / "twice.safetensors", folder / "peft", to="peft", checkpoint=trained.checkpoint)


def test_a_layer_whose_name_ends_anothers_keeps_its_own_rank(folder: Path) -> None:
    layers = {"block.q": 3, "model.block.q": 2, "other.q": 2, "other.c++": 2}
    tensors = {}
    for module, rank in layers.items():
        name = f"lycoris_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = (
            torch.ones(rank, 5),
            torch.ones(6, rank),
        )
        tensors[f"{name}.alpha"] = torch.tensor(4.0 * rank)
    save_file(tensors, folder / "there.safetensors")
    weights = {f"{module}.weight": torch.ones(6, 5) for module in layers}
    save_file(weights, folder / "base.safetensors")
    convert(folder / "there.safetensors", folder / "peft", to="peft", checkpoint=folder / "base.safetensors")
    config = LoraConfig.from_pretrained(folder / "peft")
    for module, rank in layers.items():
        assert config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r) == rank
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        assert alpha == 4 * rank


def test_an_m_for_inputs_has_no_peft_form(trained: Trained, folder: Path) -> None:
    there = on_inputs(trained, folder)
    with pytest.raises(ConversionError, match=r"wd_on_output=False.*--merge"):
        convert(there, folder / "peft", to="peft")
    with pytest.raises(ConversionError, match="--merge"):
        convert(there, folder / "trt", to="trtllm", checkpoint=trained.checkpoint)


def test_values_of_m_along_the_wrong_axis_are_refused_where_w_shows_it(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    weight = weights_of(copied.checkpoint)[f"{Q}.weight"]
    edit(copied.adapter, lambda tensors, config: tensors.update({Q + M: torch.linalg.norm(weight, dim=0)}))
    with pytest.raises(ConversionError, match="norms of the columns of W"):
        convert(copied.adapter, folder / "trt", to="trtllm", checkpoint=copied.checkpoint)


def test_a_result_that_is_not_the_source_is_never_named_done(
    trained: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(file: Path, layers: Any, known: Any, prefix: str) -> None:
        write_lycoris(file, layers, known, prefix)
        tensors = load_file(file)
        tensors[f"{flat(Q)}.alpha"] *= 1.001
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(converting, "write_lycoris", wrong)
    with pytest.raises(ConversionError, match="differs from its source"):
        convert(trained.adapter, folder / "there.safetensors", to="lycoris")
    assert list(folder.iterdir()) == []


def test_a_target_that_exists_is_never_overwritten(trained: Trained, folder: Path) -> None:
    (folder / "there.safetensors").write_text("mine")
    with pytest.raises(ConversionError, match="exists already"):
        convert(trained.adapter, folder / "there.safetensors", to="lycoris")
    assert (folder / "there.safetensors").read_text() == "mine"
    with pytest.raises(ConversionError, match="no such folder"):
        convert(trained.adapter, folder / "nowhere" / "there.safetensors", to="lycoris")
    with pytest.raises(UsageError, match="unknown format 'kohya'"):
        convert(trained.adapter, folder / "there", to="kohya")
    with pytest.raises(UsageError, match=r"\.safetensors"):
        convert(trained.adapter, folder / "there", to="lycoris")


def test_scalings_and_ranks_are_those_that_peft_gives(folder: Path) -> None:
    from doratune.adapters.adapter import Adapter

    model = adapted(
        llama(),
        rank_pattern={r"layers\.0\..*q_proj": 4, "down_proj": 2},
        alpha_pattern={"model.layers.1.mlp.down_proj": 5, "k_proj": 3.5},
        use_rslora=True,
    )
    model.save_pretrained(folder / "adapter")
    with Adapter(folder / "adapter") as adapter:
        assert adapter.config is not None
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                own = name.removeprefix(PREFIX)
                assert adapter.config.rank_of(own) == module.r["default"] == adapter.rank_of(own)
                assert adapter.scaling_of(own) == module.scaling["default"]
