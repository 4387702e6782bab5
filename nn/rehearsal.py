"""Find out which kernels a layer will launch, by running its very code on tensors without values.

Inside :func:`rehearsing`, :func:`~doratune.nn.kernels.kernel_for` gives a :class:`StandIn` for operands on PyTorch's
``meta`` device. Its launch starts nothing; it notes the kernel that real operands would launch, and their alignments.
So the list is what the code asks for, whatever operations it uses. An error in a rehearsal costs only the list: what
is not on it compiles at its first launch.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..internals.torch import global_hook_is_on, linear_is_replaced, saving_is_hooked, without_modes
from ..internals.triton import without_launches
from ..runtime.kernel import Kernel, Request

META = "meta"

_log = logging.getLogger("doratune")

_lock = threading.Lock()
_active: Rehearsal | None = None


class Rehearsal:
    """The kernels that were asked for, for operands on ``device``: ``requests`` in the order of their launches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.requests: dict[Request, None] = {}


@contextmanager
def rehearsing(device: torch.device) -> Iterator[Rehearsal]:
    """Note the kernels that the block launches on meta tensors, as if these were on ``device``.

    Modes of the caller do not see the block's operations, and kernels of others are not started: meta tensors have no
    memory. One rehearsal runs at a time; a second one, in another thread, waits.
    """
    global _active
    with _lock, without_modes(), without_launches():
        _active = Rehearsal(device)
        try:
            yield _active
        finally:
            _active = None


def rehearsed_device(device: torch.device) -> torch.device:
    """The device that ``device`` stands for: in a rehearsal another one for ``meta``, else itself."""
    active = _active
    return device if active is None or device.type != META else active.device


def is_rehearsing() -> bool:
    """Whether a rehearsal runs, perhaps in another thread."""
    return _active is not None


class StandIn:
    """In place of a kernel, for operands on the meta device.

    ``find`` returns the kernel for operands on a device. Outside of a rehearsal a launch does nothing either, because
    such operands have no values.
    """

    def __init__(self, find: Callable[[torch.device], Kernel | None]) -> None:
        self._find = find

    def launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float | None = None
    ) -> None:
        """Note the kernel and the alignments of its operands."""
        active, kernel = _active, self._kernel()
        if active is not None and kernel is not None:
            active.requests[kernel, kernel.alignments_of((*inputs, *outputs))] = None

    @property
    def fusion_pays(self) -> bool:
        """As :attr:`~doratune.runtime.kernel.Kernel.fusion_pays`."""
        kernel = self._kernel()
        return kernel is not None and kernel.fusion_pays

    @property
    def specialises_warps(self) -> bool:
        """As :attr:`~doratune.runtime.kernel.Kernel.specialises_warps`."""
        kernel = self._kernel()
        return kernel is not None and kernel.specialises_warps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel(), name)

    def _kernel(self) -> Kernel | None:
        active = _active
        return None if active is None else self._find(active.device)


class Part(NamedTuple):
    """A module that takes one x [..., d_in] of ``dtype``, such as a layer, and returns a tensor or a tuple of them."""

    module: nn.Module
    d_in: int
    dtype: torch.dtype


def requests_of(
    parts: Iterable[Part],
    tokens: int,
    *,
    train: bool,
    device: torch.device | None = None,
    stand_ins: Callable[[nn.Module], dict[nn.Module, nn.Module]] = lambda module: {},
    around: Callable[[nn.Module], AbstractContextManager[object]] = lambda module: nullcontext(),
) -> Iterator[Request]:
    """The kernels that ``parts`` launch in a forward pass of ``tokens`` tokens and, with ``train``, the backward pass.

    They come one after another, so that the caller can begin with the first. Autocast counts as it is set now. What is
    called is a copy on the meta device, one for all modules of the same form; the modules themselves are not. Others'
    hooks and patches do not run: they could keep a tensor without memory and start a kernel on it later, and Triton
    would take it to lie at address 0. Where PyTorch's own ``linear`` is replaced or all modules are hooked, nothing is
    listed.

    Args:
        parts: modules whose parameters are on ``device``, or on their own device if None. On another device than a GPU
            they launch no kernels.
        stand_ins: the submodules of a module that others replace in its copy.
        around: the context in which a copy is called.
    """
    if linear_is_replaced() or global_hook_is_on():
        return
    known: set[Hashable] = set()
    for part in parts:
        module = part.module
        where = device or next((parameter.device for parameter in module.parameters()), torch.device(META))
        if where.type != "cuda" or (form := _form_of(module)) in known:
            continue
        known.add(form)
        with rehearsing(where) as rehearsal:
            try:
                x = torch.empty(tokens, part.d_in, dtype=part.dtype, device=META)
                called = _copy_on_meta(module, stand_ins(module))
                with around(called):
                    _run(called, x, train=train)
            except Exception as problem:
                _log.info("the kernels of a %s are not all compiled ahead: %r", type(module).__name__, problem)
        yield from rehearsal.requests


def _form_of(module: nn.Module) -> Hashable:
    """Equal for modules that launch the same kernels."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    settings = [
        (path, type(part), name, str(value))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | str | list)
    ]
    return (
        tuple(settings),
        tuple([(name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors]),
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _copy_on_meta(original: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of ``original`` without values; ``replaced`` are submodules and what takes their place in it.

    Its hooks do nothing, and its patched forward passes are those of the classes. They are still there, because what is
    called depends on that.

    Raises:
        Exception: the module cannot be copied.
    """
    known: dict[int, Any] = {id(module): other for module, other in replaced.items()}
    for tensor in (*original.parameters(), *original.buffers()):
        known[id(tensor)] = _on_meta(tensor)
    for module in original.modules():
        for hooks in [getattr(module, name) for name in _HOOKS]:
            known[id(hooks)] = OrderedDict.fromkeys(hooks, _nothing)
        if "forward" in vars(module):
            known[id(vars(module)["forward"])] = _nothing
    copied = copy.deepcopy(original, known)
    for module in copied.modules():
        if "forward" in vars(module):
            module.forward = MethodType(type(module).forward, module)
    return copied


def _nothing(*_: object, **__: object) -> None:
    """A hook that changes nothing."""


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device with the shape, strides, dtype and ``requires_grad`` of ``tensor``.

    A parameter's is a parameter. Of a sharded tensor it is the whole.
    """
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _run(module: nn.Module, x: torch.Tensor, *, train: bool) -> None:
    unseen = torch.autograd.graph.saved_tensors_hooks(_itself, _itself) if saving_is_hooked() else nullcontext()
    with torch.set_grad_enabled(train), unseen:
        y = module(x.requires_grad_(train))
    outputs = [each for each in (y if isinstance(y, tuple) else (y,)) if each.requires_grad]
    if train and outputs:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        torch.autograd.grad(outputs, [x, *trained], [*map(torch.empty_like, outputs)], allow_unused=True)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
