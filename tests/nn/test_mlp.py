"""down(act(gate(x))*up(x)) as one function: values and gradients against plain autograd, and its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from doratune.codegen.ops import IN_PLACE_RANK, IN_PLACE_TOKENS, adds_in_place
from doratune.nn import group_backward, group_plan, kernels, operators
from doratune.nn.differentiation import DifferentiationError
from doratune.nn.group import project, project_gated, project_mlp
from doratune.nn.group_plan import ACTIVATIONS, Plan, Projection, are_alike
from doratune.nn.norm_cache import NormCache

from .layers import CASES, kernels_on_paper, make_layer
from .test_group import FUNCTIONS, assert_close, leaves, plain

__all__ = ["kernels_on_paper"]

T, D_IN, D_FF, D_OUT = 33, 40, 48, 24


@pytest.fixture(params=[False, True], ids=["one kernel", "in place"], autouse=True)
def in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rank-r products are added to gate and up in memory, which otherwise depends on the rank."""
    wanted: bool = request.param
    monkeypatch.setattr(group_plan, "adds_in_place", lambda *_: wanted)
    return wanted


NAMES = ("gate", "up", "down")


def make_mlp(
    cases: dict[str, str] | None = None,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    adapter: torch.dtype | None = None,
    frozen: tuple[str, ...] = (),
) -> tuple[torch.Tensor, list[Projection]]:
    """x [3, 11, d_in], and gate, up and down with r = 6, 6 and 5, of which all but W and b and what is frozen is
    trained, such as ``down.lora_A``."""
    cases = {**dict.fromkeys(NAMES, "random"), **(cases or {})}
    for one, other in (("gate", "up"), ("up", "gate")):
        if cases[one].endswith("scaling"):
            cases[other] = cases[one]  # they have one s
    projections = []
    x = torch.empty(0)
    for seed, (name, case) in enumerate(cases.items()):
        d_out, d_in, rank = (D_OUT, D_FF, 5) if name == "down" else (D_FF, D_IN, 6)
        layer = make_layer(case, d_out=d_out, d_in=d_in, rank=rank, dtype=dtype, adapter=adapter, seed=seed)
        trained = [
            getattr(layer, part).detach().requires_grad_(f"{name}.{part}" not in frozen)
            for part in ("lora_A", "lora_B", "magnitude")
        ]
        own_bias = layer.bias.detach() if bias else None
        projections.append(Projection(layer.weight.detach(), *trained, own_bias, layer.scaling, NormCache()))
        x = x if seed else layer.x.detach()
    assert are_alike(projections[:2])
    if x.abs().max() > 100:
        x = x / x.abs().max()  # beyond a few thousand, products of gate and up overflow
    return x.requires_grad_("x" not in frozen), projections


def mlp(x: torch.Tensor, parts: list[Projection], activation: str = "silu") -> torch.Tensor:
    return project_mlp(x, Plan(parts[:2], activation), Plan(parts[2:]), parts[0].weight.dtype)


def separately(x: torch.Tensor, parts: list[Projection], activation: str = "silu") -> torch.Tensor:
    dtype = parts[0].weight.dtype
    return project(project_gated(x, Plan(parts[:2], activation), dtype), Plan(parts[2:]), dtype)[0]


def formula(x: torch.Tensor, parts: list[Projection], activation: str = "silu") -> torch.Tensor:
    gate, up, down = parts
    return plain(FUNCTIONS[activation](plain(x, gate)) * plain(x, up), down)


def trained_leaves(x: torch.Tensor, parts: list[Projection]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(x, parts) if leaf.requires_grad]


def assert_is_the_formula(
    x: torch.Tensor, parts: list[Projection], activation: str = "silu", bound: float = 1e-9
) -> None:
    y, wanted = mlp(x, parts, activation), formula(x, parts, activation)
    dy = torch.randn_like(wanted)
    got = torch.autograd.grad(y, trained_leaves(x, parts), dy)
    exact = torch.autograd.grad(wanted, trained_leaves(x, parts), dy)
    for one, other in zip((y, *got), (wanted, *exact), strict=True):
        assert_close(one.detach(), other.detach(), bound)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", [("gate",), ("up",), ("down",), NAMES], ids="-".join)
