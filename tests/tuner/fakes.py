"""A search without a compiler or a GPU: candidates "compile" at once and cost what a formula says.

Run as a script, it is a tuning run for the tests to kill; it logs every evaluation, a line each, in the folder given.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from doratune.cache.entry import MEASURED, Binary, Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.codegen.cost import floor_us
from doratune.codegen.gpu import Gpu, find_gpu
from doratune.codegen.module import declared_kernels
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner import search
from doratune.tuner.evaluation import Evaluator, FinalTimes, Resources

Cost = Callable[[KernelSpec, Config], float]
GPU = find_gpu("h200")
COMPILED = (Resources("fake_kernel", 64, 0, 1024, 4),)


def entry_of(spec: KernelSpec, config: Config, provenance: str) -> Entry:
    """An entry of a config that took twice the floor."""
    source, least = render(spec, config), floor_us(spec, find_gpu(spec.gpu))
    return Entry(
        spec=spec,
        config=config,
        template_digest=template_digest(spec.op, config.variant),
        source_digest=source.digest,
        source=source.text,
        evaluation=Evaluation(provenance, us=2.0 * least, floor_us=least, trials=24),
        environment=Environment(gpu=spec.gpu, architecture=find_gpu(spec.gpu).architecture, triton="3.7.1"),
    )


class FakePool:
    """Stands in for the compile pool; ``crashing`` names configs whose compile fails, ``submitted`` what came."""

    crashing: Callable[[Config], Exception | None] = staticmethod(lambda config: None)

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.jobs = 1

    def start(self) -> None:
        pass

    def submit(self, source: Source) -> Future[tuple[Resources, ...]]:
        future: Future[tuple[Resources, ...]] = Future()
        error = type(self).crashing(source.config)
        if error is None:
            future.set_result(COMPILED)
        else:
            future.set_exception(error)
        return future

    def binaries(self, source: Source) -> Future[tuple[Binary, ...]]:
        future: Future[tuple[Binary, ...]] = Future()
        error = type(self).crashing(source.config)
        if error is None:
            names = declared_kernels(source)
            future.set_result(tuple(Binary(source.code_digest, name, "0.0", "sm_90", "{}", b"cubin") for name in names))
        else:
            future.set_exception(error)
        return future

    def wait(self, futures: Collection[Future[tuple[Resources, ...]]], seconds: float = 0.0) -> None:
        wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeEvaluator(Evaluator):
    """Costs by ``cost``; keeps what it evaluated in order, and in ``log`` when given."""

    provenance = MEASURED

    def __init__(self, cost: Cost, log: Path | None = None, pause: float = 0.0) -> None:
        self.gpu = GPU
        self.cost = cost
        self.log = log
        self.pause = pause
        self.evaluated: list[tuple[KernelSpec, Config]] = []
        self.closed = False
        self.finals: list[list[Config]] = []
        self.fusion: Callable[[Source, Source], tuple[float, float] | None] = lambda fused, composition: None

    def fusion_times(self, fused: Source, composition: Source) -> tuple[float, float] | None:
        return self.fusion(fused, composition)

    def environment(self) -> Environment:
        return Environment(gpu="h200", architecture="sm_90", triton="0.0", gpu_name="fake")

    def evaluate(self, source: Source, compiled: Sequence[Resources]) -> Evaluation:
        self.evaluated.append((source.spec, source.config))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{source.spec} {source.config}\n")
        time.sleep(self.pause)
        us = self.cost(source.spec, source.config)
        return Evaluation(MEASURED, us=us, floor_us=floor_us(source.spec, GPU), samples_us=(us, us))

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        """Times without noise."""
        self.finals.append([source.config for source in sources])
        return FinalTimes(tuple((self.cost(source.spec, source.config),) * 8 for source in sources), settled=True)

    def close(self) -> None:
        self.closed = True


def steps_from(target: Config) -> Callable[[KernelSpec, Config], float]:
    """A cost far off the floor with one optimum: 2 % more for each doubling that a parameter is off ``target``."""

    def cost(spec: KernelSpec, config: Config) -> float:
        wanted, given = target.to_dict(), config.to_dict()
        if wanted.pop("variant") != given.pop("variant"):
            return 20_000.0
        return 10_000.0 * (1.0 + 0.02 * sum(abs(math.log2(given[name] / value)) for name, value in wanted.items()))

    return cost


FORWARD = Config.create("tile", block_t=2, block_n=128, num_warps=1, num_stages=2)


def forward_spec(tokens: int, d_out: int = 4096) -> KernelSpec:
    return KernelSpec.create("compose_forward", d_out=d_out, tokens=tokens, dtype="bf16", gpu="h200")


SPECS = [forward_spec(tokens) for tokens in (1024, 2048, 4096)]
TRIALS = 12


def run(folder: Path) -> None:
    search.CompilePool = FakePool  # type: ignore[misc, assignment]
    with Store.open(folder / "store.sqlite", create=True) as store:
        result = search.tune(
            SPECS,
            evaluators=[FakeEvaluator(steps_from(FORWARD), folder / "log", pause=0.05)],
            store=store,
            gpu=GPU,
            trials=TRIALS,
            study_storage=f"sqlite:///{folder / 'studies.sqlite'}",
        )
    print(json.dumps({"stopped": result.stopped, "outcomes": [row.outcome for row in result.rows]}))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
