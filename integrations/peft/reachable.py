"""Every kernel that a PEFT model's DoRA layers may launch, found on any machine by running their code without values.

The layers run as in a first step's preparation (:mod:`.first_step`), but in every way in which a user may run them:
in groups, as gated MLPs and alone; in training, in inference, and in the passes of checkpoints; with autocast and
without; with dropout, with trained biases, with hooks; with norms from a pass over all layers, over some of them, or of
their own. So the list holds more than any one run launches. A quantised model's is that of the dense one, and what
reads its weight format: norms, the decoding of W, and fused kernels for few tokens (:mod:`.reachable_norms`).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...codegen.ops import APART_TOKENS, IN_PLACE_RANK, IN_PLACE_TOKENS
from ...codegen.spec import KernelSpec
from ...codegen.weight_formats import parse_format
from ...nn import kernels
from ...nn.group_plan import MOST_PROJECTIONS
from ...nn.rehearsal import META, Part, _form_of, rehearsing, requests_of
from ...runtime.absent import ABSENT, NO_FUSION_PAYS
from .first_step import (
    _activation_dtype,
    _dense_bases,
    _in_a_pass,
    _parts,
    _Together,
    accelerated_layers,
)
from .gated import GatedMlp
from .passes import pass_over
from .projections import Place
from .reachable_norms import stored_norm_requests, stored_product_specs
from .swapped import state_of
from .variant import DoraVariant

_HALVES = (torch.bfloat16, torch.float16)
_DROPOUT = 0.1

COUNTS = (1, 16)
"""One token, as in decoding, and several."""

_log = logging.getLogger("doratune")


def reachable_specs(
    model: nn.Module, tokens: Sequence[int], counts: Sequence[int] = COUNTS, *, weight: str | None = None
) -> list[KernelSpec]:
    """The specs of all kernels that ``model`` may launch, sorted by their text.

    Their GPU is :data:`~doratune.runtime.absent.GPU`. Those of ``dora_linear_forward`` are launched only where a store
    says that the fusion pays.

    Args:
        model: a PEFT model on the meta device, after :func:`doratune.accelerate` with ``precompile=False``.
        tokens: the buckets of the numbers of tokens of a call.
        counts: the numbers of tokens with which the layers run. What they ask for is the same for all other numbers,
            except for the bucket in its spec, and for layers of many ranks: these also run with more tokens.
        weight: the weight format in which the base layers store W, with the dtype of its values, such as
            ``nf4.nested``. Then the list is that of layers stored so and of dense ones: some may be left dense. It is
            also that of magnitudes in fp32: PEFT makes them so from a W that it dequantises, also beside 16-bit
            adapters. So the model's magnitudes are fp32 afterwards.
    """
    found = _specs(model, tokens, counts, weight)
    if weight is not None and _widen_magnitudes(model):
        found |= _specs(model, tokens, counts, weight)
    return sorted(found, key=str)


def _specs(
    model: nn.Module, tokens: Sequence[int], counts: Sequence[int], weight: str | None
) -> dict[KernelSpec, None]:
    layers = _distinct(accelerated_layers(model))
    autocasts = _autocasts(layers)
    for rounded in autocasts:
        with _autocast(rounded):
            _call(model)
    together = [*_distinct_parts(_parts(model)), *map(_part_of, _distinct_groups(_groups(model)))]
    alone = [[_part_of_layer(layer) for layer in change(layers)] for change in _CHANGES]
    alike = [*_alike(layers, tokens, counts)]
    found: dict[KernelSpec, None] = {}
    for device in ABSENT:
        kernels.paying_kernel_for.cache_clear()  # on the meta device it keeps what the first rehearsal was told
        how: dict[str, Any] = {"device": device, "stand_ins": _dense_bases}
        for rounded, train, (count, buckets) in itertools.product(autocasts, (True, False), alike):
            with _autocast(rounded):
                requests = [*requests_of(together, count, train=train, around=_in_a_pass, **how)]
                for parts in alone:
                    requests += requests_of(parts, count, train=train, **how)
            found |= dict.fromkeys(
                replace(kernel.spec, tokens=bucket)
                for kernel, _ in requests
                for bucket in (buckets if kernel.spec.tokens else [0])
            )
    kernels.paying_kernel_for.cache_clear()
    for rounded in autocasts:
        with _autocast(rounded), rehearsing(NO_FUSION_PAYS):
            requests = [*pass_over(model).requests(NO_FUSION_PAYS, parts=True)]
            if weight is not None:
                requests += stored_norm_requests(accelerated_layers(model), parse_format(weight))
        found |= dict.fromkeys(kernel.spec for kernel, _ in requests)
    if weight is not None:
        found |= dict.fromkeys(stored_product_specs(accelerated_layers(model), parse_format(weight), tokens))
    return found


def _alike(
    layers: Iterable[LoraLayer], tokens: Sequence[int], counts: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Numbers of tokens to run the layers with, and the buckets for which they ask for the same kernels."""
    ranks = [rank for layer in layers for rank in layer.r.values()]
    bounds = (0, IN_PLACE_TOKENS, APART_TOKENS) if max(ranks, default=0) > IN_PLACE_RANK else (0,)
    for least, most in zip(bounds, (*bounds[1:], math.inf), strict=True):
        buckets = [bucket for bucket in tokens if least < bucket <= most]
        if buckets:
            yield from ((count, buckets) for count in (buckets[:1] if least else counts))


