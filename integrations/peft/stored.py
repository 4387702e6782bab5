"""Recognise how a quantised base layer stores W, so that kernels read its codes and scales themselves.

Each package keeps its tensors in a way of its own, which may change from version to version. So nothing is taken for
granted: a tested version of the package, the settings, dtypes and sizes of all tensors, and, once for each layer, some
of W decoded by the package itself, which must be what our decoder makes of the same tensors. A layer that fails is
read through its own forward, as :mod:`.base_layers` does.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ...codegen.weight_formats import KINDS, TILE, FormatError, WeightFormat
from ...internals.torch import as_plain_tensors
from ...internals.versions import installed, is_tested, tested_range
from ...nn.autocast import without_autocast
from ...nn.kernels import SPEC_DTYPES
from ...nn.norm_cache import is_capturing
from ...nn.stored_norm import StoredMatrix
from ...nn.stored_operator import TracedMatrix
from ...runtime.dequantise import StoredWeight
from ...runtime.reference import OPERAND_DTYPES
from .base_layers import BNB_4BIT, BNB_8BIT, HQQ, TORCHAO, BaseLayer, multiply

_data_ptr = torch.Tensor.data_ptr
_referent = weakref.ref.__call__

_said: set[tuple[str, str]] = set()
"""The kinds of layers, and the versions of their packages, of which a warning has been given: a model has hundreds."""

Tensors = Mapping[str, torch.Tensor]
"""The tensors of a stored W by the names of operands (:class:`~doratune.codegen.weight_formats.Stored`)."""


CODES = "weight"
"""The name of the packed codes among the tensors of a layer."""


class Held(NamedTuple):
    """What a layer holds of its W: every setting that its layout depends on, and its tensors by a name each."""

    settings: tuple[Hashable, ...]
    tensors: dict[str, torch.Tensor]


class Sample(NamedTuple):
    """Some of W as its package decodes it: ``rows`` of W seen as a matrix of ``shape``, and their ``values``."""

    shape: tuple[int, int]
    rows: list[int]
    values: torch.Tensor


class Package(NamedTuple):
    """How the layers of a package are read.

    ``hold`` reads what a layer holds, and ``parts`` returns the dictionaries that it reads it from; one of them is
    called in every forward pass. ``form`` names the format and its operands, or says why there is none. ``decode`` has
    the package decode some of W.
    """

    name: str
    hold: Callable[[Any], Held]
    parts: Callable[[Any], Sequence[dict[str, Any]]]
    form: Callable[[Any, int, int], tuple[WeightFormat, Tensors] | str]
    decode: Callable[[Any, int, int], Iterator[Sample]]


class Layout(NamedTuple):
    """How a layer stores W [d_out, d_in]: ``form`` is the format's text, ``names`` are its operands, in their order."""

    settings: tuple[Hashable, ...]
    form: str
    names: tuple[str, ...]
    d_out: int
    d_in: int


class _Known(NamedTuple):
    """What was found for what a layer held."""

    settings: tuple[Hashable, ...]
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    states: tuple[tuple[int, int], ...]
    found: StoredMatrix | str


class _Checked(NamedTuple):
    """What a layout was checked for that was recognised: all that the layer held beside its codes."""

    settings: tuple[Hashable, ...]
    form: WeightFormat
    beside: tuple[weakref.ref[torch.Tensor], ...]
    states: tuple[tuple[int, int], ...]


class Dependant(Protocol):
    """Holds what a :class:`StorageReader` has found."""

    def release(self, reader: StorageReader) -> None:
        """Release what ``reader`` has found last: the layer holds it no more."""


