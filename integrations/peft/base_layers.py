"""The base layers that DoRA adapts: their kind, their W, and whether doratune may compute their gradient.

A dense W is read as a matrix. A quantised W is multiplied by the forward of the package that made it, because its
storage format and kernels change from version to version. Where :mod:`.stored` recognises the format, its norm comes
from the codes. Else the rows of A go through that forward as r extra tokens, which gives WAᵀ for the norm. Blocks of
unit vectors go through it once, which gives rowsum(W²). The exception is bitsandbytes' 8-bit layer. It rounds its input
to 8 bits (and keeps columns with outliers in 16), so it is not a linear map. There PEFT computes the norm of the
dequantised int8 matrix, and with dropout the product with it. doratune does the same, the norm in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ...nn.rehearsal import is_rehearsing
from ...nn.watching import is_untouched

LINEAR, CONV1D, BNB_4BIT, BNB_8BIT, HQQ, TORCHAO = (
    "Linear",
    "Conv1D",
    "bitsandbytes 4-bit",
    "bitsandbytes 8-bit",
    "HQQ",
    "torchao",
)

_DENSE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = (torch.Tensor, nn.Parameter)
_WEIGHT_ONLY = ("AffineQuantizedTensor", "Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
"""torchao's tensors that do not quantise activations, unless one of :data:`_ACTIVATION_QUANTISED` is set."""
_ACTIVATION_QUANTISED = ("act_quant_kwargs", "act_quant_scale", "activation_quantization")

_BLOCK_ELEMENTS = 1 << 24
"""Elements of W that are held at a time while a quantised W is read: 64 MB in fp32."""


class NotNow(str):
    """A reason that may not hold in the next call: parameters that are sharded or not loaded yet."""


class BaseLayer(NamedTuple):
    """A base layer that doratune supports.

    ``weight`` is the tensor that holds W; ``matrix`` is W [d_out, d_in] if it is dense, else None. ``plain``: the
    layer only multiplies by a frozen W and adds the bias, so doratune may compute its gradient. ``private``: its output
    is new memory that only the caller holds and that the layer's own backward pass does not need.
    """

    kind: str
    weight: torch.Tensor
    matrix: torch.Tensor | None
    plain: bool
    private: bool


def read_base(base: nn.Module, d_out: int, d_in: int, *, transposed: bool) -> BaseLayer | str:
    """Examine ``base`` [d_out, d_in]; ``transposed`` if it stores W as [d_in, d_out].

    Returns a :class:`BaseLayer`, or the reason why doratune does not support it.
    """
    if type(base) is not nn.Linear and isinstance(getattr(base, "W_q", None), torch.Tensor):
        return _quantised(HQQ, base, base.W_q, "hqq")  # type: ignore[arg-type]
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return f"a {type(base).__name__} has no weight tensor"
    if type(weight) is nn.Parameter and base.__dict__.get("quant_state") is not None:
        weight = _gathered(base, weight, d_out * d_in)
    if type(weight) not in _PLAIN:
        return _subclassed(base, weight, (d_out, d_in))
    if weight.is_meta and not is_rehearsing():
        return NotNow("its weight is on the meta device")
    if weight.dtype not in _DENSE:
        return f"its weight is {weight.dtype} in a {type(base).__name__}"
    if hasattr(weight, "ds_id"):
        return NotNow("its weight is partitioned by DeepSpeed ZeRO-3")
    if weight.shape != ((d_in, d_out) if transposed else (d_out, d_in)):
        return NotNow(f"its weight has shape {list(weight.shape)} for {d_in} inputs and {d_out} outputs: a shard")
    kind = CONV1D if transposed else LINEAR
    private = _is_ordinary(base, transposed) and is_untouched(base)
    return BaseLayer(kind, weight, weight.T if transposed else weight, private and not weight.requires_grad, private)


