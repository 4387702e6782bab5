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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import DoratuneError, UsageError
from ..internals.versions import PEFT_EXTRA, import_fault
from ..runtime.device import find_device
from ..tuner.timing import no_collection
from .axolotl import Axolotl
from .dorafactors import Dorafactors
from .fused import FusedFunctions
from .intervals import LEAST_ROUNDS, interval
from .measuring import allocated_bytes, check_names, left_out, peak_mb
from .quantised import held_tensors
from .results import COMPILED, OURS, Row, timing
from .unsloth import Unsloth

TRACKED = f"{OURS}_tracked"
"""doratune with the norm kept from one forward pass to the next: the user's choice, so it runs only if named."""
OPS = ("step", "inference")
AXOLOTL_LORA, AXOLOTL_DORA, UNSLOTH_LORA = "axolotl_lora", "axolotl_dora", "unsloth_lora"
IMPLEMENTATIONS = (
    "peft_lora",
    AXOLOTL_LORA,
    UNSLOTH_LORA,
    "peft_dora",
    AXOLOTL_DORA,
    "dorafactors",
    OURS,
    TRACKED,
    f"peft_lora{COMPILED}",
    f"peft_dora{COMPILED}",
    f"{OURS}{COMPILED}",
)
FUSED = {AXOLOTL_LORA: "axolotl", AXOLOTL_DORA: "axolotl", UNSLOTH_LORA: "unsloth"}
"""Implementations whose unit is an attention or an MLP, and their project: a single linear layer cannot run them."""
STOCK, STOCK_LORA = "peft_dora", "peft_lora"
"""The implementations whose results the others of DoRA, and of LoRA, are compared with."""
AXOLOTL_RANK = 64
"""axolotl's norm kernel is unrolled over the rank. Beyond this rank it compiles for minutes and runs only if named."""

WARM_UPS = 3
MOST_WARM_UPS = 10
SETTLED = 1.25
"""Calls before the clock: at least three, and on a GPU until one takes at most so many times the fastest before it,
since kernels may be compiled in any of the first calls."""

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


@dataclass(frozen=True)
class Peers:
    """Other projects' code that takes part: what is given by path, and Liger's kernels."""

    dorafactors: Dorafactors | None = None
    axolotl: Axolotl | None = None
    unsloth: Unsloth | None = None
    liger: bool = False
    """Whether Liger's kernels are in the model; MLPs that no contender runs itself get Liger's SwiGLU."""

    def has(self, name: str) -> bool:
        """Whether the implementation ``name`` can run, as far as it needs one of them."""
        plain = name.removesuffix(COMPILED)
        if plain == "dorafactors":
            return self.dorafactors is not None
        return plain not in FUSED or self.fused(plain) is not None

    def fused(self, name: str) -> FusedFunctions | None:
        """The functions that the implementation ``name`` of :data:`FUSED` runs."""
        return self.axolotl if FUSED[name] == "axolotl" else self.unsloth


NO_PEERS = Peers()


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
        return {**timing(self.us), "rounds": len(self.us), "cpu_us": cpu, "floor_us": None, "peak_mb": self.peak_mb}


def chosen_modes(text: str) -> dict[str, Mode]:
    """The modes of a list like ``autocast,bf16``.

    Raises:
        UsageError: an unknown mode.
    """
    return {name: MODES[name] for name in _chosen(text.split(","), MODES, "mode")}


def chosen_implementations(
    names: Collection[str], peers: Peers, compiled: bool, known: Collection[str] = IMPLEMENTATIONS
) -> list[str]:
    """The implementations named, or those of ``known`` that can run: peers if given, compiled ones if ``compiled``.

    Raises:
        UsageError: an unknown name, or one of a peer that is not given.
    """
    if "dorafactors" in names and peers.dorafactors is None:
        raise UsageError("--impl dorafactors needs --peer-path, a checkout of sockeye44/dorafactors")
    for name, project in FUSED.items():
        if name in names and name in known and peers.fused(name) is None:
            raise UsageError(f"--impl {name} needs --{project}-path, a checkout of {project} or its unpacked wheel")
    if names:
        return _chosen(names, known, "implementation")
    return [name for name in known if (compiled or not name.endswith(COMPILED)) and peers.has(name) and name != TRACKED]


def _chosen(names: Iterable[str], known: Collection[str], kind: str) -> list[str]:
    names = list(names)
    check_names(kind, names, known)
    return [name for name in known if name in set(names)]


