"""The operations of the contract on plain tensors, each also a PyTorch operator ``doratune::…``.

Called eagerly, a function runs the kernel of :mod:`.kernels` or the reference. While ``torch.compile`` traces, the same
call puts the operator into the graph, without a graph break. The functions neither check their arguments nor record
gradients; the callers (:mod:`.autograd`, :mod:`.norm`) do. An operator returns new tensors, in a list if their number
depends on a flag. Operators are defined with ``torch.library.Library``, which costs less per call than ``custom_op``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import UsageError, near_names
from ..runtime.kernel import Kernel
from . import kernels
from .kernels import flags_of, run_reference, run_reference_on, spec_for, token_bucket, wide_dtype

F = TypeVar("F", bound=Callable[..., Any])

_DORATUNE = torch.library.Library("doratune", "DEF")


def _operator(fake: Callable[..., Any]) -> Callable[[F], F]:
    """Define the operator ``doratune::<name of the function>``; ``fake`` returns its outputs without values."""

    def define(function: F) -> F:
        name = function.__name__
        _DORATUNE.define(name + torch.library.infer_schema(function, mutates_args=()))
        _DORATUNE.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"doratune::{name}", fake, lib=_DORATUNE)
        operator = getattr(torch.ops.doratune, name)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return operator(*arguments, **named)
            return function(*arguments, **named)

        return call  # type: ignore[return-value]

    return define


def _like_norm(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [weight.new_empty(weight.shape[0], dtype=wide_dtype(weight)) for _ in range(count)]


@_operator(lambda weight, *_: _like_norm(weight, 1)[0])
def row_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, weight_sq: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return the row norms ``||W + sBA||``, [d_out] fp32 (fp64 from fp64); op ``weight_norm``.

    weight [d_out, d_in], lora_A [r, d_in], lora_B [d_out, r]; A and B in W's dtype or fp32. ``weight_sq`` is
    ``rowsum(W*W)`` [d_out] fp32 if known. Rows whose terms nearly cancel are computed from the entries of W + sBA.
    """
    return _row_norm(weight, lora_A, lora_B, weight_sq, None, scaling)[0]


