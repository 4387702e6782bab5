"""A pytest plugin: in the process that loads it, every model that PEFT injects adapters into goes through accelerate().

``inject_adapter`` is what get_peft_model, from_pretrained, load_adapter, add_adapter and inject_adapter_in_model share.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import doratune
from doratune.integrations.peft.variant import DoraVariant

_calls: Counter[str] = Counter()
_inject_adapter = BaseTuner.inject_adapter
_forward = DoraVariant.forward
_leave_to_peft = DoraVariant._leave_to_peft


def _inject_and_accelerate(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = _inject_adapter(self, model, *args, **kwargs)
    doratune.accelerate(model, quiet=True)
    return result


def _count_forward(self: DoraVariant, *args: Any, **kwargs: Any) -> Any:
    _calls["accelerated"] += 1
    return _forward(self, *args, **kwargs)


def _count_left(self: DoraVariant, reason: str, *args: Any, **kwargs: Any) -> Any:
    _calls["accelerated"] -= 1
    _calls[reason] += 1
    return _leave_to_peft(self, reason, *args, **kwargs)


def pytest_configure() -> None:
    BaseTuner.inject_adapter = _inject_and_accelerate
    DoraVariant.forward = _count_forward  # type: ignore[method-assign]
    DoraVariant._leave_to_peft = _count_left  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, count in _calls.most_common():
        terminalreporter.write_line(f"doratune: {count} calls {what}")
