"""A quantised layer of a norm pass: which of its adapters is active, and the W that it stores."""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

from peft.tuners.lora.layer import LoraLayer

from ...nn.norm_layer import StoredLayer
from .projections import active_adapter
from .stored import StorageReader
from .unchanged import switches_of
from .variant import DoraVariant, caches


class StoredPlace:
    """What norm passes know of one layer whose W is quantised.

    The layer itself is checked in each of its calls, by its :class:`.variant.DoraVariant`: it takes no norm of a pass
    that has read anything else than the layer holds.

    Attributes:
        is_left_out: whether the layer is one that no pass reads: no kernel knows its format, or hooks on its base layer
            run after a pass. Such layers are not examined again in every call.
        reader: reads the W of the active adapter's layer.
    """

    def __init__(self) -> None:
        self.is_left_out = False
        self.reader: StorageReader | None = None
        self._own: StoredLayer | None = None
        self._switches: tuple[Any, ...] = ()

    def own(self, module: LoraLayer) -> StoredLayer | None:
        """Examine the layer: what a pass reads of it now, or None. While nothing has changed it is the same object."""
        self.is_left_out = False
        found = self._examine(module)
        if found is None or self._own is None or not _are_same(self._own, found):
            self._own = found
        self._switches = switches_of(module)
        return self._own

    def _examine(self, module: LoraLayer) -> StoredLayer | None:
        active = active_adapter(module)
        variant = module.lora_variant.get(active)
        if type(variant) is not DoraVariant or module._disable_adapters or module.merged_adapters:
            return None
        dora = variant.glance.look(module, active)  # type: ignore[arg-type]
        if isinstance(dora, str) or caches(module, active):  # type: ignore[arg-type]
            return None
        if dora.base.matrix is not None:
            self.is_left_out = True  # dense, in a layer that is not run by itself
            return None
        stored = variant.stored_of(dora)
        if isinstance(stored, str) or not dora.base.private:
            self.is_left_out = True
            return None
        self.reader = variant.storage
        self.reader.dependants.add(self)
        return StoredLayer(stored, dora.lora_A, dora.lora_B, dora.magnitude, dora.scaling, variant.norms)

    def is_as_it_was(self, module: LoraLayer) -> bool:
        """Whether :meth:`own` would probably return what it returned last, which was not None."""
        own = self._own
        if own is None or self._switches != switches_of(module):
            return False
        modules: dict[str, Any] = module._modules
        active = active_adapter(module)
        try:
            parts = [modules[name]._modules[active] for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
        except KeyError:
            return False
        weights = [part._parameters.get("weight") for part in parts]
        return weights[0] is own.lora_A and weights[1] is own.lora_B and weights[2] is own.magnitude

    @property
    def has_norm(self) -> bool:
        """Whether the open norm pass has a norm for the layer that it has not asked for yet."""
        return self._own is not None and self._own.norms.is_given

    def release(self, reader: StorageReader) -> None:
        """Release the W that ``reader`` has found."""
        if self.reader is reader:
            self._own = None


_places: weakref.WeakKeyDictionary[LoraLayer, StoredPlace] = weakref.WeakKeyDictionary()


def stored_place(layer: LoraLayer) -> StoredPlace:
    """The place of a quantised layer, the same for the passes of the model and of its blocks."""
    place = _places.get(layer)
    if place is None:
        place = _places[layer] = StoredPlace()
    return place


def _are_same(one: StoredLayer, other: StoredLayer) -> bool:
    """Whether both are of the same tensors and the same cache."""
    return one.scaling == other.scaling and all(map(is_, (*one[:4], one.norms), (*other[:4], other.norms)))
