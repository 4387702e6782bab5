"""A repeated launch starts the kernels that the emitted ``launch`` starts, in its order, on its grids and with its
arguments, wherever the operands and the workspace lie; and what cannot be repeated so is not.

Triton's own launcher runs up to its C function; binaries and the driver are made up, and memory is the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import itertools
import re
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from doratune.codegen.compile import launch_options, triton_source
from doratune.codegen.gpu import Gpu, find_gpu
from doratune.codegen.module import kernel_names, load_module
from doratune.codegen.ops import OPS
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config, find_variant
from doratune.runtime import kernel as kernel_module
from doratune.runtime import program as program_module
from doratune.runtime.kernel import Kernel
from doratune.runtime.launch import Launcher
from doratune.runtime.program import Bound
from doratune.runtime.reference import reference
from doratune.tuner.inputs import make_inputs, make_outputs

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language")  # while the interpreter is on, or it cannot be loaded later

CPU = torch.device("cpu")
STREAM = 4242
SIZES = {"d_out": 256, "d_in": 512, "rank": 64, "tokens": 16, "dtype": "bf16", "adapter": "bf16"}
SCALING = 0.75


class Map(NamedTuple):
    """A tensor map: the address of the matrix, and all else that it was made from."""

    address: int
    rest: tuple[Any, ...]


class Start(NamedTuple):
    """One call of Triton's C function: which binary on which grid, the types of its arguments, and these."""

    what: tuple[Any, ...]
    types: tuple[str, ...]
    arguments: tuple[Any, ...]


