"""The operators of several projections of one x: their results in every dtype, and which memory they write to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from doratune.nn import kernels
from doratune.nn.operators import (
    compose_backward_group,
    compose_backward_group_,
    lora_compose_group,
)

T, R, S = 7, 8, 0.75
WIDTHS = [(48, 16), (48, 16, 24), (16, 16, 16)]


class Operands:
    """Random operands of the operators in a dtype, and what they should give, by autograd in fp64."""

    def __init__(self, dtype: torch.dtype, widths: tuple[int, ...], biased: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        wide = torch.float64 if dtype is torch.float64 else torch.float32

        def tensors(*shape: int, dtype: torch.dtype = dtype, by_token: bool = False) -> list[torch.Tensor]:
            return [
                torch.randn(*((T, width) if by_token else (width, *shape)), generator=generator).to(dtype)
                for width in widths
            ]

        self.dys, self.bases = tensors(by_token=True), tensors(by_token=True)
        self.h = torch.randn(T, R * len(widths), generator=generator).to(dtype)
        self.b, self.g, self.norms = tensors(R), tensors(dtype=wide), [t.abs() for t in tensors(dtype=wide)]
        self.biases = tensors() if biased else []

    def forward(self) -> tuple[Any, ...]:
        return self.bases, self.h, self.b, self.g, self.biases, S

    def backward(self, magnitude: torch.dtype) -> tuple[Any, ...]:
        return self.dys, self.bases, self.h, self.b, self.g, self.norms, S, magnitude

    def expected(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The forward pass's results and the backward pass's results, in fp64."""
        outputs, dygs, dms = [], [], []
        for index, h in enumerate(self.h.double().split(R, dim=1)):
            base, g = self.bases[index].double().requires_grad_(), self.g[index].double().requires_grad_()
            y = g * (base + S * h @ self.b[index].double().T)
            dyg, dg = torch.autograd.grad(y, [base, g], self.dys[index].double())
            outputs.append((y + self.biases[index].double() if self.biases else y).detach())
            dygs.append(dyg)
            dms.append(dg / self.norms[index].double())
        return outputs, dygs + dms


def close(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[one.dtype]
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_each_projection_alone(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    for biased in (False, True):
        operands = Operands(dtype, widths, biased)
        close(lora_compose_group(*operands.forward()), operands.expected()[0])
    results = operands.expected()[1]
    for magnitude in (torch.float32, torch.bfloat16):
        for backward in (compose_backward_group, compose_backward_group_):
            found = backward(*operands.backward(magnitude))
            assert [t.dtype for t in found] == [dtype] * len(widths) + [magnitude] * len(widths)
            close(found, results)


def test_no_tokens_give_no_rows_and_sums_of_zero() -> None:
    operands = Operands(torch.float32, (48, 16, 24))
    operands.h = operands.h[:0]
    operands.dys, operands.bases = [t[:0] for t in operands.dys], [t[:0] for t in operands.bases]
    assert [tuple(y.shape) for y in lora_compose_group(*operands.forward())] == [(0, 48), (0, 16), (0, 24)]
    *_, dm = compose_backward_group(*operands.backward(torch.float32))
    assert tuple(dm.shape) == (24,)
    assert not dm.any()


class Reference:
    """Replaces a GPU's kernel: runs the reference into the given outputs."""

    def __init__(self, *key: Any) -> None:
        self.spec = kernels.spec_for(*key[:-1])

    def launch(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float) -> None:
        results = kernels.run_reference_on(self.spec, inputs, scaling)
        for out, result in zip(outputs, results.values(), strict=True):
            assert out.dtype is result.dtype
            out.copy_(result)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_only_the_underscored_operator_overwrites_and_autograd_sees_it(
    widths: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_for", Reference)
    operands = Operands(torch.float32, widths, biased)
    outputs, gradients = operands.expected()
    kept = [base.clone() for base in operands.bases]
    close(lora_compose_group(*operands.forward()), outputs)
    close(compose_backward_group(*operands.backward(torch.float32)), gradients)
    assert all(map(torch.equal, operands.bases, kept))
    operands.bases = [base.clone() for base in kept]
    versions = [base._version for base in operands.bases]
    found = compose_backward_group_(*operands.backward(torch.float32))
    assert [t.data_ptr() for t in found[: len(widths)]] == [base.data_ptr() for base in operands.bases]
    assert all(base._version > version for base, version in zip(operands.bases, versions, strict=True))
    close(found, gradients)


def test_a_compiler_gets_one_graph_whose_operators_overwrite_nothing() -> None:
    operands = Operands(torch.float32, (48, 16, 24), biased=True)
    outputs, gradients = operands.expected()
    kept = [base.clone() for base in operands.bases]

    def both() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return lora_compose_group(*operands.forward()), compose_backward_group_(*operands.backward(torch.float32))

    found, results = torch.compile(both, backend="aot_eager", fullgraph=True)()
    assert all(map(torch.equal, operands.bases, kept))
    close(found, outputs)
    close(results, gradients)
