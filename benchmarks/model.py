"""Whole models: a training step, prefill and decode in every implementation of DoRA, and in LoRA."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..tuner.machine import Machine
from ..tuner.measure import gpu_uuid
from .adapted import (
    AXOLOTL_DORA,
    AXOLOTL_RANK,
    NO_PEERS,
    Contender,
    Mode,
    Peers,
    bench_device,
    chosen_implementations,
    chosen_modes,
    contenders,
    host_us,
    in_time,
    measure,
    ratios,
    with_dora,
)
from .agreement import compare
from .counts import COUNTS, device_work, host_calls
from .intervals import disturbance
from .measuring import check_names, release_memory
from .quantised import quantise
from .results import COMPILED, Outcome, Row, counterpart
from .shapes import SHAPES, TARGETS, random_model, read_model_config
from .tasks import DECODE, DEFAULT_OPS, FIRST_STEP, INFERENCE, STEP, Request, Task, tasks

MODEL_OPS = (STEP, INFERENCE, DECODE, FIRST_STEP)
TIMED = 0.8
"""The share of a time limit in which calls are timed; what is left counts their launches, each at its turn."""
AHEAD = 1.1
"""The GPU's time over the host's up to which the GPU has kept up: then the host never waited for room in its queue."""


def bench_model(
    *,
    shape: str = "8b",
    config: Path | None = None,
    layers: int | None = None,
    ranks: Collection[int] = (384,),
    batch: int = 1,
    seq: int = 4096,
    loss_tokens: int = 1024,
    modes: str = "autocast,bf16",
    quant: str | None = None,
    checkpointing: bool = True,
    decode_tokens: Collection[int] = (1, 4, 16),
    context: int = 256,
    compiled: bool = False,
    implementations: Collection[str] = (),
    ops: Collection[str] = DEFAULT_OPS,
    rounds: int = 5,
    counts: bool = True,
    device: str | None = None,
    minutes: float | None = None,
    parallel: str | None = None,
    processes: int = 2,
    store: Path | None = None,
    peers: Peers = NO_PEERS,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure steps, prefill and decode of a causal language model with adapters on all its linear projections.

    ``implementations`` default to all that can run, under torch.compile too where ``compiled``. ``counts``: also what a
    call puts on the GPU, and the host's own time. ``minutes``: about how long to take at most; ranks, modes and
    operations share the time, and a note says what had none. ``parallel``: only training steps, on several GPUs, see
    :func:`~.parallel.bench_parallel`. ``store``: also the first step with it. ``quant``: the format of the adapted
    layers' W, of :data:`~.quantised.QUANTS`; bf16 if None. See :class:`~.tasks.Request`.

    Raises:
        UsageError: PEFT or transformers is missing, or a name, size or config is wrong.
    """
    check_names("shape", [shape], SHAPES)
    check_names("operation", ops, MODEL_OPS)
    chosen = chosen_modes(modes)
    alone = {"--quant": quant, "--minutes": minutes}
    for option in [option for option, value in alone.items() if value is not None]:
        if parallel is not None or FIRST_STEP in ops:
            raise UsageError(f"{option} measures in one process: leave out --parallel and --op {FIRST_STEP}")
    end = None if minutes is None else time.monotonic() + 60.0 * minutes
    timed = None if minutes is None else time.monotonic() + 60.0 * minutes * TIMED
    names = chosen_implementations(implementations, peers, compiled)
    name, built = read_model_config(shape, config, layers)
    where = bench_device(device)
    sizes: dict[str, Any] = {
        "shape": shape,
        "config": str(config) if config else None,
        "layers": layers,
        "batch": batch,
        "seq": seq,
        "loss_tokens": loss_tokens,
        "checkpointing": checkpointing,
        "device": str(where),
    }
    if parallel is not None:
        from .parallel import PARALLEL_IMPLEMENTATIONS, Parallel, bench_parallel

        if device is not None and torch.device(device).index is not None:
            raise UsageError(
                f"--parallel {parallel} takes a GPU for each process, from the first on: leave out --device"
            )
        sizes["device"] = where.type  # each process takes the GPU of its own number
        parts = _only(names, PARALLEL_IMPLEMENTATIONS, f"--parallel {parallel}")
        runs = [
            Parallel(parallel, processes, parts, rank=rank, mode=mode, rounds=rounds, **sizes)
            for rank in ranks
            for mode in chosen
        ]
        return bench_parallel(runs, progress=progress)
    outcome = Outcome()
    if FIRST_STEP in ops:
        from .first_step import FIRST_STEP_IMPLEMENTATIONS, FirstStep, bench_first_step

        parts = _only(names, FIRST_STEP_IMPLEMENTATIONS, f"--op {FIRST_STEP}")
        firsts = [FirstStep(one, rank=rank, mode=mode, **sizes) for rank in ranks for mode in chosen for one in parts]
        outcome = bench_first_step(firsts, store=store, progress=progress)
    rest = [op for op in MODEL_OPS if op in ops and op != FIRST_STEP]
    if not rest:
        return outcome
    request = Request(batch, seq, loss_tokens, checkpointing, tuple(decode_tokens), context, peers.liger)
    base = random_model(built, where)
    if quant is not None:
        base = quantise(base, TARGETS, quant)
    bench = ModelBench(base, built, request, rest, rounds, where, peers, outcome)
    with with_liger(base, built.model_type, peers):
        groups: list[tuple[list[str], int, Mode, list[Row], Callable[[str], None]]] = []
        dtype, cases = quant or "bf16", len(ranks) * len(chosen)
        for rank in ranks:
            able = _able(names, rank, named=bool(implementations), notes=outcome.notes)
            for mode_name, mode in chosen.items():
                if timed is not None:
                    bench.until = share_end(timed, cases - len(groups))
                told = functools.partial(_told, progress, time.monotonic(), f"{name}, r={rank}, {mode_name}")
                facts: Row = {"bench": "model", "model": name, "rank": rank, "dtype": dtype, "adapter": mode.adapter}
                rows = bench.rows(able, rank, mode, facts, counts, told)
                outcome.rows += rows
                groups.append((able, rank, mode, rows, told))
        if counts:
            for group in groups:  # after all timing: a process that was profiled once launches more slowly
                if end is not None and time.monotonic() >= end:
                    outcome.notes.append(f"r={group[1]}: launches are not counted, the time was up")
                else:
                    bench.count(*group)
    return outcome


