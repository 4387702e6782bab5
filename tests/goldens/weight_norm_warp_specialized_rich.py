"""Row norm of W + sBA without BA: one warp loads, eight multiply, two square, and G enters below its diagonal only.

    w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)

spec    weight_norm/d_out=4304/d_in=1152/rank=24/weight=bf16/adapter=fp32/magnitude=fp32/save/autocast@h200
config  warp_specialized:gram_block=64,gram_block_k=128,gram_programs=2,gram_share=1024,gram_stages=6,rank_block=64,rank_tiles=1,split_k=3,num_warps=8,num_stages=3

Emitted by doratune from templates/weight_norm_warp_specialized.py.j2; edit the template, not this text.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
import triton.language as tl
from triton.tools import tensor_descriptor


@triton.jit
def adapter_parts_kernel(
    lora_a_ptr: "*fp32",
    lora_a_stride: "i64",
    lora_a_parts_ptr: "*bf16",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    lora_b_parts_ptr: "*bf16",
):
    """Round fp32 adapters, a [LINES, BLOCK] tile per program."""
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


@triton.jit
def gram_shares_kernel(lora_a_desc: "tensordesc<bf16[64, 128]>", gram_shares_ptr: "*fp32"):
    """Write one [BLOCK, BLOCK] tile on or below the diagonal of A @ A.T, over one share of the columns of A."""
    RANK: tl.constexpr = 24
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 128
    SHARE: tl.constexpr = 1024
    TILES: tl.constexpr = 1

    tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    tile_row = 0
    for i in tl.static_range(1, TILES):
        tile_row += (tile >= i * (i + 1) // 2).to(tl.int32)
    first_row = tile_row * BLOCK
    first_col = (tile - tile_row * (tile_row + 1) // 2) * BLOCK
    share = tl.program_id(1)
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        left = lora_a_desc.load([first_row, share * SHARE + start])
        right = lora_a_desc.load([first_col, share * SHARE + start])
        gram = tl.dot(left, right.T, gram)
    rows = (first_row + tl.arange(0, BLOCK))[:, None]
    cols = (first_col + tl.arange(0, BLOCK))[None, :]
    out = share * (RANK * RANK) + rows * RANK + cols
    tl.store(gram_shares_ptr + out, gram, mask=(rows < RANK) & (cols < RANK))


@triton.jit
def lower_gram_kernel(gram_shares_ptr: "*fp32", high_ptr: "*bf16", low_ptr: "*bf16", arrivals_ptr: "*i32", scaling: "fp32"):
    """Add the shares of A @ A.T in a fixed order; scale what lies in a diagonal block by s/2, what lies below it by s.

    The first program also sets the counters to zero by which the next kernel knows the last program of a row block.
    """
    RANK: tl.constexpr = 24
    SHARES: tl.constexpr = 2
    DIAGONAL: tl.constexpr = 64
    GRAM_BLOCK: tl.constexpr = 64
    BLOCK: tl.constexpr = 512
    STEPS: tl.constexpr = 1
    ROW_BLOCKS: tl.constexpr = 34
    COUNTERS: tl.constexpr = 64

    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    if tl.program_id(0) == 0:
        counters = tl.arange(0, COUNTERS)
        tl.store(arrivals_ptr + counters, 0, mask=counters < ROW_BLOCKS)
    for step in range(0, STEPS):
        i = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        row = i // RANK
        col = i % RANK
        needed = (row // DIAGONAL >= col // DIAGONAL) & (row < RANK)
        there = tl.where(row // GRAM_BLOCK >= col // GRAM_BLOCK, i, col * RANK + row)  # or its mirror image
        gram = tl.full((BLOCK,), 0.0, tl.float32)
        for share in tl.static_range(0, SHARES):
            gram += tl.load(gram_shares_ptr + share * (RANK * RANK) + there, mask=needed, other=0.0)
        gram *= tl.where(row // DIAGONAL > col // DIAGONAL, scaling, 0.5 * scaling)
        high = gram.to(tl.bfloat16)
        low = (gram - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(high_ptr + i, high, mask=needed)
        tl.store(low_ptr + i, low, mask=needed)


@gluon.jit
def load_step(left_desc, right_desc, ring, full, empty, step, first_m, left_k, right_row, right_k, FIRST_TILE: gl.constexpr):
    """Fill one stage of the ring: BLOCK_M rows of the left factor above the rank tiles from FIRST_TILE on."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    STAGES: gl.constexpr = 3

    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), (BLOCK_M + (TILES - FIRST_TILE) * BLOCK_N) * BLOCK_K * 2)
    rows = ring.index(stage)
    tma.async_copy_global_to_shared(left_desc, [first_m, left_k], full.index(stage), rows.slice(0, BLOCK_M))
    for i in gl.static_range(FIRST_TILE, TILES):
        tma.async_copy_global_to_shared(
            right_desc, [right_row + i * BLOCK_N, right_k], full.index(stage), rows.slice(BLOCK_M + i * BLOCK_N, BLOCK_N)
        )


@gluon.jit
def load_tiles(weight_desc, lora_a_desc, lora_b_desc, high_desc, low_desc, b_tile_desc, ring, full, empty, first_m, group, share):
    """One warp keeps the tensor memory accelerator busy, in the order in which sum_row_dots consumes."""
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    BLOCK_K: gl.constexpr = 64
    TILES: gl.constexpr = 1
    K_STEPS: gl.constexpr = 6
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 3
    STAGES: gl.constexpr = 3

    first_n = group * TILES * BLOCK_N
    step = 0
    for k in range(share * K_STEPS, (share + 1) * K_STEPS):
        load_step(weight_desc, lora_a_desc, ring, full, empty, step, first_m, k * BLOCK_K, first_n, k * BLOCK_K, 0)
        step += 1

    # Started early: all above needs nothing from the kernels before.
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for lane in range(share, LANES, SPLIT_K):
        half = (lane % (LANES // 2)) * BLOCK_K
        if lane < LANES // 2:
            for i in gl.static_range(TILES):
                load_step(lora_b_desc, high_desc, ring, full, empty, step, first_m, first_n + i * BLOCK_N + half, first_n, first_n + i * BLOCK_N + half, i)
                step += 1
        if lane >= LANES // 2:
            for i in gl.static_range(TILES):
                load_step(lora_b_desc, low_desc, ring, full, empty, step, first_m, first_n + i * BLOCK_N + half, first_n, first_n + i * BLOCK_N + half, i)
                step += 1

    for i in gl.static_range(TILES):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), b_tile_desc.block_type.nbytes)
        b_smem = ring.index(stage).slice(0, 2 * BLOCK_N)._reinterpret(b_tile_desc.dtype, [BLOCK_M, BLOCK_N], b_tile_desc.layout)
        tma.async_copy_global_to_shared(b_tile_desc, [first_m, first_n + i * BLOCK_N], full.index(stage), b_smem)
        step += 1


