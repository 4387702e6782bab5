"""A gated MLP's projections under ``torch.compile``: the operators of :mod:`.operators` in one graph.

    forward    h = x@[A_gate; A_up].T, y = act(y_gate)*y_up by ``compose_swiglu``
    backward   dYg of both and dm by ``compose_swiglu_backward``, t = s*dYg@B, dX = sum dYg@W + [t_gate, t_up]@A,
               [dA_gate; dA_up] = [t_gate, t_up].T@x, dB = s*dYg.T@h

At high ranks ``low_rank_linear`` makes the sums that ``swiglu_forward`` and
``swiglu_backward`` read. As :mod:`.group`, without a plan: a compiler refuses what is kept between calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..codegen.ops import adds_in_place
from ..codegen.spec import TOKEN_BUCKETS
from . import operators
from .autocast import without_autocast

if TYPE_CHECKING:
    from .group_plan import Projection


def composed_gated(
    x: torch.Tensor, gate: Projection, up: Projection, activation: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return act(gate)*up [..., d_out] in ``dtype`` as a gated plan of :mod:`.group` does, for calls that are traced.

    Here the operators ``compose_swiglu`` and ``compose_swiglu_backward`` stay: they read both base products once, where
    the compiler's kernels need both inners in memory first.
    """
    with torch.no_grad():
        rounded, factors = [], []
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for one in (gate, up):
            a, b = (each if each.dtype is dtype else each.to(dtype) for each in (one.lora_A, one.lora_B))
            norm, g = one.norms.gain_of_weight(
                one.weight, one.lora_A, one.lora_B, one.magnitude, one.scaling, rounded=(a, b)
            )
            rounded += [None if a is one.lora_A else a, None if b is one.lora_B else b]
            factors += [norm.to(wide), g.to(wide)]
    # With any number of tokens: a graph that asked for it would hold for these alone.
    in_place = dtype is torch.bfloat16 and adds_in_place(gate.lora_A.shape[0], TOKEN_BUCKETS[-1], "bf16")
    y: torch.Tensor = _ComposedGated.apply(  # type: ignore[no-untyped-call]
        x.to(dtype),
        gate.weight,
        up.weight,
        gate.lora_A,
        gate.lora_B,
        gate.magnitude,
        up.lora_A,
        up.lora_B,
        up.magnitude,
        gate.bias,
        up.bias,
        *rounded,
        *factors,
        gate.scaling,
        activation,
        dtype,
        in_place,
    )
    return y


class _ComposedGated(torch.autograd.Function):
    """The function of :func:`composed_gated`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_gate: torch.Tensor,
        weight_up: torch.Tensor,
        a_gate: torch.Tensor,
        b_gate: torch.Tensor,
        m_gate: torch.Tensor,
        a_up: torch.Tensor,
        b_up: torch.Tensor,
        m_up: torch.Tensor,
        bias_gate: torch.Tensor | None,
        bias_up: torch.Tensor | None,
        rounded_a_gate: torch.Tensor | None,
        rounded_b_gate: torch.Tensor | None,
        rounded_a_up: torch.Tensor | None,
        rounded_b_up: torch.Tensor | None,
        norm_gate: torch.Tensor,
        g_gate: torch.Tensor,
        norm_up: torch.Tensor,
        g_up: torch.Tensor,
        scaling: float,
        activation: str,
        dtype: torch.dtype,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.adapter_dtype, ctx.magnitude_dtype = a_gate.dtype, m_gate.dtype
        b_gate = b_gate if rounded_b_gate is None else rounded_b_gate
        b_up = b_up if rounded_b_up is None else rounded_b_up
        with without_autocast(x.device):
            a = torch.cat(
                (
                    a_gate if rounded_a_gate is None else rounded_a_gate,
                    a_up if rounded_a_up is None else rounded_a_up,
                )
            )
            rows = x.reshape(-1, x.shape[-1])
            h = rows @ a.T
            bias_gate, bias_up = (None if bias is None else bias.to(dtype) for bias in (bias_gate, bias_up))
            weight_of_gate, weight_of_up = weight_gate.to(dtype), weight_up.to(dtype)
            if in_place:
                rank = b_gate.shape[1]
                gate = operators.low_rank_linear(rows, weight_of_gate, h[:, :rank], b_gate, scaling)
                up = operators.low_rank_linear(rows, weight_of_up, h[:, rank:], b_up, scaling)
                y = operators.swiglu_forward(gate, up, g_gate, g_up, bias_gate, bias_up, activation)
            else:
                gate, up = rows @ weight_of_gate.T, rows @ weight_of_up.T
                y = operators.compose_swiglu(
                    gate, up, h, b_gate, b_up, g_gate, g_up, bias_gate, bias_up, scaling, activation
                )
        ctx.save_for_backward(
            x,
            weight_gate,
            weight_up,
            a,
            b_gate,
            b_up,
            bias_gate,
            bias_up,
            norm_gate,
            norm_up,
            g_gate,
            g_up,
            h,
            gate,
            up,
        )
        ctx.scaling, ctx.activation, ctx.dtype, ctx.in_place = scaling, activation, dtype, in_place
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_gate, weight_up, a, b_gate, b_up, bias_gate, bias_up, *factors, h, gate, up = ctx.saved_tensors
        norm_gate, norm_up, g_gate, g_up = factors
        scaling, dtype = ctx.scaling, ctx.dtype
        with without_autocast(dy.device):
            matrices = (dy.reshape(-1, dy.shape[-1]), gate, up)
            vectors = (g_gate, g_up, norm_gate, norm_up, bias_gate, bias_up)
            settings = (ctx.activation, ctx.magnitude_dtype)
            if ctx.in_place:
                made = operators.swiglu_backward(*matrices, *vectors, *settings)
            else:
                low = (h, b_gate, b_up)
                made = operators.compose_swiglu_backward(*matrices, *low, *vectors, scaling, *settings)
            dgate, dup, dm_gate, dm_up, *_ = made
            rank = b_gate.shape[1]
            t = torch.cat((_scaled(dgate, b_gate, scaling, dtype), _scaled(dup, b_up, scaling, dtype)), dim=1)
            db_gate = _scaled(dgate.T, h[:, :rank], scaling, ctx.adapter_dtype)
            db_up = _scaled(dup.T, h[:, rank:], scaling, ctx.adapter_dtype)
            da = _scaled(t.T, x.reshape(-1, x.shape[-1]), 1.0, ctx.adapter_dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                wide = torch.float64 if dtype is torch.float64 else torch.float32
                parts = (dgate @ weight_gate.to(dtype), dup @ weight_up.to(dtype), t @ a)
                dx = (parts[0].to(wide) + parts[1].to(wide) + parts[2].to(wide)).to(dtype)
                dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        grads = (da[:rank], db_gate, dm_gate, da[rank:], db_up, dm_up)
        return dx, None, None, *grads, *[None] * 14


def _scaled(left: torch.Tensor, right: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """``s * left @ right`` in ``dtype``; fp32 from 16 bits is not rounded in between."""
    if dtype is torch.float32 and left.dtype is not dtype:
        return operators.wide_product(left, right) * scaling
    if scaling == 1.0:
        return (left @ right).to(dtype)
    unread = left.new_zeros(1, 1)  # there may be no tokens, so neither factor has a row for certain
    return torch.addmm(unread, left, right, beta=0, alpha=scaling).to(dtype)
