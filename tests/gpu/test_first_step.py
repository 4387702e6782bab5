"""On a real GPU, the first step finds every kernel compiled and loaded, in training, in inference and when decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import doratune
from doratune.nn import kernels, norm_pass
from doratune.runtime import loader
from doratune.runtime.kernel import Kernel

pytest.importorskip("peft")
pytest.importorskip("transformers")

from ..integrations.peft.peft_models import VOCABULARY, llama, with_dora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


def forget() -> None:
    """No kernel is loaded."""
    loader._loaded.clear()
    loader._asked.clear()
    for known in (kernels.kernel_for, kernels.paying_kernel_for, norm_pass._kernel):
        known.cache_clear()


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's cache is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DORATUNE_COMPILE_PROCESSES", raising=False)
    forget()
    yield
    forget()


class Compiles:
    """The kernels that this process compiles, those that it loads, and those of them that a launch had to load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton

        self.compiled: list[str] = []
        self.loaded: list[str] = []
        self.late: list[str] = []
        self._launching = False
        bind, launch = Kernel.bind, Kernel.launch

        def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
            if not cache_hit:
                self.compiled.append(src.name)

        def loads(kernel: Kernel, alignments: tuple[int, ...]) -> Callable[..., None]:
            (self.late if self._launching else self.loaded).append(f"{kernel.spec} {alignments}")
            return bind(kernel, alignments)

        def launches(*arguments: Any) -> None:
            self._launching = True
            try:
                launch(*arguments)
            finally:
                self._launching = False

        monkeypatch.setattr(triton.knobs.compilation, "listener", note)
        monkeypatch.setattr(Kernel, "bind", loads)
        monkeypatch.setattr(Kernel, "launch", launches)


def model_of(adapters: torch.dtype) -> nn.Module:
    wide = adapters is torch.float32
    return with_dora(llama().to(torch.bfloat16), r=16, autocast_adapter_dtype=wide).cuda()


def train(model: nn.Module, rounds: bool) -> None:
    ids = torch.randint(0, VOCABULARY, (8, 32), device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=rounds):
        model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters, autocast", "bf16 adapters"])
def test_steps_load_nothing_that_was_not_prepared(
    adapters: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(adapters).train()
    rounds = adapters is torch.float32
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    doratune.accelerate(model, quiet=True)
    seen = Compiles(monkeypatch)
    with torch.autocast("cuda", torch.bfloat16, enabled=rounds):
        doratune.prepare(model, tokens=256)
    assert seen.loaded
    for _ in range(4):  # groups of layers form after the first
        train(model, rounds)
    assert seen.late == []
    assert seen.compiled == [], "other processes compile"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_first_forward_pass_prepares_itself_and_so_does_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(torch.bfloat16).eval()
    doratune.accelerate(model, quiet=True)
    seen = Compiles(monkeypatch)
    ids = torch.randint(0, VOCABULARY, (1, 64), device="cuda")
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert seen.loaded
    assert seen.late == [], [each for each in seen.loaded if "tokens=1/" in each]
    assert len(seen.compiled) <= 1, "one alone, the groups' kernel, is compiled where it is loaded"


def test_without_processes_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(torch.bfloat16).eval()
    ids = torch.randint(0, VOCABULARY, (2, 40), device="cuda")
    doratune.accelerate(model, quiet=True)
    with torch.no_grad():
        ahead = model(ids).logits
        forget()
        monkeypatch.setenv("DORATUNE_COMPILE_PROCESSES", "0")
        doratune.accelerate(model, quiet=True)
        assert torch.equal(model(ids).logits, ahead)
