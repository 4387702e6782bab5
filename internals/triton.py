"""The internals of Triton that doratune uses, each in one function or class here.

If an internal fails because Triton has changed, doratune warns once and uses Triton's public API from then on:
``kernel[grid](…)`` starts the kernel, a compile replaces a stored binary, and the emitted ``launch`` runs instead of
its recording. Only :func:`compile_for`, which compiles for a GPU that is not present, has no alternative.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import json
import os
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DoratuneError
from . import find

if TYPE_CHECKING:
    from .cuda import Driver

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
    "triton.runtime.cache.get_cache_key",
    "triton.runtime.cache.get_cache_manager",
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
_C_LAUNCHER = "__triton_launcher"
_LOADED = "_doratune_loaded"

NO_JIT = "DORATUNE_NO_JIT"
"""The environment variable that forbids compiling; empty or 0 is off."""


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


class LaunchRefusedError(DoratuneError):
    """A kernel was started where tensors have no memory (:func:`without_launches`)."""


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Have every ``kernel[grid](…)`` of this thread raise :class:`LaunchRefusedError` in the block.

    Blocks must not overlap. Triton takes a tensor on the meta device for one at address 0, and its kernel would be a
    fault on the GPU.
    """
    from triton.runtime import KernelInterface

    own, launcher_of = threading.get_ident(), KernelInterface.__getitem__

    def refused(kernel: Any, grid: Any) -> Any:
        if threading.get_ident() != own:
            return launcher_of(kernel, grid)
        raise LaunchRefusedError(f"{getattr(kernel, '__name__', kernel)} was started on tensors without memory")

    KernelInterface.__getitem__ = refused
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher_of


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
        self._own = False
        self._is_public = _LAUNCHING in _warned  # it failed before
        if self._is_public:
            return
        self._own = own_driver() is not None
        try:
            active = active_driver()
            self._device: int = active.get_current_device()
            self._stream: Callable[[int], int] = active.get_current_stream
            self._hooks = need("triton.knobs.runtime")
        except Exception as problem:
            self._leave(problem)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._start, (*grid, 1, 1)[:3])

    def _start(self, grid: tuple[int, ...], *args: Any, **_: int) -> None:  # the options are compiled in
        if self._is_public or (not self._own and is_hooked(self._hooks)):
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
            if self._own:
                raise
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
        launcher = active_driver().launcher_cls
        return FlatBinary.of(launcher(*_flattened(self._compiled)), function, metadata, maps)

    def _load(self) -> _Binary:
        return load(self._compiled)


