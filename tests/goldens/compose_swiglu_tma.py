"""Gated MLP: gate and up are composed, activated and multiplied; tiles moved by the tensor memory accelerator.

    out = act(yg)*yu; yg = g_gate*(gate + s*(hg@Bg.T)) + bg, yu = g_up*(up + s*(hu@Bu.T)) + bu; h = [hg, hu]

spec    compose_swiglu/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200
config  tma:block_k=64,block_n=128,block_t=128,num_warps=8,num_stages=3

Emitted by doratune from templates/compose_swiglu_tma.py.j2; edit the template, not this text.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def compose_swiglu_kernel(
    gate_desc: "tensordesc<bf16[128, 128]>",
    up_desc: "tensordesc<bf16[128, 128]>",
    h_desc: "tensordesc<bf16[128, 64]>",
    lora_b_gate_desc: "tensordesc<bf16[128, 64]>",
    lora_b_up_desc: "tensordesc<bf16[128, 64]>",
    g_gate_ptr: "*fp32",
    g_up_ptr: "*fp32",
    out_desc: "tensordesc<bf16[128, 128]>",
    scaling: "fp32",
):
    """Write one [BLOCK_T, BLOCK_N] tile of out, which may be the memory of gate or up. Descriptors clip at the edges.

    Beyond gate's ranks h has those of up, which meet zeros.
    """
    RANK: tl.constexpr = 384
    BLOCK_T: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 64
    N_TILES: tl.constexpr = 32

    first_t = (tl.program_id(0) // N_TILES) * BLOCK_T
    first_n = (tl.program_id(0) % N_TILES) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)

    lora_gate = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    lora_up = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in range(0, RANK, BLOCK_K):
        h_gate = h_desc.load([first_t, start])
        b_gate = lora_b_gate_desc.load([first_n, start])
        lora_gate = tl.dot(h_gate, b_gate.T, lora_gate)
        h_up = h_desc.load([first_t, RANK + start])
        b_up = lora_b_up_desc.load([first_n, start])
        lora_up = tl.dot(h_up, b_up.T, lora_up)

    gate = gate_desc.load([first_t, first_n])
    g_gate = tl.load(g_gate_ptr + n)[None, :]
    y_gate = g_gate * (gate.to(tl.float32) + scaling * lora_gate)
    up = up_desc.load([first_t, first_n])
    g_up = tl.load(g_up_ptr + n)[None, :]
    y_up = g_up * (up.to(tl.float32) + scaling * lora_up)
    act = y_gate / (1.0 + tl.exp(-y_gate))
    out_desc.store([first_t, first_n], (act * y_up).to(tl.bfloat16))


def launch(gate, up, h, lora_b_gate, lora_b_up, g_gate, g_up, out, scaling):
    """Fill out from gate and up [T, 4096], h [T, 768], lora_b [4096, 384], g [4096]."""
    tile, factor = [128, 128], [128, 64]
    compose_swiglu_kernel[(triton.cdiv(gate.shape[0], 128) * 32,)](
        TensorDescriptor.from_tensor(gate, tile),
        TensorDescriptor.from_tensor(up, tile),
        TensorDescriptor.from_tensor(h, [128, 64]),
        TensorDescriptor.from_tensor(lora_b_gate, factor),
        TensorDescriptor.from_tensor(lora_b_up, factor),
        g_gate,
        g_up,
        TensorDescriptor.from_tensor(out, tile),
        scaling,
        num_warps=8, num_stages=3,
    )
