"""The operations in PyTorch: the eager reference, which runs on CPU tensors, and the fp64 definition.

Both take a spec and its inputs by name, and return the outputs by name. The reference accumulates in fp32 and returns
the contract's dtypes. The definition computes the contract's formula in fp64; accuracy is measured against it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from ..codegen.ops import EPS, LEAST_SHARE, SMALLEST_GAIN
from ..codegen.spec import KernelSpec
from .dequantise import StoredWeight

Tensors = Mapping[str, torch.Tensor]

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OPERAND_DTYPES = {**TORCH_DTYPES, "i64": torch.int64, "u8": torch.uint8, "i8": torch.int8}
"""The dtypes of operands: those of specs, that of a table of layers, and those of packed codes."""

_DENSE_ELEMENTS = 1 << 26
"""Elements of W + sBA that the fp64 definition holds at a time."""

_WIDENED_ELEMENTS = 1 << 20
"""Elements of W that the reference holds in fp32 at a time, so that its memory does not grow with W."""


def reference(spec: KernelSpec, inputs: Tensors, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """Compute the outputs of ``spec`` eagerly with fp32 accumulation, in the contract's dtypes."""
    inputs = _autocast(spec, inputs)
    if spec.op == "weight_norm":
        found = _with_weight(spec, inputs, torch.float32)
        results = _corrected_norm(found, scaling) if spec.format else _factored_norm(found, scaling)
    elif spec.op == "weight_norm_exact":
        results = _exact_norm(inputs, scaling, torch.float32)
    elif spec.op == "weight_norm_group":
        results = _each_layer(spec, inputs, functools.partial(_corrected_norm, scaling=scaling), torch.float32)
    else:
        found = _widened(_with_weight(spec, inputs, torch.float32), torch.float32)
        results = _FORMULAS[spec.op](spec, found, scaling)
    return {
        operand.name: results[operand.name].to(OPERAND_DTYPES[operand.dtype_of(spec)])
        for operand in spec.contract.outputs_of(spec)
    }


