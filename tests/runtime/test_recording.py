"""A recording starts the kernels that the emitted ``launch`` starts, in its order, on its grids and with its arguments,
at any addresses of operands and workspace. A ``launch`` that cannot be repeated so runs every time.

Triton's own launcher runs up to its C function. Binaries and the driver are fakes, and all memory is on the CPU.
"""

from __future__ import annotations

import functools
import gc
import inspect
import threading
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from doratune.codegen.gpu import Gpu, find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config, find_variant
from doratune.internals.triton import Launcher
from doratune.runtime import recording

from ..specs import read_by
from .fakes import (
    SCALING,
    STREAM,
    Allocations,
    Gpus,
    Map,
    World,
    assert_same_starts,
    resolved,
)

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language")  # while the interpreter is on, or it cannot be loaded later

SIZES = {"d_out": 256, "d_in": 512, "rank": 64, "tokens": 16, "layers": 2, "dtype": "bf16", "adapter": "bf16"}


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
    monkeypatch.setattr(recording, "current_stream", lambda index: STREAM)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # jit functions must be compiled, not interpreted
    return fake


REPEATED = [variant for variant in VARIANTS if not variant.library]


def forms() -> list[Any]:
    """Every variant that only starts kernels, in bf16 and with fp32 adapters, without and with all options of its
    operation."""
    found = []
    for gpu in map(find_gpu, ("h200", "a100", "rtx4090")):
        for variant in REPEATED:
            contract = OPS[variant.op]
            rich: dict[str, Any] = {flag: True for flag in ("bias", "save") if flag in contract.flags}
            if variant.op in ("weight_norm", "weight_norm_exact"):
                rich["magnitude"] = "fp32"
            added = [{}, rich]
            if "output" in contract.flags:
                added += [{"output": True}]
            if "adapter" in contract.dtypes:
                added += [{"adapter": "fp32", **({"autocast": True} if "autocast" in contract.flags else {})}]
                added += [{"adapter": "fp32"}]
            for values in added:
                spec = KernelSpec.create(variant.op, **read_by(variant, {**SIZES, **values}), gpu=gpu.slug)
                if variant.unavailable(spec, gpu) is None:
                    found.append(pytest.param(variant, spec, gpu, id=f"{variant.name}-{spec}"))
    return found


def in_place_forms() -> list[Any]:
    """The operations whose first output may share memory with an input."""

    def may(spec: KernelSpec) -> bool:
        first = spec.contract.outputs_of(spec)[0]
        return any((o.shape, o.dtype) == (first.shape, first.dtype) for o in spec.contract.inputs_of(spec))

    return [form for form in forms() if may(form.values[1])]


