"""The products of a bitsandbytes 4-bit layer without a graph of their own, and its W for the backward pass.

The layer's own forward pass goes through several functions and a module's call to one operator, and makes a node that
dequantises W again in the backward pass. Here that operator is called where it stands for all of that; otherwise the
layer's forward pass, without a graph. The numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

_MANY = 2048
"""The token bucket from which bitsandbytes' product is that of a decoded W, too: it is from 1,537 tokens on (0.50; in
older versions from 2 on), and its kernels that multiply by the codes take longer than to decode once here."""

_NESTED = 256
"""The blocks of nested scales that the operator takes."""


class FourBits:
    """The products by W of ``layer`` and W itself, as long as the layer holds it.

    The caller sees to it that the layer, its weight and its quantisation state are as they were, that the layer has no
    hooks, and that it was called before: in its first call it decides in which dtype it computes.
    """

    __slots__ = ("_dtype", "_layer", "_packed", "_state", "product")
    keeps_dtype = True
    multiplies_from = _MANY

    def __init__(self, layer: Any) -> None:
        self._layer, self._state = layer, layer.weight.quant_state
        self._packed: torch.Tensor = layer.weight.data.view(-1, 1)
        self._dtype: torch.dtype | None = layer.compute_dtype
        arguments = _arguments(layer, self._state)
        self.product: Callable[[torch.Tensor], torch.Tensor] = (
            functools.partial(type(layer).forward, layer)
            if arguments is None
            else functools.partial(torch.ops.bitsandbytes.gemm_4bit.default, B=self._packed, **arguments)
        )

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype is self._dtype

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W [d_out, d_in] as the layer's backward pass decodes it."""
        matrix: torch.Tensor = dequantize_4bit(self._packed, self._state)
        return matrix if matrix.dtype is dtype else matrix.to(dtype)


def _arguments(layer: Any, state: Any) -> dict[str, Any] | None:
    """The operator's arguments beside x and the codes; None if the layer's forward pass does more, or another thing."""
    bias: nn.Parameter | None = layer.bias
    outer = state.state2
    if not _is_known() or (bias is not None and bias.dtype is not layer.compute_dtype):
        return None
    if layer.weight.device.type == "cpu" and getattr(layer, "support_avx512bf16_for_cpu", True):
        return None  # in inference it packs W anew
    given = {"shapeB": state.shape, "blocksize": state.blocksize, "quant_type": state.quant_type, "bias": bias}
    if outer is None:
        return {**given, "absmax": state.absmax}
    if outer.blocksize != _NESTED:
        return None
    scales = {"absmax_8bit": state.absmax, "absmax_code": outer.code, "absmax_offset": state.offset}
    return {**given, "absmax": outer.absmax, **scales}


@functools.cache
def _is_known() -> bool:
    """Whether this version of bitsandbytes has the operator, with these arguments."""
    found = getattr(getattr(torch.ops.bitsandbytes, "gemm_4bit", None), "default", None)
    return found is not None and [argument.name for argument in found._schema.arguments] == _ARGUMENTS


_ARGUMENTS = ["A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias"]
_ARGUMENTS += ["absmax_8bit", "absmax_code", "absmax_offset"]