@dataclass
class ModelBench:
    """Measures a model of random weights, ``base``, with adapters on the layers ``targets``; see :func:`bench_model`.

    ``rounds`` are played at most; ``until`` is the second of the monotonic clock at which they end.
    """

    base: nn.Module
    config: Any
    request: Request
    ops: Sequence[str]
    rounds: int
    device: torch.device
    peers: Peers
    outcome: Outcome
    targets: Sequence[str] = TARGETS
    until: float | None = None

    def rows(
        self,
        names: Sequence[str],
        rank: int,
        mode: Mode,
        facts: Row,
        counts: bool,
        progress: Callable[[str], None],
    ) -> list[Row]:
        """The rows of all operations at one rank and mode; with ``counts`` they have the host's own time."""
        rows = []
        with self.models(names, rank, mode, self.outcome.notes) as (adapted, running):
            for task, until in self._with_ends(tasks(self.ops, self.request, self.config, mode, adapted, self.device)):
                progress(task.title)
                for row in self._measure(task, running, counts, progress, until):
                    rows.append({**facts, **task.facts, **row})
        return rows

    def _with_ends(self, found: Iterable[Task]) -> Iterator[tuple[Task, float | None]]:
        """Each task with the second at which its rounds end: the time left is shared among those that are left."""
        if self.until is None:
            yield from ((task, None) for task in found)
            return
        count = sum(len(self.request.decode) if op == DECODE else 1 for op in self.ops)
        for place, task in enumerate(found):
            yield task, share_end(self.until, count - place)

    def count(
        self,
        names: Sequence[str],
        rank: int,
        mode: Mode,
        rows: list[Row],
        progress: Callable[[str], None],
    ) -> None:
        """Add to the rows of one rank and mode what a call puts on the GPU; not of what is under torch.compile."""
        plain = [name for name in names if not name.endswith(COMPILED)]
        with self.models(plain, rank, mode, []) as (adapted, running):
            for task in tasks(self.ops, self.request, self.config, mode, adapted, self.device):
                progress(f"{task.title}, launches")
                for one in running:
                    wanted = (task.facts["op"], task.facts["shape"], task.facts["flags"], one.name)
                    row = next((r for r in rows if (r["op"], r["shape"], r["flags"], r["impl"]) == wanted), None)
                    if row is not None:
                        row.update(self._counted(task, one.model))

    @contextlib.contextmanager
    def models(
        self, names: Sequence[str], rank: int, mode: Mode, notes: list[str]
    ) -> Iterator[tuple[nn.Module, list[Contender]]]:
        """The model that holds the adapters, and the contenders; memory is free again afterwards."""
        adapted = with_dora(self.base, mode, rank=rank, targets=self.targets)
        if self.request.checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        running = contenders(names, adapted, self.peers, notes)
        yield adapted, running
        running.clear()
        del adapted
        torch.compiler.reset()
        release_memory(self.device)

    def _measure(
        self,
        task: Task,
        running: list[Contender],
        counts: bool,
        progress: Callable[[str], None],
        until: float | None,
    ) -> list[Row]:
        for one in running:
            one.model.train(task.op == STEP)  # checkpointing needs training mode; there is no dropout
        notes = self.outcome.notes
        waiting = in_time(running, until, notes, task.title)
        facts = compare(task, waiting, self.peers, self.outcome, until=until)
        right = [one for one in running if one.name in facts]
        progress(f"{task.title}, compared with PEFT")
        options: dict[str, Any] = {"rounds": self.rounds, "device": self.device, "hide_host": False, "notes": notes}
        samples = measure(right, task.call, before=task.before, until=until, **options)
        machine = Machine(gpu_uuid(self.device)) if self.device.type == "cuda" else None
        notes += disturbance(task.title, [sample.us for sample in samples.values()], machine)
        rows = []
        for one in right:
            if one.name in samples:
                sample, ours = samples[one.name], samples.get(counterpart(one.name))
                row = {"impl": one.name, **sample.columns(), **facts[one.name], **ratios(sample, ours)}
                row["host_us"] = self._host_us(task, one.model, row) if counts else None
                rows.append({**row, **dict.fromkeys(COUNTS)})
        return rows

    def _host_us(self, task: Task, model: nn.Module, row: Row) -> float:
        """The host's own time for a call: without waiting for room in the GPU's queue."""
        brief = task.brief
        if self.device.type != "cuda" or brief is None or row["us"] < AHEAD * row["cpu_us"]:
            return float(row["cpu_us"])
        return host_us(functools.partial(brief.call, model), brief.before, self.device)

    def _counted(self, task: Task, model: nn.Module) -> Row:
        model.train(task.op == STEP)
        call = functools.partial(task.call, model)
        for _ in range(4):  # the first three find out what compiles ahead
            task.before()
            call()
        task.before()
        calls = host_calls(call)
        task.before()
        work = device_work(call, self.device)
        task.before()
        return {**work, "calls": calls}


