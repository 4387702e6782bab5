"""Who sees the tensors between two operations: PyTorch's modes and global hooks.

A ``TorchDispatchMode`` sees each operation and may keep its result. Selective activation checkpointing does: in the
forward pass it keeps the results that its policy names, and in the recompute it hands them out again in the order of
the calls. So memory that a mode may hold is never written over, and operations that run in one pass and not in the
other (a norm that is reused) are hidden from it. A global module hook sees what every module returns, and may return
something else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

_NOTHING = nullcontext()
_OWN_MODULE = "torch.nn.modules.linear"
_linear_forward = nn.Linear.forward if nn.Linear.forward.__module__ == _OWN_MODULE else None
_linear = getattr(torch._C._nn, "linear", None)
"""What a linear layer runs, as PyTorch has it: others (fake quantisation, profilers) put their own in the place."""


def _hidden_way() -> Callable[[], AbstractContextManager[Any]] | None:
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return None
    return _disable_current_modes


_hide = _hidden_way()
_dispatch_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
_function_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_function_stack", None)
_global_hooks: Callable[[], object] | None = getattr(torch.nn.modules.module, "_has_any_global_hook", None)


def watched() -> bool:
    """Whether a mode or a global hook may hold the result of an operation. Where PyTorch cannot be asked, it may."""
    if torch.compiler.is_compiling():  # no mode runs in a compiled graph
        return False
    return _dispatch_modes is None or _dispatch_modes() > 0 or intercepted()


def intercepted() -> bool:
    """Whether somebody may change what modules or ``linear`` return, or their gradients: a global module hook, a
    function mode, or who has replaced PyTorch's ``linear``. Where PyTorch cannot be asked, somebody may.
    """
    if torch.compiler.is_compiling():
        return False
    if _function_modes is None or _global_hooks is None:
        return True
    if nn.functional.linear is not _linear or nn.Linear.forward is not _linear_forward:
        return True
    return bool(_global_hooks()) or (_function_modes() > 0 and not _only_devices())


def is_untouched(layer: nn.Module) -> bool:
    """Whether calling ``layer`` runs its class's forward and nothing else: no hooks, no patched forward."""
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def current_backward() -> int:
    """A number for the backward pass that runs now, -1 outside of one."""
    return torch._C._current_graph_task_id()


def _only_devices() -> bool:
    """Whether every function mode is that of ``torch.set_default_device``, which holds nothing."""
    try:
        from torch.overrides import _get_current_function_mode_stack
        from torch.utils._device import DeviceContext
    except ImportError:
        return False
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def seen() -> bool:
    """Whether a dispatch mode sees what runs now: not so inside :func:`hidden`, where PyTorch can hide it."""
    return not torch.compiler.is_compiling() and (_dispatch_modes is None or _dispatch_modes() > 0)


def hidden() -> AbstractContextManager[Any]:
    """A context in which no mode sees what runs; free of charge where none is on."""
    if torch.compiler.is_compiling() or not watched():
        return _NOTHING
    stack = ExitStack()
    if _hide is not None:
        stack.enter_context(_hide())
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack
