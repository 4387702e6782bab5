"""A kernel refuses every tensor that it cannot use; the message names the argument, the fault and the requirement. It
accepts leading dimensions, positional and named tensors, and an ``out`` to write to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from doratune import Kernel, load_kernel
from doratune.codegen.ops import OPS
from doratune.errors import UsageError
from doratune.runtime.arguments import ArgumentError
from doratune.tuner.inputs import make_inputs

from ..specs import dtype_for

D_OUT, D_IN, RANK, TOKENS = 24, 24, 8, 5

Inputs = dict[str, Any]


def kernel_of(op: str, dtype: torch.dtype = torch.float32, **flags: Any) -> Kernel:
    given = dtype_for(op, "fp32") if OPS[op].only_formats else dtype
    return load_kernel(op, d_out=D_OUT, d_in=D_IN, rank=RANK, tokens=TOKENS, dtype=given, device="cpu", **flags)


def call(kernel: Kernel, inputs: Inputs, **more: Any) -> Any:
    scaling = {"scaling": 0.5} if kernel.spec.contract.scaling else {}
    return kernel(**inputs, **{**scaling, **more})


def refusal(kernel: Kernel, inputs: Inputs, **more: Any) -> str:
    with pytest.raises(ArgumentError) as raised:
        call(kernel, inputs, **more)
    return str(raised.value)


def changed(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


UNSUITABLE = [
    ("weight_norm", changed("weight", lambda w: w[:-1]), ["weight must", "shape [24, 24] (d_out, d_in), got [23, 24]"]),
    ("weight_norm", changed("weight", lambda w: w.T), ["weight must", "got strides (1, 24)", ".contiguous()"]),
    ("weight_norm", changed("weight", lambda w: w.bfloat16()), ["weight must be torch.float32, got torch.bfloat16"]),
    ("weight_norm", changed("lora_A", lambda a: a.T), ["lora_A must have shape [8, 24] (rank, d_in), got [24, 8]"]),
    ("weight_norm", changed("lora_B", lambda b: b.T), ["lora_B must have shape [24, 8] (d_out, rank), got [8, 24]"]),
    ("weight_norm", changed("lora_B", lambda b: b.flatten()), ["lora_B must have shape [24, 8]", "got [192]"]),
    (
        "weight_norm",
        changed("weight_sq", lambda n: n[:, None]),
        ["weight_sq must have shape [24] (d_out), got [24, 1]"],
    ),
    ("weight_norm", changed("weight_sq", lambda n: n.half()), ["weight_sq must be torch.float32, got torch.float16"]),
    ("lora_compose", changed("base", lambda x: x[:, :-1]), ["base must", "shape [tokens, 24] (d_out), got [5, 23]"]),
    ("lora_compose", changed("base", lambda x: x[0]), ["base must have shape [tokens, 24]", "got [24]"]),
    ("lora_compose", changed("h", lambda h: h[1:]), ["h must have [5] tokens", "got [4]"]),
    ("lora_compose", changed("h", lambda h: h[None]), ["h must have [5] tokens", "got [1, 5]"]),
    ("lora_compose", changed("h", lambda h: h.to("meta")), ["h must be on cpu, got meta", "move the tensor"]),
    ("lora_compose", changed("g", lambda g: g.double()), ["g must be torch.float32, got torch.float64"]),
    ("lora_compose", changed("g", lambda g: g.tolist()), ["g must be a torch.Tensor, got list"]),
    ("compose_forward", changed("lora", lambda x: None), ["lora must be a torch.Tensor, got NoneType"]),
    ("compose_forward", changed("lora", lambda x: x.repeat(1, 2)[:, ::2]), ["lora must", "contiguous", "(48, 2)"]),
    ("compose_forward", changed("g", lambda g: g[:1].expand(24)), ["g must", "contiguous", "got strides (0,)"]),
    (
        "compose_backward",
        changed("inner", lambda x: x.half()),
        ["inner must be", "got torch.float16", "a kernel for torch.float16"],
    ),
    ("compose_backward", changed("inner", lambda x: x[:3]), ["inner must have [5] tokens", "got [3]"]),
    ("compose_backward", changed("dy", lambda x: x.to("meta")), ["dy must be on cpu, got meta"]),
    ("dora_linear_forward", changed("x", lambda x: x[:, :-1]), ["x must", "shape [tokens, 24] (d_in), got [5, 23]"]),
    ("dora_linear_forward", changed("h", lambda h: h[1:]), ["h must have [5] tokens", "got [4]"]),
]


@pytest.mark.parametrize(("op", "spoil", "said"), UNSUITABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_an_unsuitable_tensor_is_named_with_what_would_be_right(
    op: str, spoil: Callable[[Inputs], Inputs], said: list[str]
) -> None:
    kernel = kernel_of(op)
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    call(kernel, inputs)
    message = refusal(kernel, spoil(inputs))
    for part in said:
        assert part in message


def test_an_argument_error_is_both_a_usage_error_and_a_value_error() -> None:
    assert issubclass(ArgumentError, UsageError)
    assert issubclass(ArgumentError, ValueError)


@pytest.mark.parametrize("op", OPS)
def test_each_missing_tensor_is_named(op: str) -> None:
    kernel = kernel_of(op)
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    for name in inputs:
        message = refusal(kernel, {other: tensor for other, tensor in inputs.items() if other != name})
        assert message.startswith(f"missing {name};")
        assert f"{op} takes {', '.join(inputs)}" in message


def test_surplus_unknown_and_repeated_arguments_are_refused() -> None:
    kernel = kernel_of("compose_forward")
    base, lora, g = make_inputs(kernel.spec, TOKENS)[0].values()
    takes = "compose_forward takes base, lora, g and scaling"
    with pytest.raises(ArgumentError, match=f"expected at most 3 tensors, got 4; {takes}"):
        kernel(base, lora, g, g, scaling=0.5)
    with pytest.raises(ArgumentError, match=f"unknown argument 'bias'; {takes}"):
        kernel(base, lora, g, bias=g, scaling=0.5)
    with pytest.raises(ArgumentError, match=f"lora is given twice; {takes}"):
        kernel(base, lora, lora=lora, g=g, scaling=0.5)


def test_a_tensor_that_only_another_form_takes_is_refused() -> None:
    saving = kernel_of("weight_norm", save=True)
    inputs, _ = make_inputs(kernel_of("weight_norm").spec, TOKENS)
    assert refusal(saving, inputs).startswith("unknown argument 'weight_sq'; weight_norm takes weight, lora_A, lora_B")


@pytest.mark.parametrize("scaling", [None, "0.5", True, torch.tensor(0.5), [0.5]], ids=repr)
def test_scaling_must_be_a_number(scaling: Any) -> None:
    kernel = kernel_of("compose_forward")
    message = refusal(kernel, make_inputs(kernel.spec, TOKENS)[0], scaling=scaling)
    assert message.startswith("scaling of compose_forward must be a number (PEFT's lora_alpha / r), got ")
    assert repr(scaling) in message


def test_an_operation_without_scaling_refuses_one() -> None:
    kernel = kernel_of("compose_backward")
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    assert refusal(kernel, inputs, scaling=0.5) == "compose_backward takes no scaling, got 0.5"


def test_a_whole_number_is_a_scaling() -> None:
    kernel = kernel_of("compose_forward")
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    assert torch.equal(call(kernel, inputs, scaling=2), call(kernel, inputs, scaling=2.0))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (lambda y: y[:, 1:], "out must have shape [tokens, 24] (d_out), got [5, 23]"),
        (lambda y: y[1:], "out must have [5] tokens as the other tensors, got [4]"),
        (lambda y: y[None], "out must have [5] tokens as the other tensors, got [1, 5]"),
        (lambda y: y.half(), "out must be torch.float32, got torch.float16"),
        (lambda y: y.to("meta"), "out must be on cpu, got meta"),
        (lambda y: y.repeat(1, 2)[:, ::2], "out must have a contiguous last dimension, got strides (48, 2)"),
        (lambda y: y.numpy(), "out must be a torch.Tensor, got ndarray"),
    ],
)
def test_out_must_suit_the_output(out: Callable[[torch.Tensor], object], said: str) -> None:
    kernel = kernel_of("compose_forward")
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    assert said in refusal(kernel, inputs, out=out(torch.empty(TOKENS, D_OUT)))


def test_rows_of_an_output_must_not_share_memory() -> None:
    kernel = kernel_of("compose_forward")
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    message = refusal(kernel, inputs, out=torch.empty(1, D_OUT).expand(TOKENS, D_OUT))
    assert message == "the rows of out must not overlap in memory, got shape [5, 24] and strides (0, 1)"


@pytest.mark.parametrize("op", ["weight_norm", "lora_compose", "compose_forward", "compose_backward"])
def test_rows_need_not_be_adjacent(op: str) -> None:
    kernel = kernel_of(op)
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    apart = {n: t.repeat(1, 2)[:, : t.shape[1]] if t.ndim == 2 else t for n, t in inputs.items()}
    assert not any(t.is_contiguous() for t in apart.values() if t.ndim == 2)
    got, wanted = (
        outputs if isinstance(outputs, tuple) else (outputs,) for outputs in (call(kernel, apart), call(kernel, inputs))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_an_output_may_be_a_slice_of_a_wider_matrix() -> None:
    kernel = kernel_of("compose_forward")
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    wide = torch.full((TOKENS, 2 * D_OUT), 7.0)
    assert torch.equal(call(kernel, inputs, out=wide[:, :D_OUT]), call(kernel, inputs))
    assert bool((wide[:, D_OUT:] == 7.0).all())


@pytest.mark.parametrize(
    ("op", "over"),
    [("compose_forward", "base"), ("compose_forward", "lora"), ("lora_compose", "base"), ("compose_backward", "dy")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_output_may_be_written_over_an_input(op: str, over: str, dtype: torch.dtype) -> None:
    kernel = kernel_of(op, dtype, **({"bias": True} if op == "compose_backward" else {"save": True}))
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    apart = call(kernel, {name: tensor.clone() for name, tensor in inputs.items()})
    before = {name: tensor.clone() for name, tensor in inputs.items() if name != over}
    in_place = call(kernel, inputs, out=inputs[over])
    assert in_place[0] is inputs[over]
    assert all(torch.equal(a, b) for a, b in zip(in_place, apart, strict=True))
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("op", ["lora_compose", "compose_forward", "compose_backward"])
@pytest.mark.parametrize("lead", [(2, 3), (1, 6), (6, 1), (1, 2, 3)], ids=str)
def test_leading_dimensions_are_tokens(op: str, lead: tuple[int, ...]) -> None:
    kernel = kernel_of(op, torch.bfloat16, **({"bias": True} if op == "compose_backward" else {"save": True}))
    flat, _ = make_inputs(kernel.spec, 6)
    by_token = {o.name for o in kernel.spec.contract.inputs_of(kernel.spec) if o.shape[0] == "tokens"}
    shaped = {n: t.view(*lead, t.shape[-1]) if n in by_token else t for n, t in flat.items()}
    outputs = kernel.spec.contract.outputs_of(kernel.spec)
    for operand, value, wanted in zip(outputs, call(kernel, shaped), call(kernel, flat), strict=True):
        assert list(value.shape) == ([*lead, D_OUT] if operand.shape[0] == "tokens" else [D_OUT])
        torch.testing.assert_close(value.reshape(wanted.shape), wanted)


def test_the_same_tokens_in_other_leading_dimensions_do_not_fit_together() -> None:
    kernel = kernel_of("compose_forward")
    inputs, _ = make_inputs(kernel.spec, 6)
    inputs["base"] = inputs["base"].view(2, 3, D_OUT)
    assert refusal(kernel, inputs) == "lora must have [2, 3] tokens as the other tensors, got [6]"


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_at_all_are_refused(shape: tuple[int, ...]) -> None:
    kernel = kernel_of("compose_forward")
    empty = torch.empty(*shape, D_OUT)
    assert "must have at least one token" in refusal(kernel, {"base": empty, "lora": empty, "g": torch.ones(D_OUT)})


def test_position_and_name_are_the_same() -> None:
    kernel = kernel_of("lora_compose", bias=True)
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    base, h, lora_b, g, bias = inputs.values()
    by_name = call(kernel, dict(reversed(inputs.items())))
    by_position = kernel(base, h, lora_b, g, bias, scaling=0.5)
    mixed = kernel(base, h, lora_b, bias=bias, g=g, scaling=0.5)
    for value in (by_position, mixed):
        assert isinstance(value, torch.Tensor)
        assert torch.equal(value, by_name)


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_tracks_no_gradients_also_on_a_cpu(op: str) -> None:
    kernel = kernel_of(op)
    inputs, _ = make_inputs(kernel.spec, TOKENS)
    wanted = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    outputs = call(kernel, wanted)
    assert not any(value.requires_grad for value in (outputs if isinstance(outputs, tuple) else (outputs,)))
