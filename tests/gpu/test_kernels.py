"""On a real GPU every variant is right in bf16, fp16, fp32 and with fp32 adapters, where each term dominates, for any
token count, in place, unaligned, in slices of wider matrices and beyond 2**31 elements."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

import doratune
from doratune.codegen.gpu import Gpu
from doratune.codegen.ops import OPS, SMALLEST_GAIN
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config, default_configs
from doratune.codegen.weight_formats import parse_format, stored_as
from doratune.runtime.binding import bind
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.kernel import Kernel
from doratune.runtime.reference import TORCH_DTYPES, definition
from doratune.tuner.accuracy import NORM_ERROR, worst_error
from doratune.tuner.inputs import CASES, make_inputs, make_outputs
from doratune.tuner.timing import capture

from ..specs import read_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

IDS = {variant: f"{variant.op}-{variant.name}" for variant in VARIANTS}
DTYPES = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32")]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return gpu_of(find_device("cuda"))


def forms(op: str) -> list[dict[str, object]]:
    contract = OPS[op]
    single = [{}, *({flag: True} for flag in contract.flags), *({role: "fp32"} for role in contract.optional_dtypes)]
    return [*single, {"save": True, "magnitude": "fp32"}] if op == "weight_norm" else single  # as a layer asks for it


def spec_of(op: str, dtype: str, adapter: str, gpu: Gpu, **values: object) -> KernelSpec:
    adapter = "fp32" if values.get("autocast") else adapter  # only fp32 adapters are rounded
    dims = {"d_out": 1040, "d_in": 2304, "rank": 72, "tokens": 512}
    return KernelSpec.create(op, **{**dims, "dtype": dtype, "adapter": adapter, "gpu": gpu.slug, **values})


def served_spec(variant: Variant, dtype: str, adapter: str, gpu: Gpu, **values: object) -> KernelSpec:
    """A spec for few tokens, or for many where the variant is for those alone."""
    few, many = (
        spec_of(variant.op, adapter=adapter, gpu=gpu, **read_by(variant, {"dtype": dtype, **values, "tokens": tokens}))
        for tokens in (16, 4096)
    )
    return few if variant.unavailable(few, gpu) is None else many


def fitting_config(variant: Variant, spec: KernelSpec, gpu: Gpu) -> Config:
    reason = variant.unavailable(spec, gpu)
    if reason is not None:
        pytest.skip(reason)
    return next(config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None)


def complaint_of(source: Source, tokens: int, case: str) -> str | None:
    spec = source.spec
    inputs, scaling = make_inputs(spec, tokens, case=case, device="cuda")
    outputs = make_outputs(spec, tokens, "cuda")
    bind(source).launch(*inputs.values(), *outputs.values(), *((scaling,) if spec.contract.scaling else ()))
    return worst_error(spec, outputs, definition(spec, inputs, scaling))[1]


@pytest.mark.parametrize(
    ("variant", "form"),
    [pytest.param(v, form, id=f"{IDS[v]}-{'-'.join(form) or 'plain'}") for v in VARIANTS for form in forms(v.op)],
)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_each_term_is_right_where_it_dominates(
    variant: Variant, form: dict[str, object], dtype: str, adapter: str, gpu: Gpu
) -> None:
    if dtype != adapter and "adapter" not in OPS[variant.op].dtypes:
        pytest.skip("the operation has no adapter")
    if "autocast" in form and "fp32" in (dtype, adapter):
        pytest.skip("there is nothing to round, or it is the form of the same dtype's parameters")
    spec = served_spec(variant, dtype, adapter, gpu, **form)
    source = render(spec, fitting_config(variant, spec, gpu))
    for case in CASES:
        assert complaint_of(source, 500, case) is None, case


FORMATS = [
    "nf4",
    "nf4.128.nested",
    "fp4",
    "int8",
    "ao8",
    "ao8.tensor",
    "ao8.block.zeros",
    "hqq8",
    "hqq4",
    "hqq4.strided",
]
FORMATS += ["fp8", "fp8.tensor", "fp8.tile", "fp8.exact", "fp8.tile.exact"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(1024, 2048, 64), (512, 1920, 200), (301, 517, 24)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_packed_weights_are_read_as_they_are_stored(
    form: str, shape: tuple[int, int, int], dtype: str, gpu: Gpu
) -> None:
    """Blocks along rows and across them, rows that begin inside a word; alone and for several layers."""
    d_out, d_in, rank = shape
    if parse_format(form).refuse(d_out, d_in):
        pytest.skip("no such shape in this format")
    values = {"d_out": d_out, "d_in": d_in, "rank": rank, "weight": stored_as(form, dtype), "magnitude": "fp32"}
    forms = (("weight_norm", {"save": True}), ("weight_norm", {}), ("weight_norm_group", {"layers": 3}))
    for (op, added), autocast in itertools.product(forms, (True, False)):  # fp32 adapters, and those of W's dtype
        spec = spec_of(op, dtype, dtype, gpu, **values, **added, autocast=autocast)
        firsts = {config.variant: config for config in reversed(default_configs(spec, gpu))}
        for config in firsts.values():
            for case in ("random", "cross_term", "mixed"):
                assert complaint_of(render(spec, config), 3, case) is None, (config, op, added, case)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(1024, 2048, 64), (512, 1920, 200), (301, 517, 24)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_few_tokens_are_multiplied_by_packed_weights(
    form: str, shape: tuple[int, int, int], dtype: str, gpu: Gpu
) -> None:
    """With every config that a search begins with."""
    d_out, d_in, rank = shape
    if parse_format(form).refuse(d_out, d_in):
        pytest.skip("no such shape in this format")
    values = {"d_out": d_out, "d_in": d_in, "rank": rank, "weight": stored_as(form, dtype), "tokens": 16, "bias": True}
    spec = spec_of("dora_linear_forward", dtype, dtype, gpu, **values)
    for config in default_configs(spec, gpu):
        for tokens, case in ((1, "random"), (5, "mixed"), (16, "negative_scaling")):
            assert complaint_of(render(spec, config), tokens, case) is None, (config, case)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS.get)
@pytest.mark.parametrize("tokens", [1, 16, 127, 4099])
def test_any_token_count_is_right(variant: Variant, tokens: int, gpu: Gpu) -> None:
    spec = served_spec(variant, "bf16", "bf16", gpu)
    assert complaint_of(render(spec, fitting_config(variant, spec, gpu)), tokens, "mixed") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dg_from_the_output_is_exact_where_y_says_nothing(dtype: torch.dtype) -> None:
    """The backward of a step that kept y, with columns of g = 0, of g just below the bound, and of NaN."""
    shape = {"d_out": 2048, "d_in": 1024, "rank": 64, "tokens": 1000, "dtype": dtype}
    backward = doratune.load_kernel("compose_backward", output=True, **shape)
    exact = doratune.load_kernel("compose_backward_exact", **shape)
    inputs, scaling = make_inputs(exact.spec, 1000, case="random", device="cuda")
    inputs["g"][3], inputs["g"][700] = 0.0, SMALLEST_GAIN[exact.spec.activation] / 2
    inputs["g"][2047] = float("nan")
    inner = inputs["x"].double() @ inputs["weight"].double().T
    inner += scaling * (inputs["h"].double() @ inputs["lora_B"].double().T)
    y = (inputs["g"] * inner).to(dtype)
    _, first = backward(inputs["dy"], y, inputs["g"])
    assert first[[3, 700, 2047]].tolist() == [0.0, 0.0, 0.0]
    dg = exact(**{**inputs, "dg": first}, scaling=scaling, out=first)
    assert isinstance(dg, torch.Tensor)
    wanted = (inputs["dy"].double() * inner).sum(dim=0)
    tiny = [3, 700, 2047]
    assert (dg - wanted)[tiny].norm() / wanted[tiny].norm() < 1e-5
    assert (dg - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 2e-3)  # y is rounded


@pytest.mark.parametrize("d_in", [14336, 28672])
def test_long_rows_lose_no_digits(d_in: int, gpu: Gpu) -> None:
    """Tensor cores drop low bits of a running sum; G over 14336 columns in one sum failed the norm's 1e-5."""
    for variant in (v for v in VARIANTS if v.op == "weight_norm"):
        for adapter in ("bf16", "fp32"):
            values = read_by(variant, {"dtype": "bf16", "d_out": 512, "d_in": d_in, "rank": 384})
            spec = spec_of("weight_norm", adapter=adapter, gpu=gpu, **values)
            source = render(spec, fitting_config(variant, spec, gpu))
            for case in ("cross_term", "large_lora", "mixed"):
                assert complaint_of(source, 1, case) is None, (variant.name, adapter, case)


