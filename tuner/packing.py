"""The binaries of tuned kernels: made by the compile workers, then stored beside their entries."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future

from ..cache.entry import Binary, Entry, Environment
from ..cache.store import Store
from ..codegen.module import declared_kernels
from ..codegen.render import render
from ..codegen.spec import KernelSpec
from .evaluation import BROKEN
from .progress import SilentProgress
from .workers import CompilePool


class Packing:
    """The binaries that are being made for ``store``, for the GPU and the Triton of ``environment``."""

    def __init__(self, store: Store, pool: CompilePool, environment: Environment, progress: SilentProgress) -> None:
        self._store, self._pool, self._environment, self._progress = store, pool, environment, progress
        self._made: dict[str, tuple[KernelSpec, Future[tuple[Binary, ...]]]] = {}
        """By code digest: kernels of equal code share their binaries."""

    @property
    def under_way(self) -> Collection[Future[tuple[Binary, ...]]]:
        return [future for _, future in self._made.values()]

    def start(self, entry: Entry | None) -> bool:
        """Make the binaries of an entry unless the store has them; return whether they are being made."""
        if entry is None:
            return False
        source = render(entry.spec, entry.config)
        digest = source.code_digest
        if digest in self._made or digest != entry.code_digest:
            return digest in self._made
        triton, architecture = self._environment.triton, self._environment.architecture
        stored = {key.kernel for key in self._store.binary_keys(digest, triton, architecture)}
        if not stored.issuperset(declared_kernels(source)):
            self._made[digest] = (entry.spec, self._pool.binaries(source))
        return digest in self._made

    def store_made(self) -> Exception | None:
        """Store the binaries that are made by now; return the failure after which nothing compiles here, or None.

        Any other failure costs only its own binary: whoever loads that kernel compiles it.
        """
        broken: Exception | None = None
        for digest, (spec, future) in [*self._made.items()]:
            if not future.done():
                continue
            del self._made[digest]
            error = future.exception()
            if isinstance(error, BROKEN):
                broken = error
            elif error is not None:
                self._progress.note(f"no binary of {spec}: {error}")
            else:
                for binary in future.result():
                    self._store.put_binary(binary)
        return broken
