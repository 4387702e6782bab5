"""Inputs on which each term of an operation dominates somewhere, so that a wrong term cannot hide.

On plain random data a ``weight_norm`` whose cross term is entirely wrong is off by under 1.5 %: every case below makes
one term, sign or size matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..codegen.ops import SMALLEST_GAIN
from ..codegen.spec import KernelSpec
from ..runtime.dequantise import StoredWeight
from ..runtime.reference import OPERAND_DTYPES, TORCH_DTYPES, cancels, definition
from .quantise import quantise

CASES = (
    "random",
    "cross_term",
    "zero_weight",
    "large_lora",
    "negative_scaling",
    "zero_scaling",
    "zero_gain",
    "zero_rows",
    "large_activations",
    "mixed",
)
"""The cases of :func:`make_inputs`; ``mixed`` has a band of rows or columns for each of the others that can share s."""

FEW_VALUES = 512
"""In tensors with fewer values all terms are positive: of so few sums some would nearly cancel, and no fp32 kernel gets
their last digits right."""

_SCALING = {"negative_scaling": -0.7, "zero_scaling": 0.0}
_SCALING_SIGN = {"negative_scaling": -1.0}


def make_inputs(
    spec: KernelSpec, tokens: int, *, case: str = "mixed", seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], float]:
    """Draw the inputs of ``spec`` with ``tokens`` tokens or layers for one of :data:`CASES`, and the scaling.

    Layers are dense stacks. Returns the tensors by name, in the contract's shapes and dtypes, and s.
    """
    if case not in CASES:
        raise ValueError(f"unknown case {case!r}; known: {', '.join(CASES)}")
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    scaling = _SCALING.get(case, 0.75)
    if spec.op == "weight_norm_group":
        return _layers(spec, tokens, case, normal, scaling), scaling
    make = _MAKERS.get(spec.op, _token_inputs)
    values = make(spec, tokens, case, normal)
    if (
        spec.op == "weight_norm_exact" and case != "random"
    ):  # random inputs are those that are timed: there nothing cancels
        _cancel_rows(values, scaling)
    values = _stored(spec, values)
    inputs = {
        operand.name: values[operand.name].to(OPERAND_DTYPES[operand.dtype_of(spec)])
        for operand in spec.contract.inputs_of(spec)
    }
    if "weight_sq" in inputs:  # of W as the kernel sees it, after rounding
        inputs["weight_sq"] = _row_squares(_weight_of(spec, inputs))
    if spec.op == "weight_norm_exact":
        inputs["norm"] = _marked_norm(spec, inputs, scaling)
    return inputs, scaling


def make_outputs(spec: KernelSpec, tokens: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The outputs of ``spec`` by name, filled with NaN so that an unwritten element shows."""
    return {
        operand.name: torch.full(
            operand.sizes(spec, tokens),
            float("nan"),
            dtype=OPERAND_DTYPES[operand.dtype_of(spec)],
            device=device,
        )
        for operand in spec.contract.outputs_of(spec)
    }


def _layers(
    spec: KernelSpec, layers: int, case: str, normal: Callable[..., torch.Tensor], scaling: float
) -> dict[str, torch.Tensor]:
    """Stacks of layers, and their table in an order of its own, so that a kernel that ignores the table shows it."""
    operands = spec.contract.inputs_of(spec)[1:]
    stacks = {}
    for operand in operands:
        shape, dtype = [layers, *operand.sizes(spec)[1:]], OPERAND_DTYPES[operand.dtype_of(spec)]
        stacks[operand.name] = torch.empty(shape, dtype=dtype, device=normal(1).device)
    for layer in range(layers):
        values = _norm_inputs(spec, 1, case, normal)
        if case == "mixed" and layer % 2 == 0:
            _cancel_few_rows(values, scaling)
        values = _stored(spec, values)
        for name, stack in stacks.items():
            stack[layer] = values[name].to(stack.dtype)
    order = torch.arange(layers).flip(0)[:, None]
    sizes = torch.tensor([stack[0].numel() for stack in stacks.values()])
    return {"table": (order * sizes).to(stacks["weight"].device), **stacks}


def _cancel_few_rows(values: dict[str, torch.Tensor], scaling: float) -> None:
    """Make W + sBA nearly cancel in the last row, and BA itself in the one before, by two rows of A that are alike."""
    weight, lora_a, lora_b = values["weight"], values["lora_A"], values["lora_B"]
    if lora_a.shape[0] > 1 and weight.shape[0] > 1:
        lora_a[1] = lora_a[0] * 1.01
        lora_b[-2] = 0.0
        lora_b[-2, 0], lora_b[-2, 1] = 1.0, -1.0
        weight[-2] *= 1e-2
    weight[-1] = (-scaling / 0.999) * (lora_b[-1] @ lora_a)


