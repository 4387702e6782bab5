"""A launch calls the binary's own launcher with the unchanged tensors, and Triton's runner only for a profiler."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from doratune.codegen.spec import KernelSpec
from doratune.internals.triton import FlatBinary, Launcher

SPEC = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")


class Compiled:
    """A compiled kernel without a GPU: records what its C launcher and Triton's runner are called with."""

    function, packed_metadata = 77, (1, 2)

    def __init__(self) -> None:
        self.direct: list[tuple[Any, ...]] = []
        self.through_triton: list[tuple[Any, ...]] = []
        self.loads = 0

    @property
    def run(self) -> Callable[..., None]:
        self.loads += 1
        return lambda *args: self.direct.append(args)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.through_triton.append((grid, *args))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    driver = pytest.importorskip("triton.runtime").driver
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 1000 + device)
    monkeypatch.setattr(driver, "_active", active, raising=False)
    monkeypatch.setattr(type(driver), "active", active, raising=False)
    return Compiled()


def test_a_start_goes_to_the_binarys_own_launcher_on_the_current_stream(compiled: Compiled) -> None:
    launcher = Launcher(compiled)
    assert compiled.loads == 0, "nothing is loaded before the first start"
    launcher[(5,)]("a", "b", num_warps=4)
    launcher[(5, 6, 7)]("c", num_warps=4, launch_pdl=True)
    assert compiled.direct == [
        (5, 1, 1, 1003, 77, (1, 2), None, None, None, "a", "b"),
        (5, 6, 7, 1003, 77, (1, 2), None, None, None, "c"),
    ]
    assert compiled.loads == 1
    assert not compiled.through_triton


def test_a_profilers_hooks_see_every_launch(compiled: Compiled) -> None:
    from triton import knobs

    def hook(*_: object) -> None: ...

    launcher = Launcher(compiled)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        launcher[(2,)]("a")
        chain.remove(hook)
    assert compiled.through_triton == [((2, 1, 1), "a")] * 2
    launcher[(2,)]("a")
    assert len(compiled.direct) == 1


class Runner:
    """A launcher as Triton's: ``__call__`` takes the grid, the stream and so on and ends in ``launch``."""

    launch: Any

    def __init__(self, ends: Callable[..., Any], **others: Any) -> None:
        self.ends = ends
        self.launched: list[tuple[Any, ...]] = []
        self.launch = lambda *call: self.launched.append(call)
        self.global_scratch_size, self.profile_scratch_size = 0, 0
        vars(self).update(others)

    def __call__(self, *call: Any) -> None:
        self.ends(self, *call)


def flat_end(run: Any, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
    run.launch("cooperative", stream, x, y, z, function, None, metadata, *rest[3:])


def nested_end(run: Any, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
    run.launch(x, y, z, stream, function, metadata, "types", rest[3:])


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (flat_end, ("cooperative", "S", 2, 3, 4, 7, None, "M", "a", "b")),
        (nested_end, (2, 3, 4, "S", 7, "M", "types", ["a", "b"])),
    ],
)
def test_a_binary_is_started_through_the_c_function_of_its_launcher(
    end: Callable[..., None], expected: tuple[Any, ...]
) -> None:
    runner = Runner(end)
    flat = FlatBinary.of(runner, 7, "M", ())
    assert flat.start is runner.launch
    assert runner.launched == [], "to find out starts nothing"
    head = [*flat.head]
    head[flat.grid_at : flat.grid_at + 3], head[flat.stream_at] = (2, 3, 4), "S"
    flat.start(*head, *([["a", "b"]] if flat.in_one else ["a", "b"]))
    assert runner.launched == [expected]


@pytest.mark.parametrize(
    "runner",
    [
        Runner(flat_end, global_scratch_size=64),
        Runner(flat_end, profile_scratch_size=64),
        Runner(flat_end, launch=None),
        Runner(lambda run, *call: None),
        Runner(lambda run, *call: (run.launch(*call), run.launch(*call))),
        Runner(lambda run, *call: run.launch(*call[:3], *call[4:])),
        Runner(lambda run, x, y, z, *rest: run.launch(z, y, x, *rest)),
        Runner(lambda run, *call: run.launch(*call[:-1], {"arguments": call[-1]})),
        print,
    ],
)
def test_a_launcher_that_does_more_is_called_itself(runner: Any) -> None:
    flat = FlatBinary.of(runner, 7, "M", ("D",))
    assert flat == (runner, flat.head, 0, 3, False, ("D",))
    assert flat.head[4:] == (7, "M", None, None, None)
