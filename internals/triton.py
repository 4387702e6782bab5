"""The internals of Triton that doratune uses, each in one function or class here.

If an internal fails because Triton has changed, doratune warns once and uses Triton's public API from then on:
``kernel[grid](…)`` starts the kernel, a compile replaces a stored binary, and the emitted ``launch`` runs instead of
its recording. Only :func:`compile_for`, which compiles for a GPU that is not present, has no alternative.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

from ..errors import DoratuneError
from . import find

NAMES = (
    "triton.knobs.runtime",
    "triton.knobs.compilation",
    "triton.knobs.cache",
    "triton.knobs.nvidia",
    "triton.runtime.driver",
    "triton.backends.nvidia.driver.make_tensordesc_arg",
    "triton.compiler.CompiledKernel",
    "triton.compiler.compiler.make_backend",
    "triton.experimental.gluon._runtime.GluonASTSource",
    "triton._C.libtriton.get_cache_invalidating_env_vars",
)
"""Every private name in Triton's modules. A test removes each in turn."""

ATTRIBUTES = (
    "CompiledKernel.run",
    "CompiledKernel.function",
    "CompiledKernel.packed_metadata",
    "CompiledKernel.metadata",
    "CompiledKernel.src",
    "driver.active.get_current_device",
    "driver.active.get_current_stream",
    "driver.active.launcher_cls",
    "driver.active.utils",
)
"""Every private attribute of Triton's objects. A test removes each in turn."""


_warned: set[str] = set()
"""The ways that :func:`warn_once` has warned of."""

_LAUNCHING = "starting kernels through their C launchers"
_FP_FUSION = "TRITON_DEFAULT_FP_FUSION"


class InternalsError(DoratuneError):
    """The installed Triton lacks an internal; the caller uses the public API instead."""


def need(name: str) -> Any:
    """Return the object with a name of :data:`NAMES`.

    Raises:
        InternalsError: this Triton does not have it.
    """
    found = find(name)
    if found is None:
        raise InternalsError(f"{name} is missing")
    return found


def missing() -> list[str]:
    """The names that the installed Triton lacks."""
    return [name for name in NAMES if find(name) is None]


def warn_once(way: str, instead: str, problem: BaseException) -> None:
    """Warn that a ``way`` that uses internals failed, and what happens ``instead``: once in a process for each way."""
    if way in _warned:
        return
    _warned.add(way)
    warnings.warn(
        f"an internal of Triton that doratune uses has changed, so {way} is disabled: {instead} ({_short(problem)}). "
        "`doratune doctor` lists the tested versions",
        RuntimeWarning,
        stacklevel=3,
    )


# Start a compiled kernel.


