"""The cached examination of a layer equals a new one after every change of its modules, of their tensors' addresses or
of their hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from doratune.integrations.peft import examine as module_under_test
from doratune.integrations.peft.examine import Glance, examine

D_OUT, D_IN, RANK = 12, 8, 4


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D_IN, D_OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y


@pytest.fixture
def layer() -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"], use_dora=True)
    return peft.get_peft_model(Small().requires_grad_(False), config).base_model.model.proj


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every full examination."""
    made: list[str] = []

    def spy(module: Any, adapter: str) -> Any:
        made.append(adapter)
        return examine(module, adapter)

    monkeypatch.setattr(module_under_test, "examine", spy)
    return made


def replaced(name: str, shape: tuple[int, ...]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        getattr(layer, name)["default"].weight = nn.Parameter(torch.randn(shape))

    return change


def other_values(
    part: Callable[[Any], nn.Module], values: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., None]:
    def change(layer: Any) -> None:
        weight = part(layer).weight
        weight.data = values(weight.data)

    return change


def a(layer: Any) -> nn.Module:
    found: nn.Module = layer.lora_A["default"]
    return found


def b(layer: Any) -> nn.Module:
    found: nn.Module = layer.lora_B["default"]
    return found


def m(layer: Any) -> nn.Module:
    found: nn.Module = layer.lora_magnitude_vector["default"]
    return found


def w(layer: Any) -> nn.Module:
    found: nn.Module = layer.base_layer
    return found


def no_parameter(part: nn.Module) -> None:
    """As FSDP does while it has gathered a weight."""
    weight = part._parameters.pop("weight")
    assert weight is not None
    part.weight = weight.detach().clone()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another parameter A": replaced("lora_A", (RANK, D_IN)),
    "another parameter of another rank": replaced("lora_B", (D_OUT, RANK + 1)),
    "a shard of A in its parameter": other_values(a, lambda values: values[:2]),
    "a shard of B that begins where B did": other_values(b, lambda values: values[: D_OUT // 2]),
    "m in another place": other_values(m, torch.clone),
    "W in another dtype": other_values(w, torch.Tensor.half),
    "no memory behind W": other_values(w, lambda values: values[:0]),
    "the layer moved to another dtype": lambda layer: layer.to(torch.bfloat16),
    "another scaling": lambda layer: layer.set_scale("default", 3.0),
    "a trained W": lambda layer: w(layer).weight.requires_grad_(True),
    "a hook on A": lambda layer: a(layer).register_forward_hook(lambda *_: None),
    "a hook before B": lambda layer: b(layer).register_forward_pre_hook(lambda *_: None),
    "a hook on the gradients of W's layer": lambda layer: w(layer).register_full_backward_hook(lambda *_: None),
    "a patched forward": lambda layer: setattr(w(layer), "forward", lambda x: x),
    "a bias of B": lambda layer: b(layer).register_parameter("bias", nn.Parameter(torch.ones(D_OUT))),
    "a wrapped A": lambda layer: layer.lora_A.update({"default": nn.Sequential(a(layer))}),
    "another base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(D_IN, D_OUT).requires_grad_(False)),
    "W no parameter any more": lambda layer: no_parameter(w(layer)),
}


def assert_same(seen: Any, full: Any) -> None:
    if isinstance(full, str):
        assert seen == full
        return
    for name, value in full._asdict().items():
        if isinstance(value, tuple):
            assert all(one is other or one == other for one, other in zip(getattr(seen, name), value, strict=True)), (
                name
            )
        else:
            assert getattr(seen, name) is value or getattr(seen, name) == value, name


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_result_is_that_of_a_new_examination(layer: Any, change: str, looks: list[str]) -> None:
    glance = Glance()
    before = glance.look(layer, "default")
    assert not isinstance(before, str)
    assert glance.look(layer, "default") is before
    assert len(looks) == 1, "nothing has changed, and nothing is looked at twice"
    CHANGES[change](layer)
    for _ in range(2):
        assert_same(glance.look(layer, "default"), examine(layer, "default"))
    assert len(looks) > 1, f"{change} goes unseen"


def test_new_values_at_the_same_address_need_no_examination(layer: Any, looks: list[str]) -> None:
    glance = Glance()
    before = glance.look(layer, "default")
    with torch.no_grad():
        a(layer).weight.add_(1.0)
        w(layer).bias.add_(1.0)
    assert glance.look(layer, "default") is before
    assert before.layer.bias is w(layer).bias  # type: ignore[union-attr]
    assert len(looks) == 1


def test_a_layer_that_was_refused_is_examined_again(layer: Any) -> None:
    glance = Glance()
    handle = a(layer).register_forward_hook(lambda *_: None)
    assert isinstance(glance.look(layer, "default"), str)
    handle.remove()
    assert not isinstance(glance.look(layer, "default"), str)
