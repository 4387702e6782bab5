"""Rows of a quantised layer in which sBA takes most of W away: the factored norm has lost its digits there.

Of a dense W such rows are found and redone on the GPU (``weight_norm_exact``). A quantised W has no rows that could be
read: there is only the base layer's product. So here the layer is watched, and once such rows are found in it, its norm
is summed from W's entries, which unit vectors bring out of the base layer block by block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ...codegen.ops import LEAST_SHARE
from ...nn.norm import norm_from_products
from ...runtime.reference import cancels

_LOOK_EVERY = 16
"""Norms from one look at a training adapter to the next. An optimizer's steps are small, and where rows are noticed
little is lost yet: products in 16 bits put w off by 1e-3 then."""

_LOST_SHARE = LEAST_SHARE / 8
"""Below this share of its terms w is off by more than PEFT's 16-bit sum of W and BA would be: by about 1e-2."""

_BLOCK_ELEMENTS = 1 << 22
"""Entries of W + sBA that exist at a time: 32 MB in fp64."""

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""``W @ rows.T`` [d_out, n] fp32 by the base layer, of rows [n, d_in]."""


class CancellationWatch:
    """The norm of one quantised layer and adapter, summed from W's entries once its terms were seen to cancel.

    On a CPU every norm is looked at; on a GPU the first one, and each one whose A or B were written to, if nothing is
    trained. While an adapter is trained, only every 16th is, and nothing waits for the answer. Where nobody can look
    (a compiler traces, a CUDA graph is captured), rows that have lost their digits are NaN: run the layer once before.
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
        """``||W + sBA||`` by rows, [d_out] fp32.

        Args:
            weight_sq: ``rowsum(W*W)`` [d_out] fp32. lora_A: A [r, d_in]. lora_B: B [d_out, r]. scaling: s.
            multiply: the base layer's product. trains: whether gradients are asked for.
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
                f"in {count} of {norm.shape[0]} rows of {self._layer} the adapter takes most of W away: from now on "
                "doratune sums the norm of this layer from the entries of W, which takes longer in every call",
                stacklevel=2,
            )
        return summed_norm(lora_A, lora_B, scaling, multiply)

    def _look(self, count: Callable[[], torch.Tensor], a: torch.Tensor, b: torch.Tensor, trains: bool) -> int:
        """In how many rows terms are known to cancel; 0 where that is not looked at, or not known yet."""
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
    """A whole number on its way from the GPU."""

    def __init__(self, number: torch.Tensor) -> None:
        self._memory = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return bool(self._event.query())

    def value(self) -> int:
        return int(self._memory)


def summed_norm(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, multiply: Multiply) -> torch.Tensor:
    """``||W + sBA||`` by rows, [d_out] fp32, from the entries summed in fp64, a block of columns at a time."""
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
