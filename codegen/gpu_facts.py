"""The figures of each listed GPU and architecture, with their sources: plain values, from which :mod:`.gpu` is made.

Rates are **dense** datasheet figures with fp32 accumulation; vendors also print 2:4-sparse ones, twice as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_CUDA_GUIDE = "CUDA C++ Programming Guide, technical specifications per compute capability"
_ROCM_SPECS = "ROCm documentation, AMD GPU hardware specifications"
_CDNA_ISA = "AMD Instinct CDNA instruction set architecture guide"


@dataclass(frozen=True)
class Limits:
    """What all GPUs of one architecture have in common; the defaults hold for every listed cuda architecture.

    Attributes:
        shared_block_kib: the most shared memory (LDS) of one block, with opt-in, in KiB.
        shared_multiprocessor_kib: shared memory of one multiprocessor, in KiB.
        max_threads: resident threads of one multiprocessor.
        backend: ``cuda`` or ``hip``, as Triton names it.
        warp_size: threads of a warp or wavefront.
        registers: 32-bit registers of one multiprocessor.
        registers_per_thread: 32-bit registers that one thread can address.
    """

    shared_block_kib: int
    shared_multiprocessor_kib: int
    max_threads: int
    backend: str = "cuda"
    warp_size: int = 32
    registers: int = 65536
    registers_per_thread: int = 255


_CDNA = Limits(64, 64, 2048, backend="hip", warp_size=64, registers=131072, registers_per_thread=512)

LIMITS = {
    "sm_80": Limits(163, 164, 2048),
    "sm_86": Limits(99, 100, 1536),
    "sm_89": Limits(99, 100, 1536),
    "sm_90": Limits(227, 228, 2048),
    "sm_100": Limits(227, 228, 2048),
    "sm_120": Limits(99, 100, 1536),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}
"""The limits of each architecture, from the technical specifications in :data:`LIMIT_SOURCES`."""

LIMIT_FIELDS = (
    "warp_size",
    "shared_bytes_per_block",
    "shared_bytes_per_multiprocessor",
    "registers_per_multiprocessor",
    "max_registers_per_thread",
    "max_threads_per_multiprocessor",
)
"""The fields of :class:`~doratune.codegen.gpu.Gpu` that follow from the architecture."""

LIMIT_SOURCES: dict[str, dict[str, str]] = {
    "cuda": dict.fromkeys(LIMIT_FIELDS, _CUDA_GUIDE),
    "hip": {
        **dict.fromkeys(LIMIT_FIELDS, _ROCM_SPECS),
        "registers_per_multiprocessor": f"{_ROCM_SPECS}: VGPR file of 512 KiB a compute unit",
        "max_registers_per_thread": f"{_CDNA_ISA}: 256 vector and 256 accumulation registers",
        "max_threads_per_multiprocessor": f"{_CDNA_ISA}: 4 SIMDs of 8 waves of 64",
    },
}
"""Where the limits are from, by backend and field."""


@dataclass(frozen=True)
class Facts:
    """The figures of one listed GPU.

    Attributes:
        slug, name, architecture, driver_names, multiprocessors: as in :class:`~doratune.codegen.gpu.Gpu`.
        l2_mib: the L2 cache in MiB.
        memory_gb_s: datasheet bandwidth of the device memory in GB/s.
        tflops: dense datasheet TFLOP/s in bf16, fp16, fp32 (the fastest matrix unit) and fp32 (plain multiply-add).
        source: where the figures are from that ``sources`` does not name.
        sources: where single figures are from, by field of ``Gpu``.
        measured_bytes_per_second: measured copy bandwidth, read and write together.
        measured_flops: FLOP/s of a large matrix product, by dtype.
    """

    slug: str
    name: str
    architecture: str
    driver_names: tuple[str, ...]
    multiprocessors: int
    l2_mib: float
    memory_gb_s: float
    tflops: tuple[float, float, float, float]
    source: str
    sources: Mapping[str, str] = field(default_factory=dict)
    measured_bytes_per_second: float | None = None
    measured_flops: Mapping[str, float] = field(default_factory=dict)


_A100_PAPER = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet"
_H100_PAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet (its sparse rates halved)"
_RTX_PRO_PAPER = "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper"

LISTED = (
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
    Facts(
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
