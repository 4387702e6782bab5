"""The interface of a kernel variant (template, search space, refused configs, work), and what variants share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..gpu import Gpu, UnknownGpuError, find_gpu
from ..ops import DTYPE_BYTES
from ..spec import Config, KernelSpec

MIN_DOT = 16
"""The smallest tile side that ``tl.dot`` takes."""

MAX_ACCUMULATORS = 256
"""fp32 accumulators per thread before the compiler must spill (255 registers per thread on every listed CUDA GPU)."""

MAX_TMA_BOX = 256
"""The longest side of a tensor descriptor's tile (CUDA driver API, cuTensorMapEncodeTiled, boxDim)."""

TMA_ROW_BYTES = 16
"""Row strides of a tensor descriptor are multiples of this many bytes (cuTensorMapEncodeTiled, globalStrides)."""

WARPGROUP = 4
"""Warps that issue one warp-group product (wgmma) together on Hopper."""

BARRIER_BYTES = 1024
"""Bytes of shared memory reserved for barriers and for Triton's start of specialised warps."""

LIBRARY_TILE = (256, 128)
"""Rows and columns of the tile by which cuBLAS's L2 traffic is estimated: the largest tile of emitted kernels."""

LIBRARY_FP32_COLUMNS = 1024
"""Columns in one fp32 sum of cuBLAS; _library_product.j2 says why longer sums are split."""

LIBRARY_CONSTANTS = {"library_fp32_columns": LIBRARY_FP32_COLUMNS}
"""Constants of every template that includes _library_product.j2."""

FP32_PASSES = 3
"""Tensor core products for one product of fp32 operands (Triton's tf32x3)."""

ADAPTER_ELEMENTS, ADAPTER_COLS = 2048, 512
"""Elements of a tile of adapter_parts_kernel, and its columns at most."""

ADAPTER_CONSTANTS = {"adapter_elements": ADAPTER_ELEMENTS, "adapter_cols": ADAPTER_COLS}
"""Constants of every template that includes _adapter_parts.j2."""

MOST_REFILLED = 1.5
"""From this change of the programs on a multiprocessor on, a config that is carried to another shape is also tried with
tiles of another size."""

WARPS = (1, 2, 4, 8, 16)
STAGES = tuple(range(1, 9))


@dataclass(frozen=True)
class Work:
    """The work of one kernel launch of a variant, for the performance model.

    Attributes:
        kernel: the kernel's name in the emitted text.
        programs: the size of its grid.
        dram_bytes: bytes read from and written to device memory.
        l2_bytes: bytes that all programs load and store together.
        steps: the loop iterations of one program that wait for a load.
        matrix_flops: tensor-core operations, padding and extra passes included; 0 for an elementwise kernel.
        matrix_dtype: the dtype of those operations (a key of :attr:`~doratune.codegen.gpu.Gpu.matrix_flops`).
        vector_ops: instructions of single threads that decode W, where they are as many as to matter.
    """

    kernel: str
    programs: int
    dram_bytes: int
    l2_bytes: int
    steps: int
    matrix_flops: int = 0
    matrix_dtype: str = ""
    vector_ops: int = 0


@dataclass(frozen=True)
class LibraryCall:
    """One PyTorch operation of a variant's ``launch`` (a product by cuBLAS, a cast), for the performance model.

    Attributes:
        dram_bytes: bytes of the operands and the result.
        l2_bytes: bytes that the tiles of a product load and store together.
        matrix_flops: operations of a product, in ``matrix_dtype``; 0 for a cast or copy.
        matrix_dtype: the dtype of those operations (a key of :attr:`~doratune.codegen.gpu.Gpu.matrix_flops`).
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
    """Parameters that count something, such as tiles per program: any number from 1."""
    switches: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are 0 or 1. A parameter that is neither a count nor a switch is a power of two."""
    constants: ClassVar[Mapping[str, object]] = {}
    """Numbers that the template shares with ``work`` and ``refuse``: rendering passes them under these names."""
    interpreted: ClassVar[bool] = True
    """Whether Triton's interpreter can run the template; it cannot run Gluon."""
    descriptors: ClassVar[bool] = False
    """Whether the template addresses matrices by tensor descriptors: rows must start at multiples of 16 bytes."""
    packed: ClassVar[bool] = False
    """Whether the template is for a W in a weight format, and only for such."""
    library: ClassVar[bool] = False
    """Whether ``launch`` also calls cuBLAS through PyTorch: starting its Triton kernels alone does not repeat it."""

    @property
    def template(self) -> str:
        """The template's file name."""
        return f"{self.op}_{self.name}.py.j2"

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        """Return why this variant cannot run ``spec`` on ``gpu`` with any config, or None."""
        return format_unavailable(spec, self.packed)

    def default_order(self, spec: KernelSpec) -> int:
        """Return the rank of this variant as the built-in default for ``spec``; the lowest is tried first."""
        return 1

    @abstractmethod
    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        """Return the values to search for each tile parameter and for ``num_warps`` and ``num_stages``."""

    @abstractmethod
    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        """Return configs known to be good, to try first; the first one that fits is the default."""

    def carries(self, source: KernelSpec, spec: KernelSpec) -> bool:
        """Whether what did well for ``source`` says anything of ``spec``."""
        return True

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        """Return the values that suit ``spec`` of the parameters that are bound to the shape, the likeliest first.

        ``config`` did well for ``source`` on the same GPU or another one. Each mapping names some parameters; the
        others keep their values. An empty one is the config as it is.
        """
        return ({},)

    @abstractmethod
    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        """Return why ``config`` cannot work for ``spec`` on ``gpu``, judged without compiling, or None."""

    @abstractmethod
    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        """Return the work of each kernel that ``launch`` starts, in order, at the spec's token bucket."""

    def library_calls(self, spec: KernelSpec, config: Config) -> tuple[LibraryCall, ...]:
        """Return the PyTorch operations that ``launch`` calls beside its kernels, in order; none unless ``library``."""
        return ()


