"""Inputs of kernels for quantised weights hold the values that were asked for, as near as the format's codes come."""

from __future__ import annotations

import pytest
import torch

from doratune.codegen.weight_formats import WeightFormat
from doratune.runtime.dequantise import dequantise
from doratune.tuner.quantise import quantise

FAR = {"nf4": 0.2, "fp4": 0.3, "hqq4": 0.2, "ao8": 0.03, "hqq8": 0.03, "int8": 0.02, "fp8": 0.06}
"""How far, relative to all values, those of a kind may be from what was asked for."""


@pytest.mark.parametrize(
    "text",
    [
        "nf4",
        "nf4.256.nested",
        "fp4.128",
        "int8",
        "ao8",
        "ao8.tensor",
        "ao8.block.zeros",
        "hqq8",
        "hqq4.strided",
        "hqq4",
        "fp8",
        "fp8.tile.exact",
    ],
)
def test_packed_values_are_near_the_plain_ones(text: str) -> None:
    form = WeightFormat.parse(text)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    tensors = quantise(form, weight)
    assert [(name, t.numel()) for name, t in tensors.items()] == [
        (stored.name, stored.elements) for stored in form.operands(64, 96)
    ]
    found = dequantise(form, tensors, 64, 96)
    assert (found - weight).norm() / weight.norm() < FAR[form.kind]
    if form.of.codes != "unsigned":  # zero lies between two codes there
        assert (found[3] == 0.0).all(), "a row of zeros stays one"
