"""How large the study is: the model, its text and how long it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A decoder model of bytes, what it is trained on, and for how many steps of ``batch`` × ``seq`` bytes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    seq: int
    batch: int
    pretrain_steps: int
    steps: int
    """Of each adaptation."""
    evaluations: int
    """Of the held-out loss in an adaptation, evenly spread; the last one is after the last step, and the only one where
    a learning rate is tried."""
    precision_steps: int
    ratios: tuple[int, ...]
    """The values of d/r, d being ``hidden``."""
    train_bytes: int
    held_out_bytes: int
    pretrain_rate: float = 1e-3

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.hidden // ratio for ratio in self.ratios)

    @property
    def checked_rank(self) -> int:
        """The rank at which PEFT's own DoRA runs too, and at which precisions are compared: the middle one."""
        return self.ranks[len(self.ranks) // 2]

    @property
    def blocks(self) -> int:
        """Held-out sequences that a loss is over: as many as the held-out bytes have."""
        return (self.held_out_bytes - 1) // self.seq

    @property
    def case(self) -> dict[str, Any]:
        """The fields of a row that name the model: its name, and layers and bytes of a sequence."""
        return {"model": f"llama-d{self.hidden}-bytes", "shape": [self.layers, self.seq]}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


SIZES = {
    "full": Size(
        hidden=512,
        intermediate=1408,
        layers=6,
        heads=8,
        seq=512,
        batch=16,
        pretrain_steps=1500,
        steps=200,
        evaluations=8,
        precision_steps=100,
        ratios=(64, 16, 4),
        train_bytes=6_000_000,
        held_out_bytes=131_073,
    ),
    "medium": Size(
        hidden=128,
        intermediate=352,
        layers=2,
        heads=4,
        seq=128,
        batch=8,
        pretrain_steps=2000,
        steps=80,
        evaluations=2,
        precision_steps=40,
        ratios=(32, 8, 2),
        train_bytes=4_000_000,
        held_out_bytes=16_385,
        pretrain_rate=3e-3,
    ),
    "small": Size(
        hidden=64,
        intermediate=176,
        layers=2,
        heads=4,
        seq=64,
        batch=16,
        pretrain_steps=1500,
        steps=120,
        evaluations=4,
        precision_steps=40,
        ratios=(16, 4),
        train_bytes=2_000_000,
        held_out_bytes=8_193,
        pretrain_rate=3e-3,
    ),
    "tiny": Size(
        hidden=32,
        intermediate=48,
        layers=1,
        heads=2,
        seq=32,
        batch=4,
        pretrain_steps=20,
        steps=4,
        evaluations=2,
        precision_steps=3,
        ratios=(8,),
        train_bytes=60_000,
        held_out_bytes=257,
        pretrain_rate=3e-3,
    ),
}
"""``full`` is the study, for a GPU; ``medium`` is one for a CPU, within an hour; ``small`` learns something on a CPU in
minutes; ``tiny`` tries the command out."""
