"""What is compiled before a model's first step is exactly what the step launches, and the model stays as it was."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import doratune
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.integrations.peft import first_step
from doratune.integrations.peft.first_step import FirstStep, FirstStepEnd, group_kernels_of, kernels_of
from doratune.integrations.peft.swapped import plain_class
from doratune.internals.triton import LaunchRefusedError, without_launches
from doratune.nn import kernels, norm_pass
from doratune.runtime import loader
from doratune.runtime.kernel import Kernel, Request
from doratune.runtime.reference import reference

from .peft_models import VOCABULARY, Pair, gpt2, llama, with_dora

GPU = torch.device("cuda", 0)


class Launched:
    """A kernel that computes the reference on CPU tensors, and notes for which operands."""

    def __init__(self, kernel: Kernel, notes: dict[Request, None]) -> None:
        self.kernel, self.notes = kernel, notes
        self.fusion_pays = kernel.fusion_pays

    def launch(self, inputs: Any, outputs: Any, scaling: float | None = None) -> None:
        self.notes[self.kernel, self.kernel.alignments_of((*inputs, *outputs))] = None
        operands = self.kernel.spec.contract.inputs_of(self.kernel.spec)
        rows = [tensor if tensor.ndim < 3 else tensor.flatten(0, -2) for tensor in inputs]  # as a launch reads them
        by_name = {operand.name: tensor for operand, tensor in zip(operands, rows, strict=True)}
        with torch.no_grad():
            results = reference(self.kernel.spec, by_name, float(scaling or 0.0))
            for output, result in zip(outputs, results.values(), strict=True):
                output.copy_(result.view(output.shape))


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels can be looked up as if an H100 were there."""
    monkeypatch.setattr(loader, "gpu_of", lambda device: find_gpu("h100-sxm"))
    monkeypatch.setattr(loader, "find_device", lambda device: GPU)
    kernels.kernel_for.cache_clear()
    kernels.paying_kernel_for.cache_clear()
    yield
    kernels.kernel_for.cache_clear()
    kernels.paying_kernel_for.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[Request, None]:
    """The kernels that CPU tensors launch from now on, as if they were on the GPU."""
    notes: dict[Request, None] = {}
    kernel_for = kernels.kernel_for

    @functools.cache
    def on_the_cpu(*key: Any) -> Any:
        if key[-1].type != "cpu":
            return kernel_for(*key)
        kernel = kernel_for(*key[:-1], GPU)
        return None if kernel is None else Launched(kernel, notes)

    monkeypatch.setattr(kernels, "kernel_for", on_the_cpu)
    return notes


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> set[KernelSpec]:
    """The kernels that norm passes over CPU tensors would launch from now on; they compute the plain formula."""
    specs: set[KernelSpec] = set()
    grouped = norm_pass._kernel

    def on_the_cpu(*key: Any) -> Any:
        kernel = grouped(*key[:-1], GPU)
        assert kernel is not None
        if key[-1] == GPU:
            return kernel
        specs.add(kernel.spec)
        return None

    def stored(w: Any, a: Any, b: Any, m: Any, scaling: float, how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(w.d_out), torch.ones(w.d_out)

    def plain(w: Any, a: Any, b: Any, m: Any, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        norm = (w.float() + scaling * (b.float() @ a.float())).norm(dim=1)
        return norm, m.float() / norm

    monkeypatch.setattr(norm_pass, "_kernel", on_the_cpu)
    monkeypatch.setattr(norm_pass, "norm_and_gain_of", plain)
    monkeypatch.setattr(norm_pass, "norm_and_gain_of_stored", stored)
    return specs


@contextmanager
def autocast(on: bool) -> Iterator[None]:
    """Autocast to bf16 on CPU and GPU. PyTorch's own refuses a GPU that is not there."""
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    for kind, _, _ in before:
        torch.set_autocast_enabled(kind, on)
        torch.set_autocast_dtype(kind, torch.bfloat16)
    try:
        yield
    finally:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def pair(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> nn.Module:
    wide = settings.pop("wide", False)
    return with_dora(Pair(24, 40, 16).to(dtype), autocast_adapter_dtype=wide, **settings)


def checkpointed(reentrant: bool) -> nn.Module:
    model = with_dora(llama().to(torch.bfloat16), autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def quantised(bias: bool) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Pair(64, 128, 64)
    for name, linear in (("first", model.first), ("second", model.second)):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.load_state_dict(
            {"weight": linear.weight.data, **({"bias": torch.zeros(linear.out_features)} if bias else {})}
        )
        layer.support_avx512bf16_for_cpu = False  # on a GPU W is not packed anew in inference
        setattr(model, name, layer.to("cpu"))
    return with_dora(model)


FORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "bf16": (pair, False),
    "fp32": (lambda: pair(torch.float32), False),
    "fp32 adapters kept exact": (lambda: pair(wide=True), False),
    "fp32 adapters under autocast": (lambda: pair(wide=True), True),
    "fp32 weights under autocast": (lambda: pair(torch.float32), True),
    "dropout": (lambda: pair(lora_dropout=0.1), False),
    "a rank that is no power of two": (lambda: pair(r=12), False),
    "one layer without an adapter": (lambda: pair(target_modules=["second"]), False),
    "llama": (lambda: with_dora(llama().to(torch.bfloat16), autocast_adapter_dtype=False), False),
    "gpt2, whose weights are transposed": (lambda: with_dora(gpt2().to(torch.bfloat16)), False),
    "checkpoints": (lambda: checkpointed(False), False),
    "a quantised W": (lambda: quantised(False), True),
    "a quantised W and a bias": (lambda: quantised(True), True),
    "reentrant checkpoints": (lambda: checkpointed(True), False),
}


def step(model: nn.Module, tokens: int, *, train: bool) -> None:
    with torch.set_grad_enabled(train):
        if hasattr(model, "config") and getattr(model.config, "vocab_size", None):
            ids = torch.randint(0, VOCABULARY, (1, tokens))
            y = model(input_ids=ids).logits
        else:
            layer = model.base_model.model.first
            dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.bfloat16
            y = model(torch.randn(tokens, layer.in_features, dtype=dtype))
        if train:
            y.sum().backward()


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_rehearsed_is_what_a_step_launches(
    form: str, train: bool, launches: dict[Request, None], passes: set[KernelSpec]
) -> None:
    made, rounds = FORMS[form]
    model = made().train(train)
    doratune.accelerate(model, quiet=True, precompile=False)
    with autocast(rounds):
        rehearsed = {*kernels_of(model, 12, train=train, device=GPU)}
        assert not launches, "a rehearsal launches nothing"
        step(model, 12, train=train)
        ran = len(launches)
        groups = {*group_kernels_of(model, 12, train=train, device=GPU)}
        assert len(launches) == ran
        rehearsed |= groups
        for _ in range(2):  # groups of layers that were found in the first step serve in later ones
            step(model, 12, train=train)
    assert any("group" in kernel.spec.op for kernel, _ in groups) == ("llama" in form or "checkpoints" in form)
    together = {request for request in rehearsed if request[0].spec.op == "weight_norm_group"}
    assert rehearsed - together == {*launches}
    assert {kernel.spec for kernel, _ in together} == passes
    assert launches
    assert all(kernel.spec.gpu == "h100-sxm" for kernel, _ in rehearsed)


def test_a_rehearsal_leaves_the_model_as_it_was(launches: dict[Request, None]) -> None:
    model = pair(lora_dropout=0.5).train()
    doratune.accelerate(model, quiet=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert [*kernels_of(model, 12, train=True, device=GPU)]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in first_step.accelerated_layers(model):
        assert layer.lora_variant["default"].norms._entry is None, "no norm of a rehearsal is kept"


def test_layers_of_one_form_are_rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from doratune.nn import rehearsal

    model = with_dora(llama(layers=4).to(torch.bfloat16), autocast_adapter_dtype=False)
    doratune.accelerate(model, quiet=True)
    runs = []
    run = rehearsal._run
    monkeypatch.setattr(rehearsal, "_run", lambda *args, **named: (runs.append(args), run(*args, **named)))
    assert [*kernels_of(model, 12, train=True, device=GPU)]
    assert len(runs) == 3, "q = o, k = v, and the MLP"


def test_a_layer_that_cannot_be_rehearsed_costs_only_its_kernels(launches: dict[Request, None]) -> None:
    model = pair().eval()
    doratune.accelerate(model, quiet=True)
    whole = {*kernels_of(model, 12, train=False, device=GPU)}
    first = model.base_model.model.first
    first.__deepcopy__ = lambda known: None  # it cannot be copied
    part = {*kernels_of(model, 12, train=False, device=GPU)}
    assert part < whole
    assert part


@triton.jit
def fill_kernel(out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr + tl.arange(0, BLOCK), 7.0)


@pytest.mark.parametrize("replaced", ["of the module", "of its class", "nothing"])
def test_no_kernel_of_others_starts_on_tensors_without_memory(
    replaced: str, launches: dict[Request, None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger and others replace the forward pass of an MLP; Triton would take meta tensors to lie at address 0."""
    model = with_dora(llama().to(torch.bfloat16), autocast_adapter_dtype=False).eval()
    doratune.accelerate(model, quiet=True, precompile=False)
    mlps = [module for module in model.modules() if type(module).__name__ == "LlamaMLP"]
    started: list[bool] = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        started.append(x.is_meta)
        fill_kernel[(1,)](x, BLOCK=16)
        y: torch.Tensor = self.down_proj(self.up_proj(x) * self.gate_proj(x))
        return y

    if replaced == "of the module":
        for mlp in mlps:
            mlp.forward = MethodType(forward, mlp)
    elif replaced == "of its class":
        monkeypatch.setattr(plain_class(mlps[0]), "forward", forward)
    else:  # a hook inside
        mlps[0].down_proj.lora_A["default"].register_forward_pre_hook(
            lambda module, args: fill_kernel[(1,)](args[0], BLOCK=16)
        )
    found = {kernel.spec.op for kernel, _ in kernels_of(model, 12, train=False, device=GPU)}
    assert not started, "nor is the replaced forward pass rehearsed: its layers run alone in it"
    assert "lora_compose" in found
    assert ("compose_swiglu" in found) == (replaced == "nothing")
    launched: list[int] = []
    with without_launches():
        with pytest.raises(LaunchRefusedError, match="fill_kernel"):
            fill_kernel[(1,)](torch.empty(16, device="meta"), BLOCK=16)
        other = threading.Thread(target=lambda: launched.append(bool(fill_kernel[(1,)])))
        other.start()
        other.join()
    assert launched == [True], "other threads go on"
    out = torch.zeros(16)
    fill_kernel[(1,)](out, BLOCK=16)
    assert bool((out == 7.0).all())


def hooked(base: nn.Module, see: Callable[[Any], None]) -> AbstractContextManager[Any]:
    """All hooks of a module, one a kernel's first user may have."""
    base.register_forward_hook(lambda module, args, out: see(out))
    base.register_forward_pre_hook(lambda module, args, named: see(args[0]), with_kwargs=True)
    base.register_full_backward_hook(lambda module, into, out: see(out[0]))
    base.register_full_backward_pre_hook(lambda module, out: see(out[0]))
    return nullcontext()


def patched(base: nn.Module, see: Callable[[Any], None]) -> AbstractContextManager[Any]:
    forward = base.forward
    base.forward = lambda x: see(x) or forward(x)  # type: ignore[method-assign, func-returns-value]
    return nullcontext()


def globally_hooked(base: nn.Module, see: Callable[[Any], None]) -> AbstractContextManager[Any]:
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: see(out))
    return closing(SimpleNamespace(close=hook.remove))


@contextmanager
def linear_replaced(base: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    linear = nn.functional.linear
    nn.functional.linear = lambda x, *rest: see(x) or linear(x, *rest)  # type: ignore[func-returns-value]
    yield
    nn.functional.linear = linear


def saving_hooked(base: nn.Module, see: Callable[[Any], None]) -> AbstractContextManager[Any]:
    def itself(tensor: torch.Tensor) -> torch.Tensor:
        see(tensor)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(itself, itself)


@pytest.mark.parametrize("others", [hooked, patched, globally_hooked, linear_replaced, saving_hooked])
def test_no_code_of_others_sees_a_tensor_without_memory(
    others: Callable[..., AbstractContextManager[Any]], launches: dict[Request, None]
) -> None:
    """It could keep one, and start a kernel on it when the rehearsal is over."""
    model = pair()
    doratune.accelerate(model, quiet=True, precompile=False)
    plain = {*kernels_of(model, 12, train=True, device=GPU)}
    seen: list[bool] = []
    with others(model.base_model.model.first.base_layer, lambda tensor: seen.append(tensor.is_meta)):
        found = {*kernels_of(model, 12, train=True, device=GPU)}
        assert not seen
        model(torch.randn(12, 24, dtype=torch.bfloat16)).sum().backward()
        assert seen
        assert not any(seen)
    if others in (globally_hooked, linear_replaced):
        assert found < plain, "only norms, which call no module"
    else:
        assert any(kernel.spec.tokens for kernel, _ in found)


class Collected:
    """In place of ``Batch``: the numbers of kernels of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        monkeypatch.setattr(first_step, "Batch", self._batch)
        for collect in (kernels_of, group_kernels_of):
            monkeypatch.setattr(first_step, collect.__name__, functools.partial(collect, device=GPU))

    def _batch(self, requests: Iterable[Request], besides: object = None) -> Any:
        self.calls.append(len({*requests}))
        return SimpleNamespace(finish=lambda: None)


def test_each_number_of_tokens_and_each_mode_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_dora(llama().to(torch.bfloat16), autocast_adapter_dtype=False).train()
    doratune.accelerate(model, quiet=True)
    collected = Collected(monkeypatch)
    for _ in range(5):
        step(model, 12, train=True)
    assert len(collected.calls) == 4, "all, the groups that have been seen, and twice what may be left of them"
    assert collected.calls[0] > collected.calls[1] > 0
    assert collected.calls[1:] == collected.calls[1:2] * 3
    collected.calls.clear()
    step(model, 1, train=True)
    assert len(collected.calls) == 2
    assert collected.calls[0] > collected.calls[1]
    collected.calls.clear()
    step(model.eval(), 12, train=False)
    assert len(collected.calls) == 2
    collected.calls.clear()
    with torch.no_grad():
        model.generate(torch.zeros(1, 12, dtype=torch.long), max_new_tokens=4, do_sample=False)
    assert len(collected.calls) == 1 + 4, "the prompt again, and one token at a time, without gradients"
    assert all(collected.calls)


def test_the_hook_sits_where_autocast_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers wrap the whole model's forward in autocast, so a hook of the whole model would not see it."""
    model = with_dora(llama().to(torch.bfloat16)).eval()
    doratune.accelerate(model, quiet=True)
    hooked = [module for module in model.modules() if any(isinstance(h, FirstStep) for h in hooks(module))]
    assert [type(module).__name__ for module in hooked] == ["LlamaModel"]


def hooks(module: nn.Module) -> list[object]:
    return [*module._forward_pre_hooks.values()]


def hooked(model: nn.Module) -> int:
    ends = sum(isinstance(hook, FirstStepEnd) for module in model.modules() for hook in module._forward_hooks.values())
    begins = sum(isinstance(hook, FirstStep) for module in model.modules() for hook in hooks(module))
    assert begins == ends
    return begins


def test_there_is_one_hook_until_it_is_undone() -> None:
    model = pair()
    doratune.accelerate(model, quiet=True)
    doratune.accelerate(model, quiet=True)
    assert hooked(model) == 1
    doratune.accelerate(model, quiet=True, precompile=False)
    assert hooked(model) == 0
    doratune.accelerate(model, quiet=True)
    doratune.restore(model)
    assert hooked(model) == 0


def test_a_failure_costs_no_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    model = pair().eval()
    doratune.accelerate(model, quiet=True)
    monkeypatch.setattr(first_step, "kernels_of", fails)
    step(model, 12, train=False)
    step(model, 12, train=False)
    assert [record.message for record in caplog.records if "no such thing" in record.message] == [
        "kernels are compiled one after another, at their first launch: RuntimeError('no such thing')"
    ]


def test_on_a_cpu_nothing_is_looked_up_or_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair().eval()
    doratune.accelerate(model, quiet=True)
    requests: list[Request] = []
    monkeypatch.setattr(first_step, "Batch", lambda found, besides=None: requests.extend(found))
    step(model, 12, train=False)
    assert not requests


def test_on_a_cpu_nothing_is_warned_of_that_a_gpu_lacks() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doratune.accelerate(pair(wide=True), quiet=True)
    assert [str(warning.message) for warning in caught if "autocast" in str(warning.message)] == []


def test_what_needs_no_number_of_tokens_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []
    begun = SimpleNamespace(finish=lambda: None)
    monkeypatch.setattr(first_step, "Batch", lambda found, besides=None: (requests.extend(found), begun)[1])
    on_the_gpu = functools.partial(kernels_of, device=GPU)
    monkeypatch.setattr(first_step, "kernels_of", on_the_gpu)
    model = pair(wide=True).train()
    monkeypatch.setattr(first_step.torch, "autocast", lambda kind, dtype: autocast(dtype is torch.bfloat16))
    with autocast(False):
        doratune.accelerate(model, quiet=True)
    assert {kernel.spec.op for kernel, _ in requests} == {"weight_norm_group", "adapter_backward"}
    first = {*requests}
    with autocast(True):
        step(model, 12, train=True)
        assert first < {*on_the_gpu(model, 12, train=True)}, "as it is trained: under autocast"


def test_a_copy_of_the_model_prepares_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair().eval()
    doratune.accelerate(model, quiet=True)
    collected = Collected(monkeypatch)
    step(model, 12, train=False)
    step(copy.deepcopy(model), 12, train=False)
    assert len(collected.calls) == 4
    assert collected.calls[:2] == collected.calls[2:]
