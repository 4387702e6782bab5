"""Winners from before an upgrade, and a GPU on which some configs have changed places since.

Run as a script, it is a run of ``cache drift --apply`` for the tests to kill; it logs every evaluation in the folder
given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from doratune.cache.entry import MEASURED, SEARCH, Contender, Entry, Environment, Evaluation, Final
from doratune.cache.store import Store
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import Config, KernelSpec
from doratune.errors import DoratuneError
from doratune.tuner import drift
from doratune.tuner.evaluation import ContenderFailed, FinalTimes

from .fakes import FORWARD, SPECS, FakeEvaluator, FakePool

ONE = SPECS[0]
SECOND = Config.create("tile", block_t=4, block_n=128, num_warps=1, num_stages=2)
THIRD = Config.create("tile", block_t=8, block_n=128, num_warps=1, num_stages=2)
CONFIGS = (FORWARD, SECOND, THIRD)
BEFORE = Environment("h200", "sm_90", "3.6.0", "2.12.0", "550.54", "NVIDIA H200", "0.1.0")
UPGRADES = {
    "Triton": replace(BEFORE, triton="3.7.1"),
    "PyTorch": replace(BEFORE, torch="2.13.0"),
    "driver": replace(BEFORE, driver="580.1"),
    "GPU": replace(BEFORE, gpu_name="NVIDIA H200 NVL"),
}
AFTER = UPGRADES["driver"]

Times = dict[Config, float]
SAME: Times = {FORWARD: 100.0, SECOND: 102.0, THIRD: 110.0}
"""Microseconds as they were when the winners were found."""
SWAPPED: Times = {FORWARD: 105.0, SECOND: 100.0, THIRD: 110.0}
"""The runner-up has become the fastest by 5 %."""
ROUNDS = 12


class Machine(FakeEvaluator):
    """A GPU on which configs take ``times``, under the versions ``here``; ``faults`` are raised for a config."""

    def __init__(self, times: Times, here: Environment = AFTER, **options: Any) -> None:
        super().__init__(lambda spec, config: times.get(config, 200.0), **options)
        self.here = here
        self.finals: list[tuple[Config, ...]] = []
        self.faults: dict[Config, Exception] = {}
        self.late: dict[Config, DoratuneError] = {}
        """What a config does in a final only."""
        self.notices: tuple[str, ...] = ()
        self.settled = True

    def environment(self) -> Environment:
        return self.here

    def evaluate(self, source: Source, compiled: Sequence[Any]) -> Evaluation:
        evaluation = super().evaluate(source, compiled)
        if source.config in self.faults:
            raise self.faults[source.config]
        return evaluation

    def final(self, sources: Sequence[Source]) -> FinalTimes:
        configs = tuple(source.config for source in sources)
        self.finals.append(configs)
        for place, config in enumerate(configs):
            if config in self.late:
                raise ContenderFailed(place, self.late[config])
        # The clocks move from round to round, for all alike; each sample is off by up to 0.1 %.
        samples = tuple(
            tuple(
                self.cost(source.spec, source.config)
                * (1 + 0.01 * (i % 3))
                * (1 + 0.0005 * ((7 * i + 3 * place) % 5 - 2))
                for i in range(ROUNDS)
            )
            for place, source in enumerate(sources)
        )
        return FinalTimes(samples, self.settled, self.notices)


def an_entry(
    spec: KernelSpec = ONE, winner: Config = FORWARD, beaten: Sequence[Config] = (SECOND, THIRD), **changed: Any
) -> Entry:
    """The winner with the final that it won against ``beaten``; without any, an entry without a final."""
    source = render(spec, winner)
    contenders = [Contender(config, (SEARCH,), (SAME.get(config, 100.0),) * ROUNDS) for config in (winner, *beaten)]
    entry = Entry(
        spec=spec,
        config=winner,
        template_digest=template_digest(spec.op, winner.variant),
        source_digest=source.digest,
        source=source.text,
        evaluation=Evaluation(MEASURED, us=101.0, floor_us=50.0, samples_us=(101.0,), error=1e-3, trials=40),
        environment=replace(BEFORE, gpu=spec.gpu),
        created_at="2026-01-01T00:00:00+00:00",
        final=Final(tuple(contenders), 0.999, 0.003, True) if beaten else None,
        lookup_regret=1.1,
    )
    return replace(entry, **changed)


def nothing(spec: KernelSpec) -> None:
    """A lookup without any other entry or default."""


def run(folder: Path) -> None:
    drift.CompilePool = FakePool  # type: ignore[misc, assignment]
    with Store.open(folder / "store.sqlite") as store:
        drift.drift(store, Machine(SWAPPED, log=folder / "log", pause=0.2), without=nothing, apply=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
