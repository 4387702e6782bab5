"""DoRA composition after the library's rank-r product, in one pass.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4096/rank=384/tokens=4096/activation=fp32/adapter=fp32@h200
config  library:block_n=512,block_t=4,num_warps=4,num_stages=2

Emitted by doratune from templates/lora_compose_library.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def fp32_product_kernel(
    left_ptr: "*fp32",
    left_stride: "i64",
    right_ptr: "*fp32",
    right_stride: "i64",
    result_ptr: "*fp32",
    left_rows: "i32",
    right_rows: "i32",
    cols: "i32",
):
    """Write one [BLOCK, BLOCK] tile of left @ right.T over one share of `cols` columns."""
    BLOCK: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32

    tiles = tl.cdiv(right_rows, BLOCK)
    i = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    in_i = (i < left_rows)[:, None]
    in_j = (j < right_rows)[None, :]
    left_ptrs = left_ptr + i[:, None] * left_stride + share * cols + k[None, :]
    right_ptrs = right_ptr + j[None, :] * right_stride + share * cols + k[:, None]
    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, cols, BLOCK_K):
        in_k = k < cols - start
        left = tl.load(left_ptrs + start, mask=in_i & in_k[None, :], other=0.0)
        right = tl.load(right_ptrs + start, mask=in_j & in_k[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
    tl.store(result_ptr + (share * left_rows + i)[:, None] * right_rows + j[None, :], acc, mask=in_i & in_j)


def fp32_product(left, right, result):
    """Fill result with left @ right.T in fp32; a result of three axes has equal shares of the columns apart."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # the library would keep 11 bits of each operand
        left_rows, right_rows = result.shape[-2:]
        shares = result.numel() // (left_rows * right_rows)
        fp32_product_kernel[(triton.cdiv(left_rows, 64) * triton.cdiv(right_rows, 64), shares)](
            left, left.stride(0), right, right.stride(0), result, left_rows, right_rows, left.shape[1] // shares,
            num_warps=8, num_stages=2,
        )
        return
    if result.ndim == 3:
        left, right = (matrix.unflatten(1, (len(result), -1)).transpose(0, 1) for matrix in (left, right))
        torch.bmm(left, right.mT, out=result)
        return
    torch.mm(left[:, :1024], right[:, :1024].T, out=result)
    for start in range(1024, left.shape[1], 1024):  # rounded one after another, 4096 terms would be off by 1e-6
        result.addmm_(left[:, start : start + 1024], right[:, start : start + 1024].T)


@triton.jit
def compose_kernel(
    base_ptr: "*fp32",
    base_stride: "i64",
    lora_ptr: "*fp32",
    g_ptr: "*fp32",
    y_ptr: "*fp32",
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
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.float32), mask=in_t)


@torch.no_grad()
def launch(base, h, lora_b, g, y, scaling):
    """Fill y from base [T, 4096], h [T, 384], lora_b [4096, 384], g [4096]."""
    tokens = base.shape[0]
    lora = torch.empty((tokens, 4096), dtype=torch.float32, device=base.device)
    fp32_product(h, lora_b, lora)
    compose_kernel[(triton.cdiv(tokens, 4) * 8,)](
        base, base.stride(0), lora, g, y, y.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
