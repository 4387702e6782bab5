"""Tell whether a PEFT layer is as it was when it was examined.

Between two calls, or within one, a layer's adapter may be switched, merged, rescaled or replaced, its weights streamed
in, its modules wrapped. Every layer asks in every call, and small models wait for Python: so what was read is read
again by a few calls into C, and compared there.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from ...internals.torch import guard_of, hooks_made

_data_ptr = torch.Tensor.data_ptr
_numel = torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous
_dtype = attrgetter("dtype")
_needs_gradient = attrgetter("requires_grad")

_SWITCHES = itemgetter("_active_adapter", "_disable_adapters", "merged_adapters", "training", "scaling", "lora_variant")
_OF_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")
_MODULES = itemgetter(*_OF_ADAPTERS, "base_layer")
_KEYS = ["bias", "bias", *["forward"] * 4, *["weight"] * 4]


class Unchanged:
    """The state of ``layer`` with its only active adapter, ``active``; ``tensors`` are its W, A, B and m.

    Without W, the storage of a quantised one is the caller's business.

    It counts as changed once a hook is registered on any module. Hooks from before are the caller's business.

    Attributes:
        attributes: the layer's own dictionary, which a copy of the layer does not share.
        dtype, adapter_dtype, device: of W and of A.
        frozen: whether no gradient of the bias is wanted.
    """

    __slots__ = (
        "_accepts",
        "_adapters",
        "_addresses",
        "_are_needed",
        "_bases",
        "_copies",
        "_dicts",
        "_hooks",
        "_keys",
        "_kinds",
        "_layout",
        "_modules",
        "_parts",
        "_places",
        "_switches",
        "_tensors",
        "_values",
        "adapter_dtype",
        "attributes",
        "device",
        "dtype",
        "frozen",
    )

    def __init__(self, layer: nn.Module, active: str, tensors: Sequence[torch.Tensor]) -> None:
        self.attributes = layer.__dict__
        self._switches = switches_of(layer)
        self._places = layer._modules
        self._modules = _MODULES(self._places)
        self._adapters = [held._modules for held in self._modules[:4]]
        self._copies = [{**held} for held in self._adapters]
        a, b, m = (held[active] for held in self._adapters[:3])
        base: nn.Module = self._modules[4]
        self._parts = [a, b, m, base]
        self._kinds = [*map(type, self._parts)]
        attributes = [part.__dict__ for part in self._parts]
        dense = len(tensors) == 4
        self._dicts: list[dict[str, Any]] = [
            b._parameters, base._parameters, *attributes, *[part._parameters for part in (a, b, m)]
        ]  # fmt: skip
        if dense:
            self._dicts.append(base._parameters)
        self._keys = _KEYS[: len(self._dicts)]
        self._values = [*map(dict.get, self._dicts, self._keys)]
        bias = self._values[1]
        self._bases = [*([tensors[0]] if dense else []), *([] if bias is None else [bias])]
        self._are_needed = [*map(_needs_gradient, self._bases)]
        self._tensors = [*tensors]
        self._addresses = [*map(_data_ptr, tensors)]
        self._layout = self._read_layout()
        self._accepts = guard_of(self._tensors) or _refuses
        self._hooks = hooks_made()
        self.dtype, self.adapter_dtype, self.device = tensors[0].dtype, tensors[-2].dtype, tensors[0].device
        self.frozen = bias is None or not bias.requires_grad

    def holds(self) -> bool:
        """Whether nothing has changed that decides what the layer computes, but for the values of its tensors."""
        try:
            return (
                _SWITCHES(self.attributes) == self._switches
                and _MODULES(self._places) == self._modules
                and self._adapters == self._copies
                and [*map(type, self._parts)] == self._kinds
                and all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
                and not self._parts[2].__dict__.get("_dora_cache")
                and [*map(_needs_gradient, self._bases)] == self._are_needed
                and self._hooks == hooks_made()
                and self.stands()
            )
        except KeyError:
            return False

    def stands(self) -> bool:
        """Whether W, A, B and m are where they were, in their dtypes and sizes."""
        tensors = self._tensors
        # Conversions may end at an old address, and a square W may be transposed where it is. The guard refuses for
        # other reasons, too: under another autocast, or where a tensor is frozen now.
        return [*map(_data_ptr, tensors)] == self._addresses and (
            self._accepts(*tensors) or self._read_layout() == self._layout
        )

    def _read_layout(self) -> list[object]:
        tensors = self._tensors
        return [*map(_numel, tensors), *map(_dtype, tensors), *map(_is_contiguous, tensors)]


def _refuses(*_: torch.Tensor) -> bool:
    return False


def switches_of(layer: nn.Module) -> tuple[Any, ...]:
    """What is switched in ``layer`` now: its adapters, merging, training and scaling."""
    return tuple([_copied(value) for value in _SWITCHES(layer.__dict__)])


def _copied(value: Any) -> Any:
    """A copy of a list or dictionary, which may be written to where it is; any other value itself."""
    return [*value] if type(value) is list else {**value} if type(value) is dict else value
