"""Compile the kernels of a model in parallel at the beginning of its first forward pass.

``accelerate`` puts a :class:`FirstStep` before the forward pass of the innermost module that contains all DoRA layers.
There the number of tokens, autocast and the modes of training are known. A further number of tokens that needs other
kernels gets them in the same way. Which layers form groups is known after the first forward pass; their kernels compile
during its backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...errors import UsageError
from ...internals.torch import is_traced
from ...nn.autocast import autocast_dtype
from ...nn.kernels import token_bucket
from ...nn.rehearsal import META, Part, requests_of
from ...nn.stored_norm import norm_requests
from ...runtime.ahead import Batch
from ...runtime.kernel import Request
from .base_layers import read_base
from .examine import examine
from .gated import GatedMlp
from .passes import pass_over
from .projections import Place
from .stored_place import StoredPlace
from .swapped import state_of
from .variant import DoraVariant

_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
"""The arguments of transformers' models that have a batch and a sequence dimension."""

_MOST_CALLS = 3
"""Calls in which groups of layers may form: the first shows what reads the same x, the next may wait for a graph."""

_USUAL_TOKENS = 2048
"""The number of tokens for which kernels are looked up ahead of the first forward pass; another costs milliseconds."""

_HALVES = (torch.bfloat16, torch.float16)

_log = logging.getLogger("doratune")


class FirstStep:
    """A forward pre-hook that compiles ahead what the module's DoRA layers are going to launch.

    ``begun``: the kernels that are being compiled already.
    """

    def __init__(self, begun: Batch | None = None) -> None:
        self._begun = begun
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._under_way: tuple[int, bool] | None = None

    def __reduce__(self) -> tuple[type[FirstStep], tuple[()]]:
        return FirstStep, ()  # a copied model launches kernels of its own

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._under_way = None
        tokens = _tokens(arguments, named)
        if not tokens:
            return
        train = torch.is_grad_enabled()
        state = (token_bucket(tokens), train, module.training, torch.is_autocast_enabled("cuda"))
        calls = self._calls[state] = self._calls[state] + 1
        if calls > _MOST_CALLS or _is_recorded():
            return
        begun, self._begun = self._begun, None
        with _harmless():
            wanted = group_kernels_of(module, tokens, train=train)
            if calls == 1:
                wanted = itertools.chain(kernels_of(module, tokens, train=train), wanted)
            batch = Batch(wanted, besides=begun)
            if begun is not None:
                begun.finish()
            batch.finish()
        if calls == 1:
            self._under_way = tokens, train

    def end(self, module: nn.Module) -> None:
        """Begin with the groups that this call has shown: the next call will launch their kernels."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None and not _is_recorded():
            tokens, train = under_way
            with _harmless():
                self._begun = Batch(group_kernels_of(module, tokens, train=train))


class FirstStepEnd:
    """The forward hook of a :class:`FirstStep`."""

    def __init__(self, first_step: FirstStep) -> None:
        self._first_step = first_step

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._first_step.end(module)


def _is_recorded() -> bool:
    """Whether a graph is being recorded or captured, into which nothing else may come."""
    return is_traced() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def add_first_step(model: nn.Module) -> None:
    """Put a :class:`FirstStep` into ``model`` in place of any that it has, and begin with what is known now."""
    remove_first_step(model)
    module = _innermost(model)
    if module is not None:
        begun = None
        with _harmless():
            begun = _begin(module)
        first_step = FirstStep(begun)
        # Not prepended: up to PyTorch 2.11 a compiler then takes one hook's attributes for another's.
        module.register_forward_pre_hook(first_step, with_kwargs=True)
        module.register_forward_hook(FirstStepEnd(first_step))


def _begin(model: nn.Module) -> Batch:
    """Compile and load what does not depend on the number of tokens, for layers that are on a GPU now.

    fp32 adapters beside 16-bit weights, as PEFT makes them, are taken to be trained under autocast. Where they are not,
    the first forward pass finds other kernels.
    """
    layers = [*accelerated_layers(model)]
    parameters = [parameter for layer in layers for parameter in layer.lora_A.parameters()]
    adapters = {parameter.dtype for parameter in parameters}
    kind = "cuda" if any(parameter.device.type == "cuda" for parameter in parameters) else "cpu"  # or PyTorch warns
    halves = {_dtype_of(layer.get_base_layer()) for layer in layers} & {*_HALVES}
    rounds = torch.float32 in adapters and len(halves) == 1 and not torch.is_autocast_enabled(kind)
    with torch.autocast(kind, halves.pop()) if rounds else contextlib.nullcontext():
        return Batch(each for each in kernels_of(model, _USUAL_TOKENS, train=True) if not each[0].spec.tokens)


def _dtype_of(base: nn.Module) -> torch.dtype | None:
    weight = getattr(base, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else None


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Turn an error of the block into a log record: it costs nothing but time."""
    try:
        yield
    except UsageError:
        raise
    except Exception as problem:
        _log.warning("kernels are compiled one after another, at their first launch: %r", problem)