@dataclass
class Gpus:
    """A driver without a GPU: it keeps what is started and what tensor maps are made."""

    starts: list[Start] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    meanwhile: Callable[[], object] | None = None
    """What another thread does while the next tensor map is made."""

    def launch(self, *call: Any) -> None:
        *grid, stream, function, cooperative, pdl, packed, _, _, _, scratch, profile, _, types, arguments = call
        what = (*grid, stream, function, cooperative, pdl, packed, scratch, profile)
        self.starts.append(Start(what, types, tuple(arguments)))

    def launch_of(self, source: str, *call: Any) -> None:
        """The same before Triton 3.7, where a C function is made from ``source`` for the types of the arguments."""
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
        """What was started since the last look."""
        taken, self.starts = self.starts, []
        return taken


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    fake = Gpus()
    utils = SimpleNamespace(
        launch=fake.launch,
        build_signature_metadata=tuple,
        fill_tma_descriptor_tiled=fake.fill,
        fill_tma_descriptor=fake.fill,
    )
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: STREAM,
        launcher_cls=nvidia.CudaLauncher,
        utils=utils,
    )
    if hasattr(nvidia, "PyKernelArg"):
        monkeypatch.setattr(nvidia, "PyKernelArg", lambda **of: tuple(of.values()))
    else:  # Triton 3.6
        monkeypatch.setattr(nvidia, "library_dirs", list)
        monkeypatch.setattr(
            nvidia,
            "compile_module_from_src",
            lambda src, **_: SimpleNamespace(launch=functools.partial(fake.launch_of, src)),
        )
    monkeypatch.setattr(type(driver), "active", active, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # jit functions are to be the compiler's
    return fake


class Compiled:
    """Triton's compiled kernel, but for the machine code."""

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
        block = [int(side) for side in re.findall(r"\[(\d+), (\d+)\]", type_)[0]]
        return {"swizzle": place, "elem_size": 2, "elem_type": 8, "block_size": block, "fp4_padded": False}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Triton's own runner, which tells the hooks."""

        def start(*arguments: Any) -> None:
            self.through_triton.append(grid)
            self.run(*grid, STREAM, self.function, self.packed_metadata, None, None, None, *arguments)

        return start


def bound_module(source: Source) -> ModuleType:
    module = load_module(source)
    for number, name in enumerate(kernel_names(module)):
        setattr(module, name, Launcher(Compiled(source, getattr(module, name), number)))
    return module


REPEATED = [variant for variant in VARIANTS if not variant.library]


def forms() -> list[Any]:
    """Every variant that only starts kernels where it runs, in bf16 and with fp32 adapters, plain and with all that its
    operation can add."""
    found = []
    for gpu in map(find_gpu, ("h200", "a100", "rtx4090")):
        for variant in REPEATED:
            contract = OPS[variant.op]
            rich: dict[str, Any] = {flag: True for flag in ("bias", "save") if flag in contract.flags}
            if variant.op == "weight_norm":
                rich["magnitude"] = "fp32"
            added = [{}, rich]
            if "output" in contract.flags:
                added += [{"output": True}]
            if "adapter" in contract.dtypes:
                added += [{"adapter": "fp32", **({"autocast": True} if "autocast" in contract.flags else {})}]
                added += [{"adapter": "fp32"}]
            for values in added:
                spec = KernelSpec.create(variant.op, **{**SIZES, **values}, gpu=gpu.slug)
                if variant.unavailable(spec, gpu) is None:
                    found.append(pytest.param(variant, spec, gpu, id=f"{variant.name}-{spec}"))
    return found


def in_place_forms() -> list[Any]:
    """Those whose first output may lie in the memory of an input like it."""

    def may(spec: KernelSpec) -> bool:
        first = spec.contract.outputs_of(spec)[0]
        return any((o.shape, o.dtype) == (first.shape, first.dtype) for o in spec.contract.inputs_of(spec))

    return [form for form in forms() if may(form.values[1])]


def config_of(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Config:
    return next(config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None)


def source_of(op: str, name: str) -> Source:
    spec, gpu = KernelSpec.create(op, **SIZES, gpu="h200"), find_gpu("h200")
    return render(spec, config_of(find_variant(op, name), spec, gpu))


@dataclass
class Allocations:
    """What a ``launch`` allocated, kept so that no two have one address."""

    made: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    kept = Allocations()

    def spy(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocating(*args: Any, **options: Any) -> torch.Tensor:
            kept.made.append(allocate(*args, **options))
            return kept.made[-1]

        return allocating

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, spy(getattr(torch, name)))
    return kept


def address_in(argument: Any) -> int | None:
    """The address that an argument of the C function gives: a pointer's, or that of a tensor map."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument.address if isinstance(argument, Map) else None


def assert_same_starts(
    expected: Sequence[Start],
    apart: Sequence[torch.Tensor],
    found: Sequence[Start],
    together: Sequence[torch.Tensor],
) -> None:
    """``found`` is ``expected`` with the allocations ``apart`` at places of their own in the one allocation of it."""
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
    """The same with the addresses of pointers in place of tensors, as the C function takes them."""
    return [
        start._replace(arguments=tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in start.arguments))
        for start in starts
    ]


class World:
    """An emitted module whose binaries are made up, and what repeats its ``launch``."""

    def __init__(self, source: Source, gpus: Gpus, allocations: Allocations) -> None:
        self.spec = source.spec
        self.module = bound_module(source)
        self.bound = Bound(self.module, CPU)
        self.scaling = SCALING if self.spec.contract.scaling else None
        self._gpus = gpus
        self._allocations = allocations

    def operands(self, tokens: int = 16, *, in_place: bool = False) -> list[torch.Tensor]:
        """Fresh ones; ``in_place`` puts the first output where the first input of its shape and dtype is."""
        inputs, _ = make_inputs(self.spec, tokens)
        first, *others = make_outputs(self.spec, tokens).values()
        if in_place:
            first = next(t for t in inputs.values() if (t.shape, t.dtype) == (first.shape, first.dtype))
        return [*inputs.values(), first, *others]

    def start(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> list[Start]:
        """Start as a kernel does; returns what that started."""
        self._forget()
        scaling = self.scaling if scaling is None else scaling
        self.bound.start(operands, [operand.data_ptr() for operand in operands], len(operands[0]), scaling)
        return self._gpus.taken()

    def launch(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> list[Start]:
        """Run the emitted ``launch``; returns what that started."""
        self._forget()
        scaling = self.scaling if scaling is None else scaling
        self.module.launch(*operands, *(() if scaling is None else (scaling,)))
        return self._gpus.taken()

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """In here the emitted ``launch`` must not run."""
        launch, self.module.launch = self.module.launch, None  # type: ignore[assignment]
        yield
        self.module.launch = launch  # type: ignore[method-assign]

    def assert_repeats(self, operands: Sequence[torch.Tensor], scaling: float | None = None) -> None:
        """What is repeated on ``operands`` is what ``launch`` does on them."""
        expected = self.launch(operands, scaling)
        apart = tuple(self._allocations.made)
        with self.repeating():
            found = self.start(operands, scaling)
        assert expected
        assert_same_starts(expected, apart, found, tuple(self._allocations.made))

    def _forget(self) -> None:
        self._gpus.taken()
        self._allocations.made.clear()


@pytest.fixture
def world(gpus: Gpus, allocations: Allocations) -> World:
    """Ten descriptors, four allocations, and views of one."""
    return World(source_of("weight_norm", "warp_specialized"), gpus, allocations)


@pytest.fixture
def compose(gpus: Gpus, allocations: Allocations) -> World:
    """Descriptors of tokens, and y that may lie where base does."""
    return World(source_of("lora_compose", "tma"), gpus, allocations)


# What is repeated is what would have been done.


@pytest.mark.parametrize(("variant", "spec", "gpu"), forms())
def test_a_repetition_starts_what_the_emitted_launch_starts(
    variant: Variant, spec: KernelSpec, gpu: Gpu, gpus: Gpus, allocations: Allocations
) -> None:
    world = World(render(spec, config_of(variant, spec, gpu)), gpus, allocations)
    for tokens in (16, 7, 1) if "tokens" in OPS[spec.op].inputs[0].shape else (1,):
        first = world.operands(tokens)
        recorded = world.start(first)
        assert [start.what for start in recorded] == [start.what for start in world.launch(first)]
        for _ in range(2):
            world.assert_repeats(world.operands(tokens))


def test_every_variant_is_among_them() -> None:
    seen = {(spec.op, variant.name, gpu.has_tma) for variant, spec, gpu in (param.values for param in forms())}
    assert {(op, name) for op, name, _ in seen} == {(variant.op, variant.name) for variant in REPEATED}
    for variant in REPEATED:
        assert ((variant.op, variant.name, False) in seen) is not variant.descriptors


@pytest.mark.parametrize(("variant", "spec", "gpu"), in_place_forms())
@pytest.mark.parametrize("recorded_in_place", [False, True])
def test_where_the_output_lies_may_change(
    variant: Variant, spec: KernelSpec, gpu: Gpu, recorded_in_place: bool, gpus: Gpus, allocations: Allocations
) -> None:
    world = World(render(spec, config_of(variant, spec, gpu)), gpus, allocations)
    world.start(world.operands(in_place=recorded_in_place))
    for in_place in (True, False, True):
        world.assert_repeats(world.operands(in_place=in_place))


def test_views_of_one_allocation_stay_where_they_are_in_it(world: World) -> None:
    operands = world.operands()
    world.start(operands)
    _, lower_gram, row_dots = world.start(operands)
    high, low = lower_gram.arguments[1:3]
    assert low - high == 64 * 64 * 2
    assert {high, low} <= {argument.address for argument in row_dots.arguments if isinstance(argument, Map)}


def test_the_workspace_is_one_allocation_of_which_each_part_is_aligned(world: World, allocations: Allocations) -> None:
    operands = world.operands()
    world.launch(operands)
    apart = [-(-made.nbytes // 512) * 512 for made in allocations.made]
    assert len(apart) > 1
    world.start(operands)
    world.start(operands)
    (workspace,) = allocations.made
    assert workspace.nbytes == sum(apart)
    allocations.made.clear()


def test_other_token_counts_and_scalings_are_not_taken_for_equal(compose: World) -> None:
    for tokens, scaling in ((16, 0.5), (17, 0.5), (16, 0.25), (16, 2.0), (1, 2.0)):
        compose.start(compose.operands(tokens), scaling)
    for tokens, scaling in ((1, 2.0), (16, 0.25), (17, 0.5), (16, 2.0), (16, 0.5)):
        compose.assert_repeats(compose.operands(tokens), scaling)
    assert len(compose.bound._programs) == 5


# What is kept.


def test_only_so_many_programs_are_kept(compose: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_MOST_PROGRAMS", 3)
    for tokens in (*range(1, 7), *range(1, 7)):
        operands = compose.operands(tokens)
        assert resolved(compose.start(operands)) == resolved(compose.launch(operands))
    assert [tokens for tokens, _ in compose.bound._programs] == [1, 2, 3]


def test_a_tensor_map_is_made_once_for_an_address_and_only_so_many_are_kept(
    compose: World, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, h, lora_b, g, y = compose.operands()
    compose.start((base, h, lora_b, g, y))
    gpus.maps.clear()
    for _ in range(3):
        compose.start((base, h, lora_b, g, y))
    assert [made.address for made in gpus.maps] == [t.data_ptr() for t in (base, h, lora_b, y)]
    gpus.maps.clear()
    monkeypatch.setattr(program_module, "_MOST_MAPS", 4)
    others = [torch.empty_like(y) for _ in range(9)]
    for other in others:
        compose.assert_repeats((base, h, lora_b, g, other))
    (program,) = compose.bound._programs.values()
    assert program is not None
    assert max(len(maps.known) for _, maps in program.descriptors) <= 4


def test_all_maps_but_the_first_come_straight_from_the_driver(
    compose: World, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import driver as nvidia

    operands = compose.operands()
    compose.start(operands)
    others = compose.operands()
    wanted = resolved(compose.launch(others))
    monkeypatch.setattr(nvidia, "make_tensordesc_arg", lambda *_: pytest.fail("made by way of a descriptor"))
    gpus.maps.clear()
    assert resolved(compose.start(others)) == wanted
    base, h, lora_b, _, y = others
    assert [made.address for made in gpus.maps] == [t.data_ptr() for t in (base, h, lora_b, y)]


def test_a_repeated_start_goes_past_tritons_python(
    world: World, compose: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import driver as nvidia

    for one in (world, compose):
        operands = one.operands()
        one.start(operands)
        expected, apart = one.launch(operands), tuple(one._allocations.made)
        with monkeypatch.context() as patch:
            patch.setattr(nvidia.CudaLauncher, "__call__", lambda *_: pytest.fail("Triton's launcher was called"))
            assert_same_starts(expected, apart, one.start(operands), tuple(one._allocations.made))


def test_maps_that_triton_makes_in_a_way_of_its_own_are_made_by_triton(
    compose: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import driver as nvidia

    theirs = nvidia.make_tensordesc_arg

    def make_tensordesc_arg(arg: Any, metadata: Any) -> list[Any]:
        first, *rest = theirs(arg, metadata)
        return [SimpleNamespace(wrapped=first, address=first.address), *rest]

    made: list[Any] = []

    class Counting:
        def __call__(self, arg: Any, metadata: Any) -> list[Any]:
            made.append(arg)
            return theirs(arg, metadata)

    for way in (make_tensordesc_arg, Counting()):
        monkeypatch.setattr(nvidia, "make_tensordesc_arg", way)
        compose.bound._programs.clear()
        compose.bound._maps.clear()
        for _ in range(3):
            operands = compose.operands()
            (start,) = compose.start(operands)
            maps = [argument for argument in start.arguments if hasattr(argument, "address")]
            base, h, lora_b, _, y = operands
            assert [found.address for found in maps] == [t.data_ptr() for t in (base, h, lora_b, y)]
    assert len(made) == 3 * 4 + 4, "in the recording by launch itself as well"


def test_the_map_of_a_weight_serves_every_number_of_tokens(gpus: Gpus, allocations: Allocations) -> None:
    compose = World(source_of("lora_compose", "tma"), gpus, allocations)
    base, h, lora_b, g, y = compose.operands(16)
    compose.start((base, h, lora_b, g, y))
    compose.start((base, h, lora_b, g, y))
    for tokens in (7, 5):
        fewer = (base[:tokens], h[:tokens], lora_b, g, y[:tokens])
        compose.start(fewer)
        gpus.maps.clear()
        compose.start(fewer)
        made = [found.address for found in gpus.maps]
        assert made == [t.data_ptr() for t in (base, h, y)], "those with tokens in their shape are others"
        compose.assert_repeats(fewer)


def test_nothing_recorded_keeps_an_operand_or_a_workspace_alive(world: World, allocations: Allocations) -> None:
    gc.collect()
    gc.disable()
    try:
        operands = world.operands()
        world.start(operands)
        world.start(operands)
        seen = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*operands, *allocations.made)]
        assert not any(storage.expired() for storage in seen)
        del operands
        world._forget()
        assert all(storage.expired() for storage in seen)
    finally:
        gc.enable()


# What cannot be repeated.


@pytest.mark.parametrize(
    "change",
    [
        "    torch.mm(h, lora_b.T, out=y)",
        "    g.mul_(1.0)",
        "    y.zero_()",
        "    scaling = scaling * g.sum().item()",
        "    lora_b = lora_b.contiguous().clone()",
        "    lora_b = lora_b[:]",
        "    g = g.detach()",
        "    base = base.view(-1, 256)",
    ],
)
def test_a_launch_that_computes_or_takes_parts_of_operands_runs_every_time(change: str, compose: World) -> None:
    text = inspect.getsource(compose.module.launch)
    runs: list[str] = []
    compose.module.runs = runs  # type: ignore[attr-defined]
    exec(text.replace("    tile = [", f"    runs.append('ran')\n{change}\n    tile = [", 1), vars(compose.module))
    for count in range(1, 4):
        assert len(compose.start(compose.operands())) == 1
        assert len(runs) == count
    assert [*compose.bound._programs.values()] == [None]


def test_kernels_whose_descriptors_have_no_tensor_maps_run_every_time(compose: World) -> None:
    for launcher in (held for held in vars(compose.module).values() if isinstance(held, Launcher)):
        compiled = launcher._compiled
        compiled.metadata = compiled.metadata._replace(tensordesc_meta=None)
    compose.start(compose.operands())
    assert [*compose.bound._programs.values()] == [None]
    assert len(compose.start(compose.operands())) == 1


@pytest.mark.parametrize("chain", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_see_every_launch(chain: str, world: World) -> None:
    from triton import knobs

    def hook(*_: object) -> None: ...

    hooks = getattr(knobs.runtime, chain)
    compiled = [held._compiled for held in vars(world.module).values() if isinstance(held, Launcher)]

    def seen() -> list[int]:
        return [len(one.through_triton) for one in compiled]

    world.start(world.operands())
    world.start(world.operands())
    assert seen() == [0, 0, 0]
    hooks.add(hook)
    try:
        world.start(world.operands())
        world.start(world.operands())
    finally:
        hooks.remove(hook)
    assert seen() == [2, 2, 2]
    world.assert_repeats(world.operands())
    assert seen() == [2, 2, 2]


def test_a_program_may_be_started_while_another_thread_is_starting_it(compose: World, gpus: Gpus) -> None:
    compose.start(compose.operands())
    mine, others = compose.operands(), compose.operands()
    expected = resolved(compose.launch(others)) + resolved(compose.launch(mine))
    gpus.meanwhile = lambda: compose.bound.start(others, [t.data_ptr() for t in others], 16, SCALING)
    assert compose.start(mine) == expected


def test_threads_share_a_program(compose: World, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_MOST_MAPS", 2)
    sets = [compose.operands() for _ in range(4)]
    compose.start(sets[0])
    gpus.taken()

    def run(operands: list[torch.Tensor]) -> None:
        for _ in range(200):
            compose.bound.start(operands, [operand.data_ptr() for operand in operands], 16, SCALING)

    threads = [threading.Thread(target=run, args=(operands,)) for operands in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mixed = gpus.taken()
    assert len(mixed) == 800
    for operands in sets:
        (expected,) = resolved(compose.launch(operands))
        assert sum(start == expected for start in mixed) == 200


# What reaches a program at all.


class Eager(Kernel):
    """A kernel for a GPU whose ``launch`` is the eager formula on CPU tensors; counts what is left to be repeated."""

    def __init__(self, spec: KernelSpec, monkeypatch: pytest.MonkeyPatch, *, descriptors: bool) -> None:
        super().__init__(spec, torch.device("cuda", 0))
        self._source = SimpleNamespace()  # type: ignore[assignment]
        self._repeats = True
        self._descriptors = descriptors
        self.repeated = 0
        self.seen: list[tuple[torch.Tensor, ...]] = []

        def launch(*operands: Any) -> None:
            *tensors, scaling = operands
            self.seen.append(tuple(tensors))
            named = {o.name: t for o, t in zip(spec.contract.inputs_of(spec), tensors, strict=False)}
            for output, value in zip(tensors[len(named) :], reference(spec, named, scaling).values(), strict=True):
                output.copy_(value)

        start = Bound.start

        def spy(bound: Bound, *args: Any) -> None:
            self.repeated += 1
            start(bound, *args)

        monkeypatch.setattr(kernel_module, "bind", lambda *_: SimpleNamespace(launch=launch))
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(Bound, "start", spy)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(len(tensor), tensor.shape[1] + 4)[:, : tensor.shape[1]].copy_(tensor)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def columns(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in the memory order of its transpose."""
    return tensor.T.contiguous().T


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def three(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(2, -1, tensor.shape[-1])


def odd_row(tensor: torch.Tensor) -> torch.Tensor:
    """A single row whose stride, which nothing reads, is 1."""
    return tensor.as_strided(tensor.shape, (1, 1))


MATRICES = ("base", "h", "y")
LAYOUTS = {
    **{
        f"{name} {how.__name__}": (16, {name: how})
        for name in MATRICES
        for how in (wide, shifted, columns, every_second)
    },
    **{f"{name} odd row": (1, {name: odd_row}) for name in MATRICES},
    "lora_B columns": (16, {"lora_B": columns}),
    "lora_B wide": (16, {"lora_B": wide}),
    "g every_second": (16, {"g": every_second}),
    "g shifted": (16, {"g": shifted}),
    "all at once": (16, {"base": columns, "h": every_second, "lora_B": columns, "g": every_second, "y": wide}),
}


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_are_not_plain_are_never_repeated_and_come_out_right(
    layout: str, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")
    kernel = Eager(spec, monkeypatch, descriptors=descriptors)
    tokens, changes = LAYOUTS[layout]
    inputs, scaling = make_inputs(spec, tokens)
    expected = reference(spec, inputs, scaling)["y"]
    for _ in range(2):
        (y,) = make_outputs(spec, tokens).values()
        kernel.launch(tuple(inputs.values()), (y,), scaling)
        assert torch.equal(y, expected)
    assert kernel.repeated == 1, "plain tensors are"
    changed = {name: changes[name](tensor) if name in changes else tensor for name, tensor in inputs.items()}
    for _ in range(2):
        (y,) = make_outputs(spec, tokens).values()
        y = changes["y"](y) if "y" in changes else y
        kernel.launch(tuple(changed.values()), (y,), scaling)
        assert torch.equal(y.reshape(expected.shape), expected)
        assert kernel.repeated == 1
        for given in kernel.seen[-1]:
            assert given.stride(-1) == 1
            assert given.ndim < 3
            if descriptors and given.ndim == 2:
                assert given.data_ptr() % 16 == 0
                assert given.stride(0) * given.element_size() % 16 == 0
                assert given.stride(0) >= given.shape[1]
    for name, tensor in changed.items():
        assert torch.equal(tensor.reshape(inputs[name].shape), inputs[name]), "inputs are left alone"


def test_tokens_in_two_dimensions_are_repeated_as_the_rows_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")
    kernel = Eager(spec, monkeypatch, descriptors=True)
    kernel.device = CPU
    inputs, scaling = make_inputs(spec, 16)
    expected = reference(spec, inputs, scaling)["y"]
    changed = {name: three(tensor) if name in ("base", "h") else tensor for name, tensor in inputs.items()}
    for count in range(1, 4):
        (y,) = make_outputs(spec, 16).values()
        kernel.launch(tuple(changed.values()), (three(y),), scaling)
        assert torch.equal(y, expected)
        found = kernel(*changed.values(), scaling=scaling)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, three(expected))
        assert kernel.repeated == 2 * count - 1, "all but the first launch, which binds"
    assert {tensor.ndim for given in kernel.seen for tensor in given} == {1, 2}
    assert kernel._contiguous is not None
    assert [rows for rows, _ in kernel._contiguous._programs] == [16], "what serves two rows would be another program"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not re.search("columns|every_second|all", name)])
def test_a_call_that_is_known_is_repeated_on_plain_tensors_only(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")
    kernel = Eager(spec, monkeypatch, descriptors=True)
    kernel.device = CPU  # where the tensors are; the device that is asked for stays the kernel's
    tokens, changes = LAYOUTS[layout]
    inputs, scaling = make_inputs(spec, tokens)
    expected = reference(spec, inputs, scaling)["y"]
    changed = {name: changes[name](tensor) if name in changes else tensor for name, tensor in inputs.items()}
    for out in (True, False)[: 1 if "y" in changes else 2]:
        for tensors, change, plain in ((inputs, {}, True), (changed, changes, False)):
            for count in range(3):
                (y,) = make_outputs(spec, tokens).values()
                y = change["y"](y) if "y" in change else y.reshape(tensors["base"].shape)
                before = kernel.repeated
                found = kernel(*tensors.values(), scaling=scaling, out=y if out else None)
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found.reshape(expected.shape), expected)
                assert found is y or not out
                assert kernel.repeated - before == (plain and (count > 0 or not out))
