"""What every kernel variant tells: its template, its search space, what it refuses, and the work it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..gpu import Gpu
from ..ops import DTYPE_BYTES
from ..spec import Config, KernelSpec

MIN_DOT = 16
"""The smallest tile side that ``tl.dot`` takes."""

MAX_ACCUMULATORS = 256
"""fp32 accumulators a thread may hold before the compiler must spill (255 registers a thread on every listed GPU)."""

MAX_TMA_BOX = 256
"""The longest side of a tile a tensor descriptor can describe (CUDA driver API, cuTensorMapEncodeTiled, boxDim)."""

TMA_ROW_BYTES = 16
"""Row strides of a tensor descriptor are multiples of this many bytes (cuTensorMapEncodeTiled, globalStrides)."""

WARPGROUP = 4
"""Warps that issue one Hopper warp-group product together."""

BARRIER_BYTES = 1024
"""Shared memory set aside for barriers and for what Triton needs to start specialised warps."""

LIBRARY_TILE = (256, 128)
"""The tile by which the library's traffic in the L2 is counted: as large as those of emitted kernels get."""

LIBRARY_FP32_COLUMNS = 1024
"""Columns in one fp32 sum of the library; the template says the same, and why."""

FP32_PASSES = 3
"""Tensor core products that make one of fp32 operands (Triton's tf32x3)."""

ADAPTER_TILE = 2048
"""Elements of a tile of adapter_parts_kernel."""

WARPS = (1, 2, 4, 8, 16)
STAGES = tuple(range(1, 9))


@dataclass(frozen=True)
class Work:
    """What one kernel launch of a variant does, for the performance model.

    ``programs`` is the size of its grid; ``matrix_flops`` the tensor-core work including padding and extra passes, in
    ``matrix_dtype``; ``dram_bytes`` what must come from or go to device memory, ``l2_bytes`` all that the programs load
    and store; ``steps`` how often one program waits for a load that depends on nothing but the loop count.
    """

    kernel: str
    programs: int
    dram_bytes: int
    l2_bytes: int
    steps: int
    matrix_flops: int = 0
    matrix_dtype: str = ""


@dataclass(frozen=True)
class LibraryCall:
    """One call of a variant into PyTorch's library, such as a matrix product, for the performance model.

    ``dram_bytes`` are those of the operands and the result, ``l2_bytes`` what its tiles load and store,
    ``matrix_flops`` the work, in ``matrix_dtype``.
    """

    dram_bytes: int
    l2_bytes: int = 0
    matrix_flops: int = 0
    matrix_dtype: str = ""


class Variant(ABC):
    """One algorithm for an operation: one template, ``templates/<op>_<name>.py.j2``."""

    op: ClassVar[str]
    name: ClassVar[str]
    counts: ClassVar[frozenset[str]] = frozenset()
    """Parameters that count something, such as tiles a program: any number from 1."""
    switches: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are 0 or 1. All that are neither counts nor switches are powers of two."""
    interpreted: ClassVar[bool] = True
    """Whether Triton's interpreter can run the template; it does not know Gluon."""
    descriptors: ClassVar[bool] = False
    """Whether the template addresses matrices by tensor descriptors: rows must begin at multiples of 16 bytes."""
    library: ClassVar[bool] = False
    """Whether ``launch`` also calls PyTorch's library: then the kernels that it starts are not all that it does, and to
    start them again is not to launch again."""

    @property
    def template(self) -> str:
        """The template's file name."""
        return f"{self.op}_{self.name}.py.j2"

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        """Why this variant cannot run ``spec`` on ``gpu`` at all, or None."""
        return None

    def default_order(self, spec: KernelSpec) -> int:
        """The place of this variant among those that may give the built-in default; the lowest is tried first."""
        return 1

    @abstractmethod
    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        """The values worth trying for each tile parameter and for ``num_warps`` and ``num_stages``."""

    @abstractmethod
    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Known-good configs to try first; the first one is the default."""

    @abstractmethod
    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        """Why ``config`` cannot work for ``spec`` on ``gpu`` (judged without compiling), or None."""

    @abstractmethod
    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        """The launches of this variant's kernels, in order."""

    def library_calls(self, spec: KernelSpec, config: Config) -> tuple[LibraryCall, ...]:
        """The calls into PyTorch's library beside them, in order; none unless ``library``."""
        return ()


