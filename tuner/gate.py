"""The gate: what a candidate must do before it is timed.

It runs twice on inputs where each term dominates, into poisoned outputs. Every operand lies between guard bands in one
allocation. A candidate passes if it changed nothing but its outputs, both runs are equal in every bit, and the results
are within the bounds of :mod:`.accuracy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from ..codegen.spec import KernelSpec
from ..runtime.reference import definition
from .accuracy import Judge
from .evaluation import Rejected
from .inputs import make_inputs, make_outputs

GATE_TOKENS = 512
"""Tokens of the gate's inputs, less a few so that the last tile is ragged. Timing uses the full bucket."""

GUARD_BYTES = 1 << 20
"""Bytes before and after each operand: a tile beyond an operand's end begins right behind it."""

ALIGNED_BYTES = 256
"""What addresses are multiples of, as those that PyTorch allocates are of 512."""

_GUARD = 0xFF
"""The byte of guard bands. In every float dtype it gives NaN, so a result that depends on a guard band shows it; and no
kernel writes this NaN, since the hardware makes others."""


GATE_LAYERS = 3
"""Layers of the gate's inputs of a grouped operation at most: fp64 results take long, and more layers add nothing."""


def gate_tokens(spec: KernelSpec) -> int:
    """The tokens or layers of the gate's inputs for ``spec``: the same for all larger buckets of a shape."""
    if spec.layers:
        return min(spec.layers, GATE_LAYERS)
    return spec.tokens if spec.tokens <= 16 else min(spec.tokens, GATE_TOKENS) - 3


class Gate:
    """The gate of all specs that differ from ``spec`` only in their token bucket and have the same gate tokens."""

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        tokens = gate_tokens(spec)
        inputs, self._scaling = make_inputs(spec, tokens, case="mixed", seed=1, device=device)
        self._spec = spec
        self._judge = Judge(spec, definition(spec, inputs, self._scaling))
        self._inputs = Guarded(inputs)
        self._outputs = Guarded(make_outputs(spec, tokens, device))

    @staticmethod
    def bytes(spec: KernelSpec) -> int:
        """About how much memory the gate of ``spec`` holds: its operands twice, and fp64 results with bounds."""
        tokens, contract = gate_tokens(spec), spec.contract
        exact = sum(12 * operand.elements(spec, tokens) for operand in contract.outputs_of(spec))
        operands = contract.inputs_of(spec) + contract.outputs_of(spec)
        return exact + sum(8 * operand.elements(spec, tokens) + 4 * GUARD_BYTES for operand in operands)

    def check(self, launch: Callable[..., None]) -> float:
        """Run ``launch`` of a candidate twice; return its largest relative error.

        Raises:
            Rejected: it wrote out of bounds or into its inputs, is inaccurate, or not deterministic.
        """
        scalars = (self._scaling,) if self._spec.contract.scaling else ()
        operands = (*self._inputs.tensors.values(), *self._outputs.tensors.values(), *scalars)
        first: torch.Tensor | None = None
        for _ in range(2):
            self._outputs.restore()
            launch(*operands)
            if first is None:
                first = self._outputs.contents()
        assert first is not None
        self._check_bounds()
        error, complaint = self._judge.worst_error(self._outputs.tensors)
        if complaint:
            raise Rejected(f"inaccurate: {complaint}")
        if not self._outputs.equal(first):
            raise Rejected("not deterministic: two runs on equal inputs differ")
        return error

    def _check_bounds(self) -> None:
        outside = self._outputs.changed_guard() if self._outputs.guards_changed() else None
        if self._inputs.changed():  # guard bands and contents at once
            outside = outside or self._inputs.changed_guard()
            inside = self._inputs.changed_tensor()
            self._inputs.restore()
            if outside is None:
                raise Rejected(f"writes into its input {inside}")
        if outside is not None:
            raise Rejected(f"writes out of bounds: {outside}")


class Guarded:
    """Copies of tensors in one allocation, with guard bands between them; ``tensors`` are the copies by name."""

    def __init__(self, originals: Mapping[str, torch.Tensor]) -> None:
        starts, end = {}, GUARD_BYTES
        for name, tensor in originals.items():
            starts[name] = end
            end += -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES + GUARD_BYTES
        device = next(iter(originals.values())).device
        self._bytes = torch.full((end,), _GUARD, dtype=torch.uint8, device=device)
        self._inside = {name: slice(start, start + originals[name].nbytes) for name, start in starts.items()}
        self.tensors = {
            name: self._bytes[self._inside[name]].view(tensor.dtype).view(tensor.shape)
            for name, tensor in originals.items()
        }
        for name, tensor in originals.items():
            self.tensors[name].copy_(tensor)
        self._before = self._bytes.clone()

    def restore(self) -> None:
        """Make tensors and guard bands what they were at first."""
        self._bytes.copy_(self._before)

    def contents(self) -> torch.Tensor:
        """A copy of all bytes."""
        return self._bytes.clone()

    def equal(self, contents: torch.Tensor) -> bool:
        """Whether all bytes, of tensors and guard bands, are ``contents``."""
        return torch.equal(self._bytes.view(torch.int64), contents.view(torch.int64))

    def changed(self) -> bool:
        """Whether any byte, of a tensor or of a guard band, is not what it was at first."""
        return not self.equal(self._before)

    def guards_changed(self) -> bool:
        """Whether any byte of a guard band is not what it was at first."""
        changed = self._bytes.view(torch.int64).bitwise_xor(self._before.view(torch.int64))
        return bool(changed.bitwise_and_(self._is_guard.view(torch.int64)).any())

    def changed_guard(self) -> str | None:
        """Where guard bands were changed first, in words with the name of the nearest tensor; None if none was."""
        changed = torch.nonzero((self._bytes != self._before) & (self._is_guard != 0))
        if not changed.numel():
            return None
        byte = int(changed[0])
        name, inside = min(
            self._inside.items(), key=lambda item: min(abs(byte - item[1].start), abs(byte - item[1].stop + 1))
        )
        if byte < inside.start:
            return f"byte {inside.start - byte} before {name}"
        return f"byte {byte - inside.stop + 1} behind the end of {name}"

    @functools.cached_property
    def _is_guard(self) -> torch.Tensor:
        mask = torch.full_like(self._bytes, 0xFF)
        for inside in self._inside.values():
            mask[inside] = 0
        return mask

    def changed_tensor(self) -> str | None:
        """The name of the first tensor that is not what it was at first; None if all are."""
        for name, inside in self._inside.items():
            if not torch.equal(self._bytes[inside], self._before[inside]):
                return name
        return None
