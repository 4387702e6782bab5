"""dora_linear and dora_compose have the values and gradients of DoRA's formula in fp64, on inputs where each term
dominates and for every combination of trained tensors. They refuse what hand-written gradients do not support.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.internals.torch import knows_backward
from doratune.nn import autograd as gradients_module
from doratune.nn import operators
from doratune.nn.differentiation import DifferentiationError
from doratune.nn.functional import dora_compose, dora_linear, weight_norm
from doratune.nn.norm import norm_from_products
from doratune.runtime.arguments import ArgumentError

from .layers import CASES, TRAINED, Layer, assert_close, error, gradients, kernels_on_paper, make_layer, plain

__all__ = ["kernels_on_paper"]

BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Relative Frobenius error against fp64 on the same inputs. In 16 bits it comes from intermediate tensors, which such a
model rounds to 16 bits everywhere."""

FORMS: dict[str, Callable[[Layer], torch.Tensor]] = {
    "own": lambda t: dora_linear(*t.args),
    "own, bias": lambda t: dora_linear(*t.args, t.bias),
    "given base": lambda t: dora_linear(*t.args, base=t.x @ t.weight.T),
    "given base, bias": lambda t: dora_linear(*t.args, t.bias, base=t.x @ t.weight.T + t.bias),
    "given base, bias, overwritten": lambda t: dora_linear(
        *t.args, t.bias, base=t.x @ t.weight.T + t.bias, own_base=True
    ),
    "delta": lambda t: dora_linear(*t.args, delta=True),
    "delta, given base, bias": lambda t: dora_linear(*t.args, t.bias, base=t.x @ t.weight.T + t.bias, delta=True),
    "foreign base": lambda t: compose(t, t.x @ t.weight.T),
    "foreign base, bias": lambda t: compose(t, t.x @ t.weight.T + t.bias, t.bias),
    "foreign base, owned": lambda t: compose(t, t.x @ t.weight.T, own_base=True),
    "foreign base, bias, owned": lambda t: compose(t, t.x @ t.weight.T + t.bias, t.bias, own_base=True),
    "foreign base, delta": lambda t: compose(t, t.x @ t.weight.T, delta=True),
    "foreign base, delta, bias": lambda t: compose(t, t.x @ t.weight.T + t.bias, t.bias, delta=True),
}


