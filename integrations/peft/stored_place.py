"""A quantised layer of a norm pass: which of its adapters is active, the W that it stores, and its own forward pass.

PEFT's forward pass of a quantised layer copies the base layer's output, and reads the layer's state piece by piece. A
small model, and one that decodes, waits for that. So a layer passes it by where nothing in it applies: one active
adapter, not merged, no dropout, no hooks. The base layer itself is called as PEFT calls it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ...nn.autocast import autocast_is_on
from ...nn.autograd import Form, compose_unseen
from ...nn.norm_layer import StoredLayer
from ...nn.stored_group import compose_stored
from ...nn.stored_plan import Source, StoredPlan, StoredProjection, are_alike
from .examine import PLAIN_TENSORS, DoraLayer
from .projections import Siblings, active_adapter, product_dtype
from .sources import source_of
from .stored import Snapshot, StorageReader
from .swapped import STATE, plain_class, run_plain
from .unchanged import Unchanged, switches_of
from .variant import DoraVariant, caches


def forward(module: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of an accelerated layer with a quantised W, for x [..., d_in]; returns [..., d_out]."""
    if torch.compiler.is_compiling() or args or kwargs:
        return run_plain(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    place = module.__dict__[STATE] if STATE in module.__dict__ else None  # noqa: SIM401  (without a call)
    y = place.run(module, x) if type(place) is StoredPlace else None
    return run_plain(module, x) if y is None else y


class _Call(NamedTuple):
    """What the layer was examined as, for calls of :meth:`StoredPlace.run`, and what tells that it still is that.

    ``layer`` is the base layer. ``passed_by`` is PEFT's forward pass, ``computes`` that of the base layer; if other
    code has replaced it, that runs. ``source`` computes the base products; without one the base layer does.
    ``sourced`` and ``given`` are the projection with and without it; None if no plan can have it.
    """

    unchanged: Unchanged
    snapshot: Snapshot
    passed_by: object
    computes: object
    variant: DoraVariant
    dora: DoraLayer
    layer: nn.Module
    own: StoredLayer
    bias: torch.Tensor | None
    source: Source | None
    sourced: StoredProjection | None
    given: StoredProjection | None

    def stands(self, module: LoraLayer) -> bool:
        """Whether nothing has changed that decides what the layer computes, but for the values of A, B and m."""
        return (
            self.unchanged.attributes is module.__dict__
            and type(module)._plain_class.forward is self.passed_by  # a swapped class has it
            and type(self.layer).forward is self.computes
            and self.unchanged.holds()
            and self.snapshot.holds()
        )

    def rounds(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether products on ``device`` in ``dtype`` round the adapter, if it has another dtype."""
        unchanged = self.unchanged
        return unchanged.device == device and (unchanged.adapter_dtype is dtype or autocast_is_on(device))


class StoredPlace:
    """What is known of one accelerated layer whose W is quantised, for norm passes and for its own calls.

    In a call everything that PEFT's forward pass would do is checked: whether the layer is unchanged since it was
    examined, and if not, by examining it again. A call takes no norm of a pass that has read anything else than the
    layer holds. Layers that read the same x run together, as dense ones do (:mod:`.projections`).

    Args:
        siblings: the quantised layers of its parent.

    Attributes:
        is_left_out: whether the layer is one that no pass reads: no kernel knows its format, or hooks on its base layer
            run after a pass. Such layers are not examined again in every call.
        reader: reads the W of the active adapter's layer.
    """

    def __init__(self, siblings: Siblings | None = None) -> None:
        self.siblings = Siblings() if siblings is None else siblings
        self.group: Any = None  # of layers that read the same x, once they are seen
        self.is_left_out = False
        self.reader: StorageReader | None = None
        self._own: StoredLayer | None = None
        self._switches: tuple[Any, ...] = ()
        self._call: _Call | None = None
        self._last: StoredProjection | None = None
        self._plan: StoredPlan | None = None
        self.addresses: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[StoredPlace], tuple[Siblings]]:
        return StoredPlace, (self.siblings,)  # a copied layer is examined anew

    def run(self, module: LoraLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output; None if PEFT's forward pass must compute it."""
        dtype = product_dtype(x)
        if dtype is None:
            return None
        own = self.projection(module, dtype, x.device)
        if own is None or 0 in x.shape:
            return self._compose(x, dtype)
        siblings: Any = self.siblings  # which takes any places that have the same methods
        if siblings.unsettled:
            siblings.settle(self)
        y = None if self.group is None else self.group.run(self, x, own, dtype)
        if y is None:
            held = siblings.note(self, module, x) if siblings.unsettled else None
            plan = self._plan
            if plan is None or plan.projections[0] is not own:
                self._plan = plan = StoredPlan((own,))
            made = self.run_together(x, plan, dtype, held)
            y = self._compose(x, dtype) if made is None else made[0]
        return y

    def projection(self, module: LoraLayer, dtype: torch.dtype, device: torch.device) -> StoredProjection | None:
        """The layer, for products in ``dtype``; None if it cannot run in a plan now.

        It has a source if that takes ``dtype``.
        """
        call, self._last = self._call, None
        if call is None or not call.stands(module):
            self._call = call = self._examine_call(module)
            if call is None:
                return None
            self.addresses = call.unchanged.addresses
        unchanged, bias = call.unchanged, call.bias
        if (unchanged.adapter_dtype is not dtype or unchanged.device != device) and not call.rounds(dtype, device):
            return None
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        source = call.source
        own = self._last = call.sourced if source is not None and source.takes(dtype) else call.given
        return own

    def known(self) -> StoredProjection | None:
        """The layer as it ran last, if its tensors are where they were then."""
        call = self._call
        return self._last if call is not None and call.unchanged.stands() else None

    @staticmethod
    def plan_together(projections: Sequence[StoredProjection]) -> StoredPlan | None:
        """How layers run together; None if they cannot."""
        return StoredPlan(projections) if are_alike(projections) else None

    def run_together(
        self, x: torch.Tensor, plan: StoredPlan, dtype: torch.dtype, held: object = None
    ) -> Sequence[torch.Tensor] | None:
        """The output of each layer of ``plan``, from products in ``dtype``; None if they cannot run in a plan now."""
        bases: list[torch.Tensor] = []
        returned = x.dtype if not plan.sources or plan.sources[0].keeps_dtype else dtype
        if not plan.sources:
            bases = [one.base(x) for one in plan.projections]
            if not all(type(base) in PLAIN_TENSORS and base.is_contiguous() for base in bases):
                return None
            returned = bases[0].dtype
            if returned is not dtype:
                bases = [base.to(dtype) for base in bases]
        outputs = compose_stored(x if x.dtype is dtype else x.to(dtype), plan, bases, held)
        return outputs if returned is dtype or not self._converts() else [y.to(returned) for y in outputs]

    def _converts(self) -> bool:
        """Whether PEFT's forward pass returns the base layer's dtype, whatever the products have."""
        assert self._call is not None
        return self._call.passed_by is Linear.forward or not torch.is_autocast_enabled("cuda")

    def _compose(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The output in the cases in which no plan serves; None if PEFT's forward pass must compute it."""
        call = self._call
        if call is None or not call.rounds(dtype, x.device):
            return None
        base = call.layer(x)
        if type(base) not in PLAIN_TENSORS:
            return None
        own, bias, returned = call.own, call.bias, base.dtype
        if returned is not dtype:
            base = base.to(dtype)
        trains = torch.is_grad_enabled() and (base.requires_grad or x.requires_grad or _train(own, bias))
        norm = call.variant.stored_norm(own.weight, call.dora)
        settings: Any = {"exact": False, "base_has_bias": bias is not None, "owns_memory": True, "train": trains}
        form = Form("dora_compose", own.scaling, dtype, **settings)
        y = compose_unseen(form, x, base, own.lora_A, own.lora_B, own.magnitude, bias, norm)
        return y.to(returned) if returned is not dtype and self._converts() else y

    def _examine_call(self, module: LoraLayer) -> _Call | None:
        """Examine the layer: what a call without PEFT's forward pass needs; None if anything of that applies."""
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
        layer, tensors = dora.layer, own.tensors
        if own.lora_B.dtype is not own.lora_A.dtype:
            return None
        bias = _bias_of(layer)
        if bias is not None and (type(bias) not in PLAIN_TENSORS or bias.device != tensors[0].device):
            return None
        if any(tensor.device != tensors[0].device for tensor in tensors):
            return None
        unchanged = Unchanged(module, active, (own.lora_A, own.lora_B, own.magnitude))
        snapshot = Snapshot(layer, dora.base.kind)
        source = source_of(layer, dora.base.kind)
        # Not the layer's own weight, so that its end is noticed.
        dora = dora._replace(base=dora.base._replace(weight=tensors[0]))
        ask = functools.partial(variant.stored_norm, own.weight, dora)
        projection = StoredProjection(own, tensors, bias, None, layer, ask)
        given = projection if projection.fits else None
        sourced = None if given is None or source is None else given._replace(source=source)
        computes = type(layer).forward
        return _Call(
            unchanged, snapshot, cls.forward, computes, variant, dora, layer, own, bias, source, sourced, given
        )

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
            self._own = self._call = self._plan = self._last = None
            if self.group is not None:
                self.group.release()


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
