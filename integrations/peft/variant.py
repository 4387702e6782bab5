"""PEFT's DoRA variant for linear layers with doratune's forward pass; :mod:`.merge` has its merging.

PEFT calls the variant of the active adapter with the base layer's output, ``result``, and uses the returned output:
``y = result + (g-1)*(result - b) + g*s*BAx`` with g = m / ||W + sBA||. In training with dropout DoRA's part, including
its base product, is computed from the dropped input: ``y = result + (g-1)*Wx_d + g*s*BAx_d``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from ...internals.torch import has_tangents, is_traced, transforms_active
from ...nn.autocast import autocast_dtype, autocast_is_on, without_autocast
from ...nn.functional import checked_linear, dora_compose
from ...nn.norm import NormAndGain
from ...nn.norm_cache import NormCache
from ...nn.stored_norm import StoredMatrix, how_of, norm_of_stored
from ...nn.traced_pass import TracedLayer, stored_values
from ...nn.watching import hidden, intercepted, seen
from .base_layers import multiply, products, row_squares
from .cancellation import CancellationWatch
from .examine import PLAIN_TENSORS, DoraLayer, Glance
from .merge import MergingVariant
from .stored import StorageReader
from .swapped import plain_class


class DoraVariant(MergingVariant):
    """DoRA on one linear layer and adapter by doratune. Calls that it does not support run PEFT's code, with a warning.

    Args:
        layer: the layer's name in the model, for messages.
        norm_reuse: a policy of :class:`~doratune.nn.norm_cache.NormCache`.

    Raises:
        NormReuseError: an unknown policy.
    """

    def __init__(self, layer: str, norm_reuse: str) -> None:
        self.layer = layer
        self.norms = NormCache(norm_reuse)
        self.storage = StorageReader(layer)
        self.squares = RowSquares()
        self.cancellation = CancellationWatch(layer)
        self.glance = Glance()
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[type[DoraVariant], tuple[str, str]]:
        return DoraVariant, (self.layer, self.norms.reuse)  # a copied layer has other weights: no caches

    def forward(
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the layer's output [..., d_out] for x [..., d_in] and the base layer's output ``result``."""
        if is_traced():
            return _by_peft(module, active_adapter, x, result, kwargs)
        dropout = module.lora_dropout[active_adapter] if module.training else None
        drops = dropout is not None and type(dropout) is not nn.Identity
        # Inside a transform parameters have no memory to look at.
        dora = _TRANSFORMED if _is_transformed() else self.glance.look(module, active_adapter)
        reason = dora if isinstance(dora, str) else _unfit(dora, x, result)
        if reason:
            return self._leave_to_peft(reason, module, active_adapter, x, result, kwargs)
        assert isinstance(dora, DoraLayer)

        matrix = dora.base.matrix
        bias: torch.Tensor | None = dora.layer.bias  # type: ignore[assignment]
        adapter = (dora.lora_A, dora.lora_B, dora.magnitude, dora.scaling)
        if drops:
            assert dropout is not None
            x = dropout(x)
            if matrix is not None and not matrix.requires_grad:
                given = self._norm_or_cache(module, active_adapter, dora)
                return result + checked_linear(x, matrix, *adapter, norm=given, delta=True)
            norm = self.norm_of(module, active_adapter, dora)
            # A dense W that reaches this line is trained, and gets its gradient from this product, as with PEFT.
            if matrix is None:
                product = multiply(dora.layer, dora.base, x, autocast_dtype(x.device) or result.dtype)
            else:
                product = nn.functional.linear(x, matrix)
            return result + dora_compose(product, x, *adapter, norm=norm, delta=True, own_base=True)
        alone = _is_alone(module)
        own_base = alone and dora.base.private and type(module).__module__.startswith("peft.tuners.lora.")
        if own_base and dora.base.plain and plain_class(module) is PeftLinear:
            assert matrix is not None
            given = self._norm_or_cache(module, active_adapter, dora)
            return checked_linear(x, matrix, *adapter, bias, base=result, norm=given, own_base=True)
        norm = self.norm_of(module, active_adapter, dora)
        return dora_compose(result, x, *adapter, bias, norm=norm, own_base=own_base)

    def _norm_or_cache(self, module: LoraLayer, adapter: str, dora: DoraLayer) -> torch.Tensor | NormCache:
        """What provides the norm of a dense W: the norm cache, or where PEFT caches it, the row norm w [d_out]."""
        return self._cached_norm(module, adapter, dora) if caches(module, adapter) else self.norms

    def norm_of(self, module: LoraLayer, adapter: str, dora: DoraLayer) -> torch.Tensor | NormAndGain:
        """The row norm w [d_out], with g if a norm pass has computed both from a stored W."""
        if caches(module, adapter):
            return self._cached_norm(module, adapter, dora)
        if torch.compiler.is_compiling() and (traced := self._traced_norm(dora)) is not None:
            return traced
        stored = self.stored_of(dora) if dora.base.matrix is None else None
        return (
            self._compute_norm(dora, stored)
            if stored is None or isinstance(stored, str)
            else self.stored_norm(stored, dora)
        )

    def stored_norm(self, stored: StoredMatrix, dora: DoraLayer) -> torch.Tensor | NormAndGain:
        """:meth:`norm_of` of a layer that is known to store this W, where PEFT caches no norms."""
        taken = self._taken(stored, dora)
        return self._compute_norm(dora, stored) if taken is None else taken

    def _cached_norm(self, module: LoraLayer, adapter: str, dora: DoraLayer) -> torch.Tensor:
        """The row norm w [d_out] through PEFT's cache."""
        magnitude = module.lora_magnitude_vector[adapter]
        return _cached_by_peft(magnitude, lambda: self._compute_norm(dora), adapter_name=adapter)

    def traced_layer(self, dora: DoraLayer) -> TracedLayer | None:
        """The layer with a stored W while a compiler traces it; None if its norm takes the base layer's own forward."""
        if dora.base.matrix is not None or dora.lora_A.dtype is torch.float64:
            return None
        matrix = self.storage.trace(dora.layer, dora.base)
        if isinstance(matrix, str):
            return None
        return TracedLayer(matrix, dora.lora_A, dora.lora_B, dora.magnitude, dora.scaling, self.norms)

    def _traced_norm(self, dora: DoraLayer) -> NormAndGain | None:
        """w and g of a stored W while a compiler traces the layer: its part of the graph's pass, or an operator's."""
        layer = self.traced_layer(dora)
        if layer is None:
            return None
        rounded, known = autocast_dtype(dora.lora_A.device), self.norms.traced
        if (
            known is not None
            and known.weight is layer.weight.tensors[0]
            and known.lora_A is layer.lora_A
            and known.lora_B is layer.lora_B
            and known.magnitude is layer.magnitude
            and known.scaling == layer.scaling
            and known.rounded is rounded
        ):
            return NormAndGain(known.norm, known.g)
        return NormAndGain(*stored_values([layer], rounded)[0])

    def _taken(self, stored: StoredMatrix, dora: DoraLayer) -> NormAndGain | None:
        """w and g of a stored W from the norm pass, if it has read what the layer holds now."""
        a, b, m = dora.lora_A, dora.lora_B, dora.magnitude
        waits = self.norms.is_given
        how = how_of(stored.form, a.dtype, autocast_dtype(a.device))
        with hidden():
            tensors, shapes = (*stored.tensors, a, b, m), (stored.shape, a.shape)
            taken = self.norms.take_stored(tensors, shapes, dora.scaling, how, trains=torch.is_grad_enabled())
        if taken is None and waits:
            StorageReader.changes += 1  # what the pass has read of the layer is not what it is
        return None if taken is None else NormAndGain(*taken)

    def _compute_norm(self, dora: DoraLayer, stored: StoredMatrix | str | None = None) -> torch.Tensor:
        """The row norm w [d_out] of the layer alone; ``stored`` as of :meth:`stored_of`, if that was called."""
        a, b, base = dora.lora_A, dora.lora_B, dora.base
        trains = torch.is_grad_enabled()
        if base.matrix is not None:
            return self.norms.of_weight(base.matrix, a, b, dora.scaling, trains=trains)
        matrix = self.stored_of(dora) if stored is None else stored
        if isinstance(matrix, StoredMatrix):
            how = how_of(matrix.form, a.dtype, autocast_dtype(a.device))
            with hidden():
                compute = lambda: norm_of_stored(matrix, a, b, dora.scaling)  # noqa: E731
                return self.norms.get((*matrix.tensors, a, b), (dora.scaling, how), compute, trains=trains)
        # Without autocast, so that the base layer chooses its dtype. Hidden from modes, because a reused norm runs
        # fewer operations.
        with torch.no_grad(), without_autocast(a.device), hidden():
            squares = self.squares.get(base.weight, lambda: row_squares(dora.layer, base, b.shape[0], a.shape[1]))
            return self.norms.get(
                (squares, a, b),  # a quantised W may have no storage to compare; its squares are new whenever W is
                dora.scaling,
                lambda: self.cancellation.norm(
                    squares, a, b, dora.scaling, lambda rows: products(dora.layer, base, rows), trains=trains
                ),
                trains=trains,
            )

    def stored_of(self, dora: DoraLayer) -> StoredMatrix | str:
        """The quantised W as kernels read it, or the reason why the base layer's own forward is used instead."""
        if torch.compiler.is_compiling():
            return "a compiler traces the layer"
        if dora.lora_A.dtype is torch.float64:
            return "its adapter is in fp64"
        with hidden():
            return self.storage.read(dora.layer, dora.base, dora.lora_B.shape[0], dora.lora_A.shape[1])

    def _leave_to_peft(
        self,
        reason: str,
        module: LoraLayer,
        adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if reason not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(reason)
            warnings.warn(
                f"doratune leaves {self.layer} (adapter {adapter}) to PEFT in calls like this one: {reason}",
                stacklevel=2,
            )
        return _by_peft(module, adapter, x, result, kwargs)


def _by_peft(
    module: LoraLayer, adapter: str, x: torch.Tensor, result: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the output of PEFT's own variant."""
    if "_cast_input_dtype" in module.__dict__:
        x = type(module)._cast_input_dtype(module, x, module.lora_A[adapter].weight.dtype)
    y: torch.Tensor = DoraLinearVariant.forward(module, active_adapter=adapter, x=x, result=result, **kwargs)
    return y


class InputCast:
    """Replaces a layer's ``_cast_input_dtype``, with which PEFT casts x to the adapter's dtype before the variant runs.

    With fp32 adapters that costs a pass over x, another one back, and two more for its gradient. If every active
    adapter is doratune's, x keeps its dtype, because the kernels support fp32 adapters with 16-bit activations.
    """

    def __init__(self, module: LoraLayer) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        module = self.module
        active = module._active_adapter
        if type(active) is list and len(active) == 1 and type(module.lora_variant.get(active[0])) is DoraVariant:
            return x  # fast path of the next condition for one active adapter
        if all(isinstance(module.lora_variant.get(name), DoraVariant) for name in _active(module)):
            return x
        cast: torch.Tensor | None = type(module)._cast_input_dtype(module, x, dtype)
        return cast


class RowSquares:
    """Caches rowsum(W*W) of a quantised W while the layer holds the same tensor.

    Merging, loading and moving to another device replace a quantised weight by a new tensor.
    """

    def __init__(self) -> None:
        self._key: tuple[weakref.ref[torch.Tensor], int, torch.device] | None = None
        self._value: torch.Tensor | None = None

    def get(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the cached squares if they belong to this tensor, unchanged; else ``compute()``."""
        version = 0 if weight.is_inference() else weight._version
        if seen():  # a mode sees the operations: the same ones must run every time
            return compute()
        key = self._key
        if self._value is None or key is None or key[0]() is not weight or key[1:] != (version, weight.device):
            with torch.no_grad():
                self._value = compute()
            self._key = (weakref.ref(weight), version, weight.device)
        return self._value


def _unfit(dora: DoraLayer, x: torch.Tensor, result: torch.Tensor) -> str | None:
    """The reason why doratune does not support a call with these tensors; None if it does."""
    for name, tensor in (("its input", x), ("the base layer's output", result)):
        if type(tensor) not in PLAIN_TENSORS:
            return f"{name} is a {type(tensor).__name__}"
    dtype, device, weight = dora.lora_A.dtype, x.device, dora.base.weight
    if not (device == dora.lora_A.device == dora.lora_B.device == dora.magnitude.device == weight.device):
        return f"x is on {device}, W on {weight.device}, A on {dora.lora_A.device}, m on {dora.magnitude.device}"
    if dora.lora_B.dtype != dtype:
        return f"A is {dtype} and B {dora.lora_B.dtype}"
    if dtype not in (torch.float32, result.dtype) and not autocast_is_on(device):
        return f"its adapter must be torch.float32 or have the activations' dtype {result.dtype}, got {dtype}"
    if intercepted():
        return "a global module hook, a TorchFunctionMode or a replaced linear() may change the outputs of its modules"
    if not torch.compiler.is_compiling() and has_tangents((x, result, dora.lora_A, dora.lora_B, dora.magnitude)):
        return "forward-mode differentiation is on"
    return None


_TRANSFORMED = "a torch.func transform is active"


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and transforms_active()


def _active(module: LoraLayer) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def caches(module: LoraLayer, adapter: str) -> bool:
    """Whether PEFT caches the norm: while its ``DoraCaching`` is on, or where it has cached one."""
    magnitude = module.lora_magnitude_vector[adapter]
    return bool(magnitude.__dict__.get("_dora_cache") or getattr(peft_dora, "ENABLE_DORA_CACHING", False))


def _is_alone(module: LoraLayer) -> bool:
    """Whether ``result`` is the base layer's output; a second active adapter gets the first one's output instead."""
    active = module._active_adapter
    return type(active) is str or len(active) == 1 or len(_active(module)) == 1


def _compute_norm(magnitude: nn.Module, compute: Callable[[], torch.Tensor], *, adapter_name: str) -> torch.Tensor:
    return compute()


_cached_by_peft: Callable[..., torch.Tensor] = (
    peft_dora.cache_decorator("weight-norm")(_compute_norm) if hasattr(peft_dora, "cache_decorator") else _compute_norm
)
"""Computes the norm through PEFT's own cache (``peft.helpers.DoraCaching``, since PEFT 0.19), which PEFT clears."""
