"""One model with DoRA adapters in every implementation, and the clock that times them in turn.

Each implementation gets modules of its own over the same parameters: nothing is switched between rounds, and the
memory of the weights is needed once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import DoratuneError, UsageError
from ..tuner.timing import no_collection
from .dorafactors import Dorafactors
from .measuring import allocated_bytes, check_names, left_out, peak_mb
from .results import OURS, Row, timing

COMPILED = "_compiled"
TRACKED = f"{OURS}_tracked"
"""doratune with the norm kept from one forward pass to the next: the user's choice, so it runs only if named."""
OPS = ("step", "inference")
IMPLEMENTATIONS = (
    "peft_lora",
    "peft_dora",
    "dorafactors",
    OURS,
    TRACKED,
    f"peft_lora{COMPILED}",
    f"peft_dora{COMPILED}",
    f"{OURS}{COMPILED}",
)
STOCK = "peft_dora"
"""The implementation whose results the others are compared with."""

SLEEP_CYCLES_PER_SECOND = 2e9
"""About a GPU's clock rate: its queue must be held up for long enough, not exactly."""


@dataclass(frozen=True)
class Mode:
    """The dtypes of adapters and activations: PEFT's default, or everything in bf16."""

    adapter: str
    autocast: bool

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bf16 where the mode has it."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    @property
    def flags(self) -> list[str]:
        return ["autocast"] if self.autocast else []


MODES = {"autocast": Mode("fp32", True), "bf16": Mode("bf16", False)}


@dataclass
class Contender:
    """One implementation: its name and the modules to call."""

    name: str
    model: nn.Module


