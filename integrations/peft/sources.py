"""The products of a quantised layer without a graph of their own, and its W for the backward pass.

Every package differentiates its layer's product by decoding W again. Where it is known to do no more than that, a
projection takes the product without a graph, and W when its own backward pass needs it (:class:`~.stored_plan.Source`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...codegen.weight_formats import INT8_UNIT
from ...internals.torch import some_autocast_is_on
from ...nn.stored_plan import Source
from .base_layers import BNB_4BIT, BNB_8BIT, HQQ, TORCHAO

_HQQ_EAGER = frozenset(("forward_pytorch", "forward_pytorch_backprop"))
"""Those of HQQ's ways to compute a product that decode W, rounding as its ``dequantize`` does, and multiply by it."""

_HQQ_FORWARDS = _HQQ_EAGER | {"forward_pytorch_compile", "forward_pytorch_backprop_compile"}
"""HQQ's ways to compute a product that take any x [T, d_in] and differentiate by W decoded."""


def source_of(layer: Any, kind: str) -> Source | None:
    """The source of a layer of this kind (:mod:`.base_layers`); None if only the layer itself can compute a product.

    A layer that decides something in its first call has none before that.
    """
    if kind == BNB_4BIT and layer.compute_type_is_set:
        from .four_bits import FourBits

        return FourBits(layer)
    if kind == BNB_8BIT and layer.state.CB is not None and layer.state.SCB is not None:
        return EightBits(layer)
    if kind == TORCHAO:
        weight = layer.weight.detach()
        dtype, decoder = weight.dtype, _torchao_decoder(weight)
        return Decoded(layer, dtype, weight.device.type, decoder, dequantises=_dequantises(weight))
    if kind == HQQ and (forward := type(layer).forward.__name__) in _HQQ_FORWARDS:
        dtype, eager = layer.meta.get("compute_dtype", torch.float16), forward in _HQQ_EAGER
        return Decoded(layer, dtype, layer.W_q.device.type, layer.dequantize, dequantises=eager)
    return None


class EightBits:
    """The products of a bitsandbytes 8-bit layer by its own forward pass, and its W.

    As every source it serves as long as the layer holds what it holds now and has no hooks: the caller sees to that.
    """

    __slots__ = ("_state", "product")
    keeps_dtype = True
    multiplies_from = None

    def __init__(self, layer: Any) -> None:
        self._state = layer.state
        self.product: Callable[[torch.Tensor], torch.Tensor] = functools.partial(type(layer).forward, layer)

    def takes(self, dtype: torch.dtype) -> bool:
        """Any dtype, but not under autocast: the layer rounds its input to 8 bits, and an fp32 one not to 16 before."""
        return not some_autocast_is_on() or not torch.is_autocast_enabled(self._state.CB.device.type)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W [d_out, d_in] as the layer's backward pass decodes it."""
        codes, scales = self._state.CB, self._state.SCB
        return _by_row(codes, scales.unsqueeze(1).mul(1.0 / INT8_UNIT), dtype)


class Decoded:
    """The products of ``layer`` in ``dtype`` by its own forward pass; ``decode`` returns its W [d_out, d_in].

    ``dequantises``: the forward pass multiplies by what ``decode`` returns.
    """

    __slots__ = ("_decode", "_device", "_dtype", "multiplies_from", "product")
    keeps_dtype = False

    def __init__(
        self,
        layer: Any,
        dtype: torch.dtype,
        device: str,
        decode: Callable[[], torch.Tensor],
        *,
        dequantises: bool,
    ) -> None:
        self._dtype, self._decode, self._device = dtype, decode, device
        self.multiplies_from = 1 if dequantises else None
        self.product: Callable[[torch.Tensor], torch.Tensor] = functools.partial(type(layer).forward, layer)

    def takes(self, dtype: torch.dtype) -> bool:
        """The layer's dtype; under autocast only where the product is by W, so that it has autocast's dtype."""
        plain = self.multiplies_from is not None or not torch.is_autocast_enabled(self._device)
        return dtype is self._dtype and plain

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        matrix = self._decode()
        return matrix if matrix.dtype is dtype else matrix.to(dtype)


def _torchao_decoder(weight: Any) -> Callable[[], torch.Tensor]:
    """What decodes torchao's tensor; its own way takes the host dozens of calls where codes have a scale a row."""
    if type(weight).__name__ == "Int8Tensor" and tuple(weight.block_size) == (1, weight.shape[1]):
        scales: torch.Tensor = weight.scale.view(-1, 1)
        return functools.partial(_by_row, weight.qdata, scales, weight.dtype)
    decode: Callable[[], torch.Tensor] = weight.dequantize
    return decode


def _dequantises(weight: Any) -> bool:
    """Whether torchao multiplies by its tensor decoded: not by codes whose row has a scale, which it applies after."""
    kind = type(weight).__name__
    by_row = kind == "Int8Tensor" and weight.block_size[-1] == weight.shape[-1]
    plain = all(getattr(weight, name, None) is None for name in ("act_quant_kwargs", "act_pre_scale"))
    return kind in ("Float8Tensor", "Int8Tensor") and plain and not by_row


def _by_row(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes*scales [d_out, d_in] for scales [d_out, 1], rounded once to ``dtype``."""
    return codes.to(dtype, copy=True).mul_(scales)