def bench_device(name: str | None) -> torch.device:
    """The device to measure on; the CPU only if named, since its times say nothing about a GPU.

    Raises:
        UsageError: there is no GPU and the CPU was not named, or no such device.
    """
    if name is None and not torch.cuda.is_available():
        raise UsageError(
            "this benchmark needs a GPU and PyTorch sees none; --device cpu tries the command out on a small --config, "
            "without meaning in its times"
        )
    return find_device(name or "cuda")


def with_dora(model: nn.Module, mode: Mode, *, rank: int, targets: Sequence[str], seed: int = 0) -> nn.Module:
    """A PEFT model with DoRA adapters on the layers named, in modules of its own over the parameters of ``model``.

    B and the magnitudes are moved away from PEFT's initial values, so that no term of the formula is zero.

    Raises:
        UsageError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"this benchmark compares with PEFT: {import_fault('peft', error, PEFT_EXTRA)}") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), use_dora=True)
    device = next(model.parameters()).device
    with device:  # adapters are made where they stay
        adapted: nn.Module = get_peft_model(shared_copy(model), config, autocast_adapter_dtype=mode.autocast)
    if mode.adapter == "bf16":  # beside codes, which are integers, PEFT makes them fp32
        for parameter in adapted.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02 * rank**-0.5, generator=generator)
            elif "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.1 * torch.rand(parameter.shape, generator=generator, device=device))
    return adapted


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` that shares its tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *held_tensors(model))}
    return copy.deepcopy(model, shared)


def fp32_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are its own, in fp32.

    Raises:
        DoratuneError: it has quantised layers, whose parameters are codes.
    """
    if not all(type(one) is nn.Parameter and one.is_floating_point() for one in model.parameters()):
        raise DoratuneError("the base is quantised")
    made: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach().to(torch.float32, copy=True)
        made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        made[id(buffer)] = buffer.to(torch.float32, copy=True) if buffer.is_floating_point() else buffer.clone()
    return copy.deepcopy(model, made)


def contenders(names: Collection[str], adapted: nn.Module, peers: Peers, notes: list[str]) -> list[Contender]:
    """The implementations ``names`` over the parameters of ``adapted``; a note says which are not available."""
    found = []
    for name in names:
        try:
            found.append(contender(name, adapted, peers))
        except (ImportError, DoratuneError) as error:
            notes.append(f"{name} left out: {error}")
        except RuntimeError as failure:  # no memory, or no way to compile: the others continue
            notes.append(left_out(name, failure))
    return found


def in_time(running: Iterable[Contender], until: float | None, notes: list[str], case: str) -> Iterator[Contender]:
    """The contenders whose turn comes before the second ``until`` of the monotonic clock; a note names the others."""
    for one in running:
        if until is not None and time.monotonic() >= until:
            notes.append(f"{case}: {one.name} left out: the time was up before its turn")
        else:
            yield one


def contender(name: str, adapted: nn.Module, peers: Peers = NO_PEERS) -> Contender:
    """The implementation ``name`` over the parameters of a PEFT model with DoRA adapters.

    LoRA is the same layers with the same A and B without the variant and the magnitude that make them DoRA.
    """
    model = shared_copy(adapted)
    activate(name.removesuffix(COMPILED), model, peers)
    if not name.endswith(COMPILED):
        return Contender(name, model)
    # Every implementation compiles the same functions of PEFT again: with the default limit the last would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    return Contender(name, torch.compile(model, dynamic=False))  # type: ignore[arg-type]


def activate(name: str, model: nn.Module, peers: Peers = NO_PEERS) -> None:
    """Make a PEFT model with DoRA adapters run the implementation ``name``, in place."""
    if is_lora(name):
        for module in model.modules():
            getattr(module, "lora_variant", {}).clear()
            if hasattr(module, "lora_magnitude_vector"):
                module.lora_magnitude_vector = nn.ModuleDict()
    if name in FUSED:
        functions = peers.fused(name)
        assert functions is not None
        functions.activate(model)
    elif name == "dorafactors":
        assert peers.dorafactors is not None
        peers.dorafactors.activate(model)
    elif name in (OURS, TRACKED):
        from .. import accelerate

        with contextlib.redirect_stdout(sys.stderr):  # its report; standard output is for results
            accelerate(model, norm_reuse="tracked" if name == TRACKED else "auto")
    if peers.liger:
        from .liger import add_swiglu

        add_swiglu(model)


