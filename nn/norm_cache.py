"""Reuse a row norm while its inputs are unchanged.

The norm depends only on W, A, B and s, but a checkpointed layer computes it twice a step: in the forward pass and in
the recompute during the backward pass. Reuse is safe only if nothing was written in between, and tensor versions do not
show every write: ``tensor.data.copy_()``, fused optimizers, replayed CUDA graphs and FSDP's gathering of shards leave
them unchanged. So by default only a recompute reuses a norm, and only that of its own forward pass, which is the value
that it must reproduce after any write. The norm belongs to the recompute's own forward pass if the layer ran forward
exactly once since the last recompute or optimizer step. Otherwise (several micro-batches in flight, a reference pass in
between) the norm is computed again.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UsageError
from ..internals.torch import current_backward, current_stream, dispatch_mode_is_on
from .norm import norm_and_gain_of, norm_of, row_squares
from .watching import seen

T = TypeVar("T")

_data_ptr = torch.Tensor.data_ptr
_storage = torch.Tensor.untyped_storage
_offset = torch.Tensor.storage_offset
_referent = weakref.ref.__call__
_version = operator.attrgetter("_version")

REUSE = ("auto", "tracked", "off")
"""Policies of :class:`NormCache`."""


class NormReuseError(UsageError, ValueError):
    """An unknown policy for reusing norms."""


class _Entry(NamedTuple):
    key: tuple[Hashable, ...]
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    value: Any

    def serves(self, key: tuple[Hashable, ...]) -> bool:
        # The address of a freed storage may belong to another one now.
        return self.key == key and all(storage() is not None for storage in self.storages)


class Opened:
    """A norm pass that is open in this thread: from the call of a module until it returns.

    ``layers`` are the ids of the caches of all its layers, of those too that compute their norms alone. ``at_end`` are
    called when it closes.
    """

    __slots__ = ("at_end", "before", "layers")

    def __init__(self, layers: frozenset[int]) -> None:
        self.layers = layers
        self.at_end: list[Callable[[], None]] = []
        self.before: Opened | None = opened()
        _open.innermost = self

    def close(self) -> None:
        """End the pass; its slices are no longer handed out, except to recomputes."""
        _open.innermost = self.before
        for call in self.at_end:
            call()


class _Open(threading.local):
    innermost: Opened | None = None


_open = _Open()


def abandon() -> None:
    """Close all passes of this thread: a call was killed, and nothing closed what it had opened."""
    while (innermost := opened()) is not None:
        innermost.close()


def opened() -> Opened | None:
    """The innermost norm pass that is open in this thread."""
    return _open.innermost


class Slices:
    """What one launch of the norm pass ``by`` computed: w and g of several layers, and what they were computed from.

    ``norms`` and ``gains`` hold a row [d_out] for each layer. ``settings`` are those of :func:`slice_settings`.
    ``addresses`` and ``versions`` are those of the tensors of each: W (or those that it is stored in), A, B and m.
    ``shapes`` are those of W and A. ``storages`` is the memory of the tensors, one layer's after another, and
    ``offsets`` where they begin in it. Dtypes and strides follow, since a pass takes contiguous tensors only.
    """

    def __init__(
        self,
        by: Opened,
        settings: tuple[Any, ...],
        addresses: Sequence[tuple[int, ...]],
        versions: Sequence[tuple[int, ...]],
        shapes: Sequence[tuple[torch.Size, torch.Size]],
        storages: Sequence[weakref.ref[torch.UntypedStorage]],
        offsets: Sequence[int],
        norms: torch.Tensor | Sequence[torch.Tensor],
        gains: Sequence[torch.Tensor],
    ) -> None:
        self.by = by
        self.settings = settings
        self.addresses = addresses
        self.versions = versions
        self.shapes = shapes
        self.storages = storages
        self.offsets = offsets
        self.gains = gains
        self._norms = norms

    @functools.cached_property
    def norms(self) -> Sequence[torch.Tensor]:
        """w of each layer. Inference needs none, so the views are made when one is asked for."""
        norms = self._norms
        return norms.unbind() if isinstance(norms, torch.Tensor) else norms

    def value(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w and g of a layer."""
        return self.norms[index], self.gains[index]