def definition(spec: KernelSpec, inputs: Tensors, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """Compute the outputs of ``spec`` in fp64 from the contract's formula (for the norm: the rows of W + sBA)."""
    inputs = _autocast(spec, inputs)
    if spec.op == "weight_norm":
        results = _dense_norm(_with_weight(spec, inputs, torch.float64), scaling)
    elif spec.op == "weight_norm_exact":
        results = _exact_norm(inputs, scaling, torch.float64)
    elif spec.op == "weight_norm_group":
        results = _each_layer(spec, inputs, functools.partial(_dense_norm, scaling=scaling), torch.float64)
    else:
        found = _widened(_with_weight(spec, inputs, torch.float64), torch.float64)
        results = _FORMULAS[spec.op](spec, found, scaling)
    return {operand.name: results[operand.name] for operand in spec.contract.outputs_of(spec)}


def _autocast(spec: KernelSpec, inputs: Tensors) -> Tensors:
    """The inputs, with A and B rounded to the dtype of W and x if ``spec.autocast``, as torch.autocast does."""
    if not spec.autocast:
        return inputs
    dtype = TORCH_DTYPES[spec.wide]
    return {name: tensor.to(dtype) if name.startswith("lora_") else tensor for name, tensor in inputs.items()}


def _widened(inputs: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs in ``dtype``, except W: it is converted in parts where it is used."""
    return {name: tensor if name == "weight" else tensor.to(dtype) for name, tensor in inputs.items()}


def _with_weight(spec: KernelSpec, inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The inputs, with a W in a weight format as one matrix, which is decoded where rows of it are read."""
    if spec.format is None:
        return inputs
    stored = StoredWeight(spec.format, inputs, spec.d_out, spec.d_in, dtype)
    return {**inputs, "weight": stored}  # type: ignore[dict-item]


def _each_layer(
    spec: KernelSpec, inputs: Tensors, norm: Callable[[Tensors], dict[str, torch.Tensor]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The outputs of ``norm`` for each layer of a dense stack, in the order of the table."""
    found: dict[str, list[torch.Tensor]] = {"norm": [], "g": []}
    for places in inputs["table"].tolist():
        layer: dict[str, torch.Tensor] = {}
        for operand, place in zip(spec.contract.inputs_of(spec)[1:], places, strict=True):
            stack = inputs[operand.name]
            layer[operand.name] = stack[place // stack[0].numel()]
        for name, value in norm(_with_weight(spec, layer, dtype)).items():
            if name in found:
                found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _corrected_norm(inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    """The factored norm, with the rows that nearly cancel summed directly."""
    factored = _factored_norm({name: tensor for name, tensor in inputs.items() if name != "magnitude"}, scaling)
    exact = _exact_norm({**inputs, **factored}, scaling, torch.float32)
    return {**exact, "norm": exact["norm_exact"], "weight_sq": factored["weight_sq"]}


def _gain(inputs: Tensors, norm: torch.Tensor) -> dict[str, torch.Tensor]:
    if "magnitude" not in inputs:
        return {}
    return {"g": inputs["magnitude"].to(norm.dtype) / norm.clamp_min(EPS)}


def _factored_norm(inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    weight, lora_a, lora_b = inputs["weight"], inputs["lora_A"].float(), inputs["lora_B"].float()
    half_gram = 0.5 * scaling * (lora_a @ lora_a.T)
    rows = max(1, _WIDENED_ELEMENTS // weight.shape[1])
    dots, squares = [], []
    for part, b in zip(weight.split(rows), lora_b.split(rows), strict=True):
        wide = part.float()
        dots.append((b * (wide @ lora_a.T + b @ half_gram)).sum(dim=1))
        if "weight_sq" not in inputs:
            squares.append((wide * wide).sum(dim=1))
    weight_sq = torch.cat(squares) if squares else inputs["weight_sq"]
    norm = (weight_sq + 2.0 * scaling * torch.cat(dots)).clamp_min(0.0).sqrt()
    return {"norm": norm, "weight_sq": weight_sq, **_gain(inputs, norm)}


def _dense_norm(inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    weight = inputs["weight"]
    every_row = torch.arange(weight.shape[0], device=weight.device)
    norm = _dense_rows(inputs, scaling, every_row, _DENSE_ELEMENTS)
    rows = max(1, _DENSE_ELEMENTS // weight.shape[1])
    squares = torch.cat([part.double().square().sum(dim=1) for part in weight.split(rows)])
    return {"norm": norm, "weight_sq": squares, **_gain(inputs, norm)}


def _dense_rows(inputs: Tensors, scaling: float, rows: torch.Tensor, elements: int) -> torch.Tensor:
    """``||W + sBA||`` of ``rows`` [n] in fp64 from the entries of W + sBA; holds ``elements`` of them at a time."""
    weight, lora_b = inputs["weight"], inputs["lora_B"]
    lora_a = inputs["lora_A"].double()
    norms = [
        (weight[part].double() + scaling * (lora_b[part].double() @ lora_a)).norm(dim=1)
        for part in rows.split(max(1, elements // weight.shape[1]))
    ]
    return torch.cat(norms) if norms else lora_a.new_empty(0)


def _exact_norm(inputs: Tensors, scaling: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    norm = inputs["norm"].to(dtype, copy=True)
    a, b = inputs["lora_A"].to(dtype), inputs["lora_B"].to(dtype)
    [rows] = torch.nonzero(cancels(norm, inputs["weight_sq"], a, b, scaling), as_tuple=True)
    norm[rows] = _dense_rows(inputs, scaling, rows, _WIDENED_ELEMENTS).to(dtype)
    return {"norm_exact": norm, **_gain(inputs, norm)}


def cancels(
    norm: torch.Tensor,
    weight_sq: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    share: float = LEAST_SHARE,
) -> torch.Tensor:
    """Return a mask [d_out] bool of rows where the terms of w**2 nearly cancel, so that the factored w loses digits.

    ``norm`` is w [d_out] and ``weight_sq`` is rowsum(W*W) [d_out]; A [r, d_in] and B [d_out, r] have w's dtype. A row
    cancels if w**2 is below ``share`` times the size of its terms (:data:`~doratune.codegen.ops.LEAST_SHARE`).
    """
    summands = lora_B.square() @ lora_A.square().sum(dim=1)
    return norm.square() < share * (weight_sq + scaling**2 * summands)


def _compose(spec: KernelSpec, inputs: Tensors, lora: torch.Tensor, scaling: float) -> dict[str, torch.Tensor]:
    base, g = inputs["base"], inputs["g"]
    inner = base + scaling * lora
    if spec.delta:
        return {"y": (g - 1.0) * base + g * (scaling * lora), "inner": inner}
    y = g * inner
    return {"y": y + inputs["bias"] if spec.bias else y, "inner": inner}


def _lora_compose(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    return _compose(spec, inputs, inputs["h"] @ inputs["lora_B"].T, scaling)


def _dora_linear_forward(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    x = inputs["x"]
    parts = inputs["weight"].split(max(1, _WIDENED_ELEMENTS // spec.d_in))
    base = torch.cat([x @ part.to(x.dtype).T for part in parts], dim=-1)
    return _compose(spec, {**inputs, "base": base}, inputs["h"] @ inputs["lora_B"].T, scaling)


def _compose_forward(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    return _compose(spec, inputs, inputs["lora"], scaling)


def _compose_backward(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    dy, g = inputs["dy"], inputs["g"]
    tokens = tuple(range(dy.ndim - 1))
    if spec.output:
        divisible = g.abs() >= SMALLEST_GAIN[spec.activation]
        sums = (dy * inputs["y"]).sum(dim=tokens)
        dg = torch.where(divisible, sums / torch.where(divisible, g, 1.0), 0.0)
    else:
        dg = (dy * inputs["inner"]).sum(dim=tokens)
    return {"dyg": g * dy, "dg": dg, "dbias": dy.sum(dim=tokens)}


def _compose_backward_exact(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    dy, dg = inputs["dy"], inputs["dg"].clone()
    [tiny] = torch.nonzero(~(inputs["g"].abs() >= SMALLEST_GAIN[spec.activation]), as_tuple=True)
    for part in tiny.split(max(1, _WIDENED_ELEMENTS // spec.d_in)):
        inner = inputs["x"] @ inputs["weight"][part].to(dg.dtype).T + scaling * (inputs["h"] @ inputs["lora_B"][part].T)
        dg[part] = (dy[..., part] * inner).sum(dim=tuple(range(dy.ndim - 1)))
    return {"dg_exact": dg, **({"dmagnitude": dg / inputs["norm"].clamp_min(EPS)} if "norm" in inputs else {})}


def _adapter_backward(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    product = scaling * inputs["product"]
    dg = inputs["dg_base"] + (inputs["lora_B"] * product).sum(dim=1)
    results = {"dlora_B": inputs["g"][:, None] * product, "dg": dg}
    return results | ({"dmagnitude": dg / inputs["norm"].clamp_min(EPS)} if "norm" in inputs else {})


def _gated(spec: KernelSpec, inputs: Tensors, name: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """inner = base + s*h@B.T, which the operand itself is where there is no h, and y = g*inner + b of ``gate`` or
    ``up``."""
    inner = inputs[name]
    if spec.rank:
        first = 0 if name == "gate" else spec.rank
        inner = inner + scaling * (inputs["h"][..., first : first + spec.rank] @ inputs[f"lora_B_{name}"].T)
    y = inputs[f"g_{name}"] * inner
    return inner, y + inputs[f"bias_{name}"] if spec.bias else y


def _swiglu(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    (_, gate), (_, up) = (_gated(spec, inputs, name, scaling) for name in ("gate", "up"))
    return {"out": _activation(spec, gate) * up}


def _activation(spec: KernelSpec, x: torch.Tensor) -> torch.Tensor:
    if spec.gelu or spec.gelu_tanh:
        return torch.nn.functional.gelu(x, approximate="tanh" if spec.gelu_tanh else "none")
    return torch.nn.functional.silu(x)


def _activation_backward(spec: KernelSpec, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if spec.gelu or spec.gelu_tanh:
        return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh" if spec.gelu_tanh else "none")  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward(gradient, x)  # type: ignore[no-any-return]


def _swiglu_backward(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    dout = inputs["dout"]
    (inner_gate, gate), (inner_up, up) = (_gated(spec, inputs, name, scaling) for name in ("gate", "up"))
    gradients = {
        "gate": (_activation_backward(spec, gate, dout * up), inner_gate),
        "up": (dout * _activation(spec, gate), inner_up),
    }
    tokens = tuple(range(dout.ndim - 1))
    results: dict[str, torch.Tensor] = {}
    for name, (dy, inner) in gradients.items():
        dg = (dy * inner).sum(dim=tokens)
        results |= {f"dyg_{name}": inputs[f"g_{name}"] * dy, f"dg_{name}": dg, f"dbias_{name}": dy.sum(dim=tokens)}
        if spec.magnitude:
            results[f"dmagnitude_{name}"] = dg / inputs[f"norm_{name}"].clamp_min(EPS)
    return results


def _inner_of(spec: KernelSpec, inputs: Tensors, number: int, scaling: float) -> torch.Tensor:
    """base + s*h@B.T of a group's projection, counted from 1."""
    h = inputs["h"][..., (number - 1) * spec.rank : number * spec.rank]
    return inputs[f"base_{number}"] + scaling * (h @ inputs[f"lora_B_{number}"].T)


def _lora_compose_group(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    results = {}
    for number in range(1, spec.members + 1):
        y = inputs[f"g_{number}"] * _inner_of(spec, inputs, number, scaling)
        results[f"y_{number}"] = y + inputs[f"bias_{number}"] if spec.bias else y
    return results


def _compose_backward_group(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    results: dict[str, torch.Tensor] = {}
    for number in range(1, spec.members + 1):
        dy, inner = inputs[f"dy_{number}"], _inner_of(spec, inputs, number, scaling)
        dg = (dy * inner).sum(dim=tuple(range(dy.ndim - 1)))
        results |= {f"dyg_{number}": inputs[f"g_{number}"] * dy, f"dg_{number}": dg}
        if spec.magnitude:
            results[f"dmagnitude_{number}"] = dg / inputs[f"norm_{number}"].clamp_min(EPS)
    return results


def _weight_dequantise(spec: KernelSpec, inputs: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    rows = max(1, _WIDENED_ELEMENTS // spec.d_in)
    return {"dense": torch.cat([*inputs["weight"].split(rows)])}


_FORMULAS = {
    "lora_compose": _lora_compose,
    "compose_forward": _compose_forward,
    "compose_backward": _compose_backward,
    "dora_linear_forward": _dora_linear_forward,
    "compose_backward_exact": _compose_backward_exact,
    "adapter_backward": _adapter_backward,
    "lora_compose_group": _lora_compose_group,
    "compose_backward_group": _compose_backward_group,
    "compose_swiglu": _swiglu,
    "compose_swiglu_backward": _swiglu_backward,
    "swiglu_forward": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "weight_dequantise": _weight_dequantise,
}
