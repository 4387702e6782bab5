"""What a kernel is to compute (:class:`KernelSpec`) and how (:class:`Config`): two frozen values, one text form each.

A spec holds only what its operation depends on, so equal kernels are one tuning job and one store entry. Both values
parse and print back exactly::

    >>> text = "lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16/bias@h200"
    >>> str(KernelSpec.parse(text)) == text
    True
    >>> str(Config.parse("tile:block_n=128,block_t=64,num_warps=4,num_stages=3"))
    'tile:block_n=128,block_t=64,num_warps=4,num_stages=3'
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UsageError, near_names
from ..printable import brief
from .ops import DTYPE_BYTES, OPS, RUN_TIME, TABLE_COLUMNS, WIDTHS, Op
from .weight_formats import KINDS, FormatError, WeightFormat, is_format, parse_format, wide_dtype

TOKEN_BUCKETS = (1, 16, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Token counts that kernels are tuned for. The count is a run-time argument: every kernel works for any T >= 1."""

LAYER_BUCKETS = (1, 2, 4, 8, 16, 32)
"""Layer counts that grouped kernels are tuned for. The count is a run-time argument, as the token count is; with more
layers the GPU is as full, and a search would only take more memory."""

DIMS = (*WIDTHS, "d_in", "rank", "tokens", "layers")
DTYPES = ("weight", "activation", "adapter", "magnitude")
TILE_DTYPES = ("weight", "activation", "adapter")
"""The dtypes of the matrices; the magnitude is a vector."""
FLAGS = ("bias", "delta", "save", "output", "autocast", "gelu", "gelu_tanh")

MOST_SIZE = 1 << 24
"""The largest size of a dimension: a bound for what comes from files, 64 times the widest output of a known model."""
MOST_RANK = 1 << 16
"""The largest rank."""
MOST_PARAMETER = 1 << 24
"""The largest value of a config's parameter: a share of the columns may be all of them."""
MOST_CHARACTERS = 512
"""Characters of a spec's or a config's text at most."""

_GPU_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,63}")


class SpecError(UsageError):
    """A spec, config or dimension is invalid; the message names the field and the valid values."""


