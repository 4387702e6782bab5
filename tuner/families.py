"""The families whose linear layers follow from a few fields of a config, without transformers: the models of the table.

``tests/tuner/test_families.py`` holds each family to transformers' class. Fields that a config leaves out are filled in
as the class does; a missing size is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .projections import EXPERTS, HEAD, MOST, LeftOut, Model, ModelConfigError, Projection, activation_in

AGAIN = "download the model's config.json again"


@dataclass(frozen=True)
class Family:
    """How a ``model_type`` of transformers differs from Llama.

    ``cls`` begins the names of its classes. ``qkv_bias`` and so on: True or False where the class fixes them, else the
    config field that says it and its default. ``experts_field`` counts the experts, ``experts_width`` is the width of
    one. ``activation`` is the class's default. ``defaults`` are the class's defaults of the fields that published
    configs leave out. ``equal_kv_heads``: as many key heads as heads where the config does not say.
    """

    cls: str
    qkv_bias: bool | tuple[str, bool] = False
    out_bias: bool | tuple[str, bool] = False
    mlp_bias: bool | tuple[str, bool] = False
    layout: str = "split"
    experts_field: str = ""
    experts_width: str = "moe_intermediate_size"
    defaults: tuple[tuple[str, int], ...] = ()
    equal_kv_heads: bool = False
    activation: str = "silu"


_ATTENTION_BIAS = ("attention_bias", False)

FAMILIES = {
    "llama": Family("Llama", _ATTENTION_BIAS, _ATTENTION_BIAS, ("mlp_bias", False), equal_kv_heads=True),
    "mistral": Family("Mistral", defaults=(("num_key_value_heads", 8),)),
    "mixtral": Family(
        "Mixtral",
        experts_field="num_local_experts",
        experts_width="intermediate_size",
        defaults=(("num_key_value_heads", 8),),
    ),
    "qwen2": Family("Qwen2", qkv_bias=True),
    "qwen3": Family("Qwen3", _ATTENTION_BIAS, _ATTENTION_BIAS, defaults=(("head_dim", 128),)),
    "qwen3_moe": Family("Qwen3Moe", _ATTENTION_BIAS, _ATTENTION_BIAS, experts_field="num_experts"),
    "gemma2": Family(
        "Gemma2",
        _ATTENTION_BIAS,
        _ATTENTION_BIAS,
        defaults=(("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256)),
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Family(
        "Gemma3",
        _ATTENTION_BIAS,
        _ATTENTION_BIAS,
        defaults=(("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256)),
        activation="gelu_pytorch_tanh",
    ),
    "phi3": Family("Phi3", layout="phi3", equal_kv_heads=True),
    "gpt_neox": Family(
        "GPTNeoX",
        ("attention_bias", True),
        ("attention_bias", True),
        True,
        layout="gpt_neox",
        activation="gelu",
        equal_kv_heads=True,
    ),
}
"""The ``model_type`` of each family."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse a config of one of :data:`FAMILIES` that lacks a size, or has one that no model can have.

    Transformers would fill in the size of its class's first model, and the list would be of that one.

    Raises:
        ModelConfigError: as :func:`read_family`.
    """
    reader = _Reader(config, FAMILIES[config["model_type"]])
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        reader.size(name)
    reader.heads()


def is_family(config: Mapping[str, Any]) -> bool:
    """Whether a config's ``model_type`` is one of :data:`FAMILIES`."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def covers(config: Mapping[str, Any]) -> bool:
    """Whether :func:`read_family` gives what the config's own class has: a family's causal LM, no other class."""
    if not is_family(config):
        return False
    return config.get("architectures") in (None, [], [f"{FAMILIES[config['model_type']].cls}ForCausalLM"])


def read_family(config: Mapping[str, Any], name: str, hf_id: str = "") -> Model:
    """Return the linear layers of a config whose ``model_type`` is one of :data:`FAMILIES`, for its causal LM class.

    Raises:
        ModelConfigError: a field is missing or invalid; the message does not yet name the file.
    """
    return _Reader(config, FAMILIES[config["model_type"]]).model(name, hf_id)


