"""Which linear projections a model has, from the shipped table or from any Hugging Face ``config.json``.

Both go the same way: a row of ``models.csv`` is read as a config. What a config leaves out is filled in as the model's
class in transformers does; what cannot be known is refused rather than guessed, for a wrong shape tunes kernels that
nobody runs. Embeddings, the output head and the experts' routers are no projections here: adapters leave them alone.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError, near_names

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
    """The table has no model of this name; the message gives near names and the way around the table."""


class ModelConfigError(UsageError):
    """A config cannot be read as a model; the message names the file, the field and the remedy."""


@dataclass(frozen=True)
class Projection:
    """A linear layer W [d_out, d_in] that occurs ``count`` times in the whole model."""

    name: str
    d_out: int
    d_in: int
    bias: bool
    count: int


@dataclass(frozen=True)
class Model:
    """A model's linear projections, as far as adapters are put on them.

    ``layers`` counts decoder layers; ``hf_id`` is empty for a model read from a file; ``notes`` says what was assumed
    or left out. The projections of experts are named ``experts.gate_proj`` and so on, each expert counted.
    """

    name: str
    hf_id: str
    layers: int
    projections: tuple[Projection, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Family:
    """How a ``model_type`` of transformers differs from Llama.

    ``qkv_bias`` and ``out_bias``: True or False where the class fixes them, else the config field that says it and its
    default. ``experts_field`` counts the experts, ``experts_width`` is the width of one. ``defaults`` are the class's
    defaults of the fields that published configs leave out.
    """

    qkv_bias: bool | tuple[str, bool] = False
    out_bias: bool | tuple[str, bool] = False
    mlp_bias: bool | tuple[str, bool] = False
    layout: str = "split"
    experts_field: str = ""
    experts_width: str = "moe_intermediate_size"
    defaults: tuple[tuple[str, int], ...] = ()
    equal_kv_heads: bool = False


_ATTENTION_BIAS = ("attention_bias", False)
_LLAMA = _Family(_ATTENTION_BIAS, _ATTENTION_BIAS, ("mlp_bias", False), equal_kv_heads=True)
_MISTRAL = _Family(defaults=(("num_key_value_heads", 8),))
_QWEN2 = _Family(qkv_bias=True)
_QWEN3 = _Family(_ATTENTION_BIAS, _ATTENTION_BIAS, defaults=(("head_dim", 128),))
_QWEN3_MOE = _Family(_ATTENTION_BIAS, _ATTENTION_BIAS, experts_field="num_experts")
_GEMMA_HEADS = (("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256))
_GEMMA = _Family(_ATTENTION_BIAS, _ATTENTION_BIAS, defaults=_GEMMA_HEADS)

_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mistral3": _MISTRAL,
    "mixtral": _Family(
        experts_field="num_local_experts", experts_width="intermediate_size", defaults=(("num_key_value_heads", 8),)
    ),
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _Family(layout="phi3", equal_kv_heads=True),
    "gpt_neox": _Family(
        ("attention_bias", True), ("attention_bias", True), True, layout="gpt_neox", equal_kv_heads=True
    ),
}

_MULTIMODAL = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3")

_UNLIKE_LLAMA = {
    "kv_lora_rank": "low-rank attention",
    "n_routed_experts": "experts",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "linear_num_value_heads": "linear attention",
    "mamba_d_state": "state-space layers",
    "multi_query": "fused attention",
}
"""Fields of configs whose projections are not Llama's, although the common fields are there."""


_AGAIN = "download the model's config.json again"


@functools.cache
def _table() -> Mapping[str, Model]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {row["name"]: _from_row(row) for row in csv.DictReader(file)}


def _from_row(row: Mapping[str, str]) -> Model:
    kind, width = row["model_type"], int(row["intermediate_size"])
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": int(row["hidden_size"]),
        "num_hidden_layers": int(row["num_layers"]),
        "num_attention_heads": int(row["num_heads"]),
        "num_key_value_heads": int(row["num_kv_heads"]),
        "head_dim": int(row["head_dim"]),
        "intermediate_size": width,
    }
    if row["num_experts"]:
        config |= {_FAMILIES[kind].experts_field: int(row["num_experts"]), "moe_intermediate_size": width}
    return _Reader(config, f"{TABLE.name}, {row['name']}").model(row["name"], row["hf_id"])


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


