"""``doratune.nn.DoRALinear``: a linear layer with a DoRA adapter as a module, for models without PEFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .functional import dora_compose, dora_linear, weight_norm
from .norm import safe_norm
from .norm_cache import NormCache
from .watching import is_untouched

__all__ = ["DoRALinear"]

_MERGED_ELEMENTS = 1 << 24
"""Elements of W + sBA that merging holds in fp32 at a time."""


class LayerError(UsageError, ValueError):
    """An argument or a call that a DoRA layer does not support."""


def _refuse_proxy(x: object) -> None:
    if type(x) is torch.fx.Proxy:
        raise LayerError(
            "torch.fx.symbolic_trace cannot record a DoRA layer: use make_fx or torch.export, or record to_linear()"
        )


def _save_unmerged(layer: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Save the unmerged W even while the layer is merged: otherwise loading would apply the adapter twice."""
    assert isinstance(layer, DoRALinear)
    if layer._unmerged is not None:
        state[f"{prefix}base_layer.weight"] = layer._unmerged


def _unmerge_to_load(layer: nn.Module, *_: object) -> None:
    assert isinstance(layer, DoRALinear)
    if layer.merged:  # the W that is loaded is not merged
        layer.unmerge()


class _Magnitude(nn.Module):
    """Holds m under its name in PEFT's state dicts."""

    def __init__(self, d_out: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_out, dtype=dtype, device=device))


