"""DoRA linear layer for few tokens, W decoded in registers from the words that it is stored in.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4096/d_in=4096/rank=384/tokens=16/weight=nf4.nested/activation=bf16/adapter=bf16@h200
config  packed:block_k=256,block_n=64,overlap=1,split_k=8,num_warps=4,num_stages=3

Emitted by doratune from templates/dora_linear_forward_packed.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def table_of_lane(words):
    """The value of code l mod 16 in lane l of each warp: a table in one register."""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1) % 16
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
def product_kernel(
    x_ptr: "*bf16",
    x_stride: "i64",
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    partials_ptr: "*fp32",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one share of x@W.T + s*(h@B.T) for one [BLOCK_T, BLOCK_N] tile: consecutive columns of W, every SPLIT_K-th block of ranks.

    Rows of W are the rows of the product here and the tokens its columns: few tokens would leave rows empty.
    """
    D_OUT: tl.constexpr = 4096
    D_IN: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_T: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 256
    BLOCK_R: tl.constexpr = 64
    PIECES: tl.constexpr = 8
    BLOCK_W: tl.constexpr = 32
    N_TILES: tl.constexpr = 64
    K_STEPS: tl.constexpr = 2
    SPLIT_K: tl.constexpr = 8

    tl.extra.cuda.gdc_launch_dependents()
    share = tl.program_id(1)
    t = (tl.program_id(0) // N_TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (tl.program_id(0) % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = t < tokens
    rows = n
    words_at = share * (K_STEPS * BLOCK_W) + tl.arange(0, BLOCK_W)
    k = words_at * PIECES
    groups = share * 8 + tl.arange(0, 4)
    weight_start = weight_ptr
    scales_start = scales_ptr
    scale_table_start = scale_table_ptr
    outer_scales_start = outer_scales_ptr
    scale_offset_start = scale_offset_ptr
    scale_offset = tl.load(scale_offset_start)
    word_start = weight_start.to(tl.pointer_type(tl.int32), bitcast=True)
    word_ptrs = word_start + rows.to(tl.int64)[:, None] * (D_IN // PIECES) + words_at[None, :]
    scale_rows = rows * (D_IN // 64)
    x_ptrs = x_ptr + t[None, :, None] * x_stride + k[:, None, None] + tl.arange(0, PIECES)[None, None, :]
    acc = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
    for step in range(0, K_STEPS):
        words = tl.load(word_ptrs + step * BLOCK_W)
        table = table_of_lane(words)
        number = scale_rows[:, None] + (groups + step * 4)[None, :]
        scale = tl.reshape(tl.broadcast_to((product(tl.load(scale_table_start + tl.load(scales_start + number).to(tl.int32)), tl.load(outer_scales_start + number // 256)) + scale_offset)[:, :, None], (BLOCK_N, 4, 8)), (BLOCK_N, BLOCK_W))
        x = tl.load(x_ptrs + step * BLOCK_K, mask=in_t[None, :, None], other=0.0)
        even, odd = tl.split(tl.reshape(x, (BLOCK_W, BLOCK_T, 2, 2, 2)))
        even, even_odd = tl.split(even)
        odd, odd_odd = tl.split(odd)
        x_0, x_4 = tl.split(even)
        x_1, x_5 = tl.split(odd)
        x_2, x_6 = tl.split(even_odd)
        x_3, x_7 = tl.split(odd_odd)
        w = value_of(words >> 4, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_0, acc)
        w = value_of(words, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_1, acc)
        w = value_of(words >> 12, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_2, acc)
        w = value_of(words >> 8, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_3, acc)
        w = value_of(words >> 20, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_4, acc)
        w = value_of(words >> 16, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_5, acc)
        w = value_of(words >> 28, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_6, acc)
        w = value_of(words >> 24, table) * scale
        acc = tl.dot(w.to(tl.bfloat16), x_7, acc)

    r = tl.arange(0, BLOCK_R)
    b_ptrs = lora_b_ptr + rows.to(tl.int64)[:, None] * lora_b_stride + r[None, :]
    h_ptrs = h_ptr + t[None, :] * h_stride + r[:, None]
    lora = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
    for start in range(share * BLOCK_R, RANK, SPLIT_K * BLOCK_R):
        b = tl.load(b_ptrs + start)
        h = tl.load(h_ptrs + start, mask=in_t[None, :], other=0.0)
        lora = tl.dot(b, h, lora)
    inner = acc + scaling * lora

    partial = share.to(tl.int64) * tokens + t[None, :]  # times D_OUT it may pass 2**31
    tl.store(partials_ptr + partial * D_OUT + n[:, None], inner, mask=in_t[None, :])


@triton.jit
def finish_kernel(
    partials_ptr: "*fp32",
    g_ptr: "*fp32",
    y_ptr: "*bf16",
    y_stride: "i64",
    tokens: "i64",
):
    """Add the shares of BLOCK_N columns of one token in a fixed order and write y."""
    D_OUT: tl.constexpr = 4096
    BLOCK_N: tl.constexpr = 256
    SPLIT_K: tl.constexpr = 8

    tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)  # times a row's length it may pass 2**31
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.full((BLOCK_N,), 0.0, tl.float32)
    for share in tl.static_range(SPLIT_K):
        inner += tl.load(partials_ptr + (share * tokens + token) * D_OUT + n)
    y = tl.load(g_ptr + n) * inner
    tl.store(y_ptr + token * y_stride + n, y.to(tl.bfloat16))


def launch(x, weight, scales, scale_table, outer_scales, scale_offset, h, lora_b, g, y, scaling):
    """Fill y from x [T, 4096], W [4096, 4096], h [T, 384], lora_b [4096, 384], g [4096]; W is stored in weight, scales, scale_table, outer_scales, scale_offset, flat."""
    tokens = x.shape[0]
    partials = torch.empty((8, tokens, 4096), dtype=torch.float32, device=x.device)
    product_kernel[(triton.cdiv(tokens, 16) * 64, 8)](
        x, x.stride(0), weight, scales, scale_table, outer_scales, scale_offset, h, h.stride(0), lora_b, lora_b.stride(0), partials, tokens, scaling,
        num_warps=4, num_stages=3,
    )
    finish_kernel[(tokens, 16)](
        partials, g, y, y.stride(0), tokens,
        num_warps=4, num_stages=2, launch_pdl=True,
    )
