"""axolotl's fused functions for LoRA and DoRA, run from a checkout or an unpacked wheel.

Of the rest of axolotl its kernels use a logger. They import bitsandbytes for quantised weights. Where it is missing, an
empty module stands in while they are loaded, and no layer can be quantised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .fused import FusedFunctions, empty_package, find_package, load_kernels, version_of

_FILES = ("lora", "geglu", "swiglu", "quantize", "utils", "dora", "op_registry")
"""The modules of axolotl/kernels that are used."""


class Axolotl(FusedFunctions):
    """axolotl's own functions, from the checkout or unpacked wheel at ``path``.

    They run DoRA where a layer has a magnitude, and LoRA where it has none.

    Attributes:
        version: the wheel's version, the commit of the checkout, or a digest of the files.

    Raises:
        PeerError: there is no such folder, another axolotl is loaded, or the files do not hold what is called here.
    """

    def __init__(self, path: Path) -> None:
        folder = find_package(path, "axolotl", _FILES, "--axolotl-path")
        with _bitsandbytes():
            lora = load_kernels(folder, "lora", _stand_ins)
        super().__init__(lora, "axolotl", biases=True)
        self.version = version_of(path, folder)


def _stand_ins() -> None:
    empty_package("axolotl.utils")
    empty_package("axolotl.utils.logging").get_logger = logging.getLogger


@contextlib.contextmanager
def _bitsandbytes() -> Iterator[None]:
    """bitsandbytes while the kernels are loaded: the installed one, or names that cannot be called."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield
        return
    functional: Any = ModuleType("bitsandbytes.functional")
    names = ("fp32", "fp16_nf4", "bf16_nf4", "fp32_nf4")
    functional.lib = SimpleNamespace(**{f"cdequantize_blockwise_{name}": None for name in names})
    functional.QuantState, functional.get_ptr = type("QuantState", (), {}), None
    package: Any = ModuleType("bitsandbytes")
    package.functional = functional
    sys.modules.update({"bitsandbytes": package, "bitsandbytes.functional": functional})
    try:
        yield
    finally:  # PEFT and transformers look for the real one
        del sys.modules["bitsandbytes"], sys.modules["bitsandbytes.functional"]
