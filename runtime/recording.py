"""Record what an emitted ``launch`` does, and repeat it without running its Python.

An emitted ``launch`` allocates its workspace, makes tensor descriptors, computes grids and starts its kernels. For one
number of tokens and one scaling, only the addresses differ from call to call. A :class:`Recording` keeps everything
else: it makes one allocation for the whole workspace and one tensor map per address, and starts each kernel with
arguments that it picks from a list. On an H200's host the op ``weight_norm`` at 4096x4096, r = 384 took 185 us as
emitted and 24 us from its recording (benchmarks/results/h200/host.json).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from ..codegen.module import kernel_names
from ..internals.torch import DispatchMode, current_stream
from ..internals.triton import InternalsError, Launcher, MapMaker, is_hooked, launch_hooks, warn_once

_MOST_RECORDINGS = 1 << 10
"""Recordings that a kernel keeps; further token counts and scalings run its ``launch``."""

_MOST_MAPS = 1 << 10
"""Tensor maps (128 bytes each) that a descriptor keeps before it discards them all."""

Maps = dict[tuple[Hashable, ...], "_TensorMaps"]
"""A kernel's descriptors by position, shape and strides. Those of W, A and B serve every number of tokens."""

_WORKSPACE_ALIGNMENT = 512
"""Bytes; the alignment of PyTorch's allocator."""

_HARMLESS = frozenset(
    {"aten::empty.memory_format", "aten::empty_like", "aten::detach", "aten::select.int", "aten::slice.Tensor"}
)
"""PyTorch operators that allocate or make views: a ``launch`` that calls only these can be recorded."""


class Recording:
    """The kernels that an emitted ``launch`` starts, with all their arguments except the addresses.

    :func:`record` makes it for tensors of one shape. A run builds one list of values, the line: the stream, the
    addresses of operands, the addresses in the workspace, the tensor maps and the constants. Each kernel picks its
    arguments from it by index. A run allocates only the workspace.
    """

    def __init__(self, steps: Sequence[_Step], line: _Line) -> None:
        self._steps = tuple([step.settled(line) for step in steps])
        self._workspace_bytes = line.workspace_bytes
        self._offsets = tuple(line.offsets)
        self.descriptors = tuple([(line.index(place), maps) for place, maps in line.descriptors])
        self._constants = tuple(line.constants)
        self.has_run = False

    def run(self, addresses: Sequence[int], device: torch.device, stream: int) -> None:
        """Start the kernels on operands at ``addresses``, in the order of ``launch``'s parameters, on ``stream``.

        Raises:
            InternalsError: no kernel was started, because Triton has changed: it makes no tensor maps, or its launcher
                refused the first kernel of the first run.
        """
        line: list[Any] = [stream, *addresses]
        if self._workspace_bytes:
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device)
            start = workspace.data_ptr()
            line += [start + offset for offset in self._offsets]
        for described, maps in self.descriptors:
            address = line[described]
            line.append(maps.known.get(address) or maps.make(address))
        line += self._constants
        if not self.has_run:
            self._start_first(line)
            return
        for start_kernel, head, rest in self._steps:
            if rest is None:
                start_kernel(*head(line))
            else:
                start_kernel(*head(line), rest(line))

    def _start_first(self, line: Sequence[Any]) -> None:
        for index, (start_kernel, head, rest) in enumerate(self._steps):
            try:
                start_kernel(*head(line), *(() if rest is None else (rest(line),)))
            except Exception as problem:
                if index:
                    raise
                raise InternalsError(f"{type(problem).__name__}: {problem}") from problem
        self.has_run = True


_Take = Callable[[Sequence[Any]], Sequence[Any]]


class _Settled(NamedTuple):
    """A kernel's C launcher and the pickers of its arguments from the line.

    ``rest``, if not None, picks the arguments that the launcher takes as one sequence.
    """

    start: Callable[..., None]
    head: _Take
    rest: _Take | None


