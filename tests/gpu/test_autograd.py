"""On a GPU, dora_linear runs the kernels, has the gradients of DoRA's formula in fp64, reuses norms safely, compiles to
one graph, and its training step replays from a CUDA graph. Small sizes; the kernels' own tests are test_kernels.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.nn import kernels
from doratune.nn.functional import dora_compose, dora_linear
from doratune.runtime.kernel import Kernel

from ..nn.layers import CASES, Layer, assert_close, error, gradients, make_layer, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}

FORMS: dict[str, Callable[[Layer], torch.Tensor]] = {
    "own": lambda t: dora_linear(*t.args),
    "own, bias": lambda t: dora_linear(*t.args, t.bias),
    "given base, overwritten": lambda t: dora_linear(*t.args, base=t.x @ t.weight.T, own_base=True),
    "delta": lambda t: dora_linear(*t.args, delta=True),
    "foreign base, bias": lambda t: foreign(t),
}


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """fp32 products of PyTorch in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def foreign(layer: Layer) -> torch.Tensor:
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    norm = doratune.weight_norm(weight, lora_a, lora_b, scaling)
    base = torch.nn.functional.linear(x, weight, layer.bias)
    return dora_compose(base, x, lora_a, lora_b, magnitude, scaling, layer.bias, norm=norm)


