"""All norms of a model at once: the norm pass, the layers' own launches, the reading of W, and the bare products.

``doratune`` runs the kernels of a norm pass (op ``weight_norm_group``), one group of launches for each shape. ``alone``
computes each layer's norm and gain as a layer does without a pass. ``read`` reads every W once and adds its words up,
so its time is what memory allows. ``products`` are W @ A.T of all layers of a shape in one batched product of cuBLAS
each, with 16-bit results: no norm at many ranks can be faster.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..codegen.gpu import Gpu
from ..errors import DoratuneError
from ..nn.norm import norm_and_gain_of
from ..nn.norm_cache import NormCache
from ..nn.norm_layer import NormLayer
from ..nn.norm_pass import NormPass
from ..runtime.device import find_device, gpu_of
from ..runtime.reference import TORCH_DTYPES
from ..tuner.accuracy import NORM_ERROR
from ..tuner.models import Model
from ..tuner.timing import Graph, GraphPool, interleaved_us
from .measuring import check_names, left_out, require_gpu
from .results import OURS, Outcome, timing

NORM_PEERS = ("alone", "read", "products")
MODES = {"bf16": ("bf16", False), "autocast": ("fp32", True)}
"""By name: the adapters' dtype, and whether they are rounded as under autocast."""

CHECKED = 3
"""Layers of each shape whose norms are compared with fp64."""

Run = Callable[[], object]
"""Runs on all layers."""

ROUNDS = 9
SCALING = 0.5


