"""Row norm of W + sBA, W decoded in registers from the words that it is stored in.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4304/d_in=1152/rank=24/weight=nf4.nested/adapter=fp32/magnitude=fp32/save@h200
config  packed:block_k=32,block_m=64,block_n=32,finish_ranks=32,finish_rows=32,gram_block=32,gram_block_k=32,gram_split=8,overlap=1,rank_tiles=1,split_k=4,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_norm_packed.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def table_of_lane():
    """The value of code l mod 16 in lane l of each warp: a table in one register."""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1) % 16
    table = -1.0
    table = tl.where(lane == 1, -0.6961928009986877, table)
    table = tl.where(lane == 2, -0.5250730514526367, table)
    table = tl.where(lane == 3, -0.39491748809814453, table)
    table = tl.where(lane == 4, -0.28444138169288635, table)
    table = tl.where(lane == 5, -0.18477343022823334, table)
    table = tl.where(lane == 6, -0.09105003625154495, table)
    table = tl.where(lane == 7, 0.0, table)
    table = tl.where(lane == 8, 0.07958029955625534, table)
    table = tl.where(lane == 9, 0.16093020141124725, table)
    table = tl.where(lane == 10, 0.24611230194568634, table)
    table = tl.where(lane == 11, 0.33791524171829224, table)
    table = tl.where(lane == 12, 0.44070982933044434, table)
    table = tl.where(lane == 13, 0.5626170039176941, table)
    table = tl.where(lane == 14, 0.7229568362236023, table)
    table = tl.where(lane == 15, 1.0, table)
    return table


@triton.jit
def value_of(codes, table):
    """The values of the codes in the lowest four bits, each from the lane that has it: one shuffle."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff; // nf4", "=f,f,r", [table, codes], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def product(value, outer):
    """value*outer, rounded before the offset is added, as bitsandbytes does. The compiler would fuse the two, and a scale that differs in its last bit rounds some of W otherwise."""
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [value, outer], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded(first, second):
    """Both values rounded to bf16, in fp32."""
    pair = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def gram_kernel(
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    gram_shares_ptr: "*fp32",
    scaling: "fp32",
):
    """Write one tile of s*G = s*A @ A.T over one share of the columns."""
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    STEPS: tl.constexpr = 5

    tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    k = tl.program_id(1) * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    row_ptrs = lora_a_ptr + rows.to(tl.int64)[:, None] * lora_a_stride + k[None, :]
    col_ptrs = lora_a_ptr + cols.to(tl.int64)[None, :] * lora_a_stride + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for step in range(0, STEPS):
        left = tl.load(row_ptrs + step * BLOCK_K, mask=(rows < RANK)[:, None] & (k < D_IN - step * BLOCK_K)[None, :], other=0.0)
        right = tl.load(col_ptrs + step * BLOCK_K, mask=(cols < RANK)[None, :] & (k < D_IN - step * BLOCK_K)[:, None], other=0.0)
        product = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        product = tl.dot(left, right, product, input_precision="tf32x3")
        gram += scaling * product
    share = tl.program_id(1).to(tl.int64) * (RANK * RANK)
    tl.store(gram_shares_ptr + share + rows[:, None] * RANK + cols[None, :], gram, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])


@triton.jit
def gram_sum_kernel(gram_shares_ptr: "*fp32", gram_ptr: "*fp32", adapter_squares_ptr: "*fp32"):
    """Add the shares of one tile of s*G in a fixed order; write it, and s*rowsum(A*A) from its diagonal."""
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    SHARES: tl.constexpr = 8

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    share_ptrs = gram_shares_ptr + rows[:, None] * RANK + cols[None, :]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :], other=0.0)
        share_ptrs += RANK * RANK
    there = rows[:, None] * RANK + cols[None, :]
    tl.store(gram_ptr + there, gram, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])
    diagonal = tl.sum(tl.where(rows[:, None] == cols[None, :], gram, 0.0), axis=1)
    tl.store(adapter_squares_ptr + rows, diagonal, mask=(rows < RANK))


