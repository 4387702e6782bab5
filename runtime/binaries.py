"""Binaries from the stores for a kernel that is about to be loaded, so that nothing need be compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..internals.triton import InternalsError, warn_once, why_compile
from .binding import warn_of_compile

if TYPE_CHECKING:
    from ..cache.entry import Binary
    from ..cache.store import Store
    from ..codegen.gpu import Gpu
    from ..codegen.render import Source

_UNTRUSTED = "has binaries, but not the entry that was chosen, and is neither your own store nor a prebuilt one"


@dataclass(frozen=True)
class Binaries:
    """The compiled kernels of a source that a store had, for contiguous operands.

    Attributes:
        kernels: one for each kernel of the source, by name; empty when there is none to use.
        store: the location of the store that they come from.
        note: what to say of them: for what they were made, or why there are none.
        damaged: what was wrong with those that should have served, but cannot.
        passed_over: the stores whose binaries were not taken, each with the reason.
    """

    kernels: Mapping[str, Binary] = field(default_factory=dict, repr=False)
    store: str | None = None
    note: str = ""
    damaged: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def explain(self) -> str:
        """Where the binary comes from, in a phrase, and which were passed over and why."""
        if self.kernels:
            taken = f"in {self.store}, {self.note}: contiguous operands need no compile"
            return "; ".join((taken, *(f"passed over {reason}" for reason in self.passed_over)))
        return f"compiled at the first call: {self.note}"

    def warn(self) -> None:
        """Tell of damaged binaries: their kernels are right, but they are compiled."""
        for problem in self.damaged:
            warn_of_compile(problem)


def find_binaries(source: Source, stack: Sequence[Store], gpu: Gpu, trusted: Set[str | None]) -> Binaries:
    """Look for the binaries of every kernel of ``source``, for the installed Triton and this GPU, in stores in order.

    The first store at a ``trusted`` location that has all of them serves. What does not serve is passed over and told
    in the result: a binary is only ever a compile saved.
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
        except InternalsError as problem:
            warn_once("starting stored binaries", f"kernels are compiled ({problem})")
            return Binaries(note=str(problem), damaged=tuple(damaged), passed_over=tuple(passed_over))
        except OtherSettingsError as problem:
            passed_over.append(f"{store.location}: {problem}")
        except (BinaryError, StoreError) as problem:
            text = str(problem)
            damaged.append(text if store.location in text else f"{store.location}: {text}")
            passed_over.append(damaged[-1])
        else:
            return Binaries(found, store.location, f"for {wanted}", tuple(damaged), tuple(passed_over))
    note = "; ".join(passed_over) or f"no store has a binary for {wanted}"
    return Binaries(note=note, damaged=tuple(damaged), passed_over=tuple(passed_over))


def _check_all(source: Source, found: Mapping[str, Binary], gpu: Gpu) -> None:
    """Hold the binaries of a store against every kernel of a source.

    Raises:
        BinaryError: there is not one of each kernel, or one is not what a compile here would give.
    """
    from ..codegen.binary import BinaryError, check
    from ..codegen.module import declared_kernels

    names = declared_kernels(source)
    if found.keys() != set(names):
        there = ", ".join(found)
        raise BinaryError(f"there are binaries of {there[:200]}, but the kernels are {', '.join(names)}")
    for name, binary in found.items():
        check(source, name, gpu.triton_target(), binary.metadata, binary.image)
