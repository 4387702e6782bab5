"""Reusing a row norm while it cannot have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from ..errors import UsageError
from .norm import norm_of

REUSE = ("auto", "off")
"""Policies of :class:`NormCache`."""


class NormReuseError(UsageError, ValueError):
    """An unknown policy for reusing norms."""


class NormCache:
    """The norm of one layer and adapter, kept for the recompute of gradient checkpointing.

    Args:
        reuse: ``auto`` or ``off``.

    Raises:
        NormReuseError: another policy.
    """

    def __init__(self, reuse: str = "auto") -> None:
        if reuse not in REUSE:
            raise NormReuseError(f"norm_reuse={reuse!r}: use one of {', '.join(REUSE)}")
        self.reuse = reuse

    def get(
        self, tensors: Sequence[torch.Tensor], settings: Hashable, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return ``compute()``, or what it returned before for the same contents of ``tensors`` and ``settings``."""
        return compute()

    def of_weight(
        self,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        *,
        rounded: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The norm of ``W + sBA``; ``rounded`` are A and B as the layer's products see them, the given ones if None."""
        a, b = rounded or (lora_A, lora_B)
        return self.get((weight, lora_A, lora_B), (scaling, a.dtype), lambda: norm_of(weight, a, b, scaling))
