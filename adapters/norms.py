"""The norms of a layer's W and W + sBA, and what they say of its m."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .low_rank import LowRank

_BY_DTYPE = ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10))
_EXACT = 1e-5
"""Two norms in fp32 that were summed in another order differ by less than this share."""
_FAR = 3.0


@dataclass(frozen=True)
class Norms:
    """Norms of the rows and columns of W and of W + sBA: ``rows`` [d_out], ``columns`` [d_in], in fp32.

    ``finite``: whether W is.
    """

    rows: torch.Tensor
    adapted_rows: torch.Tensor
    columns: torch.Tensor
    adapted_columns: torch.Tensor
    finite: bool


@torch.no_grad()
def norms_of(low: LowRank, pieces: Iterable[tuple[int, torch.Tensor]]) -> Norms:
    """The norms for W in ``pieces`` of rows [n, d_in], each with the number of its first row."""
    rows, adapted_rows = torch.empty(low.d_out), torch.empty(low.d_out)
    columns = torch.zeros(low.d_in, dtype=torch.float64)
    adapted_columns = torch.zeros_like(columns)
    for start, piece in pieces:
        piece = piece.float()
        adapted = low.adapted(piece, start)
        here = slice(start, start + len(piece))  # small results between the pieces would keep the heap from reuse
        torch.linalg.vector_norm(piece, dim=1, out=rows[here])
        torch.linalg.vector_norm(adapted, dim=1, out=adapted_rows[here])
        columns += piece.square().sum(dim=0)
        adapted_columns += adapted.square().sum(dim=0)
    return Norms(
        rows,
        adapted_rows,
        columns.sqrt().float(),
        adapted_columns.sqrt().float(),
        bool(rows.isfinite().all()),
    )


def is_rounded(m: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether every value of ``m`` is a number of ``dtype``; fewer than eight say nothing."""
    return m.numel() >= 8 and bool((m.to(dtype).to(m.dtype) == m).all())


def is_same(m: torch.Tensor, norms: torch.Tensor) -> bool:
    """Whether ``m`` is ``norms``, within the rounding that its values show: bf16's, fp16's, or fp32's."""
    tolerance = next((share for dtype, share in _BY_DTYPE if is_rounded(m, dtype)), _EXACT)
    return bool(((m.float() - norms).abs() <= tolerance * norms).all())


def is_along_inputs(m: torch.Tensor, norms: Norms) -> bool:
    """Whether ``m`` of a square layer is nearer to the norms of the columns than to those of the rows."""
    if m.numel() < 8 or len(norms.columns) != m.numel():
        return False
    positive = (m > 0) & (norms.adapted_rows > 0) & (norms.adapted_columns > 0)
    if not positive.any():
        return False
    log = m[positive].float().log()
    by_rows, by_columns = (
        (log - other[positive].log()).square().mean().sqrt().item()
        for other in (norms.adapted_rows, norms.adapted_columns)
    )
    return by_columns < by_rows / 2


def is_far(m: torch.Tensor, norms: Norms) -> float | None:
    """The median of m over the norms of W + sBA, if it is far from 1, and so is that over the norms of W."""
    ratios = []
    for other in (norms.adapted_rows, norms.rows):
        positive = other > 0
        if positive.any():
            ratios.append((m.float().abs()[positive] / other[positive]).median().item())
    far = bool(ratios) and all(ratio > _FAR or ratio < 1 / _FAR for ratio in ratios)
    return ratios[0] if far else None
