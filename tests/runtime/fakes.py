"""Fakes of a GPU's driver and of compiled kernels, for tests of the host's code. Triton's own launcher runs up to its C
function, and all memory is on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

from doratune.codegen.compile import launch_options, triton_source
from doratune.codegen.module import kernel_names, load_module
from doratune.codegen.render import Source
from doratune.internals.triton import Launcher
from doratune.runtime.recording import Bound
from doratune.tuner.inputs import make_inputs, make_outputs

CPU = torch.device("cpu")
STREAM = 4242
SCALING = 0.75


class Map(NamedTuple):
    """A tensor map: the address of its matrix and the other values that it was made from."""

    address: int
    rest: tuple[Any, ...]


class Start(NamedTuple):
    """One call of Triton's C function: the binary, the grid, and the types and values of the arguments."""

    what: tuple[Any, ...]
    types: tuple[str, ...]
    arguments: tuple[Any, ...]


@dataclass
class Gpus:
    """A driver without a GPU: it records starts and the tensor maps that are made."""

    starts: list[Start] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    meanwhile: Callable[[], object] | None = None
    """What another thread does while the next tensor map is made."""

    def launch(self, *call: Any) -> None:
        *grid, stream, function, cooperative, pdl, packed, _, _, _, scratch, profile, _, types, arguments = call
        what = (*grid, stream, function, cooperative, pdl, packed, scratch, profile)
        self.starts.append(Start(what, types, tuple(arguments)))

    def launch_of(self, source: str, *call: Any) -> None:
        """The same for Triton before 3.7, which makes a C function from ``source`` for the types of the arguments."""
        *what, scratch, profile, packed, _, _, _ = call[:13]
        self.starts.append(Start((*what, packed, scratch, profile), (source,), call[13:]))

    def fill(self, address: int, *rest: Any) -> Map:
        made = Map(address, tuple(tuple(r) if isinstance(r, list | tuple) else r for r in rest))
        self.maps.append(made)
        if self.meanwhile is not None:
            thread, self.meanwhile = threading.Thread(target=self.meanwhile), None
            thread.start()
            thread.join()
        return made

    def taken(self) -> list[Start]:
        """The starts since the last call."""
        taken, self.starts = self.starts, []
        return taken


class Compiled:
    """Triton's compiled kernel without machine code."""

    def __init__(self, source: Source, kernel: Any, number: int) -> None:
        from triton.runtime import driver

        self.src = triton_source(source, kernel)
        described = [type_ for type_ in self.src.signature.values() if type_.startswith("tensordesc")]
        facts = {
            "tensordesc_meta": [self._describe(type_, place) for place, type_ in enumerate(described)] or None,
            "launch_pdl": bool(launch_options(source, kernel.__name__).get("launch_pdl")),
            "launch_cooperative_grid": False,
            **dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0),
            **dict.fromkeys(("global_scratch_align", "profile_scratch_align", "num_ctas"), 1),
        }
        self.metadata = namedtuple("KernelMetadata", facts)(**facts)  # type: ignore[misc]
        self.function = 1000 + number
        self.packed_metadata = (number, 1, 0)
        self.run = driver.active.launcher_cls(self.src, self.metadata)
        self.through_triton: list[tuple[int, ...]] = []

    @staticmethod
    def _describe(type_: str, place: int) -> dict[str, Any]:
        block = [int(side) for side in re.findall(r"\[([\d, ]+)\]", type_)[0].split(", ")]
        return {"swizzle": place, "elem_size": 2, "elem_type": 8, "block_size": block, "fp4_padded": False}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Triton's own runner, which calls the hooks."""

        def start(*arguments: Any) -> None:
            self.through_triton.append(grid)
            self.run(*grid, STREAM, self.function, self.packed_metadata, None, None, None, *arguments)

        return start


def bound_module(source: Source) -> ModuleType:
    module = load_module(source)
    for number, name in enumerate(kernel_names(module)):
        setattr(module, name, Launcher(Compiled(source, getattr(module, name), number)))
    return module


