"""A repeated call checks nothing twice and lets nothing unchecked pass; a launch goes to the binary's own launcher with
the tensors as they are, and past it only where a tensor's layout or a profiler asks for more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doratune.codegen.compile import contiguous_alignments
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import VARIANTS
from doratune.runtime import kernel as kernel_module
from doratune.runtime import seen
from doratune.runtime.arguments import ArgumentError
from doratune.runtime.kernel import Kernel
from doratune.runtime.launch import FlatBinary, Launcher
from doratune.tuner.inputs import make_inputs, make_outputs

SPEC = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every full check of arguments."""
    made: list[str] = []
    bind_inputs = kernel_module.bind_inputs

    def spy(*args: Any) -> Any:
        made.append("checked")
        return bind_inputs(*args)

    monkeypatch.setattr(kernel_module, "bind_inputs", spy)
    return made


@pytest.fixture(params=["guards", "signatures"])
def recogniser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's own test of arguments, and without."""
    if request.param == "signatures":
        monkeypatch.setattr(seen, "_guards", None)


def test_equal_tensors_are_checked_once_and_others_again(checks: list[str]) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    first = kernel(**inputs, scaling=scaling)
    assert torch.equal(first, kernel(**inputs, scaling=scaling))  # type: ignore[arg-type]
    assert len(checks) == 1
    assert torch.equal(kernel(*inputs.values(), scaling=scaling), first)  # type: ignore[arg-type]
    out = torch.empty(16, 48)
    for _ in range(2):
        assert kernel(*inputs.values(), scaling=scaling, out=out) is out
        assert torch.equal(out, first)  # type: ignore[arg-type]
    assert len(checks) == 3
    fewer, _ = make_inputs(SPEC, 3)
    assert kernel(*fewer.values(), scaling=scaling).shape == (3, 48)  # type: ignore[union-attr]


def test_tensors_that_are_remembered_are_not_kept_alive(recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    out = torch.empty(16, 48)
    for _ in range(3):
        kernel(*inputs.values(), scaling=scaling, out=out)
    kept = [weakref.ref(tensor) for tensor in (*inputs.values(), out)]
    del inputs, out
    assert [tensor() for tensor in kept] == [None] * len(kept)


def test_named_tensors_in_another_order_are_told_apart(checks: list[str]) -> None:
    spec = KernelSpec.create("compose_forward", d_out=48, tokens=16, dtype="fp32", gpu="cpu")
    kernel = Kernel(spec, torch.device("cpu"))
    inputs, scaling = make_inputs(spec, 16)
    first = kernel(**inputs, scaling=scaling)
    turned = dict(reversed(inputs.items()))
    alike = {name: inputs[name] for name in ("lora", "base", "g")}  # one shape and dtype at each place
    for _ in range(3):
        assert torch.equal(kernel(**turned, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(**alike, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(**inputs, scaling=scaling), first)  # type: ignore[arg-type]
        assert torch.equal(kernel(*inputs.values(), scaling=scaling), first)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "h": t["h"][:-1]},
        lambda t: {**t, "g": t["g"].double()},
        lambda t: {**t, "h": t["h"].T.contiguous().T},
        lambda t: {**t, "base": t["base"].to("meta")},
        lambda t: {**t, "lora_B": t["lora_B"].tolist()},
        lambda t: {**t, "g": t["g"].numpy()},
        lambda t: {**t, "g": torch.Tensor},
        lambda t: {**t, "g": t["g"].repeat(2)[::2]},
        lambda t: {name: value for name, value in t.items() if name != "g"},
        lambda t: {**t, "bias": t["g"]},
    ],
)
def test_what_was_refused_is_refused_after_a_good_call_too(
    change: Callable[[dict[str, Any]], dict[str, Any]], recogniser: None
) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    for _ in range(3):
        kernel(**inputs, scaling=scaling)
        with pytest.raises(ArgumentError):
            kernel(**change(inputs), scaling=scaling)
        kernel(*inputs.values(), scaling=scaling)
        with pytest.raises(ArgumentError):
            kernel(*change(inputs).values(), scaling=scaling)
    with pytest.raises(ArgumentError, match="needs scaling"):
        kernel(**inputs)


