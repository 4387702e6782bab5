"""Tell whether a PEFT layer is as it was when it was examined.

Between two calls, or within one, a layer's adapter may be switched, merged, rescaled or replaced, its weights streamed
in, its modules wrapped. Every layer asks in every call, and small models wait for Python: so what was read is read
again by a few calls into C, and compared there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from ...internals.torch import hooks_made

_data_ptr = torch.Tensor.data_ptr
_storage = torch.Tensor.untyped_storage
_offset = torch.Tensor.storage_offset
_referent = weakref.ref.__call__
_numel = torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous
_dtype = attrgetter("dtype")
_needs_gradient = attrgetter("requires_grad")

_SWITCHES = itemgetter("_active_adapter", "_disable_adapters", "merged_adapters", "training", "scaling")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")


class Unchanged:
    """The state of ``layer`` with its only active adapter, ``active``; ``tensors`` are its W, A, B and m.

    Without W, the storage of a quantised one is the caller's business.

    It counts as changed once a hook is registered on W's module or an adapter's. Hooks from before are the caller's
    business; with such it counts as changed once any is registered anywhere.

    All layers of a model do not fit into a processor's caches, and what is compared takes longer to fetch than to
    compare. So what layers have in common is kept once for all of them, and the rest in few objects, without copies of
    what a layer holds.

    Attributes:
        addresses: of the tensors.
        attributes: the layer's own dictionary, which a copy of the layer does not share.
        dtype, adapter_dtype, device: of W and of A.
        frozen: whether no gradient of the bias is wanted.
    """

    __slots__ = (
        "_are_needed",
        "_bases",
        "_dicts",
        "_hook_tables",
        "_hookless",
        "_hooks",
        "_keys",
        "_kinds",
        "_layout",
        "_of_magnitude",
        "_offsets",
        "_parts",
        "_storages",
        "_switches",
        "_tensors",
        "_values",
        "adapter_dtype",
        "addresses",
        "attributes",
        "device",
        "dtype",
        "frozen",
    )

    def __init__(self, layer: nn.Module, active: str, tensors: Sequence[torch.Tensor]) -> None:
        self.attributes = layer.__dict__
        self._switches = _shared(tuple([_copied(value) for value in _SWITCHES(layer.__dict__)]))
        modules: dict[str, Any] = layer._modules
        adapters: list[dict[str, Any]] = [modules[name]._modules for name in _OF_ADAPTERS]
        a, b, m = (held[active] for held in adapters[:3])
        base = modules["base_layer"]
        dense = len(tensors) == 4
        self._parts = (a, b, m, base)
        self._kinds = _shared((*map(type, self._parts),))
        self._of_magnitude: dict[str, Any] = m.__dict__
        places: list[tuple[dict[str, Any], str]] = [
            (self.attributes, "lora_variant"),
            (self.attributes["lora_variant"], active),
            *[(modules, name) for name in (*_OF_ADAPTERS, "base_layer")],
            *[(held, active) for held in adapters],
            *[(part.__dict__, "forward") for part in self._parts],
            (b._parameters, "bias"),
            (base._parameters, "bias"),
            *[(part._parameters, "weight") for part in self._parts[: 3 + dense]],
        ]
        self._dicts = tuple([held for held, _ in places])
        self._keys = _shared(tuple([key for _, key in places]))
        self._values = (*map(dict.get, self._dicts, self._keys),)
        bias = base._parameters.get("bias")
        self._bases = (*tensors[:dense], *([] if bias is None else [bias]))
        self._are_needed = _shared((*map(_needs_gradient, self._bases),))
        self._tensors = tuple(tensors)
        self._storages = tuple([weakref.ref(tensor.untyped_storage()) for tensor in tensors])
        self._offsets = _shared((*map(_offset, tensors),))
        self.addresses = (*map(_data_ptr, tensors),)
        self._layout = _shared(self._read_layout())
        self._hook_tables = tuple([part.__dict__[kind] for part in self._parts for kind in _HOOKS])
        self._hooks, self._hookless = hooks_made(), not any(self._hook_tables)
        self.dtype, self.adapter_dtype, self.device = tensors[0].dtype, tensors[-2].dtype, tensors[0].device
        self.frozen = bias is None or not bias.requires_grad

    def holds(self, *, moved: bool = False) -> bool:
        """Whether nothing has changed that decides what the layer computes, but for the values of its tensors.

        ``moved``: nor does it count where these are, and in which dtypes and sizes.
        """
        try:
            return (
                _SWITCHES(self.attributes) == self._switches
                and all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
                and (*map(type, self._parts),) == self._kinds
                and not (self._of_magnitude.get("_dora_cache"))
                and (*map(_needs_gradient, self._bases),) == self._are_needed
                and (self._hooks == hooks_made() or self._is_as_free_of_hooks())
                and (moved or self.stands())
            )
        except KeyError:
            return False

    def follow(self) -> bool:
        """Whether the storages of W, A, B and m have moved, and they are as they were otherwise; then that is noted.

        Whoever asks knows that the rest has not changed (:meth:`holds` with ``moved``). So FSDP2 gathers the same
        parameters, of the same storages, into other memory before every call of a block.
        """
        if self._read_layout() != self._layout or (*map(_offset, self._tensors),) != self._offsets:
            return False
        if not all(map(is_, map(_referent, self._storages), map(_storage, self._tensors))):
            return False
        self.addresses = (*map(_data_ptr, self._tensors),)
        return True

    def _is_as_free_of_hooks(self) -> bool:
        """Whether these modules have no hooks, as before. FSDP2, for one, makes hooks of tensors in every call."""
        if not self._hookless or any(self._hook_tables):
            return False
        self._hooks = hooks_made()
        return True

    def stands(self) -> bool:
        """Whether W, A, B and m are where they were, in their dtypes and sizes."""
        return (*map(_data_ptr, self._tensors),) == self.addresses and self._read_layout() == self._layout

    def _read_layout(self) -> tuple[object, ...]:
        # Conversions may end at an old address, and a square W may be transposed where it is.
        tensors = self._tensors
        return (*map(_numel, tensors), *map(_dtype, tensors), *map(_is_contiguous, tensors))


_MOST_SHARED = 64
_known: list[tuple[Any, ...]] = []
"""The last values that :func:`_shared` was given."""


def _shared(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """One object for all equal values."""
    for known in _known:
        if known == value and [*map(type, known)] == [*map(type, value)]:
            return known
    if len(_known) >= _MOST_SHARED:
        del _known[0]
    _known.append(value)
    return value


def switches_of(layer: nn.Module) -> tuple[Any, ...]:
    """What is switched in ``layer`` now: its adapters, merging, training, scaling and variants."""
    return tuple([_copied(value) for value in (*_SWITCHES(layer.__dict__), layer.__dict__["lora_variant"])])


def _copied(value: Any) -> Any:
    """A copy of a list or dictionary, which may be written to where it is; any other value itself."""
    return [*value] if type(value) is list else {**value} if type(value) is dict else value
