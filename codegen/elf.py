"""Read the tables of an ELF file for a GPU, and check that they are consistent before a GPU's driver follows them.

The file may come from anybody, and a driver's loader runs on the host. So every offset must lie within the file, every
index within its table, sections may not overlap, and no bytes may follow the last part. The rules are those of the ELF
format; what Triton's compilers write obeys them all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import DoratuneError

CUDA, AMDGPU = 190, 224
"""``e_machine`` of a cubin and of an hsaco."""
_FILE_TYPES = {CUDA: 2, AMDGPU: 3}
"""``e_type``: an executable, and a shared object."""

SYMBOLS, DYNAMIC_SYMBOLS, NOTE, NO_BITS = 2, 11, 7, 8
_STRINGS = 3
_RELOCATION_BYTES = {4: 24, 9: 16}
"""Bytes of a relocation by the kind of its section: with an addend, and without."""
_SYMBOL_BYTES = 24
_OF_THE_PROCESSOR = range(0x70000000, 0x80000000)
_LINKED = (SYMBOLS, DYNAMIC_SYMBOLS, _STRINGS, NOTE)
"""Kinds of sections that another one may refer to for its symbols, names or note, besides those of the processor."""
_KINDS = {*range(12), 0x6FFFFFF6}
"""Kinds of sections: those of the format, and the hash table of GNU; besides those of the processor."""
_INFO_IS_SECTION = 0x40
_FLAGS = 0xFFF000F7
"""Flags of sections: those of the format, and what it leaves to systems and processors."""
_ABSOLUTE, _COMMON = 0xFFF1, 0xFFF2
"""What a symbol has in the place of its section."""

_LOADED, _TABLE_OF_SEGMENTS = 1, 6
_MOST_SECTIONS, _MOST_SYMBOLS, _MOST_RELOCATIONS = 1 << 10, 1 << 12, 1 << 14
"""Limits, far above the kernels of this package: these have up to 40 sections and 80 symbols."""
_MOST_ALIGNMENT = 1 << 16
_MOST_WITHOUT_BITS = 1 << 20
"""Bytes of a section or segment beyond the file, which a loader must allocate. Kernels have up to 4 kB."""


class ImageError(DoratuneError):
    """The image is not a file that Triton's compiler makes; the message says what differs."""


class Section(NamedTuple):
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    each: int


class Symbol(NamedTuple):
    name: str
    kind: int
    other: int
    section: int
    value: int
    size: int


