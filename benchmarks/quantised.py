"""Base layers as users quantise them: bitsandbytes' NF4 and int8, torchao's float8, HQQ; by the packages' own code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..internals.versions import import_fault

_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "fp8": "torchao", "hqq": "hqq"}
QUANTS = tuple(_PACKAGES)
"""``nf4``: 4 bits with double quantisation, as QLoRA has it. ``int8``: LLM.int8. ``fp8``: torchao's weight-only e4m3
with a scale for each row. ``hqq``: 4 bits in groups of 64 along a row."""


def quantise(model: nn.Module, targets: Collection[str], quant: str) -> nn.Module:
    """Quantise the linear layers of ``model`` that are named in ``targets``, in place.

    Raises:
        UsageError: an unknown format, its package is not installed, or it cannot be measured on this device.
    """
    if quant not in _PACKAGES:
        raise UsageError(f"unknown format {quant!r}; use one of {', '.join(QUANTS)}")
    if quant == "int8" and next(model.parameters()).device.type == "cpu":
        raise UsageError("--quant int8 needs a GPU: PEFT loses the scales of 8-bit layers on a CPU")
    try:
        replace: Callable[[nn.Linear], nn.Module] = {"nf4": _nf4, "int8": _int8, "fp8": _fp8, "hqq": _hqq}[quant]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in targets and type(child) is nn.Linear:
                    setattr(parent, name, replace(child))
    except ImportError as error:
        package = _PACKAGES[quant]
        raise UsageError(f"--quant {quant}: {import_fault(package, error, f'pip install {package}')}") from error
    if _PACKAGES[quant] == "bitsandbytes":  # as transformers says it; PEFT chooses its layers by this
        setattr(model, "is_loaded_in_8bit" if quant == "int8" else "is_loaded_in_4bit", True)
    return model


def held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that quantised layers hold beside their parameters: HQQ's scales, bitsandbytes' state."""
    for module in model.modules():
        for holder in (getattr(module, "meta", None), vars(module).get("state")):
            values = holder.values() if isinstance(holder, dict) else vars(holder).values() if holder else ()
            yield from (value for value in values if isinstance(value, torch.Tensor))


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layer: Any = _like(linear, Linear4bit, compute_dtype=linear.weight.dtype, **settings)
    layer.weight = Params4bit(linear.weight.data, False, module=layer, **settings).to(linear.weight.device)
    layer.support_avx512bf16_for_cpu = False  # in inference on a CPU it would pack W anew, which contenders share
    return _with_bias(layer, linear)


def _int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer: Any = _like(linear, Linear8bitLt, has_fp16_weights=False, threshold=6.0)
    # It quantises what it moves; what is there already would stay in 16 bits.
    layer.weight = Int8Params(linear.weight.data.cpu(), requires_grad=False).to(linear.weight.device)
    layer.init_8bit_state()  # the first call would take the scales away from W, which contenders share
    return _with_bias(layer, linear)


def _fp8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(linear, Float8WeightOnlyConfig())
    return linear


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    where = str(linear.weight.device)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    made: nn.Module = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device=where)
    return made


def _like(linear: nn.Linear, kind: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    """A layer of this kind without a weight of its own yet: on the meta device."""
    with torch.device("meta"):
        return kind(linear.in_features, linear.out_features, bias=False, **settings)


def _with_bias(layer: Any, linear: nn.Linear) -> nn.Module:
    layer.bias = linear.bias
    made: nn.Module = layer
    return made