def compose(layer: Layer, base: torch.Tensor, bias: torch.Tensor | None = None, **options: bool) -> torch.Tensor:
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    weight_sq = weight.float().square().sum(dim=1) if weight.dtype != torch.float64 else weight.square().sum(dim=1)
    products = weight.to(weight_sq.dtype) @ lora_a.to(weight_sq.dtype).T
    norm = norm_from_products(weight_sq, products, lora_a, lora_b, scaling)
    return dora_compose(base, x, lora_a, lora_b, magnitude, scaling, bias, norm=norm, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_right_wherever_a_term_dominates(form: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if dtype is torch.float16 and case == "large_activations":
            continue  # beyond fp16's range
        # The gradient of a bias in a foreign base has a part through the base's graph, and in these cases it cancels.
        trained = TRAINED[:-1] if "foreign" in form and ("delta" in form or case == "zero_rows") else TRAINED
        layer = make_layer(case, dtype=dtype, trained=trained)
        exact = layer.double()
        wanted = plain(exact, bias="bias" in form, delta="delta" in form)
        y = FORMS[form](layer)
        assert y.dtype == dtype
        scale = (
            4.0 if "delta" in form and dtype in (torch.bfloat16, torch.float16) else 1.0
        )  # g - 1 times a rounded base
        assert error(y, wanted.detach()) <= scale * BOUNDS[dtype], case
        assert_close(gradients(y, layer), gradients(wanted, exact), 2.0 * scale * BOUNDS[dtype], f"{form}, {case}")


@pytest.mark.parametrize("form", FORMS)
def test_kernels_that_write_into_given_memory_give_the_same(
    form: str, kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    layer = make_layer(dtype=torch.float32)
    exact = layer.double()
    wanted = plain(exact, bias="bias" in form, delta="delta" in form)
    y = FORMS[form](layer)
    assert error(y, wanted.detach()) <= 1e-5
    assert_close(gradients(y, layer), gradients(wanted, exact), 2e-5, form)
    assert kernels_on_paper()["lora_compose"] == kernels_on_paper()["compose_backward"] == 1


def test_the_formula_passes_gradcheck_in_fp64() -> None:
    layer = make_layer(tokens=(2, 3), d_out=5, d_in=7, rank=2)
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = weight_norm(weight, lora_a, lora_b, scaling)  # a constant: the definition of DoRA's gradient

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        x, a, b, m, bias = tensors
        return dora_linear(x, weight, a, b, m, scaling, bias, norm=norm)

    assert torch.autograd.gradcheck(run, (x, lora_a, lora_b, magnitude, layer.bias))


@pytest.mark.parametrize("form", ["own, bias", "foreign base, bias", "delta"])
def test_frozen_tensors_get_no_gradient_and_do_not_change_the_others(form: str) -> None:
    names = [name for name in TRAINED if name != "bias"] if form == "delta" else list(TRAINED)
    whole = make_layer(trained=tuple(names))
    full = gradients(FORMS[form](whole), whole)
    for count in range(1, len(names)):
        for trained in itertools.combinations(names, count):
            layer = make_layer(trained=trained)
            got = gradients(FORMS[form](layer), layer)
            assert got.keys() == set(trained)
            for name in trained:
                assert torch.equal(got[name], full[name]), f"d{name} with {trained} trained"  # type: ignore[arg-type]


def saved_for_backward(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


def test_only_what_a_gradient_asks_for_is_kept_for_the_backward_pass() -> None:
    tokens, d_out, rank = 64, 48, 6

    def kept(*trained: str) -> int:
        layer = make_layer(tokens=(tokens,), trained=trained)
        outputs: list[torch.Tensor] = []

        def run() -> torch.Tensor:
            outputs.append(dora_linear(*layer.args))
            return outputs[0]

        saved = saved_for_backward(run)
        given = {tensor.data_ptr() for tensor in (*layer.tensors.values(), *outputs)}
        return sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in given)

    assert kept("x", "lora_A", "lora_B", "magnitude") == tokens * (d_out + rank) + 2 * d_out  # x@W.T, h, g and w
    assert kept("x", "lora_A", "lora_B") == tokens * rank + d_out
    assert kept("x", "lora_A") == kept("x") == d_out


def with_parameters(layer: Layer, *names: str) -> Layer:
    """The same layer with these of its tensors as parameters, as modules have them."""
    made = {
        name: torch.nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad) if name in names else tensor
        for name, tensor in layer.tensors.items()
    }
    return Layer(made, layer.scaling, layer.dy)


@pytest.mark.skipif(not knows_backward, reason="this PyTorch does not tell one backward pass from another")
@pytest.mark.parametrize("parameters", [("weight", "lora_A", "lora_B"), ("weight",), ("lora_B",), ()])
def test_autograd_saves_everything_except_parameters(parameters: tuple[str, ...]) -> None:
    layer, other = with_parameters(make_layer(), *parameters), make_layer()
    saved = saved_for_backward(lambda: dora_linear(*layer.args))
    kept = {name for name, tensor in layer.tensors.items() for t in saved if t.data_ptr() == tensor.data_ptr()}
    assert kept == {"x", "weight", "lora_A", "lora_B"} - {*parameters}
    for how in (lambda t: dora_linear(*t.args), lambda t: checkpoint(dora_linear, *t.args, use_reentrant=False)):
        layer = with_parameters(make_layer(), *parameters)
        for name, gradient in gradients(how(layer), layer).items():
            wanted = gradients(dora_linear(*other.args), other)[name]
            assert gradient is wanted is None or torch.equal(gradient, wanted), name


@pytest.mark.skipif(not knows_backward, reason="this PyTorch does not tell one backward pass from another")
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_parameter_written_to_before_the_backward_pass_is_refused_as_autograd_does(name: str) -> None:
    layer = with_parameters(make_layer(), "weight", "lora_A", "lora_B")
    y = dora_linear(*layer.args)
    with torch.no_grad():
        layer.tensors[name].mul_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*of a DoRA layer"):
        y.backward(layer.dy)


def test_the_tensor_saved_for_dg_is_freed_before_the_products_of_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, gone = make_layer(dtype=torch.float32), list[bool]()
    product = gradients_module._product

    def spy(*args: object) -> torch.Tensor:
        gone.append(memory.expired())
        return product(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gradients_module, "_product", spy)
    for retained in (True, False):
        base = layer.x.detach() @ layer.weight.T
        y = dora_linear(*layer.args, base=base, own_base=True)
        memory = StorageWeakRef(base.untyped_storage())
        loss = (y * layer.dy).sum()
        del y, base
        if retained:
            loss.backward(retain_graph=True)
            assert not any(gone), "it is needed again"
            gone.clear()
        loss.backward()
        assert gone, "the products were made"
        assert all(gone)
        gone.clear()


def test_without_gradients_nothing_is_saved_and_no_graph_is_made() -> None:
    layer = make_layer()
    with torch.no_grad():
        assert saved_for_backward(lambda: dora_linear(*layer.args)) == []
        assert not dora_linear(*layer.args).requires_grad
    assert not dora_linear(*make_layer(trained=()).args).requires_grad


def test_the_graph_of_a_given_base_gets_no_gradient() -> None:
    layer = make_layer()
    base = (layer.x @ layer.weight.T).detach().requires_grad_()
    dora_linear(*layer.args, base=base).sum().backward()
    assert base.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["own, bias", "given base", "foreign base"])
def test_gradient_checkpointing_changes_nothing(form: str, reentrant: bool) -> None:
    layer, again = make_layer(dtype=torch.float32), make_layer(dtype=torch.float32)
    straight = gradients(FORMS[form](layer), layer)
    y = checkpoint(lambda x: FORMS[form](again), again.x, use_reentrant=reentrant)
    if reentrant:  # torch.autograd.grad is not for this kind
        y.backward(again.dy)
        got = {name: again.tensors[name].grad for name in TRAINED}
    else:
        got = gradients(y, again)
    for name, value in straight.items():
        if value is not None:
            assert torch.equal(got[name], value), name  # type: ignore[arg-type]


def test_gradients_of_micro_batches_add_up() -> None:
    layer = make_layer(tokens=(8,))
    whole = gradients(dora_linear(*layer.args, layer.bias), layer)
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    for part, dy in zip(x.detach().split(3), layer.dy.split(3), strict=True):
        dora_linear(part, weight, lora_a, lora_b, magnitude, scaling, layer.bias).backward(dy)
    got = {name: layer.tensors[name].grad for name in TRAINED if name != "x"}
    assert_close(got, {name: whole[name] for name in got}, 1e-13, "accumulated")


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["own, bias", "given base", "foreign base, bias", "delta"])
def test_autocast_rounds_fp32_adapters_as_autocast_does_and_returns_fp32_gradients(
    form: str, rounded: torch.dtype
) -> None:
    for case in ("random", "cross_term", "large_lora"):
        layer = make_layer(case, dtype=rounded, adapter=torch.float32)
        exact = layer.double(rounded=rounded)
        wanted = plain(exact, bias="bias" in form, delta="delta" in form)
        with torch.autocast("cpu", dtype=rounded):
            y = FORMS[form](layer)
        got = gradients(y, layer)
        scale = 4.0 if form == "delta" else 1.0
        assert y.dtype == rounded
        assert error(y, wanted.detach()) <= scale * BOUNDS[rounded]
        assert {got[name].dtype for name in ("lora_A", "lora_B", "magnitude")} == {torch.float32}  # type: ignore[union-attr]
        assert_close(got, gradients(wanted, exact), 2.0 * scale * BOUNDS[rounded], f"{form}, {case}")


