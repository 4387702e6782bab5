"""DoRA for PyTorch models without PEFT: ``doratune.nn.DoRALinear`` and ``doratune.nn.functional``."""

from . import functional as functional
from .module import DoRALinear as DoRALinear
from .module import LayerError as LayerError

__all__ = ["DoRALinear", "LayerError", "functional"]
