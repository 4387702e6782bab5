"""The kernels that a model's DoRA layers may launch under ``accelerate``, from its config.

The model is transformers' own class, with PEFT's adapters and without memory for its weights. Its layers run on the
meta device (:mod:`doratune.integrations.peft.reachable`), in a contained process as for reading a config.
:mod:`.jobs` lists what is worth tuning; this list is what can run at all.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..codegen.gpu import find_gpu
from ..codegen.spec import TOKEN_BUCKETS, KernelSpec
from ..codegen.weight_formats import stored_as
from ..errors import UsageError
from .class_process import ask, serve
from .jobs import _check_dtypes, _check_ranks, _check_tokens
from .models import config_text
from .projections import ModelConfigError

SECONDS = 300
"""Time limit for building the model and running its layers, after the imports."""


@dataclass(frozen=True)
class Reach:
    """A model as users run it: exactly one of ``model`` and ``config``, as in ``models.config_text``.

    ``adapter_dtype`` None means ``dtype``. ``weight`` is the weight format of a quantised base, such as ``nf4.nested``,
    whose values have ``dtype``; None for a dense one. No ``tokens`` means every bucket. No ``targets`` means every
    linear layer that PEFT can put an adapter on; a target is the end of layers' names, such as ``q_proj``.
    """

    gpu: str
    model: str | None = None
    config: Path | None = None
    ranks: tuple[int, ...] = (384,)
    dtype: str = "bf16"
    adapter_dtype: str | None = None
    weight: str | None = None
    tokens: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()


def reachable_specs(reach: Reach) -> tuple[str, list[KernelSpec]]:
    """The model's name, and the specs of all kernels that it may launch, sorted by their text.

    Those of ``dora_linear_forward`` are launched only where a store says that the fusion pays.

    Raises:
        UsageError: an invalid request, an unknown model or GPU, or a package is missing.
        ModelConfigError: transformers or PEFT cannot build the model.
    """
    if (reach.model is None) == (reach.config is None):
        raise UsageError("name a model: either --model, such as llama-8b, or --config path/to/config.json")
    adapter = reach.adapter_dtype or reach.dtype
    ranks, buckets = _check_ranks(reach.ranks), _check_tokens(reach.tokens or None)
    _check_dtypes(reach.dtype, adapter, autocast=False)
    stored = None if reach.weight is None else stored_as(reach.weight, reach.dtype)
    slug = find_gpu(reach.gpu).slug
    for package in ("peft", "transformers"):
        if find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed, and the model's layers are its: pip install 'doratune[peft]'"
            )
    name, text = config_text(reach.model, reach.config)
    request = {
        "text": text,
        "ranks": ranks,
        "dtype": reach.dtype,
        "adapter": adapter,
        "weight": stored,
        "targets": reach.targets,
    }
    try:
        found = _asked(json.dumps(request))
    except ModelConfigError as error:
        raise ModelConfigError(f"{reach.config or name}: {error}") from error
    return name, sorted((replace(spec, gpu=slug) for spec in found if spec.tokens in (0, *buckets)), key=str)


@functools.lru_cache(maxsize=16)
def _asked(request: str) -> tuple[KernelSpec, ...]:
    """The specs that the contained process answers to a request."""
    return tuple(KernelSpec.parse(spec) for spec in ask(__name__, json.loads(request), SECONDS)["specs"])


def named_gpu(name: str) -> str:
    """The slug of a GPU's name; ``auto`` is the one here.

    Raises:
        UsageError: an unknown GPU, or none is here.
    """
    if name != "auto":
        return find_gpu(name).slug
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no GPU is visible to PyTorch; name the one that the model will run on, such as --gpu h200")
    from ..runtime.device import find_device, gpu_of

    return gpu_of(find_device("cuda")).slug


def main(seconds: int) -> None:
    """Answer one request of :func:`reachable_specs`; runs in the separate process."""
    serve(_answer, seconds)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from ..integrations.peft.reachable import reachable_specs

    found: set[KernelSpec] = set()
    for rank in request["ranks"]:
        model = _adapted(request, rank)
        found.update(reachable_specs(model, TOKEN_BUCKETS, weight=request["weight"]))
    return {"specs": sorted(map(str, found))}


def _adapted(request: dict[str, Any], rank: int) -> Any:
    """The accelerated PEFT model of a request, on the meta device.

    Raises:
        ModelConfigError: there is no layer to adapt, or PEFT refuses.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from ..integrations.peft import accelerate
    from ..runtime.reference import TORCH_DTYPES
    from .class_layers import list_projections
    from .meta_model import build_model

    model = build_model(json.loads(request["text"])).model.to(TORCH_DTYPES[request["dtype"]])
    names = _targets(list_projections(model), request["targets"])
    settings = LoraConfig(r=rank, use_dora=True, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                adapted = get_peft_model(model, settings, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        except Exception as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelConfigError(f"PEFT cannot put DoRA adapters on it: {said}") from error
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # PEFT trains the adapters alone
                parameter.data = parameter.data.to(TORCH_DTYPES[request["adapter"]])
        accelerate(adapted, quiet=True, precompile=False)
    return adapted


def _targets(modules: Sequence[str], targets: Sequence[str]) -> list[str]:
    unknown = [target for target in targets if not any(_is_of(name, target) for name in modules)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in modules})
        raise ModelConfigError(f"it has no linear layer {unknown[0]!r} to adapt (it has {', '.join(known)[:300]})")
    names = [name for name in modules if not targets or any(_is_of(name, target) for target in targets)]
    if not names:
        raise ModelConfigError("it has no linear layer that PEFT can put a DoRA adapter on")
    return names


def _is_of(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
