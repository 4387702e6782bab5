"""Small models with DoRA adapters, made from configs, and their comparison. Needs peft and transformers."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


class Pair(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self, d_in: int = 24, d_mid: int = 40, d_out: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(d_in, d_mid)
        self.second = nn.Linear(d_mid, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def llama(layers: int = 2, hidden: int = 48, intermediate: int = 80) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def with_dora(model: nn.Module, seed: int = 0, autocast_adapter_dtype: bool = True, **settings: Any) -> PeftModel:
    """``model`` with DoRA adapters that are far from their initial values, biases and magnitudes included."""
    settings = {"r": 8, "target_modules": "all-linear", **settings}
    if isinstance(model, Pair):
        settings["target_modules"] = ["first", "second"]
    if isinstance(model, GPT2LMHeadModel):
        settings["fan_in_fan_out"] = True
    peft_model = get_peft_model(
        model,
        LoraConfig(use_dora=True, init_lora_weights=False, **settings),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    shake(peft_model, seed)
    return peft_model


def shake(model: nn.Module, seed: int = 0) -> None:
    """Move adapters, magnitudes and biases to where each term of DoRA matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.2 * noise)
            elif "lora_B" in name:
                parameter.copy_(0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)


def by_torchao(model: nn.Module, config: str) -> None:
    """Quantise the linear layers of ``model``, and record the method as transformers does for PEFT."""
    torchao = pytest.importorskip("torchao.quantization")
    how = getattr(torchao, config)
    torchao.quantize_(model, how())
    settings = SimpleNamespace(get_apply_tensor_subclass=how)
    model.hf_quantizer = SimpleNamespace(quantization_config=settings)  # type: ignore[assignment]


def four_bits(linear: nn.Linear, storage: torch.dtype = torch.uint8) -> Any:
    """A layer of bitsandbytes in nf4 with the weights of ``linear``, as it is on a GPU: never packed anew for a CPU.

    ``storage``: the dtype as which its codes are kept.
    """
    nn4bit = pytest.importorskip("bitsandbytes").nn
    given = {"quant_type": "nf4", "quant_storage": storage}
    sizes = linear.in_features, linear.out_features
    layer = nn4bit.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, **given)
    made = nn4bit.Params4bit(linear.weight.data, requires_grad=False, module=layer, **given)
    layer.weight = made.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def eight_bits(linear: nn.Linear, threshold: float = 0.0) -> Any:
    """A layer of bitsandbytes in 8 bits; columns of its input with larger entries than ``threshold`` stay in 16."""
    nn8bit = pytest.importorskip("bitsandbytes").nn
    sizes = linear.in_features, linear.out_features
    layer = nn8bit.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = nn8bit.Int8Params(linear.weight.data, requires_grad=False).to("cpu")
    return layer


def by_hqq(linear: nn.Linear, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A layer of HQQ that computes in ``dtype``."""
    hqq = pytest.importorskip("hqq.core.quantize")
    return hqq.HQQLinear(linear, hqq.BaseQuantizeConfig(**config), compute_dtype=dtype, device="cpu")


def in_four_bits(
    model: nn.Module, which: Callable[[str], bool] = lambda name: True, storage: torch.dtype = torch.uint8
) -> None:
    """Quantise the linear layers in the blocks of a llama whose names ``which`` picks."""
    in_layers(model, functools.partial(four_bits, storage=storage), which)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def in_eight_bits(model: nn.Module, threshold: float = 0.0) -> None:
    """Quantise the linear layers in the blocks of a llama."""
    in_layers(model, functools.partial(eight_bits, threshold=threshold))
    model.is_loaded_in_8bit = True  # type: ignore[assignment]


def in_layers(
    model: nn.Module, quantised: Callable[[nn.Linear], nn.Module], which: Callable[[str], bool] = lambda name: True
) -> None:
    """Replace the linear layers in the blocks of a llama whose names ``which`` picks."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and ".layers." in name and which(name):
            model.set_submodule(name, quantised(module))


def dense(model: PeftModel) -> PeftModel:
    """``model``, a Pair with adapters, in fp64, with every quantised W replaced by the matrix that PEFT makes of it."""
    layers = [model.base_model.model.get_submodule(name) for name in ("first", "second")]
    first, second = layers
    sizes = (first.in_features, first.out_features, second.out_features)
    exact = with_dora(Pair(*sizes), r=first.r["default"]).to(first.lora_A["default"].weight.device).double()
    with torch.no_grad():
        for name, layer in zip(("first", "second"), layers, strict=True):
            wide = exact.base_model.model.get_submodule(name)
            wide.base_layer.weight.copy_(dequantize_module_weight(layer.base_layer))
            if layer.base_layer.bias is not None:
                wide.base_layer.bias.copy_(layer.base_layer.bias)
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                getattr(wide, part)["default"].weight.copy_(getattr(layer, part)["default"].weight)
    return exact


def read_no_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every quantised layer be one whose storage is unknown: it is read through its own forward."""
    monkeypatch.setattr("doratune.integrations.peft.stored.StorageReader.read", lambda *_: "unknown")


def twin(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative Frobenius error of ``value``."""
    assert torch.isfinite(value).all()
    return float((value.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error_ratios(fast: nn.Module, stock: nn.Module, exact: nn.Module) -> dict[str, float]:
    """The error of ``fast`` over that of ``stock``, against ``exact``: the geometric mean over gradients of a kind.

    A single small gradient of a deep model is mostly the rounding of other layers, in both models by chance.
    """
    logs: dict[str, list[float]] = {}
    wanted = gradients(exact)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in gradients(fast).items():
        if wanted[name].norm() > 1e-9 * largest:  # with one token, q and k get none
            ratio = relative(gradient, wanted[name]) / relative(gradients(stock)[name], wanted[name])
            logs.setdefault(name.split("lora_")[1].split(".")[0], []).append(math.log(ratio))
    assert set(logs) == {"A", "B", "magnitude_vector"}
    return {kind: math.exp(sum(values) / len(values)) for kind, values in logs.items()}


def assert_same_gradients(model: nn.Module, exact: nn.Module, bound: float) -> None:
    wanted = gradients(exact)
    assert gradients(model).keys() == wanted.keys()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == wanted[name].dtype
        assert relative(gradient, wanted[name]) <= bound, name


def variants(model: nn.Module) -> list[Any]:
    """PEFT's variant objects of all layers and adapters."""
    return [variant for module in model.modules() for variant in getattr(module, "lora_variant", {}).values()]


def tokens(count: int = 9) -> torch.Tensor:
    """Input of a language model: 2 rows of ``count`` token ids."""
    return torch.randint(0, VOCABULARY, (2, count))


def inputs(count: int = 7) -> torch.Tensor:
    """Input of a :class:`Pair`: ``count`` rows."""
    return torch.randn(count, 24)
