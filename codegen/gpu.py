"""The GPUs that kernels are made for: limits that a kernel must respect and ceilings it can be held against.

Every figure names its source in :attr:`Gpu.sources`. Rates are **dense** datasheet figures with fp32 accumulation;
vendors print the twice larger 2:4-sparse ones beside them. Sizes are bytes (1 KiB = 1024 bytes).

A GPU is named by a slug (``h200``) or, where the exact model is unknown or not listed, by its architecture
(``sm_90``), which stands for the smallest listed GPU of that architecture::

    >>> find_gpu("H200").shared_bytes_per_block
    232448
    >>> find_gpu("sm_90").multiprocessors <= find_gpu("h200").multiprocessors
    True
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, near_names

KIB = 1024
MIB = 1024 * KIB

TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_120")
"""The listed architectures with a tensor memory accelerator (CUDA C++ Programming Guide, compute capability 9.0 up)."""

MATRIX_DTYPES = ("bf16", "fp16", "fp32", "fp32_vector")
"""The keys of :attr:`Gpu.matrix_flops`."""


class UnknownGpuError(UsageError):
    """No facts are listed for this GPU or architecture; the message names those that are."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as one process sees it (for an MI250X that is one of its two dies).

    Attributes:
        slug: the name in specs and stores, ``h200`` or ``sm_90``.
        name: the name people use.
        driver_names: the names its driver reports; empty for an architecture.
        architecture: ``sm_90``, ``gfx942``.
        backend: ``cuda`` or ``hip``, Triton's word.
        warp_size: threads of a warp or wavefront.
        multiprocessors: streaming multiprocessors or compute units that are switched on.
        shared_bytes_per_block: the most shared memory (LDS) one block can have, with opt-in.
        shared_bytes_per_multiprocessor: shared memory that the blocks of one multiprocessor divide among them.
        registers_per_multiprocessor: 32-bit registers.
        max_registers_per_thread: 32-bit registers one thread can address; AMD's count includes accumulation registers.
        max_threads_per_multiprocessor: resident threads.
        l2_bytes: the L2 cache over the whole device.
        memory_bytes_per_second: datasheet bandwidth of the device memory, read and write together.
        matrix_flops: dense datasheet FLOP/s by :data:`MATRIX_DTYPES`. ``fp32`` is **one** product on the fastest matrix
            unit that takes fp32 operands (TF32 tensor cores, XF32 on CDNA 3, full fp32 on CDNA 2); a kernel that splits
            its operands for full precision does several. ``fp32_vector`` is plain fused multiply-add.
        measured_bytes_per_second: copy bandwidth measured, read and write together, or None.
        measured_flops: FLOP/s measured on a large matrix product, by dtype.
        sources: where each of the figures above is from.
    """

    slug: str
    name: str
    driver_names: tuple[str, ...]
    architecture: str
    backend: str
    warp_size: int
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    registers_per_multiprocessor: int
    max_registers_per_thread: int
    max_threads_per_multiprocessor: int
    l2_bytes: int
    memory_bytes_per_second: float
    matrix_flops: Mapping[str, float] = field(hash=False)
    sources: Mapping[str, str] = field(hash=False, repr=False)
    measured_bytes_per_second: float | None = None
    measured_flops: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def attainable_bandwidth(self) -> float:
        """Bytes per second a kernel can hope for: measured where known, else the datasheet's."""
        return self.measured_bytes_per_second or self.memory_bytes_per_second

    def attainable_flops(self, dtype: str) -> float:
        """FLOP/s a matrix product in ``dtype`` can hope for: measured where known, else the datasheet's.

        Raises:
            UsageError: ``dtype`` is none of :data:`MATRIX_DTYPES`.
        """
        if dtype not in self.matrix_flops:
            near = near_names(dtype, MATRIX_DTYPES)
            raise UsageError(f"{self.slug} has no rate for dtype {dtype!r}{near} (known: {', '.join(MATRIX_DTYPES)})")
        return self.measured_flops.get(dtype, self.matrix_flops[dtype])

    @property
    def has_tma(self) -> bool:
        """Whether the GPU has the tensor memory accelerator, for which Triton has tensor descriptors."""
        return self.architecture in TMA_ARCHITECTURES

    def floor_us(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """The least time in µs to move ``bytes_moved`` bytes and, meanwhile, do ``flops`` matrix FLOPs in ``dtype``.

        Raises:
            UsageError: ``dtype`` is none of :data:`MATRIX_DTYPES`.
        """
        return 1e6 * max(bytes_moved / self.attainable_bandwidth, flops / self.attainable_flops(dtype))

    def triton_target(self) -> Any:
        """Triton's ``GPUTarget``: the architecture is an integer for cuda (90), a string for hip ("gfx942")."""
        from triton.backends.compiler import GPUTarget

        arch = int(self.architecture.removeprefix("sm_")) if self.backend == "cuda" else self.architecture
        return GPUTarget(self.backend, arch, self.warp_size)


_CUDA_GUIDE = "CUDA C++ Programming Guide, technical specifications per compute capability"
_ROCM_SPECS = "ROCm documentation, AMD GPU hardware specifications"
_CDNA_ISA = "AMD Instinct CDNA instruction set architecture guide"

_ARCHITECTURE_FIELDS = (
    "warp_size",
    "shared_bytes_per_block",
    "shared_bytes_per_multiprocessor",
    "registers_per_multiprocessor",
    "max_registers_per_thread",
    "max_threads_per_multiprocessor",
)


@dataclass(frozen=True)
class _Limits:
    """What all GPUs of one architecture have in common; the defaults hold for every listed cuda architecture."""

    shared_block_kib: int
    shared_multiprocessor_kib: int
    max_threads: int
    backend: str = "cuda"
    warp_size: int = 32
    registers: int = 65536
    registers_per_thread: int = 255

    @property
    def sources(self) -> dict[str, str]:
        if self.backend == "cuda":
            return dict.fromkeys(_ARCHITECTURE_FIELDS, _CUDA_GUIDE)
        return {
            **dict.fromkeys(_ARCHITECTURE_FIELDS, _ROCM_SPECS),
            "registers_per_multiprocessor": f"{_ROCM_SPECS}: VGPR file of 512 KiB a compute unit",
            "max_registers_per_thread": f"{_CDNA_ISA}: 256 vector and 256 accumulation registers",
            "max_threads_per_multiprocessor": f"{_CDNA_ISA}: 4 SIMDs of 8 waves of 64",
        }


_CDNA = _Limits(64, 64, 2048, backend="hip", warp_size=64, registers=131072, registers_per_thread=512)

_LIMITS = {
    "sm_80": _Limits(163, 164, 2048),
    "sm_86": _Limits(99, 100, 1536),
    "sm_89": _Limits(99, 100, 1536),
    "sm_90": _Limits(227, 228, 2048),
    "sm_100": _Limits(227, 228, 2048),
    "sm_120": _Limits(99, 100, 1536),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}

ARCHITECTURES = tuple(_LIMITS)
"""The architectures with listed facts; their names are valid wherever a GPU is named."""


def _gpu(
    slug: str,
    name: str,
    architecture: str,
    *,
    driver_names: tuple[str, ...],
    multiprocessors: int,
    l2_mib: float,
    memory_gb_s: float,
    tflops: tuple[float, float, float, float],
    source: str,
    sources: Mapping[str, str] | None = None,
    measured_bytes_per_second: float | None = None,
    measured_flops: Mapping[str, float] | None = None,
) -> Gpu:
    """A listed GPU: ``tflops`` in the order of :data:`MATRIX_DTYPES`, ``source`` for what ``sources`` does not name."""
    limits = _LIMITS[architecture]
    own = dict.fromkeys(("multiprocessors", "l2_bytes", "memory_bytes_per_second", "matrix_flops"), source)
    return Gpu(
        slug=slug,
        name=name,
        driver_names=driver_names,
        architecture=architecture,
        backend=limits.backend,
        warp_size=limits.warp_size,
        multiprocessors=multiprocessors,
        shared_bytes_per_block=limits.shared_block_kib * KIB,
        shared_bytes_per_multiprocessor=limits.shared_multiprocessor_kib * KIB,
        registers_per_multiprocessor=limits.registers,
        max_registers_per_thread=limits.registers_per_thread,
        max_threads_per_multiprocessor=limits.max_threads,
        l2_bytes=int(l2_mib * MIB),
        memory_bytes_per_second=memory_gb_s * 1e9,
        matrix_flops={dtype: rate * 1e12 for dtype, rate in zip(MATRIX_DTYPES, tflops, strict=True)},
        sources={**limits.sources, **own, **(sources or {})},
        measured_bytes_per_second=measured_bytes_per_second,
        measured_flops=dict(measured_flops or {}),
    )


_A100_PAPER = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet"
_H100_PAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet (its sparse rates halved)"
_RTX_PRO_PAPER = "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper"

_LISTED = (
    _gpu(
        "a100",
        "NVIDIA A100 80GB SXM",
        "sm_80",
        driver_names=("NVIDIA A100-SXM4-80GB",),
        multiprocessors=108,
        l2_mib=40,
        memory_gb_s=2039,
        tflops=(312, 312, 156, 19.5),
        source=_A100_PAPER,
        sources={"memory_bytes_per_second": _A100_SHEET, "matrix_flops": _A100_SHEET},
    ),
    _gpu(
        "a100-pcie",
        "NVIDIA A100 80GB PCIe",
        "sm_80",
        driver_names=("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"),
        multiprocessors=108,
        l2_mib=40,
        memory_gb_s=1935,
        tflops=(312, 312, 156, 19.5),
        source=_A100_PAPER,
        sources={"memory_bytes_per_second": _A100_SHEET, "matrix_flops": _A100_SHEET},
    ),
    _gpu(
        "a100-40gb",
        "NVIDIA A100 40GB (SXM and PCIe)",
        "sm_80",
        driver_names=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        multiprocessors=108,
        l2_mib=40,
        memory_gb_s=1555,
        tflops=(312, 312, 156, 19.5),
        source=_A100_PAPER,
    ),
    _gpu(
        "a10g",
        "NVIDIA A10G",
        "sm_86",
        driver_names=("NVIDIA A10G",),
        multiprocessors=80,
        l2_mib=6,
        memory_gb_s=600,
        tflops=(70, 70, 35, 31.5),
        source="NVIDIA A10G datasheet",
        sources={"l2_bytes": "NVIDIA Ampere GA102 GPU Architecture whitepaper (the full chip's 6 MB)"},
    ),
    _gpu(
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        "sm_86",
        driver_names=("NVIDIA GeForce RTX 3090",),
        multiprocessors=82,
        l2_mib=6,
        memory_gb_s=936,
        tflops=(71, 71, 35.6, 35.6),
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper (fp32 accumulation)",
    ),
    _gpu(
        "l4",
        "NVIDIA L4",
        "sm_89",
        driver_names=("NVIDIA L4",),
        multiprocessors=58,
        l2_mib=48,
        memory_gb_s=300,
        tflops=(121, 121, 60, 30.3),
        source="NVIDIA L4 datasheet (its sparse rates halved)",
        sources={
            "multiprocessors": "NVIDIA Ada GPU Architecture whitepaper",
            "l2_bytes": "NVIDIA Ada GPU Architecture whitepaper",
        },
    ),
    _gpu(
        "l40s",
        "NVIDIA L40S",
        "sm_89",
        driver_names=("NVIDIA L40S",),
        multiprocessors=142,
        l2_mib=96,
        memory_gb_s=864,
        tflops=(362.05, 362.05, 183, 91.6),
        source="NVIDIA L40S datasheet",
        sources={
            "multiprocessors": "NVIDIA Ada GPU Architecture whitepaper (18176 CUDA cores, 128 each)",
            "l2_bytes": "NVIDIA Ada GPU Architecture whitepaper (AD102)",
        },
    ),
    _gpu(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        "sm_89",
        driver_names=("NVIDIA GeForce RTX 4090",),
        multiprocessors=128,
        l2_mib=72,
        memory_gb_s=1008,
        tflops=(165.2, 165.2, 82.6, 82.6),
        source="NVIDIA Ada GPU Architecture whitepaper (fp32 accumulation)",
    ),
    _gpu(
        "h100-sxm",
        "NVIDIA H100 80GB SXM",
        "sm_90",
        driver_names=("NVIDIA H100 80GB HBM3",),
        multiprocessors=132,
        l2_mib=50,
        memory_gb_s=3350,
        tflops=(989.4, 989.4, 494.7, 66.9),
        source=_H100_PAPER,
        sources={"memory_bytes_per_second": _H100_SHEET},
    ),
    _gpu(
        "h100-pcie",
        "NVIDIA H100 80GB PCIe",
        "sm_90",
        driver_names=("NVIDIA H100 PCIe",),
        multiprocessors=114,
        l2_mib=50,
        memory_gb_s=2039,
        tflops=(756, 756, 378, 51.2),
        source=_H100_PAPER,
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        "sm_90",
        driver_names=("NVIDIA H200",),
        multiprocessors=132,
        l2_mib=60,
        memory_gb_s=4800,
        tflops=(989.4, 989.4, 494.7, 66.9),
        source="NVIDIA H200 datasheet (its sparse rates halved)",
        sources={
            "multiprocessors": "reported by the CUDA driver 580 on one H200",
            "l2_bytes": "reported by the CUDA driver 580 on one H200",
            "measured_bytes_per_second": "device copy on one H200, read and write, 2026-11",
            "measured_flops": "8192x8192x8192 bf16 matrix products on one H200, 745 to 790 TFLOP/s, 2026-11",
        },
        measured_bytes_per_second=4.27e12,
        measured_flops={"bf16": 780e12},
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        "sm_100",
        driver_names=("NVIDIA B200",),
        multiprocessors=148,
        l2_mib=126.5,
        memory_gb_s=8000,
        tflops=(2250, 2250, 1125, 75),
        source="NVIDIA HGX B200 datasheet (an eighth of the board; its sparse rates halved)",
        sources={
            "multiprocessors": "reported by the CUDA driver on a B200",
            "l2_bytes": "reported by the CUDA driver on a B200; Blackwell Tuning Guide: 126 MB",
            "memory_bytes_per_second": "NVIDIA DGX B200 datasheet (64 TB/s for eight)",
        },
    ),
    _gpu(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        "sm_120",
        driver_names=("NVIDIA GeForce RTX 5090",),
        multiprocessors=170,
        l2_mib=96,
        memory_gb_s=1792,
        tflops=(209.5, 209.5, 104.8, 104.8),
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper (fp32 accumulation)",
    ),
    _gpu(
        "rtxpro6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "sm_120",
        driver_names=("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",),
        multiprocessors=188,
        l2_mib=128,
        memory_gb_s=1792,
        tflops=(503.8, 503.8, 251.9, 126),
        source=_RTX_PRO_PAPER,
    ),
    _gpu(
        "mi210",
        "AMD Instinct MI210",
        "gfx90a",
        driver_names=("AMD Instinct MI210",),
        multiprocessors=104,
        l2_mib=8,
        memory_gb_s=1638,
        tflops=(181, 181, 45.3, 22.6),
        source="AMD Instinct MI210 datasheet (fp32 is the full fp32 matrix rate)",
        sources={"l2_bytes": _ROCM_SPECS},
    ),
    _gpu(
        "mi250x",
        "AMD Instinct MI250X (one of its two dies)",
        "gfx90a",
        driver_names=("AMD Instinct MI250X",),
        multiprocessors=110,
        l2_mib=8,
        memory_gb_s=1638,
        tflops=(191.5, 191.5, 47.85, 23.95),
        source="AMD Instinct MI250X datasheet, halved: a device is one die (fp32 is the full fp32 matrix rate)",
        sources={"l2_bytes": _ROCM_SPECS},
    ),
    _gpu(
        "mi300x",
        "AMD Instinct MI300X",
        "gfx942",
        driver_names=("AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF"),
        multiprocessors=304,
        l2_mib=32,
        memory_gb_s=5300,
        tflops=(1307.4, 1307.4, 653.7, 163.4),
        source="AMD Instinct MI300X datasheet",
        sources={"l2_bytes": f"{_ROCM_SPECS}: 4 MiB on each of 8 dies; a 256 MiB Infinity Cache lies behind them"},
    ),
)


def _generic(architecture: str) -> Gpu:
    """The smallest figures among the listed GPUs of ``architecture``: a kernel that fits these fits each of them."""
    listed = [gpu for gpu in _LISTED if gpu.architecture == architecture]
    limits = _LIMITS[architecture]
    figures = (*_ARCHITECTURE_FIELDS, "multiprocessors", "l2_bytes", "memory_bytes_per_second")
    least = "the smallest of " + ", ".join(gpu.slug for gpu in listed)
    return Gpu(
        slug=architecture,
        name=f"any {architecture} GPU",
        driver_names=(),
        architecture=architecture,
        backend=limits.backend,
        **{name: min(getattr(gpu, name) for gpu in listed) for name in figures},
        matrix_flops={dtype: min(gpu.matrix_flops[dtype] for gpu in listed) for dtype in MATRIX_DTYPES},
        sources={**dict.fromkeys(figures, least), "matrix_flops": least, **limits.sources},
    )


_GENERIC = tuple(_generic(architecture) for architecture in ARCHITECTURES)


def _key(name: str) -> str:
    """``name`` without what people write differently: case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", name.lower())


_BY_NAME = {_key(gpu.slug): gpu for gpu in (*_LISTED, *_GENERIC)}
# Older drivers leave the vendor's name out ("A100-SXM4-80GB").
_BY_DRIVER_NAME = {_key(name).removeprefix("nvidia"): gpu for gpu in _LISTED for name in gpu.driver_names}


def known_gpus() -> tuple[Gpu, ...]:
    """The listed GPUs, ordered by architecture; the generic ones are found by :func:`find_gpu`."""
    return _LISTED


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a slug (``h200``, ``RTX 4090``) or the generic GPU of an architecture (``sm_90``).

    Case, spaces, underscores and hyphens do not matter; ``sm_90a`` is ``sm_90``.

    Raises:
        UnknownGpuError: nothing is listed under this name.
    """
    key = re.sub(r"^(sm[0-9]+)[af]$", r"\1", _key(str(name)))
    if key in _BY_NAME:
        return _BY_NAME[key]
    slugs = [gpu.slug for gpu in _LISTED]
    # "h100" is near "h200" in spelling, but its user means one of the two H100s.
    models = [slug for slug in slugs if key and slug.startswith(f"{key}-")]
    near = f"; did you mean {', '.join(models)}?" if models else near_names(str(name), [*slugs, *ARCHITECTURES])
    raise UnknownGpuError(
        f"unknown GPU {str(name)!r}{near or '.'} Listed GPUs: {', '.join(slugs)}. "
        f"For another GPU name its architecture: {', '.join(ARCHITECTURES)}"
    )


def gpu_of_device(device_name: str, architecture: str, multiprocessors: int | None = None) -> Gpu:
    """Return the listed GPU behind a driver's device name, else the generic GPU of its architecture.

    Args:
        device_name: what the driver reports, "NVIDIA H100 80GB HBM3".
        architecture: ``sm_90``, ``gfx942``; features such as ``gfx942:sramecc+:xnack-`` are ignored.
        multiprocessors: how many the device reports, when known. A partition of a listed GPU has fewer than the whole
            and is not that GPU.

    Raises:
        UnknownGpuError: no facts are listed for the architecture.
    """
    base = architecture.split(":")[0]
    gpu = _BY_DRIVER_NAME.get(_key(device_name).removeprefix("nvidia"))
    if gpu and _key(gpu.architecture) == _key(base) and multiprocessors in (None, gpu.multiprocessors):
        return gpu
    if base not in ARCHITECTURES:
        raise UnknownGpuError(
            f"{device_name} has the architecture {base}, for which no facts are listed "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    return find_gpu(base)
