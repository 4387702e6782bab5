"""The gradients of B and m from the product dY.T@h, one pass over its rows.

    dB = g*s*P; dg = sum_t dY*base + s*rowsum(B*P) with P = dY.T@h; dm = dg / max(w, eps)

spec    adapter_backward/d_out=4096/rank=384/activation=bf16/adapter=bf16@h200
config  rows:block_n=4,block_r=512,num_warps=4,num_stages=2

Emitted by doratune from templates/adapter_backward_rows.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def adapter_backward_kernel(
    product_ptr: "*fp32",
    product_stride: "i64",
    lora_b_ptr: "*bf16",
    lora_b_stride: "i64",
    g_ptr: "*fp32",
    dg_base_ptr: "*fp32",
    dlora_b_ptr: "*bf16",
    dlora_b_stride: "i64",
    dg_ptr: "*fp32",
    scaling: "fp32",
):
    """Write BLOCK_N rows of dB, and of dg with the rank-r term added to dg_base; dlora_b may be the memory of product."""
    RANK: tl.constexpr = 384
    BLOCK_N: tl.constexpr = 4
    BLOCK_R: tl.constexpr = 512

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]
    r = tl.arange(0, BLOCK_R)
    g = tl.load(g_ptr + n)[:, None]
    sums = tl.full((BLOCK_N, BLOCK_R), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_R):
        column = (start + r)[None, :]
        product = scaling * tl.load(product_ptr + row * product_stride + column, mask=(r < RANK - start)[None, :], other=0.0)
        b = tl.load(lora_b_ptr + row * lora_b_stride + column, mask=(r < RANK - start)[None, :], other=0.0).to(tl.float32)
        tl.store(dlora_b_ptr + row * dlora_b_stride + column, (g * product).to(tl.bfloat16), mask=(r < RANK - start)[None, :])
        sums += b * product

    dg = tl.load(dg_base_ptr + n) + tl.sum(sums, axis=1)
    tl.store(dg_ptr + n, dg)


def launch(product, lora_b, g, dg_base, dlora_b, dg, scaling):
    """Fill dlora_b [4096, 384] and dg [4096] from product and lora_b [4096, 384], g and dg_base [4096]."""
    adapter_backward_kernel[(1024,)](
        product, product.stride(0), lora_b, lora_b.stride(0), g, dg_base, dlora_b, dlora_b.stride(0),
        dg, scaling, num_warps=4, num_stages=2,
    )
