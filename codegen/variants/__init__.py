"""The registry of kernel variants: which algorithms an operation has, and which configs are valid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...errors import near_names
from ..gpu import Gpu
from ..spec import LAYER_BUCKETS, Config, KernelSpec, SpecError
from .adapter_backward import AdapterBackwardRows
from .base import STAGES, WARPS, LibraryCall, Variant, Work, nearest
from .compose import BackwardColumns, ForwardTile
from .compose_backward_exact import BackwardExactTiles
from .compose_library import DoraLinearLibrary, LoraComposeLibrary
from .dora_linear import DoraLinearSplitK, DoraLinearTile, DoraLinearTmaPersistent
from .dora_linear_packed import DoraLinearPacked
from .gated import SwigluBackwardColumns, SwigluBackwardTile, SwigluForwardTile, SwigluTile, SwigluTma
from .group import ComposeBackwardGroupTile, LoraComposeGroupTile
from .lora_compose import LoraComposeTile, LoraComposeTma, LoraComposeWarpSpecialized
from .packed_norm import WeightNormGroupPacked, WeightNormPacked
from .packed_norm_warp_specialized import WeightNormGroupPackedWarpSpecialized, WeightNormPackedWarpSpecialized
from .weight_dequantise import WeightDequantiseTile
from .weight_norm import WeightNormFused, WeightNormTma
from .weight_norm_exact import WeightNormExactRows
from .weight_norm_group import WeightNormGroupTiles, WeightNormGroupWarpSpecialized
from .weight_norm_library import WeightNormLibrary
from .weight_norm_warp_specialized import WeightNormWarpSpecialized

__all__ = [
    "VARIANTS",
    "LibraryCall",
    "Variant",
    "Work",
    "carried",
    "check_config",
    "default_config",
    "default_configs",
    "find_variant",
    "refuse_padding",
    "variants_of",
]

VARIANTS: tuple[Variant, ...] = (
    WeightNormFused(),
    WeightNormTma(),
    WeightNormWarpSpecialized(),
    WeightNormLibrary(),
    WeightNormPacked(),
    WeightNormPackedWarpSpecialized(),
    WeightNormExactRows(),
    WeightNormGroupTiles(),
    WeightNormGroupWarpSpecialized(),
    WeightNormGroupPacked(),
    WeightNormGroupPackedWarpSpecialized(),
    LoraComposeTile(),
    LoraComposeTma(),
    LoraComposeWarpSpecialized(),
    LoraComposeLibrary(),
    ForwardTile(),
    BackwardColumns(),
    DoraLinearTile(),
    DoraLinearTmaPersistent(),
    DoraLinearSplitK(),
    DoraLinearLibrary(),
    DoraLinearPacked(),
    BackwardExactTiles(),
    AdapterBackwardRows(),
    SwigluTile(),
    SwigluTma(),
    SwigluBackwardTile(),
    SwigluForwardTile(),
    SwigluBackwardColumns(),
    LoraComposeGroupTile(),
    ComposeBackwardGroupTile(),
    WeightDequantiseTile(),
)

MOST_CARRIED = 6
"""Configs that :func:`carried` returns at most."""

_BY_NAME = {(variant.op, variant.name): variant for variant in VARIANTS}


def variants_of(spec: KernelSpec, gpu: Gpu) -> tuple[Variant, ...]:
    """Return the variants that can run ``spec`` on ``gpu``, in the order of :data:`VARIANTS`."""
    return tuple(v for v in VARIANTS if v.op == spec.op and v.unavailable(spec, gpu) is None)


def find_variant(op: str, name: str) -> Variant:
    """Return the variant of ``op`` with this name.

    Raises:
        SpecError: ``op`` has no such variant; the message lists those it has.
    """
    variant = _BY_NAME.get((op, name))
    if variant is None:
        known = [variant.name for variant in VARIANTS if variant.op == op]
        raise SpecError(f"{op} has no variant {name!r}{near_names(name, known)} (known: {', '.join(known)})")
    return variant


def default_configs(spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
    """Return the built-in configs for ``spec`` on ``gpu``: the seeds that fit, variants in ``default_order``.

    A tiny shape that no seed fits gets the first valid config of the choices.

    Raises:
        SpecError: no config of any variant fits the GPU.
    """
    fitting = tuple(_fitting_seeds(spec, gpu))
    return fitting or (_first_valid(spec, gpu),)


def _fitting_seeds(spec: KernelSpec, gpu: Gpu) -> Iterator[Config]:
    variants = sorted(variants_of(spec, gpu), key=lambda v: v.default_order(spec))
    seen = set()
    for config in (config for variant in variants for config in variant.seeds(spec, gpu)):
        if config not in seen and check_config(spec, config, gpu) is None:
            yield config
        seen.add(config)


def _first_valid(spec: KernelSpec, gpu: Gpu) -> Config:
    variants = sorted(variants_of(spec, gpu), key=lambda v: v.default_order(spec))
    every = (config for variant in variants for config in _all_of(variant, spec, gpu))
    found = next((config for config in every if check_config(spec, config, gpu) is None), None)
    if found is None:
        raise SpecError(f"no built-in config of {spec.op} fits {gpu.slug}")
    return found


def _all_of(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Iterator[Config]:
    """Every combination of a variant's choices, valid or not."""
    choices = variant.choices(spec, gpu)
    for values in itertools.product(*choices.values()):
        yield Config.create(variant.name, **dict(zip(choices, values, strict=True)))


