"""A model's linear projections as values: what is tuned, what is left out and why."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

HEAD = "the output head, which PEFT's all-linear leaves out"
EXPERTS = "fused weights of experts: PEFT refuses DoRA on parameters"
MOST = 10_000
"""No model has more layers, or more experts in one layer. A class makes a module for each, so more are refused."""


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""The activations that kernels of gated MLPs have, by transformers' names."""


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
    from a file; ``notes`` says where the layers were read and what was assumed. ``activation`` is that of the MLP:
    ``silu``, ``gelu`` or ``gelu_tanh``; empty where it is another one or unknown.
    """

    name: str
    hf_id: str
    layers: int | None
    projections: tuple[Projection, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    activation: str = ""

    def gated(self) -> tuple[Projection, ...]:
        """The gate projections whose output, activated, is multiplied by that of an up projection of the same shape."""
        ups = {(each.shape, each.bias) for each in self.projections if each.name == "up_proj"}
        gates = (each for each in self.projections if each.name == "gate_proj" and self.activation)
        return tuple(gate for gate in gates if (gate.shape, gate.bias) in ups)

    def grouped(self) -> tuple[tuple[Projection, ...], ...]:
        """The projections q, k and v of an attention, which read one x: those that agree in d_in and bias."""
        named = [[each for each in self.projections if each.name == name] for name in ("q_proj", "k_proj", "v_proj")]
        return tuple(
            group
            for group in itertools.product(*named)
            if len({(each.d_in, each.bias, each.count) for each in group}) == 1
        )


def activation_in(config: Mapping[str, Any], default: str = "") -> str:
    """The activation that a config's fields name, in the words of :class:`Model`; ``default`` is the class's own."""
    named = config.get("hidden_activation") or config.get("hidden_act") or default
    return _ACTIVATIONS.get(named, "") if isinstance(named, str) else ""
