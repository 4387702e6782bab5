"""Projections of one x as one function, and a gated activation of two: values and gradients against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from doratune.codegen.ops import APART_COLUMNS, APART_TOKENS, EPS, IN_PLACE_RANK
from doratune.codegen.spec import KernelSpec
from doratune.nn import group_plan, kernels
from doratune.nn.differentiation import DifferentiationError
from doratune.nn.group import project as project_plan
from doratune.nn.group import project_gated as project_gated_plan
from doratune.nn.group_plan import ACTIVATIONS, Plan, Projection, are_alike
from doratune.nn.norm_cache import NormCache
from doratune.runtime.absent import ABSENT, AbsentKernel
from doratune.runtime.kernel import Kernel

from .layers import CASES, kernels_on_paper, make_layer

__all__ = ["kernels_on_paper"]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
WIDTHS = (48, 24, 17)


def make_group(
    case: str, widths: tuple[int, ...], *, bias: bool = False, dtype: torch.dtype = torch.float64, rank: int = 6
) -> tuple[torch.Tensor, list[Projection]]:
    """x [3, 11, 40] and projections of it, of which all but W and b are trained."""
    made = [make_layer(case, d_out=width, rank=rank, dtype=dtype, seed=seed) for seed, width in enumerate(widths)]
    projections = [
        Projection(
            layer.weight,
            layer.lora_A,
            layer.lora_B,
            layer.magnitude,
            layer.bias.detach() if bias else None,
            layer.scaling,
            NormCache(),
        )
        for layer in made
    ]
    return made[0].x, projections


def project(x: torch.Tensor, projections: list[Projection], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    assert are_alike(projections)
    return project_plan(x, Plan(projections), dtype)


def project_gated(
    x: torch.Tensor, gate: Projection, up: Projection, activation: str, dtype: torch.dtype
) -> torch.Tensor:
    return project_gated_plan(x, Plan((gate, up), activation), dtype)


def plain(x: torch.Tensor, own: Projection) -> torch.Tensor:
    """The formula of DoRA in autograd's own operations."""
    dense = own.weight + own.scaling * own.lora_B @ own.lora_A
    g = own.magnitude / dense.detach().norm(dim=1).clamp_min(EPS)
    y = g * functional.linear(x, dense)
    return y if own.bias is None else y + own.bias


def leaves(x: torch.Tensor, projections: list[Projection]) -> list[torch.Tensor]:
    return [x, *[tensor for one in projections for tensor in one[1:4] if isinstance(tensor, torch.Tensor)]]


