"""The benchmarks time doratune and every peer on the GPU, in one run, and know what each call takes in memory."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from doratune.benchmarks.adapted import MODES, contender, with_dora
from doratune.benchmarks.groups import GROUP_PEERS, group_cases, run_group
from doratune.benchmarks.host import compiled_module, host_cases, prebound
from doratune.benchmarks.kernels import Case, run_case
from doratune.benchmarks.measuring import SCALING
from doratune.benchmarks.peers import peers_of
from doratune.benchmarks.quantised import quantise
from doratune.benchmarks.results import OURS, UNCHECKED, Outcome
from doratune.cli import main
from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.kernel import Kernel
from doratune.runtime.loader import resolve
from doratune.tuner.inputs import make_inputs, make_outputs

from ..specs import dtype_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize(("quant", "package"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("fp8", "torchao")])
def test_layers_that_are_on_the_gpu_are_quantised_there(quant: str, package: str) -> None:
    """bitsandbytes quantises what moves to a GPU; what is there already it would leave in bf16."""
    pytest.importorskip("peft")
    pytest.importorskip(package)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 128, bias=False, device="cuda", dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = plain(x)
        model = with_dora(quantise(copy.deepcopy(plain), ["0"], quant), MODES["bf16"], rank=4, targets=["0"])
        lora = contender("peft_lora", model).model.base_model.model[0]
        error = (lora.get_base_layer()(x) - wanted).norm() / wanted.norm()
    assert 1e-3 < float(error) < 0.2


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_exact")])
def test_a_kernel_is_timed_beside_every_peer(op: str) -> None:
    gpu = gpu_of(find_device("cuda"))
    sizes: dict[str, Any] = {"d_out": 512, "d_in": 1024, "rank": 64, "tokens": 128, "adapter": "bf16"}
    spec = KernelSpec.create(op, **sizes, dtype=dtype_for(op, "bf16"), gpu=gpu.slug)
    case = Case(spec, 0 if op.startswith("weight_") else 100)
    peers = peers_of(case.spec, SCALING)
    outcome = Outcome()
    run_case(case, peers, gpu, 2, outcome)
    torch.compiler.reset()
    assert outcome.notes == []
    assert outcome.failures == []
    assert [row["impl"] for row in outcome.rows] == [OURS, *(peer.name for peer in peers)]
    for row in outcome.rows:
        assert row["us"] > 0.9 * row["floor_us"] or row["impl"] != OURS
        assert row["peak_mb"] >= 0.0
    whole = {peer.name for peer in peers if peer.outputs is not None}
    assert all(row["rel_err"] < 0.05 for row in outcome.rows if row["impl"] in {OURS, *whole})


def test_projections_of_one_x_are_timed_grouped_and_separate() -> None:
    gpu = gpu_of(find_device("cuda"))
    case = next(iter(group_cases(gpu.slug, ["q,k,v"])))
    outcome = Outcome()
    run_group(case, GROUP_PEERS, gpu, 2, outcome)
    assert outcome.notes == outcome.failures == []
    assert [row["impl"] for row in outcome.rows] == [OURS, *GROUP_PEERS]
    for row in outcome.rows:
        assert row["us"] > 0.0
        assert row["peak_mb"] >= 0.0
        assert row["rel_err"] is None or row["rel_err"] < 0.05


@pytest.mark.parametrize("command", ["layer", "model"])
def test_layers_and_models_have_times_and_peaks(command: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 512, **shape}))
    size = ["--tokens", "128"] if command == "layer" else ["--seq", "128", "--loss-tokens", "64"]
    options = ["--config", str(config), *size, "--rank", "16", "--no-compile", "--rounds", "2", "--json"]
    result = CliRunner().invoke(main, ["bench", command, *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["impl"] for row in rows} == {"peft_lora", "peft_dora", "doratune"}
    for row in rows:
        assert row["us"] > 0.0
        assert row["cpu_us"] > 0.0
        assert row["peak_mb"] > 0.0
        if row["impl"] == "doratune" and row["op"] == "inference":
            assert row["rel_err"] < 0.05


TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
PATHS = {"axolotl": "DORATUNE_AXOLOTL_PATH", "unsloth": "DORATUNE_UNSLOTH_PATH"}


def model_rows(tmp_path: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of ``bench model`` on a tiny model at rank 16, and what it wrote to standard error."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    size = ["--seq", "128", "--loss-tokens", "64", "--rank", "16", "--rounds", "2", "--json"]
    result = CliRunner().invoke(main, ["bench", "model", "--config", str(config), *size, *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"], result.stderr


@pytest.mark.parametrize("checkpointing", ["--checkpointing", "--no-checkpointing"])
@pytest.mark.parametrize("project", [*PATHS])
def test_fused_functions_agree_with_peft_and_are_timed(tmp_path: Path, project: str, checkpointing: str) -> None:
    path = os.environ.get(PATHS[project])
    if not path:
        pytest.skip(f"{PATHS[project]} names no checkout or unpacked wheel of {project}")
    ops = [option for op in ("step", "inference", "decode") for option in ("--op", op)]
    less = ("--modes", "bf16", "--decode-tokens", "2", "--no-counts", "--batch", "2")  # kernels compile for each size
    rows, told = model_rows(tmp_path, *ops, *less, checkpointing, f"--{project}-path", path)
    assert "left out" not in told
    peers = {"peft_lora", "peft_dora", "doratune", f"{project}_lora"} | {"axolotl_dora"} & {f"{project}_dora"}
    assert {(row["op"], row["impl"]) for row in rows} == {(op, impl) for op in ops[1::2] for impl in peers}
    for row in rows:
        assert row["us"] > 0.0
        if row["impl"] == f"{project}_lora" and row["op"] == "step":
            assert row["loss_err"] < 5e-4


def test_ligers_kernels_are_in_every_contender(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="Liger's kernels are not installed: pip install liger-kernel")
    losses = {}
    for options in ([], ["--liger"]):
        rows, told = model_rows(tmp_path, "--op", "step", "--op", "inference", "--batch", "2", "--no-counts", *options)
        assert "left out" not in told
        assert {row["impl"] for row in rows} == {"peft_lora", "peft_dora", "doratune"}
        assert all(("liger" in row["flags"]) == bool(options) for row in rows)
        for row in rows:
            if row["op"] == "step":
                losses.setdefault((row["impl"], row["adapter"]), []).append(row["loss"])
    for plain, with_liger in losses.values():
        assert with_liger == pytest.approx(plain, rel=2e-3)


def test_launches_and_times_of_a_call_are_counted(tmp_path: Path) -> None:
    rows, _ = model_rows(tmp_path, "--op", "step", "--op", "decode", "--decode-tokens", "2", "--modes", "bf16")
    assert {row["op"] for row in rows} == {"step", "decode"}
    for row in rows:
        assert row["launches"] > 14 * 2, "at least base product and composition of each projection"
        assert 0.0 < row["busy_us"] < 1.1 * row["us"]
        assert row["host_us"] > 0.0


def test_first_steps_and_two_gpus(tmp_path: Path) -> None:
    rows, told = model_rows(tmp_path, "--op", "first-step", "--modes", "bf16", "--impl", "doratune")
    assert "left out" not in told
    cold, warm = rows
    assert warm["us"] < cold["us"], "nothing is compiled again"
    if torch.cuda.device_count() < 2:
        pytest.skip("--parallel needs two GPUs")
    for how in ("ddp", "fsdp2"):
        rows, told = model_rows(tmp_path, "--parallel", how)
        assert "left out" not in told
        assert all(row["loss_err"] < 5e-3 for row in rows if row["impl"] == "doratune")


def test_the_host_is_timed_in_every_way_to_launch() -> None:
    result = CliRunner().invoke(main, ["bench", "host", "--rounds", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert "left out" not in result.stderr
    ways = [OURS, UNCHECKED, "hit", "launch", "prebound", "jit"]
    found = [(row["op"], row["impl"]) for row in json.loads(result.stdout)["rows"]]
    composed = [("lora_compose", way) for way in [*ways, "torch"]]
    assert found == composed * 2 + [("weight_norm", way) for way in ways]


def test_prebound_kernels_give_the_bits_that_the_kernel_gives() -> None:
    device = find_device("cuda")
    for spec in host_cases(gpu_of(device).slug):
        inputs = tuple(make_inputs(spec, spec.tokens or 1, device=device)[0].values())
        found, expected = (tuple(make_outputs(spec, spec.tokens or 1, device).values()) for _ in range(2))
        source = resolve(spec)[1]
        Kernel(spec, device, source=source).launch(inputs, expected, 0.75)
        prebound(compiled_module(source), (*inputs, *found, 0.75))()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_take_a_gpu_each(how: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found, small = tmp_path / "rows.json", ("--layers", "2", "--seq", "256", "--rounds", "2", "--modes", "bf16")
    told = CliRunner().invoke(
        main, ["bench", "model", "--parallel", how, "--processes", "2", "--rank", "16", *small, "--output", str(found)]
    )
    assert told.exit_code == 0, told.output
    rows = json.loads(found.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["peft_lora", "peft_dora", OURS]
    assert rows[-1]["loss_err"] < 5e-2
