"""The operations and their contracts: the tensors that go in and out, their shapes and dtypes, and the cost.

This table is the only definition of an operation's operands. The runtime checks arguments against it, the tuner makes
inputs from it, and every report's floors are computed from it. The maths is that of DoRA with the norm factored as in
"Scaling DoRA" (arXiv 2603.22276): ``w = ||W + sBA||_row``, ``g = m / max(w, eps)``, ``y = g*(Wx + sBAx) + b``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

ALIGNMENT = 16
"""Bytes of the widest memory access; it needs addresses and row strides that are multiples of this."""

EPS = 1e-12
"""``g = m / max(w, EPS)``, so that a zero row of ``W + sBA`` gives a finite g instead of NaN."""

SMALLEST_GAIN = {"bf16": 2.0**-32, "fp16": 2.0**-7, "fp32": 2.0**-32}
"""The smallest |g| for which y / g is base + s*lora with all digits of y's dtype.

y = g*inner must stay in the range of normal numbers. In fp16 the smallest one is 2**-14: with |g| >= 2**-7 every
|inner| >= 2**-7 keeps its digits, and smaller values add little to a sum. In bf16 and fp32 it is 2**-126: |g| >= 2**-32
leaves room for |dY*inner| down to 2**-94. For smaller |g|, for g = 0 and for NaN, dg is computed by
``compose_backward_exact``.
"""

LEAST_SHARE = 0.5
"""The smallest share of its terms' size that w**2 may be; smaller rows are summed directly (``weight_norm_exact``).

The rounding errors of ``w**2 = nW + 2s*c + s**2*q`` are relative to the size of its terms,
``nW + s**2*rowsum(B*B * rowsum(A*A))``. (The summands of q may be larger than q: where rows of A are alike, signs in B
cancel them.) So the relative error of w is that of the sums divided by the share. In fp32 on a CPU the sums are off by
1e-7 to 5e-7, so the bound of 1e-5 would hold down to a share of 0.05. Tensor cores truncate a running sum, which is
worse for rows of W along -BA: with truncation to 24 bits every 16 columns, w is off by 6.5e-6 over 8192 columns at a
share of 0.48, by 1.0e-5 at 0.38 (emulated). Adapters that are small beside W stay far above a share of one half.
"""


class Spec(Protocol):
    """What a contract reads of a spec: sizes, dtypes and flags by name (:class:`~doratune.codegen.spec.KernelSpec`)."""

    @property
    def op(self) -> str:
        """The operation's name."""


@dataclass(frozen=True)
class Operand:
    """One tensor of an operation: row-major, with contiguous rows and any row stride.

    Attributes:
        name: the argument's name.
        shape: the spec's fields that are its dimensions.
        dtype: a role of the spec (``weight``, ``activation``, ``adapter``, ``magnitude``) or a dtype name.
        when: the flag or optional dtype that adds the operand; ``!flag`` adds it where the flag is off.
        rare: read for exceptional values only, so not counted in the floor.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    when: str = ""
    rare: bool = False

    def present(self, spec: Spec) -> bool:
        """Return whether ``spec`` has this operand."""
        if not self.when:
            return True
        wanted = not self.when.startswith("!")
        return bool(getattr(spec, self.when.lstrip("!"))) == wanted

    def dtype_of(self, spec: Spec) -> str:
        """Return the dtype name (``bf16``, ``fp16``, ``fp32``) of this operand in ``spec``."""
        return self.dtype if self.dtype in DTYPE_BYTES else str(getattr(spec, self.dtype))

    def elements(self, spec: Spec, tokens: int | None = None) -> int:
        """Return the number of elements in ``spec``, for ``tokens`` tokens if given, else for the spec's bucket."""
        count = 1
        for dim in self.shape:
            count *= tokens if dim == "tokens" and tokens is not None else int(getattr(spec, dim))
        return count


