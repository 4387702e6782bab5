"""Several projections of one x, each composed in the epilogue of its rank-r product, in one launch.

    for each projection of one x: y = g*(base + s*(h@B.T)) + b, with its own columns of h = [h_1, h_2, ...]

spec    lora_compose_group/d_out=4304/d_out_2=1024/d_out_3=520/rank=24/tokens=4096/activation=bf16/adapter=fp32/bias@h200
config  tile:block_k=32,block_n=64,block_t=64,chunk=64,resident=0,num_warps=8,num_stages=2

Emitted by doratune from templates/lora_compose_group_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def lora_compose_group_kernel(
    base_1_ptr: "*bf16",
    base_1_stride: "i64",
    base_2_ptr: "*bf16",
    base_2_stride: "i64",
    base_3_ptr: "*bf16",
    base_3_stride: "i64",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_1_ptr: "*fp32",
    lora_b_1_stride: "i64",
    lora_b_2_ptr: "*fp32",
    lora_b_2_stride: "i64",
    lora_b_3_ptr: "*fp32",
    lora_b_3_stride: "i64",
    g_1_ptr: "*fp32",
    g_2_ptr: "*fp32",
    g_3_ptr: "*fp32",
    bias_1_ptr: "*bf16",
    bias_2_ptr: "*bf16",
    bias_3_ptr: "*bf16",
    y_1_ptr: "*bf16",
    y_1_stride: "i64",
    y_2_ptr: "*bf16",
    y_2_stride: "i64",
    y_3_ptr: "*bf16",
    y_3_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write CHUNK rows of BLOCK_N columns of one projection's y, which may be the memory of its base."""
    RANK: tl.constexpr = 24
    CHUNK: tl.constexpr = 64
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32
    TILES: tl.constexpr = 93

    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    k = tl.arange(0, BLOCK_K)
    in_k = k < RANK
    if tile < 68:  # projection 1
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < 4304
        h_first_ptr = h_ptr
        base_ptr, base_stride = base_1_ptr, base_1_stride
        lora_b_ptr, lora_b_stride = lora_b_1_ptr, lora_b_1_stride
        y_ptr, y_stride = y_1_ptr, y_1_stride
        g_ptr = g_1_ptr
        bias_ptr = bias_1_ptr
    elif tile < 84:  # projection 2
        n = (tile - 68) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < 1024
        h_first_ptr = h_ptr + RANK
        base_ptr, base_stride = base_2_ptr, base_2_stride
        lora_b_ptr, lora_b_stride = lora_b_2_ptr, lora_b_2_stride
        y_ptr, y_stride = y_2_ptr, y_2_stride
        g_ptr = g_2_ptr
        bias_ptr = bias_2_ptr
    else:  # projection 3
        n = (tile - 84) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < 520
        h_first_ptr = h_ptr + 2 * RANK
        base_ptr, base_stride = base_3_ptr, base_3_stride
        lora_b_ptr, lora_b_stride = lora_b_3_ptr, lora_b_3_stride
        y_ptr, y_stride = y_3_ptr, y_3_stride
        g_ptr = g_3_ptr
        bias_ptr = bias_3_ptr

    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    bias = tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    b_ptrs = lora_b_ptr + n.to(tl.int64)[None, :] * lora_b_stride + k[:, None]
    b = tl.load(b_ptrs, mask=in_n[None, :] & in_k[:, None], other=0.0)

    for first in tl.range(0, CHUNK, BLOCK_T, num_stages=2):
        t = chunk * CHUNK + first + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        in_t = (t < tokens)[:, None]
        base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0)
        h_ptrs = h_first_ptr + row * h_stride + k[None, :]
        lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        h = tl.load(h_ptrs, mask=in_t & in_k[None, :], other=0.0)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        lora = tl.dot(h, b_high, lora)
        lora = tl.dot(h, b_low, lora)
        y = g * (base.to(tl.float32) + scaling * lora) + bias
        tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(
    base_1, base_2, base_3, h, lora_b_1, lora_b_2, lora_b_3, g_1, g_2, g_3, bias_1, bias_2, bias_3, y_1, y_2, y_3, scaling
):
    """Fill y of each projection (columns: 4304, 1024, 520) from base, h [T, 72], lora_b, g, bias."""
    tokens = h.shape[0]
    lora_compose_group_kernel[(triton.cdiv(tokens, 64) * 93,)](
        base_1, base_1.stride(0), base_2, base_2.stride(0), base_3, base_3.stride(0), h, h.stride(0),
        lora_b_1, lora_b_1.stride(0), lora_b_2, lora_b_2.stride(0), lora_b_3, lora_b_3.stride(0),
        g_1, g_2, g_3, bias_1, bias_2, bias_3, y_1, y_1.stride(0), y_2, y_2.stride(0), y_3, y_3.stride(0),
        tokens, scaling, num_warps=8, num_stages=2,
    )
