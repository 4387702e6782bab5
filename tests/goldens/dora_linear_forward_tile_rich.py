"""DoRA linear layer as one product over d_in + rank, one output tile per program.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4304/d_in=1152/rank=24/tokens=4096/weight=bf16/activation=bf16/adapter=fp32/bias/save@h200
config  tile:block_k=32,block_n=128,block_t=64,group_t=8,num_warps=8,num_stages=2

Emitted by doratune from templates/dora_linear_forward_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def dora_linear_kernel(
    x_ptr: "*bf16",
    x_stride: "i64",
    weight_ptr: "*bf16",
    weight_stride: "i64",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    g_ptr: "*fp32",
    bias_ptr: "*bf16",
    y_ptr: "*bf16",
    y_stride: "i64",
    inner_ptr: "*bf16",
    inner_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 32
    GROUP_T: tl.constexpr = 8
    N_TILES: tl.constexpr = 34

    tile = tl.program_id(0)
    t_tiles = tl.cdiv(tokens, BLOCK_T)
    group = tile // (GROUP_T * N_TILES)
    in_group = tile % (GROUP_T * N_TILES)
    group_rows = tl.minimum(t_tiles - group * GROUP_T, GROUP_T)
    tile_t = group * GROUP_T + in_group % group_rows
    tile_n = in_group // group_rows
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t = (t < tokens)[:, None]
    in_n = n < D_OUT

    h_ptrs = h_ptr + t[:, None] * h_stride + k[None, :]
    b_ptrs = lora_b_ptr + n[None, :] * lora_b_stride + k[:, None]
    acc = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_K):
        in_r = k < RANK - start
        h = tl.load(h_ptrs + start, mask=in_t & in_r[None, :], other=0.0)
        b = tl.load(b_ptrs + start, mask=in_n[None, :] & in_r[:, None], other=0.0)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(h, b_high, acc)
        acc = tl.dot(h, b_low, acc)
    acc *= scaling  # in fp32, before W's part comes on top

    x_ptrs = x_ptr + t[:, None] * x_stride + k[None, :]
    w_ptrs = weight_ptr + n[None, :] * weight_stride + k[:, None]
    for start in range(0, D_IN, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=in_t, other=0.0)
        w = tl.load(w_ptrs + start, mask=in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc)

    y = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :] * acc
    y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t & in_n[None, :])
    tl.store(inner_ptr + t[:, None] * inner_stride + n[None, :], acc.to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(x, weight, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from x [T, 1152], weight [4304, 1152], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tokens = x.shape[0]
    dora_linear_kernel[(triton.cdiv(tokens, 64) * 34,)](
        x, x.stride(0), weight, weight.stride(0), h, h.stride(0), lora_b, lora_b.stride(0),
        g, bias, y, y.stride(0), inner, inner.stride(0), tokens, scaling,
        num_warps=8, num_stages=2,
    )
