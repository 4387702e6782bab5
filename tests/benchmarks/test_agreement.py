"""A contender that computes what PEFT does takes part, and a wrong one does not. Where bf16 alone takes two right ones
beyond a bound, PEFT's own result in fp32 says which is right.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from doratune.benchmarks import agreement
from doratune.benchmarks.adapted import MODES, NO_PEERS, Contender, contender, with_dora
from doratune.benchmarks.agreement import FP32_FACTOR, compare, judge
from doratune.benchmarks.quantised import quantise
from doratune.benchmarks.results import Outcome
from doratune.benchmarks.shapes import TARGETS, random_model, read_model_config
from doratune.benchmarks.tasks import DECODE, INFERENCE, STEP, Request, Results, Task, tasks
from doratune.terminal.deadline import TimeUpError

pytest.importorskip("peft")
pytest.importorskip("transformers")
CPU = torch.device("cpu")
REQUEST = Request(batch=2, seq=12, loss_tokens=8, decode=(3,), context=7)
KINDS = {STEP: ("lora_A", "lora_B", "magnitude"), INFERENCE: ("logits",), DECODE: ("logits",)}


@pytest.fixture
def config(tiny: Path) -> Any:
    return read_model_config("8b", tiny, None)[1]


def checkpointed(config: Any, mode: str = "bf16") -> nn.Module:
    model = with_dora(random_model(config, CPU), MODES[mode], rank=4, targets=TARGETS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model


@pytest.fixture
def model(config: Any) -> nn.Module:
    return checkpointed(config)


def task_of(op: str, config: Any, model: nn.Module, mode: str = "bf16") -> Task:
    (task,) = tasks([op], REQUEST, config, MODES[mode], model, CPU)
    return task


def running(names: list[str], op: str, model: nn.Module) -> list[Contender]:
    found = [contender(name, model) for name in names]
    for one in found:
        one.model.train(op == STEP)
    return found


def last_layer(model: nn.Module) -> Any:
    return [module for path, module in model.named_modules() if path.endswith("down_proj")][-1]


def wrong(name: str, model: nn.Module, change: Callable[[Any], None]) -> Contender:
    """PEFT's DoRA under another name, with a change of its last layer."""
    found = Contender(name, contender("peft_dora", model).model.eval())
    change(last_layer(found.model))
    return found


def double(layer: Any) -> None:
    """The product of B and A counts twice: an error of the size of what bf16 rounds in all layers."""
    layer.scaling["default"] *= 2.0


