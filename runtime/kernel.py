"""A kernel as a callable: checked arguments in, outputs out, and the story of where it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..codegen.spec import Config, KernelSpec
from .arguments import ArgumentError, bind_inputs, make_outputs
from .reference import reference

if TYPE_CHECKING:
    from types import ModuleType

    from ..cache.lookup import Resolution
    from ..codegen.render import Source

REFERENCE = "reference"
"""Provenance of a kernel for CPU tensors: the eager PyTorch formulas of :mod:`doratune.runtime.reference`."""


class Kernel:
    """A DoRA operation bound to one device.

    Call it with the operation's tensors in the contract's order or by name, ``scaling`` where the operation has one,
    and optionally ``out`` for the first output (which may be the memory of ``base``, ``lora`` or ``dy``). It returns
    the output, or a tuple when there are several.

    Attributes:
        spec: what it computes.
        config: the variant and tile parameters; None for the eager reference on a CPU.
        provenance: ``measured``, ``predicted``, ``default`` or ``reference``.
        source: the emitted Triton text; for the reference, a sentence saying that there is none.
    """

    def __init__(
        self, spec: KernelSpec, device: torch.device, resolution: Resolution | None = None, source: Source | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        self._resolution = resolution
        self._source = source
        self._launchers: dict[bool, Callable[..., None]] = {}

    @property
    def config(self) -> Config | None:
        return self._source.config if self._source else None

    @property
    def provenance(self) -> str:
        if self._resolution is None:
            return REFERENCE
        entry = self._resolution.entry
        return entry.evaluation.provenance if entry else "default"

    @property
    def source(self) -> str:
        return (
            self._source.text
            if self._source
            else f"# {self.spec.op} on the CPU runs eagerly: doratune.runtime.reference\n"
        )

    def explain(self) -> str:
        """Say which store entry this kernel came from, what else was looked at, and why that was refused."""
        if self._resolution is None:
            return f"{self.spec}: CPU tensors run the eager fp32-accumulating reference; no kernel is looked up"
        return self._resolution.explain()

    def __repr__(self) -> str:
        return f"Kernel({self.spec}, {self.config or 'eager reference'}, {self.provenance})"

    def __call__(
        self,
        *tensors: torch.Tensor,
        scaling: float | None = None,
        out: torch.Tensor | None = None,
        **named: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the operation.

        Raises:
            ArgumentError: a tensor is missing or has the wrong shape, dtype, device or strides.
        """
        if self.spec.contract.scaling:
            if not isinstance(scaling, int | float) or isinstance(scaling, bool):
                raise ArgumentError(f"{self.spec.op} needs scaling, a number (PEFT's lora_alpha / r); got {scaling!r}")
        elif scaling is not None:
            raise ArgumentError(f"{self.spec.op} takes no scaling")
        inputs = bind_inputs(self.spec, tensors, named, self.device)
        outputs = make_outputs(self.spec, inputs, out, self.device)
        if self._source is None:
            with torch.no_grad():  # as a launched kernel: gradients are the caller's business
                for name, value in reference(self.spec, inputs, float(scaling or 0.0)).items():
                    outputs[name].copy_(value)
        else:
            self.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
        results = tuple(outputs.values())
        return results[0] if len(results) == 1 else results

    def launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float | None = None
    ) -> None:
        """Launch on checked tensors, in the contract's order, on the current stream of the kernel's device.

        Token operands may have leading dimensions; nothing is allocated but the variant's own workspace.
        """
        tensors = [t if t.ndim <= 2 else t.view(-1, t.shape[-1]) for t in (*inputs, *outputs)]
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        launcher = self._launchers.get(aligned) or self._bind(aligned)
        scalars = () if scaling is None else (float(scaling),)
        if self.device.index == torch.cuda.current_device():
            launcher(*tensors, *scalars)
        else:
            with torch.cuda.device(self.device):
                launcher(*tensors, *scalars)

    def _bind(self, aligned: bool) -> Callable[..., None]:
        assert self._source is not None
        with torch.cuda.device(self.device):
            module = bind(self._source, aligned=aligned)
        self._launchers[aligned] = module.launch
        return self._launchers[aligned]


class _Launcher:
    """Stands in for a jit function inside an emitted module, so that ``kernel[grid](…)`` starts a compiled binary."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        start = self._compiled[grid + (1,) * (3 - len(grid))]

        def run(*args: Any, **options: int) -> None:
            start(*args)  # the options are compiled in

        return run


def bind(source: Source, *, aligned: bool = True) -> ModuleType:
    """Compile an emitted module for the current GPU and put the binaries in place of its jit functions."""
    from triton.runtime import driver

    from ..codegen.compile import build
    from ..codegen.module import kernel_names, load_module

    module = load_module(source)
    target = driver.active.get_current_target()
    for name in kernel_names(module):
        setattr(module, name, _Launcher(build(source, getattr(module, name), target, aligned=aligned)))
    return module
