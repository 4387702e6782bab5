"""Read the description of its kernel from a compiled image, before a GPU's driver loads an image from a store.

Triton's compiler makes 64-bit ELF files for one architecture, each with one kernel. A cubin describes its kernel in a
section of attributes, an hsaco in a note of AMD's code object format. Nothing here is executed, and the file's tables
are checked first (:mod:`.elf`). The description does not say what the machine code does, nor, in a cubin, how much
shared memory a launch must request.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .elf import CUDA, DYNAMIC_SYMBOLS, NOTE, SYMBOLS, Elf, ImageError

__all__ = ["Image", "ImageError", "read_image"]

_AMDGPU_ARCHITECTURES = {0x3F: "gfx90a", 0x4C: "gfx942"}
"""``EF_AMDGPU_MACH`` in ``e_flags`` (LLVM, User Guide for AMDGPU Backend)."""
_NEWER_CUDA_ABI = 8
"""From this ``EI_ABIVERSION`` on, the second byte of a cubin's flags has the architecture, before it the first."""

_OBJECT, _FUNCTION = 1, 2
_CUDA_ENTRY = 0x10
"""The bit in ``st_other`` of a function that can be launched; functions that a kernel calls lack it."""

_PARAMETER, _THREADS, _CLUSTER, _PARAMETER_BANK, _PARAMETER_BYTES = 0x17, 0x10, 0x3D, 0x0A, 0x19
"""Attributes of a cubin's kernel: one parameter; the threads of a block; the blocks of a cluster; where in constant
memory the parameters lie; their bytes."""
_IN_PARAMETER_BANK = 0x1F
_CONSTANT_BYTES, _MOST_BEFORE_PARAMETERS = 1 << 16, 1 << 12
"""Constant memory, and how much of it at most the driver keeps for itself before the parameters (352 to 896 bytes)."""
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
"""A tensor map among the parameters. Other parameters are aligned to their size."""
_SIZED = 4
"""The format of attributes that state the length of their value. Values of other formats have two bytes."""

_AMDGPU_METADATA = 32
"""The type of the note that describes an hsaco's kernels, in MessagePack."""

_MOST_DESCRIPTION = 1 << 18
"""A limit, far above the kernels of this package, which have a 10 kB description."""
_DEEPEST = 8