def config_of(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Config:
    return next(config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None)


def source_of(op: str, name: str) -> Source:
    spec, gpu = KernelSpec.create(op, **SIZES, gpu="h200"), find_gpu("h200")
    return render(spec, config_of(find_variant(op, name), spec, gpu))


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


@pytest.fixture
def world(gpus: Gpus, allocations: Allocations) -> World:
    """Ten descriptors, four allocations, and views of one."""
    return World(source_of("weight_norm", "warp_specialized"), gpus, allocations)


@pytest.fixture
def compose(gpus: Gpus, allocations: Allocations) -> World:
    """Descriptors of tokens, and y that may lie where base does."""
    return World(source_of("lora_compose", "tma"), gpus, allocations)


# A repetition does what ``launch`` would do.


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


def test_other_token_counts_and_scalings_have_recordings_of_their_own(compose: World) -> None:
    for tokens, scaling in ((16, 0.5), (17, 0.5), (16, 0.25), (16, 2.0), (1, 2.0)):
        compose.start(compose.operands(tokens), scaling)
    for tokens, scaling in ((1, 2.0), (16, 0.25), (17, 0.5), (16, 2.0), (16, 0.5)):
        compose.assert_repeats(compose.operands(tokens), scaling)
    assert len(compose.bound._recordings) == 5


# What a kernel keeps.


def test_the_number_of_recordings_is_limited(compose: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MOST_RECORDINGS", 3)
    for tokens in (*range(1, 7), *range(1, 7)):
        operands = compose.operands(tokens)
        assert resolved(compose.start(operands)) == resolved(compose.launch(operands))
    assert [tokens for tokens, _ in compose.bound._recordings] == [1, 2, 3]


def test_a_tensor_map_is_made_once_for_an_address_and_their_number_is_limited(
    compose: World, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, h, lora_b, g, y = compose.operands()
    compose.start((base, h, lora_b, g, y))
    gpus.maps.clear()
    for _ in range(3):
        compose.start((base, h, lora_b, g, y))
    assert [made.address for made in gpus.maps] == [t.data_ptr() for t in (base, h, lora_b, y)]
    gpus.maps.clear()
    monkeypatch.setattr(recording, "_MOST_MAPS", 4)
    others = [torch.empty_like(y) for _ in range(9)]
    for other in others:
        compose.assert_repeats((base, h, lora_b, g, other))
    (recorded,) = compose.bound._recordings.values()
    assert recorded is not None
    assert max(len(maps.known) for _, maps in recorded.descriptors) <= 4


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


def test_a_repeated_start_skips_tritons_python(world: World, compose: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver as nvidia

    for one in (world, compose):
        operands = one.operands()
        one.start(operands)
        expected, apart = one.launch(operands), tuple(one._allocations.made)
        with monkeypatch.context() as patch:
            patch.setattr(nvidia.CudaLauncher, "__call__", lambda *_: pytest.fail("Triton's launcher was called"))
            assert_same_starts(expected, apart, one.start(operands), tuple(one._allocations.made))


def test_maps_that_triton_makes_in_an_unknown_way_are_made_by_triton(
    compose: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import driver as nvidia

    theirs = nvidia.make_tensordesc_arg
    since_3_8 = len(signature(theirs).parameters) > 2

    def make_tensordesc_arg(arg: Any, metadata: Any, *more: Any) -> list[Any]:
        first, *rest = theirs(arg, metadata, *more[:since_3_8])
        return [SimpleNamespace(wrapped=first, address=first.address), *rest]

    made: list[Any] = []

    class Counting:
        def __call__(self, arg: Any, metadata: Any, *more: Any) -> list[Any]:
            made.append(arg)
            return theirs(arg, metadata, *more[:since_3_8])

    for way in (make_tensordesc_arg, Counting()):
        monkeypatch.setattr(nvidia, "make_tensordesc_arg", way)
        compose.bound._recordings.clear()
        compose.bound._maps.clear()
        for _ in range(3):
            operands = compose.operands()
            (start,) = compose.start(operands)
            maps = [argument for argument in start.arguments if hasattr(argument, "address")]
            base, h, lora_b, _, y = operands
            assert [found.address for found in maps] == [t.data_ptr() for t in (base, h, lora_b, y)]
    # Before 3.8 Triton's launcher looks the function up in every call: launch itself calls it when it is recorded.
    assert len(made) == 3 * 4 + (0 if since_3_8 else 4)


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


def test_a_recording_keeps_no_operand_or_workspace_alive(world: World, allocations: Allocations) -> None:
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


# Launches that cannot be repeated.


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
    assert [*compose.bound._recordings.values()] == [None]


def test_kernels_whose_descriptors_have_no_tensor_maps_run_every_time(compose: World) -> None:
    for launcher in (held for held in vars(compose.module).values() if isinstance(held, Launcher)):
        compiled = launcher._compiled
        compiled.metadata = compiled.metadata._replace(tensordesc_meta=None)
    compose.start(compose.operands())
    assert [*compose.bound._recordings.values()] == [None]
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


def test_a_recording_may_be_started_while_another_thread_is_starting_it(compose: World, gpus: Gpus) -> None:
    compose.start(compose.operands())
    mine, others = compose.operands(), compose.operands()
    expected = resolved(compose.launch(others)) + resolved(compose.launch(mine))
    gpus.meanwhile = lambda: compose.bound.start(others, [t.data_ptr() for t in others], 16, SCALING)
    assert compose.start(mine) == expected


def test_threads_share_a_recording(compose: World, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MOST_MAPS", 2)
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
