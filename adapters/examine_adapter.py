"""Examine an adapter: its tensors against its config, and against the checkpoint that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import fault
from .adapter import Adapter, axis_of
from .base import dotted
from .checkpoint import Checkpoint, is_embedding, is_head
from .fault import Fault, Places
from .keys import ALPHA, EMBEDDING, LYCORIS, MID, OTHER, PEFT, TRTLLM, A, B, M
from .low_rank import INPUT, LowRank
from .norms import Norms, is_along_inputs, is_far, is_rounded, is_same, norms_of

_ORTHONORMAL = 1e-3
"""A trained A is farther than this from orthonormal rows."""


def examine_adapter(adapter: Adapter, checkpoint: Checkpoint | None = None) -> list[Fault]:
    """Examine ``adapter``, the worst faults first. Layers are read one at a time, W in pieces.

    Raises:
        AdapterError: a file cannot be read.
    """
    places = Places()
    _names(adapter, places)
    sound = [module for module in adapter.layers if _shapes(adapter, module, places)]
    values = {module: _values(adapter, module, places) for module in sound}
    if checkpoint is None:
        _rounded([one for one in values.values() if one.moved and one.rounded], places)
        if adapter.format == PEFT:
            _combined_by_svd(adapter, [module for module, one in values.items() if one.moved and one.finite], places)
    else:
        _base(adapter, checkpoint, values, places)
    return places.faults()


def _names(adapter: Adapter, places: Places) -> None:
    """Whose keys they are, and whether each layer's parts are complete and wanted."""
    keys = adapter.keys
    if adapter.format == OTHER:
        for name in keys.foreign:
            places.add(fault.OTHER_METHOD, name)
    else:
        for name in keys.foreign:
            places.add(fault.FOREIGN_KEYS, name, adapter.format)
    config = adapter.config
    if config is not None and config.unlike_dora and not config.lora_bias:  # biases are in the tensors
        places.add(fault.BEYOND_DORA, config.unlike_dora)
    wanted = set() if config is None else {*(config.raw.get("modules_to_save") or [])}
    for name in keys.others:
        known = wanted & set(name.split(".")) or (config is not None and config.raw.get("bias", "none") != "none")
        known = known or is_embedding(name) or is_head(name)  # PEFT saves those whose vocabulary grew
        if not known:
            places.add(fault.UNKNOWN_KEYS, name)
    for module, parts in keys.layers.items():
        if adapter.format == OTHER or EMBEDDING in parts:
            continue
        if A not in parts or B not in parts:
            places.add(fault.INCOMPLETE, module, f"has only {', '.join(sorted(parts))}")
        elif config is not None and adapter.format in (PEFT, TRTLLM):
            if config.use_dora and M not in parts:
                places.add(fault.MAGNITUDE_MISSING, module)
            if M in parts and not config.use_dora:
                places.add(fault.MAGNITUDE_UNUSED, parts[M])


def _shapes(adapter: Adapter, module: str, places: Places) -> bool:
    """Whether the parts of a layer can be read: their shapes fit together."""
    parts, infos = adapter.layers[module], adapter.tensors.infos
    if adapter.format == OTHER or A not in parts or B not in parts or {MID, EMBEDDING} & parts.keys():
        return False
    empty = [name for name in parts.values() if 0 in infos[name].shape]
    for name in empty:
        places.add(fault.EMPTY, name, f"shape {list(infos[name].shape)}")
    if empty:
        return False
    a, b = infos[parts[A]].shape, infos[parts[B]].shape
    if len(a) < 2 or len(a) != len(b) or b[1] != a[0] or any(size != 1 for size in b[2:]):
        places.add(fault.SHAPES, module, f"A {list(a)}, B {list(b)}")
        return False
    if adapter.config is not None and adapter.format in (PEFT, TRTLLM):
        rank = adapter.config.rank_of(module)
        if a[0] != rank:
            places.add(fault.RANK, parts[A], f"rank {a[0]}, the config says {rank}")
    if M not in parts:
        return True
    shape, d_out, d_in = infos[parts[M]].shape, b[0], a[1]
    axis = axis_of(adapter.format, shape, d_out, d_in)
    if axis == INPUT:
        places.add(fault.INPUT_AXIS, parts[M], f"shape {list(shape)}")
    elif not axis:
        size = max(shape, default=1)
        along = size == d_in != d_out or (adapter.format == PEFT and shape == (1, d_in) and d_in != d_out)
        kind = fault.MAGNITUDE_AXIS if along else fault.MAGNITUDE_SHAPE
        places.add(kind, parts[M], f"shape {list(shape)}, W is [{d_out}, {d_in}]")
    return bool(axis)


@dataclass(frozen=True)
class _Values:
    """What the values of a layer say by themselves.

    ``m_name`` is the tensor m; ``moved``: B is not zero; ``rounded``: m holds bf16 numbers; ``finite``: all parts are.
    """

    m_name: str
    moved: bool
    rounded: bool
    finite: bool


@torch.no_grad()
def _values(adapter: Adapter, module: str, places: Places) -> _Values:
    parts = adapter.layers[module]
    finite = moved = True
    rounded = False
    for part in (A, B, M, ALPHA):
        if part not in parts:
            continue
        name, bad, nonzero = parts[part], [], False
        for start, rows in adapter.tensors.rows(name):
            bad += (start + (~rows.float().isfinite()).any(dim=1).nonzero().flatten()).tolist()
            nonzero |= bool((rows != 0).any())
        if bad:
            places.add(fault.NOT_FINITE, name, rows=bad)
            finite = False
        if part == B:
            moved = nonzero
            if not nonzero:
                places.add(fault.UNTRAINED, name)
        if part == M:
            info = adapter.tensors.infos[name]
            rounded = info.dtype == "BF16" or (
                info.dtype in ("F32", "F64") and is_rounded(adapter.tensors.tensor(name).flatten())
            )
    return _Values(parts.get(M, ""), moved, rounded, finite)


