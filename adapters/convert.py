"""Convert an adapter into another trainer's format. The result is compared with its source before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..codegen.ops import EPS
from ..errors import UsageError
from . import fault
from .adapter import Adapter
from .base import Base, base_of, saved_with
from .checkpoint import Checkpoint
from .errors import ConversionError
from .examine_adapter import examine_adapter
from .keys import BIAS, LYCORIS, PEFT, TRTLLM
from .low_rank import LowRank
from .norms import is_along_inputs, norms_of
from .target import check_target, new_target
from .write import write_lycoris, write_peft, write_trtllm

FORMATS = (PEFT, LYCORIS, TRTLLM)
PREFIX = "lycoris"
"""Before the names of LyCORIS' layers outside of Stable Diffusion; there it is lora_unet and lora_te."""
_TOLERATED = (fault.FOREIGN_KEYS, fault.INPUT_AXIS, fault.COMBINED)
_SAMPLED = 64
"""Rows of W' that are compared in each piece of W."""


@dataclass(frozen=True)
class Converted:
    """What was written: ``layers`` in how many, and the largest relative difference on random inputs."""

    source: str
    format: str
    target: Path
    layers: int
    difference: float

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "target": str(self.target)}

    def describe(self) -> str:
        """As a sentence."""
        return (
            f"{self.layers} layers from {self.source} to {self.format} in {self.target}; outputs on random inputs "
            f"differ by {self.difference:.1g} at most"
        )


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    format: str | None = None,
    checkpoint: Path | None = None,
    prefix: str = PREFIX,
) -> Converted:
    """Write the adapter ``source`` as ``target``, in the format ``to``: a file for LyCORIS, else a folder.

    ``format`` is that of the source, by default what its tensors say. ``checkpoint`` is its base model: TensorRT-LLM's
    m is divided by norms of W + sBA, and the names of LyCORIS' layers do not tell dots from underscores.

    Raises:
        UsageError: an unknown format, or a target without ``.safetensors`` for LyCORIS.
        AdapterError: the source or checkpoint cannot be read, or is not what it says.
        ConversionError: the target exists, the format cannot hold the adapter, or the result differs from the source.
    """
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; use one of {', '.join(FORMATS)}")
    if to == LYCORIS and target.suffix != ".safetensors":
        raise UsageError(f"{target}: LyCORIS has one file; name it ….safetensors")
    check_target(target)
    with Adapter(source, format) as adapter:
        refuse_wrong(adapter)
        if adapter.format == to:
            raise ConversionError(f"{source} is in the format {to} already")
        if checkpoint is None:
            layers, known, base = _layers(adapter, None, to), _known(adapter), ""
            return _written(adapter, layers, known, base, target, to, prefix, None)
        with Checkpoint(checkpoint) as opened:
            layers = _layers(adapter, opened, to)
            base = str(opened.config.get("_name_or_path") or "")
            return _written(adapter, layers, _known(adapter), base, target, to, prefix, opened)


def refuse_wrong(adapter: Adapter) -> None:
    """Raise a ConversionError if ``doctor`` would call the adapter wrong by itself: nothing good would come out."""
    found = [one for one in examine_adapter(adapter) if one.kind.verdict == fault.WRONG and one.kind not in _TOLERATED]
    if found:
        kind, lines = found[0].kind, found[0].lines()
        raise ConversionError(f"{adapter.path}: {kind.what} ({lines[0][:300]}): {kind.why}. To mend it: {kind.remedy}")
    unlike = "" if adapter.config is None else adapter.config.unlike_dora
    if unlike or any(BIAS in parts for parts in adapter.layers.values()):
        raise ConversionError(
            f"{adapter.path}: it was trained with {unlike or 'lora_bias'}; only A, B and m for the checkpoint's own W "
            "are converted and merged"
        )


def _known(adapter: Adapter) -> Mapping[str, object]:
    """The fields of the PEFT config that the adapter has, or had before it was converted."""
    if adapter.config is not None:
        return adapter.config.raw
    noted = adapter.note.get("config")
    return noted if isinstance(noted, dict) else {}


def _layers(adapter: Adapter, checkpoint: Checkpoint | None, to: str) -> dict[str, LowRank]:
    """The layers by their names with dots, with m as the format ``to`` has it."""
    bases = base_of(adapter, checkpoint)
    saved = set() if checkpoint is None else saved_with(adapter, checkpoint, bases)
    others = [name for name in adapter.keys.others if name not in saved]
    if checkpoint is None and others and ".base_layer." in others[0]:
        raise ConversionError(
            f"{adapter.path}: {others[0]} is the W of an adapted layer, which {to} takes from the model; name its "
            "checkpoint with --checkpoint, which shows that it has the same"
        )
    if others:
        raise ConversionError(
            f"{adapter.path}: {others[0]} is no part of a LoRA layer (modules_to_save, or a bias), and "
            f"{to} has no place for it. Merge the adapter into its checkpoint with --merge instead"
        )
    layers = {}
    for module, base in bases.items():
        low = adapter.low_rank(module)
        if low.m is not None and low.gains != (to == TRTLLM):
            low = _with_magnitude(low, base, checkpoint, adapter)
        layers[base.name] = low
    return layers