def make(case: str = "random", **options: Any) -> Layer:
    options = {"tokens": (3, 67), "d_out": 384, "d_in": 320, "rank": 24, "device": "cuda", **options}
    return make_layer(case, **options)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_right_wherever_a_term_dominates(form: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if dtype is torch.float16 and case == "large_activations":
            continue  # beyond fp16's range
        trained = ("x", "lora_A", "lora_B", "magnitude") if "foreign" in form and case == "zero_rows" else None
        layer = make(case, dtype=dtype, **({"trained": trained} if trained else {}))
        exact = layer.double()
        wanted = plain(exact, bias="bias" in form, delta=form == "delta")
        y = FORMS[form](layer)
        scale = 4.0 if form == "delta" and dtype is not torch.float32 else 1.0  # g - 1 times a rounded base
        assert error(y, wanted) <= scale * BOUNDS[dtype], case
        assert_close(gradients(y, layer), gradients(wanted, exact), 2.0 * scale * BOUNDS[dtype], f"{form}, {case}")


def test_the_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    original = kernels.kernel_for

    def spy(*key: Any) -> Any:
        found.append(original(*key))
        return found[-1]

    monkeypatch.setattr(kernels, "kernel_for", spy)
    layer = make(dtype=torch.bfloat16)
    gradients(dora_linear(*layer.args), layer)
    assert None not in found
    ran = {kernel.spec.op for kernel in found}  # type: ignore[attr-defined]
    wanted = {"weight_norm", "weight_norm_exact", "lora_compose", "compose_backward", "adapter_backward"}
    assert ran >= wanted


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", ["own", "own, bias"])
@pytest.mark.parametrize("tokens", [(1,), (3, 67)])
def test_where_the_fusion_pays_one_kernel_gives_values_and_gradients_as_right(
    form: str, dtype: torch.dtype, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launch = Kernel.launch

    def spy(kernel: Kernel, *args: Any) -> None:
        launched.append(kernel.spec.op)
        launch(kernel, *args)

    monkeypatch.setattr(Kernel, "launch", spy)
    monkeypatch.setattr(kernels, "paying_kernel_for", kernels.kernel_for)
    for case in CASES:
        if dtype is torch.float16 and case == "large_activations":
            continue  # beyond fp16's range
        layer = make(case, dtype=dtype, tokens=tokens)
        exact = layer.double()
        wanted = plain(exact, bias="bias" in form)
        y = FORMS[form](layer)
        assert error(y, wanted) <= BOUNDS[dtype], case
        assert_close(gradients(y, layer), gradients(wanted, exact), 2.0 * BOUNDS[dtype], f"{form}, {case}")
    assert "dora_linear_forward" in launched
    assert "lora_compose" not in launched


@pytest.mark.parametrize("autocast", [True, False])
def test_fp32_adapters_beside_bf16_weights(autocast: bool) -> None:
    for case in ("random", "cross_term", "large_lora", "zero_magnitude"):
        layer = make(case, dtype=torch.bfloat16, adapter=torch.float32)
        exact = layer.double(rounded=torch.bfloat16 if autocast else None)
        wanted = plain(exact)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = dora_linear(*layer.args, layer.bias)
        got = gradients(y, layer)
        assert y.dtype == torch.bfloat16
        assert {got[name].dtype for name in ("lora_A", "lora_B", "magnitude")} == {torch.float32}  # type: ignore[union-attr]
        assert error(y, wanted) <= BOUNDS[torch.bfloat16]
        assert_close(got, gradients(wanted, exact), 2.0 * BOUNDS[torch.bfloat16], case)


@pytest.mark.parametrize("tokens", [(1,), (2, 1), (0,), (4096,)])
@pytest.mark.parametrize("rank", [1, 768])
def test_any_number_of_tokens_and_any_rank(tokens: tuple[int, ...], rank: int) -> None:
    layer = make(tokens=tokens, rank=rank, dtype=torch.float32, d_in=72, d_out=104)
    exact = layer.double()
    y = dora_linear(*layer.args, layer.bias)
    assert_close(gradients(y, layer), gradients(plain(exact), exact), 1e-4, f"{tokens}, r = {rank}")


def test_a_slice_of_a_wider_tensor_and_an_expanded_gradient_are_read_right() -> None:
    layer = make(dtype=torch.bfloat16, tokens=(67,))
    wide = torch.randn(67, 3 * 320, device="cuda", dtype=torch.bfloat16)
    layer.tensors["x"] = wide[:, 320:640].detach()
    layer.dy = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(67, 384)
    layer.tensors["x"].requires_grad_()
    exact = layer.double()
    assert_close(
        gradients(dora_linear(*layer.args), layer), gradients(plain(exact, bias=False), exact), 2e-2, "strided"
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        module = doratune.nn.DoRALinear(320, 384, 24, 48.0, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            module.adapter[1].normal_(std=0.05)
        x = torch.randn(130, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = checkpoint(module, x, use_reentrant=reentrant) if wrapped else module(x)
        y.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in module.adapter)])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
def test_a_norm_is_never_stale_after_an_optimizer_step(optimizer: str) -> None:
    torch.manual_seed(0)
    module = doratune.nn.DoRALinear(320, 384, 24, 48.0, device="cuda", bias=False, norm_reuse="tracked")
    adam = torch.optim.AdamW(module.adapter, lr=0.05, **{optimizer: True})  # type: ignore[arg-type]
    x = torch.randn(64, 320, device="cuda")
    for _ in range(3):
        adam.zero_grad()
        y = module(x)
        lora_a, lora_b, magnitude = (tensor.detach().double() for tensor in module.adapter)
        adapted = module.base_layer.weight.double() + module.scaling * lora_b @ lora_a
        wanted = x.double() @ (magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T
        assert error(y, wanted) <= 2e-5
        y.square().mean().backward()
        adam.step()


@pytest.mark.parametrize("reuse", ["auto", "tracked"])
def test_a_captured_training_step_replays_with_the_weights_of_the_moment(reuse: str) -> None:
    torch.manual_seed(0)
    module = doratune.nn.DoRALinear(320, 384, 24, 48.0, device="cuda", dtype=torch.bfloat16, norm_reuse=reuse)
    with torch.no_grad():
        module.adapter[1].normal_(std=0.05)
    twin = doratune.nn.DoRALinear(320, 384, 24, 48.0, device="cuda", dtype=torch.bfloat16, norm_reuse="off")
    twin.load_state_dict(module.state_dict())
    x = torch.randn(130, 320, device="cuda", dtype=torch.bfloat16)
    adam = torch.optim.AdamW(module.adapter, lr=0.05, capturable=True)

    def loss_of(layer: doratune.nn.DoRALinear) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = checkpoint(layer, x, use_reentrant=False).square().mean()
        loss.backward()
        return loss.detach()

    def step() -> torch.Tensor:
        adam.zero_grad(set_to_none=False)
        loss = loss_of(module)
        adam.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    losses = []
    for _ in range(4):
        twin.load_state_dict(module.state_dict())
        twin.zero_grad()
        wanted = loss_of(twin)
        graph.replay()
        losses.append(float(wanted))
        assert torch.allclose(captured, wanted, rtol=1e-3)
        for name, one, other in zip("ABm", module.adapter, twin.adapter, strict=True):
            assert error(one.grad, other.grad) <= 1e-2, name
    assert all(abs(late - early) > 1e-2 * early for early, late in itertools.pairwise(losses)), (
        "old weights are noticed"
    )


@pytest.mark.parametrize("form", ["own, bias", "given base, overwritten", "foreign base, bias"])
def test_under_torch_compile_the_kernels_run_in_one_graph(form: str) -> None:
    torch._dynamo.reset()
    layer, again = (make(dtype=torch.bfloat16, adapter=torch.float32) for _ in range(2))
    names = list(layer.tensors)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return FORMS[form](Layer(dict(zip(names, tensors, strict=True)), layer.scaling, layer.dy))

    y = torch.compile(run, fullgraph=True)(*layer.tensors.values())
    exact = layer.double(rounded=torch.bfloat16)
    wanted = plain(exact, bias="bias" in form)
    assert error(y, wanted) <= BOUNDS[torch.bfloat16]
    assert_close(gradients(y, layer), gradients(wanted, exact), 2.0 * BOUNDS[torch.bfloat16], form)
    assert error(run(*again.tensors.values()), wanted) <= BOUNDS[torch.bfloat16]


def test_under_torch_compile_with_cuda_graphs_steps_learn() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = doratune.nn.DoRALinear(320, 384, 24, 48.0, device="cuda", dtype=torch.bfloat16)
    adam = torch.optim.AdamW(module.adapter, lr=0.01)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(130, 320, device="cuda", dtype=torch.bfloat16)
    target = torch.randn(130, 384, device="cuda", dtype=torch.bfloat16)
    losses = []
    for _ in range(6):
        adam.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (compiled(x).float() - target).square().mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_no_step_waits_for_the_gpu() -> None:
    layer = make(dtype=torch.bfloat16)
    gradients(dora_linear(*layer.args), layer)  # compiled, looked up
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(dora_linear(*layer.args), layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
