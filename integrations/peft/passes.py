"""Open a norm pass (:mod:`doratune.nn.norm_pass`) when a PEFT model is called, or a block of it.

Hooks open and close the pass. They are on the innermost module that contains all DoRA layers and is called: every call
goes through it, also those of ``LoraModel`` and ``generate``, and autocast is on by then. (Trainers wrap the forward of
the outermost module in autocast; its hooks run before that.) They are also on blocks, the children of a ``ModuleList``:
a block opens a pass of its own if its layers have no norms waiting, because it was called alone, or because its weights
are gathered only for it (FSDP2, whose hooks run before these). The recompute of a checkpointed block opens none where
its layers still have their forward's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...internals.torch import current_backward, hooks_made, is_recording, undisturbed
from ...nn import traced_pass
from ...nn.group_plan import Projection
from ...nn.norm_cache import NormCache, Opened, abandon, opened
from ...nn.norm_layer import AnyLayer, NormLayer, StoredLayer
from ...nn.norm_pass import NormPass
from .examine import PLAIN_TENSORS
from .projections import Place
from .stored import StorageReader
from .stored_place import StoredPlace, stored_place
from .swapped import state_of
from .traced import norm_layers
from .variant import DoraVariant

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called."""
_MOST_PASSES = 4
"""Passes that a module keeps, each for adapters that were active together."""


def install(root: nn.Module) -> None:
    """Hook ``root`` and its blocks, where they have no hooks yet and there are DoRA layers."""
    layers = {id(module) for module in root.modules() if isinstance(module, LoraLayer) and _caches_of(module)}
    if not layers:
        return
    for module, block in _places(root, layers):
        if not any(isinstance(hook, Begin) for hook in module._forward_pre_hooks.values()):
            begin = Begin(block, top=module is root)
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(End(begin), always_call=True)


def remove(root: nn.Module) -> None:
    """Remove the hooks of :func:`install` from ``root`` and all modules below it."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Begin | End)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _places(root: nn.Module, layers: set[int]) -> Iterator[tuple[nn.Module, bool]]:
    """The modules to hook, and whether each is a block; ``layers`` are the ids of the DoRA layers."""
    module = root
    holding = _holding(root, layers)
    called = None
    while not isinstance(module, nn.ModuleList | LoraLayer):
        if not isinstance(module, _CONTAINERS):
            called = module
        inner = [child for child in module.children() if id(child) in holding]
        if len(inner) != 1:
            break
        module = inner[0]
    if called is not None:
        yield called, False
    pending = [module]
    while pending:
        module = pending.pop()
        inner = [child for child in module.children() if id(child) in holding]
        if isinstance(module, nn.ModuleList):
            yield from ((child, True) for child in inner if not isinstance(child, (*_CONTAINERS, LoraLayer)))
        elif not isinstance(module, LoraLayer):
            pending += inner


def _holding(root: nn.Module, layers: set[int]) -> set[int]:
    """The ids of the modules from ``root`` on that are one of ``layers`` or have one below them, in one walk."""
    known: dict[int, bool] = {}

    def visit(module: nn.Module) -> bool:
        key = id(module)
        if key not in known:
            known[key] = key in layers
            known[key] |= True in [visit(child) for child in module.children()]
        return known[key]

    visit(root)
    return {key for key, holds in known.items() if holds}


def _caches_of(layer: LoraLayer) -> list[NormCache]:
    return [variant.norms for variant in layer.lora_variant.values() if isinstance(variant, DoraVariant)]


class Begin:
    """The forward pre-hook: opens a pass over the DoRA layers below its module, unless one serves them already.

    Copies and pickles of it are as new, because they belong to copies of the module.

    Args:
        block: whether the module is a block, which opens a pass of its own inside one that has nothing for its layers.
        top: whether it is the uppermost module, in a call of which no pass can be open yet.
    """

    def __init__(self, block: bool, top: bool) -> None:
        self.block = block
        self.top = top
        self._traced: list[NormCache] = []
        self._layers: _Layers | None = None
        self._calls = threading.local()

    def __reduce__(self) -> tuple[type[Begin], tuple[bool, bool]]:
        return Begin, (self.block, self.top)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if not self.block and not is_recording():
                self._trace(module)
            return
        calls = self._calls.__dict__.setdefault("open", [])
        if calls and not self.block:  # PyTorch runs no hook after a KeyboardInterrupt
            calls.clear()
            abandon()
        calls.append(None)  # first, because an error below still runs the other hook
        layers = self._layers
        if self.block and layers is not None and layers.have_norms():
            return
        if getattr(module, "_is_replica", False) or getattr(peft_dora, "ENABLE_DORA_CACHING", False):
            return
        if layers is None or not layers.are_of(module):
            layers = self._layers = _Layers(module)
        calls[-1] = layers.begin(self.block)

    def _trace(self, module: nn.Module) -> None:
        """Open a pass in the graph that is being traced, unless the graph of an outer module has one.

        An outer module's graph may have been interrupted before it closed its pass. So the uppermost module always
        opens one anew.
        """
        layers = norm_layers(module)
        if self.top or all(layer.norms.traced is None for layer in layers):
            self._traced = traced_pass.begin(layers)

    def end_traced(self) -> None:
        """Close the pass of the traced call, if it opened one."""
        if self._traced:
            traced_pass.end(self._traced)
            self._traced = []

    def end(self) -> None:
        """Close the pass of the last call, if it opened one."""
        calls = self._calls.__dict__.get("open")
        begun = calls.pop() if calls else None
        if begun is not None:
            begun.close()


class End:
    """The forward hook, which also runs where the module raises: closes the pass that ``begin`` has opened."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._begin.end_traced()
        else:
            self._begin.end()