class _Reader:
    """Reads one config's fields, with the errors that name them."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family
        self.defaults = dict(family.defaults)
        self.taken: dict[str, int] = {}
        """The defaults that stand in for fields that the config lacks."""

    def _fail(self, name: str, problem: str, remedy: str = f"correct it or {AGAIN}") -> NoReturn:
        raise ModelConfigError(f"field {name} {problem}; {remedy}")

    def size(self, name: str) -> int:
        """A field that must be an integer of at least 1, or its class's default."""
        value = self.config.get(name)
        if value is None and name in self.defaults:
            value = self.taken[name] = self.defaults[name]
        if value is None:
            self._fail(name, "is missing", f"add it (an integer of at least 1) or {AGAIN}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._fail(name, f"is {value!r}, not an integer of at least 1")
        if name == "num_hidden_layers" and value > MOST:
            self._fail(name, f"is {value}, more than any model has (at most {MOST})")
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

    def heads(self) -> tuple[int, int]:
        """The numbers of heads and of key heads."""
        heads = self.size("num_attention_heads")
        same = self.family.equal_kv_heads or "num_key_value_heads" in self.config  # null: as many as heads
        kv_heads = (
            heads if same and self.config.get("num_key_value_heads") is None else self.size("num_key_value_heads")
        )
        if heads % kv_heads:
            name, other = "num_key_value_heads", "num_attention_heads"
            if name in self.taken:
                problem = f"is missing, and its class's default {kv_heads} does not divide {other}={heads}"
                self._fail(name, problem, f"add it (an integer of at least 1) or {AGAIN}")
            if other in self.taken:
                problem = f"is missing, and {name}={kv_heads} does not divide its class's default {heads}"
                self._fail(other, problem, f"add it (an integer of at least 1) or {AGAIN}")
            self._fail(name, f"is {kv_heads}, which does not divide {other}={heads}")
        return heads, kv_heads

    def head_dim(self, hidden: int, heads: int) -> int:
        if self.config.get("head_dim") is not None or ("head_dim" in self.defaults and "head_dim" not in self.config):
            return self.size("head_dim")
        if hidden % heads:
            problem = f"is missing, and hidden_size={hidden} is not divisible by num_attention_heads={heads}"
            self._fail("head_dim", problem, "add it")
        return hidden // heads

    def model(self, name: str, hf_id: str) -> Model:
        layers = self.size("num_hidden_layers")
        projections, experts = self.mlp(layers)
        attention = self.attention(layers)
        taken = ", ".join(f"{field}={value}" for field, value in self.taken.items())
        notes = (f"not in the file, so as {self.family.cls}'s class has it: {taken}",) if taken else ()
        activation = activation_in(self.config, self.family.activation)
        return Model(name, hf_id, layers, (*attention, *projections), notes, (*experts, *self.head()), activation)

    def head(self) -> tuple[LeftOut, ...]:
        if "vocab_size" not in self.config:
            return ()
        return (LeftOut("lm_head", (self.size("vocab_size"), self.size("hidden_size")), False, 1, True, HEAD),)

    def attention(self, layers: int) -> tuple[Projection, ...]:
        hidden, (heads, kv_heads) = self.size("hidden_size"), self.heads()
        width = self.head_dim(hidden, heads)
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

    def mlp(self, layers: int) -> tuple[tuple[Projection, ...], tuple[LeftOut, ...]]:
        """The feed-forward layers, and the fused experts that stand in their place."""
        field = self.family.experts_field
        if not field:
            return self.feed_forward(layers), ()
        hidden, sparse = self.size("hidden_size"), self.sparse_layers(layers)
        dense = self.feed_forward(layers - sparse) if sparse < layers else ()
        if not sparse:
            return dense, ()
        experts, width = self.size(field), self.size(self.family.experts_width)
        return dense, (
            LeftOut("gate_up_proj", (experts, 2 * width, hidden), False, sparse, False, EXPERTS),
            LeftOut("down_proj", (experts, hidden, width), False, sparse, False, EXPERTS),
        )

    def sparse_layers(self, layers: int) -> int:
        """How many layers have experts: every ``decoder_sparse_step``-th one that is not in ``mlp_only_layers``."""
        step = 1 if self.config.get("decoder_sparse_step") is None else self.size("decoder_sparse_step")
        without = self.config.get("mlp_only_layers") or []
        if not isinstance(without, list) or not all(isinstance(index, int) for index in without):
            self._fail("mlp_only_layers", f"is {without!r}, not a list of layer numbers")
        return sum((index + 1) % step == 0 and index not in without for index in range(layers))

    def feed_forward(self, count: int) -> tuple[Projection, ...]:
        """Gate, up and down, or what the family has in their place."""
        hidden, width, bias = self.size("hidden_size"), self.size("intermediate_size"), self.flag(self.family.mlp_bias)
        if self.family.layout == "gpt_neox":
            return (
                Projection("dense_h_to_4h", width, hidden, bias, count),
                Projection("dense_4h_to_h", hidden, width, bias, count),
            )
        down = Projection("down_proj", hidden, width, bias, count)
        if self.family.layout == "phi3":
            return (Projection("gate_up_proj", 2 * width, hidden, bias, count), down)
        return (
            Projection("gate_proj", width, hidden, bias, count),
            Projection("up_proj", width, hidden, bias, count),
            down,
        )
