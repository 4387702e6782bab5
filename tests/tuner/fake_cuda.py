"""A made-up GPU for CPU tensors: streams do nothing, graphs repeat the launches that they captured, and events read a
clock that only launches move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from doratune.codegen.render import Source
from doratune.codegen.spec import Config
from doratune.runtime.reference import reference
from doratune.tuner import measure


class FakeCuda:
    """Patches ``torch.cuda`` and the binding of kernels.

    A bound candidate computes the reference and takes ``us[config]`` microseconds. ``spoil`` does more to the operands
    of a config, by name. ``launched`` are the configs in the order of their launches, ``bound`` those that were loaded.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, total_bytes: int = 1 << 34) -> None:
        self.now_us = 0.0
        self.us: dict[Config, float] = {}
        self.noise: Callable[[int], float] = lambda launch: 1.0
        self.spoil: dict[Config, Callable[[Mapping[str, torch.Tensor]], None]] = {}
        self.launched: list[Config] = []
        self.bound: list[Config] = []
        self.recording: list[Callable[[], None]] | None = None
        for name, value in {
            "is_available": lambda: True,
            "set_device": lambda device: None,
            "mem_get_info": lambda: (total_bytes, total_bytes),
            "memory_reserved": lambda: 0,
            "memory_allocated": lambda: 0,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
            "stream": lambda stream: nullcontext(),
            "Event": lambda *, enable_timing: _Event(self),
            "CUDAGraph": lambda: _Graph(self),
            "get_device_properties": lambda device: SimpleNamespace(uuid="1-2-3"),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(measure, "find_device", lambda device: torch.device("cpu"))
        patch.setattr(measure, "bind", self._bind)

    def _bind(self, source: Source) -> SimpleNamespace:
        self.bound.append(source.config)
        contract, spec = source.spec.contract, source.spec
        names = [operand.name for operand in (*contract.inputs_of(spec), *contract.outputs_of(spec))]
        inputs = {operand.name for operand in contract.inputs_of(spec)}

        def compute(operands: tuple[torch.Tensor, ...]) -> None:
            by_name = dict(zip(names, operands, strict=False))
            scaling = float(operands[-1]) if contract.scaling else 1.0
            results = reference(spec, {name: by_name[name] for name in names if name in inputs}, scaling)
            for name, value in results.items():
                by_name[name].copy_(value)
            self.spoil.get(source.config, lambda by_name: None)(by_name)

        def launch(*operands: torch.Tensor) -> None:
            if self.recording is not None:
                self.recording.append(lambda: run(operands))
            else:
                run(operands)

        def run(operands: tuple[torch.Tensor, ...]) -> None:
            compute(operands)
            self.launched.append(source.config)
            self.now_us += self.us[source.config] * self.noise(len(self.launched))

        return SimpleNamespace(launch=launch)


class _Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.now_us

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) / 1000.0


class _Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.calls: list[Callable[[], None]] = []

    def capture_begin(self, pool: object = None) -> None:
        assert pool is None or isinstance(pool, _Graph)
        assert self.cuda.recording is None
        self.cuda.recording = self.calls

    def capture_end(self) -> None:
        self.cuda.recording = None

    def pool(self) -> _Graph:
        return self

    def replay(self) -> None:
        for call in self.calls:
            call()
