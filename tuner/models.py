"""Which linear projections a model has, from the shipped table or from any Hugging Face ``config.json``.

A config's projections are those of transformers' own class, built on the meta device (:mod:`.class_layers`). Without
transformers the table's families are read from their fields (:mod:`.families`), and every other config is refused: a
wrong shape would tune kernels that never run.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, near_names
from ..text_file import json_type, parse_json, read_text, reason_of
from .families import FAMILIES, check_sizes, covers, is_family, read_family
from .projections import LeftOut, Model, ModelConfigError, Projection

__all__ = [
    "ALIASES",
    "TABLE",
    "LeftOut",
    "Model",
    "ModelConfigError",
    "Projection",
    "UnknownModelError",
    "find_model",
    "list_models",
    "read_config",
    "requested_model",
]

TABLE = Path(__file__).with_name("models.csv")

ALIASES = {
    "llama-1b": "llama-3.2-1b",
    "llama-3b": "llama-3.2-3b",
    "llama-8b": "llama-3.1-8b",
    "llama-70b": "llama-3.1-70b",
    "llama-405b": "llama-3.1-405b",
    "mistral-7b": "mistral-7b-v0.3",
    "mixtral": "mixtral-8x7b",
    "qwen3-30b": "qwen3-30b-a3b",
    "qwen3-235b": "qwen3-235b-a22b",
}
"""Short names. A bare ``llama`` size is the newest generation that has this size as a base model."""


class UnknownModelError(UsageError):
    """The table has no model of this name; the message gives similar names and points to ``--config``."""


_LANGUAGE_PART = {
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
"""The family of the language part of the table's multimodal models."""

_AGAIN = "download the model's config.json again"


@functools.cache
def _table() -> Mapping[str, Model]:
    return {row["name"]: _from_row(row) for row in _rows()}


def _rows() -> list[dict[str, str]]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def _from_row(row: Mapping[str, str]) -> Model:
    kind, config = row["model_type"], _config_of(row)
    notes = []
    if config["model_type"] != kind:
        notes.append("the language model alone: --config with the model's config.json has its other parts too")
    if row["num_experts"]:
        notes.append("transformers before 5 has a layer for each expert: --config lists what the installed one has")
    return replace(read_family(config, row["name"], row["hf_id"]), notes=tuple(notes))


def _config_of(row: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a ``config.json`` that decide a model's layers."""
    kind, width = row["model_type"], int(row["intermediate_size"])
    family = _LANGUAGE_PART.get(kind, kind)
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": int(row["hidden_size"]),
        "num_hidden_layers": int(row["num_layers"]),
        "num_attention_heads": int(row["num_heads"]),
        "num_key_value_heads": int(row["num_kv_heads"]),
        "head_dim": int(row["head_dim"]),
        "intermediate_size": width,
        "vocab_size": int(row["vocab_size"]),
    }
    if row["num_experts"]:
        config |= {FAMILIES[family].experts_field: int(row["num_experts"]), "moe_intermediate_size": width}
    return config


def list_models() -> tuple[Model, ...]:
    """The models of the shipped table, in its order."""
    return tuple(_table().values())


def find_model(name: str) -> Model:
    """Return the model of a table name (``llama-3.1-8b``), one of :data:`ALIASES` or a Hugging Face id, in any case.

    Raises:
        UnknownModelError: the table has no such model.
    """
    wanted = str(name).strip().lower()
    by_id = {model.hf_id.lower(): model for model in list_models()}
    model = _table().get(ALIASES.get(wanted, wanted)) or by_id.get(wanted)
    if model is None:
        known = [*_table(), *ALIASES, *by_id]
        raise UnknownModelError(
            f"unknown model {str(name)!r}{near_names(wanted, known)} (`doratune models` lists the known ones; "
            "for any other model use --config path/to/config.json)"
        )
    return model


def config_text(model: str | None, config: str | Path | None) -> tuple[str, str]:
    """A model's name and its config as JSON text, for a name as :func:`find_model` takes it, or a path of a config.

    Of a model of the table the text has the fields that decide its layers.

    Raises:
        UnknownModelError, ModelConfigError: as :func:`find_model` and :func:`read_config`.
    """
    if config is not None:
        file = _file_of(config)
        text, _ = _load(file)
        return _name_of(file), text
    found = find_model(str(model))
    row = next(row for row in _rows() if row["name"] == found.name)
    return found.name, json.dumps(_config_of(row))


def read_config(path: str | Path) -> Model:
    """Read the model of a Hugging Face ``config.json``, or of the folder that holds one.

    Every linear layer of transformers' class is listed: of the vision and audio parts, too. Code that comes with the
    model is never executed, and nothing is downloaded.

    Raises:
        ModelConfigError: the file is missing or no JSON object, transformers has no class for it or cannot build it, or
            transformers is not installed and the model is of no known family.
    """
    file = _file_of(path)
    text, config = _load(file)
    name = _name_of(file)
    try:
        if is_family(config):
            check_sizes(config)
        if importlib.util.find_spec("transformers") is not None:
            from .class_process import layers_of_class

            return layers_of_class(text, name)
        return _without_transformers(config, name)
    except ModelConfigError as error:
        raise ModelConfigError(f"{file}: {error}") from error


def _file_of(path: str | Path) -> Path:
    file = Path(path)
    with contextlib.suppress(OSError, ValueError):  # reading it says what is wrong
        file = file / "config.json" if file.is_dir() else file
    return file


def _name_of(file: Path) -> str:
    return (file.resolve().parent.name if file.name == "config.json" else file.stem) or "config"


def _load(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise ModelConfigError(f"{file}: no such file; give a model's config.json or its folder") from None
    except (OSError, ValueError) as error:
        raise ModelConfigError(
            f"{file}: cannot be read as text ({reason_of(error)}); give a model's config.json"
        ) from error
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ModelConfigError(f"{file}: {error}; {_AGAIN}") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{file}: expected a JSON object, found {json_type(config)}; give a model's config.json")
    return text, config


def _without_transformers(config: Mapping[str, Any], name: str) -> Model:
    if not covers(config):
        kind, named = config.get("model_type"), config.get("architectures")
        what = f"model_type {kind!r}" + (f" with architectures {named!r}" if is_family(config) else "")
        raise ModelConfigError(
            f"transformers is not installed, and only it knows the layers of {what} (known without it: "
            f"{', '.join(FAMILIES)}); pip install 'doratune[peft]'"
        )
    notes = ["read from the config's fields, since transformers is not installed"]
    if "vocab_size" not in config:
        notes.append("vocab_size is not in the file: the output head is not listed")
    model = read_family(config, name)
    return replace(model, notes=(*notes, *model.notes))


def requested_model(model: str | None, config: str | Path | None) -> Callable[[], Model]:
    """Start reading whichever of the two is given; return a function that waits for the model.

    Reading a config takes seconds in another process. Meanwhile the caller can import PyTorch.

    Raises (from the returned function):
        UsageError: both or none are given, an unknown model, or a config that cannot be read.
    """
    if (model is None) == (config is None):
        raise UsageError("name either a model (--model llama-8b) or a config (--config path/to/config.json)")
    pool = ThreadPoolExecutor(1)
    found = pool.submit(find_model, model) if model is not None else pool.submit(read_config, str(config))
    pool.shutdown(wait=False)
    return found.result
