"""The page of a user with winners, searches, results files and a model; and a browser to look at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doratune.cache.entry import MEASURED, PREDICTED
from doratune.report.data import Report, Request, gather
from doratune.report.page import page
from doratune.report.sections import document
from doratune.tuner.coverage import Covered
from doratune.tuner.models import find_model

from . import world


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with something in every section."""
    folder = tmp_path_factory.mktemp("report")
    specs = world.specs()
    found = gather(
        Request(
            store=world.write_store(folder / "store.sqlite", world.usual_entries()),
            study_storage=world.write_studies(folder / "studies.sqlite", specs[3:5]),
            results=[
                world.write_results(folder / "kernels.json", world.usual_rows()),
                world.write_results(folder / "model.json", [world.step_row(530e3)]),
                world.write_results(folder / "coverage.json", world.coverage_rows(), gpu=world.HOSTILE),
            ],
        )
    )
    statuses = ((MEASURED, 0.0), (PREDICTED, None), ("near", 0.04), ("near", 0.4), ("near", None), ("default", None))
    covered = [Covered(spec, *at) for spec in specs for at in ((status, False, loss) for status, loss in statuses)]
    return replace(
        found,
        covered=tuple(covered),
        model=find_model("llama-8b"),
        gpu=world.GPU,
        ranks=(16,),
        asked="--model llama-8b",
    )


@pytest.fixture(scope="session")
def html(report: Report) -> str:
    """Its page."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    return page(document(report))


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium or Chrome of this machine."""
    named = os.environ.get("BROWSER_PATH")
    for name in (named, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    pytest.skip("no Chromium or Chrome is installed (apt-get install chromium)")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Any]:
    """A running headless browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("playwright is not installed")
    with sync_playwright() as driver:
        # In a container there is no user namespace for the sandbox, and little shared memory.
        started = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def page_file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path
