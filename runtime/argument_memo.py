"""Memoise argument checks: arguments of types, shapes, dtypes, devices and strides seen before need no second check.

For the four arguments of ``lora_compose`` the full check takes 28 us of the host, finding a signature 3.6 us and
PyTorch's own guard, which recognises the arguments of the call before, 0.3 us (one core of a server's CPU): beside a
launch of about 10 us the check would be most of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..internals.torch import TensorGuards

_MOST_KNOWN = 1 << 12
"""Signatures that a kernel remembers; token counts may be of any number."""

_is_contiguous = torch.Tensor.is_contiguous


class Known(NamedTuple):
    """What is remembered of checked arguments.

    ``outputs`` says of each output to allocate which input has its shape and dtype, or these themselves; ``rows`` is
    what :func:`rows_of` says of inputs and outputs. ``accepts`` recognises as many ``inputs``, and an ``out`` after
    them if there was one, where all are positional and no two the same.
    """

    outputs: tuple[int | tuple[torch.Size, torch.dtype], ...]
    rows: int
    inputs: int
    with_out: bool
    accepts: Callable[..., bool] | None


class ArgumentMemo:
    """The arguments that a kernel has found to be right."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], Known] = {}
        self._last: Known | None = None

    def find(
        self, inputs: Sequence[torch.Tensor], named: Mapping[str, object], out: torch.Tensor | None
    ) -> Known | None:
        """What is remembered of these; ``inputs`` are all of them, at the end those that are ``named``."""
        last = self._last
        if (
            last is not None
            and last.accepts is not None
            and last.inputs == len(inputs)
            and last.with_out is (out is not None)
            and not named
            and (last.accepts(*inputs) if out is None else last.accepts(*inputs, out))
        ):
            return last
        signature = _signature(inputs, named, out)
        known = None if signature is None else self.known.get(signature)
        if known is not None:
            self._last = known
        return known

    def remember(
        self,
        inputs: Sequence[torch.Tensor],
        named: Mapping[str, object],
        out: torch.Tensor | None,
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Remember checked arguments and the ``outputs`` made for them, ``out`` being the first of these if given."""
        signature = _signature(inputs, named, out)
        if signature is None or len(self.known) >= _MOST_KNOWN:
            return
        made = [
            next(
                (i for i, t in enumerate(inputs) if t.is_contiguous() and t.shape == o.shape and t.dtype == o.dtype),
                (o.shape, o.dtype),
            )
            for o in outputs[0 if out is None else 1 :]
        ]
        accepts = None if named else _recogniser([*inputs] if out is None else [*inputs, out])
        rows = rows_of((*inputs, *outputs))
        self.known[signature] = Known(tuple(made), rows, len(inputs), out is not None, accepts)


def rows_of(tensors: Sequence[torch.Tensor]) -> int:
    """The rows of the first tensor, with all its leading dimensions, where all are contiguous; 0 where they are not."""
    if not all(map(_is_contiguous, tensors)):
        return 0
    shape = tensors[0].shape
    return shape[0] if len(shape) == 2 else shape[:-1].numel()


def _signature(
    inputs: Iterable[torch.Tensor], named: Iterable[str], out: torch.Tensor | None
) -> tuple[object, ...] | None:
    """All that the check of arguments looks at; None if some argument is not a tensor.

    Contiguous tensors need no strides in it: all that are contiguous, and of one shape, pass or fail alike.
    """
    parts: list[object] = [out is None, *named]
    try:
        for tensor in inputs if out is None else (*inputs, out):
            strides = tensor.is_contiguous() or tensor.stride()
            parts += (type(tensor), tensor.shape, tensor.dtype, tensor.device, strides)
    except (AttributeError, TypeError):
        return None
    return tuple(parts)


def _recogniser(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """What tells whether tensors are of the types, dtypes, devices, shapes and strides of these.

    It accepts no tensor twice, so there is none for an output in the memory of an input.
    """
    if TensorGuards is None or len({*map(id, tensors)}) < len(tensors):
        return None
    sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
    try:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        accepts: Callable[..., bool] = guards.check
    except (AttributeError, TypeError, RuntimeError):  # another signature than the one known
        return None
    return accepts
