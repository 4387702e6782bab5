"""Running emitted kernels in Triton's interpreter, and judging them as the tuner does."""

from __future__ import annotations

from doratune.codegen.module import load_module
from doratune.codegen.render import Source
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs


def complaint_of(source: Source, tokens: int, *, case: str = "mixed", seed: int = 0) -> str | None:
    """Run an emitted module on fresh inputs into poisoned outputs; returns what is wrong with them, or None."""
    spec = source.spec
    inputs, scaling = make_inputs(spec, tokens, case=case, seed=seed)
    outputs = make_outputs(spec, tokens)
    scalars = (scaling,) if spec.contract.scaling else ()
    load_module(source).launch(*inputs.values(), *outputs.values(), *scalars)
    _, complaint = worst_error(spec, outputs, definition(spec, inputs, scaling))
    return complaint