def assert_close(got: torch.Tensor | None, wanted: torch.Tensor | None, bound: float = 1e-9) -> None:
    if wanted is None or got is None:
        assert got is wanted
        return
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert torch.isfinite(got).all()
    assert float((got - wanted).norm()) <= bound * (float(wanted.norm()) + 1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_group_equals_its_projections(case: str, count: int, bias: bool) -> None:
    x, projections = make_group(case, WIDTHS[:count], bias=bias)
    outputs = project(x, projections, torch.float64)
    wanted = [plain(x, one) for one in projections]
    dys = [torch.randn_like(y) for y in wanted]
    got = torch.autograd.grad(outputs, leaves(x, projections), dys)
    exact = torch.autograd.grad(wanted, leaves(x, projections), dys)
    for one, other in zip((*outputs, *got), (*wanted, *exact), strict=True):
        assert_close(one.detach(), other.detach())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_pair_equals_its_formula(case: str, activation: str, bias: bool) -> None:
    x, (gate, up) = make_group(case, (48, 48), bias=bias)
    if case == "large_activations":
        x = (x.detach() / x.detach().abs().max()).requires_grad_()  # beyond a few thousand, gradients of both overflow
    y = project_gated(x, gate, up, activation, torch.float64)
    wanted = FUNCTIONS[activation](plain(x, gate)) * plain(x, up)
    dy = torch.randn_like(wanted)
    got = torch.autograd.grad(y, leaves(x, [gate, up]), dy)
    exact = torch.autograd.grad(wanted, leaves(x, [gate, up]), dy)
    for one, other in zip((y, *got), (wanted, *exact), strict=True):
        assert_close(one.detach(), other.detach())


@pytest.mark.parametrize("keep", [False, True])
def test_kernels_that_write_over_memory_give_the_same(
    keep: bool, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    x, projections = make_group("random", (48, 48), dtype=torch.float32)
    y = project_gated(x, *projections, "gelu_tanh", torch.float32)
    outputs = project(x, projections, torch.float32)
    wanted = [FUNCTIONS["gelu_tanh"](plain(x, projections[0])) * plain(x, projections[1])]
    wanted += [plain(x, one) for one in projections]
    dys = [torch.randn_like(one) for one in wanted]
    exact = torch.autograd.grad(wanted, leaves(x, projections), dys)
    for _ in range(1 + keep):
        got = torch.autograd.grad((y, *outputs), leaves(x, projections), dys, retain_graph=keep)
        for one, other in zip((y, *outputs, *got), (*wanted, *exact), strict=True):
            assert_close(one.detach(), other.detach(), 2e-5)
    with torch.no_grad():
        for one, other in zip(
            (project_gated(x, *projections, "gelu_tanh", torch.float32), *project(x, projections, torch.float32)),
            wanted,
            strict=True,
        ):
            assert_close(one, other.detach(), 2e-5)
    counts = kernels_on_paper()
    assert counts["compose_swiglu"] == 2
    assert counts["compose_swiglu_backward"] == 1 + keep
    assert counts["lora_compose_group"] == 2
    assert counts["compose_backward_group"] == 1 + keep


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_base_product_that_is_overwritten_counts_as_written_to(
    keep: bool, activation: str | None, kernels_on_paper: object
) -> None:
    """Hooks on what is saved may hold it."""
    x, projections = make_group("random", (48, 48), dtype=torch.float32)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: held.append(saved) or saved, lambda saved: saved):
        if activation is None:
            outputs = project(x, projections, torch.float32)
        else:
            outputs = (project_gated(x, *projections, activation, torch.float32),)
    before = [saved._version for saved in held]
    torch.autograd.backward(outputs, [*map(torch.randn_like, outputs)], retain_graph=keep)
    written = [saved.shape for saved, version in zip(held, before, strict=True) if saved._version != version]
    assert written == ([] if keep else [(33, 48), (33, 48)])


@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2)])
def test_outputs_that_nobody_uses_get_no_gradient(unused: tuple[int, ...]) -> None:
    x, projections = make_group("random", WIDTHS)
    outputs = project(x, projections, torch.float64)
    wanted = [plain(x, one) for one in projections]
    used = [index for index in range(3) if index not in unused]
    sum(outputs[index].square().sum() for index in used).backward()
    got = [leaf.grad for leaf in leaves(x, projections)]
    for leaf in leaves(x, projections):
        leaf.grad = None
    sum(wanted[index].square().sum() for index in used).backward()
    for one, leaf in zip(got, leaves(x, projections), strict=True):
        assert_close(one, leaf.grad)


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    x, (gate, up) = make_group("random", (48, 48))
    y = project_gated(x, gate, up, "silu", torch.float64)
    (z,) = project(x, [gate], torch.float64)
    dy = torch.randn_like(y)
    first = torch.autograd.grad((y, z), leaves(x, [gate, up]), (dy, dy), retain_graph=True)
    again = torch.autograd.grad((y, z), leaves(x, [gate, up]), (dy, dy))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_gradients_cannot_be_differentiated_again() -> None:
    x, (gate, up) = make_group("random", (48, 48))
    for y in (project_gated(x, gate, up, "silu", torch.float64), project(x, [gate], torch.float64)[0]):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(DifferentiationError, match="cannot be differentiated again"):
            dx.sum().backward()


