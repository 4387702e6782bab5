"""DoRA linear layer as two products of the library and a pass that composes them.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4096/d_in=4096/rank=384/tokens=4096/weight=bf16/activation=bf16/adapter=bf16@h200
config  library:block_n=512,block_t=4,num_warps=4,num_stages=2

Emitted by doratune from templates/dora_linear_forward_library.py.j2; edit the template, not this text.
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
    base_ptr: "*fp32",
    lora_ptr: "*fp32",
    g_ptr: "*fp32",
    y_ptr: "*bf16",
    y_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y."""
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

    base = tl.load(base_ptr + row * D_OUT + n[None, :], mask=in_t, other=0.0)
    lora = tl.load(lora_ptr + row * D_OUT + n[None, :], mask=in_t, other=0.0)
    g = tl.load(g_ptr + n)[None, :]
    inner = base + scaling * lora
    y = g * inner
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.bfloat16), mask=in_t)


@torch.no_grad()
def launch(x, weight, h, lora_b, g, y, scaling):
    """Fill y from x [T, 4096], weight [4096, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    tokens = x.shape[0]
    base = torch.empty((tokens, 4096), dtype=torch.float32, device=x.device)
    lora = torch.empty_like(base)
    bf16_product(x, weight, base)
    bf16_product(h, lora_b, lora)
    compose_kernel[(triton.cdiv(tokens, 4) * 8,)](
        base, lora, g, y, y.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
