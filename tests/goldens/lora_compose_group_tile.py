"""Several projections of one x, each composed in the epilogue of its rank-r product, in one launch.

    for each projection of one x: y = g*(base + s*(h@B.T)) + b, with its own columns of h = [h_1, h_2, ...]

spec    lora_compose_group/d_out=4096/d_out_2=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  tile:block_k=64,block_n=128,block_t=64,chunk=64,resident=0,num_warps=8,num_stages=4

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
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_1_ptr: "*bf16",
    lora_b_1_stride: "i64",
    lora_b_2_ptr: "*bf16",
    lora_b_2_stride: "i64",
    g_1_ptr: "*fp32",
    g_2_ptr: "*fp32",
    y_1_ptr: "*bf16",
    y_1_stride: "i64",
    y_2_ptr: "*bf16",
    y_2_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write CHUNK rows of BLOCK_N columns of one projection's y, which may be the memory of its base."""
    RANK: tl.constexpr = 384
    CHUNK: tl.constexpr = 64
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    TILES: tl.constexpr = 64

    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    k = tl.arange(0, BLOCK_K)
    if tile < 32:  # projection 1
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        h_first_ptr = h_ptr
        base_ptr, base_stride = base_1_ptr, base_1_stride
        lora_b_ptr, lora_b_stride = lora_b_1_ptr, lora_b_1_stride
        y_ptr, y_stride = y_1_ptr, y_1_stride
        g_ptr = g_1_ptr
    else:  # projection 2
        n = (tile - 32) * BLOCK_N + tl.arange(0, BLOCK_N)
        h_first_ptr = h_ptr + RANK
        base_ptr, base_stride = base_2_ptr, base_2_stride
        lora_b_ptr, lora_b_stride = lora_b_2_ptr, lora_b_2_stride
        y_ptr, y_stride = y_2_ptr, y_2_stride
        g_ptr = g_2_ptr

    g = tl.load(g_ptr + n)[None, :]
    b_ptrs = lora_b_ptr + n.to(tl.int64)[None, :] * lora_b_stride + k[:, None]

    for first in tl.range(0, CHUNK, BLOCK_T):
        t = chunk * CHUNK + first + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        in_t = (t < tokens)[:, None]
        base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t, other=0.0)
        h_ptrs = h_first_ptr + row * h_stride + k[None, :]
        lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        for start in range(0, RANK, BLOCK_K):
            h = tl.load(h_ptrs + start, mask=in_t, other=0.0)
            b = tl.load(b_ptrs + start)
            lora = tl.dot(h, b, lora)
        y = g * (base.to(tl.float32) + scaling * lora)
        tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t)


def launch(
    base_1, base_2, h, lora_b_1, lora_b_2, g_1, g_2, y_1, y_2, scaling
):
    """Fill y of each projection (columns: 4096, 4096) from base, h [T, 768], lora_b, g."""
    tokens = h.shape[0]
    lora_compose_group_kernel[(triton.cdiv(tokens, 64) * 64,)](
        base_1, base_1.stride(0), base_2, base_2.stride(0), h, h.stride(0),
        lora_b_1, lora_b_1.stride(0), lora_b_2, lora_b_2.stride(0),
        g_1, g_2, y_1, y_1.stride(0), y_2, y_2.stride(0),
        tokens, scaling, num_warps=8, num_stages=4,
    )
