"""Row norms of W + sBA of many layers, which a table names: one warp loads, eight multiply, two square.

    for each layer: w = ||W + s*B@A||_row by nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T))); g = m / max(w, eps)

spec    weight_norm_group/d_out=4304/d_in=1152/rank=24/layers=32/weight=bf16/adapter=fp32/magnitude=fp32/autocast@h200
config  warp_specialized:gram_block=64,gram_block_k=128,rank_block=64,rank_tiles=1,split_k=1,num_warps=8,num_stages=4

Emitted by doratune from templates/weight_norm_group_warp_specialized.py.j2; edit the template, not this text.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
import triton.language as tl


@triton.jit
def round_kernel(table_ptr: "*i64", lora_a_ptr: "*fp32", lora_b_ptr: "*fp32", rounded_a_ptr: "*bf16", rounded_b_ptr: "*bf16"):
    """Round BLOCK values of A and of B of one layer."""
    A: tl.constexpr = 27648
    B: tl.constexpr = 103296
    BLOCK: tl.constexpr = 2048

    tl.extra.cuda.gdc_launch_dependents()
    layer = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a_start = tl.multiple_of(tl.load(table_ptr + layer * 4 + 1), 128)
    b_start = tl.multiple_of(tl.load(table_ptr + layer * 4 + 2), 8)
    a = tl.load(lora_a_ptr + a_start + i, mask=i < A, other=0.0)
    b = tl.load(lora_b_ptr + b_start + i, mask=i < B, other=0.0)
    tl.store(rounded_a_ptr + layer * A + i, a.to(tl.bfloat16), mask=i < A)
    tl.store(rounded_b_ptr + layer * B + i, b.to(tl.bfloat16), mask=i < B)


@triton.jit
def gram_kernel(
    rounded_ptr: "*bf16",
    gram_ptr: "*bf16",
    adapter_squares_ptr: "*fp32",
    scaling: "fp32",
):
    """Write one tile of s*G = s*A @ A.T of one layer and its mirror image, as a high and a low part; on the diagonal also s*rowsum(A*A)."""
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 128

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    layer = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = rounded_ptr + layer * (RANK * D_IN)
    row_ptrs = a_ptrs + rows.to(tl.int64)[:, None] * D_IN + k[None, :]
    col_ptrs = a_ptrs + cols.to(tl.int64)[None, :] * D_IN + k[:, None]
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, D_IN, BLOCK_K):
        left = tl.load(row_ptrs + start, mask=(rows < RANK)[:, None], other=0.0)
        right = tl.load(col_ptrs + start, mask=(cols < RANK)[None, :], other=0.0)
        step = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        step = tl.dot(left, right, step)
        gram += scaling * step
    there = layer * (RANK * RANK) + rows[:, None] * RANK + cols[None, :]
    mirrored = layer * (RANK * RANK) + cols[None, :] * RANK + rows[:, None]
    folded = gram * tl.where(rows[:, None] // 64 == cols[None, :] // 64, 0.5, 1.0)
    high = folded.to(tl.bfloat16)
    low = (folded - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(gram_ptr + there, high, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])
    tl.store(gram_ptr + tl.num_programs(0).to(tl.int64) * (RANK * RANK) + there, low, mask=(rows < RANK)[:, None] & (cols < RANK)[None, :])
    diagonal = tl.sum(tl.where(rows[:, None] == cols[None, :], gram, 0.0), axis=1)
    tl.store(adapter_squares_ptr + layer * RANK + rows, diagonal, mask=(rows < RANK))


@gluon.jit
def load_step(left_desc, right_desc, ring, full, empty, step, left_layer, first_m, left_k, right_layer, right_row, right_k, FIRST_TILE: gl.constexpr):
    """Fill one stage of the ring: BLOCK_M rows of the left factor above the rank tiles from FIRST_TILE on."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    STAGES: gl.constexpr = 4

    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), (BLOCK_M + (TILES - FIRST_TILE) * BLOCK_N) * BLOCK_K * 2)
    rows = ring.index(stage)
    left = rows.slice(0, BLOCK_M)._reinterpret(left_desc.dtype, [1, BLOCK_M, BLOCK_K], left_desc.layout)
    tma.async_copy_global_to_shared(left_desc, [left_layer, first_m, left_k], full.index(stage), left)
    for i in gl.static_range(FIRST_TILE, TILES):
        right = rows.slice(BLOCK_M + i * BLOCK_N, BLOCK_N)._reinterpret(right_desc.dtype, [1, BLOCK_N, BLOCK_K], right_desc.layout)
        tma.async_copy_global_to_shared(right_desc, [right_layer, right_row + i * BLOCK_N, right_k], full.index(stage), right)


