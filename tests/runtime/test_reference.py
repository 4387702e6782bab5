"""The eager reference meets the accuracy bounds of kernels, in every form and dtype and on inputs where each term
dominates, and computes the norm without a second matrix of W's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doratune.codegen.ops import OPS, SMALLEST_GAIN
from doratune.codegen.spec import KernelSpec
from doratune.codegen.weight_formats import NF4_TABLE
from doratune.runtime.reference import TORCH_DTYPES, definition, reference
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import CASES, make_inputs

from ..specs import dtype_for

TOKENS = 37


def spec_of(op: str, dtype: str, **values: object) -> KernelSpec:
    dims = {"d_out": 80, "d_in": 144, "rank": 24, "tokens": TOKENS}
    adapter = "fp32" if values.get("autocast") else dtype  # only fp32 adapters are rounded
    return KernelSpec.create(op, **{**dims, "dtype": dtype_for(op, dtype), "adapter": adapter, "gpu": "cpu", **values})


def forms(op: str) -> list[dict[str, object]]:
    """The operation plain, with each flag, and with each optional operand."""
    flags: list[dict[str, object]] = [{flag: True} for flag in OPS[op].flags]
    optional: list[dict[str, object]] = [{role: "fp32"} for role in OPS[op].optional_dtypes]
    return [{}, *flags, *optional]


FORMS = [pytest.param(op, form, id=f"{op}-{'-'.join(form) or 'plain'}") for op in OPS for form in forms(op)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("op", "form"), FORMS)
def test_the_reference_is_right_wherever_a_term_dominates(op: str, form: dict[str, object], dtype: str) -> None:
    if "autocast" in form and dtype == "fp32":
        pytest.skip("there is nothing to round")
    spec = spec_of(op, dtype, **form)
    for case in CASES:
        inputs, scaling = make_inputs(spec, TOKENS, case=case)
        _, complaint = worst_error(spec, reference(spec, inputs, scaling), definition(spec, inputs, scaling))
        assert complaint is None, f"{case}: {complaint}"


@pytest.mark.parametrize(
    "op", ["weight_norm", "weight_norm_exact", "weight_norm_group", "lora_compose", "dora_linear_forward"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_adapters_on_16_bit_weights_keep_the_bounds(op: str, dtype: str) -> None:
    spec = spec_of(op, dtype, adapter="fp32")
    for case in CASES:
        inputs, scaling = make_inputs(spec, TOKENS, case=case)
        _, complaint = worst_error(spec, reference(spec, inputs, scaling), definition(spec, inputs, scaling))
        assert complaint is None, f"{case}: {complaint}"


@pytest.mark.parametrize(("op", "form"), FORMS)
def test_the_reference_returns_the_outputs_of_the_contract_in_order(op: str, form: dict[str, object]) -> None:
    spec = spec_of(op, "bf16", **form)
    outputs = reference(spec, *make_inputs(spec, 5))
    assert list(outputs) == [operand.name for operand in spec.contract.outputs_of(spec)]
    for operand in spec.contract.outputs_of(spec):
        assert tuple(outputs[operand.name].shape) == operand.sizes(spec, 5)
        assert outputs[operand.name].dtype == TORCH_DTYPES[operand.dtype_of(spec)]


def dora_by_the_book(spec: KernelSpec, inputs: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """The contracts written again, element by element where that is short, without code of the package."""
    t = {name: tensor.double() for name, tensor in inputs.items()}
    if spec.op == "weight_dequantise":
        codes = [code for byte in inputs["weight"].tolist() for code in (byte >> 4, byte & 15)]
        values = torch.tensor([NF4_TABLE[code] for code in codes], dtype=torch.float32)
        return {"dense": (values * inputs["scales"].repeat_interleave(64)).view(spec.d_out, spec.d_in).double()}
    if spec.op == "weight_norm":
        adapted = t["weight"] + scaling * t["lora_B"] @ t["lora_A"]
        norm = torch.stack([row.dot(row).sqrt() for row in adapted])
        return {"norm": norm, "g": t["magnitude"] / norm}
    if spec.op == "weight_norm_exact":
        norm, rows = t["norm"].clone(), zip(t["weight"], t["lora_B"], strict=True)
        for i, (w, b) in enumerate(rows):
            summands = sum((scaling * b[j]) ** 2 * t["lora_A"][j].dot(t["lora_A"][j]) for j in range(spec.rank))
            if norm[i] ** 2 < 0.5 * (w.dot(w) + summands):
                norm[i] = (w + scaling * b @ t["lora_A"]).square().sum().sqrt()
        return {"norm_exact": norm, "g": t["magnitude"] / norm.clamp_min(1e-12)}
    if spec.op == "weight_norm_group":
        norms = []
        for places in inputs["table"].tolist():
            at = places[0] // (spec.d_out * spec.d_in)
            adapted = t["weight"][at] + scaling * t["lora_B"][at] @ t["lora_A"][at]
            norms.append(torch.stack([row.dot(row).sqrt() for row in adapted]))
        order = [places[3] // spec.d_out for places in inputs["table"].tolist()]
        return {"norm": torch.stack(norms), "g": t["magnitude"][order] / torch.stack(norms)}
    if spec.op == "compose_backward_exact":
        inner = torch.einsum("ti,oi->to", t["x"], t["weight"]) + scaling * torch.einsum(
            "tr,or->to", t["h"], t["lora_B"]
        )
        dg = torch.where(t["g"].abs() < 2.0**-32, (t["dy"] * inner).sum(dim=0), t["dg"])
        return {"dmagnitude": dg / t["norm"].clamp_min(1e-12)} if "norm" in t else {"dg_exact": dg}
    if spec.op == "adapter_backward":
        rows = range(spec.d_out)
        dg = t["dg_base"] + torch.stack([scaling * t["product"][i].dot(t["lora_B"][i]) for i in rows])
        return {
            "dlora_B": torch.stack([t["g"][i] * scaling * t["product"][i] for i in rows]),
            **({"dmagnitude": dg / t["norm"].clamp_min(1e-12)} if "norm" in t else {"dg": dg}),
        }
    if spec.op == "compose_backward":
        tokens = range(t["dy"].shape[0])
        return {
            "dyg": torch.stack([t["g"] * t["dy"][i] for i in tokens]),
            "dg": sum((t["dy"][i] * t["inner"][i] for i in tokens), torch.zeros(spec.d_out).double()),
            "dbias": sum((t["dy"][i] for i in tokens), torch.zeros(spec.d_out).double()),
        }
    if spec.op in ("lora_compose_group", "compose_backward_group"):
        return group_by_the_book(spec, t, scaling)
    if "swiglu" in spec.op:
        return gated_by_the_book(spec, t, scaling)
    lora = t["lora"] if "lora" in t else torch.einsum("tr,or->to", t["h"], t["lora_B"])
    base = t["base"] if "base" in t else torch.einsum("ti,oi->to", t["x"], t["weight"])
    return {"y": t["g"] * (base + scaling * lora) + t["bias"]}


def group_by_the_book(spec: KernelSpec, t: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """Each projection of a group alone, its gradients by PyTorch's autograd."""
    columns, outputs = t["h"].split(spec.rank, dim=1), {}
    for number, h in enumerate(columns, 1):
        base, b = t[f"base_{number}"].requires_grad_(), t[f"lora_B_{number}"]
        g = t[f"g_{number}"].requires_grad_()
        y = g * (base + scaling * torch.einsum("tr,or->to", h, b))
        if spec.op == "lora_compose_group":
            outputs[f"y_{number}"] = (y + t[f"bias_{number}"]).detach()
            continue
        outputs[f"dyg_{number}"], dg = torch.autograd.grad(y, [base, g], t[f"dy_{number}"])
        norm = t.get(f"norm_{number}")
        outputs |= {f"dg_{number}": dg} if norm is None else {f"dmagnitude_{number}": dg / norm.clamp_min(1e-12)}
    return outputs


