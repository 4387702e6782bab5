"""A quantised model that decodes reads its W in one kernel for each layer, where a store says that this pays: on layers
of the packages themselves, with the values that they have otherwise. Everywhere else it computes as it did."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

from doratune.integrations.peft import base_layers
from doratune.nn import kernels
from doratune.nn.kernels import kernel_for as find
from doratune.runtime.argument_memo import rows_of

from ...nn.layers import KernelOnPaper
from .peft_models import relative, shake
from .test_quantised import LINEAR_KINDS
from .test_stored_calls import only_through_peft, pair
from .test_stored_groups import model_of

OP = "dora_linear_forward"
Keys = list[tuple[Any, ...]]


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Every fusion of a stored W pays, and runs on paper; returns the number of launches since it was asked last."""
    made: dict[object, KernelOnPaper] = {}

    def pays(*key: Any) -> KernelOnPaper | None:
        assert key[0] == OP
        if not isinstance(key[5], str):
            return None
        return made.setdefault(key, KernelOnPaper(kernels.spec_for(*key[:-1])))

    monkeypatch.setattr(kernels, "paying_kernel_for", pays)
    monkeypatch.setattr(kernels, "kernel_for", find)

    def launches() -> int:
        count = sum(kernel.launches for kernel in made.values())
        for kernel in made.values():
            kernel.launches = 0
        return count

    return launches


def decode(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model.eval()(x)
    return y


def profiled(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, set[CodeType]]:
    """What ``call`` returns, and the code of all functions that it runs: nothing in the model is replaced to see it."""
    seen: set[CodeType] = set()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code))
    try:
        return call(), seen
    finally:
        sys.setprofile(None)


def x_of(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_layer_that_decodes_is_one_kernel(
    kind: str, tokens: int, dtype: torch.dtype, paying: Callable[[], int]
) -> None:
    model = pair(kind, dtype)
    x = x_of(tokens, dtype)
    with only_through_peft():
        wanted = decode(model, x)
    decode(model, x)  # bitsandbytes decides in which dtype it computes
    assert paying()
    decode(model, x)
    paying()
    bases = [model.get_base_model().get_submodule(name).base_layer for name in ("first", "second")]
    found, called = profiled(lambda: decode(model, x))
    assert paying() == 2
    assert not called & {type(base).forward.__code__ for base in bases}
    assert found.dtype is wanted.dtype
    assert relative(found, wanted) < (1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_other_calls_are_computed_as_they_were(kind: str, paying: Callable[[], int]) -> None:
    model = pair(kind, torch.bfloat16)
    decode(model, x_of(4, torch.bfloat16))
    assert paying()
    for tokens, change in ((17, None), (4, "training")):
        x = x_of(tokens, torch.bfloat16)
        y = model.train()(x) if change else decode(model, x)
        assert paying() == 0, (tokens, change)
        with only_through_peft():
            assert torch.equal(y, model(x) if change else decode(model, x))


def test_a_layer_that_rounds_its_input_multiplies_itself(paying: Callable[[], int]) -> None:
    model = pair(base_layers.BNB_8BIT, torch.bfloat16)
    x = x_of(2, torch.bfloat16)
    y = decode(model, x)
    assert paying() == 0
    with only_through_peft():
        assert torch.equal(y, decode(model, x))


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_under_autocast_the_output_has_the_dtype_that_it_has_otherwise(kind: str, paying: Callable[[], int]) -> None:
    model = pair(kind, torch.bfloat16)
    x = x_of(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = decode(model, x)
        # The others alone know in which dtype they return.
        assert bool(paying()) is (kind in (base_layers.BNB_4BIT, base_layers.HQQ))
        with only_through_peft():
            wanted = decode(model, x)
    assert y.dtype is wanted.dtype
    assert relative(y, wanted) < 2e-2


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_w_that_is_replaced_is_the_one_that_is_read(kind: str, paying: Callable[[], int]) -> None:
    model, other = pair(kind, torch.float32), pair(kind, torch.float32)
    x = x_of(3, torch.float32)
    before = decode(model, x)
    decode(model, x)
    shake(other)
    for name in ("first", "second"):
        model.get_base_model().get_submodule(name).base_layer = other.get_base_model().get_submodule(name).base_layer
    paying()
    decode(model, x)
    found = decode(model, x)
    assert paying() > 0
    with only_through_peft():
        wanted = decode(model, x)
    assert relative(found, wanted) < 1e-5
    assert relative(found, before) > 1e-3 or torch.equal(wanted, before)


def test_a_hook_on_the_base_layer_sees_its_product(paying: Callable[[], int]) -> None:
    model = pair(base_layers.BNB_4BIT, torch.float32)
    x = x_of(2, torch.float32)
    decode(model, x)
    decode(model, x)
    paying()
    seen: list[torch.Tensor] = []
    base = model.get_base_model().first.base_layer
    base.register_forward_hook(lambda module, args, y: seen.append(y))
    decode(model, x)
    assert len(seen) == 1
    assert paying() == 1, "the other layer's"


def test_layers_that_read_the_same_x_have_a_kernel_each(
    paying: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with operands of whole rows: only launches on those are repeated without running the emitted Python."""
    rows: list[int] = []
    launch = KernelOnPaper.launch

    def noted(kernel: KernelOnPaper, inputs: Any, outputs: Any, scaling: float | None = None) -> None:
        if kernel.spec.op == OP:  # type: ignore[attr-defined]
            rows.append(rows_of((*inputs, *outputs)))
        launch(kernel, inputs, outputs, scaling)

    monkeypatch.setattr(KernelOnPaper, "launch", noted)
    model = model_of()
    x = x_of(4, torch.float32)
    for _ in range(3):
        decode(model, x)
    paying()
    rows.clear()
    found = decode(model, x)
    assert paying() == 7
    assert rows == [4] * 7
    with only_through_peft():
        wanted = decode(model, x)
    assert relative(found, wanted) < 1e-5


def test_without_an_entry_nothing_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Keys = []
    monkeypatch.setattr(kernels, "paying_kernel_for", lambda *key: asked.append(key))
    model = pair(base_layers.BNB_4BIT, torch.float32)
    x = x_of(1, torch.float32)
    with only_through_peft():
        wanted = decode(model, x)
    for _ in range(4):
        assert torch.equal(decode(model, x), wanted)
    assert 0 < len(asked) <= 4, "once for each layer, again where its source is known"
    assert {key[0] for key in asked} == {OP}
