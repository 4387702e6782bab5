"""The report of ``accelerate``: what runs each DoRA layer, as values and as text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

KERNELS, REFERENCE, PENDING, PEFT = "kernels", "reference", "pending", "peft"
"""What runs a layer. ``kernels``: tuned kernels. ``reference``: doratune's eager reference (CPU tensors, fp64, unknown
GPUs). ``pending``: PEFT's code until the parameters are complete, then one of these two. ``peft``: PEFT's own code."""

_RUNS = {KERNELS: "kernels", REFERENCE: "eager reference", PENDING: "decided per call", PEFT: "left to PEFT"}


@dataclass(frozen=True)
class Layer:
    """One DoRA adapter of one layer.

    Attributes:
        name: the layer's name in the model. adapter: the adapter's.
        base: the kind of base layer, e.g. ``Linear`` or ``bitsandbytes 4-bit``.
        weight_format: how a quantised W is stored, where kernels read it themselves, e.g. ``nf4.nested``.
        runs: ``kernels``, ``reference`` (doratune's eager path), ``pending`` or ``peft``.
        kernels: the operations that run, in order, by their names for ``load_kernel``.
        remark: why or when PEFT runs the layer, or why its norm takes the base layer's own forward.
    """

    name: str
    adapter: str
    base: str
    runs: str
    kernels: tuple[str, ...] = ()
    remark: str = ""
    weight_format: str = ""


@dataclass(frozen=True)
class Report:
    """Every DoRA layer of a model and what runs it; ``str(report)`` groups layers whose names differ in a number.

    Attributes:
        layers: the layers.
        norms_together: how many layers get their norms from each launch of the norm pass (op ``weight_norm_group``) at
            the start of a call of the model, if it were called as it is now. The others compute their own.
    """

    layers: tuple[Layer, ...]
    norms_together: tuple[int, ...] = ()

    @property
    def accelerated(self) -> tuple[Layer, ...]:
        """The layers that doratune runs, now or once their parameters are complete."""
        return tuple(layer for layer in self.layers if layer.runs != PEFT)

    @property
    def left(self) -> tuple[Layer, ...]:
        """The layers that PEFT's code runs."""
        return tuple(layer for layer in self.layers if layer.runs == PEFT)

    def __str__(self) -> str:
        if not self.layers:
            return "doratune: the model has no DoRA layer (LoraConfig(use_dora=True)); nothing was changed"
        lines = [f"doratune: {len(self.accelerated)} of {len(self.layers)} DoRA layers accelerated"]
        rows = Counter((numberless(layer.name), layer.adapter, _base(layer), _how(layer)) for layer in self.layers)
        width = max(len(name) for name, *_ in rows)
        for (name, adapter, base, how), count in rows.items():
            lines.append(f"  {count:4} × {name:{width}}  {adapter}, {base}: {how}")
        if self.norms_together:
            layers, groups = sum(self.norms_together), len(self.norms_together)
            lines.append(
                f"The norms of {layers} layers are computed together at the start of a call, in {groups} "
                f"group{'s' if groups > 1 else ''} of one shape and format."
            )
        lines.append("Adapters that PEFT adds to these layers later, or initialises anew, are accelerated as well.")
        lines.append("LoRA layers that are made later run PEFT's code until accelerate() is called again.")
        return "\n".join(lines)


def _base(layer: Layer) -> str:
    return layer.base + (f" ({layer.weight_format})" if layer.weight_format else "")


def _how(layer: Layer) -> str:
    how = _RUNS[layer.runs] + (f" ({', '.join(layer.kernels)})" if layer.kernels else "")
    return f"{how}; {layer.remark}" if layer.remark else how


def numberless(name: str) -> str:
    """A layer's name with ``*`` for numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
