"""What an emitted ``launch`` does, recorded once and then repeated without running it.

An emitted ``launch`` reads like one that a person wrote: it allocates its workspace, describes its matrices to the
tensor memory accelerator, works out grids and starts its kernels. For one number of tokens and one scaling all of it is
the same every time but the addresses. A :class:`Program` keeps the rest: the workspace is one allocation, a tensor map
is made once for each address, and to start a kernel is to pick its arguments. On an H200's host a ``weight_norm`` at
4096x4096, r = 384 took 185 us as emitted and 24 us so (benchmarks/results/h200/host.json).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .binding import Launcher

_MOST_PROGRAMS = 1 << 10
"""Token counts that a kernel has a program for; others run its ``launch``."""

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


class Program:
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

    def run(self, addresses: Sequence[int], device: torch.device, stream: int) -> None:
        """Start the kernels on operands at ``addresses``, in the order of ``launch``'s parameters, on ``stream``."""
        line: list[Any] = [stream, *addresses]
        if self._workspace_bytes:
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device)
            start = workspace.data_ptr()
            line += [start + offset for offset in self._offsets]
        for described, maps in self.descriptors:
            address = line[described]
            line.append(maps.known.get(address) or maps.make(address))
        line += self._constants
        for start_kernel, head, rest in self._steps:
            if rest is None:
                start_kernel(*head(line))
            else:
                start_kernel(*head(line), rest(line))


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

    Activations may lie elsewhere in every step, and then need new maps. Triton's way to one goes through a descriptor
    and the driver; from the second map on, the function of the driver that it ends in is called itself.
    """

    def __init__(self, descriptor: Any, metadata: Any) -> None:
        self._descriptor = copy.copy(descriptor)
        self._descriptor.base = None  # keeps no tensor alive
        self._metadata = metadata
        self._fill: Callable[..., Any] | None = None
        self._settings: tuple[Any, ...] = ()
        self.known: dict[int, Any] = {}

    def expand(self, address: int) -> list[Any]:
        """The arguments that stand for the descriptor of a matrix at ``address``: its map, its shape, its strides."""
        from triton.backends.nvidia.driver import make_tensordesc_arg
        from triton.runtime import driver

        descriptor = copy.copy(self._descriptor)
        descriptor.base = SimpleNamespace(data_ptr=lambda: address)
        calls: list[_Call] = []
        active = SimpleNamespace(utils=_Listener(driver.active.utils, calls))
        triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
        listened = make_tensordesc_arg
        if isinstance(listened, FunctionType):
            inside = {**listened.__globals__, "triton": triton}
            listened = FunctionType(listened.__code__, inside, None, listened.__defaults__, listened.__closure__)
        expanded: list[Any] = listened(descriptor, self._metadata)
        if len(calls) == 1 and calls[0].arguments[0] == address and calls[0].result is expanded[0]:
            self._fill, self._settings = calls[0].function, calls[0].arguments[1:]
        return expanded

    def make(self, address: int) -> Any:
        if len(self.known) >= _MOST_MAPS:
            self.known.clear()
        fill = self._fill
        made = self.expand(address)[0] if fill is None else fill(address, *self._settings)
        self.known[address] = made
        return made


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any


class _Listener:
    """The driver's functions, each noting that it is called."""

    def __init__(self, utils: Any, calls: list[_Call]) -> None:
        self._utils = utils
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._utils, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self._calls.append(_Call(function, arguments, result))
            return result

        return call


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


class _Watch(TorchDispatchMode):
    """Notes whether anything is computed by PyTorch, which a repetition of the kernels would leave out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computes |= func.name() not in _HARMLESS
        return func(*args, **(kwargs or {}))


class Bound:
    """A bound module for contiguous operands: it is started by repeating what its ``launch`` did before."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        from triton import knobs

        self._module = module
        self._device = device
        self._index = device.index  # an attribute of a device is made anew each time
        self._hooks = knobs.runtime
        self._programs: dict[tuple[int, float | None], Program | None] = {}
        self._maps: Maps = {}

    def start(
        self, tensors: Sequence[torch.Tensor], addresses: Sequence[int], rows: int, scaling: float | None
    ) -> None:
        """Run on the operands, on the current stream of the device, which is the current one.

        ``addresses`` are the tensors' own; ``rows`` are the first one's, which are the tokens where there are any.
        """
        shape = (rows, scaling)  # all that a spec leaves open
        program = self._programs.get(shape)
        watched = self._hooks.launch_enter_hook.calls or self._hooks.launch_exit_hook.calls
        if program is not None and not watched:
            program.run(addresses, self._device, torch._C._cuda_getCurrentRawStream(self._index))
            return
        scalars = () if scaling is None else (float(scaling),)
        tensors = [tensor if tensor.ndim < 3 else tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
        if watched or shape in self._programs or len(self._programs) >= _MOST_PROGRAMS:
            self._module.launch(*tensors, *scalars)
        else:
            self._programs[shape] = record(self._module, tensors, scalars, self._maps)


def record(
    module: ModuleType, tensors: Sequence[torch.Tensor], scalars: tuple[float, ...], maps: Maps
) -> Program | None:
    """Run the ``launch`` of a bound module once and return what it did; None if its kernels are not all that it does.

    ``tensors`` are contiguous; the program is right for others of their shapes, strides and alignment. ``maps`` are
    the module's, which its programs share.
    """
    starts: list[_Start] = []
    recorders = {name: _Recorder(held, starts) for name, held in vars(module).items() if isinstance(held, Launcher)}
    emitted = module.launch
    launch = FunctionType(emitted.__code__, {**emitted.__globals__, **recorders}, closure=emitted.__closure__)
    # Each operand is an object of its own, also where two are one memory: y may be base this time and not the next.
    operands = [tensor.detach() for tensor in tensors]
    with torch.no_grad(), _Watch() as watch:
        launch(*operands, *scalars)
    return None if watch.computes else _assemble(starts, operands, maps)


def _assemble(starts: Sequence[_Start], operands: Sequence[torch.Tensor], maps: Maps) -> Program | None:
    line = _Line(operands)
    try:
        return Program([_step(start, line, maps) for start in starts], line)
    except LookupError:
        return None


class _Place(NamedTuple):
    """A value in a line: the ``number``-th of its part."""

    part: str
    number: int


class _Line:
    """What a program's kernels are given, as it is found while their starts are gone through."""

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
            places += [line.constant(value) for value in maps[key].expand(argument.base.data_ptr())[1:]]
    return _Step(binary.start, places, len(head) if binary.in_one else 0)