@pytest.mark.parametrize("d_in", [1024, 4096, 14336])
@pytest.mark.parametrize("rank", [16, 384])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_w_keeps_its_digits_however_much_of_it_ba_takes_away(dtype: str, adapter: str, rank: int, d_in: int) -> None:
    """From where the factored norm is good, past the share at which rows are redone, to where rounding is left of W."""
    weight_dtype, adapter_dtype = TORCH_DTYPES[dtype], TORCH_DTYPES[adapter]
    torch.manual_seed(0)
    a = (torch.randn(rank, d_in, device="cuda") * d_in**-0.5).to(adapter_dtype)
    b = (torch.randn(512, rank, device="cuda") * 0.02).to(adapter_dtype)
    for share in (0.1, 0.2, 0.28, 0.35, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0):
        weight = ((-0.7 / share) * (b.double() @ a.double())).to(weight_dtype)
        exact = (weight.double() + 0.7 * (b.double() @ a.double())).norm(dim=1)
        for squares in (None, weight.double().square().sum(dim=1).float()):
            error = (doratune.weight_norm(weight, a, b, 0.7, weight_sq=squares) - exact).abs() / exact
            assert error.max() <= NORM_ERROR, share


@pytest.mark.parametrize("difference", [1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("rank", [16, 384])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_w_keeps_its_digits_where_rows_of_a_are_alike(dtype: str, adapter: str, rank: int, difference: float) -> None:
    torch.manual_seed(0)
    half = torch.randn(rank // 2, 4096, device="cuda") / 64.0
    a = torch.cat([half, half + difference * torch.randn_like(half) / 64.0]).to(TORCH_DTYPES[adapter])
    b = torch.randn(512, rank // 2, device="cuda").to(TORCH_DTYPES[adapter])
    b = torch.cat([b, -b], dim=1)
    weight = (1e-3 * torch.randn(512, 4096, device="cuda")).to(TORCH_DTYPES[dtype])
    exact = (weight.double() + 0.7 * (b.double() @ a.double())).norm(dim=1)
    assert ((doratune.weight_norm(weight, a, b, 0.7) - exact).abs() / exact).max() <= NORM_ERROR


def test_rows_that_cancel_are_found_in_a_replayed_graph() -> None:
    """What is redone is decided on the GPU: not by what cancelled when the graph was captured."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 1024, device="cuda") / 32.0, torch.randn(512, 16, device="cuda")
    weight = -(b.double() @ a.double()).float()
    scaled = b.clone()
    norm = torch.empty(512, device="cuda")
    graph = capture([lambda: norm.copy_(doratune.weight_norm(weight, a, scaled, 1.0))])
    for share in (0.1, 0.999, 0.5, 1.0):
        scaled.copy_(share * b)
        graph.replay()
        exact = (weight.double() + scaled.double() @ a.double()).norm(dim=1)
        assert ((norm - exact).abs() / exact).max() <= NORM_ERROR, share


@pytest.fixture
def library_settings() -> Iterator[None]:
    """What a user may ask of PyTorch's products: speed for digits. Set back afterwards."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision, matmul.allow_fp16_accumulation = "tf32", True
    yield
    matmul.fp32_precision, matmul.allow_fp16_accumulation = "none", False


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.library], ids=IDS.get)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_pytorchs_settings_cost_library_variants_no_digits(
    variant: Variant, dtype: str, adapter: str, gpu: Gpu, library_settings: None
) -> None:
    spec = spec_of(variant.op, dtype, adapter, gpu)
    assert complaint_of(render(spec, fitting_config(variant, spec, gpu)), 500, "mixed") is None


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.library], ids=IDS.get)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_library_variants_replay_from_a_cuda_graph(variant: Variant, dtype: str, adapter: str, gpu: Gpu) -> None:
    spec = spec_of(variant.op, dtype, adapter, gpu)
    launch = bind(render(spec, fitting_config(variant, spec, gpu))).launch
    inputs, scaling = make_inputs(spec, 500, device="cuda")
    plain, captured = make_outputs(spec, 500, "cuda"), make_outputs(spec, 500, "cuda")
    launch(*inputs.values(), *plain.values(), scaling)
    graph = capture([functools.partial(launch, *inputs.values(), *captured.values(), scaling)])
    for output in captured.values():
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(plain[name], output) for name, output in captured.items())


@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"),
    [(2706, 1152, 24), (1, 1, 1), (37, 53, 7), (4304, 1152, 100), (1040, 2304, 1024), (96, 4096, 384)],
)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", sorted(OPS))
def test_load_kernel_is_right_for_odd_shapes(
    op: str, adapter: torch.dtype, d_out: int, d_in: int, rank: int, gpu: Gpu
) -> None:
    dtype = stored_as("int8", "bf16") if OPS[op].only_formats else torch.bfloat16
    kernel = doratune.load_kernel(op, d_out=d_out, d_in=d_in, rank=rank, tokens=33, dtype=dtype, adapter_dtype=adapter)
    inputs, scaling = make_inputs(kernel.spec, 33, device="cuda")
    result = kernel(*inputs.values(), **({"scaling": scaling} if kernel.spec.contract.scaling else {}))
    results = result if isinstance(result, tuple) else (result,)
    outputs = {
        operand.name: value
        for operand, value in zip(kernel.spec.contract.outputs_of(kernel.spec), results, strict=True)
    }
    assert worst_error(kernel.spec, outputs, definition(kernel.spec, inputs, scaling))[1] is None


def test_y_may_be_written_over_base_and_leading_dimensions_stay(gpu: Gpu) -> None:
    kernel = doratune.load_kernel("lora_compose", d_out=1024, d_in=64, rank=64, tokens=600)
    inputs, scaling = make_inputs(kernel.spec, 600, device="cuda")
    expected = kernel(*inputs.values(), scaling=scaling)
    shaped = {name: t.view(2, 300, -1) if name in ("base", "h") else t for name, t in inputs.items()}
    result = kernel(**shaped, scaling=scaling, out=shaped["base"])
    assert isinstance(result, torch.Tensor)
    assert result.data_ptr() == inputs["base"].data_ptr()
    assert result.shape == (2, 300, 1024)
    assert torch.equal(result.view(600, 1024), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", [8, 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    ("variant", "adapter"),
    [
        pytest.param(v, adapter, id=f"{IDS[v]}-{adapter}")
        for v in VARIANTS
        if not OPS[v.op].only_formats  # codes lie as their package has written them
        for adapter in (("bf16", "fp32") if "adapter" in OPS[v.op].dtypes else ("bf16",))
    ],
)
def test_rows_may_lie_apart(variant: Variant, adapter: str, padding: int, gpu: Gpu) -> None:
    """Slices of wider matrices, also where tensor descriptors need a copy; what lies between the rows stays."""
    spec = spec_of(variant.op, "bf16", adapter, gpu)
    if spec.layers:
        pytest.skip("its layers are contiguous: another one is left to a kernel of its own")
    kernel = Kernel(spec, find_device("cuda"), source=render(spec, fitting_config(variant, spec, gpu)))
    plain, scaling = make_inputs(spec, 300, device="cuda")

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2:
            return tensor
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 2 * padding), float("nan")).to(tensor)
        wide[:, padding:-padding] = tensor
        return wide[:, padding:-padding]

    outputs = {name: apart(tensor) for name, tensor in make_outputs(spec, 300, "cuda").items()}
    inputs = [apart(tensor) for tensor in plain.values()]
    kernel.launch(inputs, tuple(outputs.values()), scaling if spec.contract.scaling else None)
    assert worst_error(spec, outputs, definition(spec, plain, scaling))[1] is None
    for tensor in (*inputs, *outputs.values()):
        wide = tensor._base
        assert wide is None or bool(wide[:, :padding].isnan().all() & wide[:, -padding:].isnan().all())


def test_a_row_stride_may_reach_beyond_two_to_the_31_elements(gpu: Gpu) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    spec = spec_of("compose_forward", "bf16", "bf16", gpu, d_out=1024, tokens=16)
    memory = torch.empty(5 * 2**30, device="cuda", dtype=torch.bfloat16)
    inputs, scaling = make_inputs(spec, 5, device="cuda")
    base = memory.as_strided((5, 1024), (2**30, 1)).copy_(inputs["base"])
    y = memory.as_strided((5, 1024), (2**30, 1), 4096)
    kernel = doratune.load_kernel("compose_forward", d_out=1024, d_in=64, rank=64, tokens=5)
    kernel(base, inputs["lora"], inputs["g"], scaling=scaling, out=y)
    assert torch.equal(y, kernel(**inputs, scaling=scaling))  # type: ignore[arg-type]


def test_memory_that_is_not_16_byte_aligned_is_right() -> None:
    kernel = doratune.load_kernel("compose_forward", d_out=1024, d_in=64, rank=64, tokens=64)
    inputs, scaling = make_inputs(kernel.spec, 64, device="cuda")
    buffer = torch.empty(64 * 1024 + 1, dtype=torch.bfloat16, device="cuda")
    shifted = buffer[1:].view(64, 1024).copy_(inputs["base"])
    assert shifted.data_ptr() % 16
    result = kernel(shifted, inputs["lora"], inputs["g"], scaling=scaling)
    assert torch.equal(result, kernel(**inputs, scaling=scaling))  # type: ignore[arg-type]


