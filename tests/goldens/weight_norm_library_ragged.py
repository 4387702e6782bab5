"""Row norm of W + sBA without BA: the products are the library's, a kernel adds their row dots.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4304/d_in=1152/rank=24/weight=bf16/adapter=bf16/magnitude=fp32/save@h200
config  library:block_m=8,block_n=32,gram_split=2,split_k=1,num_warps=4,num_stages=2

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
    RANK: tl.constexpr = 24
    ELEMENTS: tl.constexpr = 576
    SHARES: tl.constexpr = 2
    BLOCK: tl.constexpr = 512
    DIAGONAL: tl.constexpr = 128
    EXPONENT_BITS: tl.constexpr = 0x7F800000
    LEAST_TRACE: tl.constexpr = 2.0**-100

    diagonal = tl.full((DIAGONAL,), 0.0, tl.float32)
    for first in range(0, RANK, DIAGONAL):
        n = first + tl.arange(0, DIAGONAL)
        trace_ptrs = gram_shares_ptr + n * (RANK + 1)
        for _ in range(0, SHARES):
            diagonal += tl.load(trace_ptrs, mask=n < RANK, other=0.0)
            trace_ptrs += ELEMENTS
    trace = tl.maximum(tl.sum(diagonal, axis=0), LEAST_TRACE)
    unit = (trace.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True) / 2.0**14
    if tl.program_id(0) == 0:
        tl.store(unit_ptr, unit)

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_gram = i < ELEMENTS
    gram = tl.full((BLOCK,), 0.0, tl.float32)
    share_ptrs = gram_shares_ptr + i
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs, mask=in_gram, other=0.0)
        share_ptrs += ELEMENTS
    gram /= unit
    high = gram.to(tl.bfloat16)
    low = (gram - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(gram_ptr + i, high, mask=in_gram)
    tl.store(gram_ptr + ELEMENTS + i, low, mask=in_gram)


@triton.jit
def assemble_kernel(
    weight_ptr: "*bf16",
    weight_stride: "i64",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    wa_ptr: "*fp32",
    bg_ptr: "*fp32",
    unit_ptr: "*fp32",
    magnitude_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    weight_sq_ptr: "*fp32",
    scaling: "fp32",
):
    """Dot the rows of B with those of W @ A.T and B @ G for BLOCK_M rows, add them to rowsum(W*W) and take the root."""
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 8
    BLOCK_N: tl.constexpr = 32
    WA_SHARES: tl.constexpr = 1
    WA_COLS: tl.constexpr = 24
    BG_COLS: tl.constexpr = 48
    D_IN: tl.constexpr = 1152
    COLS: tl.constexpr = 512
    EPS: tl.constexpr = 1e-12

    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cross = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    gram = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < RANK
        b = tl.load(lora_b_ptr + rows[:, None] * lora_b_stride + n[None, :], mask=in_n[None, :], other=0.0).to(tl.float32)
        wa = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        wa_ptrs = wa_ptr + rows[:, None] * WA_COLS + n[None, :]
        for _ in range(0, WA_SHARES):
            wa += tl.load(wa_ptrs, mask=in_n[None, :], other=0.0)
            wa_ptrs += D_OUT * WA_COLS
        cross += b * wa
        bg_ptrs = bg_ptr + rows[:, None] * BG_COLS + n[None, :]
        bg = tl.load(bg_ptrs, mask=in_n[None, :], other=0.0) + tl.load(bg_ptrs + RANK, mask=in_n[None, :], other=0.0)
        gram += b * bg

    cols = tl.arange(0, COLS)
    w_ptrs = weight_ptr + rows[:, None] * weight_stride + cols[None, :]
    squares = tl.full((BLOCK_M, COLS), 0.0, tl.float32)
    for start in range(0, D_IN, COLS):
        w = tl.load(w_ptrs + start, mask=(cols < D_IN - start)[None, :], other=0.0).to(tl.float32)
        squares += w * w
    weight_sq = tl.sum(squares, axis=1)
    tl.store(weight_sq_ptr + rows, weight_sq)
    gram_dots = tl.load(unit_ptr) * tl.sum(gram, axis=1)
    dots = 2.0 * tl.sum(cross, axis=1) + scaling * gram_dots
    norm = tl.sqrt(tl.maximum(weight_sq + scaling * dots, 0.0))
    tl.store(norm_ptr + rows, norm)
    magnitude = tl.load(magnitude_ptr + rows).to(tl.float32)
    tl.store(g_ptr + rows, magnitude / tl.maximum(norm, EPS))


@torch.no_grad()
def launch(weight, lora_a, lora_b, magnitude, norm, g, weight_sq, scaling):
    """Fill norm, g, weight_sq [4304] from weight [4304, 1152], lora_a [24, 1152], lora_b [4304, 24]."""
    gram_shares = torch.empty((2, 24, 24), dtype=torch.float32, device=weight.device)
    gram = torch.empty((2 * 24, 24), dtype=weight.dtype, device=weight.device)
    unit = torch.empty((1,), dtype=torch.float32, device=weight.device)
    wa = torch.empty((4304, 24), dtype=torch.float32, device=weight.device)
    bg = torch.empty((4304, 2 * 24), dtype=torch.float32, device=weight.device)
    bf16_product(lora_a, lora_a, gram_shares)
    gram_kernel[(2,)](gram_shares, gram, unit, num_warps=4, num_stages=2)
    bf16_product(weight, lora_a, wa)
    bf16_product(lora_b, gram, bg)  # G is its own transpose
    assemble_kernel[(538,)](
        weight, weight.stride(0), lora_b, lora_b.stride(0), wa, bg, unit, magnitude, norm, g, weight_sq, scaling,
        num_warps=4, num_stages=2,
    )
