"""Row norms of W + sBA of many layers, which a table names: some warps decode W, others multiply.

    for each layer: w = ||W + s*B@A||_row by nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T))); g = m / max(w, eps)

spec    weight_norm_group/d_out=4304/d_in=1152/rank=24/layers=32/weight=nf4.nested/adapter=fp32/magnitude=fp32/autocast@h200
config  packed_warp_specialized:decoders=2,gram_block=32,gram_block_k=64,gram_split=4,rank_block=64,rank_tiles=1,split_k=1,num_warps=4,num_stages=6

Emitted by doratune from templates/weight_norm_group_packed_warp_specialized.py.j2; edit the template, not this text.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
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
    lora_a_ptr: "*fp32",
    rounded_ptr: "*bf16",
    gram_shares_ptr: "*fp32",
    scaling: "fp32",
):
    """Write one tile of s*G = s*A @ A.T over one share of the columns; on the diagonal also A, rounded."""
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 64
    STEPS: tl.constexpr = 5
    SHARES: tl.constexpr = 4

    tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    layer = tl.program_id(2).to(tl.int64)
    k = tl.program_id(1) * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    a_start = lora_a_ptr + tl.multiple_of(tl.load(table_ptr + layer * 8 + 5), 128)
    row_ptrs = a_start + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    col_ptrs = a_start + cols.to(tl.int64)[None, :] * D_IN + k[:, None]
    rounded_ptrs = rounded_ptr + layer * (RANK * D_IN) + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for step in range(0, STEPS):
        left = tl.load(row_ptrs + step * BLOCK_K, mask=(rows < RANK)[:, None] & (k < D_IN - step * BLOCK_K)[None, :], other=0.0).to(tl.bfloat16)
        right = tl.load(col_ptrs + step * BLOCK_K, mask=(cols < RANK)[None, :] & (k < D_IN - step * BLOCK_K)[:, None], other=0.0).to(tl.bfloat16)
        tl.store(rounded_ptrs + step * BLOCK_K, left, mask=(rows < RANK)[:, None] & (k < D_IN - step * BLOCK_K)[None, :])
        product = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        product = tl.dot(left, right, product)
        gram += scaling * product
    share = (layer * SHARES + tl.program_id(1)) * (RANK * RANK)
    tl.store(gram_shares_ptr + share + rows[:, None] * RANK + cols[None, :], gram, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])


@triton.jit
def gram_sum_kernel(gram_shares_ptr: "*fp32", gram_ptr: "*bf16", adapter_squares_ptr: "*fp32"):
    """Add the shares of one tile of s*G in a fixed order; write it as a high and a low part, and s*rowsum(A*A) from its diagonal."""
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 32
    SHARES: tl.constexpr = 4

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    layer = tl.program_id(1).to(tl.int64)
    share_ptrs = gram_shares_ptr + layer * (SHARES * RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for _ in range(0, SHARES):
        gram += tl.load(share_ptrs, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :], other=0.0)
        share_ptrs += RANK * RANK
    there = layer * (2 * RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    high = gram.to(tl.bfloat16)
    tl.store(gram_ptr + there, high, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])
    tl.store(gram_ptr + RANK * RANK + there, (gram - high.to(tl.float32)).to(tl.bfloat16), mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])
    diagonal = tl.sum(tl.where(rows[:, None] == cols[None, :], gram, 0.0), axis=1)
    tl.store(adapter_squares_ptr + layer * RANK + rows, diagonal, mask=(rows < RANK))


@gluon.jit
def products_of(v_0, v_1, v_2, v_3):
    """Four values rounded to bf16: their low bytes in one word, their high bytes in another."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 even, odd;
        cvt.rn.bf16x2.f32 even, $3, $2;
        cvt.rn.bf16x2.f32 odd, $5, $4;
        prmt.b32 $0, even, odd, 0x6420;
        prmt.b32 $1, even, odd, 0x7531;
        }
        """, "=r,=r,f,f,f,f", [v_0, v_1, v_2, v_3], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def values_of(words, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3):
    """The eight bf16 values of each word of codes, in order, two in each of four words.

    A table of 16 bytes is looked up by two byte permutations, of codes 0 to 7 and of codes 8 to 15; a third one takes the
    result that each code's highest bit names.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 code, half, a, b, low, high;
        and.b32 code, $4, 0x77777777;
        shr.b32 half, $4, 1;
        lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;
        prmt.b32 a, $5, $6, code;
        prmt.b32 b, $7, $8, code;
        prmt.b32 low, a, b, half;
        prmt.b32 a, $9, $10, code;
        prmt.b32 b, $11, $12, code;
        prmt.b32 high, a, b, half;
        prmt.b32 $0, low, high, 0x4051;
        prmt.b32 $1, low, high, 0x6273;
        shr.b32 code, code, 16;
        shr.b32 half, half, 16;
        prmt.b32 a, $5, $6, code;
        prmt.b32 b, $7, $8, code;
        prmt.b32 low, a, b, half;
        prmt.b32 a, $9, $10, code;
        prmt.b32 b, $11, $12, code;
        prmt.b32 high, a, b, half;
        prmt.b32 $2, low, high, 0x4051;
        prmt.b32 $3, low, high, 0x6273;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [words, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )


@gluon.jit
def scale_of(value, outer, offset):
    """value*outer, rounded before the offset is added, as bitsandbytes does."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [value, outer], dtype=gl.float32, is_pure=True, pack=1) + offset


@gluon.jit
def decoded(words, scale):
    """The bf16 values of W at words [BLOCK_M, 1, 8], each two columns in one word: from a table of their products with each scale."""
    low_0, high_0 = products_of(scale * -1.0, scale * -0.6961928009986877, scale * -0.5250730514526367, scale * -0.39491748809814453)
    low_1, high_1 = products_of(scale * -0.28444138169288635, scale * -0.18477343022823334, scale * -0.09105003625154495, scale * 0.0)
    low_2, high_2 = products_of(scale * 0.07958029955625534, scale * 0.16093020141124725, scale * 0.24611230194568634, scale * 0.33791524171829224)
    low_3, high_3 = products_of(scale * 0.44070982933044434, scale * 0.5626170039176941, scale * 0.7229568362236023, scale * 1.0)
    pair_0, pair_1, pair_2, pair_3 = values_of(
        words, gl.expand_dims(low_0, 2), gl.expand_dims(low_1, 2), gl.expand_dims(low_2, 2), gl.expand_dims(low_3, 2), gl.expand_dims(high_0, 2), gl.expand_dims(high_1, 2), gl.expand_dims(high_2, 2), gl.expand_dims(high_3, 2)
    )
    return gl.join(gl.join(pair_0, pair_2), gl.join(pair_1, pair_3))


@gluon.jit
def prefetch(addresses, size):
    """Have the L2 cache read ``size`` bytes from each address: long pieces of rows, of which the loads take a little in each step."""
    gl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [addresses, size], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def store_columns_of_b(b_start, first_m, first_rank, piece, HALVED: gl.constexpr):
    """Store BLOCK_K columns of B, rounded, as a tile in the place of one of W."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_K: gl.constexpr = 64
    PIECE_ROWS: gl.constexpr = 64
    D_OUT: gl.constexpr = 4304
    RANK: gl.constexpr = 24

    LOADED: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows_of_b = piece._reinterpret(gl.bfloat16, [BLOCK_M // PIECE_ROWS, PIECE_ROWS, BLOCK_K], SWIZZLED)
    lane = gl.arange(0, PIECE_ROWS, gl.SliceLayout(1, LOADED))
    rank = first_rank + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LOADED))
    for i in range(0, BLOCK_M // PIECE_ROWS):
        row = gl.minimum(first_m + i * PIECE_ROWS + lane, D_OUT - 1).to(gl.int64)
        b = gl.load(b_start + gl.expand_dims(row * RANK, 1) + gl.expand_dims(rank, 0), mask=gl.expand_dims(rank < RANK, 0), other=0.0).to(gl.bfloat16)
        if HALVED:
            b = (b.to(gl.float32) * 0.5).to(gl.bfloat16)
        rows_of_b.index(i).store(b)


@gluon.jit
def decode(
    lora_a_desc, gram_desc, table_ptr, weight_ptr, scales_ptr, scale_table_ptr, outer_scales_ptr, scale_offset_ptr, lora_b_ptr, sums_ptr, w_ring, a_ring, full, empty, which
):
    """Four warps, a row of the tile for each thread: W's steps are decoded, A's loaded by the tensor memory accelerator; then B's columns beside G's, and alone. And rowsum(W*W)."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    ROW_BLOCKS: gl.constexpr = 34
    K_STEPS: gl.constexpr = 18
    SPLIT_K: gl.constexpr = 1
    STAGES: gl.constexpr = 6
    DECODERS: gl.constexpr = 2
    AHEAD: gl.constexpr = 1
    CHUNK: gl.constexpr = 32
    D_OUT: gl.constexpr = 4304
    D_IN: gl.constexpr = 1152
    WORDS: gl.constexpr = 8
    G_PIECES: gl.constexpr = 1
    PIECES: gl.constexpr = 1

    CODES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [32, 1, 1], [4, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, CODES))
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    group = 0
    tile = gl.program_id(0)
    layer = (tile // ROW_BLOCKS).to(gl.int64)
    first_m = tile % ROW_BLOCKS * BLOCK_M
    share = gl.program_id(1)
    steps = K_STEPS
    gram_steps = 2 * ((G_PIECES - share + SPLIT_K - 1) // SPLIT_K)
    first_step = share * K_STEPS
    row = gl.minimum(first_m + gl.arange(0, BLOCK_M, ROWS), D_OUT - 1)
    places = table_ptr + layer * 8
    weight_start = weight_ptr + gl.multiple_of(gl.load(places), 512)
    scales_start = scales_ptr + gl.multiple_of(gl.load(places + 1), 32)
    scale_table_start = scale_table_ptr + gl.multiple_of(gl.load(places + 2), 128)
    outer_scales_start = outer_scales_ptr + gl.load(places + 3)
    scale_offset_start = scale_offset_ptr + gl.load(places + 4)
    scale_offset = gl.load(scale_offset_start)
    group_of_step = gl.arange(0, 1, gl.SliceLayout(0, gl.SliceLayout(2, CODES)))
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, CODES)))
    row_starts = gl.expand_dims(gl.expand_dims(row.to(gl.int64) * (D_IN // 8) + first_step * WORDS, 1), 2)
    columns = gl.expand_dims(gl.expand_dims(group_of_step, 0), 2) * 8 + gl.expand_dims(gl.expand_dims(word, 0), 1)
    word_ptrs = weight_start.to(tl.pointer_type(tl.int32), bitcast=True) + (row_starts + columns)
    scale_numbers = gl.expand_dims(row * (D_IN // 64) + first_step * 1, 1) + gl.expand_dims(group_of_step, 0)
    squares = gl.zeros((BLOCK_M, 1), gl.float32, gl.SliceLayout(2, CODES))
    words_0 = gl.load(word_ptrs + which * WORDS)
    number = scale_numbers + which * 1
    code_0 = gl.load(scales_start + number).to(gl.int32)
    outer_0 = gl.load(outer_scales_start + number // 256)
    row_start = weight_start.to(gl.int64) + row.to(gl.int64) * 576 + first_step * 32
    prefetched = gl.minimum(2 * CHUNK, steps)
    prefetch(row_start + which * (prefetched * 16), prefetched * 16)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)  # for A, rounded
    for step in range(which, steps, DECODERS):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), TILES * BLOCK_N * BLOCK_K * 2)
        for i in gl.static_range(TILES):
            a_tile = a_ring.index(stage * TILES + i)._reinterpret(lora_a_desc.dtype, [1, BLOCK_N, BLOCK_K], lora_a_desc.layout)
            tma.async_copy_global_to_shared(lora_a_desc, [layer.to(gl.int32), (group * TILES + i) * BLOCK_N, (first_step + step) * BLOCK_K], full.index(stage), a_tile)
        scale = scale_of(gl.load(scale_table_start + code_0), outer_0, scale_offset)
        pairs = decoded(words_0, scale)
        w_ring.index(stage)._reinterpret(gl.int32, [BLOCK_M, BLOCK_K // 2], PAIRS).store(gl.reshape(pairs, [BLOCK_M, BLOCK_K // 2]))
        later = gl.minimum(step + AHEAD * DECODERS, steps - 1)
        words_0 = gl.load(word_ptrs + later * WORDS)
        number = scale_numbers + later * 1
        code_0 = gl.load(scales_start + number).to(gl.int32)
        outer_0 = gl.load(outer_scales_start + number // 256)
        even, odd = (pairs << 16).to(gl.float32, bitcast=True), (pairs & -65536).to(gl.float32, bitcast=True)
        values = even * even + odd * odd
        values = gl.sum(values, axis=2)
        values = gl.sum(values, axis=2)
        values = gl.sum(values, axis=2)
        squares += gl.convert_layout(values, gl.SliceLayout(2, CODES))
        tl.debug_barrier()  # all four warps have stored before one of them says so
        mbarrier.arrive(full.index(stage), count=1)

    b_start = lora_b_ptr + gl.multiple_of(gl.load(places + 6), 8)
    for step in range(steps + (steps + which) % DECODERS, steps + gram_steps, DECODERS):
        stage = step % STAGES
        first_rank = (share + (step - steps) // 2 * SPLIT_K) * BLOCK_K
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), TILES * BLOCK_N * BLOCK_K * 2)
        for i in gl.static_range(TILES):  # G's high part, then its low one
            gram_tile = a_ring.index(stage * TILES + i)._reinterpret(gram_desc.dtype, [1, BLOCK_N, BLOCK_K], gram_desc.layout)
            tma.async_copy_global_to_shared(gram_desc, [layer.to(gl.int32) * 2 + (step - steps) % 2, (group * TILES + i) * BLOCK_N, first_rank], full.index(stage), gram_tile)
        store_columns_of_b(b_start, first_m, first_rank, w_ring.index(stage), True)
        tl.debug_barrier()
        mbarrier.arrive(full.index(stage), count=1)
    for step in range(steps + gram_steps + (steps + gram_steps + which) % DECODERS, steps + gram_steps + PIECES, DECODERS):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        store_columns_of_b(b_start, first_m, group * (TILES * BLOCK_N) + (step - steps - gram_steps) * BLOCK_K, w_ring.index(stage), False)
        tl.debug_barrier()
        mbarrier.arrive(full.index(stage), count=2)
    total = gl.sum(squares, axis=1)
    rows = first_m + gl.arange(0, BLOCK_M, ROWS)
    sums = sums_ptr + layer * 17216 + rows
    gl.store(sums + (share * DECODERS + which).to(gl.int64) * D_OUT, total, mask=(rows < D_OUT))


@gluon.jit
def sum_row_dots(gram_ptr, sums_ptr, w_ring, a_ring, full, empty, scaling):
    """The other warps: acc = W @ A.T + B @ (s/2)G over this program's share of the sums, then s*sum_n B[:, n] * acc[:, n].

    And s*sum_n B[:, n]**2 * s*rowsum(A*A)[n], which the last kernel compares the norm with.
    """
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    ROW_BLOCKS: gl.constexpr = 34
    K_STEPS: gl.constexpr = 18
    SPLIT_K: gl.constexpr = 1
    STAGES: gl.constexpr = 6
    D_OUT: gl.constexpr = 4304
    RANK: gl.constexpr = 24
    G_PIECES: gl.constexpr = 1

    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    group = 0
    tile = gl.program_id(0)
    layer = (tile // ROW_BLOCKS).to(gl.int64)
    first_m = tile % ROW_BLOCKS * BLOCK_M
    share = gl.program_id(1)
    steps = K_STEPS
    gram_steps = 2 * ((G_PIECES - share + SPLIT_K - 1) // SPLIT_K)
    acc_0 = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, TILE)
    for step in range(0, steps + gram_steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        # Here and not where it was stored: there the fence would wait for the loads of later steps, too.
        fence_async_shared()
        left = w_ring.index(stage)
        acc_0 = warpgroup_mma(left, a_ring.index(stage * TILES).permute((1, 0)), acc_0, is_async=True)
        acc_0 = warpgroup_mma_wait(1, deps=(acc_0,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)  # the step before is done
    acc_0 = warpgroup_mma_wait(0, deps=(acc_0,))
    mbarrier.arrive(empty.index((steps + gram_steps + STAGES - 1) % STAGES), count=1)

    dots = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(1, PIECE))
    summands = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(1, PIECE))
    step = steps + gram_steps
    grams = gram_ptr + layer * (2 * RANK * RANK)
    n = group * (TILES * BLOCK_N) + gl.arange(0, BLOCK_K, gl.SliceLayout(0, PIECE))
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    b = w_ring.index(stage).load(PIECE).to(gl.float32)
    tl.debug_barrier()  # all warps have read it before one of them says so
    mbarrier.arrive(empty.index(stage), count=1)
    dots += gl.sum(acc_0 * b, axis=1)
    gram = gl.load(grams + n * (RANK + 1), mask=n < RANK, other=0.0).to(gl.float32) + gl.load(grams + RANK * RANK + n * (RANK + 1), mask=n < RANK, other=0.0).to(gl.float32)
    summands += gl.sum(b * b * gl.expand_dims(gram, 0), axis=1)
    n += BLOCK_K
    step += 1
    rows = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PIECE))
    sums = sums_ptr + layer * 17216 + rows + 8608
    partial = 2 * share.to(gl.int64)
    gl.store(sums + partial * D_OUT, dots * scaling, mask=rows < D_OUT)
    gl.store(sums + (partial + 1) * D_OUT, summands * scaling, mask=rows < D_OUT)


@gluon.jit
def sums_kernel(
    lora_a_desc: "tensordesc<bf16[1, 64, 64]>",
    gram_desc: "tensordesc<bf16[1, 64, 64]>",
    table_ptr: "*i64",
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_b_ptr: "*fp32",
    gram_ptr: "*bf16",
    sums_ptr: "*fp32",
    scaling: "fp32",
):
    """Write rowsum(W*W) and s*rowsum(B * (W@A.T + B@(s/2)G)) of BLOCK_M rows of one layer, over BLOCK_N ranks and one share of the columns.

    The descriptor reads zeros beyond the last rank, and B's columns there are zeros.
    """
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    STAGES: gl.constexpr = 6

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    w_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, BLOCK_N, BLOCK_K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # W's tile is decoded, and A's is asked for
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (sum_row_dots, (gram_ptr, sums_ptr, w_ring, a_ring, full, empty, scaling)),
            (decode, (lora_a_desc, gram_desc, table_ptr, weight_ptr, scales_ptr, scale_table_ptr, outer_scales_ptr, scale_offset_ptr, lora_b_ptr, sums_ptr, w_ring, a_ring, full, empty, 0)),
            (decode, (lora_a_desc, gram_desc, table_ptr, weight_ptr, scales_ptr, scale_table_ptr, outer_scales_ptr, scale_offset_ptr, lora_b_ptr, sums_ptr, w_ring, a_ring, full, empty, 1)),
        ],
        [4, 4],
        [104, 104],
    )


@triton.jit
def finish_kernel(
    table_ptr: "*i64",
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    lora_a_ptr: "*fp32",
    lora_b_ptr: "*fp32",
    magnitude_ptr: "*fp32",
    sums_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    scaling: "fp64",
):
    """Write w and g of BLOCK_M rows of one layer; rows whose terms nearly cancel are added up again in fp64."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_M: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    SHARES: tl.constexpr = 2
    PARTIALS: tl.constexpr = 1
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
    layer = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_M + lane
    in_m = rows < D_OUT
    places = table_ptr + layer * 8
    b_start = lora_b_ptr + tl.multiple_of(tl.load(places + 6), 8)
    sums = sums_ptr + layer * 17216 + rows
    weight_sq = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(SHARES):
        weight_sq += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
    cross = tl.full((BLOCK_M,), 0.0, tl.float32)
    summands = tl.full((BLOCK_M,), 0.0, tl.float32)
    for partial in tl.static_range(PARTIALS):
        cross += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
        if partial % 1 == 0:  # equal for all shares of the columns
            summands += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
    norm = tl.sqrt(tl.maximum(weight_sq + 2.0 * cross, 0.0))
    cancels = (norm * norm < LEAST_SHARE * (weight_sq + summands)).to(tl.int32)
    if tl.max(cancels, axis=0) > 0:
        a_start = lora_a_ptr + tl.load(places + 5)
        weight_start = weight_ptr + tl.multiple_of(tl.load(places), 512)
        scales_start = scales_ptr + tl.multiple_of(tl.load(places + 1), 32)
        scale_table_start = scale_table_ptr + tl.multiple_of(tl.load(places + 2), 128)
        outer_scales_start = outer_scales_ptr + tl.load(places + 3)
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
                    in_k = k < D_IN - start
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b_row = tl.load(b_start + row * RANK + first + rank).to(tl.bfloat16).to(tl.float64)
                        a = tl.load(a_start + (first + rank).to(tl.int64)[:, None] * D_IN + start + k[None, :], mask=in_k[None, :], other=0.0).to(tl.bfloat16).to(tl.float64)
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
    tl.store(norm_ptr + layer * D_OUT + rows, norm, mask=in_m)
    magnitude = tl.load(magnitude_ptr + tl.load(places + 7) + rows, mask=in_m, other=0.0).to(tl.float32)
    tl.store(g_ptr + layer * D_OUT + rows, magnitude / tl.maximum(norm, EPS), mask=in_m)


def launch(table, weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, magnitude, norm, g, scaling):
    """Fill norm, g [layers, 4304] for the layers of table [layers, 8]: where W [4304, 1152] (weight, scales, scale_table, outer_scales, scale_offset, flat), lora_a [24, 1152], lora_b [4304, 24] and magnitude [4304] of each begin, in elements from those given."""
    layers = table.shape[0]
    gram = torch.empty((layers, 2, 24, 24), dtype=torch.bfloat16, device=weight.device)
    sums = torch.empty((layers, 4, 4304), dtype=torch.float32, device=weight.device)
    rounded_a = torch.empty((layers, 24, 1152), dtype=torch.bfloat16, device=weight.device)
    adapter_squares = torch.empty((layers, 24), dtype=torch.float32, device=weight.device)
    gram_shares = torch.empty((layers, 4, 24, 24), dtype=torch.float32, device=weight.device)
    gram_kernel[(1, 4, layers)](table, lora_a, rounded_a, gram_shares, scaling, num_warps=4, num_stages=3)
    gram_sum_kernel[(1, layers)](gram_shares, gram, adapter_squares, num_warps=4, num_stages=2, launch_pdl=True)
    gram_layout = gl.NVMMASharedLayout.get_default_for([1, 64, 64], gl.bfloat16)
    a_layout = gl.NVMMASharedLayout.get_default_for([1, 64, 64], gl.bfloat16)
    sums_kernel[(layers * 34, 1)](
        TensorDescriptor(rounded_a, [2147483647, 24, 1152], [27648, 1152, 1], [1, 64, 64], a_layout),
        TensorDescriptor(gram, [2 * layers, 24, 24], [576, 24, 1], [1, 64, 64], gram_layout),
        table, weight, scales, scale_table, outer_scales, scale_offset, lora_b, gram, sums, scaling, num_warps=4, num_stages=6, launch_pdl=True
    )
    finish_kernel[(135, layers)](
        table, weight, scales, scale_table, outer_scales, scale_offset, lora_a, lora_b, magnitude, sums, norm, g, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
