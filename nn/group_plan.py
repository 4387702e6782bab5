"""The projections that read one x, and what their calls have in common: a plan for :mod:`.group`.

Small models wait for Python, so a :class:`Plan` keeps what does not change from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..runtime.kernel import Kernel
from . import kernels, operators
from .autograd import _parameters, _rows
from .kernels import token_bucket
from .norm_cache import NormCache

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""The activations of a gated pair: x*sigmoid(x), GELU, and its approximation by tanh."""

MOST_PROJECTIONS = 3
"""Projections in one group: the operations ``lora_compose_group`` and ``compose_backward_group`` take two or three."""

_data_ptr = torch.Tensor.data_ptr


class Projection(NamedTuple):
    """A projection that reads x [..., d_in]: W [d_out, d_in], A [r, d_in], B [d_out, r], m [d_out], b [d_out] or None.

    W and b are frozen. ``norms`` provides the row norm; ``scaling`` is s.
    """

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    norms: NormCache


def are_alike(projections: Sequence[Projection]) -> bool:
    """Whether the projections can be one group: one r, s, dtype of A and of m; all of them have a bias or none has."""
    first = projections[0]
    return len(projections) <= MOST_PROJECTIONS and all(
        one.lora_A.shape == first.lora_A.shape
        and one.lora_A.dtype is first.lora_A.dtype
        and one.magnitude.dtype is first.magnitude.dtype
        and one.scaling == first.scaling
        and (one.bias is None) is (first.bias is None)
        for one in projections[1:]
    )


class Plan:
    """Projections that are :func:`alike <are_alike>`, and what their calls have in common.

    It serves while W, A, B and m of each are where they are now, in their sizes and dtypes.

    ``activation``: the projections are the gate and up of act(gate)*up with this activation, of :data:`ACTIVATIONS`.
    """

    def __init__(self, projections: Sequence[Projection], activation: str | None = None) -> None:
        self.projections = tuple(projections)
        self.activation = activation
        self.count = len(projections)
        first = projections[0]
        self.rank, self.scaling = first.lora_A.shape[0], first.scaling
        self.adapter_dtype, self.magnitude_dtype = first.lora_A.dtype, first.magnitude.dtype
        self.weights = [one.weight for one in projections]
        self.lora_A = [one.lora_A for one in projections]
        self.lora_B = [one.lora_B for one in projections]
        self.biases = [one.bias for one in projections if one.bias is not None]
        self.caches = [one.norms for one in projections]
        self.tensors = [tensor for one in projections for tensor in one[:4]]
        self.addresses = [(*map(_data_ptr, one[:4]),) for one in projections]
        self.trained = tuple([tensor for one in projections for tensor in one[1:4]])
        self._kernels: dict[tuple[int, torch.dtype], Kernel | None] = {}
        self._kept: dict[tuple[bool, bool], Kept] = {}
        self._fuses: dict[tuple[int, torch.dtype, torch.dtype], bool] = {}

    def kernel(self, tokens: int, dtype: torch.dtype) -> Kernel | None:
        """The kernel of the composition for this many tokens; None where the eager reference runs."""
        try:
            return self._kernels[tokens, dtype]
        except KeyError:
            made = self._kernels[tokens, dtype] = self._find(tokens, dtype) if tokens else None
            return made

    def _find(self, tokens: int, dtype: torch.dtype) -> Kernel | None:
        weight = self.weights[0]
        width: Any = weight.shape[0]
        flags: tuple[str, ...] = ("bias",) if self.biases else ()
        if self.activation is not None:
            op = "compose_swiglu"
            flags += () if self.activation == "silu" else (self.activation,)
        elif self.count > 1:
            op, width = "lora_compose_group", tuple([each.shape[0] for each in self.weights])
        else:
            op = "lora_compose"
        return kernels.kernel_for(
            op, width, 1, self.rank, token_bucket(tokens), dtype, dtype, flags, None, weight.device
        )

    def biases_in(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The bias of each projection in ``dtype``; none if they have none."""
        return self.biases and [bias if bias.dtype is dtype else bias.to(dtype) for bias in self.biases]

    def keeps(self, exact: bool, need_x: bool) -> Kept:
        """What the backward pass needs of W, A and B; ``exact``: A and B are not rounded. ``need_x``: dX is wanted."""
        try:
            return self._kept[exact, need_x]
        except KeyError:
            packed = self.lora_A[0] if exact and self.count == 1 else None
            held = [*self.weights, packed, *(self.lora_B if exact else [None] * self.count)]
            needed = [need_x or index > self.count for index in range(len(held))]
            tensors = _parameters([tensor if needs else None for tensor, needs in zip(held, needed, strict=True)])
            saved = [index for index, needs in enumerate(needed) if needs and tensors[index] is None]
            made = Kept(tensors, [tensor for tensor in tensors if tensor is not None], saved)
            self._kept[exact, need_x] = made
            return made

    def fuses(self, x: torch.Tensor, tokens: int, lora_B: torch.Tensor) -> bool:
        """Whether one kernel computes the base product of a single projection too, in a pass without gradients."""
        key = (tokens, x.dtype, lora_B.dtype)
        try:
            return self._fuses[key]
        except KeyError:
            pays = operators.fusion_pays(_rows(x), self.weights[0], lora_B, bias=bool(self.biases))
            self._fuses[key] = pays
            return pays


class Kept(NamedTuple):
    """W of each projection, A of all and B of each for the backward pass, as far as parameters hold them.

    ``tensors`` has None for those that no gradient needs, and for those that autograd saves, at the indices ``saved``.
    """

    tensors: list[torch.Tensor | None]
    parameters: list[torch.Tensor]
    saved: list[int]
