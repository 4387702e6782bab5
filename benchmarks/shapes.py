"""The shapes of the models that are measured, with random weights.

Nothing is downloaded, and times do not depend on the values.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..internals.versions import PEFT_EXTRA, import_fault
from ..printable import shortened
from ..tuner.models import config_text, read_config

_LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.5b": (
        "qwen2.5-0.5b",
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    "1b": (
        "llama-1b",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "8b": (
        "llama-8b",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
}
"""By the name of the option: the model's name and what its config.json has, without the scaling of long contexts.
Qwen2.5-0.5B (its q, k and v have biases), Llama-3.2-1B, Llama-3.1-8B."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that get adapters: every projection of a decoder layer."""


def read_model_config(
    shape: str, path: Path | None, layers: int | None, *, model: str | None = None
) -> tuple[str, Any]:
    """The name and transformers' config of the model in a ``config.json`` (or its folder), or of a known ``shape``.

    ``layers`` replaces the number of decoder layers. ``model`` is a name of ``doratune models``, in place of a shape.

    Raises:
        UsageError: transformers is missing, or it knows no causal language model for the config.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UsageError(f"this benchmark makes models: {import_fault('transformers', error, PEFT_EXTRA)}") from error
    if path is None and model is not None:
        name, text = config_text(model, None)
        config = AutoConfig.for_model(**json.loads(text))
    elif path is None:
        name, values = SHAPES[shape]
        config = AutoConfig.for_model(**values)
    else:
        name = read_config(path).name
        try:
            config = AutoConfig.from_pretrained(path.parent if path.is_file() and path.name == "config.json" else path)
        except Exception as error:  # a config's fields reach code that checks nothing
            reason = f"{type(error).__name__}: {shortened(str(error), 500)}"
            raise UsageError(
                f"--config {path}: transformers cannot read it: {reason}; correct it or download it again"
            ) from error
    config = config.get_text_config()  # of models that also see or hear, the language part
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            with contextlib.suppress(AttributeError):  # some configs derive them from the number of layers
                config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(layers)]
    config.use_cache = False
    return name, config


def random_model(config: Any, device: torch.device) -> nn.Module:
    """A causal language model of this config in bf16 with random frozen weights, created on ``device``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)
