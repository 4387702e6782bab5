"""A norm pass gives layers whose W is in a weight format the norm of what the format decodes to, all layers of one kind
at once; a layer takes it only if its codes, scales and adapters are those that the pass has read.

Runs on the CPU, where the eager reference takes the place of the grouped kernels; tests/templates runs these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from doratune.codegen.weight_formats import parse_format
from doratune.nn import norm_pass, norm_table
from doratune.nn.autocast import autocast_dtype
from doratune.nn.norm_cache import NormCache
from doratune.nn.norm_layer import NormLayer, StoredLayer, kind_of, units_of
from doratune.nn.norm_pass import NormPass
from doratune.nn.norm_table import places_of
from doratune.nn.stored_norm import StoredMatrix, how_of, norm_and_gain_of_stored
from doratune.runtime.dequantise import dequantise
from doratune.tuner.quantise import quantise

D_OUT, D_IN, RANK = 16, 64, 4
FORMATS = ["nf4.fp32", "nf4.nested", "int8", "ao8.block.zeros.fp32", "hqq4", "fp8"]


def layer(form: str = "nf4.fp32", seed: int = 0, reuse: str = "auto", **other: Any) -> StoredLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parsed = parse_format(form)
    stored = quantise(parsed, normal(D_OUT, D_IN))
    tensors = [stored[operand.name] for operand in parsed.operands(D_OUT, D_IN)]
    matrix = StoredMatrix(parsed, tuple(tensors), D_OUT, D_IN)
    made = StoredLayer(matrix, normal(RANK, D_IN), normal(D_OUT, RANK), normal(D_OUT), 0.5, NormCache(reuse))
    return made._replace(**other)


def wanted(of: StoredLayer, rounded: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """w and g in fp64, of the W that the tensors decode to now."""
    matrix = of.weight
    names = [operand.name for operand in matrix.form.operands(D_OUT, D_IN)]
    w = dequantise(matrix.form, dict(zip(names, matrix.tensors, strict=True)), D_OUT, D_IN, torch.float64)
    a, b = (each.to(rounded or each.dtype).double() for each in (of.lora_A, of.lora_B))
    norm = (w + of.scaling * b @ a).norm(dim=1)
    return norm, of.magnitude.double() / norm


def take(of: StoredLayer, *, trains: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
    """w and g as the layer asks the pass for them."""
    how = how_of(of.weight.form, of.lora_A.dtype, autocast_dtype(of.weight.device))
    shapes = (of.weight.shape, of.lora_A.shape)
    return of.norms.take_stored(of.tensors, shapes, of.scaling, how, trains=trains)


def assert_taken(of: StoredLayer, rounded: torch.dtype | None = None) -> None:
    taken = take(of)
    assert taken is not None
    for value, exact in zip(taken, wanted(of, rounded), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)


def aligned(of: StoredLayer) -> StoredLayer:
    """The same layer in memory as PyTorch's allocator for GPUs gives it: each tensor at a multiple of 512 bytes."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.element_size()
        memory = torch.empty(tensor.numel() + 512 // size, dtype=tensor.dtype)
        return memory[-memory.data_ptr() % 512 // size :][: tensor.numel()].view(tensor.shape).copy_(tensor)

    matrix = replace(of.weight, tensors=tuple(map(moved, of.weight.tensors)))
    return StoredLayer(matrix, *map(moved, of.tensors[-3:]), of.scaling, of.norms)  # type: ignore[arg-type]


@contextmanager
def passing(*layers: Any) -> Iterator[None]:
    by = NormPass(layers).open()
    assert by is not None
    yield
    by.close()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch of a pass has computed."""
    counts: list[int] = []
    values = norm_pass._Group._values

    def counted(self: Any, found: Any, how: Any) -> Any:
        counts.append(len(found.members))
        return values(self, found, how)

    monkeypatch.setattr(norm_pass._Group, "_values", counted)
    return counts


@pytest.mark.parametrize("form", FORMATS)
def test_each_layer_gets_the_norm_of_what_its_own_codes_decode_to(form: str, groups: list[int]) -> None:
    layers = [layer(form, seed) for seed in range(3)]
    with passing(*layers):
        for each in reversed(layers):
            assert_taken(each)
    assert groups == [3]


def test_layers_of_another_format_rank_scaling_or_dtype_are_another_launch(groups: list[int]) -> None:
    plain = layer()
    dense = NormLayer(torch.randn(D_OUT, D_IN), *plain[1:5], NormCache())
    narrow = layer(seed=1, lora_A=torch.randn(2, D_IN), lora_B=torch.randn(D_OUT, 2))
    layers = [plain, layer(seed=2), layer("nf4.nested.fp32"), layer("int8"), narrow, layer(seed=3, scaling=0.25)]
    with passing(*layers, dense):
        for each in layers:
            assert_taken(each)
        assert dense.norms.is_given
    assert sorted(groups) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("form", ["nf4.nested.fp32", "ao8.block.zeros.fp32"])
def test_a_write_to_any_tensor_within_the_pass_is_seen(form: str) -> None:
    count = len(layer(form).tensors)
    assert count == len(parse_format(form).operands(D_OUT, D_IN)) + 3
    for index in range(count):
        for write in (lambda tensor: tensor.copy_(tensor.flip(0)), lambda t: setattr(t, "data", t.data.clone())):
            first, second = layer(form, 0), layer(form, 1)
            with passing(first, second):
                write(first.tensors[index])
                assert take(first) is None, index
                assert_taken(second)


def test_other_tensors_scalings_formats_and_roundings_are_not_served() -> None:
    one = layer()
    others = [
        one._replace(scaling=0.25),
        one._replace(lora_A=one.lora_A.clone()),
        one._replace(weight=layer(seed=1).weight),
        one._replace(weight=replace(one.weight, form=parse_format("nf4"))),  # the same tensors, rounded to bf16
        one._replace(lora_A=one.lora_A.view(RANK * 2, -1), lora_B=one.lora_B.view(-1, RANK * 2)),
    ]
    for other in others:
        with passing(one):
            assert take(other) is None
    with passing(one), torch.autocast("cpu", torch.bfloat16):
        assert take(one) is not None, "fp32 values are multiplied by exact adapters, with autocast or without"
    half = layer("nf4")
    with passing(half), torch.autocast("cpu", torch.bfloat16):
        assert take(half) is None


def test_autocast_rounds_the_adapters_as_the_layers_products_do() -> None:
    for form, rounded in (("nf4", torch.bfloat16), ("nf4.fp16", None), ("nf4.fp32", None), ("int8", torch.bfloat16)):
        one = layer(form)
        with torch.autocast("cpu", torch.bfloat16), passing(one):
            assert_taken(one, rounded)


def test_only_the_first_call_gets_it_and_none_outlives_the_pass() -> None:
    one = layer()
    with passing(one):
        assert take(one) is not None
        assert take(one) is None
    with passing(one):
        pass
    assert take(one) is None


def test_a_recompute_takes_the_norm_of_its_forward_and_no_other_call_does() -> None:
    one = layer()
    with passing(one):
        forward = take(one, trains=True)
    recomputed: list[Any] = []
    x = torch.ones(1, requires_grad=True)

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            recomputed.append(take(one, trains=True))
            return dy

    Recompute.apply(x).backward()  # type: ignore[no-untyped-call]
    assert forward is not None
    assert recomputed[0][0] is not None
    assert torch.equal(recomputed[0][0], forward[0])


def test_tracked_norms_are_computed_once_until_a_write(groups: list[int]) -> None:
    layers = [layer(seed=seed, reuse="tracked") for seed in range(2)]
    norms = NormPass(layers)
    for _ in range(3):
        by = norms.open()
        assert by is not None
        for each in layers:
            assert_taken(each)
        by.close()
    assert groups == [2]
    layers[0].weight.tensors[1].mul_(2.0)  # its scales
    by = norms.open()
    assert by is not None
    for each in layers:
        assert_taken(each)
    by.close()
    assert groups == [2, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"lora_A": torch.randn(RANK, D_IN, dtype=torch.float64), "lora_B": torch.randn(D_OUT, RANK).double()},
        {"magnitude": torch.randn(D_OUT, dtype=torch.float64)},
        {"lora_B": torch.randn(D_OUT, 2 * RANK)[:, ::2]},
        {"norms": NormCache("off")},
    ],
    ids=lambda other: " ".join(other),
)
def test_what_no_kernel_reads_is_left_out(other: dict[str, Any]) -> None:
    assert kind_of(layer(**other)) is None
    assert kind_of(layer()) is not None


def test_adapters_that_a_format_would_have_to_convert_are_left_to_the_layers() -> None:
    halves = {"lora_A": torch.randn(RANK, D_IN).bfloat16(), "lora_B": torch.randn(D_OUT, RANK).bfloat16()}
    one = layer("nf4.fp16", **halves)
    norms = NormPass([one])
    by = norms.open()
    assert by is not None
    by.close()
    assert not one.norms.is_given
    assert norms.served() == frozenset()
    exact = layer("int8", **halves)  # its values have no dtype of their own
    assert NormPass([exact]).served() == {id(exact.norms)}


def test_a_table_says_where_every_tensor_of_a_layer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [aligned(layer("nf4.nested", seed)) for seed in range(3)]
    fits, anchors, places = places_of(layers)
    assert len(fits) == 3
    for each, row in zip(layers, places, strict=True):
        for tensor, anchor, place in zip(each.tensors, anchors, row, strict=True):
            assert anchor.data_ptr() + place * tensor.element_size() == tensor.data_ptr()
    assert units_of(layers[0])[:2] == [512, 16], "bytes: 512 codes, 16 scales of a byte"
    monkeypatch.setattr(norm_table, "MOST_UNITS", 1)  # only tensor maps bound the distance
    assert len(places_of(layers)[0]) == 3
    scales = layers[1].weight.tensors[1]
    shifted = torch.empty(len(scales) + 1, dtype=torch.uint8)[1:].copy_(scales)
    tensors = (layers[1].weight.tensors[0], shifted, *layers[1].weight.tensors[2:])
    moved = layers[1]._replace(weight=replace(layers[1].weight, tensors=tensors))
    assert moved.norms not in [fit.norms for fit in places_of([layers[0], moved, layers[2]])[0]]


def test_the_squares_of_w_are_kept_for_the_layer() -> None:
    one = layer()
    with passing(one):
        assert_taken(one)
    squares = one.weight.weight_sq
    assert squares is not None
    norm, g = norm_and_gain_of_stored(*one[:5], how_of(one.weight.form, torch.float32, None))
    assert one.weight.weight_sq is squares
    for value, exact in zip((norm, g), wanted(one), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)


def test_each_launch_counts_once_for_all_its_layers(groups: list[int]) -> None:
    layers = [layer(form, seed) for form in ("nf4.fp32", "int8") for seed in range(4)]
    norms = NormPass(layers)
    for _ in range(2):
        by = norms.open()
        assert by is not None
        assert [take(each) is not None for each in layers] == [True] * 8
        by.close()
    assert Counter(groups) == {4: 4}
    assert len(norms) == 8
