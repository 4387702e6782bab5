"""DoRA composition in one pass over base and lora.

    y = g*(base + s*lora) + b; delta form: (g-1)*base + g*s*lora

spec    compose_forward/d_out=4304/tokens=4096/activation=bf16/bias/save@h200
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
    bias_ptr: "*bf16",
    y_ptr: "*bf16",
    y_stride: "i64",
    inner_ptr: "*bf16",
    inner_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; y may be the memory of base or lora."""
    D_OUT: tl.constexpr = 4304
    BLOCK_T: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 1024
    N_TILES: tl.constexpr = 5

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = (t < tokens)[:, None]
    in_n = n < D_OUT

    base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
    lora = tl.load(lora_ptr + row * lora_stride + n[None, :], mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    inner = base + scaling * lora
    y = g * inner
    y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t & in_n[None, :])
    tl.store(inner_ptr + row * inner_stride + n[None, :], inner.to(tl.bfloat16), mask=in_t & in_n[None, :])


def launch(base, lora, g, bias, y, inner, scaling):
    """Fill y and inner from base and lora [T, 4304], g [4304], bias [4304]."""
    tokens = base.shape[0]
    compose_forward_kernel[(triton.cdiv(tokens, 4) * 5,)](
        base, base.stride(0), lora, lora.stride(0), g, bias, y, y.stride(0), inner, inner.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
