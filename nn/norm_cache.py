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
        # The address of a freed storage may belong to another one now.
        return self.key == key and all(storage() is not None for storage in self.storages)


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
        return self.get(
            (weight, lora_A, lora_B, magnitude),
            (scaling, a.dtype),
            lambda: norm_and_gain_of(weight, a, b, magnitude, scaling, self._weight_squares(weight)),
            trains=trains,
        )

    def _weight_squares(self, weight: torch.Tensor) -> torch.Tensor | None:
        """``rowsum(W*W)``, cached if writes to W are tracked; None otherwise. An optimizer's step keeps it valid."""
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


def _count_steps() -> None:
    """Count every step of ``torch.optim`` optimizers, because writes of fused ones do not change versions."""
    global _counting
    _counting = True
    register_optimizer_step_post_hook(_stepped)


def _stepped(*_: object) -> None:
    global _steps
    _steps += 1
