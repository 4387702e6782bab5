"""The benchmark of the host times what it says, and its rows can be judged; the times themselves need a GPU."""

from __future__ import annotations

import gc
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from doratune.benchmarks import host
from doratune.benchmarks.host import Call, host_cases, host_row, host_us, prebound, run_case, ways_to_start
from doratune.benchmarks.results import OURS, UNCHECKED, Outcome, Row, case_of, document, results_table
from doratune.benchmarks.targets import MET, MISSED, TARGETS, UNMEASURED, judge
from doratune.cli import main
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config, find_variant
from doratune.runtime.device import find_device
from doratune.runtime.kernel import Kernel

from ..command_line import RUNNER

SPECS = list(host_cases("h200"))
HOST_TARGETS = [target for target in TARGETS if target.bench == "host"]


def row(impl: str, us: float, spec: KernelSpec = SPECS[0]) -> Row:
    return host_row(spec, Kernel(spec, torch.device("cpu")), impl, [us, us, us])


def test_one_case_has_a_pointer_kernel_and_the_others_have_descriptors() -> None:
    kinds = [find_variant(spec.op, default_config(spec, find_gpu("h200")).variant).descriptors for spec in SPECS]
    assert kinds == [False, True, True]
    assert [(spec.op, spec.rank) for spec in SPECS] == [
        ("lora_compose", 4),
        ("lora_compose", 384),
        ("weight_norm", 384),
    ]


def test_ways_take_turns_and_the_queue_is_emptied_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = iter(range(0, 10**9, 6000))
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter_ns=lambda: next(clock)))
    calls: dict[str, Call] = {name: lambda name=name: log.append(name) for name in ("a", "b")}  # type: ignore[misc]
    samples = host_us(calls, 2, 3, lambda: log.append("empty"))
    assert log == ["empty", "a", "a", "a", "empty", "b", "b", "b"] * 3 + ["empty"]
    assert samples == {"a": [2.0, 2.0], "b": [2.0, 2.0]}, "6 µs for 3 calls; the first round warms up"
    assert gc.isenabled()


