"""``accelerate`` and ``restore``: replace PEFT's variant by doratune's in each layer and adapter, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...runtime.arguments import ArgumentError
from ...runtime.device import gpu_of
from .report import KERNELS, PEFT, PENDING, REFERENCE, Layer, Report
from .versions import check_peft

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

    from .examine import DoraLayer
    from .variant import DoraVariant

_COMPOSITION = ("lora_compose", "compose_backward")
_DEFERRED = "its format is looked at in the first forward pass"
_LARGE_ON_A_CPU = 1 << 22
"""Elements of a quantised W, from which its product on a CPU, needed to recognise its format, takes long."""


def accelerate(model: nn.Module, *, norm_reuse: str = "auto", precompile: bool = True, quiet: bool = False) -> Report:
    """Run the DoRA layers of a PEFT model on doratune, and report what runs each of them.

    It replaces only PEFT's variant hooks. Parameters, state dicts, saving and ``disable_adapter`` stay PEFT's; merging
    does too, except that zero rows do not become NaN. Adapters that PEFT adds to these layers later, or initialises
    again, are accelerated as well. Call it before or after loading weights, and before wrapping the model (DDP, FSDP).
    Call it again when more layers have adapters, or to change ``norm_reuse``. :func:`restore` undoes it.

    CPU tensors run the eager reference. A call that doratune does not support runs PEFT's own code, and one warning per
    reason says why. Recorded graphs (``torch.jit.trace``, ``torch.onnx.export``) contain PEFT's code. A
    ``ZeroRowsWarning`` names the layers with zero rows of W + sBA, for which PEFT computes NaN.

    Args:
        model: any module that contains PEFT LoRA layers, e.g. a ``PeftModel``.
        norm_reuse: a policy of :class:`~doratune.nn.norm_cache.NormCache`: ``auto`` (in checkpoint recomputes),
            ``tracked`` (also from one forward to the next) or ``off``.
        precompile: compile the kernels in parallel at the beginning of the first forward pass, where they are not
            stored. Otherwise each compiles at its first launch, one after another.
        quiet: do not print the report.

    Raises:
        PeftVersionError: PEFT is missing, or its version is not tested.
        ArgumentError: ``model`` is not a ``torch.nn.Module``.
        NormReuseError: an unknown ``norm_reuse``.
    """
    lora_layers = list(_lora_layers(model))
    from peft.tuners.lora.variants import DoraLinearVariant

    from .base_layers import NotNow
    from .examine import examine
    from .first_step import add_first_step, remove_first_step
    from .passes import install, pass_over, remove
    from .resolve import VariantResolver, cast_no_input
    from .variant import DoraVariant
    from .zero_rows import count_zero_rows, warn_of_zero_rows

    layers: list[Layer] = []
    zero_rows: list[tuple[str, str, torch.Tensor | None]] = []
    for name, module in lora_layers:
        for adapter in _dora_adapters(module):
            variant = DoraVariant(name, norm_reuse)
            if not _is_linear(module, adapter):
                layers.append(Layer(name, adapter, type(module).__name__, PEFT, remark="not a linear layer"))
                continue
            found = examine(module, adapter)
            if isinstance(found, str) and not isinstance(found, NotNow):
                module.lora_variant[adapter] = DoraLinearVariant()
                layers.append(Layer(name, adapter, type(module.get_base_layer()).__name__, PEFT, remark=found))
                continue
            module.lora_variant[adapter] = variant
            cast_no_input(module)
            layers.append(_describe(name, adapter, module, found, variant))
            if not isinstance(found, str) and not module.merged:
                zero_rows.append((name, adapter, count_zero_rows(found)))
    if layers:
        for name, module in lora_layers:
            module.resolve_lora_variant = VariantResolver(module, name, norm_reuse)
        _run_together(model)
        remove_first_step(model)
        remove(model)
        if precompile:
            add_first_step(model)  # before the passes, which launch some of its kernels
        install(model)
    warn_of_zero_rows(zero_rows)
    deferred = any(layer.remark == _DEFERRED for layer in layers)
    report = Report(tuple(layers), () if deferred else pass_over(model).sizes)
    if not quiet:
        print(report)
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: PEFT runs every DoRA layer of ``model`` again.

    Unmerge merged layers with zero magnitudes before: PEFT's unmerge would make NaN of those rows, and a warning says
    so.

    Raises:
        PeftVersionError: PEFT is missing, or its version is not tested.
        ArgumentError: ``model`` is not a ``torch.nn.Module``.
    """
    lora_layers = _lora_layers(model)
    from peft.tuners.lora.variants import DoraLinearVariant

    from .first_step import remove_first_step
    from .gated import GatedMlp
    from .merge import holds_rows
    from .passes import remove
    from .swapped import state_of, unswap
    from .variant import DoraVariant

    held = []
    remove(model)
    remove_first_step(model)
    for name, module in lora_layers:
        for adapter, variant in module.lora_variant.items():
            if isinstance(variant, DoraVariant):
                module.lora_variant[adapter] = DoraLinearVariant()
                if holds_rows(module, adapter):
                    held.append(f"{name} (adapter {adapter})")
        unswap(module)
        module.__dict__.pop("_cast_input_dtype", None)
        module.__dict__.pop("resolve_lora_variant", None)
    for module in model.modules():
        if state_of(module, GatedMlp) is not None:
            unswap(module)
    if held:
        warnings.warn(
            f"{len(held)} restored layers are merged and have rows with zero magnitude; the first is {held[0]}. "
            "PEFT's unmerge makes NaN of these rows. Call doratune.accelerate(model) again before you unmerge.",
            stacklevel=2,
        )