@dataclass
class Allocations:
    """The allocations of a ``launch``, kept alive so that no two have the same address."""

    made: list[torch.Tensor] = field(default_factory=list)


def address_in(argument: Any) -> int | None:
    """The address in an argument of the C function: a pointer, or the address of a tensor map."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument.address if isinstance(argument, Map) else None


def assert_same_starts(
    expected: Sequence[Start],
    apart: Sequence[torch.Tensor],
    found: Sequence[Start],
    together: Sequence[torch.Tensor],
) -> None:
    """Assert that ``found`` is ``expected`` with the allocations ``apart`` placed in one, without overlap."""
    assert [(start.what, start.types) for start in found] == [(start.what, start.types) for start in expected]
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in apart]
    moved: dict[int, set[int]] = {}
    for one, other in zip(expected, found, strict=True):
        for was, now in zip(one.arguments, other.arguments, strict=True):
            address = address_in(was)
            if address is None:
                assert (type(now), now) == (type(was), was)
                continue
            if isinstance(was, Map):
                assert now.rest == was.rest
            there = now.address if isinstance(was, Map) else now
            assert type(there) is int
            which = next((i for i, (start, end) in enumerate(ranges) if start <= address < end), None)
            if which is None:
                assert there == address, "an operand"
            else:
                moved.setdefault(which, set()).add(there - (address - ranges[which][0]))
    if not apart:
        assert not together
        return
    (workspace,) = together
    assert moved.keys() == set(range(len(apart))), "all of the workspace is used"
    places = []
    for which, starts in moved.items():
        (start,) = starts
        offset = start - workspace.data_ptr()
        assert offset % 512 == 0
        places.append((offset, offset + apart[which].nbytes))
    places.sort()
    assert places[0][0] >= 0
    assert places[-1][1] <= workspace.nbytes
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "no byte is shared"


def resolved(starts: Sequence[Start]) -> list[Start]:
    """The same with addresses in place of tensors, as the C function takes them."""
    return [
        start._replace(arguments=tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in start.arguments))
        for start in starts
    ]


class World:
    """An emitted module with fake binaries, and the object that repeats its ``launch``."""

    def __init__(self, source: Source, gpus: Gpus, allocations: Allocations) -> None:
        self.spec = source.spec
        self.module = bound_module(source)
        self.bound = Bound(self.module, CPU)
        self.scaling = SCALING if self.spec.contract.scaling else None
        self._gpus = gpus
        self._allocations = allocations

    def operands(self, tokens: int = 16, *, in_place: bool = False) -> list[torch.Tensor]:
        """New operands; ``in_place``: the first output shares memory with the first input of its shape and dtype."""
        inputs, _ = make_inputs(self.spec, tokens)
        first, *others = make_outputs(self.spec, tokens).values()
        if in_place:
            first = next(t for t in inputs.values() if (t.shape, t.dtype) == (first.shape, first.dtype))
        return [*inputs.values(), first, *others]

    def start(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> list[Start]:
        """Start as a kernel does; returns the starts."""
        self._forget()
        scaling = self.scaling if scaling is None else scaling
        self.bound.start(operands, [operand.data_ptr() for operand in operands], len(operands[0]), scaling)
        return self._gpus.taken()

    def launch(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> list[Start]:
        """Run the emitted ``launch``; returns the starts."""
        self._forget()
        scaling = self.scaling if scaling is None else scaling
        self.module.launch(*operands, *(() if scaling is None else (scaling,)))
        return self._gpus.taken()

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """A context in which the emitted ``launch`` must not run."""
        launch, self.module.launch = self.module.launch, None  # type: ignore[assignment]
        yield
        self.module.launch = launch  # type: ignore[method-assign]

    def assert_repeats(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> None:
        """Assert that a repetition on ``operands`` starts what ``launch`` starts on them."""
        expected = self.launch(operands, scaling)
        apart = tuple(self._allocations.made)
        with self.repeating():
            found = self.start(operands, scaling)
        assert expected
        assert_same_starts(expected, apart, found, tuple(self._allocations.made))

    def _forget(self) -> None:
        self._gpus.taken()
        self._allocations.made.clear()