@_operator(lambda weight, *_: tuple(_like_norm(weight, 2)))
def row_norm_and_gain(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    magnitude: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w of :func:`row_norm` and ``g = m / max(w, eps)``, both [d_out] fp32 (fp64 from fp64)."""
    norm, g = _row_norm(weight, lora_A, lora_B, weight_sq, magnitude, scaling)
    assert g is not None
    return norm, g


def _row_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight_sq: torch.Tensor | None,
    magnitude: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """w and, with a magnitude, g: computes the factored norm, then recomputes the rows where it has lost digits."""
    d_out, d_in = weight.shape
    inputs = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if weight_sq is not None:
        inputs["weight_sq"] = weight_sq
    flags = flags_of(save=weight_sq is None)
    sizes = (d_out, d_in, lora_A.shape[0], 1, weight.dtype, lora_A.dtype)
    exact = ("weight_norm_exact", *sizes, (), None if magnitude is None else magnitude.dtype)
    kernel = kernels.kernel_for("weight_norm", *sizes, flags, None, weight.device)
    if kernel is None:
        results = run_reference(spec_for("weight_norm", *sizes, flags, None), inputs, scaling)
        if weight_sq is None:
            weight_sq = results["weight_sq"]
        inputs |= {"weight_sq": weight_sq, "norm": results["norm"]}
        if magnitude is not None:
            inputs["magnitude"] = magnitude
        results = run_reference(spec_for(*exact), inputs, scaling)
        return results["norm_exact"], results.get("g")
    if weight.stride(1) != 1:
        weight = weight.contiguous()  # here, because each of the two kernels would copy it
    norm = torch.empty(d_out, dtype=torch.float32, device=weight.device)
    if weight_sq is None:
        weight_sq = torch.empty_like(norm)
        kernel.launch((weight, lora_A, lora_B), (norm, weight_sq), scaling)
    else:
        kernel.launch((weight, lora_A, lora_B, weight_sq), (norm,), scaling)
    corrects = kernels.kernel_for(*exact, weight.device)
    assert corrects is not None  # of the same device and dtypes
    given = (weight, lora_A, lora_B, weight_sq, norm)
    if magnitude is None:
        corrects.launch(given, (norm,), scaling)
        return norm, None
    g = torch.empty_like(norm)
    corrects.launch((*given, magnitude), (norm, g), scaling)
    return norm, g


@_operator(lambda base, *_: base.new_empty(base.shape))
def lora_compose(
    base: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    delta: bool,
) -> torch.Tensor:
    """Return y = g*(base + s*h@B.T) + b, or with ``delta`` the delta form (g-1)*base + g*s*h@B.T.

    base [T, d_out], h [T, r] and bias [d_out] in one dtype, lora_B [d_out, r] in it or fp32, g [d_out] fp32.
    """
    return _lora_compose(base, h, lora_B, g, bias, scaling, delta=delta)[0]


def lora_compose_(
    base: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    delta: bool,
) -> torch.Tensor:
    """As :func:`lora_compose`, but y may overwrite ``base``, except under a compiler, which plans memory itself."""
    if torch.compiler.is_compiling():
        return lora_compose(base, h, lora_B, g, bias, scaling, delta)
    return _lora_compose(base, h, lora_B, g, bias, scaling, delta=delta, overwrite=True)[0]


def _lora_compose(
    base: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    *,
    delta: bool = False,
    save: bool = False,
    overwrite: bool = False,
) -> list[torch.Tensor]:
    """y, and inner = base + s*h@B.T if ``save``; y is ``base`` if ``overwrite`` and a kernel runs."""
    tokens, d_out = base.shape
    inputs = {"base": base, "h": h, "lora_B": lora_B, "g": g}
    if bias is not None:
        inputs["bias"] = bias
    flags = flags_of(bias=bias is not None, delta=delta, save=save)
    key = ("lora_compose", d_out, 1, h.shape[1], token_bucket(tokens), base.dtype, lora_B.dtype, flags, None)
    kernel = kernels.kernel_for(*key, base.device) if tokens else None
    if kernel is None:
        results = run_reference(spec_for(*key), inputs, scaling)
        return [results["y"], results["inner"]] if save else [results["y"]]
    y = _written(base, overwrite)
    outputs = [y, torch.empty_like(base, memory_format=torch.contiguous_format)] if save else [y]
    kernel.launch(tuple(inputs.values()), outputs, scaling)
    return outputs


def _written(matrix: torch.Tensor, overwrite: bool) -> torch.Tensor:
    """Memory for a result in place of ``matrix``: its own if ``overwrite`` and a kernel can address it."""
    if overwrite and matrix.stride(-1) == 1:
        torch.autograd.graph.increment_version(matrix)  # a launch does not, and autograd must see the write
        return matrix
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


@_operator(
    lambda x, weight, h, lora_B, g, bias, scaling, save: [
        x.new_empty(x.shape[0], weight.shape[0]) for _ in range(1 + save)
    ]
)
def dora_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    save: bool,
) -> list[torch.Tensor]:
    """Return y = g*(x@W.T + s*h@B.T) + b, and inner = x@W.T + s*h@B.T if ``save``.

    If a store says that it is faster, one kernel computes all of it (op ``dora_linear_forward``), without rounding the
    base product. Otherwise this is :func:`lora_compose` of the product. x [T, d_in] and weight [d_out, d_in] in one
    dtype.
    """
    kernel = _fused_kernel(x, weight, lora_B, bias is not None, save)
    if kernel is None:
        return _lora_compose(x @ weight.T, h, lora_B, g, bias, scaling, save=save, overwrite=True)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    outputs = [y, torch.empty_like(y)] if save else [y]
    inputs = (x, weight, h, lora_B, g)
    kernel.launch(inputs if bias is None else (*inputs, bias), outputs, scaling)
    return outputs


def fusion_pays(
    x: torch.Tensor, weight: torch.Tensor, lora_B: torch.Tensor, *, bias: bool = False, save: bool = False
) -> bool:
    """Whether :func:`dora_linear_forward` runs as one kernel on these operands, with no base product in memory."""
    return _fused_kernel(x, weight, lora_B, bias, save) is not None


def _fused_kernel(x: torch.Tensor, weight: torch.Tensor, lora_B: torch.Tensor, bias: bool, save: bool) -> Kernel | None:
    """The kernel of ``dora_linear_forward`` for these operands if a store says that it is faster, else None."""
    tokens, d_in = x.shape
    if not tokens or weight.stride(1) != 1:  # the launch would copy a column-major W in every call
        return None
    d_out, rank = lora_B.shape
    flags = flags_of(bias=bias, save=save)
    key = ("dora_linear_forward", d_out, d_in, rank, token_bucket(tokens), x.dtype, lora_B.dtype, flags, None)
    return kernels.paying_kernel_for(*key, x.device)


@_operator(
    lambda dy, inner, g, bias: [
        dy.new_empty(dy.shape),
        *[dy.new_empty(g.shape, dtype=wide_dtype(dy)) for _ in range(1 + bias)],
    ]
)
def compose_backward(dy: torch.Tensor, inner: torch.Tensor, g: torch.Tensor, bias: bool) -> list[torch.Tensor]:
    """Return dYg = g*dY [T, d_out], dg = sum_t dY*inner [d_out] fp32 and, with ``bias``, db = sum_t dY [d_out] fp32."""
    tokens, d_out = dy.shape
    key = ("compose_backward", d_out, 1, 1, token_bucket(tokens), dy.dtype, dy.dtype, flags_of(bias=bias), None)
    kernel = kernels.kernel_for(*key, dy.device) if tokens else None
    if kernel is None:
        results = run_reference(spec_for(*key), {"dy": dy, "inner": inner, "g": g}, 1.0)
        return [results["dyg"], results["dg"], *([results["dbias"]] if bias else [])]
    dg = torch.empty(d_out, dtype=torch.float32, device=dy.device)
    outputs = [torch.empty_like(dy, memory_format=torch.contiguous_format), dg]
    if bias:
        outputs.append(torch.empty_like(dg))
    kernel.launch((dy, inner, g), outputs)
    return outputs


@_operator(
    lambda dy, h, lora_B, g, dg_base, norm, scaling, adapter, magnitude: (
        lora_B.new_empty(lora_B.shape, dtype=adapter),
        lora_B.new_empty(lora_B.shape[0], dtype=magnitude),
    )
)
def adapter_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    g: torch.Tensor,
    dg_base: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
    adapter: torch.dtype,
    magnitude: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dB = g*s*P [d_out, r] with P = dY.T@h, and dm = (dg_base + s*rowsum(B*P)) / max(w, eps) [d_out].

    dy [T, d_out], h [T, r] and lora_B [d_out, r] in one dtype; ``dg_base`` = sum_t dY*base and norm [d_out] fp32.
    ``adapter`` and ``magnitude`` are the dtypes of dB and dm. The rank-r term of dg needs no pass over [T, d_out] and
    no division by g.
    """
    product = wide_product(dy.T, h)
    d_out, rank = product.shape
    wide = product.dtype
    stored = (
        adapter if adapter in (lora_B.dtype, wide) else wide
    )  # dtypes with a kernel; others are converted at the end
    divided = wide if magnitude is torch.float64 else magnitude
    inputs = {"product": product, "lora_B": lora_B, "g": g, "dg_base": dg_base, "norm": norm}
    key = ("adapter_backward", d_out, 1, rank, 1, lora_B.dtype, stored, (), divided)
    kernel = kernels.kernel_for(*key, dy.device)
    if kernel is None:
        results = run_reference(spec_for(*key), inputs, scaling)
        db, dm = results["dlora_B"], results["dmagnitude"]
    else:
        db = torch.empty(d_out, rank, dtype=stored, device=dy.device)
        dm = torch.empty(d_out, dtype=divided, device=dy.device)
        kernel.launch(tuple(inputs.values()), (db, dm), scaling)
    return (db if db.dtype is adapter else db.to(adapter)), (dm if dm.dtype is magnitude else dm.to(magnitude))


_ACTIVATIONS = {"silu": (), "gelu": ("gelu",), "gelu_tanh": ("gelu_tanh",)}
"""The flags of the activations of a gated MLP, by the names that the operators take."""


@functools.cache
def _gated_flags(bias: bool, activation: str) -> tuple[str, ...]:
    if activation not in _ACTIVATIONS:
        raise UsageError(
            f"activation={activation!r}: a gated MLP's kernels know {', '.join(_ACTIVATIONS)}"
            + near_names(activation, _ACTIVATIONS)
        )
    return flags_of(bias=bias) + _ACTIVATIONS[activation]


@_operator(lambda gate, *_: gate.new_empty(gate.shape))
def compose_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    lora_B_gate: torch.Tensor,
    lora_B_up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    scaling: float,
    activation: str,
) -> torch.Tensor:
    """Return act(yg)*yu [T, N] with yg = g_gate*(gate + s*hg@Bg.T) + bg, and yu likewise; h [T, 2r] is [hg, hu].

    gate, up [T, N], h and the biases (both or neither) in one dtype, B [N, r] in it or fp32, g [N] fp32.
    ``activation`` is ``silu``, ``gelu`` or ``gelu_tanh``. Nothing is rounded before the product.

    Raises:
        UsageError: an unknown activation.
    """
    tokens, d_out = gate.shape
    flags = _gated_flags(bias_gate is not None, activation)
    rank = lora_B_gate.shape[1]
    key = ("compose_swiglu", d_out, 1, rank, token_bucket(tokens), gate.dtype, lora_B_gate.dtype, flags, None)
    kernel = kernels.kernel_for(*key, gate.device) if tokens else None
    inputs = _gated_inputs(gate, up, h, lora_B_gate, lora_B_up, g_gate, g_up, bias_gate, bias_up)
    if kernel is None:
        return run_reference_on(spec_for(*key), inputs, scaling)["out"]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    kernel.launch(inputs, (out,), scaling)
    return out