@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_equals_its_formula_whichever_term_dominates(case: str, where: tuple[str, ...], bias: bool) -> None:
    assert_is_the_formula(*make_mlp(dict.fromkeys(where, case), bias=bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_computed_again_as_it_was(activation: str) -> None:
    assert_is_the_formula(*make_mlp(bias=True), activation)


FROZEN = [
    ("x",),
    *[(f"{name}.{part}",) for name in NAMES for part in ("lora_A", "lora_B", "magnitude")],
    ("down.lora_A", "down.lora_B"),
    ("down.lora_A", "down.lora_B", "down.magnitude"),
    ("x", *[f"{name}.{part}" for name in NAMES[:2] for part in ("lora_A", "lora_B", "magnitude")]),
    ("x", "down.lora_A", "down.lora_B", "down.magnitude"),
    tuple(f"{name}.{part}" for name in NAMES for part in ("lora_A", "lora_B", "magnitude")),
]


@pytest.mark.parametrize("frozen", FROZEN, ids=" ".join)
def test_frozen_tensors_get_no_gradient(frozen: tuple[str, ...]) -> None:
    x, parts = make_mlp(bias=True, frozen=frozen)
    assert_is_the_formula(x, parts)
    mlp(x, parts).sum().backward()
    for leaf in leaves(x, parts):
        assert (leaf.grad is not None) is leaf.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_two_functions_to_the_last_bit(dtype: torch.dtype, bias: bool) -> None:
    x, parts = make_mlp(bias=bias, dtype=dtype)
    results = []
    for run in (mlp, separately):
        y = run(x, parts)
        results.append((y, *torch.autograd.grad(y, leaves(x, parts), torch.ones_like(y))))
        with torch.no_grad():
            results[-1] += (run(x, parts),)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep", [False, True])
def test_kernels_that_write_over_memory_give_the_same(
    keep: bool, in_place: bool, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    x, parts = make_mlp(bias=True, dtype=torch.float32)
    y, wanted = mlp(x, parts), formula(x, parts)
    dy = torch.randn_like(wanted)
    exact = torch.autograd.grad(wanted, leaves(x, parts), dy)
    for _ in range(1 + keep):
        got = torch.autograd.grad(y, leaves(x, parts), dy, retain_graph=keep)
        for one, other in zip((y, *got), (wanted, *exact), strict=True):
            assert_close(one.detach(), other.detach(), 2e-5)
    with torch.no_grad():
        assert_close(mlp(x, parts), wanted.detach(), 2e-5)
    counts = kernels_on_paper()
    forward = "swiglu_forward" if in_place else "compose_swiglu"
    assert counts[forward] == 3 + keep, "forward, again in each backward pass, inference"
    assert not {"swiglu_forward", "compose_swiglu"} - {forward} & counts.keys()
    assert counts["swiglu_backward" if in_place else "compose_swiglu_backward"] == 1 + keep
    assert counts["lora_compose"] == 2
    assert counts["compose_backward"] == counts["adapter_backward"] == 1 + keep


def saved_by(run: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tensors that the graph of ``run`` saves, without hooks on them, and its result."""
    y = run()
    found: list[torch.Tensor] = []
    pending: list[Any] = [y.grad_fn]
    while pending:
        node = pending.pop()
        found += [tensor for tensor in getattr(node, "saved_tensors", ()) if tensor is not None]
        pending += [following for following, _ in node.next_functions if following is not None]
    return found, y


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("magnitude", [True, False], ids=["m trained", "m of down frozen"])
def test_the_activation_is_not_saved(magnitude: bool) -> None:
    """Saved are x, both base products, h, and for m of down its base product; the rest has no dimension of tokens."""
    x, parts = make_mlp(dtype=torch.float32, frozen=() if magnitude else ("down.magnitude",))
    saved, y = saved_by(lambda: mlp(x, parts))
    of_tokens = [tensor for tensor in saved if tensor.numel() % T == 0 and tensor.shape[0] in (3, T)]
    columns = D_IN + 2 * D_FF + 2 * 6 + 5 + (D_OUT if magnitude else 0)
    assert size_of(of_tokens) == 4 * T * columns
    others, _ = saved_by(lambda: separately(x, parts))
    assert size_of(others) - size_of(saved) == 4 * T * D_FF, "act(gate)*up, and nothing else is different"
    assert_close(y.detach(), formula(x, parts).detach(), 2e-5)


def test_the_backward_pass_frees_memory_before_it_takes_more(
    kernels_on_paper: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No [T, d_ff] of its own lives beside those that come after it."""
    x, parts = make_mlp(dtype=torch.float32)
    plans = Plan(parts[:2], "silu"), Plan(parts[2:])
    y = project_mlp(x, *plans, torch.float32)
    _, (*_, needs, _) = y.grad_fn.calls  # type: ignore[union-attr]
    base_down = weakref.ref(y.grad_fn.saved_tensors[-1 - len(needs.saved)])  # type: ignore[union-attr]
    assert base_down().shape == (T, D_OUT)  # type: ignore[union-attr]
    alive: dict[str, list[bool]] = {}
    made: dict[str, Any] = {"base of down": base_down}
    compose, differentiate, lora_b = (
        group_backward._activation,
        group_backward._activation_gradients,
        group_backward._lora_b_gradients,
    )

    def spied_compose(*arguments: Any) -> torch.Tensor:
        out = compose(*arguments)
        made["activation"] = weakref.ref(out)
        return out

    def spied_differentiate(saved: Any, dout: torch.Tensor, **options: bool) -> Any:
        alive["for gate and up"] = [made["activation"]() is not None, made["base of down"]() is not None]
        made["its gradient"] = weakref.ref(dout)
        return differentiate(saved, dout, **options)

    def spied_lora_b(*arguments: Any) -> Any:
        alive["for their factors"] = [one() is not None for one in made.values()]
        return lora_b(*arguments)

    monkeypatch.setattr(group_backward, "_activation", spied_compose)
    monkeypatch.setattr(group_backward, "_activation_gradients", spied_differentiate)
    monkeypatch.setattr(group_backward, "_lora_b_gradients", spied_lora_b)
    y.backward(torch.ones_like(y))
    assert alive == {"for gate and up": [False, False], "for their factors": [False, False, False]}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_gives_the_same_gradients(reentrant: bool) -> None:
    x, parts = make_mlp(bias=True)
    plans = Plan(parts[:2], "gelu"), Plan(parts[2:])
    y = checkpoint(lambda x: project_mlp(x * 1.0, *plans, x.dtype), x, use_reentrant=reentrant)
    y.square().sum().backward()
    got = [leaf.grad for leaf in leaves(x, parts)]
    wanted = torch.autograd.grad(formula(x, parts, "gelu").square().sum(), leaves(x, parts))
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_recompute_keeps_is_not_computed_a_third_time(
    reentrant: bool, in_place: bool, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    x, parts = make_mlp(dtype=torch.float32)
    checkpoint(lambda x: mlp(x * 1.0, parts), x, use_reentrant=reentrant).sum().backward()
    forward = "swiglu_forward" if in_place else "compose_swiglu"
    assert kernels_on_paper()[forward] == 2, "in the forward pass and in its recompute"


@pytest.mark.parametrize("outside", [False, True])
def test_what_hooks_save_elsewhere_is_read_as_it_was(outside: bool) -> None:
    """Also around a checkpoint, whose own hooks drop what they get."""
    x, parts = make_mlp()
    wanted = torch.autograd.grad(formula(x, parts).square().sum(), leaves(x, parts))
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(lambda x: mlp(x * 1.0, parts), x, use_reentrant=False) if outside else mlp(x, parts)
    y.square().sum().backward()
    for one, other in zip([leaf.grad for leaf in leaves(x, parts)], wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("run", [mlp, separately])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_under_autocast_rounds_nothing(run: Callable[..., torch.Tensor], create_graph: bool) -> None:
    x, parts = make_mlp(dtype=torch.float32)
    wanted = torch.autograd.grad(run(x, parts).sum(), leaves(x, parts))
    y = run(x, parts).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves(x, parts), create_graph=create_graph)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    x, parts = make_mlp()
    y = mlp(x, parts)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves(x, parts), dy, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, leaves(x, parts), dy), strict=True):
        assert torch.equal(one, other)


def test_gradients_cannot_be_differentiated_again() -> None:
    x, parts = make_mlp()
    (dx,) = torch.autograd.grad(mlp(x, parts).sum(), x, create_graph=True)
    with pytest.raises(DifferentiationError, match="cannot be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "weight"), (1, "weight"), (2, "weight"), (0, "lora_B"), (1, "lora_B"), (2, "lora_B"), (2, "lora_A")],
)
def test_a_parameter_written_before_the_backward_pass_is_an_error(index: int, name: str) -> None:
    """All but an A of gate or up alone: where not both are parameters, the copy of both in one matrix is saved."""
    x, parts = make_mlp()
    written = torch.nn.Parameter(getattr(parts[index], name).detach().clone(), requires_grad=name != "weight")
    parts[index] = parts[index]._replace(**{name: written})
    y = mlp(x, parts)
    with torch.no_grad():
        written.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_may_be_overwritten() -> None:
    x, parts = make_mlp()
    wanted = torch.autograd.grad(mlp(x, parts).sum(), leaves(x, parts))
    y = mlp(x, parts)
    total = y.sum()
    y.data.fill_(float("nan"))
    for one, other in zip(torch.autograd.grad(total, leaves(x, parts)), wanted, strict=True):
        assert torch.equal(one, other)
    doubled = mlp(x, parts).mul_(2.0).sum()
    for one, other in zip(torch.autograd.grad(doubled, leaves(x, parts)), wanted, strict=True):
        assert_close(one, 2.0 * other)


def test_no_tokens_and_no_gradients() -> None:
    x, parts = make_mlp(bias=True)
    empty = torch.empty(0, D_IN, dtype=torch.float64, requires_grad=True)
    y = mlp(empty, parts)
    assert y.shape == (0, D_OUT)
    for leaf, grad in zip(leaves(empty, parts), torch.autograd.grad(y.sum(), leaves(empty, parts)), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = mlp(x, parts)
            assert not y.requires_grad
            assert_close(y, formula(x, parts))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_parameters(adapter: torch.dtype) -> None:
    x, parts = make_mlp(dtype=torch.bfloat16, adapter=adapter, bias=True)
    x = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x, parts)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    rounded = [
        one._replace(
            **{name: getattr(one, name).detach().to(torch.bfloat16).double() for name in one._fields[:3]},
            magnitude=one.magnitude.detach().double().requires_grad_(),
            bias=one.bias.double(),  # type: ignore[union-attr]
        )
        for one in parts
    ]
    rounded = [one._replace(lora_A=one.lora_A.requires_grad_(), lora_B=one.lora_B.requires_grad_()) for one in rounded]
    other = x.detach().to(torch.bfloat16).double().requires_grad_()
    exact = torch.autograd.grad(formula(other, rounded).sum(), leaves(other, rounded))
    for leaf, wanted in zip(leaves(x, parts), exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert float((leaf.grad.double() - wanted).norm() / wanted.norm()) <= 0.02


only_once = pytest.mark.parametrize("in_place", [False], indirect=True)
"""For tests that choose the way themselves."""


def test_a_checkpoints_recompute_gives_the_very_values_of_its_first_pass() -> None:
    """What follows in its region may depend on them: a router sends a token elsewhere."""
    x, parts = make_mlp(dtype=torch.bfloat16)
    seen = []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = mlp(x * 1.0, parts)
        seen.append(y.detach().clone())
        return y.sin()

    for reentrant in (False, True):
        seen.clear()
        checkpoint(run, x, use_reentrant=reentrant).sum().backward()
        first, again = seen
        assert torch.equal(first, again)


@only_once
def test_products_are_added_in_place_where_they_would_take_longer_than_two_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16, whose range is fp32's, with many ranks and tokens, with gradients or without."""
    monkeypatch.setattr(group_plan, "adds_in_place", adds_in_place)
    _, parts = make_mlp()

    def at(tokens: int, dtype: torch.dtype, rank: int = IN_PLACE_RANK + 1, *, trains: bool = True) -> bool:
        plan = Plan([one._replace(lora_A=torch.empty(rank, D_IN)) for one in parts[:2]], "silu")
        return plan.at(torch.empty(tokens, D_IN, dtype=dtype), trains=trains).in_place

    many = IN_PLACE_TOKENS + 1
    assert at(many, torch.bfloat16)
    assert at(many, torch.bfloat16, trains=False)
    assert not at(IN_PLACE_TOKENS, torch.bfloat16)
    assert not at(many, torch.bfloat16, IN_PLACE_RANK)
    assert not at(many, torch.float16)
    assert not at(many, torch.float32)
    assert not at(many, torch.float64)
    assert not at(0, torch.bfloat16)


@only_once
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_in_bf16_are_about_as_right_as_those_that_are_never_rounded(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding more, of gate and of up: errors of all gradients together grow by less than half."""
    x, parts = make_mlp(bias=True, dtype=torch.bfloat16)
    wide = [one._replace(**{name: getattr(one, name).detach().double() for name in one._fields[:5]}) for one in parts]
    wide = [one._replace(**{name: getattr(one, name).requires_grad_() for name in one._fields[1:4]}) for one in wide]
    x64 = x.detach().double().requires_grad_()
    y64 = formula(x64, wide, activation)
    dy = torch.randn_like(y64).bfloat16()
    exact = (y64, *torch.autograd.grad(y64, leaves(x64, wide), dy.double()))
    errors = []
    for way in (False, True):
        monkeypatch.setattr(group_plan, "adds_in_place", lambda *_, way=way: way)
        y = mlp(x, parts, activation)
        got = (y, *torch.autograd.grad(y, leaves(x, parts), dy))
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)])
    never, once = (sum(error**2 for error in of_way) ** 0.5 for of_way in errors)
    assert once < 1.5 * never
    assert max(errors[1]) < 2e-2


@only_once
@pytest.mark.parametrize("rank", [8, 9])
def test_products_are_added_by_the_kernel_of_the_composition_where_its_warps_are_specialised(
    rank: int, kernels_on_paper: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: kernel is not None)
    base, h, b = torch.randn(3, 11, D_FF), torch.randn(3, 11, 2 * rank)[..., rank:], torch.randn(D_FF, rank)
    wanted = base + 0.5 * h @ b.T
    assert operators.add_low_rank_(base, h, b, 0.5) is base
    assert_close(base, wanted, 1e-6)
    assert kernels_on_paper().get("lora_compose", 0) == (rank == 8), "another rank's columns of h would be copied"
    monkeypatch.setattr(kernels, "specialises_warps", lambda kernel: False)
    operators.add_low_rank_(base, h, b, -0.5)
    assert_close(base, wanted - 0.5 * h @ b.T, 1e-6)
    assert kernels_on_paper().get("lora_compose", 0) == (rank == 8)
    assert operators.add_low_rank_(base[:0], h[:0], b, 0.5).shape == (0, 11, D_FF)
