"""Whole models: a training step and a forward pass in every implementation of DoRA, and in LoRA.

The default is Llama-8B's shape with random weights: nothing is downloaded, times do not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import UsageError
from ..tuner.models import read_config
from .adapted import (
    OPS,
    Contender,
    Mode,
    bench_device,
    chosen_implementations,
    chosen_modes,
    contenders,
    measure,
    relative_errors,
    touch,
    with_dora,
)
from .dorafactors import Dorafactors
from .results import Outcome, Row

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
"""Llama-3.1-8B, as its config.json has it, without the scaling of long contexts."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def bench_model(
    *,
    config: Path | None = None,
    layers: int | None = None,
    rank: int = 384,
    seq: int = 4096,
    loss_tokens: int = 1024,
    modes: str = "autocast,bf16",
    checkpointing: bool = True,
    compiled: bool = False,
    implementations: Collection[str] = (),
    ops: Collection[str] = OPS,
    rounds: int = 5,
    device: str | None = None,
    dorafactors: Dorafactors | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure steps and inference of a causal language model with adapters on all its linear projections.

    One batch of ``seq`` random tokens; the loss is over the last ``loss_tokens`` of them. ``layers`` replaces the
    config's number. ``implementations`` default to all that can run, under torch.compile too where ``compiled``.

    Raises:
        UsageError: PEFT or transformers is missing, or a name, size or config is wrong.
    """
    chosen = chosen_modes(modes)
    names = chosen_implementations(implementations, dorafactors, compiled)
    name, built = read_model_config(config, layers)
    where = bench_device(device)
    base = random_model(built, where)
    torch.manual_seed(0)
    ids = torch.randint(0, built.vocab_size, (1, seq), device=where)
    outcome = Outcome()
    for mode_name, mode in chosen.items():
        adapted = with_dora(base, mode, rank=rank, targets=TARGETS)
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        running = contenders(names, adapted, dorafactors, outcome.notes)
        facts: Row = {
            "bench": "model",
            "model": name,
            "shape": [built.num_hidden_layers, seq],
            "rank": rank,
            "dtype": "bf16",
            "adapter": mode.adapter,
        }
        for op in [op for op in OPS if op in ops]:
            progress(f"{name}, {built.num_hidden_layers} layers, {mode_name}: {op}")
            flags = mode.flags + (["checkpointing"] if checkpointing and op == "step" else [])
            rows = _measure(op, running, adapted, ids, min(loss_tokens, seq - 1), mode, rounds, outcome.notes)
            outcome.rows += [{**facts, "op": op, "flags": flags, **row} for row in rows]
        del running, adapted
        torch.compiler.reset()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return outcome


def read_model_config(path: Path | None, layers: int | None) -> tuple[str, Any]:
    """The name and transformers' config of the model in a ``config.json`` (or its folder), or of Llama-8B's shape.

    Raises:
        UsageError: transformers is missing, or it knows no causal language model for the config.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UsageError("this benchmark needs transformers: pip install 'doratune[peft]'") from error
    if path is None:
        name, config = "llama-8b", AutoConfig.for_model(**LLAMA_8B)
    else:
        name = read_config(path).name
        try:
            config = AutoConfig.from_pretrained(path.parent if path.is_file() and path.name == "config.json" else path)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"--config {path}: transformers cannot read it: {error}") from error
    if layers is not None:
        config.num_hidden_layers = layers
    config.use_cache = False
    return name, config


def random_model(config: Any, device: torch.device) -> nn.Module:
    """A causal language model of this config in bf16 with random frozen weights, created on ``device``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def _measure(
    op: str,
    running: list[Contender],
    adapted: nn.Module,
    ids: torch.Tensor,
    loss_tokens: int,
    mode: Mode,
    rounds: int,
    notes: list[str],
) -> list[Row]:
    device = ids.device
    labels = ids[0, -loss_tokens:]

    def logits(model: nn.Module) -> torch.Tensor:
        with mode.context(device):
            result: torch.Tensor = model(input_ids=ids, logits_to_keep=loss_tokens + 1, use_cache=False).logits
        return result[0, :-1]

    def step(model: nn.Module) -> None:
        functional.cross_entropy(logits(model).float(), labels).backward()

    def inference(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return logits(model)

    call: Callable[[nn.Module], object] = step if op == "step" else inference
    for one in running:
        one.model.train(op == "step")  # checkpointing needs training mode; there is no dropout
    before = touch(adapted.parameters()) if op == "step" else _nothing
    samples = measure(running, call, before=before, rounds=rounds, device=device, hide_host=False, notes=notes)
    errors: dict[str, float] = {}
    if op == "inference":
        errors = relative_errors({one.name: inference(one.model) for one in running if one.name in samples})
    return [
        {"impl": impl, **sample.columns(), "rel_err": errors.get(impl), "complaint": None}
        for impl, sample in samples.items()
    ]


def _nothing() -> None:
    """A forward pass needs no preparation."""
