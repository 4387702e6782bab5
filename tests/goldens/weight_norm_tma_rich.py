"""Row norm of W + sBA without BA, tiles moved by the tensor memory accelerator.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4304/d_in=1152/rank=24/weight=bf16/adapter=fp32/magnitude=fp32/save@h200
config  tma:block_k=64,block_m=128,block_n=32,gram_block=32,gram_block_k=64,gram_share=512,overlap=1,rank_tiles=1,split_k=3,num_warps=8,num_stages=3

Emitted by doratune from templates/weight_norm_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def adapter_parts_kernel(
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_a_parts_ptr: "*bf16",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    lora_b_parts_ptr: "*bf16",
):
    """Split fp32 adapters into a high part and, below it, a low part, a [LINES, BLOCK] tile per program."""
    LINES: tl.constexpr = 64
    BLOCK: tl.constexpr = 32

    program = tl.program_id(0)
    if program < 36:
        LORA_A_ROWS: tl.constexpr = 24
        LORA_A_COLS: tl.constexpr = 1152
        LORA_A_COL_TILES: tl.constexpr = 36
        tile = program
        row = tile // LORA_A_COL_TILES * LINES + tl.arange(0, LINES)
        col = tile % LORA_A_COL_TILES * BLOCK + tl.arange(0, BLOCK)
        exact = tl.load(lora_a_ptr + row.to(tl.int64)[:, None] * lora_a_stride + col[None, :], mask=(row < LORA_A_ROWS)[:, None], other=0.0)
        parts = lora_a_parts_ptr + row.to(tl.int64)[:, None] * LORA_A_COLS + col[None, :]
        high = exact.to(tl.bfloat16)
        tl.store(parts, high, mask=(row < LORA_A_ROWS)[:, None])
        low = (exact - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(parts + LORA_A_ROWS * LORA_A_COLS, low, mask=(row < LORA_A_ROWS)[:, None])
    else:
        LORA_B_ROWS: tl.constexpr = 4304
        LORA_B_COLS: tl.constexpr = 24
        LORA_B_COL_TILES: tl.constexpr = 1
        tile = program - 36
        row = tile // LORA_B_COL_TILES * LINES + tl.arange(0, LINES)
        col = tile % LORA_B_COL_TILES * BLOCK + tl.arange(0, BLOCK)
        exact = tl.load(lora_b_ptr + row.to(tl.int64)[:, None] * lora_b_stride + col[None, :], mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :], other=0.0)
        parts = lora_b_parts_ptr + row.to(tl.int64)[:, None] * LORA_B_COLS + col[None, :]
        high = exact.to(tl.bfloat16)
        tl.store(parts, high, mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :])
        low = (exact - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(parts + LORA_B_ROWS * LORA_B_COLS, low, mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :])


@triton.jit
def gram_shares_kernel(lora_a_desc: "tensordesc<bf16[32, 64]>", gram_shares_ptr: "*fp32"):
    """Write one [BLOCK, BLOCK] tile of A @ A.T over one share of the columns of A."""
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 64
    SHARE: tl.constexpr = 512

    tl.extra.cuda.gdc_launch_dependents()
    first_row = tl.program_id(0) * BLOCK
    first_col = tl.program_id(1) * BLOCK
    share = tl.program_id(2)
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for step in range(0, 3 * SHARE, BLOCK_K):  # low @ high.T, high @ low.T, high @ high.T: the small sums first
        product = step // SHARE
        k = share * SHARE + step % SHARE
        left = lora_a_desc.load([first_row + tl.where(product == 0, RANK, 0), k])
        right = lora_a_desc.load([first_col + tl.where(product == 1, RANK, 0), k])
        gram = tl.dot(left, right.T, gram)
    rows = (first_row + tl.arange(0, BLOCK))[:, None]
    cols = (first_col + tl.arange(0, BLOCK))[None, :]
    out = share.to(tl.int64) * (RANK * RANK) + rows * RANK + cols
    tl.store(gram_shares_ptr + out, gram, mask=(rows < RANK) & (cols < RANK))


@triton.jit
def half_gram_kernel(gram_shares_ptr: "*fp32", half_gram_ptr: "*bf16", scaling: "fp32"):
    """Add the shares of A @ A.T in a fixed order and scale by s/2; store what bf16 leaves out behind it."""
    ELEMENTS: tl.constexpr = 576
    SHARES: tl.constexpr = 3
    BLOCK: tl.constexpr = 512

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_gram = i < ELEMENTS
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs, mask=in_gram, other=0.0)
        share_ptrs += ELEMENTS
    half_gram = 0.5 * scaling * gram
    high = half_gram.to(tl.bfloat16)
    low = (half_gram - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(half_gram_ptr + i, high, mask=in_gram)
    tl.store(half_gram_ptr + ELEMENTS + i, low, mask=in_gram)


@triton.jit
def row_dots_kernel(
    weight_desc: "tensordesc<bf16[128, 64]>",
    lora_a_desc: "tensordesc<bf16[32, 64]>",
    lora_b_desc: "tensordesc<bf16[128, 64]>",
    half_gram_desc: "tensordesc<bf16[32, 64]>",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    partials_ptr: "*fp32",
):
    """Write sum_n B[:, n] * (W @ A.T + B @ (s/2)G)[:, n] for BLOCK_M rows, 1 x BLOCK_N ranks and one share of the inner sums.

    Descriptors read zeros beyond the edges, so ranks and columns that do not exist add nothing.
    """
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 64
    RANK_GROUPS: tl.constexpr = 1
    K_STEPS: tl.constexpr = 6
    GRAM_STEPS: tl.constexpr = 1
    SPLIT_K: tl.constexpr = 3

    first_m = (tl.program_id(0) // RANK_GROUPS) * BLOCK_M
    group = tl.program_id(0) % RANK_GROUPS
    first_n = group * BLOCK_N
    share = tl.program_id(1)
    first_k = share * (K_STEPS * BLOCK_K)
    first_j = share * (GRAM_STEPS * BLOCK_K)

    acc_0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, 2 * K_STEPS):  # each tile of W meets the high part of A and, out of the L2, the low part
        k = first_k + (step // 2) * BLOCK_K
        part = (step % 2) * RANK
        w = weight_desc.load([first_m, k])
        a_0 = lora_a_desc.load([part + first_n, k])
        acc_0 = tl.dot(w, a_0.T, acc_0)

    tl.extra.cuda.gdc_wait()  # started early: everything above needs nothing from the kernels before
    for step in range(0, 3 * GRAM_STEPS):  # B's low part with half_gram's high one, high with low, high with high
        part = tl.where(step // GRAM_STEPS == 1, RANK, 0)
        b_row = first_m + tl.where(step // GRAM_STEPS == 0, D_OUT, 0)
        j = first_j + (step % GRAM_STEPS) * BLOCK_K
        b_part = lora_b_desc.load([b_row, j])
        half_gram_0 = half_gram_desc.load([part + first_n, j])
        acc_0 = tl.dot(b_part, half_gram_0.T, acc_0)

    rows = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    b_ptrs = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride + n[None, :]
    b_0 = tl.load(b_ptrs, mask=(rows < D_OUT)[:, None] & (n < RANK)[None, :], other=0.0)
    dots = tl.sum(acc_0 * b_0, axis=1)
    partial = group * SPLIT_K + share
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
    PARTIALS: tl.constexpr = 3
    D_IN: tl.constexpr = 1152
    COLS: tl.constexpr = 512
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
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
    half_gram = torch.empty((2 * 24, 24), dtype=weight.dtype, device=weight.device)
    partials = torch.empty((3, 4304), dtype=torch.float32, device=weight.device)
    lora_a_parts = torch.empty((48, 1152), dtype=weight.dtype, device=weight.device)
    lora_b_parts = torch.empty((8608, 24), dtype=weight.dtype, device=weight.device)
    adapter_parts_kernel[(104,)](
        lora_a, lora_a.stride(0), lora_a_parts, lora_b, lora_b.stride(0), lora_b_parts, num_warps=4, num_stages=2
    )
    gram_shares_kernel[(1, 1, 3)](
        TensorDescriptor.from_tensor(lora_a_parts, [32, 64]), gram_shares, num_warps=4, num_stages=4
    )
    half_gram_kernel[(2,)](
        gram_shares, half_gram, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
    row_dots_kernel[(34 * 1, 3)](
        TensorDescriptor.from_tensor(weight, [128, 64]),
        TensorDescriptor.from_tensor(lora_a_parts, [32, 64]),
        TensorDescriptor.from_tensor(lora_b_parts, [128, 64]),
        TensorDescriptor.from_tensor(half_gram, [32, 64]),
        lora_b, lora_b.stride(0),
        partials,
        num_warps=8, num_stages=3, launch_pdl=True,
    )
    finish_kernel[(538,)](
        weight, weight.stride(0), partials, magnitude, norm, g, weight_sq, scaling,
        num_warps=4, num_stages=2, launch_pdl=True,
    )
