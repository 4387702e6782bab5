"""The case of all norms of a model holds every layer of it, and a wrong request is refused. tests/gpu times it."""

from __future__ import annotations

import pytest
import torch

from doratune.benchmarks.norms import MODES, NormCase, bench_norms, rounded
from doratune.errors import UsageError
from doratune.tuner.models import Model, Projection, find_model

SMALL = Model(
    "small",
    "",
    3,
    (Projection("q", 48, 32, False, 3), Projection("o", 48, 32, True, 3), Projection("d", 16, 48, False, 3)),
)


def test_a_case_has_every_layer_of_a_model() -> None:
    llama = NormCase.of(find_model("llama-8b"), 16, "bf16")
    assert dict(llama.shapes) == {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
    assert 2 * llama.weight_elements == pytest.approx(13.96e9, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_layers_of_a_case_have_its_shapes_and_dtypes(mode: str) -> None:
    layers = NormCase.of(SMALL, 4, mode, 4).make(torch.device("cpu"))
    assert [tuple(layer.weight.shape) for layer in layers] == [(16, 48)] * 3 + [(48, 32)] * 4
    for layer in layers:
        assert layer.lora_A.dtype == layer.magnitude.dtype == (torch.bfloat16 if mode == "bf16" else torch.float32)
        assert {t.dtype for t in rounded(layer, mode == "autocast")} == {torch.bfloat16}


def test_without_a_gpu_it_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="needs a GPU"):
        bench_norms(SMALL, [4])
