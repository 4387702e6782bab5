"""A PostgreSQL server of the tests' own, where one is installed."""

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
from typing import Any

import pytest


class Server:
    """A server in a folder of its own, reached by a socket there."""

    def __init__(self, folder: Path, initdb: str, postgres: str, user: dict[str, str]) -> None:
        self.folder = folder
        self.url = f"postgresql://doratune@/postgres?host={folder}"
        self._quiet: dict[str, Any] = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "cwd": folder,
            **user,
        }
        data = str(folder / "data")
        made = [initdb, "-D", data, "-A", "trust", "-U", "doratune", "-E", "UTF8", "--no-sync"]
        subprocess.run(made, check=True, **self._quiet)
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB"]
        self._command = [postgres, "-D", data, "-k", str(folder), *settings]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import psycopg

        self._process = subprocess.Popen(self._command, **self._quiet)
        for _ in range(200):
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        pytest.fail("the PostgreSQL server did not start")

    def stop(self) -> None:
        """End the server at once, with all connections; what was committed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A running PostgreSQL server of our own."""
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
    server = Server(folder, initdb, postgres, user)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_server: Server) -> str:
    """The URL of an empty PostgreSQL database, the same one for every test: making each its own costs 7 MB of disk."""
    import psycopg

    with psycopg.connect(postgresql_server.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return postgresql_server.url
