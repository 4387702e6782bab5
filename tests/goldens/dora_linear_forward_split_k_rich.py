"""DoRA linear layer for few tokens: shares of the sum over d_in + rank in many programs, then added.

    y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank

spec    dora_linear_forward/d_out=4304/d_in=1152/rank=24/tokens=4096/weight=bf16/activation=bf16/adapter=fp32/bias/save@h200
config  split_k:block_k=32,block_n=64,block_t=128,overlap=1,split_k=3,num_warps=4,num_stages=2

Emitted by doratune from templates/dora_linear_forward_split_k.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def shares_kernel(
    x_ptr: "*bf16",
    x_stride: "i64",
    weight_ptr: "*bf16",
    weight_stride: "i64",
    h_ptr: "*bf16",
    h_stride: "i64",
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    partials_ptr: "*fp32",
    tokens: "i32",
    scaling: "fp32",
):
    """Write one share of x@W.T + s*(h@B.T) for one [BLOCK_T, BLOCK_N] tile: every SPLIT_K-th block of columns.

    Rows of W are the rows of the product here and the tokens its columns: few tokens would leave rows empty, and W goes
    from shared memory into the tensor cores without passing through registers.
    """
    D_OUT: tl.constexpr = 4304
    D_IN: tl.constexpr = 1152
    RANK: tl.constexpr = 24
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 64
    BLOCK_K: tl.constexpr = 32
    N_TILES: tl.constexpr = 68
    SPLIT_K: tl.constexpr = 3

    tl.extra.cuda.gdc_launch_dependents()
    share = tl.program_id(1)
    t = (tl.program_id(0) // N_TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (tl.program_id(0) % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t = (t < tokens)[None, :]
    in_n = n < D_OUT

    b_ptrs = lora_b_ptr + n[:, None] * lora_b_stride + k[None, :]
    h_ptrs = h_ptr + t[None, :] * h_stride + k[:, None]
    acc = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
    for start in range(share * BLOCK_K, RANK, SPLIT_K * BLOCK_K):
        in_r = k < RANK - start
        b = tl.load(b_ptrs + start, mask=in_n[:, None] & in_r[None, :], other=0.0)
        h = tl.load(h_ptrs + start, mask=in_t & in_r[:, None], other=0.0)
        b_high = b.to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(b_high, h, acc)
        acc = tl.dot(b_low, h, acc)
    acc *= scaling  # in fp32, before W's part comes on top

    w_ptrs = weight_ptr + n[:, None] * weight_stride + k[None, :]
    x_ptrs = x_ptr + t[None, :] * x_stride + k[:, None]
    for start in range(share * BLOCK_K, D_IN, SPLIT_K * BLOCK_K):
        w = tl.load(w_ptrs + start, mask=in_n[:, None], other=0.0)
        x = tl.load(x_ptrs + start, mask=in_t, other=0.0)
        acc = tl.dot(w, x, acc)

    partial = share.to(tl.int64) * tokens + t[None, :]  # times D_OUT it may pass 2**31
    tl.store(partials_ptr + partial * D_OUT + n[:, None], acc, mask=in_t & in_n[:, None])


@triton.jit
def finish_kernel(
    partials_ptr: "*fp32",
    g_ptr: "*fp32",
    bias_ptr: "*bf16",
    y_ptr: "*bf16",
    y_stride: "i64",
    inner_ptr: "*bf16",
    inner_stride: "i64",
    tokens: "i64",
):
    """Add the shares of BLOCK_N columns of one token in a fixed order and write y."""
    D_OUT: tl.constexpr = 4304
    BLOCK_N: tl.constexpr = 256
    SPLIT_K: tl.constexpr = 3

    tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)  # times a row's length it may pass 2**31
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < D_OUT
    inner = tl.full((BLOCK_N,), 0.0, tl.float32)
    for share in tl.static_range(SPLIT_K):
        inner += tl.load(partials_ptr + (share * tokens + token) * D_OUT + n, mask=in_n, other=0.0)
    y = tl.load(g_ptr + n, mask=in_n, other=0.0) * inner
    y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * y_stride + n, y.to(tl.bfloat16), mask=in_n)
    tl.store(inner_ptr + token * inner_stride + n, inner.to(tl.bfloat16), mask=in_n)


def launch(x, weight, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from x [T, 1152], weight [4304, 1152], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tokens = x.shape[0]
    partials = torch.empty((3, tokens, 4304), dtype=torch.float32, device=x.device)
    shares_kernel[(triton.cdiv(tokens, 128) * 68, 3)](
        x, x.stride(0), weight, weight.stride(0), h, h.stride(0), lora_b, lora_b.stride(0), partials, tokens, scaling,
        num_warps=4, num_stages=2,
    )
    finish_kernel[(tokens, 17)](
        partials, g, bias, y, y.stride(0), inner, inner.stride(0), tokens,
        num_warps=4, num_stages=2, launch_pdl=True,
    )
