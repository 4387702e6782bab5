"""A repeated call skips the check of its arguments, and every other call is checked."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from doratune.codegen.spec import KernelSpec
from doratune.runtime import argument_memo
from doratune.runtime import kernel as kernel_module
from doratune.runtime.arguments import ArgumentError
from doratune.runtime.kernel import Kernel
from doratune.tuner.inputs import make_inputs

SPEC = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every full check of arguments."""
    made: list[str] = []
    bind_inputs = kernel_module.bind_inputs

    def spy(*args: Any) -> Any:
        made.append("checked")
        return bind_inputs(*args)

    monkeypatch.setattr(kernel_module, "bind_inputs", spy)
    return made


@pytest.fixture(params=["guards", "signatures"])
def recogniser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's own test of arguments, and without."""
    if request.param == "signatures":
        monkeypatch.setattr(argument_memo, "TensorGuards", None)


def test_equal_tensors_are_checked_once_and_others_again(checks: list[str]) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    first = kernel(**inputs, scaling=scaling)
    assert torch.equal(first, kernel(**inputs, scaling=scaling))  # type: ignore[arg-type]
    assert len(checks) == 1
    assert torch.equal(kernel(*inputs.values(), scaling=scaling), first)  # type: ignore[arg-type]
    out = torch.empty(16, 48)
    for _ in range(2):
        assert kernel(*inputs.values(), scaling=scaling, out=out) is out
        assert torch.equal(out, first)  # type: ignore[arg-type]
    assert len(checks) == 3
    fewer, _ = make_inputs(SPEC, 3)
    assert kernel(*fewer.values(), scaling=scaling).shape == (3, 48)  # type: ignore[union-attr]


def test_a_call_like_the_last_one_is_recognised_without_reading_its_tensors_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if argument_memo.TensorGuards is None:
        pytest.skip("this PyTorch has no guards")
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    others, _ = make_inputs(SPEC, 16, seed=1)
    out = torch.empty(16, 48)
    for given in ({}, {"out": out}):
        for _ in range(2):
            kernel(*inputs.values(), scaling=scaling, **given)
        with monkeypatch.context() as patched:
            patched.setattr(argument_memo, "_signature", None)
            assert kernel(*inputs.values(), scaling=scaling, **given) is not None
            assert kernel(*others.values(), scaling=scaling, **given) is not None


def test_tensors_that_are_remembered_are_not_kept_alive(recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    out = torch.empty(16, 48)
    for _ in range(3):
        kernel(*inputs.values(), scaling=scaling, out=out)
    kept = [weakref.ref(tensor) for tensor in (*inputs.values(), out)]
    del inputs, out
    assert [tensor() for tensor in kept] == [None] * len(kept)


def test_named_tensors_in_another_order_are_distinguished(checks: list[str]) -> None:
    spec = KernelSpec.create("compose_forward", d_out=48, tokens=16, dtype="fp32", gpu="cpu")
    kernel = Kernel(spec, torch.device("cpu"))
    inputs, scaling = make_inputs(spec, 16)
    first = kernel(**inputs, scaling=scaling)
    turned = dict(reversed(inputs.items()))
    alike = {name: inputs[name] for name in ("lora", "base", "g")}  # one shape and dtype at each place
    for _ in range(3):
        assert torch.equal(kernel(**turned, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(**alike, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(**inputs, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(*inputs.values(), scaling=scaling), first)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "h": t["h"][:-1]},
        lambda t: {**t, "g": t["g"].double()},
        lambda t: {**t, "h": t["h"].T.contiguous().T},
        lambda t: {**t, "base": t["base"].to("meta")},
        lambda t: {**t, "lora_B": t["lora_B"].tolist()},
        lambda t: {**t, "g": t["g"].numpy()},
        lambda t: {**t, "g": torch.Tensor},
        lambda t: {**t, "g": t["g"].repeat(2)[::2]},
        lambda t: {name: value for name, value in t.items() if name != "g"},
        lambda t: {**t, "bias": t["g"]},
    ],
)
def test_what_was_refused_is_refused_after_a_good_call_too(
    change: Callable[[dict[str, Any]], dict[str, Any]], recogniser: None
) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    for _ in range(3):
        kernel(**inputs, scaling=scaling)
        with pytest.raises(ArgumentError):
            kernel(**change(inputs), scaling=scaling)
        kernel(*inputs.values(), scaling=scaling)
        with pytest.raises(ArgumentError):
            kernel(*change(inputs).values(), scaling=scaling)
    with pytest.raises(ArgumentError, match=r"scaling of .* must be a number"):
        kernel(**inputs)


@pytest.mark.parametrize(
    "other", [torch.empty(15, 48), torch.empty(16, 48).double(), torch.empty(16, 48, device="meta"), torch.empty(48), 3]
)
def test_an_unfit_output_is_refused_after_a_good_one_too(other: Any, recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    for _ in range(3):
        kernel(*inputs.values(), scaling=scaling, out=torch.empty(16, 48))
        with pytest.raises(ArgumentError):
            kernel(*inputs.values(), scaling=scaling, out=other)


def test_calls_of_several_kinds_in_turn_are_distinguished(checks: list[str], recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    many, scaling = make_inputs(SPEC, 16)
    few, _ = make_inputs(SPEC, 5)
    spaced = {**many, "h": torch.cat((many["h"], many["h"]), 1)[:, :8]}
    parameter = {**many, "lora_B": torch.nn.Parameter(many["lora_B"])}
    first = kernel(**many, scaling=scaling).clone()  # type: ignore[union-attr]
    checks.clear()
    for _ in range(3):
        for tensors in (many, spaced, parameter):
            assert torch.equal(kernel(*tensors.values(), scaling=scaling), first)  # type: ignore[arg-type]
            out = torch.empty(16, 48)
            assert kernel(*tensors.values(), scaling=scaling, out=out) is out
            assert torch.equal(out, first)  # type: ignore[arg-type]
        assert kernel(*few.values(), scaling=scaling).shape == (5, 48)  # type: ignore[union-attr]
        in_place = many["base"].clone()
        assert kernel(in_place, *[*many.values()][1:], scaling=scaling, out=in_place) is in_place
        assert torch.equal(in_place, first)  # type: ignore[arg-type]
    assert len(checks) == 7, "each kind is checked once: three with and without an output, and the few tokens"


def test_the_number_of_remembered_signatures_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_memo, "_MOST_KNOWN", 4)
    kernel = Kernel(SPEC, torch.device("cpu"))
    for tokens in range(1, 12):
        inputs, scaling = make_inputs(SPEC, tokens)
        kernel(**inputs, scaling=scaling)
    assert len(kernel._memo.known) == 4
