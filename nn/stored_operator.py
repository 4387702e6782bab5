"""The norms of layers whose W is in a weight format as a PyTorch operator, which a compiler keeps in one graph.

A compiler cannot look at a layer's memory, so it cannot recognise a format. It is told one that was recognised before,
and the operator reads the tensors that the layer holds when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..codegen.weight_formats import parse_format
from ..runtime.reference import OPERAND_DTYPES
from .norm_cache import NormCache
from .norm_layer import Products, StoredLayer
from .operators import _operator
from .stored_norm import StoredMatrix, how_of
from .traced_tables import write_norms

_NO_CACHE = NormCache("off")


class TracedMatrix(NamedTuple):
    """A W [d_out, d_in] in a weight format, ``form`` as text, while a graph is traced: ``tensors`` hold it, in order.

    They have any shape, and codes any dtype, as their layer has them.
    """

    form: str
    tensors: tuple[torch.Tensor, ...]
    d_out: int
    d_in: int


@_operator(lambda tensors, formats, sizes, *_: tensors[0].new_empty(2, sum(sizes[::2]), dtype=torch.float32))
def stored_norms_and_gains(
    tensors: Sequence[torch.Tensor],
    formats: str,
    sizes: Sequence[int],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    magnitudes: Sequence[torch.Tensor],
    scalings: Sequence[float],
    rounded: torch.dtype | None,
) -> torch.Tensor:
    """Return the norms w and the gains g of many layers one after another, [2, sum of all d_out] fp32.

    Each layer has a W [d_out, d_in] in one of ``formats`` (texts with a space between), A [r, d_in], B [d_out, r], m
    [d_out] and s. ``tensors`` are what the W's are stored in, one layer's after another; ``sizes`` are d_out and d_in
    of each. ``rounded`` is autocast's dtype. Consecutive layers of one kind are one launch.

    Raises:
        RuntimeError: a tensor has another number of elements than its format.
    """
    values = torch.empty(2, sum(sizes[::2]), dtype=torch.float32, device=tensors[0].device)
    layers, kinds, start = [], [], 0
    for index, text in enumerate(formats.split()):
        form, (d_out, d_in) = parse_format(text), sizes[2 * index : 2 * index + 2]
        flat = []
        for stored in form.operands(d_out, d_in):
            tensor, dtype = tensors[start].detach(), OPERAND_DTYPES[stored.dtype]
            if stored.name == "weight" and tensor.dtype is not dtype:
                tensor = tensor.view(dtype)
            if tensor.numel() != stored.elements or tensor.dtype is not dtype:
                raise RuntimeError(
                    f"{form}: {stored.name} must be {stored.elements} elements of {dtype}, got {tensor.numel()} of "
                    f"{tensor.dtype}: the layer holds another W than when the model was compiled"
                )
            flat.append(tensor.reshape(-1))
            start += 1
        matrix = StoredMatrix(form, tuple(flat), d_out, d_in)
        a, b, m = lora_As[index].detach(), lora_Bs[index].detach(), magnitudes[index].detach()
        layers.append(StoredLayer(matrix, a, b, m, scalings[index], _NO_CACHE))
        kinds.append((form, d_out, d_in, a.shape[0], a.dtype, m.dtype, scalings[index]))
    begin = place = 0
    while begin < len(layers):
        end = begin
        while end < len(layers) and kinds[end] == kinds[begin]:
            end += 1
        first, size = layers[begin], (end - begin) * layers[begin].weight.d_out
        how = how_of(first.weight.form, first.lora_A.dtype, rounded)
        grouped = how.adapter is first.lora_A.dtype
        part = values[:, place : place + size].view(2, end - begin, -1)
        products = Products(how, str(how.form), first.lora_A.dtype, how.rounds)
        write_norms(layers[begin:end], products, part, grouped=grouped)
        begin, place = end, place + size
    return values
