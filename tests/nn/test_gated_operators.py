"""The operators of a gated MLP: their results in every dtype, and which memory they write to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError
from doratune.nn import kernels
from doratune.nn.operators import (
    compose_swiglu,
    compose_swiglu_backward,
    compose_swiglu_backward_,
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
T, N, R, S = 7, 48, 8, 0.75


class Operands:
    """Random operands of the operators in a dtype, and what they should give, by autograd in fp64."""

    def __init__(self, dtype: torch.dtype, activation: str, biased: bool, adapter: torch.dtype | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        wide = torch.float64 if dtype is torch.float64 else torch.float32

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.dout, self.gate, self.up, self.h = tensor(T, N), tensor(T, N), tensor(T, N), tensor(T, 2 * R)
        self.b = [tensor(N, R, dtype=adapter or dtype) for _ in range(2)]
        self.g = [tensor(N, dtype=wide) for _ in range(2)]
        self.norm = [tensor(N, dtype=wide).abs() for _ in range(2)]
        self.bias = [tensor(N) if biased else None for _ in range(2)]
        self.activation = activation

    def forward(self) -> tuple[Any, ...]:
        return (self.gate, self.up, self.h, *self.b, *self.g, *self.bias, S, self.activation)

    def backward(self, magnitude: torch.dtype) -> tuple[Any, ...]:
        before = (self.dout, self.gate, self.up, self.h, *self.b, *self.g, *self.norm, *self.bias)
        return (*before, S, self.activation, magnitude)

    def expected(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The forward pass's result and the backward pass's results, in fp64."""
        h = self.h.double().split(R, dim=1)
        bases = [self.gate.double(), self.up.double()]
        inner = [base + S * one @ b.double().T for base, one, b in zip(bases, h, self.b, strict=True)]
        y = [g.double() * each for g, each in zip(self.g, inner, strict=True)]
        y = [each if bias is None else each + bias.double() for each, bias in zip(y, self.bias, strict=True)]
        y = [each.requires_grad_() for each in y]
        out = ACTIVATIONS[self.activation](y[0]) * y[1]
        dy = torch.autograd.grad(out, y, self.dout.double())
        results = [g.double() * each for g, each in zip(self.g, dy, strict=True)]
        results += [
            (each * part).sum(dim=0) / norm.double() for each, part, norm in zip(dy, inner, self.norm, strict=True)
        ]
        if self.bias[0] is not None:
            results += [each.sum(dim=0) for each in dy]
        return out.detach(), results


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_the_textbook(dtype: torch.dtype, biased: bool, activation: str) -> None:
    operands = Operands(dtype, activation, biased)
    out, gradients = operands.expected()
    found = compose_swiglu(*operands.forward())
    assert found.dtype is dtype
    close(found, out)
    for magnitude in (torch.float32, torch.float64, torch.bfloat16):
        for backward in (compose_swiglu_backward, compose_swiglu_backward_):
            results = backward(*operands.backward(magnitude))
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            assert [t.dtype for t in results] == [dtype, dtype, magnitude, magnitude, *[wide] * (len(results) - 4)]
            for one, wanted in zip(results, gradients, strict=True):
                if one.dtype is not torch.float64 or dtype is torch.float64:
                    close(one, wanted)


def test_fp32_adapters_stay_exact() -> None:
    operands = Operands(torch.bfloat16, "silu", False, adapter=torch.float32)
    close(compose_swiglu(*operands.forward()), operands.expected()[0])


def test_no_tokens_give_no_rows_and_sums_of_zero() -> None:
    operands = Operands(torch.float32, "silu", True)
    for name in ("dout", "gate", "up", "h"):
        setattr(operands, name, getattr(operands, name)[:0])
    assert compose_swiglu(*operands.forward()).shape == (0, N)
    results = compose_swiglu_backward(*operands.backward(torch.float32))
    assert [tuple(t.shape) for t in results] == [(0, N)] * 2 + [(N,)] * 4
    assert not any(t.any() for t in results)


def test_an_unknown_activation_is_refused_by_name() -> None:
    operands = Operands(torch.float32, "silu", False)
    operands.activation = "gelu_tan"
    with pytest.raises(UsageError, match="gelu_tanh"):
        compose_swiglu(*operands.forward())


class Reference:
    """Replaces a GPU's kernel: runs the reference into the given outputs."""

    def __init__(self, *key: Any) -> None:
        op, d_out, d_in, rank, tokens, dtype, adapter, flags, magnitude, _ = key
        self.spec: KernelSpec = kernels.spec_for(op, d_out, d_in, rank, tokens, dtype, adapter, flags, magnitude)

    def launch(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float) -> None:
        results = kernels.run_reference_on(self.spec, inputs, scaling)
        names = [operand.name for operand in self.spec.contract.outputs_of(self.spec)]
        assert len(outputs) == len(names)
        for name, out in zip(names, outputs, strict=True):
            assert out.dtype is results[name].dtype
            out.copy_(results[name])


@pytest.mark.parametrize("biased", [False, True])
def test_only_the_underscored_operator_overwrites_and_autograd_sees_it(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_for", Reference)
    operands = Operands(torch.float32, "silu", biased)
    out, gradients = operands.expected()
    gate, up = operands.gate.clone(), operands.up.clone()
    close(compose_swiglu(*operands.forward()), out)
    for one, wanted in zip(compose_swiglu_backward(*operands.backward(torch.float32)), gradients, strict=True):
        close(one, wanted)
    assert torch.equal(operands.gate, gate)
    assert torch.equal(operands.up, up)
    versions = operands.gate._version, operands.up._version
    results = compose_swiglu_backward_(*operands.backward(torch.float32))
    assert (results[0].data_ptr(), results[1].data_ptr()) == (operands.gate.data_ptr(), operands.up.data_ptr())
    assert operands.gate._version > versions[0]
    assert operands.up._version > versions[1]
    for one, wanted in zip(results, gradients, strict=True):
        close(one, wanted)


def test_a_compiler_gets_one_graph_whose_operators_overwrite_nothing() -> None:
    operands = Operands(torch.float32, "gelu_tanh", True)
    out, gradients = operands.expected()
    gate = operands.gate.clone()

    def both() -> tuple[torch.Tensor, list[torch.Tensor]]:
        return compose_swiglu(*operands.forward()), compose_swiglu_backward_(*operands.backward(torch.float32))

    found, results = torch.compile(both, backend="aot_eager", fullgraph=True)()
    assert torch.equal(operands.gate, gate)
    close(found, out)
    for one, wanted in zip(results, gradients, strict=True):
        close(one, wanted)
