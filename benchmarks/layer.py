"""One linear layer with a DoRA adapter in every implementation: forward and backward, and forward alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from ..tuner.models import find_model, read_config
from .adapted import (
    FUSED,
    IMPLEMENTATIONS,
    OPS,
    Contender,
    Mode,
    Peers,
    bench_device,
    chosen_implementations,
    chosen_modes,
    contenders,
    measure,
    relative_errors,
    touch,
    with_dora,
)
from .dorafactors import Dorafactors
from .quantised import quantise
from .results import Outcome, Row


class Projection(nn.Module):
    """A model of one linear layer: PEFT adapts layers by their names inside a model."""

    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y


def layer_shapes(model: str, config: Path | None) -> tuple[str, list[tuple[int, int]]]:
    """The model's name and the distinct [d_out, d_in] of its projections.

    Raises:
        UsageError: an unknown model, or a config that cannot be read.
    """
    found = find_model(model) if config is None else read_config(config)
    shapes = dict.fromkeys((projection.d_out, projection.d_in) for projection in found.projections)
    return found.name, list(shapes)


def bench_layer(
    *,
    model: str = "llama-8b",
    config: Path | None = None,
    rank: int = 384,
    tokens: Collection[int] = (4096,),
    modes: str = "autocast,bf16",
    quant: str | None = None,
    compiled: bool = True,
    implementations: Collection[str] = (),
    ops: Collection[str] = OPS,
    rounds: int = 20,
    device: str | None = None,
    dorafactors: Dorafactors | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure one layer of every shape that the model's projections have, with ``tokens`` rows of x.

    A step is forward and backward with the gradient of x. The time is the GPU's own, without waiting for the host.
    ``quant``: the format of the layer's W, of :data:`~.quantised.QUANTS`; bf16 if None.

    Raises:
        UsageError: PEFT is missing, or a name or config is wrong.
    """
    chosen = chosen_modes(modes)
    peers = Peers(dorafactors)
    known = [name for name in IMPLEMENTATIONS if name not in FUSED]
    names = chosen_implementations(implementations, peers, compiled, known)
    name, shapes = layer_shapes(model, config)
    where = bench_device(device)
    outcome = Outcome()
    for d_out, d_in in shapes:
        base: nn.Module = Projection(d_out, d_in, where).requires_grad_(False)
        if quant is not None:
            base = quantise(base, ["proj"], quant)
        for mode in chosen.values():
            adapted = with_dora(base, mode, rank=rank, targets=["proj"])
            for count in tokens:
                torch.compiler.reset()
                facts: Row = {
                    "bench": "layer",
                    "model": name,
                    "shape": [count, d_out, d_in],
                    "rank": rank,
                    "dtype": quant or "bf16",
                    "adapter": mode.adapter,
                    "flags": mode.flags,
                }
                progress(f"{count}×{d_out}×{d_in}, {mode.adapter} adapters")
                running = contenders(names, adapted, peers, outcome.notes)
                x, dy = _inputs(count, d_out, d_in, where)
                for op in [op for op in OPS if op in ops]:
                    rows = _measure(op, running, adapted, x, dy, mode, rounds, outcome.notes)
                    outcome.rows += [{**facts, "op": op, **row} for row in rows]
    return outcome


def _inputs(tokens: int, d_out: int, d_in: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(1, tokens, width, generator=generator, device=device).to(torch.bfloat16)

    return normal(d_in).requires_grad_(), normal(d_out)


def _measure(
    op: str,
    running: list[Contender],
    adapted: nn.Module,
    x: torch.Tensor,
    dy: torch.Tensor,
    mode: Mode,
    rounds: int,
    notes: list[str],
) -> list[Row]:
    def forward(model: nn.Module) -> torch.Tensor:
        with mode.context(x.device):
            y: torch.Tensor = model(x)
        return y

    def step(model: nn.Module) -> None:
        forward(model).backward(dy)

    def inference(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return forward(model)

    touched = touch(adapted.parameters())

    def before() -> None:
        x.grad = None
        touched()

    training = op == "step"
    samples = measure(
        running,
        step if training else inference,
        before=before if training else lambda: None,
        rounds=rounds,
        device=x.device,
        hide_host=True,
        notes=notes,
    )
    errors: dict[str, float] = {}
    if not training:
        errors = relative_errors({one.name: inference(one.model) for one in running if one.name in samples})
    return [
        {"impl": impl, **sample.columns(), "rel_err": errors.get(impl), "complaint": None}
        for impl, sample in samples.items()
    ]
