"""No wait is without an end: a server that accepts and never answers, one that stops in the middle, a lock that another
session holds; and no message about it has the password."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from doratune.cache import connect
from doratune.cache.errors import StoreAccessError, StoreError, UnreachableStoreError
from doratune.cache.store import Store

from ..postgresql import Server
from .world import a_spec, an_entry

SOON = 20.0
"""Seconds that nothing below may take; the limits are set to 1 or 2."""


@contextmanager
def _soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CONNECT_SECONDS", 2)
    monkeypatch.setattr(connect, "OPERATION_SECONDS", 1)
    monkeypatch.setattr(connect, "LONG_SECONDS", 1)
    monkeypatch.setattr(connect, "BUSY_SECONDS", 1)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("mode", [{"create": True}, {}, {"readonly": True}])
def test_a_server_that_accepts_and_never_answers_is_given_up(mode: dict[str, bool]) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with socket.socket() as listening, _soon():
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(UnreachableStoreError, match=rf"127\.0\.0\.1:{port}/db.*did not answer in time") as caught:
            Store.open(f"postgresql://me:s3cret@127.0.0.1:{port}/db", **mode)
        assert "s3cret" not in str(caught.value)


@pytest.mark.usefixtures("_short")
def test_a_server_that_stops_answering_is_given_up(postgresql_server: Server, postgresql_url: str) -> None:
    with Store.open(postgresql_url, create=True) as store, store._reading() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        os.kill(pid, signal.SIGSTOP)  # the system still accepts what is sent to it
        try:
            with _soon(), pytest.raises(StoreError), connect.explained(store._where):
                connection.exec_driver_sql("SELECT 1")
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.usefixtures("_short")
def test_a_table_that_another_session_has_locked_is_given_up(postgresql_url: str) -> None:
    import psycopg

    with Store.open(postgresql_url, create=True) as store:
        store.put(an_entry())
        with psycopg.connect(postgresql_url) as other:
            other.execute("LOCK TABLE doratune_entries IN ACCESS EXCLUSIVE MODE")
            for use in (lambda: store.get(a_spec()), lambda: store.put(an_entry()), store.entries):
                with _soon(), pytest.raises(StoreAccessError, match=r"held a lock|took over"):
                    use()
            with _soon():
                [problem] = store.verify()
            assert "held a lock" in problem or "took over" in problem
        assert store.get(a_spec()) == an_entry()


@pytest.mark.usefixtures("_short")
def test_a_query_that_takes_too_long_is_given_up(postgresql_url: str) -> None:
    with (
        Store.open(postgresql_url, create=True) as store,
        _soon(),
        pytest.raises(StoreAccessError, match="took over"),
        connect.explained(store._where),
        store._reading() as connection,
    ):
        connection.exec_driver_sql("SELECT pg_sleep(30)")


def test_the_watch_over_a_connection_ends_with_it(postgresql_url: str) -> None:
    with Store.open(postgresql_url, create=True) as store:
        for _ in range(3):
            store.get(a_spec())
    assert connect._watches == {}


def test_a_view_in_the_place_of_a_table_is_refused(postgresql_url: str) -> None:
    with Store.open(postgresql_url, create=True) as store, store._writer.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE doratune_entries RENAME TO other")
        connection.exec_driver_sql("CREATE VIEW doratune_entries AS SELECT o.* FROM other o, pg_sleep(60)")
    with pytest.raises(StoreError, match="doratune_entries is not a table"):
        Store.open(postgresql_url)


def test_a_long_text_costs_its_row_on_a_server_too(postgresql_url: str) -> None:
    with Store.open(postgresql_url, create=True) as store:
        store.put_all([an_entry(), an_entry(a_spec(rank=16))])
        with store._writer.begin() as connection:
            connection.exec_driver_sql("UPDATE doratune_entries SET source = repeat('x', 30000000) WHERE rank = 16")
        found, [problem] = store.readable_entries()
        assert found == [an_entry()]
        assert "source must have at most" in str(problem)
        assert len(str(problem)) <= 1000
