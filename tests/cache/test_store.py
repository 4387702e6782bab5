"""Every kind of store keeps one contract: what is put comes back equal, the better provenance stays, order is fixed.

The same tests run over a SQLite file and PostgreSQL; those that only read also run over read-only and exported stores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from doratune.cache.distance import distance
from doratune.cache.entry import Contender
from doratune.cache.errors import CorruptRowError, InvalidEntryError, LocationError, ReadOnlyStoreError
from doratune.cache.rows import binary_values, entry_values
from doratune.cache.store import Store
from doratune.codegen.ops import WIDTHS
from doratune.codegen.spec import KernelSpec

from .world import DEFAULT, MEASURED, PREDICTED, a_binary, a_spec, an_entry, with_final

READERS = ["writable", "read-only", "exported"]


@pytest.fixture
def store(place: str) -> Store:
    return Store.open(place, create=True)


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, place: str, tmp_path: Path) -> Callable[[], Store]:
    """Open the store at ``place`` for a reader of this kind."""

    def open_it() -> Store:
        if request.param != "exported":
            return Store.open(place, readonly=request.param == "read-only")
        with Store.open(place) as original:
            original.export(tmp_path / "exported.sqlite")
        return Store.open(tmp_path / "exported.sqlite", readonly=True)

    return open_it


def test_what_is_put_comes_back_equal(store: Store, reader: Callable[[], Store]) -> None:
    entries = [an_entry(a_spec(tokens=tokens, bias=tokens == 16)) for tokens in (4096, 1, 16)]
    entries.append(an_entry(a_spec("a100"), PREDICTED, us=None))
    assert store.put_all(entries) == 4
    store.put_binary(a_binary())
    with reader() as reading:
        assert [reading.get(entry.spec) for entry in entries] == entries
        assert reading.entries() == sorted(entries, key=lambda entry: str(entry.spec))
        assert reading.binaries() == [a_binary()]
        assert reading.get_binary("code-1", "compose_kernel", "3.7.1", "sm_90") == a_binary()
        assert reading.verify() == []


def test_what_was_never_put_is_none(store: Store, reader: Callable[[], Store]) -> None:
    store.put(an_entry())
    store.put_binary(a_binary())
    with reader() as reading:
        assert reading.get(a_spec("h100")) is None
        assert reading.get_binary("code-1", "compose_kernel", "3.7.2", "sm_90") is None
        assert reading.binaries("code-2") == []


def test_entries_are_found_by_op_gpu_and_architecture(store: Store, reader: Callable[[], Store]) -> None:
    store.put_all(an_entry(a_spec(gpu)) for gpu in ("h200", "h100", "a100"))
    with reader() as reading:
        assert [entry.spec.gpu for entry in reading.entries(architecture="sm_90")] == ["h100", "h200"]
        assert [entry.spec.gpu for entry in reading.entries(gpu="a100")] == ["a100"]
        assert reading.entries(op="weight_norm") == []
        assert len(reading.entries(op="lora_compose")) == 3


def test_neighbours_share_op_and_dtypes_and_leave_the_spec_itself_out(
    store: Store, reader: Callable[[], Store]
) -> None:
    near, nearer, sister = a_spec(rank=64), a_spec(tokens=2048, bias=True), a_spec("h100")
    store.put_all(map(an_entry, (a_spec(), near, nearer, sister, a_spec(dtype="fp16"), a_spec("a100"))))
    with reader() as reading:
        found = reading.neighbours(a_spec(), "sm_90", count=8).candidates
        assert [(candidate.spec, candidate.distance) for candidate in found] == [
            (sister, 0.0),
            (nearer, 1.25),
            (near, distance(a_spec(), near)),
        ]
        assert [candidate.spec for candidate in reading.neighbours(a_spec(), "sm_90", count=1).candidates] == [
            sister,
            nearer,
        ]


def test_the_widths_of_a_groups_other_projections_count_too(store: Store, reader: Callable[[], Store]) -> None:
    """They have no columns, so the distance reads them in the spec's text."""

    def group(*widths: int) -> KernelSpec:
        dims = dict(zip(WIDTHS, widths, strict=False))
        return KernelSpec.create("lora_compose_group", rank=16, tokens=128, dtype="bf16", adapter="bf16", **dims)

    wanted, near, far = group(4096, 1024, 1024), group(4096, 1024, 2048), group(4096, 4096, 4096)
    store.put_all(map(an_entry, (far, near, wanted)))
    with reader() as reading:
        assert reading.get(wanted) == an_entry(wanted)
        found = reading.neighbours(wanted, "sm_90", count=8).candidates
    assert [(each.spec, each.distance) for each in found] == [(near, 1.0), (far, 4.0)]


