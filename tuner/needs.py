"""What kernels need to start without a compile: for each spec the config that a lookup takes, and its binaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..cache.entry import DEFAULT, Entry, Environment, Evaluation
from ..cache.lookup import Resolution
from ..codegen.gpu import find_gpu
from ..codegen.render import Source, template_digest
from ..codegen.spec import KernelSpec
from ..runtime.binaries import Binaries
from ..runtime.loader import resolve_binaries, stores_open

EXACT = "exact"


@dataclass(frozen=True)
class Need:
    """One kernel: what a lookup gives for its spec, the source that this renders to, and its stored binaries."""

    resolution: Resolution
    source: Source
    binaries: Binaries

    @property
    def spec(self) -> KernelSpec:
        return self.source.spec

    @property
    def entry(self) -> Entry:
        """The entry of exactly this spec; where there is none, one of provenance ``default`` with the config of the
        lookup, so that a store with it gives the same kernel anywhere."""
        found = self.resolution.entry
        if self.resolution.step == EXACT and found is not None:
            return found
        from triton import __version__ as triton

        from .. import __version__

        gpu, config = find_gpu(self.spec.gpu), self.source.config
        return Entry(
            spec=self.spec,
            config=config,
            template_digest=template_digest(self.spec.op, config.variant),
            source_digest=self.source.digest,
            source=self.source.text,
            evaluation=Evaluation(DEFAULT),
            environment=Environment(gpu=gpu.slug, architecture=gpu.architecture, triton=triton, doratune=__version__),
        )

    @property
    def why_no_entry(self) -> str | None:
        """Why no store has an entry of exactly this spec, or None where one has."""
        step = self.resolution.step
        return None if step == EXACT else f"no store has an entry of it: a lookup takes the step {step}"

    @property
    def why_compiled(self) -> str | None:
        """Why this kernel would be compiled here, or None where a store has its binaries."""
        return None if self.binaries.kernels else self.binaries.note


def needs_of(specs: Iterable[KernelSpec], store: str | None = None, trusted: Sequence[str] = ()) -> Iterator[Need]:
    """Look ``specs`` up in the stores, one after another; ``store`` is asked first, as in a lookup.

    ``trusted``: the stores and keys whose binaries are used, too (:mod:`doratune.cache.trust`).

    A fused kernel whose fusion does not pay is left out: it never starts.

    Raises:
        StoreError: a store cannot be read.
    """
    with stores_open():
        for spec in specs:
            resolution, source, binaries = resolve_binaries(spec, store, trusted)
            if spec.op != "dora_linear_forward" or resolution.fusion_pays:
                yield Need(resolution, source, binaries)
