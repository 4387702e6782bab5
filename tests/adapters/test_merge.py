"""A merged checkpoint is PEFT's own merge within one rounding, its other bytes are the checkpoint's, and zero rows stay
zero."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from doratune.adapters.adapter import Adapter
from doratune.adapters.checkpoint import Checkpoint
from doratune.adapters.convert import convert
from doratune.adapters.errors import AdapterError, ConversionError
from doratune.adapters.examine_adapter import examine_adapter
from doratune.adapters.low_rank import LowRank
from doratune.adapters.merge import merge
from doratune.errors import UsageError

from .test_convert import by_lycoris, embedding, flat, on_inputs
from .world import DOWN, PREFIX, Q, Tensors, Trained, edit, edit_weights, train, weights_of


def peft_merge(made: Trained, dtype: torch.dtype) -> Tensors:
    base = AutoModelForCausalLM.from_pretrained(made.checkpoint).to(dtype)
    merged = PeftModel.from_pretrained(base, made.adapter).merge_and_unload()
    return dict(merged.state_dict())


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
    {"use_dora": False},
    {"conv1d": True},
    {"modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["q_proj", "up_proj"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(map(str, settings)) or "plain")
def test_a_merge_is_pefts_within_one_rounding(settings: dict[str, Any], folder: Path) -> None:
    made = train(folder, **settings)
    before = contents(made.checkpoint), contents(made.adapter)
    done = merge(made.adapter, made.checkpoint, folder / "merged")
    assert (contents(made.checkpoint), contents(made.adapter)) == before
    dtype = settings.get("dtype", torch.float32)
    expected = peft_merge(made, dtype)
    result, base = weights_of(folder / "merged"), weights_of(made.checkpoint)
    assert result.keys() == base.keys()
    changed = 0
    for name, tensor in result.items():
        other = expected[name if name in expected else f"transformer.{name}"]
        assert tensor.dtype == base[name].dtype
        ulp = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)  # in fp32 sums differ by their order
        torch.testing.assert_close(tensor, other.to(tensor.dtype), rtol=ulp, atol=torch.finfo(dtype).tiny)
        changed += not torch.equal(tensor, base[name])
    assert done.layers == sum("lora_A" in name for name in load_file(made.adapter / "adapter_model.safetensors"))
    assert changed == done.layers + done.replaced
    for name in ("config.json", "generation_config.json"):
        assert (folder / "merged" / name).read_bytes() == (made.checkpoint / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(folder / "merged")


def test_the_index_and_tensors_that_no_layer_has_are_the_checkpoints(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    (copied.checkpoint / "tokenizer.json").write_text("{}")
    (copied.checkpoint / "pytorch_model.bin").write_bytes(b"old")
    merge(copied.adapter, copied.checkpoint, folder / "merged")
    index = "model.safetensors.index.json"
    assert (folder / "merged" / index).read_bytes() == (copied.checkpoint / index).read_bytes()
    names = {file.name for file in copied.checkpoint.iterdir()}
    assert {file.name for file in (folder / "merged").iterdir()} == names - {"pytorch_model.bin"}
    before, after = weights_of(copied.checkpoint), weights_of(folder / "merged")
    assert all(torch.equal(before[name], after[name]) for name in before if "proj" not in name)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter", "checkpoint", "merged"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zero_rows_stay_zero_where_peft_makes_nan(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    edit_weights(copied.checkpoint, lambda weights: weights[f"{Q}.weight"][5].zero_())
    edit(copied.adapter, lambda tensors, config: tensors[f"{Q}.lora_B.weight"][5].zero_())
    done = merge(copied.adapter, copied.checkpoint, folder / "merged")
    assert done.zero_rows == 1
    assert "1 zero rows stay zero" in done.describe()
    result = weights_of(folder / "merged")[f"{Q}.weight"]
    expected = peft_merge(copied, torch.float32)[f"{Q}.weight"]
    assert not result[5].any()
    assert expected[5].isnan().all()
    rest = [row for row in range(48) if row != 5]
    torch.testing.assert_close(result[rest], expected[rest], rtol=1e-6, atol=1e-38)


def test_both_axes_of_lycoris_merge_as_lycoris_does(trained: Trained, folder: Path) -> None:
    there = on_inputs(trained, folder)
    weights = weights_of(trained.checkpoint)
    for name, file in (("inputs", there), ("outputs", folder / "outputs.safetensors")):
        merge(file, trained.checkpoint, folder / name)
        result = weights_of(folder / name)
        for module in (Q, DOWN):
            expected = by_lycoris(load_file(file), flat(module), weights[f"{module}.weight"])
            torch.testing.assert_close(result[f"{module}.weight"].double(), expected, rtol=2e-6, atol=1e-9)


def test_tensorrt_llms_adapter_and_a_checkpoint_of_one_file_merge_too(trained: Trained, folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(weights_of(trained.checkpoint), file)
    convert(trained.adapter, folder / "trt", to="trtllm", checkpoint=file)
    with pytest.raises(UsageError, match=r"\.safetensors"):
        merge(folder / "trt", file, folder / "merged")
    merge(folder / "trt", file, folder / "merged.safetensors")
    merge(trained.adapter, trained.checkpoint, folder / "merged")
    by_peft, by_gains = weights_of(folder / "merged"), load_file(folder / "merged.safetensors")
    for name, tensor in by_gains.items():
        torch.testing.assert_close(tensor, by_peft[name], rtol=1e-6, atol=1e-38)


def quantise(folder: Trained) -> None:
    file = folder.checkpoint / "config.json"
    config = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(config))


def pack(folder: Trained) -> None:
    edit_weights(
        folder.checkpoint, lambda weights: weights.update({f"{Q}.weight": weights[f"{Q}.weight"].to(torch.int8)})
    )


def grow(folder: Trained) -> None:
    edit(folder.adapter, lambda tensors, config: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 50)}))


def elsewhere(folder: Trained) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(Q)]:
            tensors[name.replace("q_proj", "query")] = tensors.pop(name)

    edit(folder.adapter, change)


def tie(folder: Trained) -> None:
    file = folder.checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["modules_to_save"] = ["lm_head"]
        tensors["lm_head.weight"] = torch.ones(96, 48)

    edit(folder.adapter, change)


def replicate(folder: Trained) -> None:
    edit(folder.adapter, lambda tensors, config: config.update(layer_replication=[[0, 1], [0, 1]]))


def begin_with_pissa(folder: Trained) -> None:
    edit(folder.adapter, lambda tensors, config: config.update(init_lora_weights="pissa"))


def adapt_the_embedding(folder: Trained) -> None:
    edit(folder.adapter, lambda tensors, config: tensors.update(embedding()))


def overflow(folder: Trained) -> None:
    edit_weights(
        folder.checkpoint,
        lambda weights: weights.update({name: tensor.half() for name, tensor in weights.items()}),
    )
    edit(folder.adapter, lambda tensors, config: tensors[f"{Q}.lora_magnitude_vector"].fill_(1e6))


def lose(folder: Trained) -> None:
    edit(folder.adapter, lambda tensors, config: tensors.pop(f"{Q}.lora_magnitude_vector"))


def by_columns(folder: Trained) -> None:
    weight = weights_of(folder.checkpoint)[f"{Q}.weight"]
    change = {f"{Q}.lora_magnitude_vector": torch.linalg.norm(weight, dim=0)}
    edit(folder.adapter, lambda tensors, config: tensors.update(change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantise, r"quantised \(gptq\)"),
        (pack, "packed as I8"),
        (grow, "model of another size"),
        (elsewhere, "has no weight for"),
        (tie, "tie_word_embeddings"),
        (replicate, "layer_replication"),
        (begin_with_pissa, "which changes W"),
        (adapt_the_embedding, "is an embedding"),
        (overflow, "not finite in F16"),
        (lose, "without m"),
        (by_columns, "norms of the columns of W"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(
    change: Callable[[Trained], None], reason: str, trained: Trained, folder: Path
) -> None:
    copied = trained.copy(folder)
    change(copied)
    before = contents(folder)
    with pytest.raises((AdapterError, ConversionError), match=reason) as raised:
        merge(copied.adapter, copied.checkpoint, folder / "merged")
    assert len(str(raised.value)) <= 1000
    assert contents(folder) == before
    assert {file.name for file in folder.iterdir()} == {"adapter", "checkpoint"}


def test_a_weight_that_is_tied_by_default_is_refused(folder: Path) -> None:
    """GPT-2's own config.json says nothing of tie_word_embeddings."""
    made = train(folder, conv1d=True, target_modules=["c_attn"], modules_to_save=["wte"])
    file = made.checkpoint / "config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)  # some versions of transformers write it
    file.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        merge(made.adapter, made.checkpoint, folder / "merged")
    file.write_text(json.dumps({**config, "architectures": ["GPT2Model"]}))
    assert merge(made.adapter, made.checkpoint, folder / "merged").replaced == 1


