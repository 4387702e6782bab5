"""Backward of a gated MLP from gate and up with their rank-r products, a second kernel adds the sums over chunks of tokens.

    dYg = dout*yu*act'(yg), dYu = dout*act(yg); dyg = g*dY, dg = sum_t dY*(gate or up), db = sum_t dY

spec    swiglu_backward/d_out=4304/tokens=4096/activation=bf16/magnitude=fp32/bias/gelu@h200
config  columns:block_n=64,block_t=16,chunk=256,reduce_c=16,reduce_n=32,num_warps=4,num_stages=3

Emitted by doratune from templates/swiglu_backward_columns.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def swiglu_backward_kernel(
    dout_ptr: "*bf16",
    dout_stride: "i64",
    gate_ptr: "*bf16",
    gate_stride: "i64",
    up_ptr: "*bf16",
    up_stride: "i64",
    g_gate_ptr: "*fp32",
    g_up_ptr: "*fp32",
    bias_gate_ptr: "*bf16",
    bias_up_ptr: "*bf16",
    dyg_gate_ptr: "*bf16",
    dyg_gate_stride: "i64",
    dyg_up_ptr: "*bf16",
    dyg_up_stride: "i64",
    chunks_ptr: "*fp32",
    tokens: "i32",
):
    """Write CHUNK rows of BLOCK_N columns of both dyg, which may be the memory of gate and up, and the sums over those rows."""
    D_OUT: tl.constexpr = 4304
    SUMS: tl.constexpr = 4
    CHUNK: tl.constexpr = 256
    BLOCK_T: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 64
    N_TILES: tl.constexpr = 68
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    DENSITY: tl.constexpr = 0.3989422804014327  # of the normal distribution at 0

    chunk = tl.program_id(0) // N_TILES
    tile_n = tl.program_id(0) % N_TILES
    t = chunk * CHUNK + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]  # times a row stride it may pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < D_OUT
    g_gate = tl.load(g_gate_ptr + n, mask=in_n, other=0.0)[None, :]
    bias_gate = tl.load(bias_gate_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    g_up = tl.load(g_up_ptr + n, mask=in_n, other=0.0)[None, :]
    bias_up = tl.load(bias_up_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    dout_ptrs = dout_ptr + row * dout_stride + n[None, :]
    gate_ptrs = gate_ptr + row * gate_stride + n[None, :]
    dyg_gate_ptrs = dyg_gate_ptr + row * dyg_gate_stride + n[None, :]
    up_ptrs = up_ptr + row * up_stride + n[None, :]
    dyg_up_ptrs = dyg_up_ptr + row * dyg_up_stride + n[None, :]

    dg_gate = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    dg_up = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    dbias_gate = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    dbias_up = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        in_t = (t < tokens - start)[:, None]
        dout = tl.load(dout_ptrs + start * dout_stride, mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        inner_gate = tl.load(gate_ptrs + start * gate_stride, mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        inner_up = tl.load(up_ptrs + start * up_stride, mask=in_t & in_n[None, :], other=0.0).to(tl.float32)
        y_gate = g_gate * inner_gate + bias_gate
        y_up = g_up * inner_up + bias_up
        fraction = 0.5 * (1.0 + tl.erf(SQRT_HALF * y_gate))
        act = y_gate * fraction
        slope = fraction + DENSITY * y_gate * tl.exp(-0.5 * y_gate * y_gate)
        dy_gate = dout * y_up * slope
        dy_up = dout * act
        tl.store(dyg_gate_ptrs + start * dyg_gate_stride, (g_gate * dy_gate).to(tl.bfloat16), mask=in_t & in_n[None, :])
        tl.store(dyg_up_ptrs + start * dyg_up_stride, (g_up * dy_up).to(tl.bfloat16), mask=in_t & in_n[None, :])
        dg_gate += dy_gate * inner_gate
        dbias_gate += dy_gate
        dg_up += dy_up * inner_up
        dbias_up += dy_up

    sums = chunks_ptr + chunk.to(tl.int64) * D_OUT * SUMS + n
    tl.store(sums, tl.sum(dg_gate, axis=0), mask=in_n)
    tl.store(sums + 1 * D_OUT, tl.sum(dg_up, axis=0), mask=in_n)
    tl.store(sums + 2 * D_OUT, tl.sum(dbias_gate, axis=0), mask=in_n)
    tl.store(sums + 3 * D_OUT, tl.sum(dbias_up, axis=0), mask=in_n)


@triton.jit
def add_chunks_kernel(
    chunks_ptr: "*fp32",
    norm_gate_ptr: "*fp32",
    norm_up_ptr: "*fp32",
    dmagnitude_gate_ptr: "*fp32",
    dmagnitude_up_ptr: "*fp32",
    dbias_gate_ptr: "*fp32",
    dbias_up_ptr: "*fp32",
    chunks: "i32",
):
    """Add the chunks' sums in a fixed order, so that equal inputs give equal bits; divide dg by the norm."""
    D_OUT: tl.constexpr = 4304
    SUMS: tl.constexpr = 4
    BLOCK_C: tl.constexpr = 16
    BLOCK_N: tl.constexpr = 32
    EPS: tl.constexpr = 1e-12

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    in_n = n < D_OUT
    dg_gate = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    dg_up = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    dbias_gate = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    dbias_up = tl.full((BLOCK_C, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_C):
        sums = chunks_ptr + (start + c).to(tl.int64)[:, None] * D_OUT * SUMS + n[None, :]
        dg_gate += tl.load(sums, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
        dg_up += tl.load(sums + 1 * D_OUT, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
        dbias_gate += tl.load(sums + 2 * D_OUT, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
        dbias_up += tl.load(sums + 3 * D_OUT, mask=(start + c < chunks)[:, None] & in_n[None, :], other=0.0)
    norm_gate = tl.load(norm_gate_ptr + n, mask=in_n, other=1.0)
    dmagnitude_gate = tl.sum(dg_gate, axis=0) / tl.maximum(norm_gate, EPS)
    tl.store(dmagnitude_gate_ptr + n, dmagnitude_gate.to(tl.float32), mask=in_n)
    tl.store(dbias_gate_ptr + n, tl.sum(dbias_gate, axis=0), mask=in_n)
    norm_up = tl.load(norm_up_ptr + n, mask=in_n, other=1.0)
    dmagnitude_up = tl.sum(dg_up, axis=0) / tl.maximum(norm_up, EPS)
    tl.store(dmagnitude_up_ptr + n, dmagnitude_up.to(tl.float32), mask=in_n)
    tl.store(dbias_up_ptr + n, tl.sum(dbias_up, axis=0), mask=in_n)


def launch(dout, gate, up, g_gate, g_up, bias_gate, bias_up, norm_gate, norm_up, dyg_gate, dyg_up, dmagnitude_gate, dmagnitude_up, dbias_gate, dbias_up):
    """Fill dyg [T, 4304] and dmagnitude, dbias [4304] of both from dout, gate and up [T, 4304], g, bias, norm [4304]."""
    tokens = gate.shape[0]
    chunks = triton.cdiv(tokens, 256)
    sums = torch.empty((chunks, 4, 4304), dtype=torch.float32, device=gate.device)
    swiglu_backward_kernel[(chunks * 68,)](
        dout, dout.stride(0), gate, gate.stride(0), up, up.stride(0), g_gate, g_up, bias_gate, bias_up, dyg_gate, dyg_gate.stride(0), dyg_up, dyg_up.stride(0),
        sums, tokens, num_warps=4, num_stages=3,
    )
    add_chunks_kernel[(135,)](
        sums, norm_gate, norm_up, dmagnitude_gate, dmagnitude_up, dbias_gate, dbias_up, chunks,
        num_warps=4, num_stages=2,
    )