class Elf:
    """The tables of a 64-bit little-endian ELF file.

    Raises:
        ImageError: it is not one for a GPU, or is cut off or inconsistent.
        struct.error, UnicodeDecodeError: a table is cut off, or a name is not ASCII.
    """

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ImageError("it is not a 64-bit ELF file")
        header = struct.unpack_from("<HHIQQQIHHHHHH", data, 16)
        kind, self.machine, _, entry, segments, sections, self.flags, own, each_segment, count, each, number, names = (
            header
        )
        if self.machine not in _FILE_TYPES:
            raise ImageError(f"it is for machine {self.machine}, expected a GPU ({CUDA} or {AMDGPU})")
        if kind != _FILE_TYPES[self.machine] or entry or own != 64:
            raise ImageError(f"its header has type {kind}, entry {entry} and {own} bytes")
        self.abi = data[8]
        self.data = data
        self._end = 0
        if not 0 < number <= _MOST_SECTIONS or each != 64 or names >= number:
            raise ImageError(f"it has {number} sections of {each} bytes, with their names in section {names}")
        self._within("the table of sections", sections, number * each)
        if count > _MOST_SECTIONS or (count and each_segment != 56):
            raise ImageError(f"it has {count} segments of {each_segment} bytes")
        self._within("the table of segments", segments, count * each_segment)
        for index in range(count):
            self._check_segment(
                index, struct.unpack_from("<IIQQQQQQ", data, segments + index * 56), segments, count * 56
            )
        raw = [struct.unpack_from("<IIQQQQIIQQ", data, sections + index * 64) for index in range(number)]
        for index, (_, kind, _, _, offset, size, *_) in enumerate(raw):
            if kind != NO_BITS:
                self._within(f"section {index}", offset, size)
        if self._end < len(data):
            raise ImageError(f"its last part ends at byte {self._end}, but {len(data) - self._end} more bytes follow")
        table = data[raw[names][4] : raw[names][4] + raw[names][5]]
        self.sections = tuple(Section(_text(table, name), *rest) for name, *rest in raw)
        if any(raw[0]):
            raise ImageError("its section 0 is not empty")
        if len({section.name for section in self.sections}) < number:
            raise ImageError("two of its sections have the same name")
        for section in self.sections[1:]:
            self._check_section(section)
        self._check_overlaps(("the table of sections", sections, number * each), ("the header", 0, 64))

    def _within(self, what: str, offset: int, size: int) -> None:
        if offset + size > len(self.data):
            raise ImageError(f"it is cut off: {what} ends at byte {offset + size} of {len(self.data)}")
        self._end = max(self._end, offset + size)

    def _check_segment(self, index: int, values: tuple[int, ...], table: int, table_bytes: int) -> None:
        kind, _, offset, _, _, size, in_memory, alignment = values
        self._within(f"segment {index}", offset, size)
        if kind == _TABLE_OF_SEGMENTS and (offset, size) != (table, table_bytes):
            raise ImageError(f"segment {index} is not the table of segments")
        if kind == _LOADED and not size <= in_memory <= size + _MOST_WITHOUT_BITS:
            raise ImageError(f"segment {index} has {size} bytes, and {in_memory} in memory")
        _check_alignment(f"segment {index}", alignment)

    def _check_section(self, section: Section) -> None:
        what, count = f"section {section.name[:80]!r}", len(self.sections)
        _check_alignment(what, section.alignment)
        if section.kind not in _KINDS and section.kind not in _OF_THE_PROCESSOR:
            raise ImageError(f"{what} is of the unknown kind {section.kind:#x}")
        if section.flags & ~_FLAGS or (section.address and self.machine == CUDA):
            raise ImageError(f"{what} has flags {section.flags:#x} and address {section.address:#x}")
        if section.kind == NO_BITS and section.size > _MOST_WITHOUT_BITS:
            raise ImageError(f"{what} needs {section.size} bytes")
        if section.each > 1 and section.size % section.each:
            raise ImageError(f"{what} has {section.size} bytes in parts of {section.each}")
        if section.link >= count or (section.flags & _INFO_IS_SECTION and section.info >= count):
            raise ImageError(f"{what} refers to sections {section.link} and {section.info} of {count}")
        linked = self.sections[section.link].kind
        if section.link and linked not in _LINKED and linked not in _OF_THE_PROCESSOR:
            raise ImageError(f"{what} refers to section {section.link}, which is of kind {linked}")
        if section.kind in (SYMBOLS, DYNAMIC_SYMBOLS):
            self._check_symbols(what, section)
        elif section.kind in _RELOCATION_BYTES:
            self._check_relocations(what, section)
        elif section.kind == _STRINGS and self._bytes(section)[-1:] not in (b"", b"\0"):
            raise ImageError(f"{what} has a name without an end")

    def _check_symbols(self, what: str, section: Section) -> None:
        if section.each != _SYMBOL_BYTES or self.sections[section.link].kind != _STRINGS:
            raise ImageError(f"{what} has symbols of {section.each} bytes, with names in section {section.link}")
        for symbol in self._symbols(section):
            if symbol.section in (0, _ABSOLUTE, _COMMON):
                continue
            if symbol.section >= len(self.sections):
                raise ImageError(f"{what} has a symbol in section {symbol.section} of {len(self.sections)}")
            place = self.sections[symbol.section]
            if not 0 <= symbol.value - place.address <= place.size - symbol.size:
                raise ImageError(f"{what} has a symbol outside its section {place.name[:80]!r}")

    def _check_relocations(self, what: str, section: Section) -> None:
        symbols = self.sections[section.link]
        known = symbols.kind in (SYMBOLS, DYNAMIC_SYMBOLS)
        if section.each != _RELOCATION_BYTES[section.kind] or not known or not 0 < section.info < len(self.sections):
            raise ImageError(f"{what} has parts of {section.each} bytes for section {section.info}")
        target = self.sections[section.info]
        for at in range(0, section.size if section.size <= _MOST_RELOCATIONS * 24 else 0, section.each):
            place, which = struct.unpack_from("<QQ", self.data, section.offset + at)
            if place >= target.size or which >> 32 >= symbols.size // _SYMBOL_BYTES:
                raise ImageError(f"{what} points outside section {target.name[:80]!r} or its symbols")
        if section.size > _MOST_RELOCATIONS * 24:
            raise ImageError(f"{what} has {section.size} bytes")

    def _check_overlaps(self, *more: tuple[str, int, int]) -> None:
        """Sections may lie at the very same bytes, as a text that two of them share, but not in parts of each other."""
        parts = {(section.offset, section.size): section.name for section in self.sections if section.kind != NO_BITS}
        parts |= {(offset, size): what for what, offset, size in more}
        end, before = 0, ""
        for (offset, size), name in sorted(parts.items()):
            if size and offset < end:
                raise ImageError(f"its parts {before[:80]!r} and {name[:80]!r} overlap")
            end, before = max(end, offset + size), name

    def _bytes(self, section: Section) -> bytes:
        return self.data[section.offset : section.offset + section.size]

    def content(self, section: Section, most: int) -> bytes:
        """The bytes of a section, which may be at most ``most``."""
        if section.kind == NO_BITS or section.size > most:
            raise ImageError(f"section {section.name[:80]!r} has {section.size} bytes")
        return self._bytes(section)

    def one(self, name: str) -> Section:
        """The only section with this name."""
        found = [section for section in self.sections if section.name == name]
        if len(found) != 1:
            raise ImageError(f"it must have one section {name!r}, got {len(found)}")
        return found[0]

    def symbols(self, kind: int) -> Iterator[Symbol]:
        """The symbols in all tables of a kind."""
        for section in self.sections:
            if section.kind == kind:
                yield from self._symbols(section)

    def _symbols(self, section: Section) -> Iterator[Symbol]:
        table = self.content(section, _MOST_SYMBOLS * _SYMBOL_BYTES)
        strings = self.content(self.sections[section.link], len(self.data))
        for name, info, other, place, value, size in struct.iter_unpack("<IBBHQQ", table):
            yield Symbol(_text(strings, name), info & 15, other, place, value, size)

    def value(self, symbol: Symbol, form: str) -> tuple[int, ...]:
        """The numbers at a symbol of a section."""
        place = self.sections[symbol.section]
        if struct.calcsize(form) > place.size - (symbol.value - place.address):
            raise ImageError(f"{symbol.name[:80]!r} lies outside its section")
        return struct.unpack_from(form, self.data, place.offset + symbol.value - place.address)


def _check_alignment(what: str, alignment: int) -> None:
    if alignment & (alignment - 1) or alignment > _MOST_ALIGNMENT:
        raise ImageError(f"{what} is aligned to {alignment} bytes")


def _text(table: bytes, start: int) -> str:
    end = table.find(b"\0", start)
    if start >= len(table) or end < 0:
        raise ImageError("it is damaged: a name lies outside its table")
    return table[start:end].decode("ascii")
