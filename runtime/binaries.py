"""Find the stored binaries of a kernel that is about to be loaded, so that nothing needs to be compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..internals.triton import warn_once, why_compile
from .binding import warn_of_compile

if TYPE_CHECKING:
    from ..cache.entry import Binary
    from ..cache.store import Store
    from ..codegen.gpu import Gpu
    from ..codegen.render import Source

_UNTRUSTED = "its binaries are not used: it is neither the chosen entry's store, your own store nor a prebuilt one"


@dataclass(frozen=True)
class Binaries:
    """The stored binaries of a source, for contiguous operands.

    Attributes:
        kernels: one binary for each kernel of the source, by name; empty if no store has usable ones.
        store: the location of their store.
        note: the Triton and GPU they were made for, or why there are none.
        damaged: one message for each store whose binaries match but are damaged.
        passed_over: the stores whose binaries were not used, each with the reason.
    """

    kernels: Mapping[str, Binary] = field(default_factory=dict, repr=False)
    store: str | None = None
    note: str = ""
    damaged: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def explain(self) -> str:
        """A phrase that names the store of the binary, and the stores that were passed over with the reasons."""
        if self.kernels:
            taken = f"in {self.store}, {self.note}: contiguous operands need no compile"
            return "; ".join((taken, *(f"passed over {reason}" for reason in self.passed_over)))
        return f"compiled at the first call: {self.note}"

    def warn(self) -> None:
        """Warn about damaged binaries. Their kernels are compiled instead and give the same results."""
        for problem in self.damaged:
            warn_of_compile(problem)


def find_binaries(source: Source, stack: Sequence[Store], gpu: Gpu, trusted: Set[str | None]) -> Binaries:
    """Find the binaries of every kernel of ``source`` for the installed Triton and this GPU.

    The result comes from the first store at a ``trusted`` location that has valid binaries of all kernels. Other stores
    are passed over, and the result says why. That is no error, because kernels without binaries are compiled.
    """
    from ..cache.errors import StoreError
    from ..codegen.binary import BinaryError, OtherSettingsError

    try:
        from triton import __version__ as version
    except ImportError:
        return Binaries(note="Triton is not installed here")
    reason = why_compile()
    if reason is not None:
        return Binaries(note=reason)
    wanted = f"Triton {version} on {gpu.architecture}"
    passed_over: list[str] = []
    damaged: list[str] = []
    for store in stack:
        try:
            key = (source.code_digest, version, gpu.architecture)
            if store.location not in trusted:
                if store.binary_keys(*key):
                    passed_over.append(f"{store.location}: {_UNTRUSTED}")
                continue
            found = {binary.kernel: binary for binary in store.binaries(*key)}
            if not found:
                continue
            _check_all(source, found, gpu)
        except OtherSettingsError as problem:
            passed_over.append(f"{store.location}: {problem}")
        except (BinaryError, StoreError) as problem:
            text = str(problem)
            damaged.append(text if store.location in text else f"{store.location}: {text}")
            passed_over.append(damaged[-1])
        except Exception as problem:  # Triton cannot be asked what a binary must be
            warn_once("starting stored binaries", "kernels are compiled", problem)
            return Binaries(note=str(problem), damaged=tuple(damaged), passed_over=tuple(passed_over))
        else:
            return Binaries(found, store.location, f"for {wanted}", tuple(damaged), tuple(passed_over))
    note = "; ".join(passed_over) or f"no store has a binary for {wanted}"
    return Binaries(note=note, damaged=tuple(damaged), passed_over=tuple(passed_over))


def _check_all(source: Source, found: Mapping[str, Binary], gpu: Gpu) -> None:
    """Check that a store has one valid binary for each kernel of a source.

    Raises:
        BinaryError: a kernel has no binary, or a binary differs from what a compile here would give.
    """
    from ..codegen.binary import BinaryError, check
    from ..codegen.module import declared_kernels

    names = declared_kernels(source)
    if found.keys() != set(names):
        there = ", ".join(found)
        raise BinaryError(f"expected binaries of {', '.join(names)}, found binaries of {there[:200]}")
    for name, binary in found.items():
        check(source, name, gpu.triton_target(), binary.metadata, binary.image)
