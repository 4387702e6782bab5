"""Recordings are repeated only on plain tensors and on the kernel's own device. Other tensors run a binary of their
own, directly or as copies, with correct results.
"""

from __future__ import annotations

import contextlib
import re
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
from doratune.runtime import recording
from doratune.runtime.kernel import Kernel
from doratune.runtime.recording import Bound
from doratune.runtime.reference import reference
from doratune.tuner.inputs import make_inputs, make_outputs

from ..specs import read_by

SPEC = KernelSpec.create("lora_compose", d_out=48, rank=8, tokens=16, dtype="fp32", adapter="fp32", gpu="cpu")


class Binding(Kernel):
    """A kernel whose emitted ``launch`` records its arguments."""

    def __init__(self) -> None:
        super().__init__(SPEC, torch.device("cuda", 0))
        self._source = SimpleNamespace()  # type: ignore[assignment]
        self._repeats = True
        self.launched: list[tuple[Any, ...]] = []
        self.bound: list[tuple[int, ...]] = []

    def bind(self, alignments: tuple[int, ...]) -> Callable[..., None]:
        self.bound.append(alignments)
        return super().bind(alignments)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Binding:
    kernel = Binding()

    class Here:
        def __init__(self, _: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def bind(*_: object) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda *args: kernel.launched.append(args))

    monkeypatch.setattr(kernel_module, "bind", bind)
    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel_module, "current_device", lambda: 0)
    monkeypatch.setattr(recording, "current_stream", lambda index: 0)
    return kernel


@pytest.mark.skipif(recording.DispatchMode is None, reason="without dispatch modes no launch is recorded")
def test_contiguous_tensors_reach_the_launcher_as_they_are_once_and_its_kernels_from_then_on(
    bound: Binding, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    tensors = (*inputs.values(), *outputs.values())
    bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert bound.bound == [tuple(contiguous_alignments(SPEC).values())]
    monkeypatch.setattr(kernel_module, "as_rows", None)  # from now on the slow path must not run
    for _ in range(3):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.bound) == 1
    launched, recorded = bound.launched  # what was recorded is repeated without running it
    assert all(one is other for one, other in zip(launched, tensors, strict=False))
    assert [tensor.data_ptr() for tensor in recorded[:-1]] == [tensor.data_ptr() for tensor in tensors]
    assert launched[-1] == recorded[-1] == scaling


@pytest.mark.skipif(recording.DispatchMode is None, reason="without dispatch modes no launch is recorded")
def test_what_was_recorded_is_repeated_on_its_own_device_only(bound: Binding, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    for _ in range(3):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.launched) == 2
    for module, name in ((torch.cuda, "current_device"), (kernel_module, "current_device")):
        monkeypatch.setattr(module, name, lambda: 1)
    for _ in range(2):  # on the kernel's device, which is made the current one
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
    assert len(bound.launched) == 4


def test_a_launch_that_calls_the_library_too_is_run_every_time(bound: Binding) -> None:
    bound._repeats = False
    inputs, scaling = make_inputs(SPEC, 16)
    outputs = make_outputs(SPEC, 16)
    for times in range(1, 4):
        bound.launch(tuple(inputs.values()), tuple(outputs.values()), scaling)
        assert len(bound.launched) == times
    gpu = find_gpu("h200")
    for variant in VARIANTS:
        spec = KernelSpec.create(
            variant.op,
            d_out=256,
            d_in=512,
            rank=64,
            adapter="bf16",
            gpu=gpu.slug,
            **read_by(variant, {"dtype": "bf16", "tokens": 64}),
        )
        source = render(spec, variant.seeds(spec, gpu)[0])
        kernel = Kernel(spec, torch.device("cuda", 0), source=source)
        assert kernel._repeats is not variant.library


def test_other_layouts_get_a_binary_of_their_own(bound: Binding) -> None:
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


class Eager(Kernel):
    """A kernel for a GPU whose ``launch`` is the eager formula on CPU tensors; it counts repetitions."""

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
        monkeypatch.setattr(kernel_module, "current_device", lambda: 0)
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
def test_launches_on_tensors_that_are_not_plain_are_never_repeated_and_are_correct(
    layout: str, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Eager(SPEC, monkeypatch, descriptors=descriptors)
    tokens, changes = LAYOUTS[layout]
    inputs, scaling = make_inputs(SPEC, tokens)
    expected = reference(SPEC, inputs, scaling)["y"]
    for _ in range(2):
        (y,) = make_outputs(SPEC, tokens).values()
        kernel.launch(tuple(inputs.values()), (y,), scaling)
        assert torch.equal(y, expected)
    assert kernel.repeated == 1, "plain tensors are"
    changed = {name: changes[name](tensor) if name in changes else tensor for name, tensor in inputs.items()}
    for _ in range(2):
        (y,) = make_outputs(SPEC, tokens).values()
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
    kernel = Eager(SPEC, monkeypatch, descriptors=True)
    kernel.device = torch.device("cpu")
    inputs, scaling = make_inputs(SPEC, 16)
    expected = reference(SPEC, inputs, scaling)["y"]
    changed = {name: three(tensor) if name in ("base", "h") else tensor for name, tensor in inputs.items()}
    for count in range(1, 4):
        (y,) = make_outputs(SPEC, 16).values()
        kernel.launch(tuple(changed.values()), (three(y),), scaling)
        assert torch.equal(y, expected)
        found = kernel(*changed.values(), scaling=scaling)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, three(expected))
        assert kernel.repeated == 2 * count - 1, "all but the first launch, which binds"
    assert {tensor.ndim for given in kernel.seen for tensor in given} == {1, 2}
    assert kernel._contiguous is not None
    assert [rows for rows, _ in kernel._contiguous._recordings] == [16], (
        "what serves two rows would be another recording"
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not re.search("columns|every_second|all", name)])
def test_a_known_call_is_repeated_on_plain_tensors_only(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Eager(SPEC, monkeypatch, descriptors=True)
    kernel.device = torch.device("cpu")  # where the tensors are; the device that is asked for stays the kernel's
    tokens, changes = LAYOUTS[layout]
    inputs, scaling = make_inputs(SPEC, tokens)
    expected = reference(SPEC, inputs, scaling)["y"]
    changed = {name: changes[name](tensor) if name in changes else tensor for name, tensor in inputs.items()}
    for out in (True, False)[: 1 if "y" in changes else 2]:
        for tensors, change, plain in ((inputs, {}, True), (changed, changes, False)):
            for count in range(3):
                (y,) = make_outputs(SPEC, tokens).values()
                y = change["y"](y) if "y" in change else y.reshape(tensors["base"].shape)
                before = kernel.repeated
                found = kernel(*tensors.values(), scaling=scaling, out=y if out else None)
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found.reshape(expected.shape), expected)
                assert found is y or not out
                assert kernel.repeated - before == (plain and (count > 0 or not out))