class Launcher:
    """Replaces a jit function in an emitted module, so that ``kernel[grid](…)`` starts a compiled kernel.

    It calls the kernel's C launcher directly. That skips the work of Triton's runner before each launch: asking the
    driver for the device, and making a closure and metadata for hooks. If hooks are set (a profiler), or the C launcher
    is not available, it calls Triton's runner.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._binary: _Binary | None = None
        self._is_public = _LAUNCHING in _warned  # it failed before
        if self._is_public:
            return
        try:
            active = need("triton.runtime.driver").active
            self._device: int = active.get_current_device()
            self._stream: Callable[[int], int] = active.get_current_stream
            self._hooks = need("triton.knobs.runtime")
        except Exception as problem:
            self._leave(problem)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._start, (*grid, 1, 1)[:3])

    def _start(self, grid: tuple[int, ...], *args: Any, **_: int) -> None:  # the options are compiled in
        if self._is_public or is_hooked(self._hooks):
            self._compiled[grid](*args)
            return
        if self._binary is None:
            self._start_first(grid, args)
            return
        run, function, metadata = self._binary
        run(grid[0], grid[1], grid[2], self._stream(self._device), function, metadata, None, None, None, *args)

    def _start_first(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Start for the first time. If this fails and Triton's runner does not, the launcher has changed."""
        try:
            run, function, metadata = binary = self._load()
            run(grid[0], grid[1], grid[2], self._stream(self._device), function, metadata, None, None, None, *args)
        except Exception as problem:
            self._compiled[grid](*args)  # raises too if the kernel or the GPU is at fault
            self._leave(problem)
        else:
            self._binary = binary

    def _leave(self, problem: Exception) -> None:
        self._is_public = True
        warn_once(_LAUNCHING, "Triton's runner starts them", problem)

    @functools.cached_property
    def flat(self) -> FlatBinary:
        """The binary with a launcher that takes tensor maps instead of descriptors.

        Raises:
            LookupError: Triton makes no tensor maps for this kernel's descriptors.
            InternalsError: the launcher is unknown.
        """
        if self._is_public:
            raise InternalsError("the launcher is unknown")
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
        launcher = need("triton.runtime.driver").active.launcher_cls
        return FlatBinary.of(launcher(source, SimpleNamespace(**fields)), function, metadata, maps)

    def _load(self) -> _Binary:
        run = self._compiled.run  # loads the binary on the current device, which sets ``function``
        return _Binary(run, self._compiled.function, self._compiled.packed_metadata)


class _Binary(NamedTuple):
    """A binary's C launcher, its handle, and the metadata that Triton packs for the launcher."""

    run: Callable[..., None]
    function: int
    metadata: Any


def launch_hooks() -> Any:
    """The argument of :func:`is_hooked`; None if this Triton does not have it."""
    return find("triton.knobs.runtime")


def prepare_launcher(compiled: Any) -> None:
    """Put the C launcher of a compiled kernel into Triton's cache, so that the first start need not compile it.

    Triton up to 3.6 compiles one for each signature, with the C compiler, in a third of a second. Elsewhere, and where
    that fails, nothing happens: the first start does it.
    """
    if find("triton.backends.nvidia.driver.make_launcher") is None:
        return
    with contextlib.suppress(Exception):
        find("triton.backends.nvidia.driver.CudaLauncher")(compiled.src, compiled.metadata)


def is_hooked(hooks: Any) -> bool:
    """Whether a profiler's launch hooks are set; True if Triton offers no way to find out."""
    try:
        return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
    except AttributeError:
        return True


class FlatBinary(NamedTuple):
    """How to start a binary with ready tensor maps: Triton's C function, or its Python launcher if that does more.

    ``start`` takes ``head``, with the grid from index ``grid_at`` on and the stream at ``stream_at``, then the kernel's
    arguments, as one sequence if ``in_one``. Each descriptor is passed as its matrix's tensor map, shape and strides.
    ``descriptors`` is the metadata from which Triton's driver makes the maps.
    """

    start: Callable[..., None]
    head: tuple[Any, ...]
    grid_at: int
    stream_at: int
    in_one: bool
    descriptors: tuple[Any, ...]

    @classmethod
    def of(cls, run: Any, function: int, metadata: Any, descriptors: tuple[Any, ...]) -> FlatBinary:
        """Probe a Triton launcher for its C function and argument layout."""
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


