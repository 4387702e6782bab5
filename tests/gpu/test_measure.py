"""The measure evaluator times only what is accurate and deterministic, and its times make sense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doratune.codegen.ops import OPS
from doratune.codegen.render import Source, render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config
from doratune.runtime.device import find_device, gpu_of
from doratune.tuner.evaluation import Evaluator, Rejected, Resources
from doratune.tuner.fusion import composition_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

USED = [Resources("kernel", registers=32, spills=0, shared_bytes=0, num_warps=4)]


def evaluator_and_source(op: str, tokens: int) -> tuple[Evaluator, Source]:
    from doratune.tuner.measure import MeasureEvaluator

    gpu = gpu_of(find_device("cuda"))
    spec = KernelSpec.create(
        op, d_out=4096, d_in=4096, rank=64, tokens=tokens, dtype="bf16", adapter="bf16", gpu=gpu.slug
    )
    return MeasureEvaluator(gpu), render(spec, default_config(spec, gpu))


@pytest.mark.parametrize("op", [op for op in OPS if op != "compose_backward_exact"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_good_kernel_gets_a_time_above_its_floor(op: str, tokens: int) -> None:
    evaluator, source = evaluator_and_source(op, tokens)
    evaluation = evaluator.evaluate(source, USED)
    evaluator.close()
    assert evaluation.provenance == "measured"
    assert evaluation.us is not None
    assert evaluation.floor_us is not None
    assert evaluation.error is not None
    assert evaluation.us > 0.8 * evaluation.floor_us
    assert 0 <= evaluation.error < 0.01
    assert len(evaluation.samples_us) >= 5
    environment = evaluator.environment()
    assert environment.gpu_name == torch.cuda.get_device_name()
    assert environment.driver


def test_a_wrong_kernel_never_gets_a_time() -> None:
    evaluator, source = evaluator_and_source("lora_compose", 4096)
    broken = replace(source, text=source.text.replace("g * inner", "(g * 1.01) * inner"))
    assert broken.text != source.text
    with pytest.raises(Rejected, match="inaccurate"):
        evaluator.evaluate(broken, USED)
    evaluator.close()


def test_a_kernel_that_leaves_rows_unwritten_is_noticed() -> None:
    evaluator, source = evaluator_and_source("compose_forward", 4096)
    broken = replace(source, text=source.text.replace("mask=in_t)", "mask=in_t & (row < 256))"))
    assert broken.text != source.text
    with pytest.raises(Rejected, match="inaccurate"):
        evaluator.evaluate(broken, USED)
    evaluator.close()


@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_fused_kernel_and_its_work_one_after_another_are_timed_in_turn(tokens: int) -> None:
    evaluator, source = evaluator_and_source("dora_linear_forward", tokens)
    spec = composition_of(source.spec)
    assert spec is not None
    times = evaluator.fusion_times(source, render(spec, default_config(spec, evaluator.gpu)))
    alone = evaluator.evaluate(source, USED).us
    evaluator.close()
    assert times is not None
    assert alone is not None
    assert 0.7 * alone < times[0] < 1.4 * alone
    assert times[1] > 0.5 * evaluator.gpu.floor_us(2 * 4096 * 4096, 2 * tokens * 4096 * 4096, "bf16")
