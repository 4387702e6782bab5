"""What people run today in place of each operation: PEFT's formulas, eager and compiled, LoRA, cuBLAS, dorafactors.

Every peer takes the inputs of doratune's kernel. One that computes the whole operation also says how to read its result
as the operation's outputs, so that it is compared with fp64 too: what computes something else is no peer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..codegen.spec import KernelSpec
from ..runtime.kernel import Kernel
from ..runtime.reference import TORCH_DTYPES
from ..tuner.fusion import composition_of, product_of, run_unfused
from .dorafactors import Dorafactors
from .measuring import load

Inputs = Mapping[str, torch.Tensor]
Run = Callable[[Inputs, Inputs], Any]
"""Runs on a set of inputs and outputs; doratune, ``cublas_compose`` and ``copy`` write the outputs."""

PEERS = (
    "peft_eager",
    "peft_compiled",
    "dense_ba",
    "lora_eager",
    "eager",
    "compiled",
    "dorafactors",
    "cublas_product",
    "cublas_compose",
    "copy",
)
"""The names of all peers; benchmarks/README.md says what each one is."""

Formula = Callable[[Inputs, float], Any]
GatedFormula = Callable[[KernelSpec, Inputs, float], list[torch.Tensor]]
Reading = Callable[[Any, Inputs], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Peer:
    """One implementation beside doratune's.

    ``outputs`` reads its result as outputs of the operation; None for one that does less than the operation.
    ``kernel`` is doratune's kernel that it uses, if any.
    """

    name: str
    run: Run
    outputs: Reading | None = None
    kernel: Kernel | None = None


def peers_of(spec: KernelSpec, scaling: float, dorafactors: Dorafactors | None = None) -> list[Peer]:
    """The peers of the kernel of ``spec``; dorafactors and PEFT's own code only if available."""
    if spec.op == "weight_norm":
        return _norm_peers(spec, scaling, dorafactors)
    if spec.op == "compose_backward":
        return _backward_peers(spec, scaling, dorafactors)
    if spec.op in _GATED_AND_GROUPED:
        return _pytorch_peers(spec, scaling, *_GATED_AND_GROUPED[spec.op])
    if spec.op in ("lora_compose", "compose_forward", "dora_linear_forward"):
        return _compose_peers(spec, scaling, dorafactors)
    return []


def _norm_peers(spec: KernelSpec, scaling: float, dorafactors: Dorafactors | None) -> list[Peer]:
    def reads(result: torch.Tensor, _: Inputs) -> dict[str, torch.Tensor]:
        return {"norm": result.float()}

    peers = [
        Peer("peft_compiled", _compiled(spec, peft_norm, scaling), reads),
        Peer("dense_ba", _eager(spec, dense_norm, scaling), reads),
        Peer("cublas_product", lambda inputs, _: _linear(inputs["weight"], _rounded(spec, inputs["lora_A"]))),
    ]
    with contextlib.suppress(ImportError):
        peers.insert(0, Peer("peft_eager", _eager(spec, _pefts_own_norm(), scaling), reads))
    if dorafactors is not None:
        norm = dorafactors.norm

        def run(inputs: Inputs, _: Inputs) -> torch.Tensor:
            return norm(inputs["weight"], inputs["lora_A"], inputs["lora_B"], scaling)

        peers.append(Peer("dorafactors", run, reads))
    return peers