def _flattened(compiled: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The source and metadata for a C launcher that takes each descriptor as its tensor map, shape and strides."""
    source = SimpleNamespace(constants={}, signature=_flat_signature(compiled.src.signature))
    return source, SimpleNamespace(**{**compiled.metadata._asdict(), "tensordesc_meta": None})


def _flat_signature(signature: Mapping[Any, str]) -> dict[int, str]:
    flat: list[str] = []
    for type_ in signature.values():
        rank = type_.count(",", 0, type_.find("]")) + 1
        flat += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank] if type_.startswith("tensordesc") else [type_]
    return dict(enumerate(flat))


def own_driver() -> Driver | None:
    """The driver that takes the place of Triton's in this process; None where Triton's is used.

    Triton builds its own with the C compiler, up to 3.6 also a launcher for each signature. Where there is no C
    compiler, or ``DORATUNE_NO_JIT`` forbids to use it, doratune's kernels start without, unless all is built already.
    """
    return _own_driver(no_jit())


@functools.cache
def _own_driver(forbidden: bool) -> Driver | None:
    from . import cuda

    try:
        import torch

        on_cuda = torch.version.cuda is not None
    except (ImportError, AttributeError):  # a process that only compiles has no PyTorch
        return None
    if not on_cuda or (version() >= (3, 7) and cuda.is_built()):
        return None
    return cuda.own_driver() if forbidden or not cuda.has_c_compiler() else None


def active_driver() -> Any:
    """The driver of doratune's kernels: Triton's, or :func:`own_driver`."""
    own = own_driver()
    return need("triton.runtime.driver").active if own is None else own


def no_jit() -> bool:
    """Whether nothing may be compiled in this process."""
    return os.environ.get(NO_JIT, "").strip() not in ("", "0")


def load(compiled: Any) -> _Binary:
    """Load a compiled kernel on the current device, unless it was loaded before."""
    own = own_driver()
    if own is None:
        run = compiled.run  # sets ``function``
        return _Binary(run, compiled.function, compiled.packed_metadata)
    known: _Binary | None = vars(compiled).get(_LOADED)
    if known is None:
        shared, device = compiled.metadata.shared, own.get_current_device()
        function = own.load(compiled.name, compiled.kernel, shared, device)
        known = _Binary(own.launcher_cls(compiled.src, compiled.metadata), function, compiled.packed_metadata)
        setattr(compiled, _LOADED, known)
    return known


class _Binary(NamedTuple):
    """A binary's C launcher, its handle, and the metadata that Triton packs for the launcher."""

    run: Callable[..., None]
    function: int
    metadata: Any


def launch_hooks() -> Any:
    """The argument of :func:`is_hooked`; None if this Triton does not have it."""
    return find("triton.knobs.runtime")


def prepare_launcher(compiled: Any) -> None:
    """Put the C launchers of a compiled kernel into Triton's cache, so that the first start need not compile them.

    Where that fails, the first start compiles them.
    """
    with contextlib.suppress(Exception):
        for text in launchers_of(compiled.src, getattr(compiled.metadata, "tensordesc_meta", None)):
            compile_launcher(text)


def launchers_of(source: Any, descriptors: Any) -> list[str]:
    """The C launchers that starting a kernel takes; ``source`` is a result of :func:`source_for`.

    Triton up to 3.6 compiles one for each signature, with the C compiler, in a third of a second; with tensor
    descriptors there are two (:attr:`Launcher.flat`). Later versions need none. ``descriptors`` is the entry
    ``tensordesc_meta`` of a compiled kernel's metadata, which only kernels with tensor descriptors need.
    """
    make = find("triton.backends.nvidia.driver.make_launcher")
    if make is None or own_driver() is not None:
        return []
    try:
        texts = [make({}, dict(source.signature), descriptors)]
        if has_descriptors(source):
            texts.append(make({}, _flat_signature(source.signature), None))
    except Exception:  # this Triton makes them in another way
        return []
    return texts


def has_descriptors(source: Any) -> bool:
    """Whether a kernel has tensor descriptors among its parameters."""
    return any(type_.startswith("tensordesc") for type_ in source.signature.values())


def launcher_is_compiled(text: str) -> bool:
    """Whether Triton's cache has this C launcher; True if Triton offers no way to find out."""
    try:
        key = hashlib.sha256((text + need("triton.runtime.build.platform_key")()).encode()).hexdigest()
        name = f"{_C_LAUNCHER}{sysconfig.get_config_var('EXT_SUFFIX')}"
        return need("triton.runtime.cache.get_cache_manager")(key).get_file(name) is not None
    except Exception:
        return True


def compile_launcher(text: str) -> None:
    """Compile a C launcher into Triton's cache.

    Raises:
        Exception: it cannot be compiled here.
    """
    driver = importlib.import_module("triton.backends.nvidia.driver")
    places = (driver.library_dirs(), driver.include_dirs, driver.libraries)
    driver.compile_module_from_src(text, _C_LAUNCHER, *places)


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
        active = SimpleNamespace(utils=_Listener(active_driver().utils, calls))
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


def preload() -> None:
    """Import Triton and compute what its first compile needs: a digest of its files takes a third of a second.

    Does nothing that a compile would not do, and what fails here fails there.
    """
    for module in ("triton.compiler", "triton.backends.nvidia.driver", "triton.experimental.gluon"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for name in ("triton.runtime.cache.triton_key", "triton.backends.nvidia.driver.library_dirs"):
        with contextlib.suppress(Exception):
            find(name)()


def is_compiled(source: Any, target: Any, options: Mapping[str, int | bool]) -> bool:
    """Whether Triton's cache on disk has what :func:`compile_for` would make; False if Triton does not tell."""
    try:
        backend = need("triton.compiler.compiler.make_backend")(target)
        parsed = backend.parse_options({**_with_fusion(options), **source.parse_options()})
        key = need("triton.runtime.cache.get_cache_key")(source, backend, parsed, env_vars=cache_environment())
        folder = need("triton.runtime.cache.get_cache_manager")(hashlib.sha256(key.encode()).hexdigest())
        return bool(folder.get_group(f"{source.name[:150]}.json"))
    except Exception:  # an internal that has changed, or a folder that cannot be read
        return False


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
        return active_driver().get_current_target()
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


def scratch_memories(backend: str) -> tuple[str, ...]:
    """The kinds of scratch memory whose size Triton's metadata states: AMD's backend has the global one since 3.8."""
    return ("global", "profile") if backend == "cuda" or version() >= (3, 8) else ("profile",)


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
