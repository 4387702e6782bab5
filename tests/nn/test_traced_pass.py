"""The operator for all norms of a graph computes what each layer would, whatever the layers have in common."""

from __future__ import annotations

import pytest
import torch

from doratune.nn.functional import weight_norm
from doratune.nn.traced_pass import norms_and_gains

SHAPES = ((24, 16, 4), (24, 16, 4), (40, 16, 4), (24, 16, 2), (24, 16, 4))


def samples(dtype: torch.dtype, adapter: torch.dtype) -> tuple[list[torch.Tensor], ...]:
    torch.manual_seed(0)
    return (
        [torch.randn(d_out, d_in, dtype=dtype) for d_out, d_in, _ in SHAPES],
        [torch.randn(rank, d_in, dtype=adapter) for _, d_in, rank in SHAPES],
        [torch.randn(d_out, rank, dtype=adapter) for d_out, _, rank in SHAPES],
        [torch.randn(d_out, dtype=adapter) for d_out, _, _ in SHAPES],
    )


@pytest.mark.parametrize(
    ("dtype", "adapter", "rounded"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_each_layer_gets_its_norm_and_gain(dtype: torch.dtype, adapter: torch.dtype, rounded: torch.dtype) -> None:
    weights, downs, ups, magnitudes = samples(dtype, adapter)
    scalings = [0.5, -0.5, 2.0, 0.0, 0.5]
    norms, gains = norms_and_gains(weights, downs, ups, magnitudes, scalings, rounded)
    sizes = [weight.shape[0] for weight in weights]
    for index, (norm, g) in enumerate(zip(norms.split(sizes), gains.split(sizes), strict=True)):
        wanted = weight_norm(weights[index], downs[index].to(rounded), ups[index].to(rounded), scalings[index])
        torch.testing.assert_close(norm, wanted)
        torch.testing.assert_close(g, magnitudes[index].float() / wanted)


def test_it_is_an_operator_that_compilers_accept() -> None:
    tensors = samples(torch.float32, torch.float32)
    arguments = (*tensors, [0.5] * len(SHAPES), torch.float32)
    torch.library.opcheck(torch.ops.doratune.norms_and_gains.default, arguments)
