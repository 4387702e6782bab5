"""Give a module a forward pass of our own, by a subclass of its class, and undo it.

A patched ``module.forward`` would stay bound to the module that it was made for: the replicas of ``nn.DataParallel``
would run the original's weights. A subclass has none of that: copies, replicas, pickles and compilers treat it as any
other class. ``FSDP2`` and ``torch.nn.utils.parametrize`` change a module in the same way.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

STATE = "_doratune"
"""The attribute of a swapped module that holds what its forward pass needs."""

_OWN_WAYS = ("__init_subclass__", "__reduce__", "__reduce_ex__")

Forward = Callable[..., torch.Tensor]
T = TypeVar("T")


def swap(module: nn.Module, forward: Forward, state: object) -> None:
    """Let ``module`` run ``forward(module, x, …)``, which finds ``state`` by :func:`state_of`.

    Classes that take notice of subclasses, or copy their objects in a way of their own, stay as they are.
    """
    unswap(module)
    own = [vars(each) for each in type(module).__mro__ if each not in (object, nn.Module)]
    if type(type(module)) not in (type, ABCMeta) or any(name in each for each in own for name in _OWN_WAYS):
        return
    cls: type = type(module)
    module.__class__ = _subclass(cls, forward)
    module.__dict__[STATE] = state


def unswap(module: nn.Module) -> None:
    """Undo :func:`swap`; does nothing to a module that is not swapped, or whose class has changed again since."""
    module.__dict__.pop(STATE, None)
    if "_plain_class" in vars(type(module)):
        module.__class__ = type(module)._plain_class  # type: ignore[attr-defined]


def state_of(module: nn.Module, kind: type[T]) -> T | None:
    """The state of a swapped module if it is of this kind; None for replicas of ``nn.DataParallel``, which share it."""
    attributes = module.__dict__
    state = attributes.get(STATE)
    return state if type(state) is kind and "_is_replica" not in attributes else None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without ours."""
    found: type[nn.Module] = getattr(type(module), "_plain_class", type(module))
    return found


def run_plain(module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the forward pass of the module's own class."""
    return type(module)._plain_class.forward(module, x, *args, **kwargs)  # type: ignore[attr-defined]


@functools.cache
def _subclass(cls: type, forward: Forward) -> type:
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": forward,
        "_plain_class": cls,
        "__reduce_ex__": functools.partialmethod(_reduce, cls, forward),
    }
    return type(cls.__name__, (cls,), members)


def _reduce(module: nn.Module, cls: Any, forward: Forward, protocol: Any) -> tuple[Any, ...]:
    """How to copy or pickle a swapped module: its class is made anew, because it has no name of its own."""
    reduced: Any = cls.__reduce_ex__(module, protocol)
    _, _, *state = reduced
    return (_new, (cls, forward), *state)


def _new(cls: Any, forward: Forward) -> nn.Module:
    made: Any = _subclass(cls, forward)
    module: nn.Module = made.__new__(made)
    return module