def _rounded(found: Iterable[_Values], places: Places) -> None:
    for one in found:
        places.add(fault.MAGNITUDE_ROUNDED, one.m_name)


@torch.no_grad()
def _combined_by_svd(adapter: Adapter, modules: Sequence[str], places: Places) -> None:
    """``add_weighted_adapter`` with an SVD, its default, leaves orthonormal rows in A and orthogonal columns in B."""
    config = adapter.config
    if config is None or not config.use_dora or not _may_be_combined(adapter):
        return
    for module in modules:
        low = adapter.low_rank(module)
        a, b = low.a.float(), low.b.float()
        kept = torch.linalg.vector_norm(b, dim=0) > 1e-6 * torch.linalg.matrix_norm(b)
        gram = b[:, kept].T @ b[:, kept]
        scale = gram.diagonal().sqrt()
        off = (gram / (scale[:, None] * scale[None, :])).fill_diagonal_(0).abs()
        orthonormal = (a @ a.T - torch.eye(low.rank)).abs().max() < _ORTHONORMAL
        if low.rank < 2 or low.m is None or not orthonormal or off.max() > 10 * _ORTHONORMAL:
            return
    for module in modules:
        places.add(fault.COMBINED, module, "A has orthonormal rows and B orthogonal columns, as an SVD leaves them")


def _may_be_combined(adapter: Adapter) -> bool:
    """``add_weighted_adapter`` writes lora_alpha = r and no patterns."""
    config = adapter.config
    return (
        config is not None
        and config.alpha == config.r
        and not config.rank_pattern
        and not config.alpha_pattern
        and len(adapter.layers) > 0
    )


def _base(adapter: Adapter, checkpoint: Checkpoint, values: dict[str, _Values], places: Places) -> None:
    """Examine the layers against the checkpoint's W."""
    config = adapter.config
    modules = [module for module, one in values.items() if one.finite]
    flat = checkpoint.by_flat_name() if adapter.format == LYCORIS else {}
    names = {module: dotted(module, flat, adapter) for module in modules}
    weights = checkpoint.weights_of(names.values())
    frozen: list[str] = []
    for module in modules:
        weight = weights.get(names[module])
        if weight is None:
            if not checkpoint.quantised:  # packed weights have other names
                places.add(fault.LAYER_MISSING, module)
            continue
        info, low = checkpoint.tensors.infos[weight], adapter.low_rank(module)
        if not info.dense:
            continue  # examine_checkpoint says so
        flag = config is not None and config.fan_in_fan_out
        transposed = checkpoint.is_transposed(info, low.d_out, low.d_in, flag)
        if transposed is None:
            detail = f"A and B are for [{low.d_out}, {low.d_in}], {weight} is {list(info.shape)}"
            places.add(fault.BASE_SHAPE, module, detail)
            continue
        norms = norms_of(low, checkpoint.rows(weight, transposed=transposed))
        if norms.finite:
            frozen += _magnitude(low, norms, values[module], module, places)
    for module in frozen:
        combined = len(frozen) == len(modules) and adapter.format == PEFT and _may_be_combined(adapter)
        kind = fault.COMBINED if combined else fault.MAGNITUDE_FROZEN
        places.add(kind, module, "m is ||W||, lora_alpha is r, and there are no patterns" if combined else "")
    _base_name(adapter, checkpoint, places)


def _magnitude(low: LowRank, norms: Norms, one: _Values, module: str, places: Places) -> list[str]:
    """What m says beside the norms of W: returns the layer if its m never moved."""
    zero = (norms.adapted_rows == 0).nonzero().flatten().tolist()
    if zero and low.m is not None:
        places.add(fault.ZERO_ROWS, module, "rows of W + sBA are zero", zero)
    if low.m is None or low.axis == INPUT or low.gains:
        return []
    moved, m = one.moved and low.scaling != 0, low.m.float()
    if moved and is_same(low.m, norms.rows):
        return [module]
    if is_along_inputs(m, norms):
        places.add(fault.MAGNITUDE_AXIS, one.m_name, "its values are the norms of the columns of W")
    elif (ratio := is_far(m, norms)) is not None:
        near_one = bool(((m - 1).abs().median() < 0.25).item())
        hint = "; m itself is near 1, as TensorRT-LLM's" if near_one else ""
        places.add(fault.MAGNITUDE_SCALE, one.m_name, f"the median of m / ||W + sBA|| is {ratio:.3g}{hint}")
    elif moved and is_same(low.m, norms.adapted_rows):
        places.add(fault.MAGNITUDE_RECOMPUTED, one.m_name)
    elif moved and one.rounded:
        places.add(fault.MAGNITUDE_ROUNDED, one.m_name)
    return []


def _base_name(adapter: Adapter, checkpoint: Checkpoint, places: Places) -> None:
    if adapter.config is None or not adapter.config.base:
        return
    path = checkpoint.path.resolve()
    here = {str(checkpoint.config.get("_name_or_path") or ""), path.name, path.parent.name}
    names = {Path(name).name.lower() for name in here if name}
    if Path(adapter.config.base).name.lower() not in names:
        places.add(fault.BASE_NAME, adapter.config.base, f"the checkpoint is {checkpoint.path.name}")