class MapMaker:
    """Makes the tensor maps of one descriptor argument, for a matrix at any address.

    The first map is made by Triton's Python, which ends in a function of the driver. Further maps call that function
    directly.
    """

    def __init__(self, descriptor: Any, metadata: Any) -> None:
        self._descriptor = copy.copy(descriptor)
        self._descriptor.base = None  # so that no tensor is kept alive
        self._metadata = metadata
        self._fill: Callable[..., Any] | None = None
        self._settings: tuple[Any, ...] = ()

    def expand(self, address: int) -> list[Any]:
        """The arguments that replace the descriptor of a matrix at ``address``: its map, its shape, its strides.

        Raises:
            InternalsError: this Triton has no function for it.
        """
        listened = need("triton.backends.nvidia.driver.make_tensordesc_arg")
        descriptor = copy.copy(self._descriptor)
        descriptor.base = SimpleNamespace(data_ptr=lambda: address)
        calls: list[_Call] = []
        active = SimpleNamespace(utils=_Listener(need("triton.runtime.driver").active.utils, calls))
        triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
        if isinstance(listened, FunctionType):
            inside = {**listened.__globals__, "triton": triton}
            listened = FunctionType(listened.__code__, inside, None, listened.__defaults__, listened.__closure__)
        unused = [None] * (len(inspect.signature(listened).parameters) - 2)  # one parameter since Triton 3.8
        expanded: list[Any] = listened(descriptor, self._metadata, *unused)
        if len(calls) == 1 and calls[0].arguments[0] == address and calls[0].result is expanded[0]:
            self._fill, self._settings = calls[0].function, calls[0].arguments[1:]
        return expanded

    def make(self, address: int) -> Any:
        """The tensor map of a matrix at ``address``.

        Raises:
            InternalsError: Triton makes none.
        """
        try:
            return self.expand(address)[0] if self._fill is None else self._fill(address, *self._settings)
        except Exception as problem:
            raise InternalsError(_short(problem)) from problem


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any


class _Listener:
    """The driver's functions; each call is recorded."""

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


# Compile; make compiled kernels from stored data.


def compile_for(source: Any, target: Any, options: Mapping[str, int | bool]) -> Any:
    """Compile a result of :func:`source_for` for a ``GPUTarget``; returns Triton's compiled kernel."""
    import triton

    return triton.compile(source, target=target, options=_with_fusion(options))


def _with_fusion(options: Mapping[str, int | bool]) -> dict[str, int | bool]:
    """The options with fused multiply-add on: Triton's default, which 3.9 warns about and 3.10 is to change."""
    return {**options} if _FP_FUSION in os.environ else {**options, "enable_fp_fusion": True}


def bring_back_names() -> None:
    """Restore old names in Gluon, so that one emitted text runs with all tested versions of Triton.

    ``async_copy_…`` became ``async_load`` and ``async_store`` in 3.8, ``_reinterpret`` became ``reinterpret`` in 3.9.
    """
    tma = find("triton.experimental.gluon.language.nvidia.hopper.tma")
    for old, new in (("async_copy_global_to_shared", "async_load"), ("async_copy_shared_to_global", "async_store")):
        if hasattr(tma, new):
            setattr(tma, old, getattr(tma, new))
    memory = find("triton.experimental.gluon.language._core.shared_memory_descriptor")
    if not hasattr(memory, "_reinterpret") and hasattr(memory, "reinterpret"):
        memory._reinterpret = memory.reinterpret


def source_for(kernel: Any, signature: Mapping[str, str], attributes: Mapping[tuple[int, ...], object]) -> Any:
    """The input of Triton's compiler for a jit function whose parameters have the types of ``signature``."""
    from triton.compiler import ASTSource

    source = need("triton.experimental.gluon._runtime.GluonASTSource") if kernel.is_gluon() else ASTSource
    return source(kernel, dict(signature), constexprs={}, attrs=dict(attributes))


def current_target() -> Any:
    """The ``GPUTarget`` of the current GPU.

    Raises:
        InternalsError: this Triton offers no way to find out.
    """
    try:
        driver = need("triton.runtime.driver")
        return driver.active.get_current_target()
    except (AttributeError, TypeError) as problem:
        raise InternalsError(_short(problem)) from problem


def parsed_options(target: Any, options: Mapping[str, int | bool]) -> dict[str, Any]:
    """All options of the compiler for a target, with defaults for those not given.

    Raises:
        InternalsError: this Triton offers no way to find out.
    """
    try:
        return dict(vars(need("triton.compiler.compiler.make_backend")(target).parse_options(_with_fusion(options))))
    except Exception as problem:
        raise InternalsError(_short(problem)) from problem


