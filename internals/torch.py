"""The private names of PyTorch that doratune uses, each in one function here.

If the installed PyTorch lacks a name, a public API replaces it, or an answer that keeps results correct: a mode that
cannot be detected counts as on, and a backward pass that cannot be identified reuses nothing. Each name is looked up
once, when this module is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from . import find

NAMES = (
    "torch._C._cuda_getDevice",
    "torch._C._cuda_getCurrentRawStream",
    "torch._C._current_graph_task_id",
    "torch._C._is_any_autocast_enabled",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._dynamo.guards.TensorGuards",
    "torch._C._are_functorch_transforms_active",
    "torch.autograd.forward_ad._current_level",
    "torch._C._get_tracing_state",
    "torch._C._get_dispatch_mode",
    "torch._C._TorchDispatchModeKey",
    "torch.compiler._is_exporting_flag",
    "torch._C._nn.linear",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C.DisableTorchFunction",
    "torch._C.DisableTorchFunctionSubclass",
    "torch.overrides._get_current_function_mode_stack",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.utils._device.DeviceContext",
    "torch.utils.hooks.RemovableHandle.next_id",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
)
"""Every private name. A test removes each in turn."""


_TRIALS: dict[str, Callable[[Any], object]] = {
    "torch._C._current_graph_task_id": lambda function: function() + 0,
    "torch._C._is_any_autocast_enabled": lambda function: function(),
    "torch._C._autograd._get_current_graph_task_keep_graph": lambda function: function(),
    "torch._C._autograd._top_saved_tensors_default_hooks": lambda function: function(True),
    "torch._C._are_functorch_transforms_active": lambda function: function(),
    "torch._C._get_tracing_state": lambda function: function(),
    "torch._C._get_dispatch_mode": lambda function: function(torch._C._TorchDispatchModeKey.PROXY),
    "torch._C._len_torch_dispatch_stack": lambda function: function() > 0,
    "torch._C._len_torch_function_stack": lambda function: function() > 0,
    "torch._C.DisableTorchFunction": lambda context: context().__enter__,
    "torch._C.DisableTorchFunctionSubclass": lambda context: context().__enter__,
    "torch.utils.hooks.RemovableHandle.next_id": lambda number: number + 0,
    "torch.overrides._get_current_function_mode_stack": lambda function: [*function()],
    "torch.nn.modules.module._has_any_global_hook": lambda function: function(),
    "torch.utils._python_dispatch._disable_current_modes": lambda context: context().__enter__,
}
"""How each function is called. One that fails, because it takes other arguments now, counts as missing."""


def _find_working(name: str) -> Any:
    found = find(name)
    try:
        if found is not None and name in _TRIALS:
            _TRIALS[name](found)
    except Exception:
        return None
    return found


_found = {name: _find_working(name) for name in NAMES}


def missing() -> list[str]:
    """The names that the installed PyTorch lacks, or whose functions take other arguments."""
    on_gpus = torch.version.cuda is not None or torch.version.hip is not None
    return [name for name, value in _found.items() if value is None and (on_gpus or "_cuda_" not in name)]


# The current GPU.

current_device: Callable[[], int] = _found["torch._C._cuda_getDevice"] or torch.cuda.current_device
"""The index of the current GPU. CUDA must be initialised."""


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


current_stream: Callable[[int], int] = _found["torch._C._cuda_getCurrentRawStream"] or _public_stream
"""The handle of the current stream of the GPU with this index."""


TensorGuards: Any = _found["torch._C._dynamo.guards.TensorGuards"]
"""A guard that recognises tensors like those it was made from; None if this PyTorch lacks it."""


def guard_of(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """A function of as many tensors: whether each is like its counterpart here, in one call.

    They are alike in type, dtype, device, sizes, strides and whether a gradient is wanted, and autocast is as it was.
    None if this PyTorch has no guards, makes them from other arguments, or makes none for these tensors.
    """
    sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
    try:
        guard = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        accepts: Callable[..., bool] = guard.check
    except (AttributeError, TypeError, RuntimeError):
        return None
    return accepts


# Differentiation.


def _unknown_backward() -> int:
    return -1


knows_backward: bool = _found["torch._C._current_graph_task_id"] is not None
"""Whether :func:`current_backward` identifies backward passes."""

current_backward: Callable[[], int] = _found["torch._C._current_graph_task_id"] or _unknown_backward
"""An id of the running backward pass; -1 outside of one, or if this PyTorch lacks the name."""


def _unknown_graph() -> bool:
    return True


keeps_graph: Callable[[], bool] = _found["torch._C._autograd._get_current_graph_task_keep_graph"] or _unknown_graph
"""Whether the running backward pass keeps saved tensors for another one; True if this PyTorch lacks the name."""


def _transforms_by_trial() -> bool:
    try:
        torch.empty(0).requires_grad_()  # raises inside a transform
    except RuntimeError:
        return True
    return False


transforms_active: Callable[[], bool] = _found["torch._C._are_functorch_transforms_active"] or _transforms_by_trial
"""Whether a ``torch.func`` transform (grad, vmap, jvp, …) runs."""

_counts_levels = _found["torch.autograd.forward_ad._current_level"] is not None


def tangents_possible() -> bool:
    """Whether code runs inside ``forward_ad.dual_level``; True if this PyTorch does not tell."""
    return not _counts_levels or forward_ad._current_level >= 0


def has_tangents(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether forward-mode differentiation goes through one of ``tensors``."""
    if not tangents_possible():
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _no_hooks(ignores_unset: bool) -> None:
    return None