@gluon.jit
def sum_row_dots(
    squares_ptr, partials_ptr, arrivals_ptr, magnitude_ptr, norm_ptr, g_ptr, weight_sq_ptr, b_tile_desc, ring, full, empty, squared, first_m, group, share, scaling
):
    """Eight warps: acc = W @ A.T + B @ (s/2)G over this program's share of the inner sums, then sum_n B[:, n] * acc[:, n].

    The last program of a row block to arrive adds the shares of all, in a fixed order, to rowsum(W*W) and takes the root.
    """
    BLOCK_M: gl.constexpr = 128
    BLOCK_N: gl.constexpr = 64
    K_STEPS: gl.constexpr = 6
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 3
    STAGES: gl.constexpr = 3
    PARTIALS: gl.constexpr = 3
    D_OUT: gl.constexpr = 4304
    EPS: gl.constexpr = 1e-12

    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    acc_0 = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, TILE)
    step = 0
    for _ in range(0, K_STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        rows = ring.index(stage)
        left = rows.slice(0, BLOCK_M)
        acc_0 = warpgroup_mma(left, rows.slice(BLOCK_M, BLOCK_N).permute((1, 0)), acc_0, is_async=True)
        acc_0 = warpgroup_mma_wait(1, deps=(acc_0,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)  # the step before is done
        step += 1
    for _ in range(share, LANES, SPLIT_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        rows = ring.index(stage)
        left = rows.slice(0, BLOCK_M)
        acc_0 = warpgroup_mma(left, rows.slice(BLOCK_M, BLOCK_N).permute((1, 0)), acc_0, is_async=True)
        acc_0 = warpgroup_mma_wait(1, deps=(acc_0,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)  # the step before is done
        step += 1
    acc_0 = warpgroup_mma_wait(0, deps=(acc_0,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    b = ring.index(stage).slice(0, 2 * BLOCK_N)._reinterpret(b_tile_desc.dtype, [BLOCK_M, BLOCK_N], b_tile_desc.layout).load(TILE)
    mbarrier.arrive(empty.index(stage), count=1)
    dots = gl.sum(acc_0 * b.to(gl.float32), axis=1)
    step += 1
    rows = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TILE))
    mbarrier.wait(squared, 0)  # the two warps have stored theirs
    partial = share
    gl.store(partials_ptr + partial * D_OUT + rows, dots, mask=rows < D_OUT)
    tl.debug_barrier()  # all eight warps have stored before one of them says so
    arrived = gl.atomic_add(arrivals_ptr + first_m // BLOCK_M, 1, sem="acq_rel", scope="gpu")
    if arrived == PARTIALS - 1:
        dots = gl.load(partials_ptr + rows, mask=rows < D_OUT, other=0.0)
        for i in gl.static_range(1, PARTIALS):
            dots += gl.load(partials_ptr + i * D_OUT + rows, mask=rows < D_OUT, other=0.0)
        weight_sq = gl.load(squares_ptr + rows, mask=rows < D_OUT, other=0.0)
        for i in gl.static_range(1, SPLIT_K):
            weight_sq += gl.load(squares_ptr + i * D_OUT + rows, mask=rows < D_OUT, other=0.0)
        gl.store(weight_sq_ptr + rows, weight_sq, mask=rows < D_OUT)
        norm = gl.sqrt(gl.maximum(weight_sq + (2.0 * scaling) * dots, 0.0))
        gl.store(norm_ptr + rows, norm, mask=rows < D_OUT)
        magnitude = gl.load(magnitude_ptr + rows, mask=rows < D_OUT, other=0.0).to(gl.float32)
        gl.store(g_ptr + rows, magnitude / gl.maximum(norm, EPS), mask=rows < D_OUT)


@gluon.jit
def sum_squares(squares_ptr, ring, full, empty, squared, first_m, group, share):
    """Two warps: rowsum(W*W) over this program's share of the columns, from the tiles that are being multiplied."""
    HALF: gl.constexpr = 64
    TILES: gl.constexpr = 1
    BLOCK_K: gl.constexpr = 64
    K_STEPS: gl.constexpr = 6
    LANES: gl.constexpr = 2
    SPLIT_K: gl.constexpr = 3
    STAGES: gl.constexpr = 3
    D_OUT: gl.constexpr = 4304

    ROWS: gl.constexpr = gl.BlockedLayout([1, BLOCK_K], [32, 1], [2, 1], [1, 0])
    upper_squares = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, ROWS))
    lower_squares = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, ROWS))
    for step in range(0, K_STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        # Only now: loads of the step before may still be on their way when the instructions after them start.
        fence_async_shared()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        upper = ring.index(stage).slice(0, HALF).load(ROWS).to(gl.float32)
        upper_squares += gl.sum(upper * upper, axis=1)
        lower = ring.index(stage).slice(HALF, HALF).load(ROWS).to(gl.float32)
        lower_squares += gl.sum(lower * lower, axis=1)
    fence_async_shared()
    mbarrier.arrive(empty.index((K_STEPS - 1) % STAGES), count=1)
    rows = first_m + gl.arange(0, HALF, gl.SliceLayout(1, ROWS))
    gl.store(squares_ptr + share * D_OUT + rows, upper_squares, mask=(rows < D_OUT))
    rows += HALF
    gl.store(squares_ptr + share * D_OUT + rows, lower_squares, mask=(rows < D_OUT))
    tl.debug_barrier()  # both warps have stored before one of them says so
    mbarrier.arrive(squared, count=1)

    step = K_STEPS
    for _ in range(share, LANES, SPLIT_K):  # what follows W in the ring needs no squares, but its stages are shared
        for _ in range(0, TILES):
            mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
    for _ in range(0, TILES):
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1


@gluon.jit
def row_dots_kernel(
    weight_desc: "tensordesc<bf16[128, 64]>",
    lora_a_desc: "tensordesc<bf16[64, 64]>",
    lora_b_desc: "tensordesc<bf16[128, 64]>",
    high_desc: "tensordesc<bf16[64, 64]>",
    low_desc: "tensordesc<bf16[64, 64]>",
    lora_b_tile_desc: "tensordesc<bf16[128, 64]>",
    squares_ptr: "*fp32",
    partials_ptr: "*fp32",
    arrivals_ptr: "*i32",
    magnitude_ptr: "*fp32",
    norm_ptr: "*fp32",
    g_ptr: "*fp32",
    weight_sq_ptr: "*fp32",
    scaling: "fp32",
):
    """Sum n over B[:, n] * (W @ A.T + B @ (s/2)G)[:, n] for BLOCK_M rows, 1 x BLOCK_N ranks and one share of the inner sums.

    Descriptors read zeros beyond the edges, so ranks and columns that do not exist add nothing.
    """
    BLOCK_M: gl.constexpr = 128
    BLOCK_K: gl.constexpr = 64
    STAGES: gl.constexpr = 3
    STAGE_ROWS: gl.constexpr = 256

    ring = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, STAGE_ROWS, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    squared = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(squared, count=1)
    fence_async_shared()

    first_m = gl.program_id(0) * BLOCK_M
    group = 0
    share = gl.program_id(1)
    gl.warp_specialize(
        [
            (sum_row_dots, (squares_ptr, partials_ptr, arrivals_ptr, magnitude_ptr, norm_ptr, g_ptr, weight_sq_ptr, lora_b_tile_desc, ring, full, empty, squared, first_m, group, share, scaling)),
            (load_tiles, (weight_desc, lora_a_desc, lora_b_desc, high_desc, low_desc, lora_b_tile_desc, ring, full, empty, first_m, group, share)),
            (sum_squares, (squares_ptr, ring, full, empty, squared, first_m, group, share)),
        ],
        [1, 2],
        [40, 40],
    )


def launch(weight, lora_a, lora_b, magnitude, norm, g, weight_sq, scaling):
    """Fill norm, g, weight_sq [4304] from weight [4304, 1152], lora_a [24, 1152], lora_b [4304, 24]."""
    gram_shares = torch.empty((2, 24, 24), dtype=torch.float32, device=weight.device)
    lower_gram = torch.empty((2, 24, 24), dtype=weight.dtype, device=weight.device)
    partials = torch.empty((3, 4304), dtype=torch.float32, device=weight.device)
    arrivals = torch.empty(34, dtype=torch.int32, device=weight.device)
    squares = torch.empty((3, 4304), dtype=torch.float32, device=weight.device)
    lora_a_parts = torch.empty((24, 1152), dtype=weight.dtype, device=weight.device)
    lora_b_parts = torch.empty((4304, 24), dtype=weight.dtype, device=weight.device)
    adapter_parts_kernel[(104,)](
        lora_a, lora_a.stride(0), lora_a_parts, lora_b, lora_b.stride(0), lora_b_parts, num_warps=4, num_stages=2
    )
    step_layout = gl.NVMMASharedLayout.get_default_for([128, 64], gl.bfloat16)
    tile_layout = gl.NVMMASharedLayout.get_default_for([128, 64], gl.bfloat16)
    gram_shares_kernel[(1, 2)](
        tensor_descriptor.TensorDescriptor.from_tensor(lora_a_parts, [64, 128]), gram_shares, num_warps=4, num_stages=6
    )
    lower_gram_kernel[(2,)](
        gram_shares, lower_gram[0], lower_gram[1], arrivals, scaling, num_warps=4, num_stages=2, launch_pdl=True
    )
    row_dots_kernel[(34 * 1, 3)](
        TensorDescriptor.from_tensor(weight, [128, 64], step_layout),
        TensorDescriptor.from_tensor(lora_a_parts, [64, 64], step_layout),
        TensorDescriptor.from_tensor(lora_b_parts, [128, 64], step_layout),
        TensorDescriptor.from_tensor(lower_gram[0], [64, 64], step_layout),
        TensorDescriptor.from_tensor(lower_gram[1], [64, 64], step_layout),
        TensorDescriptor.from_tensor(lora_b_parts, [128, 64], tile_layout),
        squares, partials, arrivals, magnitude, norm, g, weight_sq, scaling,
        num_warps=8, num_stages=3, launch_pdl=True,
    )
