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

from ...nn.watching import is_untouched
from .base_layers import BaseLayer, NotNow, read_base

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class DoraLayer(NamedTuple):
    """The parts of a DoRA adapter: A [r, d_in], B [d_out, r], m [d_out], s, and the layer beneath, W [d_out, d_in]."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    layer: nn.Module
    base: BaseLayer


class Glance:
    """What :func:`examine` said of a layer, for as long as a glance shows that nothing it looks at has changed.

    Only of a plain W: what a quantised one consists of is its own business. A step on the GPU can wait for Python, and
    this is paid in every forward pass of every layer.
    """

    def __init__(self) -> None:
        self._found: DoraLayer | None = None
        self._parts: tuple[_Part, ...] = ()

    def look(self, module: LoraLayer, adapter: str) -> DoraLayer | str:
        """What :func:`examine` says."""
        if torch.compiler.is_compiling():  # a compiler holds what it has seen against what is there itself
            return examine(module, adapter)
        known = self._found
        if known is not None and self._unchanged(module, adapter, known):
            return known
        found = examine(module, adapter)
        self._found = None
        if not isinstance(found, str) and found.base.plain:
            parts = _parts(module, adapter)
            if parts is not None and all("weight" in part._parameters for part in parts):
                self._parts = tuple([_Part.of(part) for part in parts])
                self._found = found
        return found

    def _unchanged(self, module: LoraLayer, adapter: str, known: DoraLayer) -> bool:
        parts = _parts(module, adapter)
        if parts is None or module.scaling[adapter] != known.scaling:
            return False
        for part, before in zip(parts, self._parts, strict=True):
            weight = before.weight
            if part is not before.module or type(part) is not before.kind:
                return False
            if part._parameters.get("weight") is not weight or not is_untouched(part):
                return False
            # Sharding a model and moving it put other values into the same parameter.
            if weight.data_ptr() != before.address or weight.dtype is not before.dtype or weight.shape != before.shape:
                return False
        return not known.base.weight.requires_grad and parts[1]._parameters.get("bias") is None


class _Part(NamedTuple):
    """One of a layer's modules, and where the values of its weight were."""

    module: nn.Module
    kind: type
    weight: torch.Tensor
    address: int
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, module: nn.Module) -> _Part:
        weight = module._parameters["weight"]
        assert weight is not None
        return cls(module, type(module), weight, weight.data_ptr(), weight.dtype, weight.shape)


def _parts(module: LoraLayer, adapter: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module] | None:
    """The modules of A, B, m and W, without the detours of ``nn.Module.__getattr__``; None if they are elsewhere."""
    try:
        modules: dict[str, nn.Module] = module._modules
        a, b, m = (modules[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
        base = modules["base_layer"]
    except KeyError:
        return None
    return None if a is None or b is None or m is None else (a, b, m, base)


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
    if module.base_layer is not layer:  # another tuner's layer lies between, whose output PEFT hands on
        base = base._replace(plain=False, private=False)
    return DoraLayer(lora_a.weight, lora_b.weight, magnitude.weight, float(scaling), layer, base)
