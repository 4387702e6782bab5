"""Plain specs and the list of variants that several test files take."""

from __future__ import annotations

from typing import Any

import pytest

from doratune.codegen.ops import OPS
from doratune.codegen.variants import VARIANTS, Variant
from doratune.codegen.weight_formats import stored_as

EVEN = {"d_out": 4096, "d_in": 4096, "rank": 384, "tokens": 4096, "layers": 32}
EVEN |= {"dtype": "bf16", "adapter": "bf16", "gpu": "h200"}
"""Sizes that every tile divides."""

RAGGED = {**EVEN, "d_out": 4304, "d_in": 1152, "rank": 24}
"""Sizes that hardly a tile divides, with rows of a multiple of 16 bytes as tensor descriptors need."""


def dtype_for(op: str, dtype: str) -> str:
    """The ``dtype`` of a spec of ``op``: a weight format of such values where W can be nothing else."""
    return stored_as("nf4", dtype) if OPS[op].only_formats else dtype


def read_by(variant: Variant, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec, with W in a weight format if the variant reads only such, for as many tokens as it may."""
    if not variant.packed:
        return values
    weight = stored_as("nf4.nested", values["dtype"])
    most = OPS[variant.op].format_tokens
    limited = {"tokens": min(values.get("tokens", most), most)} if most else {}
    return {**values, **limited, "weight": weight}


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.op}-{variant.name}")
