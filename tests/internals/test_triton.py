"""If Triton lacks one of the internals, doratune starts the same kernels through public APIs and warns once.

The driver and the binaries are fakes (tests/runtime/fakes.py); tests/gpu/test_internals.py does the same on a GPU.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doratune.cache.entry import Binary
from doratune.cache.trust import Trust
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import kernel_names
from doratune.codegen.render import Source, render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config
from doratune.internals import triton as internals
from doratune.runtime import binding
from doratune.runtime.binaries import find_binaries

from ..runtime.fakes import Allocations, Compiled, Gpus, World
from ..runtime.test_recording import allocations, gpus  # noqa: F401  fixtures
from ..specs import read_by

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language")

ROOT = Path(__file__).parents[2]
SIZES = {"d_out": 256, "d_in": 512, "rank": 64, "tokens": 16, "dtype": "bf16", "adapter": "bf16"}
GPU = find_gpu("h200")
MAKE_BACKEND = "triton.compiler.compiler.make_backend"
COMPILED = ("triton.experimental.gluon._runtime.GluonASTSource",)
"""Without these no kernel can be compiled ahead: see the test of jit functions below."""
STARTED = [variant for variant in VARIANTS if not variant.library]


class Without:
    """An object without one of its attributes."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)

    def __getitem__(self, grid: Any) -> Any:
        return self._whole[grid]


