"""Handle rows of a quantised layer in which sBA nearly cancels W, so that the factored norm loses its digits.

For a dense W such rows are found and recomputed on the GPU (op ``weight_norm_exact``). The rows of a quantised W cannot
be read; only the base layer's product is available. So the layer is checked for such rows, and once it has any, its
norm is computed from the entries of W, which the base layer gives block by block as its product with unit vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ...codegen.ops import LEAST_SHARE
from ...nn.norm import norm_from_products
from ...runtime.reference import cancels

_LOOK_EVERY = 16
"""Norms from one check of a training adapter to the next. An optimizer's steps are small, and at the share where a row
counts as cancelling, products in 16 bits change w by only about 1e-3."""

_LOST_SHARE = LEAST_SHARE / 8
"""Below this share of its terms, w has a larger error than PEFT's 16-bit sum of W and BA: about 1e-2."""

_BLOCK_ELEMENTS = 1 << 22
"""Entries of W + sBA that are held at a time: 32 MB in fp64."""

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""``W @ rows.T`` [d_out, n] fp32 by the base layer, of rows [n, d_in]."""


class CancellationWatch:
    """The norm of one quantised layer and adapter, computed from W's entries once its terms are found to cancel.

    On a CPU every norm is checked. On a GPU the first norm is checked, and without training also each norm after a
    write to A or B. In training only every 16th norm is checked, and nothing waits for the result. While a compiler
    traces or a CUDA graph is captured no check is possible, and rows that have lost their digits become NaN. Run the
    layer once before that.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._found = False
        self._norms = 0
        self._versions: tuple[int, ...] = ()
        self._answer: _Answer | None = None

    def norm(
        self,
        weight_sq: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        multiply: Multiply,
        *,
        trains: bool,
    ) -> torch.Tensor:
        """Return the row norms ``||W + sBA||``, [d_out] fp32.

        Args:
            weight_sq: ``rowsum(W*W)`` [d_out] fp32. lora_A: A [r, d_in]. lora_B: B [d_out, r]. scaling: s.
            multiply: the base layer's product. trains: whether gradients are on.
        """
        if not self._found:
            norm = norm_from_products(weight_sq, multiply(lora_A), lora_A, lora_B, scaling)
            a, b = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
            if torch.compiler.is_compiling() or (norm.is_cuda and torch.cuda.is_current_stream_capturing()):
                lost = cancels(norm, weight_sq, a, b, scaling, _LOST_SHARE)
                return norm.masked_fill(lost, float("nan"))
            count = self._look(lambda: cancels(norm, weight_sq, a, b, scaling).sum(), lora_A, lora_B, trains)
            if not count:
                return norm
            self._found = True
            warnings.warn(
                f"in {count} of {norm.shape[0]} rows of {self._layer} the adapter cancels most of W: from now on "
                "doratune computes the norm of this layer from the entries of W, which is slower in every call",
                stacklevel=2,
            )
        return summed_norm(lora_A, lora_B, scaling, multiply)

    def _look(self, count: Callable[[], torch.Tensor], a: torch.Tensor, b: torch.Tensor, trains: bool) -> int:
        """The number of rows whose terms cancel; 0 if this norm is not checked or the result is not known yet."""
        versions = tuple([0 if tensor.is_inference() else tensor._version for tensor in (a, b)])
        written, self._versions = versions != self._versions, versions
        self._norms += 1
        if not a.is_cuda or self._norms == 1 or (written and not trains):
            self._answer = None
            return int(count())
        if self._answer is None and self._norms % _LOOK_EVERY == 0:
            self._answer = _Answer(count())
        elif self._answer is not None and self._answer.arrived():
            answer, self._answer = self._answer, None
            return answer.value()
        return 0


class _Answer:
    """An integer that is being copied from the GPU."""

    def __init__(self, number: torch.Tensor) -> None:
        self._memory = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return bool(self._event.query())

    def value(self) -> int:
        return int(self._memory)


def summed_norm(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, multiply: Multiply) -> torch.Tensor:
    """The row norms ``||W + sBA||``, [d_out] fp32, from the entries in fp64, a block of columns at a time."""
    d_in, d_out = lora_A.shape[1], lora_B.shape[0]
    a, b = lora_A.double(), scaling * lora_B.double()
    step = max(1, _BLOCK_ELEMENTS // max(d_in, d_out))
    squares = a.new_zeros(d_out)
    for start in range(0, d_in, step):
        part = a[:, start : start + step]
        units = lora_A.new_zeros(part.shape[1], d_in, dtype=torch.float32)
        units[:, start:].fill_diagonal_(1.0)
        squares += torch.addmm(multiply(units).double(), b, part).square_().sum(dim=1)
    return squares.sqrt().to(torch.promote_types(lora_A.dtype, torch.float32))
