"""The norm pass (:mod:`.norm_pass`) of a compiled graph: all norms and gains by one operator at its start.

An operator of its own for each layer would cost the host several launches a layer, which a short graph has no time for.
While a compiler traces a model, :func:`begin` puts the operator into the graph and gives each layer's cache its slice;
the layers that are traced after it take theirs. The slices are intermediate values of the graph, so :func:`end` takes
them back. Every run of the graph computes the norms anew. A checkpointed block reads them from outside of its region,
so its recompute computes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .autocast import autocast_dtype
from .kernels import SPEC_DTYPES
from .norm_cache import NormCache, TracedNorm
from .norm_layer import NormLayer, Products
from .operators import _operator
from .stored_operator import TracedMatrix, stored_norms_and_gains
from .traced_tables import write_norms

_NO_CACHE = NormCache("off")


class TracedLayer(NamedTuple):
    """A layer whose W is in a weight format, as :class:`~.norm_layer.StoredLayer`, while a graph is traced."""

    weight: TracedMatrix
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    norms: NormCache


def begin(layers: Sequence[NormLayer | TracedLayer]) -> list[NormCache]:
    """Put the norms of ``layers`` into the graph that is being traced; return the caches that got one, for :func:`end`.

    It leaves out layers in fp64, with dtypes that no kernel takes, and those whose adapters autocast rounds to another
    dtype than W's.
    """
    given = _begin_stored([layer for layer in layers if isinstance(layer, TracedLayer) and layer.norms.traced is None])
    kinds: dict[tuple[object, ...], list[NormLayer]] = {}
    for layer in layers:
        if isinstance(layer, TracedLayer):
            continue
        kind = _kind(layer)
        if kind is not None and layer.norms.traced is None:
            kinds.setdefault(kind, []).append(layer)
    if not kinds:
        return given
    devices: dict[tuple[object, torch.dtype], list[NormLayer]] = {}
    for kind, members in kinds.items():  # layers of one kind are beside each other: they can be one launch
        devices.setdefault((kind[0], kind[-1]), []).extend(members)  # type: ignore[arg-type]
    for (_, rounded), members in devices.items():
        weights, downs, ups, magnitudes, scalings, _ = zip(*members, strict=True)
        sizes = [weight.shape[0] for weight in weights]
        with torch.no_grad():
            values = norms_and_gains(list(weights), list(downs), list(ups), list(magnitudes), list(scalings), rounded)
            norms, gains = values[0].split(sizes), values[1].split(sizes)
        for layer, norm, g in zip(members, norms, gains, strict=True):
            layer.norms.traced = TracedNorm(
                layer.weight, layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling, rounded, norm, g
            )
            given.append(layer.norms)
    return given


def _begin_stored(layers: Sequence[TracedLayer]) -> list[NormCache]:
    """The same for layers in weight formats."""
    kinds: dict[tuple[object, ...], list[TracedLayer]] = {}
    for layer in layers:
        w, a, b, m, scaling, _ = layer
        kind = (a.device, w.form, w.d_out, w.d_in, a.shape[0], a.dtype, m.dtype, scaling)
        if w.tensors[0].device == a.device == b.device == m.device:
            kinds.setdefault(kind, []).append(layer)
    devices: dict[torch.device, list[TracedLayer]] = {}
    for members in kinds.values():
        devices.setdefault(members[0].lora_A.device, []).extend(members)
    given = []
    for device, members in devices.items():
        rounded = autocast_dtype(device)
        values = stored_values(members, rounded)
        for layer, (norm, g) in zip(members, values, strict=True):
            w, a, b, m, scaling, norms = layer
            norms.traced = TracedNorm(w.tensors[0], a, b, m, scaling, rounded, norm, g)
            given.append(norms)
    return given


def stored_values(
    layers: Sequence[TracedLayer], rounded: torch.dtype | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """w and g of each of the layers, by one operator in the graph; ``rounded`` is autocast's dtype."""
    matrices, downs, ups, magnitudes, scalings, _ = zip(*layers, strict=True)
    tensors = [tensor for matrix in matrices for tensor in matrix.tensors]
    formats = " ".join([matrix.form for matrix in matrices])
    rows = [matrix.d_out for matrix in matrices]
    sizes = [size for matrix in matrices for size in (matrix.d_out, matrix.d_in)]
    with torch.no_grad():
        values = stored_norms_and_gains(
            tensors, formats, sizes, list(downs), list(ups), list(magnitudes), list(scalings), rounded
        )
        return list(zip(values[0].split(rows), values[1].split(rows), strict=True))


def end(given: Sequence[NormCache]) -> None:
    """Take the slices back."""
    for norms in given:
        norms.traced = None


def _kind(layer: NormLayer) -> tuple[object, ...] | None:
    """What layers of one launch have in common, the device first and the dtype of rounded adapters last."""
    w, a, b, m, scaling, _ = layer
    adapter = a.dtype
    autocast = autocast_dtype(w.device)
    rounded = autocast or adapter
    if w.dtype not in SPEC_DTYPES or m.dtype not in SPEC_DTYPES or torch.float64 in (w.dtype, m.dtype, adapter):
        return None
    if b.dtype is not adapter or adapter not in (w.dtype, torch.float32) or (autocast and autocast is not w.dtype):
        return None
    if not w.device == a.device == b.device == m.device:
        return None
    return (w.device, *w.shape, a.shape[0], w.dtype, adapter, m.dtype, scaling, rounded)


@_operator(lambda weights, *_: weights[0].new_empty(2, sum(weight.shape[0] for weight in weights), dtype=torch.float32))
def norms_and_gains(
    weights: Sequence[torch.Tensor],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    magnitudes: Sequence[torch.Tensor],
    scalings: Sequence[float],
    rounded: torch.dtype,
) -> torch.Tensor:
    """Return the norms w and the gains g of many layers one after another, [2, sum of all d_out] fp32.

    Each layer has W [d_out, d_in], A [r, d_in], B [d_out, r], m [d_out] and s, none of them fp64. A and B are first
    rounded to ``rounded``. Consecutive layers with the same sizes, dtypes and s are one launch (op
    ``weight_norm_group``) where they lie such that a kernel can read them.
    """
    total = sum(weight.shape[0] for weight in weights)
    values = torch.empty(2, total, dtype=torch.float32, device=weights[0].device)
    tensors = [*zip(weights, lora_As, lora_Bs, magnitudes, strict=True)]
    kinds = [
        (*w.shape, a.shape[0], w.dtype, a.dtype, m.dtype, scaling)
        for (w, a, _, m), scaling in zip(tensors, scalings, strict=True)
    ]
    start, place = 0, 0
    while start < len(kinds):
        stop = start
        while stop < len(kinds) and kinds[stop] == kinds[start]:
            stop += 1
        size = (stop - start) * weights[start].shape[0]
        part = values[:, place : place + size].view(2, stop - start, -1)
        w, a, _, _ = tensors[start]
        layers = [NormLayer(*each, scalings[start], _NO_CACHE) for each in tensors[start:stop]]
        write_norms(layers, Products(rounded, w.dtype, a.dtype, rounded is not a.dtype), part)
        start, place = stop, place + size
    return values
