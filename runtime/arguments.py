"""Check the tensors that a user passes to a kernel against the operation's contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..codegen.ops import ALIGNMENT, OPERAND_BYTES, RUN_TIME, Operand
from ..codegen.spec import KernelSpec
from ..errors import UsageError
from .reference import OPERAND_DTYPES

WORD_BYTES = 4
"""Bytes of the words in which kernels load packed codes."""


class ArgumentError(UsageError, ValueError):
    """A tensor has the wrong shape, dtype, device or strides, or is missing; the message names it and the remedy."""


def bind_inputs(
    spec: KernelSpec, args: Sequence[object], kwargs: Mapping[str, object], device: torch.device
) -> dict[str, torch.Tensor]:
    """Match positional and named tensors to the inputs of ``spec`` and check each one.

    Operands with a token dimension may have any leading dimensions, ``[..., width]``. The row stride may exceed the
    width (a slice of a wider matrix), but the last dimension must be contiguous.

    Raises:
        ArgumentError: a missing, surplus or unsuitable argument.
    """
    operands = spec.contract.inputs_of(spec)
    names = [operand.name for operand in operands]
    takes = f"{spec.op} takes {', '.join(names)}" + (" and scaling" if spec.contract.scaling else "")
    if len(args) > len(names):
        raise ArgumentError(f"expected at most {len(names)} tensors, got {len(args)}; {takes}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentError(f"unknown argument {name!r}; {takes}")
        if name in given:
            raise ArgumentError(f"{name} is given twice; {takes}")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise ArgumentError(f"missing {', '.join(missing)}; {takes}")

    inputs: dict[str, torch.Tensor] = {}
    lead: tuple[int, ...] | None = None
    for operand in operands:
        tensor = given[operand.name]
        check_tensor(operand, tensor, spec, device, lead)
        assert isinstance(tensor, torch.Tensor)
        if operand.shape[0] in RUN_TIME and lead is None:
            lead = tuple(tensor.shape[:-1])
        inputs[operand.name] = tensor
    return inputs


def check_tensor(
    operand: Operand, tensor: object, spec: KernelSpec, device: torch.device, lead: tuple[int, ...] | None = None
) -> None:
    """Raise an ArgumentError unless ``tensor`` fits ``operand`` of ``spec``.

    ``lead`` are the leading dimensions that an operand of tokens or layers must have; None accepts any with at least
    one.
    """
    name = operand.name
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dtype = OPERAND_DTYPES[operand.dtype_of(spec)]
    if tensor.dtype != dtype:
        other = "" if operand.dtype in OPERAND_BYTES else f", or load a kernel for {tensor.dtype}"
        raise ArgumentError(f"{name} must be {dtype}, got {tensor.dtype}: convert it{other}")
    if tensor.device != device:
        raise ArgumentError(
            f"{name} must be on {device}, got {tensor.device}: move the tensor, or load a kernel for its device"
        )
    if operand.shape[0] == "tokens":
        width = operand.sizes(spec)[1]
        if tensor.ndim < 2 or tensor.shape[-1] != width:
            raise ArgumentError(
                f"{name} must have shape [tokens, {width}] ({operand.shape[1]}), got {list(tensor.shape)}"
            )
        if math.prod(tensor.shape[:-1]) < 1:
            raise ArgumentError(f"{name} must have at least one token, got shape {list(tensor.shape)}")
        if lead is not None and tuple(tensor.shape[:-1]) != lead:
            raise ArgumentError(
                f"{name} must have {list(lead)} tokens as the other tensors, got {list(tensor.shape[:-1])}"
            )
    elif operand.shape[0] == "layers":
        _check_layers(operand, tensor, spec, lead)
    else:
        shape = [*operand.sizes(spec)]
        if list(tensor.shape) != shape:
            raise ArgumentError(
                f"{name} must have shape {shape} ({', '.join(operand.shape)}), got {list(tensor.shape)}"
            )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ArgumentError(
            f"{name} must have a contiguous last dimension, got strides {tuple(tensor.stride())}: call .contiguous()"
        )


def _check_layers(operand: Operand, tensor: torch.Tensor, spec: KernelSpec, lead: tuple[int, ...] | None) -> None:
    """Raise an ArgumentError unless ``tensor`` is a dense stack of ``lead`` layers; of any number if that is None."""
    name, shape = operand.name, [*operand.sizes(spec)[1:]]
    if tensor.ndim != len(operand.shape) or list(tensor.shape[1:]) != shape or not tensor.shape[0]:
        sizes = f"[layers, {', '.join(map(str, shape))}] ({', '.join(operand.shape)})"
        raise ArgumentError(f"{name} must have shape {sizes}, got {list(tensor.shape)}")
    if lead is not None and tensor.shape[0] != lead[0]:
        raise ArgumentError(f"{name} must have {lead[0]} layers as the other tensors, got {tensor.shape[0]}")
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}: call .contiguous()")


def make_outputs(
    spec: KernelSpec, inputs: Mapping[str, torch.Tensor], out: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Allocate the outputs of ``spec``; ``out``, when given, becomes the first one.

    Raises:
        ArgumentError: ``out`` has the wrong shape, dtype, device or strides, or rows that overlap in memory.
    """
    lead: tuple[int, ...] = next(
        (tuple(inputs[o.name].shape[:-1]) for o in spec.contract.inputs_of(spec) if o.shape[0] in RUN_TIME), ()
    )
    outputs: dict[str, torch.Tensor] = {}
    for position, operand in enumerate(spec.contract.outputs_of(spec)):
        if position == 0 and out is not None:
            check_tensor(replace(operand, name="out"), out, spec, device, lead)
            if any(
                size > 1 and stride < out.shape[-1] for size, stride in zip(out.shape[:-1], out.stride(), strict=False)
            ):
                raise ArgumentError(
                    f"the rows of out must not overlap in memory, got shape {list(out.shape)} and strides "
                    f"{tuple(out.stride())}"
                )
            outputs[operand.name] = out
            continue
        shape: list[int] = []
        for dim, size in zip(operand.shape, operand.sizes(spec), strict=True):
            shape += lead if dim in RUN_TIME else (size,)
        outputs[operand.name] = torch.empty(shape, dtype=OPERAND_DTYPES[operand.dtype_of(spec)], device=device)
    return outputs


def as_rows(tensor: torch.Tensor, *, descriptor: bool) -> torch.Tensor:
    """Return ``tensor`` as a kernel addresses it: a vector, or a matrix ``[rows, width]`` with one row stride.

    Packed codes are loaded in words of :data:`WORD_BYTES` bytes; at another address they are copied.

    The result shares the memory of ``tensor`` if one row stride describes it and, for a tensor ``descriptor``, its rows
    do not overlap and its address and row stride are multiples of :data:`~doratune.codegen.ops.ALIGNMENT` bytes.
    Otherwise it is a contiguous copy.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.ndim < 2:
        packed = tensor.dtype is torch.uint8 and tensor.data_ptr() % WORD_BYTES
        return tensor.clone() if packed else tensor
    rows = tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
    if descriptor and (alignment_of(rows) < ALIGNMENT or rows.stride(0) < rows.shape[1]):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def alignment_of(tensor: torch.Tensor) -> int:
    """The largest power of two, up to :data:`~doratune.codegen.ops.ALIGNMENT` bytes, that divides address and stride.

    The stride is the row stride of a matrix.
    """
    bits = tensor.data_ptr() | ALIGNMENT
    if tensor.ndim == 2:
        bits |= tensor.stride(0) * tensor.element_size()
    return bits & -bits
