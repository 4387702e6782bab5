"""Write layers in the format of another trainer. Values keep dtype and bits; alpha and gains are computed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter import METADATA, STEM
from .config import NAME, AdapterConfig
from .errors import ConversionError
from .keys import PEFT_PREFIX, TRTLLM
from .low_rank import INPUT, LowRank

_SAME = 1e-6
"""Two scalings are the same within this share: an alpha in fp32 has no more."""


def write_peft(
    folder: Path, layers: Mapping[str, LowRank], known: Mapping[str, Any], base: str = "", *, format: str | None = None
) -> None:
    """Write a folder of PEFT's. ``known`` are the fields of the config that the layers came from, if there was one.

    Raises:
        ConversionError: PEFT has no such adapter.
    """
    from safetensors.torch import save_file

    tensors = {}
    for module, low in layers.items():
        if low.axis == INPUT:
            raise ConversionError(
                f"{module}: its m is for inputs (LyCORIS, wd_on_output=False), and PEFT's, as the paper's, for "
                "outputs: no PEFT adapter computes the same. Merge it into its checkpoint with --merge instead"
            )
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = _shaped(low.a, (low.rank, -1, *low.kernel))
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = _shaped(
            low.b, (low.d_out, low.rank, *(1 for _ in low.kernel))
        )
        if low.m is not None:
            shape = (1, low.d_out, *(1 for _ in low.kernel)) if low.kernel else (low.d_out,)
            tensors[f"{PEFT_PREFIX}{module}.lora_magnitude_vector"] = _shaped(low.m, shape)
    config = peft_config(layers, known, base)
    note = {METADATA: json.dumps({"format": format})} if format else {}
    save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt", **note})
    (folder / NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def write_trtllm(folder: Path, layers: Mapping[str, LowRank], known: Mapping[str, Any], base: str = "") -> None:
    """Write a folder of PEFT's whose m are the gains, as TensorRT-LLM's ``normalize_weights.py`` makes them.

    Raises:
        ConversionError: TensorRT-LLM would read something else.
    """
    config = AdapterConfig.of(peft_config(layers, known, base))
    if config.alpha_pattern:
        raise ConversionError(
            f"layers have different lora_alpha ({len(config.alpha_pattern)} in alpha_pattern), and TensorRT-LLM takes "
            "one for all: merge the adapter into its checkpoint with --merge instead"
        )
    for module, low in layers.items():
        if low.kernel:
            raise ConversionError(f"{module} is a convolution; TensorRT-LLM adapts linear layers only")
    write_peft(folder, layers, known, base, format=TRTLLM)


def write_lycoris(file: Path, layers: Mapping[str, LowRank], known: Mapping[str, Any], prefix: str) -> None:
    """Write a file as LyCORIS and kohya's scripts do. doratune's note in it keeps the names with dots and the config.

    Raises:
        ConversionError: two layers would have one name, or LyCORIS would scale BA by another factor.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for module, low in layers.items():
        name = f"{prefix}_{module}".replace(".", "_")
        if name in names:
            raise ConversionError(
                f"{module} and {names[name]} would both be named {name}; LyCORIS has no dots in names"
            )
        names[name] = module
        if low.scaling == 0:
            raise ConversionError(
                f"{module}: its alpha is 0, and LyCORIS takes an alpha of 0 as the rank; merge the adapter into its "
                "checkpoint with --merge instead"
            )
        tensors[f"{name}.lora_down.weight"] = _shaped(low.a, (low.rank, -1, *low.kernel))
        tensors[f"{name}.lora_up.weight"] = _shaped(low.b, (low.d_out, low.rank, *(1 for _ in low.kernel)))
        tensors[f"{name}.alpha"] = torch.tensor(low.scaling * low.rank, dtype=torch.float32)
        if low.m is not None:
            ones = (1,) * (1 + len(low.kernel))
            shape = (1, -1, *ones[1:]) if low.axis == INPUT else (low.d_out, *ones)
            tensors[f"{name}.dora_scale"] = _shaped(low.m, shape)
    note = json.dumps({"modules": names, "config": dict(known)})
    save_file(tensors, file, metadata={"format": "pt", METADATA: note})


def peft_config(layers: Mapping[str, LowRank], known: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The fields of an ``adapter_config.json`` for these layers: ``known``, where they say the same, else new ones."""
    with_m = {module for module, low in layers.items() if low.m is not None}
    if with_m and len(with_m) < len(layers):
        without = next(module for module in layers if module not in with_m)
        raise ConversionError(
            f"{len(with_m)} of {len(layers)} layers have an m, {without} has none: PEFT's use_dora is for all layers"
        )
    if known and _says(AdapterConfig.of(known), layers, bool(with_m)):
        return dict(known)
    alphas = {module: _whole(low.scaling * low.rank) for module, low in layers.items()}
    rank = Counter(low.rank for low in layers.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    for pattern in (str, _only):
        made = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_dropout": 0.0,
            **known,
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": False,
            "use_dora": bool(with_m),
            "rank_pattern": {pattern(module): low.rank for module, low in layers.items() if low.rank != rank},
            "alpha_pattern": {pattern(module): value for module, value in alphas.items() if value != alpha},
            "target_modules": sorted(layers),
        }
        if _says(AdapterConfig.of(made), layers, bool(with_m)):
            return made
    raise ConversionError("no adapter_config.json gives these layers their ranks and scalings")


def _only(module: str) -> str:
    """A pattern of PEFT's that fits this module alone, and not those whose names end with its own."""
    return f"^{re.escape(module)}"


def _says(config: AdapterConfig, layers: Mapping[str, LowRank], use_dora: bool) -> bool:
    """Whether a config gives every layer its rank and scaling."""
    return config.use_dora == use_dora and all(
        config.rank_of(module) == low.rank and abs(config.scaling_of(module) - low.scaling) <= _SAME * abs(low.scaling)
        for module, low in layers.items()
    )


def _whole(value: float) -> float:
    """A whole number as an integer, as configs have it, where rounding to fp32 left it beside one."""
    near = round(value)
    return near if abs(value - near) <= _SAME * abs(near) else value


def _shaped(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return values.reshape(shape).contiguous()