def read_config(path: str | Path) -> Model:
    """Read the model of a Hugging Face ``config.json``, or of the folder that holds one.

    The language part of a multimodal config (its ``text_config``) is read; the vision part is left out. A
    ``model_type`` that is not known but has Llama's fields is read as Llama's, which ``notes`` says.

    Raises:
        ModelConfigError: the file is missing, no JSON object, or a field is missing or invalid.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelConfigError(f"{file}: no such file; give a model's config.json or its folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelConfigError(f"{file}: cannot be read as text ({error}); give a model's config.json") from error
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ModelConfigError(f"{file}: not valid JSON ({where}); {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: not readable as JSON ({error}); {_AGAIN}") from error
    if not isinstance(config, dict):
        raise ModelConfigError(f"{file}: holds no JSON object but {text.strip()[:40]!r}; give a model's config.json")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return _Reader(config, str(file)).model(name or "config", "")


class _Reader:
    """Reads one config's fields, with the errors that name them."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.notes: list[str] = []
        self.prefix = ""
        self.kind = self._kind(config, "")
        self.config = config
        if self.kind in _MULTIMODAL or "text_config" in config:
            self.notes.append("the language model alone: projections of the vision or audio part are left out")
        if "text_config" in config:
            nested = config["text_config"]
            if not isinstance(nested, dict):
                self._fail("text_config", f"is {nested!r}, not an object")
            self.config, self.prefix = nested, "text_config."
            self.kind = self._kind(nested, self.kind)
        self.family = _FAMILIES.get(self.kind) or self._assume_llama()
        self.defaults = dict(self.family.defaults)

    def _kind(self, config: Mapping[str, Any], default: str) -> str:
        kind = config.get("model_type", default)
        if not isinstance(kind, str):
            self._fail("model_type", f"is {kind!r}, not a name")
        return kind

    def _assume_llama(self) -> _Family:
        for name, what in _UNLIKE_LLAMA.items():
            if self.config.get(name):
                self._fail(
                    name,
                    f"means {what}, which is not known for model_type {self.kind!r}",
                    f"the known types are {', '.join(_FAMILIES)}",
                )
        self.notes.append(f"model_type {self.kind!r} is not known: read as Llama's projections from its fields")
        return _Family(_ATTENTION_BIAS, _ATTENTION_BIAS, ("mlp_bias", False))

    def _fail(self, name: str, problem: str, remedy: str = f"correct it or {_AGAIN}") -> NoReturn:
        raise ModelConfigError(f"{self.where}: field {self.prefix}{name} {problem}; {remedy}")

    def size(self, name: str) -> int:
        """A field that must be an integer of at least 1, or its class's default."""
        value = self.config.get(name)
        if value is None:
            value = self.defaults.get(name)
        if value is None:
            self._fail(name, "is missing", f"add it (an integer of at least 1) or {_AGAIN}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._fail(name, f"is {value!r}, not an integer of at least 1")
        return value

    def flag(self, rule: bool | tuple[str, bool]) -> bool:
        """A bias rule's outcome for this config."""
        if isinstance(rule, bool):
            return rule
        name, default = rule
        value = self.config.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(name, f"is {value!r}, not true or false")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        if self.config.get("head_dim") is not None or "head_dim" in self.defaults:
            return self.size("head_dim")
        if hidden % heads:
            problem = f"is missing, and hidden_size={hidden} is not divisible by num_attention_heads={heads}"
            self._fail("head_dim", problem, "add it")
        return hidden // heads

    def model(self, name: str, hf_id: str) -> Model:
        layers = self.size("num_hidden_layers")
        projections = (*self.attention(layers), *self.mlp(layers))
        return Model(name, hf_id, layers, projections, tuple(self.notes))

    def attention(self, layers: int) -> tuple[Projection, ...]:
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        width = self.head_dim(hidden, heads)
        same = self.family.equal_kv_heads and self.config.get("num_key_value_heads") is None
        kv_heads = heads if same else self.size("num_key_value_heads")
        if heads % kv_heads:
            self._fail("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads={heads}")
        qkv, out = self.flag(self.family.qkv_bias), self.flag(self.family.out_bias)
        q, kv = heads * width, kv_heads * width
        if self.family.layout == "gpt_neox":
            return (
                Projection("query_key_value", 3 * hidden, hidden, qkv, layers),
                Projection("dense", hidden, hidden, out, layers),
            )
        if self.family.layout == "phi3":
            return (
                Projection("qkv_proj", q + 2 * kv, hidden, qkv, layers),
                Projection("o_proj", hidden, q, out, layers),
            )
        return (
            Projection("q_proj", q, hidden, qkv, layers),
            Projection("k_proj", kv, hidden, qkv, layers),
            Projection("v_proj", kv, hidden, qkv, layers),
            Projection("o_proj", hidden, q, out, layers),
        )

    def mlp(self, layers: int) -> tuple[Projection, ...]:
        field = self.family.experts_field
        if not field:
            return self.gated("", self.size("intermediate_size"), layers)
        experts = self.size(field)
        sparse = self.sparse_layers(layers)
        dense = self.gated("", self.size("intermediate_size"), layers - sparse) if sparse < layers else ()
        of_experts = self.gated("experts.", self.size(self.family.experts_width), sparse * experts) if sparse else ()
        return (*dense, *of_experts)

    def sparse_layers(self, layers: int) -> int:
        """How many layers have experts: every ``decoder_sparse_step``-th one that is not in ``mlp_only_layers``."""
        step = 1 if self.config.get("decoder_sparse_step") is None else self.size("decoder_sparse_step")
        without = self.config.get("mlp_only_layers") or []
        if not isinstance(without, list) or not all(isinstance(index, int) for index in without):
            self._fail("mlp_only_layers", f"is {without!r}, not a list of layer numbers")
        return sum((index + 1) % step == 0 and index not in without for index in range(layers))

    def gated(self, prefix: str, width: int, count: int) -> tuple[Projection, ...]:
        """The feed-forward part: gate, up and down, or what the family has in their place."""
        hidden, bias = self.size("hidden_size"), self.flag(self.family.mlp_bias)
        if self.family.layout == "gpt_neox":
            return (
                Projection("dense_h_to_4h", width, hidden, bias, count),
                Projection("dense_4h_to_h", hidden, width, bias, count),
            )
        down = Projection(f"{prefix}down_proj", hidden, width, bias, count)
        if self.family.layout == "phi3":
            return (Projection("gate_up_proj", 2 * width, hidden, bias, count), down)
        return (
            Projection(f"{prefix}gate_proj", width, hidden, bias, count),
            Projection(f"{prefix}up_proj", width, hidden, bias, count),
            down,
        )