@dataclass
class Sample:
    """The measurements of one implementation: microseconds on the GPU's clock and on the host's, peak megabytes."""

    us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    peak_mb: float | None = None

    def columns(self) -> Row:
        """The fields of a row."""
        cpu = sorted(self.cpu_us)[len(self.cpu_us) // 2]
        return {**timing(self.us), "cpu_us": cpu, "floor_us": None, "peak_mb": self.peak_mb}


def chosen_modes(text: str) -> dict[str, Mode]:
    """The modes of a list like ``autocast,bf16``.

    Raises:
        UsageError: an unknown mode.
    """
    return {name: MODES[name] for name in _chosen(text.split(","), MODES, "mode")}


def chosen_implementations(names: Collection[str], dorafactors: Dorafactors | None, compiled: bool) -> list[str]:
    """The implementations named, or all that can run: dorafactors if it is given, compiled ones if ``compiled``.

    Raises:
        UsageError: an unknown name, or dorafactors without a checkout.
    """
    if "dorafactors" in names and dorafactors is None:
        raise UsageError("--impl dorafactors needs --peer-path, a checkout of sockeye44/dorafactors")
    if names:
        return _chosen(names, IMPLEMENTATIONS, "implementation")
    return [
        name
        for name in IMPLEMENTATIONS
        if (compiled or not name.endswith(COMPILED))
        and (name != "dorafactors" or dorafactors is not None)
        and name != TRACKED
    ]


def _chosen(names: Iterable[str], known: Collection[str], kind: str) -> list[str]:
    names = list(names)
    check_names(kind, names, known)
    return [name for name in known if name in set(names)]


def bench_device(name: str | None) -> torch.device:
    """The device to measure on; the CPU only if named, since its times say nothing about a GPU.

    Raises:
        UsageError: there is no GPU and the CPU was not named.
    """
    if name is None and not torch.cuda.is_available():
        raise UsageError(
            "this benchmark needs a GPU and PyTorch sees none; --device cpu tries the command out on a small --config, "
            "without meaning in its times"
        )
    return torch.device(name or "cuda")


def with_dora(model: nn.Module, mode: Mode, *, rank: int, targets: Sequence[str], seed: int = 0) -> nn.Module:
    """A PEFT model with DoRA adapters on the layers named, in modules of its own over the parameters of ``model``.

    B and the magnitudes are moved away from PEFT's initial values, so that no term of the formula is zero.

    Raises:
        UsageError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(
            "this benchmark compares with PEFT, which is not installed: pip install 'doratune[peft]'"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), use_dora=True)
    device = next(model.parameters()).device
    with device:  # adapters are made where they stay
        adapted: nn.Module = get_peft_model(shared_copy(model), config, autocast_adapter_dtype=mode.autocast)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02 * rank**-0.5, generator=generator)
            elif "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.1 * torch.rand(parameter.shape, generator=generator, device=device))
    return adapted


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def contenders(
    names: Collection[str], adapted: nn.Module, dorafactors: Dorafactors | None, notes: list[str]
) -> list[Contender]:
    """The implementations ``names`` over the parameters of ``adapted``; a note says which are not available."""
    found = []
    for name in names:
        try:
            found.append(contender(name, adapted, dorafactors))
        except (ImportError, DoratuneError) as error:
            notes.append(f"{name} left out: {error}")
    return found


def contender(name: str, adapted: nn.Module, dorafactors: Dorafactors | None) -> Contender:
    """The implementation ``name`` over the parameters of a PEFT model with DoRA adapters.

    PEFT's LoRA is the same layers with the same A and B without the variant that makes them DoRA.
    """
    model = shared_copy(adapted)
    plain = name.removesuffix(COMPILED)
    if plain == "peft_lora":
        for module in model.modules():
            getattr(module, "lora_variant", {}).clear()
    elif plain == "dorafactors":
        assert dorafactors is not None
        dorafactors.activate(model)
    elif plain in (OURS, TRACKED):
        from .. import accelerate

        with contextlib.redirect_stdout(sys.stderr):  # its report; standard output is for results
            accelerate(model, norm_reuse="tracked" if plain == TRACKED else "auto")
    if not name.endswith(COMPILED):
        return Contender(name, model)
    # Every implementation compiles the same functions of PEFT again: with the default limit the last would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    return Contender(name, torch.compile(model, dynamic=False))  # type: ignore[arg-type]


def measure(
    contenders: Sequence[Contender],
    call: Callable[[nn.Module], object],
    *,
    before: Callable[[], None],
    rounds: int,
    device: torch.device,
    hide_host: bool,
    notes: list[str],
) -> dict[str, Sample]:
    """Time ``call`` on each contender's model in turn, after two calls to warm up and one for its peak memory.

    Each round has an order of its own, the same in every run.

    ``before`` runs ahead of every call, outside the time: it releases gradients and writes to what an optimizer would
    have changed. ``hide_host`` keeps the GPU busy until the host has queued the call, so that only the GPU's time is
    measured; else it is the time that a user waits. A contender that fails is left out, with a note.
    """
    _warm_cublas(device)
    samples: dict[str, Sample] = {}
    busy: dict[str, float] = {}
    for one in contenders:
        sample = Sample()
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # else blocks that others left in other sizes add to its peak
            held = allocated_bytes(device.type)
            for _ in range(2):
                before()
                call(one.model)
            before()
            sample.peak_mb = peak_mb(functools.partial(call, one.model), device.type, held=held)
            before()
            _, host_us = _clock(functools.partial(call, one.model), device, 0.0)
        except Exception as failure:  # the others continue
            notes.append(left_out(one.name, failure))
            continue
        finally:
            before()
        busy[one.name] = 1.5e-6 * host_us * SLEEP_CYCLES_PER_SECOND if hide_host else 0.0
        samples[one.name] = sample
    order = [one for one in contenders if one.name in samples]
    chance = random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)  # the GPU's temperature and clocks depend on what ran before
        with no_collection():
            for one in order:
                before()
                us, host_us = _clock(functools.partial(call, one.model), device, busy[one.name])
                samples[one.name].us.append(us)
                samples[one.name].cpu_us.append(host_us)
    before()
    return samples


def touch(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """A ``before`` for training steps: drop the gradients and write to every trainable parameter, as an optimizer does.

    Without the write an implementation could reuse across steps what training changes.
    """
    trained: list[torch.Tensor] = [parameter for parameter in parameters if parameter.requires_grad]

    def before() -> None:
        for parameter in trained:
            parameter.grad = None
        with torch.no_grad():
            torch._foreach_add_(trained, 0.0)

    return before


def relative_errors(outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The relative Frobenius distance of each implementation of DoRA to stock PEFT's; plain LoRA has none."""
    stock = outputs.get(STOCK)
    if stock is None:
        return {}
    size = float(stock.float().norm())
    return {
        name: float((output.float() - stock.float()).norm()) / size
        for name, output in outputs.items()
        if not name.startswith("peft_lora") and name != STOCK
    }


def _clock(call: Callable[[], object], device: torch.device, busy_cycles: float) -> tuple[float, float]:
    """Microseconds of a call on the device's clock, and of the host until the call is queued."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        spent = 1e6 * (time.perf_counter() - begin)
        return spent, spent
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy_cycles:
        torch.cuda._sleep(int(busy_cycles))
    begin = time.perf_counter()
    start.record()
    call()
    end.record()
    host_us = 1e6 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end)), host_us


def _warm_cublas(device: torch.device) -> None:
    """Make cuBLAS allocate its workspaces, forward and backward, before memory is counted."""
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
        (square @ square).sum().backward()
