"""``prepare`` compiles what a model of doratune's own layers launches, before it runs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import doratune
from doratune.codegen.gpu import find_gpu
from doratune.integrations import prepare as prepare_module
from doratune.nn import rehearsal
from doratune.runtime import loader
from doratune.runtime.arguments import ArgumentError
from doratune.runtime.kernel import Request

GPU = torch.device("cuda", 0)


class Batch:
    """In place of the real one: keeps what it is asked for."""

    requests: list[Request]
    refused: dict[str, None] = {}  # noqa: RUF012

    def __init__(self, requests: Any) -> None:
        Batch.requests = [*requests]

    def finish(self) -> None: ...


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers count as being on an H100."""
    monkeypatch.setattr(loader, "gpu_of", lambda device: find_gpu("h100-sxm"))
    monkeypatch.setattr(loader, "find_device", lambda device: GPU)
    monkeypatch.setattr(prepare_module, "Batch", Batch)
    monkeypatch.setattr(prepare_module, "requests_of", functools.partial(rehearsal.requests_of, device=GPU))


def model() -> nn.Module:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    return nn.Sequential(doratune.nn.DoRALinear(24, 40, 8, 16.0, **settings), nn.GELU())


def prepared() -> set[str]:
    return {kernel.spec.op for kernel, _ in Batch.requests}


def test_layers_without_peft_are_prepared_for_training() -> None:
    doratune.prepare(model(), tokens=16)
    assert prepared() == {
        "weight_norm",
        "weight_norm_exact",
        "lora_compose",
        "compose_backward",
        "adapter_backward",
    }


def test_or_for_inference_with_several_numbers_of_tokens() -> None:
    doratune.prepare(model().eval(), tokens=[2048, 1], train=False)
    assert prepared() == {"weight_norm", "weight_norm_exact", "lora_compose"}
    assert {kernel.spec.tokens for kernel, _ in Batch.requests} == {0, 1, 2048}


@pytest.mark.parametrize("tokens", [0, -1, True, 2.0, [16, "32"]])
def test_a_wrong_number_of_tokens_is_an_error(tokens: Any) -> None:
    with pytest.raises(ArgumentError, match="tokens must be positive integers, got"):
        doratune.prepare(model(), tokens=tokens)


def test_anything_but_a_module_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module, got list"):
        doratune.prepare([model()], tokens=16)  # type: ignore[arg-type]


def test_layers_on_a_cpu_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "requests_of", rehearsal.requests_of)
    doratune.prepare(model(), tokens=16)
    assert not Batch.requests
