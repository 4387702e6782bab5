"""A user's own model and GPU, in minutes: PEFT's LoRA and DoRA and doratune, as they are, with Liger, compiled.

It measures as :mod:`.model` does. What is new is the time that it keeps to: as many layers as memory and time allow,
and as many rounds as the time allows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DoratuneError, UsageError
from ..terminal.deadline import TimeUpError, time_limit
from .adapted import STOCK, STOCK_LORA, Mode, Peers, bench_device, chosen_modes, measure
from .deadline import Budget
from .fit import Cost, Costs, Fit, fit
from .liger import liger_version
from .measuring import allocated_bytes, check_names, left_out, release_memory
from .memory import within_free_memory
from .model import ModelBench, with_liger
from .quantised import quantise
from .results import COMPILED, OURS, Outcome, Row
from .shapes import random_model, read_model_config
from .tasks import DECODE, INFERENCE, STEP, Request, tasks

MINE_OPS = (STEP, INFERENCE, DECODE)
CONTENDERS = (STOCK_LORA, STOCK, OURS)
COMPILED_LAYERS = 2
"""Layers that are compiled, at most: torch.compile takes time for each."""
CPU_LAYERS, CPU_SEQ, GPU_SEQ = 2, 32, 2048
"""On a CPU the command is tried out."""


_NO_MODEL = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    AssertionError,
    NotImplementedError,
    ZeroDivisionError,
)
"""What transformers and PEFT raise for a config of which they make no model; they check few of its fields."""


@dataclass(frozen=True)
class Asked:
    """What a user asks of the model: see the options of ``doratune bench mine``."""

    model: str | None = None
    config: Path | None = None
    layers: int | None = None
    rank: int = 16
    batch: int = 1
    seq: int | None = None
    loss_tokens: int = 1024
    modes: str = "autocast"
    quant: str | None = None
    checkpointing: bool = True
    decode_tokens: Collection[int] = (1,)
    context: int = 256
    ops: Collection[str] = (STEP, INFERENCE)
    compiled: bool = True
    liger: bool = True
    rounds: int = 20
    minutes: float = 3.0
    device: str | None = None


@dataclass
class Mine:
    """What was measured: ``layers`` of the model's ``all_layers``, why not all (``cuts``), the rows and the notes."""

    asked: Asked
    name: str
    all_layers: int
    request: Request
    device: str
    layers: int = 0
    cuts: list[str] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """Contenders that are timed in turn on one model."""

    layers: int
    names: tuple[str, ...]
    liger: bool = False

    @property
    def title(self) -> str:
        parts = [f"{self.layers} layer{'s' if self.layers > 1 else ''}", "with Liger" if self.liger else ""]
        return ", ".join(filter(None, [*parts, "compiled" if self.names[-1].endswith(COMPILED) else ""]))


def bench_mine(asked: Asked, *, progress: Callable[[str], None] = lambda line: None) -> Mine:
    """Measure the model that was asked for, in about as many minutes as were given.

    A contender that is not available, fails or finds no memory is left out with a note; so is a run whose time is up.
    In the main thread a first call that does not end in the minutes is ended, and with it the process if need be.

    Raises:
        UsageError: PEFT or transformers is missing, there is no GPU and no device is named, or a name or size is wrong.
        DoratuneError: nothing could be measured, or not in the minutes; the message has the first reason.
    """
    budget = Budget.begin(60.0 * asked.minutes)
    if (asked.model is None) == (asked.config is None):
        raise UsageError(
            "name either a model (--model llama-8b) or a config (--config path/to/config.json); `doratune models` "
            "lists the known models"
        )
    check_names("operation", asked.ops, MINE_OPS)
    chosen_modes(asked.modes)
    device = bench_device(asked.device)
    name, whole = read_model_config("", asked.config, None, model=asked.model)
    on_gpu = device.type == "cuda"
    seq = asked.seq or (GPU_SEQ if on_gpu else CPU_SEQ)
    request = Request(
        asked.batch, seq, asked.loss_tokens, asked.checkpointing, tuple(asked.decode_tokens), asked.context
    )
    mine = Mine(asked, name, whole.num_hidden_layers, request, device.type)
    with contextlib.nullcontext() if on_gpu else within_free_memory():
        _Measuring(mine, device, budget, progress).run()
    mine.seconds = budget.spent
    if not mine.outcome.rows:
        reason = next(iter(mine.outcome.notes), "no reason is known")
        raise _nothing(name, reason)
    return mine