def cache_environment() -> dict[str, str]:
    """The environment variables that are set and part of the key of Triton's own cache.

    Raises:
        InternalsError: this Triton offers no way to find out.
    """
    try:
        variables = dict(need("triton._C.libtriton.get_cache_invalidating_env_vars")())
    except Exception as problem:
        raise InternalsError(_short(problem)) from problem
    if not all(isinstance(text, str) for pair in variables.items() for text in pair):
        raise InternalsError("the environment variables are no texts")
    return variables


def version() -> tuple[int, int]:
    """The major and minor version of Triton."""
    from triton import __version__

    major, minor, *_ = __version__.split(".")
    return int(major), int(minor)


def descriptor_flags() -> dict[str, object]:
    """The facts in Triton's metadata of each descriptor that do not depend on its tile: doratune never uses im2col."""
    return {"is_im2col": False} if version() >= (3, 8) else {}


def restored(name: str, source: Any, target: Any, metadata: Mapping[str, Any], image: bytes, digest: str) -> Any:
    """Make Triton's compiled kernel from a result of :func:`source_for`, metadata and an image, without compiling.

    Raises:
        InternalsError: this Triton offers no way to do it.
    """
    make = need("triton.compiler.CompiledKernel")
    try:
        extension = need("triton.compiler.compiler.make_backend")(target).binary_ext
        with tempfile.TemporaryDirectory(prefix="doratune-") as folder:  # Triton reads a kernel from files
            parts = {f"{name}.json": json.dumps(metadata).encode(), f"{name}.{extension}": image}
            for part, content in parts.items():
                (Path(folder) / part).write_bytes(content)
            handle = make(source, {part: str(Path(folder) / part) for part in parts}, digest)
        handle.metadata_group = {}  # the files are gone
    except (AttributeError, TypeError, KeyError) as problem:
        raise InternalsError(_short(problem)) from problem
    return handle


def why_compile() -> str | None:
    """Why stored binaries are disabled in this process, or None."""
    knobs = find("triton.knobs.compilation")
    for knob, variable in (
        ("always_compile", "TRITON_ALWAYS_COMPILE"),
        ("override", "TRITON_KERNEL_OVERRIDE"),
        ("dump_ir", "TRITON_KERNEL_DUMP"),
    ):
        if getattr(knobs, knob, os.environ.get(variable, "0") not in ("", "0")):
            return f"{variable} is set"
    if getattr(find("triton.knobs.runtime"), "add_stages_inspection_hook", None) is not None:
        return "a hook changes the stages of Triton's compiler"
    return None


def cuobjdump() -> str:
    """The path of Triton's ``cuobjdump``, or the name, to be found on the PATH."""
    path = getattr(getattr(find("triton.knobs.nvidia"), "cuobjdump", None), "path", None)
    return "cuobjdump" if path is None else str(path)


def cache_folder() -> str | None:
    """The folder of Triton's own cache; None if Triton offers no way to find out."""
    try:
        return str(need("triton.knobs.cache").dir)
    except Exception:  # this runs when Triton may be broken
        return None


def frontend_complaint(error: BaseException) -> str | None:
    """The message of Triton's frontend about an emitted text; None for another error."""
    if not _is_tritons(error, "CompilationError"):
        return None
    # Not str(error): that begins with the kernel's text.
    said = getattr(error, "error_message", None) or repr(error.__cause__ or error.__context__)
    return str(said)


def assembler_output(error: BaseException) -> str | None:
    """The output of ptxas; None for another error."""
    if not _is_tritons(error, "PTXASError"):
        return None
    return str(getattr(error, "error_message", None) or "")


def _is_tritons(error: BaseException, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("triton.") for kind in type(error).__mro__)


def _short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {next(iter(str(problem).splitlines()), '')[:120]}"
