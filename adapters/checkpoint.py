"""A model's weights on disk, read in pieces: which tensor is the W of an adapter's layer, and whether it is dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..text_file import read_object, reason_of
from .errors import AdapterError
from .tensor_files import TensorFiles, TensorInfo, find_tensor_files

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "embeddings",
    "shared",
    "relative_attention_bias",
)
INPUTS = ("embed_tokens", "wte", "word_embeddings", "shared")
"""Those of tokens, whose weight a head may share."""
_LANGUAGE_MODELS = ("LMHead", "CausalLM", "ConditionalGeneration")
"""Parts of the names of architectures that have an output head."""
HEADS = ("lm_head", "embed_out", "output_projection", "score")
_MOST_PREFIX = 3
"""Components that an adapter's names and a checkpoint's may differ by at the front."""


class Checkpoint:
    """The weights of a model in a folder, or in one file. Close it, or use it in a ``with`` statement.

    Attributes:
        path: the folder or file. config: what its ``config.json`` holds, empty without one. tensors: of its files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = TensorFiles(find_tensor_files(path))
        folder = path if path.is_dir() else path.parent
        self.config = _config(folder / "config.json")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()

    @property
    def quantised(self) -> str:
        """How the config says that the weights are quantised; empty if it does not."""
        told = self.config.get("quantization_config") or self.config.get("compression_config")
        if not told:
            return ""
        return str(told.get("quant_method") or "quantised") if isinstance(told, dict) else "quantised"

    @property
    def ties_embeddings(self) -> bool:
        """Whether the model's head shares the weight of its embedding.

        Where the config is silent, as GPT-2's is, transformers shares it: so does a language model without a head here.
        """
        told = self.config.get("tie_word_embeddings")
        if told is None:
            part = self.config.get("text_config")
            told = part.get("tie_word_embeddings") if isinstance(part, dict) else None
        if told is None:
            named = str(self.config.get("architectures"))
            has_head = any(is_head(name) for name in self.tensors.infos)
            return not has_head and any(kind in named for kind in _LANGUAGE_MODELS)
        return bool(told)

    def describe(self) -> str:
        """What it is, such as ``291 tensors in 4 files, 16.1 GB, bf16``."""
        infos = self.tensors.infos.values()
        size = sum(info.end - info.begin for info in infos) / 1e9
        dtypes = sorted({info.dtype for info in infos})
        files = len(self.tensors.files)
        return f"{len(infos)} tensors in {files} file{'' if files == 1 else 's'}, {size:.3g} GB, {', '.join(dtypes)}"

    def weights_of(self, modules: Iterable[str]) -> dict[str, str]:
        """The tensor that is W, for each of an adapter's layers that has one here.

        The names of an adapter and a checkpoint of one model may differ by components at the front: with a head or
        without, or as transformers renames parts while it loads. The difference that finds the most layers is taken
        first, then the next for what is left. A head without a weight of its own has the embedding's, where they share
        one.
        """
        left = list(modules)
        found: dict[str, str] = {}
        while left:
            taken = set(found.values())
            best: dict[str, str] = {}
            for cut, added in self._prefixes(left):
                some = {module: self._named(module, cut, added) for module in left}
                fits = {module: weight for module, weight in some.items() if weight and weight not in taken}
                if len({*fits.values()}) < len(fits):
                    continue  # the names that are cut tell layers apart
                if len(fits) > len(best):
                    best = fits
                if len(best) == len(left):
                    break
            if not best:
                break
            found |= best
            left = [module for module in left if module not in best]
        shared = self._shared_weight()
        return found | {module: shared for module in left if shared and is_head(module)}

    def _shared_weight(self) -> str:
        """The tensor that is the weight of the embedding and of the head; empty if they share none."""
        if not self.ties_embeddings:
            return ""
        found = [name for name in self.tensors.infos if name.endswith(tuple(f"{one}.weight" for one in INPUTS))]
        return found[0] if len(found) == 1 else ""

    def _named(self, module: str, cut: int, added: str) -> str:
        """The tensor of a layer if names differ so at the front; empty if there is none."""
        rest = module.split(".")[cut:]
        weight = f"{added}{'.'.join(rest)}.weight"
        return weight if rest and weight in self.tensors.infos else ""

    def _prefixes(self, modules: list[str]) -> Iterator[tuple[int, str]]:
        """How names may differ at the front: components cut from an adapter's, and text put before what is left."""
        yield 0, ""
        ends: dict[str, list[str]] = {}
        for name in self.tensors.infos:
            if name.endswith(".weight"):
                words = name.removesuffix(".weight").split(".")
                ends.setdefault(words[-1], []).append(name.removesuffix(".weight"))
        seen = set()
        for module in modules[:3]:
            words = module.split(".")
            for cut in range(min(_MOST_PREFIX, len(words) - 1) + 1):
                rest = ".".join(words[cut:])
                if any(word.isdigit() for word in words[:cut]):
                    break  # the number of a layer is no front
                for name in ends.get(words[-1], ()):
                    added = name.removesuffix(rest)
                    fits = (
                        name.endswith(rest) and (not added or added.endswith(".")) and added.count(".") <= _MOST_PREFIX
                    )
                    if fits and (cut, added) not in seen:
                        seen.add((cut, added))
                        yield cut, added

    def by_flat_name(self) -> dict[str, str]:
        """The names of the modules by these names with underscores for dots, as LyCORIS writes them.

        A name that two modules share is left out.
        """
        flat: dict[str, list[str]] = {}
        for name in self.tensors.infos:
            if name.endswith(".weight"):
                module = name.removesuffix(".weight")
                flat.setdefault(module.replace(".", "_"), []).append(module)
        return {name: modules[0] for name, modules in flat.items() if len(modules) == 1}

    def matrices(self) -> Iterator[TensorInfo]:
        """The dense weights of two dimensions: those of linear layers, embeddings and heads."""
        for info in self.tensors.infos.values():
            if info.dense and len(info.shape) == 2 and info.name.endswith("weight") and min(info.shape) > 0:
                yield info

    def is_transposed(self, info: TensorInfo, d_out: int, d_in: int, flag: bool) -> bool | None:
        """Whether W [d_out, d_in] is stored as [d_in, d_out]; None if it is another matrix.

        ``flag`` (PEFT's ``fan_in_fan_out``) decides for a square one.
        """
        shape = (info.shape[0], _size(info.shape[1:])) if info.shape else ()
        if d_out == d_in and shape == (d_out, d_in):
            return flag and len(info.shape) == 2
        return False if shape == (d_out, d_in) else True if info.shape == (d_in, d_out) else None

    def rows(self, name: str, *, transposed: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of W, in pieces [n, d_in] of fp32, each with the number of its first row."""
        for start, rows in self.tensors.rows(name, transposed=transposed):
            yield start, rows.float()


def is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of an embedding."""
    return bool(set(EMBEDDINGS) & set(name.split(".")))


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of an output head."""
    return bool(set(HEADS) & set(name.split(".")))


def _config(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: {reason_of(error)}; download it again") from error


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for width in shape:
        size *= width
    return size
