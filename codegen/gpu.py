"""The GPUs that kernels are made for: the limits of a kernel and the attainable rates.

The figures are listed in :mod:`.gpu_facts`; each names its source in :attr:`Gpu.sources`. Sizes are bytes (1 KiB = 1024
bytes).

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
from .gpu_facts import LIMIT_FIELDS, LIMIT_SOURCES, LIMITS, LISTED, Facts

KIB = 1024
MIB = 1024 * KIB

TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_120")
"""The listed architectures with a tensor memory accelerator (CUDA C++ Programming Guide, compute capability 9.0 up)."""

MATRIX_DTYPES = ("bf16", "fp16", "fp32", "fp32_vector")
"""The keys of :attr:`Gpu.matrix_flops`."""


class UnknownGpuError(UsageError):
    """This GPU or architecture is not listed; the message names those that are."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as one process sees it (for an MI250X that is one of its two dies).

    Attributes:
        slug: the name in specs and stores, ``h200`` or ``sm_90``.
        name: the name people use.
        driver_names: the names that the driver reports; empty for an architecture.
        architecture: ``sm_90``, ``gfx942``.
        backend: ``cuda`` or ``hip``, as Triton names it.
        warp_size: threads of a warp or wavefront.
        multiprocessors: enabled streaming multiprocessors or compute units.
        shared_bytes_per_block: the most shared memory (LDS) of one block, with opt-in.
        shared_bytes_per_multiprocessor: shared memory of one multiprocessor, shared by its blocks.
        registers_per_multiprocessor: 32-bit registers.
        max_registers_per_thread: 32-bit registers that one thread can address; for AMD with accumulation registers.
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
        """Attainable bytes per second: measured if known, else from the datasheet."""
        return self.measured_bytes_per_second or self.memory_bytes_per_second

    def attainable_flops(self, dtype: str) -> float:
        """Return the attainable FLOP/s of a matrix product in ``dtype``: measured if known, else from the datasheet.

        Raises:
            UsageError: ``dtype`` is not in :data:`MATRIX_DTYPES`.
        """
        if dtype not in self.matrix_flops:
            near = near_names(dtype, MATRIX_DTYPES)
            raise UsageError(f"{self.slug} has no rate for dtype {dtype!r}{near} (known: {', '.join(MATRIX_DTYPES)})")
        return self.measured_flops.get(dtype, self.matrix_flops[dtype])

    @property
    def has_tma(self) -> bool:
        """Whether the GPU has a tensor memory accelerator, which Triton's tensor descriptors use."""
        return self.architecture in TMA_ARCHITECTURES

    def floor_us(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """Return the least time, in µs, to move ``bytes_moved`` bytes while doing ``flops`` matrix FLOPs in ``dtype``.

        Raises:
            UsageError: ``dtype`` is not in :data:`MATRIX_DTYPES`.
        """
        return 1e6 * max(bytes_moved / self.attainable_bandwidth, flops / self.attainable_flops(dtype))

    def triton_target(self) -> Any:
        """Return Triton's ``GPUTarget``: the architecture is an integer for cuda (90), a string for hip ("gfx942")."""
        from triton.backends.compiler import GPUTarget

        arch = int(self.architecture.removeprefix("sm_")) if self.backend == "cuda" else self.architecture
        return GPUTarget(self.backend, arch, self.warp_size)


ARCHITECTURES = tuple(LIMITS)
"""The listed architectures; their names are valid wherever a GPU is named."""


def _listed(facts: Facts) -> Gpu:
    limits = LIMITS[facts.architecture]
    own = dict.fromkeys(("multiprocessors", "l2_bytes", "memory_bytes_per_second", "matrix_flops"), facts.source)
    return Gpu(
        slug=facts.slug,
        name=facts.name,
        driver_names=facts.driver_names,
        architecture=facts.architecture,
        backend=limits.backend,
        warp_size=limits.warp_size,
        multiprocessors=facts.multiprocessors,
        shared_bytes_per_block=limits.shared_block_kib * KIB,
        shared_bytes_per_multiprocessor=limits.shared_multiprocessor_kib * KIB,
        registers_per_multiprocessor=limits.registers,
        max_registers_per_thread=limits.registers_per_thread,
        max_threads_per_multiprocessor=limits.max_threads,
        l2_bytes=int(facts.l2_mib * MIB),
        memory_bytes_per_second=facts.memory_gb_s * 1e9,
        matrix_flops={dtype: rate * 1e12 for dtype, rate in zip(MATRIX_DTYPES, facts.tflops, strict=True)},
        sources={**LIMIT_SOURCES[limits.backend], **own, **facts.sources},
        measured_bytes_per_second=facts.measured_bytes_per_second,
        measured_flops=dict(facts.measured_flops),
    )


_LISTED = tuple(_listed(facts) for facts in LISTED)


def _generic(architecture: str) -> Gpu:
    """The GPU with the smallest figures of those listed for ``architecture``: what fits it fits each of them."""
    listed = [gpu for gpu in _LISTED if gpu.architecture == architecture]
    limits = LIMITS[architecture]
    figures = (*LIMIT_FIELDS, "multiprocessors", "l2_bytes", "memory_bytes_per_second")
    least = "the smallest of " + ", ".join(gpu.slug for gpu in listed)
    return Gpu(
        slug=architecture,
        name=f"any {architecture} GPU",
        driver_names=(),
        architecture=architecture,
        backend=limits.backend,
        **{name: min(getattr(gpu, name) for gpu in listed) for name in figures},
        matrix_flops={dtype: min(gpu.matrix_flops[dtype] for gpu in listed) for dtype in MATRIX_DTYPES},
        sources={**dict.fromkeys(figures, least), "matrix_flops": least, **LIMIT_SOURCES[limits.backend]},
    )


_GENERIC = tuple(_generic(architecture) for architecture in ARCHITECTURES)


def _key(name: str) -> str:
    """``name`` in lower case, without spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", name.lower())


_BY_NAME = {_key(gpu.slug): gpu for gpu in (*_LISTED, *_GENERIC)}
# Older drivers leave the vendor's name out ("A100-SXM4-80GB").
_BY_DRIVER_NAME = {_key(name).removeprefix("nvidia"): gpu for gpu in _LISTED for name in gpu.driver_names}


def known_gpus() -> tuple[Gpu, ...]:
    """Return the listed GPUs in order of architecture; :func:`find_gpu` returns the generic ones."""
    return _LISTED


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a slug (``h200``, ``RTX 4090``) or the generic GPU of an architecture (``sm_90``).

    Case, spaces, underscores and hyphens do not matter; ``sm_90a`` is ``sm_90``.

    Raises:
        UnknownGpuError: no GPU of this name is listed.
    """
    key = re.sub(r"^(sm[0-9]+)[af]$", r"\1", _key(str(name)))
    if key in _BY_NAME:
        return _BY_NAME[key]
    slugs = [gpu.slug for gpu in _LISTED]
    # "h100" is spelled like "h200", but means one of the two H100s.
    models = [slug for slug in slugs if key and slug.startswith(f"{key}-")]
    near = f"; did you mean {', '.join(models)}?" if models else near_names(str(name), [*slugs, *ARCHITECTURES])
    raise UnknownGpuError(
        f"unknown GPU {str(name)!r}{near or '.'} Listed GPUs: {', '.join(slugs)}. "
        f"For another GPU name its architecture: {', '.join(ARCHITECTURES)}"
    )


def gpu_of_device(device_name: str, architecture: str, multiprocessors: int | None = None) -> Gpu:
    """Return the listed GPU with a driver's device name, else the generic GPU of its architecture.

    Args:
        device_name: what the driver reports, "NVIDIA H100 80GB HBM3".
        architecture: ``sm_90``, ``gfx942``; features such as ``gfx942:sramecc+:xnack-`` are ignored.
        multiprocessors: the number that the device reports, if known. A partition of a listed GPU has fewer than the
            whole and is not that GPU.

    Raises:
        UnknownGpuError: the architecture is not listed.
    """
    base = architecture.split(":")[0]
    gpu = _BY_DRIVER_NAME.get(_key(device_name).removeprefix("nvidia"))
    if gpu and _key(gpu.architecture) == _key(base) and multiprocessors in (None, gpu.multiprocessors):
        return gpu
    if base not in ARCHITECTURES:
        raise UnknownGpuError(
            f"{device_name} has the architecture {base}, which is not listed (supported: {', '.join(ARCHITECTURES)})"
        )
    return find_gpu(base)
