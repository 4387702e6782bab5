"""What fails while a candidate is measured is held against it only where the GPU itself says so; needs no GPU."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from doratune.codegen.compile import BrokenToolchainError, CompileError, ToolchainError
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config
from doratune.errors import DoratuneError
from doratune.tuner import gate, measure
from doratune.tuner.evaluation import ContextLostError, GpuLostError, GpuMemoryError, LaunchFailureError, Rejected
from doratune.tuner.measure import MeasureEvaluator
from doratune.tuner.tune_model import Request, choose_evaluator

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
        choose_evaluator(Request(model="llama-8b"))
    assert choose_evaluator(Request(model="llama-8b", gpu="h200", evaluator="predict"))[0] == GPU
