"""doratune: tuned Triton kernels for DoRA, generated from templates and looked up in a store.

The public names are loaded at first use, so ``import doratune`` loads no other package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nn as nn
    from .integrations.peft import accelerate as accelerate
    from .integrations.peft import restore as restore
    from .integrations.prepare import prepare as prepare
    from .nn.functional import dora_linear as dora_linear
    from .nn.functional import weight_norm as weight_norm
    from .runtime.loader import Kernel as Kernel
    from .runtime.loader import explain as explain
    from .runtime.loader import load_kernel as load_kernel

__version__ = "0.1.0"

_HOMES = {
    "Kernel": "runtime.loader",
    "accelerate": "integrations.peft",
    "dora_linear": "nn.functional",
    "explain": "runtime.loader",
    "load_kernel": "runtime.loader",
    "prepare": "integrations.prepare",
    "restore": "integrations.peft",
    "weight_norm": "nn.functional",
}
"""The module of each public name."""

__all__ = [
    "Kernel",
    "__version__",
    "accelerate",
    "dora_linear",
    "explain",
    "load_kernel",
    "nn",
    "prepare",
    "restore",
    "weight_norm",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "nn":
        return importlib.import_module(".nn", __name__)
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
