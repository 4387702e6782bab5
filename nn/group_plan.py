"""The projections that read one x, and what their calls have in common: a plan for :mod:`.group`.

Small models wait for Python, so a :class:`Plan` keeps what does not change from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..codegen.ops import adds_in_place, composes_apart
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

    It serves while W, A, B and m of each are the same tensors in their sizes and dtypes.

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
        self._known: dict[tuple[int, torch.dtype, bool], At] = {}
        self._needs: dict[tuple[bool, tuple[bool, ...]], Needs] = {}
        self._fuses: dict[tuple[int, torch.dtype, torch.dtype], bool] = {}

    def follow(self) -> bool:
        """Note where W, A, B and m are now; say whether that is elsewhere than it was."""
        before, self.addresses = self.addresses, [(*map(_data_ptr, one[:4]),) for one in self.projections]
        return self.addresses != before

    def at(self, x: torch.Tensor, *, trains: bool) -> At:
        """What calls with as many tokens as x [..., d_in] have in common whose products are in its dtype."""
        tokens = x.shape[:-1].numel()
        key = tokens and token_bucket(tokens), x.dtype, trains
        try:
            return self._known[key]
        except KeyError:
            made = self._known[key] = At(self, *key)
            return made

    def biases_in(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The bias of each projection in ``dtype``; none if they have none."""
        return self.biases and [bias if bias.dtype is dtype else bias.to(dtype) for bias in self.biases]

    def needs(self, exact: bool, wanted: tuple[bool, ...]) -> Needs:
        """What a backward pass needs for the gradients that are ``wanted``: of x, and of A, B and m of each projection.

        ``exact``: A and B are not rounded.
        """
        try:
            return self._needs[exact, wanted]
        except KeyError:
            made = self._needs[exact, wanted] = Needs.of(self, exact, wanted)
            return made

    def fuses(self, x: torch.Tensor, lora_B: torch.Tensor) -> bool:
        """Whether one kernel computes the base product of a single projection too, in a pass without gradients."""
        key = (x.shape[:-1].numel(), x.dtype, lora_B.dtype)
        try:
            return self._fuses[key]
        except KeyError:
            pays = operators.fusion_pays(_rows(x), self.weights[0], lora_B, bias=bool(self.biases))
            self._fuses[key] = pays
            return pays


class At:
    """A plan at a number of tokens, in calls that train or not: its kernels, None where the eager reference runs.

    Attributes:
        compose: of the composition.
        differentiate: of the backward pass of a group or a gated pair; for a single projection ``compose_backward``.
        adapter: ``adapter_backward``, for a single projection.
        trains: whether the calls save what a backward pass needs.
        apart: of the composition of each projection of a group that is not composed in one launch; then
            ``differentiate`` is None, as each projection's backward pass is its own, too.
        in_place: whether s*h@B.T is added to the base products of a gated pair in memory; ``compose`` and
            ``differentiate`` read the sums then.
    """

    __slots__ = ("adapter", "apart", "compose", "differentiate", "in_place", "trains")

    def __init__(self, plan: Plan, bucket: int, dtype: torch.dtype, trains: bool) -> None:
        one, widths = plan.count == 1, tuple([weight.shape[0] for weight in plan.weights])
        width: Any = widths[0] if one or plan.activation else widths
        magnitude, device = plan.magnitude_dtype, plan.weights[0].device

        def find(op: str, rank: int, bucket: int, *how: Any, width: Any = width) -> Kernel | None:
            return kernels.kernel_for(op, width, 1, rank, bucket, dtype, *how, device)

        self.trains = trains
        gated = plan.activation is not None
        self.in_place = gated and adds_in_place(plan.rank, bucket, kernels.SPEC_DTYPES.get(dtype, ""))
        self.apart: tuple[Kernel, ...] = ()
        self.compose: Kernel | None = None
        self.differentiate: Kernel | None = None
        self.adapter: Kernel | None = None
        if not bucket:  # no tokens: nothing to launch
            return
        flags: tuple[str, ...] = ("bias",) if plan.biases else ()
        if plan.activation is not None and plan.activation != "silu":
            flags += (plan.activation,)
        op = "lora_compose" if one else "lora_compose_group"
        if gated:
            op = "swiglu_forward" if self.in_place else "compose_swiglu"
        # A and B are rounded to the dtype of the products.
        self.compose = find(op, plan.rank, bucket, dtype, flags, None)
        apart = not one and not gated and composes_apart(plan.rank, bucket, widths, kernels.SPEC_DTYPES.get(dtype, ""))
        if apart and kernels.specialises_warps(self.compose):
            each = [find("lora_compose", plan.rank, bucket, dtype, flags, None, width=one) for one in widths]
            self.apart = tuple([kernel for kernel in each if kernel is not None])
            return
        if not trains or magnitude is torch.float64:  # which no kernel writes
            return
        if one:
            self.differentiate = find("compose_backward", 1, bucket, dtype, (), None)
            if plan.adapter_dtype in (dtype, torch.float32):  # others are converted
                self.adapter = find("adapter_backward", plan.rank, 1, plan.adapter_dtype, (), magnitude)
        elif gated:
            op = "swiglu_backward" if self.in_place else "compose_swiglu_backward"
            self.differentiate = find(op, plan.rank, bucket, dtype, flags, magnitude)
        else:
            self.differentiate = find("compose_backward_group", plan.rank, bucket, dtype, (), magnitude)


WORTH_A_LAUNCH = 1 << 20
"""The bytes from which to make a tensor again costs less than to hold it: small models wait for the host."""


def is_put_together_again(lora_A: Sequence[torch.Tensor]) -> bool:
    """Whether the backward pass makes A of several dense projections again, instead of holding it in between."""
    return len(lora_A) > 1 and sum(a.nbytes for a in lora_A) >= WORTH_A_LAUNCH


class Needs(NamedTuple):
    """Which gradients a backward pass returns, and what of W, A and B it reads for them.

    Attributes:
        x, lora_A, lora_B, magnitude: whether the gradient of x is wanted, and of A, B and m of any projection.
        tensors: W of each projection, A of all in one matrix, and B of each. None for those that no gradient needs, and
            for those that autograd saves because no parameter holds them, which are at the indices ``saved``. Also None
            for the A of several parameters that :func:`is_put_together_again`.
        parameters: what the backward pass reads without saving it: those of ``tensors`` that are not None, and that A.
    """

    x: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    tensors: list[torch.Tensor | None]
    parameters: list[torch.Tensor]
    saved: list[int]

    @classmethod
    def of(cls, plan: Plan, exact: bool, wanted: tuple[bool, ...]) -> Needs:
        """What :meth:`Plan.needs` returns."""
        need_x, count = wanted[0], plan.count
        packed = plan.lora_A[0] if exact and count == 1 else None
        held = [*plan.weights, packed, *(plan.lora_B if exact else [None] * count)]
        needed = [need_x or index > count for index in range(len(held))]
        tensors = _parameters([tensor if needs else None for tensor, needs in zip(held, needed, strict=True)])
        saved = [index for index, needs in enumerate(needed) if needs and tensors[index] is None]
        parameters = [tensor for tensor in tensors if tensor is not None]
        if need_x and exact and is_put_together_again(plan.lora_A) and None not in _parameters(plan.lora_A):
            saved.remove(count)
            parameters += plan.lora_A
        need_a, need_b, need_m = [True in wanted[each::3] for each in (1, 2, 3)]
        return cls(need_x, need_a, need_b, need_m, tensors, parameters, saved)
