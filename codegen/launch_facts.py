"""Derive the launch metadata of a kernel from its emitted text, without compiling it.

Triton's host code trusts the metadata of a compiled kernel: the block sizes of tensor maps (written into arrays of five
elements), the sizes of scratch memory and the number of threads. So for a binary from a store, every fact that the host
code uses is derived here exactly. Facts that only the compiler's later stages know have bounds: the dynamic shared
memory, and the tensor memory of sm_100. The driver reserves both for the kernel. With too little shared memory a kernel
fails or miscomputes on the GPU, but no host code is affected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..internals.triton import descriptor_flags, scratch_memories
from .compile import DESCRIPTOR, block_of, extra_warps, signature_of
from .gpu import find_gpu
from .ops import DTYPE_BYTES
from .render import Source
from .variants.base import MAX_TMA_BOX

_SWIZZLES = {128: 3, 64: 2, 32: 1, 0: 0}
"""Triton's number of a swizzle by the bytes of its line. A tile has the widest line that divides its row."""
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
    """The launch facts of one kernel that are not Triton's options.

    ``exact`` has the derived values, ``bounds`` the allowed integers of the others. ``parameters`` are the bytes of
    each parameter of the machine code, and ``threads`` is the number of threads of a block.
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
    scratch = scratch_memories(target.backend)
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
    """The warps of a kernel: ``first`` for its main task and ``extra`` for other tasks; with others, rounded up."""
    return -(-(first + sum(extra)) // _WARP_GROUP) * _WARP_GROUP if extra else first


def tensor_maps(signature: Mapping[str, str]) -> list[dict[str, object]]:
    """The facts from which Triton's driver makes the tensor map of each descriptor among a kernel's parameters.

    The compilers of Triton 3.6 and 3.7 load a row of a tile in swizzled lines of up to 128 bytes, and the box of a map
    is one line wide.
    """
    maps: list[dict[str, object]] = []
    for dtype, ones, rows, columns in _tiles(signature):
        width = DTYPE_BYTES[dtype]
        line = next(line for line in _SWIZZLES if not line or (columns * width % line == 0 and rows >= _SWIZZLED_ROWS))
        box = [*ones, min(rows, MAX_TMA_BOX), line // width if line else min(columns, MAX_TMA_BOX)]
        facts: dict[str, object] = {"elem_size": width, "elem_type": _TMA_DTYPES[dtype], "swizzle": _SWIZZLES[line]}
        maps.append({**facts, "block_size": box, "fp4_padded": False, **descriptor_flags()})
    return maps


def least_shared_bytes(signature: Mapping[str, str]) -> int:
    """A lower bound of the shared memory: the bytes of the largest tile of a descriptor.

    The tensor memory accelerator moves tiles through shared memory. Stages and barriers need more.
    """
    return max((rows * columns * DTYPE_BYTES[dtype] for dtype, _, rows, columns in _tiles(signature)), default=0)


def _tiles(signature: Mapping[str, str]) -> Iterator[tuple[str, list[int], int, int]]:
    """The dtype, leading ones, rows and columns of the tile of each descriptor."""
    for match in filter(None, map(DESCRIPTOR.fullmatch, signature.values())):
        *ones, rows, columns = block_of(match)
        yield match[1], ones, rows, columns


def parameter_bytes(signature: Mapping[str, str]) -> tuple[int, ...]:
    """The bytes of each parameter of the machine code. A descriptor is passed as its map, shape and strides."""
    sizes: list[int] = []
    for type_ in signature.values():
        if match := DESCRIPTOR.fullmatch(type_):
            rank = len(block_of(match))
            sizes += [_TMA_MAP_BYTES, *[4] * rank, *[8] * rank]
        elif type_.startswith("*"):
            sizes.append(8)
        else:
            sizes.append(_SCALAR_BYTES[type_])
    return (*sizes, *[8] * _SCRATCH_POINTERS)