@dataclass(frozen=True)
class Op:
    """A mathematical operation with a contract.

    Attributes:
        name: the name in specs.
        maths: the formula, as the emitted docstring prints it.
        dims, dtypes: the fields of :class:`~doratune.codegen.spec.KernelSpec` that a spec must have.
        optional_dtypes: dtypes that a spec may have; each adds operands.
        flags: the flags that a spec may set.
        inputs, outputs: the operands in the order of ``launch``'s arguments.
        scaling: whether the operation takes the scalar s.
        matrix_dims: the three sizes of its matrix product (``d_in+rank`` is their sum); empty for an elementwise one.
    """

    name: str
    maths: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    flags: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    scaling: bool
    matrix_dims: tuple[str, ...] = ()
    optional_dtypes: tuple[str, ...] = ()

    def inputs_of(self, spec: Spec) -> tuple[Operand, ...]:
        """Return the inputs of ``spec`` in argument order."""
        return tuple(operand for operand in self.inputs if operand.present(spec))

    def outputs_of(self, spec: Spec) -> tuple[Operand, ...]:
        """Return the outputs of ``spec`` in argument order."""
        return tuple(operand for operand in self.outputs if operand.present(spec))

    def floor_bytes(self, spec: Spec) -> int:
        """Return the least bytes to move: each input but rare ones read once, each output written once."""
        return sum(self._bytes(operand, spec) for operand in self._operands(spec) if not operand.rare)

    def operand_bytes(self, spec: Spec) -> int:
        """Return the bytes of all inputs and outputs."""
        return sum(self._bytes(operand, spec) for operand in self._operands(spec))

    def _operands(self, spec: Spec) -> tuple[Operand, ...]:
        return self.inputs_of(spec) + self.outputs_of(spec)

    def _bytes(self, operand: Operand, spec: Spec) -> int:
        return operand.elements(spec) * DTYPE_BYTES[operand.dtype_of(spec)]

    def matrix_flops(self, spec: Spec) -> int:
        """Return the floating-point operations of the matrix product, two for each multiply-add; 0 if there is none."""
        sizes = [sum(getattr(spec, name) for name in dim.split("+")) for dim in self.matrix_dims]
        return 2 * math.prod(sizes) if sizes else 0


WEIGHT_NORM = Op(
    name="weight_norm",
    maths="w = sqrt(nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T)))), nW = rowsum(W*W); g = m / max(w, eps)",
    dims=("d_out", "d_in", "rank"),
    dtypes=("weight", "adapter"),
    optional_dtypes=("magnitude",),
    flags=("save", "autocast"),
    inputs=(
        Operand("weight", ("d_out", "d_in"), "weight"),
        Operand("lora_A", ("rank", "d_in"), "adapter"),
        Operand("lora_B", ("d_out", "rank"), "adapter"),
        Operand("weight_sq", ("d_out",), "fp32", when="!save"),
        Operand("magnitude", ("d_out",), "magnitude", when="magnitude"),
    ),
    outputs=(
        Operand("norm", ("d_out",), "fp32"),
        Operand("g", ("d_out",), "fp32", when="magnitude"),
        Operand("weight_sq", ("d_out",), "fp32", when="save"),
    ),
    scaling=True,
    matrix_dims=("d_out", "d_in", "rank"),
)

WEIGHT_NORM_EXACT = Op(
    name="weight_norm_exact",
    maths="w = ||W + s*B@A|| in rows where w*w < (nW + s*s*rowsum(B*B*rowsum(A*A)))/2, else w; g = m / max(w, eps)",
    dims=("d_out", "d_in", "rank"),
    dtypes=("weight", "adapter"),
    optional_dtypes=("magnitude",),
    flags=("autocast",),
    inputs=(
        Operand("weight", ("d_out", "d_in"), "weight", rare=True),
        Operand("lora_A", ("rank", "d_in"), "adapter"),
        Operand("lora_B", ("d_out", "rank"), "adapter"),
        Operand("weight_sq", ("d_out",), "fp32"),
        Operand("norm", ("d_out",), "fp32"),
        Operand("magnitude", ("d_out",), "magnitude", when="magnitude"),
    ),
    outputs=(
        Operand("norm_exact", ("d_out",), "fp32"),
        Operand("g", ("d_out",), "fp32", when="magnitude"),
    ),
    scaling=True,
)

LORA_COMPOSE = Op(
    name="lora_compose",
    maths="y = g*(base + s*(h@B.T)) + b; delta form: (g-1)*base + g*s*(h@B.T)",
    dims=("d_out", "rank", "tokens"),
    dtypes=("activation", "adapter"),
    flags=("bias", "delta", "save", "autocast"),
    inputs=(
        Operand("base", ("tokens", "d_out"), "activation"),
        Operand("h", ("tokens", "rank"), "activation"),
        Operand("lora_B", ("d_out", "rank"), "adapter"),
        Operand("g", ("d_out",), "fp32"),
        Operand("bias", ("d_out",), "activation", when="bias"),
    ),
    outputs=(
        Operand("y", ("tokens", "d_out"), "activation"),
        Operand("inner", ("tokens", "d_out"), "activation", when="save"),
    ),
    scaling=True,
    matrix_dims=("tokens", "d_out", "rank"),
)

COMPOSE_FORWARD = Op(
    name="compose_forward",
    maths="y = g*(base + s*lora) + b; delta form: (g-1)*base + g*s*lora",
    dims=("d_out", "tokens"),
    dtypes=("activation",),
    flags=("bias", "delta", "save"),
    inputs=(
        Operand("base", ("tokens", "d_out"), "activation"),
        Operand("lora", ("tokens", "d_out"), "activation"),
        Operand("g", ("d_out",), "fp32"),
        Operand("bias", ("d_out",), "activation", when="bias"),
    ),
    outputs=(
        Operand("y", ("tokens", "d_out"), "activation"),
        Operand("inner", ("tokens", "d_out"), "activation", when="save"),
    ),
    scaling=True,
)

