"""Run emitted kernels in Triton's interpreter: the variants, specs and configs to run, and the tuner's judgement."""

from __future__ import annotations

import functools

from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import load_module
from doratune.codegen.ops import OPS
from doratune.codegen.render import Source
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

GPU = find_gpu("h200")
LAYERS = 3
"""Layers of a grouped operation's inputs at most."""
INTERPRETED = [variant for variant in VARIANTS if variant.interpreted and not variant.packed]
PACKED = [variant for variant in VARIANTS if variant.packed]
"""The variants for weight formats: test_packed.py and test_packed_linear.py run them."""
IDS = {variant: f"{variant.op}-{variant.name}" for variant in (*INTERPRETED, *PACKED)}


def forms(op: str) -> list[dict[str, object]]:
    """The operation plain, with each flag, and with each optional operand."""
    contract = OPS[op]
    return [{}, *({flag: True} for flag in contract.flags), *({role: "fp32"} for role in contract.optional_dtypes)]


def small_config(variant: Variant, spec: KernelSpec) -> Config:
    """A config whose tiles are smaller than the shapes of these tests, so that every loop runs more than once.

    But not much smaller: the interpreter's time goes by programs and steps, not by elements.
    """
    ranks = variant.op.startswith("weight_norm")  # there block_n is of ranks
    least = {"block_t": 8, "block_m": 32, "block_n": 16 if ranks else 32}
    if variant.op == "compose_backward_exact":
        least["block_k"] = 32
    params = {
        name: next((value for value in values if value >= least.get(name, 0)), values[-1])
        for name, values in variant.choices(spec, GPU).items()
    }
    params |= {"num_warps": 2, "num_stages": 2}
    if "split_k" in params:
        params["split_k"] = 2
    if "gram_split" in params:
        params["gram_split"] = 3 if spec.d_in % 3 == 0 else 2
    if "programs" in params:
        params["programs"] = 2
    if "chunk" in params:
        params["chunk"] = params["block_t"] * 4
    return Config.create(variant.name, **params)


def interpretable(config: Config) -> Config:
    """The same config without dependent launches, which the interpreter does not know."""
    params = {name: 0 if name == "overlap" else value for name, value in config.params}
    return Config.create(config.variant, num_warps=config.num_warps, num_stages=config.num_stages, **params)


def spec_of(op: str, dtype: str, adapter: str | None = None, **values: object) -> KernelSpec:
    # An exact norm's rows are redone one after another, which takes the interpreter long.
    dims = {"d_out": 40 if op == "weight_norm_exact" else 80, "d_in": 144, "rank": 24, "tokens": 128, "layers": 4}
    adapter = adapter or ("fp32" if values.get("autocast") else dtype)  # only fp32 adapters are rounded
    return KernelSpec.create(op, **{**dims, "dtype": dtype, "adapter": adapter, "gpu": "h200", **values})


def served_spec(variant: Variant, dtype: str, **values: object) -> KernelSpec:
    """A spec for few tokens, or for many where the variant is for those alone."""
    few, many = (spec_of(variant.op, dtype, **{**values, "tokens": tokens}) for tokens in (128, 4096))
    return few if variant.unavailable(few, GPU) is None else many


loaded = functools.lru_cache(maxsize=4)(load_module)
"""The module of a source; once loaded and rewritten for the interpreter, it runs case after case."""


def complaint_of(source: Source, tokens: int, *, case: str = "mixed", seed: int = 0) -> str | None:
    """Run an emitted module on fresh inputs into poisoned outputs; returns what is wrong with them, or None."""
    spec = source.spec
    if spec.layers:
        tokens = min(tokens, LAYERS)
    inputs, scaling = make_inputs(spec, tokens, case=case, seed=seed)
    outputs = make_outputs(spec, tokens)
    scalars = (scaling,) if spec.contract.scaling else ()
    loaded(source).launch(*inputs.values(), *outputs.values(), *scalars)
    _, complaint = worst_error(spec, outputs, definition(spec, inputs, scaling))
    return complaint
