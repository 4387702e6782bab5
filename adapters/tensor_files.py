"""Tensors in safetensors files, read in pieces: headers first, then rows, never a whole model."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..text_file import read_object, reason_of
from .errors import AdapterError

PIECE_BYTES = 8 << 20
"""Bytes of a tensor, as fp32, that are held at a time."""
_REOPEN_BYTES = 128 << 20
"""A file is closed after so many bytes: pages of a mapped file count as memory of the process until then."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of dense weights, by their names in the files. Others are packed or quantised."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MOST_HEADER = 100 << 20
"""As safetensors has it."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header of its file says. ``begin`` and ``end`` are positions in the file, in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dense(self) -> bool:
        """Whether its numbers are floats of 16 bits or more."""
        return self.dtype in DTYPES


class TensorFiles:
    """The tensors of some safetensors files, by name. Close it, or use it in a ``with`` statement.

    Attributes:
        infos: what the headers say. metadata: the texts beside them, of all files together.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for file in files:
            infos, metadata = _read_header(file)
            for info in infos:
                if info.name in self.infos:
                    other = self.infos[info.name].file
                    raise AdapterError(f"{file}: tensor {info.name} is in {other.name} too; remove one of the files")
                self.infos[info.name] = info
            self.metadata.update(metadata)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
        self._open, self._read = None, 0

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, as it is stored."""
        found: torch.Tensor = self._handle(name).get_tensor(name).clone()
        return found

    def rows(self, name: str, *, transposed: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a tensor as matrices [n, elements of a row] in its dtype, each with the number of its first row.

        Dimensions after the first are one row, and a tensor without dimensions is one row of one. ``transposed`` takes
        the columns of a matrix as rows.
        """
        shape = self.infos[name].shape
        if not shape:
            yield 0, self.tensor(name).reshape(1, 1)
        if not shape or 0 in shape:
            return
        count = shape[1] if transposed else shape[0]
        size = 1
        for width in shape:
            size *= width
        step = max(1, PIECE_BYTES // (4 * (size // count)))
        for start in range(0, count, step):
            stop = min(count, start + step)
            piece = self._handle(name).get_slice(name)
            found = piece[:, start:stop].T if transposed else piece[start:stop]
            yield start, found.reshape(stop - start, -1).clone()

    def _handle(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        info = self.infos[name]
        if self._open is None or self._open[0] != info.file or self._read > _REOPEN_BYTES:
            self.close()
            try:
                opened: Any = safe_open(str(info.file), framework="pt")
                self._open = (info.file, opened.__enter__())
            except (SafetensorError, OSError) as error:
                raise AdapterError(f"{info.file}: cannot be read ({error}); download or save it again") from error
        self._read += min(info.end - info.begin, PIECE_BYTES)
        return self._open[1]


def find_tensor_files(path: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder, or the one file that ``path`` is.

    Of a folder: those that ``STEM.safetensors.index.json`` lists, else ``STEM.safetensors``, else all.

    Raises:
        AdapterError: there are none, or one of them is missing. Pickled files are not read.
    """
    require_safetensors()
    if path.is_file():
        if path.suffix in PICKLES:
            raise AdapterError(f"{path}: {_pickled()}")
        if path.suffix != ".safetensors":
            raise AdapterError(f"{path}: expected a folder or a .safetensors file")
        return [path]
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or folder; name a local one, nothing is downloaded")
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        named = _index(index)
        missing = [name for name in named if not (path / name).is_file()]
        if missing:
            raise AdapterError(
                f"{path}: {len(missing)} of {len(named)} files of {index.name} are missing: {', '.join(missing[:3])}; "
                "download them again"
            )
        return [path / name for name in named]
    if (path / f"{stem}.safetensors").exists():
        return [path / f"{stem}.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        raise AdapterError(f"{path}: {f'only {pickled[0]}: {_pickled()}' if pickled else 'no .safetensors file'}")
    return found


def require_safetensors() -> None:
    """Raise an AdapterError unless the package safetensors is installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise AdapterError(
            "reading adapters and checkpoints needs the package safetensors: pip install 'doratune[peft]'"
        ) from None


def _pickled() -> str:
    return (
        "pickled files are not read, because loading one can run any code; save it as safetensors "
        "(save_pretrained(…, safe_serialization=True), or safetensors.torch.save_file)"
    )


def weight_map_of(file: Path) -> dict[str, str]:
    """Which file each tensor of a checkpoint is in, as its index says.

    Raises:
        OSError, ValueError: it cannot be read, or is no index.
    """
    told = read_object(file).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise ValueError("its weight_map does not name a file for each tensor")
    return told


def _index(file: Path) -> list[str]:
    try:
        weight_map = weight_map_of(file)
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise AdapterError(f"{file}: not an index of safetensors files ({reason}); download it again") from error
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise AdapterError(f"{file}: names {outside[0]!r}, which is not a file beside it; download it again")
    return names


def _read_header(file: Path) -> tuple[list[TensorInfo], Mapping[str, str]]:
    """What the header of a file says. safetensors checks it; the positions, which it keeps to itself, are read here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MOST_HEADER:
                raise AdapterError(f"{file}: its header is longer than any model's; download or save it again")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise AdapterError(f"{file}: no such file; download it again") from None
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        size = ""
        with suppress(OSError):
            size = f" of {os.path.getsize(file):,} bytes"
        raise AdapterError(
            f"{file}: not a whole safetensors file{size} ({error}); download or save it again"
        ) from error
    metadata = header.pop("__metadata__", {})
    at = 8 + length
    return [
        TensorInfo(
            name,
            file,
            told["dtype"],
            tuple(told["shape"]),
            at + told["data_offsets"][0],
            at + told["data_offsets"][1],
        )
        for name, told in header.items()
    ], metadata
