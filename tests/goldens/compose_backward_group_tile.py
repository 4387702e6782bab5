"""Backward of several projections of one x in one launch, a second kernel adds the sums over chunks of tokens.

    for each projection of one x: dYg = g*dY; dg = sum_t dY*(base + s*(h@B.T)), dm = dg / max(w, eps)

spec    compose_backward_group/d_out=4096/d_out_2=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  tile:block_k=64,block_n=64,block_t=64,chunk=512,reduce_c=16,resident=1,num_warps=4,num_stages=3

Emitted by doratune from templates/compose_backward_group_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def compose_backward_group_kernel(
    dy_1_ptr: "*bf16",
    dy_1_stride: "i64",
    dy_2_ptr: "*bf16",
    dy_2_stride: "i64",
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
    dyg_1_ptr: "*bf16",
    dyg_1_stride: "i64",
    dyg_2_ptr: "*bf16",
    dyg_2_stride: "i64",
    chunks_ptr: "*fp32",
    tokens: "i32",
    scaling: "fp32",
):
    """Write CHUNK rows of BLOCK_N columns of one projection's dyg, which may be the memory of its dy or base, and the sums."""
    RANK: tl.constexpr = 384
    CHUNK: tl.constexpr = 512
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    TILES: tl.constexpr = 128

    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    k = tl.arange(0, BLOCK_K)
    if tile < 64:  # projection 1
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        h_first_ptr = h_ptr
        dy_ptr, dy_stride = dy_1_ptr, dy_1_stride
        base_ptr, base_stride = base_1_ptr, base_1_stride
        lora_b_ptr, lora_b_stride = lora_b_1_ptr, lora_b_1_stride
        dyg_ptr, dyg_stride = dyg_1_ptr, dyg_1_stride
        g_ptr = g_1_ptr
    else:  # projection 2
        n = (tile - 64) * BLOCK_N + tl.arange(0, BLOCK_N)
        h_first_ptr = h_ptr + RANK
        dy_ptr, dy_stride = dy_2_ptr, dy_2_stride
        base_ptr, base_stride = base_2_ptr, base_2_stride
        lora_b_ptr, lora_b_stride = lora_b_2_ptr, lora_b_2_stride
        dyg_ptr, dyg_stride = dyg_2_ptr, dyg_2_stride
        g_ptr = g_2_ptr

    g = tl.load(g_ptr + n)[None, :]
    b_ptrs = lora_b_ptr + n.to(tl.int64)[None, :] * lora_b_stride + k[:, None]
    b_0 = tl.load(b_ptrs)
    b_1 = tl.load(b_ptrs + BLOCK_K)
    b_2 = tl.load(b_ptrs + 2 * BLOCK_K)
    b_3 = tl.load(b_ptrs + 3 * BLOCK_K)
    b_4 = tl.load(b_ptrs + 4 * BLOCK_K)
    b_5 = tl.load(b_ptrs + 5 * BLOCK_K)

    dg = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for first in tl.range(0, CHUNK, BLOCK_T, num_stages=3):
        t = chunk * CHUNK + first + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        in_t = (t < tokens)[:, None]
        dy = tl.load(dy_ptr + row * dy_stride + n[None, :], mask=in_t, other=0.0).to(tl.float32)
        base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t, other=0.0)
        h_ptrs = h_first_ptr + row * h_stride + k[None, :]
        lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        h = tl.load(h_ptrs, mask=in_t, other=0.0)
        lora = tl.dot(h, b_0, lora)
        h = tl.load(h_ptrs + BLOCK_K, mask=in_t, other=0.0)
        lora = tl.dot(h, b_1, lora)
        h = tl.load(h_ptrs + 2 * BLOCK_K, mask=in_t, other=0.0)
        lora = tl.dot(h, b_2, lora)
        h = tl.load(h_ptrs + 3 * BLOCK_K, mask=in_t, other=0.0)
        lora = tl.dot(h, b_3, lora)
        h = tl.load(h_ptrs + 4 * BLOCK_K, mask=in_t, other=0.0)
        lora = tl.dot(h, b_4, lora)
        h = tl.load(h_ptrs + 5 * BLOCK_K, mask=in_t, other=0.0)
        lora = tl.dot(h, b_5, lora)
        tl.store(dyg_ptr + row * dyg_stride + n[None, :], (g * dy).to(tl.bfloat16), mask=in_t)
        dg += dy * (base.to(tl.float32) + scaling * lora)

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # the projections' tiles one after another
    tl.store(chunks_ptr + chunk.to(tl.int64) * (TILES * BLOCK_N) + column, tl.sum(dg, axis=0))


@triton.jit
def add_chunks_kernel(
    chunks_ptr: "*fp32",
    dg_1_ptr: "*fp32",
    dg_2_ptr: "*fp32",
    chunks: "i32",
):
    """Add the chunks' sums of one tile in a fixed order, so that equal inputs give equal bits."""
    BLOCK_C: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    TILES: tl.constexpr = 128

    tile = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dg = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_C):
        sums = chunks_ptr + (start + c).to(tl.int64)[:, None] * (TILES * BLOCK_N) + column[None, :]
        dg += tl.load(sums, mask=(start + c < chunks)[:, None], other=0.0)
    result = tl.sum(dg, axis=0)
    if tile < 64:  # projection 1
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(dg_1_ptr + n, result)
    else:  # projection 2
        n = (tile - 64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(dg_2_ptr + n, result)


def launch(
    dy_1, dy_2, base_1, base_2, h, lora_b_1, lora_b_2, g_1, g_2,
    dyg_1, dyg_2, dg_1, dg_2, scaling
):
    """Fill dyg and dg of each projection (columns: 4096, 4096) from dy, base, h [T, 768], lora_b, g."""
    tokens = h.shape[0]
    chunks = triton.cdiv(tokens, 512)
    sums = torch.empty((chunks, 8192), dtype=torch.float32, device=h.device)
    compose_backward_group_kernel[(chunks * 128,)](
        dy_1, dy_1.stride(0), dy_2, dy_2.stride(0),
        base_1, base_1.stride(0), base_2, base_2.stride(0), h, h.stride(0),
        lora_b_1, lora_b_1.stride(0), lora_b_2, lora_b_2.stride(0),
        g_1, g_2, dyg_1, dyg_1.stride(0), dyg_2, dyg_2.stride(0),
        sums, tokens, scaling, num_warps=4, num_stages=3,
    )
    add_chunks_kernel[(128,)](
        sums, dg_1, dg_2, chunks, num_warps=4, num_stages=2,
    )
