"""How the numbers of a quantised W are stored: packed codes, scales, zero points, and what one element decodes to.

A format is a dtype of a spec (``weight=nf4``). This table is the only definition: operands, the eager dequantiser
(:mod:`~doratune.runtime.dequantise`) and the templates (``_weight_formats.j2``) follow it. A format prints and parses
back exactly::

    >>> str(WeightFormat.parse("nf4.128.nested.fp16"))
    'nf4.128.nested.fp16'
    >>> str(WeightFormat.parse("nf4.64.bf16"))  # what is usual for a kind is left out
    'nf4'

Element (i, j) of W [d_out, d_in] has the flat position ``e = i*d_in + j``. Its value is
``round(round(code - zero) * scale)``, without ``- zero`` where the format has none. ``round`` rounds to the dtype that
the layer's product takes, as the library does. An *exact* format has no ``round``: the library multiplies by the codes
and applies the scales to the product.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import UsageError, near_names

NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of NF4's codes (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes has them in fp32."""

FP4_TABLE = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""The values of bitsandbytes' FP4 codes: a sign bit, then (0, 0.0625, 8, 12, 4, 6, 2, 3) / 12."""

NESTED_TABLE = 256
"""Entries of the table by which the 8-bit codes of nested scales are decoded."""

NESTED_BLOCK = 256
"""The usual number of nested scales that share an outer scale."""

INT8_UNIT = 127
"""LLM.int8 keeps the largest magnitude of a row: ``W = code * scale / 127``."""

TILE = 128
"""The side of the square tiles of W that share a scale, where a format has such tiles."""

_DTYPES = ("bf16", "fp16", "fp32")
_SPREADS = ("block", "strided", "row", "tensor", "tile")


class FormatError(UsageError):
    """A weight format is unknown or its parts do not fit together; the message names the part and the valid ones."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a stored W, flat and contiguous.

    Attributes:
        name: the argument's name: ``weight`` (the packed codes), ``scales``, ``zeros``, ``scale_table``,
            ``outer_scales``, ``scale_offset``.
        elements: its number of elements.
        dtype: ``u8``, ``i8``, ``bf16``, ``fp16`` or ``fp32``. Codes are ``u8`` whatever they mean: view them so.
    """

    name: str
    elements: int
    dtype: str


@dataclass(frozen=True)
class Kind:
    """What all formats of a kind have in common.

    Attributes:
        library: where such weights come from.
        bits: of a code.
        packing: where the code of element e of n is. ``bytes``: byte e. ``pairs``: byte e//2, the high half for even
            e. ``halves``: the high half of byte e for e < n/2, else the low half of byte e - n/2.
        codes: ``signed`` or ``unsigned`` integers, ``e4m3`` numbers, or indices into ``table``.
        table: the value of each code, for indices.
        group: the usual number of elements that share a scale, 0 where only a row, a tile or the tensor does.
        spreads: the ways in which scales may be spread over W, the usual one first.
        scales: the dtype of scales; empty where it is the layer's.
        zeros: the dtype of zero points; empty where it is the layer's. optional_zeros: whether there may be none.
            has_zeros: whether there may be any.
        nests: whether the scales themselves may be quantised.
        exact: the spreads for which the library applies the scales to the product.
        unit: what a code of 1 is worth: 1/unit of the scale.
        rounds_inputs: whether the library's layer rounds its input, too, so that its product is none with W.
    """

    library: str
    bits: int
    packing: str
    codes: str
    spreads: tuple[str, ...]
    group: int = 0
    table: tuple[float, ...] = ()
    scales: str = ""
    has_zeros: bool = False
    optional_zeros: bool = False
    zeros: str = ""
    nests: bool = False
    exact: tuple[str, ...] = ()
    unit: int = 1
    rounds_inputs: bool = False


KINDS = {
    "nf4": Kind(
        "bitsandbytes 4-bit", 4, "pairs", "index", ("block",), group=64, table=NF4_TABLE, scales="fp32", nests=True
    ),
    "fp4": Kind(
        "bitsandbytes 4-bit", 4, "pairs", "index", ("block",), group=64, table=FP4_TABLE, scales="fp32", nests=True
    ),
    "int8": Kind(
        "bitsandbytes 8-bit",
        8,
        "bytes",
        "signed",
        ("row",),
        scales="fp32",
        exact=("row",),
        unit=INT8_UNIT,
        rounds_inputs=True,
    ),
    "ao8": Kind(
        "torchao int8",
        8,
        "bytes",
        "signed",
        ("row", "tensor", "block"),
        group=32,
        has_zeros=True,
        optional_zeros=True,
        zeros="i8",
        exact=("row", "tensor"),
    ),
    "hqq8": Kind("HQQ 8-bit", 8, "bytes", "unsigned", ("block", "strided"), group=64, has_zeros=True),
    "hqq4": Kind("HQQ 4-bit", 4, "halves", "unsigned", ("block", "strided"), group=64, has_zeros=True),
    "fp8": Kind("float8 e4m3", 8, "bytes", "e4m3", ("row", "tensor", "tile"), scales="fp32"),
}
"""The kinds of formats by the name that begins their text."""


