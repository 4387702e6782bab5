"""Say what ``accelerate`` would do with a model's layers, from a model without weights on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...nn.rehearsal import META, rehearsing
from .report import KERNELS, PEFT, numberless

NONE = "none"
"""What runs a layer that gets no DoRA adapter."""

_EXPERTS_NAMES = {"gate_proj", "up_proj", "down_proj"}
"""Names of dense layers and shared experts that PEFT may take for fused experts, and then refuses."""


@dataclass(frozen=True)
class Foreseen:
    """What runs ``count`` layers that differ in a number only: ``runs`` is ``kernels``, ``peft`` or
    ``none``, and ``why``.

    ``base`` is the kind of base layer.
    """

    name: str
    count: int
    base: str
    runs: str
    why: str


def forecast(build: Callable[[], nn.Module], targets: Sequence[str], rank: int) -> list[Foreseen]:
    """Put DoRA of ``rank`` on the layers ``targets`` of a model on the meta device, and examine each as ``accelerate``
    does. ``build`` makes the model; it is called again where PEFT refuses some of the layers.

    Raises:
        PeftVersionError: PEFT is missing, or its version is not tested.
        ValueError: PEFT refuses the model.
    """
    from .versions import check_peft

    check_peft()
    refused: list[str] = []
    why = ""
    try:
        adapted = _adapted(build(), targets, rank)
    except ValueError as error:
        refused = [name for name in targets if name.rpartition(".")[2] in _EXPERTS_NAMES]
        kept = [name for name in targets if name not in {*refused}]
        if not refused or not kept:
            raise
        why = f"PEFT refuses DoRA there: {str(error).splitlines()[0]}"
        adapted = _adapted(build(), kept, rank)
    gated = _gated(adapted)
    with rehearsing(torch.device("cpu")):
        rows = Counter(
            (numberless(name), *_examined(module, gated.get(name, ""))) for name, module in _lora_layers(adapted)
        )
    rows.update((numberless(name), "", NONE, why) for name in refused)
    return [Foreseen(name, count, base, runs, reason) for (name, base, runs, reason), count in rows.items()]


def _adapted(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=list(targets), fan_in_fan_out=transposed)
    with torch.device(META):
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _examined(module: Any, together: str) -> tuple[str, str, str]:
    """The kind of base layer, what runs it, and the reason if that is PEFT."""
    from peft.tuners.lora.variants import DoraLinearVariant

    from .examine import examine

    (adapter,) = module.lora_variant
    base = type(module.get_base_layer()).__name__
    if type(module.lora_variant[adapter]) is not DoraLinearVariant:
        return base, PEFT, "not a linear layer"
    found = examine(module, adapter)
    if isinstance(found, str):
        return base, PEFT, str(found)
    if not found.base.plain:
        return found.base.kind, KERNELS, "the layer has a forward pass of its own, which computes Wx"
    return found.base.kind, KERNELS, together


def _gated(model: nn.Module) -> dict[str, str]:
    """The gates and ups that run in one kernel with their activation, by name."""
    from .gated import read_gated

    found = {}
    for name, module in model.named_modules():
        mlp = read_gated(module)
        if mlp is not None:
            for part in (mlp.form.gate, mlp.form.up):
                text = f"{mlp.form.gate} and {mlp.form.up} together, with the activation ({mlp.activation})"
                found[f"{name}.{part}".removeprefix("base_model.model.")] = text
    return found