@dataclass(frozen=True)
class NormCase:
    """All DoRA layers of a model at one rank: ``shapes`` counts the layers by (d_out, d_in)."""

    model: str
    shapes: tuple[tuple[tuple[int, int], int], ...]
    rank: int
    mode: str

    @classmethod
    def of(cls, model: Model, rank: int, mode: str, most_layers: int | None = None) -> NormCase:
        """The case of ``model``; of each shape at most ``most_layers`` layers, so that small GPUs can run it."""
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for projection in model.projections:
            counts[projection.shape] += projection.count
        shapes = tuple((shape, min(count, most_layers or count)) for shape, count in sorted(counts.items()))
        return cls(model.name, shapes, rank, mode)

    def __str__(self) -> str:
        return f"all norms of {self.model} at rank {self.rank}, {self.mode}"

    @property
    def weight_elements(self) -> int:
        return sum(count * d_out * d_in for (d_out, d_in), count in self.shapes)

    def floor_us(self, gpu: Gpu) -> float:
        """The least time: W read once, or the flops of W @ A.T."""
        return gpu.floor_us(2 * self.weight_elements, 2 * self.weight_elements * self.rank, "bf16")

    def make(self, device: torch.device, seed: int = 0) -> list[NormLayer]:
        """Random layers: each tensor in memory of its own, as in a model."""
        generator = torch.Generator(device).manual_seed(seed)
        adapter, _ = MODES[self.mode]

        def normal(*shape: int, std: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

        layers = []
        for (d_out, d_in), count in self.shapes:
            for _ in range(count):
                weight = normal(d_out, d_in, std=0.02, dtype=torch.bfloat16)
                dtype = TORCH_DTYPES[adapter]
                lora_a = normal(self.rank, d_in, std=d_in**-0.5, dtype=dtype)
                lora_b = normal(d_out, self.rank, std=0.02, dtype=dtype)
                magnitude = normal(d_out, std=0.02, dtype=dtype).abs_()
                layers.append(NormLayer(weight, lora_a, lora_b, magnitude, SCALING, NormCache()))
        return layers


def bench_norms(
    model: Model,
    ranks: Sequence[int],
    *,
    modes: Collection[str] = tuple(MODES),
    peers: Collection[str] = NORM_PEERS,
    rounds: int = ROUNDS,
    most_layers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Check and time all norms of ``model`` at each of ``ranks``, in turn with ``peers``; one row for each.

    A row's ``us`` is the GPU time of all layers, from replays of one CUDA graph in which every W is read from memory
    (they do not fit the L2 together, unless the model is tiny).

    Raises:
        UsageError: an unknown mode or peer, or there is no GPU.
    """
    require_gpu()
    check_names("mode", modes, MODES)
    check_names("peer", peers, NORM_PEERS)
    outcome = Outcome()
    for rank in ranks:
        for mode in modes:
            case = NormCase.of(model, rank, mode, most_layers)
            progress(str(case))
            _run(case, peers, rounds, outcome)
            torch.cuda.empty_cache()
    return outcome


def implementations(case: NormCase, layers: Sequence[NormLayer]) -> dict[str, Run]:
    """What is timed, by name, on all ``layers`` of the case."""
    norms = NormPass(layers)
    _, autocast = MODES[case.mode]
    by_shape: dict[torch.Size, list[NormLayer]] = defaultdict(list)
    for layer in layers:
        by_shape[layer.weight.shape].append(layer)

    def one_pass() -> None:
        for layer in layers:
            layer.norms.asked = True  # a pass leaves out layers that never ask
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            opened = norms.open()
        assert opened is not None
        opened.close()

    def alone() -> None:
        for layer in layers:
            a, b = rounded(layer, autocast)
            norm_and_gain_of(layer.weight, a, b, layer.magnitude, layer.scaling)

    def read() -> None:
        for layer in layers:
            layer.weight.view(torch.int32).sum(dtype=torch.int32)

    def products() -> None:
        for members in by_shape.values():
            torch.bmm(stacks[members[0].weight.shape], factors[members[0].weight.shape])

    one_pass()  # copies the table of addresses, for which a capture cannot wait
    torch.cuda.synchronize()
    served = len(norms.served())
    if served < len(layers):
        raise DoratuneError(f"a pass computes {served} of {len(layers)} norms, and its time would not be that of all")
    stacks: dict[torch.Size, torch.Tensor] = {}
    factors: dict[torch.Size, torch.Tensor] = {}
    for shape, members in by_shape.items():
        stacks[shape] = torch.stack([layer.weight for layer in members])
        factors[shape] = torch.stack([layer.lora_A.bfloat16() for layer in members]).transpose(1, 2)
    return {OURS: one_pass, "alone": alone, "read": read, "products": products}


def worst_of_layers(case: NormCase, layers: Sequence[NormLayer]) -> tuple[float, str | None]:
    """The largest relative error of the norms of the first layers of each shape, and what is wrong, or None."""
    _, autocast = MODES[case.mode]
    worst, seen = 0.0, Counter[torch.Size]()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        opened = NormPass(layers).open()
    assert opened is not None
    for layer in layers:
        seen[layer.weight.shape] += 1
        if seen[layer.weight.shape] > CHECKED:
            continue
        a, b = rounded(layer, autocast)
        norm, _ = layer.norms.gain_of_weight(*layer.tensors, layer.scaling, rounded=(a, b))
        exact = (layer.weight.double() + layer.scaling * b.double() @ a.double()).norm(dim=1)
        worst = max(worst, float(((norm.double() - exact).abs() / exact).max()))
    opened.close()
    return worst, None if worst <= NORM_ERROR else f"norms are off by {worst:.3g} where {NORM_ERROR:g} is allowed"


def rounded(layer: NormLayer, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as the layer's products have them."""
    return (layer.lora_A.bfloat16(), layer.lora_B.bfloat16()) if autocast else (layer.lora_A, layer.lora_B)


def _run(case: NormCase, peers: Collection[str], rounds: int, outcome: Outcome) -> None:
    device = find_device("cuda")
    gpu = gpu_of(device)
    layers = case.make(device)
    error, complaint = worst_of_layers(case, layers)
    runs = implementations(case, layers)
    if complaint:
        outcome.failures.append(f"{case}: {complaint}")
    graphs, pool = {}, GraphPool()
    for name, run in runs.items():
        if name != OURS and name not in peers:
            continue
        try:
            graphs[name] = Graph(pool.capture([run]), 1)
        except Exception as failure:
            if name == OURS:
                raise
            outcome.notes.append(f"{case}: {left_out(name, failure)}")
    samples = interleaved_us(graphs, rounds=rounds)
    adapter, autocast = MODES[case.mode]
    outcome.rows += [
        {
            "bench": "norms",
            "model": case.model,
            "op": "weight_norm_group",
            "shape": [count for _, count in case.shapes],
            "rank": case.rank,
            "dtype": "bf16",
            "adapter": adapter,
            "flags": ["autocast"] if autocast else [],
            "impl": name,
            **timing(times),
            "floor_us": case.floor_us(gpu),
            "rel_err": error if name == OURS and math.isfinite(error) else None,
        }
        for name, times in samples.items()
    ]
