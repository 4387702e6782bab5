"""Gated MLP: gate and up are composed, activated and multiplied; tiles moved by the tensor memory accelerator.

    out = act(yg)*yu; yg = g_gate*(gate + s*(hg@Bg.T)) + bg, yu = g_up*(up + s*(hu@Bu.T)) + bu; h = [hg, hu]

spec    compose_swiglu/d_out=4304/rank=24/tokens=4096/activation=bf16/adapter=fp32/bias/gelu_tanh@h200
config  tma:block_k=32,block_n=128,block_t=32,num_warps=4,num_stages=2

Emitted by doratune from templates/compose_swiglu_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def adapter_parts_kernel(
    lora_b_gate_ptr: "*fp32",
    lora_b_gate_stride: "i64",
    lora_b_gate_parts_ptr: "*bf16",
    lora_b_up_ptr: "*fp32",
    lora_b_up_stride: "i64",
    lora_b_up_parts_ptr: "*bf16",
):
    """Split fp32 adapters into a high part and, below it, a low part, a [LINES, BLOCK] tile per program."""
    LINES: tl.constexpr = 64
    BLOCK: tl.constexpr = 32

    program = tl.program_id(0)
    if program < 68:
        LORA_B_GATE_ROWS: tl.constexpr = 4304
        LORA_B_GATE_COLS: tl.constexpr = 24
        LORA_B_GATE_COL_TILES: tl.constexpr = 1
        tile = program
        row = tile // LORA_B_GATE_COL_TILES * LINES + tl.arange(0, LINES)
        col = tile % LORA_B_GATE_COL_TILES * BLOCK + tl.arange(0, BLOCK)
        exact = tl.load(lora_b_gate_ptr + row.to(tl.int64)[:, None] * lora_b_gate_stride + col[None, :], mask=(row < LORA_B_GATE_ROWS)[:, None] & (col < LORA_B_GATE_COLS)[None, :], other=0.0)
        parts = lora_b_gate_parts_ptr + row.to(tl.int64)[:, None] * LORA_B_GATE_COLS + col[None, :]
        high = exact.to(tl.bfloat16)
        tl.store(parts, high, mask=(row < LORA_B_GATE_ROWS)[:, None] & (col < LORA_B_GATE_COLS)[None, :])
        low = (exact - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(parts + LORA_B_GATE_ROWS * LORA_B_GATE_COLS, low, mask=(row < LORA_B_GATE_ROWS)[:, None] & (col < LORA_B_GATE_COLS)[None, :])
    else:
        LORA_B_UP_ROWS: tl.constexpr = 4304
        LORA_B_UP_COLS: tl.constexpr = 24
        LORA_B_UP_COL_TILES: tl.constexpr = 1
        tile = program - 68
        row = tile // LORA_B_UP_COL_TILES * LINES + tl.arange(0, LINES)
        col = tile % LORA_B_UP_COL_TILES * BLOCK + tl.arange(0, BLOCK)
        exact = tl.load(lora_b_up_ptr + row.to(tl.int64)[:, None] * lora_b_up_stride + col[None, :], mask=(row < LORA_B_UP_ROWS)[:, None] & (col < LORA_B_UP_COLS)[None, :], other=0.0)
        parts = lora_b_up_parts_ptr + row.to(tl.int64)[:, None] * LORA_B_UP_COLS + col[None, :]
        high = exact.to(tl.bfloat16)
        tl.store(parts, high, mask=(row < LORA_B_UP_ROWS)[:, None] & (col < LORA_B_UP_COLS)[None, :])
        low = (exact - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(parts + LORA_B_UP_ROWS * LORA_B_UP_COLS, low, mask=(row < LORA_B_UP_ROWS)[:, None] & (col < LORA_B_UP_COLS)[None, :])


@triton.jit
def compose_swiglu_kernel(
    gate_desc: "tensordesc<bf16[32, 128]>",
    up_desc: "tensordesc<bf16[32, 128]>",
    h_desc: "tensordesc<bf16[32, 32]>",
    lora_b_gate_desc: "tensordesc<bf16[128, 32]>",
    lora_b_up_desc: "tensordesc<bf16[128, 32]>",
    g_gate_ptr: "*fp32",
    g_up_ptr: "*fp32",
    bias_gate_ptr: "*bf16",
    bias_up_ptr: "*bf16",
    out_desc: "tensordesc<bf16[32, 128]>",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of out, which may be the memory of gate or up. Descriptors clip at the edges.

    Beyond gate's ranks h has those of up, which meet zeros.
    """
    D_OUT: tl.constexpr = 4304
    RANK: tl.constexpr = 24
    K_STEPS: tl.constexpr = 1
    BLOCK_T: tl.constexpr = 32
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 32
    N_TILES: tl.constexpr = 34
    LINEAR: tl.constexpr = 1.5957691216057308  # 2*sqrt(2/pi)
    CUBIC: tl.constexpr = 0.07135481627260025  # times 0.044715

    first_t = (tl.program_id(0) // N_TILES) * BLOCK_T
    first_n = (tl.program_id(0) % N_TILES) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)

    lora_gate = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    lora_up = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for step in range(0, 2 * K_STEPS):  # each tile of h meets the high part of B, then the low part
        start = (step // 2) * BLOCK_K
        part = (step % 2) * D_OUT
        h_gate = h_desc.load([first_t, start])
        b_gate = lora_b_gate_desc.load([part + first_n, start])
        lora_gate = tl.dot(h_gate, b_gate.T, lora_gate)
        h_up = h_desc.load([first_t, RANK + start])
        b_up = lora_b_up_desc.load([part + first_n, start])
        lora_up = tl.dot(h_up, b_up.T, lora_up)

    gate = gate_desc.load([first_t, first_n])
    g_gate = tl.load(g_gate_ptr + n, mask=n < D_OUT, other=0.0)[None, :]
    y_gate = g_gate * (gate.to(tl.float32) + scaling * lora_gate)
    y_gate += tl.load(bias_gate_ptr + n, mask=n < D_OUT, other=0.0).to(tl.float32)[None, :]
    up = up_desc.load([first_t, first_n])
    g_up = tl.load(g_up_ptr + n, mask=n < D_OUT, other=0.0)[None, :]
    y_up = g_up * (up.to(tl.float32) + scaling * lora_up)
    y_up += tl.load(bias_up_ptr + n, mask=n < D_OUT, other=0.0).to(tl.float32)[None, :]
    act = y_gate / (1.0 + tl.exp(-y_gate * (LINEAR + CUBIC * y_gate * y_gate)))
    out_desc.store([first_t, first_n], (act * y_up).to(tl.bfloat16))


def launch(gate, up, h, lora_b_gate, lora_b_up, g_gate, g_up, bias_gate, bias_up, out, scaling):
    """Fill out from gate and up [T, 4304], h [T, 48], lora_b [4304, 24], g and bias [4304]."""
    tile, factor = [32, 128], [128, 32]
    lora_b_gate_parts = torch.empty((8608, 24), dtype=h.dtype, device=h.device)
    lora_b_up_parts = torch.empty_like(lora_b_gate_parts)
    adapter_parts_kernel[(136,)](
        lora_b_gate, lora_b_gate.stride(0), lora_b_gate_parts, lora_b_up, lora_b_up.stride(0), lora_b_up_parts,
        num_warps=4, num_stages=2,
    )
    compose_swiglu_kernel[(triton.cdiv(gate.shape[0], 32) * 34,)](
        TensorDescriptor.from_tensor(gate, tile),
        TensorDescriptor.from_tensor(up, tile),
        TensorDescriptor.from_tensor(h, [32, 32]),
        TensorDescriptor.from_tensor(lora_b_gate_parts, factor),
        TensorDescriptor.from_tensor(lora_b_up_parts, factor),
        g_gate,
        g_up,
        bias_gate,
        bias_up,
        TensorDescriptor.from_tensor(out, tile),
        scaling,
        num_warps=4, num_stages=2,
    )
