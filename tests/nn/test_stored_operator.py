"""The operator for the norms of stored weights computes what each layer would, and compilers accept it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from doratune.nn.stored_operator import stored_norms_and_gains

from .test_stored_norm_pass import D_IN, D_OUT, StoredLayer, layer, wanted


def arguments(layers: list[StoredLayer], rounded: torch.dtype | None = None) -> tuple[Any, ...]:
    tensors = [tensor for each in layers for tensor in each.weight.tensors]
    formats = " ".join(str(each.weight.form) for each in layers)
    parts = [[each[field] for each in layers] for field in range(1, 5)]
    return (tensors, formats, [D_OUT, D_IN] * len(layers), *parts, rounded)


MIXED = ("nf4.fp32", "nf4.fp32", "int8.fp32", "hqq4.fp32", "nf4.nested.fp32", "nf4.fp32")


@pytest.mark.parametrize("rounded", [None, torch.bfloat16])
def test_each_layer_gets_its_norm_and_gain(rounded: torch.dtype | None) -> None:
    forms = MIXED if rounded is None else [form.removesuffix(".fp32") for form in MIXED]
    layers = [layer(form, seed, scaling=0.5 - 0.25 * (seed == 5)) for seed, form in enumerate(forms)]
    values = stored_norms_and_gains(*arguments(layers, rounded)).view(2, len(layers), D_OUT)
    for each, norm, g in zip(layers, *values, strict=True):
        for value, exact in zip((norm, g), wanted(each, rounded), strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)


def test_codes_may_have_any_shape_and_dtype() -> None:
    one = layer()
    codes, scales = one.weight.tensors
    values = stored_norms_and_gains([codes.view(torch.bfloat16).view(-1, 1), scales.view(2, -1)], *arguments([one])[1:])
    for value, exact in zip(values, wanted(one), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)


def test_another_w_than_the_format_says_is_refused() -> None:
    one = layer()
    tensors, *rest = arguments([one])
    with pytest.raises(RuntimeError, match=r"scales must be 16 elements of torch\.float32, got 8"):
        stored_norms_and_gains([tensors[0], tensors[1][:8]], *rest)
    with pytest.raises(RuntimeError, match=r"scales must be 16 elements of torch\.float32, got 16 of torch\.float16"):
        stored_norms_and_gains([tensors[0], tensors[1].half()], *rest)


def test_it_is_an_operator_that_compilers_accept() -> None:
    given = arguments([layer(form, seed) for seed, form in enumerate(MIXED[2:])])
    torch.library.opcheck(torch.ops.doratune.stored_norms_and_gains.default, given)
