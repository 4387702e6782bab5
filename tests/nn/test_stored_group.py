"""Quantised projections of one x as one function over their base products, which are given or its own: values and
gradients against plain autograd, by the eager reference and by kernels; what it saves, frees and refuses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from doratune.codegen.ops import EPS
from doratune.codegen.weight_formats import WeightFormat
from doratune.nn.differentiation import DifferentiationError
from doratune.nn.norm_cache import NormCache
from doratune.nn.norm_layer import StoredLayer
from doratune.nn.stored_group import compose_stored
from doratune.nn.stored_norm import StoredMatrix
from doratune.nn.stored_plan import StoredPlan, StoredProjection, are_alike

from .layers import CASES, kernels_on_paper, make_layer

__all__ = ["kernels_on_paper"]

WIDTHS = (48, 24, 17)
D_IN, RANK = 40, 6


class Decoded:
    """A source of products by W [d_out, d_in]; each W that it has decoded must be gone before another one is."""

    alive: weakref.ref[torch.Tensor] | None = None
    multiplies_from = None
    keeps_dtype = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias, self.dtype = weight, bias, weight.dtype

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype is self.dtype

    def product(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 2
        assert not torch.is_grad_enabled()
        return functional.linear(x, self.weight, self.bias)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        assert dtype is self.dtype
        assert Decoded.alive is None or Decoded.alive() is None, "the W before is still in memory"
        matrix = self.weight.clone()
        Decoded.alive = weakref.ref(matrix)
        return matrix


def made(
    case: str = "random",
    widths: Sequence[int] = WIDTHS,
    *,
    bias: bool = False,
    sources: bool = True,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
) -> tuple[torch.Tensor, list[StoredProjection]]:
    """x [3, 11, 40] and projections of it, of which A, B and m are trained."""
    projections = []
    for seed, width in enumerate(widths):
        layer = make_layer(case, d_out=width, d_in=D_IN, rank=RANK, dtype=dtype, adapter=adapter, seed=seed)
        a, b, m = (nn.Parameter(tensor.detach()) for tensor in (layer.lora_A, layer.lora_B, layer.magnitude))
        codes = layer.weight.detach().view(torch.uint8).view(-1)  # any tensors: only their versions are looked at
        # Of values that no product here takes, so that the source decodes W.
        matrix = StoredMatrix(WeightFormat("hqq8", dtype="fp16"), (codes,), width, D_IN)
        stored = StoredLayer(matrix, a, b, m, layer.scaling, NormCache())
        held = layer.bias.detach() if bias else None
        weight = layer.weight.detach()

        def ask(own: StoredLayer = stored, weight: torch.Tensor = weight) -> torch.Tensor:
            return (weight.double() + own.scaling * own.lora_B.double() @ own.lora_A.double()).norm(dim=1).float()

        source = Decoded(weight, held) if sources else None
        base = lambda x, weight=weight, bias=held: functional.linear(x, weight, bias)  # noqa: E731
        projections.append(StoredProjection(stored, stored.tensors, held, source, base, ask))
        if seed == 0:
            x = layer.x.detach().requires_grad_()
    return x, projections


def run(x: torch.Tensor, projections: Sequence[StoredProjection]) -> Sequence[torch.Tensor]:
    assert all(one.fits for one in projections)
    assert are_alike(projections)
    plan = StoredPlan(projections)
    bases = [] if plan.sources else [one.base(x) for one in projections]
    return compose_stored(x, plan, bases)


def plain(x: torch.Tensor, own: StoredProjection) -> torch.Tensor:
    """The formula of DoRA in autograd's own operations, in fp64."""
    layer = own.layer
    bias = None if own.bias is None else own.bias.double()
    weight = own.base(torch.eye(D_IN, dtype=x.dtype)).detach().T.double()
    weight = weight if bias is None else own.base.__defaults__[0].double()  # type: ignore[attr-defined]
    dense = weight + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    g = layer.magnitude.double() / dense.detach().norm(dim=1).clamp_min(EPS)
    y = g * functional.linear(x.double(), dense)
    return y if bias is None else y + bias


def leaves(x: torch.Tensor, projections: Sequence[StoredProjection]) -> list[torch.Tensor]:
    return [x, *[tensor for one in projections for tensor in one.layer[1:4]]]