def _gated_inputs(
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    lora_B_gate: torch.Tensor,
    lora_B_up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The tensors in the order of the contract."""
    return _with_biases((gate, up, h, lora_B_gate, lora_B_up, g_gate, g_up), bias_gate, bias_up)


def _with_biases(
    inputs: tuple[torch.Tensor, ...], bias_gate: torch.Tensor | None, bias_up: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    if bias_gate is None or bias_up is None:
        return inputs
    return (*inputs, bias_gate, bias_up)


def _gated_gradients(gate: torch.Tensor, bias: bool, magnitude: torch.dtype) -> list[torch.Tensor]:
    """The results of a gated MLP's backward pass without their values."""
    matrices = [gate.new_empty(gate.shape) for _ in range(2)]
    dm = [gate.new_empty(gate.shape[1], dtype=magnitude) for _ in range(2)]
    return [*matrices, *dm, *[gate.new_empty(gate.shape[1], dtype=wide_dtype(gate)) for _ in range(2 * bias)]]


@_operator(lambda _, gate, *rest: _gated_gradients(gate, rest[8] is not None, rest[-1]))
def compose_swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    lora_B_gate: torch.Tensor,
    lora_B_up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    norm_gate: torch.Tensor,
    norm_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    scaling: float,
    activation: str,
    magnitude: torch.dtype,
) -> list[torch.Tensor]:
    """Return dyg_gate, dyg_up [T, N], dm_gate, dm_up [N] and, with biases, dbias_gate, dbias_up [N] fp32.

    From dout [T, N] and the inputs of :func:`compose_swiglu`: dYg = dout*yu*act'(yg), dYu = dout*act(yg); dyg = g*dY,
    dm = sum_t dY*(base + s*h@B.T) / max(w, eps) in the dtype ``magnitude``, dbias = sum_t dY. norm [N] is w, fp32.

    Raises:
        UsageError: an unknown activation.
    """
    return _compose_swiglu_backward(
        dout, gate, up, h, lora_B_gate, lora_B_up, g_gate, g_up, norm_gate, norm_up, bias_gate, bias_up, scaling,
        activation, magnitude, overwrite=False,
    )  # fmt: skip


