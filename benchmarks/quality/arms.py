"""The ways to adapt a model, each applied to copies of the same pre-trained model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapted import STOCK, STOCK_LORA, Mode, shared_copy
from ..results import OURS
from ..shapes import TARGETS
from .row_scaled import RowScaledLoRA

LORA, RSLORA, DORA, PEFT_DORA = STOCK_LORA, "peft_rslora", OURS, STOCK
ROW_SCALED, FULL = "row_scaled_lora", "full"

ALPHA = 16.0
"""lora_alpha of every method and rank: s is α/r, and α/√r for rsLoRA."""

FP32 = Mode("fp32", False)
"""Everything in fp32: the reference of precisions, and what a CPU trains in."""


@dataclass(frozen=True)
class Arm:
    """A method at a rank; full fine-tuning has none."""

    name: str
    rank: int | None

    @property
    def scaling(self) -> float:
        assert self.rank is not None
        return ALPHA / (self.rank**0.5 if self.name == RSLORA else self.rank)

    def __str__(self) -> str:
        return self.name if self.rank is None else f"{self.name}, r={self.rank}"


def build(arm: Arm, base: nn.Module, mode: Mode, seed: int) -> nn.Module:
    """A model that computes what ``base`` does and trains what the method trains; ``base`` is not changed by training.

    ``mode`` has the dtypes: adapters in ``mode.adapter``, frozen weights in bf16, or in fp32 where all is
    (:data:`FP32`). Full fine-tuning keeps its weights in fp32, beginning at the values of ``base``. A is drawn from
    ``seed``, the same one for every method of a rank; B is zero, m the row norms of W.
    """
    frozen = torch.float32 if mode == FP32 else torch.bfloat16
    if arm.name == FULL:
        return _full(base, frozen)
    model = shared_copy(base) if frozen == _dtype(base) else copy.deepcopy(base).to(frozen)
    model.requires_grad_(False)
    model = _row_scaled(arm, model, mode) if arm.name == ROW_SCALED else _peft(arm, model, mode)
    _draw(model, seed)
    if arm.name == DORA:
        from ... import accelerate

        gpu = next(model.parameters()).is_cuda
        accelerate(model, quiet=True, precompile=gpu)  # a CPU runs the reference, for which nothing compiles
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _full(base: nn.Module, activations: torch.dtype) -> nn.Module:
    """All weights in fp32. Under autocast the residual stream stays in bf16, as that of the other methods."""
    model = copy.deepcopy(base).float().requires_grad_(True)
    if activations != torch.float32:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(activations))
    return model


def _peft(arm: Arm, model: nn.Module, mode: Mode) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=arm.rank,
        lora_alpha=ALPHA,
        target_modules=[*TARGETS],
        use_rslora=arm.name == RSLORA,
        use_dora=arm.name in (DORA, PEFT_DORA),
    )
    with next(model.parameters()).device:
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=mode.adapter == "fp32")
    return adapted


def _row_scaled(arm: Arm, model: nn.Module, mode: Mode) -> nn.Module:
    assert arm.rank is not None
    dtype = torch.float32 if mode.adapter == "fp32" else torch.bfloat16
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if name in TARGETS and isinstance(child, nn.Linear):
                setattr(parent, name, RowScaledLoRA(child, arm.rank, arm.scaling, dtype))
    return model


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Draw every A as PEFT does, uniform within ±1/√d_in, layer by layer, whatever module holds it.

    PEFT's magnitudes become the row norms in fp32. It makes them of W in bf16 and rounds them to that, which changes
    what the model computes before it is trained.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained(model).items():
        if "lora_A" in name:
            values = torch.rand(parameter.shape, generator=generator) * 2.0 - 1.0
            parameter.copy_(values / parameter.shape[1] ** 0.5)
    for module in model.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            weight: Any = module.get_base_layer().weight  # type: ignore[operator]
            magnitude.weight.copy_(torch.linalg.vector_norm(weight.float(), dim=1))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products without TensorFloat-32, for the reference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