@pytest.mark.parametrize("name", ["weight", "lora_B"])
def test_a_parameter_written_before_the_backward_pass_is_an_error(name: str) -> None:
    x, projections = make_group("random", (48, 48))
    written = torch.nn.Parameter(getattr(projections[1], name).detach().clone(), requires_grad=name != "weight")
    projections[1] = projections[1]._replace(**{name: written})
    y = project_gated(x, *projections, "silu", torch.float64)
    outputs = project(x, projections, torch.float64)
    with torch.no_grad():
        written.mul_(2.0)
    for output in (y, outputs[1]):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("gated", [False, True])
def test_a_of_several_parameters_is_put_together_again_and_not_saved(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, given = make_group("random", (48, 48))
    projections = [one._replace(lora_A=torch.nn.Parameter(one.lora_A.detach().clone())) for one in given]

    def run(projections: list[Projection]) -> torch.Tensor:
        if gated:
            return project_gated(x, *projections, "silu", torch.float64)
        return torch.stack(project(x, projections, torch.float64))

    packed = 2 * projections[0].lora_A.numel()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        run(given)
        assert packed in saved
        saved.clear()
        run(projections)
        assert packed in saved, "a small one costs less to hold than a launch"
        saved.clear()
        monkeypatch.setattr(group_plan, "WORTH_A_LAUNCH", 0)
        run(projections)
        assert packed not in saved
    y, wanted = run(projections), run(given)
    dy = torch.randn_like(y)
    others = [x, *[each for one in given for each in (one.lora_B, one.magnitude)]]
    found = torch.autograd.grad(y, others, dy)
    for one, other in zip(found, torch.autograd.grad(wanted, others, dy), strict=True):
        assert torch.equal(one, other)
    y = run(projections)
    with torch.no_grad():
        projections[0].lora_A.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("gated", [False, True])
def test_a_recompute_reads_a_parameter_as_it_is_then(gated: bool) -> None:
    """The graph is that of the recompute, as it is for a checkpoint around PyTorch's own operations."""
    x, projections = make_group("random", (48, 48))
    written = torch.nn.Parameter(projections[1].lora_B.detach().clone())
    projections[1] = projections[1]._replace(lora_B=written)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x * 1.0
        if gated:
            return (project_gated(x, *projections, "silu", torch.float64),)
        return project(x, projections, torch.float64)

    outputs = checkpoint(run, x, use_reentrant=False)
    dys = [*map(torch.randn_like, outputs)]
    with torch.no_grad():
        written.mul_(2.0)
    got = torch.autograd.grad(outputs, leaves(x, projections), dys)
    wanted = torch.autograd.grad(run(x), leaves(x, projections), dys)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)


def test_outputs_may_be_overwritten() -> None:
    """Fused activations and rotary embeddings do so: the backward pass must not depend on it."""
    x, projections = make_group("random", WIDTHS)
    wanted = torch.autograd.grad([y.sum() for y in project(x, projections, torch.float64)], leaves(x, projections))
    outputs = project(x, projections, torch.float64)
    sums = [y.sum() for y in outputs]
    for y in outputs:
        y.data.fill_(float("nan"))
    for one, other in zip(torch.autograd.grad(sums, leaves(x, projections)), wanted, strict=True):
        assert torch.equal(one, other)
    doubled = [y.mul_(2.0).sum() for y in project(x, projections, torch.float64)]  # in place, seen by autograd
    for one, other in zip(torch.autograd.grad(doubled, leaves(x, projections)), wanted, strict=True):
        assert_close(one, 2.0 * other)


