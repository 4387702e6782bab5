"""On a real GPU an MLP as one function is as right in bf16 as its two functions, and keeps less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from doratune.nn.group import project, project_gated, project_mlp
from doratune.nn.group_plan import Plan, Projection
from doratune.nn.norm_cache import NormCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

T, D, D_FF, RANK = 512, 1024, 4096, 16
DEVICE = "cuda"


def projection(d_out: int, d_in: int, adapter: torch.dtype) -> Projection:
    weight = torch.randn(d_out, d_in, device=DEVICE) * d_in**-0.5
    a, b = torch.randn(RANK, d_in, device=DEVICE) * d_in**-0.5, torch.randn(d_out, RANK, device=DEVICE) * 0.2
    magnitude = (weight + 2.0 * b @ a).norm(dim=1) * (0.9 + 0.2 * torch.rand(d_out, device=DEVICE))
    parts = [nn.Parameter(part.to(adapter)) for part in (a, b, magnitude)]
    frozen = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return Projection(frozen, *parts, None, 2.0, NormCache())


def make(adapter: torch.dtype) -> tuple[torch.Tensor, Plan, Plan]:
    torch.manual_seed(0)
    gate, up, down = (projection(*shape, adapter) for shape in ((D_FF, D), (D_FF, D), (D, D_FF)))
    x = torch.randn(2, T // 2, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    return x, Plan((gate, up), "silu"), Plan((down,))


def one(x: torch.Tensor, gated: Plan, down: Plan) -> torch.Tensor:
    return project_mlp(x, gated, down, torch.bfloat16)


def two(x: torch.Tensor, gated: Plan, down: Plan) -> torch.Tensor:
    return project(project_gated(x, gated, torch.bfloat16), down, torch.bfloat16)[0]


def exact(x: torch.Tensor, gated: Plan, down: Plan) -> list[torch.Tensor]:
    """The output and the gradients of its sum, in fp64, of x, and of A, B and m rounded as products round A and B."""
    leaves = [x.detach().double().requires_grad_()]
    ys = []
    for each in (*gated.projections, *down.projections):
        a, b = (part.detach().bfloat16().double().requires_grad_() for part in (each.lora_A, each.lora_B))
        m = each.magnitude.detach().double().requires_grad_()
        leaves += [a, b, m]
        given = leaves[0] if len(ys) < 2 else nn.functional.silu(ys[0]) * ys[1]
        dense = each.weight.double() + each.scaling * b @ a
        ys.append(nn.functional.linear(given, dense) * (m / dense.detach().norm(dim=1)))
    return [ys[-1].detach(), *torch.autograd.grad(ys[-1].sum(), leaves)]


def results(run: Callable[..., torch.Tensor], x: torch.Tensor, gated: Plan, down: Plan) -> list[torch.Tensor]:
    y = run(x, gated, down)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *gated.trained, *down.trained])]


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_one_function_is_as_right_as_two(adapter: torch.dtype) -> None:
    given = make(adapter)
    with torch.autocast(DEVICE, torch.bfloat16):
        single, separate = results(one, *given), results(two, *given)
        with torch.no_grad():
            assert torch.equal(one(*given), two(*given))
    for mine, other, wanted in zip(single, separate, exact(*given), strict=True):
        errors = [float((each.double() - wanted).norm() / wanted.norm()) for each in (mine, other)]
        assert errors[0] <= 1.01 * errors[1] + 1e-6
        assert errors[0] <= 0.03


def test_the_activation_is_not_kept_and_the_peak_is_no_higher() -> None:
    kept, peaks = [], []
    for run in (one, two, one, two):  # the first two compile
        given = make(torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = run(*given)
        kept.append(torch.cuda.memory_allocated() - before)
        y.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del y, given
    activation = 2 * T * D_FF
    assert kept[3] - kept[2] == pytest.approx(activation, rel=0.05)
    assert peaks[2] <= peaks[3] + 0.05 * activation
