"""What a compiler finds out about DoRA layers while it traces them.

Eager layers keep what they found out from one call to the next. A compiler refuses to keep anything from within a
checkpointed block, and has no need to: it traces a layer once, and guards what it has read.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ...nn.autocast import autocast_is_on
from ...nn.group_plan import Projection
from ...nn.norm_layer import NormLayer
from ...nn.traced_pass import TracedLayer
from .examine import DoraLayer
from .swapped import plain_class
from .variant import DoraVariant


def norm_layers(root: nn.Module) -> list[NormLayer | TracedLayer]:
    """The layers below ``root`` whose norms a traced graph can compute at its start."""
    found: list[NormLayer | TracedLayer] = []
    for module in root.modules():
        if isinstance(module, LoraLayer):
            own = _active(module)
            if own is None:
                continue
            variant, dora = own
            if dora.base.matrix is None:
                # Hooks on the base layer run after the start of the graph, and may bring other weights in.
                stored = variant.traced_layer(dora) if dora.base.private else None
                if stored is not None:
                    found.append(stored)
            elif dora.base.plain:
                adapters = (dora.lora_A, dora.lora_B, dora.magnitude, dora.scaling)
                found.append(NormLayer(dora.base.matrix, *adapters, variant.norms))
    return found


def traced_projection(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Projection | None:
    """The layer's tensors, for products in ``dtype``; None if anything of PEFT's forward pass applies."""
    if not isinstance(module, LoraLayer) or plain_class(module) is not Linear:
        return None
    own = _active(module)
    if own is None:
        return None
    variant, dora = own
    if dora.base.matrix is None or not dora.base.plain:
        return None
    adapter = _adapter(module)
    if module.training and type(module.lora_dropout[adapter]) is not nn.Identity:
        return None
    weight, a, b, m, bias = dora.base.matrix, dora.lora_A, dora.lora_B, dora.magnitude, dora.layer.bias
    assert weight is not None
    if weight.dtype is not dtype or a.dtype is not b.dtype or (a.dtype is not dtype and not autocast_is_on(device)):
        return None
    if not device == weight.device == a.device == b.device == m.device:
        return None
    if bias is not None and (bias.requires_grad or bias.device != device):
        return None
    if module.lora_magnitude_vector[adapter].__dict__.get("_dora_cache"):
        return None
    return Projection(weight, a, b, m, bias, dora.scaling, variant.norms)  # type: ignore[arg-type]


def _adapter(module: LoraLayer) -> str | None:
    """The only active adapter; None if there are several or none."""
    active = module._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def _active(module: LoraLayer) -> tuple[DoraVariant, DoraLayer] | None:
    """The variant and the parts of the active adapter, if it is doratune's."""
    if module._disable_adapters or module.merged_adapters or getattr(peft_dora, "ENABLE_DORA_CACHING", False):
        return None
    adapter = _adapter(module)
    variant = None if adapter is None else module.lora_variant.get(adapter)
    if adapter is None or type(variant) is not DoraVariant:
        return None
    dora = variant.glance.look(module, adapter)
    return (variant, dora) if isinstance(dora, DoraLayer) else None
