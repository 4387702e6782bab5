"""Read the description of its kernel from a compiled image, before a GPU's driver loads an image from a store.

Triton's compiler makes 64-bit ELF files for one architecture, each with one kernel. A cubin describes its kernel in a
section of attributes, an hsaco in a note of AMD's code object format. Nothing here is executed. Every offset is checked
against the file before it is followed, and no bytes may follow the last table or section. The description does not say
what the machine code does, nor, in a cubin, how much shared memory a launch must request.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import DoratuneError

_CUDA, _AMDGPU = 190, 224
"""``e_machine`` of a cubin and of an hsaco."""
_AMDGPU_ARCHITECTURES = {0x3F: "gfx90a", 0x4C: "gfx942"}
"""``EF_AMDGPU_MACH`` in ``e_flags`` (LLVM, User Guide for AMDGPU Backend)."""
_NEWER_CUDA_ABI = 8
"""From this ``EI_ABIVERSION`` on, the second byte of a cubin's flags has the architecture, before it the first."""

_NO_BITS, _SYMBOLS, _DYNAMIC_SYMBOLS, _NOTE = 8, 2, 11, 7
_OBJECT, _FUNCTION = 1, 2
_CUDA_ENTRY = 0x10
"""The bit in ``st_other`` of a function that can be launched; functions that a kernel calls lack it."""

_PARAMETER, _THREADS, _CLUSTER = 0x17, 0x10, 0x3D
"""Attributes of a cubin's kernel: one parameter; the threads of a block; the blocks of a cluster."""
_SIZED = 4
"""The format of attributes that state the length of their value. Values of other formats have two bytes."""

_AMDGPU_METADATA = 32
"""The type of the note that describes an hsaco's kernels, in MessagePack."""

_MOST_SECTIONS, _MOST_SYMBOLS, _MOST_DESCRIPTION = 1 << 10, 1 << 12, 1 << 18
"""Limits, far above the kernels of this package: these have up to 40 sections, 80 symbols and a 10 kB description."""
_DEEPEST = 8

