"""``doratune cache package``: stores as a wheel of data, which ``pip install`` puts where every lookup finds it.

The wheel holds one store and no code. It is written as the format says (PEP 427), with fixed dates, so that equal
stores give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..cache.merge import carry_out, plan
from ..cache.stack import PACKAGED
from ..cache.store import Store
from ..cache.trust import trust
from ..errors import UsageError
from .build_store import scratch_store

_DATE = (2026, 1, 1, 0, 0, 0)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Package:
    """A wheel: its file, name and version, what its store holds, and its size."""

    path: str
    name: str
    version: str
    architecture: str
    triton: str
    entries: int
    binaries: int
    bytes: int


def package_stores(
    stores: Sequence[str], folder: str | Path, *, name: str | None = None, trusted: Sequence[str] = ()
) -> Package:
    """Write the entries and binaries of ``stores`` into a wheel in ``folder``.

    The name is ``doratune-cache-`` and the architecture unless one is given. The version is doratune's, with Triton's
    after a plus sign: a binary serves one Triton.

    Raises:
        UsageError: the stores have no binaries, or binaries for several architectures or Tritons; an invalid name.
        StoreError: a store cannot be read, or the folder cannot be written.
    """
    with ExitStack() as opened:
        sources = [opened.enter_context(Store.open(store, readonly=True)) for store in stores]
        fresh = opened.enter_context(scratch_store())
        merged = plan(sources, fresh, refusal=trust(trusted).refusal)
        if merged.skipped:
            raise UsageError(f"a package has whole stores, and of these not all can be taken: {merged.skipped[0]}")
        carry_out(merged, fresh)
        keys = fresh.binary_keys()
        made_for = sorted({(key.architecture, key.triton) for key in keys})
        if len(made_for) != 1:
            found = ", ".join(f"{architecture} under Triton {triton}" for architecture, triton in made_for) or "none"
            raise UsageError(f"a package has binaries of one architecture and Triton, these stores have: {found}")
        ((architecture, triton),) = made_for
        called = name or f"doratune-cache-{architecture.replace('_', '')}"
        if not _NAME.fullmatch(called):
            raise UsageError(f"package name {called!r}: use lower-case letters, digits and single hyphens")
        version = f"{__version__}+triton.{triton}"
        file = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="doratune-")), "store.sqlite")
        fresh.export(file)
        parts = {f"{PACKAGED}/{called}-{triton}.sqlite": file.read_bytes()}
        path = _write_wheel(Path(folder), called, version, parts)
        entries = len(fresh.entries())
    return Package(str(path), called, version, architecture, triton, entries, len(keys), path.stat().st_size)


def _write_wheel(folder: Path, name: str, version: str, parts: dict[str, bytes]) -> Path:
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    parts = {
        **parts,
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Summary: Compiled kernels for doratune: data that it finds when it looks a kernel up.\n"
            f"Requires-Dist: doratune=={__version__}\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: doratune\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{part},sha256={_hash(content)},{len(content)}\n" for part, content in parts.items())
    parts[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for part, content in parts.items():
            entry = zipfile.ZipInfo(part, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content)
    return path


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
