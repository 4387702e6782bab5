"""Row norms of W + sBA of many layers, which a table names: each W is read once.

    for each layer: w = ||W + s*B@A||_row by nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T))); g = m / max(w, eps)

spec    weight_norm_group/d_out=4096/d_in=4096/rank=384/layers=32/weight=bf16/adapter=bf16/magnitude=bf16@h200
config  tiles:block_k=64,block_m=128,block_n=64,finish_ranks=32,finish_rows=64,gram_block=64,gram_block_k=128,overlap=1,split_k=1,num_warps=8,num_stages=3

Emitted by doratune from templates/weight_norm_group_tiles.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def gram_kernel(
    table_ptr: "*i64",
    lora_a_ptr: "*bf16",
    gram_ptr: "*bf16",
    adapter_squares_ptr: "*fp32",
    scaling: "fp32",
):
    """Write one tile of s*G = s*A @ A.T of one layer and its mirror image, as a high and a low part; on the diagonal also s*rowsum(A*A)."""
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 128
    TILES: tl.constexpr = 6

    tl.extra.cuda.gdc_launch_dependents()
    layer = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tile_row = 0
    for i in tl.static_range(1, TILES):
        tile_row += (tile >= i * (i + 1) // 2).to(tl.int32)
    tile_col = tile - tile_row * (tile_row + 1) // 2
    rows = tile_row * BLOCK + tl.arange(0, BLOCK)
    cols = tile_col * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = lora_a_ptr + tl.multiple_of(tl.load(table_ptr + layer * 4 + 1), 256)
    row_ptrs = a_ptrs + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    col_ptrs = a_ptrs + cols.to(tl.int64)[None, :] * D_IN + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, D_IN, BLOCK_K):
        left = tl.load(row_ptrs + start)
        right = tl.load(col_ptrs + start)
        step = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        step = tl.dot(left, right, step)
        gram += scaling * step
    there = layer * (2 * RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    mirrored = layer * (2 * RANK * RANK) + cols[None, :] * RANK + rows[:, None]
    high = gram.to(tl.bfloat16)
    low = (gram - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(gram_ptr + there, high)
    tl.store(gram_ptr + RANK * RANK + there, low)
    tl.store(gram_ptr + mirrored, high, mask=(tile_row != tile_col))
    tl.store(gram_ptr + RANK * RANK + mirrored, low, mask=(tile_row != tile_col))
    diagonal = tl.sum(tl.where(rows[:, None] == cols[None, :], gram, 0.0), axis=1)
    tl.store(adapter_squares_ptr + layer * RANK + rows, diagonal, mask=(tile_row == tile_col))


@triton.jit
def sums_kernel(
    table_ptr: "*i64",
    weight_ptr: "*bf16",
    lora_a_ptr: "*bf16",
    lora_b_ptr: "*bf16",
    sums_ptr: "*fp32",
    scaling: "fp32",
):
    """Write rowsum(W*W) and s*rowsum(B * W@A.T) of BLOCK_M rows of one layer, over BLOCK_N ranks and one share of the columns."""
    D_OUT: tl.constexpr = 4096
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 64
    GROUPS: tl.constexpr = 6
    ROW_BLOCKS: tl.constexpr = 32
    K_STEPS: tl.constexpr = 64
    DOTS: tl.constexpr = 4096
    LAYER_SUMS: tl.constexpr = 28672

    tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // GROUPS
    group = (tl.program_id(0) % GROUPS).to(tl.int64)
    n = group * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = (tile // ROW_BLOCKS).to(tl.int64)
    rows = (tile % ROW_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    places = table_ptr + layer * 4
    w_ptrs = weight_ptr + tl.multiple_of(tl.load(places), 256) + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    a_ptrs = lora_a_ptr + tl.multiple_of(tl.load(places + 1), 256) + n.to(tl.int64)[None, :] * D_IN + k[:, None]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        w = tl.load(w_ptrs + step * BLOCK_K)
        a = tl.load(a_ptrs + step * BLOCK_K)
        # A product of its own, which is added scaled: Triton would let one that accumulates still read w's memory when
        # it loads the next tile there, because w is also read for its squares (seen in 3.6 on an H100).
        product = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        product = tl.dot(w, a, product)
        acc += scaling * product
        w_wide = w.to(tl.float32)
        squares += w_wide * w_wide

    b = tl.load(lora_b_ptr + tl.multiple_of(tl.load(places + 2), 128) + rows.to(tl.int64)[:, None] * RANK + n[None, :])
    dots = tl.sum(acc * b.to(tl.float32), axis=1)
    sums = sums_ptr + layer * LAYER_SUMS + rows
    tl.extra.cuda.gdc_wait()  # the last kernel waits for this one only, and reads what the first wrote
    tl.store(sums, tl.sum(squares, axis=1), mask=(group == 0))
    tl.store(sums + DOTS + group * D_OUT, dots)


@triton.jit
def finish_kernel(
    table_ptr: "*i64",
    weight_ptr: "*bf16",
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
    BLOCK_R: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    SHARES: tl.constexpr = 1
    PARTIALS: tl.constexpr = 6
    LAYER_SUMS: tl.constexpr = 28672
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
    layer = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_M + lane
    places = table_ptr + layer * 4
    b_start = lora_b_ptr + tl.multiple_of(tl.load(places + 2), 128)
    b_rows = b_start + rows.to(tl.int64)[:, None] * RANK
    grams = gram_ptr + layer * (2 * RANK * RANK)
    sums = sums_ptr + layer * LAYER_SUMS + rows
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
        weight_start = weight_ptr + tl.load(places)
        a_start = lora_a_ptr + tl.load(places + 1)
        rank = tl.arange(0, RANKS)
        k = tl.arange(0, BLOCK_K)
        s_wide = tl.full((BLOCK_K,), scaling, tl.float64)
        for i in range(0, BLOCK_M):
            if tl.max(tl.where(lane == i, cancels, 0), axis=0) > 0:
                row = (tl.program_id(1) * BLOCK_M + i).to(tl.int64)
                squared = tl.full((BLOCK_K,), 0.0, tl.float64)
                for start in range(0, D_IN, BLOCK_K):
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b_row = tl.load(b_start + row * RANK + first + rank).to(tl.float64)
                        a = tl.load(a_start + (first + rank).to(tl.int64)[:, None] * D_IN + start + k[None, :]).to(tl.float64)
                        ba += tl.sum(b_row[:, None] * a, axis=0)
                    w = tl.load(weight_start + row * D_IN + start + k).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_ptr + layer * D_OUT + rows, norm)
    magnitude = tl.load(magnitude_ptr + tl.load(places + 3) + rows).to(tl.float32)
    tl.store(g_ptr + layer * D_OUT + rows, magnitude / tl.maximum(norm, EPS))


def launch(table, weight, lora_a, lora_b, magnitude, norm, g, scaling):
    """Fill norm, g [layers, 4096] for the layers of table [layers, 4]: where weight [4096, 4096], lora_a [384, 4096], lora_b [4096, 384] and magnitude [4096] of each begin, in elements from those given."""
    layers = table.shape[0]
    gram = torch.empty((layers, 2, 384, 384), dtype=torch.bfloat16, device=weight.device)
    adapter_squares = torch.empty((layers, 384), dtype=torch.float32, device=weight.device)
    sums = torch.empty((layers, 7, 4096), dtype=torch.float32, device=weight.device)
    gram_kernel[(layers, 21)](table, lora_a, gram, adapter_squares, scaling, num_warps=4, num_stages=3)
    sums_kernel[(layers * 192, 1)](
        table, weight, lora_a, lora_b, sums, scaling, num_warps=8, num_stages=3, launch_pdl=True
    )
    finish_kernel[(layers, 64)](
        table, weight, lora_a, lora_b, magnitude, gram, adapter_squares, sums, norm, g, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
