"""Every kind of fault is found where it was planted, and no other; sound adapters and checkpoints have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from doratune.adapters.adapter import Adapter
from doratune.adapters.checkpoint import Checkpoint
from doratune.adapters.errors import AdapterError
from doratune.adapters.examine_adapter import examine_adapter
from doratune.adapters.examine_checkpoint import examine_checkpoint
from doratune.adapters.fault import KINDS, Fault

from ..integrations.peft.peft_models import shake
from .test_convert import flat, on_inputs
from .world import DOWN, PREFIX, K, Q, Tensors, Trained, adapted, edit, edit_weights, llama, train, weights_of

M = ".lora_magnitude_vector"
Change = Callable[[Tensors, dict[str, Any], Tensors], object]
"""A change of an adapter's tensors and config, which may look at the checkpoint's weights."""


def found(folder: Trained, *, checkpoint: bool = True) -> list[Fault]:
    with Adapter(folder.adapter) as adapter, Checkpoint(folder.checkpoint) as weights:
        return examine_adapter(adapter, weights if checkpoint else None)


def kinds(faults: list[Fault]) -> set[str]:
    return {fault.kind.name for fault in faults}


def both(one: Callable[[Tensors, str], object]) -> Change:
    """A change of every layer."""

    def change(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(M)]:
            one(tensors, name)

    return change


def freeze(tensors: Tensors, config: dict[str, Any], weights: Tensors, dtype: torch.dtype = torch.float32) -> None:
    for name in tensors:
        if name.endswith(M):
            weight = weights[name.removesuffix(M) + ".weight"]
            tensors[name] = torch.linalg.norm(weight, dim=1).to(dtype).float()


def freeze_in_bf16(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
    freeze(tensors, config, weights, torch.bfloat16)


def recompute(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
    for name in tensors:
        if name.endswith(M):
            module = name.removesuffix(M)
            product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            tensors[name] = torch.linalg.norm(weights[f"{module}.weight"] + 2.0 * product, dim=1)


def by_columns(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
    tensors[Q + M] = torch.linalg.norm(weights[f"{Q}.weight"], dim=0) * 1.001


def normalise(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
    for name in tensors:
        if name.endswith(M):
            tensors[name] = tensors[name] / torch.linalg.norm(weights[name.removesuffix(M) + ".weight"], dim=1)


def two_kernels() -> Tensors:
    return {f"{Q}.lora_A.weight": torch.ones(8, 48, 3, 3), f"{Q}.lora_B.weight": torch.ones(48, 8, 3, 3)}


def infinite_orthonormal(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
    """An A as SVDs leave it, in an adapter with lora_alpha = r, beside a B of which nothing can be computed."""
    config.update(lora_alpha=8)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            tensors[name] = torch.eye(*tensors[name].shape)
        if name.endswith("lora_B.weight"):
            tensors[name][0, 0] = float("inf")


def set_at(name: str, index: Any, value: float) -> Change:
    return lambda tensors, config, weights: tensors[name].__setitem__(index, value)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, config, weights: tensors.update({name: make(tensors[name])})


def rename(old: str, new: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return change


PLANTED = [
    ("not_finite", set_at(f"{Q}.lora_B.weight", (5, 1), float("nan"))),
    ("not_finite", set_at(Q + M, 7, float("inf"))),
    ("not_finite", infinite_orthonormal),
    ("rank", lambda tensors, config, weights: config.update(r=4)),
    ("rank", lambda tensors, config, weights: config.update(rank_pattern={"q_proj": 16})),
    ("shapes", put(f"{Q}.lora_A.weight", lambda a: a[:4])),
    ("shapes", put(f"{Q}.lora_A.weight", lambda a: torch.tensor(1.0))),
    ("shapes", lambda tensors, config, weights: tensors.update(two_kernels())),
    ("incomplete", lambda tensors, config, weights: tensors.pop(f"{Q}.lora_A.weight")),
    ("empty", put(f"{Q}.lora_B.weight", lambda b: b[:0])),
    ("magnitude_missing", lambda tensors, config, weights: tensors.pop(Q + M)),
    ("magnitude_unused", lambda tensors, config, weights: config.update(use_dora=False)),
    ("magnitude_axis", put(K + M, lambda m: torch.ones(48))),
    ("magnitude_axis", put(K + M, lambda m: torch.ones(1, 48))),
    ("magnitude_axis", put(K + M, lambda m: torch.ones(48, 1))),
    ("magnitude_shape", put(Q + M, lambda m: m[:, None])),
    ("magnitude_shape", put(Q + M, lambda m: m[None])),
    ("magnitude_rounded", both(lambda tensors, name: tensors.update({name: tensors[name].bfloat16().float()}))),
    ("magnitude_rounded", both(lambda tensors, name: tensors.update({name: tensors[name].bfloat16()}))),
    ("untrained", put(f"{Q}.lora_B.weight", torch.zeros_like)),
    ("unknown_keys", lambda tensors, config, weights: tensors.update({"model.norm.weight": torch.ones(48)})),
    ("beyond_dora", lambda tensors, config, weights: config.update(layer_replication=[[0, 1], [0, 1]])),
    ("beyond_dora", lambda tensors, config, weights: config.update(alora_invocation_tokens=[1, 2])),
    ("beyond_dora", lambda tensors, config, weights: config.update(init_lora_weights="pissa_niter_16")),
    ("foreign_keys", rename(M, ".magnitude")),
    ("foreign_keys", rename(M, ".weight_m_wdecomp.weight")),
    ("other_method", lambda tensors, config, weights: tensors.update({"layer.hada_w1_a": torch.ones(4, 4)})),
]
"""What was planted, and how, where the checkpoint is not needed to see it."""

PLANTED_WITH_CHECKPOINT = [
    ("magnitude_frozen", freeze),
    ("magnitude_frozen", freeze_in_bf16),
    ("magnitude_recomputed", recompute),
    ("magnitude_axis", by_columns),
    ("magnitude_scale", normalise),
    ("magnitude_scale", put(Q + M, lambda m: 10 * m)),
    ("layer_missing", lambda tensors, config, weights: rename_module(tensors)),
    ("base_shape", put(f"{Q}.lora_A.weight", lambda a: torch.randn(8, 40))),
    ("base_name", lambda tensors, config, weights: config.update(base_model_name_or_path="someone/other-model")),
]


def rename_module(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(Q)]:
        tensors[name.replace("q_proj", "query")] = tensors.pop(name)


def plant(trained: Trained, folder: Path, change: Callable[..., object]) -> Trained:
    copied = trained.copy(folder)
    weights = weights_of(copied.checkpoint)
    edit(copied.adapter, lambda tensors, config: change(tensors, config, weights))
    return copied


@pytest.mark.parametrize("change", [change for _, change in PLANTED], ids=[name for name, _ in PLANTED])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["alone", "with its checkpoint"])
def test_a_fault_is_found_and_no_other(
    change: Callable[..., object], checkpoint: bool, trained: Trained, folder: Path
) -> None:
    expected = next(name for name, planted in PLANTED if planted is change)
    faults = found(plant(trained, folder, change), checkpoint=checkpoint)
    assert kinds(faults) == {expected}
    assert all(fault.places and fault.kind.why and fault.kind.remedy for fault in faults)


@pytest.mark.parametrize(
    "change", [change for _, change in PLANTED_WITH_CHECKPOINT], ids=[name for name, _ in PLANTED_WITH_CHECKPOINT]
)
def test_a_fault_is_found_in_comparison_with_the_checkpoint(
    change: Callable[..., object], trained: Trained, folder: Path
) -> None:
    expected = next(name for name, planted in PLANTED_WITH_CHECKPOINT if planted is change)
    faults = found(plant(trained, folder, change))
    assert kinds(faults) - {"magnitude_rounded"} == {expected}


def test_places_name_tensors_and_rows(trained: Trained, folder: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
        for row in (3, 5, 11, 40):
            tensors[f"{Q}.lora_B.weight"][row, 2] = float("nan")

    (fault,) = found(plant(trained, folder, change))
    (place,) = fault.places
    assert (place.name, place.row_count, place.rows) == (f"{PREFIX}{Q}.lora_B.weight", 4, (3, 5, 11))
    assert fault.lines() == [f"{PREFIX}{Q}.lora_B.weight: rows 3, 5, 11, … (4 in all)"]
    assert fault.values()["where"][0]["rows"] == [3, 5, 11]


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_what_add_weighted_adapter_makes_of_dora_is_recognised(combination: str, folder: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(folder / "checkpoint")
    model = adapted(base)
    model.add_adapter("other", model.peft_config["default"])
    shake(model)
    try:
        model.add_weighted_adapter(["default", "other"], [0.7, 0.6], "mix", combination_type=combination)
    except ValueError as error:
        pytest.skip(f"this PEFT refuses: {error}")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # earlier versions cannot save what the SVD leaves
    model.save_pretrained(folder / "adapter", selected_adapters=["mix"])
    made = Trained(folder / "adapter" / "mix", folder / "checkpoint")
    faults = found(made)
    assert [(fault.kind.name, len(fault.places)) for fault in faults] == [("combined", 14)]
    assert kinds(found(made, checkpoint=False)) == ({"combined"} if combination == "svd" else set())


def zero(*rows: int) -> Callable[[Tensors], object]:
    return lambda weights: weights[f"{Q}.weight"].__setitem__(list(rows), 0.0)


WEIGHTS = [
    ("zero_rows", zero(2, 9)),
    ("near_zero_rows", lambda weights: weights[f"{DOWN}.weight"].__setitem__(4, 1e-9)),
    ("not_finite", lambda weights: weights[f"{DOWN}.weight"].__setitem__((4, 4), float("nan"))),
]


@pytest.mark.parametrize(("expected", "change"), WEIGHTS, ids=[name for name, _ in WEIGHTS])
def test_a_fault_of_a_checkpoint_is_found_and_no_other(
    expected: str, change: Callable[[Tensors], object], trained: Trained, folder: Path
) -> None:
    copied = trained.copy(folder)
    edit_weights(copied.checkpoint, change)
    with Checkpoint(copied.checkpoint) as weights:
        (fault,) = examine_checkpoint(weights)
    assert fault.kind.name == expected
    assert fault.places[0].rows == ((2, 9) if expected == "zero_rows" else (4,))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("text_model.embeddings.position_ids", torch.arange(77)[None]),
        ("h.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ("h.0.attn.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8)),
    ],
)
def test_masks_and_positions_are_no_quantised_weights(name: str, values: torch.Tensor, folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: values, "h.0.attn.q_proj.weight": torch.eye(8)}, file)
    with Checkpoint(file) as weights:
        assert examine_checkpoint(weights) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_rows_of_every_dtype_are_examined_in_pieces_of_any_size(
    dtype: torch.dtype, transposed: bool, folder: Path
) -> None:
    weight = torch.ones(4001, 1537, dtype=dtype)  # two pieces and a part of one
    weight[4000], weight[700] = 0, 1e-5
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2" if transposed else "llama"}))
    save_file({"h.0.weight": weight.T.contiguous() if transposed else weight}, folder / "model.safetensors")
    with Checkpoint(folder) as weights:
        faults = examine_checkpoint(weights)
    assert [(fault.kind.name, fault.places[0].rows) for fault in faults] == [
        ("zero_rows", (4000,)),
        ("near_zero_rows", (700,)),
    ]


def test_zero_rows_of_embeddings_and_heads_are_no_fault(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    edit_weights(copied.checkpoint, lambda weights: weights["lm_head.weight"].zero_())
    edit_weights(copied.checkpoint, lambda weights: weights["model.embed_tokens.weight"][5:].zero_())
    with Checkpoint(copied.checkpoint) as weights:
        assert examine_checkpoint(weights) == []


def test_zero_rows_matter_to_an_adapter_where_ba_is_zero_too(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    edit_weights(copied.checkpoint, zero(2, 9))
    edit(copied.adapter, lambda tensors, config: tensors[f"{Q}.lora_B.weight"][9].zero_())
    fault = next(fault for fault in found(copied) if fault.kind.name == "zero_rows")
    assert [(place.name, place.rows) for place in fault.places] == [(Q, (9,))]


def test_a_checkpoint_with_tensors_missing_or_packed(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    file = copied.checkpoint / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('"lm_head.weight"', '"lm_head.bias"'))
    with Checkpoint(copied.checkpoint) as weights:
        assert kinds(examine_checkpoint(weights)) == {"tensor_missing"}
    packed = folder / "packed"
    packed.mkdir()
    (packed / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    save_file({f"{Q}.qweight": torch.zeros(8, 4, dtype=torch.int32)}, packed / "model.safetensors")
    with Checkpoint(packed) as weights:
        assert kinds(examine_checkpoint(weights)) == {"quantised"}
    assert found(Trained(copied.adapter, packed)) == []
    save_file({f"{Q}.weight": torch.zeros(8, 4, dtype=torch.bool)}, folder / "bits.safetensors")
    with Checkpoint(folder / "bits.safetensors") as weights:
        assert kinds(examine_checkpoint(weights)) == {"quantised"}


def test_files_of_lycoris_say_whose_they_are_and_for_which_axis(trained: Trained, folder: Path) -> None:
    inputs, outputs = on_inputs(trained, folder), folder / "outputs.safetensors"
    for checkpoint in (False, True):
        assert kinds(found(Trained(outputs, trained.checkpoint), checkpoint=checkpoint)) == {"foreign_keys"}
        wrong = found(Trained(inputs, trained.checkpoint), checkpoint=checkpoint)
        assert kinds(wrong) == {"foreign_keys", "input_axis"}
        assert len(next(fault for fault in wrong if fault.kind.name == "input_axis").places) == 14


def test_every_kind_of_fault_is_planted_and_documented() -> None:
    planted = {name for name, _ in (*PLANTED, *PLANTED_WITH_CHECKPOINT, *WEIGHTS)}
    assert planted | {"combined", "quantised", "tensor_missing", "input_axis"} == KINDS.keys()
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check-an-adapter.md").read_text()
    for name in KINDS:
        assert f"`{name}`" in page, name


SOUND: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 4, "down_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    {"conv1d": True},
    {"use_dora": False},
    {"modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["q_proj", "up_proj"]},
    {"lora_bias": True, "use_dora": False},
]


@pytest.mark.parametrize("settings", SOUND, ids=lambda settings: ", ".join(settings) or "plain")
def test_nothing_is_found_in_what_peft_trained(settings: dict[str, Any], folder: Path) -> None:
    made = train(folder, **settings)
    assert found(made) == []
    assert found(made, checkpoint=False) == []
    with Checkpoint(made.checkpoint) as weights:
        assert examine_checkpoint(weights) == []


def test_pickles_and_broken_files_are_refused_with_the_reason(trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    file = copied.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        Adapter(copied.adapter)
    file.unlink()
    (copied.adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(AdapterError, match="pickled files are not read"):
        Adapter(copied.adapter)
    next(copied.checkpoint.glob("model-00001*")).unlink()
    with pytest.raises(AdapterError, match=r"files of model\.safetensors\.index\.json are missing"):
        Checkpoint(copied.checkpoint)
    with pytest.raises(AdapterError, match="nothing is downloaded"):
        Checkpoint(Path("meta-llama/Llama-3.1-8B"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b"[]", "expected a JSON object, found a list"),
        (b"\xff\xfe{\0}\0", "UTF-16 text"),
        (b'{"r": 8, "lora_alpha": NaN}', "expected a positive integer, a finite number"),
        (b'{"r": 8, "lora_alpha": -Infinity}', "expected a positive integer, a finite number"),
        (b'{"r": 8, "lora_alpha": 1' + b"0" * 400 + b"}", "expected a positive integer, a finite number"),
        (b'{"r": 1' + b"0" * 400 + b', "lora_alpha": 8}', "expected a positive integer, a finite number"),
        (b'{"modules_to_save": 3}', "modules_to_save must be a list of names"),
        (b'{"modules_to_save": [{"norm": 1}]}', "modules_to_save must be a list of names"),
        (b'{"modules_to_save": "norm"}', "modules_to_save must be a list of names"),
        (b'{"r": 8, "lora_alpha": 8, "alpha_pattern": {"q": NaN}}', "alpha_pattern must map names to finite numbers"),
        (b'{"r": 8, "lora_alpha": 8, "rank_pattern": {"q": 1' + b"0" * 400 + b"}}", "rank_pattern must map names"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_the_reason(
    text: bytes, reason: str, trained: Trained, folder: Path
) -> None:
    copied = trained.copy(folder)
    (copied.adapter / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError) as failure:
        Adapter(copied.adapter)
    assert reason in str(failure.value)
    assert "adapter_config.json" in str(failure.value)
    assert len(str(failure.value)) < 600


def need(dtype: torch.dtype) -> None:
    """Skip the test where the installed safetensors writes no tensors of this dtype, as older ones no complex ones."""
    try:
        save({"one": torch.zeros(1, dtype=dtype)})
    except KeyError:
        pytest.skip(f"this safetensors writes no {dtype}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("part", [".lora_A.weight", ".lora_B.weight", M])
def test_parts_that_are_no_real_floats_are_refused(
    part: str, dtype: torch.dtype, trained: Trained, folder: Path
) -> None:
    need(dtype)
    copied = plant(trained, folder, put(Q + part, lambda values: values.to(dtype)))
    with pytest.raises(AdapterError, match=r"is stored as (I8|BOOL|C64)"):
        Adapter(copied.adapter)


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [(torch.ones(2), r"shape \[2\]"), (torch.ones(0), r"shape \[0\]"), (torch.tensor(1j), "dtype C64")],
)
def test_an_alpha_that_is_no_number_is_refused(
    alpha: torch.Tensor, reason: str, trained: Trained, folder: Path
) -> None:
    need(alpha.dtype)
    on_inputs(trained, folder)
    file = folder / "outputs.safetensors"
    save_file({**load_file(file), f"{flat(Q)}.alpha": alpha}, file)
    with pytest.raises(AdapterError, match=reason):
        Adapter(file)


def test_an_infinite_alpha_is_found(trained: Trained, folder: Path) -> None:
    on_inputs(trained, folder)
    file = folder / "outputs.safetensors"
    save_file({**load_file(file), f"{flat(Q)}.alpha": torch.tensor(float("nan"))}, file)
    assert kinds(found(Trained(file, trained.checkpoint), checkpoint=False)) == {"foreign_keys", "not_finite"}


@pytest.mark.parametrize("note", ["[]", "[", '{"format": 5}', '{"format": "lycoris"}', '{"format": []}'])
def test_a_note_that_is_not_doratunes_changes_nothing(note: str, trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    file = copied.adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"doratune": note})
    with Adapter(copied.adapter) as adapter:
        assert adapter.format == "peft"


def test_two_adapters_in_one_file_are_refused(trained: Trained, folder: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any], weights: Tensors) -> None:
        tensors[f"{Q}.lora_A.other.weight"] = 2 * tensors[f"{Q}.lora_A.weight"]

    copied = plant(trained, folder, change)
    with pytest.raises(AdapterError, match="as of two adapters"):
        Adapter(copied.adapter)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 10**5, '{"weight_map": 5}', '{"weight_map": {"x": 5}}'])
def test_an_index_that_is_none_is_refused_with_the_reason(text: str, trained: Trained, folder: Path) -> None:
    copied = trained.copy(folder)
    (copied.checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AdapterError, match=r"not an index of safetensors files \(.+\); download it again") as failure:
        Checkpoint(copied.checkpoint)
    assert "object has no" not in str(failure.value)
    assert "indices must" not in str(failure.value)
