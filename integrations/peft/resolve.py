"""The hook by which adapters that PEFT makes or makes anew, after ``accelerate``, run on doratune too.

PEFT puts a variant of its own on a layer whenever it initialises an adapter there: EVA, a new adapter, one that was
deleted and added again. It asks the layer's ``resolve_lora_variant`` for it, in whose place this stands.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant

from .variant import DoraVariant, InputCast


class VariantResolver:
    """In place of a layer's ``resolve_lora_variant``: doratune's variant where PEFT makes its DoRA for linear layers.

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
    """Leave x to doratune as it is. PEFT's dense layers cast it to the adapter's dtype under autocast, too."""
    if isinstance(module, Linear):
        module._cast_input_dtype = InputCast(module)
