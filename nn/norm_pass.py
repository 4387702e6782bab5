"""The norms and gains of many layers from a few launches at the start of a forward pass.

A norm of its own costs each layer several launches and their host time, and its reading of W ends in a tail of idle
multiprocessors. A pass reads the weights of all layers of one shape in one launch (op ``weight_norm_group``), which
finds them by a table of addresses on the GPU: dense matrices, or the codes and scales of weights in a format (variant
``packed``), which it decodes in registers. Each layer's :class:`~.norm_cache.NormCache` gets its slice, and hands it
out if the layer's tensors are those that the pass has read. Whatever a pass leaves out, the layers compute as before:
a pass makes nothing right or wrong, only faster.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ..codegen.spec import LAYER_BUCKETS, bucket_layers
from ..internals.torch import is_recording, transforms_active
from ..runtime.kernel import Kernel, Request
from ..runtime.loader import load_kernel
from .autocast import without_autocast
from .norm import norm_and_gain_of
from .norm_cache import NormCache, Opened, Slices, count_steps, is_capturing, slice_settings
from .norm_layer import AnyLayer, Products, StoredLayer, kind_of, products_of
from .norm_table import Found
from .rehearsal import META
from .stored_norm import How, norm_and_gain_of_stored
from .watching import seen

_IDLE = 2
"""Passes after which a layer that never asks for its norm is left out, and asks in a row that bring it back."""

_MOST_EARLIER = 3
"""Earlier tables that a group keeps: the memory into which FSDP2 gathers the weights of a block takes turns."""

_version = operator.attrgetter("_version")
_asked = operator.attrgetter("asked")


class NormPass:
    """Computes the norms of ``layers`` whenever it is opened.

    It groups layers by device, shape, dtypes or weight format, scaling and policy. It leaves out layers with another
    layout than the kernels read (a transposed W, fp64, tensors that are sharded, on the meta device or made in
    inference mode), and those with ``norm_reuse="off"``.

    Args:
        layers: the layers. also: the caches of others that it is meant for, too, but whose norms it cannot compute.
    """

    def __init__(self, layers: Sequence[AnyLayer], also: Sequence[NormCache] = ()) -> None:
        self._ids = frozenset([*map(id, also), *[id(layer.norms) for layer in layers]])
        by_kind: dict[tuple[object, ...], list[AnyLayer]] = defaultdict(list)
        for layer in layers:
            kind = kind_of(layer)
            if kind is not None:
                by_kind[kind].append(layer)
        self._groups = [_Group(members) for members in by_kind.values()]

    def __len__(self) -> int:
        """The number of layers whose norms it computes."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of layers of each launch."""
        return tuple([len(group.layers) for group in self._groups])

    def served(self, device: torch.device | None = None) -> frozenset[int]:
        """The ids of the caches of the layers whose norms :meth:`open` would compute now, on ``device`` if given."""
        return frozenset(id(cache) for group in self._groups for cache in group.served(device))

    def stands(self) -> bool:
        """Whether it computes the norms of all its layers, and their tensors are where it has found them last."""
        return all(group.stands() for group in self._groups)

    def requests(self, device: torch.device | None = None, *, parts: bool = False) -> Iterator[Request]:
        """The kernels that :meth:`open` would launch now, on ``device`` if that is given.

        ``parts``: also those of passes over any part of the layers.
        """
        for group in self._groups:
            for layers in LAYER_BUCKETS if parts else (None,):
                request = group.request(device, layers)
                if request is not None:
                    yield request

    def open(self, *, stands: bool = False) -> Opened | None:
        """Compute the norms, give the layers their slices, and return the open pass, which the caller closes.

        ``stands``: :meth:`stands` has just said so.

        Returns None where passes have no place: while a graph is compiled or recorded, under a ``torch.func``
        transform, and under a dispatch mode, which must see the same operations in every pass.
        """
        if torch.compiler.is_compiling() or is_recording() or seen() or transforms_active():
            return None
        count_steps()
        by = Opened(self._ids)
        try:
            with torch.no_grad():
                for group in self._groups:
                    group.compute(by, stands)
        except BaseException:
            by.close()
            raise
        return by


