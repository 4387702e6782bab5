"""Property: what is listed for a config is every nn.Linear and Conv1D of transformers' class for it, with its true
shape, bias and number; and what is tuned is exactly what PEFT puts DoRA on.

The class of each config is written here by hand, built here, and looked through here: nothing of the reader is used to
know the truth.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from doratune.tuner.class_layers import list_layers  # noqa: E402
from doratune.tuner.projections import LeftOut, Model, ModelConfigError, Projection  # noqa: E402

MAJOR = int(transformers.__version__.split(".")[0])
CONFIGS = Path(__file__).with_name("configs")

PUBLISHED = {
    "ERNIE-4.5-21B-A3B": "Ernie4_5_MoeForCausalLM",
    "LFM2-1.2B": "Lfm2ForCausalLM",
    "Minitron-4B": "NemotronForCausalLM",
    "NVIDIA-Nemotron-Nano-9B-v2": "NemotronHForCausalLM",
    "Qwen2.5-Omni-7B": "Qwen2_5OmniForConditionalGeneration",
    "falcon-7b": "FalconForCausalLM",
    "gemma-4-12B": "Gemma4UnifiedForConditionalGeneration",
    "glm-4-9b-chat-hf": "GlmForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "phi-2": "PhiForCausalLM",
    "starcoder2-7b": "Starcoder2ForCausalLM",
    "t5-base": "T5ForConditionalGeneration",
    "vit-base": "ViTModel",
}
"""Configs as published, without `architectures`, and the class that reads them."""

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 128}
GQA = {**TEXT, "num_key_value_heads": 2}
MOE = {**GQA, "moe_intermediate_size": 32}
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", GQA),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3ForCausalLM", GQA),
    "gemma": ("GemmaForCausalLM", {**GQA, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**GQA, "head_dim": 16}),
    "gemma3_text": ("Gemma3ForCausalLM", {**GQA, "head_dim": 16}),
    "phi": ("PhiForCausalLM", TEXT),
    "phi3": ("Phi3ForCausalLM", {**GQA, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 64, "num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4, "vocab_size": 128},
    ),
    "gptj": ("GPTJForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "vocab_size": 128,
        },
    ),
    "mpt": ("MptForCausalLM", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128}),
    "stablelm": ("StableLmForCausalLM", GQA),
    "cohere": ("CohereForCausalLM", GQA),
    "olmo2": ("Olmo2ForCausalLM", GQA),
    "granite": ("GraniteForCausalLM", GQA),
    "mixtral": ("MixtralForCausalLM", {**GQA, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": 4, "decoder_sparse_step": 2}),
    "olmoe": ("OlmoeForCausalLM", {**GQA, "num_experts": 4}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {**GQA, "intermediate_size_mlp": 80, "num_local_experts": 4, "head_dim": 16, "interleave_moe_layer_step": 2},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    ),
    "jamba": (
        "JambaForCausalLM",
        {**GQA, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4},
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    ),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {**TEXT, "num_hidden_layers": 3, "num_key_value_heads": 1}),
    "bert": ("BertModel", TEXT),
    "roberta": ("RobertaModel", TEXT),
    "distilbert": ("DistilBertModel", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 128}),
    "albert": ("AlbertModel", {**TEXT, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2Model", TEXT),
    "electra": ("ElectraModel", {**TEXT, "embedding_size": 16}),
    "modernbert": ("ModernBertModel", {**TEXT, "pad_token_id": 0}),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 128}),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 80,
            "vocab_size": 128,
        },
    ),
    "mt5": (
        "MT5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 80,
            "vocab_size": 128,
            "pad_token_id": 0,
        },
    ),
    "wav2vec2": ("Wav2Vec2Model", {**TEXT, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}),
    "dinov2": ("Dinov2Model", {k: v for k, v in VISION.items() if k != "intermediate_size"}),
    "swin": ("SwinModel", {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32}),
    "siglip_vision_model": ("SiglipVisionModel", VISION),
    "clip": (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GQA},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **GQA},
            "vision_config": {"hidden_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 64},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**GQA, "head_dim": 16}, "vision_config": VISION},
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel",
        {
            "encoder": {"model_type": "vit", **VISION},
            "decoder": {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 4},
        },
    ),
}
"""A config of each kind in small, and the class that reads it. Sizes differ where a class could confuse them."""


def built(config: dict[str, Any], cls: str) -> nn.Module:
    """The class built on the meta device."""
    settings = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    with torch.device("meta"):
        return getattr(transformers, cls)(CONFIG_MAPPING[config["model_type"]](**settings))


def truth(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    """(d_out, d_in, bias) of every linear layer by its full name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.weight.shape[0], module.weight.shape[1], module.bias is not None)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0], True)
    return found