def _with_magnitude(low: LowRank, base: Base, checkpoint: Checkpoint | None, adapter: Adapter) -> LowRank:
    """The layer with gains for m, or m for gains."""
    assert low.m is not None
    if checkpoint is None:
        raise UsageError(
            f"{adapter.path}: TensorRT-LLM's m is divided by the norms of W + sBA; name its checkpoint "
            "with --checkpoint"
        )
    if low.axis != "output":
        raise ConversionError(f"{base.name}: its m is for inputs, and TensorRT-LLM's for outputs; use --merge instead")
    norms = norms_of(low, base.rows(checkpoint))
    if not low.gains and is_along_inputs(low.m, norms):
        raise ConversionError(along_inputs(base.name))
    divisor = norms.adapted_rows.clamp_min(EPS)
    m = low.m.float() * divisor if low.gains else low.m.float() / divisor
    return replace(low, m=m.to(low.m.dtype), gains=not low.gains)


def along_inputs(name: str) -> str:
    """Why an m along the wrong axis is refused."""
    return (
        f"{name}: m lies along the wrong axis: its values are the norms of the columns of W, and DoRA has those of the "
        "rows. No conversion mends that; train the adapter again"
    )


def _written(
    adapter: Adapter,
    layers: Mapping[str, LowRank],
    known: Mapping[str, object],
    base: str,
    target: Path,
    to: str,
    prefix: str,
    checkpoint: Checkpoint | None,
) -> Converted:
    with new_target(target, folder=to != LYCORIS) as path:
        if to == LYCORIS:
            write_lycoris(path, layers, known, prefix)
        elif to == TRTLLM:
            write_trtllm(path, layers, known, base)
        else:
            write_peft(path, layers, known, base)
        with Adapter(path) as result:
            difference = _compare(adapter, result, checkpoint)
    return Converted(adapter.format, to, target, len(layers), difference)


@torch.no_grad()
def _compare(source: Adapter, result: Adapter, checkpoint: Checkpoint | None) -> float:
    """The largest relative difference of two adapters' outputs, on random inputs and, without a checkpoint, random W.

    Raises:
        ConversionError: they differ by more than one rounding.
    """
    bases = base_of(source, checkpoint)
    others = {base.name: module for module, base in base_of(result, checkpoint).items()}
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for module, base in bases.items():
        before, after = source.low_rank(module), result.low_rank(others[base.name])
        x = torch.randn(before.d_in, 4, dtype=torch.float64, generator=generator)
        product = [low.scaling * (low.b.double() @ (low.a.double() @ x)) for low in (before, after)]
        largest = max(largest, _apart(*product))
        dtypes = [low.m.dtype for low in (before, after) if low.m is not None]
        normalised = before.gains != after.gains
        tolerance = max([1e-5, *(torch.finfo(dtype).eps for dtype in dtypes)]) if normalised else 1e-6
        if checkpoint is None:
            rows = torch.randperm(before.d_out, generator=generator)[:_SAMPLED].sort().values
            w = 0.05 * torch.randn(len(rows), before.d_in, dtype=torch.float64, generator=generator)
            pieces = [(rows, w)]
        else:
            pieces = [
                ((start + chosen), piece[chosen].double())
                for start, piece in base.rows(checkpoint)
                for chosen in [torch.randperm(len(piece), generator=generator)[:_SAMPLED].sort().values]
            ]
        for rows, w in pieces:
            outputs = [_rows_of(low, rows).merged(w, column_norms=torch.ones(low.d_in)) @ x for low in (before, after)]
            apart = _apart(*outputs)
            largest = max(largest, apart)
            if not apart <= tolerance:
                raise ConversionError(
                    f"{base.name}: the result differs from its source by {apart:.2g} on random inputs, and may by "
                    f"{tolerance:.1g}; nothing was written. Please report this"
                )
    return largest


def _rows_of(low: LowRank, rows: torch.Tensor) -> LowRank:
    """The layer with these rows of W' alone."""
    m = low.m if low.m is None or low.axis != "output" else low.m[rows]
    return replace(low, b=low.b[rows], m=m)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    scale = torch.maximum(one.abs(), other.abs()).max().item()
    if not scale:
        return 0.0
    return (one - other).abs().max().item() / scale