def remove_first_step(model: nn.Module) -> None:
    """Remove the hooks of :func:`add_first_step`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, FirstStep | FirstStepEnd)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def kernels_of(
    model: nn.Module,
    tokens: int,
    *,
    train: bool,
    device: torch.device | None = None,
) -> Iterator[Request]:
    """The kernels that the accelerated layers of ``model`` launch for ``tokens`` tokens, one after another.

    ``train``: also in the backward pass. ``device`` as in :func:`~doratune.nn.rehearsal.requests_of`.
    """
    parts = [*_parts(model)]
    norms = pass_over(model)
    yield from norms.requests(device)
    yield from _stored_norms(model, norms.served(device), device)
    how: dict[str, Any] = {"device": device, "stand_ins": _dense_bases, "around": _in_a_pass}
    yield from requests_of(parts, tokens, train=train, **how)
    if train and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield from requests_of(parts, tokens, train=False, **how)  # a checkpoint's first pass may record no gradients


def _stored_norms(model: nn.Module, served: frozenset[int], device: torch.device | None) -> Iterator[Request]:
    """The kernels of the norms of quantised layers, but for those with ``served`` caches, which a pass computes.

    Their stand-ins in a rehearsal are dense and have none.
    """
    for layer in accelerated_layers(model):
        for adapter in layer.active_adapters:
            variant = layer.lora_variant.get(adapter)
            if not isinstance(variant, DoraVariant) or id(variant.norms) in served:
                continue
            dora = examine(layer, adapter)
            if isinstance(dora, str) or dora.base.matrix is not None:
                continue
            stored = variant.stored_of(dora)
            where = device or dora.base.weight.device
            if not isinstance(stored, str) and where.type == "cuda":
                yield from norm_requests(stored, dora.lora_A, dora.lora_B, where)


def group_kernels_of(
    model: nn.Module, tokens: int, *, train: bool, device: torch.device | None = None
) -> Iterator[Request]:
    """As :func:`kernels_of`, of layers that have been seen to read the same x and are to run together."""
    groups = {}
    for layer in accelerated_layers(model):
        place = state_of(layer, Place)
        if place is None:
            continue
        together = place.siblings.layers_of(place)
        groups[tuple(map(id, together))] = together
    yield from _stored_groups(model, tokens, train=train, device=device)
    parts = [
        Part(_Together(group), group[0].in_features, _activation_dtype(group[0])) for group in groups.values() if group
    ]
    yield from requests_of(parts, tokens, train=train, device=device)


def _stored_groups(model: nn.Module, tokens: int, *, train: bool, device: torch.device | None) -> Iterator[Request]:
    """The same for quantised layers, whose stand-ins in a rehearsal do not run together."""
    seen = set()
    for layer in accelerated_layers(model):
        place = state_of(layer, StoredPlace)
        siblings: Any = None if place is None else place.siblings
        together = () if place is None else siblings.layers_of(place)
        if together and (ids := tuple(map(id, together))) not in seen:
            seen.add(ids)
            known = [other.known() for each in together if (other := state_of(each, StoredPlace)) is not None]
            projections = [one for one in known if one is not None]
            plan = StoredPlace.plan_together(projections) if len(projections) == len(together) else None
            if plan is not None and (device or plan.device).type == "cuda":
                yield from plan.requests(tokens, _activation_dtype(layer), train=train, device=device)


class _Together(nn.Module):
    """Layers that read the same x. Called, they run alone, and then as a group."""

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cast("Sequence[nn.Module]", layers))
        self.train(layers[0].training)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), _in_a_pass(self):
            for layer in self.layers:
                layer(x)
        with _in_a_pass(self):
            return tuple([layer(x) for layer in self.layers])


@contextlib.contextmanager
def _in_a_pass(module: nn.Module) -> Iterator[None]:
    """Give the layers of ``module`` their norms, as a norm pass does."""
    by = pass_over(module).open()
    try:
        yield
    finally:
        if by is not None:
            by.close()


def accelerated_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The layers of ``model`` that have an adapter which doratune runs."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and any(isinstance(v, DoraVariant) for v in module.lora_variant.values()):
            yield module


def _parts(model: nn.Module) -> Iterator[Part]:
    """The modules to rehearse: gated MLPs whose forward pass nobody has replaced, and the layers outside of them."""
    inside: set[LoraLayer] = set()
    for module in model.modules():
        mlp = state_of(module, GatedMlp)
        gate = None if mlp is None or not mlp.serves(module) else module._modules.get(mlp.form.gate)
        if isinstance(gate, LoraLayer):
            inside |= {*accelerated_layers(module)}
            yield Part(module, gate.in_features, _activation_dtype(gate))
    for layer in accelerated_layers(model):
        if layer not in inside:
            yield Part(layer, layer.in_features, _activation_dtype(layer))


def _activation_dtype(layer: LoraLayer) -> torch.dtype:
    """The dtype of the x that a layer reads, as far as its weights say."""
    base = layer.get_base_layer()
    dtype = _dtype_of(base)
    if dtype is not None and dtype.is_floating_point:
        return dtype
    compute: torch.dtype | None = getattr(base, "compute_dtype", None)
    return autocast_dtype(torch.device("cuda")) or compute or torch.bfloat16


def _dense_bases(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """Plain linear layers in place of quantised base layers, whose forward does not run on the meta device."""
    found: dict[nn.Module, nn.Module] = {}
    for layer in accelerated_layers(module):
        base, d_out, d_in = layer.get_base_layer(), layer.out_features, layer.in_features
        read = read_base(base, d_out, d_in, transposed=getattr(layer, "fan_in_fan_out", False))
        if not isinstance(read, str) and read.matrix is None:
            settings: dict[str, Any] = {"device": META, "dtype": _activation_dtype(layer)}
            dense = nn.Linear(d_in, d_out, bias=getattr(base, "bias", None) is not None, **settings)
            found[base] = dense.requires_grad_(False)
    return found


def _tokens(arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
    """The number of tokens of a forward pass with these arguments; 0 if they do not say."""
    for name in _TOKENS:
        tensor = named.get(name)
        if isinstance(tensor, torch.Tensor):
            return _rows(tensor)
    for value in (*arguments, *named.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return _rows(value)
    return 0


def _rows(tensor: torch.Tensor) -> int:
    """The number of tokens of ``tensor``: [..., width] if it is floating point, else [...]."""
    return tensor.shape[:-1].numel() if tensor.is_floating_point() else tensor.numel()


def _innermost(model: nn.Module) -> nn.Module | None:
    """The innermost module with a forward of its own that contains all accelerated layers; None if it is a layer."""
    layers = {id(layer) for layer in accelerated_layers(model)}
    paths = [name.split(".") for name, module in model.named_modules() if id(module) in layers]
    if not paths or paths == [[""]]:
        return None
    common = itertools.takewhile(lambda names: len({*names}) == 1, zip(*[path[:-1] for path in paths], strict=False))
    chain = [model]
    for name, *_ in common:
        chain.append(getattr(chain[-1], name))
    called = [module for module in chain if type(module).forward is not nn.Module.forward]
    return called[-1] if called else None