top_saving_hooks: Callable[[bool], object] = _found["torch._C._autograd._top_saved_tensors_default_hooks"] or _no_hooks
"""For code that every call runs: with True, not None if :func:`saving_is_hooked`."""


def saving_is_hooked() -> bool:
    """Whether hooks take the tensors that are saved for a backward pass; False if this PyTorch lacks the name.

    A checkpoint's do, in its forward pass and in its recompute.
    """
    return top_saving_hooks(True) is not None


# Autocast.


def _unknown_autocast() -> bool:
    return True


some_autocast_is_on: Callable[[], bool] = _found["torch._C._is_any_autocast_enabled"] or _unknown_autocast
"""Whether autocast is on for any kind of device; True if this PyTorch lacks the name. No compiler traces it.

Asking for one device takes ten times as long.
"""


# Recording of graphs.

_tracing_state = _found["torch._C._get_tracing_state"]
_dispatch_mode = _found["torch._C._get_dispatch_mode"]
_has_export_flag = _found["torch.compiler._is_exporting_flag"] is not None
_PROXY = getattr(_found["torch._C._TorchDispatchModeKey"], "PROXY", None)


def _proxy_mode() -> object:
    if _dispatch_mode is not None and _PROXY is not None:
        return _dispatch_mode(_PROXY)
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode()


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` now runs this code."""
    is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
    return is_tracing() if _tracing_state is None else _tracing_state() is not None


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` or ``make_fx`` now runs this code to record its operators."""
    return not torch.compiler.is_compiling() and (is_jit_tracing() or _proxy_mode() is not None)


def is_recording() -> bool:
    """Whether PyTorch now records a graph that is to run elsewhere; False under ``torch.compile``."""
    if torch.compiler.is_compiling():  # in PyTorch 2.11 is_exporting() is also true under torch.compile
        return bool(torch.compiler._is_exporting_flag if _has_export_flag else torch.compiler.is_exporting())
    return is_traced()


# Modes and hooks, which see the operations that run.

_dispatch_modes: Callable[[], int] | None = _found["torch._C._len_torch_dispatch_stack"]
_function_modes: Callable[[], int] | None = _found["torch._C._len_torch_function_stack"]
_global_hooks: Callable[[], bool] | None = _found["torch.nn.modules.module._has_any_global_hook"]
_mode_stack = _found["torch.overrides._get_current_function_mode_stack"]
_device_mode = _found["torch.utils._device.DeviceContext"]
_hide = _found["torch.utils._python_dispatch._disable_current_modes"]
_without_functions = _found["torch._C.DisableTorchFunction"]


as_plain_tensors: Callable[[], AbstractContextManager[Any]] = (
    _found["torch._C.DisableTorchFunctionSubclass"] or nullcontext
)
"""Make a context in which a subclass's tensors behave as plain ones; otherwise each method costs microseconds."""


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
_PLAIN = torch.empty(0)
hides_modes: bool = _hide is not None
"""Whether :func:`without_modes` hides operations from dispatch modes."""
_OWN_MODULE = "torch.nn.modules.linear"
_linear_forward = nn.Linear.forward if nn.Linear.forward.__module__ == _OWN_MODULE else None
_functional, _Linear = nn.functional, nn.Linear
_linear = _found["torch._C._nn.linear"] or nn.functional.linear

