"""A tiny model trained with PEFT, and changes to what it saved."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from ..integrations.peft.peft_models import gpt2, llama

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Trained:
    """Folders of an adapter and its base model's checkpoint."""

    adapter: Path
    checkpoint: Path

    def copy(self, to: Path) -> Trained:
        """Copies in the folder ``to``, which may be changed."""
        for name in ("adapter", "checkpoint"):
            shutil.copytree(getattr(self, name), to / name)
        return Trained(to / "adapter", to / "checkpoint")


def train(folder: Path, dtype: torch.dtype = torch.float32, conv1d: bool = False, **settings: Any) -> Trained:
    """Train DoRA for a few steps as a user does, and save the adapter and the base model."""
    torch.manual_seed(0)
    model: nn.Module = (gpt2() if conv1d else llama()).to(dtype)
    made = Trained(folder / "adapter", folder / "checkpoint")
    model.save_pretrained(made.checkpoint, max_shard_size="100KB")  # type: ignore[operator]
    peft_model = adapted(model, **{"fan_in_fan_out": conv1d, **settings})
    optimizer = torch.optim.AdamW([one for one in peft_model.parameters() if one.requires_grad], lr=1e-3)
    for _ in range(3):
        tokens = torch.randint(0, 96, (2, 12))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            peft_model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.save_pretrained(made.adapter)
    return made


def adapted(model: nn.Module, autocast_adapter_dtype: bool = True, **settings: Any) -> PeftModel:
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": "all-linear", **settings})
    return get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=autocast_adapter_dtype)


def edit(folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Change an adapter's tensors and config, in place. Names are given without PEFT's prefix."""
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    config = json.loads(config_file.read_text())
    change(tensors, config)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file({f"{PREFIX}{name}": tensor for name, tensor in whole.items()}, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change a checkpoint's tensors, in place."""
    files = {file: load_file(file) for file in folder.glob("*.safetensors")}
    tensors = {name: tensor for held in files.values() for name, tensor in held.items()}
    change(tensors)
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, file, metadata={"format": "pt"})


def weights_of(checkpoint: Path) -> Tensors:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write bf16 zeros that take no space on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for width in shape:
            size *= width
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + at)
