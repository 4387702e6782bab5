"""Detect PyTorch's modes and global hooks, which see the tensors between two operations.

A ``TorchDispatchMode`` sees each operation and may keep its result. Selective activation checkpointing does: in the
forward pass it keeps the results that its policy names, and in the recompute it returns them in the order of the calls.
So memory that a mode may hold must not be overwritten, and operations that run in only one of the two passes (a norm
that is reused) are hidden from it. A global module hook sees every module's output and may replace it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..internals.torch import (
    dispatch_mode_is_on,
    function_mode_is_on,
    global_hook_is_on,
    linear_is_replaced,
    without_modes,
)

_NOTHING = nullcontext()


def watched() -> bool:
    """Whether a mode or a global hook may hold the result of an operation."""
    if torch.compiler.is_compiling():  # no mode runs in a compiled graph
        return False
    return dispatch_mode_is_on() or intercepted()


def intercepted() -> bool:
    """Whether a global hook, a function mode or a replaced ``linear`` may change modules' outputs or gradients."""
    if torch.compiler.is_compiling():
        return False
    return linear_is_replaced() or global_hook_is_on() or function_mode_is_on()


def is_untouched(layer: nn.Module) -> bool:
    """Whether calling ``layer`` only runs its class's forward: it has no hooks and no patched forward."""
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def seen() -> bool:
    """Whether a dispatch mode sees the operations that run now; usually False inside :func:`hidden`."""
    return not torch.compiler.is_compiling() and dispatch_mode_is_on()


def hidden() -> AbstractContextManager[Any]:
    """A context that hides operations from all modes; it does nothing if no mode or hook is on."""
    if torch.compiler.is_compiling() or not watched():
        return _NOTHING
    return without_modes()
