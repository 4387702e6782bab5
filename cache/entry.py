"""What a store keeps: an :class:`Entry`, the winner for a spec, with its :class:`Evaluation` and :class:`Environment`.

These are plain values: no database code, so the tuner and the runtime can share them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from ..codegen.digest import code_digest
from ..codegen.spec import Config, KernelSpec

MEASURED = "measured"
PREDICTED = "predicted"
DEFAULT = "default"

BELOW_FLOOR = 0.5
"""A time below this share of its floor is wrong. Real ones go down to 0.96: floors rest on attainable rates."""


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

    def beats(self, floor_us: float | None) -> bool:
        """Whether the time is impossible: below :data:`BELOW_FLOOR` of the floor."""
        return self.us is not None and floor_us is not None and self.us < BELOW_FLOOR * floor_us

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


SEARCH = "search"
"""The origin of a config that the search found; see :class:`Contender`."""


@dataclass(frozen=True)
class Contender:
    """A config that played in a final.

    ``origins`` say why: ``search`` (among the best that were found), and for incumbents the step of the lookup that
    gives it (``exact``, ``nearest``, ``architecture``, ``default``). ``samples_us`` are microseconds of GPU time of
    one call, one for each round; sample i of every contender comes from round i.
    """

    config: Config
    origins: tuple[str, ...]
    samples_us: tuple[float, ...]

    @property
    def us(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples_us)

    @property
    def incumbent(self) -> bool:
        """Whether a lookup gave this config before the search."""
        return any(origin != SEARCH for origin in self.origins)


@dataclass(frozen=True)
class Final:
    """The best configs of a search and the incumbents, timed in turn in one process.

    ``contenders`` begin with the winner; the others follow by their medians. ``confidence`` is the probability, by
    resampling the rounds, that no other contender is faster than the winner by more than ``noise`` (a share of its
    time: differences below it count as ties, which go to the incumbent). ``settled``: the order held before the
    budget of rounds ended. ``notices`` tell what disturbed it, such as clocks that moved.
    """

    contenders: tuple[Contender, ...]
    confidence: float
    noise: float
    settled: bool
    notices: tuple[str, ...] = ()

    @property
    def winner(self) -> Contender:
        return self.contenders[0]

    @property
    def beaten(self) -> tuple[Contender, ...]:
        """The contenders that did not win, the fastest first."""
        return self.contenders[1:]

    @property
    def margin(self) -> float:
        """How much longer the fastest of the beaten takes, as a share of the winner's time; negative if it is faster
        within the noise, 0 if the winner played alone."""
        return self.beaten[0].us / self.winner.us - 1.0 if self.beaten else 0.0


@dataclass(frozen=True)
class Entry:
    """The winner for a spec: the config, what it is valid for, and how it was found.

    ``template_digest`` ties the config to the template text it was tuned with; ``source`` is the emitted text, kept
    for reading only (what runs is rendered again and must have ``source_digest``). ``created_at`` is ISO 8601 UTC.
    ``final`` is the final that the config won, None where there was none. ``lookup_regret`` is the measured time of
    the config that a lookup without this entry gives, over the winner's time; None if it was not timed.
    """

    spec: KernelSpec
    config: Config
    template_digest: str
    source_digest: str
    source: str
    evaluation: Evaluation
    environment: Environment
    created_at: str = ""
    final: Final | None = None
    lookup_regret: float | None = None

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


class Signature(NamedTuple):
    """The signature of one row: the row's digest, the fingerprint of the key, and the 64 bytes (:mod:`.signing`)."""

    digest: str
    key: str
    signature: bytes
