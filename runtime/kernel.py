"""A kernel as a callable: it checks its arguments, launches, and explains which store entry it came from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..codegen.ops import ALIGNMENT
from ..codegen.spec import Config, KernelSpec
from ..internals.torch import current_device, is_traced
from .argument_memo import ArgumentMemo, rows_of
from .arguments import ArgumentError, alignment_of, as_rows, bind_inputs, make_outputs
from .binding import bind, only_starts_kernels, uses_descriptors
from .recording import Bound
from .reference import reference

if TYPE_CHECKING:
    from ..cache.lookup import Resolution
    from ..codegen.render import Source
    from .binaries import Binaries

_data_ptr = torch.Tensor.data_ptr

REFERENCE = "reference"
"""Provenance of a kernel for CPU tensors, which runs the eager formulas of :mod:`doratune.runtime.reference`."""


class Kernel:
    """A DoRA operation bound to one device.

    Call it with the operation's tensors in the contract's order or by name, with ``scaling`` if the operation has one,
    and optionally with ``out`` for the first output (which may share the memory of ``base``, ``lora``, ``dy`` or
    ``dg``). The row stride of a matrix may exceed its width. It returns the output, or a tuple of several.

    Attributes:
        spec: the operation, shapes, dtypes, flags and GPU.
        config: the variant and tile parameters; None for the eager reference on a CPU.
        provenance: ``measured``, ``predicted``, ``default`` or ``reference``.
        source: the emitted Triton text; for the reference, a comment that names its module.
    """

    def __init__(
        self,
        spec: KernelSpec,
        device: torch.device,
        resolution: Resolution | None = None,
        source: Source | None = None,
        binaries: Binaries | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self._resolution = resolution
        self._source = source
        self._binaries = binaries
        self._launchers: dict[tuple[int, ...], Callable[..., None]] = {}
        self._contiguous: Bound | None = None
        self._memo = ArgumentMemo()
        self._descriptors = source is not None and uses_descriptors(source)
        self._repeats = source is not None and only_starts_kernels(source)
        self._scales = spec.contract.scaling
        self._index = device.index  # reading the attribute makes a new object each time

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
    def fusion_pays(self) -> bool:
        """Whether a store says that this kernel is faster than the unfused sequence of its operations."""
        return self._resolution is not None and self._resolution.fusion_pays

    @property
    def source(self) -> str:
        return (
            self._source.text
            if self._source
            else f"# {self.spec.op} on the CPU runs eagerly: doratune.runtime.reference\n"
        )

    def explain(self) -> str:
        """Say which store entry and binary this kernel came from, and which others were refused and why."""
        if self._resolution is None:
            return f"{self.spec}: CPU tensors run the eager fp32-accumulating reference; no kernel is looked up"
        from .present import upgrade_warning

        binary = self._binaries.explain() if self._binaries else None
        return self._resolution.explain(binary, upgrade_warning(self._resolution))

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
            ArgumentError: a tensor is missing or has the wrong shape, dtype, device or strides; or ``torch.jit.trace``
                or ``make_fx`` records a graph, which would not contain the launch.
        """
        if is_traced():
            raise ArgumentError(
                f"torch.jit.trace and make_fx cannot record the launch of a {self.spec.op} kernel: call "
                "doratune.dora_linear or doratune.weight_norm there, which record PyTorch's own operators"
            )
        if not self._scales:
            if scaling is not None:
                raise ArgumentError(f"{self.spec.op} takes no scaling, got {scaling!r}")
        elif type(scaling) is not float and (not isinstance(scaling, int | float) or isinstance(scaling, bool)):
            raise ArgumentError(f"scaling of {self.spec.op} must be a number (PEFT's lora_alpha / r), got {scaling!r}")
        inputs = (*tensors, *named.values()) if named else tensors
        known = self._memo.find(inputs, named, out)
        if known is None:
            bound = bind_inputs(self.spec, tensors, named, self.device)
            made = make_outputs(self.spec, bound, out, self.device)
            inputs, outputs = tuple(bound.values()), tuple(made.values())
            if [*bound][len(tensors) :] == [*named]:
                self._memo.remember(inputs, named, out, outputs)
        else:
            outputs = () if out is None else (out,)
            if known.outputs:
                outputs += tuple(
                    torch.empty_like(inputs[like])
                    if isinstance(like, int)
                    else torch.empty(like[0], dtype=like[1], device=self.device)
                    for like in known.outputs
                )
            if known.rows and self._repeat((*inputs, *outputs), known.rows, scaling):
                return outputs[0] if len(outputs) == 1 else outputs
        if self._source is None:
            operands = self.spec.contract.inputs_of(self.spec)
            by_name = {operand.name: tensor for operand, tensor in zip(operands, inputs, strict=True)}
            with torch.no_grad():  # as a launched kernel records no gradients either
                results = reference(self.spec, by_name, float(scaling or 0.0))
                for output, value in zip(outputs, results.values(), strict=True):
                    output.copy_(value)
        else:
            self.launch(inputs, outputs, scaling)
        return outputs[0] if len(outputs) == 1 else outputs

    def launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float | None = None
    ) -> None:
        """Launch on checked tensors, in the contract's order, on the current stream of the kernel's device.

        Token operands may have leading dimensions. A launch allocates only the variant's workspace and a copy of each
        matrix that the kernel cannot address (:func:`~doratune.runtime.arguments.as_rows`).
        """
        given = (*inputs, *outputs)
        rows = rows_of(given)
        if rows and self._repeat(given, rows, scaling):
            return
        scalars = () if scaling is None else (float(scaling),)
        tensors = [as_rows(tensor, descriptor=self._descriptors) for tensor in given]
        alignments = tuple(map(alignment_of, tensors))
        launcher = self._launchers.get(alignments) or self._bind(alignments)
        if self.device.index == torch.cuda.current_device():
            launcher(*tensors, *scalars)
        else:
            with torch.cuda.device(self.device):
                launcher(*tensors, *scalars)
        for output, written in zip(outputs, tensors[len(inputs) :], strict=True):
            if written.data_ptr() != output.data_ptr():
                output.copy_(written.view(output.shape))

    def _repeat(self, tensors: Sequence[torch.Tensor], rows: int, scaling: float | None) -> bool:
        """Launch on contiguous, aligned tensors through the bound module; returns whether that was possible."""
        bound = self._contiguous
        if bound is None or self._index != current_device():  # bound implies that CUDA is initialised
            return False
        addresses = [*map(_data_ptr, tensors)]
        if functools.reduce(operator.or_, addresses) % ALIGNMENT:
            return False
        if rows == 1 and any(tensor.ndim > 1 and tensor.stride(-2) != tensor.shape[-1] for tensor in tensors):
            return False  # a single row is contiguous with any row stride, but a descriptor needs a valid one
        bound.start(tensors, addresses, rows, scaling)
        return True

    def _bind(self, alignments: tuple[int, ...]) -> Callable[..., None]:
        from ..codegen.compile import contiguous_alignments

        assert self._source is not None
        operands = self.spec.contract.inputs_of(self.spec) + self.spec.contract.outputs_of(self.spec)
        names = [operand.name for operand in operands]
        known = dict(zip(names, alignments, strict=True))
        with torch.cuda.device(self.device):
            module = bind(self._source, known, self._binaries.kernels if self._binaries else None)
        launch: Callable[..., None] = module.launch
        self._launchers[alignments] = launch
        if self._repeats and known == contiguous_alignments(self.spec):
            self._contiguous = Bound(module, self.device)
        return launch
