"""The quantised projections that read one x, and what their calls have in common: a plan for :mod:`.stored_group`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..codegen.ops import DECODE_TOKENS
from ..codegen.weight_formats import WeightFormat
from ..internals.torch import knows_backward
from ..runtime.kernel import Kernel, Request
from . import kernels
from .group_plan import MOST_PROJECTIONS
from .kernels import SPEC_DTYPES, token_bucket
from .norm import NormAndGain
from .norm_layer import StoredLayer
from .rehearsal import META
from .stored_norm import How, how_of

_data_ptr = torch.Tensor.data_ptr
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Source(Protocol):
    """A quantised base layer whose products do not need a graph, because its W can be decoded."""

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it computes products in this dtype, of an x that has it."""
        ...

    @property
    def multiplies_from(self) -> int | None:
        """The least number of tokens with which x@W.T may be made of ``matrix`` instead; None if it never may.

        Then ``product`` multiplies by the same W.
        """
        ...

    @property
    def keeps_dtype(self) -> bool:
        """Whether the layer returns the dtype of its input, whatever its products have."""
        ...

    @property
    def product(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns x@W.T + b [T, d_out] for x [T, d_in], with the bits of the layer's own forward pass.

        It is contiguous and new memory. Gradients must be off.
        """
        ...

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W [d_out, d_in] in this dtype, in memory that only the caller holds."""
        ...


class StoredProjection(NamedTuple):
    """A quantised projection: its tensors, its frozen bias b [d_out] or None, and its source, if it has one.

    ``tensors`` are those that W is stored in, A, B and m. ``base`` is the base layer. ``ask`` returns the row norm w
    [d_out] of the layer alone, or w and g.
    """

    layer: StoredLayer
    tensors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    source: Source | None
    base: Callable[[torch.Tensor], torch.Tensor]
    ask: Callable[[], torch.Tensor | NormAndGain]

    @property
    def fits(self) -> bool:
        """Whether a plan can have it: the backward pass must be able to check its parameters, and have kernels."""
        _, a, b, m, *_ = self.layer
        return (
            knows_backward
            and all(type(tensor) is nn.Parameter for tensor in (a, b, m))
            and a.dtype in _DTYPES
            and m.dtype in _DTYPES
            and b.dtype is a.dtype
        )


def are_alike(projections: Sequence[StoredProjection]) -> bool:
    """Whether they can be one group: one format, r, s, dtype of A and of m; all have a bias, or a source, or none."""
    first, *others = projections
    a, m, form = first.layer.lora_A, first.layer.magnitude, first.layer.weight.form
    return len(projections) <= MOST_PROJECTIONS and all(
        one.layer.lora_A.shape == a.shape
        and one.layer.lora_A.dtype is a.dtype
        and one.layer.magnitude.dtype is m.dtype
        and one.layer.scaling == first.layer.scaling
        and one.layer.weight.form == form
        and (one.bias is None) is (first.bias is None)
        and (one.source is None) is (first.source is None)
        for one in others
    )


class StoredPlan:
    """Projections that are :func:`alike <are_alike>` and fit, and what their calls have in common.

    It serves while what W is stored in, A, B and m of each are where they are now, in their sizes and dtypes.

    Attributes:
        sources: of all projections; empty if they have none.
    """

    def __init__(self, projections: Sequence[StoredProjection]) -> None:
        self.projections = tuple(projections)
        self.count = len(projections)
        self.layers = layers = [one.layer for one in projections]
        first = layers[0]
        self.device, self.rank, self.scaling = first.lora_A.device, first.lora_A.shape[0], first.scaling
        self.adapter_dtype, self.magnitude_dtype = first.lora_A.dtype, first.magnitude.dtype
        self.widths = tuple([layer.weight.d_out for layer in layers])
        self.lora_A = [layer.lora_A for layer in layers]
        self.lora_B = [layer.lora_B for layer in layers]
        self.biases = [one.bias for one in projections if one.bias is not None]
        self.sources = [one.source for one in projections if one.source is not None]
        self.products = [source.product for source in self.sources]
        self.stored = [layer.weight.tensors for layer in layers]
        self.caches = [layer.norms for layer in layers]
        self.tensors = [tensor for one in projections for tensor in one.tensors]
        self.addresses = [(*map(_data_ptr, one.tensors),) for one in projections]
        self.trained = tuple([tensor for layer in layers for tensor in layer[1:4]])
        self._known: dict[tuple[int, torch.dtype, bool], At] = {}

    def at(self, tokens: int, dtype: torch.dtype, *, trains: bool) -> At:
        """What calls with this many tokens have in common whose products are in ``dtype``."""
        key = token_bucket(tokens), dtype, trains
        try:
            return self._known[key]
        except KeyError:
            made = self._known[key] = At(self, *key, self.device)
            return made

    def requests(
        self, tokens: int, dtype: torch.dtype, *, train: bool, device: torch.device | None = None
    ) -> Iterator[Request]:
        """The kernels that calls launch, if ``train`` in the backward pass, too; on ``device`` if that is given."""
        at = At(self, token_bucket(tokens), dtype, train, device or self.device)
        one, rank = self.count == 1, self.rank

        def made(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=of, device=META)

        rows = [made(tokens, width, of=dtype) for width in self.widths]
        h = made(tokens, self.count * rank, of=dtype)
        b = [made(width, rank, of=dtype) for width in self.widths]
        vectors = [made(width) for width in self.widths]
        dm = [made(width, of=self.magnitude_dtype) for width in self.widths]
        biases = [made(width, of=dtype) for width in self.widths] if self.biases else []
        uses: list[tuple[Kernel | None, list[torch.Tensor]]] = []
        if at.dequantise is not None:
            for index, decoder in enumerate(at.dequantise):
                uses.append((decoder, [*self.stored[index], made(*self.layers[index].weight.shape, of=dtype)]))
        if at.fused is None:
            uses.append((at.compose, [*rows, h, *b, *vectors, *biases, *rows]))
        else:
            x, alone = made(tokens, self.layers[0].weight.d_in, of=dtype), made(tokens, rank, of=dtype)
            for index, fused in enumerate(at.fused):
                ends = [alone, b[index], vectors[index], *biases[index : index + 1], rows[index]]
                uses.append((fused, [x, *self.stored[index], *ends]))
        if one:
            product, db = made(*b[0].shape), made(*b[0].shape, of=self.adapter_dtype)
            uses += [
                (at.differentiate, [*rows, *rows, *vectors, *rows, *vectors]),
                (at.adapter, [product, *b, *vectors, *vectors, *vectors, db, *dm]),
            ]
        else:
            uses.append((at.differentiate, [*rows, *rows, h, *b, *vectors, *vectors, *rows, *dm]))
        for kernel, operands in uses:
            if kernel is not None:
                yield kernel, kernel.alignments_of(operands)

    def hows(self, dtype: torch.dtype) -> tuple[How, How]:
        """How the norms are computed without autocast, and under autocast to ``dtype``."""
        form = self.layers[0].weight.form
        return how_of(form, self.adapter_dtype, None), how_of(form, self.adapter_dtype, dtype)


class At:
    """A plan at a number of tokens, in calls that train or not: its kernels, None where the eager reference runs.

    Attributes:
        compose: of the composition.
        dequantise: of ``weight_dequantise``, one for each projection with a source.
        multiplies: whether base products are those by what ``dequantise`` gives; else the sources compute them.
        differentiate: of the backward pass of a group; for a single projection that of ``compose_backward``.
        adapter: of ``adapter_backward``, for a single projection.
        exact: whether A and B are not rounded.
        fused: of ``dora_linear_forward`` from the stored W, one for each projection: in calls for few tokens that do
            not train, where stores say that it pays for all of them. Else None.
        kept: what a backward pass reads without saving it, if it gives no dX, and if it does.
        how: how the norms are computed; None where that depends on autocast (:meth:`StoredPlan.hows`).
    """

    __slots__ = ("adapter", "compose", "dequantise", "differentiate", "exact", "fused", "how", "kept", "multiplies")

    def __init__(self, plan: StoredPlan, bucket: int, dtype: torch.dtype, trains: bool, device: torch.device) -> None:
        one = plan.count == 1
        width: Any = plan.widths[0] if one else plan.widths

        def find(op: str, rank: int, bucket: int, adapter: torch.dtype, *how: Any) -> Kernel | None:
            return kernels.kernel_for(op, width, 1, rank, bucket, dtype, adapter, *how, device)

        flags = ("bias",) if plan.biases else ()
        self.compose = find("lora_compose" if one else "lora_compose_group", plan.rank, bucket, dtype, flags, None)
        self.fused = None if trains else _fused(plan, bucket, dtype, flags, device)
        least = [source.multiplies_from for source in plan.sources]
        multiplies = self.fused is None and all(tokens is not None and bucket >= tokens for tokens in least)
        self.dequantise = _dequantise(plan, dtype, device) if multiplies or trains else None
        self.multiplies = multiplies and self.dequantise is not None
        self.differentiate: Kernel | None = None
        self.adapter: Kernel | None = None
        if trains and not one:
            self.differentiate = find("compose_backward_group", plan.rank, bucket, dtype, (), plan.magnitude_dtype)
        elif trains:
            self.differentiate = find("compose_backward", 1, bucket, dtype, (), None)
            if plan.adapter_dtype in (dtype, torch.float32):  # others are converted
                self.adapter = find("adapter_backward", plan.rank, 1, plan.adapter_dtype, (), plan.magnitude_dtype)
        self.exact = plan.adapter_dtype is dtype
        held = [*plan.lora_B] if self.exact else []
        packed = plan.lora_A if self.exact else []
        stored = [tensor for layer in plan.layers for tensor in layer.weight.tensors] if plan.sources else []
        self.kept = held, [*held, *packed, *stored]
        alone, rounded = plan.hows(dtype)
        self.how: How | None = alone if alone == rounded else None

    def matrix(self, plan: StoredPlan, index: int, dtype: torch.dtype) -> torch.Tensor:
        """W [d_out, d_in] of a projection of ``plan`` with a source, in new memory."""
        if self.dequantise is None:
            return plan.sources[index].matrix(dtype)
        dense = torch.empty(plan.layers[index].weight.shape, dtype=dtype, device=plan.device)
        self.dequantise[index].launch(plan.stored[index], (dense,))
        return dense


def _fused(
    plan: StoredPlan, bucket: int, dtype: torch.dtype, flags: tuple[str, ...], device: torch.device
) -> list[Kernel] | None:
    """The kernels that compute y of each projection from its stored W, if stores say that all of them pay.

    None, too, if the layers multiply by other values than the format's in ``dtype``, or by a rounded x.
    """
    form = _form_in(plan, dtype)
    if bucket > DECODE_TOKENS or form is None or form.of.rounds_inputs:
        return None
    found = []
    for layer in plan.layers:
        sizes = (*layer.weight.shape, plan.rank, bucket)
        kernel = kernels.paying_kernel_for("dora_linear_forward", *sizes, str(form), dtype, flags, None, device)
        if kernel is None:
            return None
        found.append(kernel)
    return found


def _dequantise(plan: StoredPlan, dtype: torch.dtype, device: torch.device) -> list[Kernel] | None:
    """The kernels that decode W of each projection into ``dtype``; None where its source does."""
    form = _form_in(plan, dtype) if plan.sources else None
    if form is None:
        return None
    sizes = [layer.weight.shape for layer in plan.layers]
    found = [kernels.kernel_for("weight_dequantise", *size, 1, 1, str(form), dtype, (), None, device) for size in sizes]
    return [kernel for kernel in found if kernel is not None] or None


def _form_in(plan: StoredPlan, dtype: torch.dtype) -> WeightFormat | None:
    """The format of the projections with values in ``dtype``, the products' own; None if its values have another."""
    form = plan.layers[0].weight.form
    if form.exact and form.of.scales:  # it rounds no value, and its scales are of no layer's dtype
        form = form.with_dtype(SPEC_DTYPES[dtype])
    return form if form.dtype == SPEC_DTYPES[dtype] else None
