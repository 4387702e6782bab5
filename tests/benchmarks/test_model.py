"""A model's rows compare equal work: the loss is over as many tokens whatever the batch, a decoded token finds the
same cache each time. First steps and several GPUs are measured in processes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from doratune.benchmarks import first_step
from doratune.benchmarks import model as model_benchmark
from doratune.benchmarks.adapted import MODES, contender, with_dora
from doratune.benchmarks.counts import covered, device_work
from doratune.benchmarks.first_step import COLD, STORE, WARM, FirstStep, bench_first_step
from doratune.benchmarks.model import bench_model
from doratune.benchmarks.parallel import Parallel, bench_parallel
from doratune.benchmarks.results import counterpart, ratios_table
from doratune.benchmarks.shapes import SHAPES, TARGETS, random_model, read_model_config
from doratune.benchmarks.tasks import DECODE, INFERENCE, STEP, Request, Task, tasks
from doratune.errors import UsageError

pytest.importorskip("peft")
pytest.importorskip("transformers")
CPU = torch.device("cpu")
REQUEST = Request(batch=2, seq=12, loss_tokens=8, checkpointing=False, decode=(3,), context=7)


@pytest.fixture
def config(tiny: Path) -> Any:
    return read_model_config("8b", tiny, None)[1]


@pytest.fixture
def model(config: Any) -> nn.Module:
    return with_dora(random_model(config, CPU), MODES["bf16"], rank=4, targets=TARGETS)


def task_of(op: str, config: Any, model: nn.Module, request: Request = REQUEST) -> Task:
    (task,) = tasks([op], request, config, MODES["bf16"], model, CPU)
    return task


def test_the_loss_is_over_the_last_tokens_of_every_sequence(config: Any, model: nn.Module) -> None:
    assert REQUEST.kept == 4
    assert Request(seq=4096).kept == 1024
    assert Request(batch=8, seq=512).kept == 128
    assert Request(batch=1, seq=100).kept == 99
    stock = contender("peft_dora", model).model.train()
    seen: list[torch.Tensor] = []
    stock.register_forward_pre_hook(lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    loss = task_of(STEP, config, model).results(stock)["loss"]
    (ids,) = seen
    logits = contender("peft_dora", model).model(input_ids=ids).logits.float()
    expected = nn.functional.cross_entropy(logits[:, -5:-1].flatten(0, 1), ids[:, -4:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_are_those_of_some_layers_by_kind(config: Any, model: nn.Module) -> None:
    found = task_of(STEP, config, model).results(contender("peft_dora", model).model.train())
    assert set(found) == {"loss", "lora_A", "lora_B", "magnitude"}
    rows = sum(p.shape[0] for name, p in model.named_parameters() if "lora_magnitude" in name)
    assert found["magnitude"].numel() == rows, "first and last layer, which are all here"


def test_each_decoded_token_finds_the_same_cache(config: Any, model: nn.Module) -> None:
    task = task_of(DECODE, config, model)
    stock = contender("peft_dora", model).model.eval()
    lengths: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        lengths.append(given["past_key_values"].get_seq_length())
        assert tuple(given["input_ids"].shape) == (3, 1)

    stock.register_forward_pre_hook(look, with_kwargs=True)
    logits = []
    for _ in range(2):
        task.before()
        logits.append(task.call(stock))
    assert lengths == [7, 7]
    assert torch.equal(*logits)


def test_a_long_task_has_a_brief_one_for_the_host(config: Any, model: nn.Module) -> None:
    long = task_of(STEP, config, model, Request(batch=4, seq=100, checkpointing=True))
    assert long.brief is not None
    assert long.brief.facts["shape"] == [2, 64]
    assert "checkpointing" in long.brief.facts["flags"]
    assert task_of(STEP, config, model).brief is None


@pytest.mark.slow
def test_a_time_limit_is_shared_and_what_had_time_is_kept(tiny: Path) -> None:
    request: dict[str, Any] = {"config": tiny, "seq": 8, "modes": "bf16", "checkpointing": False, "device": "cpu"}
    request |= {"ranks": (2, 4), "ops": [INFERENCE], "implementations": ["peft_lora", "doratune"], "rounds": 10**6}
    bench_model(**{**request, "rounds": 2})  # imports take seconds
    outcome = bench_model(**request, minutes=0.2)
    assert {(row["rank"], row["impl"]) for row in outcome.rows} == {
        (rank, name) for rank in (2, 4) for name in ("peft_lora", "doratune")
    }
    assert all(row["rounds"] < 10**6 for row in outcome.rows)
    late = bench_model(**request, minutes=1e-9)
    assert any("the time was up" in note for note in late.notes)
    with pytest.raises(UsageError, match="--minutes measures in one process"):
        bench_model(**request, minutes=1.0, parallel="ddp")


def test_known_shapes_have_the_parameters_of_their_models() -> None:
    from transformers import AutoModelForCausalLM

    billions = {}
    for shape in SHAPES:
        _, config = read_model_config(shape, None, 2)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        biases = [name for name, _ in model.named_parameters() if name.endswith("q_proj.bias")]
        assert bool(biases) == (shape == "0.5b")
        layers = sum(p.numel() for p in model.model.layers.parameters()) / 2
        total = read_model_config(shape, None, None)[1].num_hidden_layers
        billions[shape] = (
            layers * total + sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
        ) / 1e9
    assert billions == {
        name: pytest.approx(size, rel=0.001) for name, size in {"0.5b": 0.494, "1b": 1.236, "8b": 8.03}.items()
    }


def test_what_is_compiled_is_compared_with_doratune_compiled() -> None:
    assert counterpart("peft_lora_compiled") == "doratune_compiled"
    assert counterpart("axolotl_lora") == "doratune"
    case = {"bench": "model", "model": "m", "op": "step", "shape": [2, 8], "rank": 4, "dtype": "bf16", "flags": []}
    rows = [
        {**case, "impl": "doratune_compiled", "peak_mb": 3.0, "launches": None},
        {**case, "impl": "peft_lora_compiled", "ratio": 0.5, "peak_mb": 2.0, "launches": None},
        {**case, "impl": "peft_lora", "ratio": 0.25, "peak_mb": 2.0, "launches": 9},
    ]
    table = ratios_table(rows)
    cells = [list(column.cells) for column in table.columns]
    assert [str(column[0]) for column in cells[1:]] == ["peft_lora_compiled", "0.500", "", "1.500", "", ""]
    assert table.row_count == 1, "there is no doratune to compare peft_lora with"


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert covered([(0.0, 2.0), (5.0, 6.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert covered([]) == 0.0
    assert set(device_work(lambda: None, CPU).values()) == {None}


def first(tiny: Path, impl: str = "doratune") -> FirstStep:
    return FirstStep(impl, "8b", str(tiny), 1, 4, "bf16", 2, 8, 8, True, "cpu")


@pytest.mark.slow
def test_a_first_step_is_measured_in_a_process_of_its_own(tiny: Path) -> None:
    outcome = bench_first_step([first(tiny)])
    assert outcome.notes == []
    assert [row["flags"] for row in outcome.rows] == [["checkpointing", "batch=2", state] for state in (COLD, WARM)]
    for row in outcome.rows:
        assert (row["op"], row["shape"], row["impl"]) == ("first-step", [1, 8], "doratune")
        assert min(row["us"], row["accelerate_us"], row["second_us"]) > 0.0


def test_first_steps_start_with_empty_caches_and_then_with_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool, str | None]] = []

    def child(request: FirstStep, home: Path, store: Path | None) -> dict[str, float]:
        variables = first_step._environment({"DORATUNE_CACHE_PATH": "/mine", "A": "b"}, home, store)
        assert variables["A"] == "b"
        caches = [Path(value) for name, value in variables.items() if name not in ("A", "DORATUNE_CACHE_PATH")]
        assert len(caches) == 4
        seen.append((request.impl, any(any(cache.iterdir()) for cache in caches), variables.get("DORATUNE_CACHE_PATH")))
        for cache in caches:
            (cache / "compiled").touch()
        return {"us": 4.0 if request.impl == "doratune" else 2.0, "accelerate_us": 1.0}

    monkeypatch.setattr(first_step, "_in_child", child)
    store = tmp_path / "tuned.sqlite"
    told: list[str] = []
    outcome = bench_first_step([first(tiny, "peft_dora"), first(tiny)], store=store, progress=told.append)
    assert len(told) == 2 * len(seen)
    assert seen == [
        ("peft_dora", False, None),
        ("peft_dora", True, None),
        ("peft_dora", False, str(store)),
        ("doratune", False, None),
        ("doratune", True, None),
        ("doratune", False, str(store)),
    ]
    assert [row["flags"][-1] for row in outcome.rows] == [COLD, WARM, STORE] * 2
    assert [row.get("ratio") for row in outcome.rows] == [2.0, 2.0, 2.0, None, None, None]
    assert ratios_table(outcome.rows).row_count == 3


def test_where_nothing_may_be_compiled_a_first_step_runs_with_its_store_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORATUNE_NO_JIT", "1")
    asked = []

    def child(request: FirstStep, home: Path, store: Path | None) -> dict[str, float]:
        asked.append(store)
        return {"us": 1.0, "accelerate_us": 1.0, "second_us": 1.0}

    monkeypatch.setattr(first_step, "_in_child", child)
    outcome = bench_first_step([first(tiny)], store=tmp_path / "s.sqlite")
    assert asked == [tmp_path / "s.sqlite"]
    assert [row["flags"][-1] for row in outcome.rows] == [STORE]
    bench_first_step([first(tiny)])
    assert asked[1:] == [None, None], "without a store it is tried all the same, and says why it cannot"


@pytest.mark.slow
def test_a_first_step_that_fails_is_left_out_with_its_last_words(tiny: Path) -> None:
    outcome = bench_first_step([FirstStep(**{**vars(first(tiny)), "device": "banana"})])
    assert outcome.rows == []
    assert len(outcome.notes) == 2
    assert "left out" in outcome.notes[0]
    assert "banana" in outcome.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_steps_of_several_processes_agree_with_pefts(how: str, tiny: Path) -> None:
    names = ("peft_lora", "peft_dora", "doratune")
    request = Parallel(how, 2, names, "8b", str(tiny), None, 4, "bf16", 2, 8, 8, True, 2, "cpu")
    outcome = bench_parallel([request])
    assert outcome.notes == []
    assert [row["impl"] for row in outcome.rows] == list(names)
    for row in outcome.rows:
        assert row["flags"] == ["checkpointing", "batch=2", how, "processes=2"]
        assert row["us"] > 0.0
    ours = outcome.rows[-1]
    assert ours["loss_err"] < 5e-3
    assert ours["loss"] != outcome.rows[0]["loss"]


def test_each_process_takes_a_gpu_of_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in the device's name would put all of them on one GPU."""
    asked: list[Parallel] = []
    monkeypatch.setattr(model_benchmark, "bench_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("doratune.benchmarks.parallel.bench_parallel", lambda runs, progress: asked.extend(runs))
    given: dict[str, Any] = {"config": tiny, "ranks": (4,), "modes": "bf16", "parallel": "ddp", "processes": 2}
    for device in (None, "cuda"):
        bench_model(**given, device=device)
    assert [run.device for run in asked] == ["cuda", "cuda"]
    with pytest.raises(UsageError, match="leave out --device"):
        bench_model(**given, device="cuda:1")


def test_more_processes_than_gpus_are_refused(tiny: Path) -> None:
    many = torch.cuda.device_count() + 1
    request = Parallel("ddp", many, ("doratune",), "8b", str(tiny), None, 4, "bf16", 1, 8, 8, True, 2, "cuda")
    with pytest.raises(UsageError, match=f"needs {many} GPUs and PyTorch sees {many - 1}"):
        bench_parallel([request])


@pytest.mark.slow
def test_a_process_that_fails_is_named(tiny: Path) -> None:
    broken = json.loads(tiny.read_text())
    tiny.write_text(json.dumps({**broken, "num_key_value_heads": 7}))
    request = Parallel("ddp", 2, ("doratune",), "8b", str(tiny), None, 4, "bf16", 1, 8, 8, True, 2, "cpu")
    with pytest.raises(UsageError, match="--parallel ddp: a process failed"):
        bench_parallel([request])
