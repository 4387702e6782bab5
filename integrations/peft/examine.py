"""Read the parts of a PEFT DoRA layer, or the reason why doratune must leave the layer to PEFT.

At forward time parameters may be gathered or still sharded, wrapped, offloaded or hooked. So every call examines the
layer, and anything unexpected runs PEFT's code, so a shard is never mistaken for the full weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...nn.rehearsal import is_rehearsing
from ...nn.watching import is_untouched
from .base_layers import BaseLayer, NotNow, read_base

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class DoraLayer(NamedTuple):
    """The parts of a DoRA layer: A [r, d_in], B [d_out, r], m [d_out], s, and the base layer with W [d_out, d_in]."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    layer: nn.Module
    base: BaseLayer


class Glance:
    """Caches the result of :func:`examine` for a layer, reused while its inputs are unchanged.

    A forward pass may wait for Python, and every layer is examined in every forward pass. Only layers with a plain W
    are cached, because the inner tensors of a quantised W cannot be compared cheaply.
    """

    def __init__(self) -> None:
        self._found: DoraLayer | None = None
        self._parts: tuple[_Part, ...] = ()

    def look(self, module: LoraLayer, adapter: str) -> DoraLayer | str:
        """Return :func:`examine` of ``adapter`` in ``module``, from the cache if nothing has changed."""
        if torch.compiler.is_compiling():  # a compiler guards what it has read itself
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
        """Whether everything that :func:`examine` reads is as it was; every layer asks this in every forward pass."""
        parts = _parts(module, adapter)
        if parts is None or module.scaling[adapter] != known.scaling:
            return False
        for part, (before, kind, weight, address, dtype, shape) in zip(parts, self._parts, strict=True):
            held = part.__dict__
            if (
                part is not before
                or type(part) is not kind
                or held["_parameters"].get("weight") is not weight
                or held["_forward_hooks"]
                or held["_forward_pre_hooks"]
                or held["_backward_hooks"]
                or held["_backward_pre_hooks"]
                or "forward" in held
                # Sharding or moving a model changes the data of the same parameter object.
                or weight.data_ptr() != address
                or weight.dtype is not dtype
                or weight.shape != shape
            ):
                return False
        return not known.base.weight.requires_grad and parts[1]._parameters.get("bias") is None


class _Part(NamedTuple):
    """A submodule of a layer, and the address, dtype and shape of its weight when it was examined."""

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
    """The modules of A, B, m and W, read without the slow ``nn.Module.__getattr__``; None if one is missing."""
    try:
        modules: dict[str, nn.Module] = module._modules
        a, b, m = (modules[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
        base = modules["base_layer"]
    except KeyError:
        return None
    return None if a is None or b is None or m is None else (a, b, m, base)


def examine(module: LoraLayer, adapter: str) -> DoraLayer | str:
    """Return the parts of ``adapter`` in ``module``, or the reason why doratune leaves it to PEFT."""
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
            return f"its {name} has hooks or a patched forward, which run only if PEFT calls it"
        if hasattr(part.weight, "ds_id"):
            return NotNow(f"its {name} is partitioned by DeepSpeed ZeRO-3")
        if type(part.weight) not in PLAIN_TENSORS:
            return NotNow(f"its {name} is a {type(part.weight).__name__}: sharded")
        if part.weight.is_meta and not is_rehearsing():
            return NotNow(f"its {name} is on the meta device")
    if lora_b.bias is not None:
        return "lora_bias=True: in PEFT that bias changes the norm too"
    rank = lora_a.weight.shape[0] if lora_a.weight.ndim else 0
    for name, part, shape in (
        ("lora_A", lora_a, (rank, d_in)),
        ("lora_B", lora_b, (d_out, rank)),
        ("lora_magnitude_vector", magnitude, (d_out,)),
    ):
        if part.weight.shape != shape:
            return NotNow(f"its {name} must have shape {list(shape)}, got {list(part.weight.shape)}: a shard")
    scaling = module.scaling[adapter]
    if not isinstance(scaling, int | float):
        return f"its scaling must be a number, got {type(scaling).__name__}"
    layer = module.get_base_layer()
    base = read_base(layer, d_out, d_in, transposed=module.fan_in_fan_out)
    if isinstance(base, str):
        return base
    if module.base_layer is not layer:  # another tuner's layer lies between, and PEFT passes its output as ``result``
        base = base._replace(plain=False, private=False)
    return DoraLayer(lora_a.weight, lora_b.weight, magnitude.weight, float(scaling), layer, base)
