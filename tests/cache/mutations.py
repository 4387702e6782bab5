"""Damage to the files and rows of a store, drawn from a seed, and what of it counts as a change.

*Changed* is a store of which a reader sees anything else: a value of a row of its tables (but the row's number, which
means nothing), a row more or less, the text of its schema, or what SQLite keeps in the header for programs
(``application_id``, ``user_version``, the encoding of texts). Bytes of free pages, of the free space in a page and of
unused fields of the header are no content.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from doratune.cache import schema
from doratune.cache.entry import Signature
from doratune.cache.seal import row_seal
from doratune.cache.signing import row_digest
from doratune.cache.store import Store

from .world import a_binary, a_spec, an_entry, with_final

TABLES = (schema.version_table, *schema.Base.metadata.tables.values())
PRAGMAS = ("application_id", "user_version", "encoding")
HEADER = 100
"""Bytes of SQLite's header."""


def write_store(path: Path) -> None:
    """A compact store with rows in each table, one of them on pages of its own."""
    entries = [with_final(an_entry(a_spec(rank=rank))) for rank in (8, 16, 64, 128)]
    entries.append(an_entry(a_spec(rank=256), "predicted", us=None, code="y = 1\n" * 3000))
    binaries = [a_binary(code, bytes(range(256)) * 40) for code in ("code-1", "code-2", "code-3")]
    with Store.open(path.with_suffix(".made"), create=True) as store:
        store.put_all(entries)
        for binary in binaries:
            store.put_binary(binary)
        rows = [row_digest(row) for row in (*store.entries(), *store.binaries())]
        store.put_signatures(Signature(digest, f"SHA256:{'k' * 43}", bytes(range(64))) for digest in rows)
        store.export(path)


Content = tuple[Counter[tuple[object, ...]], tuple[object, ...]]


def content_of(path: Path) -> Content | None:
    """What a reader sees of the file, read without doratune; None if SQLite cannot read all of it."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1)) as connection:
            connection.text_factory = bytes
            connection.set_progress_handler(_step_limit(), 10_000)
            rows: Counter[tuple[object, ...]] = Counter()
            for table in TABLES:
                names = [column.name for column in table.columns if column.name != "id"]
                kinds = ", ".join(f"{name}, typeof({name})" for name in names)
                for row in connection.execute(f"SELECT {kinds} FROM {table.name} NOT INDEXED"):
                    rows[table.name, *row] += 1
            texts = connection.execute(
                "SELECT type, name, tbl_name, replace(replace(replace(replace(sql, char(10), ' '), char(9), ' '),"
                " char(12), ' '), char(13), ' ') FROM sqlite_master"  # all that is white space to SQLite
            ).fetchall()
            facts = tuple(connection.execute(f"PRAGMA {name}").fetchone() for name in PRAGMAS)
            return rows, (frozenset(texts), *facts)
    except (sqlite3.Error, MemoryError, UnicodeError):  # the last is of a schema's text, in an error
        return None


def _step_limit() -> Callable[[], bool]:
    steps = iter(range(2000))
    return lambda: next(steps, None) is None


def mutate(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """A damaged copy of a store's file, and the kind of damage."""
    kind = chance.choice(list(_DAMAGES))
    mutated = bytearray(content)
    _DAMAGES[kind](chance, mutated)
    return kind, bytes(mutated)


def _bytes(count: int, *, within: int | None = None) -> Callable[[random.Random, bytearray], None]:
    def damage(chance: random.Random, data: bytearray) -> None:
        for _ in range(count):
            data[chance.randrange(within or len(data))] = chance.randrange(256)

    return damage


