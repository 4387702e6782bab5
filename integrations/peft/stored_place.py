"""A quantised layer of a norm pass: which of its adapters is active, the W that it stores, and its own forward pass.

PEFT's forward pass of a quantised layer copies the base layer's output, and reads the layer's state piece by piece. A
small model, and one that decodes, waits for that. So a layer passes it by where nothing in it applies: one active
adapter, not merged, no dropout, no hooks. The base layer itself is called as PEFT calls it.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ...internals.torch import current_backward
from ...nn import kernels
from ...nn.autocast import autocast_is_on
from ...nn.autograd import Form, compose_over, compose_unseen
from ...nn.kernels import token_bucket
from ...nn.norm import NormAndGain
from ...nn.norm_cache import norms_taken, slice_settings, take_gains
from ...nn.norm_layer import StoredLayer
from ...nn.stored_norm import How, how_of
from ...runtime.kernel import Kernel
from .examine import PLAIN_TENSORS
from .projections import active_adapter, product_dtype
from .stored import Snapshot, StorageReader
from .swapped import STATE, plain_class, run_plain
from .unchanged import Unchanged, switches_of
from .variant import DoraVariant, caches


def forward(module: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of an accelerated layer with a quantised W, for x [..., d_in]; returns [..., d_out]."""
    if torch.compiler.is_compiling() or args or kwargs:
        return run_plain(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    place = module.__dict__.get(STATE)
    y = place.run(module, x) if type(place) is StoredPlace else None
    return run_plain(module, x) if y is None else y


class _Call(NamedTuple):
    """What the layer was examined as, for calls of :meth:`StoredPlace.run`, and what tells that it still is that.

    ``layer`` is the base layer. ``tensors`` are those that W is stored in, A, B and m, and ``addresses`` theirs.
    ``passed_by`` is PEFT's forward pass; if other code has replaced it, that runs.
    """

    unchanged: Unchanged
    snapshot: Snapshot
    passed_by: object
    variant: DoraVariant
    active: str
    layer: nn.Module
    own: StoredLayer
    tensors: tuple[torch.Tensor, ...]
    addresses: tuple[int, ...]

    def stands(self, module: LoraLayer) -> bool:
        """Whether nothing has changed that decides what the layer computes, but for the values of A, B and m."""
        return (
            self.unchanged.attributes is module.__dict__
            and plain_class(module).forward is self.passed_by
            and self.unchanged.holds()
            and self.snapshot.holds()
        )

    def norm(self, module: LoraLayer) -> torch.Tensor | NormAndGain:
        """The row norm w [d_out] of the layer alone, or w and g."""
        dora = self.variant.glance.look(module, self.active)
        assert not isinstance(dora, str), dora  # it stands
        return self.variant.norm_of(module, self.active, dora)


class StoredPlace:
    """What is known of one accelerated layer whose W is quantised, for norm passes and for its own calls.

    In a call everything that PEFT's forward pass would do is checked: whether the layer is unchanged since it was
    examined, and if not, by examining it again. A call takes no norm of a pass that has read anything else than the
    layer holds.

    Attributes:
        is_left_out: whether the layer is one that no pass reads: no kernel knows its format, or hooks on its base layer
            run after a pass. Such layers are not examined again in every call.
        reader: reads the W of the active adapter's layer.
    """

    def __init__(self) -> None:
        self.is_left_out = False
        self.reader: StorageReader | None = None
        self._own: StoredLayer | None = None
        self._switches: tuple[Any, ...] = ()
        self._call: _Call | None = None
        self._forms: dict[tuple[float, torch.dtype, bool, bool], Form] = {}
        self._hows: dict[torch.dtype | None, How] = {}
        self._kernels: dict[tuple[int, torch.dtype], Kernel | None] = {}

    def __reduce__(self) -> tuple[type[StoredPlace], tuple[()]]:
        return StoredPlace, ()  # a copied layer is examined anew

    def run(self, module: LoraLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output; None if PEFT's forward pass must compute it."""
        dtype = product_dtype(x)
        if dtype is None:
            return None
        call = self._call
        if call is None or not call.stands(module):
            self._call = call = self._examine_call(module)
            if call is None:
                return None
        own, unchanged = call.own, call.unchanged
        if unchanged.device != x.device or (unchanged.adapter_dtype is not dtype and not autocast_is_on(x.device)):
            return None  # adapters that are not rounded
        base = call.layer(x)
        if type(base) not in PLAIN_TENSORS:
            return None
        returned = base.dtype
        if returned is not dtype:
            base = base.to(dtype)
        bias = _bias_of(call.layer)
        trains = torch.is_grad_enabled() and (base.requires_grad or x.requires_grad or _train(own, bias))
        taken = self._taken(call, dtype, trains=trains)
        kernel = None
        if taken is not None and bias is None and returned is dtype is x.dtype is unchanged.adapter_dtype:
            kernel = None if torch.is_grad_enabled() else self._kernel(call, base)
        if taken is not None and kernel is not None:
            return compose_over(base, x, own.lora_A, own.lora_B, taken.g, own.scaling, kernel)
        norm = call.norm(module) if taken is None else taken
        key = (own.scaling, dtype, bias is not None, trains)
        form = self._forms.get(key)
        if form is None:
            scaling, _, biased, _ = key
            settings: Any = {"exact": False, "base_has_bias": biased, "owns_memory": True, "train": trains}
            form = self._forms[key] = Form("dora_compose", scaling, dtype, **settings)
        y = compose_unseen(form, x, base, own.lora_A, own.lora_B, own.magnitude, bias, norm)
        if returned is not dtype and (call.passed_by is Linear.forward or not torch.is_autocast_enabled("cuda")):
            return y.to(returned)  # as PEFT's forward passes do
        return y

    def _kernel(self, call: _Call, base: torch.Tensor) -> Kernel | None:
        """The kernel that composes over ``base`` [..., d_out]; None where there is none, or it is not contiguous."""
        if not base.is_contiguous():
            return None
        tokens = base.numel() // base.shape[-1]
        try:
            return self._kernels[tokens, base.dtype]
        except KeyError:
            own = call.own
            key = (
                "lora_compose",
                own.weight.d_out,
                1,
                own.lora_A.shape[0],
                token_bucket(tokens),
                base.dtype,
                base.dtype,
            )
            found = kernels.kernel_for(*key, (), None, base.device) if tokens else None
            self._kernels[tokens, base.dtype] = found
            return found

    def _taken(self, call: _Call, dtype: torch.dtype, *, trains: bool) -> NormAndGain | None:
        """w and g from the open norm pass, in the first call within it; None where the layer must be asked alone."""
        if trains and current_backward() != -1:
            return None
        own = call.own
        rounded = dtype if autocast_is_on(call.unchanged.device) else None
        how = self._hows.get(rounded)
        if how is None:
            how = self._hows[rounded] = how_of(own.weight.form, own.lora_A.dtype, rounded)
        held = (own.norms,)
        gains = take_gains(held, call.tensors, (call.addresses,), slice_settings(call.tensors[0], own.scaling, how))
        return None if gains is None else NormAndGain(norms_taken(held)[0], gains[0])

    def _examine_call(self, module: LoraLayer) -> _Call | None:
        """Examine the layer: what a call without PEFT's forward pass needs; None if anything of that applies."""
        self._hows.clear()
        self._kernels.clear()
        if "_is_replica" in module.__dict__ or getattr(peft_dora, "ENABLE_DORA_CACHING", False):
            return None
        cls, active = plain_class(module), active_adapter(module)
        if active is None or not cls.forward.__module__.startswith("peft.tuners.lora."):
            return None  # several adapters, or other code's forward pass
        modules: dict[str, Any] = module._modules
        if module.training and type(modules["lora_dropout"]._modules.get(active)) is not nn.Identity:
            return None
        own = self._examine(module)
        if own is None:
            return None
        variant: Any = module.lora_variant[active]
        dora = variant.glance.look(module, active)
        if isinstance(dora, str) or modules["base_layer"] is not dora.layer:
            return None
        tensors = (*own.weight.tensors, own.lora_A, own.lora_B, own.magnitude)
        if own.lora_B.dtype is not own.lora_A.dtype:
            return None
        bias = _bias_of(dora.layer)
        if bias is not None and (type(bias) not in PLAIN_TENSORS or bias.device != tensors[0].device):
            return None
        if any(tensor.device != tensors[0].device for tensor in tensors):
            return None
        unchanged = Unchanged(module, active, (own.lora_A, own.lora_B, own.magnitude))
        snapshot = Snapshot(dora.layer, dora.base.kind)
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
        return _Call(unchanged, snapshot, cls.forward, variant, active, dora.layer, own, tensors, addresses)

    def own(self, module: LoraLayer) -> StoredLayer | None:
        """Examine the layer: what a pass reads of it now, or None. While nothing has changed it is the same object."""
        self.is_left_out = False
        found = self._examine(module)
        if found is None or self._own is None or not _are_same(self._own, found):
            self._own = found
        self._switches = switches_of(module)
        return self._own

    def _examine(self, module: LoraLayer) -> StoredLayer | None:
        active = active_adapter(module)
        variant = module.lora_variant.get(active)
        if type(variant) is not DoraVariant or module._disable_adapters or module.merged_adapters:
            return None
        dora = variant.glance.look(module, active)  # type: ignore[arg-type]
        if isinstance(dora, str) or caches(module, active):  # type: ignore[arg-type]
            return None
        if dora.base.matrix is not None:
            self.is_left_out = True  # dense, in a layer that is not run by itself
            return None
        stored = variant.stored_of(dora)
        if isinstance(stored, str) or not dora.base.private:
            self.is_left_out = True
            return None
        self.reader = variant.storage
        self.reader.dependants.add(self)
        return StoredLayer(stored, dora.lora_A, dora.lora_B, dora.magnitude, dora.scaling, variant.norms)

    def is_as_it_was(self, module: LoraLayer) -> bool:
        """Whether :meth:`own` would probably return what it returned last, which was not None."""
        own = self._own
        if own is None or self._switches != switches_of(module):
            return False
        modules: dict[str, Any] = module._modules
        active = active_adapter(module)
        try:
            parts = [modules[name]._modules[active] for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
        except KeyError:
            return False
        weights = [part._parameters.get("weight") for part in parts]
        return weights[0] is own.lora_A and weights[1] is own.lora_B and weights[2] is own.magnitude

    @property
    def has_norm(self) -> bool:
        """Whether the open norm pass has a norm for the layer that it has not asked for yet."""
        return self._own is not None and self._own.norms.is_given

    def release(self, reader: StorageReader) -> None:
        """Release the W that ``reader`` has found."""
        if self.reader is reader:
            self._own = self._call = None


def _bias_of(base: nn.Module) -> torch.Tensor | None:
    """The bias of a base layer: a parameter, or as HQQ holds it, an attribute."""
    bias: torch.Tensor | None = base._parameters.get("bias")
    return base.__dict__.get("bias") if bias is None else bias


def _train(own: StoredLayer, bias: torch.Tensor | None) -> bool:
    return (
        own.lora_A.requires_grad
        or own.lora_B.requires_grad
        or own.magnitude.requires_grad
        or (bias is not None and bias.requires_grad)
    )


_places: weakref.WeakKeyDictionary[LoraLayer, StoredPlace] = weakref.WeakKeyDictionary()


def stored_place(layer: LoraLayer) -> StoredPlace:
    """The place of a quantised layer, the same for its calls and for the passes of the model and of its blocks."""
    own = layer.__dict__.get(STATE)
    if isinstance(own, StoredPlace):
        return own
    place = _places.get(layer)
    if place is None:
        place = _places[layer] = StoredPlace()
    return place


def _are_same(one: StoredLayer, other: StoredLayer) -> bool:
    """Whether both are of the same tensors and the same cache."""
    return one.scaling == other.scaling and all(map(is_, (*one[:4], one.norms), (*other[:4], other.norms)))
