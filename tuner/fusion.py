"""Fused kernels and their unfused sequence: cuBLAS's product of W, then the composition kernel.

Which of the two is faster depends on shape, tokens and GPU. So it is measured and kept in the fused kernel's entry: the
runtime runs ``dora_linear_forward`` only where its entry says that fusion pays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..cache.entry import MEASURED, Entry
from ..codegen.spec import KernelSpec


def composition_of(spec: KernelSpec) -> KernelSpec | None:
    """The spec of the composition kernel in the unfused sequence of ``spec``; None if ``spec`` is no fused kernel."""
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
    """Run the unfused sequence of ``dora_linear_forward`` on its operands.

    The product is written to y; ``launch`` starts the kernel of ``composition``, which composes in place over y.
    """
    y = outputs["y"]
    torch.mm(inputs["x"], inputs["weight"].T, out=y)
    given = {**inputs, "base": y}
    launch(
        *[given[operand.name] for operand in composition.contract.inputs_of(composition)], *outputs.values(), scaling
    )


def needs_timing(entry: Entry, *, composition_is_new: bool) -> bool:
    """Whether a fused kernel's entry lacks the time of its unfused sequence, or that of the present composition."""
    evaluation = entry.evaluation
    return evaluation.provenance == MEASURED and (evaluation.unfused_us is None or composition_is_new)


def with_unfused_time(entry: Entry, fused_us: float, unfused_us: float) -> Entry:
    """The entry with the time of its unfused sequence, from the times of both measured in turn.

    The entry's own time may come from another day and other clocks, so the ratio is what is kept.
    """
    us = entry.evaluation.us
    scaled = None if us is None else us * unfused_us / fused_us
    return replace(entry, evaluation=replace(entry.evaluation, unfused_us=scaled))
