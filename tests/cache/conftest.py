"""Places to keep a store: a SQLite file, and a PostgreSQL database where a server can be started."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stores of whoever runs the tests take no part in them."""
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be made: a path, or a URL."""
    if request.param == "sqlite":
        return str(tmp_path / "team" / "store.sqlite")
    return str(request.getfixturevalue("postgresql_url"))
