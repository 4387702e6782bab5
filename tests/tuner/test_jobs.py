"""Property: the plan of a model holds each kernel that DoRA on it runs, once, in an order that never changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.codegen.gpu import UnknownGpuError
from doratune.codegen.ops import OPS
from doratune.codegen.spec import TOKEN_BUCKETS, KernelSpec, bucket_tokens
from doratune.errors import UsageError
from doratune.tuner.jobs import plan_jobs
from doratune.tuner.models import Model, Projection, find_model, list_models

LLAMA = find_model("llama-3.1-8b")
QWEN = find_model("qwen2.5-7b")


def test_llama_8b_at_one_rank_has_175_jobs() -> None:
    jobs = plan_jobs(LLAMA, ranks=[384], gpu="h200")
    assert Counter(job.op for job in jobs) == {
        "weight_norm": 4,
        "weight_norm_exact": 4,
        "weight_norm_group": 4,
        "lora_compose": 30,
        "compose_forward": 30,
        "compose_backward": 30,
        "adapter_backward": 3,
        "compose_swiglu": 3,
        "compose_swiglu_backward": 3,
        "swiglu_forward": 7,
        "swiglu_backward": 7,
        "lora_compose_group": 5,
        "compose_backward_group": 5,
        "dora_linear_forward": 40,
    }
    others = Counter(job.op for job in plan_jobs(LLAMA, ranks=[384], gpu="a100"))
    assert others["lora_compose_group"] == others["compose_backward_group"] == 10
    norms = [(job.d_out, job.d_in) for job in jobs if job.op == "weight_norm"]
    assert norms == [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]


def test_a_grouped_norm_is_planned_for_the_layers_of_its_shape() -> None:
    shapes = [("a", 64, 128, 5), ("b", 64, 128, 4), ("c", 128, 64, 3), ("d", 64, 64, 100)]
    model = Model("m", "", 12, tuple(Projection(name, *sizes, False, count) for name, *sizes, count in shapes))
    jobs = plan_jobs(model, ranks=[8], gpu="h200", ops=["weight_norm_group"])
    assert {(job.d_out, job.d_in): job.layers for job in jobs} == {(64, 128): 16, (128, 64): 4, (64, 64): 32}
    assert {job.magnitude for job in jobs} == {"bf16"}


def test_a_job_prints_as_a_spec_of_its_own_fields_alone() -> None:
    jobs = plan_jobs(LLAMA, ranks=[384], tokens=[4000], gpu="H200", adapter_dtype="fp32")
    assert [str(job) for job in jobs if job.d_out == 4096] == [
        "weight_norm/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=fp32@h200",
        "weight_norm/d_out=4096/d_in=14336/rank=384/weight=bf16/adapter=fp32@h200",
        "weight_norm_exact/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=fp32@h200",
        "weight_norm_exact/d_out=4096/d_in=14336/rank=384/weight=bf16/adapter=fp32@h200",
        "weight_norm_group/d_out=4096/d_in=4096/rank=384/layers=32/weight=bf16/adapter=fp32/magnitude=fp32@h200",
        "weight_norm_group/d_out=4096/d_in=14336/rank=384/layers=32/weight=bf16/adapter=fp32/magnitude=fp32@h200",
        "lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=fp32@h200",
        "compose_forward/d_out=4096/tokens=4096/activation=bf16@h200",
        "compose_backward/d_out=4096/tokens=4096/activation=bf16@h200",
        "adapter_backward/d_out=4096/rank=384/activation=fp32/adapter=fp32/magnitude=fp32@h200",
        "lora_compose_group/d_out=4096/d_out_2=1024/d_out_3=1024/rank=384/tokens=4096/activation=bf16/adapter=fp32@h200",
        "compose_backward_group/d_out=4096/d_out_2=1024/d_out_3=1024/rank=384/tokens=4096/activation=bf16/adapter=fp32/"
        "magnitude=fp32@h200",
        "dora_linear_forward/d_out=4096/d_in=4096/rank=384/tokens=4096/weight=bf16/activation=bf16/adapter=fp32@h200",
        "dora_linear_forward/d_out=4096/d_in=14336/rank=384/tokens=4096/weight=bf16/activation=bf16/adapter=fp32@h200",
    ]


def test_adapters_have_the_models_dtype_unless_told_otherwise() -> None:
    assert {job.adapter for job in plan_jobs(LLAMA, ranks=[8], dtype="fp16", gpu="sm_90")} == {"fp16", ""}


def test_autocast_is_planned_where_there_are_adapters_to_round() -> None:
    jobs = plan_jobs(LLAMA, ranks=[8], tokens=[1], gpu="h200", adapter_dtype="fp32", autocast=True)
    assert {job.op for job in jobs if job.autocast} == {"weight_norm_group"}, (
        "a layer rounds A and B once for the others"
    )
    assert {job.adapter for job in jobs if job.op in ("lora_compose", "weight_norm", "compose_swiglu")} == {"bf16"}
    assert {(job.adapter, job.magnitude) for job in jobs if job.op == "weight_norm_group"} == {("fp32", "fp32")}
    packed = plan_jobs(LLAMA, ranks=[8], tokens=[1], weight="nf4", gpu="h200", adapter_dtype="fp32", autocast=True)
    assert {job.op for job in packed if job.autocast} == {"weight_norm", "weight_norm_group"}
    (backward,) = {job for job in jobs if job.op == "adapter_backward" and job.d_out == 1024}
    assert (backward.activation, backward.adapter) == ("bf16", "fp32")


def test_a_second_rank_adds_only_kernels_that_depend_on_the_rank() -> None:
    one = set(plan_jobs(LLAMA, ranks=[8], gpu="h200"))
    two = set(plan_jobs(LLAMA, ranks=[8, 64], gpu="h200"))
    assert one < two
    assert {(job.op, job.rank) for job in two - one} == {
        ("weight_norm", 64),
        ("weight_norm_exact", 64),
        ("weight_norm_group", 64),
        ("lora_compose", 64),
        ("adapter_backward", 64),
        ("compose_swiglu", 64),
        ("compose_swiglu_backward", 64),
        ("lora_compose_group", 64),
        ("compose_backward_group", 64),
        ("dora_linear_forward", 64),
    }
    assert len(two - one) == 125


def test_biased_and_unbiased_projections_of_one_width_are_two_jobs() -> None:
    jobs = plan_jobs(QWEN, ranks=[16], tokens=[1], gpu="h200")
    for op in ("lora_compose", "compose_forward"):
        # q_proj (3584) has a bias, o_proj and down_proj (3584) have none; k and v (512) have one, gate and up none.
        assert [(job.d_out, job.bias) for job in jobs if job.op == op] == [
            (512, True),
            (3584, False),
            (3584, True),
            (18944, False),
        ]
    assert not any(job.bias for job in jobs if job.op == "weight_norm")


def test_the_backward_is_planned_as_a_layer_runs_it_and_exact_columns_where_they_are_asked_for() -> None:
    jobs = plan_jobs(QWEN, ranks=[16], tokens=[1, 4096], gpu="h200")
    backward = {(job.d_out, job.output, job.bias) for job in jobs if job.op == "compose_backward"}
    assert backward == {(512, False, False), (3584, False, False), (18944, False, False)}
    assert not [job for job in jobs if job.op == "compose_backward_exact"]
    exact = plan_jobs(QWEN, ranks=[16], tokens=[1, 4096], gpu="h200", ops=["compose_backward_exact"])
    assert {job.tokens for job in exact} == {4096}
    assert (3584, 18944) in {(job.d_out, job.d_in) for job in exact}


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_every_listed_model_plans_and_covers_its_projections(model: Model) -> None:
    jobs = set(plan_jobs(model, ranks=[16], adapter_dtype="fp32", gpu="mi300x"))
    for p in model.projections:
        fields = {"d_out": p.d_out, "d_in": p.d_in, "rank": 16, "dtype": "bf16", "adapter": "fp32", "gpu": "mi300x"}
        assert KernelSpec.create("weight_norm", **fields) in jobs
        assert KernelSpec.create("weight_norm_exact", **fields) in jobs
        for tokens in TOKEN_BUCKETS:
            for op in ("lora_compose", "compose_forward", "dora_linear_forward"):
                assert KernelSpec.create(op, tokens=tokens, bias=p.bias, **fields) in jobs
            assert KernelSpec.create("compose_backward", tokens=tokens, **fields) in jobs
        assert KernelSpec.create("adapter_backward", **{**fields, "dtype": "fp32", "magnitude": "fp32"}) in jobs


projections = st.builds(
    Projection,
    name=st.just("p"),
    d_out=st.sampled_from([64, 128, 4096]),
    d_in=st.sampled_from([64, 128]),
    bias=st.booleans(),
    count=st.just(1),
)


@given(
    st.lists(projections, min_size=1, max_size=6),
    st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 40000), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_the_plan_is_sorted_distinct_and_blind_to_the_order_of_its_inputs(
    layers: list[Projection], ranks: list[int], tokens: list[int], random: Any
) -> None:
    jobs = plan_jobs(Model("m", "", 1, tuple(layers)), ranks=ranks, tokens=tokens, gpu="h200")
    assert len(set(jobs)) == len(jobs)
    order = [(list(OPS).index(job.op), job.d_out, job.tokens) for job in jobs]
    assert order == sorted(order)
    found = Counter(job.op for job in jobs)
    shapes = {(p.d_out, p.d_in, p.bias) for p in layers}
    widths, buckets = {(p.d_out, p.bias) for p in layers}, {bucket_tokens(count) for count in tokens}
    assert found["weight_norm"] == found["weight_norm_exact"] == len({(p.d_out, p.d_in) for p in layers}) * len(ranks)
    assert found["weight_norm_group"] == found["weight_norm"]
    assert found["lora_compose"] == len(widths) * len(buckets) * len(ranks)
    assert found["dora_linear_forward"] == len(shapes) * len(buckets) * len(ranks)
    assert found["compose_forward"] == len(widths) * len(buckets)
    assert found["compose_backward"] == len({p.d_out for p in layers}) * len(buckets)
    assert found["adapter_backward"] == len({p.d_out for p in layers}) * len(ranks)
    for values in (layers, ranks, tokens):
        random.shuffle(values)
    assert plan_jobs(Model("m", "", 1, tuple(layers)), ranks=ranks, tokens=tokens, gpu="h200") == jobs


@pytest.mark.parametrize(
    ("model", "width", "flags"),
    [("llama-3.1-8b", 14336, ()), ("gemma-2-9b", 14336, ("gelu_tanh",)), ("phi-3-mini", None, ())],
)
def test_a_gated_mlp_is_planned_with_its_activation(model: str, width: int | None, flags: tuple[str, ...]) -> None:
    """Where gate and up are one projection, or there is no gate, its operations have nothing to do."""
    for adapter in ("bf16", "fp32"):
        jobs = plan_jobs(find_model(model), ranks=[16], tokens=[512], adapter_dtype=adapter, gpu="h200")
        gated = [job for job in jobs if job.op.startswith("compose_swiglu")]
        assert {job.d_out for job in gated} == ({width} if width else set())
        assert len(gated) == (2 if width else 0)
        for job in gated:
            assert tuple(flag for flag in ("gelu", "gelu_tanh") if getattr(job, flag)) == flags
            assert job.magnitude == (adapter if job.op.endswith("backward") else "")


@pytest.mark.parametrize(
    ("model", "widths", "bias"),
    [("llama-3.1-8b", (4096, 1024, 1024), False), ("qwen2.5-0.5b", (896, 128, 128), True), ("phi-3-mini", (), False)],
)
def test_q_k_and_v_are_planned_as_a_group(model: str, widths: tuple[int, ...], bias: bool) -> None:
    jobs = plan_jobs(find_model(model), ranks=[16], tokens=[512], adapter_dtype="fp32", gpu="h200")
    grouped = [job for job in jobs if job.op in ("lora_compose_group", "compose_backward_group")]
    assert [(job.op, job.widths) for job in grouped] == (
        [("lora_compose_group", widths), ("compose_backward_group", widths)] if widths else []
    )
    assert [(job.bias, job.magnitude) for job in grouped] == ([(bias, ""), (False, "fp32")] if widths else [])


def test_only_the_wanted_operations_are_planned() -> None:
    jobs = plan_jobs(LLAMA, ranks=[8], ops=["compose_backward", "weight_norm"], tokens=[1], gpu="h200")
    assert list(dict.fromkeys(job.op for job in jobs)) == ["weight_norm", "compose_backward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": []}, "no rank given: give at least one, such as 384"),
        ({"ranks": [0]}, "rank 0: a rank is an integer of at least 1, such as 384"),
        ({"ranks": [8, -8]}, "rank -8: a rank is an integer of at least 1, such as 384"),
        ({"ranks": [True]}, "rank True: a rank is an integer of at least 1, such as 384"),
        ({"ranks": [8.0]}, "rank 8.0: a rank is an integer of at least 1, such as 384"),
        ({"ranks": ["8"]}, "rank '8': a rank is an integer of at least 1, such as 384"),
        ({"ranks": [float("nan")]}, "rank nan: a rank is an integer of at least 1, such as 384"),
        ({"ranks": [8, 16, 8]}, "rank 8 is given more than once: name each rank once"),
        ({"ranks": 8}, "ranks=8: give a list of ranks, such as [384]"),
        ({"ranks": "384"}, "ranks='384': give a list of ranks, such as [384]"),
        ({"dtype": "bf8"}, "unsupported dtype 'bf8'; did you mean bf16? (use one of bf16, fp16, fp32)"),
        ({"adapter_dtype": "int8"}, "unsupported adapter dtype 'int8' (use one of bf16, fp16, fp32)"),
        ({"adapter_dtype": "fp16"}, "adapter dtype fp16 with bf16 weights: use bf16 or fp32"),
        (
            {"adapter_dtype": "fp16", "ops": ["compose_forward"]},
            "adapter dtype fp16 with bf16 weights: use bf16 or fp32",
        ),
        (
            {"autocast": True},
            "autocast with adapter dtype bf16 and bf16 weights: it rounds fp32 adapters beside 16-bit weights",
        ),
        ({"ops": "lora"}, f"ops='lora': give a list of operations out of {', '.join(OPS)}, or None for all"),
        ({"ops": []}, f"ops=[]: give a list of operations out of {', '.join(OPS)}, or None for all"),
        (
            {"ops": ["weight_nrm"]},
            "unknown operation 'weight_nrm'; did you mean weight_norm, weight_norm_group, weight_norm_exact? "
            f"(known: {', '.join(OPS)})",
        ),
        ({"tokens": []}, "no token count given: give at least one, or None for every bucket"),
        ({"tokens": "16"}, "tokens='16': give a list of token counts, such as [1, 4096]"),
        ({"tokens": 16}, "tokens=16: give a list of token counts, such as [1, 4096]"),
        ({"tokens": [0]}, "tokens=0: the number of tokens must be an integer of at least 1"),
    ],
)
def test_a_wrong_request_is_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_jobs(LLAMA, **{"ranks": [384], "gpu": "h200", **changes})
    assert str(caught.value) == message


def test_a_model_without_a_layer_for_an_adapter_is_refused() -> None:
    with pytest.raises(UsageError, match="resnet has no linear layer that PEFT can put a DoRA adapter on"):
        plan_jobs(Model("resnet", "", None, ()), ranks=[8], gpu="h200")


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UnknownGpuError, match="unknown GPU 'h2000'; did you mean h200"):
        plan_jobs(LLAMA, ranks=[8], gpu="h2000")


def test_a_quantised_model_runs_what_reads_its_weights_packed_or_not_at_all() -> None:
    model = find_model("llama-8b")
    specs = plan_jobs(model, ranks=[16], weight="nf4.nested", adapter_dtype="fp32", autocast=True, gpu="h200")
    readers = {"weight_norm", "weight_norm_group", "dora_linear_forward", "weight_dequantise"}
    assert {spec.op for spec in specs if spec.weight} == readers
    assert {spec.tokens for spec in specs if spec.op == "dora_linear_forward"} == {1, 16}
    assert {(spec.activation, spec.adapter) for spec in specs if spec.op == "dora_linear_forward"} == {("bf16", "bf16")}
    assert {spec.weight for spec in specs if spec.weight} == {"nf4.nested"}
    assert {spec.op for spec in specs} >= {"lora_compose", "compose_backward", "adapter_backward"}
    rounded = plan_jobs(model, ranks=[16], weight="int8", adapter_dtype="fp32", autocast=True, gpu="h200")
    assert {spec.op for spec in rounded} == {spec.op for spec in specs} - {"dora_linear_forward"}
    with pytest.raises(UsageError, match="compose_backward_exact reads plain weights only"):
        plan_jobs(model, ranks=[16], weight="nf4", gpu="h200", ops=["compose_backward_exact"])
    with pytest.raises(UsageError, match="weight_dequantise reads packed weights only: name their format"):
        plan_jobs(model, ranks=[16], gpu="h200", ops=["weight_dequantise"])
    with pytest.raises(UsageError, match="unknown weight format 'nf5'"):
        plan_jobs(model, ranks=[16], weight="nf5", gpu="h200")
