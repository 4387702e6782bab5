"""DoRA composition as the epilogue of the rank-r product, one output tile per program.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4304/rank=24/tokens=4096/activation=bf16/adapter=fp32/bias/save@h200
config  tile:block_k=32,block_n=64,block_t=64,num_warps=4,num_stages=2

Emitted by doratune from templates/lora_compose_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def lora_compose_kernel(
    base_ptr: "*bf16",
    base_stride: "i64",
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
    """Write one [BLOCK_T, BLOCK_N] tile of y; base and y may be the same memory."""
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32
    N_TILES: tl.constexpr = 68

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t = (t < tokens)[:, None]
    in_n = n < D_OUT

    base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0)

    h_ptrs = h_ptr + row * h_stride + k[None, :]
    b_ptrs = lora_b_ptr + n.to(tl.int64)[None, :] * lora_b_stride + k[:, None]
    lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_K):
        in_k = k < RANK - start
        h = tl.load(h_ptrs + start, mask=in_t & in_k[None, :], other=0.0)
        b = tl.load(b_ptrs + start, mask=in_n[None, :] & in_k[:, None], other=0.0)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        lora = tl.dot(h, b_high, lora)
        lora = tl.dot(h, b_low, lora)

    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    inner = base.to(tl.float32) + scaling * lora
    y = g * inner
    y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t & in_n[None, :])
    tl.store(inner_ptr + row * inner_stride + n[None, :], inner.to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(base, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from base [T, 4304], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tokens = base.shape[0]
    lora_compose_kernel[(triton.cdiv(tokens, 64) * 68,)](
        base, base.stride(0), h, h.stride(0), lora_b, lora_b.stride(0), g, bias, y, y.stride(0),
        inner, inner.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