class _NotMeasuredError(DoratuneError):
    """What a layer takes could not be measured; the message is the reason."""


def _nothing(name: str, reason: str, remedy: str = "choose a smaller --seq, --batch or --rank") -> DoratuneError:
    return DoratuneError(f"nothing of {name} could be measured: {reason}; {remedy}")


def _too_slow(name: str, reason: str, minutes: str) -> DoratuneError:
    """That one layer takes longer than the command may; ``minutes`` is the option that would give it time."""
    return _nothing(name, reason, f"give {minutes}, or choose a smaller --seq, --batch or --rank")


@dataclass
class _Measuring:
    mine: Mine
    device: torch.device
    budget: Budget
    progress: Callable[[str], None]

    @property
    def notes(self) -> list[str]:
        return self.mine.outcome.notes

    def run(self) -> None:
        mine, liger = self.mine, self._with_liger()
        found = self._fit(runs=2 if liger else 1)
        mine.layers = found.layers
        mine.cuts += found.cuts
        runs = self._runs(found.layers, liger)
        for place, run in enumerate(runs):
            weights = [float(len(one.names)) for one in runs[place:]]
            if place and not self.budget.left:
                self.notes.append(f"{run.title}: left out: the time was up")
                continue
            self.progress(f"{run.title}: {', '.join(run.names)}")
            try:
                least = 0.0 if place else 2.0 * found.seconds  # a first result, however long it takes
                self._measure(run, time.monotonic() + max(least, self.budget.share(weights)))
            except Exception as failure:  # the other runs continue
                self.notes.append(left_out(run.title, failure))
            release_memory(self.device)

    def _with_liger(self) -> bool:
        """Whether Liger's kernels take part; a note says why not."""
        if not self.mine.asked.liger:
            return False
        try:
            version = liger_version()
        except UsageError:
            self.notes.append("Liger's kernels left out: liger-kernel is not installed: pip install liger-kernel")
            return False
        if self.device.type != "cuda":
            self.notes.append("Liger's kernels left out: they need a GPU")
            return False
        self.mine.versions["liger_kernel"] = version
        return True

    def _runs(self, layers: int, liger: bool) -> list[_Run]:
        """Plain contenders on all the layers; compiled ones beside them, on fewer where there are many."""
        compiled = tuple(name + COMPILED for name in (OURS, STOCK_LORA, STOCK))
        if not self.mine.asked.compiled:
            sizes: list[tuple[int, tuple[str, ...]]] = [(layers, CONTENDERS)]
        elif layers <= COMPILED_LAYERS:
            sizes = [(layers, CONTENDERS + compiled)]
        else:
            sizes = [(layers, CONTENDERS), (COMPILED_LAYERS, CONTENDERS + compiled)]
            self.mine.cuts.append(f"torch.compile on {COMPILED_LAYERS} layers: it takes time for each")
        return [_Run(count, names, flag) for count, names in sizes for flag in ((False, True) if liger else (False,))]

    def _measure(self, run: _Run, until: float) -> None:
        mine, asked = self.mine, self.mine.asked
        peers = Peers(liger=run.liger)
        base, bench, _ = self._model(run.layers, peers, asked.rounds)
        bench.until = until
        with with_liger(base, bench.config.model_type, peers):
            chosen = chosen_modes(asked.modes)
            for place, (mode_name, mode) in enumerate(chosen.items()):
                bench.until = time.monotonic() + (until - time.monotonic()) / (len(chosen) - place)
                facts: Row = {
                    "bench": "model",
                    "model": mine.name,
                    "rank": asked.rank,
                    "dtype": asked.quant or "bf16",
                    "adapter": mode.adapter,
                }
                began = time.monotonic()

                def told(what: str, mode_name: str = mode_name, began: float = began) -> None:
                    self.progress(f"{run.title}, {mode_name}: {what} ({time.monotonic() - began:.0f} s)")

                mine.outcome.rows += bench.rows(run.names, asked.rank, mode, facts, False, told)

    def _fit(self, runs: int) -> Fit:
        """The layers that memory and time allow, from calls of one layer and of two."""
        asked, wanted = self.mine.asked, self.mine.asked.layers or self.mine.all_layers
        cuts = [f"{wanted} of {self.mine.all_layers} layers: --layers"] if wanted < self.mine.all_layers else []
        if self.device.type != "cuda" and wanted > CPU_LAYERS:
            wanted = CPU_LAYERS
            cuts = [f"{wanted} of {self.mine.all_layers} layers: this is a CPU"]
        modes = chosen_modes(asked.modes)
        reason = f"a few calls of one layer did not end in the time that was given, --minutes {asked.minutes:g}"
        too_slow = _too_slow(self.mine.name, reason, "more --minutes")
        try:
            with time_limit(self.budget.until, last_words=too_slow):
                one = two = self._probe(1, next(iter(modes.values())))
        except TimeUpError as error:
            raise too_slow from error
        except _NO_MODEL as error:
            raise UsageError(
                f"transformers and PEFT make no causal language model with DoRA of the config of {self.mine.name}: "
                f"{type(error).__name__}: {_first_line(error)}; name the config of one"
            ) from error
        except _NotMeasuredError as error:
            raise _nothing(self.mine.name, str(error)) from error
        if wanted > 1:
            try:
                with time_limit(self.budget.until, last_words=too_slow):
                    two = self._probe(2, next(iter(modes.values())))
            except (DoratuneError, RuntimeError) as failure:
                wanted = 1
                cuts.append(f"1 of {self.mine.all_layers} layers: two fail: {failure}")
        share = self.budget.left / runs / (2 if asked.compiled else 1)  # half of the time is for what is compiled
        memory = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        contenders = len(CONTENDERS) * len(modes)
        found = fit(Costs(one, two), wanted, memory=memory, seconds=share, contenders=contenders)
        if found.layers == 1 and found.seconds > self.budget.left:
            reason = f"one layer takes about {found.seconds:.0f} s, and {self.budget.left:.0f} s are left"
            enough = math.ceil((self.budget.spent + 1.1 * found.seconds) / 60.0)
            raise _too_slow(self.mine.name, reason, f"--minutes {enough}")
        return replace(found, cuts=(*cuts, *found.cuts))

    def _probe(self, layers: int, mode: Mode) -> Cost:
        """What stock PEFT's DoRA takes on so many layers.

        Raises:
            DoratuneError: it cannot run.
        """
        self.progress(f"{layers} layer{'s' if layers > 1 else ''}, to see what a layer takes")
        notes: list[str] = []
        empty = allocated_bytes(self.device.type)
        base, bench, built = self._model(layers, Peers(), 1)
        peak = us = 0.0
        with bench.models([STOCK], self.mine.asked.rank, mode, notes) as (adapted, running):
            held = allocated_bytes(self.device.type) - empty
            for task in tasks(bench.ops, bench.request, bench.config, mode, adapted, self.device):
                running[0].model.train(task.op == STEP)
                options: dict[str, Any] = {"rounds": 1, "device": self.device, "hide_host": False, "notes": notes}
                sample = measure(running, task.call, before=task.before, **options).get(STOCK)
                if sample is None:
                    raise _NotMeasuredError(notes[-1])
                peak, us = max(peak, 1e6 * (sample.peak_mb or 0.0)), us + sample.us[0]
        del base, bench
        release_memory(self.device)
        return Cost(layers, built, held, peak, us)

    def _model(self, layers: int, peers: Peers, rounds: int) -> tuple[nn.Module, ModelBench, int]:
        """A model of random weights of so many layers, what measures it, and the bytes of its weights in bf16."""
        mine, asked = self.mine, self.mine.asked
        _, config = read_model_config("", asked.config, layers, model=asked.model)
        base = random_model(config, self.device)
        built = sum(parameter.nbytes for parameter in base.parameters())
        targets = adapted_layers(base)
        if asked.quant is not None:
            base = quantise(base, targets, asked.quant)
        request = replace(mine.request, liger=peers.liger)
        ops = [op for op in MINE_OPS if op in asked.ops]
        return base, ModelBench(base, config, request, ops, rounds, self.device, peers, mine.outcome, targets), built


def _first_line(error: Exception) -> str:
    """What an error says, without the lists of transformers' hundreds of models that some have below."""
    return next(iter(str(error).strip().splitlines()), "no reason is given").rstrip(".")


def adapted_layers(model: nn.Module) -> Sequence[str]:
    """The names of the linear layers that PEFT's ``all-linear`` adapts: every one but the output head.

    Raises:
        UsageError: there is none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers' models have it
    kinds = (nn.Linear, _conv1d())
    # Some models' layers are subclasses, which PEFT adapts too.
    linear = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules() if isinstance(module, kinds)}
    found = sorted(name for name, module in linear.items() if module is not head)
    if not found:
        raise UsageError("the model has no linear layers that PEFT's all-linear would adapt; name another config")
    return found


def _conv1d() -> type[nn.Module]:
    """GPT-2's linear layer, whose W is transposed."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind
