"""Fused kernels and their unfused sequence: the product of W, then the composition kernel.

Which of the two is faster depends on shape, tokens and GPU. So it is measured and kept in the fused kernel's entry: the
runtime runs ``dora_linear_forward`` only where its entry says that fusion pays.

The product of a dense W is cuBLAS's. Of a W in a format of bitsandbytes' 4-bit layers it is bitsandbytes' own, where
the package is installed: that is what such a layer runs. Of formats whose packages multiply by W decoded it is
``weight_dequantise`` and cuBLAS's product, as a layer runs it. Of others it is cuBLAS's with W decoded before, and the
decoding is not timed. What a package does takes longer than that, so a fusion that pays here pays there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch

from ..cache.entry import MEASURED, Entry
from ..codegen.spec import KernelSpec
from ..codegen.weight_formats import NESTED_BLOCK, WeightFormat
from ..runtime.dequantise import StoredWeight
from ..runtime.loader import load_kernel
from ..runtime.reference import TORCH_DTYPES


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


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns x@W.T [T, d_out] of x [T, d_in], in the given memory [T, d_out] or in new memory."""


def product_of(spec: KernelSpec, inputs: Mapping[str, torch.Tensor]) -> Product:
    """The base product in the unfused sequence of ``spec``, for the W of ``inputs``.

    A W that no package multiplies by is decoded here, and lives as long as the function that is returned.
    """
    form = spec.format
    if form is None:
        return _dense_product(inputs["weight"])
    if _is_of_bitsandbytes(form) and find_spec("bitsandbytes") is not None:
        return _bitsandbytes_product(spec, form, inputs)
    dtype = TORCH_DTYPES[spec.activation]
    if not form.exact and inputs["weight"].is_cuda:
        return _decoded_product(spec, inputs, dtype)
    stored = StoredWeight(form, inputs, spec.d_out, spec.d_in, torch.float32)
    return _dense_product(torch.cat([part.to(dtype) for part in stored.split(max(1, _DECODED // spec.d_in))]))


def _is_of_bitsandbytes(form: WeightFormat) -> bool:
    """Whether all versions of bitsandbytes multiply by a W in this format."""
    return form.kind in ("nf4", "fp4") and 64 <= form.group <= 4096 and form.nested in (0, NESTED_BLOCK)


_DECODED = 1 << 22
"""Elements of W that are decoded at a time."""


def _dense_product(weight: torch.Tensor) -> Product:
    return lambda x, y: torch.mm(x, weight.T, out=y)


def _decoded_product(spec: KernelSpec, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Product:
    device = inputs["weight"].device
    kernel = load_kernel(
        "weight_dequantise",
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=spec.rank,
        tokens=spec.tokens,
        dtype=spec.weight,
        device=device,
    )
    stored = [inputs[operand.name] for operand in kernel.spec.contract.inputs_of(kernel.spec)]
    dense = torch.empty(spec.d_out, spec.d_in, dtype=dtype, device=device)

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kernel.launch(stored, (dense,))
        return torch.mm(x, dense.T, out=y)

    return product


def _bitsandbytes_product(spec: KernelSpec, form: WeightFormat, inputs: Mapping[str, torch.Tensor]) -> Product:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState

    packed, outer = inputs["weight"].view(-1, 1).t(), None
    if form.nested:
        outer = QuantState(
            inputs["outer_scales"], code=inputs["scale_table"], blocksize=form.nested, dtype=torch.float32
        )
    state = QuantState(
        inputs["scales"],
        shape=torch.Size((spec.d_out, spec.d_in)),
        code=torch.tensor(form.of.table, device=packed.device),
        blocksize=form.group,
        quant_type=form.kind,
        dtype=TORCH_DTYPES[spec.activation],
        offset=inputs["scale_offset"][0] if form.nested else None,
        state2=outer,
    )
    return lambda x, _: matmul_4bit(x, packed, quant_state=state)


def run_unfused(
    composition: KernelSpec,
    launch: Callable[..., None],
    product: Product,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    scaling: float,
) -> None:
    """Run the unfused sequence of ``dora_linear_forward`` on its operands.

    The base product is written to y where ``product`` writes there (:func:`product_of`); ``launch`` starts the kernel
    of ``composition``, which composes over it.
    """
    given = {**inputs, "base": product(inputs["x"], outputs["y"])}
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
