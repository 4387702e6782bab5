"""A campaign of damaged files and hostile rows: whatever a store has become, no step raises anything but a StoreError,
takes long or much memory, and ``verify`` finds every change.

``pytest tests/cache/test_mutations.py --mutations 10000 --timeout 0`` runs all of it; a sample runs by default. The
seed is fixed, so that a failure can be repeated.
"""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from doratune.cache.errors import StoreError
from doratune.cache.rows import entry_values
from doratune.cache.store import Store
from doratune.cli import main
from doratune.codegen.spec import KernelSpec
from doratune.printable import MOST_MESSAGE, is_printable

from ..command_line import RUNNER
from .mutations import TABLES, Content, content_of, hostile_value, mutate, spoil, write_store
from .world import a_spec

SAMPLE = 60
COMMANDS_EACH = 30
"""Of so many damaged stores, one is also given to the commands."""
MOST_SECONDS = 20.0
MOST_KILOBYTES = 200_000
WANTED: KernelSpec = a_spec(rank=32)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shipped") / "store.sqlite"
    write_store(path)
    return path


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--mutations")) or SAMPLE


@pytest.fixture
def limits(count: int) -> Callable[[], object]:
    """What judges each step: a context with limits on time and on memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @contextmanager
    def limited() -> Iterator[None]:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < MOST_SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES

    return limited


def problems_of(path: Path) -> list[str]:
    """What every step says of the store's damage. Nothing but a StoreError may leave a step."""
    try:
        with Store.open(path, readonly=True) as store:
            found = store.verify()
            for step in (store.readable_entries, store.entries, store.binaries, store.binary_keys, store.signatures):
                with suppress(StoreError):
                    step()
            with suppress(StoreError):
                store.readable_entries(op=WANTED.op, gpu=WANTED.gpu)
            with suppress(StoreError):
                store.neighbours(WANTED, "sm_90", count=8)
            with suppress(StoreError):
                [store.get(a_spec(rank=rank)) for rank in (8, 16, 64, 128)]
    except StoreError as error:
        found = [str(error)]
    assert all(len(each) <= MOST_MESSAGE and is_printable(each) for each in found), found
    return found


def judge_commands(path: Path, damaged: bool) -> None:
    for command in (["verify"], ["ls"], ["show", str(a_spec(rank=16))], ["export", "-o", f"{path}.copy"]):
        result = RUNNER.invoke(main, ["cache", *command, "--store", str(path)])
        assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
        assert result.exit_code in (0, 1)
        assert is_printable(result.output, lines=True)
        if command == ["verify"] and damaged:
            assert result.exit_code == 1


def fresh(folder: Path, content: bytes) -> Path:
    for old in folder.glob("mutated*"):
        old.unlink()
    path = folder / "mutated.sqlite"
    path.write_bytes(content)
    return path


def test_of_a_damaged_file_every_change_is_found(
    shipped: Path, tmp_path: Path, count: int, limits: Callable[[], object]
) -> None:
    content, whole, chance = shipped.read_bytes(), content_of(shipped), random.Random(16)
    assert whole is not None
    kinds: Counter[str] = Counter()
    for number in range(count):
        kind, mutated = mutate(chance, content)
        changed = content_of(fresh(tmp_path, mutated)) != whole
        path = fresh(tmp_path, mutated)  # without the log that reading may have made
        with limits():  # type: ignore[attr-defined]
            found = problems_of(path)
        assert found or not changed, f"mutation {number} ({kind}) is not found"
        kinds[f"{'found' if found else 'changes nothing'}"] += 1
        if number % COMMANDS_EACH == 0:
            judge_commands(path, bool(found))
    print(f"{count} mutated files: {dict(kinds)}")


def test_a_hostile_row_costs_itself_or_is_one_that_could_have_been_stored(
    shipped: Path, tmp_path: Path, count: int, limits: Callable[[], object]
) -> None:
    content, whole, chance = shipped.read_bytes(), content_of(shipped), random.Random(16)
    assert whole is not None
    with Store.open(shipped, readonly=True) as store:
        honest = store.entries()
    kinds: Counter[str] = Counter()
    for number in range(count):
        path = fresh(tmp_path, content)
        table = chance.choice(TABLES[1:])
        column = chance.choice([each.name for each in table.columns if each.name != "id"])
        value, reseal = hostile_value(chance), chance.random() < 0.5
        spoil(path, table.name, 2, column, value, reseal=reseal)
        changed = _rows(content_of(path)) != _rows(whole)
        with limits():  # type: ignore[attr-defined]
            found = problems_of(path)
        said = f"row {number}: {table.name}.{column} = {value!r:.80}"
        resealed = reseal and table.name == "doratune_entries"
        assert found or not changed or resealed, said
        if not found:
            with Store.open(path, readonly=True) as store:
                for entry in store.entries():
                    entry_values(entry)  # raises for what no store would take
        with Store.open(path, readonly=True) as store:
            entries, _ = store.readable_entries()
        others = [entry for index, entry in enumerate(honest) if index != 1]
        assert [entry for entry in entries if entry in others] == others, said
        kinds["refused" if found else "equal or legal"] += 1
        if number % COMMANDS_EACH == 0:
            judge_commands(path, bool(found))
    print(f"{count} hostile rows: {dict(kinds)}")


def _rows(content: Content | None) -> object:
    return None if content is None else content[0]


@pytest.mark.parametrize(("pragma", "place"), [("application_id", 68), ("user_version", 60)])
def test_a_number_that_another_program_left_in_the_header_is_a_change(
    shipped: Path, tmp_path: Path, pragma: str, place: int
) -> None:
    content = bytearray(shipped.read_bytes())
    content[place + 3] = 7
    (problem,) = problems_of(fresh(tmp_path, bytes(content)))
    assert f"the header's {pragma} is 7, not 0" in problem


def test_bytes_that_no_reader_sees_are_no_change(shipped: Path, tmp_path: Path) -> None:
    content = bytearray(shipped.read_bytes())
    content[72:92] = b"reserved for growth!"  # SQLite's own text of these bytes of the header
    path = fresh(tmp_path, bytes(content))
    assert content_of(path) == content_of(shipped)
    assert problems_of(path) == []


def test_white_space_that_sqlite_does_not_write_is_a_change_of_the_schema(shipped: Path, tmp_path: Path) -> None:
    content = shipped.read_bytes()
    assert b"\n\tspec TEXT" in content
    for space, found in ((b"\x0b", True), (b" ", False)):
        path = fresh(tmp_path, content.replace(b"\n\tspec TEXT", b"\n" + space + b"spec TEXT"))
        assert bool(problems_of(path)) == found


@pytest.mark.parametrize("column", ["digest", "key", "signature"])
def test_a_changed_signature_is_found_without_its_key(shipped: Path, tmp_path: Path, column: str) -> None:
    path = fresh(tmp_path, shipped.read_bytes())
    value: object = {"digest": "0" * 64, "key": "SHA256:x", "signature": bytes(64)}[column]
    spoil(path, "doratune_signatures", 2, column, value)
    (problem,) = problems_of(path)
    assert "doratune_signatures" in problem
