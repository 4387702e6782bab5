"""Starting what was emitted: binaries in place of an emitted module's jit functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import ModuleType

    from ..cache.entry import Binary
    from ..codegen.render import Source


class FlatBinary(NamedTuple):
    """A binary, and what starts it without making tensor maps: Triton's C function where its Python only leads there.

    ``start`` takes ``head``, with the grid from ``grid_at`` on and the stream at ``stream_at``, then the kernel's
    arguments, ``in_one`` sequence or each on its own: the map, the shape and the strides of a matrix for each
    descriptor. ``descriptors`` is what Triton's driver needs to know to make the maps.
    """

    start: Callable[..., None]
    head: tuple[Any, ...]
    grid_at: int
    stream_at: int
    in_one: bool
    descriptors: tuple[Any, ...]

    @classmethod
    def of(cls, run: Any, function: int, metadata: Any, descriptors: tuple[Any, ...]) -> FlatBinary:
        """For a launcher of Triton, which it asks what it calls in the end, and with what."""
        x, y, z, stream, argument = (object() for _ in range(5))
        asked = (x, y, z, stream, function, metadata, None, None, None)
        through = cls(run, asked, 0, 3, False, descriptors)
        scratch = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
        if scratch != [0, 0] or not callable(getattr(run, "launch", None)):
            return through
        calls: list[tuple[Any, ...]] = []
        stand_in = SimpleNamespace(**{**vars(run), "launch": lambda *arguments: calls.append(arguments)})
        type(run).__call__(stand_in, *asked, argument)
        if len(calls) != 1:
            return through
        *head, last = calls[0]
        in_one = isinstance(last, list | tuple) and [*last] == [argument]
        places = [[i for i, value in enumerate(head) if value is wanted] for wanted in (x, y, z, stream)]
        if not (in_one or last is argument) or [len(found) for found in places] != [1, 1, 1, 1]:
            return through
        first, second, third, fourth = (found[0] for found in places)
        if (second, third) != (first + 1, first + 2):
            return through
        return cls(run.launch, tuple(head), first, fourth, in_one, descriptors)


class Launcher:
    """Stands in for a jit function inside an emitted module, so that ``kernel[grid](…)`` starts a compiled binary.

    It calls the binary's own C launcher, past what Triton's runner does before each launch: asking the driver for the
    device, and making a closure and metadata for hooks. Where hooks are set (a profiler), the runner serves.
    """

    def __init__(self, compiled: Any) -> None:
        from triton import knobs
        from triton.runtime import driver

        self._compiled = compiled
        self._device = driver.active.get_current_device()
        self._stream = driver.active.get_current_stream
        self._hooks = knobs.runtime
        self._binary: tuple[Callable[..., None], int, Any] | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._start, (*grid, 1, 1)[:3])

    def _start(self, grid: tuple[int, ...], *args: Any, **_: int) -> None:  # the options are compiled in
        if self._hooks.launch_enter_hook.calls or self._hooks.launch_exit_hook.calls:
            self._compiled[grid](*args)
            return
        run, function, metadata = self._binary or self._load()
        run(grid[0], grid[1], grid[2], self._stream(self._device), function, metadata, None, None, None, *args)

    @functools.cached_property
    def flat(self) -> FlatBinary:
        """The binary with a launcher that takes tensor maps for descriptors.

        Raises:
            LookupError: Triton makes no maps of this kernel's descriptors.
        """
        from triton.runtime import driver

        run, function, metadata = self._binary or self._load()
        types = tuple(self._compiled.src.signature.values())
        described = sum(type_.startswith("tensordesc") for type_ in types)
        if not described:
            return FlatBinary.of(run, function, metadata, ())
        maps = tuple(getattr(self._compiled.metadata, "tensordesc_meta", None) or ())
        if len(maps) != described or None in maps:
            raise LookupError("descriptors without tensor maps")
        flat: list[str] = []
        for type_ in types:
            rank = type_.count(",", 0, type_.find("]")) + 1
            flat += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank] if type_.startswith("tensordesc") else [type_]
        fields = {**self._compiled.metadata._asdict(), "tensordesc_meta": None}
        source = SimpleNamespace(constants={}, signature=dict(enumerate(flat)))
        return FlatBinary.of(driver.active.launcher_cls(source, SimpleNamespace(**fields)), function, metadata, maps)

    def _load(self) -> tuple[Callable[..., None], int, Any]:
        run = self._compiled.run  # loads the binary on the current device, after which its handle is there
        self._binary = (run, self._compiled.function, self._compiled.packed_metadata)
        return self._binary


def uses_descriptors(source: Source) -> bool:
    """Whether an emitted module addresses its matrices by tensor descriptors."""
    from ..codegen.variants import find_variant

    return find_variant(source.spec.op, source.config.variant).descriptors


def only_starts_kernels(source: Source) -> bool:
    """Whether the emitted ``launch`` calls no library beside starting its kernels."""
    from ..codegen.variants import find_variant

    return not find_variant(source.spec.op, source.config.variant).library


def bind(
    source: Source, alignments: Mapping[str, int] | None = None, binaries: Mapping[str, Binary] | None = None
) -> ModuleType:
    """Load an emitted module for the current GPU and put binaries in place of its jit functions.

    ``alignments`` are the bytes that divide the address and the row stride of each operand, by name; None means
    contiguous operands. ``binaries`` are compiled kernels from a store, by name: where they are those of this module,
    and the operands contiguous, nothing is compiled. Otherwise Triton compiles, or takes what its cache on disk has.
    """
    from triton.runtime import driver

    from ..codegen.compile import build, contiguous_alignments
    from ..codegen.module import kernel_names, load_module

    module = load_module(source)
    target = driver.active.get_current_target()
    contiguous = alignments is None or dict(alignments) == contiguous_alignments(source.spec)
    kernels = {name: getattr(module, name) for name in kernel_names(module)}
    handles = _restored(source, kernels, target, binaries) if binaries and contiguous else None
    for name, kernel in kernels.items():
        setattr(module, name, Launcher(handles[name] if handles else build(source, kernel, target, alignments)))
    return module


def _restored(
    source: Source, kernels: Mapping[str, Any], target: Any, binaries: Mapping[str, Binary]
) -> dict[str, Any] | None:
    """Triton's compiled kernels from stored binaries, loaded on the current GPU, or None when any of them fails."""
    from ..codegen.binary import BinaryError, OtherSettingsError, must_compile, restore
    from .binaries import warn_of_compile

    if must_compile() is not None:
        return None
    handles: dict[str, Any] = {}
    try:
        for name, kernel in kernels.items():
            if name not in binaries:
                raise BinaryError(f"{source.spec}: there is none of {name}")
            handle = restore(source, kernel, target, binaries[name].metadata, binaries[name].image)
            _ = handle.run  # has the driver load it now, while a compile can still take its place
            handles[name] = handle
    except OtherSettingsError:
        return None
    except Exception as problem:  # whatever the driver says: a compiled kernel runs, or fails for a reason of its own
        warn_of_compile(problem)
        return None
    return handles
