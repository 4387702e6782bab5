"""``doratune cache verify --model``: prove that the stores have every kernel that a model can launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..codegen.gpu import find_gpu
from ..codegen.spec import KernelSpec
from .needs import needs_of
from .reachable import Reach, reachable_specs


@dataclass(frozen=True)
class Missing:
    """A kernel that the stores do not have, and why."""

    spec: KernelSpec
    reason: str


@dataclass(frozen=True)
class Certificate:
    """Of a model's ``kernels`` the ``missing`` ones; with ``no_jit`` those without a binary."""

    model: str
    gpu: str
    no_jit: bool
    kernels: int
    missing: tuple[Missing, ...]

    @property
    def complete(self) -> bool:
        return not self.missing


def verify_model(
    reach: Reach, *, store: str | None = None, trusted: Sequence[str] = (), no_jit: bool = False
) -> Certificate:
    """Look up every kernel that a model can launch.

    Without ``no_jit`` a kernel is missing if no store has an entry of exactly its spec, with it if no store has a
    binary that the installed Triton starts: then it would be compiled.

    Raises:
        UsageError, ModelConfigError: as ``reachable_specs``.
        StoreError: a store cannot be read.
    """
    name, specs = reachable_specs(reach)
    kernels = 0
    missing: list[Missing] = []
    for need in needs_of(specs, store, trusted):
        kernels += 1
        reason = need.why_compiled if no_jit else need.why_no_entry
        if reason is not None:
            missing.append(Missing(need.spec, reason))
    return Certificate(name, find_gpu(reach.gpu).slug, no_jit, kernels, tuple(missing))
