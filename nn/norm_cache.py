"""Reusing a row norm while it cannot have changed.

The norm depends on W, A, B and s alone, yet a checkpointed layer computes it twice a step: in the forward pass and in
the recompute during the backward pass. What makes reuse safe is knowing that nothing was written in between, and
PyTorch does not see every write: ``tensor.data.copy_()``, fused optimizers, replayed CUDA graphs and FSDP's gathering
of shards all leave a tensor's version as it was. So by default only a recompute takes the
norm of its own forward pass: that is the norm it has to reproduce, whatever was written since. It is its own where the
layer ran forward exactly once since the last recompute or optimizer step; otherwise (several micro-batches under way, a
reference pass in between) the norm is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UsageError
from ..internals.torch import current_backward, current_stream
from .norm import norm_and_gain_of, norm_of, row_squares
from .watching import seen

T = TypeVar("T")

REUSE = ("auto", "tracked", "off")
"""Policies of :class:`NormCache`."""


class NormReuseError(UsageError, ValueError):
    """An unknown policy for reusing norms."""


class _Entry(NamedTuple):
    key: tuple[Hashable, ...]
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    value: Any

    def serves(self, key: tuple[Hashable, ...]) -> bool:
        # A storage that is gone may have left its address to another one.
        return self.key == key and all(storage() is not None for storage in self.storages)


class NormCache:
    """The norm of one layer and adapter, reused while its inputs are unchanged.

    Args:
        reuse: ``auto`` reuses only in a recompute during a backward pass, while neither an optimizer has stepped nor
            PyTorch seen a write. ``tracked`` also reuses from one forward pass to the next, which is right only if
            every write to W, A and B is one that PyTorch sees: optimizers of ``torch.optim`` and what derives from
            them, in-place operations, ``load_state_dict``, assigning to ``.data`` or to the parameter. Not so:
            in-place writes to ``.data``, replayed CUDA graphs, sharded parameters. After an optimizer's step it
            still has W's own part of the norm. ``off`` computes every time.

    Raises:
        NormReuseError: another policy.
    """

    def __init__(self, reuse: str = "auto") -> None:
        if reuse not in REUSE:
            raise NormReuseError(f"norm_reuse={reuse!r}: use one of {', '.join(REUSE)}")
        self.reuse = reuse
        self._entry: _Entry | None = None
        self._squares: _Entry | None = None
        self._forwards = 0
        self._forwards_at = -1

    def __getstate__(self) -> dict[str, Any]:
        return vars(NormCache(self.reuse))  # a copy has weights of its own

    def get(self, tensors: Sequence[torch.Tensor], settings: Hashable, compute: Callable[[], T], *, trains: bool) -> T:
        """Return ``compute()``, or what it returned before if it is safe to say that this is still its value.

        Args:
            tensors: what the norm depends on. settings: whatever else it depends on.
            trains: whether the call is differentiated, as every recompute is.
        """
        if self.reuse == "off" or torch.compiler.is_compiling() or seen():
            return compute()
        if not _counting:
            _count_steps()
        first = tensors[0]
        capturing = _capturing(first)
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
                self._entry = None  # one recompute for a forward pass: from here on it would only hold memory
            return known
        value = compute()
        if not recomputing or self.reuse == "tracked":
            self._entry = _Entry(key, tuple([weakref.ref(t.untyped_storage()) for t in tensors]), value)
        return value

    def _is_of_own_forward(self, recomputing: bool) -> bool:
        """Count the forward passes; whether a call is the recompute of the only one there is."""
        if recomputing:
            own = self._forwards == 1
            self._forwards_at = -1  # the next forward pass is counted anew
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
        """The norm of ``W + sBA``; ``rounded`` are A and B as the layer's products see them, the given ones if None."""
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
        """The norm w of ``W + sBA`` and ``g = m / max(w, eps)``; ``rounded`` as :meth:`of_weight` takes it."""
        a, b = rounded
        return self.get(
            (weight, lora_A, lora_B, magnitude),
            (scaling, a.dtype),
            lambda: norm_and_gain_of(weight, a, b, magnitude, scaling, self._weight_squares(weight)),
            trains=trains,
        )

    def _weight_squares(self, weight: torch.Tensor) -> torch.Tensor | None:
        """``rowsum(W*W)`` from before, if writes to W are tracked: no optimizer's step changes a frozen W."""
        if self.reuse != "tracked" or torch.compiler.is_compiling() or seen():
            return None
        if weight.is_inference() or _capturing(weight):
            return None
        key = (_stream(weight), *_identity(weight))
        if self._squares is None or not self._squares.serves(key):
            self._squares = _Entry(key, (weakref.ref(weight.untyped_storage()),), row_squares(weight))
        squares: torch.Tensor = self._squares.value
        return squares


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured: its replays must compute what may have changed by then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _identity(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What changes with every write or move of ``tensor`` that PyTorch sees."""
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)


def _stream(tensor: torch.Tensor) -> int:
    """The stream that values computed from ``tensor`` are on."""
    return current_stream(tensor.get_device()) if tensor.is_cuda else -1


_steps = 0
_counting = False


def _count_steps() -> None:
    """Have every ``torch.optim`` optimizer's step counted: what fused ones write, no version shows."""
    global _counting
    _counting = True
    register_optimizer_step_post_hook(_stepped)


def _stepped(*_: object) -> None:
    global _steps
    _steps += 1