def bucket_tokens(tokens: int) -> int:
    """Return the smallest token bucket that holds ``tokens``, or the largest bucket beyond it.

    Raises:
        SpecError: ``tokens`` is not a positive integer.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise SpecError(f"tokens={brief(tokens)}: the number of tokens must be an integer of at least 1")
    return next((bucket for bucket in TOKEN_BUCKETS if tokens <= bucket), TOKEN_BUCKETS[-1])


def most_tokens(op: str, weight: str) -> int:
    """Return the largest token bucket of ``op`` with W in this dtype or weight format."""
    limit = OPS[op].format_tokens
    return limit if limit and is_format(weight) else TOKEN_BUCKETS[-1]


def bucket_layers(layers: int) -> int:
    """Return the smallest layer bucket that holds ``layers``, or the largest bucket beyond it.

    Raises:
        SpecError: ``layers`` is not a positive integer.
    """
    _check_positive("layers", layers, "the number of layers of one shape")
    return next((bucket for bucket in LAYER_BUCKETS if layers <= bucket), LAYER_BUCKETS[-1])


def _check_positive(name: str, value: object, remark: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{name}={brief(value)}: must be an integer of at least 1 ({remark})")


def _check_size(name: str, value: int) -> None:
    most = MOST_RANK if name == "rank" else MOST_SIZE
    if value > most:
        raise SpecError(f"{name}={brief(value)}: must be at most {most}")


_DIGITS = len(str(MOST_SIZE))


def _check_length(what: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise SpecError(f"{what} {brief(text)}: has {len(text)} characters; it must have at most {MOST_CHARACTERS}")


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes, for which shapes, dtypes and GPU.

    A field that the operation does not depend on is 0, empty or False.

    Attributes:
        op: the operation's name, a key of :data:`~doratune.codegen.ops.OPS`.
        d_out, d_in, rank: the layer's sizes, in elements. d_out_2, d_out_3: the widths of the other projections that a
            grouped kernel serves.
        tokens: one of :data:`TOKEN_BUCKETS`.
        layers: one of :data:`LAYER_BUCKETS`: how many layers of this shape a grouped kernel serves.
        weight, activation, adapter, magnitude: the dtypes of W, of x and y, of A and B, and of m (``bf16``, ``fp16``,
            ``fp32``). W and x have one dtype; adapters have that dtype or fp32. W's may be a weight format (``nf4``);
            then the others go by the dtype of its values (``wide``).
        bias: y includes the bias b.
        delta: the output is ``(g-1)*base + g*s*lora``, to be added to base.
        save: the forward also returns ``inner`` (the norm: ``weight_sq``), which the backward reads.
        output: the backward gets y in place of ``inner``.
        autocast: fp32 adapters are rounded to the 16-bit dtype, as ``torch.autocast`` does.
        gelu, gelu_tanh: the activation of a gated MLP is GELU, or its tanh form, in place of SiLU.
        gpu: the slug of a listed GPU (``h200``) or of an architecture (``sm_90``).

    Raises:
        SpecError: an unknown operation; a missing, superfluous or invalid field.
    """

    op: str
    d_out: int = 0
    d_out_2: int = 0
    d_out_3: int = 0
    d_in: int = 0
    rank: int = 0
    tokens: int = 0
    layers: int = 0
    weight: str = ""
    activation: str = ""
    adapter: str = ""
    magnitude: str = ""
    bias: bool = False
    delta: bool = False
    save: bool = False
    output: bool = False
    autocast: bool = False
    gelu: bool = False
    gelu_tanh: bool = False
    gpu: str = "h200"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise SpecError(f"unknown operation {brief(self.op)}{near_names(self.op, OPS)} (known: {', '.join(OPS)})")
        op = OPS[self.op]
        for dim in DIMS:
            self._check_dim(op, dim)
        for role in DTYPES:
            self._check_dtype(op, role)
        for flag in FLAGS:
            value = getattr(self, flag)
            if not isinstance(value, bool):
                raise SpecError(f"{flag} must be True or False, got {value!r}")
            if value and flag not in op.flags:
                raise SpecError(f"{self.op} has no flag {flag!r} (its flags: {', '.join(op.flags) or 'none'})")
        if self.bias and self.delta:
            raise SpecError("bias and delta exclude each other: the output that delta is added to includes the bias")
        if self.bias and self.output:
            raise SpecError(
                "bias and output exclude each other: y includes the bias, and y - b has no digits left where b is as "
                "large as y; for a layer with a bias, save inner"
            )
        if self.gelu and self.gelu_tanh:
            raise SpecError("gelu and gelu_tanh exclude each other: the activation is one of the two")
        wide = self.wide
        if self.autocast and (self.adapter != "fp32" or wide == "fp32"):
            raise SpecError(
                f"autocast needs fp32 adapters and 16-bit tensors, got {self.adapter} adapters and {wide} tensors: "
                "there is nothing to round, so leave it out"
            )
        if not _GPU_PATTERN.fullmatch(self.gpu):
            raise SpecError(f"gpu must be a name such as h200, rtx4090 or sm_90, got {brief(self.gpu)}")

    def _check_dim(self, op: Op, dim: str) -> None:
        value = getattr(self, dim)
        if dim in op.optional_dims and not value:
            return
        if dim not in op.dims + op.optional_dims:
            if value:
                raise SpecError(f"{op.name} does not depend on {dim}: leave it out (it takes {', '.join(op.dims)})")
            return
        _check_positive(dim, value, f"{op.name} takes {', '.join(op.dims)}")
        _check_size(dim, value)
        if dim == "tokens" and value not in TOKEN_BUCKETS:
            raise SpecError(
                f"tokens={value} is not a token bucket; use {bucket_tokens(value)} "
                f"(buckets: {', '.join(map(str, TOKEN_BUCKETS))})"
            )
        if dim == "layers" and value not in LAYER_BUCKETS:
            raise SpecError(
                f"layers={value} is not a layer bucket; use {bucket_layers(value)} "
                f"(buckets: {', '.join(map(str, LAYER_BUCKETS))})"
            )

    def _check_dtype(self, op: Op, role: str) -> None:
        value = getattr(self, role)
        if not value:
            if role in op.dtypes:
                raise SpecError(f"{op.name} needs the {role} dtype (one of {', '.join(DTYPE_BYTES)})")
            return
        if role not in op.dtypes + op.optional_dtypes:
            raise SpecError(f"{op.name} does not depend on the {role} dtype: leave it out")
        if role == "weight" and is_format(value):
            self._check_format(op, value)
        elif role == "weight" and op.only_formats:
            raise SpecError(f"weight={value!r}: {op.name} reads a W in a weight format ({', '.join(KINDS)})")
        elif value not in DTYPE_BYTES:
            also = f" or a weight format ({', '.join(KINDS)})" if role == "weight" and op.formats else ""
            raise SpecError(f"{role}={value!r}: unsupported dtype; use one of {', '.join(DTYPE_BYTES)}{also}")
        if role == "activation" and self.weight and value != self.wide:
            raise SpecError(f"activation={value} with {self.weight} weights: a product takes one dtype for both")
        if role == "adapter":
            wide = self.wide
            if value not in (wide, "fp32"):
                raise SpecError(f"adapter={value} with {wide} tensors: adapters are {wide} or fp32")

    def _check_format(self, op: Op, value: str) -> None:
        """Check a weight format, and write it in its own form."""
        if not op.formats:
            able = ", ".join(name for name, other in OPS.items() if other.formats)
            raise SpecError(f"weight={value}: {op.name} reads plain weights only (weight formats: {able})")
        try:
            form = parse_format(value)
        except FormatError as error:
            raise SpecError(f"weight={value}: {error}") from error
        refused = form.refuse(self.d_out, self.d_in)
        if refused:
            raise SpecError(f"weight={value}: {refused}")
        if self.tokens > most_tokens(op.name, value):
            raise SpecError(
                f"weight={value}: {op.name} reads packed weights for at most {op.format_tokens} tokens, "
                f"got tokens={self.tokens}"
            )
        object.__setattr__(self, "weight", str(form))

    @classmethod
    def create(cls, op: str, **values: Any) -> KernelSpec:
        """Make the spec of ``op`` from a superset of its fields; those that the operation does not have are dropped.

        ``tokens`` and ``layers`` may be any counts and are rounded up to their buckets. ``dtype`` sets both ``weight``
        and ``activation``. Where the operation needs a number of layers and none is given, it is 1; where it needs m's
        dtype, it is the adapters'. The second projection of a group has the first one's width unless ``d_out_2`` is
        given.

        Raises:
            SpecError: as for the constructor.
        """
        if op not in OPS:
            raise SpecError(f"unknown operation {op!r}{near_names(op, OPS)} (known: {', '.join(OPS)})")
        contract = OPS[op]
        for dim in DIMS:
            if values.get(dim) is not None:
                _check_positive(dim, values[dim], "even if the operation does not depend on it")
                if dim not in RUN_TIME:
                    _check_size(dim, values[dim])
        if "dtype" in values:
            dtype = values.pop("dtype")
            values = {"weight": dtype, "activation": wide_dtype(dtype), **values}
        if values.get("tokens") is not None:
            values["tokens"] = bucket_tokens(values["tokens"])
        if "d_out_2" in contract.dims and values.get("d_out_2") is None:
            values["d_out_2"] = values.get("d_out")
        if values.get("layers") is not None:
            values["layers"] = bucket_layers(values["layers"])
        if "layers" in contract.dims and values.get("layers") is None:
            values["layers"] = 1
        if "magnitude" in contract.dtypes and values.get("magnitude") is None:
            values["magnitude"] = values.get("adapter")
        kept = {*contract.dims, *contract.optional_dims, *contract.dtypes, *contract.optional_dtypes, *FLAGS, "gpu"}
        return cls(op, **{name: value for name, value in values.items() if name in kept and value is not None})

    @classmethod
    def parse(cls, text: str) -> KernelSpec:
        """Parse the text form, ``op/field=value/…/flag@gpu``.

        Raises:
            SpecError: the text is malformed; the message names the part and, for a typo, similar names.
        """
        _check_length("spec", text)
        body, at, gpu = text.strip().partition("@")
        if not at or not gpu:
            raise SpecError(f"spec {brief(text)} names no GPU: end it with @h200, @rtx4090, @sm_90, …")
        op, *parts = body.split("/")
        values: dict[str, Any] = {}
        for part in parts:
            name, equals, value = part.partition("=")
            known = (*DIMS, *DTYPES) if equals else FLAGS
            if name not in known:
                kind = "field" if equals else "flag"
                raise SpecError(
                    f"spec {text!r}: unknown {kind} {brief(name)}{near_names(name, known)} (known: {', '.join(known)})"
                )
            if name in values:
                raise SpecError(f"spec {text!r}: {name} is given twice")
            if not equals:
                values[name] = True
            elif name in DIMS:
                if not re.fullmatch(r"[0-9]+", value):
                    raise SpecError(f"spec {text!r}: {name}={value!r} is not a whole number")
                if len(value) > _DIGITS:
                    raise SpecError(f"spec {text!r}: {name} must be at most {MOST_SIZE}")
                values[name] = int(value)
            else:
                values[name] = value
        return cls(op, gpu=gpu, **values)

    def __str__(self) -> str:
        parts = [self.op]
        parts += [f"{name}={getattr(self, name)}" for name in (*DIMS, *DTYPES) if getattr(self, name)]
        parts += [flag for flag in FLAGS if getattr(self, flag)]
        return "/".join(parts) + "@" + self.gpu

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each projection that the kernel serves: d_out, d_out_2 and d_out_3 where they are given."""
        return tuple(width for width in (self.d_out, self.d_out_2, self.d_out_3) if width)

    @property
    def members(self) -> int:
        """The number of projections that the kernel serves."""
        return len(self.widths)

    @property
    def contract(self) -> Op:
        """The contract of this spec's operation."""
        return OPS[self.op]

    @property
    def count(self) -> int:
        """The bucket of the count that is a run-time argument: of tokens or of layers; 0 where there is none."""
        return self.tokens or self.layers

    @property
    def family(self) -> KernelSpec:
        """The spec with the smallest bucket of its count: equal for specs of one shape, whose code is the same."""
        return replace(self, tokens=min(self.tokens, 1), layers=min(self.layers, 1))

    @property
    def format(self) -> WeightFormat | None:
        """How W is stored if that is a weight format; None where W has a plain dtype."""
        return parse_format(self.weight) if is_format(self.weight) else None

    @property
    def wide(self) -> str:
        """The dtype of the values of W, or of x where there is no W: that of the products."""
        form = self.format
        return form.dtype if form else self.weight or self.activation

    @property
    def most_tokens(self) -> int:
        """The largest token bucket that a spec of this operation and W's dtype can have."""
        return most_tokens(self.op, self.weight)

    @property
    def places(self) -> int:
        """The columns of a table of layers: where W (each of its tensors), A, B and m of a layer begin."""
        form = self.format
        return TABLE_COLUMNS + (len(form.operands(self.d_out, self.d_in)) - 1 if form else 0)


