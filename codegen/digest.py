"""The digest of emitted code; a compiled kernel depends on nothing else."""

from __future__ import annotations

import hashlib


def code_digest(text: str) -> str:
    """Return the SHA-256, in hexadecimal, of an emitted text without its docstring.

    The docstring names the spec and the config. Texts that differ only in the token bucket or the GPU's name therefore
    have equal digests; they compile to the same binaries.
    """
    return hashlib.sha256(text.split('"""', 2)[-1].encode()).hexdigest()
