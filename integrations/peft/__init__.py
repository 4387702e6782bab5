"""The PEFT drop-in: runs the DoRA layers of a PEFT model on doratune's kernels, through PEFT's hook for variants."""

from .report import Layer, Report
from .swap import accelerate, restore
from .versions import PeftVersionError

__all__ = ["Layer", "PeftVersionError", "Report", "accelerate", "restore"]
