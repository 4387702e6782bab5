"""An exact entry goes before all; else the least expected loss decides. The lookup says why, claims no figure nobody
measured, and gives the same answer for the same stores, whatever kind they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.cache.entry import Entry
from doratune.cache.lookup import REFUSALS_KEPT, TEXTS_COMPARED, Resolution, distance, lookup
from doratune.cache.store import Store
from doratune.codegen.spec import Config, KernelSpec

from .world import DEFAULT, DEFAULT_CONFIG, PREDICTED, a_spec, an_entry

WANTED = a_spec()
Stores = Callable[..., list[Store]]


def _digest(op: str, variant: str) -> str | None:
    return {"tile": "template-1"}.get(variant)


def _accept_all(spec: KernelSpec, config: Config) -> str | None:
    return None


def _find(
    make_stores: list[Store],
    spec: KernelSpec = WANTED,
    accepts: Callable[[KernelSpec, Config], str | None] = _accept_all,
    reproduces: Callable[[Entry], str | None] = lambda entry: None,
) -> Resolution:
    return lookup(
        spec,
        make_stores,
        defaults=[DEFAULT_CONFIG],
        architecture="sm_90",
        accepts=accepts,
        template_digest=_digest,
        reproduces=reproduces,
    )


@pytest.fixture(params=["sqlite", "exported", "postgresql"])
def make_stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    """Make a stack of read-only stores, one for each list of entries, all but the first in SQLite files."""

    def make(*stack: list[Entry]) -> list[Store]:
        opened = []
        for index, entries in enumerate(stack):
            place = str(tmp_path / f"store-{index}.sqlite")
            if request.param == "postgresql" and index == 0:
                place = request.getfixturevalue("postgresql_url")
            with Store.open(place, create=True) as store:
                store.put_all(entries)
                if request.param == "exported":
                    place = str(tmp_path / f"exported-{index}.sqlite")
                    store.export(place)
            opened.append(Store.open(place, readonly=True))
        return opened

    return make


NEAR, FAR = a_spec(rank=256), a_spec(rank=16)
SAME_ON_H100, NEAR_ON_H100 = a_spec("h100"), a_spec("h100", rank=256)

ORDER = [
    # (what it shows, entries of each store, step, the spec that wins, the number of the store that wins)
    ("the exact spec goes before all",
     [[an_entry(), an_entry(NEAR)]], "exact", WANTED, 0),
    ("an earlier store goes before a later one",
     [[an_entry(warps=2)], [an_entry(warps=8)]], "exact", WANTED, 0),
    ("measured in a later store beats predicted",
     [[an_entry(provenance=PREDICTED)], [an_entry()]], "exact", WANTED, 1),
    ("predicted for the spec beats measured nearby",
     [[an_entry(provenance=PREDICTED), an_entry(NEAR)]], "exact", WANTED, 0),
    ("predicted beats a stored default",
     [[an_entry(provenance=DEFAULT)], [an_entry(provenance=PREDICTED)]], "exact", WANTED, 1),
    ("the nearest shape wins",
     [[an_entry(FAR), an_entry(NEAR)]], "nearest", NEAR, 0),
    ("the nearest shape wins across stores",
     [[an_entry(FAR)], [an_entry(NEAR)]], "nearest", NEAR, 1),
    ("measured afar beats predicted nearby",
     [[an_entry(NEAR, PREDICTED), an_entry(FAR)]], "nearest", FAR, 0),
    ("equally near: the earlier store",
     [[an_entry(NEAR)], [an_entry(NEAR, warps=8)]], "nearest", NEAR, 0),
    ("equally near: the spec's text",
     [[an_entry(a_spec(tokens=t)) for t in (8192, 2048)]], "nearest", a_spec(tokens=2048), 0),
    ("the same shape elsewhere beats another shape on the same GPU",
     [[an_entry(NEAR)], [an_entry(SAME_ON_H100, warps=8)]], "architecture", SAME_ON_H100, 1),
    ("whichever store comes first",
     [[an_entry(SAME_ON_H100, warps=8)], [an_entry(NEAR)]], "architecture", SAME_ON_H100, 0),
    ("the same shape on the architecture",
     [[an_entry(NEAR_ON_H100), an_entry(SAME_ON_H100)]], "architecture", SAME_ON_H100, 0),
    ("measured nearby beats the same shape that is only predicted",
     [[an_entry(NEAR_ON_H100), an_entry(SAME_ON_H100, PREDICTED, warps=8)]], "architecture", NEAR_ON_H100, 0),
    ("the nearest on the architecture",
     [[an_entry(NEAR_ON_H100), an_entry(a_spec("h100", rank=8))]], "architecture", NEAR_ON_H100, 0),
    ("an entry for the architecture at large",
     [[an_entry(a_spec("sm_90"))]], "architecture", a_spec("sm_90"), 0),
    ("another flag is nearer than another shape",
     [[an_entry(NEAR), an_entry(a_spec(bias=True))]], "nearest", a_spec(bias=True), 0),
    ("another architecture is no help",
     [[an_entry(a_spec("a100"))]], "default", None, None),
    ("another dtype is no help",
     [[an_entry(a_spec(dtype="fp16"))]], "default", None, None),
    ("empty stores are no help",
     [[], []], "default", None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "step", "winner", "number"), [row[1:] for row in ORDER], ids=[row[0] for row in ORDER]
)
def test_the_order(
    make_stores: Stores, entries: list[list[Entry]], step: str, winner: KernelSpec | None, number: int | None
) -> None:
    stores = make_stores(*entries)
    found = _find(stores)
    assert (found.step, found.entry and found.entry.spec) == (step, winner)
    assert found.store == (None if number is None else stores[number].location)
    assert found.config == (DEFAULT_CONFIG if found.entry is None else found.entry.config)
    assert (found.distance is None) == (step == "default")


@pytest.mark.parametrize(
    ("around", "known"),
    [(a_spec(rank=256), True), (a_spec(d_out=64, rank=8, tokens=1), False), (a_spec("h100", rank=256), False)],
    ids=["near", "far", "near, but on another GPU than what the bound rests on"],
)
def test_a_built_in_config_has_a_bound_where_lookups_near_were_measured(
    make_stores: Stores, around: KernelSpec, known: bool
) -> None:
    """None of the entries suits, so the default is taken."""
    far = [an_entry(a_spec(d_out=32 << index, rank=8, tokens=1), warps=16) for index in range(5)]
    entries = [replace(entry, lookup_regret=1.02) for entry in (an_entry(around, warps=16), *far)]
    found = _find(make_stores(entries), accepts=lambda spec, config: "too many" if config.num_warps == 16 else None)
    assert found.step == "default"
    assert found.bound is not None
    assert (found.bound.loss is not None) == known


def test_no_stores_at_all_give_the_default() -> None:
    found = _find([])
    assert (found.step, found.config) == ("default", DEFAULT_CONFIG)
    assert "exact: no entry in 0 stores" in found.explain()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (an_entry(template="template-0"), "tuned with another template 'tile' (template-0, installed is template-1)"),
        (an_entry(variant="split_k"), "no variant 'split_k' of lora_compose is installed"),
        (an_entry(warps=16), "16 warps are too many"),
    ],
)
@pytest.mark.parametrize(("spec", "step"), [(WANTED, "exact"), (NEAR, "nearest"), (SAME_ON_H100, "architecture")])
def test_an_entry_that_does_not_suit_is_refused_with_the_reason(
    make_stores: Stores, entry: Entry, reason: str, spec: KernelSpec, step: str
) -> None:
    def accepts(wanted: KernelSpec, config: Config) -> str | None:
        assert wanted == WANTED  # the config must suit what will run, not what it was tuned for
        return "16 warps are too many" if config.num_warps == 16 else None

    environment = replace(entry.environment, gpu=spec.gpu)
    stores = make_stores([replace(entry, spec=spec, environment=environment)])
    found = _find(stores, accepts=accepts, reproduces=lambda entry: "renders to something else")
    assert found.step == "default"
    [refusal] = found.trace
    assert (refusal.step, refusal.candidate, refusal.store, refusal.reason) == (
        step,
        str(spec),
        stores[0].location,
        reason,
    )
    assert f"{spec} in {stores[0].location}: {reason}" in found.explain()


@pytest.mark.parametrize(("spec", "step"), [(WANTED, "exact"), (NEAR, "nearest"), (SAME_ON_H100, "architecture")])
def test_an_entry_of_another_template_that_renders_the_same_text_is_used(
    make_stores: Stores, spec: KernelSpec, step: str
) -> None:
    entry = an_entry(template="template-0")
    found = _find(make_stores([replace(entry, spec=spec, environment=replace(entry.environment, gpu=spec.gpu))]))
    assert (found.step, found.entry and found.entry.spec, found.trace) == (step, spec, ())


def test_only_so_many_texts_are_compared(make_stores: Stores) -> None:
    rendered: list[Entry] = []

    def reproduces(entry: Entry) -> str:
        rendered.append(entry)
        return "renders to something else"

    old = [an_entry(a_spec(rank=rank), template="template-0") for rank in range(1, 2 * TEXTS_COMPARED)]
    assert _find(make_stores(old), reproduces=reproduces).step == "default"
    assert len(rendered) == TEXTS_COMPARED


def test_an_exact_entry_that_renders_to_another_source_gives_way_to_the_nearest(make_stores: Stores) -> None:
    stores = make_stores([an_entry(), an_entry(NEAR, source_digest="source-9")])
    found = _find(stores, reproduces=lambda entry: "renders otherwise" if entry.spec == WANTED else None)
    assert (found.step, found.entry and found.entry.spec) == ("nearest", NEAR)
    assert [refusal.reason for refusal in found.trace] == ["renders otherwise"]


def test_another_triton_version_is_told_not_refused(make_stores: Stores) -> None:
    found = _find(make_stores([an_entry(triton="3.6.0")]))
    assert found.step == "exact"
    assert "under Triton 3.6.0" in found.explain()


def test_many_refusals_are_counted_rather_than_listed(make_stores: Stores) -> None:
    old = [an_entry(a_spec(rank=rank), template="template-0") for rank in range(8, 48, 2)]
    found = _find(make_stores(old), reproduces=lambda entry: "renders to something else")
    assert len(found.trace) == REFUSALS_KEPT
    assert found.refused == (("nearest", 20),)
    assert "and 15 more" in found.explain()


def test_equal_stores_filled_in_any_order_give_one_answer(tmp_path: Path) -> None:
    entries = [an_entry(a_spec(rank=r, tokens=t)) for r in (192, 768) for t in (2048, 4096, 8192)]
    answers = set()
    for seed in range(5):
        random.Random(seed).shuffle(entries)
        with Store.open(tmp_path / f"{seed}.sqlite", create=True) as store:
            store.put_all(entries)
            answers.add(str(getattr(_find([store]).entry, "spec", None)))
    assert answers == {str(a_spec(rank=192))}


def test_an_exact_hit_loads_no_candidates(make_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = make_stores([an_entry()], [an_entry(NEAR)])
    monkeypatch.delattr(Store, "neighbours")
    assert _find(stores).step == "exact"


def test_the_explanation_of_a_measured_spec() -> None:
    found = Resolution(WANTED, "exact", an_entry().config, an_entry(), "/team.sqlite", 0.0, (), (), ("/team.sqlite",))
    assert found.explain().splitlines() == [
        f"spec      {WANTED}",
        "step      exact: an entry of exactly this spec",
        "config    tile:block_n=128,block_t=64,num_warps=4,num_stages=3",
        "store     /team.sqlite",
        "tuned     measured on NVIDIA H200 under Triton 3.7.1 at 2026-11-23T10:00:00+00:00",
        "loss      0 %: the winner measured for this spec, 20 us = 1.25 x its floor",
    ]


@pytest.mark.parametrize(
    ("us", "unfused_us", "says"),
    [
        (20.0, 25.5, "fusion    pays: 25.5 us unfused"),
        (20.0, 20.0, "fusion    does not pay: 20 us unfused"),
        (None, 25.5, "fusion    does not pay: 25.5 us unfused"),
    ],
)
def test_fusion_pays_where_the_very_spec_was_measured_to_be_faster_fused(
    us: float | None, unfused_us: float, says: str
) -> None:
    def found(step: str, entry: Entry | None) -> Resolution:
        return Resolution(WANTED, step, DEFAULT_CONFIG, entry, "/team.sqlite", 0.0, (), (), ("/team.sqlite",))

    entry = replace(an_entry(), evaluation=replace(an_entry().evaluation, us=us, unfused_us=unfused_us))
    exact = found("exact", entry)
    assert exact.fusion_pays == (" pays" in says)
    assert says in exact.explain().splitlines()
    for other in (found("nearest", entry), found("exact", an_entry()), found("default", None)):
        assert not other.fusion_pays
        assert "fusion" not in other.explain()


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        ([an_entry(provenance=PREDICTED)], ["loss      unknown: predicted, never timed, 20 us = 1.25 x its floor"]),
        (
            [an_entry(NEAR)],
            [
                f"step      nearest: {NEAR} on the same GPU, distance 1.17",
                "loss      unknown: no measured lookups of lora_compose on h200; tune this spec "
                "(on its own shape: measured, 20 us = 1.25 x its floor)",
                "exact: no entry in 1 store",
            ],
        ),
        (
            [an_entry(SAME_ON_H100, us=None)],
            [
                f"step      architecture: {SAME_ON_H100} on another sm_90 GPU, distance 0.00",
                "loss      unknown: no measured lookups of lora_compose on h200; tune this spec "
                "(on its own shape: measured)",
                "exact: no entry in 1 store",
                "nearest: no entry in 1 store",
            ],
        ),
        (
            [],
            [
                "step      default: a built-in config",
                "loss      unknown: no measured lookups of lora_compose on h200; tune this spec",
                "exact: no entry in 1 store",
                "nearest: no entry in 1 store",
                "architecture: no entry in 1 store",
            ],
        ),
    ],
)
def test_an_unmeasured_spec_is_given_no_figure_for_its_loss(
    make_stores: Stores, entries: list[Entry], lines: list[str]
) -> None:
    explained = _find(make_stores(entries)).explain().splitlines()
    assert [line for line in explained if line in lines] == lines
    assert not any(line.startswith("loss      0 %") for line in explained)


def test_a_passed_over_predicted_entry_is_told(make_stores: Stores) -> None:
    found = _find(make_stores([an_entry(provenance=PREDICTED)], [an_entry()]))
    assert [refusal.reason for refusal in found.trace] == ["only predicted: a later store has it measured"]
    assert "exact: not used:" in found.explain()


RANKS, WIDTHS = st.integers(1, 4096), st.integers(1, 1 << 20)


@given(RANKS, RANKS, WIDTHS, WIDTHS, st.booleans(), st.booleans())
def test_distance_is_symmetric_and_zero_only_for_equal_shapes(
    rank: int, other_rank: int, width: int, other_width: int, bias: bool, other_bias: bool
) -> None:
    one = a_spec(rank=rank, d_out=width, bias=bias)
    other = a_spec("h100", rank=other_rank, d_out=other_width, bias=other_bias)
    assert distance(one, other) == pytest.approx(distance(other, one))
    assert (distance(one, other) == 0) == (one == replace(other, gpu="h200"))


def test_halving_the_rank_counts_twice_as_much_as_halving_the_tokens() -> None:
    assert distance(WANTED, a_spec(rank=192)) == 2 * distance(WANTED, a_spec(tokens=2048)) == 2.0


def test_an_entry_that_was_never_tuned_serves_its_own_spec_alone(tmp_path: Path) -> None:
    """A built store pins the config of every kernel, and must not move the choice for another one."""
    with Store.open(tmp_path / "built.sqlite", create=True) as store:
        store.put(an_entry(a_spec(tokens=4096), DEFAULT, us=None))
        assert store.neighbours(a_spec(tokens=2048), "sm_90", count=8).candidates == ()
        assert store.get(a_spec(tokens=4096)) is not None
