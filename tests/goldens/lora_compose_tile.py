"""DoRA composition as the epilogue of the rank-r product, one output tile per program.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  tile:block_k=64,block_n=128,block_t=128,num_warps=8,num_stages=3

Emitted by doratune from templates/lora_compose_tile.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def lora_compose_kernel(
    base_ptr: "*bf16",
    h_ptr: "*bf16",
    lora_b_ptr: "*bf16",
    g_ptr: "*fp32",
    y_ptr: "*bf16",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; base and y may be the same memory."""
    D_OUT: tl.constexpr = 4096
    RANK: tl.constexpr = 384
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    N_TILES: tl.constexpr = 32

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    row = (tile_t * BLOCK_T).to(tl.int64)  # tokens * D_OUT may pass 2**31; offsets inside a tile never do
    t = tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t = (t < tokens - tile_t * BLOCK_T)[:, None]

    tile = t[:, None] * D_OUT + n[None, :]
    base = tl.load(base_ptr + row * D_OUT + tile, mask=in_t, other=0.0)

    h_ptrs = h_ptr + row * RANK + t[:, None] * RANK + k[None, :]
    b_ptrs = lora_b_ptr + n[None, :] * RANK + k[:, None]
    lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_K):
        h = tl.load(h_ptrs + start, mask=in_t, other=0.0)
        b = tl.load(b_ptrs + start)
        lora = tl.dot(h, b, lora)

    g = tl.load(g_ptr + n)[None, :]
    inner = base.to(tl.float32) + scaling * lora
    y = g * inner
    tl.store(y_ptr + row * D_OUT + tile, y.to(tl.bfloat16), mask=in_t)


def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    tokens = base.shape[0]
    lora_compose_kernel[(triton.cdiv(tokens, 128) * 32,)](
        base, h, lora_b, g, y, tokens, scaling,
        num_warps=8, num_stages=3,
    )
