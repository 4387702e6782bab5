"""DoRA composition as the epilogue of the rank-r product: persistent, with B resident and specialised warps.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  warp_specialized:block_k=64,block_n=128,block_t=64,consumers=2,num_warps=4,num_stages=8

Emitted by doratune from templates/lora_compose_warp_specialized.py.j2; edit the template, not this text.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def load_tiles(base_desc, h_desc, lora_b_desc, b_smem, h_smem, io_smem, b_full, b_empty, h_full, h_empty, io_full, io_empty, first, last, t_tiles):
    """One warp keeps the tensor memory accelerator busy: B once for each block of columns, h and base for each tile."""
    BLOCK_T: gl.constexpr = 64
    BLOCK_N: gl.constexpr = 128
    BLOCK_K: gl.constexpr = 64
    K_STEPS: gl.constexpr = 6
    STAGES: gl.constexpr = 8
    CONSUMERS: gl.constexpr = 2

    first_n = first // t_tiles
    step = 0
    for segment in range(0, (last - 1) // t_tiles - first_n + 1):  # the tiles of one block of columns
        n = first_n + segment
        mbarrier.wait(b_empty, (segment & 1) ^ 1)
        mbarrier.expect(b_full, K_STEPS * lora_b_desc.block_type.nbytes)
        for k in gl.static_range(K_STEPS):
            tma.async_copy_global_to_shared(lora_b_desc, [n * BLOCK_N, k * BLOCK_K], b_full, b_smem.index(k))
        for tile in range(gl.maximum(first, n * t_tiles), gl.minimum(last, (n + 1) * t_tiles)):
            t = tile - n * t_tiles
            for k in gl.static_range(K_STEPS):
                stage = step % STAGES
                mbarrier.wait(h_empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(h_full.index(stage), h_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(h_desc, [t * BLOCK_T, k * BLOCK_K], h_full.index(stage), h_smem.index(stage))
                step += 1
            turn = (tile - first) // CONSUMERS
            consumer = (tile - first) % CONSUMERS
            mbarrier.wait(io_empty.index(consumer), (turn & 1) ^ 1)
            mbarrier.expect(io_full.index(consumer), base_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(base_desc, [t * BLOCK_T, n * BLOCK_N], io_full.index(consumer), io_smem.index(consumer))


@gluon.jit
def compose_tiles(me: gl.constexpr, y_desc, g_ptr, b_smem, h_smem, io_smem, b_full, b_empty, h_full, h_empty, io_full, io_empty, product_turn, first, last, t_tiles, scaling):
    """Four warps compose every 2nd tile: while they are in their epilogue, others use the tensor cores."""
    BLOCK_T: gl.constexpr = 64
    BLOCK_N: gl.constexpr = 128
    K_STEPS: gl.constexpr = 6
    STAGES: gl.constexpr = 8
    CONSUMERS: gl.constexpr = 2

    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    io = io_smem.index(me)
    first_n = first // t_tiles
    for segment in range(0, (last - 1) // t_tiles - first_n + 1):
        n = first_n + segment
        columns = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, TILE))
        g = gl.load(g_ptr + columns)[None, :]
        mbarrier.wait(b_full, segment & 1)
        begin = gl.maximum(first, n * t_tiles)
        mine = begin + (me + CONSUMERS - (begin - first) % CONSUMERS) % CONSUMERS
        for tile in range(mine, gl.minimum(last, (n + 1) * t_tiles), CONSUMERS):
            turn = (tile - first) // CONSUMERS
            step = (tile - first) * K_STEPS
            lora = gl.zeros((BLOCK_T, BLOCK_N), gl.float32, TILE)
            mbarrier.wait(product_turn.index(me), (turn & 1) ^ (1 if me == 0 else 0))  # products in the order of the tiles
            for k in gl.static_range(K_STEPS):
                stage = (step + k) % STAGES
                mbarrier.wait(h_full.index(stage), ((step + k) // STAGES) & 1)
                lora = warpgroup_mma(h_smem.index(stage), b_smem.index(k).permute((1, 0)), lora, is_async=True)
                if k > 0:
                    lora = warpgroup_mma_wait(1, deps=(lora,))
                    mbarrier.arrive(h_empty.index((step + k - 1) % STAGES), count=1)
            lora = warpgroup_mma_wait(0, deps=(lora,))
            mbarrier.arrive(h_empty.index((step + K_STEPS - 1) % STAGES), count=1)
            mbarrier.arrive(product_turn.index((me + 1) % CONSUMERS), count=1)

            mbarrier.wait(io_full.index(me), turn & 1)
            base = io.load(TILE).to(gl.float32)
            inner = base + scaling * lora
            y = g * inner
            row = (tile - n * t_tiles) * BLOCK_T
            io.store(y.to(io.dtype))  # y takes base's place, in shared memory too
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [row, n * BLOCK_N], io)
            tma.store_wait(0)
            mbarrier.arrive(io_empty.index(me), count=1)
        mbarrier.arrive(b_empty, count=1)


@gluon.jit(do_not_specialize=["t_tiles", "share"])
def lora_compose_kernel(
    base_desc: "tensordesc<bf16[64, 128]>",
    h_desc: "tensordesc<bf16[64, 64]>",
    lora_b_desc: "tensordesc<bf16[128, 64]>",
    g_ptr: "*fp32",
    y_desc: "tensordesc<bf16[64, 128]>",
    scaling: "fp32",
    t_tiles: "i32",
    share: "i32",
):
    """Compose `share` tiles of [BLOCK_T, BLOCK_N], column block by column block; base and y may be the same memory."""
    BLOCK_T: gl.constexpr = 64
    BLOCK_N: gl.constexpr = 128
    BLOCK_K: gl.constexpr = 64
    K_STEPS: gl.constexpr = 6
    STAGES: gl.constexpr = 8
    CONSUMERS: gl.constexpr = 2

    N_TILES: gl.constexpr = 32

    b_smem = gl.allocate_shared_memory(lora_b_desc.dtype, [K_STEPS, BLOCK_N, BLOCK_K], lora_b_desc.layout)
    h_smem = gl.allocate_shared_memory(h_desc.dtype, [STAGES, BLOCK_T, BLOCK_K], h_desc.layout)
    io_smem = gl.allocate_shared_memory(base_desc.dtype, [CONSUMERS, BLOCK_T, BLOCK_N], base_desc.layout)
    b_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    io_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    io_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    product_turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(b_full, count=1)
    mbarrier.init(b_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(h_full.index(i), count=1)
        mbarrier.init(h_empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(io_full.index(i), count=1)
        mbarrier.init(io_empty.index(i), count=1)
        mbarrier.init(product_turn.index(i), count=1)
    fence_async_shared()

    first = gl.program_id(0) * share
    last = gl.minimum(first + share, t_tiles * N_TILES)
    gl.warp_specialize(
        [
            (compose_tiles, (0, y_desc, g_ptr, b_smem, h_smem, io_smem, b_full, b_empty, h_full, h_empty, io_full, io_empty, product_turn, first, last, t_tiles, scaling)),
            (compose_tiles, (1, y_desc, g_ptr, b_smem, h_smem, io_smem, b_full, b_empty, h_full, h_empty, io_full, io_empty, product_turn, first, last, t_tiles, scaling)),
            (load_tiles, (base_desc, h_desc, lora_b_desc, b_smem, h_smem, io_smem, b_full, b_empty, h_full, h_empty, io_full, io_empty, first, last, t_tiles)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    io_layout = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    factor_layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    t_tiles = triton.cdiv(base.shape[0], 64)
    share = triton.cdiv(t_tiles * 32, 132)
    lora_compose_kernel[(triton.cdiv(t_tiles * 32, share),)](
        TensorDescriptor.from_tensor(base, [64, 128], io_layout),
        TensorDescriptor.from_tensor(h, [64, 64], factor_layout),
        TensorDescriptor.from_tensor(lora_b, [128, 64], factor_layout),
        g,
        TensorDescriptor.from_tensor(y, [64, 128], io_layout),
        scaling,
        t_tiles,
        share,
        num_warps=4, num_stages=8,
    )
