"""Hypothesis strategies for specs and configs: what they draw is valid and accepted, so no draw tests nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping

from hypothesis import assume
from hypothesis import strategies as st

from doratune.codegen.gpu import ARCHITECTURES, Gpu, find_gpu, known_gpus
from doratune.codegen.ops import DTYPE_BYTES, OPS
from doratune.codegen.spec import LAYER_BUCKETS, TOKEN_BUCKETS, Config, KernelSpec
from doratune.codegen.variants import Variant, check_config

from .specs import read_by

GPUS = (*known_gpus(), *(find_gpu(architecture) for architecture in ARCHITECTURES))


@st.composite
def flags_of(draw: st.DrawFn, op: str) -> dict[str, bool]:
    """Flags of an operation in a combination that a spec allows; ``autocast`` goes with the dtypes and is left out."""
    flags = {flag: draw(st.booleans()) for flag in OPS[op].flags if flag != "autocast"}
    if flags.get("bias"):
        flags |= {flag: False for flag in ("delta", "output") if flag in flags}
    if flags.get("gelu"):
        flags["gelu_tanh"] = False
    return flags


@functools.cache
def _served(variant: Variant) -> tuple[tuple[str, str, str, bool], ...]:
    """The (GPU, dtype, adapter dtype, autocast) that a variant serves where the sizes suit it."""
    sizes = {"d_out": 1024, "d_in": 1024, "rank": 64, "tokens": 128}
    served = []
    for gpu, dtype, exact, autocast in itertools.product(GPUS, DTYPE_BYTES, (False, True), (False, True)):
        if autocast and not (exact and dtype != "fp32" and "autocast" in OPS[variant.op].flags):
            continue
        dtypes = {"dtype": dtype, "adapter": "fp32" if exact else dtype}
        spec = KernelSpec.create(variant.op, **read_by(variant, sizes | dtypes), autocast=autocast, gpu=gpu.slug)
        if variant.unavailable(spec, gpu) is None:
            served.append((gpu.slug, dtype, dtypes["adapter"], autocast))
    return tuple(served)


@st.composite
def specs_served_by(draw: st.DrawFn, variant: Variant) -> KernelSpec:
    """A spec of any size, dtypes and flags that ``variant`` can run on the spec's GPU."""
    gpu, dtype, adapter, autocast = draw(st.sampled_from(_served(variant)))
    even = variant.descriptors or draw(st.booleans())

    def size(longest: int, step: int = 8) -> int:
        return step * draw(st.integers(1, longest // step)) if even else draw(st.integers(1, longest))

    equal_shares = variant.library and variant.op == "weight_norm"  # cuBLAS's batched products take no others
    whole_steps = variant.packed and variant.descriptors  # 64 columns are decoded at a time
    step = 128 if equal_shares else 64 if whole_steps else 0
    spec = KernelSpec.create(
        variant.op,
        d_out=size(16384),
        d_in=step * draw(st.integers(1, 16384 // step)) if step else size(16384),
        rank=size(1024),
        layers=draw(st.sampled_from(LAYER_BUCKETS)),
        **read_by(variant, {"dtype": dtype, "tokens": draw(st.sampled_from(TOKEN_BUCKETS))}),
        adapter=adapter,
        magnitude=draw(st.sampled_from([None, "fp32", "bf16"])),
        gpu=gpu,
        **({"autocast": True} if autocast else {}),
        **draw(flags_of(variant.op)),
    )
    assume(variant.unavailable(spec, find_gpu(gpu)) is None)
    return spec


@st.composite
def accepted_configs(
    draw: st.DrawFn,
    start: Config,
    choices: Mapping[str, tuple[int, ...]],
    accepts: Callable[[Config], bool],
) -> Config:
    """``start`` with a drawn value for each of its parameters, in a drawn order, where the config stays accepted."""
    config = start
    for name in draw(st.permutations(sorted(choices))):
        values = {**dict(config.params), "num_warps": config.num_warps, "num_stages": config.num_stages}
        changed = Config.create(config.variant, **{**values, name: draw(st.sampled_from(choices[name]))})
        config = changed if accepts(changed) else config
    return config


@st.composite
def kernels(draw: st.DrawFn, variant: Variant) -> tuple[KernelSpec, Config]:
    """A spec that ``variant`` serves and any of the configs that its GPU accepts."""
    spec = draw(specs_served_by(variant))
    gpu: Gpu = find_gpu(spec.gpu)
    fitting = [config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None]
    assume(fitting)
    choices = variant.choices(spec, gpu)
    start = draw(st.sampled_from(fitting))
    return spec, draw(accepted_configs(start, choices, lambda config: check_config(spec, config, gpu) is None))
