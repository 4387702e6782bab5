"""The registry of kernel variants: which algorithms an operation has, and which configs are valid."""

from __future__ import annotations

from ...errors import near_names
from ..gpu import Gpu
from ..spec import Config, KernelSpec, SpecError
from .adapter_backward import AdapterBackwardRows
from .base import STAGES, WARPS, LibraryCall, Variant, Work
from .compose import BackwardColumns, ForwardTile
from .compose_backward_exact import BackwardExactTiles
from .compose_library import DoraLinearLibrary, LoraComposeLibrary
from .dora_linear import DoraLinearSplitK, DoraLinearTile, DoraLinearTmaPersistent
from .lora_compose import LoraComposeTile, LoraComposeTma, LoraComposeWarpSpecialized
from .weight_norm import WeightNormFused, WeightNormTma
from .weight_norm_exact import WeightNormExactRows
from .weight_norm_library import WeightNormLibrary
from .weight_norm_warp_specialized import WeightNormWarpSpecialized

__all__ = [
    "VARIANTS",
    "LibraryCall",
    "Variant",
    "Work",
    "check_config",
    "default_config",
    "find_variant",
    "refuse_padding",
    "variants_of",
]

VARIANTS: tuple[Variant, ...] = (
    WeightNormFused(),
    WeightNormTma(),
    WeightNormWarpSpecialized(),
    WeightNormLibrary(),
    WeightNormExactRows(),
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
    BackwardExactTiles(),
    AdapterBackwardRows(),
)


def variants_of(spec: KernelSpec, gpu: Gpu) -> tuple[Variant, ...]:
    """Return the variants that can run ``spec`` on ``gpu``, in the order of :data:`VARIANTS`."""
    return tuple(v for v in VARIANTS if v.op == spec.op and v.unavailable(spec, gpu) is None)


def find_variant(op: str, name: str) -> Variant:
    """Return the variant of ``op`` with this name.

    Raises:
        SpecError: ``op`` has no such variant; the message lists those it has.
    """
    known = {variant.name: variant for variant in VARIANTS if variant.op == op}
    if name not in known:
        raise SpecError(f"{op} has no variant {name!r}{near_names(name, known)} (known: {', '.join(known)})")
    return known[name]


def default_config(spec: KernelSpec, gpu: Gpu) -> Config:
    """Return the built-in config for ``spec`` on ``gpu``: the first seed that fits, variants in ``default_order``.

    Raises:
        SpecError: no seed of any variant fits the GPU.
    """
    for variant in sorted(variants_of(spec, gpu), key=lambda v: v.default_order(spec)):
        for config in variant.seeds(spec, gpu):
            if check_config(spec, config, gpu) is None:
                return config
    raise SpecError(f"no built-in config of {spec.op} fits {gpu.slug}")


def check_config(spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
    """Return why ``config`` cannot be used for ``spec`` on ``gpu``, or None when it can.

    Checks what is known without compiling: parameter names, powers of two, tile limits, shared memory.
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
    for name, value in config.params:
        if name in variant.switches:
            if value > 1:
                return f"{name} must be 0 or 1, got {value}"
        elif value < 1:
            return f"{name} must be at least 1, got {value}"
        elif value & (value - 1) and name not in variant.counts:
            return f"{name} must be a power of two, got {value}"
    if config.num_warps not in WARPS:
        return f"num_warps must be one of {', '.join(map(str, WARPS))}, got {config.num_warps}"
    if config.num_stages not in STAGES:
        return f"num_stages must be between {STAGES[0]} and {STAGES[-1]}, got {config.num_stages}"
    return variant.refuse(spec, config, gpu)


def refuse_padding(spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
    """Return why a config tuned for more tokens wastes most of its tiles on padding at ``spec.tokens``, or None."""
    given = dict(config.params).get("block_t", 0)
    most = max(find_variant(spec.op, config.variant).choices(spec, gpu).get("block_t", (given,)))
    return f"block_t must be at most {most} for {spec.tokens} tokens, got {given}" if given > most else None
