"""The model that is adapted: a small Llama of bytes, trained from scratch on documentation."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ...errors import UsageError
from ...internals.versions import PEFT_EXTRA, import_fault
from ..adapted import MODES, Mode
from .arms import FP32
from .corpus import VALIDATION
from .sizes import Size
from .training import Curve, Deadline, Text, train

SEED = 0
BYTES = 256


def untrained(size: Size, device: torch.device) -> nn.Module:
    """A Llama of this size with random weights in fp32, the same on every device.

    Raises:
        UsageError: PEFT or transformers is missing.
    """
    try:
        import peft  # noqa: F401
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        package = "transformers" if error.name == "transformers" else "peft"
        raise UsageError(f"this benchmark trains with PEFT: {import_fault(package, error, PEFT_EXTRA)}") from error
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.seq,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    model: nn.Module = LlamaForCausalLM(config).to(device)
    return model


def pretrain(size: Size, text: Text, deadline: Deadline) -> tuple[nn.Module, Curve]:
    """The model after its training, in bf16, and how that went on held-out text of the same domain.

    The learning rate falls with a cosine, gradients are clipped to 1.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    device = text.train.device
    model = untrained(size, device)
    curve = train(
        model,
        mode_of(device),
        text,
        size,
        rate=size.pretrain_rate,
        steps=size.pretrain_steps,
        seed=SEED,
        split=VALIDATION,
        evaluations=size.evaluations,
        deadline=deadline,
        clip=1.0,
        schedule=lambda done: 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)),
    )
    return rounded(model), curve


def rounded(model: nn.Module) -> nn.Module:
    """The model with its weights in bf16, frozen. Buffers stay in fp32: rounded, they would be other positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.requires_grad_(False)


def mode_of(device: torch.device) -> Mode:
    """What is trained in: fp32 under autocast to bf16 on a GPU, fp32 on a CPU."""
    return MODES["autocast"] if device.type == "cuda" else FP32


def digest(model: nn.Module) -> str:
    """The sha256 of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def in_fp32(model: nn.Module) -> nn.Module:
    """A copy with the same values in fp32."""
    return copy.deepcopy(model).float()


def save(model: nn.Module, path: Path, of: Mapping[str, str]) -> None:
    """Write the weights as safetensors, with what they were trained on and how, ``of``, as its metadata."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial, dict(of))
    partial.replace(path)


def load(path: Path, size: Size, device: torch.device, of: Mapping[str, str]) -> nn.Module:
    """The model that :func:`save` wrote.

    Raises:
        UsageError: the file is not of this size and text, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()} if found == of else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no safetensors file ({error}); remove it, or name another --base") from error
    if found != of:
        raise UsageError(f"{path} was trained on another text or at another size; remove it, or name another --base")
    model = rounded(untrained(size, device))
    model.load_state_dict(weights)
    return model
