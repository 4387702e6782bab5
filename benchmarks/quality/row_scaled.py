"""LoRA with a trained scale for each row of W: DoRA without the norm of W + sBA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RowScaledLoRA(nn.Module):
    """y = m/‖W‖ ⊙ (xWᵀ + s·xAᵀBᵀ): m is trained and begins as the row norms ‖W‖ (d_out) of the frozen W.

    DoRA divides by ‖W + sBA‖ instead (arXiv:2402.09353, equation 5), so there m alone is the length of a row. That norm
    is all that differs between the two: A, B, m and s are the same.

    Args:
        base: the frozen layer, W of (d_out, d_in), without a bias.
        rank: r; A is (r, d_in), B is (d_out, r), both and m in ``dtype``.
        scaling: s.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))
        norm: torch.Tensor = torch.linalg.vector_norm(base.weight.detach().float(), dim=1)
        self.magnitude = nn.Parameter(norm.to(dtype, copy=True))
        self.norm: torch.Tensor
        self.register_buffer("norm", norm, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, d_in) to y (…, d_out), in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        gain = self.magnitude.float() / self.norm  # in bf16 a gain near 1 could not move by less than 0.4 %
        scaled: torch.Tensor = gain * (y + self.scaling * update)
        return scaled.to(y.dtype)