def _flip_bit(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _flip_bit_of_content(chance: random.Random, data: bytearray) -> None:
    used = [place for place, value in enumerate(data) if value]
    data[chance.choice(used)] ^= 1 << chance.randrange(8)


def _zero(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    size = min(len(data) - start, chance.choice([8, 512, 4096]))
    data[start : start + size] = bytes(size)


def _copy_range(chance: random.Random, data: bytearray) -> None:
    size = chance.choice([4, 64, 512])
    source, target = (chance.randrange(len(data) - size) for _ in range(2))
    data[target : target + size] = data[source : source + size]


def _swap_pages(chance: random.Random, data: bytearray) -> None:
    size = int.from_bytes(data[16:18], "big")
    first, second = (size * chance.randrange(len(data) // size) for _ in range(2))
    data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]


def _truncate(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def _grow(chance: random.Random, data: bytearray) -> None:
    data += chance.randbytes(chance.choice([1, 512, 4096]))


def _replace_text(chance: random.Random, data: bytearray) -> None:
    """Write a word of the store another way wherever it stands, in tables and indexes alike."""
    old, new = chance.choice(_WORDS)
    data[:] = data.replace(old, new)


_WORDS = [(b"tile", b"tilf"), (b"code-2", b"code-9"), (b"measured", b"measuree"), (b"h200", b"h201")]
_WORDS += [(b"0006", b"0005"), (b"kkkk", b"kkkl"), (b"source-1", b"source-2"), (b"rank=64", b"rank=46")]
_WORDS += [(b"BIGINT", b"BIGINU")]

_DAMAGES: dict[str, Callable[[random.Random, bytearray], None]] = {
    "one byte": _bytes(1),
    "four bytes": _bytes(4),
    "forty bytes": _bytes(40),
    "a byte of the header": _bytes(1, within=HEADER),
    "a byte of the first page": _bytes(1, within=4096),
    "a bit": _flip_bit,
    "a bit of what is no zero": _flip_bit_of_content,
    "zeros": _zero,
    "a copied range": _copy_range,
    "swapped pages": _swap_pages,
    "a short file": _truncate,
    "a long file": _grow,
    "a word everywhere": _replace_text,
}


def spoil(
    path: Path, table: str, row: int, column: str, value: object, *, raw: bool = False, reseal: bool = True
) -> None:
    """Write a value into a row past every constraint; with ``reseal`` also an entry's digest that fits it, as an
    attacker would. With ``raw``, bytes become the text that they are, in whatever encoding."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        loose = re.sub(r" (TEXT|BIGINT|BOOLEAN|DOUBLE|BLOB)( NOT NULL)?", "", sql)
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (loose, table))
        connection.execute("PRAGMA schema_version = 1000")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        as_text = "CAST(? AS TEXT)" if raw else "?"
        connection.execute(f"UPDATE {table} SET {column} = {as_text} WHERE id = ?", (value, row))
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, table))
        connection.execute("PRAGMA schema_version = 2000")
    if reseal and table == "doratune_entries" and column != "digest" and not raw:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:  # whose columns have their types again
            connection.row_factory = sqlite3.Row
            values = dict(connection.execute(f"SELECT * FROM {table} WHERE id = ?", (row,)).fetchone())
            values |= {name: bool(values[name]) for name in ("bias", "delta", "save") if values[name] in (0, 1)}
            connection.execute(f"UPDATE {table} SET digest = ? WHERE id = ?", (row_seal(values), row))


def hostile_value(chance: random.Random) -> Any:
    """A value that no store of doratune has, or has elsewhere."""
    return chance.choice(_VALUES)(chance)


def _number(chance: random.Random) -> object:
    return chance.choice([0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 5e-324, 1e300, float("inf"), -0.0, 0.5])


def _long(chance: random.Random) -> object:
    return chance.choice(["9", "x", "[", '{"a":', "\u202e", "é", "\0"]) * chance.choice([300, 5000, 300_000])


def _noise(chance: random.Random) -> object:
    return chance.randbytes(chance.choice([0, 1, 40, 3000]))


def _text(chance: random.Random) -> object:
    letters = [
        "\x1b[2J",
        "[/b]",
        "\n",
        "\x00",
        "\ud7ff",
        "%s",
        "{}",
        "'",
        "--",
        "lora_compose",
        "h200",
        "nan",
        "é",
        "1",
    ]
    return "".join(chance.choices(letters, k=chance.randrange(12)))


def _json(chance: random.Random) -> object:
    inner = chance.choice(
        ["1" * 4400, "1e999", "NaN", '"\\ud800"', "[" * 500 + "]" * 500, "null", "-1", '"tile"', "[]"]
    )
    names = ["variant", "num_warps", "num_stages", "block_n", "contenders", "samples_us", "[/b]", "cls", "config"]
    body = ", ".join(f'"{name}": {inner}' for name in chance.sample(names, chance.randrange(1, 6)))
    return chance.choice([f"[{inner}]", f"{{{body}}}", f'{{"contenders": [{{{body}}}], {body}}}', inner])


def _null(chance: random.Random) -> object:
    return None


_VALUES = (_number, _long, _noise, _text, _json, _null)