def compose_swiglu_backward_(*arguments: Any) -> list[torch.Tensor]:
    """As :func:`compose_swiglu_backward`, but dyg_gate and dyg_up may overwrite ``gate`` and ``up``, except under a
    compiler."""
    if torch.compiler.is_compiling():
        return compose_swiglu_backward(*arguments)
    return _compose_swiglu_backward(*arguments, overwrite=True)


def _compose_swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor,
    lora_B_gate: torch.Tensor,
    lora_B_up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    norm_gate: torch.Tensor,
    norm_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    scaling: float,
    activation: str,
    magnitude: torch.dtype,
    *,
    overwrite: bool,
) -> list[torch.Tensor]:
    tokens, d_out = gate.shape
    flags = _gated_flags(bias_gate is not None, activation)
    rank, adapter = lora_B_gate.shape[1], lora_B_gate.dtype
    stored = wide_dtype(gate) if magnitude is torch.float64 else magnitude
    key = ("compose_swiglu_backward", d_out, 1, rank, token_bucket(tokens), gate.dtype, adapter, flags, stored)
    inputs = (dout, *_gated_inputs(gate, up, h, lora_B_gate, lora_B_up, g_gate, g_up, bias_gate, bias_up))
    return _gated_backward(key, (*inputs, norm_gate, norm_up), gate, up, scaling, magnitude, overwrite=overwrite)


