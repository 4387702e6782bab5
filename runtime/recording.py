"""Recording what an emitted ``launch`` does, and repeating it without running it.

An emitted ``launch`` reads like one that a person wrote: it allocates its workspace, describes its matrices to the
tensor memory accelerator, works out grids and starts its kernels. For one number of tokens and one scaling all of it is
the same every time but the addresses. A :class:`Recording` keeps the rest: the workspace is one allocation, a tensor
map is made once for each address, and to start a kernel is to pick its arguments. On an H200's host a ``weight_norm``
at 4096x4096, r = 384 took 185 us as emitted and 24 us so (benchmarks/results/h200/host.json).
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
"""Token counts of which a kernel keeps a recording; others run its ``launch``."""

_MOST_MAPS = 1 << 10
"""Addresses of which a descriptor keeps the tensor map (128 bytes each) before it starts anew."""

Maps = dict[tuple[Hashable, ...], "_TensorMaps"]
"""A kernel's descriptors by place, shape and strides: those of W, A and B are the same for every number of tokens."""

_WORKSPACE_ALIGNMENT = 512
"""As PyTorch's allocator aligns what it hands out."""

_HARMLESS = frozenset(
    {"aten::empty.memory_format", "aten::empty_like", "aten::detach", "aten::select.int", "aten::slice.Tensor"}
)
"""What a ``launch`` may ask of PyTorch and still be repeated by its kernels alone: memory and views of it."""


class Recording:
    """The kernels that an emitted ``launch`` starts, with their arguments but for the addresses.

    Made by :func:`record` for tensors of one shape. Repeating it lines up all that the kernels are given (the stream,
    the operands' addresses, places in the workspace, tensor maps, what is always the same), of which each kernel then
    takes its arguments. It allocates the workspace and nothing else.
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
            InternalsError: in the first run, if not even the first kernel could be started: Triton has changed.
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
    """A kernel's C launcher, and what takes its arguments from the line: ``rest``, if any, those in one sequence."""

    start: Callable[..., None]
    head: _Take
    rest: _Take | None


class _Step(NamedTuple):
    """One kernel: its C launcher, and where in the line each of its arguments is.

    From ``in_one`` on, unless that is 0, the launcher takes the arguments as one sequence.
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
    if len(indices) < 2:  # of one index, itemgetter makes no sequence
        return lambda line: [line[index] for index in indices]
    return operator.itemgetter(*indices)


class _TensorMaps:
    """The tensor maps of one descriptor argument, by the address of the matrix that it describes.

    Activations may lie elsewhere in every step, and then need new maps.
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
    """In place of a kernel while ``launch`` is recorded: notes the start, and starts."""

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
    """Notes whether anything is computed by PyTorch, which a repetition of the kernels would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computes |= func.name() not in _HARMLESS
        return func(*args, **(kwargs or {}))


class Bound:
    """A bound module for contiguous operands: it is started by repeating what its ``launch`` did before."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._index = device.index  # an attribute of a device is made anew each time
        self._hooks = launch_hooks()
        self._recordings: dict[tuple[int, float | None], Recording | None] = {}
        self._maps: Maps = {}

    def start(
        self, tensors: Sequence[torch.Tensor], addresses: Sequence[int], rows: int, scaling: float | None
    ) -> None:
        """Run on the operands, on the current stream of the device, which is the current one.

        ``addresses`` are the tensors' own; ``rows`` are the first one's, which are the tokens where there are any.
        """
        shape = (rows, scaling)  # all that a spec leaves open
        recording = self._recordings.get(shape)
        watched = is_hooked(self._hooks)
        if recording is not None and not watched:
            try:
                recording.run(addresses, self._device, current_stream(self._index))
                return
            except InternalsError as problem:
                self._recordings[shape] = None
                warn_once("repeating recorded launches", f"each launch runs as emitted ({problem})")
        scalars = () if scaling is None else (float(scaling),)
        tensors = [tensor if tensor.ndim < 3 else tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
        if watched or shape in self._recordings or len(self._recordings) >= _MOST_RECORDINGS:
            self._module.launch(*tensors, *scalars)
        else:
            self._recordings[shape] = record(self._module, tensors, scalars, self._maps)


def record(
    module: ModuleType, tensors: Sequence[torch.Tensor], scalars: tuple[float, ...], maps: Maps
) -> Recording | None:
    """Run the ``launch`` of a bound module once and return what it did; None if its kernels are not all that it does.

    ``tensors`` are contiguous; the recording is right for others of their shapes, strides and alignment. ``maps`` are
    the module's, which its recordings share.
    """
    kernels = [getattr(module, name) for name in kernel_names(module)]
    if DispatchMode is None or not all(isinstance(kernel, Launcher) for kernel in kernels):
        module.launch(*tensors, *scalars)  # what it computes, or starts, would go unseen
        return None
    starts: list[_Start] = []
    recorders = {name: _Recorder(held, starts) for name, held in vars(module).items() if isinstance(held, Launcher)}
    emitted = module.launch
    launch = FunctionType(emitted.__code__, {**emitted.__globals__, **recorders}, closure=emitted.__closure__)
    # Each operand is an object of its own, also where two are one memory: y may be base this time and not the next.
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
        warn_once("repeating recorded launches", f"each launch runs as emitted ({type(problem).__name__}: {problem})")
        return None


class _Place(NamedTuple):
    """A value in a line: the ``number``-th of its part."""

    part: str
    number: int


class _Line:
    """What a recording's kernels are given, as it is found while their starts are gone through."""

    def __init__(self, operands: Sequence[torch.Tensor]) -> None:
        self._operands = operands
        self._workspaces: dict[int, int] = {}
        self.workspace_bytes = 0
        self.offsets: list[int] = []
        self.descriptors: list[tuple[_Place, _TensorMaps]] = []
        self.constants: list[object] = []

    def index(self, place: _Place) -> int:
        """Where a value is, once all are known."""
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
        """The place of a tensor's address: that of an operand, or one in an allocation made on the way.

        Raises:
            LookupError: a part of an operand, of which there may be several in one memory.
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
