"""Backward of several projections of one x in one launch, a second kernel adds the sums over chunks of tokens.

    for each projection of one x: dYg = g*dY; dg = sum_t dY*(base + s*(h@B.T)), dm = dg / max(w, eps)

spec    compose_backward_group/d_out=4304/d_out_2=1024/d_out_3=520/rank=24/tokens=4096/activation=bf16/adapter=fp32/magnitude=fp32@h200
config  tile:block_k=32,block_n=64,block_t=64,chunk=64,reduce_c=16,resident=0,num_warps=8,num_stages=2

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
    dy_3_ptr: "*bf16",
    dy_3_stride: "i64",
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
    dyg_1_ptr: "*bf16",
    dyg_1_stride: "i64",
    dyg_2_ptr: "*bf16",
    dyg_2_stride: "i64",
    dyg_3_ptr: "*bf16",
    dyg_3_stride: "i64",
    chunks_ptr: "*fp32",
    tokens: "i32",
    scaling: "fp32",
):
    """Write CHUNK rows of BLOCK_N columns of one projection's dyg, which may be the memory of its dy or base, and the sums."""
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
        dy_ptr, dy_stride = dy_1_ptr, dy_1_stride
        base_ptr, base_stride = base_1_ptr, base_1_stride
        lora_b_ptr, lora_b_stride = lora_b_1_ptr, lora_b_1_stride
        dyg_ptr, dyg_stride = dyg_1_ptr, dyg_1_stride
        g_ptr = g_1_ptr
    elif tile < 84:  # projection 2
        n = (tile - 68) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < 1024
        h_first_ptr = h_ptr + RANK
        dy_ptr, dy_stride = dy_2_ptr, dy_2_stride
        base_ptr, base_stride = base_2_ptr, base_2_stride
        lora_b_ptr, lora_b_stride = lora_b_2_ptr, lora_b_2_stride
        dyg_ptr, dyg_stride = dyg_2_ptr, dyg_2_stride
        g_ptr = g_2_ptr
    else:  # projection 3
        n = (tile - 84) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < 520
        h_first_ptr = h_ptr + 2 * RANK
        dy_ptr, dy_stride = dy_3_ptr, dy_3_stride
        base_ptr, base_stride = base_3_ptr, base_3_stride
        lora_b_ptr, lora_b_stride = lora_b_3_ptr, lora_b_3_stride
        dyg_ptr, dyg_stride = dyg_3_ptr, dyg_3_stride
        g_ptr = g_3_ptr

    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    b_ptrs = lora_b_ptr + n.to(tl.int64)[None, :] * lora_b_stride + k[:, None]
    b = tl.load(b_ptrs, mask=in_n[None, :] & in_k[:, None], other=0.0)

    dg = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for first in tl.range(0, CHUNK, BLOCK_T, num_stages=2):
        t = chunk * CHUNK + first + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        in_t = (t < tokens)[:, None]
        dy = tl.load(dy_ptr + row * dy_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0)
        h_ptrs = h_first_ptr + row * h_stride + k[None, :]
        lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        h = tl.load(h_ptrs, mask=in_t & in_k[None, :], other=0.0)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        lora = tl.dot(h, b_high, lora)
        lora = tl.dot(h, b_low, lora)
        tl.store(dyg_ptr + row * dyg_stride + n[None, :], (g * dy).to(tl.bfloat16), mask=in_t & in_n[None, :])
        dg += dy * (base.to(tl.float32) + scaling * lora)

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # the projections' tiles one after another
    tl.store(chunks_ptr + chunk.to(tl.int64) * (TILES * BLOCK_N) + column, tl.sum(dg, axis=0))


@triton.jit
def add_chunks_kernel(
    chunks_ptr: "*fp32",
    norm_1_ptr: "*fp32",
    norm_2_ptr: "*fp32",
    norm_3_ptr: "*fp32",
    dmagnitude_1_ptr: "*fp32",
    dmagnitude_2_ptr: "*fp32",
    dmagnitude_3_ptr: "*fp32",
    chunks: "i32",
):
    """Add the chunks' sums of one tile in a fixed order, so that equal inputs give equal bits; divide by the norm."""
    BLOCK_C: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    TILES: tl.constexpr = 93
    EPS: tl.constexpr = 1e-12

    tile = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dg = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_C):
        sums = chunks_ptr + (start + c).to(tl.int64)[:, None] * (TILES * BLOCK_N) + column[None, :]
        dg += tl.load(sums, mask=(start + c < chunks)[:, None], other=0.0)
    result = tl.sum(dg, axis=0)
    if tile < 68:  # projection 1
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        norm = tl.load(norm_1_ptr + n, mask=n < 4304, other=1.0)
        result = result / tl.maximum(norm, EPS)
        tl.store(dmagnitude_1_ptr + n, result.to(tl.float32), mask=n < 4304)
    elif tile < 84:  # projection 2
        n = (tile - 68) * BLOCK_N + tl.arange(0, BLOCK_N)
        norm = tl.load(norm_2_ptr + n)
        result = result / tl.maximum(norm, EPS)
        tl.store(dmagnitude_2_ptr + n, result.to(tl.float32))
    else:  # projection 3
        n = (tile - 84) * BLOCK_N + tl.arange(0, BLOCK_N)
        norm = tl.load(norm_3_ptr + n, mask=n < 520, other=1.0)
        result = result / tl.maximum(norm, EPS)
        tl.store(dmagnitude_3_ptr + n, result.to(tl.float32), mask=n < 520)


def launch(
    dy_1, dy_2, dy_3, base_1, base_2, base_3, h, lora_b_1, lora_b_2, lora_b_3, g_1, g_2, g_3,
    norm_1, norm_2, norm_3, dyg_1, dyg_2, dyg_3, dmagnitude_1, dmagnitude_2, dmagnitude_3, scaling
):
    """Fill dyg and dmagnitude of each projection (columns: 4304, 1024, 520) from dy, base, h [T, 72], lora_b, g, norm."""
    tokens = h.shape[0]
    chunks = triton.cdiv(tokens, 64)
    sums = torch.empty((chunks, 5952), dtype=torch.float32, device=h.device)
    compose_backward_group_kernel[(chunks * 93,)](
        dy_1, dy_1.stride(0), dy_2, dy_2.stride(0), dy_3, dy_3.stride(0),
        base_1, base_1.stride(0), base_2, base_2.stride(0), base_3, base_3.stride(0), h, h.stride(0),
        lora_b_1, lora_b_1.stride(0), lora_b_2, lora_b_2.stride(0), lora_b_3, lora_b_3.stride(0),
        g_1, g_2, g_3, dyg_1, dyg_1.stride(0), dyg_2, dyg_2.stride(0), dyg_3, dyg_3.stride(0),
        sums, tokens, scaling, num_warps=8, num_stages=2,
    )
    add_chunks_kernel[(93,)](
        sums, norm_1, norm_2, norm_3, dmagnitude_1, dmagnitude_2, dmagnitude_3, chunks, num_warps=4, num_stages=2,
    )