_QUANTISED = ("peft.tuners.lora.bnb", "peft.tuners.lora.hqq", "peft.tuners.lora.torchao")
"""PEFT's modules with layers over a quantised W."""


def _run_together(model: nn.Module) -> None:
    """Let layers run by themselves, in groups with their siblings, and dense gated MLPs with their activation."""
    from peft.tuners.lora.layer import Linear

    from . import gated, projections, stored_place
    from .swapped import plain_class, swap

    for parent in list(model.modules()):
        children = [child for child in parent._modules.values() if child is not None]
        siblings, quantised = projections.Siblings(), projections.Siblings()
        for child in children:
            if plain_class(child) is Linear:
                swap(child, projections.forward, projections.Place(siblings))
            elif plain_class(child).__module__ in _QUANTISED:
                swap(child, stored_place.forward, stored_place.StoredPlace(quantised))
        mlp = gated.read_gated(parent)
        if mlp is not None and plain_class(parent._modules[mlp.form.gate]) is Linear:  # type: ignore[arg-type]
            swap(parent, gated.forward, mlp)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the PEFT model itself")
    check_peft()
    from peft.tuners.lora.layer import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _dora_adapters(module: LoraLayer) -> list[str]:
    return [adapter for adapter, uses in module.use_dora.items() if uses]


def _is_linear(module: LoraLayer, adapter: str) -> bool:
    from peft.tuners.lora.variants import DoraLinearVariant

    from .variant import DoraVariant

    return type(module.lora_variant.get(adapter)) in (DoraLinearVariant, DoraVariant)


def _describe(name: str, adapter: str, module: LoraLayer, found: DoraLayer | str, variant: DoraVariant) -> Layer:
    if isinstance(found, str):
        return Layer(name, adapter, type(module.get_base_layer()).__name__, PENDING, remark=f"now {found}")
    base = found.base
    form = remark = ""
    if base.matrix is None and base.weight.device.type == "cpu" and base.weight.numel() > _LARGE_ON_A_CPU:
        remark = _DEFERRED
    elif base.matrix is None:
        stored = variant.stored_of(found)
        if isinstance(stored, str):
            remark = f"its norm through its own forward: {stored}"
        else:
            form = str(stored.form)
    if not _has_kernels(base.weight):
        return Layer(name, adapter, base.kind, REFERENCE, (), remark, form)
    kernels = _COMPOSITION if base.matrix is None and not form else ("weight_norm", *_COMPOSITION)
    return Layer(name, adapter, base.kind, KERNELS, kernels, remark, form)


def _has_kernels(weight: torch.Tensor) -> bool:
    from ...codegen.gpu import UnknownGpuError

    if weight.device.type != "cuda" or weight.dtype is torch.float64:
        return False
    try:
        gpu_of(weight.device)
    except UnknownGpuError:
        return False
    return True
