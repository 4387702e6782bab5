"""What PEFT's ``adapter_config.json`` says of an adapter: ranks and scalings of its layers, and what m is for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..printable import brief
from ..text_file import read_object, reason_of
from .errors import AdapterError

NAME = "adapter_config.json"
_MOST = 2**64
"""More than any rank or alpha."""
_UNLIKE_DORA = (
    "target_parameters",
    "megatron_config",
    "arrow_config",
    "trainable_token_indices",
    "kasa_config",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
_CHANGING_W = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of ``init_lora_weights`` for which PEFT takes BA out of W, or puts other values in W, before it trains."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that decide what the tensors mean. ``raw`` has all of them, as in the file."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    lora_bias: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> AdapterConfig:
        """Read the file.

        Raises:
            AdapterError: it is missing, no JSON object, or of another method than LoRA.
        """
        try:
            raw = read_object(file)
        except FileNotFoundError:
            raise AdapterError(f"{file}: no such file; PEFT saves it beside the adapter's tensors") from None
        except (OSError, ValueError) as error:
            raise AdapterError(f"{file}: {reason_of(error)}; save the adapter again") from error
        return cls.of(raw, str(file))

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str = NAME) -> AdapterConfig:
        """The config of these fields; ``where`` names them in errors."""
        kind = raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise AdapterError(f"{where}: peft_type is {brief(kind)}; DoRA adapters are of type LORA")
        rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
        if not _is_rank(rank) or not _is_number(alpha):
            raise AdapterError(
                f"{where}: r is {brief(rank)} and lora_alpha {brief(alpha)}; expected a positive integer, a finite "
                "number. Correct them, or save the adapter again"
            )
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        if not (isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))):
            raise AdapterError(f"{where}: rank_pattern must map names to positive integers; correct it")
        if not (isinstance(alphas, dict) and all(map(_is_number, alphas.values()))):
            raise AdapterError(f"{where}: alpha_pattern must map names to finite numbers; correct it")
        saved = raw.get("modules_to_save") or []
        if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
            raise AdapterError(f"{where}: modules_to_save must be a list of names; correct it")
        return cls(
            r=rank,
            alpha=float(alpha),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
            lora_bias=bool(raw.get("lora_bias")),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            base=str(raw.get("base_model_name_or_path") or ""),
            raw=raw,
        )

    def rank_of(self, module: str) -> int:
        """The rank that PEFT gives the layer of this name."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scaling_of(self, module: str) -> float:
        """The factor s of BA in the layer of this name."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def unlike_dora(self) -> str:
        """The first field that makes the adapter more than A, B and m for the checkpoint's W; or an empty text."""
        if self.lora_bias:
            return "lora_bias"
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGING_W):
            return f"init_lora_weights={brief(init)}, which changes W"
        return next((field for field in _UNLIKE_DORA if self.raw.get(field)), "")


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that fits a name, as PEFT's ``get_pattern_key`` finds it."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error:
            raise AdapterError(f"{NAME}: {pattern!r} in a pattern is no regular expression; correct it") from None
    return module


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


def _is_number(value: object) -> bool:
    """Whether it is a number that a float holds: not NaN, no infinity, no integer of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST
