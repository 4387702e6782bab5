"""DoRA composition in one pass over base and lora.

    y = g*(base + s*lora) + b; delta form: (g-1)*base + g*s*lora

spec    compose_forward/d_out=4096/tokens=4096/activation=bf16@h200
config  tile:block_n=1024,block_t=4,num_warps=4,num_stages=2

Emitted by doratune from templates/compose_forward_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def compose_forward_kernel(
    base_ptr: "*bf16",
    base_stride: "i64",
    lora_ptr: "*bf16",
    lora_stride: "i64",
    g_ptr: "*fp32",
    y_ptr: "*bf16",
    y_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; y may be the memory of base or lora."""
    BLOCK_T: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 1024
    N_TILES: tl.constexpr = 4

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = (t < tokens)[:, None]

    base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t, other=0.0).to(tl.float32)
    lora = tl.load(lora_ptr + row * lora_stride + n[None, :], mask=in_t, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + n)[None, :]
    inner = base + scaling * lora
    y = g * inner
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t)


def launch(base, lora, g, y, scaling):
    """Fill y from base and lora [T, 4096], g [4096]."""
    tokens = base.shape[0]
    compose_forward_kernel[(triton.cdiv(tokens, 4) * 4,)](
        base, base.stride(0), lora, lora.stride(0), g, y, y.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
