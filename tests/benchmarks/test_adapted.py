"""Every implementation of DoRA runs the same model: the same parameters and inputs, only other code; and what the clock
compares is the same work.

These run on a CPU, where times mean nothing: what is tested is which code runs, and what the rows say.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn

from doratune.benchmarks import adapted
from doratune.benchmarks.adapted import (
    MODES,
    Contender,
    Peers,
    contender,
    fp32_copy,
    measure,
    relative_errors,
    shared_copy,
    touch,
    with_dora,
)
from doratune.benchmarks.dorafactors import Dorafactors, PeerError
from doratune.benchmarks.layer import Projection, layer_shapes
from doratune.benchmarks.results import Row
from doratune.benchmarks.targets import MET, MISSED, judge
from doratune.cli import main

from ..command_line import RUNNER

pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _collections_skip_what_is_imported() -> Iterator[None]:
    """Garbage is collected before each round; going through all of PEFT and transformers took half of these tests."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    base = Projection(24, 40, CPU).requires_grad_(False)
    return with_dora(base, MODES["autocast"], rank=4, targets=["proj"])


def bench(*args: str) -> Result:
    return RUNNER.invoke(main, ["bench", *args])


def exact(model: nn.Module, x: torch.Tensor, *, dora: bool) -> torch.Tensor:
    """The formula in fp64 from the parameters of the model."""
    t = {name.split("proj.")[1]: p.detach().double() for name, p in model.named_parameters()}
    weight, lora = t["base_layer.weight"], t["lora_B.default.weight"] @ t["lora_A.default.weight"]
    if not dora:
        return x.double() @ (weight + lora).T
    g = t["lora_magnitude_vector.default.weight"] / (weight + lora).norm(dim=1)
    return g * (x.double() @ (weight + lora).T)


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def test_lora_and_dora_are_the_same_layer_with_and_without_the_magnitude(model: nn.Module) -> None:
    x = torch.randn(5, 40).bfloat16()
    stock, plain = contender("peft_dora", model).model, contender("peft_lora", model).model
    with MODES["autocast"].context(CPU), torch.no_grad():
        dora, lora = stock(x), plain(x)
    assert distance(dora, exact(model, x, dora=True)) < 0.01 < distance(dora, exact(model, x, dora=False))
    assert distance(lora, exact(model, x, dora=False)) < 0.01 < distance(lora, exact(model, x, dora=True))


def test_contenders_share_every_tensor_and_no_module(model: nn.Module) -> None:
    copied = shared_copy(model)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}


def test_a_copy_in_fp32_has_the_same_values_in_tensors_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied, as a head to its embeddings
    model[0].bias.requires_grad_(False)
    model.register_buffer("scales", torch.randn(2).bfloat16())
    model.register_buffer("places", torch.arange(2))
    copied = fp32_copy(model)
    assert copied[1].weight is copied[0].weight  # type: ignore[index]
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert tensors.keys() == originals.keys() == {"0.weight", "0.bias", "1.bias", "scales", "places"}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int64 if name == "places" else torch.float32)
        assert tensor.requires_grad == originals[name].requires_grad
        assert torch.equal(tensor, originals[name].to(tensor.dtype))
        assert tensor.data_ptr() != originals[name].data_ptr()


def test_the_modes_keep_adapters_in_their_dtypes() -> None:
    for mode in MODES.values():
        base = Projection(24, 40, CPU).requires_grad_(False)
        trained = [p for p in with_dora(base, mode, rank=4, targets=["proj"]).parameters() if p.requires_grad]
        assert len(trained) == 3
        assert {p.dtype for p in trained} == {torch.float32 if mode.adapter == "fp32" else torch.bfloat16}
        assert all(bool(p.any()) for p in trained)  # B starts at zero in PEFT: half the formula would be idle


def test_dorafactors_runs_in_place_of_pefts_layer_and_can_be_taken_out(
    dorafactors: Dorafactors, model: nn.Module
) -> None:
    x = torch.randn(5, 40).bfloat16()
    theirs = contender("dorafactors", model, Peers(dorafactors)).model
    with MODES["autocast"].context(CPU), torch.no_grad():
        assert distance(theirs(x), exact(model, x, dora=True)) < 0.01
    (layer,) = (m for m in theirs.modules() if type(m).__name__ == "DoraLinearLayer")
    assert type(layer).__module__ == "peft.tuners.lora.dorafactors_dora"
    assert theirs.state_dict().keys() == model.state_dict().keys()
    dorafactors.deactivate(theirs)
    assert not any(type(m).__module__ == "peft.tuners.lora.dorafactors_dora" for m in theirs.modules())
    with pytest.raises(PeerError, match="no DoRA linear layer"):
        dorafactors.activate(nn.Linear(3, 3))