class Snapshot:
    """What a layer held when its W was read, to be compared in every call; it keeps none of the tensors alive.

    Writes to the tensors where they are do not count: whoever reuses a norm looks at their versions.
    """

    __slots__ = ("_are_plain", "_base", "_parts", "_places", "_tensors", "_values", "_weak")

    def __init__(self, base: nn.Module, kind: str) -> None:
        package = _PACKAGES[kind]
        self._base, self._parts = base, package.parts
        # Of an object that is gone another may have the id, but not of all: the tensors are known to live.
        self._values = [*map(id, chain(*map(dict.values, package.parts(base))))]
        with as_plain_tensors():
            tensors = package.hold(base).tensors.values()
            self._weak = [*map(weakref.ref, tensors)]
            self._tensors = [*map(id, tensors)]
            self._places = [*map(_data_ptr, tensors)]
            self._are_plain = {*map(type, tensors)} <= {torch.Tensor, nn.Parameter}

    def holds(self) -> bool:
        """Whether the layer holds the same tensors and settings, where they were."""
        try:
            tensors: list[Any] = [*map(_referent, self._weak)]  # None has another id; a tensor compared with it is slow
            if [*map(id, tensors)] != self._tensors:
                return False
            if [*map(id, chain(*map(dict.values, self._parts(self._base))))] != self._values:
                return False
            if self._are_plain:
                return [*map(_data_ptr, tensors)] == self._places
            with as_plain_tensors():
                return [*map(_data_ptr, tensors)] == self._places
        except (AttributeError, KeyError):
            return False


