"""What the launch metadata of a kernel must say, from its emitted text alone: nothing is compiled for it.

Triton's host code believes the metadata of a compiled kernel: it makes tensor maps of the block sizes that it finds
there, in arrays of five places, allocates scratch memory of the sizes, and starts as many threads as it is told. So
for a binary that comes out of a store all that the host code computes with is derived here, exactly. What only the
compiler's later stages know has bounds: the dynamic shared memory, and the tensor memory of sm_100. The driver sets
them aside for the kernel. With too little shared memory a kernel fails or errs on the GPU; no host code runs into it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..internals.triton import descriptor_flags
from .compile import DESCRIPTOR, extra_warps, signature_of
from .gpu import find_gpu
from .ops import DTYPE_BYTES
from .render import Source
from .variants.base import MAX_TMA_BOX

_SWIZZLES = {128: 3, 64: 2, 32: 1, 0: 0}
"""Triton's number of a swizzle by the bytes of a line: the widest one that divides a row of the tile."""
_SWIZZLED_ROWS = 8
"""A tile of fewer rows has no swizzle."""
_TMA_DTYPES = {"bf16": 10, "fp16": 6}
"""A tensor map's element types, as Triton numbers them."""
_TMA_MAP_BYTES = 128
_SCALAR_BYTES = DTYPE_BYTES | {"fp64": 8, "i32": 4, "i64": 8}
_TENSOR_MEMORY = (0, 32, 64, 128, 256, 512)
"""Columns of tensor memory that a kernel can allocate (PTX ISA, tcgen05.alloc)."""
_WARP_GROUP = 4
"""The compiler rounds the warps of a kernel with several tasks up to a multiple of this."""
_SCRATCH_POINTERS = 2
"""Triton appends pointers to a kernel's global and profiling scratch memory to its parameters."""


@dataclass(frozen=True)
class LaunchFacts:
    """The facts of one kernel beside Triton's options: those known, and the whole numbers that the others may be.

    ``parameters`` are the bytes of each parameter of the machine code, ``threads`` those of a block.
    """

    exact: Mapping[str, object]
    bounds: Mapping[str, Collection[int]]
    parameters: tuple[int, ...]
    threads: int


def launch_facts(source: Source, kernel: str, target: Any, options: Mapping[str, Any]) -> LaunchFacts:
    """Derive the facts of ``kernel`` for a ``GPUTarget``, compiled with Triton's ``options``."""
    signature = signature_of(source, kernel)
    cuda = target.backend == "cuda"
    warps = total_warps(options["num_warps"], extra_warps(source, kernel))
    scratch = ("global", "profile") if cuda else ("profile",)
    exact: dict[str, object] = {"name": kernel, "num_warps": warps, "tensordesc_meta": tensor_maps(signature)}
    exact |= {f"{kind}_scratch_size": 0 for kind in scratch} | {f"{kind}_scratch_align": 1 for kind in scratch}
    most = find_gpu(source.spec.gpu).shared_bytes_per_block
    bounds: dict[str, Collection[int]] = {"shared": range(least_shared_bytes(signature), most + 1)}
    if cuda and target.arch // 10 in (10, 11):
        bounds["tmem_size"] = _TENSOR_MEMORY
    elif cuda:
        exact["tmem_size"] = 0
    return LaunchFacts(exact, bounds, parameter_bytes(signature), warps * options["warp_size"])


def total_warps(first: int, extra: tuple[int, ...]) -> int:
    """The warps that a kernel is started with, of which ``first`` begin and ``extra`` do the other tasks."""
    return -(-(first + sum(extra)) // _WARP_GROUP) * _WARP_GROUP if extra else first


def tensor_maps(signature: Mapping[str, str]) -> list[dict[str, object]]:
    """What Triton's driver is told of each descriptor among a kernel's parameters, to make its tensor maps.

    A row of a tile is loaded in swizzled lines of up to 128 bytes, and the box of a map is one line wide: so do the
    compilers of Triton 3.6 and 3.7 lay out what a descriptor loads.
    """
    maps: list[dict[str, object]] = []
    for dtype, rows, columns in _tiles(signature):
        width = DTYPE_BYTES[dtype]
        line = next(line for line in _SWIZZLES if not line or (columns * width % line == 0 and rows >= _SWIZZLED_ROWS))
        box = [min(rows, MAX_TMA_BOX), line // width if line else min(columns, MAX_TMA_BOX)]
        facts: dict[str, object] = {"elem_size": width, "elem_type": _TMA_DTYPES[dtype], "swizzle": _SWIZZLES[line]}
        maps.append({**facts, "block_size": box, "fp4_padded": False, **descriptor_flags()})
    return maps


def least_shared_bytes(signature: Mapping[str, str]) -> int:
    """The bytes of the largest tile of a descriptor: the tensor memory accelerator moves tiles through shared memory.

    The compiler takes more, for stages and barriers.
    """
    return max((rows * columns * DTYPE_BYTES[dtype] for dtype, rows, columns in _tiles(signature)), default=0)


def _tiles(signature: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """The dtype, rows and columns of the tile of each descriptor."""
    for match in filter(None, map(DESCRIPTOR.fullmatch, signature.values())):
        yield match[1], int(match[2]), int(match[3])


def parameter_bytes(signature: Mapping[str, str]) -> tuple[int, ...]:
    """The bytes of each parameter of the machine code: a descriptor is its map, its shape and its strides."""
    sizes: list[int] = []
    for type_ in signature.values():
        if DESCRIPTOR.fullmatch(type_):
            sizes += [_TMA_MAP_BYTES, 4, 4, 8, 8]
        elif type_.startswith("*"):
            sizes.append(8)
        else:
            sizes.append(_SCALAR_BYTES[type_])
    return (*sizes, *[8] * _SCRATCH_POINTERS)
