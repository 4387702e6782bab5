"""Row norm of W + sBA where the terms of w*w nearly cancel: such rows are added up directly, in fp64.

    w = ||W + s*B@A|| in rows where w*w < (nW + s*s*rowsum(B*B*rowsum(A*A)))/2, else w; g = m / max(w, eps)

spec    weight_norm_exact/d_out=4304/d_in=1152/rank=24/weight=bf16/adapter=fp32/magnitude=fp32/autocast@h200
config  rows:apart=0,block_k=256,block_m=32,block_r=32,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_norm_exact_rows.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def exact_rows_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    weight_sq_ptr: "*fp32",
    norm_ptr: "*fp32",
    magnitude_ptr: "*fp32",
    norm_exact_ptr: "*fp32",
    g_ptr: "*fp32",
    scaling: "fp64",
):
    """Copy the norms of BLOCK_M rows, but for those whose terms nearly cancel; norm_exact may be norm."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 32
    BLOCK_R: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    COLS: tl.constexpr = 256
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_M + lane
    in_m = rows < D_OUT
    norm = tl.load(norm_ptr + rows, mask=in_m, other=0.0)
    weight_sq = tl.load(weight_sq_ptr + rows, mask=in_m, other=0.0)
    # What B @ G * B is added up from: it may be far more than the sum, where rows of A are alike.
    summands = tl.full((BLOCK_M,), 0.0, tl.float32)
    for first in range(0, RANK, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_r = r < RANK
        cols = tl.arange(0, COLS)
        squares = tl.full((BLOCK_R, COLS), 0.0, tl.float32)
        for start in range(0, D_IN, COLS):
            a_part = tl.load(lora_a_ptr + r.to(tl.int64)[:, None] * lora_a_stride + start + cols[None, :], mask=in_r[:, None] & (cols < D_IN - start)[None, :], other=0.0).to(tl.bfloat16).to(tl.float32)
            squares += a_part * a_part
        adapter_squares = tl.sum(squares, axis=1)
        b_part = tl.load(lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0).to(tl.bfloat16).to(tl.float32)
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
                    in_k = k < D_IN - start
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b = tl.load(lora_b_ptr + row * lora_b_stride + first + j).to(tl.bfloat16).to(tl.float64)
                        a = tl.load(lora_a_ptr + (first + j).to(tl.int64)[:, None] * lora_a_stride + start + k[None, :], mask=in_k[None, :], other=0.0).to(tl.bfloat16).to(tl.float64)
                        ba += tl.sum(b[:, None] * a, axis=0)
                    w = tl.load(weight_ptr + row * weight_stride + start + k, mask=in_k, other=0.0).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_exact_ptr + rows, norm, mask=in_m)
    magnitude = tl.load(magnitude_ptr + rows, mask=in_m, other=0.0).to(tl.float32)
    tl.store(g_ptr + rows, magnitude / tl.maximum(norm, EPS), mask=in_m)


def launch(weight, lora_a, lora_b, weight_sq, norm, magnitude, norm_exact, g, scaling):
    """Fill norm_exact, g [4304] from weight [4304, 1152], lora_a [24, 1152], lora_b [4304, 24], weight_sq, norm and magnitude [4304]."""
    exact_rows_kernel[(135,)](
        weight, weight.stride(0), lora_a, lora_a.stride(0), lora_b, lora_b.stride(0),
        weight_sq, norm, magnitude, norm_exact, g, scaling,
        num_warps=4, num_stages=2,
    )