@dataclass(frozen=True)
class WeightFormat:
    """How W is stored and decoded.

    Attributes:
        kind: a key of :data:`KINDS`.
        spread: which elements share a scale (and a zero point). ``block``: ``group`` consecutive ones, by e // group.
            ``strided``: those ``n / group`` apart, by e mod (n / group) (HQQ's axis 0). ``row``, ``tensor``, ``tile``
            (128x128 elements, row-major tiles).
        group: elements that share a scale, for ``block`` and ``strided``; else 0.
        nested: the block size of scales that are themselves stored as 8-bit codes:
            ``scale = scale_table[code] * outer_scales[block // nested] + scale_offset``; 0 where scales are numbers.
        zeros: whether there are zero points.
        exact: values are not rounded.
        scales: the dtype of the scales where they are numbers (and of HQQ's zero points).
        dtype: the dtype to which values are rounded, which the layer's product takes (``bf16``, ``fp16``, ``fp32``).

    Raises:
        FormatError: an unknown kind, or parts that it does not have.
    """

    kind: str
    spread: str = ""
    group: int = 0
    nested: int = 0
    zeros: bool = False
    exact: bool = False
    scales: str = ""
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise FormatError(
                f"unknown weight format {self.kind!r}{near_names(self.kind, KINDS)} (known: {', '.join(KINDS)})"
            )
        if self.dtype not in _DTYPES:
            raise FormatError(f"{self.kind}: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        spread = self.spread or kind.spreads[0]
        grouped = spread in ("block", "strided")
        usual = {
            "spread": spread,
            "group": self.group or (kind.group if grouped else 0),
            "zeros": self.zeros or (kind.has_zeros and not kind.optional_zeros),
            "exact": self.exact or spread in kind.exact,
            "scales": self.scales or kind.scales or self.dtype,
        }
        for name, value in usual.items():
            object.__setattr__(self, name, value)
        self._check(kind)

    def _check(self, kind: Kind) -> None:
        if self.spread not in kind.spreads:
            raise FormatError(f"{self.kind}: scales are spread by {', '.join(kind.spreads)}, not by {self.spread!r}")
        grouped = self.spread in ("block", "strided")
        if grouped != bool(self.group) or self.group < 0:
            raise FormatError(f"{self.kind}: a group size belongs to block and strided scales only, got {self.group}")
        if grouped and (self.group & (self.group - 1) or self.group < 8):
            raise FormatError(f"{self.kind}: the group size must be a power of two of at least 8, got {self.group}")
        if self.nested and (not kind.nests or self.nested < 0):
            raise FormatError(f"{self.kind}: its scales are never quantised, so leave out 'nested'")
        if self.zeros and not kind.has_zeros:
            raise FormatError(f"{self.kind}: it has no zero points, so leave out 'zeros'")
        if self.exact and (self.zeros or grouped):
            raise FormatError(f"{self.kind}: only scales of rows, tiles or the tensor can be applied to a product")
        if kind.scales and self.scales != kind.scales:
            raise FormatError(f"{self.kind}: its scales are {kind.scales}, got {self.scales}")
        if self.scales not in _DTYPES:
            raise FormatError(f"{self.kind}: scales must be one of {', '.join(_DTYPES)}, got {self.scales!r}")

    @property
    def of(self) -> Kind:
        """What all formats of this kind have in common."""
        return KINDS[self.kind]

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """Parse the text form, ``KIND.PART.PART``: a group size, a spread, ``nested`` (``nested128``), ``zeros``,
        ``exact``, ``scales_fp32``, and the dtype, in any order.

        Raises:
            FormatError: the text is malformed.
        """
        kind, *parts = text.split(".")
        values: dict[str, str | int | bool] = {}
        for part in parts:
            name, value = _read(kind, part)
            if name in values:
                raise FormatError(f"weight format {text!r}: {part!r} gives the {name} twice")
            values[name] = value
        return cls(kind, **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        usual = type(self)(self.kind, spread=self.spread, dtype=self.dtype)
        parts = [self.kind]
        if self.spread != self.of.spreads[0]:
            parts.append(self.spread)
        if self.group != usual.group:
            parts.append(str(self.group))
        if self.nested:
            parts.append("nested" if self.nested == NESTED_BLOCK else f"nested{self.nested}")
        parts += [name for name in ("zeros", "exact") if getattr(self, name) != getattr(usual, name)]
        if self.scales != usual.scales:
            parts.append(f"scales_{self.scales}")
        if self.dtype != _DTYPES[0]:
            parts.append(self.dtype)
        return ".".join(parts)

    def with_dtype(self, dtype: str) -> WeightFormat:
        """The same format of values of ``dtype``; scales in the layer's dtype follow it."""
        return replace(
            self, dtype=dtype, scales=dtype if self.scales == self.dtype and not self.of.scales else self.scales
        )

    def bytes_of(self, elements: int) -> int:
        """The bytes of the packed codes of so many elements."""
        return -(-elements * self.of.bits // 8)

    def scales_of(self, d_out: int, d_in: int) -> int:
        """The number of scales of W [d_out, d_in]."""
        if self.spread == "tile":
            return -(-d_out // TILE) * -(-d_in // TILE)
        if self.group:
            return -(-d_out * d_in // self.group)
        return d_out if self.spread == "row" else 1

    def refuse(self, d_out: int, d_in: int) -> str | None:
        """Why W [d_out, d_in] cannot be stored in this format, or None."""
        elements = d_out * d_in
        if (self.spread == "strided" or self.of.packing == "halves") and elements % self.group:
            return f"{self} needs a multiple of {self.group} elements, got {d_out} x {d_in}"
        if self.of.packing == "halves" and self.spread == "block" and elements // self.group % 2:
            return f"{self} packs two halves of the groups: {d_out} x {d_in} has an odd number of groups"
        if self.kind == "ao8" and self.group and d_in % self.group:
            return f"{self} has groups along the rows: d_in must be a multiple of {self.group}, got {d_in}"
        return None

    def operands(self, d_out: int, d_in: int) -> tuple[Stored, ...]:
        """The tensors of W [d_out, d_in] in the order of a kernel's arguments; the packed codes are ``weight``."""
        return tuple(self._operands(d_out, d_in))

    def _operands(self, d_out: int, d_in: int) -> Iterator[Stored]:
        scales = self.scales_of(d_out, d_in)
        yield Stored("weight", self.bytes_of(d_out * d_in), "u8")
        yield Stored("scales", scales, "u8" if self.nested else self.scales)
        if self.zeros:
            yield Stored("zeros", scales, self.of.zeros or self.scales)
        if self.nested:
            yield Stored("scale_table", NESTED_TABLE, "fp32")
            yield Stored("outer_scales", -(-scales // self.nested), "fp32")
            yield Stored("scale_offset", 1, "fp32")


def _read(kind: str, part: str) -> tuple[str, str | int | bool]:
    """The field and value that one part of a format's text stands for."""
    if part.isdigit():
        return "group", int(part)
    if part in _SPREADS:
        return "spread", part
    if part in _DTYPES:
        return "dtype", part
    if part in ("zeros", "exact"):
        return part, True
    if match := re.fullmatch(r"nested([0-9]*)", part):
        return "nested", int(match[1] or NESTED_BLOCK)
    if match := re.fullmatch(r"scales_(\w+)", part):
        return "scales", match[1]
    known = ("GROUP", *_SPREADS, "nested", "zeros", "exact", "scales_DTYPE", *_DTYPES)
    raise FormatError(
        f"weight format {kind!r}: unknown part {part!r}{near_names(part, known)} (parts: {', '.join(known)})"
    )


def is_format(dtype: str) -> bool:
    """Whether a weight dtype of a spec names a format rather than a plain dtype."""
    return dtype.partition(".")[0] in KINDS


@functools.lru_cache(maxsize=256)
def parse_format(text: str) -> WeightFormat:
    """:meth:`WeightFormat.parse`, remembered."""
    return WeightFormat.parse(text)


def stored_as(text: str, dtype: str) -> str:
    """The weight dtype of a spec for W in the format ``text``, whose values have ``dtype``.

    Raises:
        FormatError: the text is malformed.
    """
    return str(parse_format(text).with_dtype(dtype))


def wide_dtype(dtype: str) -> str:
    """The dtype of the values of a weight dtype: a format's, or the plain dtype itself."""
    return parse_format(dtype).dtype if is_format(dtype) else dtype
