"""Examine a model on a GPU: what the stores hold of its kernels, and what ``accelerate`` would do with its layers.

The model is transformers' class on the meta device, in a process without a network: no weights, no code of the model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .class_process import ask, model_of, serve
from .coverage import Covered, OpCoverage, by_op, cover, kernels_of
from .models import ModelConfigError, config_text, find_model, read_config
from .projections import Model

NONE = "none"
SECONDS = 60
"""Time limit for building the model and examining its layers, after the imports."""
_RANK = 16
"""What runs a layer does not depend on its rank."""

_READ = "{}: kernels compose, and read W's codes for the norm where they know how it stores them"
_QUANTISED = {
    "bitsandbytes": _READ.format("bitsandbytes"),
    "hqq": _READ.format("HQQ"),
    "torchao": f"{_READ.format('torchao, weight-only')}; with quantised activations PEFT's code",
}
_OTHER = "{}: PEFT's code, if PEFT has DoRA for it: doratune does not know this weight format"


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind: their name with ``*`` for numbers, how many, what runs them, why.

    ``runs`` is ``kernels`` (doratune's), ``peft`` (PEFT's code) or ``none``: they get no DoRA adapter.
    """

    name: str
    count: int
    base: str
    runs: str
    why: str


@dataclass(frozen=True)
class ModelReport:
    """``kernels`` is empty where no GPU is named or here, ``layers`` where PEFT is not installed; ``notes`` say so."""

    model: Model
    gpu: str | None
    kernels: tuple[Covered, ...]
    layers: tuple[LayerKind, ...]
    notes: tuple[str, ...]

    def operations(self) -> list[OpCoverage]:
        """The kernels counted by operation."""
        return by_op(self.kernels)

    def summary(self) -> str:
        """How many kernels are measured, and what to do about the others."""
        measured = sum(one.status == "measured" for one in self.kernels)
        others = "" if measured == len(self.kernels) else "; `doratune tune` searches the others"
        return f"{measured} of {len(self.kernels)} kernels of {self.model.name} are measured on {self.gpu}{others}"

    def values(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "name": self.model.name,
            "gpu": self.gpu,
            "operations": [one.values() for one in self.operations()],
            "kernels": [{**vars(one), "spec": str(one.spec)} for one in self.kernels],
            "layers": [vars(one) for one in self.layers],
            "notes": list(self.notes),
        }


def examine_model(
    model: str | None,
    config: Path | None,
    *,
    gpu: str = "auto",
    ranks: Sequence[int] = (384,),
    dtype: str = "bf16",
    store: str | None = None,
) -> ModelReport:
    """Examine a known model, or that of a ``config.json``; the other arguments are those of ``doratune tune``.

    Raises:
        UsageError: both or none are given, an unknown model or GPU, a config that cannot be read, an invalid rank.
        StoreError: a store cannot be read.
    """
    found, layers, notes = _layers(model, config)
    slug = _gpu(gpu)
    if slug is None:
        notes.append("no GPU is here, so no kernels were looked up; name one with --gpu, such as --gpu h200")
        return ModelReport(found, None, (), layers, tuple(notes))
    specs = kernels_of(found, ranks=ranks, dtype=dtype, gpu=slug)
    return ModelReport(found, slug, tuple(cover(specs, store)), layers, tuple(notes))


def _gpu(name: str) -> str | None:
    import torch

    from .reachable import named_gpu

    return None if name == "auto" and not torch.cuda.is_available() else named_gpu(name)


def _layers(model: str | None, config: Path | None) -> tuple[Model, tuple[LayerKind, ...], list[str]]:
    """The model, what would run each kind of its layers, and notes."""
    if (model is None) == (config is None):
        raise UsageError("name either a model (--model llama-8b) or a config (--config path/to/config.json)")
    name, text = config_text(model, config)
    notes = _quantised(json.loads(text))
    if find_spec("peft") is None or find_spec("transformers") is None:
        found = find_model(model) if model is not None else read_config(str(config))
        missing = "PEFT and transformers are not installed, so what accelerate would do is not known"
        return found, (), [*found.notes, *notes, missing]
    try:
        answer = ask(__name__, {"name": name, "text": text}, SECONDS)
    except ModelConfigError as error:
        raise ModelConfigError(f"{config or name}: {error}") from error
    found = find_model(model) if model is not None else model_of(answer["model"])
    if answer["problem"]:
        notes.append(f"what accelerate would do is not known: {answer['problem']}")
    return found, tuple(LayerKind(**row) for row in answer["layers"]), [*found.notes, *notes]


def main(seconds: int) -> None:
    """Answer one request of :func:`examine_model`; runs in the separate process."""
    serve(_answer, seconds)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The linear layers of a config's model, and what would run each kind of them."""
    from ..integrations.peft.forecast import forecast
    from ..integrations.peft.versions import PeftVersionError
    from .class_layers import list_layers
    from .meta_model import build_model

    config = json.loads(request["text"])
    model = list_layers(config, request["name"])
    targets = [module for projection in model.projections for module in projection.modules]
    layers: list[dict[str, Any]] = []
    problem = ""
    if targets:
        try:
            layers = [vars(one) for one in forecast(lambda: build_model(config).model, targets, _RANK)]
        except (PeftVersionError, ValueError) as error:
            problem = next(iter(str(error).splitlines()), type(error).__name__)
    layers += [
        {"name": left.name, "count": left.count, "base": "", "runs": NONE, "why": left.why} for left in model.left_out
    ]
    return {"model": dataclasses.asdict(model), "layers": layers, "problem": problem}


def _quantised(config: Mapping[str, Any]) -> list[str]:
    told = config.get("quantization_config")
    if not isinstance(told, dict):
        return []
    method = str(told.get("quant_method") or "a quantised checkpoint")
    return [_QUANTISED.get(method, _OTHER.format(method))]
