"""``DORATUNE_NO_JIT=1``: this process starts stored binaries only, and compiles nothing.

It makes a missing binary an error at the first launch that needs it, instead of seconds of waiting on every fresh
machine. Triton's own cache is not asked either: a run that succeeds where its kernels happen to be cached would prove
nothing for the next machine.
"""

from __future__ import annotations

from ..errors import DoratuneError
from ..internals.triton import NO_JIT, no_jit

__all__ = ["NO_JIT", "NotCompiledError", "no_jit", "not_compiled"]


class NotCompiledError(DoratuneError):
    """:data:`NO_JIT` is set, and a kernel has no stored binary that can be started here."""


def not_compiled(spec: object, reason: object) -> NotCompiledError:
    """The error for a kernel of ``spec`` that would have to be compiled, because of ``reason``."""
    return NotCompiledError(
        f"{spec} would have to be compiled, and {NO_JIT} is set: {str(reason)[:500]}. `doratune cache build` makes the "
        "binaries of a model, `doratune cache verify --no-jit` lists those that are missing"
    )
