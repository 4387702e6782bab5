"""How far apart two specs of one operation are: what a lookup ranks entries by before it weighs them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..codegen.spec import DIMS, FLAGS, KernelSpec

DIM_WEIGHTS = {
    "d_out": 1.0,
    "d_out_2": 1.0,
    "d_out_3": 1.0,
    "d_in": 1.0,
    "rank": 2.0,
    "tokens": 1.0,
    "layers": 0.5,
}
"""What a factor of two in a dim adds to the distance. The rank counts double: it is a side of the tiles themselves
(so it decides what fits into shared memory), where the others mostly change how many tiles there are. The number of
neural layers counts half: it changes nothing else, and with a few the GPU is full."""

FLAG_PENALTY = 0.25
"""What each differing flag adds: it adds or drops one operand, which matters less than any halving of a dim."""


def distance(wanted: KernelSpec, other: KernelSpec) -> float:
    """Return the distance of two specs of one op: ``sum(weight * |log2(ratio)|)`` over the dims, plus flag penalties.

    A different or missing magnitude dtype counts as a flag. Dims the op does not depend on, and
    the GPU, add nothing.
    """
    dims = {dim: getattr(other, dim) for dim in DIMS}
    return distance_of(wanted, dims, other.magnitude, [flag for flag in FLAGS if getattr(other, flag)])


def distance_of(wanted: KernelSpec, dims: Mapping[str, Any], magnitude: str, flags: Collection[str]) -> float:
    """The same for a spec that is given by its dims, its magnitude's dtype and its flags."""
    pairs = ((DIM_WEIGHTS[dim], getattr(wanted, dim), dims[dim]) for dim in DIMS)
    apart = sum(weight * abs(math.log2(a / b)) for weight, a, b in pairs if a and b)
    differing = sum(getattr(wanted, flag) != (flag in flags) for flag in FLAGS) + (wanted.magnitude != magnitude)
    return float(apart + FLAG_PENALTY * differing)