def test_of_many_neighbours_the_measured_ones_are_read(store: Store) -> None:
    predicted = [an_entry(a_spec(rank=rank), PREDICTED) for rank in (380, 388)]
    store.put_all([*predicted, an_entry(a_spec(rank=16))])
    assert [each.spec.rank for each in store.neighbours(a_spec(), "sm_90", count=1).candidates] == [16]
    assert len(store.neighbours(a_spec(), "sm_90", count=8).candidates) == 3


def test_neighbours_bring_their_runners_up_and_the_regrets_of_all(store: Store, reader: Callable[[], Store]) -> None:
    near, far, sister = a_spec(rank=256), a_spec(rank=16), a_spec("h100")
    store.put_all([with_final(an_entry(near)), with_final(an_entry(far), lookup_regret=1.3), an_entry(sister)])
    with reader() as reading:
        found = reading.neighbours(a_spec(), "sm_90", count=1)
    [own] = [candidate for candidate in found.candidates if candidate.spec.gpu == "h200"]
    [(beaten, behind)] = own.beaten
    assert (beaten.num_warps, behind, own.lookup_regret) == (8, 21.0 / 20.0, 1.05)
    assert [(each.spec, each.gpu, each.regret) for each in found.regrets] == [
        (str(far), "h200", 1.3),
        (str(near), "h200", 1.05),
    ]


@pytest.mark.parametrize(
    ("held", "offered", "template", "taken"),
    [
        (MEASURED, MEASURED, "template-1", True),
        (MEASURED, PREDICTED, "template-1", False),
        (MEASURED, DEFAULT, "template-1", False),
        (PREDICTED, MEASURED, "template-1", True),
        (PREDICTED, PREDICTED, "template-1", True),
        (PREDICTED, DEFAULT, "template-1", False),
        (DEFAULT, PREDICTED, "template-1", True),
        (MEASURED, PREDICTED, "template-2", True),
        (MEASURED, DEFAULT, "template-2", True),
    ],
)
def test_the_better_provenance_stays_unless_the_template_changed(
    store: Store, held: str, offered: str, template: str, taken: bool
) -> None:
    first, second = an_entry(provenance=held), an_entry(provenance=offered, template=template, warps=8)
    assert store.put(first)
    assert store.put(second) is taken
    assert store.entries() == [second if taken else first]


def test_an_entry_without_a_date_gets_the_present_one(store: Store) -> None:
    store.put(replace(an_entry(), created_at=""))
    assert store.entries()[0].created_at.endswith("+00:00")


def test_a_removed_entry_is_gone_and_its_binary_is_pruned(store: Store) -> None:
    first, second = an_entry(code="y = 1"), an_entry(a_spec("h100"), code="y = 2")
    store.put_all([first, second])
    store.put_binary(a_binary(first.code_digest))
    store.put_binary(a_binary(second.code_digest))
    assert store.prune_binaries() == 0
    assert store.remove(a_spec())
    assert not store.remove(a_spec())
    assert store.prune_binaries() == 1
    assert [binary.code_digest for binary in store.binaries()] == [second.code_digest]


def test_damaged_rows_are_named_beside_the_entries_that_can_be_read(store: Store) -> None:
    entries = [an_entry(a_spec(rank=rank)) for rank in (8, 16, 64)]
    store.put_all(entries)
    with store._writer.begin() as connection:
        connection.execute(text("UPDATE doratune_entries SET config = 'tile' WHERE rank = 16"))
    found, damaged = store.readable_entries("lora_compose")
    assert found == sorted([entries[0], entries[2]], key=lambda entry: str(entry.spec))
    assert [str(entries[1].spec) in str(error) for error in damaged] == [True]
    assert store.readable_entries("weight_norm") == ([], [])


def test_a_store_without_one_entry_has_the_others(store: Store) -> None:
    hidden, other = an_entry(a_spec(rank=8)), an_entry(a_spec(rank=16))
    store.put_all([hidden, other])
    reading = store.without(hidden.spec)
    assert (reading.location, reading.get(hidden.spec), reading.get(other.spec)) == (store.location, None, other)
    around = reading.neighbours(hidden.spec, "sm_90", count=8)
    assert [candidate.spec for candidate in around.candidates] == [other.spec]
    with pytest.raises(ReadOnlyStoreError):
        reading.put(other)