_Values = tuple[torch.Tensor | Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""w and g of layers: a row [d_out] for each."""

_Last = tuple[tuple[object, ...], list[tuple[int, ...]], _Values]
"""What tracked norms were computed from, beside addresses, and the norms."""


class _Group:
    """The layers of one launch, and their table of addresses."""

    def __init__(self, layers: Sequence[AnyLayer]) -> None:
        self.layers = list(layers)
        self._caches = [layer.norms for layer in layers]
        self._idle = [0] * len(self.layers)
        self._asks = [0] * len(self.layers)
        self._steady = True
        self._captured: list[torch.Tensor] = []
        self._set([True] * len(self.layers))

    def _set(self, included: list[bool]) -> None:
        """Make the pass one over the ``included`` layers, without a table."""
        self._included = included
        self._members = [layer for layer, takes in zip(self.layers, included, strict=True) if takes]
        self._tensors = [tensor for layer in self._members for tensor in layer.tensors]
        self._found: Found | None = None
        self._earlier: list[Found] = []
        self._last: _Last | None = None

    def served(self, device: torch.device | None) -> Sequence[NormCache]:
        found = self._find()
        return [] if found is None or products_of(found.members[0], device) is None else found.caches

    def stands(self) -> bool:
        found = self._found
        return found is not None and len(found.members) == len(self.layers) and found.holds(self._tensors)

    def compute(self, by: Opened, stands: bool) -> None:
        """Give each layer that the pass includes its slice; ``stands`` as in :meth:`NormPass.open`."""
        self._look()
        found = self._find(stands)
        if found is None:
            return
        first = found.members[0]
        how = products_of(first)
        if how is None:
            return
        settings = slice_settings(found.tensors[0], first.scaling, how.rounded)
        versions = found.by_layer(map(_version, found.tensors))
        last = self._last
        if last is not None and last[:2] == (settings, versions) and not is_capturing(found.tensors[0]):
            values = last[2]
        else:
            with without_autocast(first.weight.device):
                values = self._values(found, how)
            self._last = (settings, versions, values) if first.norms.reuse == "tracked" else None
        where = (found.addresses, versions, found.shapes, found.storages, found.offsets)
        slices = Slices(by, settings, *where, *values)
        for index, cache in enumerate(found.caches):
            cache.give(slices, index)

    def _look(self) -> None:
        """Leave out layers that do not ask for their norms (compiled ones, experts without tokens), until they do."""
        asked = [*map(_asked, self._caches)]
        if self._steady and False not in asked:
            return
        for index, (layer, asks) in enumerate(zip(self.layers, asked, strict=True)):
            layer.norms.asked = False
            self._idle[index] = 0 if asks else self._idle[index] + 1
            self._asks[index] = self._asks[index] + 1 if asks else 0
        wanted = [
            self._idle[index] < _IDLE if takes else self._asks[index] >= _IDLE
            for index, takes in enumerate(self._included)
        ]
        if wanted != self._included:
            self._set(wanted)
        self._steady = all(self._included) and not any(self._idle)

    def _find(self, stands: bool = False) -> Found | None:
        """Where the layers are now; None if nowhere, or if a table would have to be made while a graph is captured.

        ``stands``: they are known to be where they were found last.
        """
        if not self._members:
            return None
        found = self._found
        capturing = is_capturing(self._tensors[0])
        if found is not None and (stands or found.holds(self._tensors)):
            return found if found.members and found.await_table(capturing) else None
        self._last = None
        if found is not None:
            self._earlier = [found, *self._earlier[: _MOST_EARLIER - 1]]
        self._found = found = next((one for one in self._earlier if one.holds(self._tensors)), None)
        if found is not None:
            return found if found.members and found.await_table(capturing) else None
        if capturing:  # making a table copies from the host
            return None
        self._found = found = Found.of(self._members, self._tensors)
        return found if found.members else None

    def _values(self, found: Found, how: Products) -> _Values:
        """w and g of each layer of ``found``."""
        members, first = found.members, found.members[0]
        if found.tensors[0].is_meta:  # a rehearsal of the layers, not of the pass
            made = [torch.empty(first.weight.shape[0], dtype=torch.float32, device=META) for _ in members]
            return made, made
        kernel = self._kernel(len(members), how, first.weight.device)
        if kernel is None or found.table is None:
            pairs = [alone(layer, how) for layer in members]
            return [norm for norm, _ in pairs], [g for _, g in pairs]
        if is_capturing(found.tensors[0]):
            self._captured += [found.table]  # replays read it
        norms = torch.empty(2, len(members), first.weight.shape[0], dtype=torch.float32, device=first.weight.device)
        norm, g = norms[0], norms[1]
        kernel.launch((found.table, *found.anchors), (norm, g), first.scaling)
        return norm, g.unbind()

    def _kernel(self, layers: int, how: Products, device: torch.device) -> Kernel | None:
        first = self._members[0]
        return _kernel(
            *first.weight.shape,
            first.lora_A.shape[0],
            min(layers, LAYER_BUCKETS[-1]),
            how.weight,
            how.adapter,
            first.magnitude.dtype,
            how.autocast,
            device,
        )

    def request(self, device: torch.device | None, layers: int | None = None) -> Request | None:
        """The kernel that :meth:`compute` would launch now, if the layers were on ``device``.

        ``layers``: for a part of the layers whose number is in this bucket; None where there is no such part.
        """
        found = self._find()
        how = None if found is None else products_of(found.members[0], device)
        if found is None or how is None:
            return None
        first, count = found.members[0], len(found.members)
        if layers is not None:
            if layers > bucket_layers(count):
                return None
            count = min(layers, count)
        kernel = self._kernel(count, how, device or first.weight.device)
        if kernel is None:
            return None
        table = torch.empty(count, found.columns, dtype=torch.int64, device=META)
        norm, g = torch.empty(2, count, first.weight.shape[0], dtype=torch.float32, device=META)
        return kernel, kernel.alignments_of((table, *(found.anchors or first.tensors), norm, g))


def alone(layer: AnyLayer, how: Products) -> tuple[torch.Tensor, torch.Tensor]:
    """w and g of one layer, where no grouped kernel runs."""
    a, b, m, scaling = layer[1:5]
    if isinstance(layer, StoredLayer):
        assert isinstance(how.rounded, How)
        return norm_and_gain_of_stored(layer.weight, a, b, m, scaling, how.rounded)
    assert isinstance(how.rounded, torch.dtype)
    return norm_and_gain_of(layer.weight, a.to(how.rounded), b.to(how.rounded), m, scaling)


@functools.cache
def _kernel(
    d_out: int,
    d_in: int,
    rank: int,
    layers: int,
    weight: torch.dtype | str,
    adapter: torch.dtype,
    magnitude: torch.dtype,
    autocast: bool,
    device: torch.device,
) -> Kernel | None:
    """The grouped kernel for these layers; None where the eager reference runs. ``weight`` may be a format's text."""
    from ..codegen.gpu import UnknownGpuError

    if device.type != "cuda":
        return None
    try:
        return load_kernel(
            "weight_norm_group",
            d_out=d_out,
            d_in=d_in,
            rank=rank,
            tokens=1,
            layers=layers,
            dtype=weight,
            adapter_dtype=adapter,
            magnitude_dtype=magnitude,
            autocast=autocast,
            device=device,
        )
    except UnknownGpuError:
        return None
