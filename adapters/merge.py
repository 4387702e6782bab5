"""Merge an adapter into a checkpoint: a copy of its files in which only the adapted weights are other bytes.

Each W' is computed in fp32 from pieces of W and rounded once, to W's dtype. Headers, names, dtypes, the index and the
config stay as they are, so a file of any size needs little memory.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..codegen.ops import EPS
from ..errors import UsageError
from .adapter import Adapter
from .base import Base, base_of, saved_with
from .checkpoint import Checkpoint, is_embedding, is_head
from .convert import along_inputs, refuse_wrong
from .errors import AdapterError, ConversionError
from .keys import PEFT_PREFIX
from .low_rank import INPUT, LowRank
from .norms import is_along_inputs, norms_of
from .target import check_target, new_target
from .tensor_files import DTYPES, PICKLES, TensorInfo

_SAMPLED = 64
"""Rows of W' that are compared in each piece of W."""
_NOT_COPIED = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLES}


@dataclass(frozen=True)
class Merged:
    """What was written: ``layers`` merged, other tensors ``replaced``, and the zero rows of W + sBA (kept zero)."""

    source: str
    target: Path
    layers: int
    replaced: int
    zero_rows: int
    difference: float

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "target": str(self.target)}

    def describe(self) -> str:
        """As a sentence."""
        replaced = f", {self.replaced} tensors replaced" if self.replaced else ""
        zero = f"; {self.zero_rows} zero rows stay zero, where PEFT makes NaN" if self.zero_rows else ""
        return (
            f"{self.layers} layers merged into {self.target}{replaced}; outputs on random inputs differ by "
            f"{self.difference:.2g} of what one rounding may{zero}"
        )


@dataclass(frozen=True)
class _Job:
    """One W to merge: its module, its layer, and for an m of the inputs the norms of the columns of W + sBA [d_in]."""

    base: Base
    low: LowRank
    column_norms: torch.Tensor | None = None


def merge(source: Path, checkpoint: Path, target: Path, *, format: str | None = None) -> Merged:
    """Write ``checkpoint`` with the adapter ``source`` merged in as ``target``: a folder, or a file if it is one.

    ``format`` is that of the source, by default what its tensors say.

    Raises:
        UsageError: the target is a folder where the checkpoint is a file.
        AdapterError: the source or checkpoint cannot be read, they do not fit together, or the checkpoint is quantised.
        ConversionError: the target exists, a shared weight would change for one of its owners only, W' overflows its
            dtype, or the result differs from the source.
    """
    check_target(target)
    with Adapter(source, format) as adapter, Checkpoint(checkpoint) as opened:
        if checkpoint.is_file() and target.suffix != ".safetensors":
            raise UsageError(f"{target}: the checkpoint is one file; name the target ….safetensors")
        refuse_wrong(adapter)
        bases = base_of(adapter, opened)
        replaced = _replaced(adapter, opened, saved_with(adapter, opened, bases))
        _refuse_shared(opened, [*(base.weight for base in bases.values()), *replaced])
        with new_target(target, folder=checkpoint.is_dir()) as path:
            files = _copy(opened, path)
            zero_rows, difference = 0, 0.0
            columns: dict[str, torch.Tensor | None] = {}
            for module, base in bases.items():
                low = adapter.low_rank(module)
                columns[module] = _column_norms(low, opened, base)
                job = _Job(base, low, columns[module])
                zero_rows += _write(opened, job, files[opened.tensors.infos[base.weight].file])
            for name, own in replaced.items():
                _overwrite(adapter, own, opened.tensors.infos[name], files)
            with Checkpoint(path) as result:
                for module, base in bases.items():
                    job = _Job(base, adapter.low_rank(module), columns[module])
                    difference = max(difference, _compare(opened, result, job))
    return Merged(adapter.format, target, len(bases), len(replaced), zero_rows, difference)


def _replaced(adapter: Adapter, checkpoint: Checkpoint, left: set[str]) -> dict[str, str]:
    """The checkpoint's tensors that the adapter has whole (modules_to_save, biases), by the adapter's names of them.

    Those ``left`` stay the checkpoint's.
    """
    found = {}
    for name in adapter.keys.others:
        if name in left:
            continue
        own_name = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default", "")
        module, _, own = own_name.replace(".base_layer.", ".").rpartition(".")
        weight = checkpoint.weights_of([module]).get(module, "")
        there = f"{weight.removesuffix('weight')}{own}"
        info = checkpoint.tensors.infos.get(there)
        if not weight or info is None or info.shape != adapter.tensors.infos[name].shape or not info.dense:
            raise AdapterError(
                f"{adapter.path}: {name} replaces a tensor of the model, and {checkpoint.path} has none of this name "
                "and shape; give the checkpoint that the adapter was trained on"
            )
        found[there] = name
    return found


def _refuse_shared(checkpoint: Checkpoint, changed: list[str]) -> None:
    if not checkpoint.ties_embeddings:
        return
    shared = [name for name in changed if is_embedding(name) or is_head(name)]
    if shared:
        raise ConversionError(
            f"{checkpoint.path}: {shared[0]} is one weight for the embedding and the head (tie_word_embeddings), and "
            "the adapter changes one of the two. Untie them first: save the model with both weights and "
            "tie_word_embeddings=false"
        )