DispatchMode: type[Any] | None = _found["torch.utils._python_dispatch.TorchDispatchMode"]
"""The base class of modes that see each operation; None if this PyTorch lacks it."""


def dispatch_mode_is_on() -> bool:
    """Whether a dispatch mode sees the operations that run now; True if PyTorch offers no way to find out."""
    if _dispatch_modes is not None:
        return _dispatch_modes() > 0
    try:
        from torch.utils._python_dispatch import is_in_torch_dispatch_mode
    except ImportError:
        return True
    return bool(is_in_torch_dispatch_mode(include_infra_modes=True))


def function_mode_is_on() -> bool:
    """Whether a function mode may change what operations return; ignores the mode of ``torch.set_default_device``."""
    on = _function_modes() > 0 if _function_modes is not None else torch.overrides.has_torch_function((_PLAIN,))
    if not on or _mode_stack is None or _device_mode is None:
        return on
    return not all(type(mode) is _device_mode for mode in _mode_stack())


def global_hook_is_on() -> bool:
    """Whether a global module hook is registered; True if PyTorch offers no way to find out."""
    if _global_hooks is not None:
        return bool(_global_hooks())
    tables = [getattr(nn.modules.module, f"_global_{kind}_hooks", True) for kind in _HOOKS]
    return any(map(bool, tables))


_asked = itertools.count()
_counts_hooks = _found["torch.utils.hooks.RemovableHandle.next_id"] is not None


def hooks_made() -> int:
    """A number that changes whenever a hook is registered on a module or tensor; always, if PyTorch does not count."""
    return RemovableHandle.next_id if _counts_hooks else -1 - next(_asked)


def linear_is_replaced() -> bool:
    """Whether other code (fake quantisation, a profiler) has replaced PyTorch's ``linear``."""
    return nn.functional.linear is not _linear or nn.Linear.forward is not _linear_forward


_hookless_at = -1
"""The value of :func:`hooks_made` at which no global hook was registered."""


def undisturbed() -> bool:
    """Whether nothing but plain eager execution goes on: no mode, global hook, recorder, transform or tangent.

    A compiler is not asked for. ``make_fx`` records by a dispatch mode. Where PyTorch has all names, one expression
    answers: every layer asks.
    """
    global _hookless_at
    names = (_dispatch_modes, _function_modes, _global_hooks, _tracing_state)
    if None in names or not (_counts_levels and _counts_hooks):
        return not (
            dispatch_mode_is_on()
            or function_mode_is_on()
            or global_hook_is_on()
            or linear_is_replaced()
            or transforms_active()
            or tangents_possible()
            or is_jit_tracing()
        )
    hooks = RemovableHandle.next_id
    if hooks != _hookless_at:
        if global_hook_is_on():
            return False
        _hookless_at = hooks  # until another hook is made
    return not (
        _dispatch_modes()  # type: ignore[misc]
        or (_function_modes() and function_mode_is_on())  # type: ignore[misc]
        or _functional.linear is not _linear
        or _Linear.forward is not _linear_forward
        or transforms_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def without_modes() -> AbstractContextManager[Any]:
    """A context that hides operations from all modes, as far as this PyTorch can."""
    stack = ExitStack()
    for hide in (_hide, _without_functions):
        if hide is not None:
            stack.enter_context(hide())
    return stack
