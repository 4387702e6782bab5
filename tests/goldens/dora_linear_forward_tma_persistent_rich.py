"""DoRA linear layer as one product over d_in + rank, programs that walk over tiles, tensor descriptors.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4304/d_in=1152/rank=24/tokens=4096/weight=bf16/activation=bf16/adapter=bf16/bias/save@h200
config  tma_persistent:block_k=64,block_n=256,block_t=128,group_t=8,parts=2,programs=132,num_warps=8,num_stages=4

Emitted by doratune from templates/dora_linear_forward_tma_persistent.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def dora_linear_kernel(
    x_desc: "tensordesc<bf16[128, 64]>",
    weight_desc: "tensordesc<bf16[256, 64]>",
    h_desc: "tensordesc<bf16[128, 64]>",
    lora_b_desc: "tensordesc<bf16[256, 64]>",
    g_ptr: "*fp32",
    bias_ptr: "*bf16",
    y_desc: "tensordesc<bf16[128, 128]>",
    inner_desc: "tensordesc<bf16[128, 128]>",
    tokens: "i32",
    scaling: "fp32",
):
    """Write every NUM_PROGRAMS-th [BLOCK_T, BLOCK_N] tile of y. Descriptors read zeros beyond the edges and clip there."""
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 256
    BLOCK_K: tl.constexpr = 64
    PART_N: tl.constexpr = 128
    GROUP_T: tl.constexpr = 8
    N_TILES: tl.constexpr = 17

    t_tiles = tl.cdiv(tokens, BLOCK_T)
    for tile in range(tl.program_id(0), t_tiles * N_TILES, tl.num_programs(0)):
        group = tile // (GROUP_T * N_TILES)
        in_group = tile % (GROUP_T * N_TILES)
        group_rows = tl.minimum(t_tiles - group * GROUP_T, GROUP_T)
        tile_t = group * GROUP_T + in_group % group_rows
        tile_n = in_group // group_rows
        first_t = tile_t * BLOCK_T
        first_n = tile_n * BLOCK_N

        acc = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
        for start in range(0, RANK, BLOCK_K):
            h = h_desc.load([first_t, start])
            b = lora_b_desc.load([first_n, start])
            acc = tl.dot(h, b.T, acc)
        acc *= scaling  # in fp32, before W's part comes on top
        for start in range(0, D_IN, BLOCK_K):
            x = x_desc.load([first_t, start])
            w = weight_desc.load([first_n, start])
            acc = tl.dot(x, w.T, acc)

        # Stored in two halves: what passes through shared memory is half as much, which leaves room for a stage.
        halves = tl.split(acc.reshape(BLOCK_T, 2, PART_N).permute(0, 2, 1))
        for half in tl.static_range(2):
            n = first_n + half * PART_N + tl.arange(0, PART_N)
            y = tl.load(g_ptr + n, mask=n < D_OUT, other=0.0)[None, :] * halves[half]
            y += tl.load(bias_ptr + n, mask=n < D_OUT, other=0.0).to(tl.float32)[None, :]
            y_desc.store([first_t, first_n + half * PART_N], y.to(tl.bfloat16))
            inner_desc.store([first_t, first_n + half * PART_N], halves[half].to(tl.bfloat16))


def launch(x, weight, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from x [T, 1152], weight [4304, 1152], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tokens = x.shape[0]
    tiles = triton.cdiv(tokens, 128) * 17
    dora_linear_kernel[(min(tiles, 132),)](
        TensorDescriptor.from_tensor(x, [128, 64]),
        TensorDescriptor.from_tensor(weight, [256, 64]),
        TensorDescriptor.from_tensor(h, [128, 64]),
        TensorDescriptor.from_tensor(lora_b, [256, 64]),
        g,
        bias,
        TensorDescriptor.from_tensor(y, [128, 128]),
        TensorDescriptor.from_tensor(inner, [128, 128]),
        tokens,
        scaling,
        num_warps=8, num_stages=4,
    )
