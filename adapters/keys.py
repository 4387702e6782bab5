"""Whose tensors these are: the names that trainers give to A, B, m and alpha, and what each part is.

========== ================================================================= =====================
trainer    names, after the layer's                                          m
========== ================================================================= =====================
PEFT       ``.lora_A.weight .lora_B.weight .lora_magnitude_vector``          [d_out]
TensorRT   as PEFT's; m is divided by ``||W + sBA||`` (``normalize_weights``)  [d_out]
LyCORIS    ``.lora_down.weight .lora_up.weight .alpha .dora_scale``          [d_out, 1] or [1, d_in]
ai-toolkit ``.lora_A.weight .lora_B.weight .magnitude``                      [d_out]
NVlabs     ``.lora_A.weight .lora_B.weight .weight_m_wdecomp.weight``        [d_out, 1]
========== ================================================================= =====================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

PEFT, TRTLLM, LYCORIS, AI_TOOLKIT, NVLABS, OTHER = "peft", "trtllm", "lycoris", "ai-toolkit", "nvlabs", "other"
"""Formats. ``other``: LoHa, LoKr and the like, which are neither A nor B."""

A, B, M, ALPHA, MID, BIAS, EMBEDDING = "A", "B", "m", "alpha", "mid", "bias", "embedding"
"""Parts of a layer. ``mid`` is the middle factor of a convolution, ``bias`` that of B."""

PEFT_PREFIX = "base_model.model."

_SUFFIXES: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_A(\.(?!weight$)[^.]+)?\.weight", A, PEFT),
    (r"\.lora_B(\.(?!weight$)[^.]+)?\.weight", B, PEFT),
    (r"\.lora_B(\.(?!bias$)[^.]+)?\.bias", BIAS, PEFT),
    (r"\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(\.weight)?", M, PEFT),
    (r"\.lora_embedding_[AB](\.[^.]+)?", EMBEDDING, PEFT),
    (r"\.lora_down\.weight", A, LYCORIS),
    (r"\.lora_up\.weight", B, LYCORIS),
    (r"\.lora_mid\.weight", MID, LYCORIS),
    (r"\.alpha", ALPHA, LYCORIS),
    (r"\.dora_scale", M, LYCORIS),
    (r"\.magnitude", M, AI_TOOLKIT),
    (r"\.weight_m_wdecomp\.weight", M, NVLABS),
    (r"\.(hada_w|lokr_w|lokr_t|hada_t|oft_|glora|a1\.weight|b1\.weight)[^.]*(\.weight)?", MID, OTHER),
)
_PARSED = [(re.compile(rf"(?P<module>.*?){suffix}"), part, trainer) for suffix, part, trainer in _SUFFIXES]


@dataclass(frozen=True)
class Keys:
    """The tensors of a file, sorted: for each layer its parts' names; what belongs to no layer; whose they are."""

    format: str
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    """Names of another trainer than PEFT, which PEFT does not load."""
    clashes: tuple[tuple[str, str], ...] = ()
    """Pairs of names that are the same part of one layer."""


def sort_keys(names: Iterable[str]) -> Keys:
    """Sort tensors by layer and part, and say which trainer wrote them. PEFT's prefix is cut from layers' names."""
    layers: dict[str, dict[str, str]] = {}
    others: list[str] = []
    foreign: list[str] = []
    clashes: list[tuple[str, str]] = []
    trainers: set[str] = set()
    for name in names:
        for pattern, part, trainer in _PARSED:
            found = pattern.fullmatch(name)
            if found:
                parts = layers.setdefault(found["module"].removeprefix(PEFT_PREFIX), {})
                if part in parts and part not in (MID, EMBEDDING):
                    clashes.append((parts[part], name))
                parts[part] = name
                trainers.add(trainer)
                if trainer != PEFT:
                    foreign.append(name)
                break
        else:
            others.append(name)
    order = (OTHER, AI_TOOLKIT, NVLABS, LYCORIS)
    format = next((one for one in order if one in trainers), PEFT)
    return Keys(format, layers, tuple(others), tuple(foreign), tuple(clashes))