def test_more_than_two_to_the_31_elements_are_right() -> None:
    tokens, d_out = 530_000, 4096
    assert tokens * d_out > 2**31
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    g = torch.rand(d_out, device="cuda")
    base = torch.randn(tokens, d_out, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device="cuda")
    kept = base[rows].clone()
    for op in ("compose_forward", "lora_compose", "compose_backward"):
        base[rows] = kept
        kernel = doratune.load_kernel(op, d_out=d_out, d_in=64, rank=16, tokens=tokens)
        inputs, scaling = make_inputs(kernel.spec, 1, case="random", device="cuda")
        if op == "lora_compose":
            h = torch.randn(tokens, 16, device="cuda", dtype=torch.bfloat16)
            given = {"base": base, "h": h, "lora_B": inputs["lora_B"], "g": g}
            few = {**given, "base": kept, "h": h[rows]}
        else:
            names = ("base", "lora") if op == "compose_forward" else ("dy", "inner")
            given = {names[0]: base, names[1]: base, "g": g}
            few = {names[0]: kept, names[1]: kept, "g": g}
        result = kernel(**given, out=base, **({"scaling": scaling} if kernel.spec.contract.scaling else {}))
        first = result[0] if isinstance(result, tuple) else result
        exact = definition(kernel.spec, few, scaling)
        name = kernel.spec.contract.outputs[0].name
        assert worst_error(kernel.spec, {name: first[rows]}, {name: exact[name]})[1] is None, op


def test_a_graph_of_nothing_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="started nothing"):
        capture([lambda: None])
