"""Count the zero rows of W + sBA and warn about them: stock PEFT divides by zero there.

Released weights have such rows. doratune computes 0 for them, but stock PEFT, once it loads the saved adapter, NaN.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch

from .base_layers import BNB_4BIT, BNB_8BIT, BaseLayer
from .examine import DoraLayer

_NAMED = 3
"""Layers that the warning names."""


class ZeroRowsWarning(UserWarning):
    """Rows of W + sBA are zero: stock PEFT gives NaN there."""


@torch.no_grad()
def count_zero_rows(dora: DoraLayer) -> torch.Tensor | None:
    """The number of zero rows of W + sBA, an integer tensor on the layer's device; None if counting would be slow.

    It does not wait for a GPU. It counts rows where both W and BA are zero, because the two do not cancel exactly.
    """
    if dora.lora_B.device != dora.base.weight.device:
        return None
    zero = _zero_rows_of_base(dora.base, dora.lora_B.shape[0], dora.lora_A.shape[1], dora.layer)
    if zero is None:
        return None
    if dora.scaling == 0.0:
        return zero.sum()
    return (zero & (_is_zero(dora.lora_B) | (dora.lora_A == 0).all())).sum()


def warn_of_zero_rows(counted: Sequence[tuple[str, str, torch.Tensor | None]]) -> None:
    """Warn if a count is above 0; ``counted`` has layer name, adapter name and count. Waits once for each device."""
    by_device: dict[torch.device, list[tuple[str, str, torch.Tensor]]] = defaultdict(list)
    for name, adapter, count in counted:
        if count is not None:
            by_device[count.device].append((name, adapter, count))
    found = [
        (name, adapter, rows)
        for entries in by_device.values()
        for (name, adapter, _), rows in zip(entries, torch.stack([e[2] for e in entries]).tolist(), strict=True)
        if rows
    ]
    if not found:
        return
    named = ", ".join(f"{name} (adapter {adapter}): {rows}" for name, adapter, rows in found[:_NAMED])
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    warnings.warn(
        f"{sum(rows for *_, rows in found)} rows of W + sBA are zero, in {len(found)} DoRA layers: {named}{rest}. "
        "doratune computes 0 there. PEFT divides by the norms of these rows and computes NaN: when the saved adapter "
        "is loaded without doratune.accelerate, after doratune.restore, and in traced graphs. Weights merged while "
        "the model is accelerated (merge_and_unload) are correct everywhere.",
        ZeroRowsWarning,
        stacklevel=3,
    )


def _zero_rows_of_base(base: BaseLayer, d_out: int, d_in: int, layer: object) -> torch.Tensor | None:
    """Mask [d_out] bool of the zero rows of W [d_out, d_in]; None if W would have to be dequantised for it."""
    if base.matrix is not None:
        return _is_zero(base.matrix)
    if base.kind == BNB_8BIT:
        scales = layer.state.SCB  # type: ignore[attr-defined]
        scales = base.weight.SCB if scales is None else scales  # type: ignore[attr-defined]
        return None if scales is None else scales.to(base.weight.device).flatten() == 0
    if base.kind == BNB_4BIT:
        state = base.weight.quant_state  # type: ignore[attr-defined]
        plain = not state.nested and not getattr(state, "packing_format_for_cpu", False)
        if plain and d_in % state.blocksize == 0:  # each block is part of one row
            return _is_zero(state.absmax.view(d_out, -1))
    return None


def _is_zero(rows: torch.Tensor) -> torch.Tensor:
    """Mask [n] bool of the zero rows of ``rows`` [n, k]."""
    if rows.is_cuda:
        largest: torch.Tensor = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
        return largest == 0
    zero = rows[:, 0] == 0  # only these rows are read in full: on a CPU reading all of W is slow
    index = zero.nonzero().flatten()
    zero[index] = (rows[index] == 0).all(dim=1)
    return zero
