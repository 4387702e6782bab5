"""The columns of dg that y cannot give, from x, W, h and B; where there are none, dg is copied.

    dg = sum_t dY*(x@W.T + s*(h@B.T)) in the columns whose g is too small to divide y by, dg elsewhere

spec    compose_backward_exact/d_out=4304/d_in=1152/rank=24/tokens=4096/weight=bf16/activation=bf16/adapter=fp32/magnitude=fp32/autocast@h200
config  tiles:block_k=32,block_n=64,block_t=32,chunk=256,finish_n=256,k_share=128,num_warps=4,num_stages=2

Emitted by doratune from templates/compose_backward_exact_tiles.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    dy_ptr: "*bf16",
    dy_stride: "i64",
    x_ptr: "*bf16",
    x_stride: "i64",
    weight_ptr: "*bf16",
    weight_stride: "i64",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    g_ptr: "*fp32",
    dg_chunks_ptr: "*fp32",
    tokens: "i32",
    scaling: "fp32",
):
    """Write sum_t dY*(x@W.T + s*(h@B.T)) over CHUNK rows of BLOCK_N columns; nothing where every g can be divided by."""
    RANK: tl.constexpr = 24
    D_OUT: tl.constexpr = 4304
    CHUNK: tl.constexpr = 256
    BLOCK_T: tl.constexpr = 32
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32
    RANK_SHARES: tl.constexpr = 1
    IN_SHARES: tl.constexpr = 9
    K_SHARE: tl.constexpr = 128
    N_TILES: tl.constexpr = 68
    SMALLEST_GAIN: tl.constexpr = 2.3283064365386963e-10

    chunk = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < D_OUT
    g = tl.load(g_ptr + n, mask=in_n, other=1.0)
    tiny = (tl.abs(g) >= SMALLEST_GAIN) == 0  # NaN too
    if tl.max(tiny.to(tl.int32), axis=0) > 0:
        k = tl.arange(0, BLOCK_K)
        t = chunk * CHUNK + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
        column = n.to(tl.int64)[None, :]
        sums = tl.full((BLOCK_N,), 0.0, tl.float32)
        for start in range(0, CHUNK, BLOCK_T):
            in_t = (t < tokens - start)[:, None]
            # Tensor cores drop the low bits of a running sum: the shares of a long one are added in fp32.
            inner = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
            for first in range(0, RANK_SHARES * K_SHARE, K_SHARE):
                share = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
                for step in range(first, first + K_SHARE, BLOCK_K):
                    h = tl.load(h_ptr + (row + start) * h_stride + (step + k)[None, :], mask=in_t & (k < RANK - step)[None, :], other=0.0)
                    b = tl.load(lora_b_ptr + column * lora_b_stride + (step + k)[:, None], mask=in_n[None, :] & (k < RANK - step)[:, None], other=0.0).to(tl.bfloat16)
                    share = tl.dot(h, b, share)
                inner += scaling * share
            for first in range(0, IN_SHARES * K_SHARE, K_SHARE):
                share = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
                for step in range(first, first + K_SHARE, BLOCK_K):
                    x = tl.load(x_ptr + (row + start) * x_stride + (step + k)[None, :], mask=in_t, other=0.0)
                    w = tl.load(weight_ptr + column * weight_stride + (step + k)[:, None], mask=in_n[None, :], other=0.0)
                    share = tl.dot(x, w, share)
                inner += share
            dy = tl.load(dy_ptr + (row + start) * dy_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
            sums += tl.sum(dy * inner, axis=0)
        tl.store(dg_chunks_ptr + chunk.to(tl.int64) * D_OUT + n, sums, mask=in_n)


@triton.jit
def choose_columns_kernel(
    dg_chunks_ptr: "*fp32",
    g_ptr: "*fp32",
    dg_ptr: "*fp32",
    norm_ptr: "*fp32",
    dmagnitude_ptr: "*fp32",
    chunks: "i32",
):
    """Take dg, or the chunks' sums in a fixed order where g cannot be divided by, to the gradient of m."""
    D_OUT: tl.constexpr = 4304
    BLOCK_N: tl.constexpr = 256
    SMALLEST_GAIN: tl.constexpr = 2.3283064365386963e-10
    EPS: tl.constexpr = 1e-12

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < D_OUT
    dg = tl.load(dg_ptr + n, mask=in_n, other=0.0)
    g = tl.load(g_ptr + n, mask=in_n, other=1.0)
    tiny = (tl.abs(g) >= SMALLEST_GAIN) == 0  # NaN too
    if tl.max(tiny.to(tl.int32), axis=0) > 0:
        sums = tl.full((BLOCK_N,), 0.0, tl.float32)
        chunk_ptrs = dg_chunks_ptr + n
        for _ in range(0, chunks):  # of columns that nobody summed up nothing is read
            sums += tl.load(chunk_ptrs, mask=tiny, other=0.0)
            chunk_ptrs += D_OUT
        dg = tl.where(tiny, sums, dg)
    norm = tl.load(norm_ptr + n, mask=in_n, other=1.0)
    dmagnitude = dg / tl.maximum(norm, EPS)
    tl.store(dmagnitude_ptr + n, dmagnitude.to(tl.float32), mask=in_n)


def launch(dy, x, weight, h, lora_b, g, dg, norm, dmagnitude, scaling):
    """Fill dmagnitude [4304] from dy [T, 4304], x [T, 1152], weight [4304, 1152], h [T, 24], lora_b [4304, 24], g, dg and norm [4304]."""
    tokens = dy.shape[0]
    chunks = triton.cdiv(tokens, 256)
    dg_chunks = torch.empty((chunks, 4304), dtype=torch.float32, device=dy.device)
    column_sums_kernel[(chunks * 68,)](
        dy, dy.stride(0), x, x.stride(0), weight, weight.stride(0), h, h.stride(0), lora_b, lora_b.stride(0),
        g, dg_chunks, tokens, scaling,
        num_warps=4, num_stages=2,
    )
    choose_columns_kernel[(17,)](dg_chunks, g, dg, norm, dmagnitude, chunks, num_warps=4, num_stages=2)
