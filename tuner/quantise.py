"""Packs a plain W into a weight format, for the inputs of kernels: each value as the nearest code."""

from __future__ import annotations

import torch

from ..codegen.weight_formats import NESTED_TABLE, WeightFormat
from ..runtime.dequantise import scale_index
from ..runtime.reference import OPERAND_DTYPES

_LARGEST = {"index": 1.0, "signed": 127.0, "e4m3": 448.0}
"""What the largest magnitude of a group is stored as."""


def quantise(form: WeightFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that hold ``weight`` [d_out, d_in] in ``form``, by name, flat."""
    d_out, d_in = weight.shape
    wide = weight.float()
    rows, columns = (torch.arange(size, device=weight.device) for size in (d_out, d_in))
    index = scale_index(form, d_out, d_in, rows, columns).reshape(-1)
    flat = wide.reshape(-1)
    least, most = _extremes(flat, index, form.scales_of(d_out, d_in))
    zeros = torch.zeros_like(least)
    if form.of.codes == "unsigned":
        # From the least value to the largest, and zero among them.
        least, most = least.clamp_max(0.0), most.clamp_min(0.0)
        scales = (most - least) / (2**form.of.bits - 1)
        zeros = torch.where(scales > 0.0, -least / scales.clamp_min(1e-30), 0.0)
    else:
        scales = torch.maximum(-least, most) * (form.of.unit / _LARGEST[form.of.codes])
        if form.zeros:
            zeros = (torch.arange(len(zeros), device=zeros.device) % 7 - 3).float()
    found: dict[str, torch.Tensor] = {}
    if form.nested:
        found, scales = _nested(form, scales)
    else:
        found["scales"] = scales.to(OPERAND_DTYPES[form.scales])
        scales = found["scales"].float()
    if form.zeros:
        dtype = form.of.zeros or form.scales
        found["zeros"] = zeros.to(OPERAND_DTYPES[dtype])
        zeros = found["zeros"].float()
    steps = torch.where(scales[index] != 0.0, flat / scales[index] * form.of.unit, 0.0) + zeros[index]
    return {"weight": _pack(form, _codes(form, steps)), **found}


def _extremes(flat: torch.Tensor, index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value that each scale is for."""
    empty = torch.zeros(count, device=flat.device)
    least = empty.scatter_reduce(0, index, flat, "amin", include_self=False)
    return least, empty.scatter_reduce(0, index, flat, "amax", include_self=False)


def _nested(form: WeightFormat, scales: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of scales in 8-bit codes, and the scales that they decode to."""
    offset = scales.mean()
    table = torch.linspace(-1.0, 1.0, NESTED_TABLE, device=scales.device).pow(3)
    blocks = torch.arange(len(scales), device=scales.device) // form.nested
    least, most = _extremes(scales - offset, blocks, int(blocks[-1]) + 1)
    outer = torch.maximum(-least, most).clamp_min(1e-30)
    codes = _nearest(table, (scales - offset) / outer[blocks])
    found = {
        "scales": codes.to(torch.uint8),
        "scale_table": table,
        "outer_scales": outer,
        "scale_offset": offset[None],
    }
    return found, table[codes] * outer[blocks] + offset


def _nearest(table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The number of the entry of ``table`` that is nearest to each value."""
    ordered, order = table.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2.0)]


def _codes(form: WeightFormat, steps: torch.Tensor) -> torch.Tensor:
    """The codes [n] uint8 that are nearest to values in units of their scales."""
    kind = form.of
    if kind.codes == "index":
        table = torch.tensor(kind.table, device=steps.device)
        return _nearest(table, steps).to(torch.uint8)
    if kind.codes == "e4m3":
        return steps.to(torch.float8_e4m3fn).view(torch.uint8)
    if kind.codes == "signed":
        return steps.round().clamp(-128.0, 127.0).to(torch.int8).view(torch.uint8)
    return steps.round().clamp(0.0, 2.0**kind.bits - 1.0).to(torch.uint8)


def _pack(form: WeightFormat, codes: torch.Tensor) -> torch.Tensor:
    if form.of.packing == "bytes":
        return codes
    if form.of.packing == "halves":
        first, second = codes.chunk(2)
        return (first << 4) | second
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return (codes[::2] << 4) | codes[1::2]
