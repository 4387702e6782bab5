"""DoRA composition as the epilogue of the rank-r product, tiles moved by the tensor memory accelerator.

    y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)

spec    lora_compose/d_out=4304/rank=24/tokens=4096/activation=bf16/adapter=fp32/bias/save@h200
config  tma:block_k=32,block_n=128,block_t=128,num_warps=4,num_stages=3

Emitted by doratune from templates/lora_compose_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def adapter_parts_kernel(
    lora_b_ptr: "*fp32",
    lora_b_stride: "i64",
    lora_b_parts_ptr: "*bf16",
):
    """Split fp32 adapters into a high part and, below it, a low part, a [LINES, BLOCK] tile per program."""
    LINES: tl.constexpr = 64
    BLOCK: tl.constexpr = 32

    tile = tl.program_id(0)
    LORA_B_ROWS: tl.constexpr = 4304
    LORA_B_COLS: tl.constexpr = 24
    LORA_B_COL_TILES: tl.constexpr = 1
    row = tile // LORA_B_COL_TILES * LINES + tl.arange(0, LINES)
    col = tile % LORA_B_COL_TILES * BLOCK + tl.arange(0, BLOCK)
    exact = tl.load(lora_b_ptr + row.to(tl.int64)[:, None] * lora_b_stride + col[None, :], mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :], other=0.0)
    parts = lora_b_parts_ptr + row.to(tl.int64)[:, None] * LORA_B_COLS + col[None, :]
    high = exact.to(tl.bfloat16)
    tl.store(parts, high, mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :])
    low = (exact - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(parts + LORA_B_ROWS * LORA_B_COLS, low, mask=(row < LORA_B_ROWS)[:, None] & (col < LORA_B_COLS)[None, :])


@triton.jit
def lora_compose_kernel(
    base_desc: "tensordesc<bf16[128, 128]>",
    h_desc: "tensordesc<bf16[128, 32]>",
    lora_b_desc: "tensordesc<bf16[128, 32]>",
    g_ptr: "*fp32",
    bias_ptr: "*bf16",
    y_desc: "tensordesc<bf16[128, 128]>",
    inner_desc: "tensordesc<bf16[128, 128]>",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of y; base and y may be the same memory. Descriptors clip at the edges."""
    D_OUT: tl.constexpr = 4304
    K_STEPS: tl.constexpr = 1
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 32
    N_TILES: tl.constexpr = 34

    first_t = (tl.program_id(0) // N_TILES) * BLOCK_T
    first_n = (tl.program_id(0) % N_TILES) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)

    lora = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for step in range(0, 2 * K_STEPS):  # each tile of h meets the high part of B, then the low part
        start = (step // 2) * BLOCK_K
        part = (step % 2) * D_OUT
        h = h_desc.load([first_t, start])
        b = lora_b_desc.load([part + first_n, start])
        lora = tl.dot(h, b.T, lora)

    base = base_desc.load([first_t, first_n])  # not before the loop: its registers are worth more there
    g = tl.load(g_ptr + n, mask=n < D_OUT, other=0.0)[None, :]
    inner = base.to(tl.float32) + scaling * lora
    y = g * inner
    y += tl.load(bias_ptr + n, mask=n < D_OUT, other=0.0).to(tl.float32)[None, :]
    y_desc.store([first_t, first_n], y.to(tl.bfloat16))
    inner_desc.store([first_t, first_n], inner.to(tl.bfloat16))


def launch(base, h, lora_b, g, bias, y, inner, scaling):
    """Fill y and inner from base [T, 4304], h [T, 24], lora_b [4304, 24], g [4304], bias [4304]."""
    tile = [128, 128]
    lora_b_parts = torch.empty((8608, 24), dtype=h.dtype, device=h.device)
    adapter_parts_kernel[(68,)](
        lora_b, lora_b.stride(0), lora_b_parts, num_warps=4, num_stages=2
    )
    lora_compose_kernel[(triton.cdiv(base.shape[0], 128) * 34,)](
        TensorDescriptor.from_tensor(base, tile),
        TensorDescriptor.from_tensor(h, [128, 32]),
        TensorDescriptor.from_tensor(lora_b_parts, [128, 32]),
        g,
        bias,
        TensorDescriptor.from_tensor(y, tile),
        TensorDescriptor.from_tensor(inner, tile),
        scaling,
        num_warps=4, num_stages=3,
    )
