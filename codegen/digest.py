"""The digest of emitted code, which is all that a compiled kernel depends on."""

from __future__ import annotations

import hashlib


def code_digest(text: str) -> str:
    """SHA-256 of an emitted text without its docstring, in hexadecimal.

    The docstring names the spec and the config. So the digest is equal where only the token bucket or the GPU's name
    differ, and such sources compile to the same binaries.
    """
    return hashlib.sha256(text.split('"""', 2)[-1].encode()).hexdigest()
