"""A kernel as a callable: checked arguments in, outputs out, and the story of where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..codegen.ops import ALIGNMENT
from ..codegen.spec import Config, KernelSpec
from .arguments import ArgumentError, alignment_of, as_rows, bind_inputs, make_outputs
from .launch import bind, only_starts_kernels, uses_descriptors
from .program import Bound
from .reference import reference

if TYPE_CHECKING:
    from ..cache.lookup import Resolution
    from ..codegen.render import Source
    from .binaries import Binaries

_MOST_KNOWN = 1 << 12
"""Signatures of checked arguments that a kernel remembers; token counts may be of any number."""

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
        self._known: dict[tuple[object, ...], _Known] = {}
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
        """Say which store entry and binary this kernel came from, what else was looked at, and why that was refused."""
        if self._resolution is None:
            return f"{self.spec}: CPU tensors run the eager fp32-accumulating reference; no kernel is looked up"
        return self._resolution.explain(self._binaries.explain() if self._binaries else None)

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
        signature = _signature(tensors, named, out)
        known = None if signature is None else self._known.get(signature)
        if known is None:
            bound = bind_inputs(self.spec, tensors, named, self.device)
            made = make_outputs(self.spec, bound, out, self.device)
            inputs, outputs = tuple(bound.values()), tuple(made.values())
            if signature is not None and [*bound][len(tensors) :] == [*named] and len(self._known) < _MOST_KNOWN:
                self._known[signature] = _remember(inputs, outputs, given=out is not None)
        else:  # such tensors have been checked before, in this order
            inputs = (*tensors, *named.values()) if named else tensors
            rest = [
                torch.empty_like(inputs[like])
                if isinstance(like, int)
                else torch.empty(like[0], dtype=like[1], device=self.device)
                for like in known.outputs
            ]
            outputs = tuple(rest) if out is None else (out, *rest)
        if self._source is None:
            operands = self.spec.contract.inputs_of(self.spec)
            by_name = {operand.name: tensor for operand, tensor in zip(operands, inputs, strict=True)}
            with torch.no_grad():  # as a launched kernel: gradients are the caller's business
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

        Token operands may have leading dimensions. Nothing is allocated but the variant's own workspace, and a copy of
        each matrix that the kernel cannot address (:func:`~doratune.runtime.arguments.as_rows`).
        """
        if self._launch_plain(inputs, outputs, scaling):
            return
        scalars = () if scaling is None else (float(scaling),)
        tensors = [as_rows(tensor, descriptor=self._descriptors) for tensor in (*inputs, *outputs)]
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

    def _launch_plain(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], scaling: float | None
    ) -> bool:
        """Launch on tensors of plain layout, if that is all there is to do; says whether it was."""
        bound = self._contiguous
        if bound is None or self.device.index != torch.cuda.current_device():
            return False
        tensors = (*inputs, *outputs)
        addresses = []
        together = 0
        for tensor in tensors:
            if not tensor.is_contiguous() or tensor.ndim > 2:
                return False
            address = tensor.data_ptr()
            addresses.append(address)
            together |= address
        first = inputs[0]
        if together % ALIGNMENT or (first.shape[0] == 1 and first.stride(0) != first.shape[1]):
            return False  # a single row may count as contiguous with a row stride that no descriptor takes
        bound.start(tensors, addresses, scaling)
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
        if known == contiguous_alignments(self.spec) and only_starts_kernels(self._source):
            self._contiguous = Bound(module, self.device)
        return launch


class _Known(NamedTuple):
    """What a kernel remembers of arguments that it has checked.

    ``outputs`` says of each output to allocate which input has its shape and dtype, or these themselves.
    """

    outputs: tuple[int | tuple[torch.Size, torch.dtype], ...]


def _remember(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], *, given: bool) -> _Known:
    made = [
        next(
            (i for i, t in enumerate(inputs) if t.is_contiguous() and t.shape == o.shape and t.dtype == o.dtype),
            (o.shape, o.dtype),
        )
        for o in outputs[1 if given else 0 :]
    ]
    return _Known(tuple(made))


def _signature(
    tensors: Sequence[object], named: Mapping[str, object], out: torch.Tensor | None
) -> tuple[object, ...] | None:
    """All that the check of arguments looks at; None if some argument is not a tensor."""
    parts: list[object] = [len(tensors), out is None, *named]
    for tensor in (*tensors, *named.values()) if out is None else (*tensors, *named.values(), out):
        if not isinstance(tensor, torch.Tensor):
            return None
        strides = None if tensor.is_contiguous() and tensor.ndim < 2 else tensor.stride()
        parts += (tensor.shape, tensor.dtype, tensor.device, strides)
    return tuple(parts)
