"""DoRA linear layer as two products of the library and a pass that composes them.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4304/d_in=1152/rank=24/tokens=4096/weight=fp16/activation=fp16/adapter=fp32/bias/save@h200
config  library:block_n=512,block_t=4,num_warps=4,num_stages=2

Emitted by doratune from templates/dora_linear_forward_library.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def fp16_product_kernel(
    left_ptr: "*fp16",
    left_stride: "i64",
    right_ptr: "*fp16",
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
        acc = tl.dot(left, right, acc)
    tl.store(result_ptr + (share * left_rows + i)[:, None] * right_rows + j[None, :], acc, mask=in_i & in_j)


def fp16_product(left, right, result):
    """Fill result with left @ right.T in fp32; a result of three axes has equal shares of the columns apart."""
    if torch.backends.cuda.matmul.allow_fp16_accumulation:  # the library would add in fp16
        left_rows, right_rows = result.shape[-2:]
        shares = result.numel() // (left_rows * right_rows)
        fp16_product_kernel[(triton.cdiv(left_rows, 64) * triton.cdiv(right_rows, 64), shares)](
            left, left.stride(0), right, right.stride(0), result, left_rows, right_rows, left.shape[1] // shares,
            num_warps=8, num_stages=2,
        )
        return
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
    bias_ptr: "*fp16",
    y_ptr: "*fp16",
    y_stride: "i64",
    inner_ptr: "*fp16",
    inner_stride: "i64",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y."""
    D_OUT: tl.constexpr = 4304
    BLOCK_T: tl.constexpr = 4
    BLOCK_N: tl.constexpr = 512
    N_TILES: tl.constexpr = 9

    tile_t = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row's length it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t = (t < tokens)[:, None]
    in_n = n < D_OUT

    base = tl.load(base_ptr + row * D_OUT + n[None, :], mask=in_t & in_n[None, :], other=0.0)
    lora = tl.load(lora_ptr + row * D_OUT + n[None, :], mask=in_t & in_n[None, :], other=0.0)
    g = tl.load(g_ptr + n, mask=in_n, other=0.0)[None, :]
    inner = base + scaling * lora
    y = g * inner
    y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row * y_stride + n[None, :], y.to(tl.float16), mask=in_t & in_n[None, :])
    tl.store(inner_ptr + row * inner_stride + n[None, :], inner.to(tl.float16), mask=in_t & in_n[None, :])


@torch.no_grad()
def launch(x, weight, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from x [T, 1152], weight [4304, 1152], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tokens = x.shape[0]
    base = torch.empty((tokens, 4304), dtype=torch.float32, device=x.device)
    lora = torch.empty_like(base)
    fp16_product(x, weight, base)
    parts = torch.empty((4304, 48), dtype=h.dtype, device=h.device)
    high, low = parts.chunk(2, dim=1)
    high.copy_(lora_b)
    low.copy_(lora_b - high)
    fp16_product(h.repeat(1, 2), parts, lora)
    compose_kernel[(triton.cdiv(tokens, 4) * 9,)](
        base, lora, g, bias, y, y.stride(0), inner, inner.stride(0), tokens, scaling,
        num_warps=4, num_stages=2,
    )
