"""Property: the projections of a model have the shapes, biases and counts of its real linear layers.

A wrong shape tunes kernels that nobody runs, and says nothing. So shapes are compared with hand-written ones, the table
with configs as published, and whatever cannot be known is refused by file, field and remedy.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

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
    requested_model,
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
    },
    "mixtral-8x7b": {
        "q_proj": (4096, 4096, False, 32),
        "k_proj": (1024, 4096, False, 32),
        "v_proj": (1024, 4096, False, 32),
        "o_proj": (4096, 4096, False, 32),
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
        assert any(not left.linear for left in model.left_out) == bool(row["experts_note"])
        head = ("lm_head", (int(row["vocab_size"]), int(row["hidden_size"])))
        assert [(left.name, left.shape) for left in model.left_out if left.linear] == [head]


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
    experts = sum(math.prod(left.shape) * left.count for left in model.left_out if not left.linear)
    count = embedding_and_head + experts + sum(p.d_out * p.d_in * p.count for p in model.projections)
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


def test_multimodal_models_say_that_the_vision_part_is_left_out() -> None:
    noted = {model.name for model in list_models() if any("the language model alone" in note for note in model.notes)}
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


needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")


@pytest.fixture
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@needs_transformers
def test_a_config_gives_what_the_table_gives(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    file = write(folder, LLAMA)
    model = read_config(file)
    assert shapes(model) == LLAMA_SHAPES
    assert (model.name, model.hf_id, model.layers) == ("my-llama", "", 32)
    assert "LlamaForCausalLM" in model.notes[0]
    assert read_config(folder) == read_config(str(file)) == model


@needs_transformers
def test_a_published_config_is_read_with_its_class(tmp_path: Path) -> None:
    model = read_config(Path(__file__).with_name("configs") / "t5-base.json")
    assert model.name == "t5-base"
    assert sum(p.count for p in model.projections) == 192
    assert all(name for p in model.projections for name in p.modules)


@needs_transformers
def test_what_transformers_refuses_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, without(LLAMA, model_type="lamma"))
    with pytest.raises(ModelConfigError) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: transformers ")
    assert "did you mean llama?" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("_without_transformers")
def test_a_byte_order_mark_before_the_config_changes_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path, LLAMA)
    model = read_config(plain)
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_config(plain) == model


@pytest.mark.usefixtures("_without_transformers")
def test_without_transformers_a_family_is_read_from_its_fields_and_says_so(tmp_path: Path) -> None:
    model = read_config(write(tmp_path, LLAMA).rename(tmp_path / "tiny.json"))
    assert shapes(model) == LLAMA_SHAPES
    assert (model.name, model.layers, model.left_out) == ("tiny", 32, ())
    assert model.notes == (
        "read from the config's fields, since transformers is not installed",
        "vocab_size is not in the file: the output head is not listed",
    )
    told = read_config(write(tmp_path, without(LLAMA, vocab_size=128256, architectures=["LlamaForCausalLM"])))
    assert [(left.name, left.shape) for left in told.left_out] == [("lm_head", (128256, 4096))]


@pytest.mark.usefixtures("_without_transformers")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "falcon"}, "model_type 'falcon' "),
        ({"model_type": "gemma3"}, "model_type 'gemma3' "),
        ({"model_type": None}, "model_type None "),
        ({"model_type": ["llama"]}, "model_type ['llama'] "),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "model_type 'llama' with architectures ['LlamaForSequenceClassification'] ",
        ),
    ],
    ids=str,
)
def test_without_transformers_anything_else_is_refused_with_the_remedy(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    file = write(tmp_path, {**LLAMA, **changes})
    with pytest.raises(ModelConfigError) as caught:
        read_config(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: transformers is not installed, and only it knows the layers of {what}")
    assert message.endswith("; pip install 'doratune[peft]'")
    assert "known without it: llama, mistral, mixtral" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "expected a JSON object, found a list; give a model's config.json"),
        ('{\n "hidden_size": 1,\n}', "not valid JSON (line 3, column 1: "),
        ("", "not valid JSON (line 1, column 1: "),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not readable as JSON ("),
        ("[" * 100_000, "not readable as JSON ("),
        (without(LLAMA, "hidden_size"), "field hidden_size is missing; add it"),
        (without(LLAMA, num_key_value_heads=5), "field num_key_value_heads is 5, which does not divide"),
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


def test_one_of_model_and_config_is_asked_for() -> None:
    for both in ((None, None), ("llama-8b", "config.json")):
        with pytest.raises(UsageError, match="name either a model"):
            requested_model(*both)
    assert requested_model("llama-8b", None)() == find_model("llama-8b")
    with pytest.raises(ModelConfigError, match="no such file"):
        requested_model(None, "missing.json")()