@pytest.mark.parametrize(
    "other", [torch.empty(15, 48), torch.empty(16, 48).double(), torch.empty(16, 48, device="meta"), torch.empty(48), 3]
)
def test_an_unfit_output_is_refused_after_a_good_one_too(other: Any, recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    inputs, scaling = make_inputs(SPEC, 16)
    for _ in range(3):
        kernel(*inputs.values(), scaling=scaling, out=torch.empty(16, 48))
        with pytest.raises(ArgumentError):
            kernel(*inputs.values(), scaling=scaling, out=other)


def test_calls_of_several_kinds_in_turn_are_told_apart(checks: list[str], recogniser: None) -> None:
    kernel = Kernel(SPEC, torch.device("cpu"))
    many, scaling = make_inputs(SPEC, 16)
    few, _ = make_inputs(SPEC, 5)
    spaced = {**many, "h": torch.cat((many["h"], many["h"]), 1)[:, :8]}
    parameter = {**many, "lora_B": torch.nn.Parameter(many["lora_B"])}
    first = kernel(**many, scaling=scaling).clone()  # type: ignore[union-attr]
    checks.clear()
    for _ in range(3):
        for tensors in (many, spaced, parameter):
            assert torch.equal(kernel(*tensors.values(), scaling=scaling), first)  # type: ignore[arg-type]
            out = torch.empty(16, 48)
            assert kernel(*tensors.values(), scaling=scaling, out=out) is out
            assert torch.equal(out, first)  # type: ignore[arg-type]
        assert kernel(*few.values(), scaling=scaling).shape == (5, 48)  # type: ignore[union-attr]
        in_place = many["base"].clone()
        assert kernel(in_place, *[*many.values()][1:], scaling=scaling, out=in_place) is in_place
        assert torch.equal(in_place, first)  # type: ignore[arg-type]
    assert len(checks) == 7, "each kind is checked once: three with and without an output, and the few tokens"


def test_a_kernel_remembers_only_so_many_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_MOST_KNOWN", 4)
    kernel = Kernel(SPEC, torch.device("cpu"))
    for tokens in range(1, 12):
        inputs, scaling = make_inputs(SPEC, tokens)
        kernel(**inputs, scaling=scaling)
    assert len(kernel._seen.known) == 4


class Bound(Kernel):
    """A kernel whose emitted ``launch`` records what it is given."""

    def __init__(self) -> None:
        super().__init__(SPEC, torch.device("cuda", 0))
        self._source = SimpleNamespace()  # type: ignore[assignment]
        self._repeats = True
        self.launched: list[tuple[Any, ...]] = []
        self.bound: list[tuple[int, ...]] = []

    def _bind(self, alignments: tuple[int, ...]) -> Callable[..., None]:
        self.bound.append(alignments)
        return super()._bind(alignments)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Bound:
    kernel = Bound()

    class Here:
        def __init__(self, _: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def bind(*_: object) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda *args: kernel.launched.append(args))

    monkeypatch.setattr(kernel_module, "bind", bind)
    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    return kernel


def test_contiguous_tensors_reach_the_launcher_as_they_are_once_and_its_kernels_from_then_on(
    bound: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    tensors = (*inputs.values(), *outputs.values())
    bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert bound.bound == [tuple(contiguous_alignments(SPEC).values())]
    monkeypatch.setattr(kernel_module, "as_rows", None)  # from now on nobody looks at a tensor for long
    for _ in range(3):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.bound) == 1
    launched, recorded = bound.launched  # what was recorded is repeated without running it
    assert all(one is other for one, other in zip(launched, tensors, strict=False))
    assert [tensor.data_ptr() for tensor in recorded[:-1]] == [tensor.data_ptr() for tensor in tensors]
    assert launched[-1] == recorded[-1] == scaling


def test_what_was_recorded_is_repeated_on_its_own_device_only(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    for _ in range(3):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.launched) == 2
    for module, name in ((torch.cuda, "current_device"), (torch._C, "_cuda_getDevice")):
        monkeypatch.setattr(module, name, lambda: 1)
    for _ in range(2):  # on the kernel's device, which is made the current one
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.launched) == 4


def test_a_launch_that_calls_the_library_too_is_run_every_time(bound: Bound) -> None:
    bound._repeats = False
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    for times in range(1, 4):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
        assert len(bound.launched) == times
    gpu = find_gpu("h200")
    for variant in VARIANTS:
        spec = KernelSpec.create(
            variant.op, d_out=256, d_in=512, rank=64, tokens=64, dtype="bf16", adapter="bf16", gpu=gpu.slug
        )
        source = render(spec, variant.seeds(spec, gpu)[0])
        kernel = Kernel(spec, torch.device("cuda", 0), source=source)
        assert kernel._repeats is not variant.library


def test_other_layouts_get_a_binary_of_their_own(bound: Bound) -> None:
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = tuple(make_outputs(SPEC, 16).values())
    bound.launch(tuple(inputs.values()), outputs, scaling)
    aligned = bound.bound[0]
    shifted = torch.empty(16 * 48 + 1)[1:].view(16, 48).copy_(inputs["base"])
    narrow = torch.empty(16, 49)[:, :48].copy_(inputs["base"])
    row = inputs["base"][0].clone().as_strided((1, 48), (1, 1))  # contiguous, with a row stride that no row needs
    for base, alignment in ((shifted, 4), (narrow, 4), (row, 4)):
        tokens = base.shape[0]
        changed = (base, inputs["h"][:tokens], *list(inputs.values())[2:])
        bound.launch(changed, (outputs[0][:tokens],), scaling)
        assert bound.bound[-1] == (alignment, *aligned[1:])
        assert bound.launched[-1][0].data_ptr() == base.data_ptr()
    bound.launch((inputs["base"].view(2, 8, 48), inputs["h"].view(2, 8, 8), *list(inputs.values())[2:]), outputs, 0.5)
    assert bound.launched[-1][0].shape == (16, 48)


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
def test_a_binary_is_started_by_what_its_launcher_ends_in(end: Callable[..., None], expected: tuple[Any, ...]) -> None:
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
