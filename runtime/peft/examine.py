"""What a DoRA layer of PEFT is made of at this moment, and why doratune may have to leave it to PEFT.

Parameters can be anything at forward time: gathered or still sharded, wrapped, offloaded, hooked. So a layer is looked
at anew in every call, and whatever is not plainly what the formula needs goes PEFT's way: never a shard taken for a
weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .base_layers import BaseLayer, NotNow, is_untouched, read_base

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class DoraLayer(NamedTuple):
    """The parts of a DoRA adapter: A [r, d_in], B [d_out, r], m [d_out], s, and the layer beneath, W [d_out, d_in]."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    layer: nn.Module
    base: BaseLayer

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the base layer."""
        return self.layer.bias  # type: ignore[return-value]


class Glance:
    """What :func:`examine` said of a layer, for as long as a glance shows that nothing it looks at has changed.

    Only of a plain W: what a quantised one consists of is its own business. A glance costs 4 us where the full look
    costs 40, in every forward pass of every layer.
    """

    def __init__(self) -> None:
        self._parts: tuple[nn.Module, ...] = ()
        self._weights: tuple[tuple[torch.Tensor, int, torch.Size, torch.dtype], ...] = ()
        self._scaling: object = None
        self._found: DoraLayer | None = None

    def look(self, module: LoraLayer, adapter: str) -> DoraLayer | str:
        """What :func:`examine` says."""
        if torch.compiler.is_compiling():
            return examine(module, adapter)
        parts = (
            module.lora_A[adapter],
            module.lora_B[adapter],
            module.lora_magnitude_vector[adapter],
            module.get_base_layer(),
        )
        if self._found is not None and self._unchanged(parts) and module.scaling[adapter] is self._scaling:
            return self._found
        found = examine(module, adapter)
        self._found = None
        if not isinstance(found, str) and found.base.plain:
            self._parts = parts
            weights = [part._parameters.get("weight") for part in parts]
            self._weights = tuple([(w, w.data_ptr(), w.shape, w.dtype) for w in weights if w is not None])
            self._scaling = module.scaling[adapter]
            self._found = found if len(self._weights) == len(parts) else None
        return found

    def _unchanged(self, parts: tuple[nn.Module, ...]) -> bool:
        for part, known, (weight, address, shape, dtype) in zip(parts, self._parts, self._weights, strict=True):
            if part is not known or part._parameters.get("weight") is not weight or not is_untouched(part):
                return False
            # Sharding and moving a model put other values into the same parameter.
            if weight.data_ptr() != address or weight.dtype is not dtype or weight.shape != shape:
                return False
        return not self._weights[3][0].requires_grad and parts[1]._parameters.get("bias") is None


def examine(module: LoraLayer, adapter: str) -> DoraLayer | str:
    """The parts of ``adapter`` in ``module``, or the reason why the adapter is PEFT's business."""
    d_out, d_in = module.out_features, module.in_features
    lora_a, lora_b = module.lora_A[adapter], module.lora_B[adapter]
    magnitude = module.lora_magnitude_vector[adapter]
    for name, part, kind in (
        ("lora_A", lora_a, nn.Linear),
        ("lora_B", lora_b, nn.Linear),
        ("lora_magnitude_vector", magnitude, DoraLinearLayer),
    ):
        if type(part) is not kind:
            return NotNow(f"its {name} is wrapped as {type(part).__name__}, so its weight may be a shard")
        if not is_untouched(part):
            return f"its {name} has hooks or a patched forward, which only run when PEFT calls it"
        if hasattr(part.weight, "ds_id"):
            return NotNow(f"its {name} is partitioned by DeepSpeed ZeRO-3")
        if type(part.weight) not in PLAIN_TENSORS:
            return NotNow(f"its {name} is a {type(part.weight).__name__}: sharded")
        if part.weight.is_meta:
            return NotNow(f"its {name} is on the meta device")
    if lora_b.bias is not None:
        return "lora_bias=True: PEFT lets that bias into the norm too"
    rank = lora_a.weight.shape[0] if lora_a.weight.ndim else 0
    for name, part, shape in (
        ("lora_A", lora_a, (rank, d_in)),
        ("lora_B", lora_b, (d_out, rank)),
        ("lora_magnitude_vector", magnitude, (d_out,)),
    ):
        if part.weight.shape != shape:
            return NotNow(f"its {name} has shape {list(part.weight.shape)} where {list(shape)} is due: a shard")
    scaling = module.scaling[adapter]
    if not isinstance(scaling, int | float):
        return f"its scaling is a {type(scaling).__name__}, not a number"
    layer = module.get_base_layer()
    base = read_base(layer, d_out, d_in, transposed=module.fan_in_fan_out)
    if isinstance(base, str):
        return base
    return DoraLayer(lora_a.weight, lora_b.weight, magnitude.weight, float(scaling), layer, base)
