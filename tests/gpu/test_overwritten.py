"""On a GPU, kernels that PyTorch does not see (Liger's, and one written here) may overwrite a layer's output or its
base layer's, in any order of patching: the gradients stay stock PEFT's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import doratune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@triton.jit
def fill_kernel(out_ptr, count, value, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``value`` over ``count`` elements."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, value, mask=offsets < count)


def overwrite(tensor: torch.Tensor) -> None:
    assert tensor.is_contiguous()
    fill_kernel[(triton.cdiv(tensor.numel(), 1024),)](tensor, tensor.numel(), 7.0, BLOCK=1024)


class Overwritten(torch.autograd.Function):
    """Doubles y; its backward overwrites it."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y)
        return 2.0 * y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        overwrite(ctx.saved_tensors[0])
        return 2.0 * gradient


def gradients_of(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(*inputs)
    (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    assert any("magnitude" in name for name in got)
    for name, value in wanted.items():
        error = float((got[name] - value).norm() / value.norm())
        assert error <= bound, f"{name} is off by {error:.2e}"


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config).cuda(),
        peft.LoraConfig(use_dora=True, r=16, target_modules="all-linear", init_lora_weights=False),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.2 * torch.randn_like(parameter))
            elif "lora_B" in name:
                parameter.mul_(0.1)
    return model


@pytest.fixture
def llama_as_it_is() -> Iterator[None]:
    """Liger replaces classes and functions of transformers for the whole process: afterwards they are put back."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def with_liger(model: nn.Module) -> None:
    transformers_of_liger = pytest.importorskip("liger_kernel.transformers")
    transformers_of_liger.apply_liger_kernel_to_llama(
        rope=True,
        swiglu=True,
        rms_norm=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model.base_model.model,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", ["accelerate, Liger", "Liger, accelerate"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 6e-2)], ids=str)
def test_liger_in_either_order(
    order: str, checkpointing: bool, dtype: torch.dtype, bound: float, llama_as_it_is: None
) -> None:
    tokens = torch.randint(0, 128, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    wanted = gradients_of(llama(), tokens)  # in fp32, without Liger
    steps = (lambda m: doratune.accelerate(m, quiet=True), with_liger)
    model = llama().to(dtype)
    for change in steps if order.startswith("accelerate") else steps[::-1]:
        change(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for _ in range(2):
        assert_close(gradients_of(model, tokens), wanted, bound)


class Pair(nn.Module):
    """Two layers, each followed by a function that overwrites their output."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 384, bias=bias), nn.Linear(384, 128, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Overwritten.apply(self.second(Overwritten.apply(self.first(x)).tanh()))  # type: ignore[no-any-return]


@contextlib.contextmanager
def base_outputs_overwritten(model: nn.Module) -> Any:
    """After each forward pass of the model, what its base layers returned is overwritten by a kernel."""
    held: list[torch.Tensor] = []

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        held.append(output)

    bases = [module for name, module in model.named_modules() if name.endswith("base_layer")]
    handles = [base.register_forward_hook(keep) for base in bases]

    def write(*_: Any) -> None:
        assert len(held) >= 2
        for tensor in held:
            overwrite(tensor)
        held.clear()

    handles.append(model.register_forward_hook(write))
    yield
    for handle in handles:
        handle.remove()


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "nobody": lambda model: contextlib.nullcontext(),
    "a hook": base_outputs_overwritten,
}


@pytest.mark.parametrize("first", ["accelerate", "the holder"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_of_ones_own(bias: bool, holder: str, first: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Pair(bias).cuda(),
        peft.LoraConfig(use_dora=True, r=16, target_modules=["first", "second"], init_lora_weights=False),
    )
    x = torch.randn(200, 256, device="cuda")
    wanted = gradients_of(model, x)
    with contextlib.ExitStack() as stack:
        if first == "accelerate":
            doratune.accelerate(model, quiet=True)
        stack.enter_context(HOLDERS[holder](model))
        if first != "accelerate":
            doratune.accelerate(model, quiet=True)
        assert_close(gradients_of(model, x), wanted, 1e-4)
