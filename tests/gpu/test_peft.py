"""On a real GPU an accelerated PEFT model runs kernels, and is as near to fp64 as stock PEFT."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict

import pytest
import torch

import doratune

pytest.importorskip("peft")
pytest.importorskip("transformers")

from ..integrations.peft.peft_models import VOCABULARY, error_ratios, llama, relative, twin, with_dora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters, autocast", "bf16 adapters"])
def test_gradients_are_as_good_as_pefts(adapters: torch.dtype, checkpointing: bool) -> None:
    ratios: dict[str, float] = defaultdict(float)
    wide = adapters is torch.float32
    for seed in range(3):
        torch.manual_seed(seed)
        stock = with_dora(llama().to(torch.bfloat16), seed=seed, r=16, autocast_adapter_dtype=wide).cuda()
        exact, fast = twin(stock).double(), twin(stock)
        report = doratune.accelerate(fast, quiet=True)
        assert {layer.runs for layer in report.layers} == {"kernels"}
        ids = torch.randint(0, VOCABULARY, (8, 33), device="cuda")
        reference = exact(ids, labels=ids)
        reference.loss.backward()
        errors = []
        for model in (fast, stock):
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            with torch.autocast("cuda", torch.bfloat16, enabled=wide), warnings.catch_warnings():
                warnings.filterwarnings("error", message="doratune leaves")
                output = model(ids, labels=ids)
                output.loss.backward()
            errors.append(relative(output.logits, reference.logits))
        assert errors[0] <= 1.1 * errors[1]
        for kind, ratio in error_ratios(fast, stock, exact).items():
            ratios[kind] += math.log(ratio) / 3
    assert len(ratios) == 3
    for kind, log in ratios.items():
        assert math.exp(log) <= 1.1, kind