def _stored(spec: KernelSpec, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values, with W packed if the spec has it in a weight format."""
    return values | quantise(spec.format, values["weight"]) if spec.format else values


def _weight_of(spec: KernelSpec, inputs: dict[str, torch.Tensor]) -> torch.Tensor | StoredWeight:
    """W as it is read by rows."""
    if spec.format is None:
        return inputs["weight"]
    return StoredWeight(spec.format, inputs, spec.d_out, spec.d_in, torch.float64)


def _row_squares(weight: torch.Tensor | StoredWeight) -> torch.Tensor:
    rows = max(1, (1 << 26) // weight.shape[1])
    return torch.cat([part.double().square().sum(dim=1) for part in weight.split(rows)]).float()


def _bands(case: str, count: int, names: tuple[str, ...]) -> dict[str, slice]:
    """The slice of ``count`` rows or columns that each named case covers: all for the case itself, a share in mixed."""
    if case != "mixed":
        return {name: slice(0, count if name == case else 0) for name in names}
    step = max(1, count // (len(names) + 1))
    return {name: slice(index * step, (index + 1) * step) for index, name in enumerate(names)}


def _norm_inputs(
    spec: KernelSpec, tokens: int, case: str, normal: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    lora_a = normal(spec.rank, spec.d_in) * spec.d_in**-0.5
    weight = normal(spec.d_out, spec.d_in) * 0.02
    lora_b = normal(spec.d_out, spec.rank) * 0.02
    bands = _bands(case, spec.d_out, ("cross_term", "zero_weight", "large_lora", "zero_rows"))
    if case == "negative_scaling":
        bands["cross_term"] = slice(0, spec.d_out)
    cross = bands["cross_term"]
    # A norm that cancels has no digits left in fp32. So the terms of BA have one sign in a column if there are too few
    # columns to even them out, and with s > 0 each row's cross term is positive (with s < 0 it stays small).
    if spec.d_in < 2 * spec.rank:
        lora_b = lora_b.abs() * torch.where(lora_a[:, 0] < 0.0, -1.0, 1.0)
    lora_b *= torch.where(((weight @ lora_a.T) * lora_b).sum(dim=1, keepdim=True) < 0.0, -1.0, 1.0)
    # Rows of W in the span of A: at s = 0.75 the cross term is 1.5 times nW, as much as it can be against the others.
    weight[cross] = (lora_b[cross] * (10.0 if case == "negative_scaling" else 1.0)) @ lora_a
    weight[bands["zero_weight"]] = 0.0
    lora_b[bands["large_lora"]] *= 1000.0
    zero = bands["zero_rows"]
    weight[zero][::2] = 0.0
    lora_b[zero][::2] = 0.0
    magnitude = weight.norm(dim=1) * (1.0 + 0.1 * normal(spec.d_out))
    vectors = dict.fromkeys(("weight_sq", "norm", "magnitude"), magnitude)
    return {"weight": weight, "lora_A": lora_a, "lora_B": lora_b, **vectors}


def _weight_inputs(
    spec: KernelSpec, tokens: int, case: str, normal: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """W alone, with bands of rows that are zero, large, or the smaller the further right."""
    weight = normal(spec.d_out, spec.d_in) * 0.02
    bands = _bands(case, spec.d_out, ("zero_weight", "large_activations", "cross_term", "zero_rows"))
    weight[bands["zero_weight"]] = 0.0
    weight[bands["large_activations"]] *= 1e3
    weight[bands["cross_term"]] *= torch.logspace(0, -4, spec.d_in, device=weight.device)
    weight[bands["zero_rows"]][::2] = 0.0
    return {"weight": weight}


def _cancel_rows(values: dict[str, torch.Tensor], scaling: float) -> None:
    """Make W + sBA nearly cancel in a third of the rows, and BA itself in another one, by rows of A that are alike."""
    weight, lora_a, lora_b = values["weight"], values["lora_A"], values["lora_B"]
    lora_a[1::2] = lora_a[: lora_a.shape[0] // 2 * 2 : 2] * 1.01
    lora_b[2::3, 1::2] = -lora_b[2::3, : lora_b.shape[1] // 2 * 2 : 2]
    weight[2::3] *= 1e-2
    weight[1::3] = (-scaling / 0.999) * (lora_b[1::3] @ lora_a)


def _marked_norm(spec: KernelSpec, inputs: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """Wrong norms, so that the result shows what the kernel recomputed: half where it must, 1.25 times elsewhere."""
    seen = TORCH_DTYPES[spec.weight if spec.autocast else spec.adapter]
    lora_a, lora_b = (inputs[name].to(seen).double() for name in ("lora_A", "lora_B"))
    exact = definition(replace(spec, op="weight_norm"), inputs, scaling)["norm"]
    lost = cancels(exact, inputs["weight_sq"], lora_a, lora_b, scaling)
    return torch.where(lost, 0.5 * exact, 1.25 * exact).float()


def _token_inputs(
    spec: KernelSpec, tokens: int, case: str, normal: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    g = 1.0 + 0.1 * normal(spec.d_out).clamp(-1.0, 1.0)
    bands = _bands(case, spec.d_out, ("large_lora", "zero_gain", "zero_weight"))
    zero = bands["zero_gain"]
    g[zero][::2] = 0.0
    g[zero][1::2] *= 1e-6
    size = 1e4 if case == "large_activations" else 1.0
    values = {"g": g, "bias": normal(spec.d_out)}
    for name in ("base", "lora", "inner"):
        values[name] = normal(tokens, spec.d_out).clamp(-1.0, 1.0) * size
    values["dy"] = normal(tokens, spec.d_out)
    values["lora"][:, bands["large_lora"]] *= 100.0
    if spec.rank:
        values["h"] = normal(tokens, spec.rank).clamp(-1.0, 1.0) * size
        values["lora_B"] = normal(spec.d_out, spec.rank) * 0.5 * spec.rank**-0.5
        values["lora_B"][bands["large_lora"]] *= 100.0
    if spec.d_in:
        values["x"] = normal(tokens, spec.d_in).clamp(-1.0, 1.0) * size
        values["weight"] = normal(spec.d_out, spec.d_in) * spec.d_in**-0.5
        values["weight"][bands["zero_weight"]] = 0.0
    if spec.op == "adapter_backward":
        # B and P of one sign in a row: with random ones dg could cancel to nothing.
        sign = torch.where(normal(spec.d_out) < 0.0, -1.0, 1.0)
        values["lora_B"] = values["lora_B"].abs() * sign[:, None]
        values["product"] = normal(spec.d_out, spec.rank).abs()
        values["product"][bands["zero_weight"]] = 0.0
        values["dg_base"] = sign * normal(spec.d_out).abs() * _SCALING_SIGN.get(case, 1.0)
        values["norm"] = 0.5 + normal(spec.d_out).abs()
    if spec.op == "compose_backward_exact":
        if case != "random":  # random inputs are those that are timed: there no column is below
            g[1::3] = 0.0
            g[2::6] = SMALLEST_GAIN[spec.activation] / 2
        values["dg"] = torch.where(g.abs() >= SMALLEST_GAIN[spec.activation], normal(spec.d_out), 0.0)
        values["norm"] = 0.5 + normal(spec.d_out).abs()
    if tokens * spec.d_out < FEW_VALUES:
        values = {name: value.abs() for name, value in values.items()}
    values["y"] = values["g"] * values["inner"]
    return values


def _gated_inputs(
    spec: KernelSpec, tokens: int, case: str, normal: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs of a gated MLP's composition.

    Large activations are of gate in the first half of the columns and of up in the others, so that products of the two
    fit fp16. Those of gate reach both ends of the activation, where exp(-y) is 0 or infinite.
    """
    values = {"dout": normal(tokens, spec.d_out)}
    if spec.rank:
        values["h"] = normal(tokens, 2 * spec.rank).clamp(-1.0, 1.0)
    bands = _bands(case, spec.d_out, ("large_lora", "zero_gain", "zero_weight"))
    half = spec.d_out // 2
    for name, parity in (("gate", 0), ("up", 1)):
        g = 1.0 + 0.1 * normal(spec.d_out).clamp(-1.0, 1.0)
        base = normal(tokens, spec.d_out).clamp(-1.0, 1.0)
        times = 100.0 if name == "gate" else 10.0
        g[bands["zero_gain"]][parity::3] = 0.0
        g[bands["zero_gain"]][2::3] *= 1e-6
        base[:, bands["zero_weight"]] = 0.0
        large = slice(0, 0)
        if case == "large_activations":
            large = slice(0, half) if name == "gate" else slice(half, spec.d_out)
            base[:, large] *= 1e4
        if spec.rank:
            lora_b = normal(spec.d_out, spec.rank) * 0.5 * spec.rank**-0.5
            lora_b[bands["large_lora"]] *= times
            lora_b[large] *= 1e4
            values[f"lora_B_{name}"] = lora_b
        else:  # the rank-r product is in it
            base[:, bands["large_lora"]] *= times
        values |= {name: base, f"g_{name}": g, f"bias_{name}": normal(spec.d_out)}
        values[f"norm_{name}"] = 0.5 + normal(spec.d_out).abs()
    if tokens * spec.d_out < FEW_VALUES:
        values = {name: value.abs() for name, value in values.items()}
    return values


def _group_inputs(
    spec: KernelSpec, tokens: int, case: str, normal: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs of several projections of one x: of each those of its own composition, with columns of h of its own."""
    values: dict[str, torch.Tensor] = {}
    h = []
    for number, width in enumerate(spec.widths, 1):
        own = _token_inputs(replace(spec, d_out=width), tokens, case, normal)
        h.append(own.pop("h"))
        own["norm"] = 0.5 + normal(width).abs()
        values |= {f"{name}_{number}": value for name, value in own.items()}
    return {"h": torch.cat(h, dim=1), **values}


_MAKERS = {
    "weight_norm": _norm_inputs,
    "weight_norm_exact": _norm_inputs,
    "lora_compose_group": _group_inputs,
    "compose_backward_group": _group_inputs,
    "compose_swiglu": _gated_inputs,
    "compose_swiglu_backward": _gated_inputs,
    "swiglu_forward": _gated_inputs,
    "swiglu_backward": _gated_inputs,
    "weight_dequantise": _weight_inputs,
}
