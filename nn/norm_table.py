"""Where the tensors of many layers are, and the table that tells it to a grouped kernel."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch

from ..codegen.ops import ALIGNMENT
from .norm_layer import AnyLayer, StoredLayer, kind_of, units_of

MOST_UNITS = 1 << 31
"""Units of a table (``ops.TABLE_UNIT``) between two dense matrices at most: tensor maps take 32-bit coordinates."""

_data_ptr = torch.Tensor.data_ptr
_is_contiguous = torch.Tensor.is_contiguous
_numel = torch.Tensor.numel
_referent = weakref.ref.__call__


class Found:
    """The addresses of layers, and the table that tells a kernel: places in elements from the lowest of each tensor.

    ``members`` are the layers that can be in one launch, and ``tensors`` all their tensors, whose ``addresses``,
    ``shapes``, ``storages`` and ``offsets`` are as in :class:`~.norm_cache.Slices`. ``columns`` is the number of
    tensors of a layer.
    ``table`` is [layers, columns] int64 on their GPU; None on a CPU.
    """

    def __init__(
        self,
        members: list[AnyLayer],
        tensors: Sequence[torch.Tensor],
        anchors: list[torch.Tensor],
        table: torch.Tensor | None,
    ) -> None:
        self.members = members
        self.anchors = anchors
        self.table = table
        self._copied: torch.cuda.Event | None = None
        if table is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(table.device))
        self._looked_at = [*map(_data_ptr, tensors)]
        self._sizes = [*map(_numel, tensors)]
        self.caches = [layer.norms for layer in members]
        self.columns = len(members[0].tensors) if members else 0
        self.tensors = [tensor for layer in members for tensor in layer.tensors]
        self.addresses = self.by_layer(map(_data_ptr, self.tensors))
        self.shapes = [(layer.weight.shape, layer.lora_A.shape) for layer in members]
        self.storages = [weakref.ref(tensor.untyped_storage()) for tensor in self.tensors]
        self.offsets = [int(tensor.storage_offset()) for tensor in self.tensors]

    @classmethod
    def of(cls, layers: Sequence[AnyLayer], tensors: Sequence[torch.Tensor]) -> Found:
        """Find ``layers``, whose tensors are ``tensors``; leave out those that have changed or lie badly."""
        first = kind_of(layers[0])
        members = [layer for layer in layers if first is not None and kind_of(layer) == first]
        if not members or members[0].weight.device.type != "cuda":
            return cls(members, tensors, [], None)
        fits, anchors, places = places_of(members)
        if not fits:
            return cls([], tensors, [], None)
        table = torch.tensor(places, dtype=torch.int64).pin_memory()
        return cls(fits, tensors, anchors, table.to(members[0].weight.device, non_blocking=True))

    def by_layer(self, values: Iterator[int]) -> list[tuple[int, ...]]:
        """``values`` of the tensors of one layer after another, by layer."""
        return [*zip(*[values] * self.columns, strict=True)]

    def await_table(self, capturing: bool) -> bool:
        """Make the current stream wait for the table's copy, which another stream may have begun.

        Returns whether that was possible: a captured graph must not wait for what is outside of it.
        """
        copied = self._copied
        if copied is None or self.table is None:
            return True
        if capturing:
            return False
        if copied.query():
            self._copied = None
        else:
            torch.cuda.current_stream(self.table.device).wait_event(copied)
        return True

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` are still where they were, in the same memory."""
        return (
            [*map(_data_ptr, tensors)] == self._looked_at
            and [*map(_numel, tensors)] == self._sizes
            and all(map(_is_contiguous, tensors))  # a square W may have been transposed where it is
            and None not in map(_referent, self.storages)
        )


def places_of(layers: Sequence[AnyLayer]) -> tuple[list[AnyLayer], list[torch.Tensor], list[list[int]]]:
    """Where the tensors of layers of one kind are, in elements from the lowest of each, which come second.

    First come the layers that a table reaches: at distances that are multiples of its unit.
    """
    columns = [*zip(*[layer.tensors for layer in layers], strict=True)]
    anchors = [min(column, key=_data_ptr) for column in columns]
    starts = [anchor.data_ptr() for anchor in anchors]
    units = units_of(layers[0])
    # Kernels of stored weights use no tensor maps, and vectors are read without them: m may be far from other m.
    mapped = not isinstance(layers[0], StoredLayer)
    most = [MOST_UNITS if mapped and tensor.ndim == 2 else 1 << 62 for tensor in layers[0].tensors]
    fits, places = [], []
    for layer in layers:
        distances = [tensor.data_ptr() - start for tensor, start in zip(layer.tensors, starts, strict=True)]
        reached = zip(distances, units, most, strict=True)
        if all(distance % unit == 0 and distance // unit < limit for distance, unit, limit in reached):
            fits.append(layer)
            places.append([d // tensor.element_size() for d, tensor in zip(distances, layer.tensors, strict=True)])
    return ([], [], []) if any(start % ALIGNMENT for start in starts) else (fits, anchors, places)