def test_autocast_takes_an_fp32_model_to_16_bits_as_a_linear_layer() -> None:
    layer = make_layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dora_linear(*layer.args, layer.bias)
        assert y.dtype == torch.nn.functional.linear(layer.x, layer.weight).dtype == torch.bfloat16
    got = gradients(y, Layer(layer.tensors, layer.scaling, layer.dy.bfloat16()))
    assert {grad.dtype for grad in got.values() if grad is not None} == {torch.float32}
    exact = layer.double()
    assert_close(got, gradients(plain(exact), exact), 2e-2, "autocast")


def test_a_backward_pass_inside_autocast_gives_the_same_bits() -> None:
    layer, again = (make_layer(dtype=torch.bfloat16, adapter=torch.float32) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(dora_linear(*layer.args), layer)
        y = dora_linear(*again.args)
    outside = gradients(y, again)
    for name, value in outside.items():
        assert value is inside[name] is None or torch.equal(value, inside[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["own, bias", "foreign base"])
def test_fp32_adapters_beside_16_bit_weights_stay_exact_without_autocast(form: str) -> None:
    layer = make_layer("zero_weight", dtype=torch.bfloat16, adapter=torch.float32, tokens=(64,))
    exact, rounded = layer.double(), layer.double(rounded=torch.bfloat16)
    wanted, coarse = plain(exact, bias="bias" in form), plain(rounded, bias="bias" in form)
    y = FORMS[form](layer)
    unavoidable = error(wanted.detach().bfloat16(), wanted.detach())
    assert error(y, wanted.detach()) <= 1.05 * unavoidable  # W = 0: no rounded base in between
    assert error(y, coarse.detach()) > 1.2 * unavoidable  # rounded adapters would show
    got, best = gradients(y, layer), gradients(wanted, exact)
    assert got["lora_A"].dtype == torch.float32  # type: ignore[union-attr]
    assert_close(got, best, 5e-3, form)


@pytest.mark.parametrize("tokens", [(1,), (1, 1, 1), (0,), (2, 0), ()])
def test_any_leading_dimensions_even_none_or_no_token(tokens: tuple[int, ...]) -> None:
    layer = make_layer(tokens=tokens, rank=1, dtype=torch.float32)
    y = dora_linear(*layer.args, layer.bias)
    assert y.shape == (*tokens, 48)
    exact = layer.double()
    assert error(y, plain(exact).detach()) <= 1e-5
    assert_close(gradients(y, layer), gradients(plain(exact), exact), 1e-5, str(tokens))


def test_a_rank_above_every_size_of_the_layer() -> None:
    layer = make_layer(rank=768, d_in=24, d_out=16, dtype=torch.float32)
    exact = layer.double()
    y = dora_linear(*layer.args)
    assert_close(gradients(y, layer), gradients(plain(exact, bias=False), exact), 1e-4, "r = 768")


def test_zero_rows_and_zero_magnitudes_are_finite() -> None:
    layer = make_layer("zero_rows", dtype=torch.float32)
    with torch.no_grad():
        layer.magnitude[:4] = 0.0
    y = dora_linear(*layer.args)
    assert y.isfinite().all()
    assert (y[..., 0] == 0).all()
    assert all(grad is None or grad.isfinite().all() for grad in gradients(y, layer).values())


@pytest.mark.parametrize("form", ["own", "own, bias", "given base", "given base, bias, overwritten", "foreign base"])
@pytest.mark.parametrize("through_a_view", [False, True])
def test_the_output_may_be_changed_in_place(form: str, through_a_view: bool) -> None:
    layer, again = make_layer(), make_layer()
    wanted = gradients(torch.tanh(FORMS[form](layer) * 3.0), layer)
    y = FORMS[form](again)
    (y.view(-1, 48) if through_a_view else y).mul_(3.0).tanh_()
    assert_close(gradients(y, again), wanted, 1e-12, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_pytorch_does_not_see_may_overwrite_the_output(form: str) -> None:
    """As fused activations and rotary embeddings do. A write through ``.data`` changes no version, like a launch."""
    layer, again = make_layer(), make_layer()
    wanted = gradients(FORMS[form](layer), layer)
    y = FORMS[form](again)
    y.data.zero_()
    assert_close(gradients(y, again), wanted, 1e-13, form)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", ["linear", "compose"])
def test_the_caller_may_overwrite_a_given_base(compute: str, bias: bool) -> None:
    results = []
    for overwritten in (False, True):
        layer = make_layer(trained=TRAINED[:-1])
        base = (layer.x @ layer.weight.T + (layer.bias if bias else 0.0)).detach()
        if compute == "linear":
            y = dora_linear(*layer.args, layer.bias if bias else None, base=base)
        else:
            y = compose(layer, base, layer.bias if bias else None)
        if overwritten:
            base.data.zero_()
        results.append(gradients(y, layer))
    assert_close(results[1], results[0], 1e-15, compute)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [TRAINED[:-1], ("x", "lora_A", "lora_B")])
def test_a_given_base_that_its_own_gradient_needs_is_kept_or_its_loss_raises(
    trained: tuple[str, ...], kernels_on_paper: Callable[[], dict[str, int]]
) -> None:
    layer = make_layer(dtype=torch.float32, trained=trained)
    base = torch.tanh(layer.x @ layer.weight.T)  # tanh's gradient reads its output
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = weight_norm(weight, lora_a, lora_b, scaling)
    y = dora_compose(base, x, lora_a, lora_b, magnitude, scaling, norm=norm, own_base=True)
    if "magnitude" in trained:
        assert y.data_ptr() != base.data_ptr(), "it is kept for dg"
        y.sum().backward()
    else:
        assert y.data_ptr() == base.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_an_adapter_changed_between_forward_and_backward_is_noticed() -> None:
    layer = make_layer()
    y = dora_linear(*layer.args)
    with torch.no_grad():
        layer.lora_B.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", ["own", "foreign base"])
def test_double_backward_is_refused_with_the_remedy(form: str) -> None:
    layer = make_layer()
    grads = torch.autograd.grad(FORMS[form](layer).square().sum(), [layer.x, layer.lora_A], create_graph=True)
    assert_close(
        {"x": grads[0].detach()},
        {"x": torch.autograd.grad(plain(layer, bias=False).square().sum(), layer.x)[0]},
        1e-11,
        "create_graph alone",
    )
    with pytest.raises(DifferentiationError, match=r"cannot be differentiated again.*create_graph"):
        grads[0].square().sum().backward()


def test_torch_func_and_forward_mode_are_refused_with_the_remedy() -> None:
    layer = make_layer()
    x, *rest = layer.args
    with pytest.raises(DifferentiationError, match=r"torch\.func transforms.*loss\.backward"):
        torch.func.grad(lambda x: dora_linear(x, *rest).sum())(x)
    with pytest.raises(DifferentiationError, match=r"torch\.func transforms"):
        torch.vmap(lambda x: dora_linear(x, *rest))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(DifferentiationError, match="no forward-mode derivative"):
            dora_linear(dual, *rest)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(3, 41)}, r"x must have shape \[..., 40\] .*, got \[3, 41\]"),
        ({"lora_A": torch.zeros(6, 41)}, r"lora_A must have shape \[r, 40\] .*, got \[6, 41\]"),
        ({"lora_B": torch.zeros(48, 5)}, r"lora_B must have shape \[48, 6\] .*, got \[48, 5\]"),
        ({"lora_B": torch.zeros(48, 6).half()}, r"lora_A and lora_B must have .* got torch.float32 and torch.float16"),
        ({"magnitude": torch.zeros(40)}, r"magnitude must have shape \[48\] .*, got \[40\]"),
        ({"weight": torch.zeros(48 * 40)}, r"weight must have shape \[d_out, d_in\], got \[1920\]"),
        ({"x": torch.zeros(3, 40).bfloat16()}, r"x must have .* torch.float32, got torch.bfloat16: convert x"),
        ({"magnitude": torch.zeros(48, device="meta")}, r"magnitude must be on the layer's device cpu, got meta"),
        (
            {"weight": torch.zeros(48, 40).requires_grad_()},
            r"weight must not require a gradient, because DoRA freezes W",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: dict[str, torch.Tensor], complaint: str) -> None:
    layer = make_layer(dtype=torch.float32)
    layer.tensors.update(change)
    with pytest.raises(ArgumentError, match=complaint):
        dora_linear(*layer.args)