class StorageReader:
    """Reads how one layer stores W, and remembers it while the layer holds the same tensors, unchanged.

    Merging, loading, moving to another device and bitsandbytes' packing for CPUs replace tensors or write to them.

    Args:
        layer: the layer's name in the model, for messages.

    Attributes:
        layout: what was recognised last, in values that a compiler can guard; None if nothing was.
        dependants: what is to release the layer's W when that changes; they are not kept alive.
    """

    changes = 0
    """How often a layer was found to store another W than before, counted over all models."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._known: _Known | None = None
        self._checked: _Checked | None = None
        self.layout: Layout | None = None
        self.dependants: weakref.WeakSet[Dependant] = weakref.WeakSet()

    def read(self, base: nn.Module, layer: BaseLayer, d_out: int, d_in: int) -> StoredMatrix | str:
        """W of ``base`` [d_out, d_in] as a kernel reads it, or the reason why none does."""
        package = _PACKAGES[layer.kind]
        try:
            with as_plain_tensors():
                held = package.hold(base)
                tensors = tuple(held.tensors.values())
                states = tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors])
        except (AttributeError, LookupError, TypeError, RuntimeError) as problem:
            return f"{layer.kind}: the layer does not hold what is expected: {problem!r}"
        known = self._known
        if known is not None and known.settings == held.settings and known.states == states:
            same = [ref() is tensor for ref, tensor in zip(known.tensors, tensors, strict=True)]
            if False not in same:
                return known.found
        if is_capturing(tensors[0]):
            return f"{layer.kind}: a format cannot be checked while a CUDA graph is captured"
        self._forget()
        beside = tuple([tensor for name, tensor in held.tensors.items() if name != CODES])
        others = tuple([state for name, state in zip(held.tensors, states, strict=True) if name != CODES])
        found = self._as_checked(held, beside, others, d_out, d_in)
        if found is None:
            with torch.no_grad(), without_autocast(tensors[0].device):
                found = self._recognise(package, base, layer, d_out, d_in)
            self._checked = None
            if isinstance(found, StoredMatrix):
                self._checked = _Checked(held.settings, found.form, tuple(map(weakref.ref, beside)), others)
        reader = weakref.ref(self)

        def forget(_: object) -> None:
            """Let go of the views, which keep the memory of a W that the layer holds no more."""
            if (mine := reader()) is not None:
                mine._forget()

        references = tuple([weakref.ref(tensor, forget) for tensor in tensors])
        self._known = _Known(held.settings, references, states, found)
        if isinstance(found, StoredMatrix):
            names = tuple([stored.name for stored in found.form.operands(d_out, d_in)])
            self.layout = Layout(held.settings, str(found.form), names, d_out, d_in)
        return found

    def _as_checked(
        self,
        held: Held,
        beside: tuple[torch.Tensor, ...],
        states: tuple[tuple[int, int], ...],
        d_out: int,
        d_in: int,
    ) -> StoredMatrix | str | None:
        """W if the layer holds other codes than when its layout was checked, and nothing else has changed; else None.

        Under FSDP2 every forward pass has codes of its own, gathered for it.
        """
        checked = self._checked
        if checked is None or (checked.settings, checked.states) != (held.settings, states):
            return None
        if any(ref() is not tensor for ref, tensor in zip(checked.beside, beside, strict=True)):
            return None
        return _matrix(checked.form, held.tensors, d_out, d_in)

    def trace(self, base: nn.Module, layer: BaseLayer) -> TracedMatrix | str:
        """W of ``base`` while a compiler traces, which cannot recognise a format: the one that was recognised before.

        The graph reads the tensors that the layer holds when it runs. It is compiled anew when a setting changes, and
        when the layer is found to store another W.
        """
        layout = self.layout
        if layout is None:
            return "a compiler traces the layer, and its format was not recognised before"
        held = _PACKAGES[layer.kind].hold(base)
        if held.settings != layout.settings:
            return "a compiler traces the layer, whose settings have changed since its format was recognised"
        return TracedMatrix(
            layout.form, tuple([held.tensors[name] for name in layout.names]), layout.d_out, layout.d_in
        )

    def _forget(self) -> None:
        """Forget W, and let others know."""
        StorageReader.changes += 1
        self.layout = None
        if self._known is not None:
            self._known = None
            for dependant in [*self.dependants]:
                dependant.release(self)

    def _recognise(
        self, package: Package, base: nn.Module, layer: BaseLayer, d_out: int, d_in: int
    ) -> StoredMatrix | str:
        version = installed(package.name)
        if version is None or not is_tested(package.name, version):
            return f"{package.name} {version} is not tested (tested: {tested_range(package.name)})"
        try:
            named = package.form(base, d_out, d_in)
            if isinstance(named, str):
                return named
            form, tensors = named
            matrix = _matrix(form, tensors, d_out, d_in)
            if isinstance(matrix, str):
                return matrix
            problem = _differs(matrix, package.decode(base, d_out, d_in)) or _multiplies_by_another(matrix, base, layer)
        except FormatError as refused:
            return str(refused)
        except (AttributeError, ImportError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            problem = f"it cannot be read as expected: {error!r}"
        if problem is None:
            return matrix
        said = (layer.kind, version)
        if said not in _said:
            _said.add(said)
            warnings.warn(
                f"{self._layer}: {layer.kind} of {package.name} {version} stores W in another way than doratune "
                f"knows: {problem}. Norms of such layers are computed through their own forward, right but slower",
                stacklevel=2,
            )
        return problem


_WORD = 4
"""Bytes that kernels load of codes at once."""


def _matrix(form: WeightFormat, tensors: Tensors, d_out: int, d_in: int) -> StoredMatrix | str:
    """The flat operands of a kernel, or which of ``tensors`` is another than the format has."""
    refused = form.refuse(d_out, d_in)
    if refused is not None:
        return refused
    flat = []
    for stored in form.operands(d_out, d_in):
        tensor = _with_version(tensors[stored.name].detach())
        dtype = OPERAND_DTYPES[stored.dtype]
        if not tensor.is_contiguous():
            return f"{form}: its {stored.name} are not contiguous"
        if stored.name == "weight" and tensor.dtype != dtype:
            tensor = tensor.view(dtype)
        if tensor.dtype != dtype or tensor.numel() != stored.elements:
            found = f"{tensor.numel()} elements of {tensor.dtype}"
            return f"{form}: its {stored.name} must be {stored.elements} elements of {dtype}, got {found}"
        flat.append(tensor.view(-1))
    if flat[0].data_ptr() % _WORD:
        return f"{form}: its codes begin inside of a word"
    if any(tensor.device != flat[0].device for tensor in flat):
        return f"{form}: its codes and scales are on several devices"
    counts = not any(tensors[stored.name].is_inference() for stored in form.operands(d_out, d_in))
    return StoredMatrix(form, tuple(flat), d_out, d_in, counts)


def _with_version(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a view of the memory of one from inference mode, which counts no writes: HQQ makes such."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _differs(matrix: StoredMatrix, samples: Iterator[Sample]) -> str | None:
    """How our decoder and the package's differ on the samples; None if they do not."""
    for shape, rows, values in samples:
        ours = _decoder(matrix, *shape)[torch.tensor(rows, device=matrix.device)]
        wrong = _unlike(ours.to(values.dtype), values.reshape(ours.shape), matrix.form, _FP32_DIGIT)
        if wrong:
            return f"read as {matrix.form}, {wrong} of {ours.numel()} values differ from those that the package decodes"
    return None