@pytest.mark.parametrize("op", ["lora_compose_group", "compose_backward_group"])
@pytest.mark.parametrize("widths", [(80, 48, 0), (48, 80, 16), (16, 16, 16)])
def test_the_projections_of_a_group_have_their_own_widths(op: str, widths: tuple[int, int, int]) -> None:
    values = {name: width for name, width in zip(("d_out", "d_out_2", "d_out_3"), widths, strict=True) if width}
    spec = spec_of(op, "fp32", bias="bias" in OPS[op].flags, **values)
    assert spec.widths == tuple(filter(None, widths))
    inputs, scaling = make_inputs(spec, 7)
    exact, by_the_book = (
        definition(spec, inputs, scaling),
        group_by_the_book(spec, {name: tensor.double() for name, tensor in inputs.items()}, scaling),
    )
    assert exact.keys() == by_the_book.keys()
    for name, value in by_the_book.items():
        assert exact[name].shape[-1] == widths[int(name[-1]) - 1]
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12)


def gated_by_the_book(spec: KernelSpec, t: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """A gated MLP's activation by formulas of textbooks, and its gradients by PyTorch's autograd."""
    inner = {n: t[n] for n in ("gate", "up")}
    if spec.op.startswith("compose_"):
        for n, h in zip(inner, t["h"].split(spec.rank, dim=1), strict=True):
            inner[n] = inner[n] + scaling * torch.einsum("tr,or->to", h, t[f"lora_B_{n}"])
    y = {n: (t[f"g_{n}"] * inner[n] + t[f"bias_{n}"]).requires_grad_() for n in inner}
    x = y["gate"]
    if spec.gelu:
        act = x * torch.distributions.Normal(0.0, 1.0).cdf(x)
    elif spec.gelu_tanh:
        act = 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        act = x / (1.0 + torch.exp(-x))
    out = act * y["up"]
    if not spec.op.endswith("_backward"):
        return {"out": out.detach()}
    dy = dict(zip(inner, torch.autograd.grad(out, [*y.values()], t["dout"]), strict=True))
    dg = {n: (dy[n] * inner[n]).sum(dim=0) for n in dy}
    norms = {n: t[f"norm_{n}"].clamp_min(1e-12) for n in dy if f"norm_{n}" in t}
    return {
        **{f"dyg_{n}": t[f"g_{n}"] * dy[n] for n in dy},
        **({f"dmagnitude_{n}": dg[n] / norms[n] for n in dy} if norms else {f"dg_{n}": dg[n] for n in dy}),
        **{f"dbias_{n}": dy[n].sum(dim=0) for n in dy},
    }


@pytest.mark.parametrize("op", [op for op in OPS if "swiglu" in op])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_definition_of_a_gated_mlp_matches_each_activation(op: str, activation: str) -> None:
    spec = spec_of(op, "fp32", bias=True, **{activation: True})
    inputs, scaling = make_inputs(spec, 7, case="random")
    exact = definition(spec, inputs, scaling)
    for name, value in dora_by_the_book(spec, inputs, scaling).items():
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("op", "magnitude"),
    [
        *((op, "fp32") for op in OPS),
        ("compose_backward_exact", None),
        ("adapter_backward", None),
        ("compose_swiglu_backward", None),
        ("compose_backward_group", None),
    ],
    ids=lambda value: str(value),
)
def test_the_definition_matches_the_contract(op: str, magnitude: str | None) -> None:
    spec = spec_of(op, "fp32", magnitude=magnitude, bias="bias" in OPS[op].flags)
    inputs, scaling = make_inputs(spec, 7, case="mixed" if op.endswith("_exact") else "random")
    exact, by_the_book = definition(spec, inputs, scaling), dora_by_the_book(spec, inputs, scaling)
    assert exact.keys() == by_the_book.keys()
    for name, value in by_the_book.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "op", ["weight_norm", "weight_norm_exact", "weight_norm_group", "lora_compose", "compose_backward_exact"]
)
def test_autocast_means_adapters_rounded_first(op: str) -> None:
    rounded, plain = spec_of(op, "bf16", autocast=True), spec_of(op, "bf16")
    inputs, scaling = make_inputs(rounded, 7)
    assert inputs["lora_B"].dtype == torch.float32
    narrow = {n: t.bfloat16() if n in ("lora_A", "lora_B") else t for n, t in inputs.items()}
    for compute in (reference, definition):
        for name, value in compute(plain, narrow, scaling).items():
            assert torch.equal(compute(rounded, inputs, scaling)[name], value)
    exact = definition(spec_of(op, "bf16", adapter="fp32"), inputs, scaling)
    assert all(not torch.equal(exact[name], value) for name, value in definition(rounded, inputs, scaling).items())


