"""``prepare``: compile the kernels of a model in parallel before it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import nn

from ..nn.module import DoRALinear
from ..nn.rehearsal import Part, requests_of
from ..runtime.ahead import Batch
from ..runtime.arguments import ArgumentError
from ..runtime.kernel import Request
from ..runtime.no_jit import not_compiled


def prepare(model: nn.Module, tokens: int | Iterable[int], *, train: bool = True) -> None:
    """Compile and load the kernels that the DoRA layers of ``model`` will launch, in parallel.

    Otherwise each compiles at its first launch, one after another. A PEFT model prepares itself at the beginning of its
    first forward pass (:func:`doratune.accelerate`); call this to have it earlier, for a model that ``torch.compile``
    is to compile, and for models of :class:`doratune.nn.DoRALinear`. What is stored as a binary or in Triton's cache is
    only loaded. Layers that are not on a GPU need no kernels. Call it under the ``torch.autocast`` of training.

    Args:
        model: has layers of :class:`doratune.nn.DoRALinear`, or was given to :func:`doratune.accelerate`.
        tokens: the number of tokens (batch times sequence) of a forward pass, or several such numbers.
        train: also prepare the backward pass.

    Raises:
        ArgumentError: ``model`` is not a ``torch.nn.Module``, or a number of tokens is not a positive integer.
        UsageError: ``DORATUNE_COMPILE_PROCESSES`` is not a number.
        NotCompiledError: ``DORATUNE_NO_JIT`` is set and kernels have no stored binary; the message lists them.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    numbers = [*tokens] if isinstance(tokens, Iterable) else [tokens]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ArgumentError(f"tokens must be positive integers, got {number!r}")
    batch = Batch(_requests(model, numbers, train))
    batch.finish()
    if batch.refused:
        first, *more = batch.refused
        others = f"; so would {len(more)} others: {', '.join(more)[:500]}" if more else ""
        raise not_compiled(first, f"no store has a binary for it{others}")


def _requests(model: nn.Module, numbers: Iterable[int], train: bool) -> Iterator[Request]:
    own = [
        Part(layer, layer.base_layer.in_features, layer.base_layer.weight.dtype)
        for layer in model.modules()
        if isinstance(layer, DoRALinear)
    ]
    for number in numbers:
        yield from requests_of(own, number, train=train)
        if "peft" in sys.modules:
            from .peft.first_step import kernels_of

            yield from kernels_of(model, number, train=train)
