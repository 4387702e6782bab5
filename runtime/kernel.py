"""A kernel as a callable: checked arguments in, outputs out, and the story of where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..codegen.spec import Config, KernelSpec
from .arguments import ArgumentError, alignment_of, as_rows, bind_inputs, make_outputs
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
    and optionally ``out`` for the first output (which may be the memory of ``base``, ``lora``, ``dy`` or ``dg``). The
    rows of a matrix may lie apart. It returns the output, or a tuple when there are several.

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
        self._launchers: dict[tuple[int, ...], Callable[..., None]] = {}
        self._descriptors = source is not None and uses_descriptors(source)

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

        Token operands may have leading dimensions. Nothing is allocated but the variant's own workspace, and a copy of
        each matrix that the kernel cannot address (:func:`~doratune.runtime.arguments.as_rows`).
        """
        tensors = [as_rows(tensor, descriptor=self._descriptors) for tensor in (*inputs, *outputs)]
        alignments = tuple(map(alignment_of, tensors))
        launcher = self._launchers.get(alignments) or self._bind(alignments)
        scalars = () if scaling is None else (float(scaling),)
        if self.device.index == torch.cuda.current_device():
            launcher(*tensors, *scalars)
        else:
            with torch.cuda.device(self.device):
                launcher(*tensors, *scalars)
        for output, written in zip(outputs, tensors[len(inputs) :], strict=True):
            if written.data_ptr() != output.data_ptr():
                output.copy_(written.view(output.shape))

    def _bind(self, alignments: tuple[int, ...]) -> Callable[..., None]:
        assert self._source is not None
        operands = self.spec.contract.inputs_of(self.spec) + self.spec.contract.outputs_of(self.spec)
        names = [operand.name for operand in operands]
        with torch.cuda.device(self.device):
            module = bind(self._source, dict(zip(names, alignments, strict=True)))
        self._launchers[alignments] = module.launch
        return self._launchers[alignments]


class _Launcher:
    """Stands in for a jit function inside an emitted module, so that ``kernel[grid](…)`` starts a compiled binary."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        start = self._compiled[grid + (1,) * (3 - len(grid))]

        def run(*args: Any, **options: int) -> None:
            start(*args)  # the options are compiled in

        return run


def uses_descriptors(source: Source) -> bool:
    """Whether an emitted module addresses its matrices by tensor descriptors."""
    from ..codegen.variants import find_variant

    return find_variant(source.spec.op, source.config.variant).descriptors


def bind(source: Source, alignments: Mapping[str, int] | None = None) -> ModuleType:
    """Compile an emitted module for the current GPU and put the binaries in place of its jit functions.

    ``alignments`` are the bytes that divide the address and the row stride of each operand, by name; None means
    contiguous operands.
    """
    from triton.runtime import driver

    from ..codegen.compile import build
    from ..codegen.module import kernel_names, load_module

    module = load_module(source)
    target = driver.active.get_current_target()
    for name in kernel_names(module):
        setattr(module, name, _Launcher(build(source, getattr(module, name), target, alignments)))
    return module