def _widen_magnitudes(model: nn.Module) -> bool:
    """Make the magnitudes fp32; say whether one was not."""
    found = False
    for layer in accelerated_layers(model):
        for magnitude in layer.lora_magnitude_vector.values():
            parameter = cast("nn.Parameter", magnitude.weight)
            found |= parameter.dtype is not torch.float32
            parameter.data = parameter.data.float()
    return found


def _distinct(layers: Iterable[LoraLayer]) -> list[LoraLayer]:
    """One layer of each form."""
    known: dict[Hashable, LoraLayer] = {}
    for layer in layers:
        known.setdefault(_form_of(layer), layer)
    return [*known.values()]


def _distinct_parts(parts: Iterable[Part]) -> list[Part]:
    known: dict[Hashable, Part] = {}
    for part in parts:
        known.setdefault(_form_of(part.module), part)
    return [*known.values()]


def _distinct_groups(groups: Iterable[tuple[LoraLayer, ...]]) -> list[tuple[LoraLayer, ...]]:
    known: dict[Hashable, tuple[LoraLayer, ...]] = {}
    for group in groups:
        known.setdefault(tuple(map(_form_of, group)), group)
    return [*known.values()]


# The ways in which a layer runs alone.


def _as_it_is(layers: Sequence[LoraLayer]) -> list[LoraLayer]:
    return [*layers]


def _changed(change: Callable[[LoraLayer], None]) -> Callable[[Sequence[LoraLayer]], list[LoraLayer]]:
    def changed(layers: Sequence[LoraLayer]) -> list[LoraLayer]:
        copies = [copy.deepcopy(layer) for layer in layers]
        for layer in copies:
            change(layer)
        return copies

    return changed


def _drop(layer: LoraLayer) -> None:
    layer.train()
    for adapter in layer.lora_dropout:
        layer.lora_dropout[adapter] = nn.Dropout(_DROPOUT)


def _hook(layer: LoraLayer) -> None:
    """A hook may do anything, so PEFT's forward pass runs, with doratune's composition."""
    layer.get_base_layer().register_forward_hook(_nothing)


def _nothing(*_: object) -> None: ...


def _train_bias(layer: LoraLayer) -> None:
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is not None:
        bias.requires_grad_(True)


def _track(layer: LoraLayer) -> None:
    for variant in layer.lora_variant.values():
        if isinstance(variant, DoraVariant):
            variant.norms.reuse = "tracked"


def _hook_and_train_bias(layer: LoraLayer) -> None:
    _hook(layer)
    _train_bias(layer)


_CHANGES = (_as_it_is, *map(_changed, (_drop, _hook, _train_bias, _hook_and_train_bias, _track)))


# The groups in which layers run.


def _groups(model: nn.Module) -> Iterator[tuple[LoraLayer, ...]]:
    """The layers that read the same x: as a call of the model has shown, and those that may do so where none has."""
    known: set[tuple[int, ...]] = set()
    for parent in model.modules():
        children = [each for each in parent.children() if isinstance(each, LoraLayer)]
        placed = [(state_of(each, Place), each) for each in children]
        for group in (*_seen(placed), *_possible(parent, placed)):
            if (ids := tuple(map(id, group))) not in known:
                known.add(ids)
                yield group


def _seen(placed: Sequence[tuple[Place | None, LoraLayer]]) -> Iterator[tuple[LoraLayer, ...]]:
    for place, _ in placed:
        group = () if place is None else place.siblings.layers_of(place)
        if group:
            yield group


def _possible(parent: nn.Module, placed: Sequence[tuple[Place | None, LoraLayer]]) -> Iterator[tuple[LoraLayer, ...]]:
    """The groups that a gated MLP may form where it does not run as one, and those of layers that were not called."""
    mlp = state_of(parent, GatedMlp)
    if mlp is not None:
        gate, up = parent._modules.get(mlp.form.gate), parent._modules.get(mlp.form.up)
        yield cast("tuple[LoraLayer, ...]", (gate, up))
        return
    waiting = [layer for place, layer in placed if place is not None and not place.siblings.called]
    for start in range(len(waiting)):
        for end in range(start + 2, min(start + MOST_PROJECTIONS, len(waiting)) + 1):
            group = waiting[start:end]
            if len({layer.in_features for layer in group}) > 1:
                break
            yield tuple(group)


def _part_of_layer(layer: LoraLayer) -> Part:
    return Part(layer, layer.in_features, _activation_dtype(layer))


def _part_of(group: Sequence[LoraLayer]) -> Part:
    return Part(_Together(group), group[0].in_features, _activation_dtype(group[0]))


def _call(model: nn.Module) -> None:
    """Call the model once, so that its layers see which of them read the same x. Some models cannot be called so."""
    try:
        with torch.no_grad(), rehearsing(NO_FUSION_PAYS):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=META))
    except Exception as problem:
        _log.info("a %s cannot be called without values: %r", type(model).__name__, problem)


# Autocast.


def _autocasts(layers: Iterable[LoraLayer]) -> list[torch.dtype | None]:
    """The dtypes of autocast under which these layers may run, and None for none."""
    weights = {getattr(layer.get_base_layer().weight, "dtype", None) for layer in layers}
    return [None, *(half for half in _HALVES if half in weights or (half is _HALVES[0] and torch.float32 in weights))]


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast on GPUs to ``dtype``, or none. PyTorch's own refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
