"""What a store keeps: an :class:`Entry`, the winner for a spec, with its :class:`Evaluation` and :class:`Environment`.

These are plain values: no database code, so the tuner and the runtime can share them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..codegen.digest import code_digest
from ..codegen.spec import Config, KernelSpec

MEASURED = "measured"
PREDICTED = "predicted"
DEFAULT = "default"


@dataclass(frozen=True)
class Evaluation:
    """The time, error and resources of a kernel, and how they were obtained.

    ``provenance`` is ``measured`` (timed on ``Environment.gpu_name``), ``predicted`` (compiled and modelled) or
    ``default`` (never tuned). Times are microseconds of GPU time; ``us`` is the median of the replays ``samples_us``.
    ``error`` is the worst relative error against fp64 seen by the accuracy gate, None when not measured. ``registers``
    are per thread, ``spills`` and ``shared_bytes`` in bytes, each the largest over the variant's kernels. ``trials``
    counts the configurations that the search evaluated. ``unfused_us`` is the time of a fused kernel's unfused
    sequence, measured in turn with the kernel; None if not measured or not fused.
    """

    provenance: str
    us: float | None = None
    floor_us: float | None = None
    samples_us: tuple[float, ...] = ()
    error: float | None = None
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    trials: int = 0
    unfused_us: float | None = None

    @property
    def fusion_pays(self) -> bool:
        """Whether the kernel was measured to be faster than its unfused sequence."""
        return self.us is not None and self.unfused_us is not None and self.us < self.unfused_us


@dataclass(frozen=True)
class Environment:
    """Where an evaluation comes from. ``gpu_name`` is the driver's name for a measured GPU, else empty."""

    gpu: str
    architecture: str
    triton: str
    torch: str = ""
    driver: str = ""
    gpu_name: str = ""
    doratune: str = ""


@dataclass(frozen=True)
class Entry:
    """The winner for a spec: the config, what it is valid for, and how it was found.

    ``template_digest`` ties the config to the template text it was tuned with; ``source`` is the emitted text, kept
    for reading only (what runs is rendered again and must have ``source_digest``). ``created_at`` is ISO 8601 UTC.
    """

    spec: KernelSpec
    config: Config
    template_digest: str
    source_digest: str
    source: str
    evaluation: Evaluation
    environment: Environment
    created_at: str = ""

    @property
    def code_digest(self) -> str:
        """The digest that is the key of this entry's binaries."""
        return code_digest(self.source)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: valid only for this Triton version, architecture and code.

    ``code_digest`` is that of the emitted code (:func:`~doratune.codegen.digest.code_digest`), not of the whole text:
    the token buckets of one shape share their code, and so their binaries. ``metadata`` is Triton's own JSON metadata
    of the kernel with what doratune adds to it (:mod:`doratune.codegen.binary`). ``image`` is the cubin or hsaco:
    machine code for the GPU, never Python.
    """

    code_digest: str
    kernel: str
    triton: str
    architecture: str
    metadata: str = field(repr=False)
    image: bytes = field(repr=False)


class BinaryKey(NamedTuple):
    """The key of a binary in a store."""

    code_digest: str
    kernel: str
    triton: str
    architecture: str
