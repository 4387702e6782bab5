"""What fails while a candidate is measured is held against it only where the GPU itself says so; what is kept between
candidates changes no result; a final names the contender that fails. Needs no GPU.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from doratune.codegen.compile import BrokenToolchainError, CompileError, ToolchainError
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import default_config
from doratune.errors import DoratuneError
from doratune.tuner import gate, measure
from doratune.tuner.evaluation import (
    ContenderFailed,
    ContextLostError,
    GpuLostError,
    GpuMemoryError,
    LaunchFailureError,
    Rejected,
)
from doratune.tuner.final import CHECK_ROUNDS
from doratune.tuner.machine import Machine
from doratune.tuner.measure import MeasureEvaluator
from doratune.tuner.timing import MIN_REPLAYS, SHORT_GRAPH_CALLS, Turns
from doratune.tuner.tune_model import Request, choose_evaluators

from .fake_cuda import FakeCuda
from .fakes import COMPILED

GPU = find_gpu("h200")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Evaluate a small kernel on a made-up GPU: its tensors lie in the host's memory, its launch or its inputs fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 24, 1 << 24))
    monkeypatch.setattr(measure, "find_device", lambda device: torch.device("cpu"))
    spec = KernelSpec.create("compose_forward", d_out=64, tokens=16, dtype="fp32", gpu=GPU.slug)
    source = render(spec, default_config(spec, GPU))

    def run(error: Exception, *, answers: bool = True, inputs: bool = False) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        def synchronize() -> None:
            if not answers:
                raise RuntimeError("CUDA error: the context is gone")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        if inputs:
            monkeypatch.setattr(gate, "make_inputs", fail)
        monkeypatch.setattr(measure, "bind", lambda source: SimpleNamespace(launch=fail))
        MeasureEvaluator(GPU).evaluate(source, ())

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory"),
        (RuntimeError("CUDA error: too many resources requested for launch\n..."), "too many resources"),
        (RuntimeError("CUDA error: invalid configuration argument"), "invalid configuration"),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), "invalid argument"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_launch_that_asks_for_more_than_the_gpu_has_is_rejected(
    evaluate: Callable[..., None], error: Exception, said: str
) -> None:
    with pytest.raises(Rejected, match=said):
        evaluate(error)


def test_a_text_that_the_compiler_refuses_here_is_refused(evaluate: Callable[..., None]) -> None:
    with pytest.raises(CompileError, match="run failed"):
        evaluate(RuntimeError("PassManager::run failed"))


@pytest.mark.parametrize(
    "text", ["an illegal memory access was encountered", "misaligned address", "an illegal instruction was encountered"]
)
def test_a_kernel_whose_own_code_faults_is_out_and_took_the_context(evaluate: Callable[..., None], text: str) -> None:
    with pytest.raises(ContextLostError, match=text):
        evaluate(RuntimeError(f"CUDA error: {text}"), answers=False)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: device lost",
        "CUDA error: unknown error",
        "CUDA error: no CUDA-capable device is detected",
        "Triton Error [CUDA]: driver shutting down",
    ],
)
def test_a_lost_gpu_is_no_verdict(evaluate: Callable[..., None], text: str) -> None:
    with pytest.raises(GpuLostError, match="nvidia-smi") as caught:
        evaluate(RuntimeError(text), answers=False)
    assert text in str(caught.value)
    assert not isinstance(caught.value, Rejected | LaunchFailureError)


def test_an_unspecified_launch_failure_leaves_open_who_is_to_blame(evaluate: Callable[..., None]) -> None:
    with pytest.raises(LaunchFailureError):
        evaluate(RuntimeError("CUDA error: unspecified launch failure"), answers=False)


@pytest.mark.parametrize("text", ["unspecified launch failure", "an illegal memory access was encountered"])
def test_what_fails_before_the_candidate_runs_is_never_its_fault(evaluate: Callable[..., None], text: str) -> None:
    with pytest.raises(GpuLostError) as caught:
        evaluate(RuntimeError(f"CUDA error: {text}"), answers=False, inputs=True)
    assert type(caught.value) is GpuLostError


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["PyTorch", "Triton"],
)
def test_a_full_gpu_is_no_verdict(evaluate: Callable[..., None], error: Exception, inputs: bool) -> None:
    with pytest.raises(GpuMemoryError, match="--tokens"):
        evaluate(error, inputs=inputs)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), BrokenToolchainError),
        (OSError(errno.ENOSPC, "No space left on device"), BrokenToolchainError),
        (RuntimeError("Failed to find C compiler."), BrokenToolchainError),
        (ImportError("libcuda.so.1: cannot open shared object file"), BrokenToolchainError),
        (RuntimeError("an error nobody knows"), ToolchainError),
        (ValueError("an error nobody knows"), ToolchainError),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_any_other_failure_is_no_verdict(
    evaluate: Callable[..., None], error: Exception, kind: type[DoratuneError]
) -> None:
    with pytest.raises(ToolchainError) as caught:
        evaluate(error)
    assert type(caught.value) is kind


def test_a_gpu_that_does_not_answer_at_the_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: object) -> None:
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("doratune.tuner.tune_model.find_device", fail)
    with pytest.raises(GpuLostError, match=r"does not answer PyTorch: CUDA unknown error.*nvidia-smi"):
        choose_evaluators(Request(model="llama-8b"))
    assert choose_evaluators(Request(model="llama-8b", gpu="h200", evaluator="predict"))[0] == GPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(measure, "environment_of", lambda gpu, device: pytest.fail("not needed"))
    return FakeCuda(monkeypatch)


def spec_of(tokens: int, d_out: int = 64) -> KernelSpec:
    return KernelSpec.create("compose_forward", d_out=d_out, tokens=tokens, dtype="fp32", gpu=GPU.slug)


SMALL = replace(GPU, l2_bytes=1 << 16)
"""So that a few small tensors rotate."""


def source_of(cuda: FakeCuda, us: float, spec: KernelSpec | None = None, warps: int = 1) -> Source:
    config = Config.create("tile", block_t=2, block_n=32, num_warps=warps, num_stages=2)
    cuda.us[config] = us
    return render(spec or spec_of(16), config)


@pytest.mark.parametrize("tokens", [1, 16, 128, 1024])
def test_a_good_candidate_gets_the_time_it_takes(cuda: FakeCuda, tokens: int) -> None:
    evaluation = MeasureEvaluator(SMALL).evaluate(source_of(cuda, 12.5, spec_of(tokens)), COMPILED)
    assert evaluation.us == pytest.approx(12.5)
    assert len(evaluation.samples_us) >= MIN_REPLAYS
    assert evaluation.error is not None
    assert 0.0 <= evaluation.error < 1e-6
    assert evaluation.registers == COMPILED[0].registers


def test_code_of_a_candidate_runs_only_after_the_evaluator_said_so(cuda: FakeCuda) -> None:
    evaluator, said = MeasureEvaluator(SMALL), []
    evaluator.running = lambda index: said.append((index, len(cuda.launched)))
    evaluator.evaluate(source_of(cuda, 10.0), COMPILED)
    assert said == [(0, 0)]
    said.clear()
    cuda.launched.clear()
    sources = [source_of(cuda, 10.0, warps=warps) for warps in (1, 2)]
    evaluator.final(sources)
    assert [index for index, _ in said] == [0, 1, None]
    assert said[0][1] == 0
    assert sources[1].config not in cuda.launched[: said[1][1]]


def test_a_candidate_far_behind_is_not_timed_further(cuda: FakeCuda) -> None:
    evaluator = MeasureEvaluator(SMALL)
    evaluator.evaluate(source_of(cuda, 10.0), COMPILED)
    cuda.launched.clear()
    slow = evaluator.evaluate(source_of(cuda, 35.0, warps=2), COMPILED)
    assert slow.us == pytest.approx(35.0)
    assert len(slow.samples_us) == 1
    cuda.launched.clear()
    endless = evaluator.evaluate(source_of(cuda, 1e6, warps=4), COMPILED)
    assert endless.us == pytest.approx(1e6)
    assert len(cuda.launched) == 3, "twice in the gate and once to see that it is slow"


def test_a_wrong_row_at_the_full_size_is_noticed(cuda: FakeCuda) -> None:
    source = source_of(cuda, 10.0, spec_of(1024))

    def spoil(by_name: object) -> None:
        y = by_name["y"]  # type: ignore[index]
        if len(y) == 1024:
            y[-1, 5] += 1e-3

    cuda.spoil[source.config] = spoil
    with pytest.raises(Rejected, match="inaccurate at 1024 tokens: y"):
        MeasureEvaluator(SMALL).evaluate(source, COMPILED)


def test_what_a_kernel_needs_is_made_once_though_kernels_take_turns(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, str]] = []
    make = gate.make_inputs

    def counted(spec: KernelSpec, tokens: int, *, case: str, **options: object) -> object:
        made.append((tokens, case))
        return make(spec, tokens, case=case, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "make_inputs", counted)
    monkeypatch.setattr(measure, "make_inputs", counted)
    evaluator = MeasureEvaluator(SMALL)
    specs = [spec_of(512), spec_of(1024), spec_of(512, d_out=32)]
    for warps in (1, 2, 4):
        for spec in specs:
            evaluator.evaluate(source_of(cuda, 10.0, spec, warps), COMPILED)
    assert [case for _, case in made].count("mixed") == 2, "512 and 1024 tokens have one gate"
    first = len(made)
    evaluator.finish(specs[0])
    evaluator.evaluate(source_of(cuda, 10.0, specs[1]), COMPILED)
    assert len(made) == first, "the others are kept"
    evaluator.evaluate(source_of(cuda, 10.0, specs[0]), COMPILED)
    assert {case for _, case in made[first:]} == {"random"}


@pytest.mark.parametrize("total_bytes", [1 << 10, 1 << 24])
def test_little_memory_keeps_what_one_kernel_needs(monkeypatch: pytest.MonkeyPatch, total_bytes: int) -> None:
    cuda = FakeCuda(monkeypatch, total_bytes=total_bytes)
    evaluator = MeasureEvaluator(SMALL)
    made: list[KernelSpec] = []
    make = gate.Gate.__init__
    monkeypatch.setattr(
        gate.Gate, "__init__", lambda self, spec, device: (made.append(spec), make(self, spec, device))[1]
    )
    specs = [spec_of(16, d_out=32 * count) for count in range(1, 5)]
    for spec in specs:
        for warps in (1, 2):
            evaluator.evaluate(source_of(cuda, 10.0, spec, warps), COMPILED)
    assert made == specs


def test_buckets_of_a_shape_share_their_loaded_candidates(cuda: FakeCuda) -> None:
    evaluator = MeasureEvaluator(SMALL)
    sources = [source_of(cuda, 10.0, spec_of(tokens)) for tokens in (128, 512, 1024)]
    for source in sources:
        evaluator.evaluate(source, COMPILED)
    evaluator.final(sources[:1])
    assert len(cuda.bound) == len({source.code_digest for source in sources}) == 1


def test_a_final_times_its_sources_in_turn(cuda: FakeCuda) -> None:
    evaluator = MeasureEvaluator(SMALL, machine=Machine(ask=lambda arguments: None))
    sources = [source_of(cuda, us, warps=warps) for us, warps in ((12.0, 1), (10.0, 2), (11.0, 4))]
    times = evaluator.final(sources)
    assert [sum(samples) / len(samples) for samples in times.samples_us] == pytest.approx([12.0, 10.0, 11.0])
    assert {len(samples) for samples in times.samples_us} == {CHECK_ROUNDS}
    assert times.settled
    assert times.notices == ()


def test_a_final_tells_that_clocks_moved(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    asked: list[object] = []
    evaluator = MeasureEvaluator(
        SMALL, machine=Machine("GPU-1", lambda arguments: asked.append(arguments)), sleep=slept.append
    )
    sources = [source_of(cuda, us, warps=warps) for us, warps in ((12.0, 1), (10.0, 2))]
    rounds: list[int] = []
    play = measure.Turns.play

    def playing(turns: Turns, count: int) -> list[list[float]]:
        rounds.append(len(cuda.launched))
        return play(turns, count)

    monkeypatch.setattr(measure.Turns, "play", playing)
    half = CHECK_ROUNDS // 2 * 2 * SHORT_GRAPH_CALLS  # the first two calls warm up
    cuda.noise = lambda launch: 1.25 if len(rounds) == 3 and launch > rounds[2] + half else 1.0
    times = evaluator.final(sources)
    assert times.notices
    assert "clocks moved" in times.notices[0]
    assert asked
    assert slept == [], "the order was settled all the same"
    assert times.settled


def test_a_final_names_the_contender_that_fails(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = MeasureEvaluator(SMALL)
    sources = [source_of(cuda, 10.0, warps=warps) for warps in (1, 2, 4)]

    def fail(by_name: object) -> None:
        raise RuntimeError("CUDA error: too many resources requested for launch")

    cuda.spoil[sources[1].config] = fail
    with pytest.raises(ContenderFailed, match="too many resources") as caught:
        evaluator.final(sources)
    assert caught.value.index == 1
    assert isinstance(caught.value.cause, Rejected)
    assert evaluator.final([sources[0], sources[2]]).settled


def test_the_contenders_of_a_final_are_of_one_spec(cuda: FakeCuda) -> None:
    with pytest.raises(ValueError, match="one spec"):
        MeasureEvaluator(SMALL).final([source_of(cuda, 10.0), source_of(cuda, 10.0, spec_of(1024))])