_NUMBERS = {0xCC: "B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: "b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {0xD9: "B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
"""The ``struct`` formats of MessagePack's numbers, and of the lengths of its strings, lists and maps, by type byte."""


class ImageError(DoratuneError):
    """The image is not a file that Triton's compiler makes; the message says what differs."""


@dataclass(frozen=True)
class Image:
    """The architecture of an image and the description of its kernel.

    ``parameters`` are the sizes in bytes of the kernel's parameters, ``threads`` the threads of a block, ``blocks`` the
    blocks of a cluster, ``shared`` the bytes of static shared memory, which a launch does not request.
    """

    architecture: str
    kernel: str
    parameters: tuple[int, ...]
    threads: int
    blocks: int
    shared: int


def read_image(image: bytes) -> Image:
    """Read a cubin or hsaco.

    Raises:
        ImageError: it is not a complete ELF file for a GPU, does not have exactly one kernel, or does not describe it.
    """
    try:
        elf = _Elf(image)
        return _cubin(elf) if elf.machine == _CUDA else _hsaco(elf)
    except (struct.error, IndexError, UnicodeDecodeError) as problem:  # an offset outside its table
        raise ImageError(f"it is damaged ({problem})") from None


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int


class _Symbol(NamedTuple):
    name: str
    kind: int
    other: int
    size: int


class _Elf:
    """The tables of a 64-bit little-endian ELF file. All lie within the file, and no bytes follow them."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ImageError("it is not a 64-bit ELF file")
        header = struct.unpack_from("<HHIQQQIHHHHHH", data, 16)
        _, self.machine, _, _, segments, sections, self.flags, _, segment_bytes, segment_count, each, count, names = (
            header
        )
        if self.machine not in (_CUDA, _AMDGPU):
            raise ImageError(f"it is for machine {self.machine}, expected a GPU ({_CUDA} or {_AMDGPU})")
        self.abi = data[8]
        self.data = data
        self._end = 0
        if not 0 < count <= _MOST_SECTIONS or each != 64 or names >= count:
            raise ImageError(f"it has {count} sections of {each} bytes, with their names in section {names}")
        self._within("the table of sections", sections, count * each)
        if segment_count > _MOST_SECTIONS or (segment_count and segment_bytes != 56):
            raise ImageError(f"it has {segment_count} segments of {segment_bytes} bytes")
        self._within("the table of segments", segments, segment_count * segment_bytes)
        for index in range(segment_count):
            _, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, segments + index * segment_bytes)
            self._within(f"segment {index}", offset, size)
        raw = [struct.unpack_from("<IIQQQQII", data, sections + index * each) for index in range(count)]
        for index, (_, kind, _, _, offset, size, _, _) in enumerate(raw):
            if kind != _NO_BITS:
                self._within(f"section {index}", offset, size)
        if self._end < len(data):
            raise ImageError(f"its last part ends at byte {self._end}, but {len(data) - self._end} more bytes follow")
        table = self._bytes(raw[names][4], raw[names][5])
        self.sections = tuple(_Section(_text(table, name), *rest) for name, *rest in raw)

    def _within(self, what: str, offset: int, size: int) -> None:
        if offset + size > len(self.data):
            raise ImageError(f"it is cut off: {what} ends at byte {offset + size} of {len(self.data)}")
        self._end = max(self._end, offset + size)

    def _bytes(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]

    def content(self, section: _Section, most: int) -> bytes:
        """The bytes of a section, which may be at most ``most``."""
        if section.kind == _NO_BITS or section.size > most:
            raise ImageError(f"section {section.name[:80]!r} has {section.size} bytes")
        return self._bytes(section.offset, section.size)

    def one(self, name: str) -> _Section:
        """The only section with this name."""
        found = [section for section in self.sections if section.name == name]
        if len(found) != 1:
            raise ImageError(f"it must have one section {name!r}, got {len(found)}")
        return found[0]

    def symbols(self, kind: int) -> Iterator[_Symbol]:
        """The symbols in all tables of a kind."""
        for section in self.sections:
            if section.kind != kind:
                continue
            table = self.content(section, _MOST_SYMBOLS * 24)
            names = self.sections[section.link]
            strings = self.content(names, len(self.data))
            for name, info, other, _, _, size in struct.iter_unpack("<IBBHQQ", table):
                yield _Symbol(_text(strings, name), info & 15, other, size)


def _text(table: bytes, start: int) -> str:
    end = table.find(b"\0", start)
    if start >= len(table) or end < 0:
        raise ImageError("it is damaged: a name lies outside its table")
    return table[start:end].decode("ascii")


def _only(kernels: Sequence[str]) -> str:
    if len(kernels) != 1:
        raise ImageError(
            f"it must have one kernel, got {len(kernels)}{': ' + ', '.join(kernels)[:80] if kernels else ''}"
        )
    return kernels[0]


def _cubin(elf: _Elf) -> Image:
    number = elf.flags >> 8 & 255 if elf.abi >= _NEWER_CUDA_ABI else elf.flags & 255
    launched = [s.name for s in elf.symbols(_SYMBOLS) if s.kind == _FUNCTION and s.other & _CUDA_ENTRY]
    kernel = _only(launched)
    elf.one(f".text.{kernel}")
    parameters: dict[int, int] = {}
    threads: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    for attribute, value in _attributes(elf.content(elf.one(f".nv.info.{kernel}"), _MOST_DESCRIPTION)):
        if attribute == _PARAMETER:
            _, place, _, packed = struct.unpack("<IHHI", value)
            if place in parameters:
                raise ImageError(f"it describes parameter {place} twice")
            parameters[place] = packed >> 18
        elif attribute in (_THREADS, _CLUSTER):
            (threads if attribute == _THREADS else blocks).append(struct.unpack("<III", value))
    if [*sorted(parameters)] != [*range(len(parameters))]:
        raise ImageError("it does not describe each of its parameters")
    if len(threads) != 1 or len(blocks) > 1:
        raise ImageError("it must state the threads of a block once, and the blocks of a cluster at most once")
    (across, *others), cluster = threads[0], blocks[0] if blocks else (1, 1, 1)
    if others != [1, 1] or cluster[1:] != (1, 1):
        raise ImageError(f"blocks and clusters must have one dimension, got {threads[0]} threads and {cluster} blocks")
    shared = sum(section.size for section in elf.sections if section.name == f".nv.shared.{kernel}")
    sizes = tuple(parameters[place] for place in range(len(parameters)))
    return Image(f"sm_{number}", kernel, sizes, across, cluster[0], shared)


def _attributes(table: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a kernel as pairs of number and value."""
    at = 0
    while at < len(table):
        form, attribute, value = struct.unpack_from("<BBH", table, at)
        at += 4
        if form != _SIZED:
            yield attribute, struct.pack("<H", value)
            continue
        if at + value > len(table):
            raise ImageError("it is damaged: an attribute lies outside its table")
        yield attribute, table[at : at + value]
        at += value


def _hsaco(elf: _Elf) -> Image:
    architecture = _AMDGPU_ARCHITECTURES.get(elf.flags & 255, f"AMD machine {elf.flags & 255:#x}")
    described = [s.name for s in elf.symbols(_DYNAMIC_SYMBOLS) if s.kind == _OBJECT and s.name.endswith(".kd")]
    kernel = _only([name.removesuffix(".kd") for name in described])
    (about,) = _fields(_note(elf), ("amdhsa.kernels", list))
    if len(about) != 1:
        raise ImageError(f"it must describe one kernel, got {len(about)}")
    name, arguments, threads, shared = _fields(
        about[0], (".name", str), (".args", list), (".max_flat_workgroup_size", int), (".group_segment_fixed_size", int)
    )
    if name != kernel:
        raise ImageError(f"it must describe its kernel {kernel[:80]!r}, got {name[:80]!r}")
    sizes = tuple(_fields(argument, (".size", int))[0] for argument in arguments)
    return Image(architecture, kernel, sizes, threads, 1, shared)


def _note(elf: _Elf) -> Any:
    found = []
    for section in elf.sections:
        if section.kind != _NOTE:
            continue
        notes, at = elf.content(section, _MOST_DESCRIPTION), 0
        while at < len(notes):
            name_bytes, value_bytes, kind = struct.unpack_from("<III", notes, at)
            name = notes[at + 12 : at + 12 + name_bytes]
            start = at + 12 + -(-name_bytes // 4) * 4
            at = start + -(-value_bytes // 4) * 4
            if kind == _AMDGPU_METADATA and name == b"AMDGPU\0":
                found.append(notes[start : start + value_bytes])
    if len(found) != 1:
        raise ImageError(f"it must have one description of its kernels, got {len(found)}")
    return _MessagePack(found[0]).value(0)


def _fields(record: Any, *wanted: tuple[str, type]) -> list[Any]:
    """The values of a record by name, checked for their types."""
    if not isinstance(record, dict):
        raise ImageError(f"expected a map in its description, found {type(record).__name__}")
    for name, type_ in wanted:
        if type(record.get(name)) is not type_:
            raise ImageError(
                f"{name} in its description must be {type_.__name__}, got {type(record.get(name)).__name__}"
            )
    return [record[name] for name, _ in wanted]


class _MessagePack:
    """The part of MessagePack that hsaco files use: integers, booleans, strings, lists, maps."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ImageError(f"its description is nested more than {_DEEPEST} levels deep")
        kind: int = self._number("B")
        if kind < 0x80:
            return kind
        if kind >= 0xE0:
            return kind - 0x100
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind < 0x90 or kind in (0xDE, 0xDF):
            count = kind & 15 if kind < 0x90 else self._number(_LENGTHS[kind])
            return {self._key(depth): self.value(depth + 1) for _ in range(count)}
        if kind < 0xA0 or kind in (0xDC, 0xDD):
            count = kind & 15 if kind < 0xA0 else self._number(_LENGTHS[kind])
            return [self.value(depth + 1) for _ in range(count)]
        if kind < 0xC0 or kind in (0xD9, 0xDA, 0xDB):
            count = kind & 31 if kind < 0xC0 else self._number(_LENGTHS[kind])
            self._at += count
            if self._at > len(self._data):
                raise ImageError("its description is cut off")
            return self._data[self._at - count : self._at].decode("utf-8")
        raise ImageError(f"its description has a value of the unknown type {kind:#x}")

    def _key(self, depth: int) -> str:
        key = self.value(depth + 1)
        if not isinstance(key, str):
            raise ImageError(f"names in its description must be strings, got {type(key).__name__}")
        return key

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value