@pytest.mark.parametrize("op", ["lora_compose", "compose_forward"])
def test_the_delta_form_added_to_the_base_output_is_the_full_form(op: str) -> None:
    delta, full = spec_of(op, "fp32", delta=True), spec_of(op, "fp32")
    inputs, scaling = make_inputs(full, 7, case="random")
    added = inputs["base"].double() + definition(delta, inputs, scaling)["y"]
    torch.testing.assert_close(added, definition(full, inputs, scaling)["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dg_from_the_output_is_dg_from_inner_and_exact_where_y_cannot_give_it(dtype: str) -> None:
    """The backward of a step that kept y: y/g in most columns, the product again where g is 0, tiny or NaN."""
    spec, exact = spec_of("compose_backward", dtype, output=True), spec_of("compose_backward_exact", dtype)
    inputs, scaling = make_inputs(exact, 64, case="random")
    inputs["g"][[0, 5, 7]] = torch.tensor([0.0, SMALLEST_GAIN[dtype] / 2, float("nan")])
    inputs["g"][6] = SMALLEST_GAIN[dtype]
    inner = inputs["x"].double() @ inputs["weight"].double().T
    inner += scaling * inputs["h"].double() @ inputs["lora_B"].double().T
    y = (inputs["g"] * inner).to(TORCH_DTYPES[dtype])
    first = reference(spec, {"dy": inputs["dy"], "y": y, "g": inputs["g"]})["dg"]
    assert first[[0, 5, 7]].tolist() == [0.0, 0.0, 0.0]
    dg = reference(exact, {**inputs, "dg": first}, scaling)["dg_exact"]
    wanted = (inputs["dy"].double() * inner).sum(dim=0)
    rounding = {"bf16": 2e-3, "fp16": 2e-3, "fp32": 1e-6}[dtype]
    assert (dg - wanted).norm() / wanted.norm() < rounding
    assert (dg - wanted)[[0, 5, 7]].norm() / wanted[[0, 5, 7]].norm() < 1e-6
    assert dg[6] == pytest.approx(float(wanted[6]), rel=0.05, abs=rounding * float(wanted.norm()))


def test_a_zero_row_has_norm_zero_and_a_finite_gain() -> None:
    spec = spec_of("weight_norm", "bf16", magnitude="fp32")
    inputs, scaling = make_inputs(spec, 1, case="random")
    for name in ("weight", "lora_B", "weight_sq"):
        inputs[name][3] = 0.0
    outputs = reference(spec, inputs, scaling)
    assert outputs["norm"][3] == 0.0
    assert outputs["g"].isfinite().all()


class Shapes(TorchDispatchMode):
    """Records the size of every tensor that is allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:  # not a view
                self.sizes.append((tensor.numel(), str(func)))
        return result


def largest_made(run: Callable[[], object]) -> tuple[int, str]:
    shapes = Shapes()
    with shapes:
        run()
    return max(shapes.sizes)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", [{}, {"save": True}, {"magnitude": "fp32"}], ids=["given", "save", "magnitude"])
def test_the_norm_holds_no_second_matrix_of_the_size_of_w(
    dtype: str, form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doratune.runtime.reference._WIDENED_ELEMENTS", 1 << 12)
    spec = spec_of("weight_norm", dtype, d_out=512, d_in=256, rank=8, **form)
    inputs, scaling = make_inputs(spec, 1)
    size, what = largest_made(lambda: reference(spec, inputs, scaling))
    factors = max(spec.d_out * spec.rank, spec.rank * spec.d_in, spec.rank**2)
    assert size <= max(1 << 12, factors), f"{what} made {size} elements, W has {spec.d_out * spec.d_in}"


def test_the_recorder_sees_a_dense_product() -> None:
    a, b = torch.randn(8, 256), torch.randn(512, 8)
    assert largest_made(lambda: (b @ a).norm(dim=1))[0] == 512 * 256


@pytest.mark.parametrize("form", [{}, {"save": True}], ids=["given", "save"])
def test_the_norm_does_not_depend_on_its_blocks_of_rows(
    form: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("weight_norm", "bf16", d_out=83, **form)
    inputs, scaling = make_inputs(spec, 1)
    exact = definition(spec, inputs, scaling)
    for elements in (1, 10 * spec.d_in, 1 << 20):
        monkeypatch.setattr("doratune.runtime.reference._WIDENED_ELEMENTS", elements)
        assert worst_error(spec, reference(spec, inputs, scaling), exact)[1] is None, elements


def test_a_wrong_reference_would_be_noticed() -> None:
    spec = spec_of("weight_norm", "bf16")
    inputs, scaling = make_inputs(spec, 1)
    exact = definition(spec, inputs, scaling)
    for wrong in (scaling * 1.02, -scaling, 0.0):
        assert worst_error(spec, reference(spec, inputs, wrong), exact)[1] is not None
