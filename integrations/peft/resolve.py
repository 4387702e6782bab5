"""Run adapters on doratune that PEFT adds or initialises again after ``accelerate``.

Whenever PEFT initialises an adapter on a layer (a new adapter, EVA, one that was deleted and added again), it calls the
layer's ``resolve_lora_variant`` and sets the variant that this returns. :class:`VariantResolver` replaces that method.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant

from .variant import DoraVariant, InputCast


class VariantResolver:
    """Replaces a layer's ``resolve_lora_variant``: returns doratune's variant in place of PEFT's for linear layers.

    Args:
        module: the layer. settings: the arguments of :class:`DoraVariant`.
    """

    def __init__(self, module: LoraLayer, *settings: Any) -> None:
        self.module = module
        self.settings = settings

    def __call__(self, **config: Any) -> LoraVariant | None:
        variant = type(self.module).resolve_lora_variant(self.module, **config)
        if type(variant) is not DoraLinearVariant:
            return variant
        cast_no_input(self.module)
        return DoraVariant(*self.settings)


def cast_no_input(module: LoraLayer) -> None:
    """Stop PEFT's dense layers from casting x to the adapter's dtype; they would even do so under autocast."""
    if isinstance(module, Linear):
        module._cast_input_dtype = InputCast(module)