def linear(model: Model) -> list[Projection | LeftOut]:
    return [*model.projections, *(left for left in model.left_out if left.linear)]


def listed(model: Model) -> dict[str, tuple[int, int, bool]]:
    return {name: (*layer.shape, layer.bias) for layer in linear(model) for name in layer.modules}


def assert_true(model: Model, real: nn.Module) -> None:
    assert listed(model) == truth(real)
    assert all(layer.count == len(layer.modules) for layer in (*model.projections, *model.left_out))
    names = Counter(name for layer in linear(model) for name in layer.modules)
    assert set(names.values()) <= {1}


def tuned(model: Model) -> set[str]:
    return {name for projection in model.projections for name in projection.modules}


def reasons(model: Model) -> dict[str, str]:
    return {name: left.why for left in model.left_out for name in left.modules}


def need(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_lists_every_linear_layer_of_its_class(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    need(config["model_type"])
    real = built(config, PUBLISHED[name])
    model = list_layers(config, name)
    assert_true(model, real)
    assert PUBLISHED[name] in model.notes[0]
    assert list_layers({**config, "architectures": [PUBLISHED[name]]}, name).projections == model.projections


def test_every_published_config_here_has_its_class_written_down() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_lists_every_linear_layer_and_tunes_what_peft_puts_dora_on(kind: str) -> None:
    need(kind)
    if MAJOR < 5 and kind in ("swin", "qwen2_5_vl"):
        pytest.skip("what this test builds, transformers before 5 builds from a file alone")
    cls, sizes = KINDS[kind]
    config = {"model_type": kind, **sizes}
    real = built(config, cls)
    model = list_layers(config, kind)
    assert_true(model, real)
    assert_tuned_is_what_peft_does(model, real)


def assert_tuned_is_what_peft_does(model: Model, real: nn.Module, **task: Any) -> None:
    """What PEFT's all-linear targets, less what it refuses or never calls, each with its reason."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    targets = _maybe_include_all_linear_layers(
        peft.LoraConfig(target_modules="all-linear", **task), real
    ).target_modules
    refused = {name for name, why in reasons(model).items() if "output head" not in why} & set(truth(real))
    assert tuned(model) == set(targets) - refused
    if tuned(model):
        names = sorted(f"model.{name}" for name in tuned(model))
        adapted = peft.get_peft_model(Holder(real), peft.LoraConfig(use_dora=True, r=2, target_modules=names))
        with_dora = {name for name, module in adapted.base_model.model.named_modules() if is_dora(module)}
        assert with_dora == set(names)


class Holder(nn.Module):
    """Hides a model's type from PEFT, which takes names such as gate_proj for fused experts in some types."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def is_dora(module: nn.Module) -> bool:
    return len(getattr(module, "lora_magnitude_vector", ())) > 0


def test_mamba_s_out_proj_is_what_peft_refuses() -> None:
    peft = pytest.importorskip("peft")
    config = {"model_type": "mamba", **KINDS["mamba"][1]}
    model = list_layers(config, "mamba")
    assert {why for name, why in reasons(model).items() if name.endswith("out_proj")} == {
        "PEFT refuses adapters on out_proj of Mamba models"
    }
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(built(config, "MambaForCausalLM"), peft.LoraConfig(target_modules=["out_proj"]))


def test_a_multihead_attention_calls_no_layer_of_its_own() -> None:
    model = list_layers({"model_type": "siglip_vision_model", **VISION}, "siglip")
    assert {name.removeprefix("vision_model."): why for name, why in reasons(model).items()} == {
        "head.attention.in_proj_weight": "a weight of nn.MultiheadAttention, on which PEFT has no DoRA",
        "head.attention.out_proj": "nn.MultiheadAttention reads its weight and never calls it",
    }


def test_fused_experts_are_told_and_not_tuned() -> None:
    model = list_layers({"model_type": "mixtral", **KINDS["mixtral"][1]}, "mixtral")
    experts = {left.name: (left.shape, left.count) for left in model.left_out if not left.linear}
    if MAJOR < 5:
        assert experts == {}
        assert {p.count for p in model.projections if p.name in ("w1", "w2", "w3")} == {8}
        return
    assert experts == {"gate_up_proj": ((4, 192, 64), 2), "down_proj": ((4, 64, 96), 2)}
    assert {p.name for p in model.projections} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {left.why for left in model.left_out if not left.linear} == {
        "fused weights of experts: PEFT refuses DoRA on parameters"
    }


def test_layers_with_the_names_of_fused_experts_are_tuned_and_peft_s_confusion_is_told() -> None:
    need("qwen3_moe")
    model = list_layers({"model_type": "qwen3_moe", **KINDS["qwen3_moe"][1]}, "m")
    if any(not left.linear for left in model.left_out):
        assert {p.name for p in model.projections} >= {"gate_proj", "up_proj", "down_proj"}
        assert "PEFT 0.21" in model.notes[-1]


def test_a_router_that_returns_more_than_a_product_is_not_tuned() -> None:
    need("llama4_text")
    model = list_layers({"model_type": "llama4_text", **KINDS["llama4_text"][1]}, "llama4")
    if MAJOR >= 5:
        assert [left.why for left in model.left_out if left.name == "router"] == [
            "Llama4Router is not x·Wᵀ + b, which DoRA is for"
        ]


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("RobertaForSequenceClassification", {"classifier.dense", "classifier.out_proj"}),
        ("RobertaForTokenClassification", {"classifier"}),
        ("RobertaForQuestionAnswering", {"qa_outputs"}),
        ("RobertaForMaskedLM", {"lm_head.decoder"}),
        ("RobertaModel", set()),
    ],
)
def test_the_class_that_a_file_names_is_read_and_the_head_of_its_task_is_left_out(
    architecture: str, heads: set[str]
) -> None:
    config = {"model_type": "roberta", **TEXT}
    model = list_layers({**config, "architectures": [architecture]}, "roberta")
    assert_true(model, built(config, architecture))
    assert set(reasons(model)) == heads