def assert_close(got: torch.Tensor | None, wanted: torch.Tensor | None, bound: float = 3e-5) -> None:
    if wanted is None or got is None:
        assert got is wanted
        return
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    assert float((got.double() - wanted.double()).norm()) <= bound * (float(wanted.double().norm()) + 1e-12)


def check(x: torch.Tensor, projections: Sequence[StoredProjection], bound: float = 3e-5, keep: bool = False) -> None:
    outputs, wanted = run(x, projections), [plain(x, one) for one in projections]
    dys = [torch.randn(y.shape, dtype=torch.float64) for y in wanted]
    exact = torch.autograd.grad(wanted, leaves(x, projections), dys)
    for again in range(1 + keep):
        rounded = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
        got = torch.autograd.grad(outputs, leaves(x, projections), rounded, retain_graph=keep and not again)
        for one, other, leaf in zip(got, exact, leaves(x, projections), strict=True):
            assert one.dtype is leaf.dtype
            assert_close(one, other, bound)
    with torch.no_grad():
        for y, one, other in zip(outputs, run(x, projections), wanted, strict=True):
            assert y.dtype is x.dtype
            assert_close(y.detach(), other.detach(), bound)
            assert_close(one, other.detach(), bound)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sources", [False, True])
def test_a_group_equals_its_projections(case: str, count: int, bias: bool, sources: bool) -> None:
    check(*made(case, WIDTHS[:count], bias=bias, sources=sources))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sources", [False, True])