COMPOSE_BACKWARD = Op(
    name="compose_backward",
    maths="dYg = g*dY; dg = sum_t dY*inner with inner = base + s*lora, or y/g (0 where g is tiny); db = sum_t dY",
    dims=("d_out", "tokens"),
    dtypes=("activation",),
    flags=("bias", "output"),
    inputs=(
        Operand("dy", ("tokens", "d_out"), "activation"),
        Operand("inner", ("tokens", "d_out"), "activation", when="!output"),
        Operand("y", ("tokens", "d_out"), "activation", when="output"),
        Operand("g", ("d_out",), "fp32"),
    ),
    outputs=(
        Operand("dyg", ("tokens", "d_out"), "activation"),
        Operand("dg", ("d_out",), "fp32"),
        Operand("dbias", ("d_out",), "fp32", when="bias"),
    ),
    scaling=False,
)

DORA_LINEAR_FORWARD = Op(
    name="dora_linear_forward",
    maths="y = g*(x@W.T + s*(h@B.T)) + b, one sum over d_in + rank",
    dims=("d_out", "d_in", "rank", "tokens"),
    dtypes=("weight", "activation", "adapter"),
    flags=("bias", "save"),
    inputs=(
        Operand("x", ("tokens", "d_in"), "activation"),
        Operand("weight", ("d_out", "d_in"), "weight"),
        Operand("h", ("tokens", "rank"), "activation"),
        Operand("lora_B", ("d_out", "rank"), "adapter"),
        Operand("g", ("d_out",), "fp32"),
        Operand("bias", ("d_out",), "activation", when="bias"),
    ),
    outputs=(
        Operand("y", ("tokens", "d_out"), "activation"),
        Operand("inner", ("tokens", "d_out"), "activation", when="save"),
    ),
    scaling=True,
    matrix_dims=("tokens", "d_out", "d_in+rank"),
)

COMPOSE_BACKWARD_EXACT = Op(
    name="compose_backward_exact",
    maths="dg = sum_t dY*(x@W.T + s*(h@B.T)) in the columns whose g is too small to divide y by, dg elsewhere",
    dims=("d_out", "d_in", "rank", "tokens"),
    dtypes=("weight", "activation", "adapter"),
    optional_dtypes=("magnitude",),
    flags=("autocast",),
    inputs=(
        Operand("dy", ("tokens", "d_out"), "activation", rare=True),
        Operand("x", ("tokens", "d_in"), "activation", rare=True),
        Operand("weight", ("d_out", "d_in"), "weight", rare=True),
        Operand("h", ("tokens", "rank"), "activation", rare=True),
        Operand("lora_B", ("d_out", "rank"), "adapter", rare=True),
        Operand("g", ("d_out",), "fp32"),
        Operand("dg", ("d_out",), "fp32"),
        Operand("norm", ("d_out",), "fp32", when="magnitude"),
    ),
    outputs=(
        Operand("dg_exact", ("d_out",), "fp32", when="!magnitude"),
        Operand("dmagnitude", ("d_out",), "magnitude", when="magnitude"),
    ),
    scaling=True,
)

ADAPTER_BACKWARD = Op(
    name="adapter_backward",
    maths="dB = g*s*P; dg = sum_t dY*base + s*rowsum(B*P) with P = dY.T@h; dm = dg / max(w, eps)",
    dims=("d_out", "rank"),
    dtypes=("activation", "adapter"),
    optional_dtypes=("magnitude",),
    flags=(),
    inputs=(
        Operand("product", ("d_out", "rank"), "fp32"),
        Operand("lora_B", ("d_out", "rank"), "activation"),
        Operand("g", ("d_out",), "fp32"),
        Operand("dg_base", ("d_out",), "fp32"),
        Operand("norm", ("d_out",), "fp32", when="magnitude"),
    ),
    outputs=(
        Operand("dlora_B", ("d_out", "rank"), "adapter"),
        Operand("dg", ("d_out",), "fp32", when="!magnitude"),
        Operand("dmagnitude", ("d_out",), "magnitude", when="magnitude"),
    ),
    scaling=True,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        WEIGHT_NORM,
        WEIGHT_NORM_EXACT,
        LORA_COMPOSE,
        COMPOSE_FORWARD,
        COMPOSE_BACKWARD,
        COMPOSE_BACKWARD_EXACT,
        ADAPTER_BACKWARD,
        DORA_LINEAR_FORWARD,
    )
}
