"""Under ``DORATUNE_NO_JIT`` a process starts stored binaries, whatever layout its tensors have, and compiles nothing: a
missing or unusable binary is an error that names the spec."""

from __future__ import annotations

import pytest
import torch

import doratune
from doratune.cache.entry import Binary
from doratune.cache.store import Store
from doratune.codegen.compile import contiguous_alignments
from doratune.codegen.spec import KernelSpec
from doratune.integrations import prepare as prepare_module
from doratune.runtime import ahead
from doratune.runtime.ahead import Batch
from doratune.runtime.binding import bind
from doratune.runtime.kernel import Kernel
from doratune.runtime.loader import resolve_binaries
from doratune.runtime.no_jit import NO_JIT, NotCompiledError, no_jit
from doratune.tuner.inputs import make_inputs, make_outputs

from . import test_binaries, test_kernel
from .test_binaries import SPEC, FakeGpu, source_of
from .test_kernel import Binding

_own_stores, _no_compiler = test_binaries._own_stores, test_binaries._no_compiler
pool, compiled, store, gpu = test_binaries.pool, test_binaries.compiled, test_binaries.store, test_binaries.gpu
bound = test_kernel.bound


@pytest.fixture(autouse=True)
def _no_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_JIT, "1")
    monkeypatch.setattr("doratune.internals.triton._own_driver", lambda forbidden: None)  # the fake GPU has no libcuda


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False), ("", False), (" ", False)])
def test_the_variable_is_off_where_it_is_empty_or_zero(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_JIT, value)
    assert no_jit() is on


def test_a_stored_binary_is_started(store: Store, gpu: FakeGpu, compiled: tuple[Binary, ...]) -> None:
    _, source, binaries = resolve_binaries(SPEC, store.location)
    bind(source, None, binaries.kernels)
    assert [name for name, _, _ in gpu.loaded] == [binary.kernel for binary in compiled]


def test_a_missing_binary_is_an_error_that_names_the_spec_and_the_remedy(gpu: FakeGpu) -> None:
    with pytest.raises(NotCompiledError) as raised:
        bind(source_of(SPEC), None, {}, None, "no store has a binary for Triton 9.9 on sm_90")
    for part in (str(SPEC), NO_JIT, "no store has a binary for Triton 9.9 on sm_90", "doratune cache build"):
        assert part in str(raised.value)
    assert not gpu.loaded


def test_a_binary_that_the_driver_refuses_is_not_replaced_by_a_compile(store: Store, gpu: FakeGpu) -> None:
    _, source, binaries = resolve_binaries(SPEC, store.location)
    gpu.refuses = RuntimeError("no kernel image is available")
    with pytest.raises(NotCompiledError, match="no kernel image is available"):
        bind(source, None, binaries.kernels)


def test_neither_is_one_that_triton_is_told_to_ignore(
    store: Store, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, binaries = resolve_binaries(SPEC, store.location)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    with pytest.raises(NotCompiledError, match="TRITON_ALWAYS_COMPILE is set"):
        bind(source, None, binaries.kernels)


def test_operands_of_every_layout_reach_the_binary_for_contiguous_ones(bound: Binding) -> None:
    spec = bound.spec
    inputs, scaling = make_inputs(spec, 16)
    (y,) = make_outputs(spec, 16).values()
    assumed = tuple(contiguous_alignments(spec).values())
    base = inputs["base"]
    odd = torch.empty(16 * 48 + 1)[1:].view(16, 48).copy_(base)
    apart = torch.empty(16, 64)[:, :48].copy_(base)
    for given, copied in ((base, False), (odd, True), (apart, False), (torch.empty(16, 49)[:, :48].copy_(base), True)):
        bound.launch((given, *list(inputs.values())[1:]), (y,), scaling)
        started = bound.launched[-1][0]
        assert torch.equal(started, base)
        assert (started.data_ptr() != given.data_ptr()) is copied
    assert bound.bound == [assumed], "one binary serves them all"


def test_an_output_that_the_binary_cannot_write_is_copied_back(bound: Binding, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, scaling = make_inputs(bound.spec, 16)
    odd = torch.zeros(16 * 48 + 1)[1:].view(16, 48)
    launch = bound.bind(tuple(contiguous_alignments(bound.spec).values()))
    monkeypatch.setitem(bound._launchers, bound.bound[0], lambda *args: (launch(*args), args[-2].fill_(3.0)))
    bound.launch(tuple(inputs.values()), (odd,), scaling)
    assert torch.equal(odd, torch.full_like(odd, 3.0))


def test_operands_that_a_table_points_into_are_never_copied() -> None:
    spec = KernelSpec.create(
        "weight_norm_group", d_out=48, d_in=24, rank=8, layers=2, dtype="bf16", adapter="bf16", gpu="h200"
    )
    tensors = [torch.empty(24 * 48 + 1)[1:].view(48, 24)]
    kernel = Kernel(spec, torch.device("cuda", 0))
    assert kernel._for_binaries(tensors, (4,)) == (tensors, (4,))


def test_nothing_is_compiled_ahead_and_what_is_missing_is_listed(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def __init__(self, _: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def no_server(*_: object) -> None:
        raise AssertionError("a compile server was started")

    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(ahead, "_Server", no_server)
    kernel = Kernel(SPEC, torch.device("cuda", 0), source=source_of(SPEC))
    batch = Batch([(kernel, (16, 16, 16))] * 2)
    assert batch.finish() == (0, 0)
    assert [*batch.refused] == [str(SPEC)]
    monkeypatch.setattr(prepare_module, "_requests", lambda *_: [(kernel, (16, 16, 16))])
    with pytest.raises(NotCompiledError, match="compose_backward/d_out=512"):
        doratune.prepare(torch.nn.Identity(), 16)
