"""One adapted layer as numbers, the same for every trainer: W' = g (W + sBA) with g = m / ||W + sBA||."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..codegen.ops import EPS

OUTPUT, INPUT = "output", "input"
"""Axes of m: a factor for each output (row of W), as in the paper, or for each input (column)."""


@dataclass(frozen=True)
class LowRank:
    """A [r, d_in], B [d_out, r], s, and m [d_out] (or [d_in], for the axis ``input``); no m is plain LoRA.

    ``gains``: m holds g itself, as TensorRT-LLM has it. ``kernel``: the last dimensions of a convolution's W, whose
    d_in counts inputs times these.
    """

    a: torch.Tensor
    b: torch.Tensor
    m: torch.Tensor | None
    scaling: float
    axis: str = OUTPUT
    gains: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    def adapted(self, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """W + sBA of the ``rows`` [n, d_in] of W from ``start`` on, in the dtype of ``rows``."""
        b = self.b[start : start + len(rows)].to(rows.dtype)
        return rows + self.scaling * (b @ self.a.to(rows.dtype))

    def merged(self, rows: torch.Tensor, start: int = 0, column_norms: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of W' for these ``rows`` of W, in their dtype, which is fp32 or fp64.

        Zero rows of W + sBA stay zero. ``column_norms`` [d_in] are those of W + sBA, for the axis ``input``.
        """
        adapted = self.adapted(rows, start)
        if self.m is None:
            return adapted
        m = self.m.to(rows.dtype)
        if self.axis == INPUT:
            assert column_norms is not None
            return adapted * (m if self.gains else m / column_norms.to(rows.dtype).clamp_min(EPS))
        m = m[start : start + len(rows)]
        if not self.gains:
            m = m / torch.linalg.vector_norm(adapted, dim=1).clamp_min(EPS)
        return m[:, None] * adapted
