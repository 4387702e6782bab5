"""The rows that the kernel benchmark writes say what was measured, and its failures are told without losing the rest.

Timing needs a GPU; here the rows are built from given samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from doratune.benchmarks import kernels
from doratune.benchmarks.kernels import Case, kernel_cases, kernel_row
from doratune.benchmarks.measuring import peak_mb
from doratune.benchmarks.peers import Peer
from doratune.benchmarks.results import (
    OURS,
    Outcome,
    case_of,
    document,
    environment,
    read_rows,
    results_table,
    timing,
)
from doratune.cli import main
from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError
from doratune.runtime.device import find_device
from doratune.runtime.kernel import Kernel
from doratune.runtime.reference import reference

from ..command_line import RUNNER

GPU = find_gpu("h200")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def lora_case(tokens: int) -> Case:
    values: dict[str, Any] = {"d_out": 4096, "rank": 384, "tokens": tokens, "dtype": "bf16", "adapter": "fp32"}
    return Case(KernelSpec.create("lora_compose", **values, gpu="h200"), tokens)


def test_a_row_says_what_was_measured_in_its_own_tokens() -> None:
    case = lora_case(64)
    row = kernel_row(case, "peft_eager", [4.0, 1.0, 2.0, 3.0, 5.0], GPU)
    assert row["shape"] == [64, 4096]  # not those of the bucket of 128
    assert (row["bench"], row["op"], row["rank"]) == ("kernels", "lora_compose", 384)
    assert (row["dtype"], row["adapter"], row["flags"]) == ("bf16", "fp32", [])
    assert row["us"] == 3.0
    assert row["us_p20"] < 3.0 < row["us_p80"]
    assert row["config"] is None
    moved = 2 * 64 * 4096 * 2 + 64 * 384 * 2 + 4096 * 384 * 4 + 4096 * 4
    assert row["floor_us"] == pytest.approx(GPU.floor_us(moved, 2 * 64 * 4096 * 384, "bf16"))


def test_every_case_is_another_one() -> None:
    rows = [kernel_row(case, OURS, [1.0, 2.0], GPU) for case in kernel_cases("h200")]
    assert len({case_of(row) for row in rows}) == len(rows)
    assert {row["op"] for row in rows} <= set(OPS)
    norms = [row for row in rows if row["op"] == "weight_norm"]
    assert {row["rank"] for row in norms} == {64, 384}
    assert {(row["dtype"], row["adapter"]) for row in norms} >= {("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")}
    assert {row["shape"][0] for row in rows if row["op"] == "lora_compose"} >= {1, 16, 64, 4096, 8192}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case, list[Peer]], Outcome]:
    """``run_case`` with the reference in the kernel's place, on CPU tensors, and given times instead of a clock."""

    class Eager(Kernel):
        def launch(self, inputs: Sequence[Any], outputs: Sequence[Any], scaling: float | None = None) -> None:
            names = [operand.name for operand in self.spec.contract.inputs_of(self.spec)]
            results = reference(self.spec, dict(zip(names, inputs, strict=True)), scaling or 0.0)
            for output, value in zip(outputs, results.values(), strict=True):
                output.copy_(value)

    checked = kernels.checked_set
    monkeypatch.setattr(kernels, "load", lambda spec, tokens: Eager(spec, find_device("cpu")))
    monkeypatch.setattr(kernels, "checked_set", lambda case, draw: checked(case, draw, "cpu"))
    monkeypatch.setattr(
        kernels,
        "_time",
        lambda case, running, gpu, rounds, notes: ({n: [1.0, 2.0] for n in running}, dict.fromkeys(running)),
    )

    def run(case: Case, peers: list[Peer]) -> Outcome:
        outcome = Outcome()
        kernels.run_case(case, peers, GPU, 2, outcome)
        return outcome

    return run


def small(op: str, **values: Any) -> Case:
    sizes: dict[str, Any] = {"d_out": 64, "d_in": 96, "rank": 8, "tokens": 16, "dtype": "fp32", "adapter": "fp32"}
    return Case(KernelSpec.create(op, **{**sizes, **values}, gpu="h200"), 16 if op != "weight_norm" else 0)


def test_a_peer_that_fails_is_left_out_with_its_reason_and_the_others_stay(on_the_cpu: Any) -> None:
    def fails(inputs: Any, outputs: Any) -> None:
        raise RuntimeError("out of memory\nand a long tail")

    good = Peer("lora_eager", lambda inputs, _: inputs["base"])
    outcome = on_the_cpu(small("lora_compose"), [Peer("peft_eager", fails), good])
    assert [row["impl"] for row in outcome.rows] == [OURS, "lora_eager"]
    assert outcome.notes == [f"{small('lora_compose').spec}: peft_eager left out: RuntimeError: out of memory"]
    assert not outcome.failures