def _multiplies_by_another(matrix: StoredMatrix, base: nn.Module, layer: BaseLayer) -> str | None:
    """How some columns of W differ from those by which the layer multiplies; None if they do not, but for last digits.

    A package may decode a part of W right and the whole wrong: bitsandbytes 0.50 does on CPUs, where the rows end
    inside of blocks. bitsandbytes' 8-bit layer rounds its input, so its product says little.
    """
    if layer.kind == BNB_8BIT:
        return None
    columns = torch.tensor(sorted({0, 1 % matrix.d_in, *_some(matrix.d_in)}), device=matrix.device)
    units = nn.functional.one_hot(columns, matrix.d_in).to(OPERAND_DTYPES[matrix.form.dtype])
    theirs = multiply(base, layer, units).T
    ours = _decoder(matrix, matrix.d_out, matrix.d_in).at(torch.arange(matrix.d_out, device=matrix.device), columns)
    wrong = _unlike(ours, theirs, matrix.form, max(_PRODUCT_DIGITS * torch.finfo(theirs.dtype).eps, _FP32_DIGIT))
    return f"read as {matrix.form}, {wrong} of {ours.numel()} products with unit vectors differ" if wrong else None


def _decoder(matrix: StoredMatrix, rows: int, columns: int) -> StoredWeight:
    """Our decoder of W, seen as a matrix of these sizes."""
    names = [stored.name for stored in matrix.form.operands(matrix.d_out, matrix.d_in)]
    return StoredWeight(matrix.form, dict(zip(names, matrix.tensors, strict=True)), rows, columns, torch.float32)


def _unlike(ours: torch.Tensor, theirs: torch.Tensor, form: WeightFormat, digit: float) -> int:
    """The number of values that differ by more than ``digit``, relatively."""
    if not form.exact:
        theirs = theirs.to(OPERAND_DTYPES[form.dtype])
    ours, theirs = ours.float(), theirs.float()
    near = (ours - theirs).abs() <= digit * torch.maximum(ours.abs(), theirs.abs())
    return int((~near & ~(ours.isnan() & theirs.isnan())).sum())


_FP32_DIGIT = 1e-6
"""The relative difference of two ways to decode in fp32 beyond which a value is another."""

_PRODUCT_DIGITS = 4
"""The same of products, in last digits of their dtype. A layer that is compiled may not round what is between, and of
some shapes bitsandbytes 0.50's products on GPUs are of codes' values that are rounded before they are scaled.
"""


