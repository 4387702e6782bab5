"""The row norm of ``W + sBA`` for a W in a weight format: the kernel reads the codes, and W is nowhere dequantised."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..codegen.weight_formats import WeightFormat
from ..runtime.kernel import Request
from ..runtime.reference import TORCH_DTYPES
from . import kernels
from .autocast import autocast_dtype, without_autocast
from .kernels import SPEC_DTYPES, flags_of, run_reference_on, spec_for
from .norm import safe_norm
from .norm_cache import is_capturing
from .rehearsal import META

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class StoredMatrix:
    """A stored W [d_out, d_in]: its format, and its tensors, flat, in the order of ``form.operands(d_out, d_in)``.

    :attr:`weight_sq` is ``rowsum(W*W)`` [d_out] fp32 once a norm has been computed, as long as PyTorch sees no write to
    the tensors: W is frozen. ``counts_writes``: whether PyTorch sees any; it sees none to tensors of inference mode.
    """

    form: WeightFormat
    tensors: tuple[torch.Tensor, ...]
    d_out: int
    d_in: int
    counts_writes: bool = True
    _squares: tuple[list[int], torch.Tensor] | None = field(default=None, repr=False)

    @property
    def weight_sq(self) -> torch.Tensor | None:
        """``rowsum(W*W)`` [d_out] fp32 of the tensors as they are now, if it is known."""
        known = self._squares
        return known[1] if known is not None and known[0] == self._versions() else None

    def keep_squares(self, weight_sq: torch.Tensor) -> None:
        """Keep ``rowsum(W*W)`` [d_out] fp32 until the next write, if that will be seen."""
        if self.counts_writes:
            self._squares = self._versions(), weight_sq

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors]

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.tensors[0].device

    @property
    def shape(self) -> torch.Size:
        """[d_out, d_in]."""
        return torch.Size((self.d_out, self.d_in))


class How(NamedTuple):
    """How a norm is computed: W's format in the dtype of the layer's products, A's and B's dtype, autocast or not."""

    form: WeightFormat
    adapter: torch.dtype
    rounds: bool

    def key(self, matrix: StoredMatrix, rank: int, save: bool) -> tuple[object, ...]:
        """The arguments of :func:`~.kernels.spec_for`."""
        flags = flags_of(save=save, autocast=self.rounds)
        return ("weight_norm", matrix.d_out, matrix.d_in, rank, 1, str(self.form), self.adapter, flags, None)


def norm_of_stored(matrix: StoredMatrix, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The row norms ``||W + sBA||``, [d_out] fp32, without a gradient; op ``weight_norm``.

    W's values are those that the layer multiplies by, rounded to the format's dtype. Under autocast to that dtype A and
    B are rounded to it, too, as in the layer's products; otherwise they are exact. Rows whose terms nearly cancel are
    computed from the entries of W + sBA.

    Args:
        matrix: W [d_out, d_in]. lora_A: A [r, d_in]. lora_B: B [d_out, r]. scaling: s. All on one device.
    """
    return _norm_of(matrix, lora_A, lora_B, scaling, how_of(matrix.form, lora_A.dtype, autocast_dtype(matrix.device)))


def norm_and_gain_of_stored(
    matrix: StoredMatrix,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    how: How,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w of :func:`norm_of_stored`, computed as ``how`` says, and ``g = m / max(w, eps)``; both [d_out] fp32."""
    norm = _norm_of(matrix, lora_A, lora_B, scaling, how)
    return norm, magnitude.detach().to(norm.dtype) / safe_norm(norm)


def _norm_of(
    matrix: StoredMatrix, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, how: How
) -> torch.Tensor:
    device = matrix.device
    with torch.no_grad(), without_autocast(device):
        a, b = (adapter.detach().to(how.adapter).contiguous() for adapter in (lora_A, lora_B))
        squares = matrix.weight_sq
        key = how.key(matrix, a.shape[0], save=squares is None)
        given = (*matrix.tensors, a, b) if squares is None else (*matrix.tensors, a, b, squares)
        kernel = kernels.kernel_for(*key, device)
        if kernel is None:
            results = run_reference_on(spec_for(*key), given, scaling)
            norm, found = results["norm"], results.get("weight_sq")
        else:
            norm = torch.empty(matrix.d_out, dtype=torch.float32, device=device)
            found = torch.empty_like(norm) if squares is None else None
            kernel.launch(given, (norm,) if found is None else (norm, found), scaling)
        if squares is None and not is_capturing(norm):  # a graph's memory is its own
            assert found is not None
            matrix.keep_squares(found)
        return norm


def norm_requests(
    matrix: StoredMatrix, lora_A: torch.Tensor, lora_B: torch.Tensor, device: torch.device
) -> Iterator[Request]:
    """The kernels that :func:`norm_of_stored` launches first and from then on, if the tensors were on ``device``."""
    how = how_of(matrix.form, lora_A.dtype, autocast_dtype(device))
    a, b = (
        adapter.detach() if adapter.dtype is how.adapter else torch.empty_like(adapter, dtype=how.adapter, device=META)
        for adapter in (lora_A, lora_B)
    )
    sums = torch.empty(matrix.d_out, dtype=torch.float32, device=META)
    for save in (True, False) if matrix.weight_sq is None else (False,):
        kernel = kernels.kernel_for(*how.key(matrix, a.shape[0], save), device)
        if kernel is not None:
            yield kernel, kernel.alignments_of((*matrix.tensors, a, b, sums, sums))


@functools.lru_cache(maxsize=256)
def how_of(form: WeightFormat, adapter: torch.dtype, rounded: torch.dtype | None) -> How:
    """How the norm is computed for adapters of this dtype, under autocast to ``rounded`` or not (None)."""
    products = adapter if rounded is None else rounded
    if form.exact and products in _HALVES:  # an exact one rounds no value, so it has no dtype of its own
        form = form.with_dtype(SPEC_DTYPES[products])
    own = TORCH_DTYPES[form.dtype]
    kept = adapter if adapter is own else torch.float32
    return How(form, kept, rounded is own and own in _HALVES and kept is torch.float32)
