"""A user's stores, studies and results files as reports read them: measured winners with finals, and their searches."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from doratune.cache.entry import MEASURED, PREDICTED, SEARCH, Contender, Entry, Environment, Evaluation, Final
from doratune.cache.store import Store
from doratune.codegen.cost import floor_us
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner.space import Space
from doratune.tuner.studies import KernelStudy, study_name
from doratune.tuner.study_storage import open_study_storage, release

GPU = "h200"
HOSTILE = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"
"""A driver's name for a GPU, as a store from anybody may have it."""

ENVIRONMENT = Environment(GPU, "sm_90", "3.7.1", torch="2.13.0", driver="580.1", gpu_name=HOSTILE, doratune="0.1.0")
ROUNDS = 9


def specs() -> list[KernelSpec]:
    """Kernels of a layer at several sizes."""
    made = [
        KernelSpec.create("lora_compose", d_out=d_out, rank=16, tokens=tokens, dtype="bf16", adapter="bf16", gpu=GPU)
        for d_out in (1024, 4096)
        for tokens in (16, 4096)
    ]
    made += [
        KernelSpec.create("compose_backward", d_out=d_out, tokens=4096, dtype="bf16", gpu=GPU) for d_out in (1024, 4096)
    ]
    made.append(KernelSpec.create("weight_norm", d_out=4096, d_in=4096, rank=16, dtype="bf16", adapter="bf16", gpu=GPU))
    return made


def entry(spec: KernelSpec, *, over: float = 1.4, gain: float | None = 1.06, provenance: str = MEASURED) -> Entry:
    """A winner that takes ``over`` times its floor. ``gain``: what ran before takes so many times as long in its final;
    1 if it won, None if there was no final."""
    gpu = find_gpu(spec.gpu)
    config, other = Space(spec, gpu).seeds[:2]
    floor = floor_us(spec, gpu)
    us = over * floor
    chance = random.Random(str(spec))
    rounds = [us * chance.uniform(0.99, 1.01) for _ in range(ROUNDS)]
    final = None
    if gain is not None:
        stayed = gain == 1.0
        won = Contender(config, ("exact",) if stayed else (SEARCH,), tuple(rounds))
        factor = 1.1 if stayed else gain
        beaten = Contender(
            other,
            (SEARCH,) if stayed else ("nearest",),
            tuple(factor * one * chance.uniform(0.985, 1.015) for one in rounds),
        )
        final = Final((won, beaten), 0.998, 0.003, True, ("clocks fell by 3 % during the final",))
    environment = replace(ENVIRONMENT, gpu_name=HOSTILE if provenance == MEASURED else "")
    evaluation = Evaluation(provenance, us=us, floor_us=floor, samples_us=tuple(rounds), error=1e-3, trials=12)
    source = render(spec, config)
    digest = template_digest(spec.op, config.variant)
    return Entry(spec, config, digest, source.digest, source.text, evaluation, environment, final=final)


def write_store(path: Path, entries: Sequence[Entry]) -> str:
    """A store with these entries."""
    with Store.open(path, create=True) as store:
        store.put_all(entries)
    return str(path)


def usual_entries() -> list[Entry]:
    """Winners that gained, one that stayed, one that lost within the noise, and a predicted one."""
    first, second, third, fourth, *rest = specs()
    return [
        entry(first, over=3.0, gain=1.25),
        entry(second, over=1.2, gain=1.0),
        entry(third, over=2.0, gain=0.99),
        entry(fourth, over=1.1, gain=1.02),
        *(entry(spec, over=1.5, gain=1.06) for spec in rest[:-1]),
        entry(rest[-1], over=4.0, gain=None, provenance=PREDICTED),
    ]


def write_studies(path: Path, searched: Sequence[KernelSpec], *, trials: int = 14) -> str:
    """A storage with a search of each spec, as the tuner records them; every fifth config was rejected."""
    storage = open_study_storage(str(path))
    for spec in searched:
        space = Space(spec, find_gpu(spec.gpu))
        name = study_name(space, ENVIRONMENT, MEASURED)
        study = KernelStudy(space, storage, name, seeds=space.seeds, floor_us=0.0, sampler=_at_random)
        chance = random.Random(str(spec))
        for number in range(trials):
            seed = space.seeds[number] if number < len(space.seeds) else None
            candidate = study.propose(seed) if seed is not None else study.ask(lambda config: None)
            if candidate is None:
                continue
            if number % 5 == 4:
                study.reject(candidate, "error 0.5 where 0.01 is allowed")
            else:
                us = _time(candidate.config, chance)
                study.accept(candidate, Evaluation(MEASURED, us=us, samples_us=(us,)))
    release(storage)
    return str(path)


def _at_random(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _time(config: Config, chance: random.Random) -> float:
    """A time to which the warps matter most."""
    return 10.0 + 3.0 * abs(config.num_warps - 4) + 0.5 * config.num_stages + chance.uniform(0.0, 0.2)


def row(impl: str, us: float, **fields: Any) -> dict[str, Any]:
    """A row of a results file of ``doratune bench kernels``."""
    made = {"bench": "kernels", "op": "lora_compose", "shape": [4096, 4096], "rank": 16, "dtype": "bf16"}
    return {**made, "adapter": "bf16", "flags": [], "impl": impl, "us": us, **fields}


def usual_rows() -> list[dict[str, Any]]:
    """Two cases of a kernel with a peer, and a peer alone."""
    return [
        row("doratune", 10.0),
        row("peft_eager", 25.0, ratio=0.4, ratio_p20=0.38, ratio_p80=0.5),
        row("doratune", 4.0, shape=[16, 4096]),
        row(f"{HOSTILE} peer", 3.0, shape=[16, 4096]),
        row("peft_eager", 7.0, shape=[1, 4096]),
    ]


def step_row(us: float, **fields: Any) -> dict[str, Any]:
    """The row of a measured training step of llama-8b."""
    given = {"bench": "model", "op": "step", "model": "llama-8b", "shape": [32, 4096], "flags": ["checkpointing"]}
    return row("doratune", us, **{**given, **fields})


def coverage_rows() -> list[dict[str, Any]]:
    """Rows of ``doratune bench coverage``."""
    shares = {"exact": 0.25, "bounded": 0.25, "bound > 10 %": 0.0, "no bound": 0.5}
    given = {"bench": "coverage", "op": "coverage", "shape": [], "rank": None, "dtype": ""}
    return [{**given, "impl": op, "kernels": 40, **shares} for op in ("all", "lora_compose")]


def write_results(path: Path, rows: Sequence[dict[str, Any]], gpu: str = "NVIDIA H200") -> Path:
    """A results file."""
    env = {"gpu": gpu, "driver": "580.1", "torch": "2.13.0", "doratune_commit": "0123abc", "date": "2026-11-24"}
    path.write_text(json.dumps({"schema": 1, "env": env, "rows": rows}))
    return path
