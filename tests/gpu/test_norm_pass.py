"""On a GPU a norm pass gives the norms of the fp64 definition, from weights wherever they lie, and its slices are never
those of other weights: on another stream, in a captured graph, at addresses that no kernel takes."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch

import doratune
from doratune.codegen.weight_formats import parse_format
from doratune.nn import norm_cache, norm_pass, traced_tables
from doratune.nn.norm_cache import NormCache
from doratune.nn.norm_layer import NormLayer, StoredLayer
from doratune.nn.norm_pass import NormPass
from doratune.nn.stored_norm import StoredMatrix, how_of
from doratune.nn.stored_operator import stored_norms_and_gains
from doratune.runtime.dequantise import dequantise
from doratune.tuner.quantise import quantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

SHAPES = [(896, 896), (128, 4864), (1000, 520)]
NORM_ERROR = 1e-5


def layer(
    d_out: int, d_in: int, rank: int, adapter: torch.dtype = torch.bfloat16, dtype: torch.dtype = torch.bfloat16
) -> NormLayer:
    """A layer whose adapter takes away half of some rows, nearly all of another, and dwarfs W in some."""
    weight = torch.randn(d_out, d_in, device="cuda") * 0.02
    lora_a = torch.randn(rank, d_in, device="cuda") * d_in**-0.5
    lora_b = torch.randn(d_out, rank, device="cuda") * 0.02
    lora_b[::7] *= 100.0
    weight[1::7] = -1.4 * (lora_b[1::7] @ lora_a)
    weight[2] = -2.001 * (lora_b[2] @ lora_a)
    weight[3], lora_b[3] = 0.0, 0.0
    magnitude = weight.norm(dim=1) * 1.1
    tensors = (weight.to(dtype), lora_a.to(adapter), lora_b.to(adapter), magnitude.to(adapter))
    return NormLayer(*tensors, 0.5, NormCache())


def exact(of: NormLayer, rounded: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (t.to(rounded or t.dtype).double() for t in (of.lora_A, of.lora_B))
    norm = (of.weight.double() + of.scaling * b @ a).norm(dim=1)
    return norm, of.magnitude.double() / norm.clamp_min(1e-12)


def assert_exact(of: NormLayer, rounded: torch.dtype | None = None) -> None:
    a, b = (t.to(rounded or t.dtype) for t in (of.lora_A, of.lora_B))
    values = of.norms.gain_of_weight(*of.tensors, of.scaling, rounded=(a, b))
    for value, wanted in zip(values, exact(of, rounded), strict=True):
        assert value.isfinite().all()
        error = (value.double() - wanted).abs() / wanted.abs().clamp_min(1e-30)
        assert float(torch.where(value == wanted, 0.0, error).max()) <= NORM_ERROR


@pytest.fixture
def none_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_cache, "norm_and_gain_of", lambda *_: pytest.fail("a layer computed its norm alone"))


@pytest.mark.usefixtures("none_alone")
@pytest.mark.parametrize("rank", [1, 16, 64, 100, 384])
@pytest.mark.parametrize(
    ("adapter", "rounded"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
    ids=["bf16", "fp32", "autocast"],
)
def test_all_layers_of_a_model_are_exact(rank: int, adapter: torch.dtype, rounded: torch.dtype | None) -> None:
    layers = [layer(*shape, rank, adapter) for _ in range(3) for shape in SHAPES]
    norms = NormPass(layers)
    for _ in range(3):  # as emitted, recorded, repeated
        with torch.autocast("cuda", torch.bfloat16, enabled=rounded is not None):
            by = norms.open()
        assert by is not None
        for each in layers:
            assert_exact(each, rounded)
        by.close()
        for each in layers:
            each.lora_B.mul_(1.25)


@pytest.mark.usefixtures("none_alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_exact(dtype: torch.dtype) -> None:
    layers = [layer(*shape, 16, dtype, dtype) for shape in SHAPES for _ in range(2)]
    by = NormPass(layers).open()
    assert by is not None
    for each in layers:
        assert_exact(each)
    by.close()


def test_weights_that_no_table_reaches_are_computed_alone() -> None:
    layers = [layer(256, 512, 16) for _ in range(3)]
    memory = torch.empty(256 * 512 + 8, dtype=torch.bfloat16, device="cuda")
    odd = memory[8:].view(256, 512).copy_(layers[1].weight)
    layers[1] = layers[1]._replace(weight=odd)
    by = NormPass(layers).open()
    assert by is not None
    for each in layers:
        assert_exact(each)
    by.close()


def test_a_slice_is_not_handed_out_on_another_stream() -> None:
    one = layer(256, 512, 16)
    by = NormPass([one]).open()
    assert by is not None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one.lora_B.data.mul_(2.0)
        assert_exact(one)
    by.close()
    torch.cuda.synchronize()


def test_moved_weights_are_found_again() -> None:
    layers = [layer(256, 512, 16) for _ in range(4)]
    norms = NormPass(layers)
    for _ in range(3):
        by = norms.open()
        assert by is not None
        for each in layers:
            assert_exact(each)
        by.close()
        for each in layers:
            each.weight.data = each.weight.data * 1.5
        gc.collect()


def test_replays_of_a_captured_pass_compute_from_the_weights_of_their_time() -> None:
    layers = [layer(256, 512, 16) for _ in range(4)]
    norms = NormPass(layers)

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        by = norms.open()
        assert by is not None
        found = [
            each.norms.gain_of_weight(*each.tensors, each.scaling, rounded=(each.lora_A, each.lora_B))
            for each in layers
        ]
        by.close()
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        for each in layers:
            each.lora_B.data.mul_(1.5)
        graph.replay()
        for each, (norm, g) in zip(layers, captured, strict=True):
            wanted = exact(each)
            torch.testing.assert_close(norm.double(), wanted[0], rtol=NORM_ERROR, atol=1e-9)
            torch.testing.assert_close(g.double(), wanted[1], rtol=NORM_ERROR, atol=1e-9)


def test_a_pass_that_is_first_opened_in_a_capture_leaves_the_layers_alone() -> None:
    layers = [layer(256, 512, 16) for _ in range(2)]
    for each in layers:
        assert_exact(each)  # compiled before the capture
    norms = NormPass(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by = norms.open()
        found = [
            each.norms.gain_of_weight(*each.tensors, each.scaling, rounded=(each.lora_A, each.lora_B))
            for each in layers
        ]
        assert by is not None
        by.close()
    layers[0].lora_B.data.mul_(2.0)
    graph.replay()
    for each, (norm, _) in zip(layers, found, strict=True):
        torch.testing.assert_close(norm.double(), exact(each)[0], rtol=NORM_ERROR, atol=1e-9)


@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_accelerated_model_trains_as_without_passes(adapter_dtype: str, reentrant: bool) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from doratune.integrations.peft import passes

    def losses(with_passes: bool) -> list[float]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 96}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
        dora = LoraConfig(use_dora=True, r=16, target_modules="all-linear", init_lora_weights=True)
        model = get_peft_model(model, dora, autocast_adapter_dtype=adapter_dtype == "fp32")
        doratune.accelerate(model, quiet=True)
        if not with_passes:
            passes.remove(model)
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)
        ids, seen = torch.randint(0, 96, (2, 32), device="cuda"), []
        for _ in range(6):
            with torch.autocast("cuda", torch.bfloat16, enabled=adapter_dtype == "fp32"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss))
        return seen

    torch.testing.assert_close(losses(True), losses(False), rtol=2e-3, atol=2e-3)


def stored_layer(form: str, d_out: int, d_in: int, rank: int, adapter: torch.dtype) -> StoredLayer:
    """As :func:`layer`, with W in a weight format, so that rows nearly cancel as far as its codes can."""
    plain, parsed = layer(d_out, d_in, rank, adapter, torch.float32), parse_format(form)
    tensors = quantise(parsed, plain.weight)
    flat = tuple([tensors[stored.name].clone() for stored in parsed.operands(d_out, d_in)])
    return StoredLayer(StoredMatrix(parsed, flat, d_out, d_in), *plain[1:])


def assert_stored(of: StoredLayer, values: Sequence[torch.Tensor] | None, rounded: torch.dtype | None) -> None:
    matrix = of.weight
    names = [stored.name for stored in matrix.form.operands(matrix.d_out, matrix.d_in)]
    weight = dequantise(matrix.form, dict(zip(names, matrix.tensors, strict=True)), *matrix.shape, torch.float64)
    assert values is not None
    for value, wanted in zip(values, exact(NormLayer(weight, *of[1:]), rounded), strict=True):
        assert value.isfinite().all()
        error = (value.double() - wanted).abs() / wanted.abs().clamp_min(1e-30)
        assert float(torch.where(value == wanted, 0.0, error).max()) <= NORM_ERROR


@pytest.mark.parametrize("rank", [16, 100])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["exact", "autocast"])
@pytest.mark.parametrize("form", ["nf4.nested", "int8", "hqq4.strided", "ao8.block.zeros", "fp8"])
def test_all_stored_layers_of_a_model_are_exact(
    form: str, rounded: torch.dtype | None, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the grouped kernel, from a pass and from the operator of compiled graphs."""
    for module in (norm_pass, traced_tables):
        monkeypatch.setattr(module, "alone", lambda *_: pytest.fail("a layer computed its norm alone"))
    layers = [stored_layer(form, 896, 1024, rank, torch.float32) for _ in range(3)]
    norms = NormPass(layers)
    for _ in range(3):  # as emitted, recorded, repeated
        with torch.autocast("cuda", torch.bfloat16, enabled=rounded is not None):
            by = norms.open()
            assert by is not None
            for each in layers:
                how = how_of(each.weight.form, torch.float32, rounded)
                shapes = (each.weight.shape, each.lora_A.shape)
                taken = each.norms.take_stored(each.tensors, shapes, each.scaling, how, trains=False)
                assert_stored(each, taken, rounded)
        by.close()
        for each in layers:
            each.lora_B.mul_(1.25)
    tensors = [tensor for each in layers for tensor in each.weight.tensors]
    parts = [[each[field] for each in layers] for field in range(1, 5)]
    formats, sizes = " ".join([form] * 3), [896, 1024] * 3
    values = stored_norms_and_gains(tensors, formats, sizes, *parts, rounded).view(2, 3, 896)
    for each, norm, g in zip(layers, *values, strict=True):
        assert_stored(each, (norm, g), rounded)
