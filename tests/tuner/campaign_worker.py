"""A worker of a campaign, for the tests to start in a process of its own, to stop and to kill.

It compiles nothing and measures nothing. It writes a line to the log before each evaluation, and the outcomes to a file
at the end. Imported by its bare name, so that the server which forks the workers can import it too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass

from fakes import FORWARD, GPU, FakeEvaluator, FakePool, forward_spec, steps_from

from doratune.cache.entry import Environment, Evaluation
from doratune.cache.store import Store
from doratune.errors import DoratuneError
from doratune.tuner import campaign, search, study_storage


@dataclass(frozen=True)
class Options:
    """``first`` and ``last`` number the shapes, in two token buckets each; ``pause`` seconds an evaluation; the
    heartbeat's ``interval`` and ``grace`` in seconds; ``host`` stands for a machine, "" for this one; the evaluation of
    the shape ``deadly`` kills the worker. ``folder`` is where it writes.
    """

    name: str
    url: str
    store: str
    folder: str
    first: int = 1
    last: int = 6
    trials: int = 6
    pause: float = 0.03
    interval: int = 1
    grace: int = 3
    host: str = ""
    gpu_name: str = "fake"
    deadly: int = 0


class LoggingEvaluator(FakeEvaluator):
    """Says in the log who evaluates what, and when."""

    def __init__(self, options: Options) -> None:
        super().__init__(steps_from(FORWARD), pause=options.pause)
        self.options = options

    def environment(self) -> Environment:
        return Environment(gpu="h200", architecture="sm_90", triton="0.0", gpu_name=self.options.gpu_name)

    def evaluate(self, source, compiled) -> Evaluation:  # type: ignore[no-untyped-def]
        line = json.dumps([self.options.name, time.time(), f"{source.spec} {source.config}"])
        with open(f"{self.options.folder}/log", "a") as file:
            file.write(line + "\n")
        if source.spec.d_out == 1024 * self.options.deadly:
            os._exit(9)
        return super().evaluate(source, compiled)


def run(options: Options) -> None:
    sys.stderr = open(f"{options.folder}/{options.name}.stderr", "w", buffering=1)  # noqa: SIM115
    os.environ["LOCAL_RANK"] = "0"  # as a launcher does: it is not alone
    search.CompilePool = FakePool  # type: ignore[misc, assignment]
    campaign.POLL_SECONDS = 0.2
    study_storage.HEARTBEAT.interval, study_storage.HEARTBEAT.grace = options.interval, options.grace
    if options.host:
        campaign.machine = lambda: options.host  # type: ignore[assignment]
    shapes = range(options.first, options.last + 1)
    specs = [forward_spec(tokens, 1024 * n) for n in shapes for tokens in (1024, 2048)]
    try:
        with Store.open(options.store, create=True) as store:
            result = search.tune(
                specs,
                evaluators=[LoggingEvaluator(options)],
                store=store,
                gpu=GPU,
                trials=options.trials,
                study_storage=options.url,
            )
    except DoratuneError as error:  # as the command line does
        sys.exit(str(error))
    rows = {str(row.spec): [row.outcome, row.note] for row in result.rows}
    with open(f"{options.folder}/{options.name}.json", "w") as file:
        json.dump({"stopped": result.stopped, "rows": rows}, file)
