"""DoRA composition after the library's rank-r product, in one pass.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  library:block_n=512,block_t=4,num_warps=4,num_stages=2

Emitted by doratune from templates/lora_compose_library.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


def bf16_product(left, right, result):
    """Fill result with left @ right.T in fp32; a result of three axes has equal shares of the columns apart."""
    multiply = torch.mm
    if result.ndim == 3:
        left, right = (matrix.unflatten(1, (len(result), -1)).transpose(0, 1) for matrix in (left, right))
        multiply = torch.bmm
    if left.is_cuda:
        multiply(left, right.mT, out_dtype=torch.float32, out=result)
    else:  # on a CPU there is no out_dtype
        multiply(left.float(), right.mT.float(), out=result)


@triton.jit
def compose_kernel(
    base_ptr: "*bf16",
    base_stride: "i64",
    lora_ptr: "*fp32",
    g_ptr: "*fp32",
    y_ptr: "*bf16",
    y_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; base and y may be the same memory."""
    D_OUT: tl.constexpr = 4096
    BLOCK_T: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 512
    N_TILES: tl.constexpr = 8

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row's length it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = (t < tokens)[:, None]

    base = tl.load(base_ptr + row * base_stride + n[None, :], mask=in_t, other=0.0).to(tl.float32)
    lora = tl.load(lora_ptr + row * D_OUT + n[None, :], mask=in_t, other=0.0)
    g = tl.load(g_ptr + n)[None, :]
    inner = base + scaling * lora
    y = g * inner
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t)


@torch.no_grad()
def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    tokens = base.shape[0]
    lora = torch.empty((tokens, 4096), dtype=torch.float32, device=base.device)
    bf16_product(h, lora_b, lora)
    compose_kernel[(triton.cdiv(tokens, 4) * 8,)](
        base, base.stride(0), lora, g, y, y.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
