"""Property: the projections of a model have the shapes, biases and counts of its real linear layers.

A wrong shape tunes kernels that nobody runs, and says nothing. So shapes are compared with hand-written ones, the table
with configs as published, and whatever cannot be known is refused by file, field and remedy.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.errors import UsageError
from doratune.tuner.models import (
    ALIASES,
    TABLE,
    Model,
    ModelConfigError,
    UnknownModelError,
    find_model,
    list_models,
    read_config,
)

Shapes = dict[str, tuple[int, int, bool, int]]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "mlp_bias": False,
}

LLAMA_SHAPES: Shapes = {
    "q_proj": (4096, 4096, False, 32),
    "k_proj": (1024, 4096, False, 32),
    "v_proj": (1024, 4096, False, 32),
    "o_proj": (4096, 4096, False, 32),
    "gate_proj": (14336, 4096, False, 32),
    "up_proj": (14336, 4096, False, 32),
    "down_proj": (4096, 14336, False, 32),
}

EXPECTED: dict[str, Shapes] = {
    "llama-3.1-8b": LLAMA_SHAPES,
    "qwen2.5-7b": {
        "q_proj": (3584, 3584, True, 28),
        "k_proj": (512, 3584, True, 28),
        "v_proj": (512, 3584, True, 28),
        "o_proj": (3584, 3584, False, 28),
        "gate_proj": (18944, 3584, False, 28),
        "up_proj": (18944, 3584, False, 28),
        "down_proj": (3584, 18944, False, 28),
    },
    "qwen3-32b": {
        "q_proj": (8192, 5120, False, 64),
        "k_proj": (1024, 5120, False, 64),
        "v_proj": (1024, 5120, False, 64),
        "o_proj": (5120, 8192, False, 64),
        "gate_proj": (25600, 5120, False, 64),
        "up_proj": (25600, 5120, False, 64),
        "down_proj": (5120, 25600, False, 64),
    },
    "qwen3-30b-a3b": {
        "q_proj": (4096, 2048, False, 48),
        "k_proj": (512, 2048, False, 48),
        "v_proj": (512, 2048, False, 48),
        "o_proj": (2048, 4096, False, 48),
        "experts.gate_proj": (768, 2048, False, 48 * 128),
        "experts.up_proj": (768, 2048, False, 48 * 128),
        "experts.down_proj": (2048, 768, False, 48 * 128),
    },
    "mixtral-8x7b": {
        "q_proj": (4096, 4096, False, 32),
        "k_proj": (1024, 4096, False, 32),
        "v_proj": (1024, 4096, False, 32),
        "o_proj": (4096, 4096, False, 32),
        "experts.gate_proj": (14336, 4096, False, 256),
        "experts.up_proj": (14336, 4096, False, 256),
        "experts.down_proj": (4096, 14336, False, 256),
    },
    "gemma-3-12b": {
        "q_proj": (4096, 3840, False, 48),
        "k_proj": (2048, 3840, False, 48),
        "v_proj": (2048, 3840, False, 48),
        "o_proj": (3840, 4096, False, 48),
        "gate_proj": (15360, 3840, False, 48),
        "up_proj": (15360, 3840, False, 48),
        "down_proj": (3840, 15360, False, 48),
    },
    "phi-4": {
        "qkv_proj": (7680, 5120, False, 40),
        "o_proj": (5120, 5120, False, 40),
        "gate_up_proj": (35840, 5120, False, 40),
        "down_proj": (5120, 17920, False, 40),
    },
}


def shapes(model: Model) -> Shapes:
    found = {p.name: (p.d_out, p.d_in, p.bias, p.count) for p in model.projections}
    assert len(found) == len(model.projections)
    return found


def write(folder: Path, config: object) -> Path:
    file = folder / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return file


def without(config: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names} | changes


@pytest.mark.parametrize("name", EXPECTED)
def test_listed_models_have_their_real_shapes(name: str) -> None:
    assert shapes(find_model(name)) == EXPECTED[name]


def test_the_table_gives_every_row_its_layers_and_widths() -> None:
    rows = {row["name"]: row for row in csv.DictReader(TABLE.open(newline="", encoding="utf-8"))}
    assert [model.name for model in list_models()] == list(rows)
    for model in list_models():
        row, found = rows[model.name], shapes(model)
        assert (model.hf_id, model.layers) == (row["hf_id"], int(row["num_layers"]))
        attention_in = int(row["num_heads"]) * int(row["head_dim"])
        assert found["o_proj"] == (int(row["hidden_size"]), attention_in, False, model.layers)
        fused = "+".join(name for name in found if name in ("qkv_proj", "gate_up_proj"))
        assert fused == row["fused_projections"]
        assert any(name.startswith("experts.") for name in found) == bool(row["experts_note"])


def test_only_qwen2_has_biases_in_the_table_and_only_on_q_k_v() -> None:
    for model in list_models():
        biased = [p.name for p in model.projections if p.bias]
        assert biased == (["q_proj", "k_proj", "v_proj"] if model.name.startswith("qwen2.5") else [])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-405b", 405.9),
        ("qwen2.5-7b", 7.62),
        ("qwen3-235b-a22b", 235.1),
        ("mixtral-8x7b", 46.7),
        ("phi-4", 14.7),
    ],
)
def test_parameters_with_embedding_and_head_add_up_to_the_published_count(name: str, billions: float) -> None:
    model = find_model(name)
    row = next(row for row in csv.DictReader(TABLE.open(newline="", encoding="utf-8")) if row["name"] == name)
    embedding_and_head = 2 * int(row["vocab_size"]) * int(row["hidden_size"])
    count = embedding_and_head + sum(p.d_out * p.d_in * p.count for p in model.projections)
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


def test_multimodal_models_say_that_the_vision_part_is_left_out() -> None:
    noted = {model.name for model in list_models() if model.notes}
    assert "gemma-3-4b" in noted
    assert "qwen2.5-vl-32b" in noted
    assert not noted & {"gemma-3-1b", "llama-3.1-8b", "qwen3-4b", "mistral-small-24b"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama-8b", "llama-3.1-8b"),
        ("LLAMA-8B", "llama-3.1-8b"),
        ("llama-70b", "llama-3.1-70b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/llama-3.1-8b", "llama-3.1-8b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        (" phi-4 ", "phi-4"),
    ],
)
def test_names_aliases_and_hugging_face_ids_in_any_case(name: str, found: str) -> None:
    assert find_model(name).name == found


def test_every_alias_leads_to_a_model_and_hides_none() -> None:
    names = {model.name for model in list_models()}
    assert set(ALIASES.values()) <= names
    assert not ALIASES.keys() & names


@pytest.mark.parametrize(
    ("name", "near"), [("llama-9b", "llama-8b"), ("qwen3-8", "qwen3-8b"), ("gemma3-4b", "gemma-3-4b")]
)
def test_an_unknown_model_gets_near_names_and_the_way_around(name: str, near: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        find_model(name)
    assert str(caught.value).startswith(f"unknown model {name!r}; did you mean ")
    assert near in str(caught.value)
    assert "--config path/to/config.json" in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_a_name_like_no_model_still_gets_the_way_around() -> None:
    with pytest.raises(UnknownModelError, match=r"^unknown model '' \(`doratune models` lists the known ones; for any"):
        find_model("")


def test_a_config_gives_what_the_table_gives(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    file = write(folder, LLAMA)
    model = read_config(file)
    assert shapes(model) == LLAMA_SHAPES
    assert (model.name, model.hf_id, model.layers, model.notes) == ("my-llama", "", 32, ())
    assert read_config(folder) == read_config(str(file)) == model


def test_a_file_of_another_name_names_the_model(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, LLAMA).rename(tmp_path / "tiny.json")).name == "tiny"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            without(LLAMA, "num_key_value_heads"),
            {"k_proj": (4096, 4096, False, 32)},
            id="an old llama has as many key heads as heads",
        ),
        pytest.param(
            without(LLAMA, attention_bias=True, mlp_bias=True),
            {name: (*shape[:2], True, 32) for name, shape in LLAMA_SHAPES.items()},
            id="llama with biases everywhere",
        ),
        pytest.param(without(LLAMA, head_dim=64), {"q_proj": (2048, 4096, False, 32)}, id="head_dim is believed"),
        pytest.param(
            without(LLAMA, head_dim=None), {"q_proj": (4096, 4096, False, 32)}, id="a null head_dim is derived"
        ),
        pytest.param(
            without(LLAMA, model_type="mistral", attention_bias=True),
            {"q_proj": (4096, 4096, False, 32)},
            id="mistral never has biases",
        ),
        pytest.param(
            without(LLAMA, "attention_bias", model_type="qwen2"),
            {"q_proj": (4096, 4096, True, 32), "o_proj": (4096, 4096, False, 32)},
            id="qwen2 has q k v biases without saying so",
        ),
        pytest.param(
            without(LLAMA, model_type="qwen3", hidden_size=2560),
            {"q_proj": (4096, 2560, False, 32), "o_proj": (2560, 4096, False, 32)},
            id="qwen3's head_dim is 128 when it is left out",
        ),
        pytest.param(
            without(LLAMA, model_type="mixtral", num_local_experts=4),
            {"experts.up_proj": (14336, 4096, False, 128)},
            id="mixtral's experts have intermediate_size",
        ),
        pytest.param(
            without(
                LLAMA,
                model_type="qwen3_moe",
                num_experts=8,
                moe_intermediate_size=768,
                decoder_sparse_step=2,
                mlp_only_layers=[0, 1, 3],
            ),
            {"gate_proj": (14336, 4096, False, 18), "experts.gate_proj": (768, 4096, False, 14 * 8)},
            id="qwen3_moe with dense layers between",
        ),
        pytest.param(
            without(LLAMA, model_type="phi3"),
            {"qkv_proj": (6144, 4096, False, 32), "gate_up_proj": (28672, 4096, False, 32)},
            id="phi3 is fused",
        ),
        pytest.param(
            {
                "model_type": "gpt_neox",
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_attention_heads": 8,
                "num_hidden_layers": 6,
            },
            {
                "query_key_value": (1536, 512, True, 6),
                "dense": (512, 512, True, 6),
                "dense_h_to_4h": (2048, 512, True, 6),
                "dense_4h_to_h": (512, 2048, True, 6),
            },
            id="gpt_neox is fused with biases",
        ),
    ],
)
def test_families_differ_where_their_classes_do(tmp_path: Path, config: dict[str, Any], expected: Shapes) -> None:
    model = read_config(write(tmp_path, config))
    found = shapes(model)
    assert {name: found[name] for name in expected} == expected
    assert model.notes == ()


def test_gemma3_as_published_leaves_out_its_class_defaults(tmp_path: Path) -> None:
    """gemma-3-4b's text_config gives neither heads nor head_dim; 2560 / 8 would be the wrong head_dim."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"hidden_size": 1152, "num_hidden_layers": 27}
    model = read_config(write(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": vision}))
    assert shapes(model) == shapes(find_model("gemma-3-4b"))
    assert model.notes == ("the language model alone: projections of the vision or audio part are left out",)


def test_a_text_config_without_a_type_has_the_outer_type(tmp_path: Path) -> None:
    nested = {"model_type": "qwen2_5_vl", "text_config": without(LLAMA, "model_type")}
    assert shapes(read_config(write(tmp_path, nested)))["q_proj"] == (4096, 4096, True, 32)


def test_an_unknown_type_with_llamas_fields_is_read_as_llama_and_says_so(tmp_path: Path) -> None:
    model = read_config(write(tmp_path, without(LLAMA, model_type="brand_new")))
    assert shapes(model) == LLAMA_SHAPES
    assert model.notes == ("model_type 'brand_new' is not known: read as Llama's projections from its fields",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "holds no JSON object but '[1]'; give a model's config.json"),
        ('{\n "hidden_size": 1,\n}', "not valid JSON (line 3, column 1: "),
        ("", "not valid JSON (line 1, column 1: "),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not readable as JSON ("),
        ("[" * 100_000, "not readable as JSON ("),
        ({}, "field num_hidden_layers is missing; add it (an integer of at least 1) or download"),
        (without(LLAMA, "hidden_size"), "field hidden_size is missing; add it"),
        (without(LLAMA, "intermediate_size"), "field intermediate_size is missing; add it"),
        (without(LLAMA, "num_attention_heads"), "field num_attention_heads is missing; add it"),
        (without(LLAMA, "num_key_value_heads", model_type="new"), "field num_key_value_heads is missing; add it"),
        (without(LLAMA, hidden_size=-1), "field hidden_size is -1, not an integer of at least 1; correct it or"),
        (without(LLAMA, hidden_size=0), "field hidden_size is 0, not an integer"),
        (without(LLAMA, hidden_size=4096.0), "field hidden_size is 4096.0, not an integer"),
        (without(LLAMA, hidden_size="4096"), "field hidden_size is '4096', not an integer"),
        (without(LLAMA, num_hidden_layers=True), "field num_hidden_layers is True, not an integer"),
        (without(LLAMA, intermediate_size=[1, 2]), "field intermediate_size is [1, 2], not an integer"),
        (without(LLAMA, head_dim=0), "field head_dim is 0, not an integer"),
        (
            without(LLAMA, hidden_size=4100),
            "field head_dim is missing, and hidden_size=4100 is not divisible by num_attention_heads=32; add it",
        ),
        (
            without(LLAMA, num_key_value_heads=5),
            "field num_key_value_heads is 5, which does not divide num_attention_heads=32; correct it",
        ),
        (without(LLAMA, attention_bias="no"), "field attention_bias is 'no', not true or false; correct it"),
        (without(LLAMA, model_type=3), "field model_type is 3, not a name; correct it"),
        ({"text_config": 3}, "field text_config is 3, not an object; correct it"),
        ({"text_config": LLAMA | {"hidden_size": 0}}, "field text_config.hidden_size is 0, not an integer"),
        (without(LLAMA, model_type="qwen3_moe"), "field num_experts is missing; add it"),
        (without(LLAMA, model_type="qwen3_moe", num_experts=8), "field moe_intermediate_size is missing; add it"),
        (without(LLAMA, model_type="mixtral"), "field num_local_experts is missing; add it"),
        (
            without(LLAMA, model_type="qwen3_moe", num_experts=8, mlp_only_layers="all"),
            "field mlp_only_layers is 'all', not a list of layer numbers; correct it",
        ),
        (
            without(LLAMA, model_type="deepseek_v3", kv_lora_rank=512),
            "field kv_lora_rank means low-rank attention, which is not known for model_type 'deepseek_v3'; the known",
        ),
        (without(LLAMA, model_type="new_moe", num_experts=8), "field num_experts means experts, which is not known"),
    ],
)
def test_a_config_that_cannot_be_read_names_file_field_and_remedy(tmp_path: Path, config: object, message: str) -> None:
    file = write(tmp_path, config)
    with pytest.raises(ModelConfigError) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert ";" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_and_a_folder_without_one(tmp_path: Path) -> None:
    for path, file in ((tmp_path, tmp_path / "config.json"), (tmp_path / "no.json", tmp_path / "no.json")):
        with pytest.raises(ModelConfigError) as caught:
            read_config(path)
        assert str(caught.value) == f"{file}: no such file; give a model's config.json or its folder"


def test_a_binary_file_is_no_config(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelConfigError, match="cannot be read as text"):
        read_config(file)


json_values = st.sampled_from([None, True, False, -1, 0, 1, 8, 96, 4096, 10**30, 0.5, "8", "", [], [0], {}, {"a": 1}])


@given(
    st.sampled_from(["llama", "qwen2", "qwen3_moe", "mixtral", "gemma3", "phi3", "gpt_neox", "other"]),
    st.dictionaries(
        st.sampled_from([*LLAMA, "head_dim", "num_experts", "num_local_experts", "mlp_only_layers", "text_config"]),
        json_values,
    ),
)
def test_any_json_is_read_or_refused_with_the_error_meant_for_it(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: dict[str, Any]
) -> None:
    file = write(tmp_path_factory.getbasetemp(), {**LLAMA, "model_type": kind, **changes})
    try:
        model = read_config(file)
    except ModelConfigError:
        return
    assert all(min(p.d_out, p.d_in, p.count) >= 1 for p in model.projections)
    assert all(isinstance(p.bias, bool) for p in model.projections)