def test_entries_whose_code_is_the_same_share_a_binary_until_the_last_is_gone(store: Store) -> None:
    entries = [an_entry(a_spec(tokens=tokens), source_digest=f"source-{tokens}") for tokens in (1, 16)]
    assert entries[0].source != entries[1].source
    store.put_all(entries)
    store.put_binary(a_binary(entries[0].code_digest))
    store.remove(entries[0].spec)
    assert store.prune_binaries() == 0
    store.remove(entries[1].spec)
    assert store.prune_binaries() == 1


def test_binaries_of_other_triton_versions_are_pruned_on_request(store: Store) -> None:
    store.put(an_entry())
    digest = an_entry().code_digest
    kept, old = a_binary(digest), a_binary(digest, triton="3.6.0")
    store.put_binary(kept)
    store.put_binary(old)
    assert store.prune_binaries() == 0
    assert store.prune_binaries(triton="3.7.1") == 1
    assert store.binaries() == [kept]


def test_binaries_are_found_by_code_triton_and_architecture(store: Store, reader: Callable[[], Store]) -> None:
    here = a_binary()
    others = [a_binary("code-2"), a_binary(triton="3.6.0"), replace(here, architecture="sm_80")]
    beside = replace(here, kernel="finish_kernel")
    for binary in (beside, here, *others):
        store.put_binary(binary)
    with reader() as reading:
        assert reading.binaries("code-1", "3.7.1", "sm_90") == [here, beside]
        assert [key.kernel for key in reading.binary_keys("code-1", "3.7.1", "sm_90")] == [
            "compose_kernel",
            "finish_kernel",
        ]
        assert len(reading.binary_keys()) == len(reading.binaries()) == 5
        assert {key.triton for key in reading.binary_keys("code-1")} == {"3.6.0", "3.7.1"}


def test_an_image_takes_less_room_than_it_has_bytes(store: Store) -> None:
    store.put_binary(a_binary(image=b"\x7fELF" * 10_000))
    with store._reading() as session:
        (stored,) = session.execute(text("SELECT image FROM doratune_binaries")).scalars()
    assert len(stored) < 1_000


def test_an_export_may_leave_the_binaries_out(store: Store, tmp_path: Path) -> None:
    store.put(an_entry())
    store.put_binary(a_binary())
    store.export(tmp_path / "configs.sqlite", binaries=False)
    with Store.open(tmp_path / "configs.sqlite", readonly=True) as reading:
        assert reading.entries() == [an_entry()]
        assert reading.binaries() == []


def test_a_binary_compiled_again_replaces_the_earlier_one(store: Store) -> None:
    store.put_binary(a_binary())
    store.put_binary(a_binary(image=b"new"))
    assert store.binaries() == [a_binary(image=b"new")]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (replace(an_entry(), template_digest=""), "template_digest"),
        (
            replace(an_entry(), evaluation=replace(an_entry().evaluation, us=float("nan"))),
            "us must be a finite number of at least 0, got nan",
        ),
        (replace(an_entry(), evaluation=replace(an_entry().evaluation, provenance="guessed")), "guessed"),
        (replace(an_entry(), evaluation=replace(an_entry().evaluation, samples_us=(1.0, -1.0))), "sample"),
    ],
)
def test_an_invalid_entry_stores_nothing_of_its_batch(store: Store, wrong: object, named: str) -> None:
    with pytest.raises(InvalidEntryError, match=named):
        store.put_all([an_entry(a_spec("h100")), wrong])  # type: ignore[list-item]
    assert store.entries() == []


def test_a_binary_whose_metadata_is_no_json_is_not_stored(store: Store) -> None:
    with pytest.raises(InvalidEntryError, match="JSON"):
        store.put_binary(replace(a_binary(), metadata="import os"))
    assert store.binaries() == []


def test_a_read_only_store_refuses_every_write_and_says_where(store: Store, place: str) -> None:
    store.put(an_entry())
    with Store.open(place, readonly=True) as reading:
        for write in (
            lambda: reading.put(an_entry(warps=8)),
            lambda: reading.put_binary(a_binary()),
            lambda: reading.remove(a_spec()),
            reading.prune_binaries,
        ):
            with pytest.raises(ReadOnlyStoreError, match="read-only") as caught:
                write()
            assert reading.location in str(caught.value)
    assert store.entries() == [an_entry()]


