"""The operations and their contracts: the tensors that go in and out, their shapes and dtypes, and the cost.

This table is the only definition of an operation's operands. The runtime checks arguments against it, the tuner makes
inputs from it, and every report's floors are computed from it. The maths is that of DoRA with the norm factored as in
"Scaling DoRA" (arXiv 2603.22276): ``w = ||W + sBA||_row``, ``g = m / max(w, eps)``, ``y = g*(Wx + sBAx) + b``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .weight_formats import is_format, parse_format

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

OPERAND_BYTES = {**DTYPE_BYTES, "i64": 8, "u8": 1, "i8": 1}
"""Bytes of an element of every dtype that an operand may have: those of specs, a table's, and those of packed codes."""

RUN_TIME = ("tokens", "layers")
"""Dims whose size is a run-time argument: a kernel is right for any number of tokens or layers."""

TABLE_COLUMNS = 4
"""Columns of the table of a grouped operation: W, A, B, m. In a weight format W has one for each of its tensors."""

TABLE_UNIT = 512
"""Bytes of which the places in a table are multiples, or of the largest power of two that divides a row, if that is
less. PyTorch allocates memory in such blocks, and in a dense stack of layers each begins at a multiple of a row."""

ALIGNMENT = 16
"""Bytes of the widest memory access; it needs addresses and row strides that are multiples of this."""


def table_unit(row: int, dtype: str) -> int:
    """The elements of ``dtype`` of which the places of matrices with rows of ``row`` elements are multiples."""
    return math.gcd(row * DTYPE_BYTES[dtype], TABLE_UNIT) // DTYPE_BYTES[dtype]


def stored_unit(elements: int, dtype: str) -> int:
    """The same for a tensor of ``elements`` elements that W is stored in, which is one row."""
    return math.gcd(elements * OPERAND_BYTES[dtype], TABLE_UNIT) // OPERAND_BYTES[dtype]


DECODE_TOKENS = 16
"""Tokens up to which ``dora_linear_forward`` takes a W in a weight format: with more, every tile of tokens would decode
W again, and the product of a W that is decoded once takes less."""

IN_PLACE_RANK, IN_PLACE_TOKENS = 176, 128
"""Up to this rank and this token bucket a gated MLP is composed in one kernel; see :func:`adds_in_place`."""

IN_ONE_KERNEL = ("compose_swiglu", "compose_swiglu_backward")
"""The operations of a gated MLP that is composed in one kernel, forward and backward."""

IN_PLACE = ("swiglu_forward", "swiglu_backward")
"""The same where rank-r products are added to gate and up in memory."""


def adds_in_place(rank: int, tokens: int, activation: str) -> bool:
    """Whether a gated MLP adds s*(h@B.T) to gate and up in memory, with ``tokens`` in a bucket.

    It depends on nothing else, so that the recompute of a checkpoint gives the values of its first pass, with gradients
    or without. Then ``swiglu_forward`` and ``swiglu_backward`` run, each one pass. ``compose_swiglu`` and its backward
    save two passes and compute the products again in the backward pass (and once more for dA of down), which takes less
    up to some rank. Timed in turn on an H100, in us, a forward and a backward pass of either way, the second with
    cuBLAS's products: at 4096 tokens and 14336 columns 489 and 609 at r = 128, 620 and 614 at 192, 869 and 631 at 384;
    at 512 tokens 96 and 119, 108 and 120, 150 and 126. The built-in configs of the two passes are from later: by their
    tables they take 25 us less of the former and 30 of the latter.

    The sums are rounded once more than in one kernel, to bf16, as in PEFT. In fp16 they could be out of range where
    g*(base + s*(h@B.T)) is not.
    """
    return activation == "bf16" and rank > IN_PLACE_RANK and tokens > IN_PLACE_TOKENS


APART_TOKENS, APART_COLUMNS = 1024, 2048
"""Up to this token bucket, and below so many columns of the widest, a group is composed in one launch; see
:func:`composes_apart`."""