@pytest.mark.parametrize("frozen", [("x",), ("lora_A",), ("lora_B",), ("magnitude",), ("lora_A", "lora_B")])
def test_frozen_tensors_get_no_gradient(frozen: tuple[str, ...]) -> None:
    x, projections = make_group("random", (48, 48))
    if "x" in frozen:
        x = x.detach()
    held = {name: False for name in frozen if name != "x"}
    projections = [
        one._replace(**{name: getattr(one, name).detach().requires_grad_(False) for name in held})
        for one in projections
    ]
    y = project_gated(x, *projections, "gelu", torch.float64) + project(x, projections, torch.float64)[0]
    wanted = functional.gelu(plain(x, projections[0])) * plain(x, projections[1]) + plain(x, projections[0])
    trained = [leaf for leaf in leaves(x, projections) if leaf.requires_grad]
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(wanted, trained, dy), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("on_paper", [True, False], ids=["kernels", "reference"])
def test_a_plan_serves_whatever_is_trained_in_a_call(on_paper: bool, request: pytest.FixtureRequest) -> None:
    if on_paper:
        request.getfixturevalue("kernels_on_paper")
    x, projections = make_group("random", (48, 48), dtype=torch.float32)
    plan, gated = Plan(projections), Plan(projections, "silu")
    tensors = leaves(x, projections)
    for frozen in ((0, 1, 3, 4, 6), (), (0,), (3, 6), (1, 4), (2, 5), (0, 1, 2, 4, 5), (4,), (1, 2, 3), ()):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index not in frozen)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        outputs = (*project_plan(x, plan, torch.float32), project_gated_plan(x, gated, torch.float32))
        wanted = [plain(x, one) for one in projections]
        wanted.append(functional.silu(wanted[0]) * wanted[1])
        used = [index for index, y in enumerate(wanted) if y.requires_grad]
        dys = [torch.randn_like(wanted[index]) for index in used]
        got = torch.autograd.grad([outputs[index] for index in used], trained, dys)
        exact = torch.autograd.grad([wanted[index] for index in used], trained, dys)
        for one, other in zip(got, exact, strict=True):
            assert_close(one, other, 2e-5)


def test_no_tokens_and_no_gradients() -> None:
    x, projections = make_group("random", (48, 48))
    empty = torch.empty(0, 40, dtype=torch.float64)
    with torch.no_grad():
        assert project_gated(empty, *projections, "silu", torch.float64).shape == (0, 48)
        y = project_gated(x, *projections, "silu", torch.float64)
        assert not y.requires_grad
        assert_close(y, functional.silu(plain(x, projections[0])) * plain(x, projections[1]))
        for z, one in zip(project(x, projections, torch.float64), projections, strict=True):
            assert_close(z, plain(x, one))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two dimensions": lambda x: x.reshape(-1, x.shape[-1]),
    "three dimensions": lambda x: x,
    "four dimensions": lambda x: x[None],
    "one token": lambda x: x[:1, :1],
    "every second token": lambda x: x[:, ::2],
    "columns": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_paper", [True, False], ids=["kernels", "reference"])
