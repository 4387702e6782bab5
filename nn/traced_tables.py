"""Grouped norms from operators of compiled graphs, which are given tensors in each call and keep nothing but tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codegen.spec import LAYER_BUCKETS
from ..internals.torch import current_stream
from .norm_cache import is_capturing
from .norm_layer import AnyLayer, Products
from .norm_pass import _kernel, alone
from .norm_table import places_of

_MOST_TABLES = 256
_tables: dict[tuple[object, ...], torch.Tensor | None] = {}
"""Tables of addresses by what they tell; None where no kernel can read the layers at their addresses."""
_captured: list[torch.Tensor] = []
"""Tables that replays of CUDA graphs read."""


def write_norms(layers: Sequence[AnyLayer], how: Products, values: torch.Tensor, *, grouped: bool = True) -> None:
    """Write w and g of ``layers``, which are of one kind, to values [2, layers, d_out] fp32.

    In one launch (op ``weight_norm_group``) where they lie such that a kernel can read them, and with ``grouped``.
    """
    first = layers[0]
    device = first.tensors[0].device
    kernel = table = None
    if len(layers) > 1 and grouped:
        count, rank = min(len(layers), LAYER_BUCKETS[-1]), first.lora_A.shape[0]
        dtypes = (how.weight, how.adapter, first.magnitude.dtype)
        kernel = _kernel(*first.weight.shape, rank, count, *dtypes, how.autocast, device)
        table = None if kernel is None else _table_of(layers)
    if kernel is not None and table is not None:
        anchors = [min(column, key=torch.Tensor.data_ptr) for column in zip(*_tensors(layers), strict=True)]
        kernel.launch((table, *anchors), (values[0], values[1]), first.scaling)
        return
    for index, layer in enumerate(layers):
        values[0, index], values[1, index] = alone(layer, how)


def _tensors(layers: Sequence[AnyLayer]) -> list[tuple[torch.Tensor, ...]]:
    return [layer.tensors for layer in layers]


def _table_of(layers: Sequence[AnyLayer]) -> torch.Tensor | None:
    """The places of ``layers`` in elements from the lowest of each tensor, [layers, columns] int64 on their GPU.

    None if a kernel cannot read them there, or if a table would have to be made while a CUDA graph is captured.
    """
    tensors = _tensors(layers)
    first = tensors[0][0]
    addresses = [tuple([tensor.data_ptr() for tensor in layer]) for layer in tensors]
    dtypes = tuple([tensor.dtype for tensor in tensors[0]])
    key = (first.device, current_stream(first.get_device()), dtypes, layers[0].weight.shape, *addresses)
    capturing = is_capturing(first)
    if key not in _tables:
        if capturing:  # making a table copies from the host
            return None
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = _make_table(layers, first.device)
    table = _tables[key]
    if capturing and table is not None:
        _captured.append(table)
    return table


def _make_table(layers: Sequence[AnyLayer], device: torch.device) -> torch.Tensor | None:
    fits, _, places = places_of(layers)
    if len(fits) < len(layers) or not all(tensor.is_contiguous() for layer in layers for tensor in layer.tensors):
        return None
    # On a stream of its own, because the compiler's CUDA graphs own what is allocated on the current one.
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        table = torch.tensor(places, dtype=torch.int64, device=device)
    stream.synchronize()
    return table