def composes_apart(rank: int, tokens: int, widths: Sequence[int], activation: str) -> bool:
    """Whether projections of one x are composed by a launch each, not by one for all, with ``tokens`` in a bucket.

    This is for GPUs on which ``lora_compose`` has a variant with specialised warps that the grouped kernel has not. An
    H100's entries of Llama-8B's q, k and v at r = 384 and 4096 tokens: 31 + 11 + 11 us, and 77 in one launch; in the
    backward pass 40 + 13 + 13 of ``compose_backward`` and 13 of ``adapter_backward``, and 97 in one launch, which
    multiplies h by B again.
    """
    many = rank > IN_PLACE_RANK and tokens > APART_TOKENS
    return activation == "bf16" and many and rank % 8 == 0 and max(widths) >= APART_COLUMNS


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
    """One tensor of an operation: row-major, with contiguous rows and any row stride; fully contiguous if grouped.

    Attributes:
        name: the argument's name.
        shape: its dimensions: the spec's fields, or products of them (``2*rank``).
        dtype: a role of the spec (``weight``, ``activation``, ``adapter``, ``magnitude``) or a dtype name.
        when: the flag, optional dtype or optional dim that adds the operand; ``!flag`` adds it where the flag is off,
            ``one&other`` where both do.
        rare: read for exceptional values only, so not counted in the floor.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    when: str = ""
    rare: bool = False

    def present(self, spec: Spec) -> bool:
        """Return whether ``spec`` has this operand."""
        conditions = self.when.split("&") if self.when else ()
        return all(bool(getattr(spec, name.lstrip("!"))) != name.startswith("!") for name in conditions)

    def dtype_of(self, spec: Spec) -> str:
        """Return the dtype name (``bf16``, ``fp16``, ``fp32``; ``i64`` for a table) of this operand in ``spec``."""
        return self.dtype if self.dtype in OPERAND_BYTES else str(getattr(spec, self.dtype))

    def elements(self, spec: Spec, tokens: int | None = None) -> int:
        """Return the number of elements in ``spec``, for ``tokens`` tokens or layers if given, else for its bucket."""
        return math.prod(self.sizes(spec, tokens))

    def sizes(self, spec: Spec, tokens: int | None = None) -> tuple[int, ...]:
        """Return the size of each dimension in ``spec``, for ``tokens`` tokens or layers if given, else its bucket."""
        return tuple(tokens if dim in RUN_TIME and tokens is not None else size_of(spec, dim) for dim in self.shape)


def size_of(spec: Spec, dim: str) -> int:
    """Return the size of a dimension: a field of ``spec``, a product (``2*rank``), or a sum of these."""
    return sum(
        math.prod(int(factor) if factor.isdigit() else int(getattr(spec, factor)) for factor in term.split("*"))
        for term in dim.split("+")
    )


def _as_stored(operand: Operand, spec: Spec) -> Iterator[Operand]:
    """The operand itself; in place of a W in a weight format, the flat tensors that it is stored in."""
    if operand.dtype != "weight" or not is_format(operand.dtype_of(spec)):
        yield operand
        return
    *lead, d_out, d_in = operand.shape
    sizes = size_of(spec, d_out), size_of(spec, d_in)
    for stored in parse_format(operand.dtype_of(spec)).operands(*sizes):
        yield Operand(stored.name, (*lead, str(stored.elements)), stored.dtype, operand.when, operand.rare)


@dataclass(frozen=True)
class Op:
    """A mathematical operation with a contract.

    Attributes:
        name: the name in specs.
        maths: the formula, as the emitted docstring prints it.
        dims, dtypes: the fields of :class:`~doratune.codegen.spec.KernelSpec` that a spec must have.
        optional_dims, optional_dtypes: dims and dtypes that a spec may have; each adds operands.
        flags: the flags that a spec may set.
        inputs, outputs: the operands in the order of ``launch``'s arguments.
        scaling: whether the operation takes the scalar s.
        formats: whether W may be in a weight format (:mod:`~doratune.codegen.weight_formats`); then a norm also redoes
            the rows whose terms nearly cancel.
        only_formats: whether it must be.
        format_tokens: the largest token bucket for a W in a weight format, where there is a limit.
        matrix_dims: the three sizes of its matrix product (``d_in+rank`` is their sum, ``2*rank`` stands for two
            products); empty for an elementwise one.
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
    optional_dims: tuple[str, ...] = ()
    formats: bool = False
    only_formats: bool = False
    format_tokens: int = 0

    def inputs_of(self, spec: Spec) -> tuple[Operand, ...]:
        """Return the inputs of ``spec`` in argument order; a W in a weight format is several."""
        return tuple(stored for operand in self.inputs if operand.present(spec) for stored in _as_stored(operand, spec))

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
        return operand.elements(spec) * OPERAND_BYTES[operand.dtype_of(spec)]

    def matrix_flops(self, spec: Spec) -> int:
        """Return the floating-point operations of the matrix product, two for each multiply-add; 0 if there is none."""
        sizes = [size_of(spec, dim) for dim in self.matrix_dims]
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
    formats=True,
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

