"""Gated MLP in one pass over gate and up, to which their rank-r products are added.

    out = act(yg)*yu; yg = g_gate*gate + bg, yu = g_up*up + bu, of gate and up = base + s*(h@B.T)

spec    swiglu_forward/d_out=4304/tokens=4096/activation=bf16/bias/gelu_tanh@h200
config  tile:block_n=128,block_t=8,num_warps=8,num_stages=2

Emitted by doratune from templates/swiglu_forward_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def swiglu_forward_kernel(
    gate_ptr: "*bf16",
    gate_stride: "i64",
    up_ptr: "*bf16",
    up_stride: "i64",
    g_gate_ptr: "*fp32",
    g_up_ptr: "*fp32",
    bias_gate_ptr: "*bf16",
    bias_up_ptr: "*bf16",
    out_ptr: "*bf16",
    out_stride: "i64",
    tokens: "i32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of out, which may be the memory of gate or up."""
    D_OUT: tl.constexpr = 4304
    BLOCK_T: tl.constexpr = 8
    BLOCK_N: tl.constexpr = 128
    N_TILES: tl.constexpr = 34
    LINEAR: tl.constexpr = 1.5957691216057308  # 2*sqrt(2/pi)
    CUBIC: tl.constexpr = 0.07135481627260025  # times 0.044715

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = (t < tokens)[:, None]
    in_n = n < D_OUT

    inner_gate = tl.load(gate_ptr + row * gate_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
    inner_up = tl.load(up_ptr + row * up_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
    y_gate = tl.load(g_gate_ptr + n, mask=in_n, other=0.0)[None, :] * inner_gate
    y_gate += tl.load(bias_gate_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_up = tl.load(g_up_ptr + n, mask=in_n, other=0.0)[None, :] * inner_up
    y_up += tl.load(bias_up_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    act = y_gate / (1.0 + tl.exp(-y_gate * (LINEAR + CUBIC * y_gate * y_gate)))
    tl.store(out_ptr + row * out_stride + n[None, :], (act * y_up).to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(gate, up, g_gate, g_up, bias_gate, bias_up, out):
    """Fill out from gate and up [T, 4304], g and bias [4304]."""
    tokens = gate.shape[0]
    swiglu_forward_kernel[(triton.cdiv(tokens, 8) * 34,)](
        gate, gate.stride(0), up, up.stride(0), g_gate, g_up, bias_gate, bias_up, out, out.stride(0), tokens,
        num_warps=8, num_stages=2,
    )