def drop(layer: Any) -> None:
    """The gains are 1."""
    layer.lora_variant.clear()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result that is rounded in another way is beyond its bound; the loss, a single value, is not judged."""
    for kind in ("logits", "lora_A", "lora_B", "magnitude"):
        monkeypatch.setitem(agreement.BOUNDS, kind, (0.0, 0.0))


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of fp32 matrices may be computed in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class Fp32:
    """What is seen of calls of a model in fp32, by a hook that copies of ``model`` have too."""

    def __init__(self, model: nn.Module) -> None:
        self.precisions: list[str] = []
        self.layers = 0
        self.parameters: list[weakref.ref[nn.Parameter]] = []
        self.fails = False
        model.register_forward_pre_hook(self.call)
        first = next(module for path, module in model.named_modules() if path.endswith("layers.0.mlp"))
        first.register_forward_pre_hook(self.layer)

    @property
    def calls(self) -> int:
        return len(self.precisions)

    def call(self, module: nn.Module, args: Any) -> None:
        if {parameter.dtype for parameter in module.parameters()} == {torch.float32}:
            assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
            assert not torch.is_autocast_enabled("cpu")
            self.precisions.append(torch.get_float32_matmul_precision())
            self.parameters += map(weakref.ref, module.parameters())
            if self.fails:
                raise torch.OutOfMemoryError("CUDA out of memory\nlong tail")

    def layer(self, module: nn.Module, args: Any) -> None:
        self.layers += next(module.parameters()).dtype == torch.float32

    def __deepcopy__(self, memo: object) -> Fp32:
        return self  # hooks of copies are bound to it


@pytest.mark.parametrize("op", [STEP, INFERENCE, DECODE])
def test_right_contenders_agree_and_a_wrong_one_is_left_out(op: str, config: Any, model: nn.Module) -> None:
    other = contender("peft_dora", model).model
    for name, module in other.named_modules():
        if name.endswith(("v_proj", "down_proj")):
            module.lora_variant.clear()  # LoRA where DoRA is wanted, with an adapter that is far too strong
            module.scaling["default"] = 300.0
    able = [contender("peft_lora", model), contender("doratune", model), Contender("axolotl_dora", other)]
    outcome = Outcome()
    facts = compare(task_of(op, config, model), able, NO_PEERS, outcome)
    assert list(facts) == ["peft_lora", "doratune"]
    assert facts["peft_lora"]["rel_err"] is None
    assert 0.0 < facts["doratune"]["rel_err"] < 0.1
    (note,) = outcome.notes
    assert "axolotl_dora left out: " in note
    assert ("gradients of magnitude are missing" if op == STEP else "logits ") in note
    assert outcome.failures == []


def test_a_contender_without_a_gradient_is_wrong() -> None:
    stock = {"loss": torch.tensor(2.0), "lora_A": torch.ones(3), "magnitude": torch.ones(3)}

    def unasked() -> Results | None:
        raise AssertionError("no distance from fp32 makes up for it")

    row, complaint = judge({"loss": torch.tensor(2.02), "lora_A": torch.ones(3)}, stock, unasked, lora=False)
    assert complaint == "loss 0.01 from PEFT's, at most 0.005 is right; gradients of magnitude are missing"
    assert row["loss_err"] == row["rel_err"] == pytest.approx(1e-2, rel=1e-3)


def test_a_result_beyond_its_bound_is_wrong_where_there_is_none_in_fp32() -> None:
    row, complaint = judge({"loss": torch.tensor(2.002)}, {"loss": torch.tensor(2.0)}, lambda: None, lora=True)
    assert complaint == "loss 0.001 from PEFT's, at most 0.0005 is right"
    assert set(row) == {"rel_err", "loss", "loss_err"}
    _, complaint = judge({"logits": torch.tensor([float("nan")])}, {"logits": torch.ones(1)}, lambda: None, lora=True)
    assert complaint is not None


def test_the_distances_from_fp32_decide_for_each_kind_that_is_beyond() -> None:
    exact = {"lora_A": torch.tensor([4.0, 0.0]), "lora_B": torch.tensor([4.0, 0.0]), "magnitude": torch.ones(2)}
    stock = {**exact, "lora_A": torch.tensor([4.0, 1.0]), "lora_B": torch.tensor([4.0, 1.0])}
    found = {**exact, "lora_A": torch.tensor([4.0, -1.09]), "lora_B": torch.tensor([4.0, -1.11])}
    row, complaint = judge(found, stock, lambda: exact, lora=False)
    assert complaint == "lora_B 0.51 from PEFT's, at most 0.2 is right (0.278 from fp32, PEFT's is 0.25)"
    assert row["fp32_err"] == {"lora_A": pytest.approx(0.2725), "lora_B": pytest.approx(0.2775)}
    assert row["peft_fp32_err"] == {"lora_A": 0.25, "lora_B": 0.25}
    _, complaint = judge({**found, "lora_B": stock["lora_B"]}, stock, lambda: exact, lora=False)
    assert complaint is None
    _, complaint = judge({**found, "lora_A": torch.full((2,), torch.nan)}, stock, lambda: exact, lora=False)
    assert complaint is not None
    assert "lora_A nan" in complaint
    infinite = {"logits": torch.tensor([4.0, torch.inf])}
    _, complaint = judge(infinite, infinite, lambda: {"logits": torch.ones(2)}, lora=False)
    assert complaint is not None, "as wrong as PEFT's is wrong where no distance can be told"


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_contender_that_rounds_otherwise_is_right_by_its_distance_from_fp32(op: str, mode: str, config: Any) -> None:
    model = checkpointed(config, mode)
    seen = Fp32(model)
    outcome = Outcome()
    facts = compare(task_of(op, config, model, mode), running(["peft_dora", "doratune"], op, model), NO_PEERS, outcome)
    assert outcome.failures == outcome.notes == []
    row = facts["doratune"]
    assert row["complaint"] is None
    assert tuple(row["fp32_err"]) == tuple(row["peft_fp32_err"]) == KINDS[op]
    for kind, distance in row["fp32_err"].items():
        assert 1e-3 < distance <= FP32_FACTOR * row["peft_fp32_err"][kind] < 0.02
    assert "fp32_err" not in facts["peft_dora"]
    assert seen.calls == 1
    assert seen.layers == (2 if op == STEP else 1), "a step's activations are computed again in the backward pass"


@pytest.mark.usefixtures("no_room")
def test_loras_are_compared_with_pefts_lora_in_fp32(config: Any, model: nn.Module) -> None:
    dora = Contender("axolotl_lora", contender("doratune", model).model.eval())
    lora = Contender("unsloth_lora", contender("peft_lora", model).model.eval())
    last_layer(lora.model).scaling["default"] *= 1.01  # rounds otherwise, and is hardly another function
    seen = Fp32(model)
    outcome = Outcome()
    facts = compare(task_of(INFERENCE, config, model), [dora, lora], NO_PEERS, outcome)
    assert list(facts) == ["unsloth_lora"]
    assert facts["unsloth_lora"]["fp32_err"]["logits"] < 0.02
    assert "axolotl_lora left out: logits " in outcome.notes[0]
    assert seen.calls == 1


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("change", [double, drop])
def test_a_wrong_contender_is_refused_with_its_distance_from_fp32(
    change: Callable[[Any], None], config: Any, model: nn.Module
) -> None:
    able = [wrong("doratune", model, change), wrong("axolotl_dora", model, change)]
    outcome = Outcome()
    facts = compare(task_of(INFERENCE, config, model), able, NO_PEERS, outcome)
    assert list(facts) == ["doratune"]
    row = facts["doratune"]
    own, pefts = row["fp32_err"]["logits"], row["peft_fp32_err"]["logits"]
    assert FP32_FACTOR * pefts < own < 0.02, "the bounds of a deep model would let it pass"
    assert row["complaint"].endswith(f" is right ({own:.3g} from fp32, PEFT's is {pefts:.3g})")
    (failure,), (note,) = outcome.failures, outcome.notes
    assert failure == f"inference 2×12 batch=2: doratune: {row['complaint']}"
    assert note == f"inference 2×12 batch=2: axolotl_dora left out: {row['complaint']}"


@pytest.mark.parametrize("op", KINDS)
def test_nothing_runs_in_fp32_where_all_is_within_its_bound(op: str, config: Any, model: nn.Module) -> None:
    seen = Fp32(model)
    facts = compare(task_of(op, config, model), running(["peft_dora", "doratune"], op, model), NO_PEERS, Outcome())
    assert seen.calls == 0
    assert not {"fp32_err", "peft_fp32_err"} & facts["doratune"].keys()


@pytest.mark.usefixtures("no_room")
def test_pefts_result_in_fp32_is_computed_once_and_its_memory_is_free_again(config: Any, model: nn.Module) -> None:
    seen = Fp32(model)
    able = [contender("doratune", model), wrong("axolotl_dora", model, double)]
    able[0].model.eval()
    outcome = Outcome()
    facts = compare(task_of(INFERENCE, config, model), able, NO_PEERS, outcome)
    assert "fp32_err" in facts["doratune"]
    assert "from fp32" in outcome.notes[0]
    assert seen.calls == 1
    assert seen.parameters
    assert [one for one in seen.parameters if one() is not None] == []


@pytest.mark.usefixtures("no_room", "tf32")
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_pytorchs_settings_are_as_before(fails: bool, config: Any, model: nn.Module) -> None:
    seen = Fp32(model)
    seen.fails = fails
    able = running(["doratune"], STEP, model)
    model.eval()
    before = {
        name: (id(one), one.dtype, one.requires_grad, one.clone())
        for name, one in [*model.named_parameters(), *model.named_buffers()]
    }
    compare(task_of(STEP, config, model), able, NO_PEERS, Outcome())
    assert seen.precisions == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.is_autocast_enabled("cpu")
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in able[0].model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        identity, dtype, trained, values = before[name]
        assert (id(one), one.dtype, one.requires_grad) == (identity, dtype, trained)
        assert torch.equal(one, values)


@pytest.mark.usefixtures("no_room")
def test_without_memory_for_fp32_the_bound_decides_and_a_note_says_so(config: Any, model: nn.Module) -> None:
    seen = Fp32(model)
    seen.fails = True
    able = running(["doratune", "doratune"], INFERENCE, model)
    able[1].name = "doratune_tracked"
    outcome = Outcome()
    facts = compare(task_of(INFERENCE, config, model), able, NO_PEERS, outcome)
    assert outcome.notes == [
        "inference 2×12 batch=2: comparison with peft_dora in fp32 left out: OutOfMemoryError: CUDA out of memory"
    ]
    assert seen.calls == 1, "it is tried once"
    assert len(outcome.failures) == len(facts) == 2
    for row in facts.values():
        assert row["complaint"].endswith("from PEFT's, at most 0 is right")
        assert "fp32_err" not in row
    assert [one for one in seen.parameters if one() is not None] == []


@pytest.mark.usefixtures("no_room")
def test_what_has_no_time_in_fp32_is_judged_by_its_bound(
    config: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []

    @contextlib.contextmanager
    def spent(until: float | None) -> Iterator[None]:
        limits.append(until)
        if len(limits) > 1:  # the contender's call was in time
            raise TimeUpError("the time was up")
        yield

    monkeypatch.setattr(agreement, "time_limit", spent)
    outcome = Outcome()
    able = running(["doratune"], INFERENCE, model)
    facts = compare(task_of(INFERENCE, config, model), able, NO_PEERS, outcome, until=7.0)
    assert limits == [7.0, 7.0]
    assert outcome.notes == [
        "inference 2×12 batch=2: comparison with peft_dora in fp32 left out: TimeUpError: the time was up"
    ]
    assert facts["doratune"]["complaint"].endswith("at most 0 is right")


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize(("quant", "package"), [("nf4", "bitsandbytes"), ("fp8", "torchao"), ("hqq", "hqq")])
def test_a_quantised_model_is_judged_by_its_bounds(quant: str, package: str, tiny: Path) -> None:
    pytest.importorskip(package)
    config = read_model_config("8b", tiny, 1)[1]
    config.hidden_size = config.intermediate_size = 64
    base = quantise(random_model(config, CPU), TARGETS, quant)
    model = with_dora(base, MODES["bf16"], rank=4, targets=TARGETS)
    outcome = Outcome()
    facts = compare(task_of(INFERENCE, config, model), running(["doratune"], INFERENCE, model), NO_PEERS, outcome)
    assert facts["doratune"]["complaint"].endswith("at most 0 is right")
    (note,) = outcome.notes
    assert note.endswith("comparison with peft_dora in fp32 left out: DoratuneError: the base is quantised")