WEIGHT_NORM_GROUP = Op(
    name="weight_norm_group",
    maths="for each layer: w = ||W + s*B@A||_row by nW + s*rowsum(B * (2*W@A.T + s*B@(A@A.T))); g = m / max(w, eps)",
    dims=("layers", "d_out", "d_in", "rank"),
    dtypes=("weight", "adapter", "magnitude"),
    flags=("autocast",),
    inputs=(
        # Where W, A, B and m of each layer begin, in elements from those of the operands below. The layers are a dense
        # stack in tests and in the tuner, and tensors of their own in use: then an operand is the one at the lowest
        # address. The order makes the number of layers the number of rows of the first operand.
        Operand("table", ("layers", "places"), "i64"),
        Operand("weight", ("layers", "d_out", "d_in"), "weight"),
        Operand("lora_A", ("layers", "rank", "d_in"), "adapter"),
        Operand("lora_B", ("layers", "d_out", "rank"), "adapter"),
        Operand("magnitude", ("layers", "d_out"), "magnitude"),
    ),
    outputs=(
        Operand("norm", ("layers", "d_out"), "fp32"),
        Operand("g", ("layers", "d_out"), "fp32"),
    ),
    scaling=True,
    matrix_dims=("layers", "d_out", "d_in", "rank"),
    formats=True,
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

_GATE_AND_UP = (
    Operand("gate", ("tokens", "d_out"), "activation"),
    Operand("up", ("tokens", "d_out"), "activation"),
)
_GAINS_AND_BIASES = (
    Operand("g_gate", ("d_out",), "fp32"),
    Operand("g_up", ("d_out",), "fp32"),
    Operand("bias_gate", ("d_out",), "activation", when="bias"),
    Operand("bias_up", ("d_out",), "activation", when="bias"),
)
_GATED_INPUTS = (
    *_GATE_AND_UP,
    Operand("h", ("tokens", "2*rank"), "activation"),
    Operand("lora_B_gate", ("d_out", "rank"), "adapter"),
    Operand("lora_B_up", ("d_out", "rank"), "adapter"),
    *_GAINS_AND_BIASES,
)
_GATED_NORMS = (
    Operand("norm_gate", ("d_out",), "fp32", when="magnitude"),
    Operand("norm_up", ("d_out",), "fp32", when="magnitude"),
)
_GATED_GRADIENTS = (
    Operand("dyg_gate", ("tokens", "d_out"), "activation"),
    Operand("dyg_up", ("tokens", "d_out"), "activation"),
    Operand("dg_gate", ("d_out",), "fp32", when="!magnitude"),
    Operand("dg_up", ("d_out",), "fp32", when="!magnitude"),
    Operand("dmagnitude_gate", ("d_out",), "magnitude", when="magnitude"),
    Operand("dmagnitude_up", ("d_out",), "magnitude", when="magnitude"),
    Operand("dbias_gate", ("d_out",), "fp32", when="bias"),
    Operand("dbias_up", ("d_out",), "fp32", when="bias"),
)

COMPOSE_SWIGLU = Op(
    name="compose_swiglu",
    maths="out = act(yg)*yu; yg = g_gate*(gate + s*(hg@Bg.T)) + bg, yu = g_up*(up + s*(hu@Bu.T)) + bu; h = [hg, hu]",
    dims=("d_out", "rank", "tokens"),
    dtypes=("activation", "adapter"),
    flags=("bias", "autocast", "gelu", "gelu_tanh"),
    inputs=_GATED_INPUTS,
    outputs=(Operand("out", ("tokens", "d_out"), "activation"),),
    scaling=True,
    matrix_dims=("tokens", "d_out", "2*rank"),
)

COMPOSE_SWIGLU_BACKWARD = Op(
    name="compose_swiglu_backward",
    maths="dYg = dout*yu*act'(yg), dYu = dout*act(yg); dyg = g*dY, dg = sum_t dY*(base + s*(h@B.T)), db = sum_t dY",
    dims=("d_out", "rank", "tokens"),
    dtypes=("activation", "adapter"),
    optional_dtypes=("magnitude",),
    flags=("bias", "autocast", "gelu", "gelu_tanh"),
    inputs=(Operand("dout", ("tokens", "d_out"), "activation"), *_GATED_INPUTS, *_GATED_NORMS),
    outputs=_GATED_GRADIENTS,
    scaling=True,
    matrix_dims=("tokens", "d_out", "2*rank"),
)

SWIGLU_FORWARD = Op(
    name="swiglu_forward",
    maths="out = act(yg)*yu; yg = g_gate*gate + bg, yu = g_up*up + bu, of gate and up = base + s*(h@B.T)",
    dims=("d_out", "tokens"),
    dtypes=("activation",),
    flags=("bias", "gelu", "gelu_tanh"),
    inputs=(*_GATE_AND_UP, *_GAINS_AND_BIASES),
    outputs=(Operand("out", ("tokens", "d_out"), "activation"),),
    scaling=False,
)

SWIGLU_BACKWARD = Op(
    name="swiglu_backward",
    maths="dYg = dout*yu*act'(yg), dYu = dout*act(yg); dyg = g*dY, dg = sum_t dY*(gate or up), db = sum_t dY",
    dims=("d_out", "tokens"),
    dtypes=("activation",),
    optional_dtypes=("magnitude",),
    flags=("bias", "gelu", "gelu_tanh"),
    inputs=(Operand("dout", ("tokens", "d_out"), "activation"), *_GATE_AND_UP, *_GAINS_AND_BIASES, *_GATED_NORMS),
    outputs=_GATED_GRADIENTS,
    scaling=False,
)

WIDTHS = ("d_out", "d_out_2", "d_out_3")
"""The widths of a group's projections, of which there are two or three."""


def _each(name: str, leading: str, dtype: str, when: str = "") -> tuple[Operand, ...]:
    """A group's operands ``name_1``, ``name_2`` and, of three projections, ``name_3``.

    Each is [leading, width]; [width, rank] if ``leading`` is ``rank``, and [width] without one.
    """
    operands = []
    for number, width in enumerate(WIDTHS, 1):
        shape = (width, "rank") if leading == "rank" else (leading, width) if leading else (width,)
        conditions = [when, width if number == len(WIDTHS) else ""]
        operands.append(Operand(f"{name}_{number}", shape, dtype, when="&".join(filter(None, conditions))))
    return tuple(operands)


LORA_COMPOSE_GROUP = Op(
    name="lora_compose_group",
    maths="for each projection of one x: y = g*(base + s*(h@B.T)) + b, with its own columns of h = [h_1, h_2, ...]",
    dims=("d_out", "d_out_2", "rank", "tokens"),
    optional_dims=("d_out_3",),
    dtypes=("activation", "adapter"),
    flags=("bias", "autocast"),
    inputs=(
        *_each("base", "tokens", "activation"),
        Operand("h", ("tokens", "members*rank"), "activation"),
        *_each("lora_B", "rank", "adapter"),
        *_each("g", "", "fp32"),
        *_each("bias", "", "activation", when="bias"),
    ),
    outputs=_each("y", "tokens", "activation"),
    scaling=True,
    matrix_dims=("tokens", "+".join(WIDTHS), "rank"),
)

COMPOSE_BACKWARD_GROUP = Op(
    name="compose_backward_group",
    maths="for each projection of one x: dYg = g*dY; dg = sum_t dY*(base + s*(h@B.T)), dm = dg / max(w, eps)",
    dims=("d_out", "d_out_2", "rank", "tokens"),
    optional_dims=("d_out_3",),
    dtypes=("activation", "adapter"),
    optional_dtypes=("magnitude",),
    flags=("autocast",),
    inputs=(
        *_each("dy", "tokens", "activation"),
        *_each("base", "tokens", "activation"),
        Operand("h", ("tokens", "members*rank"), "activation"),
        *_each("lora_B", "rank", "adapter"),
        *_each("g", "", "fp32"),
        *_each("norm", "", "fp32", when="magnitude"),
    ),
    outputs=(
        *_each("dyg", "tokens", "activation"),
        *_each("dg", "", "fp32", when="!magnitude"),
        *_each("dmagnitude", "", "magnitude", when="magnitude"),
    ),
    scaling=True,
    matrix_dims=("tokens", "+".join(WIDTHS), "rank"),
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
    formats=True,
    format_tokens=DECODE_TOKENS,
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

WEIGHT_DEQUANTISE = Op(
    name="weight_dequantise",
    maths="dense = round(round(code - zero) * scale) for each element of W, as the format has it",
    dims=("d_out", "d_in"),
    dtypes=("weight", "activation"),
    flags=(),
    inputs=(Operand("weight", ("d_out", "d_in"), "weight"),),
    outputs=(Operand("dense", ("d_out", "d_in"), "activation"),),
    scaling=False,
    formats=True,
    only_formats=True,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        WEIGHT_NORM,
        WEIGHT_NORM_EXACT,
        WEIGHT_NORM_GROUP,
        LORA_COMPOSE,
        COMPOSE_FORWARD,
        COMPOSE_BACKWARD,
        COMPOSE_BACKWARD_EXACT,
        ADAPTER_BACKWARD,
        COMPOSE_SWIGLU,
        COMPOSE_SWIGLU_BACKWARD,
        SWIGLU_FORWARD,
        SWIGLU_BACKWARD,
        LORA_COMPOSE_GROUP,
        COMPOSE_BACKWARD_GROUP,
        DORA_LINEAR_FORWARD,
        WEIGHT_DEQUANTISE,
    )
}