def ceil_div(value: int, by: int) -> int:
    """``value / by`` rounded up."""
    return -(-value // by)


def power_of_two(value: int) -> int:
    """The smallest power of two of at least ``value``."""
    return 1 << (value - 1).bit_length()


def up_to(values: tuple[int, ...], extent: int) -> tuple[int, ...]:
    """The tile sizes up to the first one that covers ``extent``; larger ones would only add padding."""
    covering = next((value for value in values if value >= extent), values[-1])
    return tuple(value for value in values if value <= covering)


def nearest(values: Sequence[int], wanted: float) -> int:
    """The value with the least ratio to ``wanted``, the smaller one of two; 0 only where there is no other."""
    return min(values, key=lambda value: (abs(math.log(value / wanted)) if value else math.inf, value))


def around(values: Sequence[int], wanted: float) -> tuple[int, ...]:
    """The values next to ``wanted``, the nearest first: one below or equal and one above."""
    below = max((value for value in values if value <= wanted), default=None)
    above = min((value for value in values if value > wanted), default=None)
    found = [value for value in (below, above) if value is not None]
    return tuple(sorted(found, key=lambda value: (abs(math.log(value / wanted)), value)))


def covering(values: Sequence[int], value: int, there: int, here: int) -> int:
    """The tile side for an extent of ``here``: the whole of it where ``value`` covered all of ``there``."""
    covers = (each for each in values if each >= here)
    return next(covers, values[-1]) if value >= there else nearest(values, value)


def split_for(
    split: int, tiles: tuple[int, int], inner: tuple[int, int], multiprocessors: tuple[int, int], values: Sequence[int]
) -> tuple[int, ...]:
    """The values of a ``split_k`` that fit another shape, the likeliest first. Each pair is (there, here).

    Two keep the number of programs a multiprocessor, one the length of a share. ``tiles`` are the tiles of the output,
    ``inner`` the length of the sum that is split.
    """
    filled = split * tiles[0] / multiprocessors[0] * multiprocessors[1] / tiles[1]
    return tuple(dict.fromkeys((*around(values, filled), nearest(values, split * inner[1] / inner[0]))))


def tiles_for(
    config: Config,
    source: KernelSpec,
    spec: KernelSpec,
    gpu: Gpu,
    choices: Mapping[str, tuple[int, ...]],
    sides: Mapping[str, str],
) -> tuple[Mapping[str, int], ...]:
    """The sizes of output tiles that fit another shape: as before, and twice or half as large.

    ``sides`` names the dim of each tile parameter. The other sizes are only tried where the number of programs on a
    multiprocessor would change by more than :data:`MOST_REFILLED`, and keep it.
    """

    def extent(of: KernelSpec, name: str) -> int:
        return int(getattr(of, sides[name]))

    same = {
        name: covering(choices[name], config[name], source.rank, spec.rank)
        if sides[name] == "rank"
        else nearest(choices[name], config[name])
        for name in sides
    }
    found = [same]
    before = math.prod(ceil_div(extent(source, name), config[name]) for name in sides)
    now = math.prod(ceil_div(extent(spec, name), same[name]) for name in sides)
    ratio = now / before * multiprocessors_of(source, gpu) / gpu.multiprocessors
    if not 1 / MOST_REFILLED < ratio < MOST_REFILLED:
        scale = 2.0 if ratio > 1 else 0.5
        found += [{**same, name: nearest(choices[name], scale * same[name])} for name in sides]
    return tuple(found)


def multiprocessors_of(spec: KernelSpec, otherwise: Gpu) -> int:
    """The multiprocessors of the spec's GPU, or of another one if it is not listed."""
    try:
        return find_gpu(spec.gpu).multiprocessors
    except UnknownGpuError:
        return otherwise.multiprocessors


def fit(value: int, extent: int, smallest: int = MIN_DOT) -> int:
    """``value`` halved while the half still covers ``extent``, down to ``smallest``."""
    while value > smallest and value // 2 >= extent:
        value //= 2
    return value


def adapter_parts(spec: KernelSpec) -> int:
    """The number of 16-bit parts of each adapter in a template with tensor descriptors (_adapter_parts.j2)."""
    return 2 if spec.adapter == "fp32" and not spec.autocast else 1


def adapter_parts_work(spec: KernelSpec, *shapes: tuple[int, int]) -> tuple[Work, ...]:
    """The launch that rounds or splits fp32 adapters of these (rows, columns); none for other adapters."""
    if spec.adapter != "fp32":
        return ()
    moved = sum(rows * cols for rows, cols in shapes) * (4 + 2 * adapter_parts(spec))
    tile_cols = min(power_of_two(min(cols for _, cols in shapes)), ADAPTER_COLS)
    tile_rows = ADAPTER_ELEMENTS // tile_cols
    programs = sum(ceil_div(rows, tile_rows) * ceil_div(cols, tile_cols) for rows, cols in shapes)
    return (Work("adapter_parts_kernel", programs=programs, dram_bytes=moved, l2_bytes=moved, steps=1),)


def format_unavailable(spec: KernelSpec, packed: bool) -> str | None:
    """Why a template for packed weights, or one for plain ones, cannot read W, or None."""
    if packed == (spec.format is not None):
        return None
    return f"the variant reads {'packed' if packed else 'plain'} weights, W is {spec.weight}"


def library_unavailable(gpu: Gpu) -> str | None:
    """Why variants that call cuBLAS cannot run on ``gpu``, or None."""
    if gpu.backend != "cuda":
        return f"{gpu.slug} is not a CUDA GPU: only cuBLAS gives fp32 results of 16-bit products"
    return None


def library_product(rows: int, cols: int, inner: int, dtype: str, shares: int = 1) -> LibraryCall:
    """A [rows, inner] x [inner, cols] product by cuBLAS with an fp32 result for each of ``shares`` shares of ``inner``.

    fp32 operands are multiplied with plain multiply-adds, not on tensor cores.
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
    """The calls for one such product: in fp32, one for each :data:`LIBRARY_FP32_COLUMNS` columns."""
    longest = LIBRARY_FP32_COLUMNS if dtype == "fp32" else inner
    return tuple(library_product(rows, cols, min(longest, inner - start), dtype) for start in range(0, inner, longest))


def dot_passes(left: str, right: str) -> tuple[str, int]:
    """The dtype of the products of these operand dtypes, and how many are needed for one (``dot`` in _macros.j2)."""
    if left == right:
        return left, FP32_PASSES if left == "fp32" else 1
    return (left if left != "fp32" else right), 2


def refuse_dot_tile(m: int, n: int, k: int, warps: int) -> str | None:
    """Why a ``tl.dot`` tile [m, k] x [k, n] on ``warps`` warps cannot work, or None."""
    if min(m, n, k) < MIN_DOT:
        return f"a {m}x{n}x{k} tile is smaller than tl.dot's minimum of {MIN_DOT}x{MIN_DOT}x{MIN_DOT}"
    per_thread = m * n // (warps * 32)
    if per_thread > MAX_ACCUMULATORS:
        return f"{per_thread} accumulators per thread ({m}x{n} on {warps} warps) do not fit the registers"
    return None


def refuse_shared_memory(stages: int, bytes_per_stage: int, gpu: Gpu) -> str | None:
    """Why a pipeline of ``stages`` buffers of ``bytes_per_stage`` bytes does not fit ``gpu``, or None.

    Triton needs one buffer less on some targets; counting all of them is safe on every target.
    """
    needed = stages * bytes_per_stage
    if needed > gpu.shared_bytes_per_block:
        limit = gpu.shared_bytes_per_block
        return f"{needed} bytes of shared memory for {stages} stages exceed {gpu.slug}'s {limit} per block"
    return None


def warp_specialization_unavailable(spec: KernelSpec, gpu: Gpu) -> str | None:
    """Why templates with specialised warps (Hopper only) cannot run ``spec`` on ``gpu``, or None."""
    if adapter_parts(spec) > 1:
        return "exact fp32 adapters need two passes over the ranks, which no warp-specialised template makes"
    if gpu.architecture != "sm_90":
        return f"{gpu.slug} ({gpu.architecture}) has no warp-group products (wgmma): only sm_90 has them"
    return None


def tma_unavailable(gpu: Gpu, dtypes: tuple[str, ...], row_lengths: tuple[int, ...]) -> str | None:
    """Why tensor descriptors cannot serve row-major operands of one of these row lengths on ``gpu``, or None."""
    if not gpu.has_tma:
        return f"{gpu.slug} ({gpu.architecture}) has no tensor memory accelerator"
    if len(set(dtypes)) > 1 or dtypes[0] == "fp32":
        return f"tensor descriptors need one 16-bit dtype for all operands, not {' with '.join(dict.fromkeys(dtypes))}"
    for length in row_lengths:
        if length * dtype_bytes(dtypes[0]) % TMA_ROW_BYTES:
            return (
                f"rows of {length} {dtypes[0]} values are not a multiple of {TMA_ROW_BYTES} bytes, which tensor "
                "descriptors need"
            )
    return None


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPE_BYTES[dtype]