@pytest.mark.parametrize(
    "extra",
    [
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        {"torch_dtype": None, "rope_scaling": None, "head_dim": None, "pretraining_tp": 1},
        {"attn_implementation": "flash_attention_2", "_attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation_internal": "flash_attention_3", "_flash_attn_2_enabled": True},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"attention_dropout": None, "initializer_range": None, "use_cache": None, "attention_bias": None},
        {"transformers_version": "99.0.0", "field_of_the_future": {"a": [1, None]}},
        {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}},
        {"architectures": None},
        {"architectures": []},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_says_how_a_model_is_stored_or_run_does_not_change_its_layers(extra: dict[str, Any]) -> None:
    config = {"model_type": "llama", **GQA}
    assert list_layers({**config, **extra}, "m").projections == list_layers(config, "m").projections


def test_a_quantised_config_says_that_the_layers_are_the_unquantised_ones() -> None:
    model = list_layers({"model_type": "llama", **GQA, "quantization_config": {"quant_method": "awq"}}, "m")
    assert model.notes[-1] == "quantization_config is ignored: the layers have their unquantised shapes"


FILLED_IN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "one": ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": None}, {"vocab_size=50257"}),
    "several": (
        {"model_type": "glm", "num_hidden_layers": 1, "num_attention_heads": 32, "pad_token_id": 0},
        {
            "vocab_size=151552",
            "hidden_size=4096",
            "intermediate_size=13696",
            "num_key_value_heads=2",
            "head_dim=128",
        },
    ),
    "under another name": (
        {"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"vocab_size=50257"},
    ),
    "derived": ({"model_type": "llama", **TEXT}, set()),
    "in a part": (
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", **{k: v for k, v in GQA.items() if k != "intermediate_size"}},
            "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32, "patch_size": 14},
        },
        {"text_config.intermediate_size=11008", "vision_config.num_channels=3"},
    ),
    "a whole part": (
        {"model_type": "gemma3", "text_config": {**GQA, "head_dim": 16}},
        {"all of vision_config"},
    ),
}
"""Configs that lack sizes, and what the note must say of them."""


@pytest.mark.parametrize(("config", "filled_in"), FILLED_IN.values(), ids=FILLED_IN.keys())
def test_sizes_that_the_class_fills_in_are_told(config: dict[str, Any], filled_in: set[str]) -> None:
    start = re.compile("not in the file, so as [A-Za-z0-9]+Config has it: ")
    notes = [start.sub("", note) for note in list_layers(config, "m").notes if start.match(note)]
    assert set(", ".join(notes).split(", ")) - {""} == filled_in


