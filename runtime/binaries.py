"""Find the stored binaries of a kernel that is about to be loaded, so that nothing needs to be compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..internals.triton import warn_once, why_compile
from .binding import warn_of_compile

if TYPE_CHECKING:
    from ..cache.entry import Binary
    from ..cache.store import Store
    from ..cache.trust import Trust
    from ..codegen.gpu import Gpu
    from ..codegen.render import Source


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


def find_binaries(source: Source, stack: Sequence[Store], gpu: Gpu, trust: Trust) -> Binaries:
    """Find the binaries of every kernel of ``source`` for the installed Triton and this GPU.

    The result comes from the first store that has valid binaries of all kernels, and that ``trust`` admits or that has
    them signed by a key of ``trust``. Other stores are passed over, and the result says why. That is no error, because
    kernels without binaries are compiled.
    """
    from ..cache.errors import StoreError
    from ..cache.stack import user_location
    from ..codegen.binary import BinaryError, OtherSettingsError
    from ..codegen.module import declared_kernels

    try:
        from triton import __version__ as version
    except ImportError:
        return Binaries(note="Triton is not installed here")
    reason = why_compile()
    if reason is not None:
        return Binaries(note=reason)
    wanted = f"Triton {version} on {gpu.architecture}"
    names = declared_kernels(source)
    passed_over: list[str] = []
    damaged: list[str] = []
    for store in stack:
        try:
            if not store.has_binaries(source.code_digest, version, gpu.architecture):
                continue
            refusal = trust.refusal(store)
            if refusal is not None and not trust.keys:
                raise _UntrustedError(refusal)
            # One by one: a store may have any number of others, each of which may unpack to megabytes.
            read = [store.get_binary(source.code_digest, name, version, gpu.architecture) for name in names]
            found = {binary.kernel: binary for binary in read if binary is not None}
            signer = None if refusal is None else _signed_by(store, [*found.values()], trust, refusal)
            _check_all(source, names, found, gpu)
        except _UntrustedError as problem:
            passed_over.append(f"{store.location}: its binaries are not used: {problem}")
            if store.location == user_location():  # its owner expects it to serve, and a command mends it
                damaged.append(passed_over[-1])
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
            note = f"for {wanted}" if signer is None else f"signed by {signer}, for {wanted}"
            return Binaries(found, store.location, note, tuple(damaged), tuple(passed_over))
    note = "; ".join(passed_over) or f"no store has a binary for {wanted}"
    return Binaries(note=note, damaged=tuple(damaged), passed_over=tuple(passed_over))


class _UntrustedError(Exception):
    """The binaries of a store are others', and nobody said that they are to be run."""


def _signed_by(store: Store, found: Sequence[Binary], trust: Trust, refusal: str) -> str:
    """The fingerprints of the trusted keys that signed all of these binaries.

    Raises:
        _UntrustedError: one is not signed by any of them.
    """
    from ..cache.signing import signers

    keys = signers(store, found, trust.keys)
    for binary, key in zip(found, keys, strict=True):
        if key is None:
            raise _UntrustedError(f"{binary.kernel} is not signed by a trusted key, and {refusal}")
    return ", ".join(sorted({key.fingerprint for key in keys if key is not None}))


def _check_all(source: Source, names: Sequence[str], found: Mapping[str, Binary], gpu: Gpu) -> None:
    """Check that a store has one valid binary for each kernel of a source.

    Raises:
        BinaryError: a kernel has no binary, or a binary differs from what a compile here would give.
    """
    from ..codegen.binary import BinaryError, check

    if len(found) < len(names):
        raise BinaryError(f"expected binaries of {', '.join(names)}, found {', '.join(found) or 'none of them'}")
    for name, binary in found.items():
        check(source, name, gpu.triton_target(), binary.metadata, binary.image)