def test_the_database_itself_refuses_writes_on_a_read_only_connection(store: Store, place: str) -> None:
    with Store.open(place, readonly=True) as reading:
        reading.readonly = False  # as a bug of ours would have it
        with pytest.raises(ReadOnlyStoreError):
            reading.put(an_entry())


def test_a_store_cannot_be_made_read_only(place: str) -> None:
    with pytest.raises(LocationError, match="read-only"):
        Store.open(place, create=True, readonly=True)


BAD_FINALS = [
    ({"contenders": []}, "final has no contenders"),
    ({"contenders": {}}, "contenders must be a list"),
    ({"contenders": None}, "contenders must be a list"),
    ({"contenders": [1]}, "a contender must be an object"),
    ({"contenders": [{}]}, "a contender must be an object"),
    ({"confidence": "high"}, "confidence must be a finite number"),
    ({"confidence": True}, "confidence must be a finite number"),
    ({"confidence": float("nan")}, "confidence must be a finite number"),
    ({"noise": -0.1}, "noise must be a finite number"),
    ({"noise": float("inf")}, "noise must be a finite number"),
    ({"settled": 1}, "settled must be true or false"),
    ({"settled": None}, "settled must be true or false"),
    ({"notices": "none"}, "notices must be a list"),
    ({"notices": [1]}, "an element of notices must be text"),
    ({"contender": {"config": 3}}, "expected an object with variant"),
    ({"contender": {"config": {"variant": "tile"}}}, "expected an object with variant"),
    ({"contender": {"config": {"variant": "a b", "num_warps": 1, "num_stages": 1}}}, "variant must be a name"),
    ({"contender": {"origins": "search"}}, "origins must be a list"),
    ({"contender": {"origins": [None]}}, "an element of origins must be text"),
    ({"contender": {"samples_us": []}}, "a contender has no samples"),
    ({"contender": {"samples_us": [1.0, -1.0]}}, "a sample must be a finite number"),
    ({"contender": {"samples_us": ["1"]}}, "a sample must be a finite number"),
    ({"contender": {"samples_us": {}}}, "samples_us must be a list"),
    ({"extra": 1}, "final must be an object with confidence, contenders"),
]
"""Changes of a good final's JSON, and what is said of them."""


def _final_with(contender: dict[str, object] | None = None, **changes: object) -> str:
    """The JSON of a final with some values, or some of its first contender's, replaced."""
    data = json.loads(str(entry_values(with_final())["final"]))
    data["contenders"][0] |= contender or {}
    return json.dumps(data | changes)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("config", "{not json", "config must be JSON"),
        ("config", '{"variant": "tile"}', "num_warps"),
        ("config", '{"variant": 3, "num_warps": 4, "num_stages": 2}', "config"),
        ("config", '{"variant": "tile", "num_warps": "__import__", "num_stages": 2}', "num_warps"),
        ("spec", "lora_compose/d_out=banana@h200", "banana"),
        ("gpu", "a100", "contradicts"),
        ("rank", 64, "contradicts"),
        ("provenance", "sworn", "sworn"),
        ("samples_us", "[1, null]", "sample"),
        ("us", -3.0, "us"),
        ("template_digest", "", "template_digest"),
        ("lookup_regret", -0.5, "lookup_regret must be a finite number"),
        ("final", "{not json", "final must be JSON"),
        ("final", "[" * 100_000, "final must be JSON"),
        ("final", "[]", "final must be an object with confidence, contenders"),
        *(("final", _final_with(**change), complaint) for change, complaint in BAD_FINALS),
    ],
)
def test_a_damaged_row_is_an_error_that_names_row_and_store(
    store: Store, column: str, value: object, complaint: str
) -> None:
    store.put(an_entry())
    _spoil(store, f"UPDATE doratune_entries SET {column} = :value", value)
    with pytest.raises(CorruptRowError, match=complaint) as caught:
        store.entries()
    assert store.location in str(caught.value)
    assert "entry 1" in str(caught.value)
    assert store.verify() == [str(caught.value)]


SEAL = len(b"doratune-1\0") + 32


