"""DoRA composition as the epilogue of the rank-r product, each program keeping its columns of B.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4304/rank=24/tokens=4096/activation=bf16/adapter=fp32/autocast@h200
config  stationary:block_k=32,block_n=128,block_t=64,programs_t=3,num_warps=8,num_stages=3

Emitted by doratune from templates/lora_compose_stationary.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def lora_compose_kernel(
    base_ptr: "*bf16",
    base_stride: "i64",
    h_desc: "tensordesc<bf16[64, 32]>",
    lora_b_desc: "tensordesc<bf16[128, 32]>",
    g_ptr: "*fp32",
    y_desc: "tensordesc<bf16[64, 128]>",
    tokens: "i32",
    scaling: "fp32",
):
    """Write every PROGRAMS_T-th [BLOCK_T, BLOCK_N] tile of one column of tiles; base and y may be the same memory.

    BLOCK_N rows of B stay in registers meanwhile: they are the rows of the product here, and the tokens its columns.
    Descriptors read zeros beyond the edges and clip there.
    """
    D_OUT: tl.constexpr = 4304
    BLOCK_T: tl.constexpr = 64
    BLOCK_N: tl.constexpr = 128
    N_TILES: tl.constexpr = 34
    PROGRAMS_T: tl.constexpr = 3

    first_n = (tl.program_id(0) % N_TILES) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    g = tl.load(g_ptr + n, mask=n < D_OUT, other=0.0)[None, :]
    # A left operand that comes straight from a load stays in shared memory; a sum goes into registers, once.
    b_0 = lora_b_desc.load([first_n, 0]) + 0.0

    for tile_t in range(tl.program_id(0) // N_TILES, tl.cdiv(tokens, BLOCK_T), PROGRAMS_T):
        first_t = tile_t * BLOCK_T
        t = first_t + tl.arange(0, BLOCK_T)
        in_t = (t < tokens)[:, None]
        # Loaded through pointers: on its way during the product, where a descriptor's load would be waited for.
        base = tl.load(base_ptr + t[:, None] * base_stride + n[None, :], mask=in_t & (n < D_OUT)[None, :], other=0.0)
        acc = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
        acc = tl.dot(b_0, h_desc.load([first_t, 0]).T, acc)
        lora = acc.T
        inner = base.to(tl.float32) + scaling * lora
        y = g * inner
        y_desc.store([first_t, first_n], y.to(tl.bfloat16))


def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4304], h [T, 24], lora_b [4304, 24], g [4304]."""
    tokens = base.shape[0]
    lora_compose_kernel[(min(triton.cdiv(tokens, 64), 3) * 34,)](
        base,
        base.stride(0),
        TensorDescriptor.from_tensor(h, [64, 32]),
        TensorDescriptor.from_tensor(lora_b, [128, 32]),
        g,
        TensorDescriptor.from_tensor(y, [64, 128]),
        tokens,
        scaling,
        num_warps=8, num_stages=3,
    )
