"""``explain`` says what was upgraded since its entry was measured, and asks the driver only then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

import doratune
from doratune.cache.entry import MEASURED, PREDICTED, Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.cli import main
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.runtime import loader, present

from ..command_line import RUNNER

SPEC = KernelSpec.create("compose_forward", d_out=4096, tokens=1024, dtype="bf16", gpu="h200")
CONFIG = Config.create("tile", block_t=2, block_n=128, num_warps=1, num_stages=2)
HERE = Environment("h200", "sm_90", triton.__version__, torch.__version__, "580.1", "NVIDIA H200", "0.1.0")


@pytest.fixture(autouse=True)
def _a_machine_with_an_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path / "prebuilt")
    lists(monkeypatch, "NVIDIA H200, 580.1, 9.0")
    yield
    present._boards.cache_clear()


def lists(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have the driver's tool print these lines."""
    monkeypatch.setattr(present, "_QUERY", ["printf", r"%s\n", *lines])
    present._boards.cache_clear()


Put = Callable[..., str]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def make(path: Path | None = None, spec: KernelSpec = SPEC, **changed: str) -> str:
        source = render(spec, CONFIG)
        provenance = changed.pop("provenance", MEASURED)
        entry = Entry(
            spec,
            CONFIG,
            template_digest(spec.op, CONFIG.variant),
            source.digest,
            source.text,
            Evaluation(provenance, us=20.0, floor_us=15.0),
            replace(HERE, **{"gpu": spec.gpu, **changed}),
        )
        with Store.open(path or tmp_path / "home" / "store.sqlite", create=True) as store:
            store.put(entry)
            return store.location

    return make


def warned(spec: KernelSpec = SPEC, store: str | None = None) -> str:
    """The line of ``explain`` about versions, or an empty text."""
    lines = doratune.explain(spec, store).splitlines()
    return next((line.removeprefix("versions").strip() for line in lines if line.startswith("versions ")), "")


def test_an_entry_that_was_measured_under_the_present_versions_has_no_warning(put: Put) -> None:
    put()
    assert warned() == ""


def test_each_version_that_differs_is_named(put: Put) -> None:
    put(triton="2.0.0", torch="1.0.0", driver="450.1", gpu_name="NVIDIA H200 NVL")
    then = "Triton 2.0.0, PyTorch 1.0.0, driver 450.1, GPU NVIDIA H200 NVL"
    here = f"{triton.__version__}, {torch.__version__}, 580.1, NVIDIA H200"
    assert warned().startswith(f"measured under {then}; here {here}. ")
    assert warned().endswith("`doratune cache drift` measures it again")


def test_a_store_that_is_not_the_users_own_is_named_in_the_command(put: Put, tmp_path: Path) -> None:
    path = put(tmp_path / "team.sqlite", driver="450.1")
    assert warned(store=path).endswith(f"`doratune cache drift --store {path}` measures it again")


def test_an_entry_that_came_with_the_package_is_measured_by_a_search(put: Put, tmp_path: Path) -> None:
    (tmp_path / "prebuilt").mkdir()
    put(tmp_path / "prebuilt" / "h200.sqlite", driver="450.1")
    assert warned().endswith("; `doratune tune` measures it here")


def test_a_predicted_entry_has_no_warning(put: Put) -> None:
    put(provenance=PREDICTED, triton="2.0.0")
    assert warned() == ""


@pytest.mark.parametrize("lines", [(), ("NVIDIA H100 80GB HBM3, 590.2, 9.0",), ("Unable to determine the device",)])
def test_the_driver_is_not_compared_where_such_a_gpu_is_not_here(
    lines: tuple[str, ...], put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists(monkeypatch, *lines)
    put(driver="450.1")
    assert warned() == ""
    put(driver="450.1", triton="2.0.0")
    assert warned().startswith(f"measured under Triton 2.0.0; here {triton.__version__}. ")
    assert warned().endswith("; `doratune cache drift` on h200 measures it again")


def test_one_of_several_gpus_is_enough(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    lists(monkeypatch, "NVIDIA H100 80GB HBM3, 580.1, 9.0", "NVIDIA A99, 580.1, 9.9", "NVIDIA H200, 580.1, 9.0")
    put(driver="450.1")
    assert warned().startswith("measured under driver 450.1; here 580.1. ")


def test_without_the_drivers_tool_the_packages_are_compared(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(present, "_QUERY", ["/nowhere/nvidia-smi"])
    present._boards.cache_clear()
    put(driver="450.1", torch="1.0.0")
    assert warned().startswith(f"measured under PyTorch 1.0.0; here {torch.__version__}. ")


def test_a_kernel_asks_the_driver_when_it_is_explained_and_not_when_it_is_loaded(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "find_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(loader, "gpu_of", lambda device: find_gpu("h200"))
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "_asked", {})
    put(driver="450.1")
    kernel = doratune.load_kernel("compose_forward", d_out=4096, d_in=64, rank=8, tokens=1024)
    assert present._boards.cache_info().misses == 0
    assert f"versions  {warned()}" in kernel.explain()
    assert warned()


def test_the_command_has_it_as_text_and_as_json(put: Put) -> None:
    put(driver="450.1")
    assert f"versions  {warned()}" in RUNNER.invoke(main, ["explain", str(SPEC)]).stdout
    data = json.loads(RUNNER.invoke(main, ["explain", str(SPEC), "--json"]).stdout)
    assert data["upgraded"] == [{"what": "driver", "then": "450.1", "here": "580.1"}]
