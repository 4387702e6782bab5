"""How a quantised layer stores W is recognised, or the layer is read through its own forward: never misread.

Every layout of every package that computes on CPU tensors is made by the package itself. A layout that has changed is
played by changing the package's own decoder, so that the same tensors mean another W.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import doratune
from doratune.integrations.peft import base_layers, stored
from doratune.integrations.peft.stored import StorageReader
from doratune.internals import versions
from doratune.nn import stored_norm
from doratune.nn.stored_norm import StoredMatrix, norm_of_stored
from doratune.runtime import reference
from doratune.runtime.reference import OPERAND_DTYPES

from .peft_models import relative, with_dora
from .test_quantised import quantised

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
D_OUT, D_IN = 96, 192

Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_said", set())


def linear(dtype: torch.dtype, d_in: int = D_IN) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, D_OUT, bias=False).to(dtype).requires_grad_(False)


def decodes_otherwise_on_a_cpu() -> bool:
    """Whether bitsandbytes' decoder for CPUs rounds scales to 16 bits and has other FP4 codes, as up to 0.48."""
    return tuple(map(int, pytest.importorskip("bitsandbytes").__version__.split(".")[:2])) < (0, 49)


def four_bits(dtype: torch.dtype = FP32, compute: torch.dtype | None = None, d_in: int = D_IN, **settings: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    layer = bitsandbytes.Linear4bit(d_in, D_OUT, bias=False, compute_dtype=compute or dtype)
    made = bitsandbytes.Params4bit(linear(dtype, d_in).weight.data, requires_grad=False, module=layer, **settings)
    layer.weight = made.to("cpu")
    return layer


def eight_bits(dtype: torch.dtype = BF16) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    layer = bitsandbytes.Linear8bitLt(D_IN, D_OUT, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.Int8Params(linear(dtype).weight.data, requires_grad=False).to("cpu")
    return layer


def by_hqq(dtype: torch.dtype = BF16, **settings: Any) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize")
    return hqq.HQQLinear(linear(dtype), hqq.BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")


def by_torchao(config: str, dtype: torch.dtype = BF16, **settings: Any) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    given = {key: value() if callable(value) else value for key, value in settings.items()}
    model = nn.Sequential(linear(dtype))
    try:
        torchao.quantize_(model, getattr(torchao, config)(**given))
        model[0].weight.detach()[0:1].dequantize()
    except (TypeError, RuntimeError) as error:  # an older version has other settings, or cannot cut the rows of groups
        pytest.skip(str(error))
    return model[0]


def granular(name: str, *arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(pytest.importorskip("torchao.quantization"), name)(*arguments)


LAYERS: dict[str, tuple[Make, str]] = {
    "nf4": (lambda: four_bits(quant_type="nf4", compress_statistics=False), "nf4.fp32"),
    "nf4, nested": (lambda: four_bits(quant_type="nf4", compress_statistics=True), "nf4.nested.fp32"),
    "nf4, bf16": (lambda: four_bits(BF16, quant_type="nf4", compress_statistics=False), "nf4"),
    "nf4, blocks of 128, nested, fp16": (
        lambda: four_bits(FP16, quant_type="nf4", blocksize=128, compress_statistics=True, d_in=256),
        "nf4.128.nested.fp16",
    ),
    "nf4, quantised in fp32, computing in bf16": (
        lambda: four_bits(FP32, BF16, quant_type="nf4", compress_statistics=False),
        "nf4",
    ),
    "nf4, quantised in bf16, computing in fp32": (
        lambda: four_bits(BF16, FP32, quant_type="nf4", compress_statistics=False),
        "nf4",
    ),
    "nf4 stored as bf16": (
        lambda: four_bits(quant_type="nf4", compress_statistics=False, quant_storage=BF16),
        "nf4.fp32",
    ),
    "nf4, an odd width": (lambda: four_bits(quant_type="nf4", compress_statistics=False, d_in=131), "nf4.fp32"),
    "fp4": (lambda: four_bits(quant_type="fp4", compress_statistics=False), "fp4.fp32"),
    "fp4, nested": (lambda: four_bits(quant_type="fp4", compress_statistics=True), "fp4.nested.fp32"),
    "int8": (eight_bits, "int8"),
    "HQQ 8": (lambda: by_hqq(nbits=8, group_size=64, axis=1), "hqq8"),
    "HQQ 8, axis 0": (lambda: by_hqq(nbits=8, group_size=32, axis=0), "hqq8.strided.32"),
    "HQQ 4": (lambda: by_hqq(nbits=4, group_size=64, axis=1), "hqq4"),
    "HQQ 4, axis 0": (lambda: by_hqq(nbits=4, group_size=64, axis=0), "hqq4.strided"),
    "HQQ 4, fp32": (lambda: by_hqq(FP32, nbits=4, group_size=32, axis=1), "hqq4.32.fp32"),
    "torchao int8": (lambda: by_torchao("Int8WeightOnlyConfig"), "ao8"),
    "torchao int8, fp32": (lambda: by_torchao("Int8WeightOnlyConfig", FP32), "ao8.fp32"),
    "torchao int8, a scale for the tensor": (
        lambda: by_torchao("Int8WeightOnlyConfig", version=2, granularity=granular("PerTensor")),
        "ao8.tensor",
    ),
    "torchao int8, groups": (
        lambda: by_torchao("Int8WeightOnlyConfig", version=2, granularity=granular("PerGroup", 32)),
        "ao8.block",
    ),
    "torchao int4": (
        lambda: by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granular("PerGroup", 32)),
        "ao8.block",
    ),
    "torchao int4 with zero points": (
        lambda: by_torchao(
            "IntxWeightOnlyConfig",
            weight_dtype=torch.int4,
            granularity=granular("PerGroup", 32),
            mapping_type=lambda: pytest.importorskip("torchao.quantization").MappingType.ASYMMETRIC,
        ),
        "ao8.block.zeros",
    ),
    "torchao float8": (lambda: by_torchao("Float8WeightOnlyConfig"), "fp8"),
}
"""Layers by what they are, and the formats that they have, without the dtype of scales."""

UNREAD: dict[str, tuple[Make, str]] = {
    "HQQ 3": (lambda: by_hqq(nbits=3, group_size=64, axis=1), "packs it as 3bit_32"),
    "HQQ 2": (lambda: by_hqq(nbits=2, group_size=64, axis=0), "packs it as 2bit_u8"),
    "HQQ, codes viewed as floats": (
        lambda: by_hqq(nbits=8, group_size=64, axis=1, view_as_float=True),
        "views its codes as floats",
    ),
    "HQQ, groups of another size": (lambda: by_hqq(nbits=8, group_size=24, axis=1), "must be a power of two"),
    "nf4 rounded twice": (lambda: four_bits(FP16, BF16, quant_type="nf4"), "and then to torch.bfloat16"),
}


def base_of(layer: Any) -> base_layers.BaseLayer:
    found = base_layers.read_base(layer, layer.out_features, layer.in_features, transposed=False)
    assert isinstance(found, base_layers.BaseLayer), found
    return found


def read(layer: Any, reader: StorageReader | None = None) -> StoredMatrix | str:
    return (reader or StorageReader("layer")).read(layer, base_of(layer), layer.out_features, layer.in_features)


def exactly(layer: Any, matrix: StoredMatrix) -> torch.Tensor:
    """W [d_out, d_in] in fp64: codes times scales where a package multiplies by the codes, else as it decodes W."""
    if not matrix.form.exact:
        weight: torch.Tensor = dequantize_module_weight(layer)
        return weight.to(OPERAND_DTYPES[matrix.form.dtype]).double()
    codes, scales = matrix.tensors
    values = codes.view(torch.int8).double().view(matrix.d_out, matrix.d_in)
    return values * scales.double().view(-1, 1) / matrix.form.of.unit


@pytest.mark.parametrize("dominates", ["W", "BA", "W along BA"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_recognised_and_its_norm_is_that_of_the_w_that_its_package_decodes(
    name: str, dominates: str
) -> None:
    make, form = LAYERS[name]
    layer = make()
    hard = name.startswith("fp4") or (name.startswith("nf4") and not form.endswith("fp32"))
    if hard and decodes_otherwise_on_a_cpu():
        pytest.skip("this bitsandbytes decodes it otherwise on a CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stores W")
        matrix = read(layer)
    assert isinstance(matrix, StoredMatrix), matrix
    assert str(matrix.form).replace(".scales_fp32", "") == form
    weight = exactly(layer, matrix)
    a, b = torch.randn(8, layer.in_features), torch.randn(D_OUT, 8)
    b *= {"W": 0.001, "BA": 10.0, "W along BA": 0.01}[dominates]
    if dominates == "W along BA":
        a[0], b[:, 0] = weight[0].float(), 0.5 * torch.randn(D_OUT)
    wanted = (weight - 0.7 * (b.double() @ a.double())).norm(dim=1)
    for _ in range(2):  # the second one takes rowsum(W*W) from the first
        norm = norm_of_stored(matrix, a, b, -0.7).double()
        assert float(((norm - wanted) / wanted).abs().max()) < 1e-5
    if matrix.counts_writes:
        assert matrix.weight_sq is not None
        assert relative(matrix.weight_sq, weight.square().sum(dim=1)) < 1e-6
    else:
        assert name.startswith("HQQ")
        assert matrix.weight_sq is None


@pytest.mark.parametrize("name", UNREAD)
def test_a_format_that_no_kernel_reads_is_named_and_no_reason_to_warn(name: str) -> None:
    make, reason = UNREAD[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stores W")
        found = read(make())
    assert isinstance(found, str)
    assert reason in found


def test_a_w_that_is_packed_for_a_cpu_is_not_read() -> None:
    layer = four_bits(quant_type="nf4", compress_statistics=False)
    reader = StorageReader("layer")
    assert isinstance(read(layer, reader), StoredMatrix)
    layer.weight.quant_state.packing_format_for_cpu = True
    found = read(layer, reader)
    assert isinstance(found, str)
    assert "packed it for kernels of its own" in found


def changed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let the package decode the same tensors to another W, as if its layout had changed."""
    if kind == "low halves first":
        functional = pytest.importorskip("bitsandbytes").functional
        decode = functional.dequantize_4bit

        def swapped(packed: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            return decode((packed << 4) | (packed >> 4), *rest, **named)  # type: ignore[no-any-return]

        monkeypatch.setattr(functional, "dequantize_4bit", swapped)
    elif kind == "another unit":
        functional = pytest.importorskip("bitsandbytes").functional
        decode = functional.int8_vectorwise_dequant
        monkeypatch.setattr(functional, "int8_vectorwise_dequant", lambda *given: decode(*given) * (127.0 / 128.0))
    elif kind == "rows in pairs":
        quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
        unpack = quantizer.unpack["4bit_u8"]

        def interleaved(packed: torch.Tensor, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.cat([*unpack(packed, dtype=dtype).chunk(2)[::-1]])

        monkeypatch.setitem(quantizer.unpack, "4bit_u8", interleaved)
    elif kind == "a zero point of one half":
        quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
        decode = quantizer.dequantize
        monkeypatch.setattr(
            quantizer, "dequantize", lambda codes, meta: decode(codes, {**meta, "zero": meta["zero"] + 0.5})
        )
    else:
        cls = type(by_torchao("Int8WeightOnlyConfig").weight)
        decode = cls.dequantize
        monkeypatch.setattr(cls, "dequantize", lambda self, *rest: decode(self, *rest) * 1.01)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nf4", "low halves first"),
        ("nf4, nested", "low halves first"),
        ("int8", "another unit"),
        ("HQQ 4", "rows in pairs"),
        ("HQQ 8", "a zero point of one half"),
        ("torchao int8", "scales of another unit"),
    ],
)
def test_a_layout_that_has_changed_is_noticed_refused_and_said_once(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[name][0]()
    changed(monkeypatch, kind)
    with pytest.warns(UserWarning, match=r"first: .* stores W in another way than doratune knows: .* differ"):
        found = read(layer, StorageReader("first"))
    assert isinstance(found, str)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stores W")
        assert isinstance(read(layer, StorageReader("second")), str)


def test_a_layer_that_multiplies_by_another_w_than_its_blocks_hold_is_not_read() -> None:
    layer = four_bits(quant_type="nf4", compress_statistics=False, d_in=160)  # rows end inside of blocks
    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size((1, D_OUT * 160))
    flat = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(layer.weight.data, state)
    right = torch.equal(flat.view(D_OUT, 160), dequantize_module_weight(layer))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stores W")
        found = read(layer)
    if right:  # not so in bitsandbytes 0.50 on a CPU
        assert isinstance(found, StoredMatrix)
    else:
        assert "products with unit vectors differ" in str(found)


def test_other_codes_settings_and_sizes_are_noticed() -> None:
    def nf4() -> Any:
        return four_bits(quant_type="nf4", compress_statistics=False)

    layer = nf4()
    layer.weight.quant_state.code = layer.weight.quant_state.code * 1.001
    assert "stand for other values" in str(read(layer))
    layer = nf4()
    layer.weight.quant_state.shape = torch.Size((D_IN, D_OUT))
    assert "not of W's" in str(read(layer))
    layer = nf4()
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:-1]
    assert "its scales must be 288 elements of torch.float32, got 287" in str(read(layer))
    layer = nf4()
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.half()
    assert "got 288 elements of torch.float16" in str(read(layer))
    layer = nf4()
    del layer.weight.quant_state.blocksize
    assert "does not hold what is expected" in str(read(layer))


def test_an_untested_version_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = four_bits(quant_type="nf4", compress_statistics=False)
    monkeypatch.setattr(stored, "installed", lambda package: "0.99.0")
    assert "bitsandbytes 0.99.0 is not tested (tested: 0.48 to" in str(read(layer))
    assert set(versions.STORAGE) == {package.name for package in stored._PACKAGES.values()}


def write_codes(layer: Any) -> None:
    layer.weight.copy_(layer.weight.flip(0))


def write_scales(layer: Any) -> None:
    layer.weight.quant_state.absmax.mul_(2.0)


def give_other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data.flip(0)


def load(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.data)  # as load_state_dict does, but on the parameter
    layer.load_state_dict({"weight": layer.weight.detach().flip(0)}, strict=False)


def quantise_anew(layer: Any) -> None:
    layer.weight = four_bits(quant_type="nf4", compress_statistics=False).weight


def compute_in_bf16(layer: Any) -> None:
    layer.compute_dtype = BF16


@pytest.mark.parametrize("change", [write_codes, write_scales, give_other_data, load, quantise_anew, compute_in_bf16])
def test_a_w_that_has_changed_is_read_again(change: Callable[[Any], None]) -> None:
    layer, reader = four_bits(quant_type="nf4", compress_statistics=False), StorageReader("layer")
    before = read(layer, reader)
    assert isinstance(before, StoredMatrix)
    a, b = torch.randn(4, D_IN), 0.01 * torch.randn(D_OUT, 4)
    norm_of_stored(before, a, b, 1.0)
    assert read(layer, reader) is before
    with torch.no_grad():
        change(layer)
    if layer.compute_dtype is BF16 and decodes_otherwise_on_a_cpu():
        return
    after = read(layer, reader)
    assert isinstance(after, StoredMatrix)
    assert after is not before
    wanted = (exactly(layer, after) + b.double() @ a.double()).norm(dim=1)
    assert relative(norm_of_stored(after, a, b, 1.0), wanted) < 1e-6


def test_a_reader_does_not_keep_the_memory_of_a_w_that_its_layer_has_given_up() -> None:
    layer, reader = four_bits(quant_type="nf4", compress_statistics=False), StorageReader("layer")
    assert isinstance(read(layer, reader), StoredMatrix)
    memory = weakref.ref(layer.weight.untyped_storage())
    del layer.weight
    gc.collect()
    assert memory() is None


class Largest(TorchDispatchMode):
    """Notes the largest floating-point tensor that an operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("name", ["nf4, nested", "int8", "HQQ 4", "torchao int8", "torchao float8"])
def test_no_norm_holds_a_dequantised_w(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_WIDENED_ELEMENTS", 16 * D_IN)
    layer = LAYERS[name][0]()
    matrix = read(layer)
    assert isinstance(matrix, StoredMatrix)
    a, b = torch.randn(4, D_IN), 0.01 * torch.randn(D_OUT, 4)
    for _ in range(2):
        with Largest() as largest:
            norm_of_stored(matrix, a, b, 1.0)
        assert 0 < largest.elements <= 16 * D_IN


def specs_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs of the norms that are computed from now on."""
    asked: list[str] = []
    original = stored_norm.run_reference_on

    def noted(spec: Any, *rest: Any) -> Any:
        asked.append(str(spec))
        return original(spec, *rest)

    monkeypatch.setattr(stored_norm, "run_reference_on", noted)
    return asked


def test_a_model_reads_its_layers_and_keeps_the_squares_of_w(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_dora(quantised(base_layers.BNB_4BIT))
    report = doratune.accelerate(model, quiet=True)
    assert {layer.weight_format for layer in report.layers} == {"nf4.fp32"}
    assert "bitsandbytes 4-bit (nf4.fp32): eager reference" in str(report)
    asked = specs_of(monkeypatch)
    x = torch.randn(5, 64)
    y = model(x)
    assert ["save" in spec for spec in asked] == [True, True]
    assert torch.equal(model(x), y)
    assert ["save" in spec for spec in asked[2:]] == [False, False]
    model.merge_adapter()
    model.unmerge_adapter()
    again = model(x)
    assert ["save" in spec for spec in asked[4:]] == [True, True]
    doratune.restore(model)
    torch.testing.assert_close(model(x), again)


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", BF16):
        yield


@pytest.mark.usefixtures("autocast")
def test_under_autocast_the_adapter_is_rounded_as_in_the_layers_products(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = by_hqq(nbits=4, group_size=64, axis=1)
    matrix = read(layer)
    assert isinstance(matrix, StoredMatrix)
    asked = specs_of(monkeypatch)
    a, b = torch.randn(4, D_IN), torch.randn(D_OUT, 4)
    norm = norm_of_stored(matrix, a, b, 1.0)
    wanted = exactly(layer, matrix) + b.bfloat16().double() @ a.bfloat16().double()
    assert relative(norm, wanted.norm(dim=1)) < 1e-6
    assert "autocast" in asked[0]


def test_a_model_of_an_unread_format_says_so_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    base = quantised(base_layers.BNB_4BIT, sizes=(64, 128, 64))
    for name in ("first", "second"):
        wide = nn.Linear(*((64, 128) if name == "first" else (128, 64)), bias=False).requires_grad_(False)
        config = hqq.BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
        setattr(base, name, hqq.HQQLinear(wide, config, compute_dtype=FP32, device="cpu"))
    model = with_dora(base)
    report = doratune.accelerate(model, quiet=True)
    assert {layer.weight_format for layer in report.layers} == {""}
    assert {layer.remark for layer in report.accelerated} == {
        "its norm through its own forward: HQQ packs it as 3bit_32"
    }
    x = torch.randn(5, 64)
    y = model(x)
    doratune.restore(model)
    assert relative(y, model(x)) < 1e-6