class Wrapped(torch.Tensor):
    """A tensor subclass that stores its values elsewhere, like a sharded or quantised tensor."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("not to be read")


def test_a_tensor_subclass_with_values_elsewhere_is_refused() -> None:
    layer = make_layer(dtype=torch.float32)
    layer.tensors["weight"] = torch.Tensor._make_subclass(Wrapped, layer.weight)
    with pytest.raises(ArgumentError, match=r"weight must be a plain torch\.Tensor, got Wrapped"):
        dora_linear(*layer.args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_public_norm_is_that_of_w_plus_sba(case: str, dtype: torch.dtype) -> None:
    layer = make_layer(case, dtype=dtype)
    _, weight, lora_a, lora_b, _, scaling = layer.double().args
    norm = doratune.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    exact = (weight + scaling * lora_b @ lora_a).norm(dim=1)
    assert norm.dtype == torch.float32
    assert not norm.requires_grad
    torch.testing.assert_close(norm.double(), exact.detach(), rtol=1e-5, atol=1e-30)
    squares = layer.weight.double().square().sum(dim=1).float()
    again = doratune.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, weight_sq=squares)
    torch.testing.assert_close(again, norm, rtol=1e-6, atol=0.0)
    with pytest.raises(ArgumentError, match=r"weight_sq must be \[48\] torch.float32, got \[48\] torch.float64"):
        doratune.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, weight_sq=squares.double())


def test_a_norm_in_16_bits_is_taken_as_the_fp32_numbers_that_it_holds() -> None:
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        layer = make_layer(dtype=torch.bfloat16)
        norm = weight_norm(*layer.args[1:4], layer.scaling).to(torch.bfloat16).to(dtype)
        y = dora_linear(*layer.args, norm=norm)
        results.append((y.detach(), gradients(y, layer)))
    (one, ones), (other, others) = results
    assert torch.equal(one, other)
    for name, gradient in ones.items():
        assert gradient is others[name] is None or torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("given", ["magnitude", "norm"])
def test_operators_get_gains_and_norms_in_fp32_from_fp64_ones(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read fp32: fp64 numbers would be misread on a GPU."""
    dtypes: list[torch.dtype] = []

    def spy(name: str, places: tuple[int, ...]) -> None:
        operator = getattr(operators, name)

        def call(*arguments: object) -> object:
            dtypes.extend(arguments[place].dtype for place in places)  # type: ignore[attr-defined]
            return operator(*arguments)

        monkeypatch.setattr(operators, name, call)

    spy("lora_compose", (3,))
    spy("compose_backward", (2,))
    spy("adapter_backward", (3, 5))
    layer = make_layer(dtype=torch.bfloat16)
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = weight_norm(weight, lora_a, lora_b, scaling)
    norm = norm.double() if given == "norm" else norm
    magnitude = magnitude.detach().double().requires_grad_() if given == "magnitude" else magnitude
    dora_linear(x, weight, lora_a, lora_b, magnitude, scaling, norm=norm).backward(layer.dy)
    assert dtypes == [torch.float32] * 4
    assert magnitude.grad is not None
    assert magnitude.grad.dtype is magnitude.dtype
