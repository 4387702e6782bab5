"""A model's linear projections as values: what is tuned, what is left out and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

HEAD = "the output head, which PEFT's all-linear leaves out"
EXPERTS = "fused weights of experts: PEFT refuses DoRA on parameters"
MOST = 10_000
"""No model has more layers, or more experts in one layer. A class makes a module for each, so more are refused."""


class ModelConfigError(UsageError):
    """A config cannot be read as a model; the message names the file, the problem and the remedy."""


@dataclass(frozen=True)
class Projection:
    """A linear layer W [d_out, d_in] that PEFT can put a DoRA adapter on, ``count`` times in the whole model.

    ``modules`` are the full names of these layers in the model's class; a model of the table has none.
    """

    name: str
    d_out: int
    d_in: int
    bias: bool
    count: int
    modules: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.d_out, self.d_in


@dataclass(frozen=True)
class LeftOut:
    """Weights that get no DoRA adapter, and ``why``.

    ``linear`` tells a linear layer (``shape`` is [d_out, d_in]) from a bare parameter, such as the fused weights of a
    layer's experts.
    """

    name: str
    shape: tuple[int, ...]
    bias: bool
    count: int
    linear: bool
    why: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model's linear layers: ``projections`` are tuned, ``left_out`` are not.

    ``layers`` counts decoder layers, None where the model has no one such number; ``hf_id`` is empty for a model read
    from a file; ``notes`` says where the layers were read and what was assumed.
    """

    name: str
    hf_id: str
    layers: int | None
    projections: tuple[Projection, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