class _Step(NamedTuple):
    """A kernel's C launcher and the place of each of its arguments in the line.

    If ``in_one`` is not 0, the launcher takes the arguments from that index on as one sequence.
    """

    start: Callable[..., None]
    places: Sequence[_Place]
    in_one: int

    def settled(self, line: _Line) -> _Settled:
        indices = [line.index(place) for place in self.places]
        if not self.in_one:
            return _Settled(self.start, _taking(indices), None)
        return _Settled(self.start, _taking(indices[: self.in_one]), _taking(indices[self.in_one :]))


def _taking(indices: Sequence[int]) -> _Take:
    if len(indices) < 2:  # with one index, itemgetter returns no sequence
        return lambda line: [line[index] for index in indices]
    return operator.itemgetter(*indices)


class _TensorMaps:
    """The tensor maps of one descriptor argument, by the address of its matrix.

    Activations may have a new address in every step, and each address needs its own map.
    """

    def __init__(self, descriptor: Any, metadata: Any) -> None:
        self.maker = MapMaker(descriptor, metadata)
        self.known: dict[int, Any] = {}

    def make(self, address: int) -> Any:
        if len(self.known) >= _MOST_MAPS:
            self.known.clear()
        made = self.known[address] = self.maker.make(address)
        return made


class _Recorder:
    """Replaces a kernel while ``launch`` is recorded: records the start, then starts the kernel."""

    def __init__(self, launcher: Launcher, starts: list[_Start]) -> None:
        self._launcher = launcher
        self._starts = starts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*arguments: Any, **options: Any) -> None:
            self._starts.append(_Start(self._launcher, (*grid, 1, 1)[:3], arguments))
            self._launcher[grid](*arguments, **options)

        return start


class _Start(NamedTuple):
    launcher: Launcher
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Watch(DispatchMode or object):  # type: ignore[misc]
    """Detects operators that PyTorch computes during ``launch``; a recording would leave them out."""

    def __init__(self) -> None:
        super().__init__()
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computes |= func.name() not in _HARMLESS
        return func(*args, **(kwargs or {}))