def test_kernels_that_write_over_memory_give_the_same(
    keep: bool, count: int, bias: bool, sources: bool, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    check(*made(widths=WIDTHS[:count], bias=bias, sources=sources), keep=keep)
    launches = kernels_on_paper()
    if count == 1:
        assert launches == {"lora_compose": 2, "compose_backward": 1 + keep, "adapter_backward": 1 + keep}
    else:
        assert launches == {"lora_compose_group": 2, "compose_backward_group": 1 + keep}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sources", [False, True])
def test_wide_adapters_are_rounded_to_the_products_dtype(
    count: int, sources: bool, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    widths = WIDTHS[:count]
    check(*made(widths=widths, sources=sources, dtype=torch.bfloat16, adapter=torch.float32), bound=0.02)
    check(*made(widths=widths, sources=sources, dtype=torch.bfloat16), bound=0.02)


def test_the_gradient_of_x_is_summed_before_it_is_rounded() -> None:
    """In 16 bits the sum of rounded products, as two nodes of autograd make it, is farther off."""
    x, projections = made(widths=(48, 48, 48), dtype=torch.bfloat16)
    given = [one._replace(source=None) for one in projections]
    dys = [torch.randn(3, 11, 48).bfloat16() for _ in projections]
    (exact,) = torch.autograd.grad([plain(x, one) for one in projections], x, [dy.double() for dy in dys])
    own, summed = (
        float((torch.autograd.grad(run(x, each), x, dys)[0].double() - exact).norm()) for each in (projections, given)
    )
    assert own < summed


@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("sources", [False, True])
def test_outputs_that_nobody_uses_get_no_gradient(unused: tuple[int, ...], sources: bool) -> None:
    x, projections = made(sources=sources)
    used = [index for index in range(3) if index not in unused]
    outputs, wanted = run(x, projections), [plain(x, one) for one in projections]
    total = sum((outputs[index].square().sum() for index in used), x.sum())
    exact = sum((wanted[index].square().sum() for index in used), x.double().sum())
    got = torch.autograd.grad(total, leaves(x, projections), allow_unused=True)
    for one, other in zip(got, torch.autograd.grad(exact, leaves(x, projections), allow_unused=True), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("frozen", [("x",), ("A",), ("B",), ("m",), ("A", "B"), ("x", "A"), ("A", "B", "m")])
@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_frozen_tensors_get_no_gradient(
    frozen: tuple[str, ...], sources: bool, count: int, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    x, projections = made(widths=WIDTHS[:count], sources=sources)
    x.requires_grad_("x" not in frozen)
    for one in projections:
        for name, tensor in zip("ABm", one.layer[1:4], strict=True):
            tensor.requires_grad_(name not in frozen)
    outputs, wanted = run(x, projections), [plain(x, one) for one in projections]
    trained = [leaf for leaf in leaves(x, projections) if leaf.requires_grad]
    dys = [torch.randn_like(y) for y in outputs]
    exact = torch.autograd.grad(wanted, trained, [dy.double() for dy in dys])
    for one, other in zip(torch.autograd.grad(outputs, trained, dys), exact, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["codes", "A", "B"])
def test_what_the_backward_pass_reads_must_not_be_written_before(name: str, count: int) -> None:
    x, projections = made(widths=WIDTHS[:count])
    outputs = run(x, projections)
    layer = projections[-1].layer
    written = {"codes": layer.weight.tensors[0], "A": layer.lora_A, "B": layer.lora_B}[name]
    with torch.no_grad():
        written.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[-1].sum().backward()


def test_a_recompute_counts_as_its_own_forward_pass() -> None:
    """An offloaded optimizer may write parameters between a checkpoint's forward pass and its recompute."""
    x, projections = made(widths=WIDTHS[:1])

    def composed(x: torch.Tensor) -> torch.Tensor:
        return run(x, projections)[0]

    y = checkpoint(composed, x, use_reentrant=False)
    with torch.no_grad():
        projections[0].layer.lora_B.mul_(2.0)
    got = torch.autograd.grad(y.sum(), leaves(x, projections))
    exact = torch.autograd.grad(plain(x, projections[0]).sum(), leaves(x, projections))
    for one, other in zip(got, exact, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("sources", [False, True])
def test_outputs_may_be_overwritten(sources: bool, kernels_on_paper: Callable[[], dict[str, int]]) -> None:
    """Fused activations and rotary embeddings do so: the backward pass must not depend on it."""
    x, projections = made(sources=sources)
    wanted = torch.autograd.grad([y.sum() for y in run(x, projections)], leaves(x, projections))
    outputs = run(x, projections)
    sums = [y.sum() for y in outputs]
    for y in outputs:
        y.data.fill_(float("nan"))
    for one, other in zip(torch.autograd.grad(sums, leaves(x, projections)), wanted, strict=True):
        assert torch.equal(one, other)
    doubled = [y.mul_(2.0).sum() for y in run(x, projections)]  # in place, seen by autograd
    for one, other in zip(torch.autograd.grad(doubled, leaves(x, projections)), wanted, strict=True):
        assert_close(one, 2.0 * other)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_cannot_be_differentiated_again(count: int) -> None:
    x, projections = made(widths=WIDTHS[:count])
    (dx,) = torch.autograd.grad(run(x, projections)[0].sum(), x, create_graph=True)
    with pytest.raises(DifferentiationError, match="cannot be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("count", [1, 3])
def test_a_pass_saves_x_and_one_more_tensor_of_the_outputs_size_for_each_projection(count: int) -> None:
    x, projections = made(widths=WIDTHS[:count])
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        run(x, projections)
    tokens = 33
    large = sorted(shape.numel() for shape in saved if shape.numel() >= tokens * min(WIDTHS))
    rank_wide = [tokens * count * RANK] if tokens * count * RANK >= tokens * min(WIDTHS) else []
    assert large == sorted([tokens * D_IN, *[tokens * width for width in WIDTHS[:count]], *rank_wide])


def test_projections_that_differ_do_not_run_together() -> None:
    _, (one, other) = made(widths=WIDTHS[:2])
    assert are_alike([one, other])
    layer = other.layer
    for changed in (
        other._replace(source=None),
        other._replace(bias=torch.zeros(24)),
        other._replace(layer=layer._replace(scaling=0.5)),
        other._replace(layer=layer._replace(lora_A=nn.Parameter(torch.zeros(RANK + 2, D_IN)))),
        other._replace(layer=layer._replace(lora_A=nn.Parameter(layer.lora_A.detach().bfloat16()))),
        other._replace(layer=layer._replace(magnitude=nn.Parameter(layer.magnitude.detach().bfloat16()))),
        other._replace(layer=layer._replace(weight=StoredMatrix(WeightFormat("nf4"), (), 24, D_IN))),
    ):
        assert not are_alike([one, changed])
    assert not are_alike([one] * 4)


def test_what_autograd_cannot_watch_does_not_fit() -> None:
    _, (one,) = made(widths=WIDTHS[:1])
    assert one.fits
    layer = one.layer
    for changed in (
        layer._replace(lora_A=layer.lora_A.detach()),
        layer._replace(magnitude=nn.Parameter(layer.magnitude.detach().double())),
        layer._replace(lora_B=nn.Parameter(layer.lora_B.detach().bfloat16())),
    ):
        assert not one._replace(layer=changed).fits