def _gated_backward(
    key: tuple[Any, ...],
    inputs: tuple[torch.Tensor, ...],
    gate: torch.Tensor,
    up: torch.Tensor,
    scaling: float | None,
    magnitude: torch.dtype,
    *,
    overwrite: bool,
) -> list[torch.Tensor]:
    """The outputs of the kernel of ``key``, of a gated MLP's backward pass; dyg over gate and up if ``overwrite``."""
    tokens, d_out = gate.shape
    kernel = kernels.kernel_for(*key, gate.device) if tokens else None
    if kernel is None:
        outputs = [*run_reference_on(spec_for(*key), inputs, 1.0 if scaling is None else scaling).values()]
    else:
        outputs = [_written(base, overwrite) for base in (gate, up)]
        outputs += [torch.empty(d_out, dtype=key[-1], device=gate.device) for _ in range(2)]
        if "bias" in key[-2]:
            outputs += [torch.empty(d_out, dtype=torch.float32, device=gate.device) for _ in range(2)]
        kernel.launch(inputs, outputs, scaling)
    if outputs[2].dtype is not magnitude:
        outputs[2:4] = [dm.to(magnitude) for dm in outputs[2:4]]
    return outputs


def add_low_rank_(base: torch.Tensor, h: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Add s*h@B.T to ``base`` [..., d_out], with h [..., r] and B [d_out, r] in its dtype, and return it.

    By ``lora_compose`` with gains of one where that has specialised warps: on an H100 it takes 103 us for 4096 tokens,
    14336 columns and r = 384, cuBLAS 137.
    """
    tokens, (d_out, rank) = base.shape[:-1].numel(), lora_B.shape
    kernel = None
    if tokens and rank % 8 == 0:  # or its launch would copy h
        key = ("lora_compose", d_out, 1, rank, token_bucket(tokens), base.dtype, lora_B.dtype, (), None)
        kernel = kernels.kernel_for(*key, base.device)
    if kernel is None or not kernels.specialises_warps(kernel):
        base.view(-1, d_out).addmm_(h.reshape(-1, rank), lora_B.t(), alpha=scaling)
        return base
    kernel.launch((base, h, lora_B, base.new_ones(d_out, dtype=torch.float32)), (base,), scaling)
    return base


@_operator(lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]))
def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return x@W.T + s*h@B.T [T, d_out] of x [T, d_in], W [d_out, d_in], h [T, r] and B [d_out, r] in one dtype.

    The first product is rounded before the second is added, in its memory. (As plain products a compiler would copy the
    first one for it.)
    """
    return add_low_rank_(torch.nn.functional.linear(x, weight), h, lora_B, scaling)


@_operator(lambda gate, *_: gate.new_empty(gate.shape))
def swiglu_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Return act(yg)*yu [T, N] with yg = g_gate*gate + bg and yu = g_up*up + bu; gate, up [T, N] are base + s*h@B.T.

    The biases (both or neither) have their dtype, g [N] is fp32. ``activation`` as for :func:`compose_swiglu`.

    Raises:
        UsageError: an unknown activation.
    """
    tokens, d_out = gate.shape
    flags = _gated_flags(bias_gate is not None, activation)
    key = ("swiglu_forward", d_out, 1, 1, token_bucket(tokens), gate.dtype, gate.dtype, flags, None)
    kernel = kernels.kernel_for(*key, gate.device) if tokens else None
    inputs = _with_biases((gate, up, g_gate, g_up), bias_gate, bias_up)
    if kernel is None:
        return run_reference_on(spec_for(*key), inputs, 1.0)["out"]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    kernel.launch(inputs, (out,))
    return out


@_operator(lambda _, gate, *rest: _gated_gradients(gate, rest[5] is not None, rest[-1]))
def swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    norm_gate: torch.Tensor,
    norm_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    activation: str,
    magnitude: torch.dtype,
) -> list[torch.Tensor]:
    """As :func:`compose_swiglu_backward`, from dout [T, N] and the inputs of :func:`swiglu_forward`."""
    given = (dout, gate, up, g_gate, g_up, norm_gate, norm_up, bias_gate, bias_up, activation, magnitude)
    return _swiglu_backward(*given, overwrite=False)


def swiglu_backward_(*arguments: Any) -> list[torch.Tensor]:
    """As :func:`swiglu_backward`, but both dyg may overwrite ``gate`` and ``up``, except under a compiler."""
    if torch.compiler.is_compiling():
        return swiglu_backward(*arguments)
    return _swiglu_backward(*arguments, overwrite=True)


def _swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    g_gate: torch.Tensor,
    g_up: torch.Tensor,
    norm_gate: torch.Tensor,
    norm_up: torch.Tensor,
    bias_gate: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    activation: str,
    magnitude: torch.dtype,
    *,
    overwrite: bool,
) -> list[torch.Tensor]:
    tokens, d_out = gate.shape
    flags = _gated_flags(bias_gate is not None, activation)
    stored = wide_dtype(gate) if magnitude is torch.float64 else magnitude
    key = ("swiglu_backward", d_out, 1, 1, token_bucket(tokens), gate.dtype, gate.dtype, flags, stored)
    inputs = (*_with_biases((dout, gate, up, g_gate, g_up), bias_gate, bias_up), norm_gate, norm_up)
    return _gated_backward(key, inputs, gate, up, None, magnitude, overwrite=overwrite)


@_operator(lambda bases, *_: [base.new_empty(base.shape) for base in bases])
def lora_compose_group(
    bases: list[torch.Tensor],
    h: torch.Tensor,
    lora_B: list[torch.Tensor],
    g: list[torch.Tensor],
    biases: list[torch.Tensor],
    scaling: float,
) -> list[torch.Tensor]:
    """Return y_i = g_i*(base_i + s*h_i@B_i.T) + b_i [T, N_i] of two or three projections of one x, from one launch.

    bases [T, N_i], h [T, n*r] = [h_1, h_2, …] and biases (of all, or an empty list) in one dtype, B [N_i, r] in it or
    fp32, g [N_i] fp32.
    """
    first, b = bases[0], lora_B[0]
    tokens, rank = first.shape[0], b.shape[1]
    widths = tuple([base.shape[1] for base in bases])
    flags = ("bias",) if biases else ()
    key = ("lora_compose_group", widths, 1, rank, token_bucket(tokens), first.dtype, b.dtype, flags, None)
    kernel = kernels.kernel_for(*key, first.device) if tokens else None
    inputs = (*bases, h, *lora_B, *g, *biases)
    if kernel is None:
        return [*run_reference_on(spec_for(*key), inputs, scaling).values()]
    outputs = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]
    kernel.launch(inputs, outputs, scaling)
    return outputs


@_operator(
    lambda dys, bases, h, lora_B, g, norms, scaling, magnitude: [
        *[dy.new_empty(dy.shape) for dy in dys],
        *[dy.new_empty(dy.shape[1], dtype=magnitude) for dy in dys],
    ]
)
def compose_backward_group(
    dys: list[torch.Tensor],
    bases: list[torch.Tensor],
    h: torch.Tensor,
    lora_B: list[torch.Tensor],
    g: list[torch.Tensor],
    norms: list[torch.Tensor],
    scaling: float,
    magnitude: torch.dtype,
) -> list[torch.Tensor]:
    """Return dYg_i = g_i*dY_i [T, N_i] of each projection, then dm_i [N_i] of each in the dtype ``magnitude``.

    dm_i = sum_t dY_i*(base_i + s*h_i@B_i.T) / max(w_i, eps): the rank-r product is computed again, so dm needs no other
    launch, and dB_i is s*dYg_i.T@h_i. dys [T, N_i] and norms [N_i] fp32; the others as in :func:`lora_compose_group`.
    """
    return _compose_backward_group(dys, bases, h, lora_B, g, norms, scaling, magnitude, overwrite=False)


def compose_backward_group_(*arguments: Any) -> list[torch.Tensor]:
    """As :func:`compose_backward_group`, but dYg_i may overwrite base_i, except under a compiler."""
    if torch.compiler.is_compiling():
        return compose_backward_group(*arguments)
    return _compose_backward_group(*arguments, overwrite=True)


def _compose_backward_group(
    dys: list[torch.Tensor],
    bases: list[torch.Tensor],
    h: torch.Tensor,
    lora_B: list[torch.Tensor],
    g: list[torch.Tensor],
    norms: list[torch.Tensor],
    scaling: float,
    magnitude: torch.dtype,
    *,
    overwrite: bool,
) -> list[torch.Tensor]:
    first, b, count = bases[0], lora_B[0], len(bases)
    tokens, rank = first.shape[0], b.shape[1]
    widths = tuple([base.shape[1] for base in bases])
    stored = wide_dtype(first) if magnitude is torch.float64 else magnitude
    key = ("compose_backward_group", widths, 1, rank, token_bucket(tokens), first.dtype, b.dtype, (), stored)
    kernel = kernels.kernel_for(*key, first.device) if tokens else None
    inputs = (*dys, *bases, h, *lora_B, *g, *norms)
    if kernel is None:
        outputs = [*run_reference_on(spec_for(*key), inputs, scaling).values()]
    else:
        outputs = [_written(base, overwrite) for base in bases]
        outputs += [torch.empty(width, dtype=stored, device=first.device) for width in widths]
        kernel.launch(inputs, outputs, scaling)
    if outputs[-1].dtype is not magnitude:
        outputs[count:] = [dm.to(magnitude) for dm in outputs[count:]]
    return outputs


@_operator(lambda left, right: left.new_empty(left.shape[0], right.shape[1], dtype=wide_dtype(left)))
def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in fp32 (fp64 from fp64), without rounding the sums to 16 bits where PyTorch allows that."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float() if left.device.type == "cpu" else (left @ right).float()


@_operator(lambda left, right, *_: left.new_empty(left.shape[0], right.shape[1]))
def sum_of_products(left: torch.Tensor, right: torch.Tensor, low: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return ``left@right + low@down``, [T, n] in the factors' dtype: the second product accumulates into the first.

    It is an operator because a compiler would copy the first product before adding to it.
    """
    return (left @ right).addmm_(low, down)
