"""An accelerated model has stock PEFT's gradients if other code overwrites a layer's output or keeps its base layer's.

Kernels write through a pointer, so no tensor's version changes; here writes to ``.data`` replace them. It makes no
difference which package they come from, and whether it was imported before ``accelerate`` or after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.internals.torch import hides_modes

from ...nn.layers import kernels_on_paper
from .peft_models import Pair, assert_same_gradients, twin, with_dora

__all__ = ["kernels_on_paper"]


class OverwritesItsInput(torch.autograd.Function):
    """A fused activation in the manner of Liger's: its backward writes the gradient over the input it has saved."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y)
        return torch.nn.functional.silu(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        sigmoid = y.sigmoid()
        y.data.copy_(gradient * sigmoid * (1.0 + y * (1.0 - sigmoid)))
        return y.detach()


class RotatesInPlace(torch.autograd.Function):
    """A rotary embedding in the manner of Unsloth's: its forward writes over q or k."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        y.data.copy_(y.roll(1, dims=-1) * 0.5)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient * 0.5).roll(-1, dims=-1)


class Fused(nn.Module):
    """Both after a layer each."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = RotatesInPlace.apply(self.second(OverwritesItsInput.apply(self.first(x))))
        assert isinstance(y, torch.Tensor)
        return y


def dora(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_dora(model, target_modules=["first", "second"], **settings)


def step(model: nn.Module, x: torch.Tensor, *, reentrant: bool | None = None) -> None:
    torch.manual_seed(1)  # the same dropout for all
    y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()


def inputs() -> torch.Tensor:
    return torch.randn(11, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_kernel_may_overwrite_the_output(
    bias: bool, dropout: float, reentrant: bool | None, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    stock = dora(Fused(bias), lora_dropout=dropout)
    fast = twin(stock)
    doratune.accelerate(fast, quiet=True)
    for model in (stock, fast):
        step(model, inputs(), reentrant=reentrant)
    assert_same_gradients(fast, stock, 1e-5)
    assert kernels_on_paper()["adapter_backward"] == 2


class Keeps(TorchDispatchMode):
    """A mode that holds the results of matrix products."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.held = held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.held.append(result)
        return result


class KeepsFunctions(TorchFunctionMode):
    """The same for Python's functions."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.held = held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.held.append(result)
        return result


@contextlib.contextmanager
def held_by_a_hook(model: nn.Module, held: list[torch.Tensor]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                stack.enter_context(
                    contextlib.closing(_Handle(module.register_forward_hook(lambda *call: held.append(call[-1]))))
                )
        yield


@contextlib.contextmanager
def held_by_a_global_hook(model: nn.Module, held: list[torch.Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if type(module) is nn.Linear:
            held.append(output)

    with contextlib.closing(_Handle(nn.modules.module.register_module_forward_hook(hook))):
        yield


class _Handle:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


HOLDERS: dict[str, Callable[[nn.Module, list[torch.Tensor]], Any]] = {
    "hook": held_by_a_hook,
    "global hook": held_by_a_global_hook,
    "dispatch mode": lambda model, held: Keeps(held),
    "function mode": lambda model, held: KeepsFunctions(held),
}


@pytest.mark.parametrize("first", ["accelerate", "the holder"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_holder_of_the_base_layers_output_may_read_and_overwrite_it(
    holder: str, bias: bool, first: str, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    if holder == "dispatch mode" and not hides_modes:
        pytest.skip("this PyTorch hides nothing from modes: one that overwrites all it sees breaks stock PEFT, too")
    torch.manual_seed(0)
    stock = dora(Pair())
    fast = twin(stock)
    if not bias:
        for model in (stock, fast):
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.bias = None
    seen: list[list[torch.Tensor]] = []
    for model in (stock, fast):
        held: list[torch.Tensor] = []
        if model is fast and first == "accelerate":
            doratune.accelerate(fast, quiet=True)
        with HOLDERS[holder](model, held):
            if model is fast and first != "accelerate":
                doratune.accelerate(fast, quiet=True)
            with torch.no_grad():
                model(inputs())
            seen.append([tensor.clone() for tensor in held])
            held.clear()
            y = model(inputs())
        # Under a global hook or a function mode PEFT's code runs, which keeps what they hold.
        for tensor in held if model is fast and holder in ("hook", "dispatch mode") else ():
            if tensor.shape[-1] in (40, 16):
                tensor.data.zero_()
        y.square().sum().backward()
    assert_same_gradients(fast, stock, 1e-5)
    bases = [[t for t in tensors if t.shape[-1] in (40, 16)] for tensors in seen]
    assert len(bases[1]) >= 2
    for base in bases[1]:
        assert any(base.shape == other.shape and torch.allclose(base, other, atol=1e-5) for other in bases[0]), (
            "what was held is not the base layer's output any more"
        )