def is_lora(name: str) -> bool:
    """Whether an implementation is one of plain LoRA."""
    return "lora" in name.split("_")


def measure(
    contenders: Sequence[Contender],
    call: Callable[[nn.Module], object],
    *,
    before: Callable[[], None],
    rounds: int,
    device: torch.device,
    hide_host: bool,
    notes: list[str],
    most_warm_ups: int = MOST_WARM_UPS,
    until: float | None = None,
) -> dict[str, Sample]:
    """Time ``call`` on each contender's model in turn, after calls to warm up and one for its peak memory.

    Each round has an order of its own, the same in every run.

    ``before`` runs ahead of every call, outside the time: it releases gradients and writes to what an optimizer would
    have changed. ``hide_host`` keeps the GPU busy until the host has queued the call, so that only the GPU's time is
    measured; else it is the time that a user waits. With ``most_warm_ups`` of :data:`WARM_UPS` every process makes the
    same number of calls. No round begins that would end after the second ``until`` of the monotonic clock, but for the
    first :data:`~.intervals.LEAST_ROUNDS`. A contender that fails is left out, with a note.
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
            warm_up(functools.partial(call, one.model), before, device, most_warm_ups)
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
    longest = 0.0
    for played in range(rounds):
        begin = time.monotonic()
        if until is not None and played >= LEAST_ROUNDS and begin + longest > until:
            break
        chance.shuffle(order)  # the GPU's temperature and clocks depend on what ran before
        with no_collection():
            for one in [*order]:
                before()
                try:
                    us, host_us = _clock(functools.partial(call, one.model), device, busy[one.name])
                except Exception as failure:  # such as too little memory: the others continue
                    if torch.distributed.is_initialized():
                        raise  # the other processes would wait for this one
                    notes.append(left_out(one.name, failure))
                    order.remove(one)
                    del samples[one.name]
                    continue
                samples[one.name].us.append(us)
                samples[one.name].cpu_us.append(host_us)
        longest = max(longest, time.monotonic() - begin)
    before()
    return samples


def ratios(sample: Sample, ours: Sample | None) -> Row:
    """doratune's time over this implementation's: of the medians, and the 20th and 80th percentile over the rounds.

    Also the mean ratio of a round with its confidence interval, see :func:`~.intervals.interval`.
    """
    if ours is None or sample is ours:
        return {}
    by_round = timing([mine / theirs for mine, theirs in zip(ours.us, sample.us, strict=True)])
    ratio = timing(ours.us)["us"] / timing(sample.us)["us"]
    found: Row = {"ratio": ratio, "ratio_p20": by_round["us_p20"], "ratio_p80": by_round["us_p80"]}
    if (paired := interval(ours.us, sample.us)) is not None:
        found.update(ratio_mean=paired.mean, ratio_low=paired.low, ratio_high=paired.high)
    return found


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


def relative_error(found: torch.Tensor, stock: torch.Tensor) -> float:
    """The relative Frobenius distance of ``found`` to ``stock``."""
    difference = torch.linalg.vector_norm(found.float() - stock.float())
    return float(difference / torch.linalg.vector_norm(stock.float()))


def relative_errors(outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The distance of each implementation of DoRA to stock PEFT's, and of LoRA to stock PEFT's LoRA."""
    errors = {}
    for name, output in outputs.items():
        stock = STOCK_LORA if is_lora(name) else STOCK
        if name != stock and stock in outputs:
            errors[name] = relative_error(output, outputs[stock])
    return errors


def warm_up(
    call: Callable[[], object], before: Callable[[], None], device: torch.device, most: int = MOST_WARM_UPS
) -> None:
    """Call until nothing is compiled any more, ``most`` times at most; see :data:`SETTLED`."""
    fastest = float("inf")
    for count in range(1, most + 1):
        before()
        us, _ = _clock(call, device, 0.0)
        if count >= WARM_UPS and (device.type != "cuda" or us <= SETTLED * fastest):
            return
        fastest = min(fastest, us)


def host_us(call: Callable[[], object], before: Callable[[], None], device: torch.device, rounds: int = 5) -> float:
    """The host's time for a call, microseconds, median: until everything is queued, on an empty queue."""
    warm_up(call, before, device)
    spent = []
    with no_collection():
        for _ in range(rounds):
            before()
            spent.append(_clock(call, device, 0.0)[1])
    return sorted(spent)[rounds // 2]


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
