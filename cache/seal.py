"""The digest of an entry's row: every value in it but its number. It finds accidents, and edits that meant no harm.

Whoever changes a row on purpose can also write the digest anew: what proves an origin is a signature.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

_KINDS = (str, bool, int, float, bytes)
_NAMES: dict[type, str] = {kind: kind.__name__ for kind in _KINDS}
_NOT_SEALED = frozenset({"id", "digest"})


def row_seal(values: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of a row's values by their columns' names.

    A column without a value counts as none, so that a new optional column leaves the digests as they are.
    """
    parts = []
    for name in _in_order(tuple(values)):
        value = values[name]
        if value is None:
            continue
        kind = type(value)
        if kind not in _NAMES:
            # By what it is and not by its class: PyTorch's version is a subclass of str, which comes back as str.
            kind = next(kind for kind in _KINDS if isinstance(value, kind))
            value = kind(value)
        text = value if kind is str else repr(value)
        parts.append(f"{name}:{_NAMES[kind]}:{len(text)}:{text}\n")
    return hashlib.sha256("".join(parts).encode(errors="surrogatepass")).hexdigest()


@functools.lru_cache(maxsize=64)
def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that are sealed, sorted. Rows of one query have the same names."""
    return tuple(sorted({*names} - _NOT_SEALED))