def test_garbage_is_collected_again_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError):
        host_us({"a": lambda: 1 // 0}, 2, 3, lambda: None)
    assert gc.isenabled()


def test_a_prebound_start_is_what_launch_would_start_with_all_else_made_beforehand() -> None:
    started: list[Any] = []
    grids: list[Any] = []

    class Compiled:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments: started.append((self.name, grid, *arguments))

    module = ModuleType("emitted")
    module.first_kernel, module.second_kernel = Compiled("first"), Compiled("second")  # type: ignore[attr-defined]
    text = """
def launch(x, y, scaling):
    workspace = object()
    first_kernel[(3,)](x, workspace, num_warps=4)
    second_kernel[(3, 4)](workspace, y, scaling, num_warps=4, launch_pdl=True)
"""
    exec(text, vars(module))
    call = prebound(module, ("x", "y", 0.5))
    assert started == [], "making it starts nothing"
    call()
    call()
    first, second, *again = started
    assert first[:3] == ("first", (3, 1, 1), "x")
    assert second == ("second", (3, 4, 1), first[3], "y", 0.5)
    assert again == [first, second]
    assert len(grids) == 2


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``run_case`` with the reference in the kernels' place; grows by the name of each way that is timed."""
    timed: list[str] = []
    times = {OURS: 9.0, UNCHECKED: 8.0, "hit": 1.0, "launch": 7.0, "prebound": 8.5, "jit": 40.0, "torch": 6.0}

    def given(calls: dict[str, Call], rounds: int, repeats: int, synchronize: Call) -> dict[str, list[float]]:
        assert repeats in (128, 170, 256, 512)
        for call in calls.values():
            call()
        timed.extend(calls)
        return {impl: [times[impl]] * rounds for impl in calls}

    def fails(*_: object) -> Any:
        raise RuntimeError("no target\nand a long tail")

    monkeypatch.setattr(host, "host_us", given)
    monkeypatch.setattr(host, "compiled_module", fails)
    monkeypatch.setattr(host, "load_module", fails)
    monkeypatch.setattr(host, "resolve", lambda spec: (None, SimpleNamespace(spec=spec, text="def a_kernel(")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Kernel, "launch", lambda *_: None)
    return timed


def test_every_way_is_timed_and_one_that_fails_is_left_out_with_its_reason(on_the_cpu: list[str]) -> None:
    outcome = Outcome()
    run_case(SPECS[0], find_device("cpu"), 2, outcome)
    assert on_the_cpu == [OURS, UNCHECKED, "hit", "launch", "torch"]
    assert [row["impl"] for row in outcome.rows] == on_the_cpu
    assert [note.split(": ", 1)[1] for note in outcome.notes] == [
        f"{impl} left out: RuntimeError: no target" for impl in ("prebound", "jit")
    ]
    assert {row["shape"][0] for row in outcome.rows} == {16}


def test_the_calls_are_those_that_a_user_makes() -> None:
    seen: list[Any] = []

    class Loaded:
        def __call__(self, *tensors: Any, **options: Any) -> None:
            seen.append(("call", tensors, options))

        def launch(self, *arguments: Any) -> None:
            seen.append(("launch", *arguments))

    def load() -> Any:
        seen.append("hit")
        return Loaded()

    base, h, factor, g, y = (torch.zeros(2, 2) for _ in range(5))
    source: Any = SimpleNamespace(spec=SPECS[0])
    ways = ways_to_start(load, source, {"base": base, "h": h, "lora_B": factor, "g": g}, {"y": y})
    ours, unchecked, launch = ways[OURS](), ways[UNCHECKED](), ways["launch"]()
    seen.clear()
    ours()
    unchecked()
    launch()
    assert seen == [
        "hit",
        ("call", (base, h, factor, g), {"scaling": host.SCALING, "out": y}),
        "hit",
        ("launch", (base, h, factor, g), (y,), host.SCALING),
        ("launch", (base, h, factor, g), (y,), host.SCALING),
    ]
    assert ways["hit"]() is load


def test_a_row_has_the_hosts_time_and_none_of_the_gpu() -> None:
    found = host_row(SPECS[2], Kernel(SPECS[2], torch.device("cpu")), "jit", [4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found["bench"], found["op"], found["shape"], found["rank"]) == ("host", "weight_norm", [4096, 4096], 384)
    assert found["cpu_us_p20"] < found["cpu_us"] == 3.0 < found["cpu_us_p80"]
    assert {found[name] for name in ("us", "us_p20", "us_p80", "floor_us", "rel_err", "peak_mb")} == {None}
    assert len({case_of(row("jit", 1.0, spec)) for spec in SPECS}) == len(SPECS)
    document({}, [found])


def test_the_table_shows_the_hosts_time() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table([row(OURS, 10.0), row("jit", 40.0)]))
    (line,) = (line for line in console.export_text().splitlines() if "16×512" in line)
    assert "10.0 µs" in line
    assert "jit 4.00" in line


@pytest.mark.parametrize("impl", [OURS, UNCHECKED])
@pytest.mark.parametrize(
    ("ours", "prebound_us", "jit_us", "outcomes"),
    [(12.1, 11.2, 60.0, [MET, MET]), (12.3, 11.2, 60.0, [MISSED, MET]), (9.0, 11.2, 8.0, [MET, MISSED])],
)
def test_a_launch_is_held_against_the_same_kernels_prebound_and_tritons_own(
    ours: float, prebound_us: float, jit_us: float, outcomes: list[str], impl: str
) -> None:
    other = row("prebound", 1.0, SPECS[1])
    rows = [row(impl, ours), row("prebound", prebound_us), row("jit", jit_us), other]
    verdicts = [verdict for verdict in judge(rows) if verdict.target.op == "lora_compose"]
    found = [verdict for verdict in verdicts if verdict.target.impl == impl]
    assert {verdict.outcome for verdict in verdicts if verdict not in found} == {UNMEASURED}
    assert [verdict.outcome for verdict in found] == outcomes
    assert found[0].measured == pytest.approx(ours - prebound_us)
    assert found[1].measured == pytest.approx(ours / jit_us)
    assert {verdict.outcome for verdict in judge(rows) if verdict.target.op == "weight_norm"} == {UNMEASURED}


def test_a_way_that_was_left_out_is_not_measured() -> None:
    assert {verdict.outcome for verdict in judge([row(OURS, 9.0)])} == {UNMEASURED}


def test_every_target_selects_a_case_that_is_measured() -> None:
    assert {target.source for target in HOST_TARGETS} == {"issue 4"}
    for target in HOST_TARGETS:
        assert any(target.op == spec.op and target.where(row(target.impl, 1.0, spec)) for spec in SPECS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    result = RUNNER.invoke(main, ["bench", "host"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "needs a GPU and PyTorch sees none" in result.stderr