def test_a_step_starts_without_gradients_and_with_weights_that_have_been_written() -> None:
    weight, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    weight.grad = torch.ones(3)
    version = weight._version
    touch([weight, frozen])()
    assert weight.grad is None
    assert weight._version > version
    assert frozen._version == 0
    assert torch.equal(weight, torch.ones(3))


def test_rounds_are_interleaved_and_a_contender_that_fails_is_left_out() -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    called: list[str] = []
    collecting: list[bool] = []

    def call(model: nn.Module) -> None:
        if model.name == "bad":
            raise RuntimeError("does not fit\nlong tail")
        called.append(str(model.name))
        collecting.append(gc.isenabled())

    notes: list[str] = []
    running = [Contender(name, Named(name)) for name in ("a", "bad", "b")]
    samples = measure(
        running, call, before=lambda: called.append("-"), rounds=6, device=CPU, hide_host=True, notes=notes
    )
    assert list(samples) == ["a", "b"]
    assert notes == ["bad left out: RuntimeError: does not fit"]
    timed = called[-25:]
    assert timed[::2] == ["-"] * 13, "before each call, and after the last"
    rounds = ["".join(timed[start : start + 3 : 2]) for start in range(1, 25, 4)]
    assert set(rounds) == {"ab", "ba"}, "everyone once in a round, not always after the same one"
    assert not any(collecting[-12:]), "Python's garbage collector rests while the rounds are timed"
    assert gc.isenabled()
    for sample in samples.values():
        columns = sample.columns()
        assert len(sample.us) == 6
        assert columns["us_p20"] <= columns["us"] <= columns["us_p80"]
        assert columns["cpu_us"] > 0.0
        assert columns["peak_mb"] is None


def test_distances_are_those_to_stock_peft_of_dora_to_dora_and_of_lora_to_lora() -> None:
    outputs = {"peft_lora": torch.zeros(4), "peft_dora": torch.ones(4), "doratune": torch.tensor([1.0, 1.0, 1.0, 2.0])}
    assert relative_errors(outputs) == {"doratune": 0.5}
    assert relative_errors({"peft_lora": torch.ones(4), "axolotl_lora": torch.ones(4)}) == {"axolotl_lora": 0.0}
    assert relative_errors({"doratune": torch.ones(4)}) == {}


def rows_of(result: Result) -> list[Row]:
    assert result.exit_code == 0, result.output
    rows: list[Row] = json.loads(result.stdout)["rows"]
    return rows


TRY = ("--device", "cpu", "--rank", "4", "--rounds", "2", "--json")


def test_a_model_is_measured_in_every_implementation_and_mode(tiny: Path) -> None:
    rows = rows_of(bench("model", "--config", str(tiny), "--seq", "16", "--loss-tokens", "8", *TRY))
    found = {(row["op"], row["adapter"], tuple(row["flags"]), row["impl"]) for row in rows}
    expected = {
        (op, adapter, (*flags, *(["checkpointing"] if op == "step" else [])), impl)
        for op in ("step", "inference")
        for adapter, flags in (("fp32", ["autocast"]), ("bf16", []))
        for impl in ("peft_lora", "peft_dora", "doratune")
    }
    assert found == expected
    for row in rows:
        assert (row["bench"], row["model"], row["shape"], row["rank"]) == ("model", "tiny", [2, 16], 4)
        assert 0.0 < row["us_p20"] <= row["us"] <= row["us_p80"]
        if row["impl"] == "doratune" and row["op"] == "inference":
            assert row["rel_err"] < 0.03


def test_ranks_batches_and_decoding_are_cases_of_their_own(tiny: Path) -> None:
    sizes = (
        "--batch",
        "2",
        "--seq",
        "16",
        "--loss-tokens",
        "8",
        "--rank",
        "8",
        "--decode-tokens",
        "3",
        "--context",
        "5",
    )
    ops = ("--op", "step", "--op", "inference", "--op", "decode", "--modes", "bf16")
    rows = rows_of(bench("model", "--config", str(tiny), *sizes, *ops, *TRY))
    cases = {(row["op"], tuple(row["shape"]), tuple(row["flags"]), row["rank"]) for row in rows}
    assert cases == {
        case
        for rank in (4, 8)
        for case in (
            ("step", (2, 16), ("checkpointing", "batch=2"), rank),
            ("inference", (2, 16), ("batch=2",), rank),
            ("decode", (2, 3), ("cache=5",), rank),
        )
    }
    for row in rows:
        assert row["host_us"] == row["cpu_us"] > 0.0
        assert row["launches"] is row["busy_us"] is None, "there is no GPU"
        assert row["calls"] > 1000
        assert ("loss" in row) == (row["op"] == "step")
        if row["impl"] == "doratune":
            assert row["rel_err"] < 0.1
            assert "ratio" not in row
        else:
            assert row["ratio_p20"] <= row["ratio_p80"]
            assert row["rel_err"] is None


