"""Training steps on several GPUs: each contender under DDP, or under FSDP2 with every decoder layer sharded as a block.

One process for each GPU. Every contender has parameters of its own that are trained, since each wrapper changes them;
the frozen ones are shared until FSDP2 makes its shards. On CPUs (gloo) the times mean nothing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import ProcessException, spawn

from ..errors import DoratuneError, UsageError
from .adapted import MODES, WARM_UPS, Contender, activate, measure, ratios, touch, with_dora
from .measuring import left_out
from .results import OURS, Outcome, Row
from .shapes import TARGETS, random_model, read_model_config
from .tasks import STEP, Request, whole_sequences

DDP, FSDP2 = "ddp", "fsdp2"
PARALLEL = (DDP, FSDP2)
PARALLEL_IMPLEMENTATIONS = ("peft_lora", "peft_dora", OURS)

_LIMIT = timedelta(seconds=180)
"""Longest wait for another process, which may be compiling its kernels."""


@dataclass(frozen=True)
class Parallel:
    """What the processes measure, as in ``bench_model``; each process has ``batch`` sequences of its own."""

    how: str
    processes: int
    implementations: tuple[str, ...]
    shape: str
    config: str | None
    layers: int | None
    rank: int
    mode: str
    batch: int
    seq: int
    loss_tokens: int
    checkpointing: bool
    rounds: int
    device: str  # cuda or cpu, without a number


def bench_parallel(requests: Collection[Parallel], *, progress: Callable[[str], None] = lambda line: None) -> Outcome:
    """Time training steps in as many processes as each request says, in turn, on the clock of the first.

    A step is forward and backward on a batch of the process's own, with what the wrapper exchanges; no optimizer.

    Raises:
        UsageError: there are fewer GPUs than processes, or a process failed.
    """
    outcome = Outcome()
    for request in requests:
        seen = torch.cuda.device_count()
        if request.device == "cuda" and seen < request.processes:
            raise UsageError(
                f"--parallel {request.how} needs {request.processes} GPUs and PyTorch sees {seen}; "
                "--device cpu tries the command out on a small --config"
            )
        progress(f"{request.how} in {request.processes} processes, r={request.rank}, {request.mode}")
        with tempfile.TemporaryDirectory(prefix="doratune-parallel-") as folder:
            found = Path(folder, "rows.json")
            try:
                spawn(_process, args=(request, _free_port(), str(found)), nprocs=request.processes)
            except ProcessException as failure:
                last = str(failure).strip().splitlines()[-1]
                raise UsageError(f"--parallel {request.how}: a process failed: {last}") from failure
            result = json.loads(found.read_text(encoding="utf-8"))
        outcome.rows += result["rows"]
        outcome.notes += result["notes"]
    return outcome


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _process(index: int, request: Parallel, port: int, found: str) -> None:
    """One of the processes; the first writes its rows and notes to the file ``found``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(index), LOCAL_RANK=str(index))
    os.environ["WORLD_SIZE"] = str(request.processes)
    device = torch.device("cuda", index) if request.device == "cuda" else torch.device(request.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    own = device if device.type == "cuda" else None
    distributed.init_process_group("nccl" if own else "gloo", timeout=_LIMIT, device_id=own)
    try:
        rows, notes = _measure(index, request, device)
        if index == 0:
            Path(found).write_text(json.dumps({"rows": rows, "notes": notes}), encoding="utf-8")
    finally:
        distributed.destroy_process_group()


def _measure(index: int, request: Parallel, device: torch.device) -> tuple[list[Row], list[str]]:
    name, config = read_model_config(request.shape, Path(request.config) if request.config else None, request.layers)
    mode = MODES[request.mode]
    adapted = with_dora(random_model(config, device), mode, rank=request.rank, targets=TARGETS)
    if request.checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    notes: list[str] = []
    running = []
    for impl in request.implementations:
        try:
            with contextlib.redirect_stderr(sys.stderr if index == 0 else io.StringIO()):  # one report is enough
                running.append(Contender(impl, wrapped(impl, adapted, request.how, device)))
        except (
            ImportError,
            DoratuneError,
            RuntimeError,
            ValueError,
            TypeError,
        ) as failure:  # the same in every process
            notes.append(left_out(impl, failure))
    wanted = Request(request.batch, request.seq, request.loss_tokens, request.checkpointing)
    task = whole_sequences(STEP, wanted, config, mode, adapted, device, seed=index)
    touches = [touch(one.model.parameters()) for one in running]

    def before() -> None:
        for one in touches:
            one()
        distributed.barrier()

    losses: dict[str, float] = {}
    for one in running:
        one.model.train()
        before()
        losses[one.name] = _mean(task.call(one.model), request.processes)
    samples = measure(
        running,
        task.call,
        before=before,
        rounds=request.rounds,
        device=device,
        hide_host=False,
        notes=notes,
        most_warm_ups=WARM_UPS,
    )
    facts: Row = {
        "bench": "model",
        "model": name,
        "rank": request.rank,
        "dtype": "bf16",
        "adapter": mode.adapter,
        **task.facts,
        "flags": [*task.facts["flags"], request.how, f"processes={request.processes}"],
    }
    rows: list[Row] = []
    for impl, sample in samples.items():
        stock = losses.get("peft_lora" if impl == "peft_lora" else "peft_dora")
        distance = abs(losses[impl] - stock) / abs(stock) if stock and not impl.startswith("peft") else None
        accuracy = {"loss": losses[impl], "loss_err": distance, "rel_err": None, "complaint": None}
        rows.append({**facts, "impl": impl, **sample.columns(), **accuracy, **ratios(sample, samples.get(OURS))})
    return rows, notes


def wrapped(impl: str, adapted: nn.Module, how: str, device: torch.device) -> nn.Module:
    """The implementation ``impl`` on a copy of ``adapted`` with its own trained parameters, under DDP or FSDP2."""
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    model = copy.deepcopy(adapted, {id(tensor): tensor for tensor in (*frozen, *adapted.buffers())})
    activate(impl, model)
    if how == DDP:
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers."""
    lists = [module for name, module in model.named_modules() if name.endswith(".layers")]
    return [block for layers in lists for block in layers.children()]


def _mean(loss: Any, processes: int) -> float:
    total = loss.detach().float().clone()
    distributed.all_reduce(total)
    return float(total) / processes