SHAPING = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "shared_expert_intermediate_size",
    "n_routed_experts",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "state_size",
    "n_embd",
    "n_layer",
    "ffn_dim",
    "d_model",
    "d_kv",
    "d_ff",
    "encoder_layers",
    "decoder_ffn_dim",
]


@pytest.mark.parametrize("field", SHAPING)
def test_a_field_that_changes_the_layers_when_it_is_missing_is_told(field: str) -> None:
    """Of the kinds here that have the field and a number as its default. Others derive it from sizes in the file."""
    told = 0
    for kind, (_, sizes) in KINDS.items():
        if field not in sizes or kind not in CONFIG_MAPPING:
            continue
        default = inspect.signature(CONFIG_MAPPING[kind]).parameters.get(field)
        if default is None or default.default is None:
            continue
        config = {"model_type": kind, **sizes}
        try:
            without = list_layers({name: value for name, value in config.items() if name != field}, "m")
        except ModelConfigError:
            continue
        whole = list_layers(config, "m")
        if (without.projections, without.left_out) != (whole.projections, whole.left_out):
            assert f" {field}=" in "".join(without.notes), kind
            told += 1
    assert told or MAJOR < 5


@pytest.mark.parametrize(
    "unset",
    ["rope_theta", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "rope_scaling"],
)
def test_null_in_a_field_that_is_no_size_is_the_class_s_default(unset: str) -> None:
    config = {"model_type": "llama", **GQA}
    assert list_layers({**config, unset: None}, "m") == list_layers(config, "m")


def test_null_in_many_fields_is_the_class_s_default_and_null_for_a_size_is_refused() -> None:
    config = {"model_type": "llama", **GQA}
    unset = dict.fromkeys(["rope_theta", "rms_norm_eps", "hidden_act", "head_dim", "attention_bias", "mlp_bias"])
    assert list_layers({**config, **unset}, "m") == list_layers(config, "m")
    with pytest.raises(ModelConfigError, match="cannot"):
        list_layers({**config, **unset, "vocab_size": None}, "m")
    with pytest.raises(ModelConfigError):  # by the name that GPT-2 does not use itself
        list_layers({"model_type": "gpt2", "hidden_size": None, "n_layer": 2}, "m")


@pytest.mark.parametrize("base", ["PreTrainedModel", "LlamaPreTrainedModel"])
def test_a_base_class_without_layers_is_refused(base: str) -> None:
    with pytest.raises(ModelConfigError, match=f"{base} has no linear layer.*in the field architectures"):
        list_layers({"model_type": "llama", **GQA, "architectures": [base]}, "m")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": None}, "field model_type is missing, and it names the model's class"),
        ({"model_type": 3}, "field model_type is 3, not a name"),
        ({"model_type": "lamma"}, "has no class for model_type 'lamma'; did you mean llama?; a newer transformers may"),
        (
            {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.C"}},
            "has no class for model_type 'chatglm': its code comes with the model, and doratune executes none of it",
        ),
        (
            {"architectures": ["MyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "my.MyForCausalLM"}},
            "names MyForCausalLM, which transformers",
        ),
        ({"architectures": ["MyForCausalLM"]}, "take the field out of a copy of the file to read it as model_type"),
        ({"architectures": ["BertModel"]}, "names BertModel, which is no class of model_type 'glm'"),
        ({"architectures": 3}, "architectures"),
        ({"hidden_size": "64"}, "cannot"),
        ({"hidden_size": -64}, "cannot"),
        ({"hidden_size": None}, "cannot"),
        ({"hidden_size": 10**18}, "cannot build GlmForCausalLM"),
        (
            {"num_hidden_layers": 10**9},
            "field num_hidden_layers is 1000000000, more than any model has (at most 10000)",
        ),
        ({"vision_config": {"depths": [1, 10**9]}}, "field vision_config.depths is 1000000000"),
        ({"text_config": {"moe_num_experts": 10**7}}, "field text_config.moe_num_experts is 10000000"),
        ({"num_labels": 10**12}, "field num_labels is 1000000000000, more than any model has"),
        (
            {"model_type": "upernet", "backbone": "someone/model", "use_pretrained_backbone": True},
            "",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_transformers_cannot_build_is_refused_in_one_sentence(changes: dict[str, Any], said: str) -> None:
    config = {"model_type": "glm", **GQA, "pad_token_id": 0, **changes}
    with pytest.raises(ModelConfigError) as caught:
        list_layers({key: value for key, value in config.items() if value is not None or key != "model_type"}, "m")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
