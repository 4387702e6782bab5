"""DoRA layers for tests: inputs on which each term dominates somewhere, and the plain formula in fp64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch

from doratune.codegen.ops import EPS
from doratune.nn import kernels
from doratune.runtime.reference import reference

CASES = (
    "random",
    "cross_term",
    "zero_weight",
    "large_lora",
    "negative_scaling",
    "zero_scaling",
    "zero_magnitude",
    "zero_rows",
    "large_activations",
)
TRAINED = ("x", "lora_A", "lora_B", "magnitude", "bias")


@dataclass
class Layer:
    """The tensors of one layer and its input, and the gradient that arrives at its output."""

    tensors: dict[str, torch.Tensor]
    scaling: float
    dy: torch.Tensor

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The positional arguments of ``dora_linear`` up to the scaling."""
        t = self.tensors
        return t["x"], t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], self.scaling

    def double(self, rounded: torch.dtype | None = None) -> Layer:
        """The same values in fp64, A and B rounded to ``rounded`` first."""
        tensors = {}
        for name, tensor in self.tensors.items():
            value = tensor.detach()
            if rounded is not None and name.startswith("lora_"):
                value = value.to(rounded)
            tensors[name] = value.double().requires_grad_(tensor.requires_grad)
        return Layer(tensors, self.scaling, self.dy.double())


def make_layer(
    case: str = "random",
    *,
    tokens: tuple[int, ...] = (3, 11),
    d_out: int = 48,
    d_in: int = 40,
    rank: int = 6,
    dtype: torch.dtype = torch.float64,
    adapter: torch.dtype | None = None,
    trained: tuple[str, ...] = TRAINED,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scaling = {"negative_scaling": -0.7, "zero_scaling": 0.0}.get(case, 0.75)
    lora_a, lora_b = normal(rank, d_in) * d_in**-0.5, normal(d_out, rank) * rank**-0.5
    weight = normal(d_out, d_in) * d_in**-0.5
    magnitude = (weight + scaling * lora_b @ lora_a).norm(dim=1) * (1.0 + 0.1 * normal(d_out).clamp(-1.0, 1.0))
    if case == "cross_term":
        weight = lora_b @ lora_a
    if case == "zero_weight":
        weight.zero_()
    if case == "large_lora":
        lora_b *= 100.0
    if case == "zero_rows":
        weight[::3], lora_b[::3] = 0.0, 0.0
        if dtype is torch.float16:
            magnitude[::3] = 0.0  # as they start; else g = m / eps and true gradients beyond fp16's range
    if case == "zero_magnitude":
        magnitude[::2] = 0.0
    x = normal(*tokens, d_in) * (1e4 if case == "large_activations" else 1.0)
    values = {"x": x, "weight": weight, "lora_A": lora_a, "lora_B": lora_b, "magnitude": magnitude}
    values["bias"] = normal(d_out) * 0.1
    own = {"lora_A": adapter or dtype, "lora_B": adapter or dtype, "magnitude": adapter or dtype}
    tensors = {name: value.to(device, own.get(name, dtype)) for name, value in values.items()}
    for name in trained:
        tensors[name].requires_grad_()
    return Layer(tensors, scaling, normal(*tokens, d_out).to(device, dtype))


def plain(layer: Layer, *, bias: bool = True, delta: bool = False) -> torch.Tensor:
    """DoRA's formula for autograd, with a materialised BA and a detached norm."""
    x, weight, lora_a, lora_b, magnitude, scaling = layer.args
    g = magnitude / (weight + scaling * (lora_b @ lora_a)).norm(dim=1).detach().clamp_min(EPS)
    base, lora = x @ weight.T, scaling * (x @ lora_a.T) @ lora_b.T
    if delta:
        return (g - 1.0) * base + g * lora
    return g * (base + lora) + (layer.bias if bias else 0.0)


def gradients(y: torch.Tensor, layer: Layer) -> dict[str, torch.Tensor | None]:
    """The gradient of every trained tensor of ``layer`` for ``layer.dy``; None where there is none."""
    names = [name for name in TRAINED if layer.tensors[name].requires_grad]
    grads = torch.autograd.grad(y, [layer.tensors[name] for name in names], layer.dy, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error; absolute where the exact value is zero."""
    got, exact = got.detach().double(), exact.detach()
    size = float(exact.norm())
    return float((got - exact).norm()) / (size or 1.0)


def assert_close(
    got: Mapping[str, torch.Tensor | None], exact: Mapping[str, torch.Tensor | None], bound: float, what: str
) -> None:
    """Every gradient is within ``bound`` of the exact one; None counts as zero."""
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        mine = got[name]
        wanted = torch.zeros_like(mine, dtype=torch.float64) if value is None and mine is not None else value
        if wanted is None:
            continue
        assert mine is not None or not wanted.any(), f"{what}: no gradient for {name}"
        if mine is not None:
            assert mine.shape == wanted.shape
            assert error(mine, wanted) <= bound, f"{what}: d{name} is off by {error(mine, wanted):.2e}"


class KernelOnPaper:
    """Replaces a launched kernel on CPU tensors: fills the given outputs with NaN, then with the reference's values."""

    specialises_warps = False

    def __init__(self, spec: object) -> None:
        self.spec = spec
        self.launches = 0

    def launch(
        self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], scaling: float | None = None
    ) -> None:
        self.launches += 1
        spec = self.spec
        names = [operand.name for operand in spec.contract.inputs_of(spec)]  # type: ignore[attr-defined]
        rows = [tensor if tensor.ndim < 3 else tensor.flatten(0, -2) for tensor in inputs]  # as a launch reads them
        given = dict(zip(names, rows, strict=True))
        results = reference(spec, given, scaling or 0.0)  # type: ignore[arg-type]
        for output, value in zip(outputs, results.values(), strict=True):
            output.data.fill_(float("nan"))  # like a kernel, without a change of the version
            output.data.copy_(value.view(output.shape))  # which may have leading dimensions


@pytest.fixture
def kernels_on_paper(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """Launch every operation like a kernel, into given memory; returns the number of launches by operation."""
    made: dict[object, KernelOnPaper] = {}

    def kernel(*key: object) -> KernelOnPaper:
        return made.setdefault(key, KernelOnPaper(kernels.spec_for(*key[:-1])))  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "kernel_for", kernel)
    monkeypatch.setattr(kernels, "paying_kernel_for", lambda *key: None)

    def launches() -> dict[str, int]:
        counts: dict[str, int] = {}
        for key, one in made.items():
            counts[key[0]] = counts.get(key[0], 0) + one.launches  # type: ignore[index]
        return counts

    return launches
