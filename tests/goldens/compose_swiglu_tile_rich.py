"""Gated MLP: gate and up are composed, activated and multiplied in the epilogue of their rank-r products.

    out = act(yg)*yu; yg = g_gate*(gate + s*(hg@Bg.T)) + bg, yu = g_up*(up + s*(hu@Bu.T)) + bu; h = [hg, hu]

spec    compose_swiglu/d_out=4304/rank=24/tokens=4096/activation=bf16/adapter=fp32/bias/gelu_tanh@h200
config  tile:block_k=32,block_n=64,block_t=64,chunk=64,resident=0,num_warps=8,num_stages=2

Emitted by doratune from templates/compose_swiglu_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def compose_swiglu_kernel(
    gate_ptr: "*bf16",
    gate_stride: "i64",
    up_ptr: "*bf16",
    up_stride: "i64",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_gate_ptr: "*fp32",
    lora_b_gate_stride: "i64",
    lora_b_up_ptr: "*fp32",
    lora_b_up_stride: "i64",
    g_gate_ptr: "*fp32",
    g_up_ptr: "*fp32",
    bias_gate_ptr: "*bf16",
    bias_up_ptr: "*bf16",
    out_ptr: "*bf16",
    out_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write CHUNK rows of BLOCK_N columns of out, which may be the memory of gate or up."""
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    CHUNK: tl.constexpr = 64
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32
    N_TILES: tl.constexpr = 68
    LINEAR: tl.constexpr = 1.5957691216057308  # 2*sqrt(2/pi)
    CUBIC: tl.constexpr = 0.07135481627260025  # times 0.044715

    chunk = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n = n < D_OUT
    in_k = k < RANK
    g_gate = tl.load(g_gate_ptr + n, mask=in_n, other=0.0)[None, :]
    bias_gate = tl.load(bias_gate_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    b_gate_ptrs = lora_b_gate_ptr + n.to(tl.int64)[None, :] * lora_b_gate_stride + k[:, None]
    b_gate = tl.load(b_gate_ptrs, mask=in_n[None, :] & in_k[:, None], other=0.0)
    g_up = tl.load(g_up_ptr + n, mask=in_n, other=0.0)[None, :]
    bias_up = tl.load(bias_up_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    b_up_ptrs = lora_b_up_ptr + n.to(tl.int64)[None, :] * lora_b_up_stride + k[:, None]
    b_up = tl.load(b_up_ptrs, mask=in_n[None, :] & in_k[:, None], other=0.0)

    for first in tl.range(0, CHUNK, BLOCK_T, num_stages=2):
        t = chunk * CHUNK + first + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        in_t = (t < tokens)[:, None]
        gate = tl.load(gate_ptr + row * gate_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0)
        up = tl.load(up_ptr + row * up_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0)

        h_ptrs = h_ptr + row * h_stride + k[None, :]  # of gate; up's columns follow
        lora_gate = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        lora_up = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        h_gate = tl.load(h_ptrs, mask=in_t & in_k[None, :], other=0.0)
        b_gate_high = b_gate.to(tl.bfloat16)
        b_gate_low = (b_gate - b_gate_high.to(tl.float32)).to(tl.bfloat16)
        lora_gate = tl.dot(h_gate, b_gate_high, lora_gate)
        lora_gate = tl.dot(h_gate, b_gate_low, lora_gate)
        h_up = tl.load(h_ptrs + RANK, mask=in_t & in_k[None, :], other=0.0)
        b_up_high = b_up.to(tl.bfloat16)
        b_up_low = (b_up - b_up_high.to(tl.float32)).to(tl.bfloat16)
        lora_up = tl.dot(h_up, b_up_high, lora_up)
        lora_up = tl.dot(h_up, b_up_low, lora_up)

        y_gate = g_gate * (gate.to(tl.float32) + scaling * lora_gate) + bias_gate
        y_up = g_up * (up.to(tl.float32) + scaling * lora_up) + bias_up
        act = y_gate / (1.0 + tl.exp(-y_gate * (LINEAR + CUBIC * y_gate * y_gate)))
        tl.store(out_ptr + row * out_stride + n[None, :], (act * y_up).to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(gate, up, h, lora_b_gate, lora_b_up, g_gate, g_up, bias_gate, bias_up, out, scaling):
    """Fill out from gate and up [T, 4304], h [T, 48], lora_b [4304, 24], g and bias [4304]."""
    tokens = gate.shape[0]
    compose_swiglu_kernel[(triton.cdiv(tokens, 64) * 68,)](
        gate, gate.stride(0), up, up.stride(0), h, h.stride(0), lora_b_gate, lora_b_gate.stride(0), lora_b_up, lora_b_up.stride(0),
        g_gate, g_up, bias_gate, bias_up, out, out.stride(0), tokens, scaling,
        num_warps=8, num_stages=2,
    )
