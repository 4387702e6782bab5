"""An operation runs the fused kernel if, and only if, a store says that its fusion pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from doratune.cache.entry import MEASURED, Entry, Environment, Evaluation
from doratune.cache.lookup import Resolution
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config
from doratune.nn import kernels
from doratune.nn.functional import dora_linear
from doratune.runtime.kernel import Kernel
from doratune.runtime.reference import definition

from .layers import TRAINED, Layer, error, make_layer

SPEC = KernelSpec.create(
    "dora_linear_forward", d_out=48, d_in=32, rank=8, tokens=16, dtype="bf16", adapter="bf16", gpu="h200"
)


class Fused:
    """Replaces a GPU's kernel: computes in fp64 and records its arguments."""

    def __init__(self, pays: bool = True) -> None:
        self.fusion_pays = pays
        self.keys: list[tuple[Any, ...]] = []
        self.launched = 0

    def find(self, *key: Any) -> Fused | None:
        if key[0] != "dora_linear_forward":
            return None
        self.keys.append(key)
        return self

    def launch(self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], scaling: float) -> None:
        op, d_out, d_in, rank, tokens, _, _, flags, _, _ = self.keys[-1]
        sizes = {"d_out": d_out, "d_in": d_in, "rank": rank, "tokens": tokens, **dict.fromkeys(flags, True)}
        spec = KernelSpec.create(op, dtype="fp32", adapter="fp32", gpu="cpu", **sizes)
        names = [operand.name for operand in spec.contract.inputs_of(spec)]
        results = definition(spec, dict(zip(names, inputs, strict=True)), scaling)
        for out, result in zip(outputs, results.values(), strict=True):
            out.copy_(result)
        self.launched += 1


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Fused]:
    def install(pays: bool) -> Fused:
        kernel = Fused(pays)
        monkeypatch.setattr(kernels, "kernel_for", kernel.find)
        return kernel

    # The caches of functools would be used by the next test too.
    monkeypatch.setattr(kernels, "paying_kernel_for", kernels.paying_kernel_for.__wrapped__)
    return install


def layer(trained: tuple[str, ...] = ()) -> Layer:
    return make_layer(tokens=(2, 8), d_out=48, d_in=32, rank=8, dtype=torch.float32, trained=trained)


@pytest.mark.parametrize("trained", [(), TRAINED], ids=["inference", "training"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_kernel_runs_where_it_pays_and_gives_the_same(
    fused: Callable[[bool], Fused], trained: tuple[str, ...], biased: bool
) -> None:
    def run() -> list[torch.Tensor]:
        one = layer(trained)
        y = dora_linear(*one.args, one.bias if biased else None)
        if trained:
            y.backward(one.dy)
        return [y.detach(), *[tensor.grad for tensor in one.tensors.values() if tensor.grad is not None]]

    apart = fused(False)
    expected = run()
    assert apart.keys
    assert not apart.launched
    together = fused(True)
    found = run()
    assert together.launched == 1
    assert together.keys[0][:5] == ("dora_linear_forward", 48, 32, 8, 16)
    assert len(found) == len(expected) == (len(trained) + biased if trained else 1)
    for one, another in zip(found, expected, strict=True):
        assert error(one, another.double()) < 1e-5


@pytest.mark.parametrize("form", ["delta", "a base that is there", "no tokens", "W by columns"])
def test_other_forms_take_no_fused_kernel(fused: Callable[[bool], Fused], form: str) -> None:
    kernel, one = fused(True), layer()
    if form == "delta":
        dora_linear(*one.args, delta=True)
    elif form == "W by columns":  # a launch would copy it
        dora_linear(one.x, one.weight.T.contiguous().T, *one.args[2:])
    elif form == "no tokens":
        assert dora_linear(one.x[:, :0], *one.args[1:]).shape == (2, 0, 48)
    else:
        dora_linear(*one.args, base=one.x @ one.weight.T)
    assert not kernel.launched


@pytest.mark.parametrize(
    ("step", "unfused_us", "pays"), [("exact", 9.0, True), ("exact", 7.0, False), ("nearest", 9.0, False)]
)
def test_a_kernels_fusion_pays_if_its_own_entry_says_so(step: str, unfused_us: float, pays: bool) -> None:
    config = default_config(SPEC, find_gpu("h200"))
    evaluation = Evaluation(MEASURED, us=8.0, unfused_us=unfused_us)
    entry = Entry(SPEC, config, "t", "s", "", evaluation, Environment("h200", "sm_90", "3.7.1"))
    found = Resolution(SPEC, step, config, entry, "store", 0.0, (), (), ())
    assert Kernel(SPEC, torch.device("cuda", 0), found).fusion_pays == pays
    assert not Kernel(SPEC, torch.device("cpu")).fusion_pays
