"""The operations and their contracts: which tensors go in and out, in which shapes and dtypes, and what the work costs.

This table is the one place that says what an operation takes. The runtime checks arguments against it, the tuner makes
inputs from it, and the floors of every report are counted from it. The maths is that of DoRA with the norm factored as
in "Scaling DoRA" (arXiv 2603.22276): ``w = ||W + sBA||_row``, ``g = m / max(w, eps)``, ``y = g*(Wx + sBAx) + b``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

ALIGNMENT = 16
"""Bytes of the widest access: what an address and a row stride are multiples of where a kernel may use it."""

EPS = 1e-12
"""``g = m / max(w, EPS)``: a zero row of ``W + sBA`` gives a finite g instead of NaN."""


SMALLEST_GAIN = {"bf16": 2.0**-32, "fp16": 2.0**-7, "fp32": 2.0**-32}
"""The least |g| by which y can be divided to get base + s*lora back with the digits that y's dtype has.

What must not happen is that y = g*inner leaves the normal numbers. In fp16 they end at 2**-14: from g = 2**-7 on, every
|inner| of 2**-7 or more keeps its digits, and smaller ones add little to a sum of such values. In bf16 and fp32 they
end at 2**-126: g = 2**-32 leaves room for |dY*inner| down to 2**-94. Below the bound dg comes from
``compose_backward_exact``, as it does for g = 0, where y says nothing, and for NaN.
"""


LEAST_SHARE = 0.5
"""The least share of its terms' size that w**2 keeps: a row that has less is summed directly (``weight_norm_exact``).

``w**2 = nW + 2s*c + s**2*q`` is off by the rounding of its terms, and c and q by that of their own. Their size is
``nW + s**2*rowsum(B*B * rowsum(A*A))``: the second part is what q is added up from, which is more than q where the rows
of A are alike and B's signs take them away from each other again. The relative error of w is the sums' own divided by
the share. In fp32 on a CPU that is 1e-7 to 5e-7, so that 1e-5 would hold down to a share of 0.05. Tensor cores cut the
low bits off a running sum, which of a W along -BA takes more: cut to 24 bits every 16 columns, w is off by 6.5e-6 over
8192 columns at a share of 0.48, by 1.0e-5 at 0.38 (emulated). No adapter that is small beside W comes near a half.
"""


class Spec(Protocol):
    """A spec as its contract reads it: sizes, dtypes and flags by name (:class:`~doratune.codegen.spec.KernelSpec`)."""

    @property
    def op(self) -> str:
        """The operation's name."""


@dataclass(frozen=True)
class Operand:
    """One tensor of an operation: row-major, with named dimensions and a dtype role.

    A matrix may have any row stride, as a slice of a wider one has; the elements of a row are contiguous.
    ``dtype`` is a role of the spec (``weight``, ``activation``, ``adapter``, ``magnitude``) or a dtype name.
    ``when`` names the flag or optional role that brings the operand in; ``!flag`` is its absence. A ``rare`` operand is
    read for exceptional values only, and no part of the floor.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    when: str = ""
    rare: bool = False

    def present(self, spec: Spec) -> bool:
        """Whether this operand is part of ``spec``."""
        if not self.when:
            return True
        wanted = not self.when.startswith("!")
        return bool(getattr(spec, self.when.lstrip("!"))) == wanted

    def dtype_of(self, spec: Spec) -> str:
        """The dtype name (``bf16``, ``fp16``, ``fp32``) of this operand in ``spec``."""
        return self.dtype if self.dtype in DTYPE_BYTES else str(getattr(spec, self.dtype))

    def elements(self, spec: Spec, tokens: int | None = None) -> int:
        """The number of elements of this operand, with ``tokens`` rows in place of the spec's bucket when given."""
        count = 1
        for dim in self.shape:
            count *= tokens if dim == "tokens" and tokens is not None else int(getattr(spec, dim))
        return count


@dataclass(frozen=True)
class Op:
    """A mathematical operation with a contract.

    ``dims`` and ``dtypes`` are the fields of :class:`~doratune.codegen.spec.KernelSpec` the operation depends on;
    a spec holds no others. ``scaling`` says whether the operation takes the scalar s; ``matrix_dims`` are the three
    sizes of its matrix product (``d_in+rank``: their sum), none for an elementwise operation.
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
        """The tensors that ``spec`` takes, in argument order."""
        return tuple(operand for operand in self.inputs if operand.present(spec))

    def outputs_of(self, spec: Spec) -> tuple[Operand, ...]:
        """The tensors that ``spec`` returns, in order."""
        return tuple(operand for operand in self.outputs if operand.present(spec))

    def floor_bytes(self, spec: Spec) -> int:
        """The fewest bytes the operation moves: every input but rare ones read once, every output written once."""
        return sum(self._bytes(operand, spec) for operand in self._operands(spec) if not operand.rare)

    def operand_bytes(self, spec: Spec) -> int:
        """The bytes of all inputs and outputs."""
        return sum(self._bytes(operand, spec) for operand in self._operands(spec))

    def _operands(self, spec: Spec) -> tuple[Operand, ...]:
        return self.inputs_of(spec) + self.outputs_of(spec)

    def _bytes(self, operand: Operand, spec: Spec) -> int:
        return operand.elements(spec) * DTYPE_BYTES[operand.dtype_of(spec)]

    def matrix_flops(self, spec: Spec) -> int:
        """Floating-point operations of the matrix product: two for each multiply-add."""
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
