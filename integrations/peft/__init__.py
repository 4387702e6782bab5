"""The PEFT drop-in: every DoRA layer of a PEFT model on doratune's kernels, through PEFT's own hook for variants."""

from .report import Layer, Report
from .swap import accelerate, restore
from .versions import PeftVersionError

__all__ = ["Layer", "PeftVersionError", "Report", "accelerate", "restore"]
