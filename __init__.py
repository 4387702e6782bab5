"""doratune: tuned Triton kernels for DoRA, generated from templates and dispatched from a store.

The public names load lazily, so ``import doratune`` costs nothing beyond Python's own work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nn as nn
    from .runtime.linear import dora_linear as dora_linear
    from .runtime.loader import Kernel as Kernel
    from .runtime.loader import explain as explain
    from .runtime.loader import load_kernel as load_kernel
    from .runtime.norm import weight_norm as weight_norm
    from .runtime.peft import accelerate as accelerate
    from .runtime.peft import restore as restore

__version__ = "0.1.0"
__all__ = [
    "Kernel",
    "__version__",
    "accelerate",
    "dora_linear",
    "explain",
    "load_kernel",
    "nn",
    "restore",
    "weight_norm",
]


def __getattr__(name: str) -> Any:
    if name == "dora_linear":
        from .runtime.linear import dora_linear

        return dora_linear
    if name == "nn":
        import importlib

        return importlib.import_module(".nn", __name__)
    if name == "weight_norm":
        from .runtime.norm import weight_norm

        return weight_norm
    if name in ("accelerate", "restore"):
        from .runtime import peft

        return getattr(peft, name)
    if name in __all__:
        from .runtime import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
