"""An adapter on disk: its layers, read one at a time, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..text_file import parse_json
from .config import NAME, AdapterConfig
from .errors import AdapterError
from .keys import ALPHA, EMBEDDING, LYCORIS, MID, NVLABS, PEFT, TRTLLM, A, B, Keys, M, sort_keys
from .low_rank import INPUT, OUTPUT, LowRank
from .tensor_files import DTYPES, TensorFiles, find_tensor_files

STEM = "adapter_model"
METADATA = "doratune"
"""The key of doratune's own text in a file's metadata."""
_FLOATS = {*DTYPES, "F8_E4M3", "F8_E5M2"}
"""Dtypes of A, B and m, by their names in the files."""


class Adapter:
    """An adapter in a folder of PEFT's, or in one file. Close it, or use it in a ``with`` statement.

    Attributes:
        path: the folder or file. format: one of :mod:`.keys`. config: PEFT's, None for a file of another trainer.
        tensors: of the files. keys: these by layer and part. note: what doratune wrote beside the tensors.
    """

    def __init__(self, path: Path, format: str | None = None) -> None:
        files = find_tensor_files(path, STEM)
        self.path = path
        self.tensors = TensorFiles(files)
        self.keys: Keys = sort_keys(self.tensors.infos)
        self.note = _note(self.tensors.metadata)
        self._check_tensors()
        self.config: AdapterConfig | None = None
        found = self.keys.format
        if not self.keys.layers:
            raise AdapterError(
                f"{path}: no adapter: none of its {len(self.tensors.infos)} tensors has a name such as "
                "….lora_A.weight or ….lora_down.weight"
            )
        if found == PEFT:
            self.config = AdapterConfig.read((path if path.is_dir() else path.parent) / NAME)
            found = TRTLLM if self.note.get("format") == TRTLLM else PEFT
        elif path.is_dir() and (path / NAME).exists():
            self.config = AdapterConfig.read(path / NAME)
        self.format = found if format is None else _checked(path, found, format)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()

    @property
    def layers(self) -> Mapping[str, Mapping[str, str]]:
        """The names of each layer's tensors, by part. PEFT's are the layers' names; LyCORIS' have no dots."""
        return self.keys.layers

    def describe(self) -> str:
        """What it is, such as ``peft, 14 layers of rank 8, DoRA``."""
        infos = self.tensors.infos
        shapes = [infos[parts[A]].shape for parts in self.layers.values() if A in parts]
        ranks = sorted({shape[0] for shape in shapes if shape})
        rank = "" if not ranks else f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        count = sum(M in parts for parts in self.layers.values())
        dora = "plain LoRA" if not count else "DoRA" if count == len(self.layers) else f"DoRA on {count} of them"
        return f"{self.format}, {len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}{rank}, {dora}"

    def scaling_of(self, module: str) -> float:
        """s of a layer: from the config, or from its alpha and rank."""
        parts = self.layers[module]
        if self.config is not None and self.format in (PEFT, TRTLLM, NVLABS):
            return self.config.scaling_of(module)
        if ALPHA not in parts:
            return 1.0  # ai-toolkit saves none where alpha is the rank, and LyCORIS takes a missing one as the rank
        alpha = float(self.tensors.tensor(parts[ALPHA]).double().item())
        return (alpha or float(self.rank_of(module))) / self.rank_of(module)

    def rank_of(self, module: str) -> int:
        """The rank that the tensor A of a layer has."""
        return self.tensors.infos[self.layers[module][A]].shape[0]

    def check_parts(self, module: str) -> None:
        """Raise an AdapterError unless a layer has A and B, and nothing that makes it more than A, B and m."""
        parts = self.layers[module]
        where = f"{self.path}: {module}"
        for part, what in (
            (MID, "is of another method than LoRA, or a Tucker decomposition"),
            (EMBEDDING, "is an embedding"),
        ):
            if part in parts:
                raise AdapterError(f"{where} {what}; only A, B and m of linear layers and convolutions are converted")
        if A not in parts or B not in parts:
            raise AdapterError(f"{where} has {', '.join(sorted(parts.values()))} and not both A and B; save it again")

    def low_rank(self, module: str) -> LowRank:
        """Read a layer.

        Raises:
            AdapterError: parts are missing, do not fit together, or make it more than A, B and m.
        """
        parts = self.layers[module]
        where = f"{self.path}: {module}"
        self.check_parts(module)
        a, b = self.tensors.tensor(parts[A]), self.tensors.tensor(parts[B])
        kernel = tuple(a.shape[2:])
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
            raise AdapterError(f"{where}: A {list(a.shape)} and B {list(b.shape)} are not one product; save it again")
        m, axis = None, OUTPUT
        if M in parts:
            m = self.tensors.tensor(parts[M])
            axis = self._axis(where, tuple(m.shape), b.shape[0], a.shape[1])
            m = m.flatten()
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        return LowRank(a, b, m, self.scaling_of(module), axis, self.format == TRTLLM, kernel)

    def _check_tensors(self) -> None:
        for one, other in self.keys.clashes:
            raise AdapterError(
                f"{self.path}: {one} and {other} are the same part of one layer, as of two adapters; save each by "
                "itself (save_pretrained(…, selected_adapters=[…]))"
            )
        for parts in self.layers.values():
            for part in (A, B, M):
                info = self.tensors.infos[parts[part]] if part in parts else None
                if info is not None and info.dtype not in _FLOATS:
                    raise AdapterError(
                        f"{self.path}: {info.name} is stored as {info.dtype}; A, B and m are real floats, so save the "
                        "adapter again as fp32, bf16 or fp16"
                    )
            alpha = self.tensors.infos[parts[ALPHA]] if ALPHA in parts else None
            if alpha is not None and (any(size != 1 for size in alpha.shape) or alpha.dtype.startswith("C")):
                raise AdapterError(
                    f"{self.path}: {alpha.name} has shape {list(alpha.shape)} and dtype {alpha.dtype}; expected one "
                    "real number, so save the adapter again"
                )

    def _axis(self, where: str, shape: tuple[int, ...], d_out: int, d_in: int) -> str:
        axis = axis_of(self.format, shape, d_out, d_in)
        if axis:
            return axis
        if max(shape, default=0) == d_in != d_out:
            raise AdapterError(
                f"{where}: m {list(shape)} lies along the wrong axis: it has a value for each of {d_in} inputs, and "
                f"DoRA has one for each of {d_out} outputs. No conversion mends that; train the adapter again"
            )
        raise AdapterError(
            f"{where}: m has shape {list(shape)}, from which its axis cannot be told; expected {d_out} values, one for "
            "each output, shaped as its trainer shapes them"
        )


def axis_of(format: str, shape: tuple[int, ...], d_out: int, d_in: int) -> str:
    """The axis of an m of this shape as the trainer of ``format`` writes it; empty if it writes none such.

    LyCORIS has a column [d_out, 1, …] for outputs and a row [1, d_in, …] for inputs; the others have a vector for
    outputs, NVlabs a column, and PEFT [1, d_out, 1, …] for convolutions.
    """
    ones = (1,) * (len(shape) - 2)
    if format == LYCORIS and len(shape) > 1:
        return OUTPUT if shape == (d_out, 1, *ones) else INPUT if shape == (1, d_in, *ones) else ""
    if shape == (d_out,) and (format != LYCORIS or d_out != d_in):
        return OUTPUT
    if format == NVLABS and shape == (d_out, 1):
        return OUTPUT
    return OUTPUT if len(shape) > 2 and shape == (1, d_out, *ones) else ""


def _note(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        note = parse_json(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _checked(path: Path, found: str, named: str) -> str:
    """The format that a user named, if the tensors may be of it."""
    likely = {PEFT: (PEFT, TRTLLM), TRTLLM: (PEFT, TRTLLM)}.get(found, (found,))
    if named not in likely:
        raise AdapterError(f"{path}: its tensors have names of {found}, not of {named}; leave --from out")
    return named