def slice_settings(weight: torch.Tensor, scaling: float, rounded: Hashable) -> tuple[Any, ...]:
    """What the norm of a layer depends on now, beside its tensors.

    ``rounded`` is the dtype of A in products; for a W in a weight format it is a :class:`~.stored_norm.How`.
    """
    stream, capturing = -1, False
    if weight.is_cuda:
        stream, capturing = current_stream(weight.get_device()), torch.cuda.is_current_stream_capturing()
    return scaling, rounded, _steps, stream, capturing, torch.is_inference_mode_enabled()


class TracedNorm(NamedTuple):
    """One layer's part of a norm pass in a graph that is being traced: what w and g, each [d_out], were computed from.

    ``rounded`` is the dtype to which A and B were rounded. Of a W in a weight format ``weight`` is the tensor of its
    codes, and ``rounded`` autocast's dtype or None.
    """

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    scaling: float
    rounded: torch.dtype | None
    norm: torch.Tensor
    g: torch.Tensor


class NormCache:
    """The norm of one layer and adapter, reused while its inputs are unchanged.

    Args:
        reuse: ``auto`` reuses only in a recompute during a backward pass, and only if no optimizer has stepped and
            PyTorch has seen no write since the forward pass. ``tracked`` also reuses from one forward pass to the next.
            That is correct only if PyTorch sees every write to W, A and B. It sees optimizers of ``torch.optim`` and
            their subclasses, in-place operations, ``load_state_dict``, and assignments to ``.data`` or to the
            parameter. It does not see in-place writes to ``.data``, replayed CUDA graphs and the gathering of sharded
            parameters. After an optimizer's step ``tracked`` still reuses W's part of the norm. ``off`` never reuses.

    Raises:
        NormReuseError: an unknown policy.
    """

    def __init__(self, reuse: str = "auto") -> None:
        if reuse not in REUSE:
            raise NormReuseError(f"norm_reuse must be one of {', '.join(REUSE)}, got {reuse!r}")
        self.reuse = reuse
        self._entry: _Entry | None = None
        self._squares: _Entry | None = None
        self._given: Slices | None = None
        self._index = 0
        self._taken = False
        self.traced: TracedNorm | None = None
        """The layer's part of the norm pass of the graph that is being traced."""
        self.asked = True
        """Whether the layer has asked for its norm outside a compiler since a norm pass last looked."""
        self._forwards = 0
        self._forwards_at = -1

    def __getstate__(self) -> dict[str, Any]:
        return vars(NormCache(self.reuse))  # a copied layer has other weights

    def get(self, tensors: Sequence[torch.Tensor], settings: Hashable, compute: Callable[[], T], *, trains: bool) -> T:
        """Return ``compute()``, or its last result if the policy allows reuse and the inputs are unchanged.

        Args:
            tensors: the tensors that the norm depends on. settings: all other values that it depends on.
            trains: whether the call is differentiated, as every recompute is.
        """
        if self.reuse == "off" or torch.compiler.is_compiling() or seen():
            return compute()
        count_steps()
        first = tensors[0]
        capturing = is_capturing(first)
        recomputing = trains and current_backward() != -1
        own = self._is_of_own_forward(recomputing)
        try:
            key = (settings, capturing, _steps, _stream(first), *[_identity(tensor) for tensor in tensors])
        except RuntimeError:  # inference tensors have no version
            return compute()
        entry = self._entry
        if (own or (self.reuse == "tracked" and not capturing)) and entry is not None and entry.serves(key):
            known: T = entry.value
            if self.reuse == "auto":
                self._entry = None  # each forward pass has one recompute: free the memory
            return known
        value = compute()
        if not recomputing or self.reuse == "tracked":
            self._entry = _Entry(key, tuple([weakref.ref(t.untyped_storage()) for t in tensors]), value)
        return value

    def _is_of_own_forward(self, recomputing: bool) -> bool:
        """Count the forward passes; return whether this call is the recompute of the only one."""
        if recomputing:
            own = self._forwards == 1
            self._forwards_at = -1  # the next forward pass counts as the first
            return own
        self._forwards = self._forwards + 1 if self._forwards_at == _steps else 1
        self._forwards_at = _steps
        return False

    def of_weight(
        self,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        *,
        rounded: tuple[torch.Tensor, torch.Tensor] | None = None,
        trains: bool = False,
    ) -> torch.Tensor:
        """The norm of ``W + sBA``; ``rounded`` are A and B in the dtype of the layer's products, if that is another."""
        a, b = rounded or (lora_A, lora_B)
        return self.get(
            (weight, lora_A, lora_B),
            (scaling, a.dtype),
            lambda: norm_of(weight, a, b, scaling, self._weight_squares(weight)),
            trains=trains,
        )

    def gain_of_weight(
        self,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        magnitude: torch.Tensor,
        scaling: float,
        *,
        rounded: tuple[torch.Tensor, torch.Tensor],
        trains: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm w of ``W + sBA`` and ``g = m / max(w, eps)``; ``rounded`` as in :meth:`of_weight`."""
        a, b = rounded
        if torch.compiler.is_compiling():
            known = self.traced
            if (
                known is not None
                and known.weight is weight
                and known.lora_A is lora_A
                and known.lora_B is lora_B
                and known.magnitude is magnitude
                and known.scaling == scaling
                and known.rounded is a.dtype
            ):
                return known.norm, known.g
        else:
            self.asked = True
            if self._given is not None:
                tensors, shapes = (weight, lora_A, lora_B, magnitude), (weight.shape, lora_A.shape)
                value = self._hand_out(tensors, shapes, scaling, a.dtype, trains)
                if value is not None:
                    return value
        return self.get(
            (weight, lora_A, lora_B, magnitude),
            (scaling, a.dtype),
            lambda: norm_and_gain_of(weight, a, b, magnitude, scaling, self._weight_squares(weight)),
            trains=trains,
        )

    def take_stored(
        self,
        tensors: Sequence[torch.Tensor],
        shapes: tuple[torch.Size, torch.Size],
        scaling: float,
        how: Hashable,
        *,
        trains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """w and g of a layer whose W is in a weight format from the norm pass; None if it must compute its own norm.

        Args:
            tensors: those that W is stored in, then A, B and m. shapes: those of W and A. scaling: s.
            how: how the norm is computed now (:class:`~.stored_norm.How`). trains: as in :meth:`get`.
        """
        self.asked = True
        if self._given is None:
            return None
        return self._hand_out(tensors, shapes, scaling, how, trains)

    def give(self, given: Slices, index: int) -> None:
        """Take the slice ``index`` of the norm pass that is being opened."""
        self._given, self._index = given, index
        self._taken = self.asked = False

    def withdraw(self) -> None:
        """Drop the slice of the norm pass, because the layer's tensors lie elsewhere or otherwise than it has read."""
        self._given = None

    def follow(self, addresses: tuple[int, ...]) -> None:
        """Drop a slice that waits for the layer unless it was computed from tensors at these ``addresses``.

        For the recompute of a forward pass that has taken it the slice stays.
        """
        given = self._given
        if given is not None and not self._taken and given.addresses[self._index] != addresses:
            self._given = None

    def _is_of_storages(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the slice was computed from these places in storages, which FSDP2 moves between gathers."""
        given, count = self._given, len(tensors)
        assert given is not None
        own = slice(count * self._index, count * self._index + count)
        return [*map(_offset, tensors)] == given.offsets[own] and all(
            map(operator.is_, map(_referent, given.storages[own]), map(_storage, tensors))
        )

    @property
    def is_given(self) -> bool:
        """Whether a slice of the open norm pass waits for the layer."""
        given = self._given
        return given is not None and not self._taken and given.by is opened()

    def has_own(self, weight: torch.Tensor) -> bool:
        """Whether a recompute of the layer, if it comes next, can reproduce the slice of its forward pass."""
        given = self._given
        if given is None or not self._taken:
            return False
        addresses = given.addresses[self._index]
        if addresses[0] != weight.data_ptr():
            first = len(addresses) * self._index
            if given.storages[first]() is not weight.untyped_storage() or given.offsets[first] != _offset(weight):
                return False
        return self._forwards == 1 or self.reuse == "tracked"

    def _hand_out(
        self,
        tensors: Sequence[torch.Tensor],
        shapes: tuple[torch.Size, torch.Size],
        scaling: float,
        rounded: Hashable,
        trains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The slice of the norm pass if it is this call's, else None.

        It is for the first call of the layer within the pass, and for the recompute of the only forward pass. With
        ``tracked`` it is for any call while its inputs are unchanged.
        """
        given = self._given
        assert given is not None
        by, index = given.by, self._index
        recomputing = trains and current_backward() != -1
        tracked = self.reuse == "tracked"
        first = not self._taken and by is opened()
        expected = first or tracked or (recomputing and self._taken and self._forwards == 1)
        try:
            same = (
                expected
                and (
                    (*map(_data_ptr, tensors),) == given.addresses[index]
                    or (recomputing and self._is_of_storages(tensors))
                )
                and (*map(_version, tensors),) == given.versions[index]
                and shapes == given.shapes[index]
                and slice_settings(tensors[0], scaling, rounded) == given.settings
                and (first or _alive(given.storages[len(tensors) * index : len(tensors) * (index + 1)]))
                and not dispatch_mode_is_on()
            )
        except RuntimeError:  # inference tensors have no version
            same = False
        if not same:
            if not recomputing:
                self._given = None  # whose forward pass it was is no longer certain
            return None
        self._is_of_own_forward(recomputing)
        self._taken = True
        if recomputing and not tracked:
            self._given = None  # each forward pass has one recompute: free the memory
        self._entry = None
        return given.value(index)

    def _weight_squares(self, weight: torch.Tensor) -> torch.Tensor | None:
        """``rowsum(W*W)``, cached if writes to W are tracked; None otherwise. An optimizer's step keeps it valid."""
        if self.reuse != "tracked" or torch.compiler.is_compiling() or seen():
            return None
        if weight.is_inference() or is_capturing(weight):
            return None
        key = (_stream(weight), *_identity(weight))
        if self._squares is None or not self._squares.serves(key):
            self._squares = _Entry(key, (weakref.ref(weight.untyped_storage()),), row_squares(weight))
        squares: torch.Tensor = self._squares.value
        return squares


def take_gains(
    caches: Sequence[NormCache],
    tensors: Sequence[torch.Tensor],
    addresses: Sequence[tuple[int, ...]],
    settings: tuple[Any, ...],
) -> list[torch.Tensor] | None:
    """g of layers that run together, from the open norm pass; None if one of them must be asked alone.

    A layer's slice is for its first call within the pass, while nothing has changed. ``tensors`` are W, A, B and m of
    each layer in turn, ``addresses`` theirs by layer: the caller knows where and of what shape they are now.
    ``settings`` are those of :func:`slice_settings` for all. Nothing must watch, and no recompute run.
    """
    by = _open.innermost
    versions: list[int] = []
    for cache, address in zip(caches, addresses, strict=True):
        given = cache._given
        if given is None or given.by is not by or cache._taken or given.settings != settings:
            return None
        index = cache._index
        if given.addresses[index] != address:
            return None
        versions += given.versions[index]
    try:
        if [*map(_version, tensors)] != versions:
            return None
    except RuntimeError:  # inference tensors have no version
        return None
    for cache in caches:
        cache._forwards = cache._forwards + 1 if cache._forwards_at == _steps else 1
        cache._forwards_at = _steps
        cache._taken = cache.asked = True
        cache._entry = None
    return [cache._given.gains[cache._index] for cache in caches]  # type: ignore[union-attr]


def norms_taken(caches: Sequence[NormCache]) -> list[torch.Tensor]:
    """w of layers whose g :func:`take_gains` has just returned."""
    return [cache._given.norms[cache._index] for cache in caches]  # type: ignore[union-attr]


def _alive(storages: Sequence[weakref.ref[torch.UntypedStorage]]) -> bool:
    return None not in map(_referent, storages)


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured: its replays must compute the norm, because weights may change."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _identity(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """A key that changes with every write to ``tensor`` or move of it that PyTorch sees."""
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)


def _stream(tensor: torch.Tensor) -> int:
    """The current stream of the tensor's GPU; -1 for the CPU."""
    return current_stream(tensor.get_device()) if tensor.is_cuda else -1


_steps = 0
_counting = False


def count_steps() -> None:
    """Count every step of ``torch.optim`` optimizers, because writes of fused ones do not change versions."""
    global _counting
    if _counting:
        return
    _counting = True
    register_optimizer_step_post_hook(_stepped)


def _stepped(*_: object) -> None:
    global _steps
    _steps += 1
