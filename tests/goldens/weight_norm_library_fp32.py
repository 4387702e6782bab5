"""Row norm of W + sBA without BA: the products are the library's, a kernel adds their row dots.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4096/d_in=4096/rank=384/weight=fp32/adapter=fp32@h200
config  library:block_m=8,block_n=128,gram_split=4,split_k=1,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_norm_library.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def fp32_product_kernel(
    left_ptr: "*fp32",
    left_stride: "i64",
    right_ptr: "*fp32",
    right_stride: "i64",
    result_ptr: "*fp32",
    left_rows: "i32",
    right_rows: "i32",
    cols: "i32",
):
    """Write one [BLOCK, BLOCK] tile of left @ right.T over one share of `cols` columns."""
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32

    tiles = tl.cdiv(right_rows, BLOCK)
    i = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    in_i = (i < left_rows)[:, None]
    in_j = (j < right_rows)[None, :]
    left_ptrs = left_ptr + i[:, None] * left_stride + share * cols + k[None, :]
    right_ptrs = right_ptr + j[None, :] * right_stride + share * cols + k[:, None]
    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, cols, BLOCK_K):
        in_k = k < cols - start
        left = tl.load(left_ptrs + start, mask=in_i & in_k[None, :], other=0.0)
        right = tl.load(right_ptrs + start, mask=in_j & in_k[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
    tl.store(result_ptr + (share * left_rows + i)[:, None] * right_rows + j[None, :], acc, mask=in_i & in_j)


def fp32_product(left, right, result):
    """Fill result with left @ right.T in fp32; a result of three axes has equal shares of the columns apart."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # the library would keep 11 bits of each operand
        left_rows, right_rows = result.shape[-2:]
        shares = result.numel() // (left_rows * right_rows)
        fp32_product_kernel[(triton.cdiv(left_rows, 64) * triton.cdiv(right_rows, 64), shares)](
            left, left.stride(0), right, right.stride(0), result, left_rows, right_rows, left.shape[1] // shares,
            num_warps=8, num_stages=2,
        )
        return
    if result.ndim == 3:
        left, right = (matrix.unflatten(1, (len(result), -1)).transpose(0, 1) for matrix in (left, right))
        torch.bmm(left, right.mT, out=result)
        return
    torch.mm(left[:, :1024], right[:, :1024].T, out=result)
    for start in range(1024, left.shape[1], 1024):  # rounded one after another, 4096 terms would be off by 1e-6
        result.addmm_(left[:, start : start + 1024], right[:, start : start + 1024].T)


@triton.jit
def gram_kernel(gram_shares_ptr: "*fp32", gram_ptr: "*fp32"):
    """Add the shares of G = A @ A.T in a fixed order."""
    ELEMENTS: tl.constexpr = 147456
    SHARES: tl.constexpr = 4
    BLOCK: tl.constexpr = 512

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs)
        share_ptrs += ELEMENTS
    tl.store(gram_ptr + i, gram)


@triton.jit
def assemble_kernel(
    weight_sq_ptr: "*fp32",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    wa_ptr: "*fp32",
    bg_ptr: "*fp32",
    norm_ptr: "*fp32",
    scaling: "fp32",
):
    """Dot the rows of B with those of W @ A.T and B @ G for BLOCK_M rows, add them to rowsum(W*W) and take the root."""
    D_OUT: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 8
    BLOCK_N: tl.constexpr = 128
    WA_SHARES: tl.constexpr = 1
    WA_COLS: tl.constexpr = 384

    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cross = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    gram = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        b = tl.load(lora_b_ptr + rows[:, None] * lora_b_stride + n[None, :]).to(tl.float32)
        wa = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        wa_ptrs = wa_ptr + rows[:, None] * WA_COLS + n[None, :]
        for _ in range(0, WA_SHARES):
            wa += tl.load(wa_ptrs)
            wa_ptrs += D_OUT * WA_COLS
        cross += b * wa
        bg = tl.load(bg_ptr + rows[:, None] * RANK + n[None, :])
        gram += b * bg

    weight_sq = tl.load(weight_sq_ptr + rows)
    gram_dots = tl.sum(gram, axis=1)
    dots = 2.0 * tl.sum(cross, axis=1) + scaling * gram_dots
    norm = tl.sqrt(tl.maximum(weight_sq + scaling * dots, 0.0))
    tl.store(norm_ptr + rows, norm)


@torch.no_grad()
def launch(weight, lora_a, lora_b, weight_sq, norm, scaling):
    """Fill norm [4096] from weight [4096, 4096], lora_a [384, 4096], lora_b [4096, 384]."""
    gram_shares = torch.empty((4, 384, 384), dtype=torch.float32, device=weight.device)
    gram = torch.empty((384, 384), dtype=torch.float32, device=weight.device)
    wa = torch.empty((4096, 384), dtype=torch.float32, device=weight.device)
    bg = torch.empty((4096, 384), dtype=torch.float32, device=weight.device)
    fp32_product(lora_a, lora_a, gram_shares)
    gram_kernel[(288,)](gram_shares, gram, num_warps=4, num_stages=2)
    fp32_product(weight, lora_a, wa)
    fp32_product(lora_b, gram, bg)  # G is its own transpose
    assemble_kernel[(512,)](
        weight_sq, lora_b, lora_b.stride(0), wa, bg, norm, scaling,
        num_warps=4, num_stages=2,
    )