def _sealed(image: bytes) -> bytes:
    values = binary_values(a_binary(image=image))
    assert isinstance(values["image"], bytes)
    return values["image"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("metadata", "[]"),
        ("metadata", '{"shared": 98305}'),
        ("kernel", "finish_kernel"),
        ("source_digest", "code-2"),
        ("triton", "3.7.2"),
        ("architecture", "sm_80"),
        ("image", b"\x7fELF\x00\xff"),
        ("image", b""),
        ("image", _sealed(a_binary().image)[:SEAL] + _sealed(b"another")[SEAL:]),
        ("image", _sealed(a_binary().image)[:-9]),
        ("image", _sealed(bytes(1 << 27))),
    ],
    ids=[
        *("no-object", "another-number", "kernel", "code", "triton", "architecture"),
        *("raw", "empty", "another-image", "truncated", "bomb"),
    ],
)
def test_a_binary_damaged_in_any_part_is_an_error_that_names_row_and_store(
    store: Store, column: str, value: object
) -> None:
    store.put_binary(a_binary())
    _spoil(store, f"UPDATE doratune_binaries SET {column} = :value", value)
    with pytest.raises(CorruptRowError, match="binary 1") as caught:
        store.binaries()
    assert store.location in str(caught.value)
    assert store.verify() == [str(caught.value)]


def test_a_damaged_row_is_replaced_by_tuning_again(store: Store) -> None:
    store.put(an_entry())
    _spoil(store, "UPDATE doratune_entries SET config = :value", "")
    assert store.put(an_entry())
    assert store.get(a_spec()) == an_entry()


def test_equal_entries_export_to_equal_bytes_whatever_their_history(store: Store, tmp_path: Path) -> None:
    specs = [a_spec(tokens=tokens) for tokens in (1, 16, 4096)]
    store.put_all(map(an_entry, specs))
    store.export(tmp_path / "first.sqlite")
    for spec in specs:
        store.remove(spec)
    store.put_all(map(an_entry, reversed(specs)))
    store.export(tmp_path / "second.sqlite")
    assert (tmp_path / "first.sqlite").read_bytes() == (tmp_path / "second.sqlite").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.sqlite*")) == ["first.sqlite", "second.sqlite"]


def _spoil(store: Store, statement: str, value: object) -> None:
    with store._writer.begin() as connection:
        connection.execute(text(statement), {"value": value})


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("final", "complaint"),
    [
        ({"contenders": ()}, "final has no contenders"),
        ({"confidence": NAN}, "confidence must be a finite number"),
        ({"confidence": -1.0}, "confidence must be a finite number"),
        ({"noise": INFINITE}, "noise must be a finite number"),
        ({"noise": True}, "noise must be a finite number"),
        ({"settled": "yes"}, "settled must be true or false"),
        ({"notices": (3,)}, "an element of notices must be text"),
        ({"contenders": (Contender(an_entry().config, ("search",), ()),)}, "a contender has no samples"),
        ({"contenders": (Contender(an_entry().config, ("search",), (NAN,)),)}, "a sample must be a finite number"),
        ({"contenders": (Contender(an_entry().config, (7,), (1.0,)),)}, "an element of origins must be text"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_final_is_not_stored(store: Store, final: dict[str, object], complaint: str) -> None:
    entry = with_final()
    assert entry.final is not None
    with pytest.raises(InvalidEntryError, match=complaint) as caught:
        store.put(replace(entry, final=replace(entry.final, **final)))  # type: ignore[arg-type]
    assert str(entry.spec) in str(caught.value)
    assert store.entries() == []


@pytest.mark.parametrize("regret", [-1.0, NAN, INFINITE, True, "1.05"])
def test_an_invalid_regret_is_not_stored(store: Store, regret: object) -> None:
    with pytest.raises(InvalidEntryError, match="lookup_regret must be a finite number") as caught:
        store.put(replace(an_entry(), lookup_regret=regret))  # type: ignore[arg-type]
    assert str(an_entry().spec) in str(caught.value)
    assert store.entries() == []


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("final", '{"contenders": []}', "final must be an object"),
        ("lookup_regret", -2.0, "lookup_regret"),
        ("config", "[]", "config"),
        ("us", -1.0, "us"),
        ("d_out", -4096, "d_out"),
    ],
)
def test_a_damaged_neighbour_costs_itself_and_is_named_with_its_store(
    store: Store, column: str, value: object, complaint: str
) -> None:
    near, far = with_final(an_entry(a_spec(rank=64))), an_entry(a_spec(rank=16))
    store.put_all([near, far])
    _spoil(store, f"UPDATE doratune_entries SET {column} = :value WHERE rank = 64", value)
    found = store.neighbours(a_spec(), "sm_90", count=8)
    assert [candidate.spec for candidate in found.candidates] == [far.spec]
    [problem] = found.damaged
    assert complaint in problem
    assert store.location in problem
    assert "entry 1" in problem
