"""Unsloth's fused functions for LoRA, run from a checkout or an unpacked wheel. For DoRA it has none: PEFT's code runs.

Of unsloth_zoo its kernels use a logger, a class of versions, and its torch.compile for fp8 kernels, which nothing here
calls. The rest of Unsloth (its attention, norms and loss, its trainer) takes no part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .fused import FusedFunctions, empty_package, find_package, load_kernels, version_of

_FILES = ("fast_lora", "utils", "swiglu", "geglu", "fp8")
"""Modules of unsloth/kernels that are used; they load others."""


class Unsloth(FusedFunctions):
    """Unsloth's own functions, from the checkout or unpacked wheel at ``path``. It needs a GPU to be loaded.

    As in Unsloth, projections with biases stay PEFT's.

    Attributes:
        version: the wheel's version, the commit of the checkout, or a digest of the files.

    Raises:
        PeerError: there is no such folder, another Unsloth is loaded, or the files do not hold what is called here.
    """

    def __init__(self, path: Path) -> None:
        folder = find_package(path, "unsloth", _FILES, "--unsloth-path")
        super().__init__(load_kernels(folder, "fast_lora", _stand_ins), "unsloth", biases=False)
        self.version = version_of(path, folder)


def _stand_ins() -> None:
    from packaging.version import Version

    empty_package("unsloth_zoo")
    empty_package("unsloth_zoo.utils").Version = lambda version: Version(str(version))
    empty_package("unsloth_zoo.log").logger = logging.getLogger("unsloth_zoo")
    empty_package("unsloth_zoo.temporary_patches")
    empty_package("unsloth_zoo.temporary_patches.common").torch_compile = _uncompiled


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return function if function is not None else lambda function: function