_NUMBERS = {0xCC: "B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: "b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {0xD9: "B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
"""The ``struct`` formats of MessagePack's numbers, and of the lengths of its strings, lists and maps, by type byte."""


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
        elf = Elf(image)
        return _cubin(elf) if elf.machine == CUDA else _hsaco(elf)
    except (struct.error, IndexError, UnicodeDecodeError) as problem:  # an offset outside its table
        raise ImageError(f"it is damaged ({problem})") from None


def _only(kernels: Sequence[str]) -> str:
    if len(kernels) != 1:
        raise ImageError(
            f"it must have one kernel, got {len(kernels)}{': ' + ', '.join(kernels)[:80] if kernels else ''}"
        )
    return kernels[0]


def _cubin(elf: Elf) -> Image:
    number = elf.flags >> 8 & 255 if elf.abi >= _NEWER_CUDA_ABI else elf.flags & 255
    launched = [s.name for s in elf.symbols(SYMBOLS) if s.kind == _FUNCTION and s.other & _CUDA_ENTRY]
    kernel = _only(launched)
    elf.one(f".text.{kernel}")
    parameters: dict[int, tuple[int, int]] = {}
    stated: dict[int, list[tuple[int, ...]]] = {each: [] for each in _FORMS}
    for attribute, value in _attributes(elf.content(elf.one(f".nv.info.{kernel}"), _MOST_DESCRIPTION)):
        if attribute == _PARAMETER:
            _, place, offset, packed = struct.unpack("<IHHI", value)
            if place in parameters:
                raise ImageError(f"it describes parameter {place} twice")
            if packed >> 12 & 63 != _IN_PARAMETER_BANK:
                raise ImageError(f"parameter {place} does not lie among the parameters")
            parameters[place] = offset, packed >> 18
        elif attribute in _FORMS:
            stated[attribute].append(struct.unpack(_FORMS[attribute], value))
    if [*sorted(parameters)] != [*range(len(parameters))]:
        raise ImageError("it does not describe each of its parameters")
    threads, blocks = stated[_THREADS], stated[_CLUSTER]
    if len(threads) != 1 or len(blocks) > 1:
        raise ImageError("it must state the threads of a block once, and the blocks of a cluster at most once")
    (across, *others), cluster = threads[0], blocks[0] if blocks else (1, 1, 1)
    if others != [1, 1] or cluster[1:] != (1, 1):
        raise ImageError(f"blocks and clusters must have one dimension, got {threads[0]} threads and {cluster} blocks")
    if len(stated[_PARAMETER_BANK]) != 1 or len(stated[_PARAMETER_BYTES]) != 1:
        raise ImageError("it must state once where its parameters lie, and once how many bytes they have")
    (symbol, before, size), (again,) = stated[_PARAMETER_BANK][0], stated[_PARAMETER_BYTES][0]
    bank = elf.one(f".nv.constant0.{kernel}")
    symbols = [*elf.symbols(SYMBOLS)]
    if sum(section.kind == SYMBOLS for section in elf.sections) != 1:
        raise ImageError("it must have one table of symbols")
    if symbol >= len(symbols) or symbols[symbol].name != bank.name or not size == again == bank.size - before:
        raise ImageError(f"its {size} bytes of parameters at {before} do not fill its constant memory of {bank.size}")
    if before > _MOST_BEFORE_PARAMETERS or bank.size > _CONSTANT_BYTES:
        raise ImageError(f"its parameters lie at {before} of {bank.size} bytes of constant memory")
    _check_layout([parameters[place] for place in range(len(parameters))], before, size)
    shared = sum(section.size for section in elf.sections if section.name == f".nv.shared.{kernel}")
    sizes = tuple(parameters[place][1] for place in range(len(parameters)))
    return Image(f"sm_{number}", kernel, sizes, across, cluster[0], shared)


_FORMS = {_THREADS: "<III", _CLUSTER: "<III", _PARAMETER_BANK: "<IHH", _PARAMETER_BYTES: "<H"}


def _check_layout(parameters: Sequence[tuple[int, int]], before: int, size: int) -> None:
    """Check that parameters, pairs of offset and size, follow one another: a driver copies each to its offset on the
    host. They begin ``before`` bytes into a block that is aligned for all, and have ``size`` bytes in all."""
    at = before
    for place, (offset, each) in enumerate(parameters):
        alignment = _MAP_ALIGNMENT if each == _MAP_BYTES else max(each, 1)
        at = -(-at // alignment) * alignment
        if offset != at - before:
            raise ImageError(f"its parameter {place} lies at {offset}, expected {at - before}")
        at += each
    if not 0 <= size - (at - before) < 8:
        raise ImageError(f"its parameters end at {at - before} of {size} bytes")


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


def _hsaco(elf: Elf) -> Image:
    architecture = _AMDGPU_ARCHITECTURES.get(elf.flags & 255, f"AMD machine {elf.flags & 255:#x}")
    described = [s for s in elf.symbols(DYNAMIC_SYMBOLS) if s.kind == _OBJECT and s.name.endswith(".kd")]
    kernel = _only([symbol.name.removesuffix(".kd") for symbol in described])
    (about,) = _fields(_note(elf), ("amdhsa.kernels", list))
    if len(about) != 1:
        raise ImageError(f"it must describe one kernel, got {len(about)}")
    name, arguments, threads, shared, private, size = _fields(
        about[0],
        (".name", str),
        (".args", list),
        (".max_flat_workgroup_size", int),
        (".group_segment_fixed_size", int),
        (".private_segment_fixed_size", int),
        (".kernarg_segment_size", int),
    )
    if name != kernel:
        raise ImageError(f"it must describe its kernel {kernel[:80]!r}, got {name[:80]!r}")
    descriptor = elf.value(described[0], "<III")
    if descriptor != (shared, private, size):
        raise ImageError(f"its description has {(shared, private, size)} bytes of memory, its kernel {descriptor}")
    parameters = [_fields(argument, (".offset", int), (".size", int)) for argument in arguments]
    _check_layout([(offset, each) for offset, each in parameters], 0, size)
    return Image(architecture, kernel, tuple(each for _, each in parameters), threads, 1, shared)


def _note(elf: Elf) -> Any:
    found = []
    for section in elf.sections:
        if section.kind != NOTE:
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
