"""Checks of the tensors that users pass to DoRA's functions."""

from __future__ import annotations

import torch

from ..internals.torch import is_traced
from ..runtime.arguments import ArgumentError


def check_layer(
    x: torch.Tensor,
    d_in: int,
    d_out: int,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    norm: object,
    device: torch.device,
) -> None:
    """Raise an ArgumentError unless these tensors fit a layer [d_out, d_in] on ``device``; A and B are not checked."""
    if is_traced():  # sizes may be tensors; PyTorch's own operators check them
        return
    check_plain(x=x, magnitude=magnitude, bias=bias, base=base)
    if x.ndim < 1 or x.shape[-1] != d_in:
        raise ArgumentError(f"x must have shape [..., {d_in}] (d_in of the layer), got {list(x.shape)}")
    if base is not None and base.shape != (*x.shape[:-1], d_out):
        raise ArgumentError(
            f"base must have shape {[*x.shape[:-1], d_out]} (x's tokens, d_out), got {list(base.shape)}"
        )
    for name, vector in (("magnitude", magnitude), ("bias", bias), ("norm", norm)):
        if isinstance(vector, torch.Tensor) and vector.shape != (d_out,):
            raise ArgumentError(f"{name} must have shape [{d_out}] (d_out), got {list(vector.shape)}")
    for name, tensor in (("x", x), ("magnitude", magnitude), ("bias", bias), ("base", base), ("norm", norm)):
        if isinstance(tensor, torch.Tensor) and tensor.device != device:
            raise ArgumentError(f"{name} must be on the layer's device {device}, got {tensor.device}: move one of them")


def check_adapters(
    shape: torch.Size | tuple[int, ...], lora_A: torch.Tensor, lora_B: torch.Tensor, device: torch.device
) -> None:
    """Raise an ArgumentError unless A and B fit a W of ``shape`` [d_out, d_in] on ``device``."""
    if is_traced():  # sizes may be tensors; PyTorch's own operators check them
        return
    if len(shape) != 2:
        raise ArgumentError(
            f"weight must have shape [d_out, d_in], got {list(shape)}: for a quantised weight use dora_compose"
        )
    d_out, d_in = shape
    check_plain(lora_A=lora_A, lora_B=lora_B)
    if lora_A.ndim != 2 or lora_A.shape[1] != d_in or lora_A.shape[0] < 1:
        raise ArgumentError(f"lora_A must have shape [r, {d_in}] for W [{d_out}, {d_in}], got {list(lora_A.shape)}")
    if lora_B.shape != (d_out, lora_A.shape[0]):
        raise ArgumentError(f"lora_B must have shape [{d_out}, {lora_A.shape[0]}] (d_out, r), got {list(lora_B.shape)}")
    if lora_A.dtype != lora_B.dtype or not lora_A.dtype.is_floating_point:
        raise ArgumentError(
            f"lora_A and lora_B must have the same floating-point dtype, got {lora_A.dtype} and {lora_B.dtype}"
        )
    if lora_A.device != device or lora_B.device != device:
        raise ArgumentError(
            f"lora_A and lora_B must be on the layer's device {device}, got {lora_A.device} and {lora_B.device}"
        )


def check_plain(**tensors: torch.Tensor | None) -> None:
    """Raise an ArgumentError for a tensor subclass that stores its values elsewhere: sharded, quantised, …"""
    if torch.compiler.is_compiling() or is_traced():
        return
    for name, tensor in tensors.items():
        dispatch = getattr(type(tensor), "__torch_dispatch__", None)
        if tensor is not None and dispatch is not torch.Tensor.__torch_dispatch__:
            raise ArgumentError(
                f"{name} must be a plain torch.Tensor, got {type(tensor).__name__}: gather a sharded tensor first; "
                "for a quantised weight use doratune.nn.functional.dora_compose"
            )