class Bound:
    """A bound module for contiguous operands, which repeats recordings of its ``launch``."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._index = device.index  # reading the attribute makes a new object each time
        self._hooks = launch_hooks()
        self._recordings: dict[tuple[int, float | None], Recording | None] = {}
        self._maps: Maps = {}

    def start(
        self, tensors: Sequence[torch.Tensor], addresses: Sequence[int], rows: int, scaling: float | None
    ) -> None:
        """Run on the operands, on the current stream. The module's device must be the current one.

        ``addresses`` are the addresses of ``tensors``. ``rows`` is the number of rows of the first tensor: the number
        of tokens, if the operation has any.
        """
        shape = (rows, scaling)  # all that varies between launches of one spec
        recording = self._recordings.get(shape)
        watched = is_hooked(self._hooks)
        if recording is not None and not watched:
            try:
                recording.run(addresses, self._device, current_stream(self._index))
                return
            except InternalsError as problem:
                self._recordings[shape] = None
                warn_once("repeating recorded launches", "each launch runs as emitted", problem)
        scalars = () if scaling is None else (float(scaling),)
        tensors = [*map(_as_matrix, tensors)]
        if watched or shape in self._recordings or len(self._recordings) >= _MOST_RECORDINGS:
            self._module.launch(*tensors, *scalars)
        else:
            self._recordings[shape] = record(self._module, tensors, scalars, self._maps)


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a vector, or as a matrix whose row stride is its width.

    A single row is contiguous with any row stride, but a descriptor needs a valid one.
    """
    if tensor.ndim < 2:
        return tensor
    width = tensor.shape[-1]
    return tensor.as_strided((tensor.numel() // width, width), (width, 1))


def record(
    module: ModuleType, tensors: Sequence[torch.Tensor], scalars: tuple[float, ...], maps: Maps
) -> Recording | None:
    """Run the ``launch`` of a bound module once and return its recording; None if it does more than start kernels.

    ``tensors`` must be contiguous; the recording is valid for tensors of the same shapes, strides and alignment.
    ``maps`` are shared by all recordings of a module.
    """
    kernels = [getattr(module, name) for name in kernel_names(module)]
    if DispatchMode is None or not all(isinstance(kernel, Launcher) for kernel in kernels):
        module.launch(*tensors, *scalars)  # not all of its computations and starts would be seen
        return None
    starts: list[_Start] = []
    recorders = {name: _Recorder(held, starts) for name, held in vars(module).items() if isinstance(held, Launcher)}
    emitted = module.launch
    launch = FunctionType(emitted.__code__, {**emitted.__globals__, **recorders}, closure=emitted.__closure__)
    # One object per operand, even where two share memory: y may be base in this call and not in the next.
    operands = [tensor.detach() for tensor in tensors]
    with torch.no_grad(), _Watch() as watch:
        launch(*operands, *scalars)
    return None if watch.computes else _assemble(starts, operands, maps)


def _assemble(starts: Sequence[_Start], operands: Sequence[torch.Tensor], maps: Maps) -> Recording | None:
    line = _Line(operands)
    try:
        return Recording([_step(start, line, maps) for start in starts], line)
    except LookupError:
        return None
    except Exception as problem:
        warn_once("repeating recorded launches", "each launch runs as emitted", problem)
        return None


class _Place(NamedTuple):
    """The position of a value in a line: the ``number``-th value of a part."""

    part: str
    number: int


class _Line:
    """The layout of a recording's line, built while the recorded starts are read one after another."""

    def __init__(self, operands: Sequence[torch.Tensor]) -> None:
        self._operands = operands
        self._workspaces: dict[int, int] = {}
        self.workspace_bytes = 0
        self.offsets: list[int] = []
        self.descriptors: list[tuple[_Place, _TensorMaps]] = []
        self.constants: list[object] = []

    def index(self, place: _Place) -> int:
        """The index of a value in the line; valid once all starts have been read."""
        parts = {
            "stream": 1,
            "operand": len(self._operands),
            "workspace": len(self.offsets),
            "descriptor": len(self.descriptors),
            "constant": len(self.constants),
        }
        before = list(parts)[: list(parts).index(place.part)]
        return sum(parts[part] for part in before) + place.number

    def constant(self, value: object) -> _Place:
        self.constants.append(value)
        return _Place("constant", len(self.constants) - 1)

    def descriptor(self, matrix: _Place, maps: _TensorMaps) -> _Place:
        self.descriptors.append((matrix, maps))
        return _Place("descriptor", len(self.descriptors) - 1)

    def tensor(self, tensor: torch.Tensor) -> _Place:
        """The place of a tensor's address: an operand's, or one in the workspace.

        Raises:
            LookupError: ``tensor`` is a view of an operand. Operands may share memory, so the view's owner is unknown.
        """
        for index, operand in enumerate(self._operands):
            if tensor is operand:
                return _Place("operand", index)
        memory = tensor.untyped_storage()
        start = memory.data_ptr()
        if any(operand.untyped_storage().data_ptr() == start for operand in self._operands):
            raise LookupError("a view of an operand")
        if start not in self._workspaces:
            self._workspaces[start] = self.workspace_bytes
            self.workspace_bytes += -(-memory.nbytes() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
        self.offsets.append(self._workspaces[start] + tensor.data_ptr() - start)
        return _Place("workspace", len(self.offsets) - 1)


def _step(start: _Start, line: _Line, maps: Maps) -> _Step:
    binary = start.launcher.flat
    head = [*binary.head]
    head[binary.grid_at : binary.grid_at + 3] = start.grid
    places = [line.constant(value) for value in head]
    places[binary.stream_at] = _Place("stream", 0)
    described = 0
    for argument in start.arguments:
        if isinstance(argument, torch.Tensor):
            places.append(line.tensor(argument))
        elif isinstance(argument, int | float):
            places.append(line.constant(argument))
        else:
            key = (start.launcher, described, *argument.shape, *argument.strides)
            if key not in maps:
                maps[key] = _TensorMaps(argument, binary.descriptors[described])
            described += 1
            places.append(line.descriptor(line.tensor(argument.base), maps[key]))
            places += [line.constant(value) for value in maps[key].maker.expand(argument.base.data_ptr())[1:]]
    return _Step(binary.start, places, len(head) if binary.in_one else 0)
