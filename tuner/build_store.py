"""``doratune cache build``: a store with every kernel that a model can launch, and all of their binaries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..cache.entry import Binary
from ..cache.signing import SigningKey
from ..cache.store import Store
from ..codegen.gpu import find_gpu
from ..codegen.spec import KernelSpec
from ..errors import DoratuneError
from .evaluation import BROKEN
from .needs import Need, needs_of
from .reachable import Reach, reachable_specs
from .workers import CompilePool

_NAMED = 5


class IncompleteBuildError(DoratuneError):
    """A kernel of the model cannot be compiled for the GPU, so no store was written."""


@dataclass(frozen=True)
class Build:
    """A finished build: ``kernels`` are the specs in the store, ``compiled`` and ``copied`` the binaries by origin.

    ``steps`` counts the kernels by the step of the lookup that gave their config. ``bytes`` is the file's size.
    """

    model: str
    gpu: str
    path: str
    kernels: int
    steps: dict[str, int]
    compiled: int
    copied: int
    bytes: int

    @property
    def binaries(self) -> int:
        return self.compiled + self.copied


Tell = Callable[[int, int], None]
"""Called with the number of finished kernels and of all."""


def build_store(
    reach: Reach,
    output: str | Path,
    *,
    store: str | None = None,
    trusted: Sequence[str] = (),
    replace: bool = False,
    jobs: int | None = None,
    sign: SigningKey | None = None,
    tell: Tell = lambda done, total: None,
) -> Build:
    """Write a store to ``output`` that starts every kernel of a model without a compile, on a machine without others.

    Each kernel has the config that a lookup takes here. Binaries that the stores have are copied; the others are
    compiled for the installed Triton, in ``jobs`` processes.

    Raises:
        UsageError, ModelConfigError: as ``reachable_specs``.
        StoreAccessError: the file exists and ``replace`` is not given, or it cannot be written.
        IncompleteBuildError: a kernel does not compile.
        StoreError: a store cannot be read.
    """
    target = Store.check_export(output, replace=replace)  # before minutes of work
    name, specs = reachable_specs(reach)
    needs = [*needs_of(specs, store, trusted)]
    made = _compile({need.source.code_digest: need for need in needs if need.why_compiled is not None}, jobs, tell)
    copied = {id(binary): binary for need in needs for binary in need.binaries.kernels.values()}
    unique = {(binary.code_digest, binary.kernel): binary for binary in copied.values()}
    with scratch_store() as fresh:
        fresh.put_all(need.entry for need in needs)
        for binary in (*unique.values(), *made):
            fresh.put_binary(binary)
        fresh.export(output, replace=replace, sign=sign)
    steps: dict[str, int] = {}
    for need in needs:
        steps[need.resolution.step] = steps.get(need.resolution.step, 0) + 1
    size = 0 if target.path is None else target.path.stat().st_size
    return Build(name, find_gpu(reach.gpu).slug, str(target), len(needs), steps, len(made), len(unique), size)


@contextmanager
def scratch_store() -> Iterator[Store]:
    """A new store in a folder that is removed after the block: what is to be exported is collected there."""
    with tempfile.TemporaryDirectory(prefix="doratune-") as folder, Store.open(Path(folder, "s"), create=True) as fresh:
        yield fresh


def _compile(missing: dict[str, Need], jobs: int | None, tell: Tell) -> list[Binary]:
    """The binaries of these sources, by code digest.

    Raises:
        IncompleteBuildError: one does not compile; the message names the first ones.
        BrokenToolchainError: nothing compiles here.
    """
    if not missing:
        return []
    gpu = find_gpu(next(iter(missing.values())).spec.gpu)
    pool = CompilePool(gpu, jobs)
    failed: dict[KernelSpec, Exception] = {}
    made: list[Binary] = []
    try:
        longest_first = sorted(missing.values(), key=lambda need: -len(need.source.text))
        waiting: dict[Future[tuple[Binary, ...]], Need] = {pool.binaries(n.source): n for n in longest_first}
        while waiting:
            pool.wait([*waiting])
            for future in [future for future in waiting if future.done()]:
                need = waiting.pop(future)
                error = future.exception()
                if isinstance(error, BROKEN):
                    raise error
                if isinstance(error, Exception):
                    failed[need.spec] = error
                elif error is None:
                    made += future.result()
                tell(len(missing) - len(waiting), len(missing))
    finally:
        pool.close()
    if failed:
        named = "; ".join(f"{spec}: {' '.join(str(error).split())[:200]}" for spec, error in [*failed.items()][:_NAMED])
        raise IncompleteBuildError(
            f"{len(failed)} of {len(missing)} kernels do not compile for {gpu.slug}, so no store is written: {named}"
        )
    return made
