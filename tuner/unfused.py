"""What a fused kernel does, one after another: the product of W by the library, then the composition's own kernel.

Which of the two is faster depends on shape, tokens and GPU, so it is measured like a config, and the store keeps it:
the runtime runs ``dora_linear_forward`` where its entry says that the fusion pays, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..codegen.spec import KernelSpec


def composition_of(spec: KernelSpec) -> KernelSpec | None:
    """The spec of the kernel that composes what the library has multiplied; None if ``spec`` fuses no such product."""
    if spec.op != "dora_linear_forward":
        return None
    return KernelSpec.create(
        "lora_compose",
        d_out=spec.d_out,
        rank=spec.rank,
        tokens=spec.tokens,
        dtype=spec.activation,
        adapter=spec.adapter,
        bias=spec.bias,
        save=spec.save,
        gpu=spec.gpu,
    )


def run_unfused(
    composition: KernelSpec,
    launch: Callable[..., None],
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    scaling: float,
) -> None:
    """Do the work of ``dora_linear_forward`` on its operands, with ``launch`` for the composition, in place over y."""
    y = outputs["y"]
    torch.mm(inputs["x"], inputs["weight"].T, out=y)
    given = {**inputs, "base": y}
    launch(
        *[given[operand.name] for operand in composition.contract.inputs_of(composition)], *outputs.values(), scaling
    )
