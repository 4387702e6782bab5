"""Which stores' binaries are run: the package's, this user's own, and those that the user trusts by name or by key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from doratune.cache.errors import LocationError, SigningError, TrustError
from doratune.cache.store import Store
from doratune.cache.trust import trust

from .test_signing import write_key
from .world import an_entry


@pytest.fixture(autouse=True)
def _groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DORATUNE_TRUST", raising=False)
    monkeypatch.setattr("doratune.cache.permissions._private_group", lambda path, found: False)


def a_store(path: Path, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Store.open(path, create=True) as store:
        store.put(an_entry())
    path.chmod(mode)
    return path


def refusal(path: Path | str, *named: str) -> str | None:
    """Why the binaries of the store at this place are refused."""
    if isinstance(path, str):
        return trust(named).refusal(cast(Store, SimpleNamespace(location=path)))
    with Store.open(path, readonly=True) as store:
        return trust(named).refusal(store)


def test_your_own_stores_are_used_and_others_need_trust(tmp_path: Path) -> None:
    assert refusal(a_store(tmp_path / "own.sqlite")) is None
    assert refusal(a_store(tmp_path / "shipped.sqlite", 0o444)) is None
    team = a_store(tmp_path / "team.sqlite", 0o664)
    reason = refusal(team)
    assert reason is not None
    assert (
        f"can write {team} (mode 664); chmod go-w {team}; to use them all the same, set DORATUNE_TRUST={team}" in reason
    )
    for named in (str(team), str(tmp_path), f"sqlite:///{team}", str(team.parent / "." / "team.sqlite")):
        assert refusal(team, named) is None
    for named in (str(tmp_path / "own.sqlite"), str(tmp_path / "te"), str(tmp_path / "missing")):
        assert refusal(team, named) == reason


def test_trust_does_not_help_where_everybody_can_write(tmp_path: Path) -> None:
    team = a_store(tmp_path / "team" / "store.sqlite")
    team.parent.chmod(0o777)
    said = refusal(team, str(team))
    assert said is not None
    assert f"everybody can write {team.parent} (mode 777); chmod go-w {team.parent}, or sign it" in said


def test_a_symbolic_link_is_judged_by_its_target(tmp_path: Path) -> None:
    team = a_store(tmp_path / "team" / "store.sqlite", 0o664)
    (tmp_path / "own").mkdir()
    link = tmp_path / "own" / "store.sqlite"
    link.symlink_to(team)
    assert f"can write {team}" in str(refusal(link))
    assert refusal(link, str(team)) is None
    assert refusal(team, str(link)) is None
    own = a_store(tmp_path / "mine" / "store.sqlite")
    (tmp_path / "public").mkdir(mode=0o777)
    (tmp_path / "public").chmod(0o777)
    (tmp_path / "public" / "store.sqlite").symlink_to(own)
    assert refusal(tmp_path / "public" / "store.sqlite") is None


def test_a_packaged_store_is_as_trusted_as_the_code_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doratune.cache.stack._PREBUILT_FOLDER", tmp_path)
    assert refusal(a_store(tmp_path / "h200.sqlite", 0o666)) is None


def test_a_database_is_other_peoples_until_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:***@host:5432/team"
    assert refusal(url) == (
        f"a database is other people's; to use them all the same, set DORATUNE_TRUST={url}, "
        "or name there the public key that signed them"
    )
    for named in ("postgresql://me:secret@host:5432/team", "postgresql://me@host:5432/team"):
        assert refusal(url, named) is None
    assert refusal(url, "postgresql://me@host:5432/other") is not None
    monkeypatch.setenv("DORATUNE_TRUST", "/srv/a.sqlite:postgresql://me@host:5432/team:/srv/b.sqlite")
    assert refusal(url) is None


def test_keys_are_named_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (write_key(tmp_path / name).public for name in ("first", "second"))
    team = a_store(tmp_path / "team.sqlite", 0o664)
    monkeypatch.setenv("DORATUNE_TRUST", f"{tmp_path / 'first.pub'}:{team}:{tmp_path / 'first.pub'}")
    found = trust([str(tmp_path / "second.pub")])
    assert {*found.keys} == {first, second}
    assert len(found.keys) == 2
    assert found.stores == {str(team)}


def test_an_item_that_is_neither_store_nor_key_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.pub").write_text("ssh-ed25519 AAAA")
    write_key(tmp_path / "key")
    for name, error, said in (
        ("text", TrustError, "neither a store, a folder nor a file of Ed25519 public keys"),
        ("key", TrustError, "neither a store, a folder nor a file"),
        ("cut.pub", SigningError, "not a file of Ed25519 public keys"),
    ):
        with pytest.raises(error, match=said):
            trust([str(tmp_path / name)])
    with pytest.raises(LocationError, match="unknown scheme"):
        trust(["ftp://host/store"])


def test_a_key_that_everybody_can_write_is_an_error(tmp_path: Path) -> None:
    write_key(tmp_path / "key")
    (tmp_path / "key.pub").chmod(0o666)
    with pytest.raises(SigningError, match=r"everybody can write .*key.pub \(mode 666\); chmod go-w "):
        trust([str(tmp_path / "key.pub")])