class DoRALinear(nn.Module):
    """``y = m/||W + sBA||_row * (Wx + sBAx) + b`` with W and b frozen, A, B and m trained.

    Its state dict has the names of PEFT's DoRA layer (``base_layer.weight``, ``base_layer.bias``,
    ``lora_A.<adapter>.weight``, ``lora_B.<adapter>.weight``, ``lora_magnitude_vector.<adapter>.weight``), so each can
    load the other's. Under ``torch.autocast`` fp32 adapters are rounded as autocast does.

    Args:
        in_features: d_in. out_features: d_out. r: the rank. lora_alpha: s = lora_alpha / r.
        bias: whether the base layer has one. adapter_name: ``<adapter>`` in the names above.
        lora_dropout: PEFT's dropout probability: in training y is the base layer's output for x plus DoRA's delta form
            for the dropped input.
        dtype: of W and b. adapter_dtype: of A, B and m. None means fp32, as PEFT keeps adapters of 16-bit weights (fp64
            for an fp64 W).
        norm_reuse: when the row norm is reused, see :class:`doratune.nn.norm_cache.NormCache`.

    Raises:
        LayerError: a rank below 1 or a dropout outside [0, 1).
        NormReuseError: an unknown ``norm_reuse``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        *,
        bias: bool = True,
        adapter_name: str = "default",
        lora_dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        norm_reuse: str = "auto",
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
        self._build(linear, r, lora_alpha, adapter_name, lora_dropout, adapter_dtype, norm_reuse)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        adapter_name: str = "default",
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        norm_reuse: str = "auto",
    ) -> DoRALinear:
        """Put an adapter on ``linear``, which is frozen and becomes the base layer. At first the output is unchanged.

        Raises:
            LayerError: ``linear`` is not an ``nn.Linear`` that computes x·Wᵀ + b with a dense W; a rank below 1 or a
                dropout outside [0, 1).
            NormReuseError: an unknown ``norm_reuse``.
        """
        if not isinstance(linear, nn.Linear):
            raise LayerError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
            raise LayerError(
                f"linear must use torch.nn.Linear's forward, got a {type(linear).__name__} with another one. "
                "For quantised layers use PEFT's DoRA and doratune.accelerate"
            )
        if type(linear.weight) not in (torch.Tensor, nn.Parameter) or not linear.weight.is_floating_point():
            raise LayerError(
                f"linear must have a dense weight, got a {type(linear.weight).__name__} of {linear.weight.dtype}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, lora_alpha, adapter_name, lora_dropout, adapter_dtype, norm_reuse)
        return layer

    def _build(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        adapter_name: str,
        lora_dropout: float,
        adapter_dtype: torch.dtype | None,
        norm_reuse: str,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise LayerError(f"the rank r must be an integer of at least 1, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise LayerError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout!r}")
        weight = linear.weight
        dtype = adapter_dtype or (weight.dtype if weight.dtype is torch.float64 else torch.float32)
        d_out, d_in, device = linear.out_features, linear.in_features, weight.device
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.adapter_name, self.lora_dropout = adapter_name, lora_dropout
        self.base_layer = linear.requires_grad_(False)
        self.lora_A = nn.ModuleDict({adapter_name: nn.Linear(d_in, r, bias=False, dtype=dtype, device=device)})
        self.lora_B = nn.ModuleDict({adapter_name: nn.Linear(r, d_out, bias=False, dtype=dtype, device=device)})
        self.lora_magnitude_vector = nn.ModuleDict({adapter_name: _Magnitude(d_out, dtype, device)})
        self._norms = NormCache(norm_reuse)
        self._unmerged: torch.Tensor | None
        self.register_buffer("_unmerged", None, persistent=False)
        self.register_state_dict_post_hook(_save_unmerged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_unmerge_to_load)  # type: ignore[no-untyped-call]
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Set A to random values, B to zero and m to the norms of W, so that the layer's output is its base layer's."""
        lora_A, lora_B, magnitude = self.adapter
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)
        if not magnitude.is_meta:
            with torch.no_grad():
                magnitude.copy_(self.norm())

    @property
    def adapter(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [r, d_in], B [d_out, r] and m [d_out]."""
        name = self.adapter_name
        a, b, m = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_magnitude_vector[name].weight
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert isinstance(m, torch.Tensor)
        return a, b, m

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight contains the adapter now."""
        return self._unmerged is not None

    def norm(self) -> torch.Tensor:
        """The row norms of W + sBA, [d_out] fp32."""
        lora_A, lora_B, _ = self.adapter
        weight = self.base_layer.weight if self._unmerged is None else self._unmerged
        return weight_norm(weight, lora_A, lora_B, self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., d_out] for x [..., d_in]."""
        _refuse_proxy(x)
        base_layer = self.base_layer
        if self._unmerged is not None:
            merged: torch.Tensor = base_layer(x)
            return merged
        lora_A, lora_B, magnitude = self.adapter
        if self.training and self.lora_dropout > 0.0:
            dropped = nn.functional.dropout(x, self.lora_dropout)
            base: torch.Tensor = base_layer(x)
            return base + dora_linear(
                dropped, base_layer.weight, lora_A, lora_B, magnitude, self.scaling, norm=self._norms, delta=True
            )
        if not is_untouched(base_layer):  # call it, so that its hooks run and may change its output
            given: torch.Tensor = base_layer(x)
            trains = torch.is_grad_enabled()
            norm = self._norms.of_weight(base_layer.weight, lora_A, lora_B, self.scaling, trains=trains)
            return dora_compose(given, x, lora_A, lora_B, magnitude, self.scaling, base_layer.bias, norm=norm)
        return dora_linear(
            x, base_layer.weight, lora_A, lora_B, magnitude, self.scaling, base_layer.bias, norm=self._norms
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Write ``g*(W + sBA)`` into the base layer's weight, for inference. A copy of W is kept for :meth:`unmerge`.

        Raises:
            LayerError: the layer is merged already.
        """
        if self._unmerged is not None:
            raise LayerError("the layer is merged already: call unmerge() first")
        merged = self._merged_weight()
        self._unmerged = self.base_layer.weight.detach().clone()
        self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W, bit for bit.

        Raises:
            LayerError: the layer is not merged.
        """
        if self._unmerged is None:
            raise LayerError("the layer is not merged: call merge() first")
        self.base_layer.weight.copy_(self._unmerged)
        self._unmerged = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a new ``nn.Linear`` with the adapter merged into its weight; this layer is not changed."""
        weight = self.base_layer.weight
        linear = nn.Linear(
            self.base_layer.in_features, self.base_layer.out_features, self.base_layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self._merged_weight() if self._unmerged is None else weight.clone(), False)
        if self.base_layer.bias is not None:
            linear.bias = nn.Parameter(self.base_layer.bias.clone(), False)
        return linear

    def _merged_weight(self) -> torch.Tensor:
        lora_A, lora_B, magnitude = self.adapter
        weight = self.base_layer.weight
        norm = safe_norm(self.norm())
        gain = magnitude.to(norm.dtype) / norm
        merged = torch.empty_like(weight)
        rows = max(1, _MERGED_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            dense = weight[part].to(norm.dtype) + self.scaling * (lora_B[part].to(norm.dtype) @ lora_A.to(norm.dtype))
            merged[part] = gain[part, None] * dense
        return merged

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``.

        Raises:
            LayerError: always, because scripting is not supported.
        """
        raise LayerError("torch.jit.script cannot compile a DoRA layer: use torch.jit.trace, or script to_linear()")

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, merged={self.merged}"
