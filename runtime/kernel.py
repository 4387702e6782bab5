"""A kernel as a callable: it checks its arguments, launches, and explains which store entry it came from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..codegen.ops import ALIGNMENT
from ..codegen.spec import Config, KernelSpec
from ..internals.torch import current_device, is_traced
from .argument_memo import ArgumentMemo, rows_of
from .arguments import ArgumentError, alignment_of, as_rows, bind_inputs, make_outputs
from .binding import bind, only_starts_kernels, uses_descriptors
from .no_jit import no_jit
from .recording import Bound
from .reference import reference

if TYPE_CHECKING:
    from types import ModuleType

    from ..cache.entry import Binary
    from ..cache.lookup import Resolution
    from ..codegen.render import Source
    from .binaries import Binaries

_data_ptr = torch.Tensor.data_ptr

REFERENCE = "reference"
"""Provenance of a kernel for CPU tensors, which runs the eager formulas of :mod:`doratune.runtime.reference`."""


class Unbound(NamedTuple):
    """A kernel that is not loaded: its source, the executed text, the alignments by operand, its stored binaries."""

    source: Source
    module: ModuleType
    alignments: dict[str, int]
    binaries: Mapping[str, Binary]


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
        self._modules: dict[tuple[int, ...], ModuleType] = {}  # executed, not bound yet
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

    @functools.cached_property
    def specialises_warps(self) -> bool:
        """Whether variants of this GPU have warps with roles of their own."""
        from ..codegen.gpu import find_gpu

        return self.device.type == "cuda" and find_gpu(self.spec.gpu).architecture == "sm_90"

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
            NotCompiledError: no stored binary serves the operation, and ``DORATUNE_NO_JIT`` is set.
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
        launcher = self._launchers.get(alignments)
        if launcher is None:
            if no_jit():
                tensors, alignments = self._for_binaries(tensors, alignments)
            launcher = self._launchers.get(alignments) or self.bind(alignments)
        if self.device.index == torch.cuda.current_device():
            launcher(*tensors, *scalars)
        else:
            with torch.cuda.device(self.device):
                launcher(*tensors, *scalars)
        for output, written in zip(outputs, tensors[len(inputs) :], strict=True):
            if written.data_ptr() != output.data_ptr():
                output.copy_(written.view(output.shape))

    def _for_binaries(
        self, tensors: list[torch.Tensor], alignments: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        """The operands as stored binaries take them, and the alignments that these assume: those of contiguous ones.

        An operand that is aligned less is copied. One that is aligned more is not.
        """
        if self.spec.layers:  # its table says where the layers are, from the operands on
            return tensors, alignments
        assumed = self._assumed()
        fitted = [
            tensor.clone(memory_format=torch.contiguous_format) if alignment % least else tensor
            for tensor, alignment, least in zip(tensors, alignments, assumed, strict=True)
        ]
        return fitted, assumed

    def _assumed(self) -> tuple[int, ...]:
        """The alignments that stored binaries assume."""
        from ..codegen.compile import contiguous_alignments

        return tuple(contiguous_alignments(self.spec).values())

    def _repeat(self, tensors: Sequence[torch.Tensor], rows: int, scaling: float | None) -> bool:
        """Launch on contiguous, aligned tensors through the bound module; returns whether that was possible."""
        bound = self._contiguous
        if bound is None or self._index != current_device():  # bound implies that CUDA is initialised
            return False
        addresses = [*map(_data_ptr, tensors)]
        if functools.reduce(operator.or_, addresses) % ALIGNMENT:
            return False
        bound.start(tensors, addresses, rows, scaling)
        return True

    def alignments_of(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """The alignments of inputs and outputs, in the contract's order, for which a launch on them needs a binary."""
        return tuple([alignment_of(as_rows(tensor, descriptor=self._descriptors)) for tensor in tensors])

    def is_loaded(self, alignments: tuple[int, ...]) -> bool:
        """Whether :meth:`bind` has loaded the kernel for these alignments, or has nothing to load."""
        return self._source is None or alignments in self._launchers

    def unbound(self, alignments: tuple[int, ...]) -> Unbound | None:
        """What :meth:`bind` would load; None if it is loaded, or if there is nothing to load."""
        from ..codegen.compile import contiguous_alignments
        from ..codegen.module import load_module

        if self._source is None or self.is_loaded(alignments):
            return None
        known = self._by_operand(alignments)
        if alignments not in self._modules:
            self._modules[alignments] = load_module(self._source)
        stored = self._binaries is not None and known == contiguous_alignments(self.spec)
        binaries = self._binaries.kernels if self._binaries is not None and stored else {}
        return Unbound(self._source, self._modules[alignments], known, binaries)

    def _by_operand(self, alignments: tuple[int, ...]) -> dict[str, int]:
        operands = self.spec.contract.inputs_of(self.spec) + self.spec.contract.outputs_of(self.spec)
        return dict(zip([operand.name for operand in operands], alignments, strict=True))

    def load(self, alignments: tuple[int, ...]) -> None:
        """Load the kernel for a launch on operands of these alignments.

        Raises:
            NotCompiledError: as :meth:`bind`.
        """
        if no_jit() and not self.spec.layers:  # a launch copies what a stored binary does not take
            alignments = self._assumed()
        if not self.is_loaded(alignments):
            self.bind(alignments)

    def bind(self, alignments: tuple[int, ...]) -> Callable[..., None]:
        """Load the kernel for operands of these alignments, compiled if it must be; return the emitted ``launch``.

        Raises:
            NotCompiledError: it must be compiled, and ``DORATUNE_NO_JIT`` is set.
        """
        from ..codegen.compile import contiguous_alignments
        from .binaries import Binaries

        assert self._source is not None
        known = self._by_operand(alignments)
        with torch.cuda.device(self.device):
            binaries = self._binaries or Binaries(note="no store was asked for it")
            module = bind(self._source, known, binaries.kernels, self._modules.pop(alignments, None), binaries.note)
        launch: Callable[..., None] = module.launch
        self._launchers[alignments] = launch
        if self._repeats and known == contiguous_alignments(self.spec):
            self._contiguous = Bound(module, self.device)
        return launch


Request = tuple[Kernel, tuple[int, ...]]
"""A kernel, and the alignments of its operands (:meth:`Kernel.alignments_of`) for which it is wanted."""
