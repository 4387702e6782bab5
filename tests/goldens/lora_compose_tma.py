"""DoRA composition as the epilogue of the rank-r product, tiles moved by the tensor memory accelerator.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  tma:block_k=64,block_n=128,block_t=128,num_warps=4,num_stages=3

Emitted by doratune from templates/lora_compose_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def lora_compose_kernel(
    base_desc: "tensordesc<bf16[128, 128]>",
    h_desc: "tensordesc<bf16[128, 64]>",
    lora_b_desc: "tensordesc<bf16[128, 64]>",
    g_ptr: "*fp32",
    y_desc: "tensordesc<bf16[128, 128]>",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; base and y may be the same memory. Descriptors clip at the edges."""
    RANK: tl.constexpr = 384
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    N_TILES: tl.constexpr = 32

    first_t = (tl.program_id(0) // N_TILES) * BLOCK_T
    first_n = (tl.program_id(0) % N_TILES) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)

    lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_K):
        h = h_desc.load([first_t, start])
        b = lora_b_desc.load([first_n, start])
        lora = tl.dot(h, b.T, lora)

    base = base_desc.load([first_t, first_n])  # not before the loop: its registers are worth more there
    g = tl.load(g_ptr + n)[None, :]
    inner = base.to(tl.float32) + scaling * lora
    y = g * inner
    y_desc.store([first_t, first_n], y.to(tl.bfloat16))


def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    tile = [128, 128]
    lora_compose_kernel[(triton.cdiv(base.shape[0], 128) * 32,)](
        TensorDescriptor.from_tensor(base, tile),
        TensorDescriptor.from_tensor(h, [128, 64]),
        TensorDescriptor.from_tensor(lora_b, [128, 64]),
        g,
        TensorDescriptor.from_tensor(y, tile),
        scaling,
        num_warps=4, num_stages=3,
    )
