"""No variant reads or writes beyond its operands, or writes into its inputs: between guard bands of NaN each passes the
tuner's gate.
"""

from __future__ import annotations

import pytest
import torch

from doratune.codegen.module import load_module
from doratune.codegen.render import render
from doratune.codegen.variants import Variant
from doratune.tuner.gate import Gate

from .interpreter import IDS, INTERPRETED, forms, served_spec, small_config

pytestmark = pytest.mark.usefixtures("interpreter")

CASE_TABLE = [
    pytest.param(variant, form, id=f"{IDS[variant]}-{'-'.join(form) or 'plain'}")
    for variant in INTERPRETED
    for form in forms(variant.op)
]


@pytest.mark.parametrize(("variant", "form"), CASE_TABLE)
def test_a_variant_touches_its_operands_alone(
    variant: Variant, form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.tuner.gate.gate_tokens", lambda spec: 37 if spec.tokens else 3 if spec.layers else 0)
    spec = served_spec(variant, "fp16", **form)
    launch = load_module(render(spec, small_config(variant, spec))).launch
    Gate(spec, torch.device("cpu")).check(launch)