def _copy(checkpoint: Checkpoint, target: Path) -> dict[Path, Path]:
    """Copy the checkpoint's files, but for weights in other formats; where each file of tensors is now."""
    if checkpoint.path.is_file():
        shutil.copyfile(checkpoint.path, target)
        return {checkpoint.path: target}
    copies = {file: target / file.name for file in checkpoint.tensors.files}
    for file in sorted(checkpoint.path.iterdir()):
        if file in copies or (file.is_file() and file.suffix not in _NOT_COPIED and file.name[0] != "."):
            shutil.copyfile(file, target / file.name)
    return copies


def _column_norms(low: LowRank, checkpoint: Checkpoint, base: Base) -> torch.Tensor | None:
    """The norms that an m of the inputs needs; of a square layer W is read to refuse an m along the wrong axis."""
    if low.m is None or low.gains or (low.axis != INPUT and low.d_in != low.d_out):
        return None
    if low.axis == INPUT and low.kernel:
        raise ConversionError(f"{base.name}: a convolution with an m for inputs is not merged; merge it with LyCORIS")
    norms = norms_of(low, base.rows(checkpoint))
    if low.axis == INPUT:
        return norms.adapted_columns
    if is_along_inputs(low.m, norms):
        raise ConversionError(along_inputs(base.name))
    return None


@torch.no_grad()
def _write(checkpoint: Checkpoint, job: _Job, file: Path) -> int:
    """Write W' over W in a copy of its file; return the number of zero rows of W + sBA."""
    info = checkpoint.tensors.infos[job.base.weight]
    columns, zero_rows = [], 0
    with file.open("r+b") as opened:
        opened.seek(info.begin)
        for start, piece in job.base.rows(checkpoint):
            rows = _rounded(job.low.merged(piece, start, job.column_norms), info)
            zero_rows += _zeros(job.low, rows, start)
            if job.base.transposed:
                columns.append(rows)
            else:
                opened.write(_bytes(rows))
        if columns:
            opened.write(_bytes(torch.cat(columns).T))
    return zero_rows


def _zeros(low: LowRank, rows: torch.Tensor, start: int) -> int:
    """How many of the rows of W' are zero though their m is not."""
    if low.m is None or low.axis == INPUT:
        return 0
    return int(((rows == 0).all(dim=1) & (low.m[start : start + len(rows)] != 0)).sum())


def _rounded(rows: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    rounded = rows.to(DTYPES[info.dtype])
    if not rounded.isfinite().all():
        raise ConversionError(
            f"{info.name}: a merged weight is not finite in {info.dtype}: W or m has NaN, or a value is too large; "
            "`doratune doctor --adapter … --checkpoint …` says which"
        )
    return rounded


def _overwrite(adapter: Adapter, name: str, info: TensorInfo, files: dict[Path, Path]) -> None:
    with files[info.file].open("r+b") as opened:
        opened.seek(info.begin)
        for _, rows in adapter.tensors.rows(name):
            opened.write(_bytes(_rounded(rows, info)))


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _compare(before: Checkpoint, after: Checkpoint, job: _Job) -> float:
    """The largest difference on random inputs, over the largest that one rounding of W' can make.

    The source is computed in fp64 and apart: as a layer does, from products with x.

    Raises:
        ConversionError: it is over 1.
    """
    info, low = before.tensors.infos[job.base.weight], job.low
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(low.d_in, 4, dtype=torch.float64, generator=generator)
    if job.column_norms is not None and low.axis == INPUT:
        assert low.m is not None
        scaled = x * (low.m.double() / job.column_norms.double().clamp_min(EPS))[:, None]
        low = replace(low, m=None)
    else:
        scaled = x
    inner = low.a.double() @ scaled
    unit = torch.finfo(DTYPES[info.dtype]).eps / 2
    tiny = torch.finfo(DTYPES[info.dtype]).smallest_normal
    largest = 0.0
    for (start, w), (_, merged) in zip(job.base.rows(before), job.base.rows(after), strict=True):
        chosen = torch.randperm(len(w), generator=generator)[:_SAMPLED].sort().values
        rows, w64, result = start + chosen, w[chosen].double(), merged[chosen].double()
        y = w64 @ scaled + low.scaling * (low.b[rows].double() @ inner)
        if low.m is not None:
            m = low.m[rows].double()
            adapted = w64 + low.scaling * (low.b[rows].double() @ low.a.double())
            gain = m if low.gains else m / torch.linalg.vector_norm(adapted, dim=1).clamp_min(EPS)
            y = gain[:, None] * y
        size = result.abs() @ x.abs()
        allowed = (unit + 1e-5) * size + tiny * x.abs().sum(dim=0)
        largest = max(largest, ((result @ x - y).abs() / allowed).max().item())
    if not largest <= 1.0:
        raise ConversionError(
            f"{job.base.name}: the merged weights differ from the adapter by {largest:.3g} times what one rounding to "
            f"{info.dtype} can; nothing was written. Please report this"
        )
    return largest
