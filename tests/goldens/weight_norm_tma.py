"""Row norm of W + sBA without BA, tiles moved by the tensor memory accelerator.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=bf16@h200
config  tma:block_k=64,block_m=128,block_n=128,gram_block=64,gram_block_k=64,gram_share=512,overlap=1,rank_tiles=3,split_k=4,num_warps=8,num_stages=3

Emitted by doratune from templates/weight_norm_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def gram_shares_kernel(lora_a_desc: "tensordesc<bf16[64, 64]>", gram_shares_ptr: "*fp32"):
    """Write one [BLOCK, BLOCK] tile of A @ A.T over one share of the columns of A."""
    RANK: tl.constexpr = 384
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    SHARE: tl.constexpr = 512

    tl.extra.cuda.gdc_launch_dependents()
    first_row = tl.program_id(0) * BLOCK
    first_col = tl.program_id(1) * BLOCK
    share = tl.program_id(2)
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        left = lora_a_desc.load([first_row, share * SHARE + start])
        right = lora_a_desc.load([first_col, share * SHARE + start])
        gram = tl.dot(left, right.T, gram)
    rows = (first_row + tl.arange(0, BLOCK))[:, None]
    cols = (first_col + tl.arange(0, BLOCK))[None, :]
    out = share.to(tl.int64) * (RANK * RANK) + rows * RANK + cols
    tl.store(gram_shares_ptr + out, gram)


@triton.jit
def half_gram_kernel(gram_shares_ptr: "*fp32", half_gram_ptr: "*bf16", scaling: "fp32"):
    """Add the shares of A @ A.T in a fixed order and scale by s/2; store what bf16 leaves out behind it."""
    ELEMENTS: tl.constexpr = 147456
    SHARES: tl.constexpr = 8
    BLOCK: tl.constexpr = 512

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs)
        share_ptrs += ELEMENTS
    half_gram = 0.5 * scaling * gram
    high = half_gram.to(tl.bfloat16)
    low = (half_gram - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(half_gram_ptr + i, high)
    tl.store(half_gram_ptr + ELEMENTS + i, low)


@triton.jit
def row_dots_kernel(
    weight_desc: "tensordesc<bf16[128, 64]>",
    lora_a_desc: "tensordesc<bf16[128, 64]>",
    lora_b_desc: "tensordesc<bf16[128, 64]>",
    half_gram_desc: "tensordesc<bf16[128, 64]>",
    lora_b_tile_desc: "tensordesc<bf16[128, 128]>",
    partials_ptr: "*fp32",
):
    """Write sum_n B[:, n] * (W @ A.T + B @ (s/2)G)[:, n] for BLOCK_M rows, 3 x BLOCK_N ranks and one share of the inner sums.

    Descriptors read zeros beyond the edges, so ranks and columns that do not exist add nothing.
    """
    D_OUT: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    RANK_GROUPS: tl.constexpr = 1
    K_STEPS: tl.constexpr = 16
    GRAM_STEPS: tl.constexpr = 2
    SPLIT_K: tl.constexpr = 4

    first_m = (tl.program_id(0) // RANK_GROUPS) * BLOCK_M
    group = tl.program_id(0) % RANK_GROUPS
    first_n = group * (3 * BLOCK_N)
    share = tl.program_id(1)
    first_k = share * (K_STEPS * BLOCK_K)
    first_j = share * (GRAM_STEPS * BLOCK_K)

    acc_0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc_1 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc_2 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        w = weight_desc.load([first_m, first_k + step * BLOCK_K])
        a_0 = lora_a_desc.load([first_n, first_k + step * BLOCK_K])
        acc_0 = tl.dot(w, a_0.T, acc_0)
        a_1 = lora_a_desc.load([first_n + BLOCK_N, first_k + step * BLOCK_K])
        acc_1 = tl.dot(w, a_1.T, acc_1)
        a_2 = lora_a_desc.load([first_n + 2 * BLOCK_N, first_k + step * BLOCK_K])
        acc_2 = tl.dot(w, a_2.T, acc_2)

    tl.extra.cuda.gdc_wait()  # started early: everything above needs nothing from the kernels before
    for step in range(0, 2 * GRAM_STEPS):  # first the high part of half_gram, then the low part
        part = (step // GRAM_STEPS) * RANK
        j = first_j + (step % GRAM_STEPS) * BLOCK_K
        b_part = lora_b_desc.load([first_m, j])
        half_gram_0 = half_gram_desc.load([part + first_n, j])
        acc_0 = tl.dot(b_part, half_gram_0.T, acc_0)
        half_gram_1 = half_gram_desc.load([part + first_n + BLOCK_N, j])
        acc_1 = tl.dot(b_part, half_gram_1.T, acc_1)
        half_gram_2 = half_gram_desc.load([part + first_n + 2 * BLOCK_N, j])
        acc_2 = tl.dot(b_part, half_gram_2.T, acc_2)

    rows = first_m + tl.arange(0, BLOCK_M)
    b_0 = lora_b_tile_desc.load([first_m, first_n]).to(tl.float32)
    dots = tl.sum(acc_0 * b_0, axis=1)
    b_1 = lora_b_tile_desc.load([first_m, first_n + BLOCK_N]).to(tl.float32)
    dots += tl.sum(acc_1 * b_1, axis=1)
    b_2 = lora_b_tile_desc.load([first_m, first_n + 2 * BLOCK_N]).to(tl.float32)
    dots += tl.sum(acc_2 * b_2, axis=1)
    partial = group * SPLIT_K + share
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
    PARTIALS: tl.constexpr = 4

    tl.extra.cuda.gdc_wait()
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
    half_gram = torch.empty((2 * 384, 384), dtype=weight.dtype, device=weight.device)
    partials = torch.empty((4, 4096), dtype=torch.float32, device=weight.device)
    gram_shares_kernel[(6, 6, 8)](
        TensorDescriptor.from_tensor(lora_a, [64, 64]), gram_shares, num_warps=4, num_stages=4
    )
    half_gram_kernel[(288,)](
        gram_shares, half_gram, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
    row_dots_kernel[(32 * 1, 4)](
        TensorDescriptor.from_tensor(weight, [128, 64]),
        TensorDescriptor.from_tensor(lora_a, [128, 64]),
        TensorDescriptor.from_tensor(lora_b, [128, 64]),
        TensorDescriptor.from_tensor(half_gram, [128, 64]),
        TensorDescriptor.from_tensor(lora_b, [128, 128]),
        partials,
        num_warps=8, num_stages=3, launch_pdl=True,
    )
    finish_kernel[(32,)](
        weight_sq, partials, norm, scaling,
        num_warps=4, num_stages=2, launch_pdl=True,
    )