@gluon.jit
def load_tiles(table_ptr, weight_desc, lora_a_desc, lora_b_desc, high_desc, low_desc, b_tile_desc, ring, full, empty, first_tile, count):
    """One warp keeps the tensor memory accelerator busy, in the order in which sum_row_dots consumes."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    GROUPS: gl.constexpr = 1
    ROW_BLOCKS: gl.constexpr = 34
    K_STEPS: gl.constexpr = 18
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 1
    STAGES: gl.constexpr = 4
    WEIGHT_UNIT: gl.constexpr = 128

    # What the kernels before have rounded is needed at once.
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    step = 0
    for tile in range(first_tile, count, gl.num_programs(0)):
        share = tile % SPLIT_K
        group = tile // SPLIT_K % GROUPS
        first_m = tile // (SPLIT_K * GROUPS) % ROW_BLOCKS * BLOCK_M
        layer = tile // (SPLIT_K * GROUPS * ROW_BLOCKS)
        places = table_ptr + layer * 4
        weight_at = (gl.load(places) // WEIGHT_UNIT).to(gl.int32)
        lora_a_at = layer
        lora_b_at = layer
        first_n = group * TILES * BLOCK_N
        for k in range(share * K_STEPS, (share + 1) * K_STEPS):
            load_step(weight_desc, lora_a_desc, ring, full, empty, step, weight_at, first_m, k * BLOCK_K, lora_a_at, first_n, k * BLOCK_K, 0)
            step += 1
        for lane in range(share, LANES, SPLIT_K):
            half = (lane % (LANES // 2)) * BLOCK_K
            if lane < LANES // 2:
                for i in gl.static_range(TILES):
                    load_step(lora_b_desc, high_desc, ring, full, empty, step, lora_b_at, first_m, first_n + i * BLOCK_N + half, layer, first_n, first_n + i * BLOCK_N + half, i)
                    step += 1
            if lane >= LANES // 2:
                for i in gl.static_range(TILES):
                    load_step(lora_b_desc, low_desc, ring, full, empty, step, lora_b_at, first_m, first_n + i * BLOCK_N + half, layer, first_n, first_n + i * BLOCK_N + half, i)
                    step += 1

        for i in gl.static_range(TILES):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), b_tile_desc.block_type.nbytes)
            b_smem = ring.index(stage).slice(0, 2 * BLOCK_N)._reinterpret(b_tile_desc.dtype, [1, BLOCK_M, BLOCK_N], b_tile_desc.layout)
            tma.async_copy_global_to_shared(b_tile_desc, [lora_b_at, first_m, first_n + i * BLOCK_N], full.index(stage), b_smem)
            step += 1


@gluon.jit
def sum_row_dots(adapter_squares_ptr, sums_ptr, b_tile_desc, ring, full, empty, first_tile, count):
    """Eight warps: acc = W @ A.T + B @ (s/2)G over a share of the inner sums, then sum_n B[:, n] * acc[:, n].

    And sum_n B[:, n]**2 * s*rowsum(A*A)[n], which the last kernel compares the norm with.
    """
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    TILES: gl.constexpr = 1
    GROUPS: gl.constexpr = 1
    ROW_BLOCKS: gl.constexpr = 34
    K_STEPS: gl.constexpr = 18
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 1
    STAGES: gl.constexpr = 4
    D_OUT: gl.constexpr = 4304
    RANK: gl.constexpr = 24
    LAYER_SUMS: gl.constexpr = 12912

    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    step = 0
    for tile in range(first_tile, count, gl.num_programs(0)):
        share = tile % SPLIT_K
        group = tile // SPLIT_K % GROUPS
        first_m = tile // (SPLIT_K * GROUPS) % ROW_BLOCKS * BLOCK_M
        layer = tile // (SPLIT_K * GROUPS * ROW_BLOCKS)
        acc_0 = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, TILE)
        for k in range(0, K_STEPS):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = ring.index(stage)
            left = rows.slice(0, BLOCK_M)
            acc_0 = warpgroup_mma(left, rows.slice(BLOCK_M, BLOCK_N).permute((1, 0)), acc_0, is_async=True)
            acc_0 = warpgroup_mma_wait(1, deps=(acc_0,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)  # the step before is done
            step += 1
        for _ in range(share, LANES, SPLIT_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = ring.index(stage)
            left = rows.slice(0, BLOCK_M)
            acc_0 = warpgroup_mma(left, rows.slice(BLOCK_M, BLOCK_N).permute((1, 0)), acc_0, is_async=True)
            acc_0 = warpgroup_mma_wait(1, deps=(acc_0,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=True)  # the step before is done
            step += 1
        acc_0 = warpgroup_mma_wait(0, deps=(acc_0,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        b_0 = ring.index(stage).slice(0, 2 * BLOCK_N)._reinterpret(b_tile_desc.dtype, [BLOCK_M, BLOCK_N], SWIZZLED).load(TILE)
        fence_async_shared()  # read before it is loaded over
        mbarrier.arrive(empty.index(stage), count=1)
        n_0 = (group * TILES + 0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, TILE))
        adapter_squares_0 = gl.load(adapter_squares_ptr + layer.to(gl.int64) * RANK + n_0, mask=n_0 < RANK, other=0.0)
        dots = gl.sum(acc_0 * b_0.to(gl.float32), axis=1)
        summands = gl.sum(b_0.to(gl.float32) * b_0.to(gl.float32) * adapter_squares_0[None, :], axis=1)
        step += 1
        rows = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TILE))
        sums = sums_ptr + layer.to(gl.int64) * LAYER_SUMS + rows
        partial = SPLIT_K + 2 * (group * SPLIT_K + share).to(gl.int64)
        gl.store(sums + partial * D_OUT, dots, mask=rows < D_OUT)
        gl.store(sums + (partial + 1) * D_OUT, summands, mask=rows < D_OUT)


@gluon.jit
def sum_squares(sums_ptr, ring, full, empty, first_tile, count):
    """Two warps: rowsum(W*W) over a share of the columns, from the tiles that are being multiplied."""
    BLOCK_M: gl.constexpr = 128
    HALF: gl.constexpr = 64
    TILES: gl.constexpr = 1
    GROUPS: gl.constexpr = 1
    ROW_BLOCKS: gl.constexpr = 34
    BLOCK_K: gl.constexpr = 64
    K_STEPS: gl.constexpr = 18
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 1
    STAGES: gl.constexpr = 4
    D_OUT: gl.constexpr = 4304
    LAYER_SUMS: gl.constexpr = 12912

    ROWS: gl.constexpr = gl.BlockedLayout([1, BLOCK_K], [32, 1], [2, 1], [1, 0])
    step = 0
    for tile in range(first_tile, count, gl.num_programs(0)):
        share = tile % SPLIT_K
        group = tile // SPLIT_K % GROUPS
        first_m = tile // (SPLIT_K * GROUPS) % ROW_BLOCKS * BLOCK_M
        layer = tile // (SPLIT_K * GROUPS * ROW_BLOCKS)
        upper_squares = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, ROWS))
        lower_squares = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, ROWS))
        for k in range(0, K_STEPS):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            # Only now: loads of the step before may still be on their way when the instructions after them start.
            fence_async_shared()
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            upper = ring.index(stage).slice(0, HALF).load(ROWS).to(gl.float32)
            upper_squares += gl.sum(upper * upper, axis=1)
            lower = ring.index(stage).slice(HALF, HALF).load(ROWS).to(gl.float32)
            lower_squares += gl.sum(lower * lower, axis=1)
            step += 1
        fence_async_shared()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        rows = first_m + gl.arange(0, HALF, gl.SliceLayout(1, ROWS))
        sums = sums_ptr + layer.to(gl.int64) * LAYER_SUMS + share.to(gl.int64) * D_OUT
        gl.store(sums + rows, upper_squares, mask=(group == 0) & (rows < D_OUT))
        rows += HALF
        gl.store(sums + rows, lower_squares, mask=(group == 0) & (rows < D_OUT))

        for _ in range(share, LANES, SPLIT_K):  # what follows W in the ring needs no squares, but its stages are shared
            for _ in range(0, (group + 1) * TILES):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
        for _ in range(0, TILES):
            mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1


@gluon.jit
def sums_kernel(
    table_ptr: "*i64",
    weight_desc: "tensordesc<bf16[1, 128, 64]>",
    lora_a_desc: "tensordesc<bf16[1, 64, 64]>",
    lora_b_desc: "tensordesc<bf16[1, 128, 64]>",
    high_desc: "tensordesc<bf16[1, 64, 64]>",
    low_desc: "tensordesc<bf16[1, 64, 64]>",
    lora_b_tile_desc: "tensordesc<bf16[1, 128, 64]>",
    adapter_squares_ptr: "*fp32",
    sums_ptr: "*fp32",
    count: "i32",
):
    """Write the sums over W of the ``count`` tiles of all layers: of squares, and of B * (W @ A.T + B @ (s/2)G).

    Each program takes every num_programs-th tile, so that its loads go on while it finishes one. Descriptors read zeros
    beyond a layer's edges, so ranks and columns that do not exist add nothing.
    """
    BLOCK_K: gl.constexpr = 64
    STAGES: gl.constexpr = 4
    STAGE_ROWS: gl.constexpr = 256

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    ring = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, STAGE_ROWS, BLOCK_K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    first_tile = gl.program_id(0)
    gl.warp_specialize(
        [
            (sum_row_dots, (adapter_squares_ptr, sums_ptr, lora_b_tile_desc, ring, full, empty, first_tile, count)),
            (load_tiles, (table_ptr, weight_desc, lora_a_desc, lora_b_desc, high_desc, low_desc, lora_b_tile_desc, ring, full, empty, first_tile, count)),
            (sum_squares, (sums_ptr, ring, full, empty, first_tile, count)),
        ],
        [1, 2],
        [40, 40],
    )


@triton.jit
def finish_kernel(
    table_ptr: "*i64",
    weight_ptr: "*bf16",
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
    BLOCK_M: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 256
    RANKS: tl.constexpr = 8
    SHARES: tl.constexpr = 1
    PARTIALS: tl.constexpr = 1
    LAYER_SUMS: tl.constexpr = 12912
    LEAST_SHARE: tl.constexpr = 0.5
    EPS: tl.constexpr = 1e-12

    tl.extra.cuda.gdc_wait()
    layer = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_M + lane
    in_m = rows < D_OUT
    places = table_ptr + layer * 4
    b_start = lora_b_ptr + tl.multiple_of(tl.load(places + 2), 8)
    sums = sums_ptr + layer * LAYER_SUMS + rows
    weight_sq = tl.full((BLOCK_M,), 0.0, tl.float32)
    for _ in tl.static_range(SHARES):
        weight_sq += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
    cross = tl.full((BLOCK_M,), 0.0, tl.float32)
    summands = tl.full((BLOCK_M,), 0.0, tl.float32)
    for partial in tl.static_range(PARTIALS):
        cross += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
        if partial % SHARES == 0:  # equal for all shares of the columns
            summands += tl.load(sums, mask=in_m, other=0.0)
        sums += D_OUT
    s = tl.full((BLOCK_M,), scaling, tl.float32)
    norm = tl.sqrt(tl.maximum(weight_sq + 2.0 * s * cross, 0.0))

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
                    in_k = k < D_IN - start
                    ba = tl.full((BLOCK_K,), 0.0, tl.float64)
                    for first in range(0, RANK, RANKS):
                        b_row = tl.load(b_start + row * RANK + first + rank).to(tl.bfloat16).to(tl.float64)
                        a = tl.load(a_start + (first + rank).to(tl.int64)[:, None] * D_IN + start + k[None, :], mask=in_k[None, :], other=0.0).to(tl.bfloat16).to(tl.float64)
                        ba += tl.sum(b_row[:, None] * a, axis=0)
                    w = tl.load(weight_start + row * D_IN + start + k, mask=in_k, other=0.0).to(tl.float64)
                    entry = w + s_wide * ba
                    squared += entry * entry
                exact = tl.sqrt(tl.sum(squared, axis=0)).to(tl.float32)
                norm = tl.where(lane == i, exact, norm)
    tl.store(norm_ptr + layer * D_OUT + rows, norm, mask=in_m)
    magnitude = tl.load(magnitude_ptr + tl.load(places + 3) + rows, mask=in_m, other=0.0).to(tl.float32)
    tl.store(g_ptr + layer * D_OUT + rows, magnitude / tl.maximum(norm, EPS), mask=in_m)


def launch(table, weight, lora_a, lora_b, magnitude, norm, g, scaling):
    """Fill norm, g [layers, 4304] for the layers of table [layers, 4]: where weight [4304, 1152], lora_a [24, 1152], lora_b [4304, 24] and magnitude [4304] of each begin, in elements from those given."""
    layers = table.shape[0]
    count = layers * 34
    gram = torch.empty((2, layers, 24, 24), dtype=weight.dtype, device=weight.device)
    adapter_squares = torch.empty((layers, 24), dtype=torch.float32, device=weight.device)
    sums = torch.empty((layers, 3, 4304), dtype=torch.float32, device=weight.device)
    rounded_a = torch.empty((layers, 24, 1152), dtype=weight.dtype, device=weight.device)
    rounded_b = torch.empty((layers, 4304, 24), dtype=weight.dtype, device=weight.device)
    round_kernel[(layers, 51)](table, lora_a, lora_b, rounded_a, rounded_b, num_warps=4, num_stages=2)
    gram_kernel[(layers, 1)](
        rounded_a, gram, adapter_squares, scaling, num_warps=4, num_stages=3, launch_pdl=True
    )
    step_layout = gl.NVMMASharedLayout.get_default_for([1, 128, 64], gl.bfloat16)
    tile_layout = gl.NVMMASharedLayout.get_default_for([1, 128, 64], gl.bfloat16)
    sums_kernel[(min(count, 132),)](
        table,
        TensorDescriptor(weight, [2147483647, 4304, 1152], [128, 1152, 1], [1, 128, 64], step_layout),
        TensorDescriptor(rounded_a, [2147483647, 24, 1152], [27648, 1152, 1], [1, 64, 64], step_layout),
        TensorDescriptor(rounded_b, [2147483647, 4304, 24], [103296, 24, 1], [1, 128, 64], step_layout),
        TensorDescriptor(gram[0], [layers, 24, 24], [576, 24, 1], [1, 64, 64], step_layout),
        TensorDescriptor(gram[1], [layers, 24, 24], [576, 24, 1], [1, 64, 64], step_layout),
        TensorDescriptor(rounded_b, [2147483647, 4304, 24], [103296, 24, 1], [1, 128, 64], tile_layout),
        adapter_squares, sums, count, num_warps=8, num_stages=4, launch_pdl=True,
    )
    finish_kernel[(layers, 34)](
        table, weight, lora_a, lora_b, magnitude, sums, norm, g, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
