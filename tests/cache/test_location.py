"""A location reads as the user meant it: paths and URLs in one search path, and a password is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from doratune.cache.errors import LocationError
from doratune.cache.location import Location, passwords_of, split_locations, without_password
from doratune.cache.store import Store


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("/a:/b", ["/a", "/b"]),
        ("/a::/b:", ["/a", "/b"]),
        ("relative:~/own.sqlite", ["relative", "~/own.sqlite"]),
        ("postgresql://me@host:5432/db", ["postgresql://me@host:5432/db"]),
        ("/a:postgresql://me:word@host:5432/db:/b", ["/a", "postgresql://me:word@host:5432/db", "/b"]),
        ("postgresql://me@[::1]:5432/db?x=1:/b", ["postgresql://me@[::1]:5432/db?x=1", "/b"]),
        ("postgresql:///db?host=/run/pg:sqlite:////x/y", ["postgresql:///db?host=/run/pg", "sqlite:////x/y"]),
        ("sqlite:////abs/a.sqlite:sqlite:///b.sqlite", ["sqlite:////abs/a.sqlite", "sqlite:///b.sqlite"]),
    ],
)
def test_a_search_path_keeps_urls_whole(text: str, items: list[str]) -> None:
    assert split_locations(text) == items


@pytest.mark.parametrize("text", ["sqlite:////x/a.sqlite", "sqlite+pysqlite:////x/a.sqlite", "/x/./a.sqlite"])
def test_names_of_one_file_are_one_location(text: str) -> None:
    assert Location.parse(text) == Location.parse(Path("/x/a.sqlite"))


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Location.parse("~/a.sqlite").path == Path("/home/me/a.sqlite")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_password_reaches_the_driver_but_no_message(scheme: str) -> None:
    location = Location.parse(f"{scheme}://me:s3cret@host:5432/db?password=s3cret")
    assert location.url == "postgresql+psycopg://me:s3cret@host:5432/db?password=s3cret"
    assert "s3cret" not in f"{location} {location!r}"
    assert str(location) == "postgresql://me:***@host:5432/db?password=***"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:s3/cret@host/db",
        "postgresql://me:s3@cret@host/db",
        "postgresql://me:s3?cret@host/db",
        "postgresql://me:s3#cret@host/db",
        "postgresql://me:s3 cret@host/db",
        "postgresql://me:s3'cret@host/db",
        "postgresql:/me:s3cret@host/db",
        "postgresql:me:s3cret@host/db",
        "postgres:/me:s3cret@host/db",
        "POSTGRESQL:/me:s3cret@host/db",
        "mysql://me:s3cret@host/db",
        "mysql:/me:s3cret@host/db",
        "sqlite://me:s3cret@host/db",
        "host=a user=me password=s3cret",
        "host=a user=me password='s3 cret'",
        "postgresql://me:s3cret@host:port/db",
        "postgresql://host:port/db?password=s3cret",
        "postgresql://host:port/db?PASS%57ORD=s3cret&sslpassword=s3cret",
    ],
)
def test_no_message_of_a_refused_url_has_its_password(text: str) -> None:
    with pytest.raises(LocationError) as caught:
        Store.open(text)
    for part in ("s3", "cret"):
        assert part not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"


def test_a_password_is_masked_wherever_a_message_quotes_it() -> None:
    quoted = "cannot reach postgresql://me:s3/c@ret@host/db or 'postgresql:/me:s3cret@host/db?sslpassword=s3cret'"
    masked = without_password(quoted)
    assert masked == "cannot reach postgresql://me:***@host/db or 'postgresql:/me:***@host/db?sslpassword=***'"
    assert passwords_of("postgresql://me:s3%2Fcret@host/db?password=other") == {"s3%2Fcret", "s3/cret", "other"}
    assert passwords_of("postgresql://me@host/db") == set()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":memory:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///file:a?mode=memory",
        "file:a?mode=memory",
        "a\0b",
        "~nobody-of-this-name/store.sqlite",
        "mysql://me@h/db",
    ],
)
def test_what_names_no_store_is_refused_with_what_would(text: str) -> None:
    with pytest.raises(LocationError, match="postgresql://user@host:5432/database"):
        Location.parse(text)
