"""How long the first training step takes in a process that has just started: kernels are compiled or loaded in it.

Each contender runs in a child process of its own, first with empty folders for what is compiled (Triton's, Inductor's
and the driver's caches) and for doratune's store of the user, then in another process with what the first has left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache.stack import HOME_VARIABLE, PATH_VARIABLE
from ..errors import DoratuneError, UsageError
from ..runtime.no_jit import no_jit
from .adapted import MODES, Peers, activate, bench_device, with_dora
from .results import OURS, Outcome, Row, case_of
from .shapes import TARGETS, random_model, read_model_config
from .tasks import FIRST_STEP, STEP, Request, whole_sequences

FIRST_STEP_IMPLEMENTATIONS = ("peft_lora", "peft_dora", OURS)
COLD, WARM, STORE = "cold", "warm", "store"
"""Nothing is compiled yet; the same again, with what the first process has left; with a store that is given."""

_LIMIT_S = 600.0
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "driver"}


@dataclass(frozen=True)
class FirstStep:
    """What a child process measures."""

    impl: str
    shape: str
    config: str | None
    layers: int | None
    rank: int
    mode: str
    batch: int
    seq: int
    loss_tokens: int
    checkpointing: bool
    device: str


def bench_first_step(
    requests: Collection[FirstStep],
    *,
    store: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run each request cold, warm, and cold with a ``store`` (whose kernels may have binaries), in a process each.

    Where ``DORATUNE_NO_JIT`` is set, with the store alone.

    ``us`` of a row is the time from the end of ``accelerate`` to the end of the first step, ``accelerate_us`` that of
    ``accelerate``, ``second_us`` that of the second step.
    """
    outcome = Outcome()
    for request in requests:
        with tempfile.TemporaryDirectory(prefix="doratune-first-step-") as folder:
            first = Path(folder, "a")
            states: list[tuple[str, Path, Path | None]] = [(COLD, first, None), (WARM, first, None)]
            if store is not None and no_jit():
                states = []  # without the store nothing could run
            if store is not None:
                states.append((STORE, Path(folder, "b"), store.absolute()))
            for state, home, stores in states:
                begin = time.monotonic()
                progress(f"first step of {request.impl}, r={request.rank}, {request.mode}, {state}")
                try:
                    row = {**_row(request, state), **_in_child(request, home, stores)}
                except DoratuneError as failure:
                    outcome.notes.append(f"first step of {request.impl}, {state}, left out: {failure}")
                    continue
                outcome.rows.append(row)
                told = f"{row['us'] / 1e6:.2f} s after {row['accelerate_us'] / 1e6:.2f} s of accelerate"
                progress(f"{told}, in a process of {time.monotonic() - begin:.0f} s")
    _add_ratios(outcome.rows)
    return outcome


def _add_ratios(rows: list[Row]) -> None:
    """doratune's time over each peer's in the same state of the caches."""
    ours = {case_of(row): row["us"] for row in rows if row["impl"] == OURS}
    for row in rows:
        if row["impl"] != OURS and case_of(row) in ours:
            row["ratio"] = ours[case_of(row)] / row["us"]


def _row(request: FirstStep, state: str) -> Row:
    name, config = read_model_config(request.shape, Path(request.config) if request.config else None, request.layers)
    mode = MODES[request.mode]
    flags = [*mode.flags, *(["checkpointing"] if request.checkpointing else [])]
    flags += [f"batch={request.batch}"] if request.batch > 1 else []
    return {
        "bench": "model",
        "model": name,
        "op": FIRST_STEP,
        "shape": [config.num_hidden_layers, request.seq],
        "rank": request.rank,
        "dtype": "bf16",
        "adapter": mode.adapter,
        "flags": [*flags, state],
        "impl": request.impl,
        "floor_us": None,
        "rel_err": None,
        "complaint": None,
        "peak_mb": None,
    }


def _in_child(request: FirstStep, home: Path, store: Path | None) -> Row:
    """The measurements of a process whose caches are in ``home``.

    Raises:
        UsageError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(asdict(request))],
        env=_environment(os.environ, home, store),
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"its process ended with code {done.returncode}: {last}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _environment(inherited: Mapping[str, str], home: Path, store: Path | None) -> dict[str, str]:
    """Of the child: nothing compiled and no store of the user but what is in ``home``, and ``store``."""
    variables = {name: value for name, value in inherited.items() if name != PATH_VARIABLE}
    for name, folder in {**_CACHES, HOME_VARIABLE: "doratune"}.items():
        path = home / folder
        path.mkdir(parents=True, exist_ok=True)
        variables[name] = str(path)
    return variables if store is None else {**variables, PATH_VARIABLE: str(store)}


def main() -> None:
    """Measure the request in the command line, and print the fields of its row as JSON."""
    print(json.dumps(measure_first_step(FirstStep(**json.loads(sys.argv[1])))))


def measure_first_step(request: FirstStep) -> Row:
    """Make the model and its adapters, then time ``accelerate`` (or what puts another contender in) and two steps."""
    device = bench_device(request.device)
    _, config = read_model_config(request.shape, Path(request.config) if request.config else None, request.layers)
    mode = MODES[request.mode]
    model = with_dora(random_model(config, device), mode, rank=request.rank, targets=TARGETS)
    if request.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    wanted = Request(request.batch, request.seq, request.loss_tokens, request.checkpointing)
    task = whole_sequences(STEP, wanted, config, mode, model, device)
    accelerate_us = _wall_us(lambda: activate(request.impl, model, Peers()), device)
    steps = []
    for _ in range(2):
        task.before()
        steps.append(_wall_us(lambda: task.call(model), device))
    return {
        "us": steps[0],
        "us_p20": steps[0],
        "us_p80": steps[0],
        "cpu_us": None,
        "accelerate_us": accelerate_us,
        "second_us": steps[1],
    }


def _wall_us(call: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    begin = time.perf_counter()
    call()
    _finish(device)
    return 1e6 * (time.perf_counter() - begin)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