def ceil_div(value: int, by: int) -> int:
    """``value / by`` rounded up."""
    return -(-value // by)


def up_to(values: tuple[int, ...], extent: int) -> tuple[int, ...]:
    """The values whose tile is not more than padding: up to the first one that covers ``extent``."""
    covering = next((value for value in values if value >= extent), values[-1])
    return tuple(value for value in values if value <= covering)


def fit(value: int, extent: int, smallest: int = MIN_DOT) -> int:
    """``value`` halved while the half still covers ``extent``, down to ``smallest``."""
    while value > smallest and value // 2 >= extent:
        value //= 2
    return value


def adapter_parts(spec: KernelSpec) -> int:
    """The 16-bit parts in which a template with tensor descriptors takes each adapter (see _adapter_parts.j2)."""
    return 2 if spec.adapter == "fp32" and not spec.autocast else 1


def adapter_parts_work(spec: KernelSpec, elements: int) -> tuple[Work, ...]:
    """The launch that rounds or splits ``elements`` of fp32 adapters, where they are fp32."""
    if spec.adapter != "fp32":
        return ()
    moved = elements * (4 + 2 * adapter_parts(spec))
    programs = ceil_div(elements, ADAPTER_TILE)
    return (Work("adapter_parts_kernel", programs=programs, dram_bytes=moved, l2_bytes=moved, steps=1),)


def library_unavailable(gpu: Gpu) -> str | None:
    """Why variants that call the library cannot run on ``gpu``, or None."""
    if gpu.backend != "cuda":
        return f"{gpu.slug} is no CUDA GPU: fp32 results of 16-bit products are cuBLAS's"
    return None


def library_product(rows: int, cols: int, inner: int, dtype: str, shares: int = 1) -> LibraryCall:
    """A [rows, inner] x [inner, cols] product by the library, its fp32 result in ``shares`` shares of the inner sum.

    fp32 operands are multiplied as they are, by plain multiply-adds.
    """
    width, written = dtype_bytes(dtype), shares * rows * cols * 4
    block_rows, block_cols = LIBRARY_TILE if rows >= cols else LIBRARY_TILE[::-1]
    tiles = ceil_div(rows, block_rows) * ceil_div(cols, block_cols)
    return LibraryCall(
        dram_bytes=(rows + cols) * inner * width + written,
        l2_bytes=tiles * (min(rows, block_rows) + min(cols, block_cols)) * inner * width + written,
        matrix_flops=2 * rows * cols * inner,
        matrix_dtype="fp32_vector" if dtype == "fp32" else dtype,
    )


def library_products(rows: int, cols: int, inner: int, dtype: str) -> tuple[LibraryCall, ...]:
    """The calls that make one such product: in fp32 it is added up from parts of :data:`LIBRARY_FP32_COLUMNS`."""
    calls = ceil_div(inner, LIBRARY_FP32_COLUMNS) if dtype == "fp32" else 1
    return (library_product(rows, cols, ceil_div(inner, calls), dtype),) * calls


def dot_passes(left: str, right: str) -> tuple[str, int]:
    """The dtype in which a product of these operand dtypes runs, and how many products make one (see _macros.j2)."""
    if left == right:
        return left, FP32_PASSES if left == "fp32" else 1
    return (left if left != "fp32" else right), 2


def refuse_dot_tile(m: int, n: int, k: int, warps: int) -> str | None:
    """Why a ``tl.dot`` tile [m, k] x [k, n] on ``warps`` warps cannot work, or None."""
    if min(m, n, k) < MIN_DOT:
        return f"a {m}x{n}x{k} product is below tl.dot's {MIN_DOT}x{MIN_DOT}x{MIN_DOT}"
    per_thread = m * n // (warps * 32)
    if per_thread > MAX_ACCUMULATORS:
        return f"{per_thread} accumulators a thread ({m}x{n} on {warps} warps) do not fit the registers"
    return None


def refuse_shared_memory(stages: int, bytes_per_stage: int, gpu: Gpu) -> str | None:
    """Why a pipeline of ``stages`` buffers of ``bytes_per_stage`` bytes does not fit ``gpu``, or None.

    Triton makes do with one buffer less on some targets; counting them all means that what passes here does fit.
    """
    needed = stages * bytes_per_stage
    if needed > gpu.shared_bytes_per_block:
        limit = gpu.shared_bytes_per_block
        return f"{needed} bytes of shared memory for {stages} stages exceed {gpu.slug}'s {limit} a block"
    return None


def warp_specialization_unavailable(spec: KernelSpec, gpu: Gpu) -> str | None:
    """Why templates with specialised warps cannot run ``spec`` on ``gpu``, or None: they issue Hopper's products."""
    if adapter_parts(spec) > 1:
        return "fp32 adapters that are kept exact need two passes over the ranks, for which there is no such template"
    if gpu.architecture != "sm_90":
        return f"{gpu.slug} ({gpu.architecture}) has no warp-group products (wgmma): they are sm_90's"
    return None


def tma_unavailable(gpu: Gpu, dtypes: tuple[str, ...], row_lengths: tuple[int, ...]) -> str | None:
    """Why tensor descriptors cannot serve row-major operands of one of these row lengths on ``gpu``, or None."""
    if not gpu.has_tma:
        return f"{gpu.slug} ({gpu.architecture}) has no tensor memory accelerator"
    if len(set(dtypes)) > 1 or dtypes[0] == "fp32":
        return f"tensor descriptors feed products of one 16-bit dtype, not {' with '.join(dict.fromkeys(dtypes))}"
    for length in row_lengths:
        if length * dtype_bytes(dtypes[0]) % TMA_ROW_BYTES:
            return (
                f"rows of {length} {dtypes[0]} are not a multiple of {TMA_ROW_BYTES} bytes, as tensor descriptors need"
            )
    return None


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPE_BYTES[dtype]
