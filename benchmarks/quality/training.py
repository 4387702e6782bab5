"""Training: bytes in an order that a seed gives, the clock of each step, losses on held-out text."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ...tuner.timing import no_collection
from ..adapted import Mode
from .corpus import TEST, TRAIN, VALIDATION, Domain
from .sizes import Size

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises to its value, in which it then stays."""
HELD_OUT_BATCHES = 4
"""Batches of training that one of a held-out loss holds: it keeps nothing for a backward pass."""


class OutOfTimeError(Exception):
    """The time that a call has is over; the run is not finished."""


@dataclass(frozen=True)
class Deadline:
    """When a call must be done, on ``time.monotonic``'s clock."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.at - time.monotonic()

    def check(self) -> None:
        if self.left < 0.0:
            raise OutOfTimeError


@dataclass
class Text:
    """A domain's bytes on a device: a row of all that is trained on, held-out sequences of ``seq + 1`` bytes."""

    train: torch.Tensor
    held_out: dict[str, torch.Tensor]

    @classmethod
    def of(cls, domain: Domain, size: Size, device: torch.device) -> Text:
        def tensor(split: str) -> torch.Tensor:
            return torch.frombuffer(bytearray(domain.parts[split]), dtype=torch.uint8).to(device)

        def blocks(split: str) -> torch.Tensor:
            return tensor(split)[: size.blocks * size.seq + 1].unfold(0, size.seq + 1, size.seq)

        return cls(tensor(TRAIN), {split: blocks(split) for split in (VALIDATION, TEST)})

    def batches(self, size: Size, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, each (batch, seq), from places that ``seed`` gives, the same ones for any ``steps``."""
        device = self.train.device
        generator = torch.Generator().manual_seed(seed)
        most = len(self.train) - size.seq
        places = torch.stack([torch.randint(most, (size.batch,), generator=generator) for _ in range(steps)]).to(device)
        window = torch.arange(size.seq + 1, device=device)
        for starts in places:
            block = self.train[starts[:, None] + window].long()
            yield block[:, :-1], block[:, 1:]


@dataclass
class Curve:
    """What a run has given: the loss of each training step; after how many steps which held-out loss."""

    train: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats per byte."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, mode: Mode, text: Text, split: str, size: Size) -> float:
    """Nats per byte of a held-out split."""
    model.eval()
    device = text.train.device
    losses, blocks = [], text.held_out[split]
    with mode.context(device):
        for block in blocks.split(HELD_OUT_BATCHES * size.batch):
            block = block.long()
            losses.append(loss_of(model, block[:, :-1], block[:, 1:]) * len(block))
    model.train()
    return float(torch.stack(losses).sum()) / len(blocks)


def evaluated(steps: int, evaluations: int) -> list[int]:
    """The steps after which the held-out loss is taken, evenly spread; 0 is not one, the last step is."""
    return sorted({max(1, round(steps * k / evaluations)) for k in range(1, evaluations + 1)})


def train(
    model: nn.Module,
    mode: Mode,
    text: Text,
    size: Size,
    *,
    rate: float,
    steps: int,
    seed: int,
    split: str,
    evaluations: int,
    deadline: Deadline,
    clip: float | None = None,
    schedule: Callable[[float], float] = lambda done: 1.0,
) -> Curve:
    """Train what is trainable with AdamW, without weight decay.

    ``schedule`` gives the factor of ``rate`` from the share of steps that are done. ``clip``: the largest norm of all
    gradients.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    device = text.train.device
    optimizer = optimizer_of(model, rate, device)
    model.train()
    curve, losses = Curve(), torch.zeros(steps, device=device)
    marks = evaluated(steps, evaluations)
    with no_collection() if device.type == "cuda" else contextlib.nullcontext():
        for done, (inputs, targets) in enumerate(text.batches(size, steps, seed)):
            warm = min(1.0, (done + 1) / max(1.0, WARM_UP * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * schedule(done / steps)
            losses[done] = step(model, optimizer, mode, inputs, targets, clip)
            if done + 1 in marks:
                deadline.check()
                curve.at.append(done + 1)
                curve.held_out.append(held_out_loss(model, mode, text, split, size))
    curve.train = losses.tolist()
    return curve


def optimizer_of(model: nn.Module, rate: float, device: torch.device) -> torch.optim.Optimizer:
    """AdamW for what is trainable in ``model``."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=device.type == "cuda")


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mode: Mode,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    clip: float | None = None,
) -> torch.Tensor:
    """One training step; returns its loss, on the device."""
    with mode.context(inputs.device):
        loss = loss_of(model, inputs, targets)
    loss.backward()
    if clip is not None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