@triton.jit
def sums_kernel(
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    sums_ptr: "*fp32",
    scaling: "fp32",
):
    """Write rowsum(W*W) and s*rowsum(B * W@A.T) of BLOCK_M rows, over BLOCK_N ranks and one share of the columns."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    BLOCK_W: tl.constexpr = 4
    K_STEPS: tl.constexpr = 9

    tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(1)
    word = share * (K_STEPS * BLOCK_W) + tl.arange(0, BLOCK_W)
    k = word * 8
    j = share * (K_STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    in_m = rows < D_OUT
    weight_start = weight_ptr
    scales_start = scales_ptr
    scale_table_start = scale_table_ptr
    outer_scales_start = outer_scales_ptr
    scale_offset_start = scale_offset_ptr
    scale_offset = tl.load(scale_offset_start)
    table = table_of_lane()
    word_start = weight_start.to(tl.pointer_type(tl.int32), bitcast=True)
    word_ptrs = word_start + rows.to(tl.int64)[:, None] * (D_IN // 8) + word[None, :]
    scale_rows = rows * (D_IN // 64)
    a_ptrs = lora_a_ptr + n.to(tl.int64)[None, :] * lora_a_stride + j[:, None]
    acc_0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_W), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        words = tl.load(word_ptrs + step * 4, mask=in_m[:, None], other=2004318071)
        number = scale_rows[:, None] + ((k + step * BLOCK_K) // 64)[None, :]
        scale = product(tl.load(scale_table_start + tl.load(scales_start + number, mask=in_m[:, None], other=0.0).to(tl.int32)), tl.load(outer_scales_start + number // 256, mask=in_m[:, None], other=0.0)) + scale_offset
        w_0, w_1 = rounded(value_of(words >> 4, table) * scale, value_of(words, table) * scale)
        squares += w_0 * w_0
        squares += w_1 * w_1
        w_2, w_3 = rounded(value_of(words >> 12, table) * scale, value_of(words >> 8, table) * scale)
        squares += w_2 * w_2
        squares += w_3 * w_3
        w_4, w_5 = rounded(value_of(words >> 20, table) * scale, value_of(words >> 16, table) * scale)
        squares += w_4 * w_4
        squares += w_5 * w_5
        w_6, w_7 = rounded(value_of(words >> 28, table) * scale, value_of(words >> 24, table) * scale)
        squares += w_6 * w_6
        squares += w_7 * w_7
        even = tl.join(tl.join(w_0, w_4), tl.join(w_2, w_6))
        odd = tl.join(tl.join(w_1, w_5), tl.join(w_3, w_7))
        w = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))
        w = w.to(tl.bfloat16)
        a = tl.load(a_ptrs + step * BLOCK_K, mask=(n < RANK)[None, :], other=0.0)
        a_high = a.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        acc_0 = tl.dot(w, a_high, acc_0)
        acc_0 = tl.dot(w, a_low, acc_0)

    b_ptrs = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride + n[None, :]
    b = tl.load(b_ptrs, mask=in_m[:, None] & (n < RANK)[None, :], other=0.0)
    dots = tl.sum(acc_0 * b.to(tl.float32), axis=1)
    dots *= scaling
    squares = tl.sum(squares, axis=1)
    tl.extra.cuda.gdc_wait()  # the last kernel waits for this one only, and reads what those before wrote
    sums = sums_ptr + rows
    tl.store(sums + share.to(tl.int64) * D_OUT, squares, mask=in_m)
    tl.store(sums + 17216 + share.to(tl.int64) * D_OUT, dots, mask=in_m)


@triton.jit
def finish_kernel(
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    magnitude_ptr: "*fp32",
    gram_ptr: "*fp32",
    adapter_squares_ptr: "*fp32",
    sums_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    weight_sq_ptr: "*fp32",
    scaling: "fp64",
):
    """Write w and g of BLOCK_M rows; rows whose terms nearly cancel are added up again in fp64."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 32
    BLOCK_R: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    SHARES: tl.constexpr = 4
    PARTIALS: tl.constexpr = 4
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_M + lane
    in_m = rows < D_OUT
    b_rows = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride
    grams = gram_ptr
    sums = sums_ptr + rows
    weight_sq = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(SHARES):
        weight_sq += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
    cross = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(PARTIALS):
        cross += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT

    # rowsum(B@sG * B); and what it is added up from, which may be far more.
    r = tl.arange(0, BLOCK_R)
    b = tl.load(b_rows + r[None, :], mask=in_m[:, None] & (r < RANK)[None, :], other=0.0)
    acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    gram_ptrs = grams + r[:, None] * RANK + r[None, :]
    gram = tl.load(gram_ptrs, mask=(r < RANK)[:, None] & (r < RANK)[None, :], other=0.0)
    acc = tl.dot(b.to(tl.float32), gram, acc, input_precision="tf32x3")
    b_wide = b.to(tl.float32)
    square = tl.sum(acc * b_wide, axis=1)
    adapter_squares = tl.load(adapter_squares_ptr + r, mask=r < RANK, other=0.0)
    summands = tl.sum(b_wide * b_wide * adapter_squares[None, :], axis=1)
    s = tl.full((BLOCK_M,), scaling, tl.float32)
    norm = tl.sqrt(tl.maximum(weight_sq + 2.0 * cross + s * square, 0.0))

    cancels = (norm * norm < LEAST_SHARE * (weight_sq + s * summands)).to(tl.int32)
    if tl.max(cancels, axis=0) > 0:
        weight_start = weight_ptr
        scales_start = scales_ptr
        scale_table_start = scale_table_ptr
        outer_scales_start = outer_scales_ptr
        scale_offset_start = scale_offset_ptr
        scale_offset = tl.load(scale_offset_start)
        table = table_of_lane()
        rank = tl.arange(0, RANKS)
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
                        b_row = tl.load(lora_b_ptr + row * lora_b_stride + first + rank).to(tl.float64)
                        a = tl.load(lora_a_ptr + (first + rank).to(tl.int64)[:, None] * lora_a_stride + start + k[None, :], mask=in_k[None, :], other=0.0).to(tl.float64)
                        ba += tl.sum(b_row[:, None] * a, axis=0)
                    flat = row * D_IN + start + k
                    w = value_of(tl.load(weight_start + flat // 2, mask=in_k, other=119).to(tl.int32) >> (4 - 4 * (flat % 2)).to(tl.int32), table)
                    number = flat // 64
                    scale = product(tl.load(scale_table_start + tl.load(scales_start + number, mask=in_k, other=0.0).to(tl.int32)), tl.load(outer_scales_start + number // 256, mask=in_k, other=0.0)) + scale_offset
                    w = (w * scale).to(tl.bfloat16).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_ptr + rows, norm, mask=in_m)
    tl.store(weight_sq_ptr + rows, weight_sq, mask=in_m)
    magnitude = tl.load(magnitude_ptr + rows, mask=in_m, other=0.0).to(tl.float32)
    tl.store(g_ptr + rows, magnitude / tl.maximum(norm, EPS), mask=in_m)


def launch(weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, magnitude, norm, g, weight_sq, scaling):
    """Fill norm, g, weight_sq [4304] from W [4304, 1152] (weight, scales, scale_table, outer_scales, scale_offset, flat), lora_a [24, 1152], lora_b [4304, 24]."""
    gram = torch.empty((24, 24), dtype=torch.float32, device=weight.device)
    adapter_squares = torch.empty((24,), dtype=torch.float32, device=weight.device)
    sums = torch.empty((8, 4304), dtype=torch.float32, device=weight.device)
    gram_shares = torch.empty((8, 24, 24), dtype=torch.float32, device=weight.device)
    gram_kernel[(1, 8)](lora_a, lora_a.stride(0), gram_shares, scaling, num_warps=4, num_stages=3)
    gram_sum_kernel[(1,)](gram_shares, gram, adapter_squares, num_warps=4, num_stages=2, launch_pdl=True)
    sums_kernel[(68, 4)](
        weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_a.stride(0), lora_b, lora_b.stride(0), sums, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
    finish_kernel[(135, 1)](
        weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_a.stride(0), lora_b, lora_b.stride(0), magnitude, gram, adapter_squares, sums, norm, g, weight_sq, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