def _compose_peers(spec: KernelSpec, scaling: float, dorafactors: Dorafactors | None) -> list[Peer]:
    def reads(result: torch.Tensor, _: Inputs) -> dict[str, torch.Tensor]:
        return {"y": result}

    peers = [
        Peer("peft_eager", _eager(spec, peft_compose, scaling), reads),
        Peer("peft_compiled", _compiled(spec, peft_compose, scaling), reads),
    ]
    if dorafactors is not None:
        compose = dorafactors.compose

        def run(inputs: Inputs, _: Inputs) -> torch.Tensor:
            with _autocast(spec, inputs["g"].device):
                lora, base = _lora(inputs), _base(inputs)
            return compose(base, lora, inputs["g"], scaling, inplace="lora" not in inputs)

        peers.append(Peer("dorafactors", run, reads))
    if spec.op == "compose_forward":
        return [*peers, Peer("copy", copies)]
    peers.append(Peer("lora_eager", _eager(spec, plain_lora, scaling)))
    left, right = ("h", "lora_B") if spec.op == "lora_compose" else ("x", "weight")
    peers.append(Peer("cublas_product", lambda inputs, _: _linear(inputs[left], _rounded(spec, inputs[right]))))
    composition = composition_of(spec)
    return peers if composition is None else [*peers, _unfused_peer(spec, composition, scaling)]


def _unfused_peer(spec: KernelSpec, composition: KernelSpec, scaling: float) -> Peer:
    """What ``dora_linear_forward`` fuses: cuBLAS's product, then doratune's kernel of ``composition`` over it."""
    kernel = load(composition)

    def launch(*arguments: Any) -> None:
        *inputs, y, scaling = arguments
        kernel(*inputs, scaling=scaling, out=y)

    def run(inputs: Inputs, outputs: Inputs) -> torch.Tensor:
        run_unfused(composition, launch, product_of(spec, inputs), inputs, outputs, scaling)
        return outputs["y"]

    return Peer("cublas_compose", run, lambda y, _: {"y": y}, kernel)


def _backward_peers(spec: KernelSpec, scaling: float, dorafactors: Dorafactors | None) -> list[Peer]:
    def reads(result: tuple[torch.Tensor, torch.Tensor], _: Inputs) -> dict[str, torch.Tensor]:
        return {"dyg": result[0], "dg": result[1].float()}

    peers = [
        Peer("eager", _eager(spec, eager_backward, scaling), reads),
        Peer("compiled", _compiled(spec, eager_backward, scaling), reads),
    ]
    if dorafactors is not None:
        backward = dorafactors.compose_backward

        def run(inputs: Inputs, _: Inputs) -> tuple[torch.Tensor, ...]:
            return backward(inputs["dy"], _saved(inputs), inputs["g"], scaling)

        def reads_parts(result: tuple[torch.Tensor, ...], inputs: Inputs) -> dict[str, torch.Tensor]:
            dg = result[2].float().view(-1)
            return {"dyg": inputs["dy"] + result[1], "dg": dg if "inner" in inputs else dg / inputs["g"]}

        peers.append(Peer("dorafactors", run, reads_parts))
    return [*peers, Peer("copy", copies)]


def _pytorch_peers(spec: KernelSpec, scaling: float, formula: GatedFormula, names: tuple[str, ...]) -> list[Peer]:
    """The operation's formula in PyTorch, eager and compiled; ``names`` are its results without a group's numbers."""

    def run(inputs: Inputs, scaling: float) -> list[torch.Tensor]:
        return formula(spec, inputs, scaling)

    def reads(result: list[torch.Tensor], _: Inputs) -> dict[str, torch.Tensor]:
        outputs = [operand.name for operand in spec.contract.outputs_of(spec)]
        computed = [name for name in outputs if name in names or name.rsplit("_", 1)[0] in names]
        return dict(zip(computed, result, strict=True))

    return [Peer("eager", _eager(spec, run, scaling), reads), Peer("compiled", _compiled(spec, run, scaling), reads)]


