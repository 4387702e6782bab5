"""Load emitted text as a Python module.

The text is not written to disk: it is registered with :mod:`linecache`, where tracebacks and Triton (which reads a
kernel's source through :mod:`inspect`) find it.
"""

from __future__ import annotations

import linecache
import re
from types import ModuleType
from typing import TYPE_CHECKING

from ..internals.triton import bring_back_names

if TYPE_CHECKING:
    from .render import Source


def load_module(source: Source) -> ModuleType:
    """Execute an emitted text and return the module: its ``@triton.jit`` kernels and its ``launch`` function."""
    if "gluon" in source.text:
        bring_back_names()
    name = f"doratune_{source.spec.op}_{source.digest[:16]}"
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    module = ModuleType(name)
    module.__file__ = filename
    exec(compile(source.text, filename, "exec", dont_inherit=True), module.__dict__)
    return module


def kernel_names(module: ModuleType) -> tuple[str, ...]:
    """Return the names of a module's Triton kernels in the order of the text."""
    return tuple(name for name in vars(module) if name.endswith("_kernel"))


def declared_kernels(source: Source) -> tuple[str, ...]:
    """Return the same names from the text alone, without executing it or importing Triton."""
    return tuple(re.findall(r"^def (\w+_kernel)\(", source.text, re.MULTILINE))
