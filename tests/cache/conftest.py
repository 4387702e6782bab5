"""Places to keep a store: a SQLite file, and a PostgreSQL database where a server can be started."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stores of whoever runs the tests take no part in them."""
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Path]:
    """The socket folder of a running PostgreSQL server of our own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    search = os.pathsep.join([*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))), os.environ["PATH"]])
    initdb, postgres = shutil.which("initdb", path=search), shutil.which("postgres", path=search)
    if initdb is None or postgres is None:
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="doratune-pg-"))  # not pytest's: a socket's path must be short
    user: dict[str, str] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip("running as root, and there is no user 'postgres' to run the server")
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    made = [initdb, "-D", str(data), "-A", "trust", "-U", "doratune", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, check=True, **quiet, **user)  # type: ignore[call-overload]
    settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB"]
    server = subprocess.Popen([postgres, "-D", str(data), "-k", str(folder), *settings], **quiet, **user)  # type: ignore[call-overload]
    try:
        _wait(folder, server)
        yield folder
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    for _ in range(200):
        try:
            psycopg.connect(f"postgresql://doratune@/postgres?host={folder}").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None:
                break
            time.sleep(0.05)
    pytest.fail("the PostgreSQL server did not start")


@pytest.fixture
def postgresql_url(postgresql_server: Path) -> str:
    """The URL of an empty PostgreSQL database, the same one for every test: making each its own costs 7 MB of disk."""
    import psycopg

    url = f"postgresql://doratune@/postgres?host={postgresql_server}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be made: a path, or a URL."""
    if request.param == "sqlite":
        return str(tmp_path / "team" / "store.sqlite")
    return str(request.getfixturevalue("postgresql_url"))
