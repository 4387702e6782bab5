"""Row norm of W + sBA where the terms of w*w nearly cancel: such rows are added up directly, in fp64.

    w = ||W + s*B@A|| in rows where w*w < (nW + s*s*rowsum(B*B*rowsum(A*A)))/2, else w; g = m / max(w, eps)

spec    weight_norm_exact/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=bf16@h200
config  rows:apart=1,block_k=256,block_m=32,block_r=128,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_norm_exact_rows.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def adapter_squares_kernel(lora_a_ptr: "*bf16", lora_a_stride: "i64", adapter_squares_ptr: "*fp32"):
    """Write rowsum(A*A) of one row of A."""
    D_IN: tl.constexpr = 4096
    COLS: tl.constexpr = 1024

    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    squares = tl.full((COLS,), 0.0, tl.float32)
    for start in range(0, D_IN, COLS):
        a = tl.load(lora_a_ptr + row * lora_a_stride + start + cols).to(tl.float32)
        squares += a * a
    tl.store(adapter_squares_ptr + row, tl.sum(squares, axis=0))


@triton.jit
def exact_rows_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    lora_a_ptr: "*bf16",
    lora_a_stride: "i64",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    adapter_squares_ptr: "*fp32",
    weight_sq_ptr: "*fp32",
    norm_ptr: "*fp32",
    norm_exact_ptr: "*fp32",
    scaling: "fp64",
):
    """Copy the norms of BLOCK_M rows, but for those whose terms nearly cancel; norm_exact may be norm."""
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 32
    BLOCK_R: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    LEAST_SHARE: tl.constexpr = 0.5

    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_M + lane
    norm = tl.load(norm_ptr + rows)
    weight_sq = tl.load(weight_sq_ptr + rows)
    # What B @ G * B is added up from: it may be far more than the sum, where rows of A are alike.
    summands = tl.full((BLOCK_M,), 0.0, tl.float32)
    for first in range(0, RANK, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        adapter_squares = tl.load(adapter_squares_ptr + r)
        b_part = tl.load(lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride + r[None, :]).to(tl.float32)
        summands += tl.sum(b_part * b_part * adapter_squares[None, :], axis=1)
    s = tl.full((BLOCK_M,), scaling, tl.float32)
    cancels = (norm * norm < LEAST_SHARE * (weight_sq + s * s * summands)).to(tl.int32)
    if tl.max(cancels, axis=0) > 0:
        j = tl.arange(0, RANKS)
        k = tl.arange(0, BLOCK_K)
        s_wide = tl.full((BLOCK_K,), scaling, tl.float64)
        for i in range(0, BLOCK_M):
            if tl.max(tl.where(lane == i, cancels, 0), axis=0) > 0:
                row = (tl.program_id(0) * BLOCK_M + i).to(tl.int64)
                squared = tl.full((BLOCK_K,), 0.0, tl.float64)
                for start in range(0, D_IN, BLOCK_K):
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b = tl.load(lora_b_ptr + row * lora_b_stride + first + j).to(tl.float64)
                        a = tl.load(lora_a_ptr + (first + j).to(tl.int64)[:, None] * lora_a_stride + start + k[None, :]).to(tl.float64)
                        ba += tl.sum(b[:, None] * a, axis=0)
                    w = tl.load(weight_ptr + row * weight_stride + start + k).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_exact_ptr + rows, norm)


def launch(weight, lora_a, lora_b, weight_sq, norm, norm_exact, scaling):
    """Fill norm_exact [4096] from weight [4096, 4096], lora_a [384, 4096], lora_b [4096, 384], weight_sq and norm [4096]."""
    adapter_squares = torch.empty((384,), dtype=torch.float32, device=weight.device)
    adapter_squares_kernel[(384,)](lora_a, lora_a.stride(0), adapter_squares, num_warps=4, num_stages=2)
    exact_rows_kernel[(128,)](
        weight, weight.stride(0), lora_a, lora_a.stride(0), lora_b, lora_b.stride(0),
        adapter_squares, weight_sq, norm, norm_exact, scaling,
        num_warps=4, num_stages=2,
    )
