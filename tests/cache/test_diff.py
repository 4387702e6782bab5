"""A difference of two stores names each spec in which they differ, in what, and the binaries that one alone has."""

from __future__ import annotations

from pathlib import Path

from doratune.cache.diff import BOTH, FIRST, SECOND, diff
from doratune.cache.entry import PREDICTED
from doratune.cache.store import Store

from .world import a_binary, a_spec, an_entry


def test_equal_stores_do_not_differ(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a", create=True) as one, Store.open(tmp_path / "b", create=True) as other:
        for store in (one, other):
            store.put(an_entry())
            store.put_binary(a_binary())
        found = diff(one, other)
        assert not found
        assert found.same == 1


def test_each_difference_says_where_and_in_what(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a", create=True) as one, Store.open(tmp_path / "b", create=True) as other:
        one.put_all([an_entry(), an_entry(a_spec(tokens=1)), an_entry(a_spec(tokens=16))])
        other.put_all(
            [an_entry(us=18.0, warps=8), an_entry(a_spec(tokens=128)), an_entry(a_spec(tokens=16), PREDICTED)]
        )
        one.put_binary(a_binary("one"))
        found = diff(one, other)
        assert found
        assert {(each.spec.tokens, each.where, each.fields) for each in found.entries} == {
            (1, FIRST, ()),
            (128, SECOND, ()),
            (4096, BOTH, ("config", "time")),
            (16, BOTH, ("time", "provenance", "environment")),
        }
        assert [[key.code_digest for key in keys] for keys in found.binaries] == [["one"], []]