def test_layers_and_modes_narrow_a_run_and_checkpointing_can_be_left_out(tiny: Path) -> None:
    narrow = ("--layers", "1", "--modes", "bf16", "--no-checkpointing", "--impl", "peft_lora")
    rows = rows_of(bench("model", "--config", str(tiny), "--seq", "16", *narrow, *TRY))
    assert [(r["op"], r["shape"], r["flags"], r["impl"]) for r in rows] == [
        ("step", [1, 16], [], "peft_lora"),
        ("inference", [1, 16], [], "peft_lora"),
    ]


def test_checkpointing_computes_every_layer_again_in_each_contender(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    calls = {"forward": 0}
    forward = Linear.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls["forward"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    counts = []
    for option in ("--checkpointing", "--no-checkpointing"):
        calls["forward"] = 0
        narrow = ("--modes", "bf16", "--impl", "peft_dora", option)
        rows_of(bench("model", "--config", str(tiny), "--seq", "16", *narrow, *TRY))
        counts.append(calls["forward"])
    projections = 2 * 7
    steps = 1 + 3 + 1 + 1 + 2  # comparison, warm-up, memory, host time, rounds
    steps += 4 + 1  # warm-up, calls counted
    assert counts[0] - counts[1] == steps * projections


def test_an_operation_and_the_tracked_norm_are_measured_when_named(tiny: Path, model: nn.Module) -> None:
    named = ("--op", "inference", "--impl", "doratune_tracked", "--modes", "bf16")
    for rows in (
        rows_of(bench("model", "--config", str(tiny), "--seq", "16", *named, *TRY)),
        rows_of(bench("layer", "--config", str(tiny), "--tokens", "6", *named, *TRY)),
    ):
        assert {(row["op"], row["impl"]) for row in rows} == {("inference", "doratune_tracked")}
    for name in ("doratune", "doratune_tracked"):
        variants = [
            variant
            for module in contender(name, model).model.modules()
            for variant in getattr(module, "lora_variant", {}).values()
        ]
        assert {variant.norms.reuse for variant in variants} == {"tracked" if "tracked" in name else "auto"}


def test_a_compiled_contender_runs_the_same_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiler(module, backend="aot_eager", **options))
    torch.compiler.reset()
    x = torch.randn(5, 40).bfloat16()
    for dora, name in ((True, "peft_dora_compiled"), (False, "peft_lora_compiled")):
        compiled = contender(name, model).model
        with MODES["autocast"].context(CPU):
            y = compiled(x)
        assert distance(y.detach(), exact(model, x, dora=dora)) < 0.01
        assert torch._dynamo.config.recompile_limit >= len(adapted.IMPLEMENTATIONS) * 2


def test_a_layer_is_measured_in_every_shape_of_the_model_and_doratune_agrees_with_stock_peft(tiny: Path) -> None:
    rows = rows_of(bench("layer", "--config", str(tiny), "--tokens", "6", "--no-compile", *TRY))
    name, shapes = layer_shapes("", tiny)
    assert name == "tiny"
    assert set(shapes) == {(32, 32), (16, 32), (48, 32), (32, 48)}
    found = {(row["op"], row["adapter"], row["impl"], tuple(row["shape"])) for row in rows}
    assert found == {
        (op, adapter, impl, (6, *shape))
        for op in ("step", "inference")
        for adapter in ("fp32", "bf16")
        for impl in ("peft_lora", "peft_dora", "doratune")
        for shape in shapes
    }
    assert all(row["rel_err"] < 0.02 for row in rows if row["impl"] == "doratune" and row["op"] == "inference")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("model", "--modes", "fp8", "--device", "cpu"), "unknown mode 'fp8'"),
        (("model", "--impl", "pefdora", "--device", "cpu"), "unknown implementation 'pefdora'; did you mean"),
        (("layer", "--impl", "dorafactors", "--device", "cpu"), "needs --peer-path"),
        (("model", "--impl", "axolotl_lora", "--device", "cpu"), "needs --axolotl-path"),
        (("layer", "--impl", "axolotl_lora", "--device", "cpu"), "unknown implementation 'axolotl_lora'"),
        (("model", "--axolotl-path", "/nowhere", "--device", "cpu"), "no axolotl there"),
        (("model", "--parallel", "ddp", "--impl", "dorafactors_compiled", "--device", "cpu"), "unknown implementation"),
        (("model", "--op", "first-step", "--impl", "doratune_tracked", "--device", "cpu"), "first-step runs peft_lora"),
        (("layer", "--model", "lama-8b", "--device", "cpu"), "unknown model 'lama-8b'"),
        (("model", "--config", "/nowhere", "--device", "cpu"), "/nowhere"),
    ],
)
def test_a_wrong_request_is_named(args: tuple[str, ...], message: str) -> None:
    result = bench(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
@pytest.mark.parametrize("command", ["layer", "model"])
def test_without_a_gpu_the_cpu_must_be_asked_for(command: str) -> None:
    result = bench(command)
    assert result.exit_code == 2
    assert "needs a GPU and PyTorch sees none; --device cpu" in result.stderr


def model_row(impl: str, us: float, **values: Any) -> Row:
    case = {"bench": "model", "model": "llama-8b", "op": "step", "shape": [32, 4096], "rank": 384, "dtype": "bf16"}
    facts = {"adapter": "fp32", "flags": ["autocast", "checkpointing"], "us": us, "peak_mb": 100.0, "floor_us": None}
    return {**case, "impl": impl, **facts, **values}


def test_the_targets_for_models_are_judged_like_those_for_kernels() -> None:
    rows = [model_row("doratune", 540.0, peak_mb=103.0), model_row("peft_lora", 578.0), model_row("peft_dora", 1100.0)]
    uncheckpointed: dict[str, Any] = {"shape": [4, 4096], "flags": ["autocast"]}
    rows += [
        model_row(f"{name}_compiled", us, **uncheckpointed) for name, us in (("doratune", 1.0), ("peft_lora", 1.0))
    ]
    first = [v for v in judge(rows) if v.measured is not None and v.target.source == "issue 4"]
    outcomes = {(v.target.figure, v.case): v.outcome for v in first}
    whole = "llama-8b step 32×4096 r=384 bf16 fp32 adapters autocast checkpointing"
    assert outcomes == {
        ("time / peft_lora", whole): MET,
        ("peft_dora / time", whole): MISSED,
        ("peak memory / peft_lora", whole): MISSED,
        ("time / peft_lora_compiled", "llama-8b step 4×4096 r=384 bf16 fp32 adapters autocast"): MET,
    }


def test_targets_of_whole_models_select_their_shape_and_flags() -> None:
    small: dict[str, Any] = {"model": "qwen2.5-0.5b", "shape": [24, 2048], "rank": 16, "adapter": "bf16", "flags": []}
    counted: dict[str, Any] = {"launches": 90, "host_us": 50.0}
    rows = [
        model_row("doratune", 104.0, **small, launches=100, host_us=40.0),
        model_row("axolotl_lora", 100.0, **small, **counted),
        model_row("peft_lora", 100.0, **small, **counted),
        model_row("peft_dora", 200.0, **small, **counted),
    ]
    for change in ({"flags": ["liger"]}, {"flags": ["batch=4"]}, {"rank": 64}, {"model": "another"}):
        rows += [model_row(name, us, **{**small, **change}) for name, us in (("doratune", 9.0), ("peft_lora", 1.0))]
    outcomes = [
        (v.target.what, v.target.figure, v.outcome)
        for v in judge(rows)
        if v.target.source == "issue 14" and v.measured is not None
    ]
    what = "1B and 0.5B, 2048 tokens, bf16"
    assert outcomes == [
        (what, "time / axolotl_lora", MET),
        (what, "time / peft_lora", MISSED),
        (what, "time / peft_dora", MET),
        ("0.5B, launches of a step", "launches / peft_lora", MISSED),
        ("0.5B, the host's time of a step", "host_us / peft_lora", MET),
        ("peak memory", "peak memory / peft_lora", MET),
        ("peak memory", "peak memory / axolotl_lora", MET),
    ]


def test_first_steps_and_several_gpus_have_targets() -> None:
    def outcomes(flag: str, op: str, ours: float, *peers: str) -> list[str]:
        rows = [
            model_row(name, us, op=op, flags=[flag]) for name, us in (("doratune", ours), *((p, 1e6) for p in peers))
        ]
        return [v.outcome for v in judge(rows) if v.target.source == "issue 14" and v.measured is not None]

    assert outcomes("cold", "first-step", 5.9e6) == [MET]
    assert outcomes("cold", "first-step", 6.1e6) == [MISSED]
    assert outcomes("store", "first-step", 1.4e6, "peft_lora") == [MET]
    assert outcomes("ddp", "step", 1.1e6, "peft_lora") == [MISSED]
    assert outcomes("fsdp2", "step", 0.9e6, "peft_lora") == [MET]
