"""A layer whose norm is computed together with those of others: what a launch needs of it, and which may share one.

W is a matrix, or stored in a weight format (:mod:`.stored_norm`); then each tensor that it is stored in counts as one
of the layer's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..codegen.ops import stored_unit, table_unit
from ..codegen.weight_formats import WeightFormat
from ..runtime.reference import TORCH_DTYPES
from .autocast import autocast_dtype
from .kernels import SPEC_DTYPES
from .norm_cache import NormCache
from .rehearsal import META, is_rehearsing
from .stored_norm import How, StoredMatrix, how_of

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)
_text: Callable[[WeightFormat], str] = functools.lru_cache(maxsize=256)(str)


class NormLayer(NamedTuple):
    """A layer of a pass: W [d_out, d_in], A [r, d_in], B [d_out, r], m [d_out], s, and the cache that hands out w."""

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    norms: NormCache

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """W, A, B and m: the columns of a table of layers."""
        return self.weight, self.lora_A, self.lora_B, self.magnitude


class StoredLayer(NamedTuple):
    """The same for a W in a weight format."""

    weight: StoredMatrix
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    norms: NormCache

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that W is stored in, A, B and m: the columns of a table of layers."""
        return (*self.weight.tensors, self.lora_A, self.lora_B, self.magnitude)


AnyLayer = NormLayer | StoredLayer


class Products(NamedTuple):
    """How the products of a layer's norm are computed now.

    ``rounded`` is what :func:`~.norm_cache.slice_settings` takes: the dtype to which A and B are rounded, or all of how
    a norm of a W in a weight format is computed. ``weight`` (or the text of a format), ``adapter`` and ``autocast`` are
    a spec's.
    """

    rounded: torch.dtype | How
    weight: torch.dtype | str
    adapter: torch.dtype
    autocast: bool


def kind_of(layer: AnyLayer) -> tuple[object, ...] | None:
    """What layers of one launch have in common; None if a pass leaves the layer out."""
    w, a, b, m = layer.weight, layer.lora_A, layer.lora_B, layer.magnitude
    tensors, reuse = layer.tensors, layer.norms.reuse
    if reuse == "off" or any(type(tensor) not in _PLAIN for tensor in tensors):
        return None
    stored: object
    if isinstance(layer, StoredLayer):
        stored, own = layer.weight.form, TORCH_DTYPES[layer.weight.form.dtype]
        beside: tuple[torch.dtype, ...] = (own, *_HALVES, torch.float32)  # those of exact formats are any half
    else:
        stored, own = None, layer.weight.dtype
        beside = (own, torch.float32)
    if own not in SPEC_DTYPES or own is torch.float64:
        return None
    if len(w.shape) != 2 or a.ndim != 2 or not w.shape[0] * w.shape[1] or not a.numel():
        return None
    if a.shape[1] != w.shape[1] or b.shape != (w.shape[0], a.shape[0]) or m.shape != w.shape[:1]:
        return None
    if m.dtype not in SPEC_DTYPES or m.dtype is torch.float64:
        return None
    if a.dtype not in beside or b.dtype is not a.dtype:
        return None
    kinds = ("cuda", "cpu", META) if is_rehearsing() else ("cuda", "cpu")
    device = tensors[0].device
    if device.type not in kinds:
        return None
    for tensor in tensors:
        if tensor.device != device or not tensor.is_contiguous():
            return None
        if tensor.is_inference() or not (tensor.data_ptr() or tensor.is_meta):  # no version, or no memory now
            return None
    return (device, *w.shape, a.shape[0], stored, own, a.dtype, m.dtype, layer.scaling, reuse)


def products_of(layer: AnyLayer, device: torch.device | None = None) -> Products | None:
    """How the layer's norm is computed under the present autocast; None if no grouped kernel takes A beside W so.

    ``device``: as if the layer were there.
    """
    adapter = layer.lora_A.dtype
    rounded = autocast_dtype(device or layer.weight.device)
    if isinstance(layer, StoredLayer):
        how = how_of(layer.weight.form, adapter, rounded)
        return Products(how, _text(how.form), adapter, how.rounds) if how.adapter is adapter else None
    w = layer.weight
    if rounded is None:
        return Products(adapter, w.dtype, adapter, False)
    if rounded is not w.dtype or rounded not in _HALVES:
        return None
    return Products(rounded, w.dtype, adapter, rounded is not adapter)


def units_of(layer: AnyLayer) -> list[int]:
    """The bytes of which a kernel takes the places of each tensor of such a layer to be multiples."""
    if not isinstance(layer, StoredLayer):
        return [*map(unit_of, layer.tensors)]
    w = layer.weight
    parts = [
        stored_unit(tensor.numel(), stored.dtype) * tensor.element_size()
        for tensor, stored in zip(w.tensors, w.form.operands(w.d_out, w.d_in), strict=True)
    ]
    return [*parts, *map(unit_of, (layer.lora_A, layer.lora_B, layer.magnitude))]


def unit_of(tensor: torch.Tensor) -> int:
    """The bytes of which a kernel takes the places of such matrices, or vectors, to be multiples."""
    if tensor.ndim == 1:
        return tensor.element_size()
    return table_unit(tensor.shape[1], SPEC_DTYPES[tensor.dtype]) * tensor.element_size()
