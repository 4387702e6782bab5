"""DoRA in PyTorch's own operators, for graphs that are recorded to run elsewhere.

The recorders are ``torch.jit.trace``, ``make_fx`` and ``torch.export``; ``torch.onnx.export`` goes through one of them.

They record operators. They see neither kernel launches nor the backward pass of an autograd function, and under
``torch.jit.trace`` sizes are tensors. So they record the plain formula instead. Its graph runs without doratune for any
number of tokens, and PyTorch differentiates it. It materialises W + sBA, as PEFT does.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ..codegen.ops import EPS
from .autocast import without_autocast
from .kernels import wide_dtype


def recorded_norm(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The row norms ``||W + sBA||``, [d_out] in fp32 (fp64 from fp64), without a gradient."""
    wide = wide_dtype(weight)
    with without_autocast(weight.device):
        # detach() instead of no_grad(): torch.jit.trace does not record that gradients were off.
        product = lora_B.detach().to(wide) @ lora_A.detach().to(wide)
        norm: torch.Tensor = torch.linalg.vector_norm(weight.detach().to(wide) + scaling * product, dim=1)
        return norm


def recorded_dora(
    x: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    scaling: float,
    *,
    delta: bool,
) -> torch.Tensor:
    """``g*(base + s*h@B.T) + b``, or ``(g-1)*base + g*s*h@B.T`` if ``delta``, in the dtype of x [..., d_in].

    A and B keep their dtypes. If ``weight`` is given, the base product is computed here, so that x gets its gradient.
    Otherwise ``base`` [..., d_out] is the caller's and contains the bias. If ``norm`` is None it is computed from
    ``weight``.
    """
    with without_autocast(x.device):
        if weight is not None:
            inner = linear(x, weight.detach().to(x.dtype))
            norm = recorded_norm(weight, lora_A, lora_B, scaling) if norm is None else norm
        else:
            assert base is not None
            inner = base if bias is None else base - bias.to(base.dtype)
        assert norm is not None
        wide = wide_dtype(inner)
        g = magnitude.to(wide) / norm.detach().to(wide).clamp_min(EPS)
        h = linear(x.to(lora_A.dtype), lora_A)
        lora = scaling * linear(h.to(wide), lora_B.to(wide))
        y = (g - 1.0) * inner + g * lora if delta else g * (inner + lora)
        if bias is not None and not delta:
            y = y + bias.to(x.dtype)
        return y.to(x.dtype)
