"""Liger's kernels beside every contender: RMSNorm, rotary positions, SwiGLU, and the last product with the loss.

So the rest of the model costs everybody the same, and what it costs those who care. An MLP that a contender runs itself
keeps its own activation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import UsageError

_OPTIONS = {"rope": True, "rms_norm": True, "swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": True}
"""SwiGLU is put in per contender, see :func:`add_swiglu`."""


_MLP = ("gate_proj", "up_proj", "down_proj")


def liger_version() -> str:
    """The version of the installed liger-kernel.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError("--liger needs Liger's kernels: pip install liger-kernel") from error


@contextlib.contextmanager
def liger(model: nn.Module, model_type: str) -> Iterator[None]:
    """Put Liger's kernels into ``model`` by Liger's own function; transformers' functions are put back at the end.

    Raises:
        UsageError: Liger is not installed, does not load, or does not know models of this type.
    """
    liger_version()
    try:
        patches: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except Exception as error:
        raise UsageError(f"--liger: Liger's kernels do not load: {type(error).__name__}: {error}") from error
    apply = patches.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        raise UsageError(f"--liger: Liger has no kernels for models of type {model_type!r}")
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    try:
        apply(model=model, **_OPTIONS)
        yield
    finally:
        for name, value in before.items():
            setattr(modeling, name, value)


def add_swiglu(model: nn.Module) -> int:
    """Make the MLPs that run transformers' forward pass run Liger's SwiGLU; returns their number.

    An implementation that runs whole MLPs has given them another one, as an attribute or by a class of its own.
    """
    swiglu: Any = importlib.import_module("liger_kernel.transformers.swiglu")
    count = 0
    for module in model.modules():
        theirs = "forward" not in vars(module) and type(module).forward.__module__ == type(module).__module__
        if theirs and all(hasattr(module, name) for name in _MLP):
            module.__dict__["forward"] = MethodType(swiglu.LigerSwiGLUMLP.forward, module)
            count += 1
    return count


def loss_of(model: Any, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """The mean loss over the last ``kept`` tokens of each sequence, without its logits in memory."""
    last = torch.arange(ids.shape[1] - kept - 1, ids.shape[1] - 1, device=ids.device)  # a slice would have no view
    labels = ids[:, -kept:].contiguous()
    result: torch.Tensor = model(input_ids=ids, shift_labels=labels, logits_to_keep=last, use_cache=False).loss
    return result
