"""Property: what the table's families give from a config's fields is what transformers' class has, and every model of
the table is listed as its class would be.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.tuner.families import FAMILIES, check_sizes, covers, read_family
from doratune.tuner.models import _LANGUAGE_PART, TABLE, find_model, list_models
from doratune.tuner.projections import Model, ModelConfigError

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "pad_token_id": 0,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "gpt_neox": {"num_key_value_heads": None},
}
ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_neox")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"head_dim": 32}) for family in FAMILIES if family not in ("phi3", "gpt_neox")),
    *((family, {"attention_bias": True}) for family in FAMILIES if family in ATTENTION_BIAS),
    *((family, {"attention_bias": True}) for family in ("mistral", "mixtral", "qwen2", "phi3")),  # never heard
    *((family, {"num_key_value_heads": None}) for family in ("llama", "qwen2", "qwen3", "phi3")),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": None}),
    ("llama", {"attention_bias": None}),
    ("mistral", {"head_dim": None}),
    ("gpt_neox", {"attention_bias": False}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
]
LEFT_OUT: list[tuple[str, tuple[str, ...]]] = [
    ("llama", ("num_key_value_heads",)),
    ("phi3", ("num_key_value_heads",)),
    ("mistral", ("num_key_value_heads",)),
    ("mixtral", ("num_key_value_heads",)),
    ("gemma2", ("num_attention_heads", "num_key_value_heads")),
    ("gemma3_text", ("num_attention_heads", "num_key_value_heads")),
]
"""Fields that a class fills in by itself."""

Found = Counter[tuple[str, tuple[int, ...], bool]]


def tuned(model: Model) -> Found:
    return Counter({(p.name, p.shape, p.bias): p.count for p in model.projections})


def left_out(model: Model) -> Found:
    return Counter({(left.name, left.shape, left.bias): left.count for left in model.left_out})


def config_of(family: str, changes: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    config = {**BASE, **OF_FAMILY.get(family, {}), **changes}
    return {"model_type": family, **{key: value for key, value in config.items() if key not in without}}


def of_class(config: dict[str, Any]) -> Model:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 has a layer for each expert")
    from doratune.tuner.class_layers import list_layers

    return list_layers(config, "m")


def assert_as_the_class(config: dict[str, Any]) -> None:
    read, real = read_family(config, "m"), of_class(config)
    assert tuned(read) == tuned(real)
    assert left_out(read) == left_out(real)
    assert read.layers == real.layers
    assert read.activation == real.activation
    assert [left.why for left in read.left_out] == [left.why for left in real.left_out]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_a_family_has_the_layers_of_its_class(family: str, changes: dict[str, Any]) -> None:
    assert_as_the_class(config_of(family, changes))


@pytest.mark.parametrize(("family", "fields"), LEFT_OUT, ids=str)
def test_a_family_fills_in_what_its_class_fills_in(family: str, fields: tuple[str, ...]) -> None:
    config = config_of(family, {"num_attention_heads": 8}, fields)
    assert_as_the_class(config)


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_a_model_of_the_table_has_the_layers_of_its_class(model: Model) -> None:
    row = next(row for row in csv.DictReader(TABLE.open(newline="", encoding="utf-8")) if row["name"] == model.name)
    family = _LANGUAGE_PART.get(row["model_type"], row["model_type"])
    width = int(row["intermediate_size"])
    experts = {"num_experts": "num_experts", "num_local_experts": "num_local_experts"}
    counts = {experts[FAMILIES[family].experts_field]: int(row["num_experts"])} if row["num_experts"] else {}
    real = of_class(
        {
            "model_type": family,
            "hidden_size": int(row["hidden_size"]),
            "num_hidden_layers": int(row["num_layers"]),
            "num_attention_heads": int(row["num_heads"]),
            "num_key_value_heads": int(row["num_kv_heads"]),
            "head_dim": int(row["head_dim"]),
            "intermediate_size": width,
            "moe_intermediate_size": width,
            "vocab_size": int(row["vocab_size"]),
            "pad_token_id": 0,
            **counts,
        }
    )
    assert tuned(model) == tuned(real)
    assert left_out(model) == left_out(real)
    assert model.activation == real.activation


def test_a_family_covers_its_causal_lm_and_no_other_class() -> None:
    config = config_of("qwen2", {})
    assert covers(config)
    assert covers({**config, "architectures": None})
    assert covers({**config, "architectures": ["Qwen2ForCausalLM"]})
    assert not covers({**config, "architectures": ["Qwen2ForSequenceClassification"]})
    assert not covers({**config, "model_type": "qwen2_vl"})
    assert not covers({**config, "model_type": ["qwen2"]})
    transformers = pytest.importorskip("transformers")
    for family, known in FAMILIES.items():
        if not family.startswith("qwen3"):  # of transformers 4.51
            assert hasattr(transformers, f"{known.cls}ForCausalLM"), family


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "field hidden_size is missing; add it (an integer of at least 1) or download"),
        ({"num_hidden_layers": None}, "field num_hidden_layers is missing; add it"),
        ({"intermediate_size": None}, "field intermediate_size is missing; add it"),
        ({"num_attention_heads": None}, "field num_attention_heads is missing; add it"),
        ({"hidden_size": -1}, "field hidden_size is -1, not an integer of at least 1; correct it or download"),
        ({"hidden_size": 64.0}, "field hidden_size is 64.0, not an integer"),
        (
            {"num_hidden_layers": 10**30},
            f"field num_hidden_layers is {10**30}, more than any model has (at most 10000)",
        ),
        ({"num_hidden_layers": True}, "field num_hidden_layers is True, not an integer"),
        ({"intermediate_size": [1, 2]}, "field intermediate_size is [1, 2], not an integer"),
        ({"num_key_value_heads": 3}, "field num_key_value_heads is 3, which does not divide num_attention_heads=4"),
    ],
    ids=str,
)
def test_a_size_that_is_missing_or_wrong_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        check_sizes(config_of("llama", changes))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            config_of("llama", {"hidden_size": 65}),
            "field head_dim is missing, and hidden_size=65 is not divisible by num_attention_heads=4",
        ),
        (config_of("llama", {"head_dim": 0}), "field head_dim is 0, not an integer"),
        (config_of("llama", {"attention_bias": "no"}), "field attention_bias is 'no', not true or false; correct it"),
        (config_of("qwen3_moe", {"num_experts": None}), "field num_experts is missing; add it"),
        (config_of("qwen3_moe", {"mlp_only_layers": "all"}), "field mlp_only_layers is 'all', not a list of layer"),
        (config_of("llama", {"vocab_size": 0}), "field vocab_size is 0, not an integer"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_field_that_cannot_be_read_names_itself_and_the_remedy(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_family(config, "m")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("family", "missing", "changes", "said"),
    [
        (
            "mixtral",
            "num_key_value_heads",
            {"num_attention_heads": 4},
            "field num_key_value_heads is missing, and its class's default 8 does not divide num_attention_heads=4",
        ),
        (
            "gemma2",
            "num_attention_heads",
            {"num_key_value_heads": 3},
            "field num_attention_heads is missing, and num_key_value_heads=3 does not divide its class's default 8",
        ),
    ],
)
def test_a_default_that_does_not_fit_is_said_to_be_one(
    family: str, missing: str, changes: dict[str, Any], said: str
) -> None:
    config = config_of(family, changes, (missing,))
    for read in (check_sizes, lambda config: read_family(config, "m")):
        with pytest.raises(ModelConfigError) as caught:
            read(config)
        assert str(caught.value).startswith(f"{said}; add it")


def test_defaults_of_the_class_that_shape_the_layers_are_told() -> None:
    config = config_of("qwen3", {}, ("head_dim",))
    assert read_family(config, "m").notes == ("not in the file, so as Qwen3's class has it: head_dim=128",)
    assert read_family({**config, "head_dim": 16}, "m").notes == ()


json_values = st.sampled_from([None, True, False, -1, 0, 1, 8, 96, 4096, 10**30, 0.5, "8", "", [], [0], {}, {"a": 1}])


@given(
    st.sampled_from(list(FAMILIES)),
    st.dictionaries(
        st.sampled_from([*BASE, "head_dim", "num_experts", "num_local_experts", "mlp_only_layers", "attention_bias"]),
        json_values,
    ),
)
def test_any_json_is_read_or_refused_with_the_error_meant_for_it(family: str, changes: dict[str, Any]) -> None:
    config = json.loads(json.dumps(config_of(family, changes)))
    try:
        model = read_family(config, "m")
    except ModelConfigError:
        return
    assert all(min(p.d_out, p.d_in, p.count) >= 1 for p in model.projections)
    assert all(isinstance(p.bias, bool) for p in model.projections)


def test_experts_of_the_table_are_told_and_not_tuned() -> None:
    model = find_model("qwen3-30b-a3b")
    assert {p.name for p in model.projections} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert left_out(model) == {
        ("gate_up_proj", (128, 1536, 2048), False): 48,
        ("down_proj", (128, 2048, 768), False): 48,
        ("lm_head", (151936, 2048), False): 1,
    }
