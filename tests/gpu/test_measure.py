"""The measure evaluator times only what is accurate and deterministic, and its times make sense. In a process of its
own, what hangs, crashes, exits or writes out of bounds is rejected with its reason, and the next candidate is measured.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from doratune.cache.entry import Contender
from doratune.codegen.ops import OPS
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import default_config
from doratune.codegen.weight_formats import stored_as
from doratune.runtime.binding import bind
from doratune.runtime.device import find_device, gpu_of
from doratune.tuner.evaluation import ContenderFailed, Evaluator, Rejected, Resources
from doratune.tuner.final import decide
from doratune.tuner.fusion import composition_of
from doratune.tuner.isolation import IsolatedEvaluator, Limits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

USED = [Resources("kernel", registers=32, spills=0, shared_bytes=0, num_warps=4)]


def evaluator_and_source(op: str, tokens: int, **values: str) -> tuple[Evaluator, Source]:
    from doratune.tuner.measure import MeasureEvaluator

    gpu = gpu_of(find_device("cuda"))
    dtype = stored_as("nf4.nested", "bf16") if OPS[op].only_formats else "bf16"
    sizes = {"d_out": 4096, "d_in": 4096, "rank": 64, "tokens": tokens}
    spec = KernelSpec.create(op, **sizes, **{"dtype": dtype, "adapter": "bf16", "gpu": gpu.slug, **values})
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


@pytest.mark.parametrize("weight", ["nf4", "nf4.nested", "hqq4", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_fused_kernel_of_codes_is_timed_beside_what_a_layer_would_run(weight: str, tokens: int) -> None:
    evaluator, source = evaluator_and_source("dora_linear_forward", tokens, weight=weight)
    spec = composition_of(source.spec)
    assert spec is not None
    assert evaluator.evaluate(source, USED).error is not None
    times = evaluator.fusion_times(source, render(spec, default_config(spec, evaluator.gpu)))
    evaluator.close()
    assert times is not None
    assert min(times) > 0.5 * evaluator.gpu.floor_us(4096 * 4096 // 2, 2 * tokens * 4096 * 4096, "bf16")


def forward(block_t: int = 4, num_warps: int = 4) -> Source:
    gpu = gpu_of(find_device("cuda"))
    spec = KernelSpec.create("compose_forward", d_out=4096, tokens=4096, dtype="bf16", gpu=gpu.slug)
    config = Config.create("tile", block_t=block_t, block_n=1024, num_warps=num_warps, num_stages=2)
    return render(spec, config)


BAD = {
    "hangs": (
        "    tl.store(y_ptr",
        "    flag = tl.load(g_ptr)\n"
        "    while flag > -1e30:\n"
        "        flag = tl.load(g_ptr, volatile=True)\n"
        "    tl.store(y_ptr",
        "did not end within 5 s",
    ),
    "out of bounds": (
        "y.to(tl.bfloat16), mask=in_t)",
        "y.to(tl.bfloat16), mask=(t < tokens + 1)[:, None])",
        "writes out of bounds: .* behind the end of y",
    ),
    "into an input": (
        "    tl.store(y_ptr",
        "    tl.store(g_ptr + n, g.reshape(BLOCK_N) * 2.0)\n    tl.store(y_ptr",
        "input g",
    ),
    "one element wrong": (
        "    tl.store(y_ptr",
        "    y = tl.where((row == 300) & (n[None, :] == 3000), y + 1.0, y)\n    tl.store(y_ptr",
        r"inaccurate: y(\[300, 3000\])? is off by",
    ),
    "faults": ("tl.store(y_ptr + row", "tl.store(y_ptr + (1 << 40) + row", "illegal memory access"),
    "exits": ("    tokens = base", "    __import__('os')._exit(3)\n    tokens = base", "exited with code 3"),
    "crashes": (
        "    tokens = base",
        "    __import__('os').kill(__import__('os').getpid(), 11)\n    tokens = base",
        "was ended by SIGSEGV",
    ),
}
"""What a bad candidate says instead of what a good one says, and why it is rejected."""


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedEvaluator]:
    from doratune.tuner.measure import MeasureEvaluator

    gpu = gpu_of(find_device("cuda"))
    evaluator = IsolatedEvaluator(functools.partial(MeasureEvaluator, gpu, "cuda"), gpu, limits=Limits(run=5.0))
    evaluator.start()
    yield evaluator
    evaluator.close()


def broken(source: Source, kind: str) -> Source:
    said, instead, _ = BAD[kind]
    assert said in source.text
    return replace(source, text=source.text.replace(said, instead))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_candidate_is_rejected_with_its_reason_and_the_next_one_measured(
    isolated: IsolatedEvaluator, kind: str
) -> None:
    with pytest.raises(Rejected, match=BAD[kind][2]):
        isolated.evaluate(broken(forward(), kind), USED)
    us = isolated.evaluate(forward(), USED).us
    assert us is not None
    assert us > 0.0


@pytest.mark.parametrize("kind", ["hangs", "faults", "exits"])
def test_a_bad_contender_is_named_and_the_final_played_without_it(isolated: IsolatedEvaluator, kind: str) -> None:
    with pytest.raises(ContenderFailed, match=BAD[kind][2]) as caught:
        isolated.final([forward(), broken(forward(), kind), forward(2)])
    assert caught.value.index == 1
    times = isolated.final([forward(), forward(2)])
    assert times is not None
    assert len(times.samples_us) == 2


def test_a_final_ties_equal_kernels_and_beats_a_slow_one() -> None:
    from doratune.tuner.measure import MeasureEvaluator

    evaluator = MeasureEvaluator(gpu_of(find_device("cuda")))
    same = forward()
    twice = "\n\ndef launch(*operands):\n    once(*operands)\n    once(*operands)\n"
    slow = replace(same, text=same.text.replace("def launch(", "def once(") + twice)
    times = evaluator.final([same, same, slow])
    evaluator.close()
    origins = [("default",), ("search",), ("search",)]
    contenders = [
        Contender(replace_stages(same.config, place), origin, samples)
        for place, (origin, samples) in enumerate(zip(origins, times.samples_us, strict=True))
    ]
    final = decide(contenders, settled=times.settled, notices=times.notices)
    assert final.winner == contenders[0]
    assert abs(contenders[1].us / contenders[0].us - 1.0) < 0.02
    assert final.beaten[-1] == contenders[2]
    assert contenders[2].us > 1.5 * contenders[0].us


def replace_stages(config: Config, stages: int) -> Config:
    """Another config, to tell contenders of the same text apart."""
    return Config.create(**{**config.to_dict(), "num_stages": stages + 1})


def test_a_trial_costs_a_fraction_of_a_tenth_of_a_second() -> None:
    evaluator, source = evaluator_and_source("lora_compose", 4096)
    config = source.config.to_dict()
    sources = [render(source.spec, Config.create(**{**config, "num_warps": count})) for count in (4, 8)]
    for each in sources:
        bind(each)  # compiled as the pool of a search does
        evaluator.evaluate(each, USED)
    seconds = []
    for each in sources * 3:
        since = time.perf_counter()
        evaluator.evaluate(each, USED)
        seconds.append(time.perf_counter() - since)
    evaluator.close()
    assert statistics.median(seconds) < 0.05