def test_our_error_and_the_peers_are_in_the_rows(on_the_cpu: Any) -> None:
    coarse = Peer("dense_ba", lambda inputs, _: inputs["weight"].norm(dim=1), lambda result, _: {"norm": result})
    part = Peer("cublas_product", lambda inputs, _: inputs["weight"] @ inputs["lora_A"].T)
    ours, whole, product = on_the_cpu(small("weight_norm"), [coarse, part]).rows
    assert ours["rel_err"] < 1e-5
    assert ours["complaint"] is None
    assert whole["rel_err"] > 1e-3
    assert product["rel_err"] is None


def test_an_inaccurate_kernel_is_a_failure_with_its_case(on_the_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = kernels._ours

    def off(kernel: Kernel) -> Any:
        def run(inputs: Any, outputs: Any) -> None:
            ours(kernel)(inputs, outputs)
            outputs["norm"][0] = float("nan")

        return run

    monkeypatch.setattr(kernels, "_ours", off)
    outcome = on_the_cpu(small("weight_norm"), [])
    (row,) = outcome.rows
    assert "mixed inputs: norm is off by nan" in row["complaint"]
    assert row["rel_err"] is None
    assert outcome.failures == [f"{small('weight_norm').spec}, None: {row['complaint']}"]
    json.loads(document({}, outcome.rows), parse_constant=pytest.fail)  # NaN is no JSON


def test_percentiles_stay_within_the_samples_however_few() -> None:
    assert timing([3.0]) == {"us": 3.0, "us_p20": 3.0, "us_p80": 3.0}
    few = timing([1.0, 100.0])
    assert 1.0 <= few["us_p20"] < few["us"] == 50.5 < few["us_p80"] <= 100.0


@needs_no_gpu
def test_peak_memory_is_unknown_without_a_gpu_but_the_call_runs() -> None:
    calls: list[int] = []
    assert peak_mb(lambda: calls.append(1)) is None
    assert calls


def test_the_environment_names_versions_commit_and_peers() -> None:
    env = environment("abc", dorafactors="sha256:1")
    assert env["torch"] == torch.__version__
    assert (env["doratune_commit"], env["dorafactors"]) == ("abc", "sha256:1")
    assert len(environment()["doratune_commit"]) >= 7


def test_the_table_has_a_line_a_case_and_peers_as_multiples() -> None:
    from rich.console import Console

    rows = [kernel_row(lora_case(64), name, [us, us], GPU) for name, us in ((OURS, 2.0), ("copy", 5.0))]
    alone = kernel_row(lora_case(16), "copy", [7.0, 7.0], GPU)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table([*rows, alone]))
    lines = console.export_text().splitlines()
    (first,) = (line for line in lines if "64×4096 r=384 bf16 fp32 adapters" in line)
    assert "copy 2.50" in first
    (second,) = (line for line in lines if "16×4096" in line)
    assert "copy 7.0 µs" in second


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in ("", "{}", '{"schema": 1, "rows": [{}]}', '{"schema": 2, "rows": []}'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"rows\.json"):
            read_rows(path)


def bench(*args: str) -> Result:
    return RUNNER.invoke(main, ["bench", *args])


@needs_no_gpu
def test_without_a_gpu_the_command_says_so() -> None:
    result = bench("kernels", "--op", "weight_norm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "needs a GPU and PyTorch sees none" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--op", "weight_nrom"), "unknown operation 'weight_nrom'; did you mean weight_norm, "),
        (("--op", "q,k"), "unknown operation 'q,k'; did you mean q,k,v?"),
        (("--peer", "peft_eagre"), "unknown peer 'peft_eagre'; did you mean peft_eager"),
        (("--peer", "seperate"), "unknown peer 'seperate'; did you mean separate"),
        (("--peer-path", "/nowhere"), "--peer-path /nowhere: no dorafactors there"),
        (("--rounds", "1"), "--rounds"),
    ],
)
def test_a_wrong_request_is_named_before_anything_runs(args: tuple[str, ...], message: str) -> None:
    result = bench("kernels", *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_results_are_judged_without_a_gpu(tmp_path: Path) -> None:
    case = small("weight_norm", d_out=4096, d_in=4096, rank=384, dtype="bf16", adapter="bf16")
    rows = [kernel_row(case, name, [us, us], GPU) for name, us in ((OURS, 30.0), ("cublas_product", 20.0))]
    path = tmp_path / "kernels.json"
    path.write_text(document({}, rows))
    result = bench("targets", str(path))
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if "4096×4096" in line and "missed" in line)
    assert "1.5" in line
    assert "1 missed" in result.stderr