def share_end(until: float, count: int) -> float:
    """The second at which the first of ``count`` ends that share the time until a second of the monotonic clock."""
    now = time.monotonic()
    return now + max(0.0, until - now) / count


def _told(progress: Callable[[str], None], begin: float, where: str, what: str) -> None:
    progress(f"{where}: {what} ({time.monotonic() - begin:.0f} s)")


def with_liger(base: nn.Module, model_type: str, peers: Peers) -> contextlib.AbstractContextManager[None]:
    """Liger's kernels in ``base`` where ``peers`` has them, see :func:`~.liger.liger`."""
    if not peers.liger:
        return contextlib.nullcontext()
    from .liger import liger

    return liger(base, model_type)


def _able(names: Sequence[str], rank: int, *, named: bool, notes: list[str]) -> list[str]:
    """The implementations that run at this rank."""
    if named or rank <= AXOLOTL_RANK or AXOLOTL_DORA not in names:
        return list(names)
    notes.append(
        f"{AXOLOTL_DORA} left out at r={rank}: its norm kernel is unrolled over the rank and compiles for minutes "
        f"(--impl {AXOLOTL_DORA} runs it all the same)"
    )
    return [name for name in names if name != AXOLOTL_DORA]


def _only(names: Sequence[str], able: Sequence[str], what: str) -> tuple[str, ...]:
    """Those of ``names`` that can do it.

    Raises:
        UsageError: none.
    """
    found = tuple(name for name in able if name in names)
    if not found:
        raise UsageError(f"{what} runs {', '.join(able)}, not {', '.join(names)}")
    return found
