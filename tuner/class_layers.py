"""The linear layers of a config's model: those of transformers' own class for it, built on the meta device.

Each says whether PEFT can put a DoRA adapter on it, or why not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .meta_model import build_model, version
from .projections import EXPERTS, HEAD, LeftOut, Model, ModelConfigError, Projection, activation_in

_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""PEFT refuses adapters on ``out_proj`` of these (``_check_lora_target_modules_mamba``)."""

_EXPERTS_NAMES = {"gate_proj", "up_proj", "down_proj"}
"""Names of dense layers and shared experts that PEFT may take for the experts' (``_MOE_TARGET_MODULE_MAPPING``)."""

_TASK_HEADS = {
    "ForSequenceClassification": ("classifier", "score"),
    "ForTokenClassification": ("classifier", "score"),
    "ForQuestionAnswering": ("qa_outputs",),
}
"""The heads that PEFT trains whole for these tasks (``modules_to_save``), so that they get no adapter."""


class _Weight(NamedTuple):
    """A linear layer, or a bare parameter (``linear`` false), and why it gets no adapter, if so."""

    name: str
    shape: tuple[int, ...]
    bias: bool
    linear: bool
    why: str = ""


def list_layers(config: Mapping[str, Any], name: str) -> Model:
    """List the linear layers of the class that transformers has for ``config``, the content of a ``config.json``.

    Raises:
        ModelConfigError: as :func:`~.meta_model.build_model`, or the class has no linear layer.
    """
    built = build_model(config)
    projections, left_out = _group(_weights(built.model))
    if not projections and not left_out:
        raise ModelConfigError(
            f"{built.cls}{built.how} has no linear layer in transformers {version()}; name the model's class in the "
            "field architectures"
        )
    notes = [f"the layers of transformers {version()}'s {built.cls}{built.how}", *built.notes]
    if {layer.why for layer in left_out} & {EXPERTS} and {layer.name for layer in projections} & _EXPERTS_NAMES:
        notes.append(
            "PEFT 0.21 takes gate_proj, up_proj, down_proj and all-linear for the fused experts in some models, and "
            "then refuses DoRA: where it does, leave these names out of target_modules"
        )
    text = built.model.config.get_text_config()
    activation = activation_in({field: getattr(text, field, None) for field in ("hidden_activation", "hidden_act")})
    return Model(name, "", built.decoder_layers, projections, tuple(notes), left_out, activation)


def _weights(model: Any) -> Iterator[_Weight]:
    """All linear layers and bare weights, by their full names."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, task_heads = _output_head(model), _task_heads(type(model).__name__)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D):
            shape = tuple(module.weight.shape)
            shape = shape[::-1] if isinstance(module, Conv1D) else shape
            why = ""
            if module is head:
                why = HEAD
            elif task_heads & set(name.split(".")):
                why = "the task's head, which PEFT trains whole"
            elif isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
                why = "nn.MultiheadAttention reads its weight and never calls it"
            elif name.endswith(".out_proj") and getattr(model.config, "model_type", "") in _MAMBA_TYPES:
                why = "PEFT refuses adapters on out_proj of Mamba models"
            elif not _is_product(module, shape):
                why = f"{type(module).__name__} is not x·Wᵀ + b, which DoRA is for"
            yield _Weight(name, shape, module.bias is not None, True, why)
        elif isinstance(module, nn.MultiheadAttention):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2 and own.endswith("weight"):
                    why = "a weight of nn.MultiheadAttention, on which PEFT has no DoRA"
                    yield _Weight(f"{name}.{own}", tuple(parameter.shape), False, False, why)
        elif not _is_torchs(module):
            yield from _bare_weights(name, module)


def _output_head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except Exception:  # some classes have none and say so by raising
        return None


def _task_heads(cls: str) -> set[str]:
    return {head for suffix, heads in _TASK_HEADS.items() if cls.endswith(suffix) for head in heads}


def _is_torchs(module: Any) -> bool:
    """Whether a module is a layer of torch.nn or derives from one: its parameters are no bare weights."""
    from torch import nn

    return any(
        base.__module__.startswith("torch.nn.modules.") and base is not nn.Module for base in type(module).__mro__
    )


def _bare_weights(name: str, module: Any) -> Iterator[_Weight]:
    """Matrices that are no layer: fused experts above all."""
    experts = "expert" in type(module).__name__.lower()
    for own, parameter in module.named_parameters(recurse=False):
        shape, full = tuple(parameter.shape), f"{name}.{own}" if name else own
        if own.endswith("bias") or "embed" in own or min(shape, default=0) < 2:
            continue
        if experts and len(shape) >= 2:
            yield _Weight(full, shape, False, False, EXPERTS)
        elif len(shape) == 3:
            yield _Weight(full, shape, False, False, "a parameter and no layer: PEFT refuses DoRA on parameters")


def _is_product(module: Any, shape: tuple[int, ...]) -> bool:
    """Whether a layer maps [.., d_in] to [.., d_out], as PEFT takes for granted.

    Routers derive from nn.Linear and return several tensors, grouped layers take other shapes: a call on the meta
    device tells, and costs nothing.
    """
    import torch
    from torch import nn

    if len(shape) != 2 or min(shape) < 1:
        return False
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    try:
        y = module(torch.empty(2, shape[1], dtype=module.weight.dtype, device="meta"))
    except Exception:
        return False
    return isinstance(y, torch.Tensor) and tuple(y.shape) == (2, shape[0])


def _group(weights: Iterable[_Weight]) -> tuple[tuple[Projection, ...], tuple[LeftOut, ...]]:
    """Equal layers as one entry, in the order in which they first come in the model."""
    groups: dict[_Weight, list[str]] = {}
    for weight in weights:
        groups.setdefault(weight._replace(name=_short(weight.name)), []).append(weight.name)
    projections, left_out = [], []
    for (name, shape, bias, linear, why), modules in groups.items():
        if why:
            left_out.append(LeftOut(name, shape, bias, len(modules), linear, why, tuple(modules)))
        else:
            projections.append(Projection(name, shape[0], shape[1], bias, len(modules), tuple(modules)))
    return tuple(projections), tuple(left_out)


def _short(full: str) -> str:
    """The end of a layer's name from its last word on, with the number of a nameless layer: ``q_proj``, ``mlp.0``."""
    words = list(re.finditer(r"(?:^|(?<=\.))[^.]*[^.\d][^.]*", full))
    if not words:
        return full
    last = words[-1]
    numbers = full[last.end() :].split(".")[1:]
    return ".".join([last.group(), *("*" for _ in numbers[:-1]), *numbers[-1:]])


def list_projections(model: Any) -> list[str]:
    """The full names of the layers of ``model`` that PEFT can put a DoRA adapter on."""
    return [weight.name for weight in _weights(model) if not weight.why and weight.linear]
