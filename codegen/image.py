"""What a compiled image says of itself, read from its bytes: before a GPU's driver sees one that came out of a store.

Triton's compiler makes 64-bit ELF files for one architecture, each with one kernel. A cubin describes that kernel in a
section of attributes of its own, an hsaco in a note of AMD's code object format. Nothing here is executed, and every
offset is held against the file before it is followed, and the file ends where the last of its tables and parts does.
What the machine code does cannot be told from it, nor, for a cubin, how much shared memory a launch must ask for.
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
"""From this ``EI_ABIVERSION`` on, a cubin's flags have the architecture in their second byte instead of the first."""

_NO_BITS, _SYMBOLS, _DYNAMIC_SYMBOLS, _NOTE = 8, 2, 11, 7
_OBJECT, _FUNCTION = 1, 2
_CUDA_ENTRY = 0x10
"""In ``st_other``: a function that can be launched, unlike one that a kernel calls."""

_PARAMETER, _THREADS, _CLUSTER = 0x17, 0x10, 0x3D
"""Attributes of a cubin's kernel: one parameter; the threads of a block; the blocks of a cluster."""
_SIZED = 4
"""The format of an attribute whose value has the length that is given; values of the other formats are two bytes."""

_AMDGPU_METADATA = 32
"""The type of the note that describes an hsaco's kernels, in MessagePack."""

_MOST_SECTIONS, _MOST_SYMBOLS, _MOST_DESCRIPTION = 1 << 10, 1 << 12, 1 << 18
"""More than any kernel of this package has by far: up to 40 sections, 80 symbols and 10 kB that describe it."""
_DEEPEST = 8

_NUMBERS = {0xCC: "B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: "b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {0xD9: "B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
"""The forms of MessagePack's numbers, and of the lengths of its texts, lists and maps, by the byte before them."""


class ImageError(DoratuneError):
    """The image is no file that Triton's compiler makes, or not one for this kernel; the message says what differs."""


@dataclass(frozen=True)
class Image:
    """The architecture of an image and the one kernel in it.

    ``parameters`` are the sizes in bytes of what a launch must hand over, ``threads`` those of a block, ``blocks`` of a
    cluster, ``shared`` the bytes of shared memory beside those that a launch asks for.
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
        ImageError: it is no whole ELF file of a GPU's, has not exactly one kernel, or does not describe it.
    """
    try:
        elf = _Elf(image)
        return _cubin(elf) if elf.machine == _CUDA else _hsaco(elf)
    except (struct.error, IndexError, UnicodeDecodeError) as problem:  # an offset that leads out of its table
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
    """The tables of a 64-bit little-endian ELF file: all of them lie within it, and nothing lies after them."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ImageError("it is no 64-bit ELF file")
        header = struct.unpack_from("<HHIQQQIHHHHHH", data, 16)
        _, self.machine, _, _, programs, sections, self.flags, _, program_bytes, program_count, each, count, names = (
            header
        )
        if self.machine not in (_CUDA, _AMDGPU):
            raise ImageError(f"it is for machine {self.machine}, not for a GPU ({_CUDA} or {_AMDGPU})")
        self.abi = data[8]
        self.data = data
        self._end = 0
        if not 0 < count <= _MOST_SECTIONS or each != 64 or names >= count:
            raise ImageError(f"it has {count} sections of {each} bytes, their names in number {names}")
        self._within("the table of sections", sections, count * each)
        if program_count > _MOST_SECTIONS or (program_count and program_bytes != 56):
            raise ImageError(f"it has {program_count} segments of {program_bytes} bytes")
        self._within("the table of segments", programs, program_count * program_bytes)
        for index in range(program_count):
            _, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, programs + index * program_bytes)
            self._within(f"segment {index}", offset, size)
        raw = [struct.unpack_from("<IIQQQQII", data, sections + index * each) for index in range(count)]
        for index, (_, kind, _, _, offset, size, _, _) in enumerate(raw):
            if kind != _NO_BITS:
                self._within(f"section {index}", offset, size)
        if self._end < len(data):
            raise ImageError(f"it ends at byte {self._end}, and {len(data) - self._end} more bytes follow")
        table = self._bytes(raw[names][4], raw[names][5])
        self.sections = tuple(_Section(_text(table, name), *rest) for name, *rest in raw)

    def _within(self, what: str, offset: int, size: int) -> None:
        if offset + size > len(self.data):
            raise ImageError(f"it is cut off: {what} ends at byte {offset + size} of {len(self.data)}")
        self._end = max(self._end, offset + size)

    def _bytes(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]

    def content(self, section: _Section, most: int) -> bytes:
        """The bytes of a section that may be up to ``most`` long."""
        if section.kind == _NO_BITS or section.size > most:
            raise ImageError(f"section {section.name[:80]!r} has {section.size} bytes")
        return self._bytes(section.offset, section.size)

    def one(self, name: str) -> _Section:
        """The section of this name, of which there must be one."""
        found = [section for section in self.sections if section.name == name]
        if len(found) != 1:
            raise ImageError(f"it has {len(found)} sections {name!r}")
        return found[0]

    def symbols(self, kind: int) -> Iterator[_Symbol]:
        """The symbols in the tables of a kind."""
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
        raise ImageError(f"it has {len(kernels)} kernels{': ' + ', '.join(kernels)[:80] if kernels else ''}")
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
        raise ImageError("it does not fix the threads of a block once")
    (across, *others), cluster = threads[0], blocks[0] if blocks else (1, 1, 1)
    if others != [1, 1] or cluster[1:] != (1, 1):
        raise ImageError(f"its blocks have {threads[0]} threads and its clusters {cluster} blocks")
    shared = sum(section.size for section in elf.sections if section.name == f".nv.shared.{kernel}")
    sizes = tuple(parameters[place] for place in range(len(parameters)))
    return Image(f"sm_{number}", kernel, sizes, across, cluster[0], shared)


def _attributes(table: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a kernel, as their number and value."""
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
        raise ImageError(f"it describes {len(about)} kernels")
    name, arguments, threads, shared = _fields(
        about[0], (".name", str), (".args", list), (".max_flat_workgroup_size", int), (".group_segment_fixed_size", int)
    )
    if name != kernel:
        raise ImageError(f"it has kernel {kernel[:80]!r} and describes {name[:80]!r}")
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
        raise ImageError(f"it has {len(found)} descriptions of its kernels")
    return _MessagePack(found[0]).value(0)


def _fields(record: Any, *wanted: tuple[str, type]) -> list[Any]:
    """The values of a record by name, of the types that they should have."""
    if not isinstance(record, dict):
        raise ImageError("its description is none")
    for name, type_ in wanted:
        if type(record.get(name)) is not type_:
            raise ImageError(f"its description has no {name}, or none of type {type_.__name__}")
    return [record[name] for name, _ in wanted]


class _MessagePack:
    """The part of MessagePack in which hsaco files are described: integers, truth values, texts, lists, maps."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ImageError("its description is nested too deep")
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
        raise ImageError(f"its description has a value of kind {kind:#x}")

    def _key(self, depth: int) -> str:
        key = self.value(depth + 1)
        if not isinstance(key, str):
            raise ImageError("its description has a name that is no text")
        return key

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value