def hide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make doratune find no ``name``, which is one of NAMES or ATTRIBUTES."""
    find = internals.find
    owner, _, attribute = name.rpartition(".")
    if name in internals.NAMES:
        monkeypatch.setattr(internals, "find", lambda wanted: None if wanted == name else find(wanted))
    elif owner == "driver.active":

        def found(wanted: str) -> Any:
            driver = find(wanted)
            return driver if wanted != "triton.runtime.driver" else Held(Without(driver.active, attribute))

        monkeypatch.setattr(internals, "find", found)
    else:
        made = internals.Launcher.__init__
        monkeypatch.setattr(
            internals.Launcher, "__init__", lambda self, compiled: made(self, Without(compiled, attribute))
        )


class Held:
    def __init__(self, active: Any) -> None:
        self.active = active


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    internals._warned.clear()
    yield
    internals._warned.clear()


def source_of(variant: Variant) -> Source:
    spec = KernelSpec.create(variant.op, **read_by(variant, SIZES), gpu=GPU.slug)
    config = next(config for config in variant.seeds(spec, GPU) if check_config(spec, config, GPU) is None)
    return render(spec, config)


def world_of(variant: Variant, gpus: Gpus, allocations: Allocations) -> World:  # noqa: F811
    return World(source_of(variant), gpus, allocations)


@pytest.mark.parametrize("name", [name for name in (*internals.NAMES, *internals.ATTRIBUTES) if name not in COMPILED])
@pytest.mark.parametrize("variant", STARTED, ids=lambda variant: f"{variant.op}-{variant.name}")
def test_without_it_the_same_kernels_are_started(
    variant: Variant,
    name: str,
    gpus: Gpus,  # noqa: F811
    allocations: Allocations,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = world_of(variant, gpus, allocations)
    operands = whole.operands()
    expected = [start.what[:3] for start in whole.launch(operands)]
    assert expected
    hide(name, monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reduced = world_of(variant, gpus, allocations)
        for _ in range(3):
            assert [start.what[:3] for start in reduced.start(operands)] == expected
    messages = [
        str(warning.message)
        for warning in said
        if "an internal of Triton that doratune uses has changed" in str(warning.message)
    ]
    assert len(messages) == len(set(messages)) <= 2, "each way is left once"


@pytest.mark.parametrize("name", ["triton.runtime.driver", "driver.active.get_current_target", *COMPILED])
def test_where_nothing_can_be_compiled_ahead_the_jit_functions_stay(
    name: str,
    gpus: Gpus,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variant = next(v for v in STARTED if v.name == "warp_specialized")
    source = source_of(variant)
    if name in COMPILED:
        monkeypatch.setattr(binding, "current_target", GPU.triton_target)
    hide(name, monkeypatch)  # the fake driver has no get_current_target
    with pytest.warns(RuntimeWarning, match="kernels compile at their first start"):
        module = binding.bind(source)
    kernels = [held for held_name, held in vars(module).items() if held_name.endswith("_kernel")]
    assert kernels
    assert not any(isinstance(kernel, internals.Launcher) for kernel in kernels)


def test_what_jit_functions_start_is_not_recorded(gpus: Gpus, allocations: Allocations) -> None:  # noqa: F811
    """A recording contains only starts by launchers, so here it would start nothing."""
    world = world_of(next(v for v in STARTED if v.op == "compose_backward"), gpus, allocations)
    started: list[Any] = []

    class Jit:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: started.append(grid)

    for name in kernel_names(world.module):
        setattr(world.module, name, Jit())
    world.start(world.operands())
    once = len(started)
    for times in range(2, 4):
        world.start(world.operands())
        assert len(started) == times * once > 0


class Changed(Compiled):
    """A compiled kernel whose C launcher takes unknown arguments."""

    error: type[Exception] = TypeError

    @property
    def run(self) -> Callable[..., None]:
        def refuse(*_: Any) -> None:
            raise self.error("launch() takes 3 arguments")

        return refuse

    @run.setter
    def run(self, _: Any) -> None: ...

    def __init__(self) -> None:
        self.function, self.packed_metadata = 1, ()
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.started.append((grid, arguments))


def test_a_first_start_that_fails_is_made_by_tritons_runner_and_so_are_the_others(gpus: Gpus) -> None:  # noqa: F811
    compiled = Changed()
    launcher = internals.Launcher(compiled)
    with pytest.warns(RuntimeWarning, match="Triton's runner starts them"):
        launcher[(4,)]("a")
    launcher[(5,)]("b")
    assert compiled.started == [((4, 1, 1), ("a",)), ((5, 1, 1), ("b",))]


def test_an_error_of_the_kernel_itself_is_raised(gpus: Gpus) -> None:  # noqa: F811
    compiled = Changed()
    compiled.__class__ = type("Failing", (Changed,), {"__getitem__": lambda self, grid: self.run})
    launcher = internals.Launcher(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="takes 3 arguments"):
            launcher[(4,)]("a")


def test_no_other_file_names_an_internal_of_triton() -> None:
    """Other files use public names only: ``triton``, its languages, and the GPUTarget that ``triton.compile`` takes."""
    public = r"backends\.compiler import GPUTarget|experimental\.gluon import language"
    private = re.compile(rf"(from|import) triton\.(?!{public})|triton\.(knobs|_C|runtime)")
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0]
        if part.startswith(".") or part in ("tests", "internals", "docs", "build"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not private.search(line), f"{path}:{number}: {line}"


def test_this_triton_has_every_name() -> None:
    assert internals.missing() == []


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not as it was")


@pytest.mark.parametrize("internal", ["get_current_device", "get_current_stream"])
def test_a_driver_that_fails_leaves_starting_to_tritons_runner(
    internal: str,
    gpus: Gpus,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime import driver

    compiled = Changed()
    monkeypatch.setattr(Changed, "run", property(lambda self: lambda *_: None))
    monkeypatch.setattr(driver.active, internal, fail)
    with pytest.warns(RuntimeWarning, match="Triton's runner starts them"):
        internals.Launcher(compiled)[(4,)]("a")
    assert compiled.started == [((4, 1, 1), ("a",))]


@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError, AssertionError, AttributeError])
def test_a_compile_that_fails_for_no_known_reason_leaves_the_jit_functions(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    from doratune.codegen import compile as compiling

    def refuse(*_: Any) -> Any:
        raise kind("not as it was")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(binding, "current_target", GPU.triton_target)
    monkeypatch.setattr(compiling, "build", refuse)
    with pytest.warns(RuntimeWarning, match="kernels compile at their first start"):
        module = binding.bind(source_of(STARTED[0]))
    assert not any(isinstance(held, internals.Launcher) for held in vars(module).values())


@pytest.mark.parametrize("complaint", ["PassManager::run failed", "Failed to find C compiler"])
def test_a_compile_that_says_what_is_wrong_is_an_error(complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from doratune.codegen import compile as compiling

    def refuse(*_: Any) -> Any:
        raise RuntimeError(complaint)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(binding, "current_target", GPU.triton_target)
    monkeypatch.setattr(compiling, "build", refuse)
    with pytest.raises(RuntimeError, match=complaint):
        binding.bind(source_of(STARTED[0]))


@pytest.mark.parametrize("way", ["raises", "gives nonsense"])
@pytest.mark.parametrize("name", ["triton._C.libtriton.get_cache_invalidating_env_vars", MAKE_BACKEND])
def test_where_triton_cannot_be_asked_what_a_binary_must_be_none_is_taken(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(STARTED[0])
    find = internals.find
    instead = fail if way == "raises" else lambda *_: [3]
    monkeypatch.setattr(internals, "find", lambda wanted: instead if wanted == name else find(wanted))

    class Team:
        location = "team"

        def has_binaries(self, *_: str) -> bool:
            return True

        def get_binary(self, code: str, kernel: str, triton: str, architecture: str) -> Binary:
            return Binary(code, kernel, triton, architecture, "{}", b"")

    monkeypatch.setattr("doratune.codegen.binary._parsed", lambda kernel, metadata: {})
    monkeypatch.setattr(Trust, "refusal", lambda self, store: None)
    with pytest.warns(RuntimeWarning, match="kernels are compiled"):
        found = find_binaries(source, [Team()], GPU, Trust())  # type: ignore[list-item]
    assert not found.kernels
    assert "Team" not in found.note, "it is Triton that fails"


def test_a_tensor_map_that_cannot_be_made_later_leaves_the_recording(
    gpus: Gpus,  # noqa: F811
    allocations: Allocations,  # noqa: F811
) -> None:
    world = world_of(next(v for v in STARTED if (v.op, v.name) == ("lora_compose", "tma")), gpus, allocations)
    for _ in range(2):
        world.start(world.operands())
    (recorded,) = world.bound._recordings.values()
    assert recorded is not None
    for _, maps in recorded.descriptors:
        maps.maker._fill = fail
        maps.known.clear()
    operands = world.operands()
    with pytest.warns(RuntimeWarning, match="each launch runs as emitted"):
        assert len(world.start(operands)) == 1
    assert [*world.bound._recordings.values()] == [None]
