"""Backward of the DoRA composition: one pass writes dYg and per-chunk column sums, a second adds the chunks.

    dYg = g*dY; dg = sum_t dY*inner with inner = base + s*lora, or y/g (0 where g is tiny); db = sum_t dY

spec    compose_backward/d_out=4304/tokens=4096/activation=bf16/bias@h200
config  columns:block_n=64,block_t=16,chunk=64,reduce_c=16,reduce_n=32,num_warps=1,num_stages=4

Emitted by doratune from templates/compose_backward_columns.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def compose_backward_kernel(
    dy_ptr: "*bf16",
    dy_stride: "i64",
    inner_ptr: "*bf16",
    inner_stride: "i64",
    g_ptr: "*fp32",
    dyg_ptr: "*bf16",
    dyg_stride: "i64",
    dg_chunks_ptr: "*fp32",
    dbias_chunks_ptr: "*fp32",
    tokens: "i32",
):
    """Write dYg for CHUNK rows of BLOCK_N columns, and the sums over those rows; dyg may be the memory of dy."""
    D_OUT: tl.constexpr = 4304
    CHUNK: tl.constexpr = 64
    BLOCK_T: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    N_TILES: tl.constexpr = 68

    chunk = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = chunk * CHUNK + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < D_OUT
    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    dy_ptrs = dy_ptr + row * dy_stride + n[None, :]
    inner_ptrs = inner_ptr + row * inner_stride + n[None, :]
    dyg_ptrs = dyg_ptr + row * dyg_stride + n[None, :]

    dg = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    dbias = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        in_t = (t < tokens - start)[:, None]
        dy = tl.load(dy_ptrs + start * dy_stride, mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        inner = tl.load(inner_ptrs + start * inner_stride, mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        tl.store(dyg_ptrs + start * dyg_stride, (g * dy).to(tl.bfloat16), mask=in_t & in_n[None, :])
        dg += dy * inner
        dbias += dy

    sums = chunk.to(tl.int64) * D_OUT + n
    tl.store(dg_chunks_ptr + sums, tl.sum(dg, axis=0), mask=in_n)
    tl.store(dbias_chunks_ptr + sums, tl.sum(dbias, axis=0), mask=in_n)


@triton.jit
def add_chunks_kernel(
    dg_chunks_ptr: "*fp32",
    dbias_chunks_ptr: "*fp32",
    dg_ptr: "*fp32",
    dbias_ptr: "*fp32",
    chunks: "i32",
):
    """Add the chunks' sums in a fixed order, so that equal inputs give equal bits."""
    D_OUT: tl.constexpr = 4304
    BLOCK_C: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 32

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    in_n = n < D_OUT
    dg = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    dbias = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_C):
        sums = (start + c).to(tl.int64)[:, None] * D_OUT + n[None, :]
        dg += tl.load(dg_chunks_ptr + sums, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
        dbias += tl.load(dbias_chunks_ptr + sums, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
    tl.store(dg_ptr + n, tl.sum(dg, axis=0), mask=in_n)
    tl.store(dbias_ptr + n, tl.sum(dbias, axis=0), mask=in_n)


def launch(dy, inner, g, dyg, dg, dbias):
    """Fill dyg [T, 4304], dg and dbias [4304] from dy and inner [T, 4304], g [4304]."""
    tokens = dy.shape[0]
    chunks = triton.cdiv(tokens, 64)
    dg_chunks = torch.empty((chunks, 4304), dtype=torch.float32, device=dy.device)
    dbias_chunks = torch.empty_like(dg_chunks)
    compose_backward_kernel[(chunks * 68,)](
        dy, dy.stride(0), inner, inner.stride(0), g, dyg, dyg.stride(0), dg_chunks, dbias_chunks, tokens,
        num_warps=1, num_stages=4,
    )
    add_chunks_kernel[(135,)](
        dg_chunks, dbias_chunks, dg, dbias, chunks,
        num_warps=4, num_stages=2,
    )
