"""Row norm of W + sBA without BA: the product W @ A.T is folded into row sums as it is made.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=bf16@h200
config  fused:block_k=64,block_m=128,block_n=128,gram_block=64,gram_block_k=64,gram_share=512,split_k=2,num_warps=8,num_stages=4

Emitted by doratune from templates/weight_norm_fused.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def gram_shares_kernel(lora_a_ptr: "*bf16", lora_a_stride: "i64", gram_shares_ptr: "*fp32"):
    """Write one [BLOCK, BLOCK] tile of A @ A.T over one share of the columns of A."""
    RANK: tl.constexpr = 384
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    SHARE: tl.constexpr = 512

    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.program_id(2)
    k = share * SHARE + tl.arange(0, BLOCK_K)
    row_ptrs = lora_a_ptr + rows.to(tl.int64)[:, None] * lora_a_stride + k[None, :]
    col_ptrs = lora_a_ptr + cols.to(tl.int64)[None, :] * lora_a_stride + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        left = tl.load(row_ptrs + start)
        right = tl.load(col_ptrs + start)
        gram = tl.dot(left, right, gram)
    out = share.to(tl.int64) * (RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    tl.store(gram_shares_ptr + out, gram)


@triton.jit
def half_gram_kernel(gram_shares_ptr: "*fp32", half_gram_ptr: "*fp32", scaling: "fp32"):
    """Add the shares of A @ A.T in a fixed order and scale by s/2."""
    ELEMENTS: tl.constexpr = 147456
    SHARES: tl.constexpr = 8
    BLOCK: tl.constexpr = 512

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs)
        share_ptrs += ELEMENTS
    half_gram = 0.5 * scaling * gram
    tl.store(half_gram_ptr + i, half_gram)


@triton.jit
def row_dots_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    lora_a_ptr: "*bf16",
    lora_a_stride: "i64",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    half_gram_ptr: "*fp32",
    partials_ptr: "*fp32",
):
    """Write sum_n B[:, n] * (W @ A.T + B @ (s/2)G)[:, n] for BLOCK_M rows, BLOCK_N ranks and one share of the inner sums."""
    D_OUT: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    RANK_TILES: tl.constexpr = 3
    K_STEPS: tl.constexpr = 32
    GRAM_STEPS: tl.constexpr = 3
    SPLIT_K: tl.constexpr = 2

    tile_m = tl.program_id(0) // RANK_TILES
    tile_n = tl.program_id(0) % RANK_TILES
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    k = share * (K_STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    j = share * (GRAM_STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)

    w_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + k[None, :]
    a_ptrs = lora_a_ptr + n.to(tl.int64)[None, :] * lora_a_stride + k[:, None]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        w = tl.load(w_ptrs + step * BLOCK_K)
        a = tl.load(a_ptrs + step * BLOCK_K)
        acc = tl.dot(w, a, acc)

    b_rows = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride
    b_ptrs = b_rows + j[None, :]
    gram_ptrs = half_gram_ptr + n[None, :] + j[:, None] * RANK
    for step in range(0, GRAM_STEPS):
        b_part = tl.load(b_ptrs + step * BLOCK_K)
        half_gram = tl.load(gram_ptrs + step * (BLOCK_K * RANK))
        half_gram_high = half_gram.to(tl.bfloat16)
        half_gram_low = (half_gram - half_gram_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(b_part, half_gram_high, acc)
        acc = tl.dot(b_part, half_gram_low, acc)

    b = tl.load(b_rows + n[None, :])
    dots = tl.sum(acc * b.to(tl.float32), axis=1)
    partial = tile_n * SPLIT_K + share
    tl.store(partials_ptr + partial.to(tl.int64) * D_OUT + rows, dots)


@triton.jit
def finish_kernel(
    weight_sq_ptr: "*fp32",
    partials_ptr: "*fp32",
    norm_ptr: "*fp32",
    scaling: "fp32",
):
    """Add the partial sums of ROWS rows in a fixed order to rowsum(W*W) and take the root."""
    D_OUT: tl.constexpr = 4096
    ROWS: tl.constexpr = 128
    PARTIALS: tl.constexpr = 6

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight_sq = tl.load(weight_sq_ptr + rows)
    dots = tl.full((ROWS,), 0.0, tl.float32)
    partial_ptrs = partials_ptr + rows
    for _ in range(0, PARTIALS):
        dots += tl.load(partial_ptrs)
        partial_ptrs += D_OUT
    norm = tl.sqrt(tl.maximum(weight_sq + (2.0 * scaling) * dots, 0.0))
    tl.store(norm_ptr + rows, norm)


def launch(weight, lora_a, lora_b, weight_sq, norm, scaling):
    """Fill norm [4096] from weight [4096, 4096], lora_a [384, 4096], lora_b [4096, 384]."""
    gram_shares = torch.empty((8, 384, 384), dtype=torch.float32, device=weight.device)
    half_gram = torch.empty((384, 384), dtype=torch.float32, device=weight.device)
    partials = torch.empty((6, 4096), dtype=torch.float32, device=weight.device)
    gram_shares_kernel[(6, 6, 8)](lora_a, lora_a.stride(0), gram_shares, num_warps=4, num_stages=3)
    half_gram_kernel[(288,)](gram_shares, half_gram, scaling, num_warps=4, num_stages=2)
    row_dots_kernel[(32 * 3, 2)](
        weight, weight.stride(0), lora_a, lora_a.stride(0), lora_b, lora_b.stride(0), half_gram, partials,
        num_warps=8, num_stages=4,
    )
    finish_kernel[(32,)](
        weight_sq, partials, norm, scaling,
        num_warps=4, num_stages=2,
    )