def _gathered(base: Any, weight: torch.Tensor, elements: int) -> torch.Tensor:
    """The weight of a bitsandbytes 4-bit layer that FSDP2 has gathered: plain memory, until the layer's own forward
    pass makes it a 4-bit weight again. Here that is done before, if it is the codes of so many elements and no shard.
    """
    if weight.shape != ((elements + 1) // (2 * weight.element_size()), 1):
        return weight
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(base)
    gathered: torch.Tensor = base.weight
    return gathered


def _is_ordinary(base: nn.Module, transposed: bool) -> bool:
    """Whether ``base`` has PyTorch's or transformers' own class, which returns W x + b and saves no output."""
    if not transposed:
        return type(base) is nn.Linear
    theirs = "transformers.pytorch_utils"
    return type(base).__module__ == theirs and type(base).forward.__module__ == theirs


def _subclassed(base: nn.Module, weight: torch.Tensor, shape: tuple[int, int]) -> BaseLayer | str:
    name, module = type(weight).__name__, type(weight).__module__
    if name == "Params4bit":
        if getattr(weight, "quant_state", None) is None:
            return "its 4-bit weight has no quantisation state yet"
        return _quantised(BNB_4BIT, base, weight, "bitsandbytes")
    if name == "Int8Params":
        if weight.dtype is not torch.int8:
            return f"its 8-bit layer holds a weight in {weight.dtype} (has_fp16_weights, or not quantised yet)"
        if weight.shape != shape:
            return f"its 8-bit weight must have the shape of W, {list(shape)}, got {list(weight.shape)}"
        return _quantised(BNB_8BIT, base, weight, "bitsandbytes")
    if module.startswith("torchao."):
        inexact = [attribute for attribute in _ACTIVATION_QUANTISED if getattr(weight, attribute, None) is not None]
        if name not in _WEIGHT_ONLY or inexact:
            return f"torchao's {name} is not weight-only quantisation{f' ({inexact[0]} is set)' if inexact else ''}"
        return _quantised(TORCHAO, base, weight, "torch")
    if name == "DTensor":
        return NotNow("its weight is a DTensor: sharded")
    return f"its weight is a {module}.{name}"


def _quantised(kind: str, base: nn.Module, weight: torch.Tensor, package: str) -> BaseLayer | str:
    """A layer of this kind if its class's forward comes from ``package`` and does not round its input."""
    if weight.is_meta:
        return NotNow("its weight is on the meta device")
    forward = type(base).forward
    if forward.__module__.split(".")[0] != package:
        return f"the forward of its {type(base).__name__} comes from {forward.__module__}, not from {package}"
    if kind == HQQ and forward.__name__.endswith("_int8"):
        return f"HQQ's backend {forward.__name__} rounds the layer's input to 8 bits"
    return BaseLayer(kind, weight, None, plain=False, private=is_untouched(base))


def multiply(base: nn.Module, layer: BaseLayer, rows: torch.Tensor, wanted: torch.dtype | None = None) -> torch.Tensor:
    """Return ``rows @ W.T`` [..., d_out] of a quantised layer for rows [..., d_in], in the layer's compute dtype.

    A layer without one computes in ``wanted``, or else in the dtype of ``rows``. It calls the forward of the layer's
    class, without hooks, as PEFT multiplies by W without calling the layer. It leaves the bias out: adding a large bias
    and subtracting it again would round a small product away in 16 bits. Of bitsandbytes' 8-bit layer it is the product
    with the dequantised int8 matrix, as in PEFT: the layer's own product would round the rows.
    """
    wanted = wanted or rows.dtype
    if layer.kind == BNB_8BIT:
        given = (rows.to(wanted), layer.weight, _int8_scales(base, layer))
        product: torch.Tensor = _Int8Product.apply(*given)  # type: ignore[no-untyped-call]
        return product
    dtype = layer.weight.dtype if layer.kind == TORCHAO else getattr(base, "compute_dtype", None)
    product = type(base).forward(_without_bias(base), rows.to(dtype or wanted))
    return product


def _without_bias(base: nn.Module) -> nn.Module:
    """A temporary layer with the class and tensors of ``base`` but no bias.

    ``base`` is not changed, because other threads may use it and the call may fail. Attributes that a forward sets at
    its first call (bitsandbytes' compute dtype) are set on the copy. The copy is in training mode, in which
    bitsandbytes does not repack the weight for the CPU: the copy shares W with ``base``, whose backward may need the
    old format.
    """
    bare: nn.Module = object.__new__(type(base))
    bare.__dict__.update(base.__dict__, training=True, _parameters={**base._parameters, "bias": None})
    bare.__dict__.pop("bias", None)  # HQQ keeps a plain tensor
    return bare


def products(base: Any, layer: BaseLayer, lora_A: torch.Tensor) -> torch.Tensor:
    """Return ``W @ A.T`` [d_out, r] in fp32 of a quantised layer, for A [r, d_in]."""
    if layer.kind != BNB_8BIT:
        return multiply(base, layer, lora_A).float().T
    wide = lora_A.float().T
    return torch.cat([rows @ wide for rows in _int8_rows(layer.weight, _int8_scales(base, layer))])


def row_squares(base: Any, layer: BaseLayer, d_out: int, d_in: int) -> torch.Tensor:
    """Return ``rowsum(W*W)`` [d_out] in fp32 of a quantised layer, from blocks of W."""
    if layer.kind == BNB_8BIT:
        blocks = _int8_rows(layer.weight, _int8_scales(base, layer))
        return torch.cat([rows.square().sum(dim=1) for rows in blocks])
    total: torch.Tensor | None = None
    device = layer.weight.device
    step = max(1, _BLOCK_ELEMENTS // max(d_in, d_out))
    for start in range(0, d_in, step):
        units = torch.zeros(min(step, d_in - start), d_in, device=device)
        units[:, start:].fill_diagonal_(1.0)
        part = multiply(base, layer, units).float().square_().sum(dim=0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


class _Int8Product(torch.autograd.Function):
    """``x @ W.T`` [..., d_out] for x [..., d_in] and W = weight * scales / 127 in the dtype of x, as PEFT computes it.

    W is dequantised in both passes and not kept between them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        return nn.functional.linear(x, _int8_matrix(weight, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight, scales = ctx.saved_tensors
        return dy @ _int8_matrix(weight, scales, dy.dtype), None, None


def _int8_matrix(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dequantised int8 matrix [d_out, d_in] in ``dtype``."""
    matrix = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    start = 0
    for rows in _int8_rows(weight, scales):
        matrix[start : start + len(rows)] = rows
        start += len(rows)
    return matrix


def _int8_scales(base: Any, layer: BaseLayer) -> torch.Tensor:
    """The scales [d_out] of the rows: 127 times the value of one step."""
    scales: torch.Tensor = base.weight.SCB if base.state.SCB is None else base.state.SCB
    return scales.to(layer.weight.device)


def _int8_rows(weight: torch.Tensor, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of the dequantised int8 matrix in fp32, a block at a time."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for rows, scale in zip(weight.detach().split(step), scales.split(step), strict=True):
        yield int8_vectorwise_dequant(rows, scale).float()
