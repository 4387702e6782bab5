"""Winners of recorded tables as entries: their losses are those of lookups without them, and none is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from doratune.benchmarks.tables.entries import entries_of, renew, renew_digests
from doratune.benchmarks.tables.fit import Fitting
from doratune.benchmarks.tables.lookup_loss import losses, winners
from doratune.benchmarks.tables.read import read_table, table_path
from doratune.cache.entry import MEASURED, PREDICTED, Contender, Entry, Final
from doratune.cache.store import Store
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import template_digest
from doratune.codegen.spec import Config
from doratune.codegen.variants import default_configs

TABLE = read_table(table_path("h100-sxm", "compose_swiglu"))


@pytest.fixture(autouse=True)
def no_other_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("doratune.cache.stack.prebuilt_paths", list)


def made() -> list[Entry]:
    return list(entries_of(TABLE, Fitting([TABLE])))


def test_each_spec_has_its_best_config_with_what_a_lookup_without_it_loses() -> None:
    lost = {loss.spec: loss for loss in losses(TABLE, [winners(TABLE)], Fitting([TABLE]))}
    entries = made()
    assert [entry.spec for entry in entries] == list(TABLE.specs)
    for entry in entries:
        assert (entry.config, entry.evaluation.us) == TABLE[entry.spec].best
        assert entry.evaluation.provenance == MEASURED
        assert entry.environment.triton == TABLE.env["triton"]
        loss = lost[entry.spec]
        assert entry.lookup_regret == (None if loss.missing or loss.rejected else loss.regret)


def test_regrets_are_renewed_from_finals_and_others_are_left(tmp_path: Path) -> None:
    """One entry alone: a lookup without it gives the first built-in config."""
    entry = next(one for one in made() if one.config != default_configs(one.spec, find_gpu("h100-sxm"))[0])
    default = default_configs(entry.spec, find_gpu("h100-sxm"))[0]
    won, lost = Contender(entry.config, ("search",), (20.0,)), Contender(default, ("default",), (23.0,))
    tied = Contender(replace(entry.config, num_stages=1), ("search",), (19.9,))
    cases = {
        "timed, a third is as fast as the winner within the noise": (
            replace(entry, final=Final((won, tied, lost), 1.0, 0.005, True), lookup_regret=None),
            pytest.approx(1.15),
        ),
        "a tie": (
            replace(entry, final=Final((won, replace(lost, samples_us=(19.9,))), 1.0, 0.005, True)),
            1.0,
        ),
        "not timed": (replace(entry, final=Final((won,), 1.0, 0.005, True), lookup_regret=1.3), 1.3),
        "agrees": (replace(entry, config=default, final=None, lookup_regret=1.3), 1.0),
    }
    for name, (given, wanted) in cases.items():
        with Store.open(tmp_path / f"{name}.sqlite", create=True) as store:
            store.put(given)
            renew(store)
            assert store.entries()[0].lookup_regret == wanted, name
            assert renew(store) == 0
    predicted = replace(
        entry,
        evaluation=replace(entry.evaluation, provenance=PREDICTED),
        final=Final((won, lost), 1.0, 0.005, True),
        lookup_regret=None,
    )
    with Store.open(tmp_path / "predicted.sqlite", create=True) as store:
        store.put(predicted)
        assert renew(store) == 0


def test_a_digest_is_renewed_where_the_template_still_renders_what_was_tuned(tmp_path: Path) -> None:
    entry = made()[0]
    assert entry.template_digest == template_digest(entry.spec.op, entry.config.variant)
    older = replace(entry, template_digest="0" * 64)
    wider = replace(entry.spec, d_out=2 * entry.spec.d_out)
    other = replace(older, spec=wider, source="another text", source_digest="1" * 64)
    gone = replace(
        older, spec=replace(wider, d_out=3 * wider.d_out), config=Config.create("gone", num_warps=4, num_stages=2)
    )
    fewer = Config.create(entry.config.variant, num_warps=4, num_stages=2)
    renamed = replace(older, spec=replace(wider, d_out=5 * wider.d_out), config=fewer)
    with Store.open(tmp_path / "s.sqlite", create=True) as store:
        store.put_all([gone, renamed, older, other])
        assert renew_digests(store) == 1
        assert store.get(entry.spec) == entry
        assert store.get(other.spec) == other, "that one is to be measured again"
        assert renew_digests(store) == 0