def test_an_adapted_head_has_the_embeddings_weight_where_they_share_one(folder: Path) -> None:
    made = train(folder, target_modules=["q_proj", "lm_head"])
    weights = weights_of(made.checkpoint)
    tied = folder / "tied"
    tied.mkdir()
    shared = {"model.embed_tokens.weight": weights["lm_head.weight"].clone()}
    save_file({**weights, **shared}, folder / "untied.safetensors")
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tied / "model.safetensors")
    config = json.loads((made.checkpoint / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with Adapter(made.adapter) as adapter, Checkpoint(tied) as checkpoint:
        assert examine_adapter(adapter, checkpoint) == []
    convert(made.adapter, folder / "trt", to="trtllm", checkpoint=tied)
    convert(made.adapter, folder / "expected", to="trtllm", checkpoint=folder / "untied.safetensors")
    result, expected = (load_file(folder / name / "adapter_model.safetensors") for name in ("trt", "expected"))
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        merge(made.adapter, tied, folder / "merged")


def test_the_w_that_peft_saves_with_an_adapted_head_is_not_written_over_the_merged_one(folder: Path) -> None:
    made = train(folder, target_modules=["q_proj", "lm_head"])
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(made.adapter / "adapter_model.safetensors")
    done = merge(made.adapter, made.checkpoint, folder / "merged")
    assert (done.layers, done.replaced) == (3, 0)
    result, expected = weights_of(folder / "merged"), peft_merge(made, torch.float32)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-38)
    convert(made.adapter, folder / "there.safetensors", to="lycoris", checkpoint=made.checkpoint)
    with pytest.raises(ConversionError, match="name its checkpoint with --checkpoint"):
        convert(made.adapter, folder / "again.safetensors", to="lycoris")
    edit(made.adapter, lambda tensors, config: tensors["lm_head.base_layer.weight"].mul_(2))
    with pytest.raises(AdapterError, match=r"is another W than lm_head\.weight"):
        merge(made.adapter, made.checkpoint, folder / "again")
    with pytest.raises(AdapterError, match=r"is another W than lm_head\.weight"):
        convert(made.adapter, folder / "again.safetensors", to="lycoris", checkpoint=made.checkpoint)


def test_a_saved_scalar_replaces_the_checkpoints(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    file = folder / "model.safetensors"
    save_file({**weights_of(copied.checkpoint), "model.norm.scale": torch.tensor(1.0)}, file)

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["modules_to_save"] = ["norm"]
        tensors["model.norm.scale"] = torch.tensor(3.0)

    edit(copied.adapter, change)
    assert merge(copied.adapter, file, folder / "merged.safetensors").replaced == 1
    assert load_file(folder / "merged.safetensors")["model.norm.scale"].item() == 3.0


def test_a_wrong_merge_is_never_named_done(trained: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LowRank.merged

    def wrong(low: LowRank, rows: torch.Tensor, start: int = 0, norms: torch.Tensor | None = None) -> torch.Tensor:
        return right(low, rows, start, norms) * 1.0001

    monkeypatch.setattr(LowRank, "merged", wrong)
    with pytest.raises(ConversionError, match="differ from the adapter"):
        merge(trained.adapter, trained.checkpoint, folder / "merged")
    assert list(folder.iterdir()) == []


def test_a_target_that_exists_is_never_overwritten(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    for target in (copied.checkpoint, copied.adapter):
        before = contents(target)
        with pytest.raises(ConversionError, match="exists already"):
            merge(copied.adapter, copied.checkpoint, target)
        assert contents(target) == before


def test_names_may_differ_at_the_front(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    file = folder / "bare.safetensors"
    weights = {name.removeprefix("model."): tensor for name, tensor in weights_of(copied.checkpoint).items()}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    merge(copied.adapter, file, folder / "merged.safetensors")
    merge(copied.adapter, copied.checkpoint, folder / "merged")
    expected = weights_of(folder / "merged")
    for name, tensor in load_file(folder / "merged.safetensors").items():
        assert torch.equal(tensor, expected[name if name in expected else f"model.{name}"])


def test_parts_of_a_model_may_be_named_differently(trained: Trained, folder: Path) -> None:
    """As transformers renames the parts of multimodal models: each part has a front of its own."""
    copied = trained.copy(folder)
    file = folder / "parts.safetensors"
    fronts = {"model.layers.0.": "language.layers.0.", "model.layers.1.": "tower.blocks.layers.1."}
    weights = weights_of(copied.checkpoint)
    for name in list(weights):
        for old, new in fronts.items():
            if name.startswith(old):
                weights[new + name.removeprefix(old)] = weights.pop(name)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    assert merge(copied.adapter, file, folder / "merged.safetensors").layers == 14
    merge(copied.adapter, copied.checkpoint, folder / "merged")
    merged, expected = load_file(folder / "merged.safetensors"), weights_of(folder / "merged")
    assert torch.equal(merged["tower.blocks.layers.1.mlp.down_proj.weight"], expected[f"{DOWN}.weight"])


def test_a_folder_that_cannot_be_written_is_one_message(trained: Trained, folder: Path) -> None:
    with pytest.raises(ConversionError, match="no such folder"):
        merge(trained.adapter, trained.checkpoint, folder / "file" / "merged")
    (folder / "long").mkdir()
    with pytest.raises(ConversionError, match="cannot be written"):
        merge(trained.adapter, trained.checkpoint, folder / "long" / ("x" * 250))
    assert list((folder / "long").iterdir()) == []
