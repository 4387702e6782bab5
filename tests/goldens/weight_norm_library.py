"""Row norm of W + sBA without BA: the products are the library's, a kernel adds their row dots.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=bf16@h200
config  library:block_m=8,block_n=128,gram_split=4,split_k=1,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_norm_library.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


def bf16_product(left, right, result):
    """Fill result with left @ right.T in fp32; a result of three axes has equal shares of the columns apart."""
    multiply = torch.mm
    if result.ndim == 3:
        left, right = (matrix.unflatten(1, (len(result), -1)).transpose(0, 1) for matrix in (left, right))
        multiply = torch.bmm
    if left.is_cuda:
        multiply(left, right.mT, out_dtype=torch.float32, out=result)
    else:  # on a CPU there is no out_dtype
        multiply(left.float(), right.mT.float(), out=result)


@triton.jit
def gram_kernel(gram_shares_ptr: "*fp32", gram_ptr: "*bf16", unit_ptr: "*fp32"):
    """Add the shares of G = A @ A.T in a fixed order; write G in units that bf16 holds, what it leaves out behind.

    No element of G exceeds its trace. The unit is the power of two that puts the trace between 2**14 and 2**15: far
    from bf16's largest value, and small elements keep their digits.
    """
    RANK: tl.constexpr = 384
    ELEMENTS: tl.constexpr = 147456
    SHARES: tl.constexpr = 4
    BLOCK: tl.constexpr = 512
    DIAGONAL: tl.constexpr = 128
    EXPONENT_BITS: tl.constexpr = 0x7F800000
    LEAST_TRACE: tl.constexpr = 2.0**-100

    diagonal = tl.full((DIAGONAL,), 0.0, tl.float32)
    for first in range(0, RANK, DIAGONAL):
        n = first + tl.arange(0, DIAGONAL)
        trace_ptrs = gram_shares_ptr + n * (RANK + 1)
        for _ in range(0, SHARES):
            diagonal += tl.load(trace_ptrs)
            trace_ptrs += ELEMENTS
    trace = tl.maximum(tl.sum(diagonal, axis=0), LEAST_TRACE)
    unit = (trace.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True) / 2.0**14
    if tl.program_id(0) == 0:
        tl.store(unit_ptr, unit)

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs)
        share_ptrs += ELEMENTS
    gram /= unit
    high = gram.to(tl.bfloat16)
    low = (gram - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(gram_ptr + i, high)
    tl.store(gram_ptr + ELEMENTS + i, low)


@triton.jit
def assemble_kernel(
    weight_sq_ptr: "*fp32",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    wa_ptr: "*fp32",
    bg_ptr: "*fp32",
    unit_ptr: "*fp32",
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
    BG_COLS: tl.constexpr = 768

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
        bg_ptrs = bg_ptr + rows[:, None] * BG_COLS + n[None, :]
        bg = tl.load(bg_ptrs) + tl.load(bg_ptrs + RANK)
        gram += b * bg

    weight_sq = tl.load(weight_sq_ptr + rows)
    gram_dots = tl.load(unit_ptr) * tl.sum(gram, axis=1)
    dots = 2.0 * tl.sum(cross, axis=1) + scaling * gram_dots
    norm = tl.sqrt(tl.maximum(weight_sq + scaling * dots, 0.0))
    tl.store(norm_ptr + rows, norm)


@torch.no_grad()
def launch(weight, lora_a, lora_b, weight_sq, norm, scaling):
    """Fill norm [4096] from weight [4096, 4096], lora_a [384, 4096], lora_b [4096, 384]."""
    gram_shares = torch.empty((4, 384, 384), dtype=torch.float32, device=weight.device)
    gram = torch.empty((2 * 384, 384), dtype=weight.dtype, device=weight.device)
    unit = torch.empty((1,), dtype=torch.float32, device=weight.device)
    wa = torch.empty((4096, 384), dtype=torch.float32, device=weight.device)
    bg = torch.empty((4096, 2 * 384), dtype=torch.float32, device=weight.device)
    bf16_product(lora_a, lora_a, gram_shares)
    gram_kernel[(288,)](gram_shares, gram, unit, num_warps=4, num_stages=2)
    bf16_product(weight, lora_a, wa)
    bf16_product(lora_b, gram, bg)  # G is its own transpose
    assemble_kernel[(512,)](
        weight_sq, lora_b, lora_b.stride(0), wa, bg, unit, norm, scaling,
        num_warps=4, num_stages=2,
    )