def test_outputs_have_the_leading_dimensions_of_x_in_any_layout(
    layout: str, on_paper: bool, request: pytest.FixtureRequest
) -> None:
    """Without gradients products keep x's dimensions; the outputs may be written to, with gradients on, too."""
    if on_paper:
        request.getfixturevalue("kernels_on_paper")
    x, projections = make_group("random", (48, 48, 24), dtype=torch.float32, bias=True)
    x = LAYOUTS[layout](x.detach())
    wanted = [functional.silu(plain(x, projections[0])) * plain(x, projections[1])]
    wanted += [plain(x, one) for one in projections] + [plain(x, projections[2])]
    with torch.no_grad():
        outputs = [project_gated(x, *projections[:2], "silu", torch.float32), *project(x, projections, torch.float32)]
        outputs += project(x, projections[2:], torch.float32)
    for y, exact in zip(outputs, wanted, strict=True):
        assert_close(y, exact.detach(), 2e-5)
        assert y.is_contiguous()
        y.mul_(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_parameters(adapter: torch.dtype) -> None:
    x, projections = make_group("random", (48, 48), dtype=torch.bfloat16)
    projections = [
        one._replace(
            lora_A=one.lora_A.detach().to(adapter).requires_grad_(),
            lora_B=one.lora_B.detach().to(adapter).requires_grad_(),
            magnitude=one.magnitude.detach().float().requires_grad_(),
        )
        for one in projections
    ]
    wide = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = project_gated(wide, *projections, "silu", torch.bfloat16)
        z = project(wide, projections, torch.bfloat16)[1]
    assert y.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + z.float().sum()).backward()
    for leaf in leaves(wide, projections):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
    exact = [one._replace(**{n: getattr(one, n).detach().double() for n in one._fields[:4]}) for one in projections]
    wanted = functional.silu(plain(x.detach().double(), exact[0])) * plain(x.detach().double(), exact[1])
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) <= 0.01


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_projections_that_are_composed_apart_give_the_same(
    count: int, bias: bool, keep: bool, kernels_on_paper: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels, each of which takes its own columns of h; also where some outputs have no gradient."""
    monkeypatch.setattr(group_plan, "composes_apart", lambda *_: True)
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: kernel is not None)
    x, projections = make_group("random", WIDTHS[:count], bias=bias, dtype=torch.float32, rank=8)
    outputs, wanted = project(x, projections, torch.float32), [plain(x, one) for one in projections]
    dys = [torch.randn_like(one) for one in wanted]
    exact = torch.autograd.grad(wanted, leaves(x, projections), dys, retain_graph=True)
    for _ in range(1 + keep):
        got = torch.autograd.grad(outputs, leaves(x, projections), dys, retain_graph=keep)
        for one, other in zip((*outputs, *got), (*wanted, *exact), strict=True):
            assert_close(one.detach(), other.detach(), 2e-5)
    with torch.no_grad():
        for one, other in zip(project(x, projections, torch.float32), wanted, strict=True):
            assert_close(one, other.detach(), 2e-5)
    counts = kernels_on_paper()
    assert counts["lora_compose"] == 2 * count
    assert counts["compose_backward"] == counts["adapter_backward"] == (1 + keep) * count
    assert counts.get("lora_compose_group", 0) == counts.get("compose_backward_group", 0) == 0

    outputs = project(x, projections, torch.float32)
    got = torch.autograd.grad(outputs[1:], leaves(x, projections), dys[1:], allow_unused=True)
    exact = torch.autograd.grad(wanted[1:], leaves(x, projections), dys[1:], allow_unused=True)
    for one, other in zip(got, exact, strict=True):
        assert_close(one, other, 2e-5)


def test_projections_are_composed_apart_where_each_is_a_good_part_of_the_gpu(
    kernels_on_paper: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 with many ranks and tokens, on a GPU whose composition has specialised warps."""
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: kernel is not None)

    def apart(
        tokens: int, rank: int = IN_PLACE_RANK + 8, dtype: torch.dtype = torch.bfloat16, width: int = 2048
    ) -> bool:
        one = Projection(*map(torch.empty, ((width, 8), (rank, 8), (width, rank), width)), None, 1.0, NormCache())
        plan = Plan([one, one._replace(weight=torch.empty(256, 8))])
        return bool(plan.at(torch.empty(tokens, 8, dtype=dtype), trains=False).apart)

    many = APART_TOKENS + 1
    assert apart(many)
    assert not apart(APART_TOKENS)
    assert not apart(many, IN_PLACE_RANK)
    assert not apart(many, IN_PLACE_RANK + 9), "columns of h would begin between 16 bytes"
    assert not apart(many, dtype=torch.float16)
    assert not apart(many, width=APART_COLUMNS - 8)
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: False)
    assert not apart(many)


def test_a_gpu_of_hopper_specialises_warps() -> None:
    """Other GPUs, the CPU and no kernel do not; of absent GPUs one does."""

    def specialises(gpu: str, device: torch.device) -> bool:
        spec = KernelSpec.create("compose_backward", d_out=8, tokens=1, dtype="bf16", gpu=gpu)
        kind = AbsentKernel if device in ABSENT else Kernel
        return kernels.specialises_warps(kind(spec, device))

    first = torch.device("cuda", 0)
    gpus = ("h100-sxm", "h200", "sm_90", "a100", "b200")
    assert [gpu for gpu in gpus if specialises(gpu, first)] == ["h100-sxm", "h200", "sm_90"]
    assert not specialises("cpu", torch.device("cpu"))
    assert [specialises("h200", device) for device in ABSENT] == [False, True]
    assert not kernels.specialises_warps(None)