def _some(count: int) -> list[int]:
    """Indices of the first, a middle and the last row or column."""
    return sorted({0, count // 2, count - 1})


# bitsandbytes, 4 bits


def _hold_4bit(base: Any) -> Held:
    weight, state = base.weight, base.weight.quant_state
    tensors = {"weight": weight, "scales": state.absmax, "code": state.code}
    settings = (state.quant_type, state.blocksize, state.dtype, tuple(state.shape), base.compute_dtype, weight.dtype)
    outer = state.state2
    if outer is None:
        return Held((*settings, _is_packed(state), None), tensors)
    nested = {"scale_offset": state.offset, "outer_scales": outer.absmax, "scale_table": outer.code}
    return Held((*settings, _is_packed(state), outer.blocksize), {**tensors, **nested})


def _parts_4bit(base: Any) -> Sequence[dict[str, Any]]:
    weight = base._parameters["weight"]
    state = weight.quant_state
    outer = state.state2
    own = (base.__dict__, weight.__dict__, state.__dict__)
    return own if outer is None else (*own, outer.__dict__)


def _is_packed(state: Any) -> bool:
    """Whether bitsandbytes has packed W for its kernels for CPUs."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _form_4bit(base: Any, d_out: int, d_in: int) -> tuple[WeightFormat, Tensors] | str:
    held = _hold_4bit(base)
    state = base.weight.quant_state
    if _is_packed(state):
        return "bitsandbytes has packed it for kernels of its own on the CPU"
    if state.quant_type not in ("nf4", "fp4"):
        return f"its 4-bit quant_type is {state.quant_type!r}"
    if tuple(state.shape) != (d_out, d_in):
        return f"its 4-bit state is of shape {list(state.shape)}, not of W's, {[d_out, d_in]}"
    dtype = _rounded_once(state.dtype, base.compute_dtype or state.dtype)
    if dtype is None:
        return f"it rounds W to {state.dtype} and then to {base.compute_dtype}"
    table = torch.tensor(KINDS[state.quant_type].table, device=state.code.device)
    if state.code.shape != table.shape or not torch.equal(state.code.float(), table):
        return f"its {state.quant_type} codes stand for other values than bitsandbytes' own"
    nested = 0 if state.state2 is None else state.state2.blocksize
    return WeightFormat(state.quant_type, group=state.blocksize, nested=nested, dtype=dtype), held.tensors


def _rounded_once(stored: torch.dtype, computed: torch.dtype) -> str | None:
    """The dtype to which decoded values are rounded on their way to a product; None if to two."""
    for dtype, other in ((stored, computed), (computed, stored)):
        if other in (dtype, torch.float32):
            return SPEC_DTYPES[dtype]
    return None


def _decode_4bit(base: Any, d_out: int, d_in: int) -> Iterator[Sample]:
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state, block = base.weight.quant_state, base.weight.quant_state.blocksize
    packed = base.weight.detach().view(torch.uint8).view(-1)
    scales = state.absmax
    if state.state2 is not None:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    for row in _some(d_out):
        first = row * d_in // block
        begin, end = first * block, min(-(-(row + 1) * d_in // block) * block, d_out * d_in)
        part = QuantState(
            absmax=scales.view(-1)[first : -(-end // block)].float(),
            shape=torch.Size((1, end - begin)),
            code=state.code,
            blocksize=block,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        values = dequantize_4bit(packed[begin // 2 : -(-end // 2)].view(-1, 1), part).reshape(-1)
        yield Sample((d_out, d_in), [row], values[row * d_in - begin :][:d_in])


# bitsandbytes, 8 bits


def _hold_8bit(base: Any) -> Held:
    weight, state = base.weight, base.state
    scales = weight.SCB if state.SCB is None else state.SCB
    return Held((weight.dtype, tuple(weight.shape)), {"weight": weight, "scales": scales})


_FOUND_8BIT = {"idx": None, "subB": None}
"""What a product of bitsandbytes' may leave in the layer's state: the columns of outliers in its input, and of W."""


def _parts_8bit(base: Any) -> Sequence[dict[str, Any]]:
    state: dict[str, Any] = base.__dict__["state"].__dict__
    if state.get("idx") is not None or state.get("subB") is not None:
        state = {**state, **_FOUND_8BIT}
    return base._parameters["weight"].__dict__, state


def _form_8bit(base: Any, d_out: int, d_in: int) -> tuple[WeightFormat, Tensors] | str:
    return WeightFormat("int8"), _hold_8bit(base).tensors


def _decode_8bit(base: Any, d_out: int, d_in: int) -> Iterator[Sample]:
    from bitsandbytes.functional import int8_vectorwise_dequant

    rows, tensors = _some(d_out), _hold_8bit(base).tensors
    values = int8_vectorwise_dequant(tensors["weight"].detach()[rows], tensors["scales"][rows])
    yield Sample((d_out, d_in), rows, values)


# HQQ

_HQQ_PACKINGS = {"8bit_u8": "hqq8", "4bit_u8": "hqq4"}
_HQQ_SETTINGS = ("axis", "group_size", "packing", "view_as_float", "quant_scale", "quant_zero", "compute_dtype")


def _hold_hqq(base: Any) -> Held:
    meta = base.meta
    tensors = {"weight": base.W_q}
    tensors.update({name: meta[key] for name, key in (("scales", "scale"), ("zeros", "zero")) if key in meta})
    return Held((*[meta.get(name) for name in _HQQ_SETTINGS], tuple(meta["shape"]), base.W_q.dtype), tensors)


def _parts_hqq(base: Any) -> Sequence[dict[str, Any]]:
    return base.__dict__, base._parameters, base.meta


def _form_hqq(base: Any, d_out: int, d_in: int) -> tuple[WeightFormat, Tensors] | str:
    meta, held = base.meta, _hold_hqq(base)
    if meta.get("quant_scale") or meta.get("quant_zero") or len(held.tensors) < 3:
        return "HQQ has quantised its scales or keeps them elsewhere, which it deprecates"
    kind = _HQQ_PACKINGS.get(meta["packing"])
    if kind is None:
        return f"HQQ packs it as {meta['packing']}"
    if meta.get("view_as_float"):
        return "HQQ views its codes as floats"
    if tuple(meta["shape"]) != (d_out, d_in):
        return f"HQQ's shape is {list(meta['shape'])}, not W's, {[d_out, d_in]}"
    rows, columns = _hqq_shape(meta, d_out, d_in)
    scales = (rows, 1) if meta["axis"] else (1, columns)
    for name in ("scales", "zeros"):
        if held.tensors[name].shape != scales:
            return f"HQQ's {name} must have shape {list(scales)}, got {list(held.tensors[name].shape)}"
    dtype = SPEC_DTYPES[meta.get("compute_dtype", torch.float16)]
    spread = "block" if meta["axis"] else "strided"
    return WeightFormat(kind, spread=spread, group=columns if meta["axis"] else rows, dtype=dtype), held.tensors


def _hqq_shape(meta: dict[str, Any], d_out: int, d_in: int) -> tuple[int, int]:
    """W as HQQ's matrix of groups: its rows are groups (axis 1), or its columns are (axis 0)."""
    group = meta["group_size"] or (d_in if meta["axis"] else d_out)
    other = d_out * d_in // group
    return (other, group) if meta["axis"] else (group, other)


def _decode_hqq(base: Any, d_out: int, d_in: int) -> Iterator[Sample]:
    from hqq.core.quantize import Quantizer

    meta, tensors = base.meta, _hold_hqq(base).tensors
    shape = _hqq_shape(meta, d_out, d_in)
    packed = tensors["weight"].detach()
    for row in _some(packed.shape[0]):
        rows = [row] if meta["packing"] == "8bit_u8" else [row, row + packed.shape[0]]
        part = {**meta, "shape": torch.Size((len(rows), shape[1]))}
        if meta["axis"]:
            part.update(scale=tensors["scales"][rows], zero=tensors["zeros"][rows])
        yield Sample(shape, rows, Quantizer.dequantize(packed[row : row + 1], part))


# torchao


def _hold_torchao(base: Any) -> Held:
    weight = base.weight
    name = type(weight).__name__
    settings: tuple[Hashable, ...] = (name, tuple(weight.block_size), weight.dtype, tuple(weight.shape))
    if name == "AffineQuantizedTensor":
        inner = weight.tensor_impl
        codes, scales, zeros = inner.int_data, inner.scale, inner.zero_point
        settings += (type(inner).__name__, str(weight.zero_point_domain), weight.quant_min, weight.quant_max)
    else:
        codes, scales, zeros = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
        settings += (getattr(weight, "act_pre_scale", None) is None, getattr(weight, "target_dtype", None))
    tensors = {"weight": codes, "scales": scales}
    return Held((*settings, codes.dtype), tensors if zeros is None else {**tensors, "zeros": zeros})


def _parts_torchao(base: Any) -> Sequence[dict[str, Any]]:
    own = base._parameters["weight"].__dict__
    inner = own.get("tensor_impl")
    return (own,) if inner is None else (own, inner.__dict__)


def _form_torchao(base: Any, d_out: int, d_in: int) -> tuple[WeightFormat, Tensors] | str:
    weight: Any = base.weight
    name, tensors = type(weight).__name__, _hold_torchao(base).tensors
    if tuple(weight.shape) != (d_out, d_in) or tuple(tensors["weight"].shape) != (d_out, d_in):
        return f"torchao's {name} must hold codes of shape {[d_out, d_in]}, got {list(tensors['weight'].shape)}"
    if name == "AffineQuantizedTensor" and type(weight.tensor_impl).__name__ != "PlainAQTTensorImpl":
        return f"torchao's {name} has the layout {type(weight.tensor_impl).__name__}"
    if name == "AffineQuantizedTensor" and not str(weight.zero_point_domain).endswith(("INT", "NONE")):
        return f"torchao's {name} has zero points of {weight.zero_point_domain}"
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"torchao's {name} scales its input"
    expected = torch.float8_e4m3fn if name == "Float8Tensor" else torch.int8
    if tensors["weight"].dtype is not expected:
        return f"torchao's {name} holds {tensors['weight'].dtype}"
    dtype = SPEC_DTYPES.get(weight.dtype)
    if dtype is None or weight.dtype is torch.float64:
        return f"torchao's {name} decodes to {weight.dtype}"
    block = tuple(weight.block_size) or (d_out, d_in)
    spread = _torchao_spread(name, block, d_out, d_in)
    if spread is None:
        return f"torchao's {name} has scales of blocks of {list(block)}"
    if name == "Float8Tensor":
        return WeightFormat("fp8", spread=spread, dtype=dtype), tensors
    zeros = tensors.get("zeros")
    shifted = zeros is not None and bool(zeros.any())
    if shifted and (zeros is None or zeros.dtype is not torch.int8 or spread != "block"):
        return f"torchao's {name} has zero points in {zeros.dtype if zeros is not None else None} by {spread}"
    group = block[1] if spread == "block" else 0
    scales = SPEC_DTYPES.get(tensors["scales"].dtype, "")
    return WeightFormat("ao8", spread=spread, group=group, zeros=shifted, scales=scales, dtype=dtype), tensors


def _torchao_spread(name: str, block: tuple[int, ...], d_out: int, d_in: int) -> str | None:
    """How a format spreads scales of such blocks; IntxUnpackedToInt8Tensor never applies them to a product."""
    if name != "IntxUnpackedToInt8Tensor":
        if block == (1, d_in):
            return "row"
        if block == (d_out, d_in):
            return "tensor"
    if name == "Float8Tensor":
        return "tile" if block == (TILE, TILE) else None
    return "block" if block[0] == 1 and len(block) == 2 else None


def _decode_torchao(base: Any, d_out: int, d_in: int) -> Iterator[Sample]:
    weight: Any = base.weight.detach()
    block = tuple(weight.block_size) or (d_out, d_in)
    height = block[0] if block[0] < d_out else 1  # a scale of all of W is that of each row
    for row in _some(d_out):
        begin = row // height * height
        end = min(begin + height, d_out)
        yield Sample((d_out, d_in), [*range(begin, end)], weight[begin:end].dequantize())


_PACKAGES = {
    BNB_4BIT: Package("bitsandbytes", _hold_4bit, _parts_4bit, _form_4bit, _decode_4bit),
    BNB_8BIT: Package("bitsandbytes", _hold_8bit, _parts_8bit, _form_8bit, _decode_8bit),
    HQQ: Package("hqq", _hold_hqq, _parts_hqq, _form_hqq, _decode_hqq),
    TORCHAO: Package("torchao", _hold_torchao, _parts_torchao, _form_torchao, _decode_torchao),
}
"""By the kind of base layer."""
