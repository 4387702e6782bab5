"""A W in a weight format, decoded.

    dense = round(round(code - zero) * scale) for each element of W, as the format has it

spec    weight_dequantise/d_out=4096/d_in=4096/weight=nf4.nested/activation=bf16@h200
config  tile:block_k=1024,block_m=4,num_warps=4,num_stages=2

Emitted by doratune from templates/weight_dequantise_tile.py.j2; edit the template, not this text.
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
def dequantise_kernel(
    weight_ptr: "*u8",
    scales_ptr: "*u8",
    scale_table_ptr: "*fp32",
    outer_scales_ptr: "*fp32",
    scale_offset_ptr: "*fp32",
    dense_ptr: "*bf16",
    dense_stride: "i64",
):
    """Write one [BLOCK_M, BLOCK_K] tile of W."""
    D_IN: tl.constexpr = 4096
    BLOCK_M: tl.constexpr = 4
    BLOCK_K: tl.constexpr = 1024
    PIECES: tl.constexpr = 8
    BLOCK_W: tl.constexpr = 128
    K_TILES: tl.constexpr = 4

    rows = (tl.program_id(0) // K_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_k = (tl.program_id(0) % K_TILES) * BLOCK_K
    k = tile_k + tl.arange(0, BLOCK_W) * PIECES
    weight_start = weight_ptr
    scales_start = scales_ptr
    scale_table_start = scale_table_ptr
    outer_scales_start = outer_scales_ptr
    scale_offset_start = scale_offset_ptr
    scale_offset = tl.load(scale_offset_start)
    word_start = weight_start.to(tl.pointer_type(tl.int32), bitcast=True)
    stored = tl.load(word_start + rows.to(tl.int64)[:, None] * (D_IN // PIECES) + (k // PIECES)[None, :])
    table = table_of_lane()
    words = stored
    row = rows
    number = row[:, None] * 64 + (k // 64)[None, :]
    scale = product(tl.load(scale_table_start + tl.load(scales_start + number).to(tl.int32)), tl.load(outer_scales_start + number // 256)) + scale_offset
    w_0 = (value_of(words >> 4, table) * scale).to(tl.bfloat16)
    w_1 = (value_of(words, table) * scale).to(tl.bfloat16)
    w_2 = (value_of(words >> 12, table) * scale).to(tl.bfloat16)
    w_3 = (value_of(words >> 8, table) * scale).to(tl.bfloat16)
    w_4 = (value_of(words >> 20, table) * scale).to(tl.bfloat16)
    w_5 = (value_of(words >> 16, table) * scale).to(tl.bfloat16)
    w_6 = (value_of(words >> 28, table) * scale).to(tl.bfloat16)
    w_7 = (value_of(words >> 24, table) * scale).to(tl.bfloat16)
    even = tl.join(tl.join(w_0, w_4), tl.join(w_2, w_6))
    odd = tl.join(tl.join(w_1, w_5), tl.join(w_3, w_7))
    w = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))
    column = tile_k + tl.arange(0, BLOCK_K)
    tl.store(dense_ptr + row.to(tl.int64)[:, None] * dense_stride + column[None, :], w)


def launch(weight, scales, scale_table, outer_scales, scale_offset, dense):
    """Fill dense [4096, 4096] from the flat tensors that W is stored in."""
    dequantise_kernel[(4096,)](
        weight, scales, scale_table, outer_scales, scale_offset, dense, dense.stride(0),
        num_warps=4, num_stages=2,
    )
