"""Run DoRA layers of a PEFT model as groups: all projections that read the same x in one call.

Which layers read the same x is not known from an architecture but seen: in the first forward pass every layer runs
alone, and layers of one parent that got the very same tensor one after another become a group. From then on the first
of a group computes the outputs of all and the others hand theirs out, if they are called with that tensor, unchanged,
in the state in which they were computed. Anything else runs alone, or as PEFT's own forward pass.

A layer passes PEFT's forward by only where nothing in it applies: one active adapter, not merged, no dropout, no hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ...internals.torch import current_backward, some_autocast_is_on, top_saving_hooks, undisturbed
from ...nn.autocast import autocast_dtype, autocast_is_on
from ...nn.group import project
from ...nn.group_plan import MOST_PROJECTIONS, Plan, Projection, are_alike
from ...nn.norm_cache import Opened, opened
from ...nn.rehearsal import is_rehearsing
from .examine import PLAIN_TENSORS, DoraLayer
from .swapped import STATE, run_plain
from .unchanged import Unchanged
from .variant import DoraVariant

_HAS_CACHING = hasattr(peft_dora, "ENABLE_DORA_CACHING")
_NO_VERSION = -1
_VERSION = attrgetter("_version")
_PEFT_FORWARD = Linear.forward if Linear.forward.__module__ == Linear.__module__ else None
"""What is passed by: if other code has replaced it, that runs."""


def forward(module: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of an accelerated layer, for x [..., d_in]; returns [..., d_out]."""
    if torch.compiler.is_compiling() or args or kwargs:
        return run_plain(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    place = module.__dict__.get(STATE)
    y = place.run(module, x) if type(place) is Place else None
    return run_plain(module, x) if y is None else y


def product_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of products with x if layers may run by themselves now; None if PEFT's forward pass must run."""
    if (
        type(x) not in PLAIN_TENSORS
        or x.ndim < 2
        or not undisturbed()
        or Linear.forward is not _PEFT_FORWARD
        or (_HAS_CACHING and peft_dora.ENABLE_DORA_CACHING)
    ):
        return None
    return (autocast_dtype(x.device) or x.dtype) if some_autocast_is_on() else x.dtype


class Place:
    """The place of one accelerated layer among its parent's children.

    Everything that PEFT's forward pass would do is checked in every call: whether the layer is unchanged since it was
    examined, and if not, by examining it again.
    """

    def __init__(self, siblings: Siblings) -> None:
        self.siblings = siblings
        self.group: _Group | None = None
        self._dora: object = None
        self._own: Projection | None = None
        self._plan: Plan | None = None
        self._state: Unchanged | None = None
        self.addresses: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[Place], tuple[Siblings]]:
        return Place, (self.siblings,)  # a copied layer learns its group anew

    def run(self, module: LoraLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output; None if PEFT's forward pass must compute it."""
        dtype = product_dtype(x)
        if dtype is None or (own := self.projection(module, dtype, x.device)) is None:
            return None
        siblings = self.siblings
        if siblings.unsettled:
            siblings.settle(self)
        if self.group is not None:
            y = self.group.run(self, x, own, dtype)
            if y is not None:
                return y
        held = siblings.note(self, module, x) if siblings.unsettled else None
        return project(x, self.plan(own), dtype, held)[0]

    def plan(self, own: Projection) -> Plan:
        """How the layer runs alone; ``own`` is what :meth:`projection` returned."""
        plan = self._plan
        if plan is None or plan.projections[0] is not own:
            self._plan = plan = Plan((own,))
        return plan

    def projection(self, module: LoraLayer, dtype: torch.dtype, device: torch.device) -> Projection | None:
        """The layer's tensors, for products in ``dtype``; None if anything of PEFT's forward pass applies.

        Whoever asks has the dtype from :func:`product_dtype`.
        """
        state = self._state
        if (
            state is None
            or state.attributes is not module.__dict__
            or not state.holds(moved=True)
            or not (state.stands() or self._follows(state))
        ):
            if "_is_replica" in module.__dict__ or self.own(module) is None:
                return None
            state = self._state
            assert state is not None
        if state.dtype is not dtype or state.device != device or not state.frozen:
            return None
        if state.adapter_dtype is not dtype and not autocast_is_on(device):
            return None  # adapters that are not rounded
        return self._own

    @staticmethod
    def plan_together(projections: Sequence[Projection]) -> Plan | None:
        """How layers run together; None if they cannot."""
        return Plan(projections) if are_alike(projections) else None

    @staticmethod
    def run_together(x: torch.Tensor, plan: Plan, dtype: torch.dtype) -> Sequence[torch.Tensor] | None:
        """The output of each layer of ``plan``, in ``dtype``."""
        return project(x, plan, dtype)

    def known(self) -> Projection | None:
        """The layer's tensors if it could run by itself when it was examined last, and they are where they were."""
        state = self._state
        return self._own if state is not None and state.frozen and state.stands() else None

    def own(self, module: LoraLayer) -> Projection | None:
        """Examine the layer, unless it is as it was: its tensors if doratune may run it by itself now."""
        state = self._state
        if state is not None:
            looks = state.attributes is module.__dict__ and not getattr(peft_dora, "ENABLE_DORA_CACHING", False)
            if looks and state.holds(moved=True) and (state.stands() or self._follows(state)):
                return self._own
            Place.changes += 1
            self._state = None
            if self._own is not None and not state.stands():
                self._own.norms.withdraw()
                self._dora = None  # what was computed for the tensors as they were is for another projection
        active = active_adapter(module)
        variant = module.lora_variant.get(active)
        if type(variant) is not DoraVariant or module._disable_adapters or module.merged_adapters:
            return None
        modules: dict[str, Any] = module._modules
        if module.training and type(modules["lora_dropout"]._modules.get(active)) is not nn.Identity:
            return None
        dora = variant.glance.look(module, active)  # type: ignore[arg-type]
        own = self._own
        if dora is not self._dora or (own is not None and modules["base_layer"]._parameters["bias"] is not own.bias):
            self._dora, self._own = dora, _read(dora, variant)
            own = self._own
        if own is None or getattr(peft_dora, "ENABLE_DORA_CACHING", False):
            return None
        if modules["lora_magnitude_vector"]._modules[active].__dict__.get("_dora_cache"):
            return None
        self._state = state = Unchanged(module, active, own[:4])  # type: ignore[arg-type]
        self.addresses = state.addresses
        return own

    def _follows(self, state: Unchanged) -> bool:
        """Whether the layer, which is as it was otherwise, has moved with its storages; then that is noted."""
        if self._own is None or not state.follow():
            return False
        self.addresses = state.addresses
        self._own.norms.follow(state.addresses)
        return True

    changes = 0
    """How often a layer has been found to be other than it was, counted over all models."""

    def is_as_it_was(self, module: LoraLayer) -> bool:
        """Whether :meth:`own` would return what it returned last, which was not None."""
        state = self._state
        return state is not None and state.attributes is module.__dict__ and state.holds()

    @property
    def has_norm(self) -> bool:
        """Whether the open norm pass has a norm for the layer that it has not asked for yet."""
        return self._own is not None and self._own.norms.is_given


def active_adapter(module: LoraLayer) -> str | None:
    """The only active adapter; None if there are several or none."""
    active: str | list[str] = module._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def _read(dora: DoraLayer | str, variant: DoraVariant) -> Projection | None:
    if isinstance(dora, str) or not dora.base.plain or dora.base.matrix is None:
        return None
    a, b, m, weight = dora.lora_A, dora.lora_B, dora.magnitude, dora.base.matrix
    bias: torch.Tensor | None = dora.layer.bias  # type: ignore[assignment]
    if a.dtype is not b.dtype or not a.device == b.device == m.device == weight.device:
        return None
    if bias is not None and (type(bias) not in PLAIN_TENSORS or bias.device != weight.device):
        return None
    return Projection(weight, a, b, m, bias, dora.scaling, variant.norms)


class _Call(NamedTuple):
    """A layer that ran alone, and the tensor that it read."""

    place: Place
    module: LoraLayer
    x: weakref.ref[torch.Tensor]
    version: int


class Siblings:
    """The accelerated layers of one parent, and what has been seen of the tensors that they read.

    Groups serve once no graph of a forward pass without them waits for its backward pass, because a recompute of a
    checkpoint must save the same tensors as its forward pass.
    """

    def __init__(self) -> None:
        self.unsettled = True
        self._calls: list[_Call] = []
        self._found: list[list[_Call]] | None = None
        self._token: _Token | None = _Token()
        self._graphs = weakref.ref(self._token)

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return Siblings, ()

    def note(self, place: Place, module: LoraLayer, x: torch.Tensor) -> object:
        """Remember that ``place`` read x, and return what a graph of the call is to keep alive."""
        if self._found is None and current_backward() == -1:
            self._calls.append(_Call(place, module, weakref.ref(x), _version(x)))
        return self._graphs()

    @property
    def called(self) -> bool:
        """Whether any of the layers was called: then it has been seen which of them read the same x."""
        return self._found is not None or bool(self._calls)

    def layers_of(self, place: Place) -> tuple[LoraLayer, ...]:
        """The layers of the group of ``place``, or of the group that it will be in; none if it runs alone."""
        if place.group is not None:
            return tuple(place.group.modules)
        runs = self._runs() if self._found is None else self._found
        return next((tuple([call.module for call in run]) for run in runs if any(c.place is place for c in run)), ())

    def _runs(self) -> list[list[_Call]]:
        """The calls of layers that read the same x one after another."""
        runs: list[list[_Call]] = []
        for call in self._calls:
            last = runs[-1][-1] if runs else call
            if runs and call.x is last.x and call.version == last.version and len(runs[-1]) < MOST_PROJECTIONS:
                runs[-1].append(call)
            else:
                runs.append([call])
        return [run for run in runs if len(run) > 1]

    def settle(self, place: Place) -> None:
        """When ``place`` is called a second time, form the groups that were seen; let them serve when all is quiet."""
        if current_backward() != -1:
            return
        if self._found is None:
            if not any(call.place is place for call in self._calls):
                return
            self._found, self._calls, self._token = self._runs(), [], None
        if self._graphs() is None:
            for run in self._found:
                group = _Group([call.place for call in run], [call.module for call in run])
                for call in run:
                    call.place.group = group
            self._found, self.unsettled = [], False


class _Token:
    """Lives as long as graphs in which every layer ran alone."""


class _Outputs(NamedTuple):
    """The outputs of one call of a group that its other layers have not handed out yet, and what they depend on."""

    scope: object
    x: weakref.ref[torch.Tensor]
    version: int
    dtype: torch.dtype
    grad: bool
    outputs: dict[Place, tuple[torch.Tensor, Projection, tuple[int, ...], list[int]]]


class _Group:
    """Layers that read the same x, in the order of their calls.

    Their places are of dense layers, or all of quantised ones (:mod:`.stored_place`), which have the same methods.
    """

    def __init__(self, places: Sequence[Place], modules: Sequence[LoraLayer]) -> None:
        self.places = places
        self.modules = modules
        self._call: _Outputs | None = None
        self._plan: Plan | None = None
        self._serves = False

    def run(self, place: Place, x: torch.Tensor, own: Projection, dtype: torch.dtype) -> torch.Tensor | None:
        """The output of ``place``, of all in one call; None if it must run alone.

        A group serves within one call of the model, and the recomputes of such a call. It does not where the graph
        begins at x, since then the backward pass may come for one output after another, nor where writes to x cannot
        be seen.
        """
        recomputes = current_backward()
        scope: object = opened() or (None if recomputes == -1 else recomputes)
        if self.places[0] is not place:
            return self._take(place, x, own, dtype, scope)
        self._call = None
        grad = torch.is_grad_enabled()
        serves = scope is not None and not x.is_inference()
        if serves and grad and x.grad_fn is None:
            serves = is_rehearsing()  # where x stands for any tensor
        if recomputes == -1 and (grad or serves):
            self._serves = serves  # for the recompute; a pass without gradients in between has none
        if not serves or not (recomputes == -1 or self._serves):
            return None
        asks = grad and recomputes == -1 and top_saving_hooks(True) is not None
        return self._compute(x, own, dtype, scope, grad, asks)

    def drop(self) -> None:
        """Forget the outputs that nobody has asked for."""
        self._call = None

    def release(self) -> None:
        """Release the weights of the layers, which one of them holds no more."""
        self._call = self._plan = None

    def _compute(
        self, x: torch.Tensor, first: Projection, dtype: torch.dtype, scope: object, grad: bool, asks: bool
    ) -> torch.Tensor | None:
        """Compute all outputs and return that of the ``first``; None if the layers cannot run together now.

        The others are taken as they were known last. If one has changed since, it does not take its output. With
        ``asks`` each is examined before: what is saved may be recomputed, and a recompute would find the change, and
        save other tensors.
        """
        plan = self._plan
        stands = plan is not None and not asks
        known = [first, *[place.known() for place in self.places[1:]]] if stands else []
        if plan is None or not stands or not all(map(is_, plan.projections, known)):
            found = [first]
            for place, module in zip(self.places[1:], self.modules[1:], strict=True):
                own = place.projection(module, dtype, x.device)
                if own is None:
                    return None
                found.append(own)
            if plan is None or not all(map(is_, plan.projections, found)):
                self._plan = plan = self.places[0].plan_together(found)
            if plan is None:
                return None
        made = self.places[0].run_together(x, plan, dtype)
        if made is None:
            return None
        y, *others = made
        waiting = {}
        for place, other, own in zip(self.places[1:], others, plan.projections[1:], strict=True):
            waiting[place] = other, own, place.addresses, _versions(own)
        self._call = _Outputs(scope, weakref.ref(x), x._version, dtype, grad, waiting)
        if type(scope) is Opened:
            scope.at_end.append(self.drop)
        return y

    def _take(
        self, place: Place, x: torch.Tensor, own: Projection, dtype: torch.dtype, scope: object
    ) -> torch.Tensor | None:
        """The output of ``place`` if the last call computed it for this x, and nothing has changed since.

        That the group serves was true for the same x and scope when they were computed.
        """
        call = self._call
        if call is None:
            return None
        y, projection, addresses, versions = call.outputs.pop(place, _NOTHING)
        if not call.outputs:
            self._call = None
        if (
            y is None
            or call.scope != scope
            or call.x() is not x
            or call.version != x._version  # which no tensor of inference has, nor does a group serve for one
            or call.dtype is not dtype
            or call.grad is not torch.is_grad_enabled()
            or projection is not own
            or addresses != place.addresses
            or versions != _versions(own)
        ):
            self._call = None
            return None
        return y


_NOTHING = (None, None, (), None)


def _versions(own: Any) -> list[int]:
    """The versions of W, A, B and m, of a quantised layer those of what W is stored in; of a bias also where it is."""
    tensors = own[:4] if type(own) is Projection else own.tensors
    bias = own.bias
    try:
        versions = [*map(_VERSION, tensors)]
    except RuntimeError:  # inference tensors have none
        versions = [_version(tensor) for tensor in tensors]
    if bias is not None:
        versions += (_version(bias), bias.data_ptr())
    return versions


def _version(x: torch.Tensor) -> int:
    return _NO_VERSION if x.is_inference() else x._version
