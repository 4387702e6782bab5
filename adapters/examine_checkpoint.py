"""Examine a checkpoint's weights for DoRA, in pieces of rows: zero and near-zero rows, NaN, what is missing."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..text_file import reason_of
from . import fault
from .checkpoint import Checkpoint, is_embedding, is_head
from .errors import AdapterError
from .fault import Fault, Places
from .tensor_files import TensorInfo, weight_map_of

NEAR = 1e-4
"""A norm below this share of the median norm is near zero."""


@torch.no_grad()
def examine_checkpoint(checkpoint: Checkpoint, examined: Collection[str] = ()) -> list[Fault]:
    """Examine the linear layers' weights, without embeddings and output heads, which DoRA seldom adapts.

    ``examined`` are tensors whose zero rows are known already. W that is stored as [d_in, d_out] is examined by columns
    where a config says that it is (GPT-2).

    Raises:
        AdapterError: a file cannot be read.
    """
    places = Places()
    _missing(checkpoint, places)
    packed = [info.name for info in checkpoint.tensors.infos.values() if _is_packed(info)]
    if checkpoint.quantised or packed:
        places.add(fault.QUANTISED, packed[0] if packed else str(checkpoint.path), checkpoint.quantised)
    transposed = checkpoint.config.get("model_type") in ("gpt2", "openai-gpt")
    for info in checkpoint.matrices():
        if is_embedding(info.name) or is_head(info.name):
            continue
        _rows(checkpoint, info, transposed, info.name in examined, places)
    return places.faults()


def _is_packed(info: TensorInfo) -> bool:
    """Whether it may hold packed or quantised weights; masks of attention and numbers of positions do not."""
    own = info.name.split(".")[-1]
    mask = own in ("bias", "mask", "causal_mask") or (info.dtype in ("BOOL", "I64") and own != "weight")
    return not info.dense and len(info.shape) >= 2 and not mask


def _rows(checkpoint: Checkpoint, info: TensorInfo, transposed: bool, examined: bool, places: Places) -> None:
    norms = torch.empty(info.shape[1] if transposed else info.shape[0])
    for start, rows in checkpoint.tensors.rows(info.name, transposed=transposed):
        # In place: a small result for each piece would keep the heap from reusing the memory of the piece before.
        rows = rows.float() if rows.dtype == torch.float64 else rows  # which vector_norm does not narrow
        torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32, out=norms[start : start + len(rows)])
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        places.add(fault.NOT_FINITE, info.name, rows=bad)
        return
    zero = norms == 0
    if zero.any() and not examined:
        places.add(fault.ZERO_ROWS, info.name, rows=zero.nonzero().flatten().tolist())
    if zero.all():
        return
    near = ((norms < NEAR * norms[~zero].median()) & ~zero).nonzero().flatten().tolist()
    if near:
        places.add(fault.NEAR_ZERO_ROWS, info.name, rows=near)


def _missing(checkpoint: Checkpoint, places: Places) -> None:
    index = checkpoint.path / "model.safetensors.index.json"
    if not checkpoint.path.is_dir() or not index.exists():
        return
    try:
        names = weight_map_of(index)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{index}: cannot be read ({reason_of(error)}); download it again") from error
    for name in names:
        if name not in checkpoint.tensors.infos:
            places.add(fault.TENSOR_MISSING, name, f"{names[name]} lacks it")