@dataclass(frozen=True)
class Config:
    """How a kernel does its work. A config is a plain validated value, never code.

    Attributes:
        variant: the variant's name, part of its template's file name.
        params: (name, value) pairs of the tile parameters, sorted by name.
        num_warps: warps per Triton program.
        num_stages: stages of Triton's software pipeline.

    Raises:
        SpecError: an invalid variant name, or a parameter that is not a non-negative integer.
    """

    variant: str
    params: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", tuple(sorted((str(name), value) for name, value in self.params)))
        if not isinstance(self.variant, str) or not _NAME_PATTERN.fullmatch(self.variant):
            raise SpecError(f"config: variant must be a name such as 'tile', got {brief(self.variant)}")
        for name, value in (*self.params, ("num_warps", self.num_warps), ("num_stages", self.num_stages)):
            if not _NAME_PATTERN.fullmatch(name):
                raise SpecError(f"config: a parameter must be a name such as block_n, got {brief(name)}")
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SpecError(f"config: {name} must be an integer of at least 0, got {brief(value)}")
            if value > MOST_PARAMETER:
                raise SpecError(f"config: {name} must be at most {MOST_PARAMETER}, got {brief(value)}")

    @classmethod
    def create(cls, variant: str, *, num_warps: int, num_stages: int, **params: int) -> Config:
        """Make a config from tile parameters given by name.

        Raises:
            SpecError: as for the constructor.
        """
        return cls(variant, tuple(params.items()), num_warps, num_stages)

    @classmethod
    def parse(cls, text: str) -> Config:
        """Parse ``variant:name=value,…,num_warps=…,num_stages=…``.

        Raises:
            SpecError: the text is malformed.
        """
        _check_length("config", text)
        variant, _, rest = text.strip().partition(":")
        values: dict[str, int] = {}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals or not re.fullmatch(r"[0-9]+", value) or name in values:
                raise SpecError(f"config {text!r}: {part!r} must be name=number, each name once")
            if len(value) > _DIGITS:
                raise SpecError(f"config {text!r}: {name} must be at most {MOST_PARAMETER}")
            values[name] = int(value)
        missing = {"num_warps", "num_stages"} - values.keys()
        if missing:
            raise SpecError(f"config {brief(text)} lacks {' and '.join(sorted(missing))}")
        return cls.create(variant, **values)

    @classmethod
    def from_dict(cls, data: Any) -> Config:
        """Make a config from the JSON form ``{"variant": …, "num_warps": …, "num_stages": …, tile parameters…}``.

        Raises:
            SpecError: ``data`` is not such an object.
        """
        if not isinstance(data, dict) or not {"variant", "num_warps", "num_stages"} <= data.keys():
            raise SpecError(f"config: expected an object with variant, num_warps and num_stages, got {brief(data)}")
        values = dict(data)
        return cls.create(values.pop("variant"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "variant": self.variant,
            **dict(self.params),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def __getitem__(self, name: str) -> int:
        """Return the tile parameter ``name``."""
        return dict(self.params)[name]

    def __str__(self) -> str:
        params = [f"{name}={value}" for name, value in self.params]
        return f"{self.variant}:" + ",".join([*params, f"num_warps={self.num_warps}", f"num_stages={self.num_stages}"])


SPEC_FIELDS = tuple(field.name for field in fields(KernelSpec))