def pass_over(module: nn.Module) -> NormPass:
    """A new pass over the adapters below ``module`` that are active now. It is not opened."""
    owns = [own for place, layer in _Layers(module).layers if (own := place.own(layer)) is not None]
    return NormPass([*map(_norm_layer, owns)])


def _norm_layer(own: Projection | StoredLayer) -> AnyLayer:
    return own if isinstance(own, StoredLayer) else NormLayer(*own[:4], own.scaling, own.norms)


def _place_of(layer: LoraLayer) -> Place | StoredPlace | None:
    """The place of a layer of a pass: by whether its W is dense or quantised; None for other layers."""
    base = layer.get_base_layer()
    weight: Any = None if hasattr(base, "W_q") else getattr(base, "weight", None)  # HQQ's is no matrix
    if type(weight) in PLAIN_TENSORS and weight.is_floating_point():
        return state_of(layer, Place)
    return stored_place(layer) if _caches_of(layer) else None


class _Layers:
    """The DoRA layers below a module, and the passes over those that were active together."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        found = [(_place_of(each), each) for each in module.modules() if isinstance(each, LoraLayer)]
        self.layers = [(place, each) for place, each in found if place is not None]
        holding = _holding(module, {id(each) for _, each in self.layers})
        self._between = [each for each in module.modules() if each is not module and id(each) in holding]
        self._passes: dict[tuple[int, ...], _Last] = {}
        self._last: _Last | None = None

    def are_of(self, module: nn.Module) -> bool:
        """Whether they were collected below this very module, and not below one that it is a copy of."""
        return self._module() is module

    def have_norms(self) -> bool:
        """Whether the open pass has norms for layers that have not asked for them yet."""
        return opened() is not None and any(place.has_norm for place, _ in self.layers)

    def begin(self, block: bool) -> Opened | None:
        """Open a pass, unless an open one serves the layers or they still have the norms of their own forward pass."""
        if not self.layers or not undisturbed() or (not block and self._are_served()):
            return None
        if block and self.have_norms():
            return None
        last = self._last
        if last is not None and last.hooks != hooks_made() and not last.hooked and not self._are_hooked():
            last = self._last = last._replace(hooks=hooks_made())  # of tensors, or elsewhere
        known = last is not None and last.holds(self.layers)
        if last is None or not known:
            last = self._last = self._look()
        if block and not last.owns:
            return None
        if current_backward() != -1 and any(each.norms.has_own(each.tensors[0]) for each in last.members):
            return None
        return last.over.open(stands=known and last.over.stands())

    def release(self, reader: StorageReader) -> None:
        """Release the W of a quantised layer, which it holds no more."""
        self._passes.clear()
        self._last = None

    def _look(self) -> _Last:
        """Check all layers, and make the pass over those that are active."""
        found = [(place.own(layer), place, layer) for place, layer in self.layers]
        owns = [own for own, _, _ in found if own is not None]
        first = next(((place, layer) for own, place, layer in found if own is not None), None)
        left_out = 0
        for _, place, _ in found:
            if isinstance(place, StoredPlace):
                left_out += place.is_left_out
                if place.reader is not None:
                    place.reader.dependants.add(self)
        chosen = (*map(id, owns), self._are_hooked())
        kept = self._passes.get(chosen)
        if kept is None:
            if len(self._passes) >= _MOST_PASSES:
                self._passes.clear()
            hooked = bool(chosen[-1])
            members = [*map(_norm_layer, owns)]
            every = [norms for _, layer in self.layers for norms in _caches_of(layer)]
            over = NormPass([] if hooked else members, every)
            kept = self._passes[chosen] = _Last(hooked, 0, 0, 0, first, owns, members, over)
        return kept._replace(hooks=hooks_made(), changes=_changes(), left_out=left_out)

    def _are_hooked(self) -> bool:
        """Whether hooks of others run between the opening of a pass and a layer: they may write to weights unseen."""
        module = self._module()
        after = [*module._forward_pre_hooks.values()] if module is not None else []
        while after and not isinstance(after.pop(0), Begin):
            pass
        hooks = [*after, *[hook for each in self._between for hook in each._forward_pre_hooks.values()]]
        hooks += [hook for each in self._between for hook in each._forward_hooks.values()]
        return any(not type(hook).__module__.startswith(__package__) for hook in hooks)

    def _are_served(self) -> bool:
        """Whether a pass is open that was meant for these layers, too, whether or not it could compute their norms."""
        at = opened()
        if at is None:
            return False
        own = id(next(iter(_caches_of(self.layers[0][1])), None))
        while at is not None:
            if own in at.layers:
                return True
            at = at.before
        return False


def _is_sharded(layer: LoraLayer) -> bool:
    """Whether an adapter of the layer is no tensor of its own memory now."""
    return any(type(each._parameters.get("weight")) not in PLAIN_TENSORS for each in layer.lora_A.values())


def _changes() -> int:
    """How often layers were found to be other than they were."""
    return Place.changes + StorageReader.changes


class _Last(NamedTuple):
    """The layers that were active when they were checked last, the pass over them, and what was counted until then.

    ``first`` is the first of them. ``owns`` is what their places gave, ``members`` the same as layers of a pass.
    ``left_out`` is the number of others, whose weights no pass reads.
    """

    hooked: bool
    hooks: int
    changes: int
    left_out: int
    first: tuple[Place | StoredPlace, LoraLayer] | None
    owns: list[Projection | StoredLayer]
    members: list[AnyLayer]
    over: NormPass

    def holds(self, layers: Sequence[tuple[Place | StoredPlace, LoraLayer]]) -> bool:
        """Whether a check would probably find the same.

        Adapters are mostly switched in all layers at once, so only the first is asked. A change of another one is found
        in its own call, which checks the layer and what its norm was computed from, and then by the next pass. Nor are
        all asked again while they are shards, as outside of the blocks that FSDP2 gathers.
        """
        if self.first is None and _is_sharded(layers[0][1]):
            return True
        return (
            not self.hooked  # until those hooks are gone
            and len(self.owns) + self.left_out == len(layers)
            and self.hooks == hooks_made()
            and self.changes == _changes()
            and not getattr(peft_dora, "ENABLE_DORA_CACHING", False)
            and (self.first is None or self._first_is_as_it_was(*self.first))
        )

    def _first_is_as_it_was(self, place: Place | StoredPlace, layer: LoraLayer) -> bool:
        return place.is_as_it_was(layer) or (type(place) is Place and place.own(layer) is self.owns[0])