def _projected(
    spec: KernelSpec, inputs: Inputs, name: str, index: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """base + s*h@B.T of a projection, in base already where there is no h, and y; ``index`` counts its columns of h."""
    inner = inputs[name if name in inputs else f"base_{name}"]
    if spec.rank:
        h = inputs["h"][:, index * spec.rank : (index + 1) * spec.rank]
        inner = inner + (_linear(h, inputs[f"lora_B_{name}"]) * scaling).to(inner.dtype)
    y = inputs[f"g_{name}"].to(inner.dtype) * inner
    return inner, y + inputs[f"bias_{name}"] if spec.bias else y


def gated(spec: KernelSpec, inputs: Inputs, scaling: float) -> list[torch.Tensor]:
    """act(yg)*yu of a gated MLP in the dtype of the activations."""
    _, gate = _projected(spec, inputs, "gate", 0, scaling)
    _, up = _projected(spec, inputs, "up", 1, scaling)
    return [_activated(spec, gate) * up]


def _activated(spec: KernelSpec, gate: torch.Tensor) -> torch.Tensor:
    if spec.gelu or spec.gelu_tanh:
        return functional.gelu(gate, approximate="tanh" if spec.gelu_tanh else "none")
    return functional.silu(gate)


def gated_backward(spec: KernelSpec, inputs: Inputs, scaling: float) -> list[torch.Tensor]:
    """Both dYg of a gated MLP, and both dg."""
    dout = inputs["dout"]
    inner, gate = _projected(spec, inputs, "gate", 0, scaling)
    inner_up, up = _projected(spec, inputs, "up", 1, scaling)
    if spec.gelu or spec.gelu_tanh:
        form = "tanh" if spec.gelu_tanh else "none"
        d_gate = torch.ops.aten.gelu_backward(dout * up, gate, approximate=form)
    else:
        d_gate = torch.ops.aten.silu_backward(dout * up, gate)
    d_up = dout * _activated(spec, gate)
    dygs = [inputs["g_gate"].to(dout.dtype) * d_gate, inputs["g_up"].to(dout.dtype) * d_up]
    return [*dygs, (d_gate * inner).sum(dim=0), (d_up * inner_up).sum(dim=0)]


def grouped(spec: KernelSpec, inputs: Inputs, scaling: float) -> list[torch.Tensor]:
    """y of each projection of a group."""
    return [_projected(spec, inputs, str(i + 1), i, scaling)[1] for i in range(spec.members)]


def grouped_backward(spec: KernelSpec, inputs: Inputs, scaling: float) -> list[torch.Tensor]:
    """dYg of each projection of a group, and dg of each."""
    dygs, dgs = [], []
    for i in range(spec.members):
        dy = inputs[f"dy_{i + 1}"]
        dygs.append(inputs[f"g_{i + 1}"].to(dy.dtype) * dy)
        dgs.append((dy * _projected(spec, inputs, str(i + 1), i, scaling)[0]).sum(dim=0))
    return dygs + dgs


_GATED_AND_GROUPED: dict[str, tuple[GatedFormula, tuple[str, ...]]] = {
    "compose_swiglu": (gated, ("out",)),
    "compose_swiglu_backward": (gated_backward, ("dyg", "dg")),
    "swiglu_forward": (gated, ("out",)),
    "swiglu_backward": (gated_backward, ("dyg", "dg")),
    "lora_compose_group": (grouped, ("y",)),
    "compose_backward_group": (grouped_backward, ("dyg", "dg")),
}


def peft_norm(inputs: Inputs, scaling: float) -> torch.Tensor:
    """PEFT's weight norm written out: B @ A from an identity matrix sent through both, the dense sum, its norm."""
    weight = inputs["weight"]
    adapter = _identity_product(inputs).to(weight.dtype)
    norm: torch.Tensor = torch.linalg.norm(weight + scaling * adapter, dim=1)
    return norm.to(weight.dtype)


def _pefts_own_norm() -> Formula:
    """The same through PEFT's own method.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    layer = DoraLinearLayer(fan_in_fan_out=False)

    def norm(inputs: Inputs, scaling: float) -> torch.Tensor:
        weight = inputs["weight"]
        result: torch.Tensor = layer.get_weight_norm(weight, _identity_product(inputs).to(weight.dtype), scaling)
        return result

    return norm


def dense_norm(inputs: Inputs, scaling: float) -> torch.Tensor:
    """The norm of the dense W + sBA, without the identity matrix."""
    weight = inputs["weight"]
    adapter = functional.linear(inputs["lora_B"], inputs["lora_A"].T)
    norm: torch.Tensor = torch.linalg.norm(weight + scaling * adapter.to(weight.dtype), dim=1)
    return norm


def peft_compose(inputs: Inputs, scaling: float) -> torch.Tensor:
    """PEFT's eager formula from h (or the LoRA output, or x) on, its result added to the base output.

    g has the dtype that PEFT gives it: that of the adapters.
    """
    base, lora = _base(inputs), _lora(inputs)
    g = inputs["g"].to(inputs["lora_B"].dtype if "lora_B" in inputs else base.dtype)
    return (base + ((g - 1) * base + g * lora * scaling)).to(base.dtype)


def plain_lora(inputs: Inputs, scaling: float) -> torch.Tensor:
    """LoRA without DoRA: product, scale, add."""
    base = _base(inputs)
    return (base + _lora(inputs) * scaling).to(base.dtype)


def eager_backward(inputs: Inputs, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """dYg and dg in PyTorch, from inner, or from the output y where the operation takes that."""
    dy = inputs["dy"]
    dg = (dy * _saved(inputs)).sum(dim=0)
    return inputs["g"].to(dy.dtype) * dy, dg if "inner" in inputs else dg / inputs["g"]


def copies(inputs: Inputs, outputs: Inputs) -> None:
    """As many bytes as the operation moves, by device copies: every output written from an input of its size."""
    streamed = [tensor for tensor in inputs.values() if tensor.ndim == 2]
    written = sum(tensor.ndim == 2 for tensor in outputs.values())
    half = streamed[0].numel() * (len(streamed) + written) // 2  # a copy reads and writes
    whole, part = divmod(half, streamed[0].numel())
    destination = next(iter(outputs.values())).view(-1)
    for index in range(whole):
        destination.copy_(streamed[index].view(-1))
    if part:
        destination[:part].copy_(streamed[-1].view(-1)[:part])


def _identity_product(inputs: Inputs) -> torch.Tensor:
    lora_a = inputs["lora_A"]
    eye = torch.eye(lora_a.shape[1], device=lora_a.device, dtype=lora_a.dtype)
    return _linear(_linear(eye, lora_a), inputs["lora_B"]).T


def _base(inputs: Inputs) -> torch.Tensor:
    return inputs["base"] if "base" in inputs else _linear(inputs["x"], inputs["weight"])


def _lora(inputs: Inputs) -> torch.Tensor:
    return inputs["lora"] if "lora" in inputs else _linear(inputs["h"], inputs["lora_B"])


def _saved(inputs: Inputs) -> torch.Tensor:
    return inputs["inner"] if "inner" in inputs else inputs["y"]


def _linear(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T; autocast aligns the dtypes where it is on, as in PEFT, and the wider adapters do elsewhere."""
    if not torch.is_autocast_enabled(left.device.type):
        left = left.to(right.dtype)
    return functional.linear(left, right)


def _rounded(spec: KernelSpec, adapter: torch.Tensor) -> torch.Tensor:
    """The adapter in the dtype of W or of the activations: the bare product runs at their rate whatever A and B are.

    Rounding fp32 adapters is then part of its time.
    """
    return adapter.to(TORCH_DTYPES[spec.wide])


def _autocast(spec: KernelSpec, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not getattr(spec, "autocast", False):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=TORCH_DTYPES[spec.wide])


def _eager(spec: KernelSpec, formula: Formula, scaling: float) -> Run:
    def run(inputs: Inputs, _: Inputs) -> Any:
        with _autocast(spec, next(iter(inputs.values())).device):
            return formula(inputs, scaling)

    return run


def _compiled(spec: KernelSpec, formula: Formula, scaling: float) -> Run:
    """The formula under torch.compile. PyTorch counts compilations by formula: reset it after each spec."""

    def call(inputs: Inputs) -> Any:
        with _autocast(spec, next(iter(inputs.values())).device):
            return formula(inputs, scaling)

    compiled = torch.compile(call, fullgraph=True, dynamic=False)
    return lambda inputs, _: compiled(dict(inputs))
