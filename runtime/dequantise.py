"""A stored W decoded in PyTorch, a block of rows at a time: the eager reference of the weight formats.

It decodes as the library that packed the weights does (:mod:`~doratune.codegen.weight_formats` has the formula), and is
compared with the libraries themselves in ``tests/runtime/test_dequantise.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..codegen.weight_formats import TILE, WeightFormat

_WIDE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class StoredWeight:
    """W [d_out, d_in] in a weight format, read by rows like a matrix.

    Args:
        form: the format.
        tensors: its operands by name (:meth:`~doratune.codegen.weight_formats.WeightFormat.operands`), flat.
        d_out, d_in: the sizes of W.
        dtype: the dtype of the rows that are handed out, fp32 or fp64. Values are rounded to the format's own dtype
            before, unless the format is exact.
    """

    def __init__(
        self, form: WeightFormat, tensors: Mapping[str, torch.Tensor], d_out: int, d_in: int, dtype: torch.dtype
    ) -> None:
        self.form = form
        self.shape = (d_out, d_in)
        self.dtype = dtype
        self.device = tensors["weight"].device
        self._tensors = {stored.name: tensors[stored.name].reshape(-1) for stored in form.operands(d_out, d_in)}

    def split(self, rows: int) -> Iterator[torch.Tensor]:
        """W in blocks of so many rows."""
        for part in torch.arange(self.shape[0], device=self.device).split(rows):
            yield self[part]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """The ``rows`` [n] of W, [n, d_in]."""
        return self.at(rows, torch.arange(self.shape[1], device=self.device))

    def at(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The entries of W in ``rows`` [n] and ``columns`` [k], [n, k]."""
        form, (_, d_in) = self.form, self.shape
        flat = rows[:, None] * d_in + columns
        values = self._values(self._codes(flat))
        index = scale_index(form, *self.shape, rows, columns)
        if form.zeros:
            values = self._rounded(values - self._tensors["zeros"][index].float())
        if form.exact:
            return values.to(self.dtype) * (self._scales(index).to(self.dtype) / form.of.unit)
        return self._rounded(values * self._scales(index)).to(self.dtype)

    def _codes(self, flat: torch.Tensor) -> torch.Tensor:
        """The codes at the flat positions, uint8 in int64."""
        packed = self._tensors["weight"]
        packing = self.form.of.packing
        if packing == "bytes":
            return packed[flat].long()
        if packing == "pairs":
            pairs = packed[flat // 2].long()
            return torch.where(flat % 2 == 0, pairs >> 4, pairs & 15)
        half = packed.numel()
        pairs = packed[flat % half].long()
        return torch.where(flat < half, pairs >> 4, pairs & 15)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """What the codes stand for, in fp32."""
        kind = self.form.of
        if kind.codes == "index":
            return torch.tensor(kind.table, dtype=torch.float32, device=codes.device)[codes]
        if kind.codes == "e4m3":
            return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        if kind.codes == "signed":
            return codes.to(torch.uint8).view(torch.int8).float()
        return codes.float()

    def _scales(self, index: torch.Tensor) -> torch.Tensor:
        """The scales with these numbers, in fp32."""
        found = self._tensors["scales"][index]
        if not self.form.nested:
            return found.float()
        outer = self._tensors["outer_scales"][index // self.form.nested]
        return self._tensors["scale_table"][found.long()] * outer + self._tensors["scale_offset"]

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(_WIDE[self.form.dtype]).float()


def scale_index(form: WeightFormat, d_out: int, d_in: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Which scale each entry of W [d_out, d_in] in ``rows`` [n] and ``columns`` [k] has, [n, k]."""
    flat = rows[:, None] * d_in + columns
    if form.spread == "block":
        return flat // form.group
    if form.spread == "strided":
        return flat % (d_out * d_in // form.group)
    if form.spread == "tile":
        return rows[:, None] // TILE * -(-d_in // TILE) + columns // TILE
    return rows[:, None].expand_as(flat) if form.spread == "row" else torch.zeros_like(flat)


def dequantise(
    form: WeightFormat,
    tensors: Mapping[str, torch.Tensor],
    d_out: int,
    d_in: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The whole W [d_out, d_in] of stored ``tensors``, in fp32 or fp64."""
    return StoredWeight(form, tensors, d_out, d_in, dtype)[torch.arange(d_out, device=tensors["weight"].device)]
