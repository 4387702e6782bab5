"""Row norm of W + sBA without BA: the product W @ A.T is folded into row sums as it is made.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4304/d_in=1152/rank=24/weight=bf16/adapter=fp32/magnitude=fp32/save@h200
config  fused:block_k=32,block_m=128,block_n=32,gram_block=32,gram_block_k=32,gram_share=512,split_k=4,num_warps=8,num_stages=2

Emitted by doratune from templates/weight_norm_fused.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def gram_shares_kernel(lora_a_ptr: "*fp32", lora_a_stride: "i64", gram_shares_ptr: "*fp32"):
    """Write one [BLOCK, BLOCK] tile of A @ A.T over one share of the columns of A."""
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    SHARE: tl.constexpr = 512

    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.program_id(2)
    k = share * SHARE + tl.arange(0, BLOCK_K)
    row_ptrs = lora_a_ptr + rows.to(tl.int64)[:, None] * lora_a_stride + k[None, :]
    col_ptrs = lora_a_ptr + cols.to(tl.int64)[None, :] * lora_a_stride + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        left = tl.load(row_ptrs + start, mask=(rows < RANK)[:, None] & (k < D_IN - start)[None, :], other=0.0)
        right = tl.load(col_ptrs + start, mask=(cols < RANK)[None, :] & (k < D_IN - start)[:, None], other=0.0)
        gram = tl.dot(left, right, gram, input_precision="tf32x3")
    out = share.to(tl.int64) * (RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    tl.store(gram_shares_ptr + out, gram, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])


@triton.jit
def half_gram_kernel(gram_shares_ptr: "*fp32", half_gram_ptr: "*fp32", scaling: "fp32"):
    """Add the shares of A @ A.T in a fixed order and scale by s/2."""
    ELEMENTS: tl.constexpr = 576
    SHARES: tl.constexpr = 3
    BLOCK: tl.constexpr = 512

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_gram = i < ELEMENTS
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs, mask=in_gram, other=0.0)
        share_ptrs += ELEMENTS
    half_gram = 0.5 * scaling * gram
    tl.store(half_gram_ptr + i, half_gram, mask=in_gram)


@triton.jit
def row_dots_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    half_gram_ptr: "*fp32",
    partials_ptr: "*fp32",
):
    """Write sum_n B[:, n] * (W @ A.T + B @ (s/2)G)[:, n] for BLOCK_M rows, BLOCK_N ranks and one share of the inner sums."""
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    RANK_TILES: tl.constexpr = 1
    K_STEPS: tl.constexpr = 9
    GRAM_STEPS: tl.constexpr = 1
    SPLIT_K: tl.constexpr = 4

    tile_m = tl.program_id(0) // RANK_TILES
    tile_n = tl.program_id(0) % RANK_TILES
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    k = share * (K_STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    j = share * (GRAM_STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    in_m = (rows < D_OUT)[:, None]
    in_n = n < RANK

    w_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + k[None, :]
    a_ptrs = lora_a_ptr + n.to(tl.int64)[None, :] * lora_a_stride + k[:, None]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        w = tl.load(w_ptrs + step * BLOCK_K, mask=in_m, other=0.0)
        a = tl.load(a_ptrs + step * BLOCK_K, mask=in_n[None, :], other=0.0)
        a_high = a.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(w, a_high, acc)
        acc = tl.dot(w, a_low, acc)

    b_rows = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride
    b_ptrs = b_rows + j[None, :]
    gram_ptrs = half_gram_ptr + n[None, :] + j[:, None] * RANK
    for step in range(0, GRAM_STEPS):
        in_j = j < RANK - step * BLOCK_K
        b_part = tl.load(b_ptrs + step * BLOCK_K, mask=in_m & in_j[None, :], other=0.0)
        half_gram = tl.load(gram_ptrs + step * (BLOCK_K * RANK), mask=in_n[None, :] & in_j[:, None], other=0.0)
        b_wide = b_part.to(tl.float32)
        acc = tl.dot(b_wide, half_gram, acc, input_precision="tf32x3")

    b = tl.load(b_rows + n[None, :], mask=in_m & in_n[None, :], other=0.0)
    dots = tl.sum(acc * b.to(tl.float32), axis=1)
    partial = tile_n * SPLIT_K + share
    tl.store(partials_ptr + partial.to(tl.int64) * D_OUT + rows, dots, mask=rows < D_OUT)


@triton.jit
def finish_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    partials_ptr: "*fp32",
    magnitude_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    weight_sq_ptr: "*fp32",
    scaling: "fp32",
):
    """Add the partial sums of ROWS rows in a fixed order to rowsum(W*W) and take the root."""
    D_OUT: tl.constexpr = 4304
    ROWS: tl.constexpr = 8
    PARTIALS: tl.constexpr = 4
    D_IN: tl.constexpr = 1152
    COLS: tl.constexpr = 512
    EPS: tl.constexpr = 1e-12

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    w_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + cols[None, :]
    squares = tl.full((ROWS, COLS), 0.0, tl.float32)
    for start in range(0, D_IN, COLS):
        w = tl.load(w_ptrs + start, mask=(cols < D_IN - start)[None, :], other=0.0).to(tl.float32)
        squares += w * w
    weight_sq = tl.sum(squares, axis=1)
    tl.store(weight_sq_ptr + rows, weight_sq)
    dots = tl.full((ROWS,), 0.0, tl.float32)
    partial_ptrs = partials_ptr + rows
    for _ in range(0, PARTIALS):
        dots += tl.load(partial_ptrs)
        partial_ptrs += D_OUT
    norm = tl.sqrt(tl.maximum(weight_sq + (2.0 * scaling) * dots, 0.0))
    tl.store(norm_ptr + rows, norm)
    magnitude = tl.load(magnitude_ptr + rows).to(tl.float32)
    tl.store(g_ptr + rows, magnitude / tl.maximum(norm, EPS))


def launch(weight, lora_a, lora_b, magnitude, norm, g, weight_sq, scaling):
    """Fill norm, g, weight_sq [4304] from weight [4304, 1152], lora_a [24, 1152], lora_b [4304, 24]."""
    gram_shares = torch.empty((3, 24, 24), dtype=torch.float32, device=weight.device)
    half_gram = torch.empty((24, 24), dtype=torch.float32, device=weight.device)
    partials = torch.empty((4, 4304), dtype=torch.float32, device=weight.device)
    gram_shares_kernel[(1, 1, 3)](lora_a, lora_a.stride(0), gram_shares, num_warps=4, num_stages=3)
    half_gram_kernel[(2,)](gram_shares, half_gram, scaling, num_warps=4, num_stages=2)
    row_dots_kernel[(34 * 1, 4)](
        weight, weight.stride(0), lora_a, lora_a.stride(0), lora_b, lora_b.stride(0), half_gram, partials,
        num_warps=8, num_stages=2,
    )
    finish_kernel[(538,)](
        weight, weight.stride(0), partials, magnitude, norm, g, weight_sq, scaling,
        num_warps=4, num_stages=2,
    )
