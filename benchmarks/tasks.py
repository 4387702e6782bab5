"""What a whole model does: a training step, a forward pass over a prompt, one more token of some sequences."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .adapted import Mode, touch
from .results import Row

STEP, INFERENCE, DECODE, FIRST_STEP = "step", "inference", "decode", "first-step"
DEFAULT_OPS = (STEP, INFERENCE)

FEW_TOKENS = 64
"""Tokens of a call that queues as much as a long one and keeps no GPU busy for as long as that takes the host."""

Results = dict[str, torch.Tensor]
"""What a call computed: the loss and gradients by kind of parameter, or the logits."""


@dataclass(frozen=True)
class Request:
    """What is measured: ``batch`` sequences of ``seq`` tokens, the loss over the last ``loss_tokens`` of all of them.

    ``decode`` are the numbers of sequences that get one more token each, after ``context`` tokens. ``liger``: the model
    has Liger's loss.
    """

    batch: int = 1
    seq: int = 4096
    loss_tokens: int = 1024
    checkpointing: bool = True
    decode: tuple[int, ...] = (1, 4, 16)
    context: int = 256
    liger: bool = False

    @property
    def kept(self) -> int:
        """The tokens of each sequence that the loss is over."""
        return max(1, min(self.loss_tokens // self.batch, self.seq - 1))


@dataclass
class Task:
    """One operation on the model: ``call`` is what is timed, ``before`` runs ahead of it, outside the time.

    ``results`` makes the call and says what it computed. ``anew`` makes the same task, on the same tokens, for another
    mode and model. ``facts`` are the fields of its rows. ``brief`` is the same with few tokens, for the host's time;
    None where the task is brief.
    """

    facts: Row
    adapted: nn.Module
    call: Callable[[nn.Module], object]
    results: Callable[[nn.Module], Results]
    anew: Callable[[Mode, nn.Module], Task]
    before: Callable[[], None] = field(default=lambda: None)
    brief: Task | None = None

    @property
    def op(self) -> str:
        return str(self.facts["op"])

    @property
    def title(self) -> str:
        return " ".join([self.op, "×".join(map(str, self.facts["shape"])), *self.facts["flags"]])


def tasks(
    ops: Sequence[str], request: Request, config: Any, mode: Mode, adapted: nn.Module, device: torch.device
) -> Iterator[Task]:
    """The tasks of the operations ``ops`` on a model of this config, whose trained parameters ``adapted`` holds."""
    for op in ops:
        if op == DECODE:
            for count in request.decode:
                yield _decode(count, request, config, mode, adapted, device)
        else:
            task = whole_sequences(op, request, config, mode, adapted, device)
            if request.batch * request.seq > FEW_TOKENS:
                few = replace(request, batch=1, seq=min(FEW_TOKENS, request.seq))
                task.brief = whole_sequences(op, few, config, mode, adapted, device)
            yield task


def whole_sequences(
    op: str, request: Request, config: Any, mode: Mode, adapted: nn.Module, device: torch.device, *, seed: int = 0
) -> Task:
    """A training step, or a forward pass without gradients (prefill), on all tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (request.batch, request.seq), device=device, generator=generator)
    labels = ids[:, -request.kept :].flatten()

    def logits(model: nn.Module) -> torch.Tensor:
        with mode.context(device):
            result: torch.Tensor = model(input_ids=ids, logits_to_keep=request.kept + 1, use_cache=False).logits
        return result[:, :-1].flatten(0, 1)

    def loss(model: nn.Module) -> torch.Tensor:
        if not request.liger:
            return functional.cross_entropy(logits(model).float(), labels)
        from .liger import loss_of

        with mode.context(device):
            return loss_of(model, ids, request.kept)

    def step(model: nn.Module) -> torch.Tensor:
        result = loss(model)
        result.backward()
        return result.detach()

    def inference(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return logits(model)

    flags = _flags(request, mode)
    if request.checkpointing and op == STEP:
        flags.append("checkpointing")
    if request.batch > 1:
        flags.append(f"batch={request.batch}")
    facts: Row = {"op": op, "shape": [config.num_hidden_layers, request.seq], "flags": flags}
    anew = functools.partial(whole_sequences, op, request, config, device=device, seed=seed)
    if op == INFERENCE:
        return Task(facts, adapted, inference, lambda model: {"logits": inference(model)}, anew)
    before = touch(adapted.parameters())
    return Task(facts, adapted, step, lambda model: {"loss": step(model), **_gradients(adapted)}, anew, before)


def _decode(count: int, request: Request, config: Any, mode: Mode, adapted: nn.Module, device: torch.device) -> Task:
    """One more token for each of ``count`` sequences, after a context whose keys and values are cached.

    The cache is transformers' DynamicCache, which ``generate`` makes by default.
    """
    from transformers import DynamicCache

    generator = torch.Generator(device).manual_seed(0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ids = torch.randint(0, config.vocab_size, (count, 1), device=device, generator=generator)
    size = (count, config.num_key_value_heads, request.context, width)
    cached = [
        [torch.randn(size, device=device, generator=generator).to(torch.bfloat16) for _ in range(2)]
        for _ in range(config.num_hidden_layers)
    ]
    caches: list[Any] = []

    def before() -> None:
        caches[:] = [DynamicCache()]  # the call lengthens it
        for layer, (keys, values) in enumerate(cached):
            caches[0].update(keys, values, layer)

    def decode(model: nn.Module) -> torch.Tensor:
        with torch.no_grad(), mode.context(device):
            result: torch.Tensor = model(input_ids=ids, past_key_values=caches[0], use_cache=True).logits
        return result[:, -1]

    flags = [*_flags(request, mode), f"cache={request.context}"]
    facts: Row = {"op": DECODE, "shape": [config.num_hidden_layers, count], "flags": flags}
    anew = functools.partial(_decode, count, request, config, device=device)
    return Task(facts, adapted, decode, lambda model: {"logits": decode(model)}, anew, before)


def _flags(request: Request, mode: Mode) -> list[str]:
    return [*mode.flags, *(["liger"] if request.liger else [])]


def _gradients(model: nn.Module) -> Results:
    """The gradients of the first, middle and last decoder layer, by kind of parameter."""
    found: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        place = re.search(r"\.layers\.(\d+)\.", name)
        if place is not None and parameter.grad is not None:
            found.setdefault(int(place[1]), []).append((name, parameter.grad))
    layers = sorted(found)
    kinds: dict[str, list[torch.Tensor]] = {}
    for layer in {*layers[:1], *layers[len(layers) // 2 :][:1], *layers[-1:]}:
        for name, gradient in found[layer]:
            kind = next(kind for kind in ("lora_A", "lora_B", "magnitude") if kind in name)
            kinds.setdefault(kind, []).append(gradient.flatten().float())
    return {kind: torch.cat(gradients) for kind, gradients in kinds.items()}
