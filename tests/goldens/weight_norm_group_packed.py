"""Row norms of W + sBA of many layers, which a table names: each W is decoded in registers from its words.

    for each layer: w = ||W + s*B@A||_row by nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T))); g = m / max(w, eps)

spec    weight_norm_group/d_out=4096/d_in=4096/rank=384/layers=32/weight=nf4.nested/adapter=bf16/magnitude=bf16@h200
config  packed:block_k=64,block_m=128,block_n=64,finish_ranks=64,finish_rows=64,gram_block=64,gram_block_k=64,gram_split=1,overlap=1,rank_tiles=3,split_k=1,num_warps=8,num_stages=3

Emitted by doratune from templates/weight_norm_group_packed.py.j2; edit the template, not this text.
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
    table_ptr: "*i64",
    lora_a_ptr: "*bf16",
    gram_ptr: "*bf16",
    adapter_squares_ptr: "*fp32",
    scaling: "fp32",
):
    """Write one tile of s*G = s*A @ A.T, as a high and a low part; on the diagonal also s*rowsum(A*A)."""
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    TILES: tl.constexpr = 6
    STEPS: tl.constexpr = 64

    tl.extra.cuda.gdc_launch_dependents()
    tile_row = tl.program_id(0) // TILES
    tile_col = tl.program_id(0) % TILES
    rows = tile_row * BLOCK + tl.arange(0, BLOCK)
    cols = tile_col * BLOCK + tl.arange(0, BLOCK)
    layer = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_start = lora_a_ptr + tl.multiple_of(tl.load(table_ptr + layer * 8 + 5), 256)
    row_ptrs = a_start + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    col_ptrs = a_start + cols.to(tl.int64)[None, :] * D_IN + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for step in range(0, STEPS):
        left = tl.load(row_ptrs + step * BLOCK_K)
        right = tl.load(col_ptrs + step * BLOCK_K)
        product = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        product = tl.dot(left, right, product)
        gram += scaling * product
    there = layer * (2 * RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    high = gram.to(tl.bfloat16)
    tl.store(gram_ptr + there, high)
    tl.store(gram_ptr + RANK * RANK + there, (gram - high.to(tl.float32)).to(tl.bfloat16))
    diagonal = tl.sum(tl.where(rows[:, None] == cols[None, :], gram, 0.0), axis=1)
    tl.store(adapter_squares_ptr + layer * RANK + rows, diagonal, mask=(tile_row == tile_col))


@triton.jit
def sums_kernel(
    table_ptr: "*i64",
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_a_ptr: "*bf16",
    lora_b_ptr: "*bf16",
    sums_ptr: "*fp32",
    scaling: "fp32",
):
    """Write rowsum(W*W) and s*rowsum(B * W@A.T) of BLOCK_M rows of one layer, over 3 x BLOCK_N ranks and one share of the columns."""
    D_OUT: tl.constexpr = 4096
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    GROUP: tl.constexpr = 64
    GROUPS: tl.constexpr = 2
    ROW_BLOCKS: tl.constexpr = 32
    K_STEPS: tl.constexpr = 64

    tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    n = group * 192 + tl.arange(0, BLOCK_N)
    layer = (tile // ROW_BLOCKS).to(tl.int64)
    rows = (tile % ROW_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.arange(0, BLOCK_K // GROUP)
    word = groups[:, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, :]
    j = tl.arange(0, BLOCK_K)
    places = table_ptr + layer * 8
    weight_start = weight_ptr + tl.multiple_of(tl.load(places), 512)
    scales_start = scales_ptr + tl.multiple_of(tl.load(places + 1), 512)
    scale_table_start = scale_table_ptr + tl.multiple_of(tl.load(places + 2), 128)
    outer_scales_start = outer_scales_ptr + tl.multiple_of(tl.load(places + 3), 128)
    scale_offset_start = scale_offset_ptr + tl.load(places + 4)
    scale_offset = tl.load(scale_offset_start)
    table = table_of_lane()
    word_start = weight_start.to(tl.pointer_type(tl.int32), bitcast=True)
    word_ptrs = word_start + rows.to(tl.int64)[:, None, None] * (D_IN // 8) + word[None, :, :]
    scale_rows = rows * (D_IN // 64)
    scale_number = scale_rows[:, None] + groups[None, :]
    a_ptrs = lora_a_ptr + tl.multiple_of(tl.load(places + 5), 256) + n.to(tl.int64)[None, :] * D_IN + j[:, None]
    acc_0 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc_1 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc_2 = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_K // GROUP, GROUP // 8), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        words = tl.load(word_ptrs + step * 8)
        number = scale_number + step * 1
        scale = (product(tl.load(scale_table_start + tl.load(scales_start + number).to(tl.int32)), tl.load(outer_scales_start + number // 256)) + scale_offset)[:, :, None]
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
        a = tl.load(a_ptrs + step * BLOCK_K)
        acc_0 = tl.dot(w, a, acc_0)
        a = tl.load(a_ptrs + 262144 + step * BLOCK_K)
        acc_1 = tl.dot(w, a, acc_1)
        a = tl.load(a_ptrs + 524288 + step * BLOCK_K)
        acc_2 = tl.dot(w, a, acc_2)

    b_ptrs = lora_b_ptr + tl.multiple_of(tl.load(places + 6), 128) + rows.to(tl.int64)[:, None] * RANK + n[None, :]
    b = tl.load(b_ptrs)
    dots = tl.sum(acc_0 * b.to(tl.float32), axis=1)
    b = tl.load(b_ptrs + BLOCK_N)
    dots += tl.sum(acc_1 * b.to(tl.float32), axis=1)
    b = tl.load(b_ptrs + 2 * BLOCK_N)
    dots += tl.sum(acc_2 * b.to(tl.float32), axis=1)
    dots *= scaling
    squares = tl.sum(tl.reshape(squares, (BLOCK_M, BLOCK_K // 8)), axis=1)
    tl.extra.cuda.gdc_wait()  # the last kernel waits for this one only, and reads what those before wrote
    sums = sums_ptr + layer * 12288 + rows
    tl.store(sums, squares, mask=(group == 0))
    tl.store(sums + 4096 + group.to(tl.int64) * D_OUT, dots)


@triton.jit
def finish_kernel(
    table_ptr: "*i64",
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_a_ptr: "*bf16",
    lora_b_ptr: "*bf16",
    magnitude_ptr: "*bf16",
    gram_ptr: "*bf16",
    adapter_squares_ptr: "*fp32",
    sums_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    scaling: "fp64",
):
    """Write w and g of BLOCK_M rows of one layer; rows whose terms nearly cancel are added up again in fp64."""
    D_OUT: tl.constexpr = 4096
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 64
    BLOCK_R: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    SHARES: tl.constexpr = 1
    PARTIALS: tl.constexpr = 2
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
    layer = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_M + lane
    places = table_ptr + layer * 8
    b_start = lora_b_ptr + tl.multiple_of(tl.load(places + 6), 128)
    b_rows = b_start + rows.to(tl.int64)[:, None] * RANK
    grams = gram_ptr + layer * (2 * RANK * RANK)
    sums = sums_ptr + layer * 12288 + rows
    weight_sq = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(SHARES):
        weight_sq += tl.load(sums)
        sums += D_OUT
    cross = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(PARTIALS):
        cross += tl.load(sums)
        sums += D_OUT

    # rowsum(B@sG * B), the blocks below the diagonal of the symmetric G twice; and what it is added up from, which may be far more.
    square = tl.full((BLOCK_M,), 0.0, tl.float32)
    summands = tl.full((BLOCK_M,), 0.0, tl.float32)
    for first in range(0, RANK, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        b = tl.load(b_rows + r[None, :])
        below = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for start in range(0, first, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            b_part = tl.load(b_rows + j[None, :])
            gram_ptrs = grams + j[:, None] * RANK + r[None, :]
            below = tl.dot(b_part, tl.load(gram_ptrs), below)
            below = tl.dot(b_part, tl.load(gram_ptrs + RANK * RANK), below)
        acc = 2.0 * below
        gram_ptrs = grams + r[:, None] * RANK + r[None, :]
        acc = tl.dot(b, tl.load(gram_ptrs), acc)
        acc = tl.dot(b, tl.load(gram_ptrs + RANK * RANK), acc)
        b_wide = b.to(tl.float32)
        square += tl.sum(acc * b_wide, axis=1)
        adapter_squares = tl.load(adapter_squares_ptr + layer * RANK + r)
        summands += tl.sum(b_wide * b_wide * adapter_squares[None, :], axis=1)
    s = tl.full((BLOCK_M,), scaling, tl.float32)
    norm = tl.sqrt(tl.maximum(weight_sq + 2.0 * cross + s * square, 0.0))

    cancels = (norm * norm < LEAST_SHARE * (weight_sq + s * summands)).to(tl.int32)
    if tl.max(cancels, axis=0) > 0:
        a_start = lora_a_ptr + tl.load(places + 5)
        weight_start = weight_ptr + tl.multiple_of(tl.load(places), 512)
        scales_start = scales_ptr + tl.multiple_of(tl.load(places + 1), 512)
        scale_table_start = scale_table_ptr + tl.multiple_of(tl.load(places + 2), 128)
        outer_scales_start = outer_scales_ptr + tl.multiple_of(tl.load(places + 3), 128)
        scale_offset_start = scale_offset_ptr + tl.load(places + 4)
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
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b_row = tl.load(b_start + row * RANK + first + rank).to(tl.float64)
                        a = tl.load(a_start + (first + rank).to(tl.int64)[:, None] * D_IN + start + k[None, :]).to(tl.float64)
                        ba += tl.sum(b_row[:, None] * a, axis=0)
                    flat = row * D_IN + start + k
                    w = value_of(tl.load(weight_start + flat // 2).to(tl.int32) >> (4 - 4 * (flat % 2)).to(tl.int32), table)
                    number = flat // 64
                    scale = product(tl.load(scale_table_start + tl.load(scales_start + number).to(tl.int32)), tl.load(outer_scales_start + number // 256)) + scale_offset
                    w = (w * scale).to(tl.bfloat16).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_ptr + layer * D_OUT + rows, norm)
    magnitude = tl.load(magnitude_ptr + tl.load(places + 7) + rows).to(tl.float32)
    tl.store(g_ptr + layer * D_OUT + rows, magnitude / tl.maximum(norm, EPS))


def launch(table, weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, magnitude, norm, g, scaling):
    """Fill norm, g [layers, 4096] for the layers of table [layers, 8]: where W [4096, 4096] (weight, scales, scale_table, outer_scales, scale_offset, flat), lora_a [384, 4096], lora_b [4096, 384] and magnitude [4096] of each begin, in elements from those given."""
    layers = table.shape[0]
    gram = torch.empty((layers, 2, 384, 384), dtype=torch.bfloat16, device=weight.device)
    adapter_squares = torch.empty((layers, 384,), dtype=torch.float32, device=weight.device)
    sums = torch.empty((layers, 3, 4096), dtype=torch.float32, device=weight.device)
    gram_kernel[(36, 1, layers)](table, lora_a, gram, adapter_squares, scaling, num_warps=4, num_stages=3)
    sums_kernel[(layers * 64, 1)](
        table, weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, sums, scaling, num_warps=8, num_stages=3, launch_pdl=True
    )
    finish_kernel[(64, layers)](
        table, weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, magnitude, gram, adapter_squares, sums, norm, g, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