def default_config(spec: KernelSpec, gpu: Gpu) -> Config:
    """Return the built-in config for ``spec`` on ``gpu``: the first of :func:`default_configs`.

    Raises:
        SpecError: no config of any variant fits the GPU.
    """
    return next(_fitting_seeds(spec, gpu), None) or _first_valid(spec, gpu)


def check_config(spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
    """Return why ``config`` cannot be used for ``spec`` on ``gpu``, or None when it can.

    Checks what is known without compiling: parameter names, powers of two, the bounds of the search space, tile limits,
    shared memory.
    """
    try:
        variant = find_variant(spec.op, config.variant)
    except SpecError as error:
        return str(error)
    reason = variant.unavailable(spec, gpu)
    if reason is not None:
        return reason
    expected = variant.choices(spec, gpu).keys() - {"num_warps", "num_stages"}
    given = {name for name, _ in config.params}
    if given != expected:
        named = ", ".join(sorted(given)) or "none"
        return f"{variant.name} takes {', '.join(sorted(expected))}, got {named}"
    most = _most(variant, spec, gpu)
    for name, value in config.params:
        if name in variant.switches:
            if value > 1:
                return f"{name} must be 0 or 1, got {value}"
        elif value < 1:
            return f"{name} must be at least 1, got {value}"
        elif value & (value - 1) and name not in variant.counts:
            return f"{name} must be a power of two, got {value}"
        elif value > most[name]:
            return f"{name} must be at most {most[name]}, far beyond what a search tries, got {value}"
    if config.num_warps not in WARPS:
        return f"num_warps must be one of {', '.join(map(str, WARPS))}, got {config.num_warps}"
    if config.num_stages not in STAGES:
        return f"num_stages must be between {STAGES[0]} and {STAGES[-1]}, got {config.num_stages}"
    return variant.refuse(spec, config, gpu)


BEYOND = 4
"""A parameter may be this many times the largest value that a search tries for any shape: an earlier search space may
have been wider, but a split of thousands only allocates memory."""
_WIDE = {"d_out": 1 << 18, "d_out_2": 1 << 18, "d_out_3": 1 << 18, "d_in": 1 << 18, "rank": 1024}


@functools.lru_cache(maxsize=64)
def _most(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Mapping[str, int]:
    """The largest value of each parameter that is accepted."""
    wide: dict[str, Any] = {dim: size for dim, size in _WIDE.items() if getattr(spec, dim)}
    wide |= {"tokens": spec.most_tokens} if spec.tokens else {}
    wide |= {"layers": LAYER_BUCKETS[-1]} if spec.layers else {}
    found = [_choices(variant, each, gpu) for each in (spec, replace(spec, **wide))]
    return {name: BEYOND * max(max(choices[name]) for choices in found) for name in found[0]}


def carried(config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
    """Return the configs for ``spec`` on ``gpu`` that follow from ``config``, which did well for ``source``.

    The first is ``config`` itself, unless one of its values is no choice for ``spec``. In the others the parameters
    that are bound to the shape (:meth:`~.base.Variant.rederived`) take the values that suit ``spec``, and values that
    are no choice the nearest one that is. At most :data:`MOST_CARRIED`, valid ones only; none where ``source`` says
    nothing of ``spec`` (:meth:`~.base.Variant.carries`).

    Raises:
        SpecError: ``config`` is of no variant of ``spec.op``, or its parameters are not those of the variant.
    """
    variant = find_variant(spec.op, config.variant)
    if variant.unavailable(spec, gpu) is not None or not variant.carries(source, spec):
        return ()
    choices = _choices(variant, spec, gpu)
    given = {**dict(config.params), "num_warps": config.num_warps, "num_stages": config.num_stages}
    if given.keys() != choices.keys():
        raise SpecError(f"{variant.name} takes {', '.join(sorted(choices))}, got {', '.join(sorted(given))}")
    kept = {
        name: value if value in choices[name] or not value else nearest(choices[name], value)
        for name, value in given.items()
    }
    found = dict.fromkeys([config] if kept == given else [])
    for values in variant.rederived(config, source, spec, gpu):
        found[Config.create(variant.name, **{**kept, **values})] = None
    return tuple(each for each in found if check_config(spec, each, gpu) is None)[:MOST_CARRIED]


@functools.lru_cache(maxsize=64)
def _choices(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
    """The values of each parameter that a search would try: the variant's choices, and those of its seeds."""
    values = {name: dict.fromkeys(given) for name, given in variant.choices(spec, gpu).items()}
    for seed in variant.seeds(spec, gpu):
        for name, value in (*seed.params, ("num_warps", seed.num_warps), ("num_stages", seed.num_stages)):
            values[name][value] = None
    return {name: tuple(given) for name, given in values.items()}


def refuse_padding(spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
    """Return why a config tuned for more tokens wastes most of its tiles on padding at ``spec.tokens``, or None."""
    given = dict(config.params).get("block_t", 0)
    most = max(find_variant(spec.op, config.variant).choices(spec, gpu).get("block_t", (given,)))
    return f"block_t must be at most {most} for {spec.tokens} tokens, got {given}" if given > most else None
